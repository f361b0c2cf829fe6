"""Properties of a model, read from its config under every name that architectures use.

A window that is read under one name only, or a rope table that changes with the length of a call,
makes log-probs wrong and says nothing. So names are matched by what they speak of, and what is not
known is refused where the model is loaded.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import UnfitModel

CONTEXT = re.compile(
    r"(n_|max_|maximum_)(target_)?position(s|_embeddings)|(max_)?(seq|sequence|context|model_max)_?(len|length)|max_(seq|context)_?len|n_ctx"
    r"|context_(size|window)"
)
SPAN = re.compile(r"window|chunk|local|block_size")
LOGITS = re.compile(r"soft_?cap|logit|lm_head_mult|output_mult|(^|_)cap$")
ATTENTION = re.compile(r"attn|attention|router")


def setting(config: Any, name: str) -> Any:
    """Returns what a config says under a name, its own or one that it maps to its own; None where
    it has no such setting."""
    return getattr(config, name, None)


def context_length(config: Any) -> int:
    """Returns the most tokens the model may read: the smallest limit that its config names, nested
    parts included; 2**31 where it names none, as of models whose attention fades with distance.

    A "longrope" table is another one beyond the length that the model was first trained on, and
    which of the two a token gets depends on the longest position of the call: neither kept keys nor
    padded batches are exact there, so the context ends at that length.
    """
    named = {name: setting(config, name) for name in config.attribute_map}
    found = [
        v
        for part in (named, *_tables(config.to_dict()))
        for name, v in part.items()
        if CONTEXT.fullmatch(str(name))
    ]
    limit = min(
        (
            int(v)
            for v in found
            if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0
        ),
        default=2**31,
    )
    limit = min(limit, 2**31)
    for rope in _tables(config.to_dict()):
        if "longrope" in (rope.get("rope_type"), rope.get("type")):
            first = rope.get("original_max_position_embeddings")
            first = first or setting(config, "original_max_position_embeddings")
            limit = min(limit, int(first or limit))
    return limit


def _tables(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yields every mapping inside a config, itself included: rope parameters may stand per layer
    type."""
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _tables(inner)


def layer_kinds(config: Any) -> set[str]:
    """Returns the kinds of layers that the config names one by one; empty where all are alike."""
    kinds = set(setting(config, "layer_types") or ())
    return kinds | {"local"} if "local" in (setting(config, "attention_layers") or ()) else kinds


def longest_span(config: Any) -> int:
    """Returns the largest number of the config that may be the reach of a local attention, 0 if
    none."""
    found = [0]
    for name, value in ((n, v) for part in _tables(config.to_dict()) for n, v in part.items()):
        if SPAN.search(str(name)):
            several = value if isinstance(value, (list, tuple)) else [value]
            found += [
                int(v) for v in several if isinstance(v, (int, float)) and not isinstance(v, bool)
            ]
    return max(found)


def changes_logits(config: Any) -> bool:
    """Returns whether the config names a cap or a scale of logits, however little it does to small
    ones."""
    return any(
        LOGITS.search(name)
        and not ATTENTION.search(name)
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value not in (0, 1)
        for name, value in config.to_dict().items()
    )


def is_adapted(model: Any) -> bool:
    """Returns whether adapters of peft are around a model; peft is not loaded to find out."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def cache_argument(module: Any) -> str:
    """Returns the name under which a transformers model takes its cache: newer and older versions
    differ."""
    named = inspect.signature(module.forward).parameters
    return "cache" if "cache" in named else "past_key_values"


def trunk(lm: Any) -> Any:
    """Returns the part of a causal language model that makes hidden states, the one below its head.

    Raises:
        UnfitModel: it has none that transformers knows.
    """
    from transformers import PreTrainedModel

    for part in (lm.base_model, lm.get_decoder(), *lm.children()):
        if part is not lm and isinstance(part, PreTrainedModel):
            return part
    raise UnfitModel(
        f"{type(lm).__name__} has no trunk below its head that hidden states could be read from"
    )


def fingerprint(model: Any) -> str:
    """Returns what a model is known by: a digest of some of its embeddings."""
    rows = model.get_input_embeddings().weight[:16].detach().float().cpu()
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()[:16]
