"""What a ledger holds: episodes, requests, feedback, training members, sums."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..records.episode import Episode
from ..records.feedback import Answer, Status
from .database import Database, again
from .queries import about, check_filters, chunks, current, decided_until
from .rows import Member, decode_answer, decode_episode
from .tables import EPISODES, FEEDBACK, MEMBERS, REQUESTS


class LedgerReader(Database):
    """Reads a ledger; `Ledger` writes it.

    Attributes:
        clock: the time that requests expire by, seconds.
    """

    clock: Callable[[], float]

    @again
    def episodes(self, ids: Sequence[str]) -> dict[str, Episode]:
        """Returns episodes by id; unknown ids are left out."""
        with self.reading() as db:
            return self._load(db, ids)

    @again
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

    @again
    def judged_episodes(self, run: str, sources: Sequence[str]) -> list[Episode]:
        """Returns a run's episodes that a source has scored and that are no members of an update,
        by the time they were recorded."""
        scored = sa.select(FEEDBACK.c.id).where(
            FEEDBACK.c.target == EPISODES.c.id, FEEDBACK.c.status == "scored",
            FEEDBACK.c.source.in_(list(sources)), current(),
        )  # fmt: skip
        decided = sa.select(MEMBERS.c.episode).where(MEMBERS.c.episode == EPISODES.c.id)
        query = sa.select(EPISODES.c.id, EPISODES.c.content).where(
            EPISODES.c.run == run, scored.exists(), ~decided.exists()
        )
        with self.reading() as db:
            rows = db.execute(query.order_by(EPISODES.c.time, EPISODES.c.id))
            return [decode_episode(id_, content) for id_, content in rows]

    def _load(self, db: Connection, ids: Sequence[str]) -> dict[str, Episode]:
        found: dict[str, Episode] = {}
        for some in chunks(ids):
            query = sa.select(EPISODES.c.id, EPISODES.c.content).where(EPISODES.c.id.in_(some))
            found |= {id_: decode_episode(id_, content) for id_, content in db.execute(query)}
        return found

    @again
    def open_requests(self, groups: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Returns requests without an answer that have not expired: id, kind, target, group,
        source, rater_slot, required, deadline, and the time they were first asked."""
        with self.reading() as db:
            return [dict(row) for row in self._open(db, groups)]

    @again
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

    @again
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

    @again
    def feedback(
        self,
        groups: Sequence[str] | None = None,
        *,
        ids: Sequence[str] | None = None,
        run: str | None = None,
        stages: Sequence[str] | None = None,
        decided_by: int | None = None,
        sources: Sequence[str] | None = None,
        kind: Literal["feedback", "comparison"] | None = None,
        status: Status | None = None,
        late: bool = False,
        corrected: bool = False,
        newest: int | None = None,
        order: Literal["time", "target"] = "time",
    ) -> list[Answer]:
        """Returns the answers to which all of these apply.

        Args:
            groups: on these groups or their episodes.
            ids: of these ids.
            run: on the conversations of this run.
            stages: on conversations played or imported there; with `run`.
            decided_by: on groups that were members of an update up to this one; with `run`. The
                same for a run that was interrupted and resumed, whatever came since.
            sources: from these.
            kind: scores of single conversations, or comparisons.
            status: scored, abstained or failed.
            late: also answers that came after their group was decided.
            corrected: also answers that a correction has replaced.
            newest: the last so many of them, as they came.
            order: as they came, or by what they are about; then by id.

        Raises:
            ValueError: filters that do not go together, or one that is no list or no such word.
        """
        check_filters(run, groups, ids, stages, sources, decided_by, kind, status, order)
        conditions = [] if late else [~FEEDBACK.c.late]
        if not corrected:
            conditions.append(current())
        if decided_by is not None:
            conditions.append(decided_until(run, decided_by))
        elif run is not None:
            played = EPISODES.c.run == run
            if stages is not None:
                played = sa.and_(played, EPISODES.c.stage.in_(list(stages)))
            conditions.append(about(played, kind))
        for column, value in ((FEEDBACK.c.kind, kind), (FEEDBACK.c.status, status)):
            if value is not None:
                conditions.append(column == value)
        if sources is not None and groups is None:
            conditions.append(FEEDBACK.c.source.in_(list(sources)))
        query = sa.select(FEEDBACK).where(*conditions)
        if newest is not None and groups is None and ids is None:
            query = query.order_by(FEEDBACK.c.time.desc(), FEEDBACK.c.id.desc()).limit(newest)
        queries = [query]
        if groups is not None:
            queries = [query.where(about(EPISODES.c.group.in_(c), kind)) for c in chunks(groups)]
        if ids is not None:
            queries = [q.where(FEEDBACK.c.id.in_(some)) for q in queries for some in chunks(ids)]
        with self.reading() as db:
            rows = [row for each in queries for row in db.execute(each).mappings()]
        # On few groups: a source has many more answers, and its index would be the slower way.
        if sources is not None and groups is not None:
            rows = [row for row in rows if row["source"] in sources]
        if newest is not None:
            rows = sorted(rows, key=lambda r: (r["time"], r["id"]))[max(0, len(rows) - newest) :]
        return [decode_answer(row) for row in sorted(rows, key=lambda r: (r[order], r["id"]))]

    @again
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

    @again
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

    @again
    def deleted_members(self, run: str) -> dict[str, int]:
        """Returns the episodes that a run has trained on and that were deleted since, and in which
        update."""
        there = sa.select(EPISODES.c.id).where(EPISODES.c.id == MEMBERS.c.episode)
        query = sa.select(MEMBERS.c.episode, MEMBERS.c.update).where(
            MEMBERS.c.run == run, MEMBERS.c.used, ~there.exists()
        )
        with self.reading() as db:
            return dict(db.execute(query.order_by(MEMBERS.c.update)).tuples().all())

    @again
    def rounds(self, run: str) -> list[tuple[str, int]]:
        """Returns every (stage, update) that played, in order."""
        query = sa.select(EPISODES.c.stage, EPISODES.c.update, sa.func.min(EPISODES.c.time)).where(
            EPISODES.c.run == run
        )
        query = query.group_by(EPISODES.c.stage, EPISODES.c.update)
        with self.reading() as db:
            found = sorted(db.execute(query).tuples(), key=lambda row: (row[1], row[2]))
        return [(stage, update) for stage, update, _ in found]

    @again
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

    @again
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

    @again
    def spend(self, run: str | None = None) -> dict[str, float]:
        """Returns the cost so far by source; of one run, or of all that share this ledger."""
        query = sa.select(FEEDBACK.c.source, sa.func.sum(FEEDBACK.c.cost)).group_by(
            FEEDBACK.c.source
        )
        if run is not None:
            query = query.where(about(EPISODES.c.run == run))
        with self.reading() as db:
            return {source: float(cost) for source, cost in db.execute(query)}
