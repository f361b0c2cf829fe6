"""The desk: hands tasks to raters and takes their answers.

A slot is one request of the ledger: an item that three people should judge has three. The rules, whoever asks at the same moment
(every method that changes something is one transaction of the ledger's only writer):

- a rater holds a task for a while (a lease); when that is over, somebody else may have its slot;
- nobody gets an item twice;
- a slot is filled once; an answer whose slot was given away takes a free one, or is kept as an extra opinion;
- an answer that was sent twice is one answer; one that is sent again with other content is a correction;
- gold looks like everything else, and is drawn at random.
"""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ...engine.episode import Episode, canonical_json, derive_id
from ...engine.exchange import import_data
from ...engine.feedback import Comparison, Feedback, Request, Stamp
from ...engine.ledger import FEEDBACK, MEMBERS, REQUESTS, Answer, Ledger
from ...engine.preferences import PreferenceError
from . import raters, tasks
from .tables import EVENTS, ITEMS, LEASES, RATERS, STUDIES, prepare

ACTIVE = 900.0  # seconds without a sign after which a rater counts as away
SAME = 10  # answers alike in a row that are flagged


class DeskError(Exception):
    """What a rater asks for cannot be given; the message is for them."""


class NotYours(DeskError):
    """A task that this rater does not hold."""


@dataclass(frozen=True, slots=True)
class Task:
    """An item in a rater's hands.

    Attributes:
        shown: the conversations, in the order they are displayed.
        draft: the form as they left it; after an answer, what they answered.
        study: the options of its `People` source.
    """

    id: str
    source: str
    study: Mapping[str, Any]
    shown: tuple[Episode, ...]
    draft: Mapping[str, str]
    status: str


@dataclass(frozen=True, slots=True)
class Said:
    """An answer and how it came about.

    Attributes:
        seconds: from when the task was handed out.
        chosen: how the item was: "value", "random" or "gold".
        right: of gold, whether it was.
    """

    item: str
    source: str
    task: str
    rater: str
    answer: Answer
    seconds: float
    chosen: str
    right: bool | None
    time: float
    gold: bool


class Desk:
    """Args:
    ledger: where everything lies.
    luck: what draws; default: the system's.
    """

    def __init__(self, ledger: Ledger, luck: random.Random | None = None) -> None:
        self.ledger = ledger
        self.luck = luck or secrets.SystemRandom()
        if not getattr(ledger, "_people", False):  # once per ledger object
            prepare(ledger)
            ledger._people = True  # type: ignore[attr-defined]

    # What the run lays out.

    def publish(self, run: str, source: str, settings: Mapping[str, Any], instructions: str) -> None:
        """What raters are asked and how; the latest word counts."""
        row = {"settings": json.dumps(dict(settings)), "instructions": json.dumps(instructions)}
        with self.ledger.writing() as db:
            mine = (STUDIES.c.run == run, STUDIES.c.source == source)
            if db.scalar(sa.select(STUDIES.c.source).where(*mine)) is None:
                db.execute(STUDIES.insert().values(run=run, source=source, paused=False, **row))
            else:
                db.execute(STUDIES.update().where(*mine).values(**row))

    def add_items(self, run: str, requests: Iterable[Request], gold: Mapping[str, Any] | None = None) -> None:
        """Items to be judged; those that are there already stay as they are.

        Args:
            gold: the known answers, by item.
        """
        rows = [
            {
                "id": r.item, "run": run, "source": r.source, "target": r.target, "group": r.episodes[0].group,
                "start": r.episodes[0].start.key, "shown": canonical_json([e.id for e in r.episodes]), "value": 0.0,
                "valued": False, "luck": int(derive_id("luck", r.item)[:12], 16) / 16**12,
                "gold": None if gold is None else canonical_json(gold[r.item]), "time": self.ledger.clock(),
            }
            for r in requests
        ]  # fmt: skip
        with self.ledger.writing() as db:
            known = set(db.scalars(sa.select(ITEMS.c.id).where(ITEMS.c.run == run)))
            if fresh := [row for row in rows if row["id"] not in known]:
                db.execute(ITEMS.insert(), fresh)

    def add_gold(self, run: str, source: str, task: str, path: Path) -> None:
        """Gold from a file in any format of docs/preference-data.md: comparisons for rank and compare, scores or labels for score, scores of
        turns for mark (the first that is not positive is where it went wrong).

        Raises:
            PreferenceError: the file holds something else.
        """
        found = import_data(path, run=f"{run}/gold", stage=source, update=0)
        by_id = {e.id: e for e in found.episodes}
        requests: list[Request] = []
        known: dict[str, Any] = {}
        shown: tuple[Episode, ...]
        right: dict[str, Any]
        answers: list[Answer] = [*found.comparisons, *found.scores]
        for said in answers:
            kinds: tuple[str, ...]
            if isinstance(said, Comparison):
                shown = tuple(by_id[e] for tier in said.ranking for e in tier)
                kinds, right = ("rank", "compare"), {"ranking": said.ranking}
            elif said.turn_scores is not None:
                wrong = next((k for k, mark in enumerate(said.turn_scores) if mark is not None and mark <= 0), None)
                shown, kinds, right = (by_id[said.episode],), ("mark",), {"first_wrong": wrong}
            else:
                points = [said.score] if said.score is not None else list(said.aspects.values())
                shown, kinds, right = (by_id[said.episode],), ("score",), {"score": sum(p or 0.0 for p in points) / len(points)}
            if task not in kinds or (task == "compare" and len(shown) != 2):
                raise PreferenceError(f"{path} holds answers that cannot be gold for the task {task}")
            kind: Any = "group" if isinstance(said, Comparison) else "episode"
            requests.append(Request(kind, said.target, source, 0, None, False, {"gold": said.id}, shown))
            known[requests[-1].item] = right
        self.ledger.add_episodes(found.episodes)
        self.add_items(run, requests, known)

    # What raters do.

    def next(self, run: str, rater: str) -> str | None:
        """The id of the task this rater holds, or else of a new one; None: there is nothing for them now.

        Raises:
            DeskError: they may not work now, and why.
        """
        now = self.ledger.clock()
        with self.ledger.writing() as db:
            person = raters.person(db, rater)
            if person.why:
                raise DeskError(person.why)
            open_ = db.execute(
                sa.select(LEASES, ITEMS.c.source)
                .join(ITEMS, ITEMS.c.id == LEASES.c.item)
                .where(LEASES.c.rater == rater, LEASES.c.status == "open", ITEMS.c.run == run)
                .order_by(LEASES.c.since.desc())
            ).mappings()
            studies = self._studies(db, run)
            for lease in open_.all():
                if lease["source"] in studies and self._take(db, lease, now):
                    self._renew(db, lease, studies[lease["source"]], now)
                    return str(lease["id"])
            if not studies:
                return None
            found = self._draw(db, run, person, studies, now)
            if found is None:
                return None
            item, request, chosen = found
            shown = json.loads(item["shown"])
            self.luck.shuffle(shown)
            row = {
                "id": secrets.token_urlsafe(16), "item": item["id"], "rater": rater, "request": request, "status": "open",
                "order": canonical_json(shown), "chosen": chosen, "draft": "{}", "attempt": 0, "delivered": 0,
                "since": now, "expires": now + float(studies[item["source"]]["lease"]),
            }  # fmt: skip
            db.execute(LEASES.insert().values(**row))
            return row["id"]

    def task(self, id_: str, rater: str) -> Task:
        """A task this rater has, or had.

        Raises:
            NotYours: it is somebody else's, or nobody's.
        """
        with self.ledger.reading() as db:
            lease = self._lease(db, id_, rater)
            item = self._item(db, lease["item"])
            study = self._studies(db, item["run"], paused=True)[item["source"]]
        return Task(id_, item["source"], study, self._shown(lease), json.loads(lease["draft"]), lease["status"])

    def draft(self, id_: str, rater: str, form: Mapping[str, str]) -> None:
        """Keeps the form as it stands; the lease begins anew."""
        with self.ledger.writing() as db:
            lease = self._lease(db, id_, rater)
            if lease["status"] != "open":
                return
            db.execute(LEASES.update().where(LEASES.c.id == id_).values(draft=_form(form)))
            item = self._item(db, lease["item"])
            study = self._studies(db, item["run"], paused=True)[item["source"]]
            if self._take(db, lease, self.ledger.clock()):
                self._renew(db, lease, study, self.ledger.clock())

    def answer(self, id_: str, rater: str, form: Mapping[str, str]) -> str:
        """Takes an answer, and says what became of it: "new", "again" (nothing changed), "corrected", or "extra" (all slots were taken).

        Raises:
            NotYours; DeskError: they may not work now; FormError: it is not an answer.
        """
        now = self.ledger.clock()
        with self.ledger.reading() as db:
            lease = self._lease(db, id_, rater)
        shown = self._shown(lease)  # read before anybody has to wait for it
        with self.ledger.writing() as db:
            lease = self._lease(db, id_, rater)
            person = raters.person(db, rater)
            if person.why and lease["status"] != "answered":
                raise DeskError(person.why)
            item = self._item(db, lease["item"])
            study = self._studies(db, item["run"], paused=True)[item["source"]]
            seconds = round(now - lease["since"], 1) if lease["seconds"] is None else lease["seconds"]
            more = {"seconds": seconds, "chosen": lease["chosen"]}
            said = tasks.read(study["task"], form, shown, study["aspects"], study["scale"], more)
            content = _say(said)
            if lease["status"] == "answered" and content == lease["answer"]:
                return "again"
            result = "corrected" if lease["status"] == "answered" or lease["attempt"] else "new"
            if lease["status"] != "answered" and item["gold"] is None and not self._take(db, lease, now):
                result = "extra"
            right = None if item["gold"] is None else tasks.agrees(said, json.loads(item["gold"]))
            db.execute(
                LEASES.update().where(LEASES.c.id == id_).values(
                    status="answered", draft=_form(form), answer=content, attempt=lease["attempt"] + 1, seconds=seconds,
                    right=right, answered=now,
                )
            )  # fmt: skip
            self._flag(db, person, lease, study, shown, said, seconds, now)
            if right is not None:
                raters.check_gold(db, person, float(study["gold_pass"]), now)
            return result

    def skip(self, id_: str, rater: str, reason: str) -> None:
        """Passes an item on to others. When enough raters have, it counts as one that nobody can judge.

        Raises:
            NotYours; DeskError: it has been answered.
        """
        with self.ledger.writing() as db:
            lease = self._lease(db, id_, rater)
            if lease["status"] == "answered":
                raise DeskError("This task has an answer; correct that instead.")
            now, item = self.ledger.clock(), self._item(db, lease["item"])
            db.execute(LEASES.update().where(LEASES.c.id == id_).values(status="skipped", expires=now))
            raters.note(db, rater, "skipped", reason.strip()[: tasks.COMMENT], now, id_)
            study = self._studies(db, item["run"], paused=True)[item["source"]]
            passed = sa.select(sa.func.count()).where(LEASES.c.item == item["id"], LEASES.c.status == "skipped")
            if item["gold"] is None and (db.scalar(passed) or 0) >= int(study["skips"]) and self._take(db, lease, now):
                kind: Any = Comparison if study["task"] in ("rank", "compare") else Feedback
                said = kind.abstained(
                    item["target"], reason.strip()[: tasks.COMMENT] or "skipped", shown={"order": json.loads(lease["order"])}
                )
                db.execute(
                    LEASES.update().where(LEASES.c.id == id_).values(
                        status="answered", answer=_say(said), attempt=lease["attempt"] + 1, answered=now
                    )
                )  # fmt: skip

    def undo(self, run: str, rater: str) -> Task:
        """Takes the last answer back: its task is open again, with the form as it was sent.

        Raises:
            DeskError: there is none, or it has trained.
        """
        now = self.ledger.clock()
        with self.ledger.writing() as db:
            last = db.execute(
                sa.select(LEASES, ITEMS.c.group)
                .join(ITEMS, ITEMS.c.id == LEASES.c.item)
                .where(LEASES.c.rater == rater, LEASES.c.status == "answered", ITEMS.c.run == run)
                .order_by(LEASES.c.answered.desc())
                .limit(1)
            ).mappings().first()  # fmt: skip
            if last is None:
                raise DeskError("There is no answer to take back.")
            decided = sa.select(MEMBERS.c.group).where(MEMBERS.c.group == last["group"]).limit(1)
            if last["delivered"] and db.scalar(decided) is not None:
                raise DeskError("Your last answer has been used already and cannot be taken back.")
            item = self._item(db, last["item"])
            lease = float(self._studies(db, run, paused=True)[item["source"]]["lease"])
            db.execute(LEASES.update().where(LEASES.c.id == last["id"]).values(status="open", since=now, expires=now + lease))
        return self.task(last["id"], rater)

    def progress(self, run: str, rater: str) -> dict[str, int]:
        """How many tasks this rater has done, today and in all, and how many of everybody's slots are filled."""
        now = self.ledger.clock()
        mine = sa.select(sa.func.count()).join(ITEMS, ITEMS.c.id == LEASES.c.item).select_from(LEASES)
        mine = mine.where(ITEMS.c.run == run, LEASES.c.rater == rater, LEASES.c.status == "answered")
        with self.ledger.reading() as db:
            own = {"mine": db.scalar(mine) or 0, "today": db.scalar(mine.where(LEASES.c.answered > now - now % 86400)) or 0}
        return own | self.slots(run)

    def slots(self, run: str, source: str | None = None) -> dict[str, int]:
        """How many slots there are, and how many of them are filled."""
        slots = sa.select(sa.func.count()).select_from(REQUESTS.join(ITEMS, ITEMS.c.id == REQUESTS.c.item))
        slots = slots.where(ITEMS.c.run == run, *([] if source is None else [ITEMS.c.source == source]))
        with self.ledger.reading() as db:
            return {"filled": db.scalar(slots.where(~_unfilled())) or 0, "slots": db.scalar(slots) or 0}

    # What the run collects.

    def due(self, run: str, source: str, undo: float) -> list[Answer]:
        """Answers that can no longer be taken back and that the ledger does not have."""
        decided = sa.select(MEMBERS.c.group).where(MEMBERS.c.group == ITEMS.c.group).exists()
        query = (
            sa.select(LEASES, RATERS.c.strata, STUDIES.c.settings, decided.label("decided"))
            .join(ITEMS, ITEMS.c.id == LEASES.c.item)
            .join(RATERS, RATERS.c.id == LEASES.c.rater)
            .join(STUDIES, sa.and_(STUDIES.c.run == ITEMS.c.run, STUDIES.c.source == ITEMS.c.source))
            .where(
                ITEMS.c.run == run, ITEMS.c.source == source, ITEMS.c.gold.is_(None), LEASES.c.status == "answered",
                LEASES.c.delivered < LEASES.c.attempt, LEASES.c.answered <= self.ledger.clock() - undo,
            )
            .order_by(LEASES.c.answered, LEASES.c.id)
        )  # fmt: skip
        with self.ledger.reading() as db:
            return [_answer(row) for row in db.execute(query).mappings()]

    def answers(self, run: str) -> list[Said]:
        """Everything raters said in this run, gold and what is not delivered yet included, in the order it was said."""
        query = (
            sa.select(
                LEASES, ITEMS.c.source, ITEMS.c.gold, RATERS.c.strata, STUDIES.c.settings, sa.literal(False).label("decided")
            )
            .join(ITEMS, ITEMS.c.id == LEASES.c.item)
            .join(RATERS, RATERS.c.id == LEASES.c.rater)
            .join(STUDIES, sa.and_(STUDIES.c.run == ITEMS.c.run, STUDIES.c.source == ITEMS.c.source))
            .where(ITEMS.c.run == run, LEASES.c.status == "answered")
            .order_by(LEASES.c.answered, LEASES.c.id)
        )
        with self.ledger.reading() as db:
            rows = list(db.execute(query).mappings())
        return [
            Said(
                row["item"], row["source"], json.loads(row["settings"])["task"], row["rater"], _answer(row), row["seconds"] or 0.0,
                row["chosen"], row["right"], row["answered"], row["gold"] is not None,
            )
            for row in rows
        ]  # fmt: skip

    def delivered(self, ids: Sequence[str]) -> None:
        """The ledger has these answers now."""
        with self.ledger.writing() as db:
            query = sa.select(LEASES.c.id, LEASES.c.attempt).where(LEASES.c.delivered < LEASES.c.attempt)
            for lease, attempt in db.execute(query).all():
                if derive_id(lease, attempt) in ids:
                    db.execute(LEASES.update().where(LEASES.c.id == lease).values(delivered=attempt))

    def pace(self, run: str, source: str) -> tuple[int, float | None]:
        """How many raters are at work, and in how many seconds they will be through at this pace; None where nobody can tell."""
        now = self.ledger.clock()
        mine = (ITEMS.c.run == run, ITEMS.c.source == source)
        recent = sa.select(sa.func.count(sa.distinct(LEASES.c.rater))).join(ITEMS, ITEMS.c.id == LEASES.c.item)
        answers = sa.select(sa.func.count(), sa.func.min(LEASES.c.answered)).join(ITEMS, ITEMS.c.id == LEASES.c.item)
        with self.ledger.reading() as db:
            active = (
                db.scalar(recent.where(*mine, sa.or_(LEASES.c.since > now - ACTIVE, LEASES.c.answered > now - ACTIVE))) or 0
            )
            done, first = db.execute(answers.where(*mine, LEASES.c.answered > now - ACTIVE)).one()
            joined = REQUESTS.join(ITEMS, ITEMS.c.id == REQUESTS.c.item)
            left = db.scalar(sa.select(sa.func.count()).select_from(joined).where(*mine, _unfilled())) or 0
        if done < 2 or now <= first:
            return active, None
        return active, left * (now - first) / done

    # Within a transaction.

    def _studies(self, db: Connection, run: str, paused: bool = False) -> dict[str, dict[str, Any]]:
        query = sa.select(STUDIES.c.source, STUDIES.c.settings).where(STUDIES.c.run == run)
        if not paused:
            query = query.where(~STUDIES.c.paused)
        return {source: json.loads(settings) for source, settings in db.execute(query)}

    def _item(self, db: Connection, item: str) -> Any:
        return db.execute(sa.select(ITEMS).where(ITEMS.c.id == item)).mappings().one()

    def _lease(self, db: Connection, id_: str, rater: str) -> Any:
        found = db.execute(sa.select(LEASES).where(LEASES.c.id == id_, LEASES.c.rater == rater)).mappings().first()
        if found is None:
            raise NotYours("There is no such task among yours.")
        return found

    def _take(self, db: Connection, lease: Any, now: float) -> bool:
        """Makes sure that a lease has a slot: its own, if nobody else has it now, or another one of its item. False: all are taken."""
        item = self._item(db, lease["item"])
        if item["gold"] is not None:
            return True
        free = (
            sa.select(REQUESTS.c.id)
            .where(REQUESTS.c.item == lease["item"], _unfilled(), ~_held(now, besides=lease["id"]))
            .order_by(REQUESTS.c.id != (lease["request"] or ""), REQUESTS.c.rater_slot)
            .limit(1)
        )
        own = sa.select(FEEDBACK.c.request).where(FEEDBACK.c.request == lease["request"])
        if lease["delivered"] and db.scalar(own.limit(1)) is not None:
            return True  # its slot is filled, by itself
        slot = db.scalar(free)
        db.execute(LEASES.update().where(LEASES.c.id == lease["id"]).values(request=slot))
        return slot is not None

    def _renew(self, db: Connection, lease: Any, study: Mapping[str, Any], now: float) -> None:
        db.execute(LEASES.update().where(LEASES.c.id == lease["id"]).values(expires=now + float(study["lease"])))

    def _draw(
        self, db: Connection, run: str, person: raters.Person, studies: Mapping[str, Mapping[str, Any]], now: float
    ) -> tuple[Any, str | None, str] | None:
        """An item, its slot and how it was chosen."""
        seen = sa.select(LEASES.c.id).where(LEASES.c.item == ITEMS.c.id, LEASES.c.rater == person.id).exists()
        mine = (ITEMS.c.run == run, ITEMS.c.source.in_(sorted(studies)), ~seen)
        share = max(float(s["gold_share"]) for s in studies.values())
        if person.state == "practice" or self.luck.random() < share:
            same = ITEMS.alias()  # gold made from an item must not come back to those who judged that item
            known = sa.select(LEASES.c.id).join(same, same.c.id == LEASES.c.item)
            known = known.where(LEASES.c.rater == person.id, same.c.shown == ITEMS.c.shown)
            query = sa.select(ITEMS).where(*mine, ITEMS.c.gold.is_not(None), ~known.exists()).order_by(ITEMS.c.luck)
            gold = db.execute(query).mappings().all()
            if gold:
                return self.luck.choice(gold), None, "gold"
            if person.state == "practice":
                raise DeskError("There are no more practice tasks. Please write to the person who invited you.")
        every = next(iter(studies.values()))
        chosen = "random" if every["order"] == "random" or self.luck.random() < float(every["random_share"]) else "value"
        decided = sa.select(MEMBERS.c.episode).where(MEMBERS.c.group == ITEMS.c.group).exists()
        query = (
            sa.select(ITEMS, REQUESTS.c.id.label("request"))
            .join(REQUESTS, REQUESTS.c.item == ITEMS.c.id)
            .where(
                *mine, ITEMS.c.gold.is_(None), _unfilled(), ~_held(now), sa.or_(~decided, ~REQUESTS.c.required),
                sa.or_(REQUESTS.c.deadline.is_(None), REQUESTS.c.deadline > now),
            )
        )  # fmt: skip
        covered = sa.select(sa.func.count()).where(LEASES.c.status == "answered", LEASES.c.item == ITEMS.c.id).scalar_subquery()
        by_value = (REQUESTS.c.required.desc(), ITEMS.c.value.desc(), covered.desc(), ITEMS.c.time, ITEMS.c.luck)
        order = (ITEMS.c.luck,) if chosen == "random" else by_value
        found = db.execute(query.order_by(*order, REQUESTS.c.rater_slot).limit(1)).mappings().first()
        return None if found is None else (found, found["request"], chosen)

    def _shown(self, lease: Any) -> tuple[Episode, ...]:
        order = json.loads(lease["order"])
        found = self.ledger.episodes(order)
        return tuple(found[id_] for id_ in order)

    def _flag(
        self, db: Connection, person: raters.Person, lease: Any, study: Mapping[str, Any], shown: Sequence[Episode], said: Answer,
        seconds: float, now: float,
    ) -> None:  # fmt: skip
        """Notes what a lead should look at. An answer is never dropped for it."""
        words = sum(len(m.content.split()) for e in shown for m in e.messages)
        least = max(1.0, 60 * words / float(study["reading"]))
        if said.status == "scored" and seconds < least:
            raters.note(db, person.id, "too fast", f"{seconds:.1f} s for {words} words", now, lease["id"])
        query = (
            sa.select(LEASES.c.answer, LEASES.c.order)
            .join(ITEMS, ITEMS.c.id == LEASES.c.item)
            .where(
                LEASES.c.rater == person.id,
                LEASES.c.status == "answered",
                ITEMS.c.source == self._item(db, lease["item"])["source"],
            )
            .order_by(LEASES.c.answered.desc())
            .limit(SAME)
        )
        looks = {_look(json.loads(answer), json.loads(order)) for answer, order in db.execute(query)}
        count = db.scalar(sa.select(sa.func.count()).where(LEASES.c.rater == person.id, LEASES.c.status == "answered")) or 0
        if len(looks) == 1 and count >= SAME and count % SAME == 0:
            raters.note(db, person.id, "always the same", f"the last {SAME} answers are alike: {looks.pop()}", now, lease["id"])


def _unfilled() -> Any:
    """Requests that neither the ledger nor a rater's answer has filled."""
    in_ledger = sa.select(FEEDBACK.c.id).where(FEEDBACK.c.request == REQUESTS.c.id).exists()
    on_desk = sa.select(LEASES.c.id).where(LEASES.c.request == REQUESTS.c.id, LEASES.c.status == "answered").exists()
    return sa.and_(~in_ledger, ~on_desk)


def _held(now: float, besides: str = "") -> Any:
    """Requests that a rater has in their hands."""
    live = (LEASES.c.request == REQUESTS.c.id, LEASES.c.status == "open", LEASES.c.expires > now, LEASES.c.id != besides)
    return sa.select(LEASES.c.id).where(*live).exists()


def _form(form: Mapping[str, str]) -> str:
    """A form as JSON, without what belongs to the session."""
    return json.dumps({k: v for k, v in form.items() if k != "csrf"})


def _say(said: Answer) -> str:
    """What was said, as JSON."""
    keep = ("ranking", "strength", "score", "turn_scores", "aspects", "comment", "status", "reason", "shown", "details")
    return canonical_json({"target": said.target} | {k: getattr(said, k) for k in keep if hasattr(said, k)})


def _answer(row: Any) -> Answer:
    """An answer as the ledger takes it."""
    study, said = json.loads(row["settings"]), json.loads(row["answer"])
    kind: type[Answer] = Comparison if study["task"] in ("rank", "compare") else Feedback
    declared = json.loads(row["strata"])
    stratum = next((declared[name] for name in study["strata"] if name in declared), "")
    earlier = derive_id(row["id"], row["delivered"]) if row["delivered"] and not row["decided"] else None
    stamp = Stamp(request=row["request"], time=row["answered"], rater=row["rater"], stratum=stratum)
    return kind(said.pop("target"), **said, id=derive_id(row["id"], row["attempt"]), supersedes=earlier, stamp=stamp)


def _look(said: Mapping[str, Any], order: Sequence[str]) -> str:
    """What an answer looks like from outside: which place was best, which points were given."""
    if said["status"] != "scored":
        return said["status"]
    if "ranking" in said:
        place = {e: i for i, tier in enumerate(said["ranking"]) for e in tier}
        return "ranks " + " ".join(str(place[e] + 1) for e in order if e in place)
    if said.get("turn_scores"):
        return "all turns alike" if len(set(said["turn_scores"])) == 1 else str(said["turn_scores"])
    return "points " + " ".join(f"{v:g}" for _, v in sorted(said["aspects"].items()))


__all__ = ["EVENTS", "Desk", "DeskError", "NotYours", "Task"]
