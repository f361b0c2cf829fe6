"""Rubrics: the criteria of a good conversation, in a Markdown file with front matter that people
can read, discuss and version.

    ---
    name: helpful
    criteria:
      - name: resolved
        question: Did the agent solve the customer's problem?
        weight: 2
        levels: [made it worse, did nothing, solved part of it, solved it]
      - name: economy
        question: Did it ask only what it needed?
        levels: [asked at random, asked more than needed, asked only what it needed]
    ---
    Judge the whole conversation as the customer would a day later. Politeness alone is worth
        nothing.

Levels are anchors, worst first; a criterion's score is its place among them, in [0, 1], and the
rubric's the mean by weight. The version is a hash of all of it, and stands in every verdict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ...tools import derive_id, did_you_mean


class Criterion(BaseModel):
    """A criterion of a rubric.

    Attributes:
        name: a word, used as the aspect's name.
        question: what is asked.
        levels: anchors, worst first.
        weight: in the rubric's score; 0 reports it only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z][\w-]*$")
    question: str = Field(min_length=1)
    levels: tuple[str, ...] = Field(min_length=2, max_length=11)
    weight: float = Field(default=1.0, ge=0)

    @field_validator("levels", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        words = {True: "yes", False: "no"}  # what YAML 1.1 takes the words for
        return (
            [words[level] if isinstance(level, bool) else str(level) for level in value]
            if isinstance(value, list)
            else value
        )


class _Head(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    criteria: list[Criterion] = Field(min_length=1)

    @model_validator(mode="after")
    def _sound(self) -> _Head:
        names = [c.name for c in self.criteria]
        if len(set(names)) < len(names):
            raise ValueError(f"two criteria share a name: {', '.join(names)}")
        if not sum(c.weight for c in self.criteria):
            raise ValueError("at least one criterion needs a weight above 0")
        return self


@dataclass(frozen=True, slots=True)
class Rubric:
    """A rubric: criteria with anchored levels, and instructions.

    Attributes:
        name: short.
        criteria: at least one.
        text: instructions in addition to the criteria.
    """

    name: str
    criteria: tuple[Criterion, ...]
    text: str = ""
    version: str = field(init=False, default="")

    def __post_init__(self) -> None:
        content = [self.name, self.text, [c.model_dump(mode="json") for c in self.criteria]]
        object.__setattr__(self, "version", f"{self.name}-{derive_id('rubric', content)[:8]}")

    def __str__(self) -> str:
        return self.version

    @classmethod
    def load(cls, given: Any) -> Rubric:
        """Reads a rubric from a file (`.md`), a mapping or a plain question, or returns the object
        itself.

        A plain text is a rubric of one criterion with five levels.

        Raises:
            ValueError: no such file, or what is wrong in it and where.
        """
        if isinstance(given, Rubric):
            return given
        if isinstance(given, Mapping):
            return cls._made(dict(given), str(given.get("text", "")), "the rubric")
        text = str(given)
        is_path = (
            "\n" not in text
            and len(text) < 1000
            and (" " not in text.strip() and ("/" in text or "." in text.strip(".?!")))
        )
        if is_path or ("\n" not in text and text.endswith((".md", ".markdown", ".txt"))):
            try:
                return cls.parse(Path(text).read_text(encoding="utf-8"), text)
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"rubric: cannot read {text}: {error}") from error
        if not text.strip():
            raise ValueError(
                "a rubric is needed: a Markdown file with criteria (docs/judges.md), or a question"
                " in plain words"
            )
        return cls("question", (Criterion(name="overall", question=text.strip(), levels=LIKERT),))

    @classmethod
    def parse(cls, text: str, where: str = "the rubric") -> Rubric:
        """Reads a rubric from the text of its file."""
        head, body = front_matter(text, where)
        return cls._made(head, body, where)

    @classmethod
    def _made(cls, head: dict[str, Any], text: str, where: str) -> Rubric:
        head.pop("text", None)
        try:
            read = _Head(**head)
        except ValidationError as error:
            raise ValueError(
                raise_invalid(error, where, {*_Head.model_fields, *Criterion.model_fields})
            ) from error
        return cls(read.name, tuple(read.criteria), text.strip())

    @property
    def prompt(self) -> str:
        """Returns the rubric as it is shown to a judge."""
        lines = [f"# Rubric: {self.name}", *([self.text, ""] if self.text else [])]
        for c in self.criteria:
            lines += [
                f"## {c.name}",
                c.question,
                *(f"{i}: {level}" for i, level in enumerate(c.levels)),
                "",
            ]
        return "\n".join(lines).strip()

    def score(self, levels: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """Returns the rubric's score and each criterion's, in [0, 1], from levels by criterion
        (places from 0; means of several need not be whole numbers)."""
        aspects = {c.name: levels[c.name] / (len(c.levels) - 1) for c in self.criteria}
        total = sum(c.weight for c in self.criteria)
        return sum(c.weight * aspects[c.name] for c in self.criteria) / total, aspects


LIKERT = ("not at all", "barely", "partly", "mostly", "fully")


def front_matter(text: str, where: str) -> tuple[dict[str, Any], str]:
    """Returns the YAML between two lines of --- at the head of a file, and the text that follows.

    Raises:
        ValueError: there is none, or it is no mapping.
    """
    found = re.match(r"\ufeff?\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)(.*)", text, re.DOTALL)
    if found is None:
        raise ValueError(
            f"{where} must begin with front matter between two lines of ---, see docs/judges.md"
        )
    try:
        head = yaml.safe_load(found.group(1))
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: the front matter is not YAML: {error}") from error
    if not isinstance(head, dict):
        raise ValueError(f"{where}: the front matter must be a mapping of names to values")
    return head, found.group(2).strip()


def raise_invalid(error: ValidationError, where: str, known: Iterable[str]) -> str:
    """Describes the first error in a file's front matter, unknown keys before missing ones, with
    near names."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    first = faults[0]
    place = ".".join(str(p) for p in first["loc"]) or "front matter"
    if first["type"] == "extra_forbidden":
        return f"{where}: there is no key {place!r}.{did_you_mean(str(first['loc'][-1]), known)}"
    wants = {
        "missing": "is needed",
        "tuple_type": "must be a list",
        "list_type": "must be a list",
    }.get(first["type"], first["msg"])
    return f"{where}: {place}: {wants}"
