"""A KV cache for conversations of uneven length: the slot of a token is its position.

Masks and sliding windows of unmodified transformers models count cache slots, so a cache with holes
(right padding between turns) is silently wrong with sliding windows. Here row b's token at position
p stands in slot p: no holes, nothing to shift, a finished conversation's row is reused by starting
again at position 0. Padding is written to a scratch slot that no mask allows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import UnfitModel
from .properties import context_length, layer_kinds, longest_span, setting

GROWTH = 64  # slots are allocated in blocks of this many positions

# The kinds of attention that a config's `layer_types` may name, and where it says how far they
# reach.
TYPES = {
    "full_attention": "",
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}


@dataclass
class _Step:
    """The data that the layers of one forward call share."""

    rows: Tensor | None = None  # [b] cache rows, None: all in order
    slots: Tensor | None = None  # [b, q] where each token is written
    extent: int = 0  # the first slots, as many as the longest row has tokens


class SlotLayer(CacheLayerMixin):
    """A layer's keys and values [rows, heads, capacity + 1, dim]; the last slot is scratch."""

    is_sliding = False

    def __init__(self, rows: int, step: _Step) -> None:
        super().__init__()
        self.rows, self.step = rows, step

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes keys and values of one slot, the scratch one, in the states' type and place."""
        heads, dim = key_states.shape[1], key_states.shape[3]
        self.keys = key_states.new_zeros(self.rows, heads, 1, dim)
        self.values = value_states.new_zeros(self.rows, heads, 1, value_states.shape[3])
        self.is_initialized = True

    def _grow(self, extent: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        more = -(-(extent - self.keys.shape[2] + 1) // GROWTH) * GROWTH
        if more > 0:
            shape = list(self.keys.shape)
            shape[2] = more
            self.keys = torch.cat([self.keys, self.keys.new_zeros(shape)], 2)
            shape[3] = self.values.shape[3]
            self.values = torch.cat([self.values, self.values.new_zeros(shape)], 2)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes keys and values of new tokens to their slots; returns the step's rows of both, up
        to `extent`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._grow(self.step.extent)
        keys, values, rows, slots = self.keys, self.values, self.step.rows, self.step.slots
        assert keys is not None
        assert values is not None
        assert slots is not None
        slots = torch.where(slots < 0, keys.shape[2] - 1, slots)
        at = (torch.arange(self.rows, device=keys.device) if rows is None else rows).unsqueeze(1)
        keys[at, :, slots] = key_states.transpose(1, 2)
        values[at, :, slots] = value_states.transpose(1, 2)
        if rows is None:
            return keys[:, :, : self.step.extent], values[:, :, : self.step.extent]
        return keys[:, :, : self.step.extent].index_select(0, rows), values[
            :, :, : self.step.extent
        ].index_select(0, rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns how many slots a mask covers, and the first of them, 0."""
        return self.step.extent, 0

    def get_seq_length(self) -> int:
        """Returns how many tokens the longest row of the step has."""
        return self.step.extent

    def get_max_length(self) -> int:
        """Returns -1: there is no limit."""
        return -1


class CachedModel:
    """A causal language model with a slot cache, fed tokens row by row.

    Args:
        model: an unmodified transformers causal LM.
        rows: how many conversations are alive at a time.

    Raises:
        UnfitModel: no way of masking this model's attention reproduces its plain forward pass.
    """

    STYLES = ("typed", "windowed", "full")

    def __init__(self, model: Any, rows: int) -> None:
        self.model, self.config, self.rows = model, model.config.get_text_config(), rows
        self.device = model.get_input_embeddings().weight.device
        named = inspect.signature(model.forward).parameters
        # Newer transformers, and older ones.
        self._argument = "cache" if "cache" in named else "past_key_values"
        self.style = self._find_style()
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._step = _Step()
        layers: list[Any] = [
            SlotLayer(self.rows, self._step) for _ in range(self.config.num_hidden_layers)
        ]
        self._cache = Cache(layers=layers)

    def _mask(self, positions: Tensor, extent: int, kind: str) -> Tensor:
        """Returns [b, 1, q, extent], which slots each token may look at; at least one, so that
        padding gives no NaN."""
        slots = torch.arange(extent, device=positions.device)
        at = positions.clamp(min=0).unsqueeze(-1)
        allowed = slots <= at
        reach = setting(self.config, TYPES[kind]) if TYPES[kind] else None
        if reach is not None and kind == "sliding_attention":
            allowed &= slots > at - reach
        elif reach is not None:
            allowed &= slots // reach == at // reach
        if self.model.config._attn_implementation == "eager":
            dtype = self.model.dtype
            return (
                torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
                .masked_fill_(~allowed, torch.finfo(dtype).min)
                .unsqueeze(1)
            )
        return allowed.unsqueeze(1)

    @torch.no_grad()
    def extend(
        self, rows: Sequence[int], lengths: Sequence[int], feeds: Sequence[Sequence[int]]
    ) -> Tensor:
        """Feeds each row its new tokens and returns the logits after the last one, [b, V].

        Args:
            rows: cache rows, distinct, ascending.
            lengths: how many tokens each row holds already (0 starts it over).
            feeds: at least one new token per row.
        """
        width = max(map(len, feeds))
        b = len(rows)
        fed = torch.tensor([len(f) for f in feeds])
        if width == 1:
            ids = torch.tensor(feeds)
        else:
            ids = torch.tensor([[*f, *([0] * (width - len(f)))] for f in feeds])
        index = torch.arange(width).expand(b, width)
        real = index < fed.unsqueeze(1)
        begin = torch.tensor(lengths)
        positions = torch.where(real, begin.unsqueeze(1) + index, -1).to(self.device)
        extent = int((begin + fed).max())
        self._step.rows = None if b == self.rows else torch.tensor(rows, device=self.device)
        self._step.slots, self._step.extent = positions, extent
        last = (fed - 1).to(self.device)
        return self._forward(ids.to(self.device), positions, extent, last)

    def _forward(self, ids: Tensor, positions: Tensor, extent: int, last: Tensor) -> Tensor:
        if self.style == "typed":
            mask: Any = {kind: self._mask(positions, extent, kind) for kind in TYPES}
        else:
            kind = "sliding_attention" if self.style == "windowed" else "full_attention"
            mask = self._mask(positions, extent, kind)
        keep, where = torch.unique(last, return_inverse=True)  # logits at these columns only
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.clamp(min=0),
            use_cache=True,
            logits_to_keep=keep,
            **{self._argument: self._cache},
        ).logits
        return logits[torch.arange(len(where), device=where.device), where]

    @torch.no_grad()
    def _find_style(self) -> str:
        """Tries the ways models take masks, against a plain forward pass over two rows of uneven
        length."""
        types = layer_kinds(self.config)
        if types - set(TYPES):
            raise UnfitModel(
                f"{type(self.model).__name__} has layers of the kinds {sorted(types - set(TYPES))},"
                f" whose state is no KV cache of tokens by position (known are {sorted(TYPES)})."
                " Use another backend for this model."
            )
        # Longer than any local attention reaches, or that what is local would not show.
        reach, limit = longest_span(self.config), context_length(self.config)
        length = min(max(reach + 9 if reach < limit else 0, 17), limit)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(0, vocabulary, (2, length), generator=generator).to(self.device)
        half = length // 2
        last: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
        plain = self.model(input_ids=tokens, **last).logits[:, -1].float()
        short = self.model(input_ids=tokens[1:, : length - 2], **last).logits[:, -1].float()
        exact = self.model.dtype in (torch.float32, torch.float64)
        best: tuple[float, str] = (float("inf"), "")
        refused = ""
        rows, self.rows = self.rows, 2
        order = self.STYLES if types else self.STYLES[1:]
        for self.style in order:
            self.reset()
            try:
                self.extend(
                    [0, 1], [0, 0], [tokens[0, :half].tolist(), tokens[1, : half - 2].tolist()]
                )
                two = self.extend(
                    [0, 1],
                    [half, half - 2],
                    [tokens[0, half:-1].tolist(), tokens[1, half - 2 : -2].tolist()],
                )
                one = self.extend([0], [length - 1], [tokens[0, -1:].tolist()])
            except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as raised:
                refused = f" ({type(raised).__name__}: {raised})"
                continue
            error = max(
                float((one[0] - plain[0]).abs().max()), float((two[1] - short[0]).abs().max())
            )
            best = min(best, (error, self.style))
            if error < 1e-4 * (1 + float(plain.abs().max())):
                break
        self.rows = rows
        if best[0] > (1e-4 if exact else 0.3) * (1 + float(plain.abs().max())):
            why = f"the closest way of masking is off by {best[0]:.2g} in the logits"
            if not best[1]:
                why = (
                    "it takes no mask of ours, as models with ALiBi or a cache of their"
                    f" own{refused}"
                )
            raise UnfitModel(
                f"{type(self.model).__name__} cannot be sampled with a kept KV cache: {why}. Use"
                " another backend for this model; `sft`, `preference` and reward models train it."
            )
        return best[1]
