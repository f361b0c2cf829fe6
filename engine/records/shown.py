"""Records as they are shown: short in a terminal, as tables and conversations in a notebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

# rgb of credit and of blame
GREEN, RED = "24, 128, 56", "190, 40, 40"
PLAIN, BLUE = "transparent", "rgba(60, 110, 200, .12)"
_BOX = "max-width:50em;margin:.3em 0;padding:.4em .7em;border-radius:.5em;white-space:pre-wrap"


def brief(record: Any) -> str:
    """Returns a record's `repr` without the fields that are as they are by default."""
    shown = (f"{name}={value!r}" for name, value in _stated(record))
    return f"{type(record).__name__}({', '.join(shown)})"


def in_a_table(record: Any) -> str:
    """Returns a record as an HTML table, without the fields that are as they are by default."""
    rows = ((name, value if isinstance(value, str) else repr(value))
            for name, value in _stated(record))  # fmt: skip
    return table(rows, (type(record).__name__, ""))


def _stated(record: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(record):
        value, default = getattr(record, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.repr and (default is dataclasses.MISSING or value != default):
            yield field.name, value


def number(value: float) -> str:
    """Returns a number as people read it, with four digits that say something."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Returns an HTML table."""
    top = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(f"<td style='text-align:left'>{escape(str(c))}</td>" for c in row)
        + "</tr>"
        for row in rows
    )
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def tint(credit: float, largest: float) -> str:
    """Returns the CSS colour of a turn: green for credit and red for blame, stronger for more."""
    return f"rgba({GREEN if credit > 0 else RED}, {0.45 * abs(credit) / (largest or 1.0):.2f})"


def messages(written: Iterable[tuple[str, str, str, str]], note: str) -> str:
    """Returns a conversation as HTML.

    Args:
        written: of each message who wrote it, what, what is noted next to the writer, and the CSS
            colour it stands on.
        note: what stands below all of it.
    """
    shown = "".join(_message(*each) for each in written)
    return f"<div>{shown}<p>{escape(note)}</p></div>"


def _message(role: str, text: str, mark: str, colour: str) -> str:
    return (
        f"<div style='{_BOX};background:{colour};border:1px solid rgba(128, 128, 128, .35)'>"
        f"<small>{escape(role + mark)}</small>\n{escape(text)}</div>"
    )
