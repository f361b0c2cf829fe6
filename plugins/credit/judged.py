"""The credit method `judged`: turns get the credit that a feedback source gives them.

Two readings of a turn's score s_k:

- "absolute": how good the reply was. Credit is s_k less the mean of all scored turns of the other
  conversations of the group.
- "delta": how well the conversation stands after it (prime-rl's `turn_credit`; with a potential,
  the shaping of Ng, Harada & Russell 1999). d_k = s_k - s_{k-1}, from `initial` on; a turn without
  a score passes the last score on. With `smear` g each delta is shared with the turns that prepared
  it: turn j <= k gets d_k g^{k-j} / sum_{i <= k} g^i, which biases the gradient. The credit of an
  episode sums to its last score less `initial`.

A score is an opinion and no reward: it is not part of the outcome. `outcome` adds so many times
what RLOO would give every turn, so that good marks alone are not the aim. A turn without a score
has no credit of its own in "absolute" (`credit/scored_turns` counts them). Sources that never score
a turn stop the run at its first update; an update in which they abstain throughout trains on the
outcome's part alone, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...learning import (
    Batch,
    Credit,
    apart,
    group_advantage,
    group_largest,
    spread_turns,
    turn_sums,
)
from ...protocols import ConfigError, CreditAssigner, Section


class Judged(Section, CreditAssigner):
    """Credits turns with the scores that feedback sources give them.

    Attributes:
        scores: "absolute" or "delta".
        initial: what a conversation is worth before the first turn, for "delta".
        smear: 0 keeps each delta where it arose; below 1.
        outcome: weight of the outcome's own advantage over the group.

    Raises:
        ConfigError: when credit is assigned and no source has ever scored a turn.
    """

    scores: Literal["absolute", "delta"] = "absolute"
    initial: float = 0.0
    smear: float = Field(default=0.0, ge=0, lt=1)
    outcome: float = 0.0

    _scored: bool = False

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Turn scores, and the group where conversations are compared."""
        alone = self.scores == "delta" and not self.outcome
        return frozenset({"turn_scores"} if alone else {"turn_scores", "group"})

    def assign(self, batch: Batch) -> Credit:
        """Credits each turn by its judged score: its change, or its distance from other
        conversations."""
        scores = batch.turn_scores
        self._scored = self._scored or scores is not None
        if not self._scored:
            raise ConfigError(
                "credit 'judged': none of the feedback sources scored a single turn (a rubric judge"
                " does with `per: reply`). Their Feedback needs `turn_scores`, one number (or None)"
                " per turn; credit 'outcome' needs none"
            )
        if scores is None:
            scores = torch.full(batch.turn_mask.shape, torch.nan)
        if self.scores == "delta":
            credit = smeared(score_deltas(scores, batch.turn_mask, self.initial), self.smear)
        else:
            credit = against_other_conversations(scores, batch.group)
        penalty, _ = turn_sums(
            batch.token_rewards, batch.turn, batch.mask, batch.turn_mask.shape[1]
        )
        credit = credit + penalty
        if self.outcome:
            credit = credit + self.outcome * group_advantage(
                batch.outcome, batch.group, "loo"
            ).unsqueeze(1)
        credit = credit * batch.turn_mask
        return Credit(spread_turns(credit, batch.turn, batch.mask), None, credit)

    def state_dict(self) -> dict[str, Any]:
        """Returns whether any turn was ever scored."""
        return {"heard": self._scored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up whether any turn was ever scored."""
        self._scored = bool(state["heard"])


def score_deltas(scores: Tensor, turn_mask: Tensor, initial: float) -> Tensor:
    """Returns the changes of the state score at each turn, [E, K]; they sum to the last score less
    `initial`, or to 0 without any.

    Args:
        scores: [E, K], NaN where a turn has no score.
        turn_mask: [E, K] bool.
        initial: the score before the first turn.
    """
    deltas = torch.zeros_like(scores)
    stands = torch.full_like(scores[:, 0], initial)
    for k in range(scores.shape[1]):
        scored = turn_mask[:, k] & ~scores[:, k].isnan()
        deltas[:, k] = torch.where(scored, scores[:, k] - stands, 0.0)
        stands = torch.where(scored, scores[:, k], stands)
    return deltas


def smeared(deltas: Tensor, smear: float) -> Tensor:
    """Shares each delta with the turns up to its own, by powers of `smear`; sums stay. [E, K] ->
    [E, K]."""
    turns = torch.arange(deltas.shape[1], dtype=deltas.dtype)
    back = turns.unsqueeze(1) - turns.unsqueeze(0)  # [k, j]
    share = torch.where(back >= 0, smear ** back.clamp(min=0), 0.0)
    return deltas @ (share / share.sum(1, keepdim=True))


def against_other_conversations(scores: Tensor, group: Tensor) -> Tensor:
    """Returns scores less the mean of all scored turns of the group's other episodes, [E, K]; 0
    where there is no score, or none in the other episodes."""
    scored = ~scores.isnan()
    sums, counts = scores.double().nan_to_num(0.0).sum(1), scored.sum(1)
    groups = int(group.max()) + 1
    others = sums.new_zeros(groups).index_add_(0, group, sums)[group] - sums
    many = counts.new_zeros(groups).index_add_(0, group, counts)[group] - counts
    credit = apart(
        scores, (others / many.clamp(min=1)).unsqueeze(1), group_largest(scores, group).unsqueeze(1)
    )
    return torch.where(scored & (many > 0).unsqueeze(1), credit, 0.0).to(scores.dtype)
