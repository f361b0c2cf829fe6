"""Wording of reasons of failures: the messages of other code, without secrets, in one line."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import NoRoom, PartFailed, Paused
from .secrets import redact

LONGEST = 2000  # characters of a reason
# Files of installed packages, of this engine, and what is no file: "<string>", "_generator.pyx".
_FOREIGN = re.compile(
    r"[/\\](site-packages|dist-packages|lib[/\\]python[0-9.]+)[/\\]|^"
    + re.escape(str(Path(__file__).parents[1]))
    + r"[/\\]|^[^/\\]*$"
)
READ = 10 * LONGEST  # as much of it is searched for secrets before it is cut
_STEERS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def name_of(value: Any) -> str:
    """Returns the name of a function or a class; of any other object that of its class."""
    return getattr(value, "__name__", type(value).__name__)


def numbered(names: Sequence[str]) -> list[str]:
    """Returns names in which each is its own: one that comes again has a number, `rl-2`."""
    return [
        name if (times := names[: i + 1].count(name)) == 1 else f"{name}-{times}"
        for i, name in enumerate(names)
    ]


def valid(text: str) -> str:
    """Returns text in which half characters (lone surrogates) are spelled out, so that it can
    always be encoded."""
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(text: str) -> str:
    """Returns text in which whatever steers a terminal or ends its line is spelled out: control and
    direction signs, half characters."""
    return _STEERS.sub(lambda found: ascii(found[0])[1:-1], text)


def reason_text(text: str, most: int = LONGEST) -> str:
    """Returns a foreign message as a reason: one line without secrets, of at most so many
    characters."""
    line = one_line(redact(text[:READ]))
    if len(line) <= most and len(text) <= READ:
        return line
    rest = f"... ({len(text):,} characters)"
    return line[: most - len(rest)] + rest


def worded(error: BaseException) -> str:
    """Words an error in the one form that all reasons have: `Type: message (file:line)`, as
    `reason_text`.

    An exception whose own text cannot be had is named all the same.
    """
    try:
        message = str.__str__(str(error))
    except BaseException:
        message = "(its message cannot be read)"
    name = type(error).__name__
    if isinstance(error, PartFailed):
        return reason_text(message or name)  # an empty reason would be none
    frames = traceback.extract_tb(error.__traceback__)
    # Lines of a library that was called, and ours, say less than the one that called it.
    own = [frame for frame in frames if not _FOREIGN.search(frame.filename)] or frames
    where = ""
    if own:
        where = reason_text(f" ({own[-1].filename.rsplit('/', 1)[-1]}:{own[-1].lineno})", 300)
    return reason_text(f"{name}: {message}" if message else name, LONGEST - len(where)) + where


def each_text(change: Callable[[str], str], data: Any) -> Any:
    """Returns plain data in which every text, keys included, is changed."""
    if isinstance(data, str):
        return change(data)
    if isinstance(data, Mapping):
        return {each_text(change, key): each_text(change, value) for key, value in data.items()}
    return [each_text(change, value) for value in data] if isinstance(data, (list, tuple)) else data


class PauseReason(str):
    """The reason of a part that asks for the run to be paused, and did not fail."""


class NoRoomReason(str):
    """The reason of a dialogue that cannot begin yet, and did not fail."""


def failure_of(reason: str, otherwise: type[Exception]) -> Exception:
    """Returns the error whose reason `tried` gave, in another process perhaps."""
    kinds: dict[type, type[Exception]] = {PauseReason: Paused, NoRoomReason: NoRoom}
    return kinds.get(type(reason), otherwise)(reason)


def tried(work: Callable[[], Any]) -> tuple[Any, str]:
    """Returns (result, "") or (None, reason), whatever `work` raises; only KeyboardInterrupt, the
    user's Ctrl-C, goes on. That of `Paused` is a `PauseReason`, that of `NoRoom` a
    `NoRoomReason`."""
    try:
        return work(), ""
    except KeyboardInterrupt:
        raise
    except Paused as paused:
        return None, PauseReason(reason_text(str(paused)))
    except NoRoom as full:
        return None, NoRoomReason(reason_text(str(full)))
    except BaseException as error:
        return None, worded(error)
