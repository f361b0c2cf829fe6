"""The aggregator `majority`: the vote of most raters, 1 or 0, and 1/2 where they are divided.

    y = votes for, n = votes        score = 1 if y > n / 2, 0 if y < n / 2, 1/2 if they are equal
    share of all raters who would vote for: Beta(1 + y, 1 + n - y), from a uniform prior; sd is its
        standard deviation

A score votes for an episode if it is above the threshold, against if below, half if it is the
threshold (up to rounding). A comparison gives each of its episodes one vote: the share of the
others that it beats there, ties half (for two: 1 to the winner; a rater's own `probability` as it
stands). A divided vote is never broken by chance or by order.

It does not estimate the raters' reliability, so it has nothing to get wrong. `dawid-skene` is the
same with reliabilities.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from ...judging import EQUAL
from ...protocols import (
    Aggregate,
    Aggregator,
    Comparison,
    Estimate,
    Feedback,
    RaterEstimate,
    ranking_scores,
)
from .common import comparisons, rater, scores


class Majority(Aggregator):
    """Estimates each episode by the majority of its raters' votes.

    Args:
        threshold: scores above it are votes for the episode.
    """

    reads = frozenset({"scores", "comparisons"})

    def __init__(self, threshold: float = 0.5) -> None:
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be a finite number, got {threshold}")
        self.threshold = threshold

    def aggregate(self, answers: Sequence[Feedback | Comparison]) -> Aggregate:
        """Returns estimates for every episode that was scored or compared.

        A rater's reliability is how often they side with the majority of the others, right less
        wrong, from a uniform Beta prior (0 for a rater who was always alone).
        """
        votes = [
            (e, r, 0.5 if abs(x - self.threshold) <= EQUAL else float(x > self.threshold))
            for e, r, x in scores(answers)
        ]
        for comparison in comparisons(answers):
            sure = 1.0 if comparison.probability is None else comparison.probability
            votes += [
                (e, rater(comparison), 0.5 + (2 * sure - 1) * (x - 0.5))
                for e, x in ranking_scores(comparison).items()
            ]
        for_it: dict[str, list[float]] = defaultdict(list)
        people: dict[str, set[str]] = defaultdict(set)
        for e, r, vote in votes:
            for_it[e].append(vote)
            people[e].add(r)
        estimates = {
            e: Estimate(_side(own), _beta_sd(sum(own), len(own)), _beta_sd(0, 0), len(people[e]))
            for e, own in for_it.items()
        }
        right: Counter[str] = Counter()
        judged: Counter[str] = Counter()
        given = Counter(r for _, r, _ in votes)
        for e, r, vote in votes:
            # Without one's own vote: voting against it cancels it.
            others = 2 * _side([*for_it[e], 1 - vote]) - 1
            if len(for_it[e]) > 1 and others and vote != 0.5:
                judged[r] += 1
                right[r] += (others > 0) == (vote > 0.5)
        raters = {
            r: RaterEstimate(
                given[r],
                2 * (1 + right[r]) / (2 + judged[r]) - 1,
                2 * _beta_sd(right[r], judged[r]),
            )
            for r in given
        }
        return Aggregate(estimates, raters)


def _side(votes: Sequence[float]) -> float:
    """Returns the majority's vote: 1, 0 or 1/2."""
    surplus = math.fsum(votes) - len(votes) / 2
    return 0.5 if abs(surplus) < 1e-9 else float(surplus > 0)


def _beta_sd(votes_for: float, votes: float) -> float:
    a, b = 1 + votes_for, 1 + votes - votes_for
    return math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)))
