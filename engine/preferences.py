"""Comparisons as preferences: how raters agree with one another and with a known truth. Files of them: `engine/exchange`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from .feedback import Comparison


class PreferenceError(ValueError):
    """A file of preferences, or a comparison, that cannot be used. The message says where."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What all raters together said of two episodes of a group.

    Attributes:
        first, second: their ids.
        probability: mean over the raters of how sure they are that the first is better, by the weights of their sources; a tie is 0.5.
        margin: mean of the raters' grades by the same weights, where they gave any; 0 otherwise.
        weight: the sum of these weights; where none are stated, how many raters there were.
    """

    first: str
    second: str
    probability: float
    margin: float
    weight: float


def opinion(comparison: Comparison, first: str, second: str) -> float | None:
    """How sure a rater is that the first episode is better: 1, 0, 0.5 for a tie, or their own probability. None: not compared."""
    place = {episode: tier for tier, episodes in enumerate(comparison.ranking) for episode in episodes}
    if first not in place or second not in place:
        return None
    if place[first] == place[second]:
        return 0.5
    sure = 1.0 if comparison.probability is None else comparison.probability
    return sure if place[first] < place[second] else 1 - sure


def pairs(comparisons: Iterable[Comparison], weights: Mapping[str, float] = {}) -> list[Pair]:
    """Every pair of episodes that somebody compared, over all raters; the comparisons must be in force and scored.

        probability = sum_c w(c) p(c) / sum_c w(c)        over the comparisons c of the pair, w by the source of c

    Args:
        weights: source to what each of its opinions counts, at least 0; 1 for those that are not named. What weighs 0 is left out.
    """
    said: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for comparison in comparisons:
        weight = weights.get(comparison.stamp.source, 1.0)
        if not weight:
            continue
        ranked = sorted(episode for tier in comparison.ranking for episode in tier)
        for a, b in combinations(ranked, 2):
            sure = opinion(comparison, a, b)
            if sure is not None:
                said.setdefault((a, b), []).append((weight, sure, comparison.strength or 0.0))
    found = []
    for (a, b), votes in said.items():
        total = sum(w for w, *_ in votes)
        found.append(Pair(a, b, sum(w * p for w, p, _ in votes) / total, sum(w * m for w, _, m in votes) / total, float(total)))
    return found


def rater_agreement(comparisons: Sequence[Comparison]) -> float | None:
    """The chance that two raters of one pair agree, over all pairs that two raters ordered strictly; None where none did.

    It is a ceiling: a model that knew the raters' common taste would agree with single raters no more often than they do with one
    another, up to their noise.
    """
    by_group: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        by_group.setdefault(comparison.group, []).append(comparison)
    agreed: list[float] = []
    for same in by_group.values():
        for one, other in combinations(same, 2):
            for a, b in combinations(sorted({e for tier in one.ranking for e in tier}), 2):
                first, second = opinion(one, a, b), opinion(other, a, b)
                if first is not None and second is not None and 0.5 not in (first, second):
                    agreed.append(float((first > 0.5) == (second > 0.5)))
    return sum(agreed) / len(agreed) if agreed else None


def truth_agreement(comparisons: Iterable[Comparison], truth: Mapping[str, float]) -> float | None:
    """How often a single rater orders two episodes as the truth does, over pairs that both order strictly; None where there are none.

    Args:
        truth: episode id to a known true outcome.
    """
    agreed: list[float] = []
    for comparison in comparisons:
        for a, b in combinations(sorted(e for tier in comparison.ranking for e in tier), 2):
            sure = opinion(comparison, a, b)
            if sure is not None and sure != 0.5 and truth[a] != truth[b]:
                agreed.append(float((sure > 0.5) == (truth[a] > truth[b])))
    return sum(agreed) / len(agreed) if agreed else None


def liked(score: float, threshold: float | None) -> bool:
    """Whether a score is that of something liked: from the threshold on; without one, scores must be labels, 0 or 1.

    Raises:
        PreferenceError: a score that is no label, and no threshold.
    """
    if threshold is None and score not in (0.0, 1.0):
        raise PreferenceError(
            f"a score of {score:g} is no label (0 or 1): state the `threshold` from which on a score means liked (`--threshold` of export)"
        )
    return score >= (1.0 if threshold is None else threshold)
