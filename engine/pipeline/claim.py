"""A run's claim on its folder: one process at a time, and nothing of another run is overwritten."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import CheckpointError, ConfigError, Damaged, DatabaseError
from ..ledger.ledger import Ledger
from ..util import files
from ..util.secrets import redacted
from .config import RunConfig
from .folder import read_config, read_metrics

RESULTS = ("metrics.jsonl", "ledger.sqlite", "checkpoints")
OWN = {
    "file": ("config.yaml", "metrics.jsonl", "evaluation.json", "run.pid", "run.lock"),
    "folder": ("policy", "checkpoints"),
}


class Claim:
    """The right to work in a folder.

    The lock is the operating system's: it ends with the process, however that ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: Any = None

    def take(self) -> None:
        """Makes the folder where it is missing, and claims it.

        Raises:
            ConfigError: another process is at work in it, something else stands where a run puts
                its own, or it cannot be written to.
        """
        from filelock import FileLock, Timeout

        self._check_places()
        pid = self.folder / "run.pid"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / "run.lock")
            self._lock.acquire(timeout=0)
            pid.write_text(f"{os.getpid()}\n")
        except Timeout:
            self._lock = None
            who = (
                f"process {pid.read_text(errors='replace').strip()}"
                if pid.exists()
                else "another process"
            )
            raise ConfigError(
                f"the run in {self.folder} is at work in {who}: wait for it, stop it (Ctrl-C, or"
                " kill -TERM), or choose another folder"
            ) from None
        except OSError as error:
            self.release()
            raise ConfigError(
                f"the run's folder {self.folder} cannot be made or written to: {error}"
            ) from error

    def release(self) -> None:
        """Gives the folder back; nothing happens where it was not claimed."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            (self.folder / "run.pid").unlink(missing_ok=True)
        self._lock.release()
        self._lock = None

    def _check_places(self) -> None:
        for path, own in (
            (self.folder / name, own) for own, names in OWN.items() for name in names
        ):
            odd = path.is_symlink() or (path.exists() and path.is_dir() != (own == "folder"))
            # These may lie on another disk.
            if odd and not (path.name == "checkpoints" and path.is_dir()):
                what = (
                    "a symbolic link"
                    if path.is_symlink()
                    else "a folder"
                    if path.is_dir()
                    else "a file"
                )
                raise ConfigError(
                    f"{path} is {what}, and a run puts a {own} of its own in that place: move it"
                    " away, or choose another folder"
                )


def folder_named(name: str) -> Path:
    """Returns the folder of a run that was given a name and no folder; absolute, since an
    environment may change the directory.

    Raises:
        ConfigError: the name leads elsewhere.
    """
    if path_safe(name) != name:
        raise ConfigError(
            f"the run's name {name!r} is to be its folder under runs/, so it can hold no / or \\,"
            " no control character, and not only dots: choose another name, or say where the run"
            " goes (folder)"
        )
    return (Path("runs") / name).absolute()


def has_results(folder: Path) -> bool:
    """Returns whether a run has been at work in a folder."""
    return any((folder / name).exists() for name in RESULTS)


def is_unspent(folder: Path) -> bool:
    """Returns whether the folder's run ended before anything was played, judged or learned, so that
    another one may begin in its place."""
    if {path.name for path in (folder / "checkpoints").glob("*")} - {"update-000000"}:
        return False
    try:
        if (folder / "metrics.jsonl").exists() and read_metrics(folder):
            return False
        if (folder / "ledger.sqlite").exists():
            with contextlib.closing(Ledger(folder / "ledger.sqlite", create=False)) as ledger:
                return not any(ledger.counts().values())
    # what is damaged may have held something
    except (ConfigError, DatabaseError, CheckpointError):
        return False
    return True


def shown_config(config: RunConfig) -> dict[str, Any]:
    """Returns a config as config.yaml shows it: what was asked, as plain data, secrets hidden."""
    return plain_config(config.model_dump(mode="python", exclude_defaults=True))


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config as plain data, secrets hidden."""
    return json.loads(json.dumps(redacted(config), default=str))


def write_config(folder: Path, shown: Mapping[str, Any]) -> None:
    """Writes config.yaml, where it does not say the same already."""
    target, text = folder / "config.yaml", yaml.safe_dump(dict(shown), sort_keys=False)
    if not target.exists() or target.read_bytes() != text.encode():
        files.write(target, text)


def refuse_results(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses to begin a run in a folder that holds one.

    Args:
        folder: of the run.
        config: what is asked now, as config.yaml would show it.

    Raises:
        ConfigError: always; it says whether the run there is this one or another.
    """
    with contextlib.suppress(Damaged):
        if read_config(folder) != config:
            raise ConfigError(
                f"the folder {folder} holds a run with another config; choose another folder or"
                " name, or remove it"
            )
    raise ConfigError(
        f"the folder {folder} holds this run's results already: go on with `turnwise run --resume`"
        " (or resume=True), choose another folder or name, or remove it"
    )


def path_safe(name: str) -> str:
    """Returns a name as one step of a path: it leads nowhere else."""
    safe = (
        re.sub(r"[/\\\x00-\x1f\x7f]", "-", name)
        .encode("utf-8", "replace")[:200]
        .decode(errors="ignore")
    )
    return safe if safe.strip(". ") else "-"
