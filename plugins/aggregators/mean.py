"""The aggregator `mean`: the mean of the raters' scores, drawn towards the mean of all scores; the
more so, the fewer and noisier the answers are.

    x_ij = mu + u_i + e_ij     u_i ~ N(0, rho v)     e_ij ~ N(0, (1 - rho) v)
    score_i = mu + k_i (mean_i - mu)     sd_i^2 = rho v (1 - k_i)   k_i = n_i rho / (n_i rho + 1 -
                                         rho)

The one-way random-effects model: n_i answers x_ij on episode i, noise pooled over all episodes.
rho, the reliability of a single answer, is estimated from the answers: restricted likelihood on a
grid, uniform prior, and the estimates are averaged over its posterior (the mean mu and the variance
v at their best for each rho). A single best rho would be 0 by accident with little data, and all
episodes alike; averaged it never is. Where no episode has two answers, noise cannot be told from
difference, and rho stays uniform: half of every deviation is taken for noise.

Scores of a rater who is strict with every episode count as they are: where raters see different
episodes, prefer comparisons. Rankings are ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ...protocols import Aggregate, Aggregator, Comparison, Estimate, Feedback, RaterEstimate
from .common import Floats, Index, Ints, scores

GRID = np.linspace(0.005, 0.995, 100)  # values of rho


class Mean(Aggregator):
    """Estimates each episode by the mean of its raters' scores."""

    reads = frozenset({"scores"})

    def aggregate(self, answers: Sequence[Feedback | Comparison]) -> Aggregate:
        """Returns estimates for every episode with a score (or aspects: their mean), in the scores'
        own unit."""
        scored = scores(answers)
        if not scored:
            return Aggregate({}, {})
        episodes, raters = Index(), Index()
        of = np.array([episodes[e] for e, _, _ in scored])
        by = np.array([raters[r] for _, r, _ in scored])
        value = np.array([x for _, _, x in scored])
        origin = value.min()  # scores that are all alike are then exactly 0
        value = value - origin
        count = np.bincount(of).astype(float)
        mean = np.bincount(of, value) / count
        within = (value - mean[of]) ** 2

        likely, overall, total = self._posterior(count, mean, within.sum())
        keep = count * GRID[:, None] / (count * GRID[:, None] + 1 - GRID[:, None])  # [rho, episode]
        each = overall[:, None] + keep * (mean - overall[:, None])
        score = likely @ each
        variance = likely @ ((GRID * total)[:, None] * (1 - keep) + (each - score) ** 2)
        prior = float(likely @ (GRID * total))
        people = Counter(e for e, _ in {(e, r) for e, r, _ in scored})
        columns = zip(episodes, (origin + score).tolist(), np.sqrt(variance).tolist(), strict=True)
        noise = float(likely @ ((1 - GRID) * total))
        return Aggregate(
            {str(e): Estimate(s, sd, prior**0.5, people[str(e)]) for e, s, sd in columns},
            self._raters([str(r) for r in raters], by, within, 1 - 1 / count[of], prior, noise),
        )

    def _posterior(
        self, count: Floats, mean: Floats, within: float
    ) -> tuple[Floats, Floats, Floats]:
        """Returns, on the grid, how likely each rho is, and the best mu and v there."""
        precision = 1 / (GRID[:, None] + (1 - GRID[:, None]) / count)
        overall = precision @ mean / precision.sum(1)
        squares = within / (1 - GRID) + (precision * (mean - overall[:, None]) ** 2).sum(1)
        free, inner = count.sum() - 1, count.sum() - len(count)
        if not squares.max() > 0 or not free:  # all alike, or one answer: nothing varies
            return np.full(len(GRID), 1 / len(GRID)), overall, np.zeros(len(GRID))
        log = (
            np.log(precision).sum(1)
            - inner * np.log(1 - GRID)
            - np.log(precision.sum(1))
            - free * np.log(squares)
        ) / 2
        likely = np.exp(log - log.max())
        return likely / likely.sum(), overall, squares / free

    def _raters(
        self,
        names: Sequence[str],
        by: Ints,
        within: Floats,
        share: Floats,
        between: float,
        noise: float,
    ) -> dict[str, RaterEstimate]:
        """Returns the reliability of one answer of each rater: the share of its variance that is
        the episode's, by the rater's own noise where others answered the same (`share` (n - 1) / n
        of it shows in the distance from the mean), else by the noise of all raters."""
        found = {}
        for w, name in enumerate(names):
            own = by == w
            shown = share[own].sum()
            own_noise = within[own].sum() / shown if shown > 0 else noise
            varies = between + own_noise
            found[name] = RaterEstimate(
                int(own.sum()), float(between / varies) if varies > 0 else 0.0
            )
        return found
