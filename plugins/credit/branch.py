"""The credit method `branch`: the change that a turn made in the expected outcome, estimated by
conversations that are continued from before it and from after it.

    V(s_k) = mean outcome of `rollouts` conversations continued from the start of turn k   A_k =
        V(s_{k+1}) - V(s_k)

VinePPO (Kazemnejad et al. 2024, arXiv:2410.01679, eq. 6) at the turns of a conversation instead of
the steps of a proof. The state after the last turn is worth the outcome itself, so the credit of an
episode sums to its outcome less the value of its start. It needs no critic and no group and is
unbiased, with the noise of `rollouts` samples on either side, and expensive: `rollouts`
conversations per turn. The engine plays them, by playing the recorded replies again, so the
environment must be a function of its seed and the replies.

Outcomes are whole ones, what came before the branch included. A KL penalty is charged to the turn
whose tokens cost it, and to no turn before it that led there.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ...learning import Batch, Credit, spread_turns, turn_advantages, turn_sums
from ...protocols import CreditAssigner, Section


class BranchCredit(Section, CreditAssigner):
    """Credits a turn with its change of the outcome expected from continued conversations.

    Attributes:
        rollouts: conversations continued from the start of every turn.
    """

    called: ClassVar = "branch"
    needs: ClassVar = frozenset({"branches"})

    rollouts: int = Field(default=8, ge=1)

    @property
    def branches(self) -> int:  # type: ignore[override]
        """How many conversations are continued from a turn."""
        return self.rollouts

    def assign(self, batch: Batch) -> Credit:
        """Credits each turn with the change of the branch values over it."""
        assert batch.branch_values is not None
        penalty, _ = turn_sums(
            batch.token_rewards, batch.turn, batch.mask, batch.turn_mask.shape[1]
        )
        credit = (
            turn_advantages(batch.branch_values, batch.outcome, batch.turn_mask)
            + penalty * batch.turn_mask
        )
        return Credit(spread_turns(credit, batch.turn, batch.mask), None, credit)
