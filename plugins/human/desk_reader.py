"""What is on the desk: tasks, slots, progress, answers, what is worth asking next."""

from __future__ import annotations

import json
import random
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ...protocols import Episode
from ...running import SLOTS, Ledger
from . import raters
from .answers import RatedAnswer, Task, decode_answer
from .errors import NotYours
from .queries import at_work, held, leases, of_study, seen, unfilled, wanted
from .tables import ITEMS, LEASES, RATERS, STUDIES

ACTIVE = 900.0  # seconds without an answer after which a rater without a task counts as away
REMEMBERED = 1000  # conversations
# Of the items worth most, among which begun ones come first and little-covered starts next.
CLOSE = 50


class DeskReader:
    """Reads what the raters' service keeps; `Desk` changes it.

    Args:
        ledger: where everything lies; the tables of tables.py must be there (`keep`).
        luck: what draws; default: the system's.
    """

    def __init__(self, ledger: Ledger, luck: random.Random | None = None) -> None:
        self.ledger = ledger
        self.luck = luck or secrets.SystemRandom()
        self._known: dict[str, Episode] = {}

    def _look(
        self, db: Connection, run: str, rater: str, now: float
    ) -> tuple[list[Any], str, float] | None:
        """Finds what this rater should get, the best first: a lease of theirs, or items with a slot
        each; how it was chosen, and until when they may keep it."""
        person, studies = at_work(db, rater), self._studies(db, run)
        mine = leases().where(
            LEASES.c.rater == rater, LEASES.c.status == "open", ITEMS.c.run == run
        )
        for lease in db.execute(mine.order_by(LEASES.c.since.desc())).mappings().all():
            if lease["source"] in studies and self._slot(db, lease, now)[0] == "new":
                return [lease], "again", now + float(studies[lease["source"]]["lease"])
        found = self._draw(db, run, person, studies, now)
        if found is None and person.state == "practice":
            return [], "no gold", max(float(s["gold_pass"]) for s in studies.values())
        return (
            None
            if found is None
            else (*found, now + float(studies[found[0][0]["source"]]["lease"]))
        )

    def has_next(self, run: str, rater: str) -> bool:
        """Returns whether there is something for this rater, without handing it out."""
        with self.ledger.reading() as db:
            return (
                not raters.person(db, rater).why
                and self._look(db, run, rater, self.ledger.clock()) is not None
            )

    def task(self, id_: str, rater: str) -> Task:
        """Returns a task this rater has, or had.

        Raises:
            NotYours: it is another rater's, or does not exist.
        """
        with self.ledger.reading() as db:
            lease = self._lease(db, id_, rater)
            study = self._study(db, lease)
        return Task(
            id_,
            lease["source"],
            study,
            self._shown(lease),
            json.loads(lease["draft"]),
            lease["status"],
        )

    def progress(self, run: str, rater: str) -> dict[str, int]:
        """Returns how many tasks this rater has done, in the last day and in all."""
        now = self.ledger.clock()
        mine = sa.select(sa.func.count()).select_from(
            LEASES.join(ITEMS, ITEMS.c.id == LEASES.c.item)
        )
        mine = mine.where(
            ITEMS.c.run == run, LEASES.c.rater == rater, LEASES.c.status == "answered"
        )
        with self.ledger.reading() as db:
            return {
                "mine": db.scalar(mine) or 0,
                "today": db.scalar(mine.where(LEASES.c.answered > now - 86400)) or 0,
            }

    def answer_count(self, run: str) -> int:
        """Returns the number of answers of all raters, gold included: a count that did not grow
        after gold would give it away."""
        query = sa.select(sa.func.count()).select_from(
            LEASES.join(ITEMS, ITEMS.c.id == LEASES.c.item)
        )
        with self.ledger.reading() as db:
            return db.scalar(query.where(ITEMS.c.run == run, LEASES.c.status == "answered")) or 0

    def slots(self, run: str, source: str | None = None) -> dict[str, int]:
        """Returns how many slots there are, how many are filled, and how many wait for a rater."""
        now = self.ledger.clock()
        slots = sa.select(sa.func.count()).select_from(
            SLOTS.join(ITEMS, ITEMS.c.id == SLOTS.c.item)
        )
        slots = slots.where(
            ITEMS.c.run == run, *([] if source is None else [ITEMS.c.source == source])
        )
        with self.ledger.reading() as db:
            return {
                "filled": db.scalar(slots.where(~unfilled())) or 0,
                "slots": db.scalar(slots) or 0,
                "open": db.scalar(slots.where(unfilled(), *wanted(now))) or 0,
            }

    def answers(self, run: str, item: str | None = None) -> list[RatedAnswer]:
        """Returns all answers of raters in this run (to one item), gold and what is not collected
        yet included, in the order they were given."""
        query = (
            leases(RATERS.c.strata, STUDIES.c.settings)
            .join(RATERS, RATERS.c.id == LEASES.c.rater)
            .join(STUDIES, of_study())
        )
        query = query.where(
            ITEMS.c.run == run,
            LEASES.c.status == "answered",
            *([] if item is None else [ITEMS.c.id == item]),
        )
        with self.ledger.reading() as db:
            rows = list(db.execute(query.order_by(LEASES.c.answered, LEASES.c.id)).mappings())
        return [
            RatedAnswer(
                row["item"], row["source"], json.loads(row["ask"])["task"], row["rater"],
                decode_answer(row), row["seconds"] or 0.0,
                row["chosen"], row["right"], row["answered"], row["gold"] is not None,
            )
            for row in rows
        ]  # fmt: skip

    def pace(self, run: str, source: str) -> tuple[int, float | None]:
        """Returns how many raters are at work, and in how many seconds they will be done at this
        pace; None where that cannot be estimated."""
        now = self.ledger.clock()
        leases = LEASES.join(ITEMS, ITEMS.c.id == LEASES.c.item)
        mine, recent = (
            (ITEMS.c.run == run, ITEMS.c.source == source),
            LEASES.c.answered > now - ACTIVE,
        )
        working = sa.or_(recent, sa.and_(LEASES.c.status == "open", LEASES.c.expires > now))
        count = sa.select(sa.func.count(sa.distinct(LEASES.c.rater))).select_from(leases)
        answers = sa.select(sa.func.count(), sa.func.min(LEASES.c.answered)).select_from(leases)
        with self.ledger.reading() as db:
            active = db.scalar(count.where(*mine, working)) or 0
            done, first = db.execute(answers.where(*mine, recent)).one()
        if done < 2 or now <= first:
            return active, None
        return active, self.slots(run, source)["open"] * (now - first) / done

    def _studies(self, db: Connection, run: str) -> dict[str, dict[str, Any]]:
        """Returns the studies that raters may be handed tasks of, by source."""
        query = sa.select(STUDIES.c.source, STUDIES.c.settings).where(
            STUDIES.c.run == run, ~STUDIES.c.paused
        )
        return {
            source: json.loads(settings)
            for source, settings in db.execute(query.order_by(STUDIES.c.source))
        }

    def _study(self, db: Connection, lease: Any) -> dict[str, Any]:
        """Returns the options of a task's study, with the task as it was when it was asked."""
        query = sa.select(STUDIES.c.settings).where(
            STUDIES.c.run == lease["run"], STUDIES.c.source == lease["source"]
        )
        return {**json.loads(db.scalar(query) or "{}"), **json.loads(lease["ask"])}

    def _lease(self, db: Connection, id_: str, rater: str) -> Any:
        """Returns a lease with its item."""
        found = (
            db.execute(leases().where(LEASES.c.id == id_, LEASES.c.rater == rater))
            .mappings()
            .first()
        )
        if found is None:
            raise NotYours("There is no such task among yours.")
        return found

    def _slot(self, db: Connection, lease: Any, now: float) -> tuple[str, str | None]:
        if lease["gold"] is not None:
            return "new", None
        own = sa.select(SLOTS.c.answered).where(SLOTS.c.id == lease["request"])
        if lease["delivered"] and db.scalar(own):
            return "new", lease["request"]  # its slot is filled, by itself
        free = sa.select(SLOTS.c.id).join(ITEMS, ITEMS.c.id == SLOTS.c.item)
        free = free.where(
            SLOTS.c.item == lease["item"], unfilled(), ~held(now, besides=lease["id"])
        )
        free = free.order_by(SLOTS.c.id != (lease["request"] or ""), SLOTS.c.rater_slot).limit(1)
        slot = db.scalar(free.where(*wanted(now)))
        if slot is not None:
            return "new", slot
        return "late" if db.scalar(free) is not None else "extra", None

    def _draw(
        self,
        db: Connection,
        run: str,
        person: raters.Person,
        studies: Mapping[str, Mapping[str, Any]],
        now: float,
    ) -> tuple[list[Any], str] | None:
        """Draws items with a slot each, the best first, and tells how they were chosen. Studies
        take turns at random; what a run waits for comes before what it does not."""
        order = self.luck.sample(sorted(studies), len(studies))
        practice = person.state == "practice"
        for source in order if practice else order[:1]:
            wanted = practice or self.luck.random() < float(studies[source]["gold_share"])
            if wanted and (gold := self._gold(db, run, person, source)):
                return gold, "gold"
        for required in () if practice else (True, False):
            for source in order:
                if (
                    found := self._items(db, run, person, source, studies[source], required, now)
                ) is not None:
                    return found
        return None

    def _gold(self, db: Connection, run: str, person: raters.Person, source: str) -> list[Any]:
        query = sa.select(ITEMS, sa.null().label("request"))
        query = query.where(
            ITEMS.c.run == run,
            ITEMS.c.source == source,
            ITEMS.c.gold.is_not(None),
            ~seen(person.id, source),
        )
        found = db.execute(query.order_by(ITEMS.c.luck)).mappings().all()
        return self.luck.sample(found, len(found))

    def _items(
        self,
        db: Connection,
        run: str,
        person: raters.Person,
        source: str,
        study: Mapping[str, Any],
        required: bool,
        now: float,
    ) -> tuple[list[Any], str] | None:
        """Returns the next items of a study: of its random share in random order, or of the others
        by what an answer would teach."""
        share = 1.0 if study["order"] == "random" else float(study["random_share"])
        query = sa.select(ITEMS, SLOTS.c.id.label("request")).join(
            SLOTS, SLOTS.c.item == ITEMS.c.id
        )
        query = query.where(
            ITEMS.c.run == run, ITEMS.c.source == source, ITEMS.c.gold.is_(None),
            SLOTS.c.required == required, *wanted(now),
            unfilled(), ~held(now), ~seen(person.id, source),
        )  # fmt: skip
        at_random = query.where(ITEMS.c.luck < share).order_by(ITEMS.c.luck, SLOTS.c.rater_slot)
        by_value = query.where(ITEMS.c.luck >= share)
        by_value = by_value.order_by(
            ITEMS.c.value.desc(), ITEMS.c.time, ITEMS.c.luck, SLOTS.c.rater_slot
        )
        chance = self.luck.random() < share
        for lucky in (chance, not chance):
            found = list(db.execute((at_random if lucky else by_value).limit(CLOSE)).mappings())
            if found:
                return (found, "random") if lucky else (self._sorted(db, run, found), "value")
        return None

    def _sorted(self, db: Connection, run: str, found: Sequence[Any]) -> list[Any]:
        """Sorts items: of those worth the same, those that are begun come first, then those of
        starts that have been judged less often."""
        judged = sa.select(ITEMS.c.id, ITEMS.c.start).join(LEASES, LEASES.c.item == ITEMS.c.id)
        starts = {row["start"] for row in found}
        rows = db.execute(
            judged.where(
                ITEMS.c.run == run, ITEMS.c.start.in_(starts), LEASES.c.status == "answered"
            )
        ).all()
        begun, covered = Counter(row.id for row in rows), Counter(row.start for row in rows)
        return sorted(
            found, key=lambda row: (-row["value"], begun[row["id"]] == 0, covered[row["start"]])
        )

    def _shown(self, lease: Any) -> tuple[Episode, ...]:
        """Returns the conversations of a lease.

        They never change, so those looked at last are cached, unless they are huge.
        """
        # Threads replace the dictionary, and never change it.
        order, known = json.loads(lease["order"]), self._known
        if missing := [id_ for id_ in order if id_ not in known]:
            found = self.ledger.episodes(missing)
            small = {
                id_: e
                for id_, e in found.items()
                if sum(len(m.content) for m in e.messages) < 50_000
            }
            self._known = small if len(known) > REMEMBERED else {**known, **small}
            known = {**known, **found}
        return tuple(known[id_] for id_ in order)
