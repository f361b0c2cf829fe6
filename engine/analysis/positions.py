"""Position bias: what verdicts follow in the order shown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..records.feedback import Comparison, Feedback
from ..records.rewards import ranking_scores
from .preferences import opinion

Floats = NDArray[np.float64]
Answers = Iterable[Feedback | Comparison]

FEWEST = 10  # groups: below, nothing is estimated
LINEAR = {"reference", "own family"}  # terms of the regressions that no tanh bends
PRIOR = 0.1  # precision of the prior of a coefficient
DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True, slots=True)
class Bias:
    """A measured bias of one judge.

    Attributes:
        kind: "position", "flips", "own family", or a feature of style ("length", ...).
        estimate, low, high: the effect and its 95 % interval, in `unit`.
        unit: "net win rate" in [-1, 1] (100 points are 1), "share" in [0, 1], or "sd" of the
            judge's scores within groups.
        n: verdicts, pairs or scores it rests on.
        sentence: the same for people to read.
        rater, version: the judge that was measured; empty where the caller knows it.
    """

    kind: str
    estimate: float
    low: float
    high: float
    unit: str
    n: int
    sentence: str
    rater: str = ""
    version: str = ""


# Position


class Look(NamedTuple):
    """A judge's verdict on some episodes shown in one order.

    Attributes:
        by: the judge, its version and the aspect.
        order: ids as shown.
        scores: normalised ranks in [0, 1], in this order.
    """

    group: str
    by: tuple[str, str, str]
    order: tuple[str, ...]
    scores: tuple[float, ...]


def looks(answers: Answers) -> Iterator[Look]:
    """Returns every look for which it is known what was shown where.

    A comparison says so by `shown["order"]`, episode ids as displayed; those it did not rank are
    passed over. A judge that looks at a pair more than once for one comparison puts
    `details["orders"]` instead, [{"order": [id, id], "first": p}, ...], p being the probability (1,
    0.5, 0) that what was shown first is better, None where that look failed; of a ranking "tiers"
    instead of "first", the place of each as shown, 0 the best.

    Raises:
        ValueError: `details["orders"]` of another form.
    """
    for answer in answers:
        if not isinstance(answer, Comparison) or answer.status != "scored":
            continue
        by = answer.stamp.rater or answer.stamp.source, answer.stamp.version, answer.aspect
        if "orders" in answer.details:
            for entry in answer.details["orders"]:
                yield from (
                    Look(answer.group, by, order, scores)
                    for order, scores in _entry(entry, answer.group)
                )
            continue
        worth = ranking_scores(answer)
        if answer.probability is not None and len(worth) == 2:
            worth = {a: opinion(answer, a, b) or 0.0 for a, b in (tuple(worth), tuple(worth)[::-1])}
        order = tuple(e for e in answer.shown.get("order", ()) if e in worth)
        if sorted(order) == sorted(worth):
            yield Look(answer.group, by, order, tuple(worth[e] for e in order))


def _entry(entry: Any, group: str) -> Iterator[tuple[tuple[str, ...], tuple[float, ...]]]:
    """Returns one look: the ids as shown, and the score of each; none where it failed."""
    try:
        order = tuple(map(str, entry["order"]))
        if len(set(order)) != len(order) or len(order) < 2:
            raise ValueError("ids must differ")
        if "tiers" in entry:
            tiers = [int(tier) for tier in entry["tiers"]]
            if len(tiers) != len(order):
                raise ValueError("a tier for each id")
            beaten = [
                sum((other > own) + 0.5 * (other == own) for other in tiers) - 0.5 for own in tiers
            ]
            yield order, tuple(each / (len(order) - 1) for each in beaten)
        elif entry["first"] is not None:
            if len(order) != 2 or not 0 <= entry["first"] <= 1:
                raise ValueError("a probability for two")
            yield order, (float(entry["first"]), 1 - float(entry["first"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"details['orders'] of a comparison of group {group} holds {entry!r} ({error}); needed:"
            " {order: [id, id], first: p} with p in [0, 1] or None, or {order: ids, tiers:"
            " places}"
        ) from error


def position(answers: Answers) -> Bias | None:
    """Measures how much more often what is shown first wins than what is shown last, see the top of
    `engine/analysis/bias`; None: too few groups.

    Below zero, the last place is liked better.
    """
    seen = list(looks(answers))
    turned = _turned(seen)
    known = "in both orders"
    values = [(group, (_slope(one) + _slope(other)) / 2) for group, one, other in turned]
    if len({group for group, _ in values}) < FEWEST:
        known = "in one order each, drawn at random if this is to mean anything"
        values = [(look.group, _slope(look.scores)) for look in seen]
    found = _mean([v for _, v in values], [g for g, _ in values], (-1.0, 1.0))
    if found is None:
        return None
    what = (
        f"what is shown first wins {in_points(*found)} than what is shown last,"
        f" {counted(len(values), 'comparison')} {known}"
    )
    return Bias("position", *found, "net win rate", len(values), what)


def flips(answers: Answers) -> Bias | None:
    """Returns the share of pairs, judged in both orders, whose winner changes with the order; a win
    that becomes a tie is half one."""
    pairs = [
        (group, one[0], other[1]) for group, one, other in _turned(looks(answers)) if len(one) == 2
    ]  # twice of the same episode
    changed = [abs(np.sign(one - 0.5) - np.sign(other - 0.5)) / 2 for _, one, other in pairs]
    found = _mean(changed, [group for group, _, _ in pairs], (0.0, 1.0))
    if found is None:
        return None
    text = (
        f"{100 * found[0]:.1f} % ({100 * found[1]:.1f} to {100 * found[2]:.1f}) of the verdicts"
        " change with the order"
    )
    return Bias("flips", *found, "share", len(pairs), f"{text}, {counted(len(pairs), 'pair')}")


def rank_by_place(answers: Answers) -> dict[int, Floats]:
    """Returns the mean normalised rank by place, [K], for each number K of episodes shown; an
    unbiased judge has 1/2 everywhere."""
    by_size: dict[int, list[tuple[float, ...]]] = defaultdict(list)
    for look in looks(answers):
        by_size[len(look.scores)].append(look.scores)
    return {size: np.mean(rows, axis=0) for size, rows in sorted(by_size.items())}


def _turned(seen: Iterable[Look]) -> list[tuple[str, Floats, Floats]]:
    """Returns (group, scores in an order, scores in the reverse order) of everything that was
    looked at both ways; repeats are averaged."""
    by_order: dict[tuple[str, tuple[str, str, str], tuple[str, ...]], list[tuple[float, ...]]] = (
        defaultdict(list)
    )
    for look in seen:
        by_order[look.group, look.by, look.order].append(look.scores)
    return [
        (group, np.mean(rows, axis=0), np.mean(by_order[group, by, order[::-1]], axis=0))
        for (group, by, order), rows in by_order.items()
        if order < order[::-1] and (group, by, order[::-1]) in by_order
    ]


def _slope(scores: ArrayLike) -> float:
    s = np.asarray(scores, float)
    place = np.linspace(0, 1, len(s)) - 0.5
    return float(-(place @ (s - 0.5)) / (place @ place))


def _mean(
    values: Sequence[float], clusters: Sequence[str], ends: tuple[float, float]
) -> tuple[float, float, float] | None:
    """Returns the mean and its 95 % interval by the bootstrap over clusters; None with fewer than
    FEWEST of them.

    One value at either end is drawn along. Clusters are put in the order of what they hold, so that
    names and the order of answers change nothing.
    """
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for value, cluster in zip(values, clusters, strict=True):
        total[cluster][0] += value
        total[cluster][1] += 1
    if len(total) < FEWEST:
        return None
    sums, counts = np.array(sorted([*map(tuple, total.values()), (ends[0], 1.0), (ends[1], 1.0)])).T
    rng = np.random.default_rng(0)
    means = np.empty(DRAWS)
    for b in range(DRAWS):
        times = np.bincount(rng.integers(len(sums), size=len(sums)), minlength=len(sums))
        means[b] = (times @ sums) / (times @ counts)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)


def turned_positive(estimate: float, low: float, high: float) -> tuple[float, float, float, bool]:
    """Negates an estimate and its interval where the estimate is negative; returns the three, and
    whether they were negated."""
    return (-estimate, -high, -low, True) if estimate < 0 else (estimate, low, high, False)


def in_points(estimate: float, low: float, high: float) -> str:
    """Words a net win rate and its interval in points."""
    size, least, most, negative = turned_positive(estimate, low, high)
    return (
        f"{100 * size:.1f} points ({100 * least:.1f} to {100 * most:.1f})"
        f" {'less' if negative else 'more'} often"
    )


def counted(n: int, what: str) -> str:
    """Returns a number and a noun, in the plural where the number is not 1."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
