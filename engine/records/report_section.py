"""A section of a run's report, as plugins give it by the hook `report_sections`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ReportSection:
    """A section of a run's report.

    Attributes:
        title: its heading.
        lines: sentences, shown above the table.
        columns, rows: a table; no columns: none.
    """

    title: str
    lines: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=list)
