"""Reward-model and preference losses against independent computations in float64, gradients
included, to 1e-6."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from turnwise.plugins.optimizers.dpo import dpo_loss
from turnwise.plugins.reward_model.losses import (
    bradley_terry,
    calibration_error,
    centering,
    combine,
    k_wise,
    plackett_luce,
)

R = [0.7, -1.3, 2.1, 0.0, -0.4]
numbers = st.floats(-5, 5, allow_nan=False)


def double(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def assert_gradient(
    loss: Callable[[torch.Tensor], torch.Tensor],
    plain: Callable[[list[float]], float],
    at: Sequence[float],
) -> None:
    """The value and the gradient against an independent function of plain numbers and its central
    differences."""
    scores = double(at)
    value = loss(scores)
    value.backward()
    assert float(value) == pytest.approx(plain(list(at)), abs=1e-9)
    step = 1e-5
    for i in range(len(at)):
        up, down = list(at), list(at)
        up[i] += step
        down[i] -= step
        assert float(scores.grad[i]) == pytest.approx(
            (plain(up) - plain(down)) / (2 * step), abs=1e-6
        )


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_bradley_terry_by_hand() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert float(bradley_terry(0 * one, 0 * one, one)) == pytest.approx(math.log(2))
    assert float(bradley_terry(2 * one, one, one)) == pytest.approx(math.log(1 + math.exp(-1)))
    assert float(bradley_terry(2 * one, one, one, 0.5)) == pytest.approx(
        math.log(1 + math.exp(-0.5))
    )
    assert float(bradley_terry(2 * one, one, 0 * one)) == pytest.approx(math.log(1 + math.exp(1)))


@pytest.mark.parametrize("margin", [0.0, 0.8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("eta", [0.0, 0.01])
def test_pairs_with_margin_soft_labels_smoothing_and_centering(
    margin: float, smoothing: float, eta: float
) -> None:
    first, second, p = [0, 1, 2], [1, 3, 4], [1.0, 0.35, 0.5]

    def ours(r: torch.Tensor) -> torch.Tensor:
        a, b = r[first], r[second]
        each = bradley_terry(a, b, torch.tensor(p, dtype=torch.float64), margin, smoothing)
        return (each + eta * centering(a, b)).mean()

    def plain(r: list[float]) -> float:
        total = 0.0
        for i, j, q in zip(first, second, p, strict=True):
            s = q * (1 - smoothing) + smoothing / 2
            d = r[i] - r[j]
            total -= s * math.log(sigma(d - margin)) + (1 - s) * math.log(sigma(-d - margin))
            total += eta * (r[i] + r[j]) ** 2
        return total / len(p)

    assert_gradient(ours, plain, R)


def test_k_wise_is_instructgpts_mean_over_all_pairs_of_each_start() -> None:
    """Two starts: one with three ranked conversations (three pairs), one with two (one pair)."""
    rankings = [[0, 1, 2], [3, 4]]
    pairs = [
        (g, a, b)
        for g, ranking in enumerate(rankings)
        for a, b in itertools.combinations(ranking, 2)
    ]

    def ours(r: torch.Tensor) -> torch.Tensor:
        a, b = r[[a for _, a, _ in pairs]], r[[b for _, _, b in pairs]]
        ones = torch.ones(len(pairs), dtype=torch.float64)
        return k_wise(bradley_terry(a, b, ones), torch.tensor([g for g, _, _ in pairs]), ones)

    def plain(r: list[float]) -> float:
        per_start = []
        for ranking in rankings:
            own = [-math.log(sigma(r[a] - r[b])) for a, b in itertools.combinations(ranking, 2)]
            per_start.append(sum(own) / math.comb(len(ranking), 2))
        return sum(per_start) / len(per_start)

    assert_gradient(ours, plain, R)


def test_plackett_luce_is_a_chain_of_choices() -> None:
    ranking = [2, 0, 3, 4, 1]

    def plain(r: list[float]) -> float:
        probability, left = 1.0, list(ranking)
        while left:
            probability *= math.exp(r[left[0]]) / sum(math.exp(r[i]) for i in left)
            left.pop(0)
        return -math.log(probability)

    assert_gradient(lambda r: plackett_luce(r, [[i] for i in ranking]), plain, R)
    every = [
        math.exp(-float(plackett_luce(double(R), [[i] for i in order])))
        for order in itertools.permutations(range(5))
    ]
    assert sum(every) == pytest.approx(1.0), "probabilities of all orders"


def test_plackett_luce_with_ties_and_two_items_is_bradley_terry() -> None:
    def plain(r: list[float]) -> float:
        among = sum(math.exp(x) for x in r)
        return -(r[1] - math.log(among)) - (r[4] - math.log(among)) - (
            r[0] - math.log(sum(math.exp(r[i]) for i in (0, 2, 3)))
        ) - sum(r[i] - math.log(math.exp(r[2]) + math.exp(r[3])) for i in (2, 3))  # fmt: skip

    assert_gradient(lambda r: plackett_luce(r, [[1, 4], [0], [2, 3]]), plain, R)
    a, b = double([0.3]), double([-0.9])
    two = plackett_luce(torch.cat([a, b]), [[0], [1]])
    assert float(two) == pytest.approx(float(bradley_terry(a, b, torch.ones(1))))


@given(st.lists(numbers, min_size=2, max_size=6), numbers)
def test_a_constant_added_to_all_scores_changes_no_loss_but_centering(
    scores: list[float], constant: float
) -> None:
    r = torch.tensor(scores, dtype=torch.float64)
    order = [[i] for i in range(len(scores))]
    assert float(plackett_luce(r, order)) == pytest.approx(
        float(plackett_luce(r + constant, order)), abs=1e-6
    )
    p = torch.full((len(scores) - 1,), 0.7, dtype=torch.float64)
    before, after = (bradley_terry(x[:-1], x[1:], p, 0.2, 0.1) for x in (r, r + constant))
    assert torch.allclose(before, after, atol=1e-9)


@given(st.lists(numbers, min_size=1, max_size=6), st.floats(0, 0.9))
def test_swapping_the_sides_and_the_label_changes_nothing(
    gaps: list[float], smoothing: float
) -> None:
    d = torch.tensor(gaps, dtype=torch.float64)
    zero, p = torch.zeros_like(d), torch.full_like(d, 0.8)
    assert torch.allclose(
        bradley_terry(d, zero, p, 0.3, smoothing),
        bradley_terry(zero, d, 1 - p, 0.3, smoothing),
        atol=1e-9,
    )


def test_dpo_against_plain_numbers() -> None:
    def ours(r: torch.Tensor) -> torch.Tensor:
        return dpo_loss(
            r[[0, 2]], r[[1, 3]], torch.tensor([1.0, 0.6], dtype=torch.float64), 0.3, 0.1
        ).mean()

    def plain(r: list[float]) -> float:
        total = 0.0
        for better, worse, q in ((0, 1, 1.0), (2, 3, 0.6)):
            p, h = 0.9 * q + 0.05, 0.3 * (r[better] - r[worse])
            total -= p * math.log(sigma(h)) + (1 - p) * math.log(sigma(-h))
        return total / 2

    assert_gradient(ours, plain, R)


def test_ensembles() -> None:
    members = torch.tensor([[1.0, 2.0], [3.0, 0.0], [2.0, 4.0]], dtype=torch.float64)
    assert combine(members, "mean").tolist() == [2.0, 2.0]
    assert combine(members, "min").tolist() == [1.0, 0.0]
    variance = np.var(members.numpy(), axis=0)
    assert combine(members, "uwo", 0.5).tolist() == pytest.approx((2.0 - 0.5 * variance).tolist())
    with pytest.raises(ValueError, match="there are 'mean', 'min' and 'uwo'"):
        combine(members, "max")


def test_calibration_error_by_hand() -> None:
    predicted = torch.tensor([0.15, 0.15, 0.95, 0.95])
    observed = torch.tensor([0.0, 1.0, 1.0, 1.0])
    # bin 1: mean 0.15 against 0.5, weight 2; bin 9: 0.95 against 1, weight 2
    assert calibration_error(predicted, observed, torch.ones(4)) == pytest.approx(
        (2 * 0.35 + 2 * 0.05) / 4, abs=1e-6
    )
    assert calibration_error(torch.tensor([1.0]), torch.tensor([1.0]), torch.ones(1)) == 0.0
