"""Reads the rows that an environment makes its starts of, and divides them by content."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..util.wording import name_of
from .records import rows


def named(place: str) -> Callable[..., Any]:
    """Returns the function that "python:MODULE:FUNCTION" names.

    Raises:
        ValueError: there is none.
    """
    module, _, name = place.removeprefix("python:").partition(":")
    try:
        found = vars(importlib.import_module(module)).get(name)
    except ImportError as error:
        raise ValueError(f"{place!r}: cannot import {module!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"{place!r}: the module {module!r} has no function {name!r}")
    return found


def read_tasks(data: str) -> Iterator[tuple[str, Any]]:
    """Yields (place, content) of each row of a data set.

    Args:
        data: a file of JSON lines or one JSON array, a folder that `datasets` saved, or
            "python:MODULE:FUNCTION", which returns rows.

    Raises:
        ValueError: there is no such function, or what is there cannot be read.
    """
    if data.startswith("python:"):
        for number, row in enumerate(named(data)(), 1):
            yield f"{data} row {number}", row
    else:
        yield from rows(Path(data))


def time_of(data: str) -> int:
    """Returns when the file of a data set was last written, in nanoseconds; 0: it is no file."""
    path = Path(data)
    return path.stat().st_mtime_ns if path.is_file() else 0


class Task(NamedTuple):
    """A row that starts are made of, and what it is known by."""

    key: str
    row: Mapping[str, Any]


Splits = Mapping[str, tuple[Task, ...]]


def content_key(content: Any) -> str:
    """Returns a hash of a row's content, JSON data."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_tasks(tasks: Iterable[tuple[Any, Any, Mapping[str, Any]]], held_out: float) -> Splits:
    """Divides rows into those that train and those held out, "train" and "held_out"; which ones
    these are, and their order, do not change when the data is shuffled or grows.

    Args:
        tasks: of each row what is asked in it, which decides its side: no question is on both; what
            makes it a row of its own, or it is another one's copy; and the row.
        held_out: share of the rows that are held out.
    """
    apart: dict[str, bool] = {}
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for asked, whole, row in tasks:
        key = content_key([asked, whole])
        apart[key] = int(content_key(asked), 16) / 16**16 < held_out
        copy = (content_key(row), row)  # of several copies the same one, whatever their order
        found[key] = min(found.get(key, copy), copy, key=lambda each: each[0])
    ordered = [Task(key, found[key][1]) for key in sorted(found)]
    return {
        "train": tuple(task for task in ordered if not apart[task.key]),
        "held_out": tuple(task for task in ordered if apart[task.key]),
    }


def task_of(splits: Splits, options: Mapping[str, Any] | None, number: int, data: str) -> Task:
    """Returns the row of a number; as many numbers in a row as there are rows visit each once.

    Args:
        splits: the rows of each split.
        options: of the reset: `split`, "train" (default) or "held_out".
        number: of the start, such as its seed.
        data: the name of the data set, for messages.

    Raises:
        ValueError: other options, or there is no such split, or it has no rows.
    """
    given = dict(options or {})
    name = given.pop("split", "train")
    if given:
        raise ValueError(f"{data} takes the option split, not {', '.join(given)}")
    tasks = splits.get(name)
    if not tasks:
        has = ", ".join(f"{each} ({len(some)})" for each, some in splits.items())
        raise ValueError(f"{data} has no rows in the split {name!r}; there are {has}")
    return tasks[number % len(tasks)]


def scored(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the score that a function gives.

    Raises:
        ValueError: it is no number.
    """
    score = function(*arguments)
    if not isinstance(score, (bool, int, float, np.generic)) or not math.isfinite(score):
        raise ValueError(f"{name_of(function)} returned {score!r}, which is no number")
    return float(score)
