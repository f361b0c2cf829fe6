"""Checkpoints: everything a run needs to go on exactly, written whole or not at all.

checkpoints/update-000120/
  state.json           where the run stood, what cannot be kept in tensors, and a hash of every file beside it
  policy/              as `save_pretrained` writes it
  <part>.safetensors   tensors of whatever else learns: optimizer, credit method, combiner, reward model, source
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .config import ConfigError
from .ledger import Ledger, LedgerError
from .secrets import HIDDEN

if TYPE_CHECKING:
    from .policy import Policy


class CheckpointError(Exception):
    """A checkpoint cannot be written or read. The message says what still stands, and what to do."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stood.

    Attributes:
        run: its id.
        update: updates made, through the whole run.
        stage: index of the stage it was in.
        done: updates that stage had made.
        start: number of the update after which that stage began; the checkpoint of that number is kept, since a reference policy
            is the policy as it was then.
        version: the policy's.
        machine: what a bit-exact continuation depends on: threads, attention, device, processes, torch.
    """

    run: str
    update: int
    stage: int
    done: int
    start: int
    version: int
    machine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that is whole: its folder and its position."""

    folder: Path
    position: Position

    def states(self) -> dict[str, dict[str, Any]]:
        """The state of every part, by name: tensors and plain values together, as its `state_dict` gave them."""
        from safetensors.torch import load_file

        plain = json.loads((self.folder / "state.json").read_text())["states"]
        return {name: {**values, **load_file(self.folder / f"{name}.safetensors")} for name, values in plain.items()}


def save(root: Path, position: Position, policy: Policy | None, parts: Mapping[str, Any]) -> Path:
    """Writes a checkpoint beside the others and moves it into place whole. One that is there already stays.

    Args:
        policy: left out where the run has loaded none yet.
        parts: name to whatever has a `state_dict()` of tensors, numbers and strings.

    Raises:
        CheckpointError: it cannot be written (a full disk); the checkpoints before it are untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target, draft = root / f"update-{position.update:06d}", root / ".draft"
    if target.exists():
        try:
            return read(target).folder
        except CheckpointError:
            pass  # of an earlier attempt, torn: written anew
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        if policy is not None:
            policy.save_pretrained(draft / "policy")
        plain: dict[str, Any] = {}
        for name, part in parts.items():
            state = part.state_dict()
            tensors = {k: v.contiguous() for k, v in state.items() if hasattr(v, "contiguous")}
            plain[name] = {k: v for k, v in state.items() if k not in tensors}
            save_file(tensors, draft / f"{name}.safetensors")
        files = {str(f.relative_to(draft)): _hash(f) for f in sorted(draft.rglob("*")) if f.is_file()}
        note = {"position": asdict(position), "states": plain, "files": files}
        (draft / "state.json").write_text(json.dumps(note))
        for path in [*draft.rglob("*"), draft]:
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        _sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint {target} cannot be written: {error}. Everything up to the checkpoint before it stands; make room on the "
            "disk and go on with `turnwise run --resume`."
        ) from error
    return target


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; torn ones are skipped with a warning. None where there is none."""
    for folder in sorted(root.glob("update-*"), reverse=True):
        try:
            return read(folder)
        except CheckpointError as error:
            warnings.warn(f"{error} Using the one before it.", stacklevel=2)
    return None


def read(folder: Path) -> Checkpoint:
    """A checkpoint, checked file by file.

    Raises:
        CheckpointError: it is not there, or torn.
    """
    try:
        note = json.loads((folder / "state.json").read_text())
        position = Position(**note["position"])
        for name, digest in note["files"].items():
            if _hash(folder / name) != digest:
                raise CheckpointError(f"the checkpoint {folder} is torn: {name} is not what was written.")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {folder} is torn or missing: {type(error).__name__}: {error}.") from error
    return Checkpoint(folder, position)


def run_of(folder: Path) -> str:
    """The id of the run in a folder, under which the ledger knows it.

    Raises:
        CheckpointError: the folder has no checkpoint.
    """
    found = sorted((folder / "checkpoints").glob("update-*/state.json"))
    if not found:
        raise CheckpointError(f"{folder} holds no run: it has no checkpoint.")
    return str(json.loads(found[-1].read_text())["position"]["run"])


def open_ledger(folder: Path, url: str | None = None) -> tuple[Ledger, str]:
    """The ledger of the run in a folder, where its config says that it is, and the run's id.

    Args:
        url: where it is instead; needed where the URL in the config had a password, which no folder keeps.

    Raises:
        ConfigError: the folder holds no run, or its ledger cannot be opened.
    """
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        run = run_of(folder)
    except (OSError, CheckpointError) as error:
        raise ConfigError(f"{folder} holds no run: {error}") from error
    url = url or config.get("ledger")
    if url is None and not (folder / "ledger.sqlite").is_file():
        raise ConfigError(f"the ledger of the run in {folder} is gone (ledger.sqlite): put it back to read it")
    if url is not None and HIDDEN in url:
        raise ConfigError(
            f"the ledger of the run in {folder} is at {url}, whose password is not kept: give the URL with --ledger"
        )
    try:
        return Ledger(url or folder / "ledger.sqlite"), run
    except LedgerError as error:
        raise ConfigError(f"the ledger of the run in {folder} cannot be read: {error}") from error


def prune(root: Path, keep: int) -> None:
    """Removes the oldest checkpoints beyond the `keep` latest, never one that a stage of those kept began from."""
    folders = sorted(root.glob("update-*"))
    starts = set()
    for folder in folders[-keep:]:
        with contextlib.suppress(OSError, ValueError, KeyError):  # a torn one needs nothing
            starts.add(f"update-{json.loads((folder / 'state.json').read_text())['position']['start']:06d}")
    for old in folders[:-keep]:
        if old.name not in starts:
            shutil.rmtree(old)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Makes the disk hold what was written: a crash of the machine too must not tear a checkpoint that was moved into place."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
