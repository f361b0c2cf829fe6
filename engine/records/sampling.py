"""Sampling settings, conversations and samples: the data that a backend receives and returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from .episode import Message


@dataclass(frozen=True, slots=True)
class Sampling:
    """The settings by which replies are drawn. No top-p or top-k: log-probs would not be those of
    the distribution sampled from.

    Attributes:
        temperature: divides the logits, in sampling and in training alike; 0 is greedy, for
            evaluation only.
        max_new_tokens: limit of one reply, its end token included.
    """

    temperature: float = 1.0
    max_new_tokens: int = 256


@dataclass(slots=True)
class Conversation:
    """A conversation being played. Its ids only ever grow, as long as `cached` is not 0.

    Attributes:
        row: a small number that no other living conversation has; a backend may keep state under
            it.
        ids: the whole context so far.
        messages: the same as text, for players that read text.
        seed: for the noise of the next reply.
        limit: how many tokens the next reply may have, where that is fewer than for others.
        cached: how many of `ids` the backend has processed; its own note. 0 when the conversation
            begins, or goes on in another context.
    """

    row: int
    ids: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    seed: int = 0
    limit: int | None = None
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """A sampled reply: ids with the stop token last, log-probs of the sampling distribution, and
    whether it was cut short."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    cut: bool
