"""Weights in 4 or 8 bits, and AdamW's memory in 8 bits, by the package bitsandbytes.

Quantized weights stand still and adapters are trained on them (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314). A token's log-prob must not depend on what is computed with it, or the sampler
and the update would disagree: in `int8` activations are therefore quantized token by token, without
the search for outliers in the whole batch (threshold 0), which moves logits by several units.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import PolicyError
from ..util.suggest import install

KINDS = ("nf4", "int8")
# bitsandbytes, which peft imports too, tells of every layer's every pass that activations become
# float16 on the way, and of a kernel that could be fetched (see `computed_alike`).
for _name in ("autograd._functions", "backends.cpu.ops"):
    logging.getLogger(f"bitsandbytes.{_name}").setLevel(logging.ERROR)


def quantized(kind: str | None, dtype: str, device: str | None) -> dict[str, Any]:
    """Returns the arguments by which transformers quantizes what it loads; none for None.

    Args:
        kind: "nf4" or "int8".
        dtype: that of what is not quantized, and of computing.
        device: where the weights go; they cannot be moved later.

    Raises:
        PolicyError: no such kind, or bitsandbytes is missing.
    """
    if kind is None:
        return {}
    if kind not in KINDS:
        raise PolicyError(f"quantize must be one of {', '.join(KINDS)}, got {kind!r}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PolicyError(f"quantized weights need bitsandbytes: {install('quantize')}")
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        compute = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return {"quantization_config": config, "device_map": {"": device or "cpu"}}


def computed_alike(model: torch.nn.Module) -> None:
    """Has layers of 4 bits compute alike wherever they are: on CPUs with bfloat16 they would use it
    without a gradient, and the sampler's log-probs would not be the update's."""
    layers: Any = model.modules()
    for layer in layers:
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False


def adamw_8bit(parameters: Iterable[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """Returns an AdamW whose moments have 8 bits each, in blocks of 256 (Dettmers et al. 2022,
    arXiv:2110.02861); those of parameters with fewer than 4096 numbers stay whole."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **options)  # type: ignore[attr-defined]


def restored(state: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
    """Returns what `adamw_8bit` keeps of a parameter, from its tensors: it counts steps in a plain
    number."""
    return {
        name: int(value) if name == "step" else value.clone().to(device)
        for name, value in state.items()
    }
