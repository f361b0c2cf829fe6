"""Predicts how much memory play and an update of a model take, without its weights.

The model is counted on torch's meta device, which holds no numbers; what a forward pass keeps for
each token is measured on a model of the same shape with two layers. What torch and transformers
themselves take is measured in this process.
"""

from __future__ import annotations

import copy
import importlib.util
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import PolicyError
from ..util.files import read_note
from ..util.memory import resident
from .activations import fitted, kept_bytes
from .cache import BLOCK, SPARE
from .head import ELEMENTS
from .known import located
from .loading import ADAPTERS, find_model, with_adapters
from .properties import context_length

CHUNKS = 4  # chunks of logits that exist at a time while the head's gradient is made
# Times the activations, where freed memory is not given back (no `activation_memory`): between 1.2
# and 2.3 was measured, in runs that are alike too.
KEPT_FREED = 1.75
BUFFERS = 80 * 2.0**20  # of the libraries that make gradients
REPLIED = 0.35  # of a conversation's tokens, the policy's own, which logits are made for
SLACK = 1.03  # what allocators hold besides
RANK = 16  # of adapters whose activations are measured
BITS = {"nf4": 4 + 32 / 64, "int8": 8.0}  # of a weight; nf4 has a float32 for each 64
VOCABULARY = 1024  # of the model that is measured; the head is no part of what is
PADDED = 1.3  # slots of the cache for each token: it grows in steps


@dataclass(frozen=True, slots=True)
class Setting:
    """What is to be trained, and how.

    Attributes:
        conversations: alive at a time, and trained on in an update.
        tokens: of each, in the end.
        lora: rank of adapters; None: all weights are trained.
        quantize: "nf4" or "int8" for the weights that adapters stand on.
        dtype: of the weights.
        micro_tokens, activation_memory: see `LearnerOptions`.
        reference: a KL penalty needs the policy as it was.
    """

    conversations: int = 32
    tokens: int = 512
    lora: int | None = None
    quantize: str | None = None
    dtype: str = "float32"
    micro_tokens: int = 2048
    activation_memory: float | None = None
    reference: bool = False


@dataclass(frozen=True, slots=True)
class Peaks:
    """Predicted bytes: the peaks of the whole process in play and in an update."""

    play: float
    update: float


def ways(plain: Setting) -> dict[str, Setting]:
    """Returns ways to train what a setting trains, by what they turn on, from the one that takes
    the most memory to the one that takes the least."""
    bounded = replace(plain, activation_memory=0.5)
    return {
        "all weights": plain,
        "all weights, activation_memory: 0.5": bounded,
        "lora: {r: 16}": replace(plain, lora=16),
        "lora: {r: 16}, activation_memory: 0.5": replace(bounded, lora=16),
        "lora: {r: 16}, activation_memory: 0.5, dtype: bfloat16": replace(
            bounded, lora=16, dtype="bfloat16"
        ),
        "lora: {r: 16}, activation_memory: 0.5, dtype: bfloat16, quantize: nf4": replace(
            bounded, lora=16, dtype="bfloat16", quantize="nf4"
        ),
    }


class Shape:
    """The shape of a model, without its weights.

    Args:
        name: folder, hub name or short name.
        gguf: the GGUF file in it, where it is one.

    Attributes:
        parameters: how many numbers it has.
        context: the most tokens that it may read.

    Raises:
        PolicyError: there is no such model, or its kind cannot be predicted.
    """

    def __init__(self, name: str | Path, gguf: str | None = None) -> None:
        folder = Path(located(name))
        adapters = (folder / ADAPTERS).is_file()
        find_model(name, None if adapters else gguf)
        if adapters:
            folder = Path(read_note(folder / ADAPTERS)["base_model_name_or_path"])
            find_model(folder, gguf)
        try:
            self._measure(folder, {"gguf_file": gguf} if gguf else {})
        except (
            OSError, ValueError, AttributeError, TypeError, KeyError, RuntimeError, IndexError,
            struct.error,
        ) as error:  # fmt: skip
            raise PolicyError(
                f"what {str(name)!r} takes cannot be predicted: its files cannot be read, or it is"
                f" no causal language model with attention in every layer. {type(error).__name__}:"
                f" {error}"
            ) from error

    def _measure(self, folder: Path, more: Mapping[str, str]) -> None:
        """Counts the numbers of a model and measures one of two layers."""
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        config = AutoConfig.from_pretrained(str(folder), **more)
        with torch.device("meta"):
            whole: Any = AutoModelForCausalLM.from_config(config)
        self.program = resident()  # all that is imported is there, and no weights are
        self.parameters = sum(p.numel() for p in whole.parameters())
        head = whole.get_output_embeddings()
        linear = (nn.Linear, Conv1D)  # what "all-linear" means to peft
        adapted = [m for m in whole.modules() if isinstance(m, linear) and m is not head]
        self.linear = sum(m.weight.numel() for m in adapted)
        self.per_rank = sum(sum(m.weight.shape) for m in adapted)  # numbers of adapters of rank 1
        text = config.get_text_config()
        self.layers, self.vocabulary = text.num_hidden_layers, head.weight.shape[0]
        self.context = context_length(text)
        few = copy.deepcopy(config)
        few.get_text_config().num_hidden_layers = 2
        few.get_text_config().vocab_size = min(text.vocab_size, VOCABULARY)
        few.get_text_config().pad_token_id = None  # it may be beyond that
        if few.get_text_config().to_dict().get("layer_types"):
            few.get_text_config().layer_types = few.get_text_config().layer_types[:2]
        small = AutoModelForCausalLM.from_config(few).eval()
        self._inputs = 4.0 * text.hidden_size * self.layers
        self.kept = self._kept(small)  # in float32
        with torch.no_grad():
            out = small(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=True)
        cached = sum(
            layer.keys.numel() + layer.values.numel() for layer in out.past_key_values.layers
        )
        self.cached = cached / 4 / 2 * self.layers  # numbers per token
        self.kept_with_adapters = self.kept
        if importlib.util.find_spec("peft"):  # else adapters cannot be trained here
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.kept_with_adapters = self._kept(with_adapters(small, folder, {"r": RANK}))

    def _kept(self, small: Any) -> tuple[float, float]:
        """Returns what `kept_bytes` would of the whole model, from one with two layers."""
        plain, _ = kept_bytes(small)
        return plain / 2 * self.layers, self._inputs + plain / 2

    def trained(self, setting: Setting) -> int:
        """Returns how many numbers are trained."""
        return self.parameters if setting.lora is None else setting.lora * self.per_rank

    def peaks(self, setting: Setting) -> Peaks:
        """Predicts the memory that a setting takes."""
        size = torch.finfo(getattr(torch, setting.dtype)).bits / 8
        weights, trained = self.parameters * size, self.trained(setting)
        if setting.quantize is not None:
            weights -= self.linear * (size - BITS[setting.quantize] / 8)
        if setting.lora is not None:
            size_trained = 4.0  # adapters are float32
            weights += size_trained * trained
        else:
            size_trained = size
        slots = -(-setting.tokens * PADDED // BLOCK) * BLOCK
        cache = min(slots, setting.tokens * SPARE) * setting.conversations * self.cached * size
        of_layers = self.kept if setting.lora is None else self.kept_with_adapters
        kept = (of_layers[0] * size / 4, of_layers[1] * size / 4)
        room = (setting.activation_memory or 1e9) * 2**30
        tokens, again = fitted(kept, room, setting.micro_tokens, setting.tokens)
        tokens = min(tokens, setting.conversations * setting.tokens)
        adam = 8 if size_trained == 4 else 12  # half precision has a float32 copy besides
        activations = tokens * kept[again] * (1 if setting.activation_memory else KEPT_FREED)
        logits = CHUNKS * 4.0 * min(ELEMENTS, REPLIED * tokens * self.vocabulary)
        reference = weights if setting.reference and setting.lora is None else 0.0
        update = trained * (size_trained + adam) + activations + logits + reference + BUFFERS
        base = self.program + weights
        return Peaks(SLACK * (base + cache), SLACK * (base + update))
