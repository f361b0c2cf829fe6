"""The policy-gradient losses that PPO and GRPO share: the form of a token's loss, and how tokens
are averaged.

Per action token t with advantage A_t, rho_t = pi_theta / pi_prox, and prox the policy at the start
of the update:

    "ppo"    -min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t)   Schulman et al. 2017
             (arXiv:1707.06347, eq. 7); high > low is DAPO's clip-higher (arXiv:2503.14476)
    "gspo"   the same with s_t = exp(mean over the sequence of log rho) for rho_t, its gradient
             shared out over the tokens; Zheng et al. 2025 (arXiv:2507.18071, eq. 5 and 13)
    "cispo"  -sg(min(rho_t, 1 + high)) A_t log pi_theta   MiniMax-M1 (arXiv:2506.13585, eq. 4): no
             token loses its gradient, only its weight is capped

A sequence is a row: the whole conversation's action tokens, or one turn's with `history: rerender`.

    "token"      sum over tokens / number of tokens   DAPO (arXiv:2503.14476, eq. 8)
    "sequence"   mean over conversations of the mean over their tokens
                 GRPO (arXiv:2402.03300, eq. 3)
    "constant"   sum over tokens / (conversations * divisor)
                 Dr. GRPO (arXiv:2503.20783): length weighs nothing

Numbers of tokens and conversations are those of the minibatch over all processes, groups without
signal included: the mean is over all that was played, with or without a gradient. An episode's
weight counts in numerator and denominator alike.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...learning import Batch, Micro, clipped_policy_loss, whiten
from ...protocols import Section


class PolicyLossOptions(Section):
    """The options of an optimizer with a policy-gradient loss.

    Attributes:
        loss: the form of a token's loss: "ppo", "gspo" or "cispo".
        clip: how far the ratio may fall below 1, and rise above it.
        clip_high: how far it may rise, where that is another distance; "cispo" uses this alone.
        loss_mean: over what tokens are averaged: "token", "sequence" or "constant".
        divisor: action tokens per conversation that "constant" divides by; a number of the config,
            never of the data.
        normalise: "whiten" advantages over the action tokens of the batch (mean 0, standard
            deviation 1), or "none".
        weight_cap: cap of the importance weight of stale episodes.
    """

    loss: Literal["ppo", "gspo", "cispo"] = "ppo"
    clip: float = Field(default=0.2, gt=0)
    clip_high: float | None = Field(default=None, gt=0)
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    divisor: float | None = Field(default=None, gt=0)
    normalise: Literal["none", "whiten"] = "none"
    weight_cap: float = 2.0

    @model_validator(mode="after")
    def _divided(self) -> Self:
        if (self.loss_mean == "constant") != (self.divisor is not None):
            raise ValueError(
                "divisor is the number of tokens that loss_mean='constant' divides by, and of no"
                f" other: got loss_mean={self.loss_mean!r} and divisor={self.divisor}"
            )
        return self


class PolicyLoss:
    """A policy-gradient loss: the form of a token's loss, and how tokens are averaged."""

    def __init__(self, options: PolicyLossOptions) -> None:
        self.form, self.clip = options.loss, options.clip
        self.clip_high = options.clip if options.clip_high is None else options.clip_high
        self.mean, self.divisor = options.loss_mean, options.divisor
        self.normalise = options.normalise

    def advantages(self, batch: Batch) -> Tensor:
        """Returns the advantages, [E, A], normalised by name; groups without signal take no part in
        that and keep 0."""
        assert batch.credit is not None
        raw = batch.credit.advantages
        return (
            whiten(raw, batch.mask & batch.signal.unsqueeze(1))
            if self.normalise == "whiten"
            else raw
        )

    def shares(self, batch: Batch) -> Tensor:
        """Returns how much each token counts, [E, A], before `total` divides it."""
        share = batch.mask.to(batch.weight.dtype) * batch.weight.unsqueeze(1)
        return (
            share / batch.mask.sum(1, keepdim=True).clamp(min=1)
            if self.mean == "sequence"
            else share
        )

    def active(self, batch: Batch, everything: bool) -> Tensor:
        """Returns which episodes have a gradient, [E] bool: those that count at all and have a
        signal, or all that count if `everything` is set because the loss has other terms than the
        advantages' (a KL to the reference, a critic). The others need not be run."""
        return (batch.weight > 0) & (batch.signal | everything)

    def total(self, batch: Batch, shares: Tensor, episodes: list[int]) -> float:
        """Returns what the shares of a minibatch are divided by."""
        if self.divisor is not None:
            return float(batch.weight[episodes].sum()) * self.divisor
        return float(shares[episodes].sum())

    def per_token(
        self, logprobs: Tensor, micro: Micro, old: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the losses of a micro-batch's tokens [n], and which of them the clip holds back
        [n] bool.

        Args:
            logprobs, old: [n], of the policy that is trained and of the one the update began with.
            micro: where the tokens stand.
            advantages: [E, A].
        """
        advantage = micro.take(advantages)
        if self.form == "cispo":
            return cispo_loss(logprobs, old, advantage, self.clip_high)
        if self.form == "gspo":
            logprobs = sequence_logprobs(logprobs, old, micro.row)
        return clipped_policy_loss(logprobs, old, advantage, self.clip, self.clip_high)


def sequence_logprobs(logprobs: Tensor, old: Tensor, row: Tensor) -> Tensor:
    """Returns log-probs whose ratio to `old` is the sequence's mean one, while each keeps its own
    gradient (GSPO-token, eq. 13).

        log s_t = sg(mean over the row of (log pi - log old)) + log pi_t - sg(log pi_t)

    Args:
        logprobs, old: [n].
        row: [n] which sequence a token belongs to.
    """
    apart = (logprobs - old).detach()
    size = int(row.max()) + 1 if len(row) else 0
    sums = apart.new_zeros(size).index_add_(0, row, apart)
    counts = apart.new_zeros(size).index_add_(0, row, torch.ones_like(apart))
    return old + (sums / counts.clamp(min=1))[row] + logprobs - logprobs.detach()


def cispo_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, high: float
) -> tuple[Tensor, Tensor]:
    """Returns -sg(min(rho, 1 + high)) * A * log pi, [n], and which ratios were capped [n] bool."""
    ratio = (logprobs - old).detach().exp()
    return -ratio.clamp(max=1 + high) * advantages * logprobs, ratio > 1 + high


def staleness_metrics(weight: Tensor, batch: Batch) -> dict[str, float]:
    """Returns how far importance weights are from 1 at most, and their mean for every age of the
    batch's episodes.

    Args:
        weight: [E, A].
        batch: its mask and staleness are read.
    """
    found = {"weight_off_one": float(((weight - 1).abs() * batch.mask).max())}
    for age in sorted(set(batch.staleness.tolist())):
        own = batch.mask & (batch.staleness == age).unsqueeze(1)
        found[f"weight/stale-{age}"] = float(weight[own].mean())
    return found
