"""The built-in backend, which samples replies for a policy.

It runs the model in process and keeps the KV cache across turns. What conversations begin with in
common is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import NonFiniteError
from ..records.sampling import Conversation, Sample, Sampling
from ..tensors import fetched, finest, sample_tokens, sent
from .cache import CachedModel
from .chat import ChatFormat
from .network import Network
from .prefixes import waves

PADDING = 0.13  # of the tokens of a prefill call, at most
JOIN = 8  # tokens after which conversations that arrived are looked for


@dataclass(slots=True)
class _Growing:
    """A reply that is being sampled: of which conversation, how many tokens it may have, a uniform
    number for each, and what it has so far."""

    conversation: Conversation
    limit: int
    noise: list[float]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class SampledPolicy(Protocol):
    """The part of a policy that sampling needs."""

    @property
    def network(self) -> Network:
        """The network around the model."""

    @property
    def chat(self) -> ChatFormat:
        """The format that renders conversations as ids."""

    @property
    def context_length(self) -> int:
        """The most tokens the model may read."""

    def autocast(self) -> Any:
        """Returns the context that sets the precision of forward passes."""

    def whole(self) -> Any:
        """Returns the context in which this process has all weights."""


class InProcess:
    """A backend that samples with the policy's own model.

    Noise is one uniform number per token from a generator seeded by the conversation's turn, so a
    reply depends on its own context and seed and not on what else is in the batch (up to rounding).

    Args:
        policy: whose model to run.
        rows: conversations alive at a time, at most; more are faster and take more memory.
        prefill_tokens: the most tokens one prefill call takes.
        compile: decodes with a model that torch has compiled, which takes minutes at first; on CPUs
            it gains little.
    """

    def __init__(
        self,
        policy: SampledPolicy,
        rows: int = 128,
        prefill_tokens: int = 8192,
        compile: bool = False,
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        self.policy, self.rows, self.prefill_tokens = policy, rows, prefill_tokens
        with policy.whole():
            self._model = CachedModel(policy.network, compile)
        self._held: dict[int, Sequence[int]] = {}  # the tokens that rows of the cache hold
        self._weights: tuple[tuple[int, int], ...] = ()  # which ones they were computed with

    @property
    def masks(self) -> str:
        """The way of masking that reproduces this model's plain forward pass, see
        `CachedModel.STYLES`."""
        return self._model.style

    def refresh(self) -> None:
        """Forgets the cache and frees its memory: the weights changed, or play is over."""
        self._model.reset()
        self._held.clear()

    def reply(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        arriving: Callable[[], Sequence[Conversation]] = tuple,
    ) -> Iterator[tuple[Conversation, Sample]]:
        """Yields every conversation with its sampled reply, when it ends; those that arrive
        meanwhile join the batch between two tokens.

        Raises:
            NonFiniteError: the model's logits are NaN or infinite; the message names the
                conversation.
        """
        weights = tuple((id(p), p._version) for p in self.policy.network.parameters())
        if weights != self._weights:  # changed without a `refresh`
            self.refresh()
            self._weights = weights
        try:
            yield from self._replies(conversations, sampling, arriving)
        except BaseException:
            self.refresh()  # what is half fed, or not finite, is read by no other conversation
            raise

    def _replies(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        arriving: Callable[[], Sequence[Conversation]],
    ) -> Iterator[tuple[Conversation, Sample]]:
        replies: list[_Growing] = []
        new, step = conversations, 0
        while new or replies:
            joining = [self._begin(c, sampling) for c in sorted(new, key=lambda c: c.row)]
            logits = self._next(replies, [each.conversation for each in joining])
            replies += joining
            tokens, logprobs = self._draw(logits, replies, sampling.temperature)
            going = []
            for each, token, logprob in zip(replies, tokens, logprobs, strict=True):
                each.ids.append(token)
                each.logprobs.append(logprob)
                if token not in self.policy.chat.stop_ids and len(each.ids) < each.limit:
                    going.append(each)
                    continue
                own = each.conversation
                self._held[own.row] = [*own.ids, *each.ids][: own.cached]
                cut = token not in self.policy.chat.stop_ids
                yield own, Sample(tuple(each.ids), tuple(each.logprobs), cut)
            replies, step = going, step + 1
            new = arriving() if replies and step % JOIN == 0 else ()

    def _begin(self, conversation: Conversation, sampling: Sampling) -> _Growing:
        """Begins a reply, with noise for all tokens that it may have."""
        noise = np.random.Generator(np.random.Philox(conversation.seed))
        room = self.policy.context_length - len(conversation.ids)
        most = conversation.limit or sampling.max_new_tokens
        return _Growing(
            conversation,
            min(sampling.max_new_tokens, most, room),
            noise.random(sampling.max_new_tokens).tolist(),
        )

    def _next(self, replies: Sequence[_Growing], joining: Sequence[Conversation]) -> torch.Tensor:
        """Returns the logits of the next token of replies that go on and then of those that begin,
        [b, V]."""
        found = []
        with self.policy.autocast():
            if replies:
                own = [each.conversation for each in replies]
                found.append(
                    self._model.extend(
                        [c.row for c in own],
                        [c.cached for c in own],
                        [each.ids[-1:] for each in replies],
                    )
                )
                for c in own:
                    c.cached += 1
            if joining:
                found.append(self._prefill(joining))
        return torch.cat(found)

    def _draw(
        self, logits: torch.Tensor, replies: Sequence[_Growing], temperature: float
    ) -> tuple[list[int], list[float]]:
        """Draws the next token of every reply. Returns the tokens and their log-probs."""
        noise = None
        if temperature:
            uniforms = [each.noise[len(each.ids)] for each in replies]
            noise = sent(torch.tensor(uniforms, dtype=finest(logits.device)), logits.device)
        found = sample_tokens(
            self.policy.network.only_tokens(logits.float()) / (temperature or 1.0), noise
        )
        drawn, chosen, finite = fetched(*found)
        if not all(finite):
            self._complain(replies[finite.index(0)].conversation)
        return [int(token) for token in drawn], chosen

    def _prefill(self, talks: Sequence[Conversation]) -> torch.Tensor:
        """Feeds the tokens that each conversation has and the cache has not; returns the logits
        after them, [b, V]."""
        if not all(len(c.ids) > c.cached for c in talks):
            raise ValueError("a conversation has nothing new to reply to")
        self._model.expect([c.row for c in talks])
        for c in talks:
            if c.row not in self._held:
                c.cached = 0  # the cache was forgotten
        new = [i for i, c in enumerate(talks) if not c.cached]
        planned = waves([talks[i].ids for i in new], [talks[i].row for i in new], self._held)
        for i in new:
            self._held.pop(talks[i].row, None)
        logits: list[Any] = [None] * len(talks)
        going_on = [i for i, c in enumerate(talks) if c.cached]
        for wave in planned:
            members = [new[m] for m in wave.members]
            for i, shared in zip(members, wave.shared, strict=True):
                if shared is not None:
                    row, talks[i].cached = shared
                    if row != talks[i].row:
                        self._model.copy(row, [talks[i].row], talks[i].cached)
            self._feed(talks, [*members, *going_on], logits)
            going_on = []
        self._feed(talks, going_on, logits)
        return torch.stack(logits)

    def _feed(self, talks: Sequence[Conversation], some: list[int], logits: list[Any]) -> None:
        """Feeds some conversations, those of like lengths together."""
        for chunk in self._chunks(talks, some):
            part = [talks[i] for i in chunk]
            found = self._model.extend(
                [c.row for c in part], [c.cached for c in part], [c.ids[c.cached :] for c in part]
            )
            for i, c, own in zip(chunk, part, found, strict=True):
                logits[i], c.cached = own, len(c.ids)
                self._held[c.row] = c.ids

    def _chunks(self, talks: Sequence[Conversation], some: list[int]) -> Iterator[list[int]]:
        """Yields conversations to be fed in one call: by length, so that little of it is
        padding."""
        size = {i: len(talks[i].ids) - talks[i].cached for i in some}
        chunk: list[int] = []
        real = 0
        for i in sorted(some, key=lambda i: -size[i]):
            width = size[chunk[0]] if chunk else size[i]
            whole = width * (len(chunk) + 1)
            padding = whole - real - size[i]
            if chunk and (whole > self.prefill_tokens or padding > PADDING * whole):
                yield chunk
                chunk, real = [], 0
            chunk.append(i)
            real += size[i]
        if chunk:
            yield chunk

    def _complain(self, conversation: Conversation) -> None:
        last = conversation.messages[-1].content[:200] if conversation.messages else ""
        raise NonFiniteError(
            "the policy's logits are not finite in a conversation of"
            f" {len(conversation.ids)} tokens that ends {last!r}. The weights are damaged: go back"
            " to the last checkpoint and lower the learning rate."
        )
