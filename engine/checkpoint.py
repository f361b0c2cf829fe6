"""Checkpoints: everything a run needs to go on exactly, written whole or not at all; and what else a run's folder says of it.

checkpoints/update-000120/
  state.json           where the run stood, what cannot be kept in tensors, and a hash of every file beside it
  policy/              as `save_pretrained` writes it
  <part>.safetensors   tensors of whatever else learns: optimizer, credit method, combiner, reward model, source
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from . import files
from .config import ConfigError, flat
from .ledger import Ledger, LedgerError
from .secrets import HIDDEN

if TYPE_CHECKING:
    from .policy import Policy


# What reading a file raises that holds something else than was written.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class Damaged(ConfigError):
    """The config.yaml in a run's folder is gone or cannot be read."""


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
        machine: what a bit-exact continuation depends on: threads, attention, device, processes, torch, and
            the day that chat templates are given.
        ledger: what the ledger held, see `Ledger.mark`: one that holds less is not the run's.
    """

    run: str
    update: int
    stage: int
    done: int
    start: int
    version: int
    machine: Mapping[str, Any] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)


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
    from safetensors.torch import save_file

    target, draft = root / f"update-{position.update:06d}", root / ".draft"
    if target.exists():
        try:
            return read(target).folder
        except CheckpointError:
            pass  # of an earlier attempt, torn: written anew
    with _written(target, draft):
        draft.mkdir(parents=True)
        if policy is not None:
            policy.save_pretrained(draft / "policy")
        plain: dict[str, Any] = {}
        for name, part in parts.items():
            state = part.state_dict()
            tensors = {k: v.contiguous() for k, v in state.items() if hasattr(v, "contiguous")}
            plain[name] = {k: v for k, v in state.items() if k not in tensors}
            save_file(tensors, draft / f"{name}.safetensors")
        hashes = {str(f.relative_to(draft)): _hash(f) for f in sorted(draft.rglob("*")) if f.is_file()}
        note = {"position": asdict(position), "states": plain, "files": hashes}
        (draft / "state.json").write_text(json.dumps(note))
        files.move(draft, target)
    return target


def save_policy(policy: Policy, target: Path) -> None:
    """Writes a policy as `save_pretrained` does, whole or not at all.

    Raises:
        CheckpointError: it cannot be written; what was there before stands.
    """
    draft = target.with_name(f".{target.name}")
    with _written(target, draft):
        policy.save_pretrained(draft)
        files.move(draft, target)


@contextlib.contextmanager
def _written(target: Path, draft: Path) -> Iterator[None]:
    """Leaves no draft behind, and says what still stands where a folder cannot be written."""
    from safetensors import SafetensorError

    shutil.rmtree(draft, ignore_errors=True)
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"{target} cannot be written: {error}. Everything up to the last checkpoint stands; make room on the disk and go on with "
            "`turnwise run --resume`."
        ) from error


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; torn ones are skipped with a warning. None where there is none at all.

    Raises:
        CheckpointError: there are some, and all are torn.
    """
    torn: list[CheckpointError] = []
    for folder in _folders(root, reverse=True):
        try:
            found = read(folder)
        except CheckpointError as error:
            torn.append(error)
            continue
        for why in torn:
            warnings.warn(f"{why} Using the one before it.", stacklevel=2)
        return found
    if torn:
        raise CheckpointError(
            f"no checkpoint in {root} can be used: {' '.join(map(str, torn))} Put one back as it was, or begin another run in another "
            "folder; what was played and said is in the ledger all the same."
        )
    return None


def read(folder: Path) -> Checkpoint:
    """A checkpoint, checked file by file.

    Raises:
        CheckpointError: it is not there, or torn.
    """
    try:
        note = json.loads((folder / "state.json").read_text())
        position, hashes, states = _position(note), dict(note["files"]), dict(note["states"])
        lies = {str(f.relative_to(folder)) for f in folder.rglob("*.safetensors")}
        needs = lies | {f"{name}.safetensors" for name in states}
        unnamed = sorted(needs - set(hashes))
        if not unnamed and position.machine.get("device") and not any(name.startswith("policy/") for name in hashes):
            unnamed = ["policy"]
        if unnamed:
            raise CheckpointError(f"the checkpoint {folder} is torn: state.json does not name {unnamed[0]}.")
        for name, digest in hashes.items():
            if _hash(folder / name) != digest:
                raise CheckpointError(f"the checkpoint {folder} is torn: {name} is not what was written.")
    except UNREADABLE as error:
        raise CheckpointError(f"the checkpoint {folder} is torn or missing: {type(error).__name__}: {error}.") from error
    return Checkpoint(folder, position)


def _position(note: Mapping[str, Any]) -> Position:
    """The position in a checkpoint's note.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    position = Position(**note["position"])
    numbers = (position.update, position.stage, position.done, position.start, position.version)
    if not isinstance(position.run, str) or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
        raise ValueError(f"no position of a run: {note['position']}")
    return dataclasses.replace(position, machine=dict(position.machine), ledger=dict(position.ledger))


def last_position(folder: Path) -> Position:
    """Where the run in a folder stood at its last checkpoint whose note can be read; its other files are not looked at.

    Raises:
        CheckpointError: the folder has no such checkpoint.
    """
    why = "it has no checkpoint"
    for each in _folders(folder / "checkpoints", reverse=True):
        try:
            return _position(json.loads((each / "state.json").read_text()))
        except UNREADABLE as error:
            why = f"none of its checkpoints can be read, {each.name}: {type(error).__name__}: {error}"
    raise CheckpointError(f"{folder} holds no run: {why}.")


def read_config(folder: Path) -> dict[str, Any]:
    """What the run in a folder was asked, as its config.yaml says.

    Raises:
        Damaged: there is none, or it cannot be read.
    """
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not all(len(stage) == 1 for stage in flat(config["stages"])):
            raise ValueError(f"it should be a mapping with a list of `stages`, and is {type(config).__name__}")
    except OSError as error:
        raise Damaged(f"{folder} holds no run: its config.yaml cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise Damaged(
            f"{path} is damaged ({type(error).__name__}: {' '.join(str(error).split())}): put it back as it was, or go on with the run by "
            "`turnwise run --resume` and the config it was started with, which writes it anew"
        ) from error
    return config


def read_metrics(folder: Path, updates: int | None = None) -> list[dict[str, Any]]:
    """The updates of the run in a folder, as its metrics.jsonl says. A last line that was cut short (a crash, a full disk) is left out.

    Args:
        updates: look at no more lines than these.

    Raises:
        ConfigError: there is no such file, or another line is damaged.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{folder} holds no run with metrics: {error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:updates], start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or type(entry["update"]) is not int or type(entry["stage"]) is not str:
                raise ValueError("it should hold the metrics of an update")
        except UNREADABLE as error:
            if number == len(lines):
                warnings.warn(f"{path}: line {number}, the last, is cut short and left out.", stacklevel=2)
                break
            raise ConfigError(
                f"{path}, line {number} is damaged ({type(error).__name__}: {error}): put the file back as it was"
            ) from error
        found.append(entry)
    return found


def read_evaluation(folder: Path) -> dict[str, dict[str, Any]]:
    """The table that a stage `evaluate` left in a run's folder; empty where there is none, and with a warning where it is damaged."""
    path = folder / "evaluation.json"
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for name, row in table.items():
            numbers = ("success_low", "outcome_high") if "pairs" in row else ("outcome", "low", "high")
            if not all(isinstance(row[number], (int, float)) for number in numbers):
                raise ValueError(f"{name!r} has no numbers")
    except UNREADABLE as error:
        warnings.warn(
            f"{path} is damaged and left out ({error}): its numbers stand in metrics.jsonl too, under `evaluate`.", stacklevel=2
        )
        return {}
    return table


def open_ledger(folder: Path, url: str | None = None) -> tuple[Ledger, str]:
    """The ledger of the run in a folder, where its config says that it is, and the run's id.

    Args:
        url: where it is instead; needed where the URL in the config had a password, which no folder keeps.

    Raises:
        ConfigError: the folder holds no run, or its ledger cannot be opened or is not the run's.
    """
    config = read_config(folder)
    try:
        position = last_position(folder)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    url = url or config.get("ledger")
    if url is None and not (folder / "ledger.sqlite").is_file():
        raise ConfigError(f"the ledger of the run in {folder} is gone (ledger.sqlite): put it back to read it")
    if url is not None and HIDDEN in url:
        raise ConfigError(
            f"the ledger of the run in {folder} is at {url}, whose password is not kept: give the URL with --ledger"
        )
    try:
        ledger = Ledger(url or folder / "ledger.sqlite", create=False)
        ledger.expect(position.run, position.ledger)
    except LedgerError as error:
        raise ConfigError(f"the ledger of the run in {folder} cannot be read: {error}") from error
    return ledger, position.run


def prune(root: Path, keep: int) -> None:
    """Removes the oldest checkpoints beyond the `keep` latest, never one that a stage of those kept began from."""
    folders = _folders(root)
    starts = set()
    for folder in folders[-keep:]:
        with contextlib.suppress(*UNREADABLE):  # a torn one needs nothing
            starts.add(f"update-{_position(json.loads((folder / 'state.json').read_text())).start:06d}")
    for old in folders[:-keep]:
        if old.name not in starts:
            shutil.rmtree(old)


def _folders(root: Path, *, reverse: bool = False) -> list[Path]:
    """The checkpoints in a folder by the number of their update."""
    numbered = [(int(n), f) for f in root.glob("update-*") if (n := f.name.removeprefix("update-")).isdecimal()]
    return [folder for _, folder in sorted(numbered, reverse=reverse)]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
