"""Weights as they are saved and read back: adapters alone, folded in, or all of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PolicyError
from .loading import ADAPTERS, LOADING, import_peft
from .network import Network
from .properties import context_length, is_adapted, setting


def merged(network: Network) -> Any:
    """Returns a plain model with a network's adapters in its weights.

    Raises:
        PolicyError: it would not be the same model.
    """
    lm = network.lm
    if setting(lm.config, "quantization_config") is not None:
        raise PolicyError(
            "adapters cannot be folded into quantized weights without rounding them again: save the"
            " adapters, load them on the plain model (Policy.from_pretrained(FOLDER), without"
            " `quantize`) and merge there"
        )
    whole: Any = copy.deepcopy(network.model)
    lm = whole.get_base_model()
    tuner = import_peft().tuners.tuners_utils.BaseTunerLayer
    inside, outside = lm.get_input_embeddings(), lm.get_output_embeddings()
    if lm.config.get_text_config().tie_word_embeddings and any(
        isinstance(end, tuner) for end in (inside, outside)
    ):  # what is added to one end of a tied pair must not change the other
        part = outside.base_layer if isinstance(outside, tuner) else outside
        part.weight = nn.Parameter(part.weight.detach().clone())
        for config in {id(c): c for c in (lm.config, lm.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    made = whole.merge_and_unload()
    few = min(16, context_length(lm.config.get_text_config()), inside.weight.shape[0])
    ids = torch.arange(few, device=inside.weight.device).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = (
            m(input_ids=ids, use_cache=False).logits.float() for m in (network.model, made.eval())
        )
    if not torch.allclose(ours, theirs, rtol=0.05, atol=0.01 * float(ours.abs().max())):
        raise PolicyError(
            "merging the adapters gives another model (its logits are off by"
            f" {float((ours - theirs).abs().max()):.2g}); save them unmerged, and report the"
            " LoRA options that were used"
        )
    return made


def adapters_of(network: Network) -> dict[str, Tensor]:
    """Returns a network's adapters by the names that they are saved under."""
    found: dict[str, Tensor] = import_peft().get_peft_model_state_dict(network.model)
    return found


def read_weights(folder: str | Path, network: Network) -> dict[str, Tensor]:
    """Returns the weights in a folder by name: adapters where the network has some.

    Raises:
        PolicyError: it has some and the folder has none, or the other way round.
    """
    adapters = (Path(folder) / ADAPTERS).is_file()
    if adapters != is_adapted(network.model):
        there, here = ("LoRA adapters", "a whole model")[:: 1 if adapters else -1]
        raise PolicyError(
            f"the weights in {folder} are of another model than this policy: {there} there, {here}"
            " here"
        )
    if adapters:
        found: dict[str, Tensor] = import_peft().load_peft_weights(str(folder), device="cpu")
        return found
    with LOADING:
        fresh = type(network.lm).from_pretrained(
            str(folder), dtype=network.lm.dtype, use_safetensors=True
        )
    return dict(fresh.named_parameters())


def check_alike(found: Mapping[str, Tensor], own: Mapping[str, Tensor], folder: Any) -> None:
    """Checks that weights read from a folder are those of a model, by name and shape.

    Raises:
        PolicyError: they are of another one.
    """
    there, here = ({name: tuple(v.shape) for name, v in each.items()} for each in (found, own))
    odd = sorted(n for n in {*there, *here} if there.get(n) != here.get(n))
    if odd:
        raise PolicyError(
            f"the weights in {folder} are of another model than this policy: {len(odd)} parameters"
            f" differ in name or shape, such as {odd[0]!r} ({there.get(odd[0], 'missing')} there,"
            f" {here.get(odd[0], 'missing')} here)"
        )
