"""The credit method `counterfactual`: the outcome against the outcomes under other replies at the
turn.

    A_k = R - mean outcome of `rollouts` conversations in which turn k and everything after it were
    sampled again

A counterfactual baseline (Foerster et al. 2018, arXiv:1705.08926, eq. 4; Mesnard et al. 2021,
arXiv:2011.09464) by sampling: the expectation over other replies to the same words. The
conversation itself is the one sample of what the reply led to, so the credit is unbiased and
carries the luck of everything that came after; `branch` averages that luck away too, at the same
price. Turns without such samples get no credit. The engine plays the other
conversations, see `branch`; a KL penalty is charged to the turn whose tokens cost it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from ...learning import Batch, Credit, apart, spread_turns, turn_sums
from ...protocols import CreditAssigner, Section


class Counterfactual(Section, CreditAssigner):
    """Credits a turn with the outcome less the mean outcome of other replies at that turn.

    Attributes:
        rollouts: conversations in which the reply at a turn is sampled again.
    """

    needs: ClassVar = frozenset({"branches"})

    rollouts: int = Field(default=8, ge=1)

    @property
    def branches(self) -> int:  # type: ignore[override]
        """How many conversations are continued from a turn."""
        return self.rollouts

    def assign(self, batch: Batch) -> Credit:
        """Credits each turn with the outcome less its branch value; 0 where there is none."""
        assert batch.branch_values is not None
        penalty, _ = turn_sums(
            batch.token_rewards, batch.turn, batch.mask, batch.turn_mask.shape[1]
        )
        outcome = batch.outcome.unsqueeze(1)
        effect = apart(
            outcome, batch.branch_values, outcome.abs().maximum(batch.branch_values.abs())
        ).to(outcome.dtype)
        credit = (torch.where(batch.branch_values.isnan(), 0.0, effect) + penalty) * batch.turn_mask
        return Credit(spread_turns(credit, batch.turn, batch.mask), None, credit)
