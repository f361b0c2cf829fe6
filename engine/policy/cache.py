"""A KV cache for conversations of uneven length: the slot of a token is its position.

Masks and sliding windows of unmodified transformers models count cache slots, so a cache with holes
(right padding between turns) is silently wrong with sliding windows. Here a row's token at position
p stands in slot p: no holes, nothing to shift, a finished conversation's row is reused by starting
again at position 0. Padding is written to a scratch slot that no mask allows.

Rows are kept in an order of their own, in which those that are decoded come first: attention then
reads a view of the cache, and nothing is copied per token. A row that ends its reply changes places
with the last one that goes on. There is room for the rows and the tokens that live, no more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import UnfitModel
from ..tensors import sent
from .network import Network
from .properties import cache_argument, context_length, layer_kinds, longest_span, setting, trunk

BLOCK = 16  # slots are allocated in multiples of this many positions
SPARE = 1.5  # and as many times what is needed, so that growing copies little

MASKED = ("sdpa", "eager")  # implementations of attention that take any mask

# The kinds of attention that a config's `layer_types` may name, and where it says how far they
# reach.
TYPES = {
    "full_attention": "",
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}


@dataclass
class _Step:
    """The data that the layers of one forward call share, and the room that all of them have.

    Attributes:
        rows: [b, 1] the rows of the cache that are read and written.
        first: whether these are its first ones, in order.
        slots: [b, q] where each token is written.
        extent: the first slots, as many as the longest row has tokens.
        capacity: (rows, slots) that are allocated, without the scratch slot.
    """

    rows: Tensor | None = None
    first: bool = True
    slots: Tensor | None = None
    extent: int = 0
    capacity: tuple[int, int] = (0, 0)


class SlotLayer(CacheLayerMixin):
    """A layer's keys and values [rows, heads, slots + 1, dim]; the last slot is scratch."""

    is_sliding = False

    def __init__(self, step: _Step) -> None:
        super().__init__()
        self.step = step
        self.size = (0, 0)
        self.clean = 0  # the first slots of all rows that hold numbers, and not what memory held

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes keys and values without room, in the states' type and place."""
        heads, dim = key_states.shape[1], key_states.shape[3]
        self.keys = key_states.new_zeros(0, heads, 1, dim)
        self.values = value_states.new_zeros(0, heads, 1, value_states.shape[3])
        self.is_initialized = True

    def _grow(self) -> None:
        """Makes room for as many rows and slots as the step says. Memory that nothing was written
        to yet is only reserved."""
        rows, slots = self.step.capacity
        assert self.keys is not None
        assert self.values is not None
        held = self.size[0]
        for name, old in (("keys", self.keys), ("values", self.values)):
            new = old.new_empty(rows, old.shape[1], slots + 1, old.shape[3])
            new[:held, :, : self.clean] = old[:, :, : self.clean]
            new[held:, :, : self.clean] = 0
            setattr(self, name, new)
        self.size = self.step.capacity

    def _wipe(self, extent: int) -> None:
        """Makes slots readable that are read for the first time: masked or not, what stands there
        is multiplied."""
        if extent > self.clean:
            until = min(-(-extent // BLOCK) * BLOCK, self.size[1])
            for held in (self.keys, self.values):
                assert held is not None
                held[:, :, self.clean : until] = 0
            self.clean = until

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes keys and values of new tokens to their slots; returns the step's rows of both, up
        to `extent`."""
        step = self.step
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.make_ready(step.extent)
        keys, values, rows = self.keys, self.values, step.rows
        assert keys is not None
        assert values is not None
        assert rows is not None
        keys[rows, :, step.slots] = key_states.transpose(1, 2).to(keys.dtype)
        values[rows, :, step.slots] = value_states.transpose(1, 2).to(values.dtype)
        if step.first:
            some = len(rows)
            return keys[:some, :, : step.extent], values[:some, :, : step.extent]
        own = rows.squeeze(1)
        return keys[:, :, : step.extent][own], values[:, :, : step.extent][own]

    def make_ready(self, extent: int) -> None:
        """Makes the room that the step asks for, and so many slots of it readable."""
        if self.size != self.step.capacity:
            self._grow()
        self._wipe(extent)

    def place(self, sources: Tensor, targets: Tensor, extent: int) -> None:
        """Copies the first slots of rows to other rows, all at once: rows may change places."""
        for held in (self.keys, self.values):
            assert held is not None
            held[targets, :, :extent] = held[sources, :, :extent]

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
        network: around an unmodified transformers causal LM.
        compile: whether single tokens are decoded by a compiled model.

    Raises:
        UnfitModel: no way of masking this model's attention reproduces its plain forward pass.
    """

    STYLES = ("typed", "windowed", "full")

    def __init__(self, network: Network, compile: bool = False) -> None:
        self.network, self.model = network, network.lm
        self.config = self.model.config.get_text_config()
        self.device = self.model.get_input_embeddings().weight.device
        # Logits are made of the last states alone where the head is nothing but a matrix.
        self._called = trunk(self.model) if network.head_is_plain else self.model
        self._argument = cache_argument(self._called)
        self._decoding: Any = self._called
        self.style = self._find_style()
        if compile:
            self._decoding = torch.compile(self._called, dynamic=True)
        self.reset()

    def reset(self) -> None:
        """Forgets everything, and frees its memory."""
        self._step = _Step()
        self._layers = [SlotLayer(self._step) for _ in range(self.config.num_hidden_layers)]
        layers: list[Any] = list(self._layers)
        self._cache = Cache(layers=layers)
        self._order: list[int] = []  # which row stands where
        self._place: dict[int, int] = {}
        self._held: dict[int, int] = {}  # how many tokens each row has

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

    def expect(self, rows: Sequence[int]) -> None:
        """Gives rows a place, so that room is made for all of them at once."""
        for row in rows:
            if row not in self._place:
                self._place[row] = len(self._order)
                self._order.append(row)

    @torch.no_grad()
    def extend(
        self, rows: Sequence[int], lengths: Sequence[int], feeds: Sequence[Sequence[int]]
    ) -> Tensor:
        """Feeds each row its new tokens and returns the logits after the last one, [b, V].

        Args:
            rows: distinct numbers of rows.
            lengths: how many tokens each row holds already (0 starts it over).
            feeds: at least one new token per row.
        """
        width = max(map(len, feeds))
        self.expect(rows)
        for row, held, feed in zip(rows, lengths, feeds, strict=True):
            self._held[row] = held + len(feed)
        extent = max(self._held[row] for row in rows)
        self._make_room(extent)
        if width == 1:
            self._bring_forward(rows)
        places = [self._place[row] for row in rows]
        by_place = sorted(range(len(rows)), key=places.__getitem__)
        self._step.first = places[by_place[-1]] == len(rows) - 1
        table = [
            [i, places[i], lengths[i], len(feeds[i]), *feeds[i], *([0] * (width - len(feeds[i])))]
            for i in by_place
        ]
        order, place, begin, fed, *_ = (data := sent(torch.tensor(table), self.device)).unbind(1)
        index = torch.arange(width, device=self.device)
        positions = begin.unsqueeze(1) + index
        real = index < fed.unsqueeze(1)
        self._step.rows = place.unsqueeze(1)
        self._step.slots = torch.where(real, positions, self._step.capacity[1])
        self._step.extent = extent
        positions = torch.where(real, positions, -1)
        with self._masked_attention():
            logits = self._forward(data[:, 4:], positions, extent, fed - 1)
        return logits if by_place == list(range(len(rows))) else logits[order.argsort()]

    @torch.no_grad()
    def copy(self, row: int, to: Sequence[int], length: int) -> None:
        """Gives other rows the first tokens of a row, as if they had been fed them."""
        self.expect(to)
        for other in to:
            self._held[other] = length
        self._make_room(length)
        source = torch.tensor([self._place[row]] * len(to), device=self.device)
        target = torch.tensor([self._place[other] for other in to], device=self.device)
        for layer in self._layers:
            if layer.is_initialized:  # others read the keys of one below them
                layer.make_ready(length)
                layer.place(source, target, length)

    def _make_room(self, extent: int) -> None:
        rows, slots = self._step.capacity
        if len(self._order) > rows:
            rows = max(len(self._order), int(rows * SPARE))
        if extent > slots:
            slots = -(-int(extent * SPARE) // BLOCK) * BLOCK
        self._step.capacity = (rows, slots)

    def _bring_forward(self, rows: Sequence[int]) -> None:
        """Makes rows the first ones; those that stood there take their places."""
        wanted, size = set(rows), len(rows)
        behind = [row for row in rows if self._place[row] >= size]
        if not behind:
            return
        away = [row for row in self._order[:size] if row not in wanted]
        pairs = [(self._place[a], self._place[b]) for a, b in zip(behind, away, strict=True)]
        extent = max(self._held.get(row, 0) for row in (*behind, *away))
        one, other = (torch.tensor(each, device=self.device) for each in zip(*pairs, strict=True))
        for layer in self._layers:
            if layer.is_initialized:
                layer.make_ready(extent)
                layer.place(torch.cat([one, other]), torch.cat([other, one]), extent)
        for a, b in pairs:
            self._order[a], self._order[b] = self._order[b], self._order[a]
            self._place[self._order[a]], self._place[self._order[b]] = a, b

    def _forward(self, ids: Tensor, positions: Tensor, extent: int, last: Tensor) -> Tensor:
        if self.style == "typed":
            mask: Any = {kind: self._mask(positions, extent, kind) for kind in TYPES}
        else:
            kind = "sliding_attention" if self.style == "windowed" else "full_attention"
            mask = self._mask(positions, extent, kind)
        given: dict[str, Any] = {
            "input_ids": ids, "attention_mask": mask, "position_ids": positions.clamp(min=0),
            "use_cache": True, self._argument: self._cache,
        }  # fmt: skip
        called = self._decoding if ids.shape[1] == 1 else self._called
        each = torch.arange(len(last), device=last.device)
        if self.network.head_is_plain:
            states = called(**given).last_hidden_state[each, last]
            return self.model.get_output_embeddings()(states)
        keep, where = torch.unique(last, return_inverse=True)  # logits at these columns only
        return called(**given, logits_to_keep=keep).logits[each, where]

    @contextlib.contextmanager
    def _masked_attention(self) -> Iterator[None]:
        """Attends in another way where the model's own implementation (flash attention) takes no
        mask of ours: it is the update's alone then."""
        own = self.model.config._attn_implementation
        if own in MASKED:
            yield
            return
        capped = setting(self.config, "attn_logit_softcapping")  # which sdpa knows nothing of
        self.model.set_attn_implementation("eager" if capped else "sdpa")
        try:
            yield
        finally:
            self.model.set_attn_implementation(own)

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
