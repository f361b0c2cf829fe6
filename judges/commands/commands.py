"""The commands `turnwise judges` and `turnwise estimate`: their options and output. What they need
is loaded when they are called, not to list them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

NO_JUDGE = "asks no model to judge. What users cost that a model plays is not estimated"


class Forget(StrEnum):
    """Which verdicts to forget."""

    ABSTAINED = "abstained"
    ALL = "all"


def _forget(folder: Path, which: Forget, models: Sequence[str], url: str | None) -> None:
    from ...protocols import ConfigError
    from ...running import read_config
    from ..asking.store import Cache

    read_config(folder)
    where = url or str(folder.absolute().parent / "judges.sqlite")
    if "://" not in where and not Path(where).is_file():
        raise ConfigError(f"there is no cache at {where}: say where it is with --cache")
    opened = Cache(where)
    gone = opened.forget(models, abstained=which is Forget.ABSTAINED)
    opened.close()
    print(
        f"Forgot {gone} verdicts in {opened.url}. Runs that share it ask for them again; what"
        " ledgers hold stays."
    )


def judges(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    people: Annotated[
        list[str] | None, typer.Option(help="A source that is people; may be given several times.")
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Option(help="A judge of the policy's own model family; may be given several times."),
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option(help="The ledger's URL, where the one in the config had a password."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    forget: Annotated[
        Forget | None,
        typer.Option(help="Throw verdicts in the cache away, so that they are asked for again."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="With --forget: of this model alone; may be given several times."),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="With --forget: the cache, where it is not judges.sqlite next to the run."
        ),
    ] = None,
) -> None:
    """Shows what the judges of a run did and cost, what fools and biases them, and what they are
    worth compared with people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ...running import open_ledger
    from ...tools import one_line
    from .audit import audit

    if forget is not None:
        _forget(folder, forget, model or (), cache)
        return
    if model or cache:
        raise typer.BadParameter("--model and --cache belong to --forget")
    opened, run = open_ledger(folder, ledger)
    sections = audit(opened, run, people or (), own or ())
    opened.close()
    if as_json:
        print(json.dumps([asdict(s) for s in sections], indent=2))
        return
    console = Console()
    if not sections:
        console.print(f"No judge has answered in {folder}.")
    for section in sections:
        console.print(Text(f"\n{one_line(section.title)}", style="bold"))
        for line in section.lines:
            console.print(one_line(line), markup=False)
        if len(section.columns) > 6:  # too wide for a terminal
            for row in section.rows:
                shown = ", ".join(
                    f"{c} {v}" for c, v in zip(section.columns, row, strict=True) if v
                )
                console.print(one_line(shown), markup=False)
        elif section.columns:
            table: Any = Table(*section.columns)
            for row in section.rows:
                table.add_row(*(Text(one_line(cell)) for cell in row))
            console.print(table)


def estimate(
    context: typer.Context,
    configs: Annotated[
        list[Path],
        typer.Argument(help="A pipeline in YAML, and further files as `run` takes them."),
    ],
    sample: Annotated[
        int, typer.Option(min=1, help="Starts that are played per environment of a stage.")
    ] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Sets a key of the config, as `run` does."),
    ] = None,
    module: Annotated[
        str | None, typer.Option(help="Import this module first, which registers environments.")
    ] = None,
) -> None:
    """Estimates what the judges of a pipeline will ask and cost; nothing is sent."""
    import tempfile

    from ...running import Run, import_module, load_config, quiet
    from .estimate import estimate as estimated

    import_module(module, context.obj)
    quiet()
    for key in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        os.environ.setdefault(key, "not-needed-to-estimate")
    with tempfile.TemporaryDirectory() as folder:
        read = load_config(configs, settings)
        found = estimated(Run(read, folder=Path(folder) / "run", plugins=context.obj), sample)
    if not found:
        print("[]" if as_json else f"{configs[0]} {NO_JUDGE}")
        return
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return
    _print_estimates(found)


def _print_estimates(found: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "judge", "model", "questions", "tokens", "dollars", "at most")
    money = lambda value: "price unknown" if value is None else f"{value:,.2f}"  # noqa: E731
    for each in found:
        table.add_row(
            each.stage,
            each.judge,
            each.model,
            f"{each.questions:,}",
            f"{each.tokens:,}",
            money(each.dollars),
            money(each.most),
        )
    known = [each for each in found if each.dollars is not None]
    if len(known) > 1:
        table.add_row(
            "",
            "all with a price",
            "",
            "",
            "",
            money(sum(e.dollars or 0 for e in known)),
            money(sum(e.most or 0 for e in known)),
        )
    Console().print(table)
    print(
        "Estimated from the policy as it is: four bytes a token, answers of 250 tokens; at most two"
        " bytes, and `max_tokens`."
    )
    if any(each.dollars is None for each in found):
        print(
            'Give `prices: {"provider:name": [input, output]}` where the price is unknown, in'
            " dollars per million tokens."
        )
