"""The aggregator `dawid-skene`: the true class from labels, with every rater's confusions.

    P(class of i = k | labels)  ~  pi_k prod_j e_w(j)[k, x_ij]   (each rater's label, given that
                                rater's confusions)
    e_w[k, l]  ~  prior[k, l] + sum over their labels l of P(class = k)   prior: `right` where k =
               l, `wrong` elsewhere
    pi_k  ~  1 + sum_i P(class of i = k)

Dawid and Skene 1979 (doi:10.2307/2346806), by EM from the votes' shares. The classes are the
distinct scores seen, up to rounding. The score of an episode is the expected class value under its
posterior, sd that posterior's deviation, and what it was before the class frequencies' (pi).

The published form has no prior, and with few labels per rater it is worse than the majority vote
and quite sure of itself: a rater's three labels make a confusion matrix of zeros and ones. Here
each rater begins as one who is right more often than not, and few labels change little. Where
labels are plenty, the prior vanishes in them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...protocols import Aggregate, Aggregator, Comparison, Estimate, Feedback, RaterEstimate
from .common import Floats, Index, scores

CLASSES = 20  # more distinct scores than this are no labels
ROUNDS, ENOUGH = 1000, 1e-8  # of EM, and the change of a posterior that ends it


class DawidSkene(Aggregator):
    """Estimates true classes from labels, with every rater's confusions.

    Args:
        right, wrong: pseudo-counts of every rater's confusion matrix, on the diagonal and off it.
    """

    reads = frozenset({"scores"})

    def __init__(self, right: float = 4.0, wrong: float = 1.0) -> None:
        if not right > wrong > 0:
            raise ValueError(
                f"need right > wrong > 0, or raters begin as no better than chance: got {right} and"
                f" {wrong}"
            )
        self.right, self.wrong = right, wrong

    def aggregate(self, answers: Sequence[Feedback | Comparison]) -> Aggregate:
        """Returns estimates for every episode with a score; rankings are ignored.

        A rater's reliability is informedness, (K * mean over classes of the chance to be right - 1)
        / (K - 1): for two classes sensitivity + specificity - 1.

        Raises:
            ValueError: more than 20 distinct scores.
        """
        scored = scores(answers)
        if not scored:
            return Aggregate({}, {})
        episodes, raters, classes, posterior, confusion, common = self.fit(scored)
        score = posterior @ classes
        variance = posterior @ classes**2 - score**2
        prior = max(float(common @ classes**2 - (common @ classes) ** 2), 0.0) ** 0.5
        people: dict[str, set[str]] = {e: set() for e in episodes}
        labels = dict.fromkeys(raters, 0)
        for e, r, _ in scored:
            people[e].add(r)
            labels[r] += 1
        k = len(classes)
        informed = [(np.trace(c) - 1) / (k - 1) if k > 1 else 0.0 for c in confusion]
        return Aggregate(
            {
                e: Estimate(
                    float(score[i]), max(float(variance[i]), 0.0) ** 0.5, prior, len(people[e])
                )
                for i, e in enumerate(episodes)
            },
            {r: RaterEstimate(labels[r], float(informed[w])) for w, r in enumerate(raters)},
        )

    def fit(
        self, labels: Sequence[tuple[str, str, float]]
    ) -> tuple[list[str], list[str], Floats, Floats, Floats, Floats]:
        """Fits classes and confusions to (episode, rater, score) by EM.

        Returns:
            episodes [N] and raters [W], names; classes [K], the scores; the posterior [N, K];
            confusion [W, K, K], true class first; how common the classes are [K].
        """
        classes, label = np.unique([x for _, _, x in labels], return_inverse=True)
        if len(classes) > CLASSES:
            raise ValueError(
                f"{len(classes)} distinct scores are no labels: dawid-skene takes at most {CLASSES}"
                " classes; use aggregator 'mean' for numbers"
            )
        episodes, raters = Index(), Index()
        of = np.array([episodes[e] for e, _, _ in labels])
        by = np.array([raters[r] for _, r, _ in labels])
        k = len(classes)
        prior = np.full((k, k), self.wrong) + (self.right - self.wrong) * np.eye(k)
        posterior = np.zeros((len(episodes), k))
        np.add.at(posterior, (of, label), 1.0)
        posterior /= posterior.sum(1, keepdims=True)
        for _ in range(ROUNDS):
            confusion = np.tile(prior, (len(raters), 1, 1))
            np.add.at(confusion.swapaxes(1, 2), (by, label), posterior[of])
            confusion /= confusion.sum(2, keepdims=True)
            common = (1 + posterior.sum(0)) / (k + len(episodes))
            log = np.tile(np.log(common), (len(episodes), 1))
            np.add.at(log, of, np.log(confusion[by, :, label]))
            new = np.exp(log - log.max(1, keepdims=True))
            new /= new.sum(1, keepdims=True)
            change, posterior = np.abs(new - posterior).max(), new
            if change < ENOUGH:
                break
        return (
            list(map(str, episodes)),
            list(map(str, raters)),
            classes,
            posterior,
            confusion,
            common,
        )
