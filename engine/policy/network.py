"""The forward pass: log-probs, entropies and hidden states at action tokens, in micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from ..errors import UnfitModel
from ..records.batch import Row
from ..tensors import log_softmax_at, sent
from .activations import recomputed
from .head import HeadLogprobs, chunks
from .prefixes import SHORTEST, alike
from .properties import (
    cache_argument,
    changes_logits,
    context_length,
    is_adapted,
    layer_kinds,
    longest_span,
    trunk,
)

PASS = 64  # tokens that could be computed in the time that a pass takes beyond its tokens
KEYS = 0.125  # share of what a token keeps for the gradient that its keys and values are, at most
LONGEST_TRIED = 128  # how far a sliding window may reach that is tried where a model is loaded


@dataclass(frozen=True, slots=True)
class Micro:
    """A micro-batch: some rows of a batch, padded, and where their action tokens are. B rows, L
    tokens, n action tokens.

    Attributes:
        ids: [B, L] long.
        row, position, target: [n] each: which row, which position in it, which token.
        episode, action: [n] each: where the token stands in the batch's [E, A].
        ends: [B] last position of each row.
        shared: the first tokens that all rows have in common and that are computed once; 0 where
            none are.
        recompute: layers are computed again for the gradient, and keep less.
        weight: 0 for a row repeated only so that every process runs the same number of forward
            passes, else 1.
    """

    ids: Tensor
    row: Tensor
    position: Tensor
    target: Tensor
    episode: Tensor
    action: Tensor
    ends: Tensor
    rows: tuple[Row, ...]
    shared: int = 0
    recompute: bool = False
    weight: float = 1.0

    def take(self, per_token: Tensor) -> Tensor:
        """Returns the entries of an [E, A] tensor at this micro-batch's action tokens, [n], on the
        model's device."""
        return per_token[self.episode, self.action].to(self.ids.device)


def divide(
    rows: Sequence[Row], tokens: int, device: torch.device, shares: bool = False
) -> list[Micro]:
    """Divides rows into padded micro-batches of at most `tokens` tokens (a single row may have
    more).

    Args:
        shares: what all rows of a micro-batch begin with alike is computed once. Rows stand
            together by length then, or by what they begin with, whichever computes less.
    """
    by_length = sorted(rows, key=lambda r: len(r.ids), reverse=True)
    parts = _parts(by_length, tokens, shares)
    if shares:
        by_beginning = _parts(sorted(by_length, key=_beginning), tokens, True)
        parts = min(parts, by_beginning, key=lambda ps: sum(p.computed + PASS for p in ps))
    return [micro_batch(part.rows, device, part.shared) for part in parts]


@dataclass(slots=True)
class _Part:
    """Rows of a micro-batch, the longest one's length, and how many tokens they share."""

    rows: list[Row]
    longest: int
    shared: int = 0

    @property
    def computed(self) -> int:
        """How many tokens a pass over the rows computes, padding included."""
        return self.shared + len(self.rows) * (self.longest - self.shared)

    @property
    def held(self) -> float:
        """How many tokens' memory it takes: every row has keys and values of what is shared."""
        return self.computed + KEYS * len(self.rows) * self.shared


def _parts(rows: Sequence[Row], tokens: int, shares: bool) -> list[_Part]:
    """Divides rows in their order: as many to each part as the tokens allow."""
    parts: list[_Part] = []
    for row in rows:
        joined = _joined(parts[-1], row, shares) if parts else None
        if joined is None or joined.held > tokens:
            parts.append(_Part([row], len(row.ids)))
        else:
            parts[-1] = joined
    return parts


def _joined(part: _Part, row: Row, shares: bool) -> _Part | None:
    """Returns a part with one more row, or None where the others would share so much less that it
    had better begin a part of its own."""
    longest, shared = max(part.longest, len(row.ids)), 0
    if shares:
        alone = len(_beginning(part.rows[0])) if len(part.rows) == 1 else part.shared
        shared = min(_alike(part.rows[0], row), alone, len(_beginning(row)))
        shared = shared if shared >= SHORTEST else 0
    joined = _Part([*part.rows, row], longest, shared)
    if part.shared and joined.computed > part.computed + max(len(row.ids), longest - part.shared):
        return None
    return joined


def _beginning(row: Row) -> tuple[int, ...]:
    """Returns the tokens of a row that nothing is predicted from, and that end before its end."""
    return row.ids[: row.positions[0] - 1] if row.positions else row.ids[:-1]


def _alike(one: Row, other: Row) -> int:
    return alike(np.asarray(one.ids), np.asarray(other.ids))


def micro_batch(rows: list[Row], device: torch.device, shared: int = 0) -> Micro:
    """Pads rows to one micro-batch on a device."""
    length = max(len(r.ids) for r in rows)
    ids = torch.tensor([[*r.ids, *([0] * (length - len(r.ids)))] for r in rows])
    row = torch.tensor([b for b, r in enumerate(rows) for _ in r.positions], dtype=torch.long)
    position = torch.tensor([p for r in rows for p in r.positions], dtype=torch.long)
    episode = torch.tensor([r.episode for r in rows for _ in r.positions], dtype=torch.long)
    action = torch.tensor([a for r in rows for a in r.actions], dtype=torch.long)
    ends = torch.tensor([len(r.ids) - 1 for r in rows])
    target = ids[row, position]
    ids, row, position, target, ends = (sent(t, device) for t in (ids, row, position, target, ends))
    return Micro(ids, row, position, target, episode, action, ends, tuple(rows), shared)


class Output(NamedTuple):
    """The network's output at the action tokens: log-probs and entropies [n], the hidden states
    they were predicted from [n, H], and the hidden state at the end of each row [B, H]."""

    logprobs: Tensor
    entropy: Tensor
    hidden: Tensor
    end_hidden: Tensor


class Network(nn.Module):
    """A module that computes everything an update needs in one forward call, so that wrappers like
    DDP see every parameter used.

    Args:
        model: a causal language model, with or without LoRA layers.
        tokens: ids that are tokens. Embeddings are often padded: the other ids are never sampled
            and have probability 0 in training. None: all are.

    Attributes:
        can_share: whether what rows begin with alike can be computed once.

    Raises:
        UnfitModel: its hidden states are not one vector per token, or it has none below its head.
    """

    def __init__(self, model: nn.Module, tokens: Collection[int] | None = None) -> None:
        super().__init__()
        self.model = model
        vocabulary = self.lm.get_input_embeddings().weight.shape[0]
        missing = sorted(set(range(vocabulary)).difference(tokens)) if tokens is not None else []
        self.missing = torch.tensor(missing)
        self.head_is_plain = self._head_is_plain()
        self.can_share = self.head_is_plain and self._can_share()

    @property
    def lm(self) -> Any:
        """The transformers model itself, with any LoRA layers in place."""
        model: Any = self.model
        return model.get_base_model() if is_adapted(model) else model

    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        """Returns whether logits are just the output embedding of the last hidden state (no soft
        cap, no scaling)."""
        lm = self.lm
        ids = torch.arange(
            min(4, lm.get_input_embeddings().weight.shape[0]), device=lm.device
        ).unsqueeze(0)
        training = lm.training
        logits = lm.eval()(input_ids=ids, use_cache=False).logits
        states = trunk(lm)(input_ids=ids, use_cache=False).last_hidden_state
        lm.train(training)
        if states.shape[:2] != ids.shape or states.ndim != 3:
            raise UnfitModel(
                f"{type(lm).__name__} has hidden states of shape {tuple(states.shape)} for"
                f" {ids.shape[1]} tokens; one vector per token is needed to train it"
            )
        if changes_logits(lm.config.get_text_config()):
            return False
        head = lm.get_output_embeddings()
        if head is None or head.weight.shape[1] != states.shape[2]:
            return False
        exact = logits.dtype in (torch.float32, torch.float64)
        return bool(
            torch.allclose(
                logits, head(states), atol=1e-5 if exact else 1e-1, rtol=1e-4 if exact else 1e-3
            )
        )

    @torch.no_grad()
    def _can_share(self) -> bool:
        """Returns whether states that follow kept keys and values are those of a pass over whole
        rows: tried, with more tokens than a short window reaches."""
        config = self.lm.config.get_text_config()
        if layer_kinds(config) - {"full_attention", "sliding_attention"}:
            return False
        vocabulary = self.lm.get_input_embeddings().weight.shape[0]
        length = min(min(longest_span(config), LONGEST_TRIED) + 16, context_length(config))
        ids = torch.arange(2 * length, device=self.lm.device).remainder(vocabulary).view(2, length)
        ids[:, : length // 2] = ids[0, : length // 2]
        plain = trunk(self.lm)(input_ids=ids, use_cache=False).last_hidden_state[:, length // 2 :]
        try:
            states = self._states(ids, length // 2)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError):
            return False  # it has a cache of its own
        exact = plain.dtype in (torch.float32, torch.float64)
        apart = float((states - plain).float().norm() / plain.float().norm())
        return apart < (1e-4 if exact else 0.02)

    def _states(self, ids: Tensor, shared: int) -> Tensor:
        """Returns the hidden states of rows from position `shared` on, [B, L - shared, H].

        What comes before is the same in all rows: one pass over it leaves its keys and values,
        which the gradient passes through like through anything else.
        """
        body = trunk(self.lm)
        if not shared:
            return body(input_ids=ids, use_cache=False).last_hidden_state
        cache = DynamicCache(config=self.lm.config)
        given = {cache_argument(body): cache, "use_cache": True}
        body(input_ids=ids[:1, :shared], **given)
        cache.batch_repeat_interleave(len(ids))
        return body(input_ids=ids[:, shared:], **given).last_hidden_state

    def only_tokens(self, logits: Tensor) -> Tensor:
        """Returns logits [..., V] in which ids that are no token have no chance."""
        if not len(self.missing):
            return logits
        return logits.index_fill(-1, self.missing.to(logits.device), torch.finfo(logits.dtype).min)

    def forward(
        self,
        ids: Tensor,
        row: Tensor,
        position: Tensor,
        target: Tensor,
        ends: Tensor,
        temperature: float,
        shared: int = 0,
        recompute: bool = False,
    ) -> Output:
        """Runs the model over padded rows. Right padding needs no mask: causal attention never
        looks ahead."""
        if self.head_is_plain:
            with recomputed(self.lm) if recompute else contextlib.nullcontext():
                states = self._states(ids, shared)
            hidden = states[row, position - 1 - shared]
            logprobs, entropy = self._head(hidden, target, temperature)
        else:
            with recomputed(self.lm) if recompute else contextlib.nullcontext():
                states, logits = self._row_by_row(ids, row, position)
            hidden = states[row, position - 1]
            logprobs, entropy = log_softmax_at(self.only_tokens(logits / temperature), target)
        return Output(
            logprobs,
            entropy,
            hidden,
            states[torch.arange(len(ids), device=ids.device), ends - shared],
        )

    def _head(self, hidden: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        head = self.lm.get_output_embeddings()

        def score(part: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.only_tokens(head(part))
            return log_softmax_at(logits / temperature if temperature != 1.0 else logits, wanted)

        parts = list(chunks(len(target), head.weight.shape[0]))
        if len(parts) <= 1:
            return score(hidden, target)  # small enough to keep its logits for the gradient
        if type(head) is nn.Linear:
            missing = self.missing.to(hidden.device)
            return HeadLogprobs.apply(hidden, head.weight, head.bias, target, temperature, missing)
        # LoRA layers in the head
        found = [
            checkpoint(score, hidden[part], target[part], use_reentrant=False)
            if torch.is_grad_enabled()
            else score(hidden[part], target[part])
            for part in parts
        ]
        return torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])

    def _row_by_row(self, ids: Tensor, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the model's own forward for models that change their logits, keeping action
        positions only."""
        states: list[Tensor] = []
        logits = []
        hook = trunk(self.lm).register_forward_hook(
            lambda _, __, out: states.append(out.last_hidden_state)
        )
        try:
            for b in range(len(ids)):
                keep = position[row == b] - 1
                out = self.lm(input_ids=ids[b : b + 1], use_cache=False, logits_to_keep=keep)
                logits.append(out.logits[0])
        finally:
            hook.remove()
        return torch.cat(states), torch.cat(logits)
