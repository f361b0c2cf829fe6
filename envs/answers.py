r"""Checks replies against known answers, for rewards that can be verified.

What counts as the answer in a reply: what stands within <answer>...</answer> or \boxed{...}, the
last of several; without such marks the reply itself, of which each check reads what it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

import regex

from ..tools import named, scored

Row = Mapping[str, Any]
LETTERS = "ABCDEFGHIJ"
SECONDS = 1.0  # that a pattern may take on a reply
_MARKED = regex.compile(r"<answer>(.*?)</answer>|\\boxed\{([^{}]*)\}", regex.DOTALL)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
# Not the end of a word, of a fraction or of another number.
_NUMBER = regex.compile(rf"(?<![\w./,])(?<sign>[-+]?)\$?(?<digits>(?:{_DIGITS})(?:[eE][-+]?\d+)?)")
_CODE = regex.compile(r"[-+]?\d*(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")
_PLAIN = regex.compile(r"[-+]?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")
# Where the letter of a choice stands, the surest place first.
_CHOSEN = tuple(
    map(
        regex.compile,
        (
            r"^\W*([A-Ja-j])\W*$",
            r"(?i:answer|choice|option)(?i: is)?:?\s*\W{0,2}([A-J])\b",
            r"^\W*([A-J])(?=[.):,])",
            r"\(([A-J])\)",
            r"(?<![A-Za-z'])([A-J])(?=\W*$|[.):;])",
        ),
    )
)


@dataclass(frozen=True, slots=True)
class Check:
    """A way to check replies.

    Attributes:
        score: (reply, row) -> the score, 1 for a right answer.
        fault: row -> what is wrong with its answer, empty where nothing is.
    """

    score: Callable[[str, Row], float]
    fault: Callable[[Row], str]


def marked(reply: str) -> str:
    """Returns the part of a reply that is marked as the answer; all of it where none is."""
    found = _MARKED.findall(reply)
    return (found[-1][0] or found[-1][1]).strip() if found else reply.strip()


def last_number(reply: str) -> Decimal | None:
    """Returns the last number in a reply, or None; digits may be grouped by commas. One with an
    exponent of more than three digits is none."""
    found = list(_NUMBER.finditer(marked(reply).replace("\N{MINUS SIGN}", "-")))
    if not found:
        return None
    return number(found[-1]["sign"] + found[-1]["digits"], codes=True)


def number(text: Any, codes: bool = False) -> Decimal | None:
    """Returns a text that is a decimal number as a whole as that number, else None; with zeros in
    front it is a code, which is none unless `codes`."""
    plain = str(text).strip().replace(",", "").replace("$", "")
    return Decimal(plain) if (_CODE if codes else _PLAIN).fullmatch(plain) else None


def check_of(kind: str) -> Check:
    """Returns a check.

    Args:
        kind: "numeric", "exact", "choice" (a letter, A to J), "regex" (the answer is a pattern that
            the reply must contain), "none" (nothing is checked), or "python:MODULE:FUNCTION", a
            function of reply and row.

    Raises:
        ValueError: there is no such check, or no such function.
    """
    if kind.startswith("python:"):
        return Check(partial(scored, named(kind)), lambda row: "")
    if kind not in CHECKS:
        raise ValueError(
            f"answer must be one of {', '.join(CHECKS)} or python:MODULE:FUNCTION, got {kind!r}"
        )
    return CHECKS[kind]


def _numeric(reply: str, row: Row) -> float:
    return float(last_number(reply) == number(row["answer"]))


def _no_number(row: Row) -> str:
    return "" if number(row["answer"]) is not None else f"{row['answer']!r} is no number"


def _exact(reply: str, row: Row) -> float:
    return float(marked(reply) == str(row["answer"]).strip())


def _no_text(row: Row) -> str:
    right = row["answer"]
    sound = isinstance(right, (str, int, float)) and str(right).strip()
    return "" if sound else f"{right!r} is no text"


def _choice(reply: str, row: Row) -> float:
    text, letters = marked(reply), LETTERS[: len(row.get("choices") or LETTERS)]
    for pattern in _CHOSEN:
        found = [letter.upper() for letter in pattern.findall(text) if letter.upper() in letters]
        if found:
            return float(found[-1] == _letter(row))
    return 0.0


def _letter(row: Row) -> str:
    return str(row["answer"]).strip().strip("().").upper()


def _no_letter(row: Row) -> str:
    letters = LETTERS[: len(row.get("choices") or LETTERS)]
    right = _letter(row)
    if len(right) == 1 and right in letters:
        return ""
    return f"{row['answer']!r} is none of the letters {letters[0]} to {letters[-1]}"


def _regex(reply: str, row: Row) -> float:
    return float(regex.search(str(row["answer"]), reply, timeout=SECONDS) is not None)


def _no_pattern(row: Row) -> str:
    try:
        every = regex.compile(str(row["answer"])).search("") is not None
    except regex.error as error:
        return f"{row['answer']!r} is no pattern: {error}"
    return f"{row['answer']!r} is found in every reply" if every else _no_text(row)


CHECKS: Mapping[str, Check] = {
    "numeric": Check(_numeric, _no_number),
    "exact": Check(_exact, _no_text),
    "choice": Check(_choice, _no_letter),
    "regex": Check(_regex, _no_pattern),
    "none": Check(lambda reply, row: 0.0, lambda row: ""),
}
