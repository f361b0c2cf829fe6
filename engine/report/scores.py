"""Players and their results as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .compare import Measured, Setting


def print_scores(table: dict[str, dict[str, Any]]) -> None:
    """Prints players and their results, as a table."""
    from rich.console import Console
    from rich.table import Table

    number = lambda row, key, digits=3: f"{row[key]:.{digits}f}" if row.get(key) is not None else ""  # noqa: E731
    interval = lambda row, low, high: f"{row[low]:.3f} to {row[high]:.3f}"  # noqa: E731
    judged = any("proxy" in row for row in table.values())
    broken = any(row.get("failed") for row in table.values())
    more_columns = (*(("proxy", "KL") if judged else ()), *(("failed",) if broken else ()))
    shown = Table(
        "player", "outcome", "success", "95 % interval", "turns", "questions", *more_columns
    )
    won = any("win_rate" in row for row in table.values())
    pairs = Table(
        "pair", "success", "95 % interval", "outcome", "95 % interval",
        *(("wins by the judge",) if won else ()),
    )  # fmt: skip
    for name, row in table.items():
        if "pairs" in row:
            pairs.add_row(
                name, f"{row['success']:+.3f}", interval(row, "success_low", "success_high"),
                f"{row['outcome']:+.3f}",
                interval(row, "outcome_low", "outcome_high"),
                *((number(row, "win_rate"),) if won else ()),
            )  # fmt: skip
        else:
            columns = number(row, "outcome"), number(row, "success"), interval(row, "low", "high")
            more: tuple[str, ...] = (number(row, "proxy"), number(row, "kl", 2)) if judged else ()
            users = f", {row['failed_users']} by users" if row.get("failed_users") else ""
            more += (f"{row['failed']} of {row['episodes']}{users}",) if broken else ()
            shown.add_row(
                name, *columns, number(row, "turns", 2), number(row, "questions", 2), *more
            )
    console = Console()
    console.print(shown)
    for name, row in table.items():
        if 0 < row.get("tasks", 0) < row.get("episodes", 0) - row.get("failed", 0):
            console.print(
                f"{name}: {row['episodes']} conversations are about {row['tasks']} rows, which came"
                " several times; the intervals are over rows."
            )
        if row.get("unanswered"):
            console.print(
                f"{name}: {row['unanswered']} of {row['episodes']} conversations ended before a"
                " reply: their first prompt does not fit the context, or another seat ended them."
            )
    if pairs.row_count:
        console.print(pairs)


def print_comparison(
    first: str, second: str, settings: Sequence[Setting], measured: Sequence[Measured]
) -> None:
    """Prints what two runs were asked otherwise, and how their players did on the same starts."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    asked = Table("setting", escape(first), escape(second))
    shown = lambda value: "not set" if value is None else escape(str(value))  # noqa: E731
    for each in settings:
        asked.add_row(escape(each.key), shown(each.first), shown(each.second))
    console.print(asked if settings else "Both were asked the same.")
    results = Table("player", "starts", "success", "95 % interval", "outcome", "95 % interval")
    for one in measured:
        two, who = one.difference, escape(f"{one.player} in {one.env} ({one.stage})")
        if two is None or not two.pairs:
            results.add_row(who, "none", "", "", "", "")
            continue
        results.add_row(
            who, str(two.pairs),
            f"{two.success:+.3f}", f"{two.success_low:+.3f} to {two.success_high:+.3f}",
            f"{two.outcome:+.3f}", f"{two.outcome_low:+.3f} to {two.outcome_high:+.3f}",
        )  # fmt: skip
    if measured:
        console.print(f"{escape(first)} less {escape(second)}, on the starts that both played:")
        console.print(results)
    else:
        console.print(
            "They evaluated no player in the same environment: `turnwise evaluate` plays two"
            " policies on the same starts, and compares them."
        )
