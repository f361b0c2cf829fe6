"""`gae`: generalised advantage estimation over the action tokens of the whole conversation.

    delta_t = r_t + gamma * V_{t+1} - V_t        A_t = delta_t + gamma * lam * A_{t+1}        target_t = A_t + V_t

Schulman et al. 2015 (arXiv:1506.02438, eq. 16). t runs over the tokens the policy chose, from the first turn to the last;
observation tokens between turns are no steps, so they neither decay credit nor insert values. A turn's reward stands on its last
token. After the last token the state is worth 0 where the episode terminated, and the critic's value where it was truncated.
"""

from __future__ import annotations

from ...engine.learning import Batch, Credit
from ...engine.tensors import gae, place_turn_rewards, turn_sums


class GAE:
    """Args:
    gamma: discount per action token; 1 for dialogues, where a longer wording is not a later reward.
    lam: 1 is Monte Carlo minus baseline, 0 is one-step TD.
    """

    needs = frozenset({"values"})

    def __init__(self, gamma: float = 1.0, lam: float = 0.95) -> None:
        for name, value in (("gamma", gamma), ("lam", lam)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        self.gamma, self.lam = gamma, lam

    def assign(self, batch: Batch) -> Credit:
        assert batch.values is not None
        assert batch.bootstrap is not None
        rewards = batch.token_rewards + place_turn_rewards(batch.turn_rewards, batch.turn, batch.mask)
        bootstrap = batch.bootstrap * batch.truncated
        advantages, targets = gae(rewards, batch.values, batch.mask, bootstrap, self.gamma, self.lam)
        sums, counts = turn_sums(advantages, batch.turn, batch.mask, batch.turn_mask.shape[1])
        return Credit(advantages, targets, sums / counts.clamp(min=1))
