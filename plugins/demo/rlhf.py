"""`turnwise demo --road`: the whole pipeline known as RLHF, on a laptop CPU.

Imperfect demonstrations -> SFT -> rankings by a simulated panel, mildly biased towards agents that
ask -> a reward model, an ensemble of it -> PPO against that under a KL penalty; for comparison,
GRPO on the true outcome. All policies then play the same held-out stories, where the truth is
known.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ...running import Run, print_scores, quiet, write_report
from .support_desk import (
    ENV,
    EVALUATION_SEED,
    GRPO,
    HELD_OUT,
    MAX_NEW_TOKENS,
    PPO,
    SFT,
    play_run,
    prepare,
    small_model,
)

BACKEND = {"name": "in-process", "rows": 256}
PANEL: dict[str, Any] = {
    "judge": "simulated-panel",
    "raters": 7,
    "noise": 0.5,
    "taste": 0.1,
    "bias": {"questions": 0.05},
}
RANK: dict[str, Any] = {
    "env": ENV, "updates": 15, "groups": 200, "group_size": 6, "max_new_tokens": MAX_NEW_TOKENS,
    "backend": BACKEND, "feedback": [PANEL],
}  # fmt: skip
REWARD_MODEL: dict[str, Any] = {
    "members": 2, "lr": 3e-3, "epochs": 6, "batch_size": 16, "held_out": 0.2, "micro_tokens": 8192,
    "steps_per_update": 100,
}  # fmt: skip
JUDGE = {"judge": "reward-model", "combine": "mean"}
PPO_RM: dict[str, Any] = {
    **PPO,
    "updates": 60,
    "feedback": [JUDGE],
    "optimizer": {**PPO["optimizer"], "kl": 0.05},
}


def run_road(
    folder: Path, *, seed: int = 0, quick: bool = False, threads: int | None = None
) -> dict[str, Any]:
    """Runs the road and returns the summary that it writes to `summary.json`.

    Args:
        folder: replaced if it holds an earlier demo.
        quick: few updates, rankings and stories only.
        threads: torch's; default: two.

    Raises:
        ConfigError: the folder holds something that is no demo.
    """
    quiet()
    console = Console()
    prepare(folder, seed, quick)
    few = {"updates": 2, "groups": 16} if quick else {}
    stories = 40 if quick else 400
    began, cpu = time.perf_counter(), time.process_time()
    seconds: dict[str, float] = {}

    def step(name: str, number: int, what: str, policy: Path, stages: list[dict[str, Any]]) -> Any:
        console.print(f"[bold]{number}[/bold]  {what}")
        since = time.perf_counter()
        done = play_run(folder, name, policy, stages, seed, threads)
        seconds[name] = round(time.perf_counter() - since, 1)
        return done

    console.print("[bold]1[/bold]  a small chat model, built on the spot")
    model = small_model(folder, seed)
    sft = folder / "sft" / "policy"
    short = {"episodes": 300, "epochs": 1} if quick else {}
    step("sft", 2, "sft: from imperfect demonstrations", model, [{"sft": {**SFT, **short}}])
    step("grpo", 3, "rl: GRPO on the true outcome, to compare with", sft, [{"rl": {**GRPO, **few}}])
    players = [
        "policy",
        {"name": "sft", "policy": str(sft)},
        {"name": "grpo", "policy": str(folder / "grpo" / "policy")},
    ]
    evaluate = {
        "env": HELD_OUT.model_dump(), "episodes": stories,
        "players": [*players, "demonstrator", "expert", "random"],
        "max_new_tokens": MAX_NEW_TOKENS, "seed": EVALUATION_SEED,
    }  # fmt: skip
    best_of = {"policy": str(sft), "judge": JUDGE, "n": [1, 4] if quick else [1, 4, 16]}
    road = step(
        "road",
        4,
        "rank -> reward-model -> rl: a simulated panel compares, a reward model learns from it, PPO"
        " learns from that",
        sft,
        [
            {"rank": {**RANK, **few}},
            {"reward-model": {**REWARD_MODEL, **({"epochs": 1} if quick else {})}},
            {"rl": {**PPO_RM, **few}},
            {"evaluate": evaluate | {"best_of": best_of}},
        ],
    )
    seconds["total"] = round(time.perf_counter() - began, 1)
    seconds["cpu"] = round(time.process_time() - cpu, 1)

    summary = _summary(road, seed, seconds)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    page = write_report(road.folder, folder / "report.html")
    _tell(console, folder, summary, page, quick)
    return summary


def _summary(road: Run, seed: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Returns who succeeded how often, how good the reward model is, and what each step took."""
    played = json.loads((road.folder / "evaluation.json").read_text())
    names = {
        "expert": "expert",
        "random": "random",
        "demonstrator": "demonstrator",
        "sft": "sft",
        "policy": "ppo-rm",
        "grpo": "grpo",
    }
    shown = {new: played[old] for old, new in names.items()} | {
        k: v for k, v in played.items() if k.startswith("best-of-")
    }
    learned = next(m for m in reversed(road.metrics) if m["stage"] == "reward-model")
    return {
        "seed": seed,
        "players": shown,
        "pairs": {k.replace("policy", "ppo-rm"): v for k, v in played.items() if "pairs" in v},
        "reward_model": {
            name: learned.get(f"held_out/{key}")  # none where too little was held out (--quick)
            for name, key in (
                ("pair_accuracy", "truth_accuracy"),
                ("rater_agreement", "rater_truth_agreement"),
                ("calibration_error", "calibration_error"),
                ("truth_pairs", "truth_pairs"),
                ("accuracy_on_raters", "accuracy"),
                ("raters_with_each_other", "rater_agreement"),
            )
        },
        "seconds": dict(seconds),
    }


def _tell(console: Console, folder: Path, summary: dict[str, Any], page: Path, quick: bool) -> None:
    """Prints the table, how good the reward model is, and how to go on."""
    print_scores(summary["players"] | {"ppo-rm - sft": summary["pairs"]["ppo-rm - sft"]})
    model, seconds = summary["reward_model"], summary["seconds"]
    if model["pair_accuracy"] is not None and model["rater_agreement"] is not None:
        console.print(
            f"Reward model: right about the truth in {model['pair_accuracy']:.1%} of"
            f" {model['truth_pairs']:,.0f} held-out pairs; single raters in"
            f" {model['rater_agreement']:.1%}. Calibration error {model['calibration_error']:.3f}."
        )
    if quick:
        console.print(
            "[bold]--quick: too little of everything to learn from; these numbers only show that it"
            " all runs.[/bold]"
        )
    steps = ", ".join(
        f"{name} {value:.0f} s" for name, value in seconds.items() if name not in ("total", "cpu")
    )
    console.print(
        f"{seconds['total']:.0f} s in all ({steps}). Report: {page}   numbers:"
        f" {folder / 'summary.json'}"
    )
    console.print(
        f"To go on: turnwise chat {folder / 'road' / 'policy'} --env {ENV}", soft_wrap=True
    )
