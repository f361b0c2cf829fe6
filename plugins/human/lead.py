"""The lead's page: who works how fast, how far raters agree and where they do not, whom to trust,
and what is disputed.

Everything is computed from the answers as they stand, without gold. No rater is excluded here: the
numbers are for a person to act on.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import sqlalchemy as sa

from ...judging import percent_agreement
from ...protocols import Aggregate, Aggregator, Comparison
from ...running import Ledger
from ...tools import canonical_json, derive_id
from . import raters
from .agreement import agreement, between, judged, versus
from .answers import RatedAnswer
from .desk import Desk
from .tables import EVENTS, ITEMS, LEASES, STUDIES
from .tasks import LETTERS, common, known
from .web.pages import blocks, folded

DISPUTED = 20  # items that are listed


@dataclass(frozen=True, slots=True)
class Study:
    """The study of one source of the run: what its raters are asked."""

    source: str
    settings: Mapping[str, Any]
    instructions: str
    paused: bool


def studies(ledger: Ledger, run: str) -> list[Study]:
    """Returns the studies of a run, in the order of their sources' names."""
    with ledger.reading() as db:
        rows = db.execute(
            sa.select(STUDIES).where(STUDIES.c.run == run).order_by(STUDIES.c.source)
        ).mappings()
        return [
            Study(
                r["source"], json.loads(r["settings"]), json.loads(r["instructions"]), r["paused"]
            )
            for r in rows
        ]


def strata(ledger: Ledger, run: str) -> dict[str, list[str]]:
    """Returns what raters are asked about themselves, by all studies of the run."""
    asked: dict[str, list[str]] = {}
    for study in studies(ledger, run):
        for name, choices in study.settings["strata"].items():
            asked[name] = list(dict.fromkeys([*asked.get(name, []), *choices]))
    return asked


def has_gold(ledger: Ledger, run: str) -> bool:
    """Returns whether a run has gold items."""
    with ledger.reading() as db:
        return (
            db.scalar(
                sa.select(ITEMS.c.id).where(ITEMS.c.run == run, ITEMS.c.gold.is_not(None)).limit(1)
            )
            is not None
        )


def pause(ledger: Ledger, run: str, source: str, paused: bool) -> None:
    """Pauses handing out tasks of a study, or resumes it."""
    with ledger.writing() as db:
        db.execute(
            STUDIES.update()
            .where(STUDIES.c.run == run, STUDIES.c.source == source)
            .values(paused=paused)
        )


# The page.


def overview(ledger: Ledger, run: str, judge: Aggregator | None = None) -> dict[str, Any]:
    """Returns all that the lead's page shows.

    Args:
        judge: an aggregator that estimates raters' reliability from comparisons.
    """
    desk, people = Desk(ledger), raters.everybody(ledger, run)
    answers = desk.answers(run)
    work = [s for s in answers if not s.gold]
    by_study = {
        study.source: _study_rows(
            study,
            desk.slots(run, study.source),
            people,
            [s for s in work if s.source == study.source],
            judge,
        )
        for study in studies(ledger, run)
    }
    with ledger.reading() as db:
        # Events of raters come before attempts of unknown visitors.
        query = sa.select(EVENTS).where(EVENTS.c.run == run)
        events = list(
            db.execute(
                query.order_by(EVENTS.c.rater == "", EVENTS.c.id.desc()).limit(200)
            ).mappings()
        )
        count = sa.select(EVENTS.c.rater, EVENTS.c.kind, sa.func.count()).where(EVENTS.c.run == run)
        kinds = {
            (r, k): n
            for r, k, n in db.execute(count.group_by(EVENTS.c.rater, EVENTS.c.kind)).tuples()
        }
    now = ledger.clock()
    rows = [_rater_row(p, [s for s in answers if s.rater == p.id], kinds, now) for p in people]
    return {
        "studies": by_study,
        "raters": rows,
        "events": events,
        "names": {p.id: p.name for p in people},
        "answers": len(work),
    }


def _study_rows(
    study: Study,
    slots: Any,
    people: Sequence[raters.Person],
    mine: Sequence[RatedAnswer],
    judge: Aggregator | None,
) -> dict[str, Any]:
    """Returns what the page shows of a study: agreement in all and by stratum, reliability,
    disputed items, progress.

    Args:
        slots: how many there are, filled and waited for.
        mine: the answers in it, gold apart.
    """
    own = judged(mine)
    table = [agreement("all raters", own)]
    parts = {"score": study.settings["aspects"], "mark": ["first_wrong"]}.get(
        study.settings["task"], []
    )
    table += [
        agreement("where it went wrong" if a == "first_wrong" else a, judged(mine, a))
        for a in parts
    ]
    for name, choices in study.settings["strata"].items():
        stratum_of = {p.id: p.strata.get(name, "") for p in people}
        table += [
            agreement(f"{name}: {c}", own.of({r for r, own_ in stratum_of.items() if own_ == c}))
            for c in choices
        ]
        table.append(agreement(f"between {name}s", between(own, stratum_of)))
    comparisons = [s.answer for s in mine if isinstance(s.answer, Comparison)]
    # Of raters who share nothing an estimate is what was assumed before.
    shared = any(len(unit) > 1 for unit in own.units)
    trust = judge.aggregate(comparisons) if judge is not None and shared else Aggregate({}, {})
    return {
        "study": study, "agreement": table, "trust": trust.raters, "disputed": disputed(mine),
        "slots": slots, "shared": shared,
        "per_rater": [
            agreement(p.name, versus(own, p.id))
            for p in people if any(s.rater == p.id for s in mine)
        ],
    }  # fmt: skip


def _rater_row(
    person: raters.Person,
    mine: Sequence[RatedAnswer],
    kinds: Mapping[tuple[str, str], int],
    now: float,
) -> dict[str, Any]:
    """Returns what the page shows of a rater.

    Args:
        mine: the rater's answers, gold included.
        kinds: how often events of a kind happened, by rater and kind.
    """
    gold = [s for s in mine if s.gold]
    spent = [s.seconds for s in mine if s.seconds]
    return {
        "person": person,
        "answers": len(mine) - len(gold),
        "hour": sum(s.time > now - 3600 for s in mine),
        "seconds": statistics.median(spent) if spent else None,
        "gold": len(gold),
        "right": sum(bool(s.right) for s in gold),
        "abstained": sum(s.answer.status != "scored" for s in mine),
        "flags": {
            kind: kinds[person.id, kind]
            for kind in ("too fast", "always the same", "skipped", "refused")
            if (person.id, kind) in kinds
        },
    }


def disputed(rated: Sequence[RatedAnswer]) -> list[dict[str, Any]]:
    """Returns the items that raters disagree on most, of those that two answered."""
    by_item: dict[str, list[RatedAnswer]] = defaultdict(list)
    for each in rated:
        by_item[each.item].append(each)
    rows: list[dict[str, Any]] = []
    for item, answers in by_item.items():
        share = percent_agreement(judged(answers).units)
        if share is not None and share < 1:
            rows.append({"item": item, "agreed": share, "raters": len(answers)})
    return sorted(rows, key=lambda r: (r["agreed"], -r["raters"], r["item"]))[:DISPUTED]


# One item.


def item(ledger: Ledger, run: str, id_: str) -> Any:
    """Returns the row of an item; None where there is none."""
    with ledger.reading() as db:
        return (
            db.execute(sa.select(ITEMS).where(ITEMS.c.id == id_, ITEMS.c.run == run))
            .mappings()
            .first()
        )


def item_page(ledger: Ledger, found: Any, renderers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the page of an item shows: the item and all answers to it."""
    shown = json.loads(found["shown"])
    by_id = ledger.episodes(shown)
    episodes = [by_id[e] for e in shown]
    settings = next(
        s.settings for s in studies(ledger, found["run"]) if s.source == found["source"]
    ) | json.loads(found["ask"])
    render = renderers.get(settings["render"], renderers["markdown"])
    same = common(episodes) if len(episodes) > 1 else 0
    each = [blocks(e, render) for e in episodes]
    names = {p.id: p.name for p in raters.everybody(ledger, found["run"])}
    letter = {e.id: LETTERS[i] for i, e in enumerate(episodes)}
    rows = [
        {
            "name": names[s.rater],
            "answer": _words(s, letter),
            "seconds": s.seconds,
            "comment": s.answer.comment,
        }
        for s in Desk(ledger).answers(found["run"], found["id"])
    ]
    return {
        "item": found, "settings": settings, "letters": LETTERS,
        "before": folded(each[0][:same]) if same else None,
        "talks": [folded(b[same:]) for b in each], "rows": rows,
    }  # fmt: skip


def _words(rated: RatedAnswer, letter: Mapping[str, str]) -> str:
    answer = rated.answer
    if answer.status != "scored":
        return f"{answer.status}: {answer.reason}"
    if isinstance(answer, Comparison):
        grade = f" (by {answer.strength:g} of 3)" if answer.strength else ""
        bad = ", all bad" if answer.details.get("all_bad") else ""
        return (
            " > ".join(" = ".join(letter[e] for e in tier) for tier in answer.ranking) + grade + bad
        )
    if answer.turn_scores is not None:
        marks = {1.0: "good", -1.0: "bad"}
        words = [
            f"reply {k + 1} {marks[m]}" for k, m in enumerate(answer.turn_scores) if m in marks
        ]
        return ", ".join(words) or "nothing went wrong"
    return ", ".join(f"{name} {value:.2f}" for name, value in answer.aspects.items())


def make_gold(ledger: Ledger, run: str, id_: str) -> None:
    """Adds a copy of an item as gold: a lead's own answer to it is the right one, or else the
    answer that all its raters agree on.

    Raises:
        ValueError: the right answer is not known.
    """
    found = item(ledger, run, id_)
    if found is None or found["gold"] is not None:
        raise ValueError("There is no such item, or it is gold already.")
    leads = {p.id for p in raters.everybody(ledger, run) if p.role == "lead"}
    scored = [s for s in Desk(ledger).answers(run, id_) if s.answer.status == "scored"]
    trusted = [s for s in scored if s.rater in leads] or scored
    shown = list(ledger.episodes(json.loads(found["shown"])).values())
    answers = {canonical_json(known(s.answer, shown)) for s in trusted}
    if len(answers) != 1 or (len(trusted) < 2 and trusted[0].rater not in leads):
        raise ValueError(
            "Raters do not agree on this item, or too few have seen it. Rate it yourself first;"
            " your answer is then the right one."
        )
    copy = {**found, "id": derive_id("gold", id_), "gold": answers.pop(), "time": ledger.clock()}
    with ledger.writing() as db:
        if db.scalar(sa.select(ITEMS.c.id).where(ITEMS.c.id == copy["id"])) is None:
            db.execute(ITEMS.insert().values(**copy))


def export(ledger: Ledger, run: str) -> list[dict[str, Any]]:
    """Returns every answer with its circumstances, flags included."""
    with ledger.reading() as db:
        flags = defaultdict(list)
        query = sa.select(EVENTS.c.kind, LEASES.c.item, LEASES.c.rater).join(
            LEASES, LEASES.c.id == EVENTS.c.lease
        )
        for kind, where, rater in db.execute(query):
            flags[where, rater].append(kind)
    rows, names = [], {p.id: p.name for p in raters.everybody(ledger, run)}
    for s in Desk(ledger).answers(run):
        keep = ("ranking", "strength", "turn_scores", "aspects", "comment", "status", "reason")
        what = {
            f.name: value
            for f in fields(s.answer)
            if f.name in keep and (value := getattr(s.answer, f.name)) not in (None, "", (), {})
        }
        rows.append({
            "source": s.source, "task": s.task, "item": s.item, "target": s.answer.target,
            "order": s.answer.shown["order"],
            "rater": s.rater, "name": names[s.rater], "stratum": s.answer.stamp.stratum, **what,
            "details": dict(s.answer.details), "gold": s.gold,
            "right": s.right, "flags": sorted(flags[s.item, s.rater]), "time": s.time,
        })  # fmt: skip
    return rows
