"""The commands `turnwise simulator check`, `spent` and `budget`: their options and output. What
they need is loaded when they are called, not to list them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..asking.store import Cache
    from .check import Check, Conversation

simulator = typer.Typer(
    no_args_is_help=True, help="Users who are played by a model: what they are worth, and cost."
)
SIDES = ("simulated", "recorded")
LARGE = 0.1  # less agreement than 1 by which an aspect differs
# An index whose interval lies above this is close, one below that is far: on SupportDesk policies
# lost less than 2 points from .9 on, and 15 to 50 below .6 (benchmarks/simulator.py).
CLOSE, FAR = 0.9, 0.7


def _conversations(place: Path, stage: str | None) -> list[Conversation]:
    """Returns the conversations of a file; of a run's folder those of its latest update that
    played, or the latest of a stage, one for each start or row.

    Raises:
        ConfigError: the run has none, or no such stage.
    """
    from ...protocols import ConfigError
    from ...running import open_ledger, read_conversations

    if not (place / "config.yaml").exists():
        return [c.messages for c in read_conversations(place)]
    ledger, run = open_ledger(place, None)
    played = [(label, update) for label, update in ledger.rounds(run) if stage in (None, label)]
    if not played:
        has = ", ".join(dict.fromkeys(label for label, _ in ledger.rounds(run))) or "none"
        what = "no stage" if stage is None else f"no stage {stage!r}"
        raise ConfigError(f"{what} of {place} has conversations; those that have: {has}")
    label, update = played[-1]
    episodes = ledger.run_episodes(run, stage=label, update=update)
    ledger.close()
    # A row of scenarios, of prompts or of tasks comes again with other seeds.
    first = {e.task: e for e in reversed(episodes) if e.ending != "failed"}
    return [e.messages for e in first.values()]


@simulator.command("check")
def check_users(
    simulated: Annotated[
        Path, typer.Argument(help="Conversations with simulated users: a run's folder, or a file.")
    ],
    recorded: Annotated[
        Path, typer.Argument(help="Recorded ones of the same agent: a file, or a run's folder.")
    ],
    stage: Annotated[
        str | None,
        typer.Option(help="Of a run: the latest update of this stage; default: the latest of all."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compares simulated users with recorded ones, and says how far to trust them."""
    from rich.console import Console
    from rich.table import Table

    from ...protocols import ConfigError
    from .check import check

    if stage is not None and not any((p / "config.yaml").exists() for p in (simulated, recorded)):
        raise ConfigError("--stage is one of a run, and both sides are files")
    sides = [_conversations(place, stage) for place in (simulated, recorded)]
    found = check(*sides)
    if as_json:
        listed = {
            aspect: [{**asdict(m), "agreement": m.agreement} for m in own]
            for aspect, own in found.measures.items()
        }
        print(json.dumps({**asdict(found), "measures": listed}, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("aspect", "agreement", "measure", *SIDES, "distance", "by chance"):
        table.add_column(column, overflow="fold")
    for aspect, measures in found.measures.items():
        for k, m in enumerate(measures):
            head = (aspect, _number(found.aspects.get(aspect))) if not k else ("", "")
            table.add_row(
                *head, m.name, *map(_number, (m.simulated, m.recorded, m.distance, m.chance))
            )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(verdict(found), highlight=False)
    for name, conversations in zip(SIDES, sides, strict=True):
        if again := _repeated(conversations):
            console.print(
                f"{again} of the {name} conversations begin with the words of another one: those of"
                " the same start should be given once."
            )


def _repeated(conversations: Sequence[Conversation]) -> int:
    """Returns how many conversations begin with the words of another one before them."""
    first = [next((m.content for m in c if m.role == "user"), "") for c in conversations]
    return len(first) - len(set(first))


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
    head = f"{head} The same users would differ so much with p = {found.p:.3f}."
    if found.low >= CLOSE:
        trust = "Close: what helps with these users can be expected to help with the recorded ones."
    elif found.index >= FAR:
        trust = "Train with them, and test with people: a part of what helps here helps there."
    else:
        trust = "Far: what is measured with them says little about the recorded users."
    return f"{head}{differ} {trust}"


def _cache(where: str | None) -> Cache:
    """Opens the cache that users' answers and accounts are in.

    Raises:
        ConfigError: there is none.
    """
    from ...protocols import ConfigError
    from ...tools import files
    from ..asking.store import Cache

    files.cache_folder().mkdir(parents=True, exist_ok=True)
    found = where or str(files.cache_folder() / "judges.sqlite")
    if where is not None and "://" not in found and not Path(found).is_file():
        raise ConfigError(f"there is no cache at {found}: say where it is with --cache")
    return Cache(found)


CACHE = typer.Option(help="The cache, where it is not judges.sqlite in the folder for caches.")


@simulator.command("spent")
def spent(cache: Annotated[str | None, CACHE] = None) -> None:
    """Shows what simulated users were asked, what that cost, and what it may cost."""
    from rich.console import Console
    from rich.table import Table

    from ..asking.store import spending
    from .account import budgets

    opened = _cache(cache)
    limits, rows = budgets(opened), spending(opened)
    never = set(limits) - {row["source"] for row in rows}
    table = Table("user", "answer", "requests", "tokens", "dollars", "budget of the user")
    for row in rows:
        limit = limits.get(row["source"])
        table.add_row(
            row["source"], row["status"], f"{row['requests']:,}", f"{row['tokens']:,}",
            f"{row['cost']:.4f}", "" if limit is None else f"{limit:g}",
        )  # fmt: skip
    opened.close()
    console = Console()
    console.print(table)
    for name in sorted(never):
        console.print(f"{name} has a budget of {limits[name]:g} and was never asked as a user.")


@simulator.command("budget")
def budget(
    dollars: Annotated[
        str, typer.Argument(help='In all, what was spent included; "none" takes the limit away.')
    ],
    user: Annotated[str, typer.Option(help="The model that plays, such as openai:gpt-5-mini.")],
    cache: Annotated[str | None, CACHE] = None,
) -> None:
    """Allows the users that a model plays so many dollars, over all runs; a run is paused before
    they spend more."""
    from ...protocols import ConfigError
    from .account import set_budget

    if not all(user.partition(":")):
        raise ConfigError(f"--user must be PROVIDER:MODEL, such as openai:gpt-5-mini; got {user!r}")
    limit = None if dollars == "none" else _dollars(dollars)
    opened = _cache(cache)
    set_budget(opened, user, limit)
    opened.close()
    what = "what they cost" if limit is None else f"{limit:g} dollars in all"
    print(f"The users that {user} plays may cost {what}, kept in {opened.url}")


def _dollars(text: str) -> float:
    """Reads an amount.

    Raises:
        ConfigError: it is none.
    """
    from ...protocols import ConfigError

    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
        raise ConfigError(f'DOLLARS must be a number of at least 0, or "none"; got {text!r}')
    return float(text)
