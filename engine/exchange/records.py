"""The rows of a file, and the rankings and scores in them, whatever the format."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import PreferenceError
from ..records.episode import Message
from ..util.suggest import install

# The environment, the source and the rater of what was played and judged elsewhere.
IMPORTED = "imported"
Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Ranked:
    """A ranking of conversations.

    Attributes:
        where: the file and the place in it.
        talks: the conversations, whole.
        tiers: their places in `talks`, best first; those in one tier are tied.
        strength, probability, aspect, details: as in `Comparison`.
        tools: schemas of what the assistant might call.
    """

    where: str
    talks: tuple[Messages, ...]
    tiers: tuple[tuple[int, ...], ...]
    rater: str = IMPORTED
    strength: float | None = None
    probability: float | None = None
    aspect: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of one conversation: as a whole, turn by turn, or by aspects; see `Feedback`."""

    where: str
    messages: Messages
    score: float | None = None
    turn_scores: tuple[float | None, ...] | None = None
    aspects: Mapping[str, float] = field(default_factory=dict)
    rater: str = IMPORTED
    details: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()


class Unread(Counter[str]):
    """Keys that hold something and are not read, and in how many places; reported once per file."""

    def note(self, found: Mapping[str, Any], read: Collection[str], of: str = "") -> None:
        """Counts the keys of a record that hold something and are not read."""
        self.update(
            of + str(key) for key, value in found.items() if key not in read and holds(value)
        )

    def warn(self, path: Path) -> None:
        """Warns of the counted keys, if there are any."""
        if self:
            keys = ", ".join(f"{key} ({count}x)" for key, count in sorted(self.items()))
            warnings.warn(
                f"{path}: these keys are not read, nothing is made of what they hold: {keys}",
                stacklevel=2,
            )


def holds(value: Any) -> bool:
    """Returns whether a key has a value: tables fill up with None, and lists and texts may be
    empty."""
    return value is not None and not (
        isinstance(value, (str, Sequence, Mapping)) and not len(value)
    )


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, content) of a folder saved by `datasets` (its first split), or of a file of
    JSON: one value per line, or one array, in UTF-8, UTF-16 or UTF-32; what gzip packed is
    unpacked, whatever its name.

    Half characters (lone surrogates), which JSON can spell and no tokenizer reads, become U+FFFD; a
    warning counts them.

    Raises:
        PreferenceError: what is there cannot be read; the message names the place and what to do.
    """
    if path.is_dir():
        yield from _folder(path)
        return
    halves: list[str] = []  # where each stood
    for where, value, odd in _values(path):
        if odd:
            value, count = _whole(value)
            halves += [where] * count
        yield where, value
    if halves:
        warnings.warn(
            f"{path}: {len(halves)} half characters (lone surrogates, the first at {halves[0]}) are"
            " read as U+FFFD",
            stacklevel=2,
        )


def _values(path: Path) -> Iterator[tuple[str, Any, bool]]:
    """Yields (place, content, whether half characters may be in it) of a file."""
    number, encoding, started = 0, "utf-8", False
    try:
        with path.open("rb") as packed:
            head = packed.peek(16)
            other = next((what for magic, what in _OTHER.items() if head.startswith(magic)), None)
            if other is not None:
                raise OSError(f"it is {other}")
            file = gzip.GzipFile(fileobj=packed) if head.startswith(b"\x1f\x8b") else packed
            encoding = json.detect_encoding(file.peek(4)[:4])
            with io.TextIOWrapper(cast(BinaryIO, file), encoding) as lines:
                for number, line in enumerate(lines, 1):
                    if line.lstrip().startswith("[") and not started:
                        text = line + lines.read()
                        odd = _SURROGATE.search(text) is not None
                        yield from (
                            (f"{path} record {i}", each, odd)
                            for i, each in enumerate(_parsed(text), 1)
                        )
                    elif line.strip():
                        started = True
                        yield (
                            f"{path}:{number}",
                            _parsed(line.rstrip("\r\n")),
                            _SURROGATE.search(line) is not None,
                        )
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise PreferenceError(
            f"{path}:{number + 1} is not text in {name}: {error}; write the file as UTF-8"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise PreferenceError(
            f"{path}: what gzip packed is cut off or damaged after line {number} ({error}): copy or"
            " download it again"
        ) from error
    except json.JSONDecodeError as error:
        raise PreferenceError(
            f"{path}:{max(number, 1) - 1 + error.lineno} is not JSON: {error.msg}, column"
            f" {error.colno}; one value per line is needed, or one array of all"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PreferenceError(f"{path}:{number} is not JSON: {error}") from error
    except OSError as error:
        raise PreferenceError(f"{path} cannot be read: {error}") from error


_OTHER = {  # what a file begins with, to what it is and what to do
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it (`zstd -d`)",
    b"BZh": "packed by bzip2: unpack it (`bunzip2`)",
    b"\xfd7zXZ": "packed by xz: unpack it (`unxz`)",
    b"PAR1": (
        "a parquet file: make a folder of it with datasets'"
        " `Dataset.from_parquet(...).save_to_disk(...)`"
    ),
    b"ARROW1": (
        "an arrow file: make a folder of it with datasets'"
        " `Dataset.from_file(...).save_to_disk(...)`"
    ),
    b"version https://": "a pointer of git-lfs to a file that is not there: `git lfs pull`",
}
_SURROGATE = re.compile(r"\\u[dD][89abcdefABCDEF]")


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(
            f"the key {twice!r} stands twice in one object, and only one of them could be read"
        )
    return found


def _whole(value: Any) -> tuple[Any, int]:
    """Returns the same with U+FFFD for every lone surrogate, and how many there were."""
    if isinstance(value, str):
        return re.subn("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        each = [_whole(v) for v in value]
        return [v for v, _ in each], sum(n for _, n in each)
    if isinstance(value, dict):
        items = [(_whole(k), _whole(v)) for k, v in value.items()]
        return {k: v for (k, _), (v, _) in items}, sum(n + m for (_, n), (_, m) in items)
    return value, 0


def _folder(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise PreferenceError(
            f"reading a datasets folder needs datasets: {install('data')}"
        ) from error
    try:  # whatever is damaged there, it is the folder's fault
        found = load_from_disk(str(path))
        splits = [None] if isinstance(found, Dataset) else list(found)
    except Exception as error:
        raise PreferenceError(
            f"{path} is no folder that `datasets` saved, or is damaged: {error}"
        ) from error
    if len(splits) > 1:
        warnings.warn(
            f"{path} has the splits {', '.join(map(str, splits))}: {splits[0]!r} is read",
            stacklevel=2,
        )
    number = 0
    try:
        for number, record in enumerate(
            found if None in splits else found[splits[0]] if splits else (), 1
        ):
            yield f"{path} row {number}", record
    except (OSError, ValueError) as error:
        raise PreferenceError(f"{path} is damaged after row {number}: {error}") from error


# What is part of a conversation, or of how it is to be learned, and has no place in ours: without
# it, it would be another conversation.
# Whether a reply is trained on: OpenAI's and Mistral's; axolotl's.
MARKS = ("weight", "train", "training")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_THOUGHTS = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
_OF_REPLIES = (
    "tool_calls",
    "function_call",
    "refusal",
    "train_detail",
    *_THOUGHTS,
    *MARKS,
    *_MEDIA,
)
_OF_CONTEXT = (
    "history",
    "conversation",
    "conversations",
    "functions",
    "documents",
    "weight",
    "weights",
    "chat_template_kwargs",
    *_MEDIA,
)


def check_keys(
    record: Mapping[str, Any], read: Collection[str], where: str, unread: Unread
) -> None:
    """Notes the keys of a record that are not read.

    Raises:
        PreferenceError: one of them is part of the conversation.
    """
    for key in _OF_CONTEXT:
        if (
            key not in read
            and holds(record.get(key))
            and not (key.startswith("weight") and record[key] == 1)
        ):
            raise PreferenceError(
                f"{where}: `{key}` is part of the conversation, or of its weight, and cannot be"
                f" read with {', '.join(read)}; put it into the messages, or remove the key"
            )
    unread.note(record, (*read, *_OF_CONTEXT))


def messages(value: Any, where: str, key: str, unread: Unread) -> Messages:
    """Reads a list of {role, content} as messages.

    Raises:
        PreferenceError: it is something else, or a message holds more than a text.
    """
    if isinstance(value, str):
        raise PreferenceError(
            f"{where}: `{key}` is a text; conversations are needed, lists of {{role, content}} (for"
            ' one reply: [{"role": "assistant", "content": "..."}])'
        )
    if not isinstance(value, Sequence):
        raise PreferenceError(
            f"{where}: `{key}` must be a list of {{role, content}}, got {value!r}"
        )
    found: list[Message] = []
    for m in value:
        if isinstance(m, Mapping):
            if "role" not in m and "from" in m and "value" in m:
                raise PreferenceError(
                    f"{where}: `{key}` has {{from, value}}; they must be called {{role, content}}"
                    " (human is user, gpt is assistant)"
                )
            more = next(
                (
                    k
                    for k in _OF_REPLIES
                    if holds(m.get(k)) and not (k in ("weight", "train", "training") and m[k] == 1)
                ),
                None,
            )
            if more is not None:
                cure = (
                    "only fine-tuning (sft) knows it, 0 or 1 on the assistant's messages, got"
                    f" {m[more]!r}"
                    if more in ("weight", "train", "training")
                    else "write it into `content` as the policy is to write it"
                )
                raise PreferenceError(
                    f"{where}: a message of `{key}` has `{more}`; messages here are texts: {cure}"
                )
            unread.note(m, ("role", "content", *_OF_REPLIES), of="message.")
        if not isinstance(m, Mapping) or not isinstance(m.get("content"), str):
            raise PreferenceError(
                f"{where}: every message of `{key}` must be {{role, content}} with a text, got"
                f" {m!r}"
            )
        if m.get("role") not in ("system", "user", "assistant", "tool"):
            raise PreferenceError(
                f"{where}: `{key}` has the role {m.get('role')!r}; there are system, user,"
                " assistant and tool"
            )
        if m["role"] == "tool" and found and found[-1].role == "tool":  # results of several calls
            parts = [*found[-1].unjoined, Message("tool", m["content"])]
            found[-1] = Message.joined("tool", parts)
        else:
            found.append(Message(m["role"], m["content"]))
    return tuple(found)


def with_system(conversation: Messages, system: Any, where: str) -> Messages:
    """Returns a conversation with the system prompt that its record has under `system`.

    Raises:
        PreferenceError: it is no text, or the conversation has another one.
    """
    if not holds(system):
        return conversation
    if not isinstance(system, str):
        raise PreferenceError(f"{where}: `system` must be a text, got {system!r}")
    if conversation and conversation[0].role == "system":
        if conversation[0].content != system:
            raise PreferenceError(
                f"{where}: `system` is another text than the system message of the conversation;"
                " keep one of them"
            )
        return conversation
    return (Message("system", system), *conversation)


def schemas(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Returns the JSON schemas that a record has under `tools`, as data or as text.

    Raises:
        PreferenceError: it is something else.
    """
    found = value
    if isinstance(value, str) and value.strip():
        try:
            found = json.loads(value)
        except ValueError as error:
            raise PreferenceError(f"{where}: `tools` is not JSON: {error}") from error
    if not holds(found):
        return ()
    if not isinstance(found, Sequence) or not all(isinstance(tool, Mapping) for tool in found):
        raise PreferenceError(f"{where}: `tools` must be a list of JSON schemas, got {value!r}")
    return tuple(found)


def number(value: Any, where: str, key: str) -> float | None:
    """Returns a finite number, or None.

    Raises:
        PreferenceError: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            if math.isfinite(float(value)):
                return float(value)
        except OverflowError:
            pass
    shown = (
        f"{value!r:.60}"
        if not isinstance(value, int) or abs(value) < 10**60
        else "an integer beyond all floats"
    )
    raise PreferenceError(f"{where}: `{key}` must be a finite number, got {shown}")


_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


def is_transcript(text: Any) -> bool:
    r"""Returns whether a text is a whole conversation in the notation of HH-RLHF: `\n\nHuman:
    ...\n\nAssistant: ...`."""
    return isinstance(text, str) and len({found.group(1) for found in _SPEAKER.finditer(text)}) == 2


def transcript(text: str) -> Messages:
    """Reads a conversation in the notation of HH-RLHF. Text before the first speaker is the system
    prompt; successive messages of one speaker are joined into one."""
    before, *parts = _SPEAKER.split(text)
    found = [Message("system", before)] if before.strip() else []
    for who, words in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if who == "Human" else "assistant"
        if found and found[-1].role == role:
            found[-1] = Message(found[-1].role, f"{found[-1].content}\n\n{words}")
        else:
            found.append(Message("user" if who == "Human" else "assistant", words))
    return tuple(found)
