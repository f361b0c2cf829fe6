"""Best-of-n against enumeration, and fits of the laws of over-optimisation against known
coefficients."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from turnwise.engine.analysis.overoptimisation import (
    Law,
    best_of_n,
    fit_interval,
    fit_law,
    kl_best_of_n,
)


def test_kl_of_best_of_n() -> None:
    samples = np.random.default_rng(0).normal(size=(3, 64))
    for n, expected in ((1, 0.0), (4, 0.636), (16, 1.835), (64, 3.175)):
        assert kl_best_of_n(samples, n) == pytest.approx([math.log(n) - (n - 1) / n] * 3, abs=1e-9)
        assert kl_best_of_n(samples, n)[0] == pytest.approx(expected, abs=1e-3)
    # by definition, for uniform scores on a fine grid: the best of n has density n u^(n-1)
    u = (np.arange(200_000) + 0.5) / 200_000
    density = 4 * u**3
    assert float(np.mean(density * np.log(density))) == pytest.approx(
        kl_best_of_n(samples, 4)[0], abs=1e-3
    )


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 4))
def test_kl_of_best_of_n_with_ties_is_that_of_all_draws(scores: list[int], n: int) -> None:
    """Drawing n times from these scores and keeping the best, by enumeration; no more than without
    ties."""
    chosen = dict.fromkeys(scores, 0.0)
    for draw in itertools.product(sorted(set(scores)), repeat=n):
        chosen[max(draw)] += math.prod(scores.count(s) / len(scores) for s in draw)
    exact = sum(q * math.log(q / (scores.count(s) / len(scores))) for s, q in chosen.items())
    [found] = kl_best_of_n([scores], n)
    assert found <= math.log(n) - (n - 1) / n + 1e-9
    twice = kl_best_of_n([scores, scores], n)  # now every score recurs
    assert twice == pytest.approx([exact, exact], abs=1e-9)
    assert found >= exact - 1e-9


def test_a_judge_of_yes_and_no_is_far_from_the_bound() -> None:
    assert kl_best_of_n([[0] * 8 + [1] * 8], 16)[0] == pytest.approx(0.693, abs=1e-3)
    assert kl_best_of_n([[1.0] * 16], 16)[0] == 0.0


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.floats(-1, 1, allow_nan=False)), min_size=1, max_size=6
    ),
    st.integers(1, 6),
)
def test_best_of_n_is_the_mean_over_all_subsets(samples: list[tuple[int, float]], n: int) -> None:
    """With ties broken at random, each tied sample is the best equally often."""
    n = min(n, len(samples))
    expected = []
    for subset in itertools.combinations(range(len(samples)), n):
        top = max(samples[i][0] for i in subset)
        tied = [samples[i][1] for i in subset if samples[i][0] == top]
        expected.append(sum(tied) / len(tied))
    found = best_of_n([[p for p, _ in samples]], [[g for _, g in samples]], n)
    assert found[0] == pytest.approx(sum(expected) / len(expected), abs=1e-9)


def test_best_of_n_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="N >= n"):
        best_of_n([[1.0, 2.0]], [[1.0, 2.0]], 3)
    with pytest.raises(ValueError, match="one shape"):
        best_of_n([[1.0, 2.0]], [[1.0]], 1)


@pytest.mark.parametrize(
    ("form", "peak"), [("best-of-n", 0.9 / (2 * 0.2)), ("rl", math.exp(0.9 / 0.2 - 1))]
)
def test_fits_recover_what_made_the_data(form: str, peak: float) -> None:
    law = Law(form, 0.9, 0.2)
    assert law.peak == pytest.approx(peak)
    d = np.linspace(0.2, 6, 30)
    assert law(peak) >= law(np.array([0.9 * peak, 1.1 * peak])).max()
    found = fit_law(d, law(d), form)
    assert (found.a, found.b) == pytest.approx((0.9, 0.2))
    rng = np.random.default_rng(0)
    curves = [(d, law(d) + rng.normal(0, 0.1, len(d))) for _ in range(5)]
    fitted, intervals = fit_interval(curves, form, draws=200)
    assert fitted.a == pytest.approx(0.9, abs=0.1)
    for name, truth in (("a", 0.9), ("b", 0.2), ("peak", peak)):
        low, high = intervals[name]
        assert low <= getattr(fitted, name) <= high
        assert low - 0.2 * truth <= truth <= high + 0.2 * truth


def test_a_law_that_never_turns_has_no_peak() -> None:
    assert Law("rl", 1.0, 0.0).peak == math.inf
    assert Law("best-of-n", 1.0, -0.1).peak == math.inf
    assert Law("best-of-n", -1.0, 0.5).peak == 0.0
    with pytest.raises(ValueError, match="two distinct distances"):
        fit_law([0.0, 1.0, 1.0], [0.0, 1.0, 1.0], "rl")
    with pytest.raises(ValueError, match="unknown form"):
        fit_law([1.0, 2.0], [1.0, 1.0], "line")  # type: ignore[arg-type]
