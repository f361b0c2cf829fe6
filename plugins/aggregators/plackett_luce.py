"""The aggregator `plackett-luce`: scores from whole rankings, with all raters alike.

    P(ranking) = prod_k prod_{i in tier k} exp(s_i) / sum_{j in tiers k, k+1, ...} exp(s_j)   s_i ~
        N(0, variance)

A ranking is made from the top: the best is chosen from all, the next from what is left (Plackett
1975, Luce 1959). Members of a tie are each chosen from all that were left when the tie began
(Breslow 1974), as in the reward model's loss. For two episodes it is Bradley-Terry, except for
ties: Breslow's are somewhat less certain than two halves of a win, and a rater's own `probability`
mixes both orders.

Scores are the posterior's mode and their deviations Laplace's, in log-odds of being preferred,
known only within a group and centred there at 0; `bradley-terry` explains why, and why the variance
is 2. Nothing in a ranking is counted twice here, which is the reason to prefer it for rankings of
more than two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize

from ...protocols import Aggregate, Aggregator, Comparison, Feedback
from .common import EXACT, Floats, Index, Ints, Inverse, agreement, centred_estimates, comparisons


class PlackettLuce(Aggregator):
    """Estimates scores from whole rankings, with all raters alike.

    Args:
        variance: of the prior of a score, in squared log-odds.
    """

    reads = frozenset({"comparisons"})

    def __init__(self, variance: float = 2.0) -> None:
        if not variance > 0:
            raise ValueError(
                f"variance must be positive, got {variance}; the larger, the less scores are drawn"
                " to 0"
            )
        self.variance = variance

    def aggregate(self, answers: Sequence[Feedback | Comparison]) -> Aggregate:
        """Returns estimates for every episode that was compared; scores without comparisons are
        ignored."""
        compared = comparisons(answers)
        if not compared:
            return Aggregate({}, {})
        choices = Choices(compared)
        size = len(choices.group)

        def loss(score: Floats) -> tuple[float, Floats]:
            normaliser, chance = choices.chances(score)
            value = (
                choices.times @ normaliser
                - choices.wins @ score
                + score @ score / (2 * self.variance)
            )
            slope = (
                np.bincount(choices.option, choices.times[choices.stage] * chance, size)
                - choices.wins
                + score / self.variance
            )
            return float(value), slope

        def covariance(score: Floats) -> Inverse:
            return Inverse(*choices.curvature(score), 1 / self.variance, size)

        score: Floats = minimize(loss, np.zeros(size), jac=True, method="L-BFGS-B", options=EXACT).x
        # Newton, to the last digits: groups must not affect each other through a stopping rule.
        for _ in range(2):
            score = score - covariance(score).times(loss(score)[1])
        variance = covariance(score).diagonal()
        estimates = centred_estimates(
            choices.episodes, choices.group, score, variance, self.variance, compared
        )
        return Aggregate(estimates, agreement(compared, estimates))


class Choices:
    """All rankings as choices: at each stage some members are taken from those left. Stages from
    the same set are one.

    Attributes:
        episodes: N ids; `group` [N].
        wins: [N] how often each was taken.
        times: [S] how many were taken from the set of each stage.
        stage, option: [M] the members of the sets, stage by stage.
    """

    def __init__(self, rankings: Sequence[Comparison]) -> None:
        episodes, groups = Index(), Index()
        group: dict[int, int] = {}
        wins: dict[int, float] = {}
        sets: dict[tuple[int, ...], float] = {}
        for comparison in rankings:
            orders = [(1.0, comparison.ranking)]
            if comparison.probability is not None:
                orders = [
                    (comparison.probability, comparison.ranking),
                    (1 - comparison.probability, comparison.ranking[::-1]),
                ]
            for weight, tiers in orders:
                for k, tier in enumerate(tiers):
                    for e in tier:
                        n = episodes[e]
                        group[n] = groups[comparison.group]
                        wins[n] = wins.get(n, 0.0) + weight
                    left = tuple(sorted(episodes[e] for lower in tiers[k:] for e in lower))
                    sets[left] = sets.get(left, 0.0) + weight * len(tier)
        self.episodes = list(map(str, episodes))
        self.group = np.array([group[n] for n in range(len(episodes))], dtype=np.int64)
        self.wins = np.array([wins[n] for n in range(len(episodes))])
        self.times = np.array(list(sets.values()))
        lengths = np.array([len(s) for s in sets])
        self.option = np.array([n for s in sets for n in s], dtype=np.int64)
        self.stage = np.repeat(np.arange(len(sets)), lengths)
        self._begins = np.cumsum(lengths) - lengths
        # Each member once with every member of its set.
        rows = np.repeat(np.arange(len(self.stage)), lengths[self.stage])
        within = np.arange(len(rows)) - np.repeat(
            np.cumsum(lengths[self.stage]) - lengths[self.stage], lengths[self.stage]
        )
        self._row, self._column = rows, self._begins[self.stage[rows]] + within

    def chances(self, score: Floats) -> tuple[Floats, Floats]:
        """Returns [S] log of the sum of exp over each stage's set, [M] the chance of each member to
        be taken."""
        offered = score[self.option]
        top = np.maximum.reduceat(offered, self._begins)
        normaliser = top + np.log(np.add.reduceat(np.exp(offered - top[self.stage]), self._begins))
        return normaliser, np.exp(offered - normaliser[self.stage])

    def curvature(self, score: Floats) -> tuple[Ints, Ints, Floats]:
        """Returns entries of the likelihood's Hessian: sum over stages of times (diag(chance) -
        chance chance^T)."""
        chance, times = self.chances(score)[1], self.times[self.stage]
        row, column = self._row, self._column
        return (
            np.concatenate([self.option, self.option[row]]),
            np.concatenate([self.option, self.option[column]]),
            np.concatenate([times * chance, -times[row] * chance[row] * chance[column]]),
        )
