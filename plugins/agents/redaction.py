"""Takes out of conversations what must not be recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...protocols import Message, Turn


def redacted(
    redact: Callable[[str], str], turns: Sequence[Turn], system: str | None
) -> tuple[tuple[Turn, ...], str | None]:
    """Returns turns and the system prompt without what must not be recorded. Where that changes
    anything all turns lose their tokens, which would tell it."""

    def clean(message: Message) -> Message:
        parts = tuple(map(clean, message.parts))
        return Message(message.role, redact(message.content), parts)

    own = None if system is None else redact(system)
    cleaned = [(clean(t.observation), redact(t.action)) for t in turns]
    before = [(t.observation, t.action) for t in turns]
    if own == system and cleaned == before:
        return tuple(turns), system
    return tuple(
        Turn(observation, action, t.reward, policy_version=t.policy_version, cut=t.cut)
        for t, (observation, action) in zip(turns, cleaned, strict=True)
    ), own
