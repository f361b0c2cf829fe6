"""Prediction-powered inference: estimates people's mean score from a judge on all episodes and
people on some."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]
Names = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its interval; unlimited where there are too few labels."""

    estimate: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def width(self) -> float:
        """The distance from the lower to the upper end."""
        return self.high - self.low


# The mean.


@dataclass(frozen=True, slots=True)
class PoweredMean:
    """An estimate of the score people would give on average, from their scores of some episodes and
    the judge's of all.

    Attributes:
        mean: with the judge's help.
        human: from people's scores alone.
        judge: mean of the judge's scores over all episodes.
        power: lambda; 0: the judge does not help.
        correlation: of judge and people over the labelled episodes; 0 where either does not vary.
        variance, human_variance: of the two estimates; infinite with fewer than two labelled
            clusters.
        labels, judged, clusters: episodes that people scored, all episodes, and independent units
            among the labelled.
    """

    mean: Interval
    human: Interval
    judge: float
    power: float
    correlation: float
    variance: float
    human_variance: float
    labels: int
    judged: int
    clusters: int

    @property
    def worth(self) -> float:
        """The judge's worth in human ratings: so many more would narrow people's own interval as
        much as the judge does (variances compared)."""
        if not self.variance > 0:
            return math.inf if self.human_variance > 0 else 0.0
        return (
            self.labels * (self.human_variance / self.variance - 1)
            if self.variance < math.inf
            else 0.0
        )


def prediction_powered_mean(
    judge_unlabelled: ArrayLike,
    judge_labelled: ArrayLike,
    human: ArrayLike,
    clusters: tuple[Names, Names] | None = None,
    level: float = 0.95,
) -> PoweredMean:
    """Estimates the mean score that people would give to all episodes; formulas at the top of
    `engine/analysis/calibration`.

    Args:
        judge_unlabelled: [U] the judge's scores of the episodes that people did not score. The two
            sets are disjoint: labelled episodes are not among these, and count in the mean over
            all.
        judge_labelled, human: [L] both scores of those that people did score.
        clusters: what unlabelled and labelled episodes hang together by (their starts), [U] and [L]
            names; None: every episode is on its own.
        level: of the interval.

    Raises:
        ValueError: lengths that differ, no label, a number that is not finite, or a level that is
            none.
    """
    return _powered(_sums(judge_unlabelled, judge_labelled, human, clusters), check_level(level))


@dataclass(frozen=True, slots=True)
class Worth:
    """A judge's worth in human ratings: so many more would narrow people's own interval as much as
    the judge did.

    Attributes:
        ratings: L (human variance / variance - 1), with a percentile interval.
        limit: with ever more judged episodes: L r^2 / (1 - r^2); infinite for a judge whose scores
            are people's; 0 where it does not help.
    """

    ratings: Interval
    limit: float


def worth(
    judge_unlabelled: ArrayLike,
    judge_labelled: ArrayLike,
    human: ArrayLike,
    clusters: tuple[Names, Names] | None = None,
    *,
    level: float = 0.95,
    samples: int = 400,
    seed: int = 0,
) -> Worth | None:
    """Estimates what a judge saves; None with fewer than 5 labelled clusters, or where people
    always gave the same score.

    The interval is the bootstrap's over clusters, those with and without labels resampled
    separately; the same seed gives the same one.

    Args, Raises: as in `prediction_powered_mean`.
    """
    sums = _sums(judge_unlabelled, judge_labelled, human, clusters)
    found = _powered(sums, check_level(level))
    if found.clusters < 5 or not found.human_variance > 0:
        return None
    square = found.correlation**2 if found.power else 0.0
    limit = found.labels * square / (1 - square) if square < 1 - 1e-12 else math.inf
    rng = np.random.default_rng(seed)
    labelled, others = np.flatnonzero(sums[0] > 0), np.flatnonzero(sums[0] == 0)
    draws = []
    for _ in range(samples):
        drawn = np.concatenate(
            [rng.choice(labelled, len(labelled)), rng.choice(others, len(others))]
        )
        again = _powered(sums[:, drawn], level)
        if again.human_variance > 0:
            draws.append(again.worth)
    return Worth(_percentiles(found.worth, draws, level), limit)


# Rows of the table of sums per cluster, from which everything follows. L_: over labelled episodes;
# A_: over all.
L_COUNT, L_Y, L_F, L_YF, L_FF, L_YY, A_F, A_COUNT = range(8)


def _sums(
    judge_unlabelled: ArrayLike,
    judge_labelled: ArrayLike,
    human: ArrayLike,
    clusters: tuple[Names, Names] | None,
) -> Array:
    """Returns the sums that the estimates are made of, [8, clusters]."""
    others, f, y = finite_numbers(judge_unlabelled), *paired_values(judge_labelled, human)
    size, more = len(y), len(others)
    if clusters is None:
        theirs, mine = np.arange(more), np.arange(more, more + size)
    else:
        check_lengths(others, clusters[0])
        check_lengths(y, clusters[1])
        both = by_number([*clusters[0], *clusters[1]])
        theirs, mine = both[:more], both[more:]
    whose, everything = np.concatenate([theirs, mine]), np.concatenate([others, f])
    count = int(whose.max()) + 1
    labelled = [
        np.bincount(mine, column, count) for column in (np.ones(size), y, f, y * f, f * f, y * y)
    ]
    return np.stack(
        [
            *labelled,
            np.bincount(whose, everything, count),
            np.bincount(whose, minlength=count).astype(float),
        ]
    )


def _powered(sums: Array, level: float) -> PoweredMean:
    at_f, at_y = sums[L_F].sum() / sums[L_COUNT].sum(), sums[L_Y].sum() / sums[L_COUNT].sum()
    sums = _centred(sums, at_f, at_y)
    total, labelled = sums.sum(1), sums[L_COUNT] > 0
    units, unlabelled = int(labelled.sum()), float(1 - total[L_COUNT] / total[A_COUNT])
    human, helped, slope = (float(x) for x in _estimates(total))
    human_variance = variance = math.inf
    if units > 1:
        left_out = _estimates(total[:, None] - sums)
        human_variance, variance = (
            jackknife_variance(left_out[0], labelled),
            jackknife_variance(left_out[1], labelled),
        )
    scale = math.sqrt(max(total[L_YY], 0.0) * max(total[L_FF], 0.0))
    r = float(np.clip(total[L_YF] / scale, -1, 1)) if scale > 0 else 0.0
    helps = units > 3 and unlabelled > 0 and slope > 0 and r**2 > 1 / (units - 2)
    if not helps:
        helped, variance, slope = human, human_variance, 0.0
    return PoweredMean(
        mean=student_interval(at_y + helped, variance, units - (2 if helps else 1), level),
        human=student_interval(at_y + human, human_variance, units - 1, level),
        judge=float(at_f + total[A_F] / total[A_COUNT]),
        power=slope * unlabelled,
        correlation=r,
        variance=variance,
        human_variance=human_variance,
        labels=int(total[L_COUNT]),
        judged=int(total[A_COUNT]),
        clusters=units,
    )


def _centred(sums: Array, f: float, y: float) -> Array:
    """Returns the sums of scores less these two, so that no differences of large squares are taken;
    what rounding left is 0."""
    found = sums.copy()
    found[L_F] -= f * sums[L_COUNT]
    found[L_Y] -= y * sums[L_COUNT]
    found[A_F] -= f * sums[A_COUNT]
    found[L_YF] += -f * sums[L_Y] - y * sums[L_F] + f * y * sums[L_COUNT]
    found[L_FF] += -2 * f * sums[L_F] + f * f * sums[L_COUNT]
    found[L_YY] += -2 * y * sums[L_Y] + y * y * sums[L_COUNT]
    for row in (L_FF, L_YY):
        found[row][found[row] < 1e-12 * sums[row]] = 0.0
    return found


def _estimates(sums: Array) -> tuple[Array, Array, Array]:
    """Returns people's mean, the powered mean and b, from [8, ...] sums."""
    count, every = np.maximum(sums[L_COUNT], 1), np.maximum(sums[A_COUNT], 1)
    y, f = sums[L_Y] / count, sums[L_F] / count
    spread = sums[L_FF] / count - f * f
    flat = spread <= 1e-12 * (sums[L_FF] / count)
    slope = np.where(
        flat, 0.0, np.maximum((sums[L_YF] / count - y * f) / np.where(flat, 1.0, spread), 0.0)
    )
    return y, y + slope * (sums[A_F] / every - f), slope


def jackknife_variance(left_out: Array, labelled: NDArray[np.bool_]) -> float:
    """Returns the variance of an estimate from its values with one cluster left out; labelled
    clusters and others are two strata."""
    found = 0.0
    for stratum in (left_out[labelled], left_out[~labelled]):
        if len(stratum) > 1:
            found += (
                (len(stratum) - 1) / len(stratum) * float(((stratum - stratum.mean()) ** 2).sum())
            )
    return found


# What several of them need.


def student_interval(estimate: float, variance: float, freedom: float, level: float) -> Interval:
    """Returns Student's interval; unlimited without freedom, and where nothing varied: that a few
    labels are equal does not make all of them so."""
    estimate = float(estimate)
    if freedom < 1 or not 0 < variance < math.inf:
        return Interval(estimate)
    half = float(stdtrit(freedom, (1 + level) / 2)) * math.sqrt(variance)
    return Interval(estimate, estimate - half, estimate + half)


def _percentiles(estimate: float, draws: Sequence[float], level: float) -> Interval:
    if not draws:
        return Interval(estimate)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], method="closest_observation")
    return Interval(estimate, float(low), float(high))


def by_number(names: Names) -> NDArray[np.int_]:
    """Replaces names by their numbers, in order of their first occurrence."""
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([place[name] for name in names], int)


def finite_numbers(values: ArrayLike) -> Array:
    """Returns values as a flat array of floats; raises `ValueError` where one is not finite."""
    found = np.asarray(values, float).ravel()
    if not np.isfinite(found).all():
        raise ValueError("scores must be finite numbers; leave out what was not scored")
    return found


def paired_values(judge: ArrayLike, human: ArrayLike) -> tuple[Array, Array]:
    """Returns both as arrays; raises `ValueError` unless they are equally long and not empty."""
    f, y = finite_numbers(judge), finite_numbers(human)
    if len(f) != len(y) or not len(y):
        raise ValueError(
            "need a score of the judge's and of people's for the same episodes, at least one, got"
            f" {len(f)} and {len(y)}"
        )
    return f, y


def check_lengths(values: Sequence[Any] | Array, names: Any) -> Any:
    """Returns the names; raises `ValueError` unless there is one per value."""
    if len(names) != len(values):
        raise ValueError(f"{len(names)} clusters or features are given for {len(values)} episodes")
    return names


def check_level(level: float) -> float:
    """Returns the level; raises `ValueError` unless it lies between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    return level
