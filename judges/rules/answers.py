"""Rules that compare the last reply's answer with a known reference.

Where the reference comes from is an option of its own, `reference`:

    reference: Paris                    the same for every conversation
    reference: [Paris, "city of light"] any of these
    reference: {option: answer}         the conversation's start has it:
                                        `episode.start.options["answer"]`
    reference: {info: answer}           the environment's reset gave it: `episode.info["answer"]`
    reference: <a function>             in Python: episode -> reference, or None where there is none
                                        (the judge abstains)
"""

from __future__ import annotations

import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...protocols import Episode, Feedback, Judge
from ...tools import did_you_mean
from .text import Pattern

Reference = str | float | Sequence[str | float] | Mapping[str, str] | Callable[[Episode], Any]


class _Answer(Judge, ABC):
    """Base of both judges: the references of an episode, and the part of the last reply that is the
    answer."""

    def __init__(self, reference: Reference, pattern: str | None) -> None:
        if isinstance(reference, Mapping) and (
            len(reference) != 1 or not set(reference) <= {"option", "info"}
        ):
            raise ValueError(
                "a reference that differs by conversation is {option: name} or {info: name},"
                f" got {dict(reference)}"
            )
        self.reference = dict(reference) if isinstance(reference, Mapping) else reference
        if not callable(reference) and not isinstance(reference, Mapping):
            self._checked(_listed(reference))
        self.pattern, self._pattern = pattern, Pattern(pattern) if pattern is not None else None
        if self._pattern is not None and self._pattern.groups > 1:
            raise ValueError(
                f"pattern {pattern!r} has {self._pattern.groups} groups; at most one, which is the"
                " answer"
            )

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        answers = []
        for episode in episodes:
            references = self._references(episode)
            if references is None:
                answers.append(
                    Feedback.abstained(episode.id, "there is no reference for this conversation")
                )
            else:
                right, details = self._right(
                    self._answer(episode.turns[-1].action), self._checked(references)
                )
                answers.append(Feedback(episode.id, score=float(right), details=details))
        return answers

    def _references(self, episode: Episode) -> list[Any] | None:
        if callable(self.reference):
            found = self.reference(episode)
            return None if found is None else _listed(found)
        if not isinstance(self.reference, Mapping):
            return _listed(self.reference)
        [(place, name)] = self.reference.items()
        there = episode.start.options if place == "option" else episode.info
        if name not in there:
            where = (
                "the start's options have"
                if place == "option"
                else "the environment's info at reset has"
            )
            raise ValueError(f"{where} no {name!r} to compare with.{did_you_mean(name, there)}")
        return _listed(there[name])

    def _answer(self, reply: str) -> str | None:
        """Returns the reply, or what the pattern last finds in it; None: it finds nothing."""
        if self._pattern is None:
            return reply
        found = list(self._pattern.finditer(reply))
        return found[-1][self._pattern.groups] or "" if found else None

    @abstractmethod
    def _checked(self, references: list[Any]) -> list[Any]:
        """Returns the references in the form in which they are compared; ValueError for one that
        has no such form."""

    @abstractmethod
    def _right(self, answer: str | None, references: list[Any]) -> tuple[bool, dict[str, Any]]:
        """Returns whether the answer is one of the references, and the details."""


def _listed(reference: Any) -> list[Any]:
    return (
        list(reference)
        if isinstance(reference, Sequence) and not isinstance(reference, str)
        else [reference]
    )


class Exact(_Answer):
    """Scores 1 where the last reply's answer is the reference, 0 where it is another. Both are
    compared without regard to case, width, spacing, quotes and emphasis around them, and
    punctuation at the end; `details["answer"]` is what was compared.

    Args:
        reference: a text, a list of which any is right, `{option: name}` of the start, `{info:
            name}` of what `reset` gave, or in Python a function of the episode.
        pattern: a regular expression that finds the answer in the reply (its group, the last match:
            `answer is (.+)`); where it finds nothing the answer is wrong. Default: the whole reply.
    """

    def __init__(self, reference: Reference, pattern: str | None = None) -> None:
        super().__init__(reference, pattern)

    def _checked(self, references: list[Any]) -> list[str]:
        plain = [normalised(str(each)) for each in references]
        if (
            not plain
            or not all(plain)
            or any(isinstance(each, (Mapping, bool)) or each is None for each in references)
        ):
            raise ValueError(
                f"a reference must be text or a number, and not empty, got {references}; in YAML,"
                " `yes` and `no` need quotes"
            )
        return plain

    def _right(self, answer: str | None, references: list[str]) -> tuple[bool, dict[str, Any]]:
        found = None if answer is None else normalised(answer)
        return found in references, {"answer": found}


def normalised(answer: str) -> str:
    """Returns an answer in the form in which two are compared: NFKC, case-folded, single spaces,
    nothing around it. Punctuation inside stays, since `3.5` is not `35`."""
    text = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
    return text.strip("\"'`*_“”‘’«»„ ").rstrip(".,;:!?… ").strip("\"'`*_“”‘’«»„ ")


class Numeric(_Answer):
    r"""Scores 1 where the last number in the reply is the reference, 0 where it is another or
    there is none; `details["answer"]` is what was read.

    A number may have a sign, thousands separators (1,234,567.5; also thin spaces, apostrophes and
    underscores), an exponent (1.5e-3, 1.5 × 10^-3, 10⁶), a percent sign (50% is 0.5, in the
    reference too: write `reference: 50%` where replies say percent), or be a fraction (3/4, 1 3/4,
    ½, \frac{3}{4}). Digits inside a word (H2O) are no number.

    Args:
        reference: a number, or text that is one; or as of `exact`.
        tolerance: how far off is still right, in the number's own unit.
        relative: the same as a share of the larger of the two.
        pattern: a regular expression that finds the answer in the reply (its group, the last match:
            `####(.*)`); the number is sought there.
        decimal: the decimal mark, "." or ","; the other one then separates thousands.
    """

    def __init__(
        self,
        reference: Reference,
        tolerance: float = 0.0,
        relative: float = 1e-6,
        pattern: str | None = None,
        decimal: str = ".",
    ) -> None:
        if not (math.isfinite(tolerance) and tolerance >= 0 and 0 <= relative < 1):
            raise ValueError(
                "tolerance must not be negative and relative lie from 0 to below 1, got"
                f" {tolerance} and {relative}"
            )
        if decimal not in (".", ","):
            raise ValueError(f"decimal must be '.' or ',', got {decimal!r}")
        self.tolerance, self.relative, self.decimal = tolerance, relative, decimal
        super().__init__(reference, pattern)

    def _checked(self, references: list[Any]) -> list[float]:
        values = []
        for each in references:
            if isinstance(each, str):
                found = numbers(each, self.decimal)
            else:
                found = (
                    [float(each)]
                    if isinstance(each, (int, float)) and not isinstance(each, bool)
                    else []
                )
            if len(found) != 1 or not math.isfinite(found[0]):
                raise ValueError(f"a reference must be one number, got {each!r}")
            values += found
        if not values:
            raise ValueError("reference names no number")
        return values

    def _right(self, answer: str | None, references: list[float]) -> tuple[bool, dict[str, Any]]:
        found = numbers(answer or "", self.decimal)
        if not found:
            return False, {"answer": None}
        near = (
            math.isclose(found[-1], each, rel_tol=self.relative, abs_tol=self.tolerance)
            for each in references
        )
        return any(near), {"answer": found[-1] if math.isfinite(found[-1]) else None}


_DIGITS = {  # by the decimal mark: digits in groups of three or in one run, and decimals
    mark: (
        rf"(?:\d{{1,3}}(?:[{other}'’_]\d{{3}})+(?!\d)|\d+)(?:{re.escape(mark)}\d+)?|{re.escape(mark)}\d+"
    )
    for mark, other in ((".", ","), (",", "."))
}
_NUMBERS = {
    mark: re.compile(
        # a stroke after a digit or a bracket is no sign
        r"(?:(?<![\w)\]}.])(?P<sign>[-+])[$€£¥]?)?(?<![\w.])"
        r"(?:10\^\{?(?P<alone>[-+]?\d{1,4}(?!\d))\}?"
        rf"|(?<!/)(?:(?P<whole>\d{{1,3}}) +)?(?P<above>{digits})\s?/\s?(?P<below>{digits})(?![\d/])"
        rf"|(?P<plain>{digits})(?:e(?P<e>[-+]?\d{{1,4}}(?!\w))|\s?[x*×·]\s?10\^\{{?(?P<times>[-+]?\d{{1,4}}(?!\d))\}}?)?)"
        r"\s?(?P<percent>%)?",
        re.IGNORECASE,
    )
    for mark, digits in _DIGITS.items()
}


def numbers(text: str, decimal: str = ".") -> list[float]:
    """Returns the numbers in a text, in order, as `Numeric` reads them; infinite where one is
    beyond a float."""
    other = "," if decimal == "." else "."

    def read(digits: str) -> str:
        return re.sub(f"[{other}'’_]", "", digits).replace(decimal, ".")

    found = []
    for match in _NUMBERS[decimal].finditer(_spelled(text)):
        below = float(read(match["below"])) if match["below"] else None
        if below == 0:  # no fraction, but numbers with a stroke between them
            found += [float(read(part)) for part in match.group("whole", "above", "below") if part]
            continue
        if below is not None:
            value = float(match["whole"] or 0) + float(read(match["above"])) / below
        else:
            power = match["alone"] or match["e"] or match["times"] or "0"
            value = float(f"{read(match['plain'] or '1')}e{power}")
        value = -value if match["sign"] == "-" else value
        found.append(value / 100 if match["percent"] else value)
    return found


def _spelled(text: str) -> str:
    """Writes out numbers that use special characters (½, 10⁶, 1\u202f000) or LaTeX."""
    text = re.sub(r"(?<=\d)(?:[\u00a0\u2009\u202f]|\\,|\{,\})(?=\d{3}(?!\d))", "_", text)
    text = re.sub(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", r" \1/\2 ", text).replace("\\%", "%")
    text = re.sub(r"\\(?:times|cdot)\b", "×", text)
    text = re.sub("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    parts = (
        (
            f" {unicodedata.normalize('NFKC', c)} "
            if unicodedata.decomposition(c).startswith("<fraction>")
            else c
        )
        for c in text
    )
    plain = unicodedata.normalize("NFKC", "".join(parts))
    return re.sub(r"\.{2,}", " ", plain.replace("\u2044", "/").replace("\u2212", "-"))
