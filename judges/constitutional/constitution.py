"""A constitution: principles in a file, by which a judge compares (`constitution`) and replies are
revised (the stage `revise`).

    ---
    name: shop
    principles:
      - name: listen
        better: Which conversation asks less of what the customer has told already?
        critique: Does the reply ask for something the customer has told already?
        revise: Ask only for what is missing, or say what will be done.
        weight: 2
    ---
    The agent serves customers of a shop.

As in Constitutional AI (Bai et al. 2022, arXiv:2212.08073): each comparison is by one principle,
drawn by weight, so that many comparisons are by all of them; with `clamp` the soft labels are kept
within [0.4, 0.6], as there for judges that reason before they answer.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ...protocols import Answer, Comparison, Episode, Request
from ...tools import derive_id
from ..asking.store import Verdict
from ..llm.pairwise import TASK, PairwiseJudge, words
from ..llm.rubric import Rubric, front_matter, raise_invalid
from ..llm.transcript import RULES
from ..trust.canaries import ATTACKS


class Principle(BaseModel):
    """A principle of a constitution.

    Attributes:
        name: a word.
        better: what tells the better of two conversations; for comparing.
        critique: what a reply is examined for; for revising.
        revise: how a reply is to be changed; for revising.
        weight: how often it is drawn, relative to the others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z][\w-]*$")
    better: str = ""
    critique: str = ""
    revise: str = ""
    weight: float = Field(default=1.0, gt=0)


class _Head(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    principles: list[Principle] = Field(min_length=1)

    @field_validator("principles")
    @classmethod
    def _distinct(cls, value: list[Principle]) -> list[Principle]:
        names = [p.name for p in value]
        if len(set(names)) < len(names):
            raise ValueError(f"two principles share a name: {', '.join(names)}")
        return value


@dataclass(frozen=True, slots=True)
class Constitution:
    """A set of principles.

    Attributes:
        principles: at least one.
        text: instructions in addition to the principles.
    """

    name: str
    principles: tuple[Principle, ...]
    text: str = ""
    version: str = field(init=False, default="")

    def __post_init__(self) -> None:
        content = [self.name, self.text, [p.model_dump(mode="json") for p in self.principles]]
        object.__setattr__(self, "version", f"{self.name}-{derive_id('constitution', content)[:8]}")

    def __str__(self) -> str:
        return self.version

    @classmethod
    def load(cls, given: Any, needs: Sequence[str]) -> Constitution:
        """Reads a constitution from a Markdown file with front matter; an object stays itself.

        Args:
            given: the file's path, or a constitution.
            needs: what each principle must state: "better", or "critique" and "revise".

        Raises:
            ValueError: no such file, or what is wrong in it and where.
        """
        if isinstance(given, Constitution):
            made = given
        else:
            try:
                text = Path(given).read_text(encoding="utf-8")
            except (OSError, TypeError, UnicodeDecodeError) as error:
                raise ValueError(f"constitution: cannot read {given}: {error}") from error
            head, body = front_matter(text, str(given))
            try:
                read = _Head(**head)
            except ValidationError as error:
                raise ValueError(
                    raise_invalid(error, str(given), {*_Head.model_fields, *Principle.model_fields})
                ) from error
            made = cls(read.name, tuple(read.principles), body)
        for principle in made.principles:
            for need in needs:
                if not getattr(principle, need):
                    raise ValueError(
                        f"constitution {made.name!r}: the principle {principle.name!r} needs"
                        f" `{need}` to be used here"
                    )
        return made

    def draw(self, *by: Any, among: Sequence[Principle] = ()) -> Principle:
        """Draws a principle (of some, or of all) by weight; the same for the same arguments."""
        rng, chosen = (
            random.Random(derive_id("principle", self.version, *by)),
            among or self.principles,
        )
        return rng.choices(chosen, [p.weight for p in chosen])[0]


@dataclass(kw_only=True)
class ConstitutionJudge(PairwiseJudge):
    """Compares conversations of one start, two at a time, each pair by a principle that is drawn
    for it.

    Attributes:
        constitution: a Markdown file with principles.
        clamp: soft labels are kept within [0.4, 0.6].
    """

    way: ClassVar[str] = "constitution"
    KINDS: ClassVar[Sequence[str]] = ATTACKS  # an empty reply may well be better by one principle
    rubric: Any = field(default=None, init=False, repr=False)
    constitution: Any
    clamp: bool = False

    def __post_init__(self) -> None:
        self.constitution = Constitution.load(self.constitution, ["better"])
        # Takes no part: the standard is drawn for each pair.
        self.rubric = Rubric.load("the principle")
        if self.clamp and self.soft is None:
            raise ValueError("clamp is for soft labels: give `soft` too, or leave it out")
        super().__post_init__()

    @property
    def label(self) -> str:
        """The constitution's version."""
        return str(self.constitution.version)

    @property
    def instructions(self) -> str:
        """The system prompt: the rules, and the constitution's text as the standard."""
        by = "Better is what the principle in the question says, and nothing else."
        return TASK.format(
            rules=RULES, standard="\n\n".join(filter(None, [self.constitution.text, by]))
        )

    def principle(self, shown: Sequence[Episode]) -> Principle:
        """Returns the principle that a pair is compared by, whichever is shown first."""
        return self.constitution.draw(*sorted(map(words, shown)))

    def standard(self, shown: Sequence[Episode]) -> str:
        """Returns the line that states the principle that the pair is compared by."""
        return f"The principle: {self.principle(shown).better}"

    def answer(self, request: Request, verdicts: Sequence[Verdict]) -> Answer:
        """Returns the pairwise answer with the principle's name; a soft label is clamped to at most
        0.6."""
        answer = super().answer(request, verdicts)
        if self.clamp and isinstance(answer, Comparison) and answer.probability is not None:
            answer = dataclasses.replace(answer, probability=min(answer.probability, 0.6))
        return dataclasses.replace(
            answer, details={**answer.details, "principle": self.principle(request.episodes).name}
        )
