"""The optimizer `grpo`: group-relative policy optimization, PPO's clipped objective without a
critic.

Shao et al. 2024 (arXiv:2402.03300, eq. 3), over the action tokens of whole conversations:

    L = mean_t of  w_t * loss_t(rho_t, A_t)  +  kl * k3_t
    rho_t = pi_theta / pi_prox                 pi_prox: the policy at the start of the update
    w_t   = min(cap, pi_prox / pi_behaviour)   1 on-policy; corrects for older episodes

The advantage comes from a credit method, `outcome` with GRPO's own normalisation by default. The
form of loss_t and the mean are options (`policy_loss.py`); with them, and with other credit, this
file is RLOO, Dr. GRPO, DAPO, GSPO, CISPO and REINFORCE++ too: see docs/optimizers.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from ...learning import (
    Batch,
    Learner,
    PassOptions,
    Policy,
    Sums,
    importance_weight,
    kl_estimate,
)
from ...protocols import Optimizer
from .kl import KL, KLOptions
from .policy_loss import PolicyLoss, PolicyLossOptions, staleness_metrics


class GRPO(PassOptions, PolicyLossOptions, KLOptions, Optimizer):
    """Group-relative policy optimization. What it takes: see `PassOptions`, `PolicyLossOptions` and
    `KLOptions`."""

    consumes: ClassVar = frozenset({"advantages"})

    kl_place: Literal["reward", "loss", "measure"] = "loss"

    _learner: Learner
    _loss: PolicyLoss
    _kl: KL

    def model_post_init(self, context: Any) -> None:
        """Makes the loss and the KL term of the options."""
        self._loss, self._kl = PolicyLoss(self), KL(self)

    def setup(self, policy: Policy) -> None:
        """Sets up the KL term and makes the learner."""
        self._kl.setup(policy)
        self._learner = Learner(policy, self)

    def prepare(self, policy: Policy, batch: Batch) -> None:
        """Computes what the KL term needs, and the policy's own log-probs before the update where
        training would not give them: with one step on episodes of this very policy, those of its
        forward passes are they."""
        once = self.epochs == self.minibatches == 1 and not bool(batch.staleness.any())
        if not once:
            batch.extras["prox"] = policy.logprobs(batch, micro_tokens=self.micro_tokens)
        self._kl.prepare(policy, batch, self.micro_tokens)

    def update(self, policy: Policy, batch: Batch) -> dict[str, float]:
        """Trains on the batch's advantages, in `epochs` passes; returns the metrics."""
        assert batch.behaviour_logprobs is not None
        advantages = self._loss.advantages(batch)
        prox = batch.extras.get("prox")
        # How far the policy is from the one that sampled, in log-probs; 0 for what is not run.
        apart = (prox if prox is not None else batch.behaviour_logprobs) - batch.behaviour_logprobs
        share, active = self._loss.shares(batch), self._loss.active(batch, self._kl.in_loss)
        sums, tokens, norms = Sums(), 0.0, []
        for epoch in range(self.epochs):
            for episodes in self._learner.minibatches(
                len(batch.episodes), self.minibatches, batch.seed, epoch
            ):
                total = self._loss.total(batch, share, episodes)
                trained = [e for e in episodes if active[e]]
                if not trained:
                    continue  # no step without a gradient: Adam would make one of its memory
                for micro in self._learner.micro_batches(batch.rows, trained):
                    out = policy.score(micro, batch.temperature, self._learner.network)
                    behaviour = micro.take(batch.behaviour_logprobs)
                    old = out.logprobs.detach().float() if prox is None else micro.take(prox)
                    if prox is None and micro.weight:
                        apart[micro.episode, micro.action] = (old - behaviour).cpu()
                    loss, held = self._loss.per_token(out.logprobs, micro, old, advantages)
                    loss = loss * importance_weight(old, behaviour, self.weight_cap)
                    if self._kl.in_loss:
                        assert batch.reference_logprobs is not None
                        loss = loss + self._kl.loss(
                            out.logprobs, micro.take(batch.reference_logprobs)
                        )
                    self._learner.backward((loss * micro.take(share)).sum() / total, micro)
                    sums.add(
                        micro, loss=loss, clip_fraction=held.float(), entropy=out.entropy,
                        approx_kl=kl_estimate(old, out.logprobs.detach(), "k3"),
                        approx_kl_k1=kl_estimate(old, out.logprobs.detach(), "k1"),
                    )  # fmt: skip
                norms.append(
                    self._learner.step(batch.progress, [batch.episodes[e].id for e in trained])
                )
                tokens += float(batch.mask[trained].sum())
        if prox is None:
            apart = policy.sum_over_processes(apart)
        weight = importance_weight(apart, torch.zeros_like(apart), self.weight_cap)
        metrics = sums.means(policy, tokens) | self._learner.metrics(norms)
        return metrics | staleness_metrics(weight, batch) | self._kl.measure()

    def state_dict(self) -> dict[str, Any]:
        """Returns the learner's state and the KL coefficient."""
        return {**self._learner.state_dict(), "kl_coef": self._kl.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the learner's state and the KL coefficient."""
        self._learner.load_state_dict(state)
        self._kl.coef = float(state["kl_coef"])
