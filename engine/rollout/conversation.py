"""Conversations in progress: where they are played, and where they branch off."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..environments.conventions import Observation
from ..environments.instance import Instance
from ..records.episode import Episode, Message, Start, Turn
from ..util.ids import derive_id


@dataclass(frozen=True, slots=True)
class Where:
    """The place in a run where episodes are played; their ids and their noise derive from it."""

    run: str = ""
    stage: str = ""
    update: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Branch:
    """A point from which a conversation is continued again: its first `turn` turns are replayed,
    token for token, then the player goes on."""

    parent: Episode
    turn: int

    @property
    def origin(self) -> tuple[str, int]:
        """The id of the conversation and the turn it branches off at."""
        return (self.parent.id, self.turn)

    @property
    def prefix(self) -> tuple[Turn, ...]:
        """The turns that are replayed."""
        return self.parent.turns[: self.turn]


def episode_id(where: Where, start: Start | Branch, slot: int) -> str:
    """Returns the id of the episode played there from this start or branch, in this slot of its
    group."""
    key = start.key if isinstance(start, Start) else start.origin
    return derive_id(where.run, where.stage, where.update, key, slot)


@dataclass(slots=True, eq=False)
class LiveEpisode:
    """A conversation that is being played; where the environment has several seats, one of them.

    Attributes:
        index: its place among the episodes asked for; None: another's, which is not recorded.
        player: who replies.
        row: its place in what the player keeps.
        env: the environment, which the seats share.
        steps: asked of the environment so far; of several seats the first one counts.
    """

    index: int | None
    start: Start
    slot: int
    player: Any
    row: int
    env: Instance
    branch: Branch | None = None
    observation: Message | None = None
    turns: list[Turn] = field(default_factory=list)
    reset: Observation | None = None
    ids: list[int] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)  # ids since the last sampled token
    state: Any = None  # what the player keeps: a backend's conversation
    steps: int = 0

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, the system prompt and the latest observation included."""
        assert self.reset is not None
        messages = [Message("system", self.reset.system)] if self.reset.system is not None else []
        for turn in self.turns:
            messages += [turn.observation, Message("assistant", turn.action)]
        return [*messages, self.observation] if self.observation else messages


@dataclass(frozen=True, slots=True)
class Reply:
    """A player's reply to one conversation; None as `text`: it cannot go on, because of `stop`
    ("context"), and perhaps `failed`."""

    text: str | None
    prompt_ids: tuple[int, ...] = ()
    action_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    version: int = 0
    cut: bool = False
    stop: str = ""
    failed: bool = False


def spoken(live: LiveEpisode) -> list[Message]:
    """Returns the conversation so far without the system prompt."""
    return [m for m in live.messages if m.role != "system"]
