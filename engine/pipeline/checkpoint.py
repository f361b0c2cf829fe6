"""Checkpoints: everything a run needs to go on exactly, written whole or not at all; and what else
a run's folder says of it.

checkpoints/update-000120/
  state.json           where the run stood, what cannot be kept in tensors, and a hash of every
                       other file
  policy/              as `save_pretrained` writes it
  <part>.safetensors   tensors of whatever else learns: optimizer, credit method, combiner, reward
                       model, source
  <part>/              those that processes divide, each process's shares in a file of its own
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..util import files

if TYPE_CHECKING:
    from ..policy.policy import Policy
    from ..protocols import Stateful


# What reading a file raises that holds something else than was written.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

# What a disk that is full or fails says.
DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stood.

    Attributes:
        run: its id.
        update: updates made, through the whole run.
        stage: index of the stage it was in.
        done: updates that stage had made.
        start: number of the update after which that stage began; the checkpoint of that number is
            kept, since a reference policy is the policy as it was then.
        version: the policy's.
        machine: what a bit-exact continuation depends on: threads, attention, device, processes,
            torch, and the day that chat templates are given.
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

    def states(self, policy: Policy | None = None) -> dict[str, dict[str, Any]]:
        """The state of every part, by name: tensors and plain values together, as its `state_dict`
        gave them.

        Args:
            policy: whose weights are divided among processes, all of which call this together:
                what was divided is divided again, whatever their number was.
        """
        from safetensors.torch import load_file

        plain = json.loads((self.folder / "state.json").read_text())["states"]
        found = {
            name: {**values, **load_file(self.folder / f"{name}.safetensors")}
            for name, values in plain.items()
        }
        for name in found:
            if (self.folder / name).is_dir():
                from ..policy.sharding import load_shares

                device = policy.device if policy is not None and policy.is_sharded else None
                found[name] |= load_shares(self.folder / name, device)
        return found


def save(
    root: Path,
    position: Position,
    policy: Policy | None,
    parts: Mapping[str, Stateful],
    keep: int,
) -> Path:
    """Writes a checkpoint next to the others, moves it into place whole, and removes the oldest
    ones. One that is there already stays. Where the policy's weights are divided, all processes
    call this together.

    Args:
        root: the folder of the checkpoints.
        position: how far the run is.
        policy: left out where the run has loaded none yet.
        parts: by name; those without state are left out.
        keep: see `prune`.

    Raises:
        CheckpointError: it cannot be written (a full disk); the checkpoints before it are
            untouched.
    """
    from safetensors.torch import save_file
    from torch import Tensor

    target, draft = root / f"update-{position.update:06d}", root / ".draft"
    together = policy.accelerator if policy is not None and policy.is_sharded else None
    main = together is None or together.is_main_process
    wait = together.wait_for_everyone if together is not None else lambda: None
    whole = main and _is_whole(target)
    if together is not None:  # what one sees in a folder, another may not see yet
        from .processes import broadcast

        whole = broadcast(whole)
    if whole:
        return target
    with _written(target, draft) if main else contextlib.nullcontext():
        if main:
            draft.mkdir(parents=True)
        wait()
        if policy is not None:
            policy.save_pretrained(draft / "policy")
        plain: dict[str, Any] = {}
        for name, part in parts.items():
            if not (state := part.state_dict()):
                continue
            tensors = {k: v.contiguous() for k, v in state.items() if isinstance(v, Tensor)}
            plain[name] = {k: v for k, v in state.items() if k not in tensors}
            if together is not None:
                from ..policy.sharding import save_shares

                tensors = save_shares(tensors, draft / name)
            if main:
                save_file(tensors, draft / f"{name}.safetensors")
        wait()
        if main:
            files_in = sorted(f for f in draft.rglob("*") if f.is_file())
            hashes = {str(f.relative_to(draft)): _hash(f) for f in files_in}
            note = {"position": asdict(position), "states": plain, "files": hashes}
            (draft / "state.json").write_text(json.dumps(note))
            files.move(draft, target)
            prune(root, keep)
    wait()
    return target


def _is_whole(target: Path) -> bool:
    """Returns whether a checkpoint is there; one of an earlier attempt may be torn."""
    try:
        read(target)
    except CheckpointError:
        return False
    return True


def save_policy(policy: Policy, target: Path) -> None:
    """Writes a policy as `save_pretrained` does, whole or not at all.

    Raises:
        CheckpointError: it cannot be written; what was there before stands.
    """
    draft = target.with_name(f".{target.name}")
    if policy.is_sharded and not policy.accelerator.is_main_process:
        policy.save_pretrained(draft)  # its share
        return
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
            f"{target} cannot be written: {error}. Everything up to the last checkpoint stands;"
            " make room on the disk and go on with `turnwise run --resume`."
        ) from error


def name_full_disk(error: OSError, folder: Path) -> None:
    """Raises `CheckpointError` where an error is that of a disk which is full or fails."""
    if error.errno in DISK:
        raise CheckpointError(
            f"the disk of {folder} cannot be written to: {error}. Everything up to the last"
            " checkpoint stands; make room and go on with `turnwise run --resume`."
        ) from error


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; torn ones are skipped with a warning. None where there
    is none at all.

    Raises:
        CheckpointError: there are some, and all are torn.
    """
    torn: list[CheckpointError] = []
    for folder in checkpoint_folders(root, reverse=True):
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
            f"no checkpoint in {root} can be used: {' '.join(map(str, torn))} Put one back as it"
            " was, or begin another run in another folder; episodes and feedback are in the"
            " ledger all the same."
        )
    return None


def read(folder: Path) -> Checkpoint:
    """A checkpoint, checked file by file.

    Raises:
        CheckpointError: it is not there, or torn.
    """
    try:
        note = json.loads((folder / "state.json").read_text())
        position, hashes, states = position_in(note), dict(note["files"]), dict(note["states"])
        lies = {str(f.relative_to(folder)) for f in folder.rglob("*.safetensors")}
        needs = lies | {f"{name}.safetensors" for name in states}
        unnamed = sorted(needs - set(hashes))
        if (
            not unnamed
            and position.machine.get("device")
            and not any(name.startswith("policy/") for name in hashes)
        ):
            unnamed = ["policy"]
        if unnamed:
            raise CheckpointError(
                f"the checkpoint {folder} is torn: state.json does not name {unnamed[0]}."
            )
        for name, digest in hashes.items():
            if _hash(folder / name) != digest:
                raise CheckpointError(
                    f"the checkpoint {folder} is torn: {name} is not what was written."
                )
    except UNREADABLE as error:
        raise CheckpointError(
            f"the checkpoint {folder} is torn or missing: {type(error).__name__}: {error}."
        ) from error
    return Checkpoint(folder, position)


def position_in(note: Mapping[str, Any]) -> Position:
    """The position in a checkpoint's note.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    position = Position(**note["position"])
    numbers = (position.update, position.stage, position.done, position.start, position.version)
    if not isinstance(position.run, str) or any(
        not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers
    ):
        raise ValueError(f"no position of a run: {note['position']}")
    return dataclasses.replace(
        position, machine=dict(position.machine), ledger=dict(position.ledger)
    )


def prune(root: Path, keep: int) -> None:
    """Removes the oldest checkpoints beyond the `keep` latest, never one that a stage of those kept
    began from."""
    folders = checkpoint_folders(root)
    starts = set()
    for folder in folders[-keep:]:
        with contextlib.suppress(*UNREADABLE):  # a torn one needs nothing
            starts.add(
                f"update-{position_in(json.loads((folder / 'state.json').read_text())).start:06d}"
            )
    for old in folders[:-keep]:
        if old.name not in starts:
            shutil.rmtree(old)


def checkpoint_folders(root: Path, *, reverse: bool = False) -> list[Path]:
    """The checkpoints in a folder by the number of their update."""
    numbered = [
        (int(n), f)
        for f in root.glob("update-*")
        if (n := f.name.removeprefix("update-")).isdecimal()
    ]
    return [folder for _, folder in sorted(numbered, reverse=reverse)]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
