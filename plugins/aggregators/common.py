"""Functions that the aggregators share: raters of answers, rankings as pairs, and the uncertainty
of scores that come in groups."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_matrix, identity
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu

from ...judging import EQUAL, opinions, rounded
from ...protocols import Comparison, Estimate, Feedback, RaterEstimate, overall

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# When L-BFGS may stop.
EXACT = {"maxiter": 2000, "maxfun": 4000, "maxls": 50, "gtol": 1e-7, "ftol": 1e-13}
COLUMNS = 128  # of an inverse that are computed at once


def rater(answer: Feedback | Comparison) -> str:
    """Returns the rater of an answer, or its source where it names none."""
    return answer.stamp.rater or answer.stamp.source


def scores(answers: Iterable[Feedback | Comparison]) -> list[tuple[str, str, float]]:
    """Returns (episode, rater, number) of every answer that gives an episode a number; numbers that
    are equal up to rounding are made equal."""
    found = []
    for answer in answers:
        if isinstance(answer, Feedback) and (number := overall(answer)) is not None:
            found.append((answer.episode, rater(answer), number))
    same = rounded(number for *_, number in found)
    return [(episode, by, same[number]) for episode, by, number in found]


def comparisons(answers: Iterable[Feedback | Comparison]) -> list[Comparison]:
    """Returns the comparisons among answers, without those that failed or were abstained from."""
    return [a for a in answers if isinstance(a, Comparison) and a.status == "scored"]


class Index(dict[Hashable, int]):
    """A mapping of names to numbers, in the order of their first mention."""

    def __missing__(self, name: Hashable) -> int:
        self[name] = len(self)
        return self[name]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of episodes as arrays, P of them; what is shown first (left, or on top) is `first`
    where that is known.

    Attributes:
        episodes: N ids; `group` [N] is the number of each one's group.
        raters: W names.
        first, second: [P] numbers of episodes.
        sure: [P] how sure the rater is that the first is better: 1, 0, 0.5 for a tie, or a soft
            label between.
        by: [P] numbers of raters.
        sided: [P] 1 where it is known which was shown first, else 0.
        weight: [P] how much each counts, see `ranking_weight`.
    """

    episodes: list[str]
    group: Ints
    raters: list[str]
    first: Ints
    second: Ints
    sure: Floats
    by: Ints
    sided: Floats
    weight: Floats

    def curvature(self, value: Floats) -> tuple[Ints, Ints, Floats]:
        """Returns the entries of sum_p value_p (e_first - e_second)(e_first - e_second)^T, for
        `Inverse`."""
        a, b = self.first, self.second
        return (
            np.concatenate([a, b, a, b]),
            np.concatenate([a, b, b, a]),
            np.concatenate([value, value, -value, -value]),
        )


def ranking_weight(size: int) -> float:
    """Returns the weight of a pair out of a ranking of K episodes: w_K = 4 (K - H_K) / (K (K - 1)),
    with H_K = 1 + 1/2 + ... + 1/K.

    The K (K - 1) / 2 pairs of one ranking are not independent: an episode that beats the second by
    chance beats the third more easily. Counted in full they would hold more information than the
    ranking, and deviations would be too small. With this weight they carry the Fisher information
    that Plackett-Luce finds in the ranking when all are equally good (both are multiples of
    I - 1/K, so one number is enough): w_2 = 1, w_3 = 0.78, w_4 = 0.64, w_8 = 0.38.
    """
    return 4 * (size - sum(1 / k for k in range(1, size + 1))) / (size * (size - 1))


def pairs(answers: Iterable[Feedback | Comparison]) -> Pairs:
    """Returns every pair of episodes in every ranking.

    `shown["order"]` lists episode ids as displayed; without it a pair has no sides.
    """
    episodes, groups, raters = Index(), Index(), Index()
    group: dict[int, int] = {}
    rows: list[tuple[int, int, float, int, bool, float]] = []
    for comparison in comparisons(answers):
        ranked = [e for tier in comparison.ranking for e in tier]
        shown = comparison.shown.get("order") or ()
        place = {e: k for k, e in enumerate(shown)}
        sided = all(e in place for e in ranked)
        ranked.sort(key=place.__getitem__ if sided else None)
        by, weight = raters[rater(comparison)], ranking_weight(len(ranked))
        for e in ranked:
            group[episodes[e]] = groups[comparison.group]
        order = {e: i for i, e in enumerate(ranked)}
        for a, b, sure in opinions(comparison):
            first, second, sure = (a, b, sure) if order[a] < order[b] else (b, a, 1 - sure)
            rows.append((episodes[first], episodes[second], sure, by, sided, weight))
    columns = [np.array(c) for c in zip(*rows, strict=True)] or [np.zeros(0)] * 6
    whole = [c.astype(np.int64) for c in (columns[0], columns[1], columns[3])]
    real = [c.astype(np.float64) for c in (columns[2], columns[4], columns[5])]
    return Pairs(
        list(map(str, episodes)), np.array([group[n] for n in range(len(episodes))],
            dtype=np.int64), list(map(str, raters)),
        whole[0], whole[1], real[0], whole[2], real[1], real[2],
    )  # fmt: skip


class Inverse:
    """The inverse of a sparse symmetric matrix over episodes, of which only requested entries are
    computed.

    Entries between episodes that nothing connects are 0, so one right-hand side holds a unit vector
    for every connected part at once: however many parts there are, as many solutions are needed as
    the largest has members.

    Args:
        row, column, value: entries, those of one place added up.
        diagonal: a number on the whole diagonal; the sum must be positive definite.
        size: how many episodes there are.
    """

    def __init__(self, row: Ints, column: Ints, value: Floats, diagonal: float, size: int) -> None:
        entries = csc_matrix((value, (row, column)), (size, size)) + diagonal * identity(
            size, format="csc"
        )
        self._factors = splu(
            entries.tocsc(),
            permc_spec="MMD_AT_PLUS_A",
            diag_pivot_thresh=0,
            options={"SymmetricMode": True},
        )
        self._part = connected_components(entries, directed=False)[1]
        order = np.argsort(self._part, kind="stable")
        count = np.bincount(self._part)
        self._place = np.empty(size, dtype=np.int64)  # of each episode among those of its part
        self._place[order] = np.arange(size) - np.repeat(np.cumsum(count) - count, count)

    def times(self, x: Floats) -> Floats:
        """Returns the product with [N] or [N, C]."""
        return np.asarray(self._factors.solve(x))

    def at(self, row: Ints, column: Ints) -> Floats:
        """Returns the entries at [P] places."""
        found = np.zeros(len(row))
        episodes = np.arange(len(self._place))
        for begin in range(0, int(self._place.max()) + 1, COLUMNS):
            own = self._place - begin
            mine = (own >= 0) & (own < COLUMNS)
            units = np.zeros((len(own), min(COLUMNS, int(own.max()) + 1)))
            units[episodes[mine], own[mine]] = 1.0
            solved = self.times(units)
            asked = np.flatnonzero(mine[column] & (self._part[row] == self._part[column]))
            found[asked] = solved[row[asked], own[column[asked]]]
        return found

    def diagonal(self) -> Floats:
        """Returns the entries on the diagonal, [N]."""
        every = np.arange(len(self._place))
        return self.at(every, every)


def centred_estimates(
    episodes: Sequence[str],
    group: Ints,
    score: Floats,
    variance: Floats,
    prior: float,
    rankings: Iterable[Comparison],
) -> dict[str, Estimate]:
    """Returns estimates relative to the mean of each episode's group.

    Comparisons tell nothing about a group's mean, which the prior alone holds at 0. Its variance,
    prior / K and independent of all differences, is subtracted from both deviations: raters cannot
    reduce it, and with it no number of answers would ever make an estimate certain.

    Args:
        episodes: [N] ids.
        group: [N] number of the group of each.
        score: [N] estimate of each score.
        variance: [N] posterior variance of each score, the mean's included.
        prior: prior variance of a score.
        rankings: the comparisons that name the episodes.
    """
    people: dict[str, set[str]] = defaultdict(set)
    for comparison in rankings:
        for tier in comparison.ranking:
            for episode in tier:
                people[episode].add(rater(comparison))
    share = 1 / np.bincount(group)[group]
    sd = np.sqrt(np.maximum(variance - prior * share, 0.0))
    before = np.sqrt(prior * (1 - share))
    columns = zip(episodes, score.tolist(), sd.tolist(), before.tolist(), strict=True)
    return {e: Estimate(s, after, at_first, len(people[e])) for e, s, after, at_first in columns}


def agreement(
    rankings: Iterable[Comparison], estimates: Mapping[str, Estimate]
) -> dict[str, RaterEstimate]:
    """Returns how far a rater's choices agree with the scores of all raters together: (right -
    wrong) / all, over pairs, ties and soft labels between.

    A rater's own answers are among those the scores are computed from, so it flatters raters of
    pairs that few others saw.
    """
    agreed: dict[str, list[float]] = defaultdict(list)
    count: Counter[str] = Counter()
    for comparison in rankings:
        name = rater(comparison)
        count[name] += 1
        for first, second, sure in opinions(comparison):
            apart = estimates[first].score - estimates[second].score
            agreed[name].append((2 * sure - 1) * ((apart > EQUAL) - (apart < -EQUAL)))
    return {
        name: RaterEstimate(count[name], sum(values) / len(values))
        for name, values in agreed.items()
    }
