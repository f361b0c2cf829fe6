"""Players and their results as a table in the terminal."""

from __future__ import annotations

from typing import Any


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
    pairs = Table(
        "pair", "success", "95 % interval", "outcome", "95 % interval", "wins by the judge"
    )
    for name, row in table.items():
        if "pairs" in row:
            pairs.add_row(
                name, f"{row['success']:+.3f}", interval(row, "success_low", "success_high"),
                f"{row['outcome']:+.3f}",
                interval(row, "outcome_low", "outcome_high"), number(row, "win_rate"),
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
