"""Feedback to rewards: the combiner contract, and rankings to scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .episode import Episode
from .feedback import Comparison, Feedback


@dataclass(frozen=True, slots=True)
class Rewards:
    """The numbers an episode trains on.

    `turns` says when the reward arrives, `outcome` how much it is in all: they are two views of one sum, so that no
    credit method can count a reward twice. What is known only at the end stands on the last turn.

    Attributes:
        outcome: the whole episode's reward.
        turns: the reward at each turn; sums to `outcome`.
        turn_scores: raters' opinions of single turns (None: no opinion), for credit methods that need them; they are
            opinions, not rewards, and take no part in the sum.
        weight: how much the episode counts in the loss; below 1 where the outcome is uncertain.

    Raises:
        ValueError: a number that is not finite, a negative weight, or turns that do not sum to the outcome.
    """

    outcome: float
    turns: tuple[float, ...]
    turn_scores: tuple[float | None, ...] | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in (self.outcome, self.weight, *self.turns)) or self.weight < 0:
            raise ValueError(f"rewards must be finite: outcome {self.outcome}, turns {self.turns}")
        if not math.isclose(sum(self.turns), self.outcome, rel_tol=1e-6, abs_tol=1e-6):
            raise ValueError(f"turn rewards sum to {sum(self.turns)}, but the outcome is {self.outcome}")


@dataclass(frozen=True, slots=True)
class NoReward:
    """Why an episode cannot be rewarded. It leaves its group's baseline and never trains."""

    reason: str


def clipped(rewards: Rewards, limit: float) -> Rewards:
    """The same with its outcome kept within plus and minus the limit; what is cut off is taken from the last turn."""
    outcome = min(max(rewards.outcome, -limit), limit)
    turns = (*rewards.turns[:-1], rewards.turns[-1] + outcome - rewards.outcome)
    return Rewards(outcome, turns, rewards.turn_scores, rewards.weight)


@runtime_checkable
class Combiner(Protocol):
    """Makes rewards of a group's feedback; named in the config.

    A combiner that learns across groups (raters' reliability) also has `fit(feedback)`, called with all that is in force
    before `combine`, `state_dict()` and `load_state_dict(state)`.
    """

    def combine(self, group: Sequence[Episode], feedback: Sequence[Feedback | Comparison]) -> Sequence[Rewards | NoReward]:
        """One entry per episode of the group, in order.

        Args:
            group: the episodes that share a start; failed ones are already left out.
            feedback: everything that was said of them and of the group, in force (nothing superseded).
        """
        ...


def ranking_scores(comparison: Comparison) -> Mapping[str, float]:
    """A ranking with ties as numbers in [0, 1]: the share of the other ranked episodes that one beats, ties half.

    This is the normalised Borda count; the best of a strict ranking gets 1, the worst 0, and the mean is always 1/2.
    """
    count = sum(len(tier) for tier in comparison.ranking)
    scores: dict[str, float] = {}
    beaten = count
    for tier in comparison.ranking:
        beaten -= len(tier)
        for episode in tier:
            scores[episode] = (beaten + (len(tier) - 1) / 2) / (count - 1)
    return scores


def ranked_pairs(comparison: Comparison) -> list[tuple[str, str]]:
    """Every (better, worse) pair a ranking implies; tied episodes form none."""
    tiers = comparison.ranking
    return [(better, worse) for i, tier in enumerate(tiers) for lower in tiers[i + 1 :] for better in tier for worse in lower]
