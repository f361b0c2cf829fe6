"""Trust in a proxy: best-of-n, and the laws of over-optimisation (Gao et al. 2022,
arXiv:2210.10760).

A policy optimised against a proxy reward (a reward model) moves away from where it began; d =
sqrt(KL(policy || start)) measures how far. The true outcome first rises and then falls:

    best-of-n:  R(d) = d (a - b d)          peak at d* = a / 2b
    RL:         R(d) = d (a - b log d)      peak at d* = exp(a / b - 1)

R is the gain over the start, R(0) = 0. Both are linear in (a, b). Pure maths over arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Form = Literal["best-of-n", "rl"]


def kl_best_of_n(proxy: ArrayLike, n: int) -> NDArray[np.float64]:
    """Returns the KL of the best of n to the policy that the samples are drawn from, nats, per
    start.

    Without ties it is log n - (n - 1) / n (Stiennon et al. 2020, arXiv:2009.01325, appendix G.3); a
    judge of 0 and 1, or of five grades, ties, and then it is less. One of those that tie is chosen
    at random. With F the share of samples below a score and p the share that has it, the best of n
    has it with probability q = (F + p)^n - F^n, and

        KL = sum over scores that recur        of  q log(q / p)
           + sum over scores that do not       of  integral from F to F + p of  n u^(n-1) log(n
                                               u^(n-1)) du

    A score recurs when two of all samples have it, whatever their start; the others are taken to be
    drawn from a continuum. Shares are those of the samples.

    Args:
        proxy: [S, N].
        n: of how many samples the best is taken.

    Returns:
        [S].
    """
    proxies = np.atleast_2d(np.asarray(proxy, float))
    values, counts = np.unique(proxies, return_counts=True)
    recurring = set(values[counts > 1].tolist())
    return np.array([_kl_of_start(own, recurring, n) for own in proxies])


def _kl_of_start(scores: NDArray[np.float64], recurring: set[float], n: int) -> float:
    def integral(u: float) -> float:  # of n u^(n-1) log(n u^(n-1)), from 0
        return u**n * (math.log(n) + (n - 1) * math.log(u) - (n - 1) / n) if u > 0 else 0.0

    total, below = 0.0, 0.0
    for value, count in zip(*np.unique(scores, return_counts=True), strict=True):
        share = float(count) / len(scores)
        to = min(below + share, 1.0)
        chosen = to**n - below**n
        if value not in recurring:
            total += integral(to) - integral(below)
        elif chosen > 0:
            total += chosen * math.log(chosen / share)
        below = to
    return total


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> NDArray[np.float64]:
    """Returns the expected gold score of the best of n by the proxy, per start, from all subsets of
    N samples (Nakano et al. 2021, arXiv:2112.09332, appendix I: the unbiased estimate).

    With samples in ascending order of the proxy, the i-th (from 1) is the best of a random subset
    with probability C(i - 1, n - 1) / C(N, n). Samples of equal proxy share their probabilities.

    Args:
        proxy, gold: [S, N].
        n: 1 to N.

    Returns:
        [S].

    Raises:
        ValueError: n out of range, or shapes that differ.
    """
    proxies, golds = np.atleast_2d(np.asarray(proxy, float)), np.atleast_2d(np.asarray(gold, float))
    size = proxies.shape[1]
    if proxies.shape != golds.shape or not 1 <= n <= size:
        raise ValueError(
            f"best of {n} needs proxy and gold of one shape [S, N] with N >= n, got"
            f" {proxies.shape}, {golds.shape}"
        )
    weight = np.array([math.comb(i, n - 1) / math.comb(size, n) for i in range(size)])
    result = np.empty(len(proxies))
    for s, (p, g) in enumerate(zip(proxies, golds, strict=True)):
        order = np.argsort(p, kind="stable")
        _, tier = np.unique(p[order], return_inverse=True)
        shared = np.bincount(tier, weight) / np.bincount(tier)
        result[s] = float((shared[tier] * g[order]).sum())
    return result


@dataclass(frozen=True, slots=True)
class Law:
    """A fitted law of over-optimisation.

    Attributes:
        form: "best-of-n" or "rl".
        a, b: its coefficients; b > 0 where the outcome turns over.
    """

    form: Form
    a: float
    b: float

    def __call__(self, d: ArrayLike) -> NDArray[np.float64]:
        """Returns the gain over the start at distance d."""
        return _features(np.asarray(d, float), self.form) @ np.array([self.a, self.b])

    @property
    def peak(self) -> float:
        """The distance d at which the gain is largest; infinity where it never turns."""
        if self.b <= 0 or self.a <= 0:
            return math.inf if self.a > 0 or self.b < 0 else 0.0
        return (
            self.a / (2 * self.b)
            if self.form == "best-of-n"
            else math.exp(min(self.a / self.b - 1, 700.0))
        )


def _features(d: NDArray[np.float64], form: Form) -> NDArray[np.float64]:
    if form == "best-of-n":
        return np.stack([d, -(d**2)], -1)
    if form == "rl":
        return np.stack([d, -d * np.log(np.maximum(d, 1e-12))], -1)
    raise ValueError(f"unknown form {form!r}; there are 'best-of-n' and 'rl'")


def fit_law(d: ArrayLike, gain: ArrayLike, form: Form) -> Law:
    """Fits (a, b) by least squares.

    Args:
        d: [m] distances, sqrt of nats.
        gain: [m] true outcome minus that at d = 0.
        form: of the law.

    Raises:
        ValueError: fewer than two distinct distances above 0.
    """
    x, y = np.asarray(d, float), np.asarray(gain, float)
    if len(np.unique(x[x > 0])) < 2:
        raise ValueError("a law of over-optimisation needs at least two distinct distances above 0")
    a, b = np.linalg.lstsq(_features(x, form), y, rcond=None)[0]
    return Law(form, float(a), float(b))


def fit_interval(
    curves: Sequence[tuple[ArrayLike, ArrayLike]],
    form: Form,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Law, dict[str, tuple[float, float]]]:
    """Fits several runs' curves, and returns percentile intervals of a, b and the peak from
    resampling whole runs.

    Points of one run are not independent of one another, so runs are what is drawn, with
    replacement.

    Args:
        curves: one (d [m], gain [m]) per run.
        form: of the law.
        draws: how many samples of runs.
        seed: of the draws.
        level: of the intervals.
    """
    arrays = [(np.asarray(d, float), np.asarray(g, float)) for d, g in curves]
    law = fit_law(
        np.concatenate([d for d, _ in arrays]), np.concatenate([g for _, g in arrays]), form
    )
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"a": [], "b": [], "peak": []}
    for _ in range(draws):
        some = [arrays[i] for i in rng.integers(len(arrays), size=len(arrays))]
        drawn = fit_law(
            np.concatenate([d for d, _ in some]), np.concatenate([g for _, g in some]), form
        )
        for name in found:
            found[name].append(getattr(drawn, name))
    edges = [(1 - level) / 2, (1 + level) / 2]
    return law, {
        name: tuple(float(v) for v in np.quantile(values, edges, method="nearest"))  # type: ignore[misc]
        for name, values in found.items()
    }
