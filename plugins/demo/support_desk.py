"""Runs `turnwise demo`, from random weights to a policy that beats its teachers.

1. A small Llama-architecture model and its tokenizer are built; the words come from the
   demonstrators' conversations.
2. `sft` on conversations of imperfect demonstrators: hasty ones, forgetful ones, a few careful
   ones.
3. `rl` from there, once by PPO and once by GRPO, on the customer's satisfaction at the end and
   nothing else. A small KL to the SFT policy keeps the language: the customer understands keywords,
   and without it the replies decay into strings of them.
4. All players on held-out stories, by sampling at temperature 1, as trained.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ...learning import InProcess, Policy, build_policy
from ...protocols import ConfigError, Episode, Sampling, starts
from ...running import (
    Display,
    EnvConfig,
    Plugins,
    PolicyPlayer,
    RLSettings,
    Run,
    Score,
    ScriptPlayer,
    Where,
    declared,
    draw_curves,
    make_parts,
    play_held_out,
    print_scores,
    printable,
    quiet,
    rollout,
    score,
    transcript,
)
from ...tools import install

ENV = "turnwise/SupportDesk-v0"
HELD_OUT = EnvConfig(id=ENV, options={"split": "held_out"})
MAX_NEW_TOKENS = 24
EVALUATION_SEED = 20_000

SFT: dict[str, Any] = {
    "env": ENV, "player": "demonstrator", "episodes": 8000, "epochs": 3, "batch_size": 32,
    "lr": 5e-3, "decay": 0.1,
    "weight_decay": 0.01, "micro_tokens": 16384, "steps_per_update": 50,
}  # fmt: skip
RL: dict[str, Any] = {
    "env": ENV,
    "updates": 80,
    "max_new_tokens": MAX_NEW_TOKENS,
    "backend": {"name": "in-process", "rows": 256},
}
PPO: dict[str, Any] = {
    **RL, "groups": 256, "group_size": 1, "credit": {"name": "gae", "lam": 0.95},
    "optimizer": {
        "name": "ppo", "lr": 2e-3, "kl": 0.02, "epochs": 1, "minibatches": 4, "warmup": 10,
        "decay": 0.1, "micro_tokens": 16384,
    },
}  # fmt: skip
GRPO: dict[str, Any] = {
    **RL, "groups": 32, "group_size": 8, "credit": "outcome",
    "optimizer": {"name": "grpo", "lr": 2e-3, "kl": 0.04, "minibatches": 2, "warmup": 10,
        "decay": 0.1, "micro_tokens": 16384},
}  # fmt: skip


def rl_stages(optimizer: str, credit: str) -> dict[str, dict[str, Any]]:
    """Returns the RL runs of the demo by name: PPO and GRPO, or one with the given optimizer and
    credit method.

    Raises:
        ConfigError, PluginError: there is no such part, or the two do not fit together.
    """
    if not optimizer and not credit:
        return {"ppo": PPO, "grpo": GRPO}
    plugins = Plugins()
    needs: frozenset[str] = (
        declared(plugins, "credit method", credit).needs if credit else frozenset()
    )
    name = optimizer or ("ppo" if "values" in needs else "grpo")
    known = {"ppo": PPO["optimizer"], "grpo": GRPO["optimizer"]}
    options = known.get(name, {"name": name, "lr": 2e-3})
    stage = {
        **(PPO if name == "ppo" and "group" not in needs else GRPO),
        "optimizer": options,
        "credit": credit or None,
    }
    if "branches" in needs:  # two continuations of every turn, of fewer conversations
        stage |= {"credit": {"name": credit, "rollouts": 2}, "groups": 8}
    make_parts(RLSettings(**stage), plugins)
    return {f"{name}-{credit}" if credit else name: stage}


def run_demo(
    folder: Path, *, seed: int = 0, quick: bool = False, optimizer: str = "", credit: str = ""
) -> dict[str, Any]:
    """Runs the demo and returns the summary that it writes to `summary.json`.

    Args:
        folder: replaced if it holds an earlier demo.
        quick: a few updates and held-out stories only.
        optimizer, credit: one RL run with these, by name, instead of PPO and GRPO.

    Raises:
        ConfigError: the folder holds something that is no demo.
        PluginError: there is no such optimizer or credit method.
    """
    quiet()
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"the demo draws its learning curves with matplotlib: {install('plots')}")
    stages = rl_stages(optimizer, credit)
    console = Console()
    prepare(folder, seed, quick)
    short = {"episodes": 300, "epochs": 1} if quick else {}
    few = {"updates": 2, "groups": 16} if quick else {}
    stories = 60 if quick else 400
    began, cpu = time.perf_counter(), time.process_time()
    seconds: dict[str, float] = {}

    console.print("[bold]1[/bold]  a small chat model, built on the spot")
    with _clocked(seconds, "build"):
        model = small_model(folder, seed)

    console.print("[bold]2[/bold]  sft: from imperfect demonstrations")
    with _clocked(seconds, "sft"):
        sft = play_run(folder, "sft", model, [{"sft": {**SFT, **short}}], seed)

    console.print(
        "[bold]3[/bold]  rl: from the outcome alone, by"
        f" {' and by '.join(name.upper() for name in stages)}"
    )
    runs: dict[str, Run] = {}
    for name, options in stages.items():
        begun = folder / "sft" / "policy"
        with _clocked(seconds, name):
            runs[name] = play_run(folder, name, begun, [{"rl": {**options, **few}}], seed)

    console.print(f"[bold]4[/bold]  everybody on {stories} held-out stories")
    with _clocked(seconds, "evaluate"):
        before = Policy.from_pretrained(folder / "sft" / "policy")
        policies = {"sft": before, **{name: done.policy for name, done in runs.items()}}
        played = _play_everybody(policies, stories)
        scores = {name: score(episodes) for name, episodes in played.items()}
    seconds["total"] = round(time.perf_counter() - began, 1)
    seconds["cpu"] = round(time.process_time() - cpu, 1)

    summary = {
        "seed": seed,
        "players": {name: asdict(scores[name]) for name in ("expert", "random", *policies)},
        "demonstrator": asdict(scores["demonstrator"]),
        "seconds": seconds,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    picture = _draw(folder, runs, scores, seed)
    _tell(console, scores, played, folder)
    _tell_effort(console, summary, sft, quick, picture)
    return summary


def _tell_effort(
    console: Console, summary: Mapping[str, Any], sft: Run, quick: bool, picture: Path
) -> None:
    """Prints where the results are and what they took."""
    if quick:
        console.print(
            "[bold]--quick: too few updates to learn anything; these numbers only show that"
            " everything runs.[/bold]"
        )
    console.print(f"Learning curves: {picture}   numbers: {picture.with_name('summary.json')}")
    seconds = summary["seconds"]
    runs = [name for name in seconds if name not in ("build", "evaluate", "total", "cpu")]
    console.print(
        f"{seconds['total']:.0f} s in all ({seconds['cpu']:.0f} CPU seconds);"
        f" {', '.join(f'{name} {seconds[name]:.0f} s' for name in runs)}. SFT's teachers"
        f" succeed in {sft.metrics[0]['demonstrations/success']:.0%} of their stories."
    )
    console.print(
        f"What next:  turnwise chat {sft.folder / 'policy'} --env turnwise/SupportDesk-v0   or "
        " examples/README.md, whose scripts take this policy"
    )


@contextlib.contextmanager
def _clocked(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Puts down how long something takes."""
    since = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - since, 1)


def _play_everybody(policies: Mapping[str, Policy], stories: int) -> dict[str, list[Episode]]:
    """Plays held-out stories with the scripts and with every policy."""
    played: dict[str, list[Episode]] = {}
    for name in ("expert", "random", "demonstrator"):
        played[name] = play_held_out(ScriptPlayer(name), HELD_OUT, stories, EVALUATION_SEED)
    for name, policy in policies.items():
        played[name] = play_held_out(policy_player(policy), HELD_OUT, stories, EVALUATION_SEED)
    return played


def _draw(folder: Path, runs: Mapping[str, Run], scores: Mapping[str, Score], seed: int) -> Path:
    """Draws the learning curves of the RL runs; lines stand for who does not learn in them."""
    curves = {
        name.upper(): [float(line["success"]) for line in done.metrics]
        for name, done in runs.items()
    }
    names = {"expert": "expert", "demonstrator": "teachers", "sft": "SFT", "random": "random"}
    return draw_curves(
        folder / "curves.png",
        curves,
        {label: scores[name].success for name, label in names.items()},
        ylabel="success in training",
        title=f"SupportDesk, reward at the end only (seed {seed})",
    )


def prepare(folder: Path, seed: int, quick: bool) -> None:
    """Empties a folder for a demo; an earlier demo in it is replaced.

    Raises:
        ConfigError: it holds something that is no demo.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "demo.json").exists():
            raise ConfigError(f"{folder} holds something else than a demo: choose another --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps({"seed": seed, "quick": quick}) + "\n")


def small_model(folder: Path, seed: int) -> Path:
    """Builds the small chat model from the demonstrators' words."""
    episodes = rollout(
        ScriptPlayer("demonstrator"),
        [(s, 0) for s in starts(ENV, seed, 1500)],
        Where("demo", "words", 0, seed),
    )
    texts = (m.content for e in episodes for m in e.messages)
    return build_policy(folder / "model", texts, seed=seed, hidden=64, layers=2, heads=4)


def play_run(
    folder: Path,
    name: str,
    policy: Path,
    stages: list[dict[str, Any]],
    seed: int,
    threads: int | None = None,
) -> Run:
    """Plays a run of the demo in a folder of its name; ends the demo when it is interrupted."""
    config = {
        "policy": str(policy), "stages": stages, "seed": seed, "name": name,
        "threads": threads or min(2, os.cpu_count() or 1),
        "checkpoint_every": 1000,
    }  # fmt: skip
    with Display(sys.stderr.isatty()) as display:
        done = Run(config, folder=folder / name, on_status=display.show).finish()
    if done.stopping:
        raise SystemExit(f"Stopped in {name}. Everything so far is in {folder}.")
    return done


def policy_player(policy: Policy, temperature: float = 1.0) -> PolicyPlayer:
    """Returns a player of the policy as it is evaluated here."""
    return PolicyPlayer(policy, Sampling(temperature, MAX_NEW_TOKENS), InProcess(policy, rows=256))


def _tell(
    console: Console, scores: dict[str, Score], played: dict[str, list[Episode]], folder: Path
) -> None:
    """Prints the table, and one conversation before and after: the first held-out story that SFT
    got wrong and the better policy right."""
    print_scores({name: asdict(each) for name, each in scores.items()})
    best = max(
        (name for name in played if name not in ("expert", "random", "demonstrator", "sft")),
        key=lambda n: scores[n].outcome,
    )
    pairs = list(zip(played["sft"], played[best], strict=True))
    before, after = next(
        ((a, b) for a, b in pairs if not a.success and b.success and len(b.turns) > 2), pairs[0]
    )
    page = (
        f"# The same story before and after\n\n## After SFT\n\n{transcript(before)}\n## After"
        f" {best.upper()}\n\n{transcript(after)}"
    )
    (folder / "before-after.md").write_text(page)
    for title, episode in (("before (SFT)", before), (f"after ({best.upper()})", after)):
        console.rule(title, align="left")
        for message in episode.messages[1:]:
            who = "customer" if message.role == "user" else "agent   "
            console.print(f"{who}  {printable(message.content)}", markup=False, highlight=False)
        console.print(f"satisfaction {episode.env_return:g}", style="bold")
    console.rule()
