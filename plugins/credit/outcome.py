"""The credit method `outcome`: every token of an episode gets the same advantage, its outcome
against its group's.

    A_i = R_i - baseline(group)

with the baseline of GRPO ("std": also divided by the group's standard deviation), Dr. GRPO ("mean")
or RLOO ("loo"); see `engine.tensors.group_advantage` for formulas and sources. Rewards that arise
per token (a KL penalty) are summed over the episode and compared within the group too, but never
divided by a standard deviation: where outcomes are equal, that would turn the smallest penalty into
a full-strength advantage, whatever its coefficient.

The gradient is that of the expected outcome with "loo", (G - 1)/G of it with "mean" (the baseline
holds the episode itself), and biased with "std", the default, which weighs every group by its own
spread: starts where success is rare pull harder (docs/credit.md has it in numbers).

Truncated episodes: there is no critic to estimate what would have come, so an episode that was cut
counts with the reward it had. `truncated="drop"` takes such episodes out of training instead
(advantage 0), while they still count in the baseline: a policy that never finishes must not look
good by leaving. That is biased: behaviour that leads to being cut gets no credit, good or bad.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from ...learning import Batch, Credit, group_advantage
from ...protocols import CreditAssigner, Section


class OutcomeCredit(Section, CreditAssigner):
    """Credits every token of an episode with its outcome against its group.

    Attributes:
        baseline: "std" (GRPO), "mean" (Dr. GRPO) or "loo" (RLOO).
        truncated: "count" truncated episodes with the reward they had, or "drop" them from the
            gradient.
    """

    called: ClassVar = "outcome"
    needs: ClassVar = frozenset({"group"})

    baseline: Literal["std", "mean", "loo"] = "std"
    truncated: Literal["count", "drop"] = "count"

    def assign(self, batch: Batch) -> Credit:
        """Credits all of an episode's tokens alike, with its group advantage."""
        penalty = batch.token_rewards.sum(1)
        advantage = group_advantage(batch.outcome, batch.group, self.baseline)
        advantage = advantage + group_advantage(
            penalty, batch.group, "loo" if self.baseline == "loo" else "mean"
        )
        if self.truncated == "drop":
            advantage = torch.where(batch.truncated, 0.0, advantage)
        return Credit(
            advantages=advantage.unsqueeze(1) * batch.mask,
            value_targets=None,
            turn_credit=advantage.unsqueeze(1) * batch.turn_mask,
        )
