"""Takes out of conversations what must not be recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...protocols import Episode, Message, Turn


def clean_text(redact: Callable[[str], str], text: str) -> str:
    """Returns a text without what must not be recorded.

    Raises:
        TypeError: the function gave something else.
    """
    found = redact(text)
    if not isinstance(found, str):
        raise TypeError(f"it gave {type(found).__name__}, and must give a text")
    return found


def redacted(redact: Callable[[str], str], episode: Episode) -> Episode:
    """Returns an episode without what must not be recorded. Where that changes anything all turns
    lose their tokens, which would tell it."""

    def clean(message: Message) -> Message:
        parts = tuple(map(clean, message.parts))
        return Message(message.role, clean_text(redact, message.content), parts)

    system = None if episode.system is None else clean_text(redact, episode.system)
    cleaned = [(clean(t.observation), clean_text(redact, t.action)) for t in episode.turns]
    if system == episode.system and cleaned == [(t.observation, t.action) for t in episode.turns]:
        return episode
    turns = (
        Turn(observation, action, t.reward, policy_version=t.policy_version, cut=t.cut)
        for t, (observation, action) in zip(episode.turns, cleaned, strict=True)
    )
    return replace(episode, system=system, turns=tuple(turns))
