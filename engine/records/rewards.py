"""Rewards made of feedback, and rankings as scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .episode import Episode
from .feedback import Comparison, Feedback


@dataclass(frozen=True, slots=True)
class Rewards:
    """The numbers an episode trains on.

    `turns` says when the reward arrives, `outcome` how much it is in all: they are two views of one
    sum, so that no credit method can count a reward twice. What is known only at the end stands on
    the last turn.

    Attributes:
        outcome: the whole episode's reward.
        turns: the reward at each turn; sums to `outcome`.
        turn_scores: raters' opinions of single turns (None: no opinion), for credit methods that
            need them; they are opinions, not rewards, and take no part in the sum.
        weight: how much the episode counts in the loss; below 1 where the outcome is uncertain.

    Raises:
        ValueError: a number that is not finite, a negative weight, or turns that do not sum to the
            outcome.
    """

    outcome: float
    turns: tuple[float, ...]
    turn_scores: tuple[float | None, ...] | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if (
            not all(math.isfinite(value) for value in (self.outcome, self.weight, *self.turns))
            or self.weight < 0
        ):
            raise ValueError(f"rewards must be finite: outcome {self.outcome}, turns {self.turns}")
        # Of what was added up: large turns that cancel leave their rounding.
        size = max(map(abs, (self.outcome, *self.turns)))
        if abs(sum(self.turns) - self.outcome) > 1e-6 * size:
            raise ValueError(
                f"turn rewards sum to {sum(self.turns)}, but the outcome is {self.outcome}"
            )


@dataclass(frozen=True, slots=True)
class NoReward:
    """The reason why an episode cannot be rewarded. It leaves its group's baseline and never
    trains."""

    reason: str


def clipped(rewards: Rewards, limit: float) -> Rewards:
    """Returns the rewards with their outcome kept within plus and minus the limit; what is cut off
    is taken from the last turn."""
    outcome = min(max(rewards.outcome, -limit), limit)
    turns = (*rewards.turns[:-1], rewards.turns[-1] + outcome - rewards.outcome)
    return Rewards(outcome, turns, rewards.turn_scores, rewards.weight)


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimate of one episode's score from all its raters.

    Attributes:
        score: the higher the better; on the aggregator's own scale.
        sd: its posterior standard deviation, in the same unit.
        prior_sd: the standard deviation before any rating.
        raters: how many people the estimate rests on.

    Raises:
        ValueError: a number that is not finite, or a deviation that is negative.
    """

    score: float
    sd: float
    prior_sd: float
    raters: int

    def __post_init__(self) -> None:
        if (
            not all(map(math.isfinite, (self.score, self.sd, self.prior_sd)))
            or min(self.sd, self.prior_sd) < 0
        ):
            raise ValueError(
                f"an estimate must be finite, with deviations of at least 0: {self.score},"
                f" {self.sd}, {self.prior_sd}"
            )

    @property
    def reliability(self) -> float:
        """The share of the prior variance that the raters removed, in [0, 1]: 0 says nothing is
        known, 1 that all is."""
        return 1.0 - min((self.sd / self.prior_sd) ** 2, 1.0) if self.prior_sd > 0 else 0.0


@dataclass(frozen=True, slots=True)
class RaterEstimate:
    """An aggregator's estimate of one rater.

    Attributes:
        answers: how many of theirs it rests on.
        reliability: 1 is as good as the aggregator's ideal rater, 0 carries no information,
            negative is systematically opposite.
        reliability_sd: its posterior standard deviation; None where the aggregator does not
            estimate one.
        side: log-odds of choosing what is shown first (left, or on top) when both are equally good;
            None where it is not estimated.
        side_sd: its posterior standard deviation.
    """

    answers: int
    reliability: float
    reliability_sd: float | None = None
    side: float | None = None
    side_sd: float | None = None


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Estimates by episode id, and raters by name."""

    scores: Mapping[str, Estimate]
    raters: Mapping[str, RaterEstimate]


def ranking_scores(comparison: Comparison) -> Mapping[str, float]:
    """Returns a ranking with ties as numbers in [0, 1]: the share of the other ranked episodes that
    one beats, ties half.

    This is the normalised Borda count; the best of a strict ranking gets 1, the worst 0, and the
    mean is always 1/2.
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
    """Yields every (better, worse) pair a ranking implies; tied episodes form none."""
    tiers = comparison.ranking
    return [
        (better, worse)
        for i, tier in enumerate(tiers)
        for lower in tiers[i + 1 :]
        for better in tier
        for worse in lower
    ]


def overall(answer: Feedback) -> float | None:
    """Returns a rater's number for the whole episode: the score, or the mean of the aspects; None:
    scores of turns alone, or not scored."""
    if answer.score is not None:
        return answer.score
    return sum(answer.aspects.values()) / len(answer.aspects) if answer.aspects else None


def opinions(
    episode: Episode, answers: Iterable[Feedback | Comparison]
) -> tuple[float | None, ...] | None:
    """Returns the raters' mean score of each of an episode's turns (None: no opinion); None where
    no answer scores turns."""
    found = [
        a.turn_scores
        for a in answers
        if isinstance(a, Feedback) and a.episode == episode.id and a.turn_scores is not None
    ]
    if not found:
        return None
    means: list[float | None] = []
    for k in range(len(episode.turns)):
        numbers = [number for each in found if k < len(each) and (number := each[k]) is not None]
        means.append(sum(numbers) / len(numbers) if numbers else None)
    return tuple(means)


def silence(episode: Episode, answers: Sequence[Feedback | Comparison]) -> str | None:
    """Returns why these answers hold no number for an episode's outcome: "did not answer", "failed:
    timeout", "left it out", ...

    None where that is no fault: the episode's turns were scored, and of no other member of its
    group does an answer say more. Opinions of turns are all there is then, and no member is
    compared on other terms.

    Args:
        episode: the one whose outcome is missing.
        answers: of one source, or of some, on the episode's whole group; none of them gives the
            episode a number.
    """
    why, of_turns = "did not answer", False
    for answer in answers:
        if answer.target not in (episode.id, episode.group):
            continue
        if answer.status != "scored":
            why = f"{answer.status}: {answer.reason}"
        elif isinstance(answer, Comparison):
            why = "left it out"
        elif answer.turn_scores is not None:
            why, of_turns = "scored turns only, unlike others of its group", True
    alone = all(
        a.status != "scored" or (isinstance(a, Feedback) and overall(a) is None) for a in answers
    )
    return None if of_turns and alone else why
