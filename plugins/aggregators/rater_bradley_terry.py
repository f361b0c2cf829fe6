"""The aggregator `rater-bradley-terry`: scores from comparisons, with every rater's reliability and
side bias.

    P(left beats right | rater w) = sigma(a_w (s_left - s_right) + b_w)
    s_i ~ N(0, variance)        a_w ~ N(1, reliability_sd^2)        b_w ~ N(0, side_sd^2)

a_w is how much a rater's choices follow the scores: 1 as a rater should, 0 not at all, negative the
other way round. b_w is what they choose when both are equally good, in log-odds for what is shown
first (left, or on top). The likelihood is that of crowd-sourced Bradley-Terry (Chen et al. 2013,
doi:10.1145/2433396.2433420) with a side term, as in crowd-kit's NoisyBradleyTerry, whose published
gradient overwrites what it should add up; here it is written out below and checked against
differences of the loss.

Identifiability: all a times c with all s over c, and all signs turned, give the same likelihood.
The priors choose: scores spread like N(0, variance) and raters good on the whole. Most raters must
be right for the estimates to be right: where most of them reverse their choices, they are believed.
Scores are known only within a group, and the prior centres each at 0. a and b of one rater are
known from all groups together, which is why a combiner keeps a history.

Raters are few and scores are many, so a joint mode would give raters too much: it fits noise in the
scores and calls it reliability (a came out at 1.7 for 1, and careless raters at 0.5). The raters'
parameters are therefore their mode with the scores integrated out, by EM: scores are Gaussian
around their mode, with the Laplace covariance of their differences v_p, and to second order that
adds to the raters' loss

    sum_p h_p v_p a_w^2 / 2 = sum_w doubt_w a_w^2 / 2        h_p = sigma(z_p) sigma(-z_p)

so each round minimises the joint loss with `doubt` from the round before (L-BFGS, from plain
scores, a = 1 and b = 0). Deviations are Laplace's. Given the raters' parameters groups are
independent, so the Hessian is an arrow: blocks A of the scores, coupled (C) with the raters' block
D only:

    cov(raters) = S^-1, S = D - C^T A^-1 C        cov(scores) = A^-1 + A^-1 C S^-1 C^T A^-1

A ranking counts as its pairs (weight w_K, `ranking_weight`); the side of each is its place in
`shown["order"]`. Answers that do not say what was shown first take no part in b_w. Pairs that one
rater took out of a ranking share that rater's view of each member, which no weight undoes: with
rankings alone, deviations of a and b are a little too small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from ...protocols import Aggregate, Aggregator, Comparison, Feedback, RaterEstimate
from .common import EXACT, Floats, Inverse, Pairs, centred_estimates, comparisons, pairs, rater

ROUNDS, STEPS = 300, 30  # rounds of EM at most, and steps in each: the next one goes on
ENOUGH = 1e-6  # the change of a and b that ends it


class RaterBradleyTerry(Aggregator):
    """Estimates scores from comparisons, with every rater's reliability and side bias.

    Args:
        variance: of the prior of a score, in squared log-odds (why 2: see `bradley-terry`).
        reliability_sd: of the prior of a rater's reliability around 1; near 0 all raters are taken
            to be alike.
        side_sd: of the prior of a rater's side bias around 0, in log-odds; near 0 raters are taken
            to have none.
    """

    reads = frozenset({"comparisons"})

    def __init__(
        self, variance: float = 2.0, reliability_sd: float = 1.0, side_sd: float = 1.0
    ) -> None:
        for name, value in (
            ("variance", variance),
            ("reliability_sd", reliability_sd),
            ("side_sd", side_sd),
        ):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.variance, self.reliability_sd, self.side_sd = variance, reliability_sd, side_sd

    def aggregate(self, answers: Sequence[Feedback | Comparison]) -> Aggregate:
        """Returns estimates for every episode that was compared, and for all raters; scores without
        comparisons are ignored.

        A rater whose answers never tell what was shown first has no `side`.
        """
        p = pairs(answers)
        if not p.episodes:
            return Aggregate({}, {})
        size, people = len(p.episodes), len(p.raters)
        begin = np.concatenate([np.zeros(size), np.ones(people), np.zeros(people)])
        plain = minimize(
            lambda s: self._plain(s, begin, p),
            np.zeros(size),
            jac=True,
            method="L-BFGS-B",
            options=EXACT,
        )
        begin[:size] = plain.x
        best, doubt = begin, np.zeros(people)
        for _ in range(ROUNDS):
            before = best[size:]
            found = minimize(
                self.loss,
                best,
                (p, doubt),
                jac=True,
                method="L-BFGS-B",
                options={**EXACT, "maxiter": STEPS},
            )
            best = found.x
            variance, rater_variance, new_doubt = self.deviations(best, p, doubt)
            if found.status != 1 and np.abs(best[size:] - before).max() < ENOUGH:  # 1: out of steps
                break
            doubt = new_doubt
        compared = comparisons(answers)
        count = Counter(map(rater, compared))
        sided = np.bincount(p.by, p.sided, people) > 0
        raters = {}
        for w, name in enumerate(p.raters):
            a, b = size + w, size + people + w
            side = (
                (float(best[b]), float(rater_variance[people + w] ** 0.5))
                if sided[w]
                else (None, None)
            )
            raters[name] = RaterEstimate(
                count[name], float(best[a]), float(rater_variance[w] ** 0.5), *side
            )
        return Aggregate(
            centred_estimates(p.episodes, p.group, best[:size], variance, self.variance, compared),
            raters,
        )

    def loss(self, theta: Floats, p: Pairs, doubt: Floats) -> tuple[float, Floats]:
        """Returns the negative log-posterior up to a constant, and its gradient.

        With d = s_left - s_right, z = a_w d + b_w and e = sigma(z) - y, a pair adds e a_w to the
        slope of s_left, -e a_w to that of s_right, e d to that of a_w and e to that of b_w.

        Args:
            theta: [N + 2 W] scores, reliabilities, side biases.
            p: the pairs that raters ordered.
            doubt: [W] what the uncertainty of the scores adds, see the top of this file.
        """
        size, people = len(p.episodes), len(p.raters)
        s, a, b = np.split(theta, [size, size + people])
        apart = s[p.first] - s[p.second]
        lean = a[p.by] * apart + p.sided * b[p.by]
        error = p.weight * (expit(lean) - p.sure)
        value = p.weight @ (np.logaddexp(0, lean) - p.sure * lean)
        value += (
            doubt @ a**2 / 2
            + s @ s / (2 * self.variance)
            + ((a - 1) @ (a - 1)) / (2 * self.reliability_sd**2)
            + b @ b / (2 * self.side_sd**2)
        )
        pull = error * a[p.by]
        slope_s = (
            np.bincount(p.first, pull, size) - np.bincount(p.second, pull, size) + s / self.variance
        )
        slope_a = (
            np.bincount(p.by, error * apart, people) + doubt * a + (a - 1) / self.reliability_sd**2
        )
        slope_b = np.bincount(p.by, error * p.sided, people) + b / self.side_sd**2
        return float(value), np.concatenate([slope_s, slope_a, slope_b])

    def _plain(self, s: Floats, begin: Floats, p: Pairs) -> tuple[float, Floats]:
        value, slope = self.loss(np.concatenate([s, begin[len(s) :]]), p, np.zeros(len(p.raters)))
        return value, slope[: len(s)]

    def deviations(self, theta: Floats, p: Pairs, doubt: Floats) -> tuple[Floats, Floats, Floats]:
        """Returns posterior variances by Laplace, [N] of scores and [2 W] of reliabilities and side
        biases; and the next round's doubt, [W].

        With h = sigma(z) sigma(-z) a pair adds h a_w^2 (e_l - e_r)(e_l - e_r)^T between its scores;
        (h a_w d + e)(e_l - e_r) between them and a_w; h a_w (e_l - e_r) between them and b_w; h d
        between a_w and b_w; h d^2 and h to these two themselves.
        """
        size, people = len(p.episodes), len(p.raters)
        s, a, b = np.split(theta, [size, size + people])
        apart, own = s[p.first] - s[p.second], a[p.by]
        chance = expit(own * apart + p.sided * b[p.by])
        bend, error = p.weight * chance * (1 - chance), p.weight * (chance - p.sure)

        inverse = Inverse(*p.curvature(bend * own**2), 1 / self.variance, size)
        cross = np.zeros((size, 2 * people))
        for shown, sign in ((p.first, 1.0), (p.second, -1.0)):
            np.add.at(cross, (shown, p.by), sign * (bend * own * apart + error))
            np.add.at(cross, (shown, people + p.by), sign * bend * own * p.sided)
        w = np.arange(people)
        corner = np.zeros((2 * people, 2 * people))
        corner[w, w] = (
            np.bincount(p.by, bend * apart**2, people) + doubt + 1 / self.reliability_sd**2
        )
        corner[people + w, people + w] = (
            np.bincount(p.by, bend * p.sided, people) + 1 / self.side_sd**2
        )
        corner[w, people + w] = corner[people + w, w] = np.bincount(
            p.by, bend * apart * p.sided, people
        )

        reach = inverse.times(cross)
        raters = np.linalg.inv(corner - cross.T @ reach)
        every = np.arange(size)
        alone, both = np.split(inverse.at(np.r_[every, p.first], np.r_[every, p.second]), [size])
        scores = alone + np.einsum("nv,nv->n", reach @ raters, reach)
        spread = alone[p.first] + alone[p.second] - 2 * both
        new_doubt = np.bincount(p.by, bend * spread, people).astype(np.float64)
        return scores, np.diagonal(raters), new_doubt
