"""`grpo`: group-relative policy optimization, PPO's clipped objective without a critic.

Shao et al. 2024 (arXiv:2402.03300, eq. 3), over the action tokens of whole conversations:

    J = E[ sum_t w_t * min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip_high) A_t) / N  -  kl * k3_t ]
    rho_t = pi_theta / pi_prox                  pi_prox: the policy at the start of the update
    w_t   = min(cap, pi_prox / pi_behaviour)    1 on-policy; corrects for episodes older than the policy

The advantage comes from a credit method, `outcome` with GRPO's own normalisation by default. N counts the action tokens of the
minibatch over all processes ("token", DAPO's choice, Yu et al. 2025, arXiv:2503.14476); with "sequence", each episode's mean counts
alike, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from ...engine.learning import Batch
from ...engine.policy import Policy
from ...engine.policy.learner import Learner, Sums
from ...engine.tensors import clipped_policy_loss, importance_weight, kl_estimate
from .kl import KL


class GRPO:
    """Args:
    lr, warmup, decay, weight_decay, max_grad_norm, micro_tokens: see `Learner`.
    epochs: passes over the batch.
    minibatches: optimizer steps per pass.
    clip, clip_high: the clip range below and above 1; `clip_high` defaults to `clip`.
    kl, kl_place, kl_estimator, kl_target: see `KL`.
    loss_mean: "token" or "sequence".
    weight_cap: cap of the importance weight of stale episodes.
    """

    consumes = frozenset({"advantages"})
    provides: frozenset[str] = frozenset()

    def __init__(
        self,
        lr: float = 1e-6,
        *,
        epochs: int = 1,
        minibatches: int = 1,
        clip: float = 0.2,
        clip_high: float | None = None,
        kl: float = 0.0,
        kl_place: Literal["reward", "loss", "measure"] = "loss",
        kl_estimator: Literal["k1", "k2", "k3"] = "k3",
        kl_target: float | None = None,
        loss_mean: Literal["token", "sequence"] = "token",
        weight_cap: float = 2.0,
        warmup: int = 10,
        decay: float = 1.0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        micro_tokens: int = 8192,
    ) -> None:
        if loss_mean not in ("token", "sequence"):
            raise ValueError(f"loss_mean must be 'token' or 'sequence', got {loss_mean!r}")
        self.epochs, self.minibatches, self.loss_mean, self.weight_cap = epochs, minibatches, loss_mean, weight_cap
        self.clip, self.clip_high = clip, clip if clip_high is None else clip_high
        self.kl = KL(kl, kl_place, kl_estimator, kl_target)
        self._learner: dict[str, Any] = {
            "lr": lr, "warmup": warmup, "decay": decay, "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm, "micro_tokens": micro_tokens,
        }  # fmt: skip

    def setup(self, policy: Policy) -> None:
        self.kl.setup(policy)
        self.learner = Learner(policy, **self._learner)

    def prepare(self, policy: Policy, batch: Batch) -> None:
        self.kl.prepare(policy, batch, self.learner.micro_tokens)

    def update(self, policy: Policy, batch: Batch) -> dict[str, float]:
        assert batch.credit is not None
        assert batch.behaviour_logprobs is not None
        advantages = batch.credit.advantages
        prox = policy.logprobs(batch, micro_tokens=self.learner.micro_tokens)
        weight = importance_weight(prox, batch.behaviour_logprobs, self.weight_cap)
        length = batch.mask.sum(1, keepdim=True).clamp(min=1)
        share = torch.ones_like(prox) if self.loss_mean == "token" else 1.0 / length.expand_as(prox)
        share = share * batch.weight.unsqueeze(1) * batch.mask
        sums, tokens, norms = Sums(), 0.0, []
        for epoch in range(self.epochs):
            for episodes in self.learner.minibatches(len(batch.episodes), self.minibatches, batch.seed, epoch):
                total = float(share[episodes].sum())
                for micro in self.learner.micro_batches(batch.rows, episodes):
                    out = policy.score(micro, batch.temperature, self.learner.network)
                    old = micro.take(prox)
                    loss, held = clipped_policy_loss(out.logprobs, old, micro.take(advantages), self.clip, self.clip_high)
                    loss = loss * micro.take(weight)
                    if self.kl.in_loss:
                        assert batch.reference_logprobs is not None
                        reference = micro.take(batch.reference_logprobs)
                        loss = loss + self.kl.coef * kl_estimate(out.logprobs, reference, self.kl.estimator)
                    self.learner.backward((loss * micro.take(share)).sum() / total, micro)
                    sums.add(
                        micro, loss=loss, clip_fraction=held.float(), entropy=out.entropy,
                        approx_kl=kl_estimate(old, out.logprobs.detach(), "k3"),
                    )  # fmt: skip
                norms.append(self.learner.step(batch.progress, [batch.episodes[e].id for e in episodes]))
                tokens += float(batch.mask[episodes].sum())
        on_policy = (weight - 1).abs() * batch.mask
        metrics = sums.means(policy, tokens)
        metrics |= {
            "grad_norm": sum(norms) / len(norms),
            "lr": self.learner.rate(batch.progress),
            "weight_off_one": float(on_policy.max()),
        }
        return metrics | self.kl.measure()

    def state_dict(self) -> dict[str, Any]:
        return {**self.learner.state_dict(), "kl_coef": self.kl.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.learner.load_state_dict(state)
        self.kl.coef = float(state["kl_coef"])
