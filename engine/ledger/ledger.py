"""The ledger: episodes, requests, feedback and the members of every update. Durable, and shared by
trainer, raters and judges.

Rules it holds, whatever is written to it:

- a request has one key (target, source, rater slot, what is asked); asking again is a no-op;
- the giver makes a feedback's id: the same id and content again is a no-op, other content an error;
- a correction is a new row that supersedes an old one, until the episode has trained;
- a group is ready when every required request of every member is answered or expired, and it trains
  once;
- the members of an update are written before the update; what arrives later is kept and never
  trains.

SQLite in WAL mode by default; PostgreSQL by URL (`postgresql://user:password@host/database`), for a
team. Both let one writer in at a time, from the first statement of its transaction on (`BEGIN
IMMEDIATE`, an advisory lock): every rule above is a look followed by a write, and nothing may come
between the two.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import LedgerError
from ..records.episode import Episode
from ..records.feedback import Answer, Comparison, Feedback, Request
from ..util.ids import canonical_json
from .database import again
from .migrations import migrate
from .queries import chunks, current
from .reader import LedgerReader
from .rows import Member, encode_answer
from .tables import EPISODES, FEEDBACK, INFO, MEMBERS, METADATA, REQUESTS, SCHEMA


class Ledger(LedgerReader):
    """A ledger, opened or created.

    Args:
        url: `sqlite:///path`, `postgresql://user:password@host/database` (any SQLAlchemy URL of
            these two), or the path of an SQLite file.
        clock: seconds; the one clock of everything that is stamped or expires.
        lock_timeout: seconds to wait for another writer.
        create: False refuses a database that holds no ledger yet, instead of making one there.

    Attributes:
        id: drawn when the ledger was made; copies share it, no other ledger has it.

    Raises:
        LedgerError: another process holds the lock, the file is no ledger, or a newer version wrote
            it.
    """

    what = "ledger"
    error = LedgerError

    def __init__(
        self,
        url: str | Path,
        *,
        clock: Callable[[], float] = time.time,
        lock_timeout: float = 30.0,
        create: bool = True,
    ) -> None:
        super().__init__(url, lock_timeout, create=create)
        self.clock = clock
        with self.writing() as db:
            if not sa.inspect(db).has_table("info"):
                if not create:
                    raise LedgerError(f"the ledger {self.url} is empty: it holds no run")
                METADATA.create_all(db)
                db.execute(
                    INFO.insert(),
                    [
                        {"key": "schema", "value": str(SCHEMA)},
                        {"key": "id", "value": uuid.uuid4().hex},
                    ],
                )
            info = dict(db.execute(sa.select(INFO.c.key, INFO.c.value)).tuples().all())
            schema = info.get("schema", "")
            if not schema.isdecimal():
                raise LedgerError(
                    f"the database {self.url} is no ledger: its table `info` is another program's"
                )
            if int(schema) > SCHEMA:
                raise LedgerError(
                    f"the ledger {self.url} was written by a newer Turnwise (schema {schema}, this"
                    f" one knows {SCHEMA}): upgrade turnwise, or start a new run folder"
                )
            if int(schema) < SCHEMA:
                info |= migrate(db, int(schema))
                warnings.warn(
                    f"the ledger {self.url} was written by an older Turnwise (schema {schema}) and"
                    f" has been brought up to date ({SCHEMA}); everything in it stays",
                    stacklevel=2,
                )
        self.id = info["id"]

    def __repr__(self) -> str:
        return f"<Ledger {self.url}>"

    # What a run must know of its ledger.

    @again
    def mark(self, run: str) -> dict[str, Any]:
        """Returns a summary of what the ledger holds now: its id, the episodes and members of a
        run, and all feedback, deleted ones included: none of these counts ever decreases."""
        queries = {
            "episodes": (
                sa.select(sa.func.count()).select_from(EPISODES).where(EPISODES.c.run == run)
            ),
            "members": sa.select(sa.func.count()).select_from(MEMBERS).where(MEMBERS.c.run == run),
            "feedback": sa.select(sa.func.count()).select_from(FEEDBACK),
        }
        with self.reading() as db:
            gone = dict(db.execute(sa.select(INFO.c.key, INFO.c.value)).tuples().all())
            counts = {name: int(db.scalar(query) or 0) for name, query in queries.items()}
        counts["episodes"] += int(gone.get(f"deleted episodes of {run}", 0))
        counts["feedback"] += int(gone.get("deleted feedback", 0))
        return {"id": self.id, **counts}

    def expect(self, run: str, mark: Mapping[str, Any]) -> None:
        """Checks that this is the ledger that was marked, and that nothing of it was lost since.

        Raises:
            LedgerError: it is another one, or holds less; the message says what is missing.
        """
        now = self.mark(run)
        if mark.get("id", now["id"]) != now["id"]:
            raise LedgerError(
                f"the ledger {self.url} is not the one that this run wrote to: its id is"
                f" {now['id']}, and should be {mark['id']}. Put the run's own back (ledger.sqlite,"
                " and ledger.sqlite-wal where there is one)"
            )
        missing = [
            f"{now[k]} of {mark[k]} {k}"
            for k in ("episodes", "members", "feedback")
            if now[k] < mark.get(k, 0)
        ]
        if missing:
            raise LedgerError(
                f"the ledger {self.url} holds less than the run had written at its last checkpoint:"
                f" {', '.join(missing)}. It is an older copy, or was copied without its file"
                " ledger.sqlite-wal: put the newest copy back, with that file"
            )

    # Episodes.

    @again
    def add_episodes(self, episodes: Sequence[Episode]) -> list[Episode]:
        """Records episodes and returns them as recorded.

        An id that is there already wins over the one given: a replay after a crash changes nothing.
        """
        with self.writing() as db:
            known = self._load(db, [e.id for e in episodes])
            rows = [
                {
                    "id": e.id, "run": e.run, "stage": e.stage, "update": e.update,
                    "group": e.group, "slot": e.slot,
                    "env": e.start.env, "ending": e.ending, "reason": e.reason,
                    "time": self.clock(),
                    "content": zlib.compress(canonical_json(e.to_dict()).encode(), 1),
                }
                for e in {e.id: e for e in episodes}.values()
                if e.id not in known
            ]  # fmt: skip
            if rows:
                db.execute(EPISODES.insert(), rows)
        return [known.get(e.id, e) for e in episodes]

    @again
    def forget(self, ids: Sequence[str]) -> dict[str, tuple[str, int]]:
        """Deletes episodes for good, and what was asked about them and answered. What is left are
        the ids of those that have trained, and their credit.

        Returns:
            the run and the update that an episode has trained in, by id.
        """
        found: dict[str, tuple[str, int]] = {}
        counts: Counter[str] = Counter()
        with self.writing() as db:
            for some in chunks(ids):
                own = EPISODES.c.id.in_(some)
                runs = db.execute(sa.select(EPISODES.c.run).where(own)).scalars()
                counts.update(f"deleted episodes of {run}" for run in runs)
                about = FEEDBACK.c.target.in_(some)
                query = sa.select(sa.func.count()).select_from(FEEDBACK).where(about)
                counts["deleted feedback"] += int(db.scalar(query) or 0)
                trained = sa.select(MEMBERS.c.episode, MEMBERS.c.run, MEMBERS.c.update)
                rows = db.execute(trained.where(MEMBERS.c.episode.in_(some), MEMBERS.c.used))
                found |= {episode: (run, update) for episode, run, update in rows.tuples()}
                db.execute(REQUESTS.delete().where(REQUESTS.c.target.in_(some)))
                db.execute(FEEDBACK.delete().where(about))
                db.execute(EPISODES.delete().where(own))
            for key, count in counts.items():
                before = db.scalar(sa.select(INFO.c.value).where(INFO.c.key == key))
                db.execute(INFO.delete().where(INFO.c.key == key))
                db.execute(INFO.insert().values(key=key, value=str(count + int(before or 0))))
        self.wipe()
        return found

    # Requests.

    @again
    def add_requests(self, requests: Sequence[Request]) -> None:
        """Records requests; one that is there already stays as it was, its deadline too."""
        with self.writing() as db:
            known = set()
            for some in chunks([r.id for r in requests]):
                known |= set(db.scalars(sa.select(REQUESTS.c.id).where(REQUESTS.c.id.in_(some))))
            rows = [
                {
                    "id": r.id, "kind": r.kind, "target": r.target, "source": r.source,
                    "rater_slot": r.rater_slot,
                    "group": r.group, "required": r.required,
                    "deadline": r.deadline, "ask": canonical_json(dict(r.ask)), "item": r.item,
                    "shown": canonical_json([e.id for e in r.episodes]), "time": self.clock(),
                }
                for r in {r.id: r for r in requests}.values()
                if r.id not in known
            ]  # fmt: skip
            if rows:
                db.execute(REQUESTS.insert(), rows)

    # Feedback.

    @again
    def add_feedback(self, answers: Sequence[Answer]) -> list[Answer]:
        """Records answers; returns those that are new, with their stamp. All or none.

        Raises:
            LedgerError: an answer without id, an id that is known with other content, a correction
                of something unknown or already corrected, or an answer to an episode or group that
                was not played.
        """
        with self.writing() as db:
            return self.record(db, answers)

    def record(self, db: Connection, answers: Sequence[Answer]) -> list[Answer]:
        """Does `add_feedback` as part of a larger transaction of `writing`."""
        new: list[Answer] = []
        if answers:
            now = self.clock()
            nameless = next((a for a in answers if not a.id), None)
            if nameless is not None:
                raise LedgerError(
                    f"feedback on {nameless.target!r} has no id; the giver makes it, so that it can"
                    " be repeated"
                )
            contents: dict[str, str] = {}
            for some in chunks([a.id for a in answers]):
                query = sa.select(FEEDBACK.c.id, FEEDBACK.c.content).where(FEEDBACK.c.id.in_(some))
                contents |= dict(db.execute(query).tuples().all())
            known, trained = self._targets(db, answers)
            rows: list[dict[str, Any]] = []
            for answer in answers:
                content = encode_answer(answer)
                if answer.id in contents:
                    if contents[answer.id] != content:
                        raise LedgerError(
                            f"feedback {answer.id!r} is recorded with other content. A correction"
                            f" needs an id of its own and supersedes={answer.id!r}."
                        )
                    continue
                contents[answer.id] = content
                if answer.target not in known:
                    raise LedgerError(
                        f"feedback {answer.id!r} speaks of {answer.target!r}, which this ledger"
                        " does not know"
                    )
                kind = "comparison" if isinstance(answer, Comparison) else "feedback"
                if answer.supersedes is not None:
                    self._insert(db, rows)  # it may correct one of these
                    rows = []
                    self._check_correction(db, kind, answer, answer.target in trained)
                stamp = dataclasses.replace(answer.stamp, time=answer.stamp.time or now)
                rows.append(
                    {
                        "id": answer.id, "kind": kind, "target": answer.target,
                        "request": stamp.request, "source": stamp.source,
                        "version": stamp.version, "rater": stamp.rater, "stratum": stamp.stratum,
                        "status": answer.status,
                        "score": answer.score if isinstance(answer, Feedback) else None,
                        "content": content,
                        "supersedes": answer.supersedes, "cost": stamp.cost,
                        "late": answer.target in trained,
                        "time": stamp.time,
                    }
                )  # fmt: skip
                new.append(dataclasses.replace(answer, stamp=stamp))
            self._insert(db, rows)
        return new

    def _insert(self, db: Connection, rows: list[dict[str, Any]]) -> None:
        if rows:
            db.execute(FEEDBACK.insert(), rows)

    def _targets(self, db: Connection, answers: Sequence[Answer]) -> tuple[set[str], set[str]]:
        """Returns those of the answers' episodes and groups that were played, and those that have
        trained."""
        known: set[str] = set()
        trained: set[str] = set()
        for kind, column, member in (
            (Feedback, EPISODES.c.id, MEMBERS.c.episode),
            (Comparison, EPISODES.c.group, MEMBERS.c.group),
        ):
            for some in chunks(list({a.target for a in answers if isinstance(a, kind)})):
                known |= set(db.scalars(sa.select(column).where(column.in_(some))))
                trained |= set(db.scalars(sa.select(member).where(member.in_(some))))
        return known, trained

    def _check_correction(self, db: Connection, kind: str, answer: Answer, trained: bool) -> None:
        old = (
            db.execute(sa.select(FEEDBACK).where(FEEDBACK.c.id == answer.supersedes))
            .mappings()
            .first()
        )
        if old is None or old["target"] != answer.target or old["kind"] != kind:
            raise LedgerError(
                f"feedback {answer.id!r} supersedes {answer.supersedes!r}, which is no feedback on"
                " the same target"
            )
        later = db.scalar(
            sa.select(FEEDBACK.c.id).where(FEEDBACK.c.supersedes == answer.supersedes)
        )
        if later is not None:
            raise LedgerError(
                f"feedback {answer.supersedes!r} is superseded by {later!r} already; supersede"
                " that one"
            )
        if trained:
            raise LedgerError(
                f"feedback {answer.supersedes!r} has trained and cannot be corrected any more; send"
                " the correction without `supersedes`, and both are kept"
            )

    # Updates.

    @again
    def add_members(self, run: str, update: int, members: Sequence[Member]) -> None:
        """Records the members of an update, before it happens. Writing the same again is a no-op.

        Answers on these episodes and groups that are not among the members' feedback came too late,
        and are marked so.

        Raises:
            LedgerError: an episode has trained in another update.
        """
        with self.writing() as db:
            known: dict[str, tuple[str, int]] = {}
            for some in chunks([m.episode for m in members]):
                query = sa.select(MEMBERS.c.episode, MEMBERS.c.run, MEMBERS.c.update).where(
                    MEMBERS.c.episode.in_(some)
                )
                known |= {e: (own, u) for e, own, u in db.execute(query).tuples()}
            twice = {e: place for e, place in known.items() if place != (run, update)}
            if twice:
                episode, (other, earlier) = next(iter(twice.items()))
                of = "" if other == run else f" of run {other}"
                raise LedgerError(
                    f"episode {episode!r} trained in update {earlier}{of} and cannot train in"
                    f" update {update} again"
                )
            rows = [
                {
                    "episode": m.episode, "run": run, "update": update, "group": m.group,
                    "used": m.used, "reason": m.reason,
                    "outcome": m.outcome, "feedback": canonical_json(list(m.feedback)),
                    "credit": canonical_json(list(m.credit)), "time": self.clock(),
                }
                for m in members
                if m.episode not in known
            ]  # fmt: skip
            if rows:
                db.execute(MEMBERS.insert(), rows)
            fresh = [m for m in members if m.episode not in known]
            used = {id_ for m in fresh for id_ in m.feedback}
            targets = {t for m in fresh for t in (m.episode, m.group)}
            for some in chunks(sorted(targets)):
                query = sa.select(FEEDBACK.c.id).where(
                    FEEDBACK.c.target.in_(some), current(), ~FEEDBACK.c.late
                )
                late = [id_ for id_ in db.scalars(query) if id_ not in used]
                if late:
                    db.execute(FEEDBACK.update().where(FEEDBACK.c.id.in_(late)).values(late=True))

    # For reports.
