"""Crash-safe writing of files: a draft in the same folder is synced to the disk and then renamed to
the file's name.

A file that is written in place is empty between the moment it is opened and the moment the disk has
its content; one that is renamed without being synced may be empty after a power loss. Whatever a
run writes goes through here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import FileError


def cache_folder() -> Path:
    """Returns the folder of what may be made or fetched again: TURNWISE_CACHE, or `turnwise` in the
    user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TURNWISE_CACHE") or Path(cache) / "turnwise")


def read_note(path: Path) -> dict[str, Any]:
    """Reads a mapping written as JSON.

    Raises:
        FileError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it should hold a mapping, not {type(found).__name__}")
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is damaged ({error}): put it back as it was") from error
    return found


def write(path: Path, content: str | bytes) -> None:
    """Writes a file in one step: a reader sees the old content or the new one, whenever the process
    or the machine stops.

    Raises:
        OSError: it cannot be written; the old content stands.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            file.write(
                content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append(path: Path, line: str) -> None:
    """Adds a line to a file and returns when the disk has it. A crash leaves the lines before, and
    at most a part of this one.

    Raises:
        OSError: it cannot be written.
    """
    new = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


def move(draft: Path, target: Path) -> None:
    """Moves a folder into place in one step, with everything in it on the disk; one that was there
    is moved aside first, and then removed.

    Args:
        draft: the new folder; it must lie on the target's disk, best in the same folder.
        target: where it goes.

    Raises:
        OSError: it cannot be put there.
    """
    for path in [*draft.rglob("*"), draft]:
        sync(path)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(draft, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Syncs a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
