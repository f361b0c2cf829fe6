"""Conversations in progress: where they are played, and where they branch off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..environments.conventions import Observation, SampledReply, Tokens
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


@dataclass(slots=True)
class Context:
    """What a policy reads: the conversation, or one of several that an environment leads.

    Attributes:
        system, tools: the system prompt and the schemas of tools that it began with.
        ids: its tokens.
        fresh: those since the last sampled one.
    """

    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    ids: list[int] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class LiveEpisode:
    """A conversation that is being played; where the environment has several seats, one of them.

    Attributes:
        index: its place among the episodes asked for; None: another's, which is not recorded.
        player: who replies.
        row: its place in what the player keeps.
        env: the environment, which the seats share.
        steps: asked of the environment so far; of several seats the first one counts.
        contexts: by number, in the order in which they were opened.
        context: the number of the one that the latest observation goes on in.
        limit: the most tokens that the next reply may have, where the environment says so.
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
    contexts: dict[int, Context] = field(default_factory=dict)
    context: int = 0
    limit: int | None = None
    state: Any = None  # what the player keeps: a backend's conversation
    steps: int = 0

    def enter(self, seen: Observation) -> None:
        """Goes on in the context that an observation is of, which it may open."""
        self.context, self.limit = seen.context, seen.max_new_tokens
        if seen.context not in self.contexts:
            self.contexts[seen.context] = Context(seen.system, seen.tools)

    @property
    def current(self) -> Context:
        """The context that the latest observation goes on in."""
        return self.contexts[self.context]

    @property
    def own_turns(self) -> list[Turn]:
        """The turns of the current context."""
        return [turn for turn in self.turns if turn.context == self.context]

    @property
    def messages(self) -> list[Message]:
        """The current context so far, the system prompt and the latest observation included."""
        system = self.current.system
        messages = [Message("system", system)] if system is not None else []
        for turn in self.own_turns:
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


def handed(live: LiveEpisode, before: Sequence[Turn], turn: Turn) -> str:
    """Returns a turn's reply as its environment receives it: as text, or with its tokens where it
    asks for them (`metadata["sampled"]`).

    Args:
        live: the conversation.
        before: the turns before it.
        turn: the turn.
    """
    if not live.env.metadata.get("sampled", False):
        return turn.action
    if turn.action_ids is None or turn.logprobs is None:
        return SampledReply(turn.action, None)
    whole = live.player.history == "rerender"
    earlier = [] if whole else [t for t in before if t.context == turn.context]
    read = sum(len(t.prompt_ids) + len(t.action_ids or ()) for t in earlier) + len(turn.prompt_ids)
    texts = live.player.pieces(turn.action_ids)
    return SampledReply(turn.action, Tokens(read, texts, turn.logprobs, turn.cut))


def spoken(live: LiveEpisode) -> list[Message]:
    """Returns the conversation so far without the system prompt."""
    return [m for m in live.messages if m.role != "system"]
