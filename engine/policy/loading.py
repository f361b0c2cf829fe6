"""Finds a model by folder or hub name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ..errors import PolicyError
from ..util.suggest import install


def find_model(name: str | Path) -> None:
    """Checks that a model exists before anything is made for it: a folder with a model in it, or a
    name that the hub or its cache on this machine knows.

    Raises:
        PolicyError: there is none; the message names folders with similar names.
    """
    from transformers.utils.hub import cached_file

    folder, notes = Path(name), ("config.json", "adapter_config.json")
    if folder.is_dir():
        if any((folder / note).is_file() for note in notes):
            return
        inside = [
            f"{p.parent}"
            for p in (*folder.glob("policy/*config.json"), *folder.glob("*/policy/*config.json"))
        ]
        hint = f" Did you mean {inside[0]!r}?" if inside else ""
        raise PolicyError(
            f"cannot load the policy {str(name)!r}: the folder holds no model (no"
            f" config.json).{hint}"
        )
    beside = [
        str(p) for p in folder.parent.glob("*/") if any((p / note).is_file() for note in notes)
    ]
    near = difflib.get_close_matches(str(folder), beside, n=1)
    hint = f" Did you mean the folder {near[0]!r}?" if near else ""
    if Path(name).is_absolute() or str(name).startswith((".", "~")) or len(folder.parts) > 2:
        raise PolicyError(f"cannot load the policy {str(name)!r}: there is no such folder.{hint}")
    try:
        if cached_file(str(name), notes[1], _raise_exceptions_for_missing_entries=False) is None:
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
