"""The built-in backend, which samples replies for a policy.

It runs the model in process and keeps the KV cache across turns. What conversations begin with in
common is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import NonFiniteError
from ..records.sampling import Conversation, Sample, Sampling
from ..tensors import sample_tokens
from .cache import CachedModel
from .chat import ChatFormat
from .network import Network
from .prefixes import waves

PADDING = 0.13  # of the tokens of a prefill call, at most


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


class InProcess:
    """A backend that samples with the policy's own model.

    Noise is one uniform number per token from a generator seeded by the conversation's turn, so a
    reply depends on its own context and seed and not on what else is in the batch (up to rounding).

    Args:
        policy: whose model to run.
        rows: conversations alive at a time, at most; more are faster and take more memory.
        prefill_tokens: the most tokens one prefill call takes.
    """

    def __init__(self, policy: SampledPolicy, rows: int = 128, prefill_tokens: int = 8192) -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        self.policy, self.rows, self.prefill_tokens = policy, rows, prefill_tokens
        self._model = CachedModel(policy.network)
        self._held: dict[int, Sequence[int]] = {}  # the tokens that rows of the cache hold
        self._weights: tuple[tuple[int, int], ...] = ()  # which ones they were computed with

    def refresh(self) -> None:
        """Forgets the cache and frees its memory: the weights changed, or play is over."""
        self._model.reset()
        self._held.clear()

    def reply(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Sample]:
        """Samples one reply per conversation.

        Raises:
            NonFiniteError: the model's logits are NaN or infinite; the message names the
                conversation.
        """
        weights = tuple((id(p), p._version) for p in self.policy.network.parameters())
        if weights != self._weights:  # changed without a `refresh`
            self.refresh()
            self._weights = weights
        try:
            return self._reply(conversations, sampling)
        except BaseException:
            self.refresh()  # what is half fed, or not finite, is read by no other conversation
            raise

    def _reply(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Sample]:
        order = sorted(range(len(conversations)), key=lambda i: conversations[i].row)
        talks = [conversations[i] for i in order]
        stops = self.policy.chat.stop_ids
        limit = self.policy.context_length
        budgets = [min(sampling.max_new_tokens, limit - len(c.ids)) for c in talks]
        noise = np.stack(
            [
                np.random.Generator(np.random.Philox(c.seed)).random(sampling.max_new_tokens)
                for c in talks
            ]
        )
        uniforms = torch.from_numpy(noise).to(self._model.device)
        ids: list[list[int]] = [[] for _ in talks]
        logprobs: list[list[float]] = [[] for _ in talks]

        active = list(range(len(talks)))
        with self.policy.autocast():
            logits = self._prefill(talks)
        step = 0
        while True:
            scaled = self.policy.network.only_tokens(logits.float()) / (sampling.temperature or 1.0)
            drawn, chosen, finite = sample_tokens(
                scaled, uniforms[active, step] if sampling.temperature else None
            )
            if not bool(finite.all()):
                self._complain(talks[active[int((~finite).nonzero()[0])]])
            going = []
            for i, token, logprob in zip(active, drawn.tolist(), chosen.tolist(), strict=True):
                ids[i].append(token)
                logprobs[i].append(logprob)
                if token not in stops and len(ids[i]) < budgets[i]:
                    going.append(i)
            step += 1
            if not going:
                break
            active = going
            with self.policy.autocast():
                logits = self._model.extend(
                    [talks[i].row for i in active],
                    [talks[i].cached for i in active],
                    [ids[i][-1:] for i in active],
                )
            for i in active:
                talks[i].cached += 1
        samples: list[Any] = [None] * len(talks)
        for i, place in enumerate(order):
            self._held[talks[i].row] = [*talks[i].ids, *ids[i]][: talks[i].cached]
            samples[place] = Sample(tuple(ids[i]), tuple(logprobs[i]), ids[i][-1] not in stops)
        return samples

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
