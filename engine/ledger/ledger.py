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
import json
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import LedgerError
from ..records.episode import Episode
from ..records.feedback import Answer, Comparison, Feedback, Request
from ..util.ids import canonical_json
from .database import Database
from .migrations import migrate
from .queries import about, chunks, current
from .rows import Member, decode_answer, decode_episode, encode_answer
from .tables import EPISODES, FEEDBACK, INFO, MEMBERS, METADATA, REQUESTS, SCHEMA


class Ledger(Database):
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

    # What a run must know of its ledger.

    def mark(self, run: str) -> dict[str, Any]:
        """Returns a summary of what the ledger holds now: its id, the episodes and members of a
        run, and all feedback. None of these counts ever decreases."""
        queries = {
            "episodes": (
                sa.select(sa.func.count()).select_from(EPISODES).where(EPISODES.c.run == run)
            ),
            "members": sa.select(sa.func.count()).select_from(MEMBERS).where(MEMBERS.c.run == run),
            "feedback": sa.select(sa.func.count()).select_from(FEEDBACK),
        }
        with self.reading() as db:
            return {
                "id": self.id,
                **{name: int(db.scalar(query) or 0) for name, query in queries.items()},
            }

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

    def episodes(self, ids: Sequence[str]) -> dict[str, Episode]:
        """Returns episodes by id; unknown ids are left out."""
        with self.reading() as db:
            return self._load(db, ids)

    def run_episodes(
        self, run: str, *, stage: str | None = None, update: int | None = None
    ) -> list[Episode]:
        """Returns a run's episodes, by update, stage, group and slot."""
        query = sa.select(EPISODES.c.id, EPISODES.c.content).where(EPISODES.c.run == run)
        if stage is not None:
            query = query.where(EPISODES.c.stage == stage)
        if update is not None:
            query = query.where(EPISODES.c.update == update)
        query = query.order_by(
            EPISODES.c.update, EPISODES.c.stage, EPISODES.c.group, EPISODES.c.slot
        )
        with self.reading() as db:
            return [decode_episode(id_, content) for id_, content in db.execute(query)]

    def _load(self, db: Connection, ids: Sequence[str]) -> dict[str, Episode]:
        found: dict[str, Episode] = {}
        for some in chunks(ids):
            query = sa.select(EPISODES.c.id, EPISODES.c.content).where(EPISODES.c.id.in_(some))
            found |= {id_: decode_episode(id_, content) for id_, content in db.execute(query)}
        return found

    # Requests.

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

    def open_requests(self, groups: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """Returns requests without an answer that have not expired: id, kind, target, group,
        source, rater_slot, required, deadline, and the time they were first asked."""
        with self.reading() as db:
            return [dict(row) for row in self._open(db, groups)]

    def failed_requests(self, requests: Sequence[str]) -> dict[str, str]:
        """Returns those of the requests whose only answer in force says that it failed, and that
        answer's id.

        Requests on groups whose members are written are left out: no answer on them can matter any
        more.
        """
        decided = sa.select(MEMBERS.c.group).where(MEMBERS.c.group == REQUESTS.c.group).exists()
        found: dict[str, str] = {}
        with self.reading() as db:
            for some in chunks(requests):
                query = sa.select(FEEDBACK.c.request, FEEDBACK.c.id, FEEDBACK.c.status)
                query = query.join(REQUESTS, REQUESTS.c.id == FEEDBACK.c.request).where(~decided)
                rows = list(db.execute(query.where(FEEDBACK.c.request.in_(some), current())))
                sound = {request for request, _, status in rows if status != "failed"}
                found |= {request: id_ for request, id_, _ in rows if request not in sound}
        return found

    def _open(self, db: Connection, groups: Iterable[str] | None) -> list[Any]:
        answered = sa.select(FEEDBACK.c.request).where(FEEDBACK.c.request == REQUESTS.c.id).exists()
        query = sa.select(REQUESTS).where(
            ~answered, sa.or_(REQUESTS.c.deadline.is_(None), REQUESTS.c.deadline > self.clock())
        )
        if groups is not None:
            query = query.where(REQUESTS.c.group.in_(list(groups)))
        return list(db.execute(query.order_by(REQUESTS.c.time, REQUESTS.c.id)).mappings())

    def ready_groups(self, groups: Sequence[str], update: int | None = None) -> list[str]:
        """Returns those of the groups that wait for no required answer any more and have not
        trained.

        Those that are members of `update` already are ready for it again: an interrupted update is
        repeated.
        """
        with self.reading() as db:
            waiting = {row["group"] for row in self._open(db, groups) if row["required"]}
            query = sa.select(MEMBERS.c.group, MEMBERS.c.update).where(
                MEMBERS.c.group.in_(list(groups))
            )
            trained = dict(db.execute(query).tuples().all())
        return [g for g in groups if (trained[g] == update if g in trained else g not in waiting)]

    # Feedback.

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

    def feedback(self, groups: Sequence[str]) -> list[Answer]:
        """Returns all answers in force on these groups and their episodes, in the order they came;
        without superseded and late ones."""
        rows: list[Any] = []
        with self.reading() as db:
            for some in chunks(groups):
                query = sa.select(FEEDBACK).where(
                    about(EPISODES.c.group.in_(some)), current(), ~FEEDBACK.c.late
                )
                rows += db.execute(query).mappings()
        return [decode_answer(row) for row in sorted(rows, key=lambda r: (r["time"], r["id"]))]

    def feedback_by(self, sources: Sequence[str], groups: Sequence[str]) -> list[Answer]:
        """Returns the scored answers in force of these sources on these groups and their episodes,
        in the order they came; late ones too."""
        rows: list[Any] = []
        with self.reading() as db:
            for some in chunks(groups):
                query = sa.select(FEEDBACK).where(about(EPISODES.c.group.in_(some)), current())
                # A source has many more answers, on other groups.
                query = query.where(FEEDBACK.c.status == "scored")
                rows += [row for row in db.execute(query).mappings() if row["source"] in sources]
        return [decode_answer(row) for row in sorted(rows, key=lambda r: (r["time"], r["id"]))]

    def answers(self, ids: Sequence[str]) -> list[Answer]:
        """Returns answers by id, in the order they came, whether or not they are still in force."""
        rows: list[Any] = []
        with self.reading() as db:
            for some in chunks(ids):
                rows += db.execute(sa.select(FEEDBACK).where(FEEDBACK.c.id.in_(some))).mappings()
        return [decode_answer(row) for row in sorted(rows, key=lambda r: (r["time"], r["id"]))]

    def run_feedback(self, run: str) -> list[Answer]:
        """Returns all answers in force on a run's conversations, whatever their status, late ones
        too; in the order they came."""
        query = sa.select(FEEDBACK).where(about(EPISODES.c.run == run), current())
        with self.reading() as db:
            return [
                decode_answer(row)
                for row in db.execute(query.order_by(FEEDBACK.c.time, FEEDBACK.c.id)).mappings()
            ]

    def feedback_before(
        self, run: str, source: str, update: int, newest: int = 5000
    ) -> list[Answer]:
        """Returns a source's answers in force on groups that were decided up to an update: the
        newest of them, in the order they came.

        The result is the same for a run that was interrupted and resumed, whatever answers came
        since.
        """
        # Per answer one look-up by the target's own index: `run` and `update` are compared with
        # what it finds, and are no way to find it.
        own = sa.and_(MEMBERS.c.run + "" == run, MEMBERS.c.update + 0 <= update)
        about = sa.or_(
            sa.select(MEMBERS.c.episode)
            .where(MEMBERS.c.episode == FEEDBACK.c.target, own)
            .exists(),
            sa.select(MEMBERS.c.episode).where(MEMBERS.c.group == FEEDBACK.c.target, own).exists(),
        )
        query = sa.select(FEEDBACK).where(
            FEEDBACK.c.source == source, about, current(), ~FEEDBACK.c.late
        )
        with self.reading() as db:
            rows = list(
                db.execute(
                    query.order_by(FEEDBACK.c.time.desc(), FEEDBACK.c.id).limit(newest)
                ).mappings()
            )
        return [decode_answer(row) for row in reversed(rows)]

    def comparisons(
        self, run: str, *, stages: Sequence[str] | None = None, everything: bool = False
    ) -> list[Comparison]:
        """Returns a run's scored comparisons in force, by group and id.

        Args:
            stages: only those of conversations played or imported there.
            everything: also those that were corrected since; for training that began before.
        """
        found = self._scored("comparison", EPISODES.c.group, run, stages, everything)
        return [a for a in found if isinstance(a, Comparison)]

    def scores(self, run: str, *, stages: Sequence[str] | None = None) -> list[Feedback]:
        """Returns a run's scored feedback in force, by episode and id; late answers too.

        Args:
            stages: only that on conversations played or imported there.
        """
        found = self._scored("feedback", EPISODES.c.id, run, stages, everything=False)
        return [a for a in found if isinstance(a, Feedback)]

    def _scored(
        self, kind: str, target: Any, run: str, stages: Sequence[str] | None, everything: bool
    ) -> list[Answer]:
        targets = sa.select(target).where(EPISODES.c.run == run)
        if stages is not None:
            targets = targets.where(EPISODES.c.stage.in_(list(stages)))
        query = sa.select(FEEDBACK).where(
            FEEDBACK.c.kind == kind, FEEDBACK.c.status == "scored", FEEDBACK.c.target.in_(targets)
        )
        if not everything:
            query = query.where(current())
        with self.reading() as db:
            return [
                decode_answer(row)
                for row in db.execute(query.order_by(FEEDBACK.c.target, FEEDBACK.c.id)).mappings()
            ]

    # Updates.

    def add_members(self, run: str, update: int, members: Sequence[Member]) -> None:
        """Records the members of an update, before it happens. Writing the same again is a no-op.

        Answers on these episodes and groups that are not among the members' feedback came too late,
        and are marked so.

        Raises:
            LedgerError: an episode has trained in another update.
        """
        with self.writing() as db:
            known: dict[str, int] = {}
            for some in chunks([m.episode for m in members]):
                query = sa.select(MEMBERS.c.episode, MEMBERS.c.update).where(
                    MEMBERS.c.episode.in_(some)
                )
                known |= dict(db.execute(query).tuples().all())
            twice = {e: u for e, u in known.items() if u != update}
            if twice:
                episode, other = next(iter(twice.items()))
                raise LedgerError(
                    f"episode {episode!r} trained in update {other} and cannot train in update"
                    f" {update} again"
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

    def decided(self, groups: Sequence[str]) -> dict[str, int]:
        """Returns those of the groups that are members of an update, and which update: further
        answers on them are late."""
        found: dict[str, int] = {}
        with self.reading() as db:
            for some in chunks(groups):
                query = (
                    sa.select(MEMBERS.c.group, MEMBERS.c.update)
                    .where(MEMBERS.c.group.in_(some))
                    .distinct()
                )
                found |= dict(db.execute(query).tuples().all())
        return found

    def members(self, run: str, update: int | None = None) -> list[Member]:
        """Returns the members of a run's updates, or of one of them, by update, group and
        episode."""
        query = sa.select(MEMBERS).where(MEMBERS.c.run == run)
        if update is not None:
            query = query.where(MEMBERS.c.update == update)
        return [member for _, member in self._members(query)]

    def members_by_update(self, run: str, updates: Sequence[int]) -> dict[int, list[Member]]:
        """Returns the members of each of these updates, in one query."""
        found: dict[int, list[Member]] = {update: [] for update in updates}
        query = sa.select(MEMBERS).where(
            MEMBERS.c.run == run, MEMBERS.c.update.between(min(updates), max(updates))
        )
        for update, member in self._members(query):
            if update in found:
                found[update].append(member)
        return found

    def _members(self, query: Any) -> list[tuple[int, Member]]:
        with self.reading() as db:
            rows = db.execute(
                query.order_by(MEMBERS.c.update, MEMBERS.c.group, MEMBERS.c.episode)
            ).mappings()
            return [
                (
                    r["update"],
                    Member(
                        r["episode"],
                        r["group"],
                        r["used"],
                        r["reason"],
                        r["outcome"],
                        tuple(json.loads(r["feedback"])),
                        tuple(json.loads(r["credit"])),
                    ),
                )
                for r in rows
            ]

    # For reports.

    def rounds(self, run: str) -> list[tuple[str, int]]:
        """Returns every (stage, update) that played, in order."""
        query = sa.select(EPISODES.c.stage, EPISODES.c.update, sa.func.min(EPISODES.c.time)).where(
            EPISODES.c.run == run
        )
        query = query.group_by(EPISODES.c.stage, EPISODES.c.update)
        with self.reading() as db:
            found = sorted(db.execute(query).tuples(), key=lambda row: (row[1], row[2]))
        return [(stage, update) for stage, update, _ in found]

    def feedback_summary(self, groups: Sequence[str]) -> list[dict[str, Any]]:
        """Counts the answers on these groups and their episodes, by source: how many scored,
        abstained and failed."""
        found: dict[str, dict[str, Any]] = {}
        with self.reading() as db:
            for some in chunks(groups):
                query = sa.select(FEEDBACK.c.source, FEEDBACK.c.status, sa.func.count())
                query = query.where(about(EPISODES.c.group.in_(some)))
                for source, status, count in db.execute(
                    query.group_by(FEEDBACK.c.source, FEEDBACK.c.status)
                ).tuples():
                    row = found.setdefault(
                        source, {"source": source, "scored": 0, "abstained": 0, "failed": 0}
                    )
                    row[status] += count
        return [found[name] for name in sorted(found)]

    def counts(self, run: str | None = None) -> dict[str, int]:
        """Returns the number of rows per table; of one run, or of all that share this ledger."""
        tables = {
            "episodes": EPISODES,
            "requests": REQUESTS,
            "feedback": FEEDBACK,
            "members": MEMBERS,
        }
        queries = {
            name: sa.select(sa.func.count()).select_from(table) for name, table in tables.items()
        }
        if run is not None:
            groups = sa.select(EPISODES.c.group).where(EPISODES.c.run == run)
            queries["episodes"] = queries["episodes"].where(EPISODES.c.run == run)
            queries["requests"] = queries["requests"].where(REQUESTS.c.group.in_(groups))
            queries["feedback"] = queries["feedback"].where(about(EPISODES.c.run == run))
            queries["members"] = queries["members"].where(MEMBERS.c.run == run)
        with self.reading() as db:
            return {name: int(db.scalar(query) or 0) for name, query in queries.items()}

    def spend(self, run: str | None = None) -> dict[str, float]:
        """Returns the cost so far by source; of one run, or of all that share this ledger."""
        query = sa.select(FEEDBACK.c.source, sa.func.sum(FEEDBACK.c.cost)).group_by(
            FEEDBACK.c.source
        )
        if run is not None:
            query = query.where(about(EPISODES.c.run == run))
        with self.reading() as db:
            return {source: float(cost) for source, cost in db.execute(query)}
