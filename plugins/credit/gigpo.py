"""The credit method `gigpo`: the episode against its group, and each turn against other turns taken
in the same state.

    A_i     = R_i - mean of the group                                     (as `outcome`)
    A_{i,k} = G_{i,k} - mean over all turns of the group in that state   G_{i,k} = sum_{l >= k}
        gamma^{l-k} r_{i,l}
    credit  = A_i + omega * A_{i,k}

Feng et al. 2025 (arXiv:2505.10978, eq. 6 to 8), with its `mean` normalisation or `std`. Two turns
are in the same state (the same anchor) when their observations are alike: exactly, or by
`similarity` of their characters. A state met once has nothing to be compared with and adds 0. A
state's mean holds the turn itself, and how often it is met depends on the replies: the gradient is
biased. It needs no further play, but states that recur: in an open conversation there are none and
what is left is `outcome`. Only the last observation counts: where it does not say all (MazePO, a
bare "Yes."), different states are taken for one. gamma below 1 tells turns apart that lead to the
same end sooner or later. A KL penalty of its tokens is part of a turn's reward.
"""

from __future__ import annotations

import difflib
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...learning import Batch, Credit, group_advantage, returns_to_go, spread_turns, turn_sums
from ...protocols import CreditAssigner, Section


class GiGPO(Section, CreditAssigner):
    """Credits an episode against its group, and its turns against others in the same state.

    Attributes:
        omega: weight of the comparison of turns.
        gamma: discount per turn in it.
        similarity: share of characters (difflib's ratio) from which two observations count as one
            state; None: only equal ones.
        baseline: "mean", or "std": also divided by the standard deviation of what is compared.
    """

    needs: ClassVar = frozenset({"group"})

    omega: float = 1.0
    gamma: float = Field(default=0.95, ge=0, le=1)
    similarity: float | None = Field(default=None, gt=0, le=1)
    baseline: Literal["mean", "std"] = "mean"

    def assign(self, batch: Batch) -> Credit:
        """Credits each turn with the episode's group advantage plus `omega` times that among turns
        from the same state."""
        penalty, _ = turn_sums(
            batch.token_rewards, batch.turn, batch.mask, batch.turn_mask.shape[1]
        )
        here = batch.turn_mask
        state = self.states(batch)[here]
        local = torch.zeros_like(penalty)
        local[here] = group_advantage(
            returns_to_go(batch.turn_rewards, self.gamma)[here], state, self.baseline
        )
        local[here] += group_advantage(
            returns_to_go(penalty, self.gamma)[here], state, "mean"
        )  # never divided, as in `outcome`
        whole = group_advantage(batch.outcome, batch.group, self.baseline)
        whole = whole + group_advantage(penalty.sum(1), batch.group, "mean")
        credit = (whole.unsqueeze(1) + self.omega * local) * batch.turn_mask
        return Credit(spread_turns(credit, batch.turn, batch.mask), None, credit)

    def states(self, batch: Batch) -> Tensor:
        """Returns [E, K] long: a number for every anchor state of a group; -1 at padding."""
        groups = batch.group.tolist()
        contents = [
            (g, t.observation.content)
            for g, e in zip(groups, batch.episodes, strict=True)
            for t in e.turns
        ]
        anchors: dict[int, list[str]] = {}
        anchor: dict[tuple[int, str], tuple[int, str]] = {}
        # Sorted, so that the order of the batch does not matter.
        for group, text in sorted(set(contents)):
            same = None
            if self.similarity is not None:
                same = next((a for a in anchors.get(group, ()) if self._alike(a, text)), None)
            if same is None:
                anchors.setdefault(group, []).append(text)
            anchor[group, text] = (group, same if same is not None else text)
        number = {key: n for n, key in enumerate(dict.fromkeys(anchor[key] for key in contents))}
        state = torch.full(batch.turn_mask.shape, -1)
        state[batch.turn_mask] = torch.tensor([number[anchor[key]] for key in contents])
        return state

    def _alike(self, one: str, other: str) -> bool:
        match = difflib.SequenceMatcher(None, one, other, autojunk=False)
        assert self.similarity is not None
        return match.quick_ratio() >= self.similarity and match.ratio() >= self.similarity
