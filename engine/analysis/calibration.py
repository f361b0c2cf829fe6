"""Calibration: how far a judge can be trusted, by people's scores on some of the episodes. Pure
functions in numpy and scipy.

**The mean.** L episodes have the judge's score f and people's y, U others have the judge's only;
both were drawn alike. With N = L + U

    mean = mean_L(y) + b (mean_all(f) - mean_L(f)) = mean_L(y) + lambda (mean_U(f) - mean_L(f))
        lambda = b U / N

is prediction-powered inference (Angelopoulos et al. 2023, arXiv:2301.09633, at lambda = 1) with
power tuning (Angelopoulos, Duchi and Zrnic 2023, arXiv:2311.01453, section 6): the lambda of least
variance is the one whose b is the slope of y on f, and the whole is the regression estimator of
double sampling (Cochran 1977, Sampling Techniques, chapter 12). b is estimated by least squares and
is at least 0. It has no upper bound: that lambda is at most 1 would mean something else on each
scale of the judge's scores. Its variance is the jackknife's, a whole cluster left out at a time and
b estimated again, so that the estimation of b is paid for; clusters with and without labels are two
strata. (The papers give the limit for many labels, which is too narrow for few.) The interval is
Student's, with two degrees of freedom less than there are labelled clusters; one less for people
alone.

**When the judge is not used.** With G labels and normal scores the regression estimator has (1 -
r^2) (1 + 1 / (G - 3)) of the variance of people's own mean, which is less only if r^2 > 1 / (G -
2). Where the sample's r does not exceed that, lambda is 0 and the result is people's own mean and
interval. The choice looks at r and not at the two widths: to take the narrower of two estimated
intervals favours those that are too narrow.

All of it supposes that the choice of what is labelled does not depend on the label it would get,
and that clusters (episodes of one start) are independent.

**The alarm** is at `Drift`, **the correction of single scores** at `Correction`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from .prediction_powered import (
    Array,
    Interval,
    Names,
    by_number,
    check_lengths,
    check_level,
    finite_numbers,
    jackknife_variance,
    paired_values,
    student_interval,
)

# Agreement.


@dataclass(frozen=True, slots=True)
class Correlations:
    """Correlations of the judge's and people's scores."""

    pearson: Interval
    spearman: Interval


def correlations(
    judge: ArrayLike, human: ArrayLike, clusters: Names | None = None, *, level: float = 0.95
) -> Correlations | None:
    """Returns the correlations of two score vectors; None where either does not vary.

    The intervals are Student's for Fisher's z = artanh r (Fisher 1921, Metron 1), with the variance
    of the jackknife over clusters, which needs no normal scores, and does not make ties in ranks,
    as drawing again does. Where leaving one cluster out leaves nothing that varies they are -1 to
    1.

    Args:
        judge, human: [L].
        clusters: [L] names of what hangs together; None: every episode is on its own.
        level: of the intervals.

    Raises:
        ValueError: lengths that differ, or a number that is not finite.
    """
    f, y = paired_values(judge, human)
    of = np.arange(len(y)) if clusters is None else by_number(check_lengths(y, clusters))
    found = _pearson_spearman(f, y)
    if found is None:
        return None
    units = int(of.max()) + 1
    left_out = (
        [_pearson_spearman(f[of != c], y[of != c]) for c in range(units)] if units > 2 else [None]
    )
    known = [each for each in left_out if each is not None]
    intervals = []
    for k, r in enumerate(found):
        low, high = -math.inf, math.inf
        if len(known) == units:
            z = np.arctanh(np.clip([each[k] for each in known], -1 + 1e-12, 1 - 1e-12))
            around = student_interval(
                math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12)),
                jackknife_variance(z, np.ones(units, bool)),
                units - 1,
                check_level(level),
            )
            low, high = around.low, around.high
        intervals.append(Interval(r, min(math.tanh(low), r), max(math.tanh(high), r)))
    return Correlations(*intervals)


def _pearson_spearman(f: Array, y: Array) -> tuple[float, float] | None:
    if not len(f) or np.ptp(f) == 0 or np.ptp(y) == 0:
        return None
    from scipy.stats import rankdata

    ranks = np.corrcoef(rankdata(f), rankdata(y))[0, 1]
    return float(np.corrcoef(f, y)[0, 1]), float(ranks)


@dataclass(frozen=True, slots=True)
class Order:
    """The agreement of the judge's order of two episodes with people's.

    Attributes:
        share: of the pairs that people ordered; a tie of the judge's is half. With a jackknife
            interval over clusters.
        pairs: that people ordered.
        judge_ties: of these, those that the judge left open.
        human_ties: pairs that people left open; they are not part of the share.
    """

    share: Interval
    pairs: int
    judge_ties: int
    human_ties: int


def same_order(
    judge: ArrayLike,
    human: ArrayLike,
    clusters: Names | None = None,
    *,
    within: bool = False,
    level: float = 0.95,
) -> Order | None:
    """Computes `Order` from scores; None where people ordered no pair.

    Args:
        judge, human: [L].
        clusters: [L] names of what hangs together; None: every episode is on its own.
        within: count only pairs of one cluster, as training within groups does.
        level: of the interval.

    Raises:
        ValueError: lengths that differ, or a number that is not finite.
    """
    f, y = paired_values(judge, human)
    of = np.arange(len(y)) if clusters is None else by_number(check_lengths(y, clusters))
    i, j = np.triu_indices(len(y), 1)
    if within:
        i, j = i[(same := of[i] == of[j])], j[same]
    return order_of(np.sign(y[i] - y[j]), np.sign(f[i] - f[j]), (of[i], of[j]), level=level)


def order_of(
    human: ArrayLike,
    judge: ArrayLike,
    clusters: tuple[ArrayLike, ArrayLike],
    *,
    level: float = 0.95,
) -> Order | None:
    """Computes `Order` from pairs; None where people ordered none.

    Args:
        human, judge: [P] 1 where the first of the pair is the better, -1 where the second is, 0 for
            a tie.
        clusters: [P] numbers of the clusters of the two.
        level: of the interval.
    """
    theirs, judged = np.asarray(human, float), np.asarray(judge, float)
    one, other = (np.asarray(c, int)[theirs != 0] for c in clusters)
    ties = int((theirs == 0).sum())
    judged, theirs = judged[theirs != 0], theirs[theirs != 0]
    if not len(theirs):
        return None
    agreed = (1 + judged * theirs) / 2
    count = int(max(one.max(), other.max())) + 1
    both, apart = np.ones(len(one)), one != other
    won, pairs = (
        np.bincount(one, value, count) + np.bincount(other[apart], value[apart], count)
        for value in (agreed, both)
    )  # of the pairs that go when a cluster goes
    touched = pairs > 0
    rest = len(one) - pairs[touched]
    share, units = float(agreed.mean()), int(touched.sum())
    interval = Interval(share, 0.0, 1.0)
    if units > 1 and (rest > 0).all():
        left_out = (agreed.sum() - won[touched]) / rest
        found = student_interval(
            share, jackknife_variance(left_out, np.ones(units, bool)), units - 1, level
        )
        interval = Interval(share, max(found.low, 0.0), min(found.high, 1.0))
    return Order(interval, len(one), int((judged == 0).sum()), ties)


def mean_difference(
    first: ArrayLike,
    second: ArrayLike,
    clusters: tuple[Names, Names] | None = None,
    level: float = 0.95,
) -> Interval:
    """Returns mean(second) - mean(first) with Welch's interval (Welch 1947, Biometrika 34), from
    the clusters' jackknife; two versions of a judge are compared by it, on their residuals
    (people's score less the judge's).

    Args:
        first, second: [A], [B].
        clusters: [A], [B] names; None: every number is on its own. The two sides are taken to be
            independent.
        level: of the interval.

    Raises:
        ValueError: a side without numbers, lengths that differ, or a number that is not finite.
    """
    sides = [
        _mean(finite_numbers(v), None if clusters is None else clusters[k])
        for k, v in enumerate((first, second))
    ]
    (one, one_variance, one_units), (two, two_variance, two_units) = sides
    variance = one_variance + two_variance
    if not 0 < variance < math.inf:
        return Interval(two - one)
    freedom = variance**2 / (one_variance**2 / (one_units - 1) + two_variance**2 / (two_units - 1))
    return student_interval(two - one, variance, freedom, check_level(level))


def mean_interval(
    values: ArrayLike, clusters: Names | None = None, level: float = 0.95
) -> Interval:
    """Returns a mean with Student's interval over clusters.

    Raises:
        ValueError: no number, lengths that differ, or a number that is not finite.
    """
    found, variance, units = _mean(finite_numbers(values), clusters)
    return student_interval(found, variance, units - 1, check_level(level))


def _mean(values: Array, clusters: Names | None) -> tuple[float, float, int]:
    """Returns a mean, its variance (of the jackknife over clusters), and how many clusters there
    are."""
    if not len(values):
        raise ValueError("there are no numbers to take a mean of")
    of = np.arange(len(values)) if clusters is None else by_number(check_lengths(values, clusters))
    mean, sums, count = (
        float(values.mean()),
        np.bincount(of, values - values.mean()),
        np.bincount(of),
    )
    units = len(count)
    return (
        mean,
        jackknife_variance(-sums / (len(values) - count), np.ones(units, bool))
        if units > 1
        else math.inf,
        units,
    )


# Single scores.

Kind = Literal["none", "shift", "linear", "features"]
KINDS: tuple[Kind, ...] = ("none", "shift", "linear", "features")


@dataclass(frozen=True, slots=True)
class Correction:
    """A map from a judge's score, and features of the episode, to what people would say.

        none        f                       shift       f + c
        linear      c + s f                 features    c + s f + sum_k w_k x_k

    Attributes:
        kind: which of them.
        intercept, slope, weights: c, s and w by feature.
        sd: deviation of people's scores from the corrected ones, out of fold; infinite before
            anything was fitted.
        errors: mean squared error of each candidate, out of fold.
        labels: how many it rests on.
    """

    kind: Kind = "none"
    intercept: float = 0.0
    slope: float = 1.0
    weights: Mapping[str, float] | None = None
    sd: float = math.inf
    errors: Mapping[str, float] | None = None
    labels: int = 0

    def __call__(self, judge: float, features: Mapping[str, float] | None = None) -> float:
        """Returns the corrected score.

        Raises:
            KeyError: a feature is missing.
        """
        return (
            self.intercept
            + self.slope * judge
            + sum(w * (features or {})[name] for name, w in (self.weights or {}).items())
        )


def fit_correction(
    judge: ArrayLike,
    human: ArrayLike,
    features: Mapping[str, ArrayLike] | None = None,
    clusters: Names | None = None,
    *,
    folds: int = 10,
    ridge: float = 1.0,
    seed: int = 0,
) -> Correction:
    """Fits the four maps and returns the simplest that is not worse out of fold than the best of
    them, so that few labels do no harm.

    People's score less the judge's is regressed on the standardised judge's score and features,
    with a ridge that weighs as much as `ridge`
    labels: the slope is drawn towards 1 and the features' weights towards 0. A map is not worse
    when its squared errors exceed those of the best by less than one standard error of their
    difference, over clusters (the one-standard-error rule of Breiman et al. 1984, section 3.4.3,
    with the paired difference: the errors of two maps have most of their noise in common). Clusters
    are never split between folds.

    Args:
        judge, human: [L].
        features: name to [L] numbers.
        clusters: [L] names of what hangs together; None: every episode is on its own.
        folds: at most so many; never more than clusters. With fewer than 4 clusters nothing is
            corrected.
        ridge: its weight, in labels.
        seed: of the division into folds.

    Raises:
        ValueError: lengths that differ, no label, or a number that is not finite.
    """
    f, y = paired_values(judge, human)
    columns = {
        name: check_lengths(y, finite_numbers(values)) for name, values in (features or {}).items()
    }
    of = np.arange(len(y)) if clusters is None else by_number(check_lengths(y, clusters))
    units = int(of.max()) + 1
    if units < 4:
        return Correction(labels=len(y))
    kinds = KINDS if columns else KINDS[:3]
    fold = np.random.default_rng(seed).permutation(units)[of] % min(folds, units)
    errors = {kind: np.empty(len(y)) for kind in kinds}
    for k in range(int(fold.max()) + 1):
        out = fold == k
        for kind in kinds:
            intercept, slope, weights = _fit(
                kind, f[~out], y[~out], {n: x[~out] for n, x in columns.items()}, ridge
            )
            guess = (
                intercept
                + slope * f[out]
                + sum((w * columns[n][out] for n, w in weights.items()), np.zeros(int(out.sum())))
            )
            errors[kind][out] = (y[out] - guess) ** 2
    best = min(kinds, key=lambda kind: float(errors[kind].mean()))
    for kind in kinds:
        worse, variance, _ = _mean(errors[kind] - errors[best], clusters)
        if kind == best or worse <= math.sqrt(variance):
            break
    intercept, slope, weights = _fit(kind, f, y, columns, ridge)
    means: dict[str, float] = {name: float(each.mean()) for name, each in errors.items()}
    return Correction(kind, intercept, slope, weights, math.sqrt(means[kind]), means, len(y))


def _fit(
    kind: Kind, f: Array, y: Array, columns: Mapping[str, Array], ridge: float
) -> tuple[float, float, dict[str, float]]:
    """Returns intercept, slope and weights."""
    if kind == "none":
        return 0.0, 1.0, {}
    if kind == "shift":
        return float((y - f).mean()), 1.0, {}
    used = columns if kind == "features" else {}
    x = np.stack([f, *used.values()], 1)
    centre, scale = x.mean(0), x.std(0)
    # What does not vary tells nothing.
    scale = np.where(scale > 1e-9 * (np.abs(centre) + 1e-300), scale, math.inf)
    z, residual = (x - centre) / scale, y - f
    weights = (
        np.linalg.solve(z.T @ z + ridge * np.eye(z.shape[1]), z.T @ (residual - residual.mean()))
        / scale
    )
    intercept = float(residual.mean() - weights @ centre)
    return intercept, 1 + float(weights[0]), dict(zip(used, weights[1:].tolist(), strict=True))


# The alarm.
