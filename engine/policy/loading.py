"""Loads models: finds them by folder or hub name, with their template, adapters and device."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import struct
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import PolicyError, UnfitModel
from ..util.files import read_note
from ..util.suggest import did_you_mean, install
from .known import located
from .properties import setting
from .quantization import computed_alike, quantized
from .template import CHATML

# How long processes wait for one another: while the main one waits for people, the others wait.
PATIENCE = timedelta(days=365)
ADAPTERS = "adapter_config.json"
ADAPTER_FILES = (ADAPTERS, "adapter_model.safetensors")
# transformers makes a model by switches that hold for all threads: two at once break each other.
LOADING = threading.RLock()


def find_model(name: str | Path, gguf: str | None = None, *, fetch: bool = True) -> None:
    """Checks that a model exists before anything is made for it: a folder with a model in it, or a
    name that the hub or its cache on this machine knows.

    Args:
        name: folder or hub name.
        gguf: the file in it that is to be loaded, where it is a GGUF file.
        fetch: whether the hub is asked.

    Raises:
        PolicyError: there is none; the message names folders with similar names.
    """
    from transformers.utils.hub import cached_file

    name = located(name)
    if str(name).endswith(".gguf"):
        path = Path(name)
        raise PolicyError(
            f"cannot load the policy {str(name)!r}: name the folder and the file in it, as in"
            f" `policy: {{model: {path.parent}, gguf: {path.name}}}`"
        )
    folder, notes = Path(name), (gguf,) if gguf else ("config.json", ADAPTERS)
    if folder.is_dir():
        if any((folder / note).is_file() for note in notes):
            return
        inside = [
            f"{p.parent}"
            for p in (*folder.glob("policy/*config.json"), *folder.glob("*/policy/*config.json"))
        ]
        hint = f" Did you mean {inside[0]!r}?" if inside else ""
        if files := sorted(path.name for path in folder.glob("*.gguf")):
            hint = f" It has {', '.join(files)}: write `gguf: {files[0]}` under `policy`."
        raise PolicyError(
            f"cannot load the policy {str(name)!r}: the folder holds no model (no"
            f" {notes[0]}).{hint}"
        )
    siblings = [
        str(p) for p in folder.parent.glob("*/") if any((p / note).is_file() for note in notes)
    ]
    near = difflib.get_close_matches(str(folder), siblings, n=1)
    hint = f" Did you mean the folder {near[0]!r}?" if near else ""
    local = Path(name).is_absolute() or str(name).startswith((".", "~")) or len(folder.parts) > 2
    if not fetch:  # a name of the hub begins with no folder that is here
        local = local or (folder.parent != Path() and folder.parent.is_dir())
    if local:
        raise PolicyError(f"cannot load the policy {str(name)!r}: there is no such folder.{hint}")
    if not fetch:
        return
    try:
        if cached_file(str(name), notes[-1], _raise_exceptions_for_missing_entries=False) is None:
            cached_file(str(name), notes[0])
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"cannot load the policy {str(name)!r}. It is no local folder, and no model of that"
            f" name could be fetched.{hint} {type(error).__name__}: {error}"
        ) from error


def import_peft() -> Any:
    """Returns the module `peft`; raises `PolicyError` where it is missing."""
    try:
        import peft
    except ImportError as error:
        raise PolicyError(f"LoRA needs peft: {install('lora')}") from error
    return peft


def from_gguf(file: str | None) -> dict[str, Any]:
    """Returns the arguments by which transformers reads a GGUF file, its weights made plain; none
    where there is no such file.

    Raises:
        PolicyError: the package `gguf` is missing.
    """
    if file is None:
        return {}
    if importlib.util.find_spec("gguf") is None:
        raise PolicyError(f"GGUF files need the package gguf: {install('gguf')}")
    try:
        from transformers import GgufConfig
    except ImportError:  # an older one, which always makes weights plain
        return {"gguf_file": file}
    return {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True)}


def unmarked(model: Any, name: str | Path) -> Any:
    """Returns a model that came from a GGUF file as the plain model it is by now: transformers
    would not save it else."""
    model.hf_quantizer = None
    for config in (model.config, model.config.get_text_config()):
        for mark in ("quantization_config", "_model_name_or_path"):
            vars(config).pop(mark, None)
    model.config.name_or_path = str(name)
    return model


def load(
    name: str | Path,
    *,
    gguf: str | None = None,
    quantize: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer; of a folder of LoRA adapters, the model that
    they belong to. The arguments are those of `Policy.from_pretrained`.

    Raises:
        PolicyError: there is none, or it cannot be loaded like this.
    """
    import transformers

    auto: Any = transformers  # its lazy module types mislead checkers
    name = located(name)
    folder = Path(name)
    adapter = folder / ADAPTERS
    find_model(name, None if adapter.is_file() else gguf)
    if dtype not in ("float32", "bfloat16", "float16", "auto"):
        raise PolicyError(
            f"dtype must be 'float32', 'bfloat16', 'float16' or 'auto', got {dtype!r}"
        )
    if gguf and quantize:
        raise PolicyError(
            f"{gguf} is quantized as it is, and made plain when it is loaded: leave `quantize` out,"
            " or save it first and load the folder"
        )
    packed = from_gguf(gguf) | quantized(quantize, dtype, device)
    base = read_note(adapter)["base_model_name_or_path"] if adapter.is_file() else str(name)
    if base != str(name):
        try:
            find_model(base, gguf)
        except PolicyError as error:
            raise PolicyError(f"the adapters in {name} belong to {base!r}: {error}") from error
    if Path(base).is_dir():  # adapters that are made on it remember where it is
        base = str(Path(base).absolute())
    try:
        own = {} if gguf is None or adapter.is_file() else {"gguf_file": gguf}
        tokenizer = auto.AutoTokenizer.from_pretrained(
            str(name), trust_remote_code=trust_remote_code, **own
        )
        if not gguf:
            _check_attends(
                auto.AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
            )
        _read_keys_in_place()
        with LOADING:
            model = auto.AutoModelForCausalLM.from_pretrained(
                base,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=attention,
                use_safetensors=True,  # nothing is unpickled
                trust_remote_code=trust_remote_code,
                **packed,
            )
    except (
        OSError, ValueError, AttributeError, ImportError, SafetensorError, RuntimeError,
        AssertionError, struct.error,
    ) as error:  # fmt: skip
        if isinstance(error, PolicyError):
            raise
        raise _not_loaded(str(name), attention, error) from error
    computed_alike(model)
    return unmarked(model, base) if gguf else model, tokenizer


def _read_keys_in_place() -> None:
    """Has a CPU attend to the keys of grouped queries where they are, which its kernel can from
    torch 2.9 on; transformers would copy them for every query head of a masked call."""
    torch_version = tuple(map(int, torch.__version__.split(".")[:2]))
    if not torch.accelerator.is_available() and torch_version >= (2, 9):
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")


def _check_attends(config: Any) -> None:
    """Refuses a model without any attention: its state is no cache of tokens.

    Raises:
        UnfitModel: it has none.
    """
    if setting(config.get_text_config(), "num_attention_heads") is None:
        raise UnfitModel(
            f"models of type {config.model_type!r} are state-space models: their layers keep a"
            " state that is no cache of tokens, which conversations cannot be gone on from, or"
            " branched, exactly. Use one with attention"
        )


def _not_loaded(name: str, attention: str, error: Exception) -> PolicyError:
    """Returns the error of a policy that cannot be loaded, with what to do about it."""
    if "trust_remote_code" in str(error):
        return PolicyError(
            f"the policy {name!r} comes with Python files of its own, which are not run unasked."
            " Read them, and if you trust them say so: `policy: {model: ...,"
            " trust_remote_code: true}`"
        )
    why = f"{type(error).__name__}: {error}"
    if attention == "sdpa" and "eager" in str(error):
        return PolicyError(
            f"the policy {name!r} has no scaled-dot-product attention: load it with"
            f" `attention: eager` (under `policy`). {why}"
        )
    known = " It is no local folder, and no model of that name could be fetched."
    return PolicyError(
        f"cannot load the policy {name!r}.{'' if Path(name).is_dir() else known} {why}"
    )


def template_of(chat_template: str) -> str:
    """Returns the Jinja template that a config gives or names.

    Raises:
        PolicyError: it is no template.
    """
    if chat_template != "chatml" and "{" not in chat_template:
        raise PolicyError(
            f"chat_template {chat_template!r} is no Jinja template: it has no {{{{ or {{%."
            " Paste one, or write `chatml` for the one that is built in"
        )
    return CHATML if chat_template == "chatml" else chat_template


def with_adapters(model: Any, folder: Path, lora: Mapping[str, Any] | None) -> Any:
    """Returns a model with the LoRA adapters of a folder, or with new ones.

    Args:
        folder: what the model was loaded from.
        lora: options of `peft.LoraConfig`; None: no new ones.

    Raises:
        PolicyError: peft is missing, an option is wrong, or there are adapters already.
    """
    found = (folder / ADAPTERS).is_file()
    if found and lora is not None:
        raise PolicyError(
            f"{folder} holds LoRA adapters already; leave `lora` out to train them on, or merge"
            " them first"
        )
    if found:
        return import_peft().PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    if lora is not None:
        peft = import_peft()
        try:
            config = peft.LoraConfig(
                task_type="CAUSAL_LM",
                **{"lora_dropout": 0.0, "target_modules": "all-linear", **lora},
            )
        except (TypeError, ValueError) as error:
            wrong = [
                key for key in lora if key not in inspect.signature(peft.LoraConfig).parameters
            ]
            hint = (
                did_you_mean(
                    wrong[0],
                    ["r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"],
                )
                if wrong
                else ""
            )
            raise PolicyError(f"lora: {error}.{hint}") from error
        try:
            return peft.get_peft_model(model, config)
        except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
            raise PolicyError(f"lora: {error}") from error
    return model


def savable(config: Any) -> Any:
    """Returns a generation config that can be saved: values for sampling that the model's own
    greedy decoding has no use for are dropped, since transformers refuses both together."""
    if not config.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            setattr(config, name, None)
    return config


def connected(device: torch.device) -> Any:
    """Returns accelerate's connection of the processes that train together.

    Raises:
        PolicyError: it connects another number than was started.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    waiting = [InitProcessGroupKwargs(timeout=PATIENCE)]
    made = Accelerator(cpu=device.type == "cpu", kwargs_handlers=waiting)
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if made.num_processes != wanted:
        raise PolicyError(
            f"{wanted} processes were started to train together (WORLD_SIZE), and accelerate"
            f" connects {made.num_processes}: start them with `torchrun --nproc_per_node N -m"
            " turnwise run ...`"
        )
    return made


def found_device(device: str | None) -> str | None:
    """Returns the device that was asked for; where none was, the one that accelerate finds for this
    process, or None for the CPU."""
    if device is None and torch.cuda.is_available():
        from accelerate import PartialState

        return str(PartialState(timeout=PATIENCE).device)  # this process's own
    return device


def on_device(model: Any, device: str | None) -> Any:
    """Returns a model on a device; None: where it is.

    Raises:
        PolicyError: there is no such device.
    """
    if device is not None:
        try:
            if torch.device(device).type == "meta":
                raise RuntimeError("it holds no numbers")
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            build = ""
            if str(device).startswith("cuda") and torch.version.cuda is None:
                build = (
                    f" This torch ({torch.__version__}) is built without CUDA: install one with it,"
                    " see https://pytorch.org/get-started, or leave `device` out."
                )
            raise PolicyError(
                f"the policy cannot be put on device {device!r}: {error}.{build}"
            ) from error
    return model
