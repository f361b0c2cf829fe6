"""The model card of a run's policy: the README.md that hubs show, from what the run itself knows.

A card says what the policy began from, what it trained on, by whom that was judged, how its
measures moved and what to be careful about. Nothing in it is written by hand, so nothing in it is
a claim that the run does not hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..policy.known import KNOWN
from ..util.suggest import install
from .config import flat

SHOWN = ("outcome", "success", "kl", "loss", "held_out/accuracy", "reply_tokens")
LINES = 9  # of a stage's curves


def model_card(
    name: str,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    adapters: bool,
) -> str:
    """Returns the card of a run's policy, as Markdown with the header that the hub reads.

    Args:
        name: of the run.
        config: what was asked, as config.yaml shows it.
        metrics: the run's updates.
        adapters: the folder holds adapters alone.
    """
    policy = config.get("policy")
    base = str(policy["model"] if isinstance(policy, Mapping) else "")
    stages = [
        (name, options or {}) for stage in flat(config["stages"]) for name, options in stage.items()
    ]
    known = KNOWN.get(base)
    origin = known.hub if known else base
    header: dict[str, Any] = {"library_name": "peft" if adapters else "transformers"}
    if on_hub(origin):
        header["base_model"] = origin
    if known:
        header["license"] = known.licence.lower()
    header |= {"pipeline_tag": "text-generation", "tags": _tags(stages)}
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name}",
        f"{'Adapters for' if adapters else 'A policy that began as'}"
        f" {f'`{origin}`' if origin else 'a model in memory'}, aligned on whole conversations with"
        " Turnwise. This card was written by the run.",
        "## What it was trained on, and by whom it was judged\n\n" + _trained(stages),
    ]
    if curves := _curves(metrics):
        parts.append("## How it went\n\n" + curves)
    if table := _evaluated(metrics):
        parts.append("## On held-out starts\n\n" + table)
    parts.append("## Limits\n\n" + _limits(stages))
    parts.append("## Use\n\n" + _use(adapters))
    shown = yaml.safe_dump(dict(config), sort_keys=False)
    parts.append(
        f"## Trained by\n\n`turnwise run {name}.yaml`, where {name}.yaml holds:\n\n"
        f"```yaml\n{shown}```"
    )
    return "\n\n".join(parts) + "\n"


def on_hub(name: str) -> bool:
    """Returns whether a model's name is one of the hub, as "owner/name", and no folder here."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).is_dir()


def _named(part: Any, key: str = "name") -> str:
    """Returns what a part is called in a config: by its name alone, in a mapping, or by the class
    of an object."""
    name = str(part.get(key, part)) if isinstance(part, Mapping) else str(part)
    made = re.fullmatch(r"<(?:function )?([\w.]+).*>", name)
    return made[1].rpartition(".")[2] if made else name


def _judges(name: str, options: Mapping[str, Any]) -> list[str]:
    """Returns who judges in a stage, in all of its environments."""
    env = options.get("env")
    entries = env if isinstance(env, list) else [env]
    own = [e["feedback"] for e in entries if isinstance(e, Mapping) and e.get("feedback")]
    given = [*own, options.get("feedback", ["environment"] if name == "rl" else [])]
    found = [judge for each in given for judge in (each if isinstance(each, list) else [each])]
    return list(dict.fromkeys(_named(judge, "judge") for judge in found))


def _tags(stages: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    optimizers = [_named(options["optimizer"]) for _, options in stages if options.get("optimizer")]
    return list(dict.fromkeys(["turnwise", *(name for name, _ in stages), *optimizers]))


def _trained(stages: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    rows = ["| stage | on | judged by | with |", "| --- | --- | --- | --- |"]
    for name, options in stages:
        env = options.get("env")
        several = env if isinstance(env, list) else [env] if env is not None else []
        source = ", ".join(
            _named(each[0] if isinstance(each, list) else each, "id") for each in several
        )
        if options.get("player"):
            source += f", played by {options['player']}"
        parts = [options[key] for key in ("optimizer", "credit") if options.get(key)]
        amount = [
            f"{options[key]:,} {key}"
            for key in ("updates", "episodes", "epochs")
            if isinstance(options.get(key), int)
        ]
        cells = (
            name,
            source or _named(options.get("data", "")),
            ", ".join(_judges(name, options)),
            ", ".join([*map(_named, parts), *amount]),
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Returns the measures of every stage at a few of its updates, as tables."""
    tables = []
    for stage in dict.fromkeys(str(line["stage"]) for line in metrics):
        lines = [line for line in metrics if line["stage"] == stage]
        shown = [key for key in SHOWN if any(key in line for line in lines)]
        if len(lines) < 2 or not shown:
            continue
        step = (len(lines) - 1) / (min(LINES, len(lines)) - 1)
        some = [lines[round(i * step)] for i in range(min(LINES, len(lines)))]
        rows = [
            [str(line["update"]), *(f"{line[key]:.3f}" if key in line else "" for key in shown)]
            for line in some
        ]
        tables.append(_table([f"{stage}, update", *shown], rows))
    return "\n\n".join(tables)


def _evaluated(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Returns what `evaluate` found last, as a table."""
    found: dict[str, dict[str, float]] = {}
    for line in metrics:
        if str(line["stage"]).startswith("evaluate"):
            for key, value in line.items():
                player, _, measure = key.rpartition("/")
                if player and isinstance(value, float):
                    found.setdefault(player, {})[measure] = value
    rows = [
        [name, f"{row['success']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}",
            f"{row['outcome']:.3f}", f"{row['episodes']:.0f}"]
        for name, row in found.items()
        if {"success", "low", "high", "outcome", "episodes"} <= set(row)
    ]  # fmt: skip
    return _table(["player", "success", "95 % interval", "outcome", "starts"], rows) if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _limits(stages: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    lines = [
        "It was trained for the dialogues above and measured on nothing else. What it lost"
        " elsewhere was not measured.",
    ]
    if any(name == "rl" for name, _ in stages):
        lines.append(
            "A reward buys what it pays for: where judge and purpose differ, the policy has been"
            " moved towards the judge."
        )
    if any(name == "evaluate" for name, _ in stages):
        lines.append("Intervals are over starts of one run, not over runs.")
    else:
        lines.append("No held-out evaluation was part of the run.")
    limits = {options["max_new_tokens"] for _, options in stages if "max_new_tokens" in options}
    if limits:
        lines.append(f"Replies were cut at {', '.join(map(str, sorted(limits)))} tokens.")
    return "\n".join(f"- {line}" for line in lines)


def _use(adapters: bool) -> str:
    if adapters:
        return (
            "```python\nimport turnwise\n\npolicy = turnwise.Policy.from_pretrained(FOLDER)\n"
            'print(policy.reply([{"role": "user", "content": "Hello"}]))\n```\n\n'
            "The folder holds adapters alone; `policy.save_pretrained(ANOTHER, merge=True)` writes"
            f" a plain model to another one ({install('lora')})."
        )
    return (
        "```python\nfrom transformers import pipeline\n\n"
        'chat = pipeline("text-generation", FOLDER)\n'
        'print(chat([{"role": "user", "content": "Hello"}]))\n```'
    )
