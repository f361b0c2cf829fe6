"""Runs `turnwise demo --real`: a pretrained chat model, SmolLM2-135M-Instruct, trained by RL on the
outcome alone, without a single demonstration.

Each task is a pipeline of `rl` and `evaluate` in a folder of its own; started again, it goes on
where it was stopped. The model as it came and the one that was trained play the same starts of
other seeds than those that trained: held-out questions and stories, and the same 20 numbers. Two
numbers say whether it still speaks: the share of replies that are whole, and what the model as it
came thinks of their tokens.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ...learning import Policy, make_batch, peak_memory
from ...protocols import ConfigError, Episode, Rewards
from ...running import (
    KNOWN,
    Display,
    Run,
    fetch,
    open_ledger,
    print_scores,
    printable,
    quiet,
    transcript,
)
from ...tools import install

MODEL = "smollm2-135m"
STARTS = 200
EVALUATION_SEED = 20_000
TEMPERATURE = 0.8
# A reply that begins like a sentence, a number or a move in brackets, and ends like one.
WHOLE = re.compile(r"\s*[\"'(\[*-]*[A-Z0-9].*[.!?0-9\])\"'*]\s*", re.DOTALL)
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
RL: dict[str, Any] = {
    "groups": 6, "group_size": 8, "temperature": TEMPERATURE,
    "optimizer": {
        "name": "grpo", "lr": 5e-4, "decay": 0.2, "warmup": 2, "kl": 0.0, "micro_tokens": 384,
    },
    # Where nearly all groups have no signal any more, AdamW makes full steps of what noise is left.
    "gold": {"episodes": 48, "every": 4, "patience": 3},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """A task of the demo.

    Attributes:
        what: it is, in a line.
        env: the environment it trains on.
        held_out: reset options that its held-out starts have more.
        tokens: of the longest reply.
        updates: of the policy.
        players: of the environment, to compare with.
        rows: conversations that are played at a time; each keeps a cache.
    """

    what: str
    env: Mapping[str, Any]
    tokens: int
    updates: int
    held_out: Mapping[str, Any] = field(default_factory=dict)
    players: tuple[str, ...] = ()
    rows: int = 24


TASKS: Mapping[str, Task] = {
    "guess": Task(
        "TextArena's GuessTheNumber: 1 to 20, at most ten guesses, told higher or lower",
        {"id": "textarena/GuessTheNumber-v0", "kwargs": {"wins_only": True}},
        tokens=16,
        updates=8,
        players=("expert", "random"),
        rows=16,
    ),
    "sums": Task(
        "reasoning-gym's chain_sum: a sum, three tries, a hint after each wrong one",
        {
            "id": "reasoning-gym/chain_sum",
            "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        },
        tokens=16,
        updates=24,
        held_out={"split": "held_out"},
        players=("random",),
    ),
    "desk": Task(
        "SupportDesk: find out what a customer needs, in words of its own",
        {"id": "turnwise/SupportDesk-v0"},
        tokens=24,
        updates=20,
        held_out={"split": "held_out"},
        players=("expert", "random"),
    ),
}


def pipeline(name: str, model: str, seed: int, quick: bool) -> dict[str, Any]:
    """Returns the config of a task's run."""
    task = TASKS[name]
    few: dict[str, Any] = {}
    if quick:
        few = {"updates": 1, "groups": 2, "group_size": 2, "gold": {"episodes": 2}}
    backend = {"name": "in-process", "rows": task.rows}
    env = {**task.env, "options": {**task.env.get("options", {}), **task.held_out}}
    evaluate = {
        "env": env, "episodes": 4 if quick else STARTS, "seed": EVALUATION_SEED,
        "players": ["policy", {"name": "as it came", "policy": model}, *task.players],
        "max_new_tokens": task.tokens, "temperature": TEMPERATURE, "backend": backend,
    }  # fmt: skip
    rl = {
        **RL, "env": task.env, "updates": task.updates, "max_new_tokens": task.tokens,
        "backend": backend, **few,
    }  # fmt: skip
    return {
        "name": name, "seed": seed, "checkpoint_every": 1,
        "policy": {"model": model, "lora": LORA},
        "stages": [{"rl": rl}, {"evaluate": evaluate}],
    }  # fmt: skip


def run_real(
    folder: Path,
    *,
    seed: int = 0,
    tasks: Sequence[str] = (),
    model: str = MODEL,
    quick: bool = False,
) -> dict[str, Any]:
    """Runs the tasks, or goes on with them, and returns the summary that it writes to
    `summary.json`.

    Args:
        folder: with a folder in it for each task; what is there already is gone on with.
        tasks: their names; default: all.
        model: another chat model's folder or hub name.
        quick: a single small update each.

    Raises:
        ConfigError: no such task, or a package that it needs is missing.
        PolicyError: the model cannot be had.
    """
    quiet()
    _check(tasks)
    console = Console()
    if model in KNOWN:
        _, source = fetch(model)
        console.print(f"{model} ({KNOWN[model].licence}), {source}", highlight=False)
    target = folder / "summary.json"
    done: dict[str, Any] = {"model": model, "tasks": {}}
    if target.exists():
        done = json.loads(target.read_text())
    if done["model"] != model:
        raise ConfigError(f"{folder} holds the demo of {done['model']}: choose another --folder")
    earlier = done["tasks"]
    summary: dict[str, Any] = {"model": model, "seed": seed, "tasks": earlier}
    for name in tasks or TASKS:
        console.rule(f"{name}: {TASKS[name].what}", align="left")
        found = _one_task(console, folder / name, pipeline(name, model, seed, quick), model)
        found["peak_memory"] = max(peak_memory(), earlier.get(name, {}).get("peak_memory", 0))
        summary["tasks"][name] = found
        target.write_text(json.dumps(summary, indent=2) + "\n")
    if quick:
        console.print("[bold]--quick: a single update teaches nothing; everything runs.[/bold]")
    console.print(f"Numbers: {target}")
    return summary


def _check(tasks: Sequence[str]) -> None:
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise ConfigError(f"the demo has no task {unknown[0]!r}; it has {', '.join(TASKS)}")
    needed = {"lora": "peft", "gguf": "gguf"}
    needed |= {"textarena": "textarena"} if not tasks or "guess" in tasks else {}
    needed |= {"reasoning-gym": "reasoning_gym"} if not tasks or "sums" in tasks else {}
    missing = [extra for extra, name in needed.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the demo needs {', '.join(missing)}: {' && '.join(map(install, missing))}"
        )


def _one_task(console: Console, folder: Path, config: dict[str, Any], model: str) -> dict[str, Any]:
    """Plays a task's run to its end, and says what came of it.

    Raises:
        SystemExit: it was asked to stop.
    """
    terminal = sys.stderr.isatty()
    with Display(terminal) as display:
        run = Run(config, folder=folder, resume=True, on_status=display.show)
        for update in run:
            if not terminal and update.stage == "rl":
                left = config["stages"][0]["rl"]["updates"] - update.number
                console.print(_line(update.number, update.metrics, left), highlight=False)
    if run.stopping:
        raise SystemExit(f"Stopped. The same command goes on from there, with {folder}.")
    metrics = run.metrics
    del run  # its policy makes room for the model as it came
    ledger, id_ = open_ledger(folder)
    played = ledger.run_episodes(id_, stage="evaluate")
    untouched = Policy.from_pretrained(model)
    speech = {
        name: fluency([e for e in played if e.slot == slot], untouched)
        for slot, name in ((1, "as it came"), (0, "policy"))
    }
    table = json.loads((folder / "evaluation.json").read_text())
    print_scores(table)
    for name, found in speech.items():
        console.print(
            f"{name}: {found['whole']:.1%} of the replies are whole,"
            f" {found['tokens']:.1f} tokens each; mean log-prob of a token under the model as it"
            f" came {found['logprob']:.2f}"
        )
    _show(console, folder, [e for e in played if e.slot == 1], [e for e in played if e.slot == 0])
    seconds = sum(
        m["seconds/play"] + m["seconds/update"] + m.get("seconds/gold", 0.0)
        for m in metrics
        if m["stage"] == "rl"
    )
    return {"players": table, "fluency": speech, "training_seconds": round(seconds, 1)}


def _line(number: int, metrics: Mapping[str, float], left: int) -> str:
    minutes = left * (metrics["seconds/play"] + metrics["seconds/update"]) / 60
    return (
        f"update {number}: outcome {metrics['outcome']:.3f}, success {metrics['success']:.3f},"
        f" {metrics['turns']:.1f} turns; about {minutes:.0f} min to go"
    )


def fluency(episodes: Sequence[Episode], untouched: Policy) -> dict[str, float]:
    """Measures whether a policy still speaks.

    Args:
        episodes: conversations that a policy of the same tokenizer played.
        untouched: the model as it came.

    Returns:
        whole: share of replies that ended by themselves and begin and end like a sentence, a number
            or a move; tokens: of a reply; logprob: mean log-prob of a token under the model as it
            came, at temperature 1.

    Raises:
        ConfigError: there is no reply to measure.
    """
    sound = [e for e in episodes if e.ending != "failed" and e.turns]
    turns = [turn for e in sound for turn in e.turns]
    if not turns:
        raise ConfigError(
            f"no conversation has a reply: what the task says at first may be longer than the"
            f" model's context of {untouched.context_length} tokens; choose another --model"
        )
    whole = [not t.cut and WHOLE.fullmatch(t.action) is not None for t in turns]
    batch = make_batch(sound, [Rewards(0.0, (0.0,) * len(e.turns)) for e in sound])
    logprobs = untouched.logprobs(batch, micro_tokens=1024)
    return {
        "whole": sum(whole) / len(turns),
        "tokens": sum(len(t.action_ids or ()) for t in turns) / len(turns),
        "logprob": float(logprobs[batch.mask].mean()),
    }


def _show(
    console: Console, folder: Path, before: Sequence[Episode], after: Sequence[Episode]
) -> None:
    """Prints and writes one start before and after: the first that was lost and is won."""
    pairs = list(zip(before, after, strict=True))
    one, other = next(((a, b) for a, b in pairs if b.succeeded and not a.succeeded), pairs[0])
    page = (
        f"# The same start before and after\n\n## As it came\n\n{transcript(one, user='User')}\n"
        f"## After RL\n\n{transcript(other, user='User')}"
    )
    (folder / "before-after.md").write_text(page)
    for title, episode in (("as it came", one), ("after RL", other)):
        console.rule(title, align="left", style="dim")
        for message in episode.messages:
            if message.role != "system":
                who = "model" if message.role == "assistant" else "      "
                console.print(
                    f"{who:6}  {printable(message.content)}", markup=False, highlight=False
                )
        console.print(f"return {episode.env_return:g}, {len(episode.turns)} turns")
