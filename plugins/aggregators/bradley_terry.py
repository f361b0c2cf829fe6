"""The aggregator `bradley-terry`: scores from comparisons, with all raters alike.

    P(i beats j) = sigma(s_i - s_j)        s_i ~ N(0, variance)   (Bradley and Terry 1952; the prior
                                           makes it a posterior)

The scores are the posterior's mode, their deviations Laplace's: the inverse Hessian there. A
ranking counts as its pairs, each of weight w_K (`ranking_weight`), a tie as half a win for each
side, a rater's own `probability` as it stands. The prior also keeps the score of an episode that
never lost finite.

Scores are known only against others of a group, since no comparison spans two groups; the prior
centres each group at 0. The default variance of 2 is a usual one: under it two raters of the same
pair agree in 70 % of the cases, as people do on replies (63 % in Bai et al. 2022,
arXiv:2204.05862; 73 to 77 % in Ouyang et al. 2022, arXiv:2203.02155).

Every answer counts alike: a rater who always takes the left one adds noise, and where sides are not
balanced a bias. `rater-bradley-terry` sees that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from ...protocols import Aggregate, Aggregator, Comparison, Feedback
from .common import EXACT, Floats, Inverse, agreement, centred_estimates, comparisons, pairs


class BradleyTerry(Aggregator):
    """Estimates scores from comparisons, with all raters alike.

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
        p = pairs(answers)
        if not p.episodes:
            return Aggregate({}, {})
        size = len(p.episodes)

        def loss(score: Floats) -> tuple[float, Floats]:
            apart = score[p.first] - score[p.second]
            value = p.weight @ (np.logaddexp(0, apart) - p.sure * apart) + score @ score / (
                2 * self.variance
            )
            pull = p.weight * (expit(apart) - p.sure)
            return (
                float(value),
                np.bincount(p.first, pull, size)
                - np.bincount(p.second, pull, size)
                + score / self.variance,
            )

        def covariance(score: Floats) -> Inverse:
            chance = expit(score[p.first] - score[p.second])
            return Inverse(*p.curvature(p.weight * chance * (1 - chance)), 1 / self.variance, size)

        score: Floats = minimize(loss, np.zeros(size), jac=True, method="L-BFGS-B", options=EXACT).x
        # Newton, to the last digits: groups must not affect each other through a stopping rule.
        for _ in range(2):
            score = score - covariance(score).times(loss(score)[1])
        compared = comparisons(answers)
        variance = covariance(score).diagonal()
        estimates = centred_estimates(p.episodes, p.group, score, variance, self.variance, compared)
        return Aggregate(estimates, agreement(compared, estimates))
