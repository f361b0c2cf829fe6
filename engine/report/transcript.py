"""Conversations as people read them."""

from __future__ import annotations

from ..records.episode import Episode, Message

SPEAKERS = {"system": "System", "user": "Customer", "assistant": "Agent", "tool": "Tool"}


def printable(text: str) -> str:
    """Returns text without control characters: models may emit them, and terminals obey them."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def transcript(episode: Episode, *, user: str = "Customer") -> str:
    """Returns an episode as Markdown: the speaker of each message, each turn's reward where there
    is one, and how it ended.

    Text is indented as code, so that nothing in it becomes markup.
    """
    names = {**SPEAKERS, "user": user}

    def passage(role: str, content: str) -> list[str]:
        return [
            f"**{names[role]}**",
            "",
            *(f"    {line}" for line in content.splitlines() or [""]),
            "",
        ]

    lines = passage("system", episode.system) if episode.system else []
    for turn in episode.turns:
        for message in (*turn.observation.speakers, Message("assistant", turn.action)):
            lines += passage(message.role, message.content)
        if turn.reward:
            lines += [f"*reward {turn.reward:g}*", ""]
    if episode.final:
        lines += passage(episode.final.role, episode.final.content)
    ended = episode.ending + (f": {episode.reason}" if episode.reason else "")
    return "\n".join([*lines, f"*{ended}; return {episode.env_return:g}*", ""])
