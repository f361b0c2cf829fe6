"""What a file holds, and what somebody said in it, whatever the format."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

from ..episode import Message
from ..preferences import PreferenceError
from ..suggest import install

IMPORTED = "imported"  # the environment, the source and the rater of what was played and judged elsewhere
Talk = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Ranked:
    """Somebody ranked conversations.

    Attributes:
        where: the file and the place in it.
        talks: the conversations, whole.
        tiers: their places in `talks`, best first; those in one tier are tied.
        strength, probability, aspect, details: as in `Comparison`.
    """

    where: str
    talks: tuple[Talk, ...]
    tiers: tuple[tuple[int, ...], ...]
    rater: str = IMPORTED
    strength: float | None = None
    probability: float | None = None
    aspect: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scored:
    """Somebody scored one conversation: as a whole, turn by turn, or by aspects; see `Feedback`."""

    where: str
    talk: Talk
    score: float | None = None
    turn_scores: tuple[float | None, ...] | None = None
    aspects: Mapping[str, float] = field(default_factory=dict)
    rater: str = IMPORTED
    details: Mapping[str, Any] = field(default_factory=dict)


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, what stands there) of a folder saved by `datasets` (its first split), or of a file of JSON: one value per line,
    or one array; `.gz` is unpacked.

    Raises:
        PreferenceError: what is there cannot be read; the message names the place.
    """
    if path.is_dir():
        yield from _folder(path)
        return
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with cast(TextIO, opened(path, "rt", encoding="utf-8-sig")) as file:
            for number, line in enumerate(file, 1):
                if line.lstrip().startswith("["):
                    yield from ((f"{path} record {i}", each) for i, each in enumerate(json.loads(line + file.read()), 1))
                elif line.strip():
                    yield f"{path}:{number}", json.loads(line)
    except UnicodeDecodeError as error:
        raise PreferenceError(f"{path}:{number + 1} is not text in UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise PreferenceError(f"{path}:{number} is not JSON: {error}") from error
    except OSError as error:
        raise PreferenceError(f"{path} cannot be read: {error}") from error


def _folder(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise PreferenceError(f"reading a datasets folder needs datasets: {install('data')}") from error
    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise PreferenceError(f"{path} is no folder that `datasets` saved: {error}") from error
    records: Any = found if isinstance(found, Dataset) else found[next(iter(found))]
    for i, record in enumerate(records, 1):
        yield f"{path} row {i}", record


def messages(value: Any, where: str, key: str) -> Talk:
    """A list of {role, content} as messages.

    Raises:
        PreferenceError: it is something else.
    """
    if isinstance(value, str):
        raise PreferenceError(
            f"{where}: `{key}` is a text; conversations are needed, lists of {{role, content}} (for one reply: "
            '[{"role": "assistant", "content": "..."}])'
        )
    if not isinstance(value, Sequence):
        raise PreferenceError(f"{where}: `{key}` must be a list of {{role, content}}, got {value!r}")
    said = []
    for m in value:
        if not isinstance(m, Mapping) or not isinstance(m.get("content"), str):
            raise PreferenceError(f"{where}: every message of `{key}` must be {{role, content}} with a text, got {m!r}")
        if m.get("role") not in ("system", "user", "assistant", "tool"):
            raise PreferenceError(
                f"{where}: `{key}` has the role {m.get('role')!r}; there are system, user, assistant and tool"
            )
        said.append(Message(m["role"], m["content"]))
    return tuple(said)


_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


def is_transcript(text: Any) -> bool:
    """Whether a text is a whole conversation in the notation of HH-RLHF: `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    return isinstance(text, str) and len({found.group(1) for found in _SPEAKER.finditer(text)}) == 2


def transcript(text: str) -> Talk:
    """A conversation in the notation of HH-RLHF. What stands before the first speaker is the system prompt; what one speaker says twice
    in a row is one message."""
    before, *parts = _SPEAKER.split(text)
    said = [Message("system", before)] if before.strip() else []
    for who, words in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if who == "Human" else "assistant"
        if said and said[-1].role == role:
            said[-1] = Message(said[-1].role, f"{said[-1].content}\n\n{words}")
        else:
            said.append(Message("user" if who == "Human" else "assistant", words))
    return tuple(said)
