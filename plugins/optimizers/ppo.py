"""`ppo`: proximal policy optimization with a critic on the policy's own hidden states.

Schulman et al. 2017 (arXiv:1707.06347, eq. 9), over the action tokens of whole conversations:

    L = sum_t w_t * -min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t) / N  +  value_coef * sum_t (V_t - target_t)^2 / 2N
    rho_t = pi_theta / pi_prox                  pi_prox: the policy at the start of the update
    w_t   = min(cap, pi_prox / pi_behaviour)    1 on-policy; corrects for episodes older than the policy

N counts the action tokens of the minibatch over all processes. V_t is read from the hidden state from which token t was chosen, so
it sees just what the policy saw; the value of a truncated episode's last state is read after its final observation. Advantages
come from a credit method (`gae`) and are whitened over the batch, by name. The KL penalty stands in the reward by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...engine.learning import Batch
from ...engine.policy import Policy
from ...engine.policy.learner import Learner, Sums
from ...engine.tensors import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    importance_weight,
    kl_estimate,
    whiten,
)
from .kl import KL


class Critic(nn.Module):
    """A value from a hidden state [n, H] -> [n]. Its last layer begins at zero: a new critic says 0 everywhere."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, 1))
        for parameter in self.layers[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden.float()).squeeze(-1)


class PPO:
    """Args:
    lr, warmup, decay, weight_decay, max_grad_norm, micro_tokens: see `Learner`.
    epochs: passes over the batch; stopped early when the policy has moved further than `target_kl`.
    minibatches: optimizer steps per pass.
    clip: the clip range around 1.
    value_clip: how far a value may move per update before its loss is held back; None: no limit.
    value_coef: weight of the critic's loss.
    trunk_gradient: whether the critic's loss trains the policy's trunk too, or its own layers only.
    normalise: "whiten" advantages over the batch, or "none".
    kl, kl_place, kl_estimator, kl_target: see `KL`.
    target_kl: k3 estimate of KL(old || new) per token after which the remaining epochs are left out; None: never.
    weight_cap: cap of the importance weight of stale episodes.
    """

    consumes = frozenset({"advantages"})
    provides = frozenset({"values"})

    def __init__(
        self,
        lr: float = 1e-6,
        *,
        epochs: int = 2,
        minibatches: int = 2,
        clip: float = 0.2,
        value_clip: float | None = 0.2,
        value_coef: float = 0.5,
        trunk_gradient: bool = True,
        normalise: Literal["whiten", "none"] = "whiten",
        kl: float = 0.0,
        kl_place: Literal["reward", "loss", "measure"] = "reward",
        kl_estimator: Literal["k1", "k2", "k3"] = "k3",
        kl_target: float | None = None,
        target_kl: float | None = None,
        weight_cap: float = 2.0,
        warmup: int = 10,
        decay: float = 1.0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        micro_tokens: int = 8192,
    ) -> None:
        if normalise not in ("whiten", "none"):
            raise ValueError(f"normalise must be 'whiten' or 'none', got {normalise!r}")
        self.epochs, self.minibatches, self.clip, self.target_kl = epochs, minibatches, clip, target_kl
        self.value_clip, self.value_coef, self.trunk_gradient = value_clip, value_coef, trunk_gradient
        self.normalise, self.weight_cap = normalise, weight_cap
        self.kl = KL(kl, kl_place, kl_estimator, kl_target)
        self._learner: dict[str, Any] = {
            "lr": lr, "warmup": warmup, "decay": decay, "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm, "micro_tokens": micro_tokens,
        }  # fmt: skip

    def setup(self, policy: Policy) -> None:
        self.kl.setup(policy)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.critic = Critic(policy.hidden_size).to(policy.device)
        self.learner = Learner(policy, [self.critic], **self._learner)

    @torch.no_grad()
    def prepare(self, policy: Policy, batch: Batch) -> None:
        """Values of every action token's state, and of the state each truncated episode was cut in, before the update."""
        values, bootstrap, prox = torch.zeros(batch.mask.shape), torch.zeros(len(batch.episodes)), torch.zeros(batch.mask.shape)
        for micro in policy.my_share(policy.micro_batches(batch.rows, self.learner.micro_tokens)):
            if not micro.weight:
                continue
            out = policy.score(micro, batch.temperature, policy.network)
            values[micro.episode, micro.action] = self.critic(out.hidden).cpu()
            prox[micro.episode, micro.action] = out.logprobs.float().cpu()
            for row, value in zip(micro.rows, self.critic(out.end_hidden).tolist(), strict=True):
                if row.bootstrap:
                    bootstrap[row.episode] = value
        batch.values, batch.bootstrap = policy.sum_over_processes(values), policy.sum_over_processes(bootstrap)
        batch.extras["prox"] = policy.sum_over_processes(prox)
        self.kl.prepare(policy, batch, self.learner.micro_tokens)

    def update(self, policy: Policy, batch: Batch) -> dict[str, float]:
        assert batch.credit is not None
        assert batch.values is not None
        assert batch.behaviour_logprobs is not None
        advantages, targets = batch.credit.advantages, batch.credit.value_targets
        if self.normalise == "whiten":
            advantages = whiten(advantages, batch.mask)
        prox = batch.extras["prox"]
        weight = importance_weight(prox, batch.behaviour_logprobs, self.weight_cap)
        share = batch.weight.unsqueeze(1) * batch.mask
        sums, tokens, norms, passes = Sums(), 0.0, [], 0
        for epoch in range(self.epochs):
            moved = Sums()
            for episodes in self.learner.minibatches(len(batch.episodes), self.minibatches, batch.seed, epoch):
                total = float(share[episodes].sum())
                for micro in self.learner.micro_batches(batch.rows, episodes):
                    out = policy.score(micro, batch.temperature, self.learner.network)
                    old, mine = micro.take(prox), micro.take(share)
                    loss, held = clipped_policy_loss(out.logprobs, old, micro.take(advantages), self.clip, self.clip)
                    loss = loss * micro.take(weight)
                    if self.kl.in_loss:
                        assert batch.reference_logprobs is not None
                        reference = micro.take(batch.reference_logprobs)
                        loss = loss + self.kl.coef * kl_estimate(out.logprobs, reference, self.kl.estimator)
                    value_loss = torch.zeros_like(loss)
                    if targets is not None:
                        hidden = out.hidden if self.trunk_gradient else out.hidden.detach()
                        values = self.learner.modules[0](hidden)
                        value_loss = clipped_value_loss(values, micro.take(batch.values), micro.take(targets), self.value_clip)
                    self.learner.backward(((loss + self.value_coef * value_loss) * mine).sum() / total, micro)
                    change = kl_estimate(old, out.logprobs.detach(), "k3")
                    moved.add(micro, kl=change)
                    sums.add(
                        micro, loss=loss, value_loss=value_loss, clip_fraction=held.float(), entropy=out.entropy,
                        approx_kl=change,
                    )  # fmt: skip
                norms.append(self.learner.step(batch.progress, [batch.episodes[e].id for e in episodes]))
                tokens += float(batch.mask[episodes].sum())
            passes += 1
            if self.target_kl is not None and moved.means(policy, float(batch.mask.sum()))["kl"] > self.target_kl:
                break
        metrics = sums.means(policy, tokens)
        metrics |= {
            "grad_norm": sum(norms) / len(norms),
            "lr": self.learner.rate(batch.progress),
            "epochs": float(passes),
            "weight_off_one": float(((weight - 1).abs() * batch.mask).max()),
        }
        if targets is not None:
            metrics["explained_variance"] = explained_variance(batch.values, targets, batch.mask)
        return metrics | self.kl.measure()

    def state_dict(self) -> dict[str, Any]:
        own = {f"critic.{k}": v for k, v in self.critic.state_dict().items()}
        return {**self.learner.state_dict(), **own, "kl_coef": self.kl.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.learner.load_state_dict(state)
        self.kl.coef = float(state["kl_coef"])
        self.critic.load_state_dict({k.removeprefix("critic."): v for k, v in state.items() if k.startswith("critic.")})
