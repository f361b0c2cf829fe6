"""The parts of an RL stage, and what one update collects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...feedback.sources import Sources
from ...protocols import RunView
from ...records.episode import Episode
from ...records.feedback import Answer
from ...records.rewards import NoReward, Rewards


@dataclass(slots=True)
class Parts:
    """The swappable parts of one RL stage."""

    optimizer: Any
    credit: Any
    sources: list[Sources]  # one per environment of the mixture
    combiners: list[Any]


@dataclass(slots=True)
class Experience:
    """What an update plays and hears: the conversations, what was said of them, and their rewards."""

    run: RunView
    parts: Parts
    player: Any
    show: dict[str, int]
    env_of: dict[str, int]  # which environment of the mixture a start is of
    episodes: list[Episode] = field(default_factory=list)
    rewards: dict[str, Rewards | NoReward] = field(default_factory=dict)
    said: dict[str, list[Answer]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # of how it came about
    played: float = 0.0  # seconds, continuations included
    heard: float = 0.0
    spend: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)  # by status

    def add(
        self, episodes: Sequence[Episode], rewards: Mapping[str, Rewards | NoReward], said: Mapping[str, list[Answer]]
    ) -> None:
        """Conversations of which all was said."""
        self.episodes += episodes
        self.rewards |= rewards
        self.said |= said
        self.spend += sum(a.stamp.cost for each in said.values() for a in each)
        self.answers.update(a.status for each in said.values() for a in each)
