"""What the aggregators share: who answered, rankings as pairs, and the uncertainty of scores that come in groups."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ...engine.feedback import Comparison, Feedback
from ...engine.preferences import opinion
from ...engine.reward import Estimate, RaterEstimate, overall

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
EXACT = {"maxiter": 2000, "maxfun": 4000, "maxls": 50, "gtol": 1e-7, "ftol": 1e-13}  # when L-BFGS may stop
EQUAL = 1e-6  # scores that differ by no more are the same up to rounding


def rater(answer: Feedback | Comparison) -> str:
    return answer.stamp.rater or answer.stamp.source


def scores(answers: Iterable[Feedback | Comparison]) -> list[tuple[str, str, float]]:
    """(episode, rater, number) of every answer that gives an episode one."""
    found = []
    for answer in answers:
        if isinstance(answer, Feedback) and (number := overall(answer)) is not None:
            found.append((answer.episode, rater(answer), number))
    return found


def comparisons(answers: Iterable[Feedback | Comparison]) -> list[Comparison]:
    return [a for a in answers if isinstance(a, Comparison) and a.status == "scored"]


class Index(dict[Hashable, int]):
    """Names to numbers, in the order of their first mention."""

    def __missing__(self, name: Hashable) -> int:
        self[name] = len(self)
        return self[name]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of episodes as arrays, P of them; what is shown first (left, or on top) is `first` where that is known.

    Attributes:
        episodes: N ids; `group` [N] is the number of each one's group.
        raters: W names.
        first, second: [P] numbers of episodes.
        sure: [P] how sure the rater is that the first is better: 1, 0, 0.5 for a tie, or a soft label between.
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
        """Entries of sum_p value_p (e_first - e_second)(e_first - e_second)^T, for `Groups.matrix`."""
        a, b = self.first, self.second
        return np.concatenate([a, b, a, b]), np.concatenate([a, b, b, a]), np.concatenate([value, value, -value, -value])


def ranking_weight(size: int) -> float:
    """What a pair out of a ranking of K episodes counts: w_K = 4 (K - H_K) / (K (K - 1)), with H_K = 1 + 1/2 + ... + 1/K.

    The K (K - 1) / 2 pairs of one ranking are not independent: who beats the second by chance beats the third more easily. Counted in full they would say
    more than the ranking knows, and deviations would be too small. With this weight they carry the Fisher information that Plackett-Luce finds in the
    ranking when all are equally good (both are multiples of I - 1/K, so one number does it): w_2 = 1, w_3 = 0.78, w_4 = 0.64, w_8 = 0.38.
    """
    return 4 * (size - sum(1 / k for k in range(1, size + 1))) / (size * (size - 1))


def pairs(answers: Iterable[Feedback | Comparison]) -> Pairs:
    """Every pair of episodes in every ranking. `shown["order"]` lists episode ids as displayed; without it a pair has no sides."""
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
        for i, first in enumerate(ranked):
            for second in ranked[i + 1 :]:
                sure = opinion(comparison, first, second)
                assert sure is not None
                rows.append((episodes[first], episodes[second], sure, by, sided, weight))
    columns = [np.array(c) for c in zip(*rows, strict=True)] or [np.zeros(0)] * 6
    whole = [c.astype(np.int64) for c in (columns[0], columns[1], columns[3])]
    real = [c.astype(np.float64) for c in (columns[2], columns[4], columns[5])]
    return Pairs(
        list(map(str, episodes)), np.array([group[n] for n in range(len(episodes))], dtype=np.int64), list(map(str, raters)),
        whole[0], whole[1], real[0], whole[2], real[1], real[2],
    )  # fmt: skip


class Groups:
    """Symmetric matrices over episodes that couple only members of a group, as one flat array of their blocks; groups of one size stand together.

    Args:
        group: [N] which group each belongs to.
    """

    def __init__(self, group: Ints) -> None:
        size = np.bincount(group)
        mine = size[group]
        order = np.lexsort((group, mine))  # by size, then by group
        begins = np.flatnonzero(np.r_[True, np.diff(group[order]) != 0])
        self._local, self._row = np.empty_like(group), np.empty_like(group)
        self._local[order] = np.arange(len(group)) - np.repeat(begins, mine[order[begins]])
        self._row[order] = np.cumsum(mine[order]) - mine[order]
        self._order, self._total = order, int(mine.sum())
        sizes, count = np.unique(size[size > 0], return_counts=True)
        self._shapes = [(int(g), int(k)) for k, g in zip(sizes, count, strict=True)]

    def matrix(self, row: Ints, column: Ints, value: Floats, diagonal: float) -> Floats:
        """The sum of entries, those of one place added up, and a number on the whole diagonal."""
        flat = np.bincount(self._row[row] + self._local[column], value, self._total).astype(np.float64)
        flat[self._row + self._local] += diagonal
        return flat

    def at(self, flat: Floats, row: Ints, column: Ints) -> Floats:
        return flat[self._row[row] + self._local[column]]

    def diagonal(self, flat: Floats) -> Floats:
        return flat[self._row + self._local]

    def inverse(self, flat: Floats) -> Floats:
        return np.concatenate([np.linalg.inv(block).ravel() for _, block in self._blocks(flat)])

    def times(self, flat: Floats, x: Floats) -> Floats:
        """The product with [N] or [N, C]."""
        product = np.empty_like(x)
        for members, block in self._blocks(flat):
            product[members] = np.einsum("gij,gj...->gi...", block, x[members])
        return product

    def _blocks(self, flat: Floats) -> Iterator[tuple[Ints, Floats]]:
        episode, entry = 0, 0
        for g, k in self._shapes:
            members = self._order[episode : episode + g * k].reshape(g, k)
            yield members, flat[entry : entry + g * k * k].reshape(g, k, k)
            episode, entry = episode + g * k, entry + g * k * k


def centred_estimates(
    episodes: Sequence[str], group: Ints, score: Floats, variance: Floats, prior: float, rankings: Iterable[Comparison]
) -> dict[str, Estimate]:
    """Estimates against the mean of one's group.

    Comparisons say nothing of a group's mean, which the prior alone holds at 0. Its variance, prior / K and independent of all differences, is
    taken off both deviations: it is none of the raters' business, and with it no number of answers would ever make an estimate certain.

    Args:
        variance: [N] posterior variance of each score, the mean's included.
        prior: prior variance of a score.
        rankings: who spoke of them.
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


def agreement(rankings: Iterable[Comparison], estimates: Mapping[str, Estimate]) -> dict[str, RaterEstimate]:
    """How a rater's choices agree with the scores that all raters together give: (right - wrong) / all, over pairs, ties and soft labels between.

    A rater's own answers are among those the scores are made of, so it flatters raters of pairs that few others saw.
    """
    agreed: dict[str, list[float]] = defaultdict(list)
    count: Counter[str] = Counter()
    for comparison in rankings:
        name = rater(comparison)
        count[name] += 1
        for first, second in combinations([e for tier in comparison.ranking for e in tier], 2):
            sure = opinion(comparison, first, second)
            assert sure is not None
            apart = estimates[first].score - estimates[second].score
            agreed[name].append((2 * sure - 1) * ((apart > EQUAL) - (apart < -EQUAL)))
    return {name: RaterEstimate(count[name], sum(said) / len(said)) for name, said in agreed.items()}
