"""Reads the rows that an environment makes its starts of, and divides them by content."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

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


def row_key(content: Any) -> str:
    """Returns what a row is known by: a hash of its content, JSON data."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_tasks(
    tasks: Mapping[str, Mapping[str, Any]], held_out: float
) -> Mapping[str, tuple[Mapping[str, Any], ...]]:
    """Divides rows into those that train and those held out, "train" and "held_out"; which ones
    these are, and their order, do not change when the data is shuffled or grows.

    Args:
        tasks: rows by `row_key`, which each gets as its `key`.
        held_out: share of the rows that are held out.
    """
    # The first digits decide what is held out, the last ones the order.
    ordered = [{**tasks[key], "key": key} for key in sorted(tasks, key=lambda key: key[::-1])]
    apart = {key: int(key, 16) / 16**16 < held_out for key in tasks}
    return {
        "train": tuple(row for row in ordered if not apart[row["key"]]),
        "held_out": tuple(row for row in ordered if apart[row["key"]]),
    }


def task_of(
    tasks: Mapping[str, tuple[Mapping[str, Any], ...]],
    options: Mapping[str, Any] | None,
    number: int,
    data: str,
) -> Mapping[str, Any]:
    """Returns the row of a number; as many numbers in a row as there are rows visit each once.

    Args:
        tasks: the rows of each split.
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
    rows_ = tasks.get(name)
    if not rows_:
        has = ", ".join(f"{each} ({len(some)})" for each, some in tasks.items())
        raise ValueError(f"{data} has no rows in the split {name!r}; there are {has}")
    return rows_[number % len(rows_)]


def scored(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the score that a function gives.

    Raises:
        ValueError: it is no number.
    """
    score = function(*arguments)
    if not isinstance(score, (bool, int, float, np.generic)) or not math.isfinite(score):
        raise ValueError(f"{name_of(function)} returned {score!r}, which is no number")
    return float(score)
