"""Conditions that several queries of the ledger share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from .tables import EPISODES, FEEDBACK, MEMBERS


def about(episodes: Any, kind: str | None = None) -> Any:
    """Selects answers on the episodes for which the condition holds, or on their groups.

    Args:
        episodes: the condition.
        kind: of the answers, where only one is wanted: "feedback" is on episodes, "comparison" on
            groups.
    """
    ids, groups = (
        FEEDBACK.c.target.in_(sa.select(column).where(episodes))
        for column in (EPISODES.c.id, EPISODES.c.group)
    )
    return {"feedback": ids, "comparison": groups}.get(kind or "", sa.or_(ids, groups))


def decided_until(run: str | None, update: int) -> Any:
    """Selects answers on episodes and groups that were members of a run's update up to this one."""
    # Per answer one look-up by the target's own index: `run` and `update` are compared with what it
    # finds, and are no way to find it.
    own = sa.and_(MEMBERS.c.run + "" == run, MEMBERS.c.update + 0 <= update)
    return sa.or_(
        *(
            sa.select(MEMBERS.c.episode).where(column == FEEDBACK.c.target, own).exists()
            for column in (MEMBERS.c.episode, MEMBERS.c.group)
        )
    )


def current() -> Any:
    """Selects answers that no correction has replaced."""
    newer = FEEDBACK.alias()
    return ~sa.select(newer.c.id).where(newer.c.supersedes == FEEDBACK.c.id).exists()


def chunks(ids: Sequence[str], size: int = 500) -> Iterator[list[str]]:
    """Divides ids into chunks, since databases limit how many parameters a query takes."""
    ids = list(ids)
    for i in range(0, len(ids), size):
        yield ids[i : i + size]


def check_filters(
    run: str | None, groups: Any, ids: Any, stages: Any, sources: Any, decided_by: int | None,
    kind: str | None, status: str | None, order: str,
) -> None:  # fmt: skip
    """Refuses filters of `feedback` that would find nothing, or everything, in silence.

    Raises:
        ValueError: a text where a list of them is wanted, a word that is none of those known, or
            filters that do not go together.
    """
    lists = {"groups": groups, "ids": ids, "stages": stages, "sources": sources}
    for name, value in lists.items():
        if isinstance(value, str):
            raise ValueError(f"{name} must be a list, got {value!r}")
    for name, word, known in (
        ("kind", kind, ("feedback", "comparison")),
        ("status", status, ("scored", "abstained", "failed")),
        ("order", order, ("time", "target")),
    ):
        if word is not None and word not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {word!r}")
    if run is None and (stages is not None or decided_by is not None):
        raise ValueError("`stages` and `decided_by` are of a run: give `run` too")
    if stages is not None and decided_by is not None:
        raise ValueError("give either `stages` or `decided_by`")
