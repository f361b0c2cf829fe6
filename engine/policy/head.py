"""Log-probs of wanted tokens from hidden states, over a vocabulary of any size.

Logits of all tokens at once would be the largest tensor of an update. They are made in chunks and
made again for the gradient, which is added up in float32: added chunk by chunk in half precision,
small parts of it would be lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..tensors import log_softmax_at

ELEMENTS = 2**24  # logits of one chunk: 64 MiB in float32


def chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Yields parts of so many tokens whose logits are of at most `ELEMENTS` elements."""
    size = max(1, ELEMENTS // vocabulary)
    for begin in range(0, tokens, size):
        yield slice(begin, min(begin + size, tokens))


class HeadLogprobs(torch.autograd.Function):
    """Log-probs [n], with gradient, and entropies [n], without, of a linear head.

    Called with hidden [n, H], weight [V, H], bias [V] or None, target [n] long, the temperature
    that logits are divided by, and missing [m] long, ids that are no tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
        temperature: float, missing: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Computes both, chunk by chunk; keeps no logits."""
        ctx.save_for_backward(hidden, weight, bias, target, missing)
        ctx.temperature = temperature
        device = hidden.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        found = [
            log_softmax_at(_logits(hidden[part], weight, bias, temperature, missing), target[part])
            for part in chunks(len(target), len(weight))
        ]
        logprobs, entropy = (torch.cat(each) for each in zip(*found, strict=True))
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Makes every chunk's logits again: d logprob / d logits = onehot - softmax."""
        hidden, weight, bias, target, missing = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        exact = torch.promote_types(weight.dtype, torch.float32)
        wanted = ctx.needs_input_grad[1]
        of_weight = weight.new_zeros(weight.shape if wanted else 0, dtype=exact)
        of_bias = None if bias is None else bias.new_zeros(bias.shape, dtype=exact)
        enabled, kind = ctx.autocast
        for part in chunks(len(target), len(weight)):
            with torch.autocast(hidden.device.type, kind, enabled):
                logits = _logits(hidden[part], weight, bias, ctx.temperature, missing)
            apart = torch.softmax(logits.to(exact), -1).neg_()
            apart[torch.arange(len(apart), device=apart.device), target[part]] += 1
            apart *= (gradient[part].to(exact) / ctx.temperature).unsqueeze(1)
            if of_bias is not None:
                of_bias += apart.sum(0)
            apart = apart.to(logits.dtype)
            if of_hidden is not None:
                of_hidden[part] = (apart @ weight.to(apart.dtype)).to(hidden.dtype)
            if wanted and apart.dtype == exact:
                of_weight.addmm_(apart.T, hidden[part].to(exact))
            elif wanted:
                of_weight += apart.T @ hidden[part].to(apart.dtype)
        return (
            of_hidden,
            of_weight.to(weight.dtype) if wanted else None,
            None if bias is None or of_bias is None else of_bias.to(bias.dtype),
            None, None, None,
        )  # fmt: skip


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, missing: Tensor
) -> Tensor:
    logits = functional.linear(hidden, weight, bias)
    if len(missing):
        logits = logits.index_fill(-1, missing, torch.finfo(logits.dtype).min)
    return logits / temperature if temperature != 1.0 else logits
