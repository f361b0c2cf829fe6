"""What a forward pass keeps for its gradient, and how to keep less.

Every layer keeps what it computed until the gradient has passed it: the largest part of an update's
memory. Where that is too much, layers keep only what goes into them, and are computed a second time
when the gradient arrives (Chen et al. 2016, arXiv:1604.06174): a third more work, the same numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .properties import trunk

LENGTHS = (32, 96)  # tokens of the two passes that are measured


def layers(model: Any) -> list[Any]:
    """Returns the layers of a transformers model that may be computed again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextlib.contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Makes the layers of a model keep only what goes into them, in forward passes within the
    context; transformers' own switch wants training mode, and with it dropout."""
    own = layers(model)
    for layer in own:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in own:
            del layer.forward


@torch.enable_grad()
def kept_bytes(model: Any) -> tuple[float, float]:
    """Measures what a forward pass of a causal language model keeps for each token, below its head.

    Returns:
        bytes per token as it is, and where layers are computed again: each layer's input, and all
        that a single one of them keeps.
    """
    body, found = trunk(model), []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for length in LENGTHS:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            states = body(input_ids=ids, use_cache=False).last_hidden_state
        found.append(sum(kept.values()))
    plain = (found[1] - found[0]) / (LENGTHS[1] - LENGTHS[0])
    own = len(layers(body))
    inputs = states.element_size() * states.shape[-1] * own
    return plain, (inputs + plain / own if own else plain)


def fitted(kept: tuple[float, float], room: float, tokens: int, longest: int) -> tuple[int, bool]:
    """Fits forward passes into a room for what they keep: as few tokens at a time as that needs,
    and where the longest conversation alone does not fit, layers are computed again.

    Args:
        kept: what `kept_bytes` returned.
        room: bytes.
        tokens: the most tokens of a pass, where there is room for them.
        longest: tokens of the longest conversation, which is never divided.

    Returns:
        tokens of a pass, and whether layers are to be computed again.
    """
    again = longest * kept[0] > room
    return max(longest, min(tokens, int(room / kept[again]))), again
