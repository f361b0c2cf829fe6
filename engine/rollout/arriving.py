"""Brings an environment to the turn a conversation begins at: by reset, by replay, or from a
copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..environments.conventions import Observation
from .conversation import Branch, LiveEpisode, handed


class ConversationFailed(Exception):
    """A conversation ends as failed, for this reason."""


# A match asks for calls of its environment (a verb and its arguments), or for a reply in one of its
# conversations.
Call = tuple[Any, ...] | LiveEpisode


@dataclass(slots=True)
class States:
    """The states from which more than one conversation goes on: reached once and then copied, where
    the environment can be.

    Attributes:
        awaited: how many conversations still begin there.
        reaching: turns that a conversation is on the way to.
        alone: turns whose states turned out not to be copyable: each conversation replays its way
            there.
        copies: an environment's state and its observations, by turn.
    """

    awaited: Counter[tuple[str, int]]
    reaching: set[tuple[str, int]] = field(default_factory=set)
    alone: set[tuple[str, int]] = field(default_factory=set)
    copies: dict[tuple[str, int], tuple[Any, list[Observation]]] = field(default_factory=dict)


def arrive(live: LiveEpisode, known: States) -> Generator[Call, Any, Observation]:
    """Brings a conversation's environment to where it begins: by reset, by playing a branch's
    replies again, or from a copy. Returns what the reset gave."""
    branch = live.branch
    origin = branch.origin if branch else None
    seen: list[Observation] = []
    try:
        if origin in known.copies:
            state, seen = known.copies[origin]
            if (yield ("adopt", state)):
                live.steps = len(seen) - 1
            else:
                seen = []
        if not seen:
            seen = [(yield ("reset", live.start.seed, live.start.options))]
            prefix = branch.prefix if branch else ()
            for k, turn in enumerate(prefix):
                if seen[-1].terminated or seen[-1].truncated:
                    break
                seen.append((yield ("step", handed(live, prefix[:k], turn))))
            copyable = live.env.metadata.get("snapshots", False)
            if (
                copyable
                and origin is not None
                and known.awaited[origin] > 1
                and origin not in known.copies
            ):
                state = yield ("copied",)
                if state is not None:
                    known.copies[origin] = (state, seen)
    finally:
        if origin is not None:
            known.reaching.discard(origin)
            if origin not in known.copies:
                known.alone.add(origin)
            known.awaited[origin] -= 1
            if not known.awaited[origin]:
                known.copies.pop(origin, None)
    if branch and (why := differs(branch, seen)):
        raise ConversationFailed(why)
    for observation in seen:
        enter(live, observation)
    live.observation = seen[-1].message
    if branch:
        live.turns = list(branch.prefix)
    return seen[0]


def enter(live: LiveEpisode, seen: Observation) -> None:
    """Lets a conversation go on in the context that an observation is of.

    Raises:
        ConversationFailed: its number is not the next free one.
    """
    if seen.context > len(live.contexts):
        raise ConversationFailed(
            f"context: the environment opens context {seen.context}, and the next free number is"
            f" {len(live.contexts)}"
        )
    live.enter(seen)


def differs(branch: Branch, seen: Sequence[Observation]) -> str:
    """Returns how a replay differs from the conversation it branches off from; empty if it does
    not."""
    recorded = [turn.observation for turn in branch.parent.turns[: branch.turn + 1]]
    replayed = [observation.message for observation in seen]
    if replayed[: len(recorded)] == recorded and len(replayed) == branch.turn + 1:
        return ""
    same = next(
        (k for k, (a, b) in enumerate(zip(recorded, replayed, strict=False)) if a != b),
        min(len(recorded), len(replayed)),
    )
    return (
        f"replay: the same replies led to another observation at turn {same + 1}; an environment"
        " whose words depend on more than its seed and the replies cannot be branched"
    )
