"""The optimizer `grpo`: group-relative policy optimization, PPO's clipped objective without a
critic.

Shao et al. 2024 (arXiv:2402.03300, eq. 3), over the action tokens of whole conversations:

    L = mean_t of  w_t * loss_t(rho_t, A_t)  +  kl * k3_t
    rho_t = pi_theta / pi_prox                  pi_prox: the policy at the start of the update
    w_t   = min(cap, pi_prox / pi_behaviour)   1 on-policy; corrects for episodes older than the
          policy

The advantage comes from a credit method, `outcome` with GRPO's own normalisation by default. The
form of loss_t and the mean are options (`losses.py`); with them, and with other credit, this file
is RLOO, Dr. GRPO, DAPO, GSPO, CISPO and REINFORCE++ too: see docs/optimizers.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ...learning import (
    Batch,
    Learner,
    Policy,
    Sums,
    importance_weight,
    kl_estimate,
    positive,
    settings,
)
from ...protocols import Optimizer
from .kl import KL
from .policy_loss import Form, Mean, Normalise, PolicyLoss, staleness_metrics


class GRPO(Optimizer):
    """Group-relative policy optimization.

    Args:
        lr, warmup, decay, weight_decay, max_grad_norm, micro_tokens: see `Learner`.
        epochs: passes over the batch.
        minibatches: optimizer steps per pass.
        loss, clip, clip_high, loss_mean, divisor, normalise: see `PolicyLoss`.
        kl, kl_place, kl_estimator, kl_target: see `KL`.
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
        loss: Form = "ppo",
        clip: float = 0.2,
        clip_high: float | None = None,
        kl: float = 0.0,
        kl_place: Literal["reward", "loss", "measure"] = "loss",
        kl_estimator: Literal["k1", "k2", "k3"] = "k3",
        kl_target: float | None = None,
        loss_mean: Mean = "token",
        divisor: float | None = None,
        normalise: Normalise = "none",
        weight_cap: float = 2.0,
        warmup: int = 10,
        decay: float = 1.0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        micro_tokens: int = 8192,
    ) -> None:
        self.epochs, self.minibatches = positive(epochs=epochs, minibatches=minibatches)
        self.weight_cap = weight_cap
        self.loss = PolicyLoss(loss, clip, clip_high, loss_mean, divisor, normalise)
        self.kl = KL(kl, kl_place, kl_estimator, kl_target)
        self._learner = settings(
            lr=lr,
            warmup=warmup,
            decay=decay,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            micro_tokens=micro_tokens,
        )

    def setup(self, policy: Policy) -> None:
        """Sets up the KL term and makes the learner."""
        self.kl.setup(policy)
        self.learner = Learner(policy, **self._learner)

    def prepare(self, policy: Policy, batch: Batch) -> None:
        """Computes the policy's own log-probs before the update, and what the KL term needs."""
        batch.extras["prox"] = policy.logprobs(batch, micro_tokens=self.learner.micro_tokens)
        self.kl.prepare(policy, batch, self.learner.micro_tokens)

    def update(self, policy: Policy, batch: Batch) -> dict[str, float]:
        """Trains on the batch's advantages, in `epochs` passes; returns the metrics."""
        assert batch.behaviour_logprobs is not None
        advantages = self.loss.advantages(batch)
        prox = batch.extras["prox"]
        weight = importance_weight(prox, batch.behaviour_logprobs, self.weight_cap)
        share, active = self.loss.shares(batch), self.loss.active(batch, self.kl.in_loss)
        sums, tokens, norms = Sums(), 0.0, []
        for epoch in range(self.epochs):
            for episodes in self.learner.minibatches(
                len(batch.episodes), self.minibatches, batch.seed, epoch
            ):
                total = self.loss.total(batch, share, episodes)
                trained = [e for e in episodes if active[e]]
                if not trained:
                    continue  # no step without a gradient: Adam would make one of its memory
                for micro in self.learner.micro_batches(batch.rows, trained):
                    out = policy.score(micro, batch.temperature, self.learner.network)
                    loss, held = self.loss.per_token(out.logprobs, micro, prox, advantages)
                    loss = loss * micro.take(weight)
                    if self.kl.in_loss:
                        assert batch.reference_logprobs is not None
                        loss = loss + self.kl.loss(
                            out.logprobs, micro.take(batch.reference_logprobs)
                        )
                    self.learner.backward((loss * micro.take(share)).sum() / total, micro)
                    sums.add(
                        micro, loss=loss, clip_fraction=held.float(), entropy=out.entropy,
                        approx_kl=kl_estimate(micro.take(prox), out.logprobs.detach(), "k3"),
                        approx_kl_k1=kl_estimate(micro.take(prox), out.logprobs.detach(), "k1"),
                    )  # fmt: skip
                norms.append(
                    self.learner.step(batch.progress, [batch.episodes[e].id for e in trained])
                )
                tokens += float(batch.mask[trained].sum())
        metrics = sums.means(policy, tokens) | self.learner.metrics(norms)
        return metrics | staleness_metrics(weight, batch) | self.kl.measure()

    def state_dict(self) -> dict[str, Any]:
        """Returns the learner's state and the KL coefficient."""
        return {**self.learner.state_dict(), "kl_coef": self.kl.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the learner's state and the KL coefficient."""
        self.learner.load_state_dict(state)
        self.kl.coef = float(state["kl_coef"])
