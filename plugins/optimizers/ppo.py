"""The optimizer `ppo`: proximal policy optimization with a critic.

Schulman et al. 2017 (arXiv:1707.06347, eq. 9), over the action tokens of whole conversations:

    L = mean_t of  w_t * loss_t(rho_t, A_t)  +  value_coef * (V_t - target_t)^2 / 2
    rho_t = pi_theta / pi_prox                 pi_prox: the policy at the start of the update
    w_t   = min(cap, pi_prox / pi_behaviour)   1 on-policy; corrects for older episodes

The form of loss_t and the mean are options (`policy_loss.py`), PPO's clipped one over all tokens by
default. V_t is read from the hidden state from which token t was chosen, so it sees just what the
policy saw; the value of a truncated episode's last state is read after its final observation. The
critic shares the policy's trunk, or reads it without training it, or has a trunk of its own.
Advantages come from a credit method (`gae`) and are whitened over the batch, by name. The KL
penalty stands in the reward by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...learning import (
    Batch,
    Learner,
    Micro,
    Output,
    PassOptions,
    Policy,
    Sums,
    clipped_value_loss,
    explained_variance,
    importance_weight,
    kl_estimate,
)
from ...protocols import Optimizer
from .kl import KL, KLOptions
from .policy_loss import PolicyLoss, PolicyLossOptions, staleness_metrics


class Critic(nn.Module):
    """A critic: a value from a hidden state, [n, H] -> [n].

    Its last layer begins at zero: a new critic returns 0 everywhere.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, 1)
        )
        for parameter in self.layers[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the value at each token, [...], from hidden states [..., H]."""
        return self.layers(hidden.float()).squeeze(-1).clone()  # a view loses FSDP's hooks


class PPO(PassOptions, PolicyLossOptions, KLOptions, Optimizer):
    """Proximal policy optimization with a critic. What it takes: see `PassOptions`,
    `PolicyLossOptions` and `KLOptions` too.

    Attributes:
        value_clip: how far a value may move per update before its loss is held back; None: no
            limit.
        value_coef: weight of the critic's loss.
        critic: "shared": its loss trains the policy's trunk too; "detached": its own layers only;
            "separate": a trunk of its own, begun as a copy of the policy's, at the price of a
            second model in memory.
        target_kl: k3 estimate of KL(old || new) per token of a minibatch from which no further step
            is taken in the update; None: never.
    """

    consumes: ClassVar = frozenset({"advantages"})
    provides: ClassVar = frozenset({"values"})

    epochs: int = Field(default=2, ge=1)
    minibatches: int = Field(default=2, ge=1)
    normalise: Literal["none", "whiten"] = "whiten"
    value_clip: float | None = Field(default=0.2, gt=0)
    value_coef: float = 0.5
    critic: Literal["shared", "detached", "separate"] = "shared"
    target_kl: float | None = None

    _learner: Learner
    _loss: PolicyLoss
    _kl: KL
    _values: Critic
    _trunk: nn.Module | None

    def model_post_init(self, context: Any) -> None:
        """Makes the loss and the KL term of the options."""
        self._loss, self._kl = PolicyLoss(self), KL(self)

    def setup(self, policy: Policy) -> None:
        """Sets up the KL term; makes the critic, its trunk where separate, and the learner."""
        self._kl.setup(policy)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._values = Critic(policy.hidden_size).to(policy.device)
        self._trunk = policy.copied_network() if self.critic == "separate" else None
        self._learner = Learner(
            policy, self, [self._values, *([self._trunk] if self._trunk else [])]
        )

    def _states(
        self, policy: Policy, micro: Micro, temperature: float, out: Output, trunk: Any
    ) -> Output:
        """Returns what the critic reads of a micro-batch: the policy's hidden states, or those of
        its own trunk."""
        return out if trunk is None else policy.score(micro, temperature, trunk)

    @torch.no_grad()
    def prepare(self, policy: Policy, batch: Batch) -> None:
        """Computes the values of every action token's state, and of the state each truncated
        episode was cut in, before the update."""
        values, bootstrap, prox = (
            torch.zeros(batch.mask.shape),
            torch.zeros(len(batch.episodes)),
            torch.zeros(batch.mask.shape),
        )
        for micro in policy.my_share(policy.micro_batches(batch.rows, self.micro_tokens)):
            out = policy.score(micro, batch.temperature, policy.network)
            seen = self._states(policy, micro, batch.temperature, out, self._trunk)
            now, at_end = self._values(seen.hidden), self._values(seen.end_hidden)
            if not micro.weight:
                continue
            values[micro.episode, micro.action] = now.cpu()
            prox[micro.episode, micro.action] = out.logprobs.float().cpu()
            for row, value in zip(micro.rows, at_end.tolist(), strict=True):
                if row.bootstrap:
                    bootstrap[row.episode] = value
        batch.values, batch.bootstrap = (
            policy.sum_over_processes(values),
            policy.sum_over_processes(bootstrap),
        )
        batch.extras["prox"] = policy.sum_over_processes(prox)
        self._kl.prepare(policy, batch, self.micro_tokens)

    def update(self, policy: Policy, batch: Batch) -> dict[str, float]:
        """Trains policy and critic on the batch, in `epochs` passes; returns the metrics."""
        assert batch.credit is not None
        assert batch.values is not None
        assert batch.behaviour_logprobs is not None
        advantages, targets = self._loss.advantages(batch), batch.credit.value_targets
        prox = batch.extras["prox"]
        weight = importance_weight(prox, batch.behaviour_logprobs, self.weight_cap)
        share, active = (
            self._loss.shares(batch),
            self._loss.active(batch, self._kl.in_loss or targets is not None),
        )
        sums, tokens, norms = Sums(), 0.0, []
        parts = (
            self._learner.minibatches(len(batch.episodes), self.minibatches, batch.seed, e)
            for e in range(self.epochs)
        )
        for episodes in chain.from_iterable(parts):
            total, moved = self._loss.total(batch, share, episodes), Sums()
            trained = [e for e in episodes if active[e]]
            if not trained:
                continue  # no step without a gradient: Adam would make one of its memory
            for micro in self._learner.micro_batches(batch.rows, trained):
                out = policy.score(micro, batch.temperature, self._learner.network)
                old, mine = micro.take(prox), micro.take(share)
                loss, held = self._loss.per_token(out.logprobs, micro, old, advantages)
                loss = loss * micro.take(weight)
                if self._kl.in_loss:
                    assert batch.reference_logprobs is not None
                    loss = loss + self._kl.loss(out.logprobs, micro.take(batch.reference_logprobs))
                value_loss = torch.zeros_like(loss)
                if targets is not None:
                    head, *trunk = self._learner.modules
                    seen = self._states(
                        policy, micro, batch.temperature, out, trunk[0] if trunk else None
                    )
                    values = head(
                        seen.hidden.detach() if self.critic == "detached" else seen.hidden
                    )
                    value_loss = clipped_value_loss(
                        values, micro.take(batch.values), micro.take(targets), self.value_clip
                    )
                    # Its language head has no loss, but wrappers like DDP want every parameter
                    # used.
                    if trunk:
                        value_loss = value_loss + 0.0 * seen.logprobs
                self._learner.backward(
                    ((loss + self.value_coef * value_loss) * mine).sum() / total, micro
                )
                change = kl_estimate(old, out.logprobs.detach(), "k3")
                moved.add(micro, kl=change)
                sums.add(
                    micro, loss=loss, value_loss=value_loss, clip_fraction=held.float(),
                    entropy=out.entropy,
                    approx_kl=change, approx_kl_k1=kl_estimate(old, out.logprobs.detach(), "k1"),
                )  # fmt: skip
            count = float(batch.mask[trained].sum())
            tokens += count
            if self.target_kl is not None and moved.means(policy, count)["kl"] > self.target_kl:
                self._learner.discard()
                break
            norms.append(
                self._learner.step(batch.progress, [batch.episodes[e].id for e in trained])
            )
        metrics = sums.means(policy, tokens) | self._learner.metrics(norms)
        if targets is not None:
            metrics["explained_variance"] = explained_variance(batch.values, targets, batch.mask)
        return metrics | staleness_metrics(weight, batch) | self._kl.measure()

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of learner, critic and trunk, and the KL coefficient."""
        own = {f"critic.{k}": v for k, v in self._values.named_parameters()}
        if self._trunk is not None:
            own |= {f"trunk.{k}": v for k, v in self._trunk.named_parameters() if v.requires_grad}
        return {**self._learner.state_dict(), **own, "kl_coef": self._kl.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the states of learner, critic and trunk, and the KL coefficient."""
        self._learner.load_state_dict(state)
        self._kl.coef = float(state["kl_coef"])
        parts = {"critic": self._values, "trunk": self._trunk}
        for part, module in parts.items():
            for name, parameter in module.named_parameters() if module is not None else ():
                if parameter.requires_grad:
                    self._learner.put(parameter, state[f"{part}.{name}"])
