"""What a lead sees: who works how fast, how far raters agree and where they do not, whom to trust, and what is disputed.

Everything is computed from the answers as they stand, gold apart. Nobody is excluded here: the numbers are for a person to act on.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from ...engine.agreement import alpha_interval, comparison_units, gwet_ac1, krippendorff_alpha, percent_agreement
from ...engine.episode import canonical_json, derive_id
from ...engine.feedback import Comparison, Feedback
from ...engine.ledger import Ledger
from ...engine.reward import Aggregate, Aggregator
from . import raters
from .desk import Desk, Said
from .pages import blocks, folded
from .tables import EVENTS, ITEMS, LEASES, STUDIES
from .tasks import LETTERS, common, known

DISPUTED = 20  # items that are listed
Units = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Study:
    """What raters are asked by one source of the run."""

    source: str
    settings: Mapping[str, Any]
    instructions: str
    paused: bool


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far raters agree.

    Attributes:
        units: things that two raters judged.
        percent, alpha, ac1: percent agreement, Krippendorff's alpha (with a 95 % interval from `low` to `high`), Gwet's AC1; None where
            they are undefined.
    """

    name: str
    units: int
    percent: float | None
    alpha: float | None
    low: float | None
    high: float | None
    ac1: float | None


def studies(ledger: Ledger, run: str) -> list[Study]:
    with ledger.reading() as db:
        rows = db.execute(sa.select(STUDIES).where(STUDIES.c.run == run).order_by(STUDIES.c.source)).mappings()
        return [Study(r["source"], json.loads(r["settings"]), json.loads(r["instructions"]), r["paused"]) for r in rows]


def strata(ledger: Ledger, run: str) -> dict[str, list[str]]:
    """What raters are asked to say of themselves, by all studies of the run."""
    asked: dict[str, list[str]] = {}
    for study in studies(ledger, run):
        for name, choices in study.settings["strata"].items():
            asked[name] = list(dict.fromkeys([*asked.get(name, []), *choices]))
    return asked


def has_gold(ledger: Ledger, run: str) -> bool:
    with ledger.reading() as db:
        return db.scalar(sa.select(ITEMS.c.id).where(ITEMS.c.run == run, ITEMS.c.gold.is_not(None)).limit(1)) is not None


def pause(ledger: Ledger, run: str, source: str, paused: bool) -> None:
    """Hands out no more tasks of a study, or does so again."""
    with ledger.writing() as db:
        db.execute(STUDIES.update().where(STUDIES.c.run == run, STUDIES.c.source == source).values(paused=paused))


# Agreement.


@dataclass(frozen=True, slots=True)
class Judged:
    """What there is to agree on: units (rater to value), the item each belongs to, and the level of measurement."""

    units: Units
    items: list[str]
    level: Any

    def of(self, some: Collection[str]) -> Judged:
        """The same of some raters only."""
        return Judged([{r: v for r, v in u.items() if r in some} for u in self.units], self.items, self.level)


def judged(said: Iterable[Said], aspect: str | None = None) -> Judged:
    """Pairs of conversations, points per aspect, marks per turn and where it went wrong first; what was left unmarked says nothing."""
    by_item: dict[str, list[Said]] = defaultdict(list)
    for each in said:
        if each.answer.status == "scored":
            by_item[each.item].append(each)
    found: Units = []
    items: list[str] = []
    level = "nominal"
    for item_, answers in by_item.items():
        values: dict[Any, dict[str, Any]] = defaultdict(dict)
        for each in answers:
            answer = each.answer
            if isinstance(answer, Feedback) and answer.turn_scores is not None:
                for k, mark in enumerate(answer.turn_scores):
                    if mark is not None and aspect != "first_wrong":
                        values[k][each.rater] = mark
                if "first_wrong" in answer.details and aspect in (None, "first_wrong"):
                    values["first"][each.rater] = str(answer.details["first_wrong"])
            elif isinstance(answer, Feedback):
                level = "interval"
                values.update({n: {**values[n], each.rater: v} for n, v in answer.aspects.items() if aspect in (None, n)})
        comparisons = [s.answer for s in answers if isinstance(s.answer, Comparison)]
        new = [*comparison_units(comparisons), *values.values()]
        found += new
        items += [item_] * len(new)
    return Judged(found, items, level)


def agreement(name: str, found: Judged) -> Agreement:
    shared = [(u, item_) for u, item_ in zip(found.units, found.items, strict=True) if len(u) > 1]
    units = [u for u, _ in shared]
    level: Any = found.level if all(isinstance(v, (int, float)) for u in units for v in u.values()) else "nominal"
    interval = (
        alpha_interval(units, level, clusters=[c for _, c in shared], samples=300) if len({c for _, c in shared}) > 2 else None
    )
    low, high = interval if interval is not None else (None, None)
    return Agreement(name, len(units), percent_agreement(units), krippendorff_alpha(units, level), low, high, gwet_ac1(units))


def between(found: Judged, stratum_of: Mapping[str, str]) -> Judged:
    """As strata see it: each says the mean of its raters' points, or what most of them say; where these are divided, it says nothing."""
    seen: Units = []
    for unit in found.units:
        votes: dict[str, list[Any]] = defaultdict(list)
        for rater, value in unit.items():
            if stratum_of.get(rater):
                votes[stratum_of[rater]].append(value)
        if found.level == "interval":
            seen.append({s: statistics.mean(v) for s, v in votes.items()})
        else:
            most = {s: Counter(v).most_common(2) for s, v in votes.items()}
            seen.append({s: top[0][0] for s, top in most.items() if len(top) == 1 or top[0][1] > top[1][1]})
    return Judged(seen, found.items, found.level)


def versus(found: Judged, rater: str) -> Judged:
    """One rater with each of the others, two by two: what the others think of one another does not count."""
    both = [
        ({rater: u[rater], o: u[o]}, i)
        for u, i in zip(found.units, found.items, strict=True)
        if rater in u
        for o in u
        if o != rater
    ]
    return Judged([u for u, _ in both], [i for _, i in both], found.level)


def agreed(ledger: Ledger, run: str) -> float | None:
    """Percent agreement of everybody, for the progress line."""
    return percent_agreement(judged(s for s in Desk(ledger).answers(run) if not s.gold).units)


# The page.


def overview(ledger: Ledger, run: str, judge: Aggregator | None = None) -> dict[str, Any]:
    """All that the lead's page shows.

    Args:
        judge: an aggregator that estimates raters' reliability from comparisons.
    """
    desk, people = Desk(ledger), raters.everybody(ledger, run)
    said = desk.answers(run)
    work = [s for s in said if not s.gold]
    names = {p.id: p.name for p in people}
    found = studies(ledger, run)
    rows: list[dict[str, Any]] = []
    by_study = {}
    for study in found:
        mine = [s for s in work if s.source == study.source]
        own = judged(mine)
        table = [agreement("all raters", own)]
        parts = {"score": study.settings["aspects"], "mark": ["first_wrong"]}.get(study.settings["task"], [])
        table += [agreement("where it went wrong" if a == "first_wrong" else a, judged(mine, a)) for a in parts]
        for name, choices in study.settings["strata"].items():
            stratum_of = {p.id: p.strata.get(name, "") for p in people}
            table += [agreement(f"{name}: {c}", own.of({r for r, own_ in stratum_of.items() if own_ == c})) for c in choices]
            table.append(agreement(f"between {name}s", between(own, stratum_of)))
        comparisons = [s.answer for s in mine if isinstance(s.answer, Comparison)]
        shared = any(len(unit) > 1 for unit in own.units)  # of raters who share nothing an estimate is what was assumed before
        trust = judge.aggregate(comparisons) if judge is not None and shared else Aggregate({}, {})
        by_study[study.source] = {
            "study": study, "agreement": table, "trust": trust.raters, "disputed": disputed(mine), "slots": desk.slots(run, study.source), "shared": shared,
            "per_rater": [
                agreement(names[p.id], versus(own, p.id)) for p in people if any(s.rater == p.id for s in mine)
            ],
        }  # fmt: skip
    now = ledger.clock()
    with ledger.reading() as db:
        query = sa.select(EVENTS).where(EVENTS.c.run == run)  # what raters did comes before what somebody unknown tried
        events = list(db.execute(query.order_by(EVENTS.c.rater == "", EVENTS.c.id.desc()).limit(200)).mappings())
        count = sa.select(EVENTS.c.rater, EVENTS.c.kind, sa.func.count()).where(EVENTS.c.run == run)
        kinds = {(r, k): n for r, k, n in db.execute(count.group_by(EVENTS.c.rater, EVENTS.c.kind)).tuples()}
    for p in people:
        mine = [s for s in said if s.rater == p.id]
        gold = [s for s in mine if s.gold]
        rows.append({
            "person": p, "answers": len(mine) - len(gold), "hour": sum(s.time > now - 3600 for s in mine),
            "seconds": statistics.median(spent) if (spent := [s.seconds for s in mine if s.seconds]) else None, "gold": len(gold), "right": sum(bool(s.right) for s in gold),
            "abstained": sum(s.answer.status != "scored" for s in mine),
            "flags": {kind: kinds[p.id, kind] for kind in ("too fast", "always the same", "skipped", "refused") if (p.id, kind) in kinds},
        })  # fmt: skip
    return {"studies": by_study, "raters": rows, "events": events, "names": names, "answers": len(work)}


def disputed(said: Sequence[Said]) -> list[dict[str, Any]]:
    """Items that raters see most differently, of those that two answered."""
    by_item: dict[str, list[Said]] = defaultdict(list)
    for each in said:
        by_item[each.item].append(each)
    rows: list[dict[str, Any]] = []
    for item, answers in by_item.items():
        share = percent_agreement(judged(answers).units)
        if share is not None and share < 1:
            rows.append({"item": item, "agreed": share, "raters": len(answers)})
    return sorted(rows, key=lambda r: (r["agreed"], -r["raters"], r["item"]))[:DISPUTED]


# One item.


def item(ledger: Ledger, run: str, id_: str) -> Any:
    with ledger.reading() as db:
        return db.execute(sa.select(ITEMS).where(ITEMS.c.id == id_, ITEMS.c.run == run)).mappings().first()


def item_page(ledger: Ledger, found: Any, renderers: Mapping[str, Any]) -> dict[str, Any]:
    """An item with everything that was said of it."""
    shown = json.loads(found["shown"])
    by_id = ledger.episodes(shown)
    episodes = [by_id[e] for e in shown]
    settings = next(s.settings for s in studies(ledger, found["run"]) if s.source == found["source"]) | json.loads(found["ask"])
    render = renderers.get(settings["render"], renderers["markdown"])
    same = common(episodes) if len(episodes) > 1 else 0
    each = [blocks(e, render) for e in episodes]
    names = {p.id: p.name for p in raters.everybody(ledger, found["run"])}
    letter = {e.id: LETTERS[i] for i, e in enumerate(episodes)}
    rows = [
        {"name": names[s.rater], "said": _words(s, letter), "seconds": s.seconds, "comment": s.answer.comment}
        for s in Desk(ledger).answers(found["run"], found["id"])
    ]
    return {
        "item": found, "settings": settings, "letters": LETTERS, "before": folded(each[0][:same]) if same else None,
        "talks": [folded(b[same:]) for b in each], "rows": rows,
    }  # fmt: skip


def _words(said: Said, letter: Mapping[str, str]) -> str:
    answer = said.answer
    if answer.status != "scored":
        return f"{answer.status}: {answer.reason}"
    if isinstance(answer, Comparison):
        grade = f" (by {answer.strength:g} of 3)" if answer.strength else ""
        bad = ", all bad" if answer.details.get("all_bad") else ""
        return " > ".join(" = ".join(letter[e] for e in tier) for tier in answer.ranking) + grade + bad
    if answer.turn_scores is not None:
        marks = {1.0: "good", -1.0: "bad"}
        said_ = [f"reply {k + 1} {marks[m]}" for k, m in enumerate(answer.turn_scores) if m in marks]
        return ", ".join(said_) or "nothing went wrong"
    return ", ".join(f"{name} {value:.2f}" for name, value in answer.aspects.items())


def make_gold(ledger: Ledger, run: str, id_: str) -> None:
    """Lays out a copy of an item as gold: a lead's own answer to it is the right one, or else what all its raters say.

    Raises:
        ValueError: nobody knows the right answer.
    """
    found = item(ledger, run, id_)
    if found is None or found["gold"] is not None:
        raise ValueError("There is no such item, or it is gold already.")
    leads = {p.id for p in raters.everybody(ledger, run) if p.role == "lead"}
    said = [s for s in Desk(ledger).answers(run, id_) if s.answer.status == "scored"]
    trusted = [s for s in said if s.rater in leads] or said
    shown = list(ledger.episodes(json.loads(found["shown"])).values())
    answers = {canonical_json(known(s.answer, shown)) for s in trusted}
    if len(answers) != 1 or (len(trusted) < 2 and trusted[0].rater not in leads):
        raise ValueError(
            "Raters do not agree on this item, or too few have seen it. Rate it yourself first; your answer is then the right one."
        )
    copy = {**found, "id": derive_id("gold", id_), "gold": answers.pop(), "time": ledger.clock()}
    with ledger.writing() as db:
        if db.scalar(sa.select(ITEMS.c.id).where(ITEMS.c.id == copy["id"])) is None:
            db.execute(ITEMS.insert().values(**copy))


def export(ledger: Ledger, run: str) -> list[dict[str, Any]]:
    """Every answer with its circumstances, flags included."""
    with ledger.reading() as db:
        flags = defaultdict(list)
        query = sa.select(EVENTS.c.kind, LEASES.c.item, LEASES.c.rater).join(LEASES, LEASES.c.id == EVENTS.c.lease)
        for kind, where, rater in db.execute(query):
            flags[where, rater].append(kind)
    rows, names = [], {p.id: p.name for p in raters.everybody(ledger, run)}
    for s in Desk(ledger).answers(run):
        keep = ("ranking", "strength", "turn_scores", "aspects", "comment", "status", "reason")
        what = {k: getattr(s.answer, k) for k in keep if getattr(s.answer, k, None) not in (None, "", (), {})}
        rows.append({
            "source": s.source, "task": s.task, "item": s.item, "target": s.answer.target, "order": s.answer.shown["order"],
            "rater": s.rater, "name": names[s.rater], "stratum": s.answer.stamp.stratum, **what, "details": dict(s.answer.details), "gold": s.gold,
            "right": s.right, "flags": sorted(flags[s.item, s.rater]), "time": s.time,
        })  # fmt: skip
    return rows
