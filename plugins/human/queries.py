"""The conditions that several queries of the desk share."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ...running import SLOTS
from . import raters
from .errors import DeskError
from .tables import ITEMS, LEASES, STUDIES


def at_work(db: Connection, rater: str) -> raters.Person:
    """Returns the rater, if they may work.

    Raises:
        DeskError: why not.
    """
    person = raters.person(db, rater)
    if person.why:
        raise DeskError(person.why)
    return person


def leases(*more: Any) -> Any:
    """Selects leases with their items."""
    of_item = (
        ITEMS.c.run,
        ITEMS.c.source,
        ITEMS.c.target,
        ITEMS.c.group,
        ITEMS.c.gold,
        ITEMS.c.ask,
    )
    return sa.select(LEASES, *of_item, *more).join(ITEMS, ITEMS.c.id == LEASES.c.item)


def of_study() -> Any:
    """Returns the condition that a study is the item's."""
    return sa.and_(STUDIES.c.run == ITEMS.c.run, STUDIES.c.source == ITEMS.c.source)


def unfilled() -> Any:
    """Returns the condition that neither the ledger nor a rater's answer has filled a request."""
    on_desk = (
        sa.select(LEASES.c.id)
        .where(LEASES.c.request == SLOTS.c.id, LEASES.c.status == "answered")
        .exists()
    )
    return sa.and_(~SLOTS.c.answered, ~on_desk)


def wanted(now: float) -> tuple[Any, ...]:
    """Returns the conditions that an answer to a request is still wanted; one that is not required
    is worth asking for even after its group has trained."""
    in_time = sa.or_(SLOTS.c.deadline.is_(None), SLOTS.c.deadline > now)
    return in_time, sa.or_(~SLOTS.c.decided, ~SLOTS.c.required)


def held(now: float, besides: str = "") -> Any:
    """Returns the condition that a rater holds a request."""
    live = (
        LEASES.c.request == SLOTS.c.id,
        LEASES.c.status == "open",
        LEASES.c.expires > now,
        LEASES.c.id != besides,
    )
    return sa.select(LEASES.c.id).where(*live).exists()


def seen(rater: str, source: str) -> Any:
    """Returns the condition that this rater has had an item of a source, or another one of the same
    conversations (gold that was made of one). The conversations they have seen are looked up once,
    not once per item."""
    had = ITEMS.alias()
    seen = (
        sa.select(had.c.shown)
        .join(LEASES, LEASES.c.item == had.c.id)
        .where(LEASES.c.rater == rater, had.c.source == source)
    )
    return ITEMS.c.shown.in_(seen)


def decided(db: Connection, group: str) -> bool:
    """Returns whether a group belongs to an update already."""
    return bool(db.scalar(sa.select(SLOTS.c.decided).where(SLOTS.c.group == group).limit(1)))


def is_due(row: Any, now: float, undo: float | None) -> bool:
    """Returns whether an answer can no longer be taken back."""
    return row["answered"] <= now - (json.loads(row["settings"])["undo"] if undo is None else undo)
