"""`gigpo`: the episode against its group, and each turn against other turns that were taken in the same state.

    A_i     = R_i - mean of the group                                     (as `outcome`)
    A_{i,k} = G_{i,k} - mean over all turns of the group in that state    G_{i,k} = sum_{l >= k} gamma^{l-k} r_{i,l}
    credit  = A_i + omega * A_{i,k}

Feng et al. 2025 (arXiv:2505.10978, eq. 6 to 8), with its `mean` normalisation or `std`. Two turns are in the same state (the same anchor)
when their observations are alike: exactly, or by `similarity` of their characters. A state met once has nothing to be compared with
and adds 0. It needs no further play, but states that recur: in an open conversation there are none and what is left is `outcome`.
gamma below 1 tells turns apart that lead to the same end sooner or later. A KL penalty of its tokens is part of a turn's reward.
"""

from __future__ import annotations

import difflib
from typing import Literal

import torch
from torch import Tensor

from ...engine.learning import Batch, Credit
from ...engine.tensors import group_advantage, returns_to_go, spread_turns, turn_sums


class GiGPO:
    """Args:
    omega: weight of the comparison of turns.
    gamma: discount per turn in it.
    similarity: share of characters (difflib's ratio) from which two observations count as one state; None: only equal ones.
    baseline: "mean", or "std": also divided by the standard deviation of what is compared.
    """

    needs = frozenset({"group"})

    def __init__(
        self,
        omega: float = 1.0,
        gamma: float = 0.95,
        similarity: float | None = None,
        baseline: Literal["mean", "std"] = "mean",
    ) -> None:
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be between 0 and 1, got {gamma}")
        if similarity is not None and not 0 < similarity <= 1:
            raise ValueError(f"similarity must be above 0 and at most 1, got {similarity}")
        if baseline not in ("mean", "std"):
            raise ValueError(f"baseline must be 'mean' or 'std', got {baseline!r}")
        self.omega, self.gamma, self.similarity, self.baseline = omega, gamma, similarity, baseline

    def assign(self, batch: Batch) -> Credit:
        penalty, _ = turn_sums(batch.token_rewards, batch.turn, batch.mask, batch.turn_mask.shape[1])
        returns = returns_to_go(batch.turn_rewards + penalty, self.gamma)
        state = self.states(batch)
        local = torch.zeros_like(returns)
        local[batch.turn_mask] = group_advantage(returns[batch.turn_mask], state[batch.turn_mask], self.baseline)
        whole = group_advantage(batch.outcome, batch.group, self.baseline)
        whole = whole + group_advantage(penalty.sum(1), batch.group, "mean")
        credit = (whole.unsqueeze(1) + self.omega * local) * batch.turn_mask
        return Credit(spread_turns(credit, batch.turn, batch.mask), None, credit)

    def states(self, batch: Batch) -> Tensor:
        """[E, K] long: a number for every anchor state of a group; -1 at padding."""
        found: dict[tuple[int, str], int] = {}
        anchors: dict[int, list[str]] = {}
        state = torch.full(batch.turn_mask.shape, -1)
        for e, episode in enumerate(batch.episodes):
            group = int(batch.group[e])
            for k, turn in enumerate(episode.turns):
                text = turn.observation.content
                if (group, text) not in found and self.similarity is not None:
                    text = next((a for a in anchors.get(group, ()) if self._alike(a, text)), text)
                if (group, text) not in found:
                    found[group, text] = len(found)
                    anchors.setdefault(group, []).append(text)
                state[e, k] = found[group, text]
        return state

    def _alike(self, one: str, other: str) -> bool:
        match = difflib.SequenceMatcher(None, one, other, autojunk=False)
        assert self.similarity is not None
        return match.quick_ratio() >= self.similarity and match.ratio() >= self.similarity
