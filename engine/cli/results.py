"""`turnwise report`, `turnwise export` and `turnwise plugins`: show what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import ConfigError
from .app import LEDGER


def report(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the page goes; default report.html in the folder.")
    ] = None,
    ledger: Annotated[str | None, LEDGER] = None,
) -> None:
    """Writes a run's report: one HTML page with curves, proxy against truth, habits, and
    conversations before and after."""
    from ..report.page import write_report

    print(write_report(folder, out, ledger, context.obj))


def compare(
    first: Annotated[Path, typer.Argument(help="A run's folder.")],
    second: Annotated[Path, typer.Argument(help="Another run's folder.")],
    ledger: Annotated[str | None, LEDGER] = None,
    other_ledger: Annotated[
        str | None, typer.Option(help="The same of the second run's ledger.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compares two runs: what was asked otherwise, and their players on the starts that both
    played."""
    from dataclasses import asdict

    from ..pipeline.view import PastRun
    from ..report.compare import outcomes, settings_that_differ
    from ..report.scores import print_comparison

    one, two = PastRun(first, ledger), PastRun(second, other_ledger)
    settings, measured = settings_that_differ(one, two), outcomes(one, two)
    if as_json:
        asked, played = [asdict(each) for each in settings], [asdict(each) for each in measured]
        print(json.dumps({"settings": asked, "outcomes": played}, indent=2))
        return
    print_comparison(str(first), str(second), settings, measured)


def export(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[
        Path, typer.Argument(help="A .jsonl file to write, or without an ending a datasets folder.")
    ],
    form: Annotated[
        Literal["pairs", "unpaired", "stepwise"],
        typer.Option(
            "--format",
            help="TRL's dataset types: preference, unpaired preference, stepwise supervision.",
        ),
    ] = "pairs",
    threshold: Annotated[
        float | None,
        typer.Option(help="Scores from this one on are good; without it they must be 0 or 1."),
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Only feedback on this stage's conversations.")
    ] = None,
    ledger: Annotated[str | None, LEDGER] = None,
) -> None:
    """Writes the feedback on a run's conversations in the formats that other tools train on:
    comparisons, scores, scores of turns."""
    from ..exchange.writing import export_pairs, export_stepwise, export_unpaired, save
    from ..pipeline.folder import open_ledger
    from ..records.feedback import Comparison, Feedback

    opened, run = open_ledger(folder, ledger)
    answers = opened.feedback(run=run, stages=stage, status="scored", late=True, order="target")
    comparisons = [a for a in answers if isinstance(a, Comparison)]
    scores = [a for a in answers if isinstance(a, Feedback)]
    episodes = opened.episodes(
        sorted(
            {e for c in comparisons for tier in c.ranking for e in tier}
            | {s.episode for s in scores}
        )
    )
    opened.close()
    if form == "pairs":
        rows = export_pairs(episodes, comparisons)
    elif form == "unpaired":
        rows = list(export_unpaired(episodes, scores, comparisons, threshold))
    else:
        rows = list(export_stepwise(episodes, scores, threshold))
    of = (
        f"{len(comparisons)} comparisons"
        if form == "pairs"
        else f"{len(scores)} scores and {len(comparisons)} comparisons"
    )
    if not rows:
        where = f" in {', '.join(stage)}" if stage else ""
        raise ConfigError(f"the run in {folder} has nothing to write as {form}{where}: {of}")
    save(rows, out)
    print(f"{len(rows)} {form if form == 'pairs' else f'rows, {form},'} of {of} in {out}")


def plugins(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Lists plugins: version, hooks, what each registered, and why one failed."""
    from dataclasses import asdict

    infos = list(context.obj.infos.values())
    if as_json:
        print(json.dumps([asdict(info) for info in infos], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("plugin", "version", "registered", "hooks")
    for info in infos:
        entries = "\n".join(
            f"{kind}: {', '.join(names)}" for kind, names in info.registered.items()
        )
        table.add_row(
            info.name,
            info.version,
            f"[red]FAILED[/red] {info.failed}" if info.failed else entries,
            "\n".join(info.hooks),
        )
    Console().print(table)
