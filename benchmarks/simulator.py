"""Does the index of `turnwise simulator check` say how well what is learned with simulated users
serves the true ones?

    python benchmarks/simulator.py --seeds 0 1 2 --out runs/bench-simulator   # about 12 minutes per
        seed on 1 core

SupportDesk's customers are the true users. A family of simulated ones is at a known distance from
them: so large a share of its customers is as users played by models are, who tell all at once, are
never annoyed, write politely and are content with whatever they get (Zhou et al. 2026,
arXiv:2603.11245); the others are true ones.

The index is computed as a user would: 300 conversations of the shop's staff (the demonstrators)
with simulated customers, against 300 others with true ones. The transfer is measured: the demo's
small chat model and its SFT, then GRPO with simulated customers alone, and the success of what has
learned on 400 held-out stories of true customers. The bar: the rank correlation (Spearman) of index
and transfer over the family, both averaged over seeds, is at least 0.8.

A seed whose `summary.json` is in --out already is not run again. Writes `results.json` and
`results.md` into --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import gymnasium
import turnwise
from scipy.stats import spearmanr
from turnwise.engine.analysis.scores import score
from turnwise.engine.pipeline.progress import quiet
from turnwise.engine.stages.evaluate import play_held_out
from turnwise.envs.support_desk import SYSTEM, THANKS, SupportDesk, relevant
from turnwise.judges.users.check import check
from turnwise.plugins.demo.support_desk import (
    EVALUATION_SEED,
    GRPO,
    HELD_OUT,
    SFT,
    play_run,
    policy_player,
    small_model,
)
from turnwise.protocols import Message, starts
from turnwise.running import ScriptPlayer, Where, rollout

DISTANCES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
CONVERSATIONS, STORIES = 300, 400
BAR = 0.8
CUSTOMERS = "bench/Customers-v0"


class Customers(SupportDesk):
    """SupportDesk's customers, a share of whom is as users played by models are."""

    def __init__(self, distance: float) -> None:
        self.distance = distance

    def reset(self, **given: Any) -> tuple[str, dict[str, Any]]:
        text, info = super().reset(**given)
        self.polite = self._rng.random() < self.distance
        if not self.polite:
            return text, info
        self._known = relevant(self.story.facts)
        self._patience = 100
        facts = " ".join(self.story.words[topic] for topic in sorted(self._known))
        return (
            f"Good day, I hope you are well! I am writing about my {self.story.item}. {facts} "
            "Thank you so much for your kind help!"
        ), {"system": SYSTEM, "optimum": 1.0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        text, reward, over, cut, info = super().step(action)
        if not self.polite:
            return text, reward, over, cut, info
        if not over:
            return f"Thank you for asking! {text}", reward, over, cut, info
        return f"{THANKS} You are wonderful!", 1.0, True, False, {**info, "success": True}


def conversations(env: str, kwargs: dict[str, Any], seed: int) -> list[tuple[Message, ...]]:
    """The staff's conversations with an environment's customers."""
    chosen = [(start, 0) for start in starts(env, seed, CONVERSATIONS, {}, kwargs)]
    where = Where("bench-simulator", "staff", 0, seed)
    return [e.messages for e in rollout(ScriptPlayer("demonstrator"), chosen, where, max_turns=12)]


def success(policy: Path) -> float:
    """With true customers, on held-out stories, by sampling at temperature 1, as trained."""
    player = policy_player(turnwise.Policy.from_pretrained(policy))
    return float(score(play_held_out(player, HELD_OUT, STORIES, EVALUATION_SEED)).success)


def one_seed(seed: int, folder: Path, updates: int) -> dict[str, Any]:
    done = folder / "summary.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "sft" / "policy").is_dir():
        play_run(folder, "sft", small_model(folder, seed), [{"sft": SFT}], seed, threads=1)
    start = folder / "sft" / "policy"
    recorded = conversations("turnwise/SupportDesk-v0", {}, 1000 + seed)
    found = []
    for distance in DISTANCES:
        kwargs = {"distance": distance}
        users = check(conversations(CUSTOMERS, kwargs, 2000 + seed), recorded)
        stage = {**GRPO, "env": {"id": CUSTOMERS, "kwargs": kwargs}, "updates": updates}
        config = {
            "policy": str(start), "seed": seed, "name": "simulator", "threads": 1,
            "checkpoint_every": 1000, "stages": [{"rl": stage}],
        }  # fmt: skip
        run = turnwise.Run(config, folder=folder / f"at-{distance:g}").finish()
        found.append({
            "distance": distance, "index": users.index, "low": users.low, "high": users.high,
            "aspects": dict(users.aspects), "simulated": run.metrics[-1]["success"],
            "transfer": success(run.folder / "policy"),
        })  # fmt: skip
    summary = {"seed": seed, "updates": updates, "sft": success(start), "family": found}
    done.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-simulator"))
    parser.add_argument("--updates", type=int, default=40)
    given = parser.parse_args()
    turnwise.Plugins()  # registers the environments
    gymnasium.register(CUSTOMERS, "simulator:Customers", max_episode_steps=12)
    quiet()
    found = [one_seed(seed, given.out / f"seed-{seed}", given.updates) for seed in given.seeds]
    lines = [
        (
            f"Command: `python benchmarks/simulator.py --seeds {' '.join(map(str, given.seeds))}"
            f" --updates {given.updates}`. Success after SFT:"
            f" {statistics.mean(s['sft'] for s in found):.3f}. Means over seeds, and their range."
        ),
        "",
        "| distance | index | success with simulated customers | success with true ones |",
        "| --- | --- | --- | --- |",
    ]
    means: dict[str, list[float]] = {"index": [], "transfer": []}
    for k, distance in enumerate(DISTANCES):
        rows = [s["family"][k] for s in found]
        cells = []
        for name in ("index", "simulated", "transfer"):
            values = [row[name] for row in rows]
            means.setdefault(name, []).append(statistics.mean(values))
            cells.append(f"{means[name][-1]:.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {distance:g} | {' | '.join(cells)} |")
    rank = float(spearmanr(means["index"], means["transfer"]).statistic)
    each = [
        float(
            spearmanr(
                [row["index"] for row in s["family"]], [row["transfer"] for row in s["family"]]
            ).statistic
        )
        for s in found
    ]
    held = rank >= BAR
    lines += [
        "",
        (
            f"- {'yes' if held else '**NO**'}: the rank correlation of index and transfer is"
            f" {rank:.2f}, at least {BAR} (of single seeds: {', '.join(f'{r:.2f}' for r in each)})"
        ),
    ]
    (given.out / "results.md").write_text("\n".join(lines) + "\n")
    (given.out / "results.json").write_text(
        json.dumps({"rank": rank, "ranks": each, "summaries": found}, indent=2) + "\n"
    )
    print("\n".join(lines))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
