"""What a ledger holds: episodes, requests, feedback, training members, sums."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..records.episode import Episode
from ..records.feedback import Answer, Comparison, Feedback
from .database import Database
from .queries import about, chunks, current
from .rows import Member, decode_answer, decode_episode
from .tables import EPISODES, FEEDBACK, MEMBERS, REQUESTS


class LedgerReader(Database):
    """Reads a ledger; `Ledger` writes it.

    Attributes:
        clock: the time that requests expire by, seconds.
    """

    clock: Callable[[], float]

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
