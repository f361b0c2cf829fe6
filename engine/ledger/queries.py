"""Conditions that several queries of the ledger share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from .tables import EPISODES, FEEDBACK


def about(episodes: Any) -> Any:
    """Selects answers on the episodes for which the condition holds, or on their groups."""
    ids, groups = (
        sa.select(column).where(episodes) for column in (EPISODES.c.id, EPISODES.c.group)
    )
    return sa.or_(FEEDBACK.c.target.in_(ids), FEEDBACK.c.target.in_(groups))


def current() -> Any:
    """Selects answers that no correction has replaced."""
    newer = FEEDBACK.alias()
    return ~sa.select(newer.c.id).where(newer.c.supersedes == FEEDBACK.c.id).exists()


def chunks(ids: Sequence[str], size: int = 500) -> Iterator[list[str]]:
    """Divides ids into chunks, since databases limit how many parameters a query takes."""
    ids = list(ids)
    for i in range(0, len(ids), size):
        yield ids[i : i + size]
