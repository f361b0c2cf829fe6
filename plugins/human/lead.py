"""What a lead sees: who works how fast, how far raters agree and where they do not, whom to trust, and what is disputed.

Everything is computed from the answers as they stand, gold apart. Nobody is excluded here: the numbers are for a person to act on.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
from .pages import blocks, common, folded
from .tables import EVENTS, ITEMS, LEASES, STUDIES
from .tasks import LETTERS

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


def pause(ledger: Ledger, run: str, source: str, paused: bool) -> None:
    """Hands out no more tasks of a study, or does so again."""
    with ledger.writing() as db:
        db.execute(STUDIES.update().where(STUDIES.c.run == run, STUDIES.c.source == source).values(paused=paused))


# Agreement.


def units(said: Iterable[Said], aspect: str | None = None) -> tuple[Units, str]:
    """What there is to agree on, rater to value, and its level of measurement: pairs of conversations, points per aspect, marks per turn."""
    comparisons: list[Comparison] = []
    values: dict[tuple[Any, ...], dict[str, Any]] = defaultdict(dict)
    level = "nominal"
    for each in said:
        answer = each.answer
        if answer.status != "scored":
            continue
        if isinstance(answer, Comparison):
            comparisons.append(answer)
        elif answer.turn_scores is not None:
            for k, mark in enumerate(answer.turn_scores):
                values[each.item, k][each.rater] = mark or 0.0
        else:
            level = "interval"
            for name, value in answer.aspects.items():
                if aspect in (None, name):
                    values[each.item, name][each.rater] = value
    return [*comparison_units(comparisons), *values.values()], level


def agreement(name: str, found: Units, level: Any) -> Agreement:
    shared = [u for u in found if len(u) > 1]
    interval = alpha_interval(shared, level, samples=300) if len(shared) > 2 else None
    low, high = interval if interval is not None else (None, None)
    alpha = krippendorff_alpha(shared, level)
    return Agreement(name, len(shared), percent_agreement(shared), alpha, low, high, gwet_ac1(shared))


def between(found: Units, stratum_of: Mapping[str, str]) -> Units:
    """Units as strata see them: each stratum says what most of its raters say; where they are divided, it says nothing."""
    seen = []
    for unit in found:
        votes: dict[str, Counter[Any]] = defaultdict(Counter)
        for rater, value in unit.items():
            if stratum_of.get(rater):
                votes[stratum_of[rater]][value] += 1
        most = {s: v.most_common(2) for s, v in votes.items()}
        seen.append({s: top[0][0] for s, top in most.items() if len(top) == 1 or top[0][1] > top[1][1]})
    return seen


def versus(found: Units, rater: str) -> Units:
    """One rater with each of the others, two by two: what the others think of one another does not count."""
    return [{rater: u[rater], other: u[other]} for u in found if rater in u for other in u if other != rater]


def agreement_now(ledger: Ledger, run: str, keep: float = 60.0) -> float | None:
    """Percent agreement of everybody, for the progress line; computed once a minute at most."""
    cache: dict[str, tuple[float, float | None]] = ledger.__dict__.setdefault("_agreement", {})
    if run not in cache or time.monotonic() - cache[run][0] > keep:
        found, _ = units(s for s in Desk(ledger).answers(run) if not s.gold)
        cache[run] = time.monotonic(), percent_agreement(found)
    return cache[run][1]


# The page.


def overview(ledger: Ledger, run: str, judge: Aggregator | None = None) -> dict[str, Any]:
    """All that the lead's page shows.

    Args:
        judge: an aggregator that estimates raters' reliability from comparisons.
    """
    desk, people = Desk(ledger), raters.everybody(ledger)
    said = desk.answers(run)
    work = [s for s in said if not s.gold]
    names = {p.id: p.name for p in people}
    found = studies(ledger, run)
    rows: list[dict[str, Any]] = []
    by_study = {}
    for study in found:
        mine = [s for s in work if s.source == study.source]
        own, level = units(mine)
        table = [agreement("all raters", own, level)]
        if study.settings["task"] == "score":
            table += [agreement(a, *units(mine, a)) for a in study.settings["aspects"]]
        for name, choices in study.settings["strata"].items():
            stratum_of = {p.id: p.strata.get(name, "") for p in people}
            table += [
                agreement(f"{name}: {c}", [{r: v for r, v in u.items() if stratum_of.get(r) == c} for u in own], level)
                for c in choices
            ]
            table.append(agreement(f"between {name}s", between(own, stratum_of), level))
        comparisons = [s.answer for s in mine if isinstance(s.answer, Comparison)]
        trust = judge.aggregate(comparisons) if judge is not None and comparisons else Aggregate({}, {})
        by_study[study.source] = {
            "study": study, "agreement": table, "trust": trust.raters, "disputed": disputed(mine), "slots": desk.slots(run, study.source),
            "per_rater": [
                agreement(names[p.id], versus(own, p.id), level) for p in people if any(s.rater == p.id for s in mine)
            ],
        }  # fmt: skip
    now = ledger.clock()
    with ledger.reading() as db:
        events = list(db.execute(sa.select(EVENTS).order_by(EVENTS.c.id.desc()).limit(200)).mappings())
        kinds = Counter(db.execute(sa.select(EVENTS.c.rater, EVENTS.c.kind)).tuples().all())
    for p in people:
        mine = [s for s in said if s.rater == p.id]
        gold = [s for s in mine if s.gold]
        rows.append({
            "person": p, "answers": len(mine) - len(gold), "hour": sum(s.time > now - 3600 for s in mine),
            "seconds": statistics.median(s.seconds for s in mine) if mine else None, "gold": len(gold), "right": sum(bool(s.right) for s in gold),
            "abstained": sum(s.answer.status != "scored" for s in mine),
            "flags": {kind: kinds[p.id, kind] for kind in ("too fast", "always the same", "skipped", "refused") if kinds[p.id, kind]},
        })  # fmt: skip
    return {"studies": by_study, "raters": rows, "events": events, "names": names, "answers": len(work)}


def disputed(said: Sequence[Said]) -> list[dict[str, Any]]:
    """Items that raters see most differently, of those that two answered."""
    by_item: dict[str, list[Said]] = defaultdict(list)
    for each in said:
        by_item[each.item].append(each)
    rows: list[dict[str, Any]] = []
    for item, answers in by_item.items():
        agreed = percent_agreement(units(answers)[0])
        if agreed is not None and agreed < 1:
            rows.append({"item": item, "agreed": agreed, "raters": len(answers)})
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
    settings = next(s.settings for s in studies(ledger, found["run"]) if s.source == found["source"])
    render = renderers.get(settings["render"], renderers["markdown"])
    same = common(episodes) if len(episodes) > 1 else 0
    each = [blocks(e, render) for e in episodes]
    names = {p.id: p.name for p in raters.everybody(ledger)}
    letter = {e.id: LETTERS[i] for i, e in enumerate(episodes)}
    rows = []
    for said in Desk(ledger).answers(found["run"]):
        if said.item == found["id"]:
            rows.append(
                {
                    "name": names[said.rater],
                    "said": _words(said, letter),
                    "seconds": said.seconds,
                    "comment": said.answer.comment,
                }
            )
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
    leads = {p.id for p in raters.everybody(ledger) if p.role == "lead"}
    said = [s for s in Desk(ledger).answers(run) if s.item == id_ and s.answer.status == "scored"]
    trusted = [s for s in said if s.rater in leads] or said
    known = {canonical_json(_gold(s.answer)) for s in trusted}
    if len(known) != 1 or (len(trusted) < 2 and trusted[0].rater not in leads):
        raise ValueError(
            "Raters do not agree on this item, or too few have seen it. Rate it yourself first; your answer is then the right one."
        )
    copy = {**found, "id": derive_id("gold", id_), "gold": known.pop(), "time": ledger.clock()}
    with ledger.writing() as db:
        if db.scalar(sa.select(ITEMS.c.id).where(ITEMS.c.id == copy["id"])) is None:
            db.execute(ITEMS.insert().values(**copy))


def _gold(answer: Feedback | Comparison) -> dict[str, Any]:
    if isinstance(answer, Comparison):
        return {"ranking": [sorted(tier) for tier in answer.ranking]}
    if answer.turn_scores is not None:
        return {"first_wrong": answer.details.get("first_wrong")}
    return {"score": float(sum(answer.aspects.values()) > 0.5 * len(answer.aspects))}


def export(ledger: Ledger, run: str) -> list[dict[str, Any]]:
    """Every answer with its circumstances, flags included."""
    with ledger.reading() as db:
        flags = defaultdict(list)
        query = sa.select(EVENTS.c.kind, LEASES.c.item, LEASES.c.rater).join(LEASES, LEASES.c.id == EVENTS.c.lease)
        for kind, where, rater in db.execute(query):
            flags[where, rater].append(kind)
    rows = []
    for s in Desk(ledger).answers(run):
        keep = ("ranking", "strength", "turn_scores", "aspects", "comment", "status", "reason")
        what = {k: getattr(s.answer, k) for k in keep if getattr(s.answer, k, None) not in (None, "", (), {})}
        rows.append({
            "source": s.source, "task": s.task, "item": s.item, "target": s.answer.target, "order": s.answer.shown["order"],
            "rater": s.rater, "stratum": s.answer.stamp.stratum, **what, "details": dict(s.answer.details), "gold": s.gold,
            "right": s.right, "flags": sorted(flags[s.item, s.rater]), "time": s.time,
        })  # fmt: skip
    return rows
