"""The built-in backend, which samples replies for a policy.

It runs the model in process and keeps the KV cache across turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import NonFiniteError
from ..records.sampling import Conversation, Sample, Sampling
from ..tensors import sample_inverse_cdf
from .cache import CachedModel
from .chat import ChatFormat
from .network import Network


class SampledPolicy(Protocol):
    """The part of a policy that sampling needs."""

    @property
    def model(self) -> Any:
        """The transformers model."""

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
        rows: conversations alive at a time; more are faster and take more memory.
        prefill_tokens: the most tokens one prefill call takes.
    """

    def __init__(self, policy: SampledPolicy, rows: int = 128, prefill_tokens: int = 8192) -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        self.policy, self.rows, self.prefill_tokens = policy, rows, prefill_tokens
        self._model = CachedModel(policy.model, rows)

    def refresh(self) -> None:
        """Forgets the cache, after the weights changed."""
        self._model.reset()

    def reply(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Sample]:
        """Samples one reply per conversation.

        Raises:
            NonFiniteError: the model's logits are NaN or infinite; the message names the
                conversation.
        """
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
            if not bool(torch.isfinite(scaled.logsumexp(-1)).all()):
                bad = int((~torch.isfinite(scaled.logsumexp(-1))).nonzero()[0])
                self._complain(talks[active[bad]])
            tokens = (
                sample_inverse_cdf(scaled, uniforms[active, step])
                if sampling.temperature
                else scaled.argmax(-1)
            )
            chosen = (
                torch.log_softmax(scaled, -1).gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
            )
            drawn = tokens.tolist()
            going = []
            for i, token, logprob in zip(active, drawn, chosen, strict=True):
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
            samples[place] = Sample(tuple(ids[i]), tuple(logprobs[i]), ids[i][-1] not in stops)
        return samples

    def _prefill(self, talks: Sequence[Conversation]) -> Any:
        """Feeds the tokens that each conversation has and the cache has not; returns the logits
        after them, [b, V]."""
        chunks: list[list[int]] = [[]]
        for i, conversation in enumerate(talks):
            width = max(len(talks[j].ids) - talks[j].cached for j in [*chunks[-1], i])
            if chunks[-1] and width * (len(chunks[-1]) + 1) > self.prefill_tokens:
                chunks.append([])
            chunks[-1].append(i)
            if not conversation.ids[conversation.cached :]:
                raise ValueError("a conversation has nothing new to reply to")
        logits = []
        for chunk in chunks:
            part = [talks[i] for i in chunk]
            logits.append(
                self._model.extend(
                    [c.row for c in part],
                    [c.cached for c in part],
                    [c.ids[c.cached :] for c in part],
                )
            )
            for c in part:
                c.cached = len(c.ids)
        return torch.cat(logits)

    def _complain(self, conversation: Conversation) -> None:
        last = conversation.messages[-1].content[:200] if conversation.messages else ""
        raise NonFiniteError(
            "the policy's logits are not finite in a conversation of"
            f" {len(conversation.ids)} tokens that ends {last!r}. The weights are damaged: go back"
            " to the last checkpoint and lower the learning rate."
        )
