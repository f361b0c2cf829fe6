"""The commands `turnwise simulator check` and `turnwise simulator spent`: their options and output.
What they need is loaded when they are called, not to list them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .check import Check, Conversation

simulator = typer.Typer(
    no_args_is_help=True, help="Users who are played by a model: what they are worth, and cost."
)
LARGE = 0.1  # less agreement than 1 by which an aspect differs
CLOSE, FAR = 0.9, 0.7  # an index from which on it is close, and below which it is far


def _conversations(place: Path, stage: str | None) -> list[Conversation]:
    """Returns the conversations of a file, or of a run's folder: of one of its stages, or of the
    last one that played.

    Raises:
        ConfigError: the run has none, or no such stage.
    """
    from ...protocols import ConfigError
    from ...running import open_ledger, read_conversations

    if not (place / "config.yaml").exists():
        return [c.messages for c in read_conversations(place)]
    ledger, run = open_ledger(place, None)
    played = [label for label, _ in ledger.rounds(run)]
    if stage is not None and stage not in played:
        has = ", ".join(dict.fromkeys(played)) or "none"
        raise ConfigError(
            f"no stage {stage!r} of {place} has conversations; those that have: {has}"
        )
    episodes = ledger.run_episodes(run, stage=stage or (played[-1] if played else ""))
    ledger.close()
    return [e.messages for e in episodes if e.ending != "failed"]


@simulator.command("check")
def check_users(
    simulated: Annotated[
        Path, typer.Argument(help="Conversations with simulated users: a run's folder, or a file.")
    ],
    recorded: Annotated[
        Path, typer.Argument(help="Recorded ones of the same agent: a file, or a run's folder.")
    ],
    stage: Annotated[
        str | None, typer.Option(help="Of a run: this stage; default: the last that played.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compares simulated users with recorded ones, and says how far to trust them."""
    from rich.console import Console
    from rich.table import Table

    from .check import check

    found = check(*(_conversations(place, stage) for place in (simulated, recorded)))
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    table = Table(
        "aspect", "agreement", "measure", "simulated", "recorded", "distance", "by chance"
    )
    for aspect, measures in found.measures.items():
        for k, m in enumerate(measures):
            head = (aspect, f"{found.aspects[aspect]:.2f}") if not k else ("", "")
            table.add_row(
                *head, m.name, *map(_number, (m.simulated, m.recorded, m.distance, m.chance))
            )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(verdict(found), highlight=False)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def verdict(found: Check) -> str:
    """Says in words how far to trust simulated users."""
    size = f"{found.simulated} simulated conversations, {found.recorded} recorded ones"
    head = f"Index {found.index:.2f} ({found.low:.2f} to {found.high:.2f}; {size})."
    worst = sorted((a for a in found.aspects.items() if a[1] < 1 - LARGE), key=lambda a: a[1])
    differ = f" They differ most in {', '.join(name for name, _ in worst[:2])}." if worst else ""
    if found.p > 0.05:
        return f"{head} Nothing tells them apart in as many conversations (p = {found.p:.2f})."
    if found.index >= CLOSE:
        trust = "Close: what helps with these users can be expected to help with the recorded ones."
    elif found.index >= FAR:
        trust = "Train with them, and test with people: a part of what helps here helps there."
    else:
        trust = "Far: what is measured with them says little about the recorded users."
    return f"{head}{differ} {trust}"


@simulator.command("spent")
def spent(
    cache: Annotated[
        str | None,
        typer.Option(help="The cache, where it is not judges.sqlite in the folder for caches."),
    ] = None,
) -> None:
    """Shows what simulated users were asked, and what that cost."""
    from rich.console import Console
    from rich.table import Table

    from ...protocols import ConfigError
    from ...tools import files
    from ..asking.store import Cache, spending

    where = cache or str(files.cache_folder() / "judges.sqlite")
    if "://" not in where and not Path(where).is_file():
        raise ConfigError(f"there is no cache at {where}: say where it is with --cache")
    opened = Cache(where)
    table = Table("user", "answer", "requests", "tokens", "dollars")
    for row in spending(opened):
        table.add_row(row["source"], row["status"], f"{row['requests']:,}", f"{row['tokens']:,}",
            f"{row['cost']:.4f}")  # fmt: skip
    opened.close()
    Console().print(table)
