"""The pure maths: hand-computed tables, independent references, and properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from turnwise.engine import tensors as t


def reference_gae(
    rewards: list[float], values: list[float], last: float, gamma: float, lam: float
) -> list[float]:
    """The definition, A_t = sum_l (gamma lam)^l delta_{t+l}, as a double loop."""
    following = [*values[1:], last]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [
        sum((gamma * lam) ** (i - s) * deltas[i] for i in range(s, len(deltas)))
        for s in range(len(deltas))
    ]


def test_gae_on_two_turns_ignores_observations() -> None:
    """Two turns of three action tokens with four observation tokens between, V = 0.5, reward 1 at
    the end, gamma 1.

    Implementations that let observation tokens decay give .295 .328 .365 or .054 .060 .067 for the
    first turn at lambda .9.
    """
    mask = torch.ones(1, 6, dtype=torch.bool)
    values, bootstrap = torch.full((1, 6), 0.5), torch.zeros(1)
    rewards = t.place_turn_rewards(
        torch.tensor([[0.0, 1.0]]), torch.tensor([[0, 0, 0, 1, 1, 1]]), mask
    )
    for lam, first in ((0.9, (0.295245, 0.32805, 0.3645)), (0.95, (0.38689, 0.40725, 0.42869))):
        advantages, targets = t.gae(rewards, values, mask, bootstrap, 1.0, lam)
        assert advantages[0, :3].tolist() == pytest.approx(first, abs=1e-5)
        assert advantages[0, 3:].tolist() == pytest.approx([0.5 * lam**2, 0.5 * lam, 0.5])
        assert torch.allclose(targets, advantages + 0.5)


numbers = st.floats(-3, 3, allow_nan=False, width=32)


@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12), st.integers(0, 5), numbers,
    st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip
def test_gae_is_its_definition_whatever_the_padding(
    steps: list[tuple[float, float]], padding: int, last: float, gamma: float, lam: float
) -> None:
    rewards, values = [s[0] for s in steps], [s[1] for s in steps]
    n = len(steps)
    mask = torch.tensor([[True] * n + [False] * padding])
    tensor = lambda x: torch.tensor([x + [9.0] * padding], dtype=torch.float64)  # noqa: E731 - junk at padding
    advantages, _ = t.gae(
        tensor(rewards), tensor(values), mask, torch.tensor([last], dtype=torch.float64), gamma, lam
    )
    assert advantages[0, :n].tolist() == pytest.approx(
        reference_gae(rewards, values, last, gamma, lam), abs=1e-9
    )
    assert (advantages[0, n:] == 0).all()


def test_gae_lambda_one_is_return_minus_value_and_bootstraps() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    values = torch.tensor([[0.1, 0.2, 0.3]] * 2)
    rewards = torch.tensor([[0.0, 0.0, 1.0]] * 2)
    advantages, targets = t.gae(rewards, values, mask, torch.tensor([0.0, 5.0]), 1.0, 1.0)
    assert targets[0].tolist() == pytest.approx([1.0, 1.0, 1.0])  # terminated
    assert targets[1].tolist() == pytest.approx([6.0, 6.0, 6.0])  # truncated: 1 + V
    assert advantages[1].tolist() == pytest.approx([5.9, 5.8, 5.7])


def test_turn_rewards_stand_on_the_last_token_of_their_turn() -> None:
    turn = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 2, -1, -1, -1, -1]])
    mask = turn >= 0
    placed = t.place_turn_rewards(torch.tensor([[1.0, 2.0, 0.0], [1.0, 5.0, 2.0]]), turn, mask)
    assert placed[0].tolist() == [0, 1, 0, 0, 2, 0]
    assert placed[1].tolist() == [6, 2, 0, 0, 0, 0], "a turn without tokens loses no reward"


def test_group_advantages_by_hand() -> None:
    outcome, group = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0, 0, 0, 1])
    assert t.group_advantage(outcome, group, "mean").tolist() == [-2, 0, 2, 0]
    assert t.group_advantage(outcome, group, "loo").tolist() == pytest.approx(
        [1 - 4, 3 - 3, 5 - 2, 0]
    )
    assert t.group_advantage(outcome, group, "std").tolist() == pytest.approx(
        [-2 / 2.0001, 0, 2 / 2.0001, 0]
    )
    with pytest.raises(ValueError, match="'mean', 'loo' and 'std'"):
        t.group_advantage(outcome, group, "median")


@given(
    st.lists(st.tuples(numbers, st.integers(0, 3)), min_size=1, max_size=20),
    numbers,
    st.sampled_from(["mean", "loo", "std"]),
)
def test_group_advantage_properties(
    members: list[tuple[float, int]], shift: float, baseline: str
) -> None:
    outcome = torch.tensor([m[0] for m in members], dtype=torch.float64)
    group = torch.tensor([m[1] for m in members])
    advantage = t.group_advantage(outcome, group, baseline)
    # Numbers that differ by the rounding of their size are equal, and a constant changes that size.
    size = outcome.abs().max() + abs(shift)
    near = (outcome.unsqueeze(0) - outcome.unsqueeze(1)).abs()
    assume(not bool(((near > 0) & (near <= 4 * t.rounding(size))).any()))
    assert torch.allclose(
        advantage, t.group_advantage(outcome + shift, group, baseline), atol=1e-6
    ), "a constant changes nothing"
    sums = torch.zeros(4, dtype=torch.float64).index_add_(0, group, advantage)
    assert torch.allclose(sums, torch.zeros(4, dtype=torch.float64), atol=1e-6), (
        "each group sums to zero"
    )
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        t.group_advantage(outcome[order], group[order], baseline), advantage[order], atol=1e-9
    )


def test_clipped_policy_loss_by_hand() -> None:
    old = torch.zeros(6)
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5, 1.1])
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, 2.0])
    loss, held = t.clipped_policy_loss(ratio.log(), old, advantage, 0.2, 0.3)
    assert loss.tolist() == pytest.approx([-2.0, -2.6, -1.0, 3.0, 1.6, -2.2])
    assert held.tolist() == [False, True, False, False, True, False]


def test_clipped_value_loss_by_hand() -> None:
    values, old, targets = (
        torch.tensor([1.0, 0.0]),
        torch.tensor([0.0, 0.0]),
        torch.tensor([1.0, 1.0]),
    )
    assert t.clipped_value_loss(values, old, targets, 0.2).tolist() == pytest.approx(
        [0.64 / 2, 0.5]
    )
    assert t.clipped_value_loss(values, old, targets, None).tolist() == pytest.approx([0.0, 0.5])


def test_kl_estimators_agree_with_the_exact_kl_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.4, 0.4, 0.2]).log()
    exact = float((p.exp() * (p - q)).sum())
    sample = torch.multinomial(p.exp(), 400_000, replacement=True, generator=generator)
    for estimator in ("k1", "k3"):
        assert float(t.kl_estimate(p[sample], q[sample], estimator).mean()) == pytest.approx(
            exact, abs=2e-3
        )
    assert (t.kl_estimate(p[sample], q[sample], "k3") >= 0).all()
    assert float(t.kl_estimate(p[sample], q[sample], "k2").mean()) == pytest.approx(exact, rel=0.1)


def test_importance_weight_is_capped_and_detached() -> None:
    prox = torch.tensor([0.0, 1.0, 5.0], requires_grad=True)
    weight = t.importance_weight(prox, torch.zeros(3), 2.0)
    assert weight.tolist() == pytest.approx([1.0, 2.0, 2.0])
    assert not weight.requires_grad


@settings(max_examples=30)
@given(st.integers(2, 40), st.integers(0, 10_000))
def test_sampling_by_inversion_is_exact(size: int, seed: int) -> None:
    """The first token whose cumulative probability exceeds the uniform; impossible tokens never."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, size, generator=generator) * 3
    logits[0, seed % size] = -math.inf
    uniforms = torch.rand(50, generator=generator, dtype=torch.float64)
    tokens, logprobs, finite = t.sample_tokens(logits.expand(50, -1), uniforms)
    cumulative = logits[0].double().softmax(-1).cumsum(-1)
    for u, token in zip(uniforms.tolist(), tokens.tolist(), strict=True):
        assert token == next(i for i, c in enumerate(cumulative.tolist()) if c > u or i == size - 1)
    if size > 1:
        assert seed % size not in tokens.tolist()
    exact = logits[0].double().log_softmax(-1)[tokens]
    assert torch.allclose(logprobs.double(), exact, atol=1e-6)
    assert bool(finite.all())
    greedy, _, _ = t.sample_tokens(logits, None)
    assert int(greedy) == int(logits.argmax())
    assert not bool(t.sample_tokens(logits * math.nan, None)[2])


def test_whiten_and_explained_variance() -> None:
    values, mask = torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]])
    assert t.whiten(values, mask)[0].tolist() == pytest.approx([-1.0, 1.0, 0.0])
    assert t.explained_variance(values, values, mask) == pytest.approx(1.0)
    assert t.explained_variance(torch.zeros(1, 3), values, mask) == pytest.approx(0.0)


def test_the_entropy_is_exact_under_autocast_and_without_some_tokens() -> None:
    logits = torch.randn(5, 300) * 3
    logits[:, ::7] = -math.inf
    exact = -torch.special.xlogy(logits.double().softmax(-1), logits.double().softmax(-1)).sum(-1)
    with torch.autocast("cpu", torch.bfloat16):
        _, entropy = t.log_softmax_at(logits, torch.ones(5, dtype=torch.long))
    assert entropy.dtype == torch.float32
    assert torch.allclose(entropy.double(), exact, atol=1e-5)


def test_log_softmax_at_agrees_with_torch() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    targets = torch.tensor([0, 6, 3, 2, 1])
    logprobs, entropy = t.log_softmax_at(logits, targets)
    distribution = torch.distributions.Categorical(logits=logits)
    assert torch.allclose(logprobs, distribution.log_prob(targets))
    assert torch.allclose(entropy, distribution.entropy())
