"""What one update of `rl` is made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...records.episode import Episode
from ...records.feedback import Answer
from ...records.rewards import NoReward, Rewards
from ...records.starts import StartNumber


@dataclass(slots=True)
class Experience:
    """Holds the conversations that an update collects, the feedback on them, and their rewards.

    Attributes:
        progress: fields of the progress display.
        numbers: the number of every start, by its key.
        rewards: by episode id.
        feedback: by group.
        metrics: of how the conversations came about.
        play_seconds, feedback_seconds: time spent, continuations of branches included.
        spend: cost of the feedback.
        answers: how many, by status.
    """

    progress: Mapping[str, int]
    numbers: dict[str, StartNumber] = field(default_factory=dict)
    episodes: list[Episode] = field(default_factory=list)
    rewards: dict[str, Rewards | NoReward] = field(default_factory=dict)
    feedback: dict[str, list[Answer]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    play_seconds: float = 0.0
    feedback_seconds: float = 0.0
    spend: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)

    def add(
        self,
        episodes: Sequence[Episode],
        rewards: Mapping[str, Rewards | NoReward],
        feedback: Mapping[str, list[Answer]],
    ) -> None:
        """Adds episodes whose feedback is complete."""
        self.episodes += episodes
        self.rewards |= rewards
        self.feedback |= feedback
        self.spend += sum(answer.stamp.cost for answers in feedback.values() for answer in answers)
        self.answers.update(answer.status for answers in feedback.values() for answer in answers)

    def add_costs(self, other: Experience) -> None:
        """Adds what other conversations took, which train nothing: time, money, and answers by
        status."""
        self.play_seconds += other.play_seconds
        self.feedback_seconds += other.feedback_seconds
        self.spend += other.spend
        self.answers += other.answers
