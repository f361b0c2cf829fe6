"""Measures how far raters agree with each other, with gold and with judges."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...judging import (
    alpha_interval,
    comparison_units,
    gwet_ac1,
    krippendorff_alpha,
    percent_agreement,
)
from ...protocols import Comparison, Feedback
from ...running import Ledger
from .answers import RatedAnswer
from .desk import Desk

Units = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Agreement:
    """The agreement of raters.

    Attributes:
        units: number of things that two raters judged.
        percent, alpha, ac1: percent agreement, Krippendorff's alpha (with a 95 % interval from
            `low` to `high`), Gwet's AC1; None where they are undefined.
    """

    name: str
    units: int
    percent: float | None
    alpha: float | None
    low: float | None
    high: float | None
    ac1: float | None


# Agreement.


@dataclass(frozen=True, slots=True)
class Judged:
    """Judgements that can agree: units (rater to value), the item each belongs to, and the level of
    measurement."""

    units: Units
    items: list[str]
    level: Any

    def of(self, some: Collection[str]) -> Judged:
        """Returns the judgements of some raters only."""
        return Judged(
            [{r: v for r, v in u.items() if r in some} for u in self.units], self.items, self.level
        )


def judged(rated: Iterable[RatedAnswer], aspect: str | None = None) -> Judged:
    """Returns the judgements in answers: pairs of conversations, points per aspect, marks per turn
    and where it went wrong first; what was left unmarked does not count."""
    by_item: dict[str, list[RatedAnswer]] = defaultdict(list)
    for each in rated:
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
                values.update(
                    {
                        n: {**values[n], each.rater: v}
                        for n, v in answer.aspects.items()
                        if aspect in (None, n)
                    }
                )
        comparisons = [s.answer for s in answers if isinstance(s.answer, Comparison)]
        new = [*comparison_units(comparisons), *values.values()]
        found += new
        items += [item_] * len(new)
    return Judged(found, items, level)


def agreement(name: str, found: Judged) -> Agreement:
    """Measures the agreement in judgements, under a name."""
    shared = [(u, item_) for u, item_ in zip(found.units, found.items, strict=True) if len(u) > 1]
    units = [u for u, _ in shared]
    level: Any = (
        found.level
        if all(isinstance(v, (int, float)) for u in units for v in u.values())
        else "nominal"
    )
    interval = (
        alpha_interval(units, level, clusters=[c for _, c in shared], samples=300)
        if len({c for _, c in shared}) > 2
        else None
    )
    low, high = interval if interval is not None else (None, None)
    return Agreement(
        name,
        len(units),
        percent_agreement(units),
        krippendorff_alpha(units, level),
        low,
        high,
        gwet_ac1(units),
    )


def between(found: Judged, stratum_of: Mapping[str, str]) -> Judged:
    """Returns the judgements of strata: each gives the mean of its raters' points, or the value
    that most of them give; where these are divided, none."""
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
            seen.append(
                {s: top[0][0] for s, top in most.items() if len(top) == 1 or top[0][1] > top[1][1]}
            )
    return Judged(seen, found.items, found.level)


def versus(found: Judged, rater: str) -> Judged:
    """Returns the judgements of one rater paired with each of the others; the agreement among the
    others does not count."""
    both = [
        ({rater: u[rater], o: u[o]}, i)
        for u, i in zip(found.units, found.items, strict=True)
        if rater in u
        for o in u
        if o != rater
    ]
    return Judged([u for u, _ in both], [i for _, i in both], found.level)


def agreed(ledger: Ledger, run: str) -> float | None:
    """Returns the percent agreement of all raters, for the progress line."""
    return percent_agreement(judged(s for s in Desk(ledger).answers(run) if not s.gold).units)
