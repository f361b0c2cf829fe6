"""Our losses and advantages, with gradients, against what published libraries compute, to 1e-6 in
float64.

The numbers are recorded in `references/recorded.json` by `references/make.py`, which calls trl,
stable-baselines3 and verl. Where those differ from one another or from us, the test says how.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from turnwise.engine.tensors import (
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    group_advantage,
    kl_estimate,
)
from turnwise.plugins.optimizers.dpo import dpo_loss
from turnwise.plugins.optimizers.kto import kto_loss
from turnwise.plugins.optimizers.policy_loss import PolicyLoss, PolicyLossOptions

RECORDED = json.loads((Path(__file__).parent / "references" / "recorded.json").read_text())


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(ours: Any, theirs: Any) -> None:
    assert torch.allclose(
        torch.as_tensor(ours, dtype=torch.float64), double(theirs), atol=1e-6, rtol=0
    )


def cases(*path: str, offered: Callable[[Any], bool] = lambda case: True) -> list[Any]:
    """(inputs, case) of a block; of what we do not offer, none."""
    block: Any = RECORDED
    for name in path:
        block = block[name]
    return [
        pytest.param(block["inputs"], case, id=f"{path[-1]}-{i}")
        for i, case in enumerate(block["cases"])
        if offered(case)
    ]


def no_odd_cispo(case: Any) -> bool:
    """A cap below 1 or a sequence's ratio in cispo: trl computes them, neither the paper nor we
    offer them."""
    return case["loss_type"] != "cispo" or (
        case["importance_sampling_level"] == "token" and case["epsilon_high"] > 1
    )


def no_dual_clip(case: Any) -> bool:
    """verl's vanilla loss is dual-clip, which is PPO's where its third bound is out of reach; its
    cispo has a floor."""
    vanilla = case["function"] == "compute_policy_loss_vanilla" and case["clip_ratio_c"] > 100
    return vanilla or case["function"] == "compute_policy_loss_gspo"


@pytest.mark.parametrize(("given", "case"), cases("trl", "dpo"))
def test_dpo_sigmoid_ipo_and_hinge_are_trls(given: Any, case: Any) -> None:
    """trl's label smoothing is the probability that a label is flipped, ours the share replaced by
    1/2: twice as much. Its ipo takes the mean over tokens, which is `length_normalise` here."""
    chosen, rejected = (
        double(given["chosen"]).requires_grad_(),
        double(given["rejected"]).requires_grad_(),
    )
    better, worse = chosen - double(given["ref_chosen"]), rejected - double(given["ref_rejected"])
    if case["loss_type"] == "ipo" and case["lengths"] is not None:
        tokens = double(given["lengths"][case["lengths"]])
        better, worse = better / tokens[0], worse / tokens[1]
    sure = torch.ones(len(chosen), dtype=torch.float64)
    each = dpo_loss(
        better, worse, sure, case["beta"], 2 * case["label_smoothing"], case["loss_type"]
    )
    each.mean().backward()
    same(each.detach(), case["losses"])
    same(chosen.grad, case["grad_chosen"])
    same(rejected.grad, case["grad_rejected"])


@pytest.mark.parametrize(("given", "case"), cases("trl", "kto"))
def test_kto_is_trls(given: Any, case: Any) -> None:
    own = double(given["logps"]).requires_grad_()
    z0 = (
        (double(given["kl_logps"][case["kl_logps"]]) - double(given["ref_kl_logps"]))
        .mean()
        .clamp(min=0)
    )
    each = kto_loss(
        own - double(given["ref_logps"]), torch.tensor(given["label"]), z0, 0.1,
        case["desirable_weight"], case["undesirable_weight"],
    )  # fmt: skip
    each.mean().backward()
    same(z0, case["z0"])
    same(each.detach(), case["losses"])
    same(own.grad, case["grad"])


def policy_loss(
    given: Any,
    form: Any,
    mean: Any,
    *,
    high: float,
    advantages: Tensor,
    divisor: float | None = None,
    extra: Any = None,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of our `PolicyLoss` on [E, A] log-probs, laid out as a micro-batch of every
    token."""
    mask = double(given["mask"]).bool()
    episode, action = mask.nonzero(as_tuple=True)
    micro = SimpleNamespace(row=episode, take=lambda x: x[episode, action])
    batch = SimpleNamespace(mask=mask, weight=torch.ones(len(mask), dtype=torch.float64))
    own = double(given["logps"]).requires_grad_()
    loss = PolicyLoss(PolicyLossOptions(loss=form, clip_high=high, loss_mean=mean, divisor=divisor))
    each, _ = loss.per_token(own[mask], micro, double(given["old_logps"])[mask], advantages)  # type: ignore[arg-type]
    if extra is not None:
        each = each + extra(own)[mask]
    shares = loss.shares(batch)  # type: ignore[arg-type]
    total = loss.total(batch, shares, list(range(len(mask))))  # type: ignore[arg-type]
    whole = (each * shares[mask]).sum() / total
    whole.backward()
    assert own.grad is not None
    return whole.detach(), own.grad


@pytest.mark.parametrize(("given", "case"), cases("trl", "grpo_loss", offered=no_odd_cispo))
def test_grpo_losses_are_trls(given: Any, case: Any) -> None:
    """trl's dapo and cispo divide by a number of tokens that is told to it (10 in this batch; 16
    stands for a larger one); its cispo caps at `epsilon_high` itself, ours at 1 + clip_high."""
    kind, sequence = case["loss_type"], case["importance_sampling_level"] == "sequence"
    advantages = double(given["advantages"]).unsqueeze(1).expand(3, 5)
    mean: Any = {"grpo": "sequence", "dr_grpo": "constant"}.get(kind, "token")
    form: Any = "cispo" if kind == "cispo" else "gspo" if sequence else "ppo"
    loss, gradient = policy_loss(
        given, form, mean,
        high=case["epsilon_high"] - 1 if kind == "cispo" else case["epsilon_high"],
        advantages=advantages,
        divisor=case["max_completion_length"] if kind == "dr_grpo" else None,
        extra=lambda own: case["beta"] * kl_estimate(own, double(given["ref_logps"]), "k3"),
    )  # fmt: skip
    scale = 10 / case["num_items_in_batch"] if kind in ("dapo", "cispo") else 1.0
    same(loss * scale, case["loss"])
    same(gradient * scale, case["grad"])


@pytest.mark.parametrize(("given", "case"), cases("verl", "policy_loss", offered=no_dual_clip))
def test_policy_losses_are_verls(given: Any, case: Any) -> None:
    function, mode = case["function"].removeprefix("compute_policy_loss_"), case["loss_agg_mode"]
    means: dict[str, Any] = {
        "token-mean": "token",
        "seq-mean-token-mean": "sequence",
        "seq-mean-token-sum": "constant",
    }
    form: Any = "gspo" if function == "gspo" else "ppo"
    loss, gradient = policy_loss(
        given, form, means[mode], high=case["clip_high"], advantages=double(given["advantages"]),
        divisor=1.0 if means[mode] == "constant" else None,
    )  # fmt: skip
    same(loss, case["loss"])
    same(gradient, case["grad"])


@pytest.mark.parametrize(("given", "case"), cases("stable_baselines3", "gae"))
def test_gae_is_stable_baselines3s(given: Any, case: Any) -> None:
    """Six steps of two episodes; the second goes on after the last step unless done."""
    rewards, values = double(given["rewards"]).view(2, 3), double(given["values"]).view(2, 3)
    bootstrap = double([0.0, 0.0 if case["done"] else given["last_value"][0]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    advantages, targets = gae(rewards, values, mask, bootstrap, case["gamma"], case["lam"])
    same(advantages.flatten(), case["advantages"])
    same(targets.flatten(), case["returns"])


@pytest.mark.parametrize(("given", "case"), cases("stable_baselines3", "ppo"))
def test_ppo_losses_are_stable_baselines3s(given: Any, case: Any) -> None:
    """Its value loss has no factor 1/2, and with a clip it forgets the maximum of PPO's reference
    implementation."""
    own = double(given["logps"]).requires_grad_()
    loss, _ = clipped_policy_loss(
        own, double(given["old_logps"]), double(given["advantages"]), case["clip"], case["clip"]
    )
    loss.mean().backward()
    same(loss.mean().detach(), case["policy_loss"])
    same(own.grad, case["grad_logps"])
    if case["clip_value"] is None:
        values = double(given["values"]).requires_grad_()
        error = (
            2
            * clipped_value_loss(
                values, double(given["old_values"]), double(given["returns"]), None
            ).mean()
        )
        error.backward()
        same(error.detach(), case["value_loss"])
        same(values.grad, case["grad_values"])


@pytest.mark.parametrize(("given", "case"), cases("verl", "value_loss"))
def test_the_clipped_value_loss_is_verls(given: Any, case: Any) -> None:
    mask = double(given["mask"])
    each = clipped_value_loss(
        double(given["values"]),
        double(given["old_values"]),
        double(given["returns"]),
        case["clip_value"],
    )
    means = {
        "token-mean": (each * mask).sum() / mask.sum(),
        "seq-mean-token-mean": ((each * mask).sum(1) / mask.sum(1)).mean(),
    }
    same(means[case["loss_agg_mode"]], case["loss"])


@pytest.mark.parametrize(("given", "case"), cases("verl", "gae"))
def test_gae_with_observations_between_turns_is_verls(given: Any, case: Any) -> None:
    """verl lays observation tokens out beside action tokens and skips them; we have only action
    tokens. It has no bootstrap."""
    mask = double(given["mask"])
    order = torch.argsort(-mask, dim=1, stable=True)  # action tokens first, in their order
    packed = mask.gather(1, order)
    pack = lambda values: double(values).gather(1, order) * packed  # noqa: E731
    advantages, targets = gae(
        pack(given["rewards"]),
        pack(given["values"]),
        packed.bool(),
        torch.zeros(2, dtype=torch.float64),
        case["gamma"],
        case["lam"],
    )
    same(advantages, pack(case["advantages"]).tolist())
    same(targets, pack(case["returns"]).tolist())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=str(i))
        for i, c in enumerate(RECORDED["trl"]["grpo_advantages"]["cases"])
        if c["scale_rewards"] != "batch"
    ],
)
def test_group_advantages_are_trls(case: Any) -> None:
    """Unbiased deviation, 1e-4 beside it, a group of one gets 0.

    Scaling by the whole batch's deviation is not offered.
    """
    rewards = double(case["rewards"])
    group = torch.arange(len(rewards)) // case["group_size"]
    same(
        group_advantage(rewards, group, {"group": "std", "none": "mean"}[case["scale_rewards"]]),
        case["advantages"],
    )


def test_group_advantages_are_verls_but_for_its_epsilon_and_groups_of_one() -> None:
    """verl adds 1e-6 to the deviation where we, like trl, add 1e-4; and it gives a group of one its
    raw reward, which is no comparison."""
    block = RECORDED["verl"]["group_advantage"]
    scores, group = double(block["inputs"]["scores"]), torch.tensor(block["inputs"]["group"])
    several = torch.bincount(group)[group] > 1
    for baseline, name in (("mean", "grpo_mean"), ("loo", "rloo")):
        ours, theirs = (
            group_advantage(scores, group, baseline),
            double(block["outputs"][name])[:, 0],
        )
        same(ours[several], theirs[several].tolist())
        assert (ours[~several] == 0).all()
        same(theirs[~several], scores[~several].tolist())
    ours, theirs = group_advantage(scores, group, "std"), double(block["outputs"]["grpo_std"])[:, 0]
    spread = torch.stack([scores[group == g].std() for g in group.tolist()]).nan_to_num(1.0)
    same((ours * (spread + 1e-4) / (spread + 1e-6))[several], theirs[several].tolist())
