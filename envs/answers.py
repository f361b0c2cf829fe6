r"""Checks replies against known answers, for rewards that can be verified.

What counts as the answer in a reply: what stands within <answer>...</answer> or \boxed{...}, the
last of several; without such marks the reply itself, of which each check reads what it is about.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import regex

Check = Callable[[str, Mapping[str, Any]], float]

SECONDS = 1.0  # that a pattern may take on a reply
_MARKED = regex.compile(r"<answer>(.*?)</answer>|\\boxed\{([^{}]*)\}", regex.DOTALL)
_NUMBER = regex.compile(r"(?<![\w.])[-+]?\$?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")
_PLAIN = regex.compile(r"[-+]?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d{1,2})?")
_LETTER = regex.compile(r"(?<![A-Za-z'])\(?([A-J])\)?(?![A-Za-z'])")


def marked(reply: str) -> str:
    """Returns the part of a reply that is marked as the answer; all of it where none is."""
    found = _MARKED.findall(reply)
    return (found[-1][0] or found[-1][1]).strip() if found else reply.strip()


def last_number(reply: str) -> float | None:
    """Returns the last number in a reply, or None; digits may be grouped by commas."""
    found = _NUMBER.findall(marked(reply))
    return number(found[-1]) if found else None


def number(text: Any) -> float | None:
    """Returns a text that is a decimal number as a whole as that number, else None; with zeros in
    front it is a code."""
    plain = str(text).strip().replace(",", "").replace("$", "")
    return float(plain) if _PLAIN.fullmatch(plain) else None


def check_of(kind: str) -> Check:
    """Returns a check: (reply, row) -> the score, 1 for a right answer.

    Args:
        kind: "numeric", "exact", "choice" (a letter, A to J), "regex" (the answer is a pattern that
            the reply must contain), or "python:MODULE:FUNCTION", a function of reply and row.

    Raises:
        ValueError: there is no such check, or no such function.
    """
    if kind.startswith("python:"):
        return partial(_by_function, _function(kind))
    if kind not in CHECKS:
        raise ValueError(
            f"answer must be one of {', '.join(CHECKS)} or python:MODULE:FUNCTION, got {kind!r}"
        )
    return CHECKS[kind]


def _numeric(reply: str, row: Mapping[str, Any]) -> float:
    right, given = number(row["answer"]), last_number(reply)
    if right is None:
        raise ValueError(f"the answer {row['answer']!r} of a row is no number")
    return float(given is not None and math.isclose(given, right, rel_tol=1e-6, abs_tol=1e-9))


def _exact(reply: str, row: Mapping[str, Any]) -> float:
    return float(marked(reply) == str(row["answer"]).strip())


def _choice(reply: str, row: Mapping[str, Any]) -> float:
    right = str(row["answer"]).strip().strip("().").upper()
    text = marked(reply)
    found = _LETTER.findall(text.upper() if len(text) <= 3 else text)
    return float(bool(found) and found[-1] == right)


def _regex(reply: str, row: Mapping[str, Any]) -> float:
    return float(regex.search(str(row["answer"]), reply, timeout=SECONDS) is not None)


def _function(kind: str) -> Callable[[str, Mapping[str, Any]], Any]:
    _, _, place = kind.partition(":")
    module, _, name = place.partition(":")
    try:
        found = vars(importlib.import_module(module)).get(name)
    except ImportError as error:
        raise ValueError(f"answer: cannot import {module!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"answer: the module {module!r} has no function {name!r}")
    return found


def _by_function(
    function: Callable[[str, Mapping[str, Any]], Any], reply: str, row: Mapping[str, Any]
) -> float:
    """Returns a function's score.

    Raises:
        ValueError: it is no number.
    """
    score = function(reply, row)
    if isinstance(score, bool):
        return float(score)
    if not isinstance(score, (int, float)) or not math.isfinite(score):
        raise ValueError(f"the check {function.__name__} returned {score!r}, which is no number")
    return float(score)


CHECKS: Mapping[str, Check] = {
    "numeric": _numeric, "exact": _exact, "choice": _choice, "regex": _regex,
}  # fmt: skip
