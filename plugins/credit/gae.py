"""The credit method `gae`: generalised advantage estimation with a critic, over tokens, turns or
both.

    delta_t = r_t + gamma * V_{t+1} - V_t
    A_t = delta_t + gamma * lam * A_{t+1}        target_t = A_t + V_t

Schulman et al. 2015 (arXiv:1506.02438, eq. 16). What a step is:

- "token": every token the policy chose, from the first turn to the last.
- "turn": every turn; V_k is the critic's value where the turn's first token was chosen, and all
  tokens of a turn share its advantage.
- "bilevel" (VAGEN, arXiv:2510.16907, section 3.3): first over turns, with V where each turn's last
  token was chosen, `turn_gamma` and `turn_lam`; then over the tokens inside each turn, which starts
  from the turn's advantage at its last token and never looks beyond it. Where the policy chooses
  where a turn ends, the place V is read at depends on the token chosen there: for `turn_lam` or
  `lam` below 1 the gradient is biased then, with an exact critic too (docs/credit.md).

Observation tokens are no steps: they neither decay credit nor insert values. Turns are the stored
ones, so one with reward 0 stays a turn. A turn's reward stands on its last token. After the last
step the state is worth 0 where the episode terminated, and the critic's value where it was
truncated.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from ...learning import (
    Batch,
    Credit,
    bilevel_gae,
    gae,
    place_turn_rewards,
    spread_turns,
    turn_edges,
    turn_sums,
)
from ...protocols import CreditAssigner, Section


class GAE(Section, CreditAssigner):
    """Computes advantages from a critic's values, per token, per turn, or both.

    Attributes:
        gamma: discount per token: in dialogues a longer wording is not a later reward.
        lam: 1 is Monte Carlo minus baseline, 0 is one-step TD.
        unit: "token", "turn" or "bilevel".
        turn_gamma, turn_lam: the same per turn.
    """

    needs: ClassVar = frozenset({"values"})

    gamma: float = Field(default=1.0, ge=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    unit: Literal["token", "turn", "bilevel"] = "token"
    turn_gamma: float = Field(default=1.0, ge=0, le=1)
    turn_lam: float = Field(default=0.95, ge=0, le=1)

    @model_validator(mode="after")
    def _used(self) -> Self:
        for name in sorted(self.model_fields_set - {"unit"}):
            if self.unit == ("turn" if not name.startswith("turn_") else "token"):
                other = f"turn_{name}" if self.unit == "turn" else name.removeprefix("turn_")
                raise ValueError(
                    f"{name} is not used with unit={self.unit!r}, it must be left out: {other} is"
                )
        return self

    def assign(self, batch: Batch) -> Credit:
        """Estimates advantages from the critic's values, over tokens, turns or both."""
        assert batch.values is not None
        assert batch.bootstrap is not None
        bootstrap, turns = batch.bootstrap * batch.truncated, batch.turn_mask.shape[1]
        rewards = batch.token_rewards + place_turn_rewards(
            batch.turn_rewards, batch.turn, batch.mask
        )
        if self.unit == "token":
            advantages, targets = gae(
                rewards, batch.values, batch.mask, bootstrap, self.gamma, self.lam
            )
        elif self.unit == "bilevel":
            advantages, targets = bilevel_gae(
                rewards, batch.values, batch.turn, batch.mask, bootstrap, turns,
                (self.gamma, self.lam), (self.turn_gamma, self.turn_lam),
            )  # fmt: skip
        else:
            earned, tokens = turn_sums(rewards, batch.turn, batch.mask, turns)
            first, _ = turn_edges(tokens)
            values = batch.values.gather(1, first) * (tokens > 0)
            per_turn, target = gae(
                earned, values, tokens > 0, bootstrap, self.turn_gamma, self.turn_lam
            )
            advantages = spread_turns(per_turn, batch.turn, batch.mask)
            targets = spread_turns(target, batch.turn, batch.mask)
        sums, counts = turn_sums(advantages, batch.turn, batch.mask, turns)
        return Credit(advantages, targets, torch.where(counts > 0, sums / counts.clamp(min=1), 0.0))
