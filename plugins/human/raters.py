"""Raters: one-time links, sessions, gold that gates, and notes for the lead.

Secrets are drawn with 256 bits and kept as SHA-256 hashes only: a reader of the database can
neither enter nor take over a session.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ...running import Ledger
from .errors import NoEntry
from .tables import EVENTS, ITEMS, LEASES, RATERS, SESSIONS

LINK = 14 * 86400.0  # seconds a link is good for
SESSION = 30 * 86400.0
# Gold answers before a rater is judged by them; how many of the latest count.
GOLD_FIRST, GOLD_LAST = 4, 8

USED = "This link has been used or is too old. Ask the person who invited you for a new one."
WHY = {
    "gated": (
        "Several of your answers differ from what we know to be right. Please read the instructions"
        " once more; then you get a few tasks to try again."
    ),
    "blocked": "Your account rests for now. Please write to the person who invited you.",
    "paused": "Your account is paused. Please write to the person who invited you.",
}


@dataclass(frozen=True, slots=True)
class Person:
    """A rater or lead.

    Attributes:
        state: active; gated (failed gold), practice (on the second chance), blocked (failed that
            too), paused (by a lead).
        strata: what they declared of themselves.
    """

    id: str
    run: str
    name: str
    role: str
    state: str
    strata: Mapping[str, str]
    chances: int
    gate: float

    @property
    def why(self) -> str:
        """The reason why they cannot work now; empty where they can."""
        return WHY.get(self.state, "")


@dataclass(frozen=True, slots=True)
class Session:
    """A rater's session: the person, and the token that its forms must carry."""

    person: Person
    csrf: str


def hashed(secret: str) -> str:
    """Returns the hash under which a secret is kept."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def invite(ledger: Ledger, run: str, name: str, role: str | None = None) -> str:
    """Makes a new account in a run, or a new link for one that exists, whose sessions end; returns
    the link's secret, which is kept nowhere.

    Args:
        ledger: of the run.
        run: the run's id.
        name: of the account.
        role: "rater" or "lead"; default: as it is, and "rater" for a new account.

    Raises:
        ValueError: an empty name, a role that does not exist, or the last lead would be none any
            more.
    """
    name = " ".join(name.split())[:200]
    if not name:
        raise ValueError("A rater needs a name.")
    if role not in (None, "rater", "lead"):
        raise ValueError(f"A role is rater or lead, not {role!r}.")
    secret, now = secrets.token_urlsafe(32), ledger.clock()
    link = {"token": hashed(secret), "token_expires": now + LINK}
    with ledger.writing() as db:
        everyone = list(db.execute(sa.select(RATERS).where(RATERS.c.run == run)).mappings())
        known = next((row for row in everyone if row["name"] == json.dumps(name)), None)
        if known is None:
            row = {
                "id": f"r-{secrets.token_hex(4)}",
                "run": run,
                "name": json.dumps(name),
                "role": role or "rater",
                "state": "active",
            }
            db.execute(
                RATERS.insert().values(**row, **link, strata="{}", gate=0.0, chances=0, time=now)
            )
            return secret
        if (
            known["role"] == "lead"
            and role == "rater"
            and sum(row["role"] == "lead" for row in everyone) == 1
        ):
            raise ValueError(
                f"{name} is the only lead of this run: make another person a lead first."
            )
        db.execute(
            RATERS.update()
            .where(RATERS.c.id == known["id"])
            .values(role=role or known["role"], **link)
        )
        db.execute(SESSIONS.delete().where(SESSIONS.c.rater == known["id"]))
    return secret


def enter(ledger: Ledger, run: str, secret: str) -> str:
    """Opens a session with a link's secret, which is used up by it; returns the cookie's secret. It
    is always a new session.

    Raises:
        NoEntry: the link is unknown, used or too old.
    """
    cookie, now = secrets.token_urlsafe(32), ledger.clock()
    known = sa.select(RATERS).where(
        RATERS.c.token == hashed(secret), RATERS.c.run == run, RATERS.c.token_expires >= now
    )
    with ledger.reading() as db:  # guesses of strangers must not block the writer
        if db.execute(known).first() is None:
            raise NoEntry(USED)
    with ledger.writing() as db:
        found = db.execute(known).mappings().first()
        if found is None:
            raise NoEntry(USED)
        db.execute(
            RATERS.update().where(RATERS.c.id == found["id"]).values(token=None, token_expires=None)
        )
        db.execute(SESSIONS.delete().where(SESSIONS.c.expires < now))
        row = {
            "id": hashed(cookie),
            "rater": found["id"],
            "csrf": secrets.token_urlsafe(24),
            "expires": now + SESSION,
        }
        db.execute(SESSIONS.insert().values(**row))
    return cookie


def session(ledger: Ledger, run: str, cookie: str) -> Session:
    """Returns the session that a cookie opens.

    Raises:
        NoEntry: it opens none.
    """
    with ledger.reading() as db:
        query = sa.select(SESSIONS.c.csrf, RATERS).join(RATERS, RATERS.c.id == SESSIONS.c.rater)
        query = query.where(SESSIONS.c.id == hashed(cookie), SESSIONS.c.expires > ledger.clock())
        found = db.execute(query.where(RATERS.c.run == run)).mappings().first()
        if found is None:
            raise NoEntry("Please enter with the link you were sent.")
        return Session(_person(found), found["csrf"])


def leave(ledger: Ledger, cookie: str) -> None:
    """Ends the session of a cookie."""
    with ledger.writing() as db:
        db.execute(SESSIONS.delete().where(SESSIONS.c.id == hashed(cookie)))


def person(db: Connection, id_: str) -> Person:
    """Returns the account of this id."""
    return _person(db.execute(sa.select(RATERS).where(RATERS.c.id == id_)).mappings().one())


def everybody(ledger: Ledger, run: str) -> list[Person]:
    """Returns all accounts of a run, in the order they were made."""
    with ledger.reading() as db:
        return [
            _person(row)
            for row in db.execute(
                sa.select(RATERS).where(RATERS.c.run == run).order_by(RATERS.c.time, RATERS.c.id)
            ).mappings()
        ]


def _person(row: Any) -> Person:
    strata = json.loads(row["strata"])
    return Person(
        row["id"],
        row["run"],
        json.loads(row["name"]),
        row["role"],
        row["state"],
        strata,
        row["chances"],
        row["gate"],
    )


def declare(ledger: Ledger, id_: str, strata: Mapping[str, str]) -> None:
    """Records what a rater declares about themselves."""
    with ledger.writing() as db:
        db.execute(
            RATERS.update().where(RATERS.c.id == id_).values(strata=json.dumps(dict(strata)))
        )


def set_state(ledger: Ledger, run: str, id_: str, state: str) -> None:
    """Sets a rater's state for a lead: "active" (with a clean record) or "paused".

    Raises:
        ValueError: another state, or no rater of that id.
    """
    if state not in ("active", "paused"):
        raise ValueError(f"A lead sets an account active or paused, not {state!r}.")
    with ledger.writing() as db:
        clean = {"gate": ledger.clock(), "chances": 0} if state == "active" else {}
        if not db.execute(
            RATERS.update()
            .where(RATERS.c.id == id_, RATERS.c.run == run)
            .values(state=state, **clean)
        ).rowcount:
            raise ValueError("There is no such account.")
        note(db, run, id_, state, "set by a lead", ledger.clock())


def try_again(ledger: Ledger, id_: str) -> None:
    """Gives a rater who failed gold a second chance: practice, on gold they have not seen."""
    with ledger.writing() as db:
        if (who := person(db, id_)).state == "gated":
            now = ledger.clock()
            db.execute(
                RATERS.update()
                .where(RATERS.c.id == id_)
                .values(state="practice", chances=RATERS.c.chances + 1, gate=now)
            )
            note(db, who.run, id_, "practice", "began the second chance", now)


def check_gold(db: Connection, who: Person, share: float, now: float, ended: bool = False) -> None:
    """Gates a rater whose gold is too often wrong. Earlier answers stay; the lead sees when it
    happened.

    At least four gold answers are needed; the latest eight count. In practice four decide, or as
    many as there are when no gold is left that they have not seen.

    Args:
        db: a connection that may write.
        who: the rater.
        share: of the gold that must be right.
        now: the time, in seconds.
        ended: no gold is left for them.
    """
    query = (
        sa.select(LEASES.c.right)
        .join(ITEMS, ITEMS.c.id == LEASES.c.item)
        .where(
            LEASES.c.rater == who.id,
            ITEMS.c.gold.is_not(None),
            LEASES.c.status == "answered",
            LEASES.c.answered > who.gate,
        )
        .order_by(LEASES.c.answered.desc())
        .limit(GOLD_FIRST if who.state == "practice" else GOLD_LAST)
    )
    right = list(db.scalars(query))
    if len(right) < GOLD_FIRST and not (ended and who.state == "practice"):
        return
    passed = bool(right) and sum(right) >= share * len(right)
    if who.state == "practice":
        state = "active" if passed else "blocked"
    elif passed or who.state != "active":
        return
    else:
        state = "blocked" if who.chances else "gated"
    db.execute(RATERS.update().where(RATERS.c.id == who.id).values(state=state, gate=now))
    note(db, who.run, who.id, state, f"{sum(right)} of {len(right)} gold answers were right", now)


def note(
    db: Connection,
    run: str,
    rater: str,
    kind: str,
    detail: str,
    now: float,
    lease: str | None = None,
) -> None:
    """Records something a lead should see."""
    db.execute(
        EVENTS.insert().values(
            run=run, rater=rater, kind=kind, lease=lease, detail=detail[:1000], time=now
        )
    )
