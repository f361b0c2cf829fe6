"""Makes one update of an optimizer and reads its gradient off the weights; used by
test_promise_2_gradients.py."""

from __future__ import annotations

from typing import Any

import torch
import turnwise
from turnwise.engine.policy.batching import make_batch
from turnwise.plugins.credit.gae import GAE
from turnwise.plugins.credit.outcome import OutcomeCredit
from turnwise.plugins.optimizers.grpo import GRPO
from turnwise.plugins.optimizers.ppo import PPO


def change(
    policy: turnwise.Policy,
    algorithm: str,
    episodes: list[turnwise.Episode],
    outcomes: list[float],
    *,
    micro_tokens: int = 100_000,
    shuffle_rows: bool = False,
) -> dict[str, torch.Tensor]:
    """Returns the gradient of one update, read off the weights: plain SGD at rate 1, nothing
    clipped."""
    rewards = [
        turnwise.Rewards(r, (*[0.0] * (len(e.turns) - 1), r))
        for r, e in zip(outcomes, episodes, strict=True)
    ]
    options: dict[str, Any] = {
        "minibatches": 1,
        "warmup": 0,
        "max_grad_norm": 1e9,
        "micro_tokens": micro_tokens,
        "lr": 1.0,
    }
    optimizer: Any = (
        PPO(**options, epochs=1, kl=0.1) if algorithm == "ppo" else GRPO(**options, kl=0.1)
    )
    optimizer.setup(policy)
    if algorithm == "ppo":  # a critic that says something
        torch.manual_seed(5)
        torch.nn.init.normal_(optimizer._values.layers[2].weight, std=0.5)
    batch = make_batch(episodes, rewards)
    if shuffle_rows:
        batch.rows = batch.rows[::-1]
    optimizer.prepare(policy, batch)
    batch.credit = (GAE(lam=0.9) if algorithm == "ppo" else OutcomeCredit()).assign(batch)
    optimizer._learner.adam = torch.optim.SGD(optimizer._learner._parameters, lr=1.0)
    before = {k: v.clone() for k, v in policy.network.state_dict().items()}
    optimizer.update(policy, batch)
    return {
        k: before[k] - v
        for k, v in policy.network.state_dict().items()
        if v.dtype.is_floating_point
    }
