"""The credit method `turn-returns`: every turn gets the return from it on, against the returns of
others of the same start from the same turn on.

    G_{i,k} = sum_{l >= k} gamma^{l-k} r_{i,l}        A_{i,k} = G_{i,k} - mean over the others j of
                                                      G_{j, min(k, K_j)}

r_{i,l} is the reward of turn l, a KL penalty of its tokens included; K_j is the last turn of j. A
turn is not credited with what came before it (the reward-to-go form of the policy gradient, Sutton
et al. 1999).

The baseline takes every other member of the group, those that have finished with what their last
turn brought, and never the episode itself: so it depends on nothing the policy chose at turn k or
later, and the gradient stays unbiased. Two tempting variants are not: normalising each r_l over
those still talking at turn l and summing afterwards subtracts one baseline more for every further
turn, a hidden reward or fine for going on when the policy itself chooses when to stop; including
the episode itself shrinks what it did (tests/test_credit_methods.py computes both by enumeration).
With gamma 1 a constant added to all outcomes changes nothing.

With `baseline: none` there is nothing to compare with and single episodes train too; whitening in
the optimizer then gives REINFORCE++ (Hu 2025, arXiv:2501.03262) at turns. Truncated episodes count
with the rewards they had.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...learning import (
    Batch,
    Credit,
    apart,
    group_counts,
    group_largest,
    returns_to_go,
    spread_turns,
    turn_sums,
)
from ...protocols import CreditAssigner, Section


class TurnReturns(Section, CreditAssigner):
    """Credits a turn with the return from it on, against the group's from the same turn on.

    Attributes:
        gamma: discount per turn.
        baseline: "others" of the group, or "none".
    """

    called: ClassVar = "turn-returns"

    gamma: float = Field(default=1.0, ge=0, le=1)
    baseline: Literal["others", "none"] = "others"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The group, where others are the baseline."""
        return frozenset({"group"} if self.baseline == "others" else ())

    def assign(self, batch: Batch) -> Credit:
        """Credits each turn with its discounted return, or that less the others'."""
        penalty, _ = turn_sums(
            batch.token_rewards, batch.turn, batch.mask, batch.turn_mask.shape[1]
        )
        returns = returns_to_go(batch.turn_rewards + penalty, self.gamma)
        if self.baseline == "others":
            returns = against_others(returns, batch.turn_mask, batch.group)
        credit = returns * batch.turn_mask
        return Credit(spread_turns(credit, batch.turn, batch.mask), None, credit)


def against_others(returns: Tensor, turn_mask: Tensor, group: Tensor) -> Tensor:
    """Subtracts the mean of the other members' returns to go, [E, K]; 0 for an episode without
    others, and where the difference is only rounding.

    Args:
        returns: [E, K].
        turn_mask: [E, K] bool.
        group: [E] long.
    """
    exact = returns.double()
    last = (turn_mask.sum(1) - 1).clamp(min=0)
    turns = torch.arange(returns.shape[1], device=returns.device).minimum(last.unsqueeze(1))
    carried = exact.gather(1, turns)  # finished members keep the return of their last turn
    groups = int(group.max()) + 1
    sums = exact.new_zeros(groups, returns.shape[1]).index_add_(0, group, carried)
    others = (group_counts(group, groups)[group] - 1).unsqueeze(1)
    baseline = (sums[group] - carried) / others.clamp(min=1)
    return torch.where(
        others == 0, 0.0, apart(exact, baseline, group_largest(exact, group).unsqueeze(1))
    ).to(returns.dtype)
