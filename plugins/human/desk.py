"""The desk: hands tasks to raters and takes their answers.

A slot is one request of the ledger: an item that three people should judge has three. The rules,
which hold under concurrent requests (every method that changes something is one transaction of the
ledger's only writer):

- a rater holds a task for a while (a lease); when that is over, another rater may get its slot;
- a rater never gets an item twice, nor gold made of it;
- a slot is filled once; an answer whose slot was given away takes a free one, or is kept as an
  extra opinion;
- an answer that was sent twice is one answer; one that is sent again with other content is a
  correction;
- gold looks like everything else, and is drawn at random;
- the random share is a simple random sample of the items, chosen beforehand, whatever is worth
  asking first.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ...protocols import Answer, Comparison, Episode, Feedback, Request
from ...running import SLOTS, again
from ...tools import canonical_json, derive_id
from . import raters, tasks
from .answers import decode_answer, encode_answer, encode_form
from .desk_reader import DeskReader
from .errors import DeskError, Used
from .gold import gold_order, read_gold
from .queries import at_work, decided, held, is_due, leases, of_study, unfilled
from .tables import ITEMS, LEASES, RATERS, STUDIES

SAME = 10  # answers alike in a row that are flagged
TRIES = 3  # at taking what was found before looking for it alone


class Desk(DeskReader):
    """Hands out tasks and takes answers, within transactions of the ledger."""

    # What the run lays out.

    @again
    def publish(
        self, run: str, source: str, settings: Mapping[str, Any], instructions: str
    ) -> None:
        """Sets what raters are asked and how; the latest call counts for what is asked from then
        on."""
        row = {"settings": json.dumps(dict(settings)), "instructions": json.dumps(instructions)}
        with self.ledger.writing() as db:
            mine = (STUDIES.c.run == run, STUDIES.c.source == source)
            if db.scalar(sa.select(STUDIES.c.source).where(*mine)) is None:
                db.execute(STUDIES.insert().values(run=run, source=source, paused=False, **row))
            else:
                db.execute(STUDIES.update().where(*mine).values(**row))

    @again
    def add_items(
        self,
        run: str,
        requests: Sequence[Request],
        ask: Mapping[str, Any],
        gold: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds items to be judged; those that are there already stay as they are.

        Args:
            ask: the task, its question, aspects and scale.
            gold: the known answers, by item.
        """
        rows = [
            {
                "id": r.item, "run": run, "source": r.source, "target": r.target,
                "group": r.episodes[0].group,
                "start": r.episodes[0].start.key,
                "shown": canonical_json([e.id for e in r.episodes]), "ask": json.dumps(dict(ask)),
                "value": 0.0, "luck": int(derive_id("luck", r.item)[:12], 16) / 16**12,
                "gold": None if gold is None else canonical_json(gold[r.item]),
                "time": self.ledger.clock(),
            }
            for r in requests
        ]  # fmt: skip
        with self.ledger.writing() as db:
            known = set(db.scalars(sa.select(ITEMS.c.id).where(ITEMS.c.run == run)))
            if fresh := [row for row in rows if row["id"] not in known]:
                db.execute(ITEMS.insert(), fresh)

    def add_gold(self, run: str, source: str, ask: Mapping[str, Any], path: Path) -> None:
        """Adds gold from a file in any format of docs/preference-data.md, see `read_gold`."""
        episodes, known = read_gold(path, str(ask["task"]), f"{run}/gold", source)
        self.ledger.add_episodes(episodes)
        self.add_items(
            run,
            [request for request, _ in known],
            ask,
            {request.item: right for request, right in known},
        )

    # What raters do.

    def next(self, run: str, rater: str) -> str | None:
        """Returns the id of the task this rater holds, or else of a new one; None: there is nothing
        for them now.

        Raises:
            DeskError: they may not work now, and why.
        """
        # Chosen without blocking other raters, and taken unless one of them was faster.
        for _ in range(TRIES):
            now = self.ledger.clock()
            with self.ledger.reading() as db:
                found = self._look(db, run, rater, now)
            if found is None:
                return None
            with self.ledger.writing() as db:
                if (id_ := self._hand_out(db, rater, *found, now)) is not None:
                    return id_
        with self.ledger.writing() as db:  # many are fast: now they wait
            found = self._look(db, run, rater, self.ledger.clock())
            return None if found is None else self._hand_out(db, rater, *found, self.ledger.clock())

    def _hand_out(
        self, db: Connection, rater: str, found: Sequence[Any], how: str, until: float, now: float
    ) -> str | None:
        """Makes a lease of the first of these that is still available.

        None: others were faster, or there is something else to do first.
        """
        if how == "again":
            [lease] = found
            took = self._take(db, lease, now) == "new"
            if took:
                db.execute(LEASES.update().where(LEASES.c.id == lease["id"]).values(expires=until))
            return str(lease["id"]) if took else None
        if how == "no gold":
            raters.check_gold(db, raters.person(db, rater), until, now, ended=True)
            return None
        slots = [row["request"] for row in found if row["request"]]
        free = (
            set(
                db.scalars(
                    sa.select(SLOTS.c.id).where(SLOTS.c.id.in_(slots), unfilled(), ~held(now))
                )
            )
            if slots
            else {None}
        )
        had = set(
            db.scalars(
                sa.select(LEASES.c.item).where(
                    LEASES.c.rater == rater, LEASES.c.item.in_({row["id"] for row in found})
                )
            )
        )
        item = next((row for row in found if row["request"] in free and row["id"] not in had), None)
        if item is None:
            return None
        shown = json.loads(item["shown"])
        self.luck.shuffle(shown)
        row = {
            "id": secrets.token_urlsafe(16), "item": item["id"], "rater": rater,
            "request": item["request"], "status": "open",
            "order": canonical_json(shown), "chosen": how, "draft": "{}", "attempt": 0,
            "delivered": 0, "passed": False,
            "since": now, "expires": until,
        }  # fmt: skip
        db.execute(LEASES.insert().values(**row))
        return str(row["id"])

    def draft(self, id_: str, rater: str, form: Mapping[str, str]) -> None:
        """Keeps the form as it stands and renews the lease.

        Raises:
            NotYours; DeskError: they may not work now.
        """
        now = self.ledger.clock()
        with self.ledger.reading() as db:
            lease = self._lease(db, id_, rater)
            at_work(db, rater)
            seconds = float(self._study(db, lease)["lease"])
        mine = LEASES.update().where(LEASES.c.id == id_, LEASES.c.status == "open")
        with self.ledger.writing() as db:
            held = lease["expires"] > now  # while it lasts the slot is theirs alone
            if held or self._take(db, self._lease(db, id_, rater), now) == "new":
                db.execute(mine.values(draft=encode_form(form), expires=now + seconds))
            else:
                db.execute(mine.values(draft=encode_form(form)))

    def answer(self, id_: str, rater: str, form: Mapping[str, str]) -> str:
        """Takes an answer, and returns what became of it: "new"; "again" (nothing changed);
        "corrected"; "extra" (all slots were taken); "late" (it is not waited for any more). The
        last two are kept all the same.

        Raises:
            NotYours; DeskError: they may not work now; FormError: it is not an answer.
        """
        now = self.ledger.clock()
        with self.ledger.reading() as db:  # read before anybody has to wait for it
            lease = self._lease(db, id_, rater)
            person, study = at_work(db, rater), self._study(db, lease)
        shown = self._shown(lease)
        with self.ledger.writing() as db:
            lease = self._lease(db, id_, rater)
            seconds = (
                round(now - lease["since"], 1) if lease["seconds"] is None else lease["seconds"]
            )
            more = {"seconds": seconds, "chosen": lease["chosen"]}
            answer = tasks.read(study["task"], form, shown, study["aspects"], study["scale"], more)
            content = encode_answer(answer)
            if lease["status"] == "answered" and content == lease["answer"]:
                return "again"
            result = "corrected" if lease["attempt"] else "new"
            if lease["status"] != "answered" and (slot := self._take(db, lease, now)) != "new":
                result = slot
            first = {"right": None, "answered": now, "seconds": seconds}
            if lease["gold"] is not None:
                first["right"] = tasks.agrees(answer, json.loads(lease["gold"]))
                if lease["attempt"]:  # only the first answer shows what a rater knows
                    first = {
                        "right": lease["right"],
                        "answered": lease["answered"],
                        "seconds": seconds,
                    }
            db.execute(
                LEASES.update()
                .where(LEASES.c.id == id_)
                .values(
                    status="answered",
                    draft=encode_form(form),
                    answer=content,
                    attempt=lease["attempt"] + 1,
                    passed=False,
                    **first,
                )
            )
            if not lease["attempt"]:
                self._flag(db, person, lease, study, shown, answer, seconds, now)
                if lease["gold"] is not None:
                    raters.check_gold(db, person, float(study["gold_pass"]), now)
            return result

    def skip(self, id_: str, rater: str, reason: str) -> None:
        """Passes an item on to other raters. Once enough raters have passed it on, each of them
        counts as one who could not judge it.

        Raises:
            NotYours; DeskError: they may not work now, or it has been answered.
        """
        reason = reason.strip()[: tasks.COMMENT] or "passed on"
        with self.ledger.writing() as db:
            lease = self._lease(db, id_, rater)
            person = at_work(db, rater)
            if lease["status"] == "answered":
                raise DeskError("This task has an answer; correct that instead.")
            now = self.ledger.clock()
            db.execute(
                LEASES.update()
                .where(LEASES.c.id == id_)
                .values(
                    status="skipped",
                    passed=True,
                    draft=encode_form({"reason": reason}),
                    expires=now,
                )
            )
            raters.note(db, person.run, rater, "skipped", reason, now, id_)
            study = self._study(db, lease)
            passed = (
                db.execute(leases().where(LEASES.c.item == lease["item"], LEASES.c.passed))
                .mappings()
                .all()
            )
            if lease["gold"] is not None or len(passed) < int(study["skips"]):
                return
            kind: Any = Comparison if study["task"] in ("rank", "compare") else Feedback
            for each in passed:
                if each["status"] == "skipped" and self._take(db, each, now) == "new":
                    why = json.loads(each["draft"]).get("reason", "passed on")
                    answer = kind.abstained(
                        each["target"],
                        why,
                        shown={"order": json.loads(each["order"])},
                        details={"chosen": each["chosen"]},
                    )
                    row = {
                        "status": "answered",
                        "answer": encode_answer(answer),
                        "attempt": each["attempt"] + 1,
                        "answered": now,
                    }
                    db.execute(LEASES.update().where(LEASES.c.id == each["id"]).values(**row))

    def undo(self, id_: str, rater: str) -> bool:
        """Takes an answer back: its task is open again, with the form as it was sent. False: it has
        been handed over to the run, and can only be corrected.

        Raises:
            NotYours; Used; DeskError: they may not work now.
        """
        now = self.ledger.clock()
        with self.ledger.writing() as db:
            lease = self._lease(db, id_, rater)
            at_work(db, rater)
            if lease["delivered"] and lease["gold"] is None and decided(db, lease["group"]):
                raise Used("This answer has been used already and cannot be taken back.")
            if lease["delivered"] or lease["status"] != "answered":
                return False
            until = now + float(self._study(db, lease)["lease"])
            db.execute(
                LEASES.update()
                .where(LEASES.c.id == id_)
                .values(status="open", since=now, expires=until)
            )
            return True

    # What the run collects.

    def collect(
        self, run: str, source: str | None = None, undo: float | None = None
    ) -> list[Answer]:
        """Writes into the ledger what raters can no longer take back, and returns it. One
        transaction: nothing is written twice or lost, whichever process collects, and however often
        it is killed. Gold can no longer be taken back from then on either, and is not written.

        Args:
            undo: seconds for which an answer can be taken back; default: the study's.
        """
        now = self.ledger.clock()
        fresh = (
            ITEMS.c.run == run,
            LEASES.c.status == "answered",
            LEASES.c.delivered < LEASES.c.attempt,
        )
        query = sa.select(LEASES.c.answered, STUDIES.c.settings).join(
            ITEMS, ITEMS.c.id == LEASES.c.item
        )
        query = query.join(STUDIES, of_study()).where(*fresh)
        # Most often there is nothing, and finding that out should not block other writers.
        with self.ledger.reading() as db:
            if not any(is_due(row, now, undo) for row in db.execute(query).mappings()):
                return []
        whole = (
            leases(RATERS.c.strata, STUDIES.c.settings)
            .join(RATERS, RATERS.c.id == LEASES.c.rater)
            .join(STUDIES, of_study())
        )
        whole = whole.where(*fresh, *([] if source is None else [ITEMS.c.source == source]))
        with self.ledger.writing() as db:
            found = db.execute(whole.order_by(LEASES.c.answered, LEASES.c.id)).mappings().all()
            due = [row for row in found if is_due(row, now, undo)]
            answers = []
            for row in due:
                if row["gold"] is not None:
                    continue
                answer = decode_answer(row)
                if row["delivered"] and not decided(db, row["group"]):
                    answer = replace(answer, supersedes=derive_id(row["id"], row["delivered"]))
                answers.append(answer)
            recorded = self.ledger.record(db, answers)
            for row in due:
                db.execute(
                    LEASES.update().where(LEASES.c.id == row["id"]).values(delivered=row["attempt"])
                )
        return recorded

    # Within a transaction.

    def _take(self, db: Connection, lease: Any, now: float) -> str:
        """Gives a lease its slot, or another one of its item: "new". Otherwise returns why there is
        none: "extra", all are taken, or "late", it is not waited for any more."""
        what, slot = self._slot(db, lease, now)
        if slot != lease["request"]:
            db.execute(LEASES.update().where(LEASES.c.id == lease["id"]).values(request=slot))
        return what

    def _flag(
        self, db: Connection, person: raters.Person, lease: Any, study: Mapping[str, Any], shown: Sequence[Episode], answer: Answer,  # noqa: E501
        seconds: float, now: float,
    ) -> None:  # fmt: skip
        """Records what a lead should look at. An answer is never dropped for it."""
        same = tasks.common(shown) if len(shown) > 1 else 0
        words = sum(
            len(m.content.split())
            for k, e in enumerate(shown)
            for m in e.messages[same if k else 0 :]
        )
        least = max(1.0, 60 * words / float(study["reading"]))
        if answer.status == "scored" and seconds < least:
            raters.note(
                db,
                person.run,
                person.id,
                "too fast",
                f"{seconds:.1f} s for {words} words",
                now,
                lease["id"],
            )
        mine = sa.select(LEASES.c.answer, LEASES.c.order).join(ITEMS, ITEMS.c.id == LEASES.c.item)
        mine = mine.where(
            LEASES.c.rater == person.id,
            LEASES.c.status == "answered",
            ITEMS.c.run == lease["run"],
            ITEMS.c.source == lease["source"],
        )
        count = db.scalar(sa.select(sa.func.count()).select_from(mine.subquery())) or 0
        if count % SAME:
            return
        looks = {
            gold_order(json.loads(a), json.loads(o))
            for a, o in db.execute(mine.order_by(LEASES.c.answered.desc()).limit(SAME))
        }
        if len(looks) == 1:
            raters.note(
                db,
                person.run,
                person.id,
                "always the same",
                f"the last {SAME} answers are alike: {looks.pop()}",
                now,
                lease["id"],
            )
