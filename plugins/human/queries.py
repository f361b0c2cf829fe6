"""Conditions that several queries of the desk share."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ...engine.ledger.tables import FEEDBACK, MEMBERS, REQUESTS
from . import raters
from .errors import DeskError
from .tables import ITEMS, LEASES, STUDIES


def at_work(db: Connection, rater: str) -> raters.Person:
    """The rater, if they may work.

    Raises:
        DeskError: why not.
    """
    person = raters.person(db, rater)
    if person.why:
        raise DeskError(person.why)
    return person


def leases(*more: Any) -> Any:
    """Leases with their items."""
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
    return sa.and_(STUDIES.c.run == ITEMS.c.run, STUDIES.c.source == ITEMS.c.source)


def unfilled() -> Any:
    """Requests that neither the ledger nor a rater's answer has filled."""
    in_ledger = sa.select(FEEDBACK.c.id).where(FEEDBACK.c.request == REQUESTS.c.id).exists()
    on_desk = (
        sa.select(LEASES.c.id)
        .where(LEASES.c.request == REQUESTS.c.id, LEASES.c.status == "answered")
        .exists()
    )
    return sa.and_(~in_ledger, ~on_desk)


def wanted(now: float) -> tuple[Any, ...]:
    """Requests that somebody still waits for; what nobody waited for is worth asking also after its
    group has trained."""
    decided = sa.select(MEMBERS.c.episode).where(MEMBERS.c.group == ITEMS.c.group).exists()
    return sa.or_(REQUESTS.c.deadline.is_(None), REQUESTS.c.deadline > now), sa.or_(
        ~decided, ~REQUESTS.c.required
    )


def held(now: float, besides: str = "") -> Any:
    """Requests that a rater has in their hands."""
    live = (
        LEASES.c.request == REQUESTS.c.id,
        LEASES.c.status == "open",
        LEASES.c.expires > now,
        LEASES.c.id != besides,
    )
    return sa.select(LEASES.c.id).where(*live).exists()


def seen(rater: str, source: str) -> Any:
    """Items of a source that this rater has had, or others of the same conversations (gold that was
    made of one). The conversations they have seen are looked up once, not once per item."""
    had = ITEMS.alias()
    seen = (
        sa.select(had.c.shown)
        .join(LEASES, LEASES.c.item == had.c.id)
        .where(LEASES.c.rater == rater, had.c.source == source)
    )
    return ITEMS.c.shown.in_(seen)


def decided(db: Connection, group: str) -> bool:
    return (
        db.scalar(sa.select(MEMBERS.c.group).where(MEMBERS.c.group == group).limit(1)) is not None
    )


def is_due(row: Any, now: float, undo: float | None) -> bool:
    return row["answered"] <= now - (json.loads(row["settings"])["undo"] if undo is None else undo)
