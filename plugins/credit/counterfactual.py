"""`counterfactual`: the outcome against what it would have been had the turn been answered
otherwise.

    A_k = R - mean outcome of `rollouts` conversations in which turn k was sampled anew and
    everything after it

A counterfactual baseline (Foerster et al. 2018, arXiv:1705.08926, eq. 4; Mesnard et al. 2021,
arXiv:2011.09464) by sampling: the expectation over other replies to the same words. The
conversation itself is the one sample of what the reply led to, so the credit is unbiased and
carries the luck of everything that came after; `branch` averages that luck away too, at the same
price. Turns that nothing could be sampled for get no credit. The engine plays the other
conversations, see `branch`; a KL penalty is charged to the turn whose tokens cost it.
"""

from __future__ import annotations

import torch

from ...engine.protocols import CreditAssigner
from ...engine.records.batch import Batch, Credit
from ...engine.tensors import apart, spread_turns, turn_sums


class Counterfactual(CreditAssigner):
    """Args:
    rollouts: conversations in which a turn is answered anew.
    """

    needs = frozenset({"branches"})

    def __init__(self, rollouts: int = 8) -> None:
        if rollouts < 1:
            raise ValueError(f"rollouts must be at least 1, got {rollouts}")
        self.branches = rollouts

    def assign(self, batch: Batch) -> Credit:
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
