"""What a model's config says of it, under every name that architectures use.

A window that is read under one name only, or a rope table that changes with the length of a call,
makes log-probs wrong and says nothing. So names are matched by what they speak of, and what is not
known is refused where the model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import UnfitModel

CONTEXT = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length", "max_sequence_length",
    "n_ctx", "seq_length", "max_target_positions", "model_max_length",
)  # fmt: skip
SPAN = re.compile(r"window|chunk|local|block_size")
LOGITS = re.compile(r"soft_?cap|logit|lm_head_mult|output_mult")
ATTENTION = re.compile(r"attn|attention|router")


def context_length(config: Any) -> int:
    """Returns the most tokens the model may read, 2**31 where its config names no limit.

    A "longrope" table is another one beyond the length that the model was first trained on, and
    which of the two a token gets depends on the longest position of the call: neither kept keys nor
    padded batches are exact there, so the context ends at that length.
    """
    limit = next((int(v) for v in (getattr(config, name, None) for name in CONTEXT) if v), 2**31)
    for rope in _tables(config.to_dict()):
        if "longrope" in (rope.get("rope_type"), rope.get("type")):
            first = rope.get("original_max_position_embeddings")
            first = first or getattr(config, "original_max_position_embeddings", None)
            limit = min(limit, int(first or limit))
    return limit


def _tables(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yields every mapping inside a config, itself included: rope parameters may stand per layer type."""
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _tables(inner)


def layer_kinds(config: Any) -> set[str]:
    """Returns the kinds of layers that the config names one by one; empty where all are alike."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return kinds | {"local"} if "local" in (getattr(config, "attention_layers", None) or ()) else kinds


def longest_span(config: Any) -> int:
    """Returns the largest number of the config that may be the reach of a local attention, 0 if none."""
    found = [0]
    for name, value in config.to_dict().items():
        if SPAN.search(name):
            several = value if isinstance(value, (list, tuple)) else [value]
            found += [v for v in several if isinstance(v, int) and not isinstance(v, bool)]
    return max(found)


def changes_logits(config: Any) -> bool:
    """Returns whether the config names a cap or a scale of logits, however little it does to small ones."""
    return any(
        LOGITS.search(name)
        and not ATTENTION.search(name)
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value not in (0, 1)
        for name, value in config.to_dict().items()
    )


def trunk(lm: Any) -> Any:
    """Returns the part of a causal language model that makes hidden states, the one below its head.

    Raises:
        UnfitModel: it has none that transformers knows.
    """
    from transformers import PreTrainedModel

    for part in (lm.base_model, lm.get_decoder(), *lm.children()):
        if part is not lm and isinstance(part, PreTrainedModel):
            return part
    raise UnfitModel(f"{type(lm).__name__} has no trunk below its head that hidden states could be read from")
