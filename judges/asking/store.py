"""Stores what judging leaves behind: verdicts in a cache of its own, and requests and money in the
run's ledger.

The cache is addressed by content: a hash of everything that a verdict depends on (model, judge,
rubric, the texts that are judged, the order in which they were shown). It lives at a URL of its
own, so that runs share it. The account is the run's: every request that was sent, what it brought
and cost.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from ...protocols import DatabaseError, Paused
from ...running import Database, Words, again, keep
from ...tools import canonical_json
from ..models.model import Usage

_cache = sa.MetaData()
VERDICTS = sa.Table(
    "verdicts",
    _cache,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("content", sa.Text, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
)

_account = sa.MetaData()
CALLS = sa.Table(  # one row per request that was sent
    "judge_calls",
    _account,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run", sa.String, nullable=False, index=True),
    sa.Column("source", Words, nullable=False),
    sa.Column("model", Words, nullable=False),
    sa.Column("key", sa.String, nullable=False),
    # "end", "length", "refused", ..., or the kind of error.
    sa.Column("status", Words, nullable=False),
    sa.Column("fresh", sa.Integer, nullable=False),
    sa.Column("read", sa.Integer, nullable=False),
    sa.Column("written", sa.Integer, nullable=False),
    sa.Column("output", sa.Integer, nullable=False),
    sa.Column("cost", sa.Float, nullable=False),
    # False: its cost is unknown; the most it can have cost is counted.
    sa.Column("certain", sa.Boolean, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
)
BATCHES = sa.Table(  # questions that were sent in batches, so that a run that was killed finds them
    "judge_batches",
    _account,
    sa.Column("key", sa.String, primary_key=True),  # of the question, within run and source
    sa.Column("run", sa.String, primary_key=True),
    sa.Column("source", Words, primary_key=True),
    sa.Column("custom_id", sa.String, nullable=False),
    sa.Column("nonce", sa.String, nullable=False),
    sa.Column("job", sa.String, nullable=False, index=True),
    sa.Column("batch", sa.String),  # None: being sent
    sa.Column("booked", sa.Boolean, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
)
CANARIES = sa.Table(  # how a judge did on conversations that are known to be bad
    "judge_canaries",
    _account,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("run", sa.String, nullable=False, index=True),
    sa.Column("source", Words, nullable=False),
    sa.Column("version", Words, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("fell", sa.Boolean),  # None: the judge failed on it
    sa.Column("said", sa.Text, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
)


def canaries(ledger: Database, run: str, source: str, version: str) -> list[tuple[str, bool]]:
    """Returns the canaries a judge was shown, in order: kind, and whether it fell for them."""
    query = sa.select(CANARIES.c.kind, CANARIES.c.fell).where(
        CANARIES.c.run == run,
        CANARIES.c.source == source,
        CANARIES.c.version == version,
        CANARIES.c.fell.is_not(None),
    )
    with ledger.reading() as db:
        return [
            (kind, bool(fell))
            for kind, fell in db.execute(query.order_by(CANARIES.c.time, CANARIES.c.id))
        ]


def add_canary(
    ledger: Database,
    id_: str,
    run: str,
    source: str,
    version: str,
    kind: str,
    fell: bool | None,
    payload: Any,
    time: float,
) -> bool:
    """Records how a judge judged a canary; returns False where it was shown this one before."""
    row = {
        "id": id_, "run": run, "source": source, "version": version, "kind": kind, "fell": fell,
        "said": canonical_json(payload),
        "time": time,
    }  # fmt: skip
    with ledger.writing() as db:
        if db.scalar(sa.select(CANARIES.c.id).where(CANARIES.c.id == id_)) is not None:
            return False
        db.execute(CANARIES.insert().values(**row))
    return True


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one question to a model.

    Attributes:
        payload: the verdict as data, in terms of what was judged, not of the ids in its prompt.
        cost: dollars paid for it now; a verdict from the cache costs nothing.
        requests: how many were sent for it.
        cached: whether it was known already.
        model: the one that answered.
    """

    status: Literal["scored", "abstained", "failed"]
    payload: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    cost: float = 0.0
    usage: Usage = field(default_factory=Usage)
    requests: int = 0
    cached: bool = False
    model: str = ""


def content_key(*parts: Any) -> str:
    """Returns a hash of everything a verdict depends on."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


class CacheError(DatabaseError):
    """The cache cannot be used."""


class Cache(Database):
    """A cache of verdicts by content.

    Args:
        url: an SQLite file's path, or any URL a ledger takes.
    """

    what = "judges' cache"
    error = CacheError

    def __init__(self, url: str | Path) -> None:
        super().__init__(url)
        with self.writing() as db:
            _cache.create_all(db)

    @again
    def get(self, key: str) -> Verdict | None:
        """Returns the verdict under a key; None where there is none."""
        with self.reading() as db:
            found = db.scalar(sa.select(VERDICTS.c.content).where(VERDICTS.c.key == key))
        return None if found is None else _verdict(found)

    @again
    def put(self, key: str, verdict: Verdict, now: float) -> Verdict:
        """Stores a verdict; one that is there already stays. A failure is not stored.

        Returns:
            the verdict that counts: the one that was there, with what the new one cost.
        """
        if verdict.status == "failed":
            return verdict
        content = canonical_json(
            {
                "status": verdict.status,
                "said": dict(verdict.payload),
                "reason": verdict.reason,
                "model": verdict.model,
            }
        )
        with self.writing() as db:
            found = db.scalar(sa.select(VERDICTS.c.content).where(VERDICTS.c.key == key))
            if found is None:
                db.execute(VERDICTS.insert().values(key=key, content=content, time=now))
                return verdict
        was = _verdict(found)
        return replace(
            was,
            cached=False,
            cost=verdict.cost,
            usage=verdict.usage,
            requests=verdict.requests,
        )

    def forget(
        self, models: Collection[str] = (), abstained: bool = False, since: float = 0.0
    ) -> int:
        """Deletes verdicts, so that they are asked for, and paid for, again. Returns how many.

        Args:
            models: of these alone, by name, with or without the provider, or by the dated name that
                answered; empty: of all.
            abstained: only where the judge abstained.
            since: only what came at or after this time.
        """
        with self.writing() as db:
            rows = db.execute(
                sa.select(VERDICTS.c.key, VERDICTS.c.content).where(VERDICTS.c.time >= since)
            ).all()
            gone = []
            for key, content in rows:
                data = json.loads(content)
                named = not models or any(_is(data["model"], name) for name in models)
                if named and (data["status"] == "abstained" or not abstained):
                    gone.append(key)
            for start in range(0, len(gone), 500):
                db.execute(VERDICTS.delete().where(VERDICTS.c.key.in_(gone[start : start + 500])))
        return len(gone)


def _verdict(content: str) -> Verdict:
    """Returns the verdict that was stored."""
    data = json.loads(content)
    return Verdict(data["status"], data["said"], data["reason"], cached=True, model=data["model"])


def _is(answered: str, name: str) -> bool:
    """Returns whether the model that answered is the one of a name: with its provider or without,
    with a date or without."""
    bare = name.partition(":")[2] or name
    return answered in (name, bare) or answered.startswith(f"{bare}-2")


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that was sent, as the account books it."""

    key: str
    model: str
    status: str
    usage: Usage
    cost: float
    certain: bool = True


class Account:
    """The account of a source in a run: what it has spent, and what it may spend.

    Money is reserved before a request is sent (the most it can cost) and settled when its answer is
    there, so that the budget holds with any number of requests under way.

    Args:
        ledger: the run's; None: nothing is kept.
        budget: dollars; None: no limit.
    """

    def __init__(
        self, ledger: Any, run: str, source: str, budget: float | None, clock: Any
    ) -> None:
        self._ledger, self._run, self._source, self._budget, self._clock = (
            ledger,
            run,
            source,
            budget,
            clock,
        )
        self.spent, self.reserved = 0.0, 0.0
        if ledger is not None:
            keep(ledger, _account)
            with ledger.reading() as db:
                query = sa.select(sa.func.coalesce(sa.func.sum(CALLS.c.cost), 0.0))
                self.spent = float(
                    db.scalar(query.where(CALLS.c.run == run, CALLS.c.source == source)) or 0.0
                )

    def reserve(self, amount: float, already_sent: bool = False) -> bool:
        """Reserves money; returns False where it must wait until what is under way is settled.

        Raises:
            Paused: there is nothing to wait for, the budget is spent.
        """
        if (
            not already_sent
            and self._budget is not None
            and self.spent + self.reserved + amount > self._budget
        ):
            if self.reserved > 0:
                return False
            raise Paused(
                f"the judge {self._source!r} has spent {self.spent:.4f} of its budget of"
                f" {self._budget:g}, and its next request may cost {amount:.4f}: give it a larger"
                " `budget` and go on"
            )
        self.reserved += amount
        return True

    def settle(self, reserved: float, entry: Entry | None, once: sa.Update | None = None) -> None:
        """Releases what was reserved, and books the request, if one was sent."""
        self.reserved = (
            0.0
            if math.isclose(self.reserved, reserved, abs_tol=1e-12)
            else self.reserved - reserved
        )
        if entry is not None:
            self.book(entry, once)

    def book(self, e: Entry, once: sa.Update | None = None) -> None:
        """Writes a request down.

        Args:
            e: the request, with what it used and cost.
            once: a statement that marks it as booked; where it changes nothing, that was done
                before.
        """
        if self._ledger is not None:
            row = {
                "run": self._run, "source": self._source, "model": e.model, "key": e.key,
                "status": e.status, "fresh": e.usage.fresh,
                "read": e.usage.read, "written": e.usage.written, "output": e.usage.output,
                "cost": e.cost, "certain": e.certain,
                "time": self._clock(),
            }  # fmt: skip
            with self._ledger.writing() as db:
                if once is not None and not db.execute(once).rowcount:
                    return
                db.execute(CALLS.insert(), row)
        self.spent += e.cost


def spending(database: Database) -> list[dict[str, Any]]:
    """Returns what was asked and paid for, by source and by how requests ended: `source`, `status`,
    `requests`, `tokens`, `cost` in dollars."""
    keep(database, _account)
    tokens = CALLS.c.fresh + CALLS.c.read + CALLS.c.written + CALLS.c.output
    query = (
        sa.select(
            CALLS.c.source,
            CALLS.c.status,
            sa.func.count().label("requests"),
            sa.func.sum(tokens).label("tokens"),
            sa.func.sum(CALLS.c.cost).label("cost"),
        )
        .group_by(CALLS.c.source, CALLS.c.status)
        .order_by(CALLS.c.source, CALLS.c.status)
    )
    with database.reading() as db:
        return [dict(row) for row in db.execute(query).mappings()]


def without_cost(verdict: Verdict) -> Verdict:
    """Returns the verdict at no cost, for a second call that asked the same: it is paid once."""
    return replace(verdict, cost=0.0, usage=Usage(), requests=0, cached=True)
