"""Reads what the questions of an annotation file ask, over the whole file, and their answers."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PreferenceError
from .records import Messages, Ranked, Scored
from .tools import COMMENTS, Form, Odd, Ranking, Score, plain_name, understand_answer


@dataclass(frozen=True, slots=True)
class Answers:
    """One person's answers on one record, question by question: a ranking, (conversation, number),
    or why neither.

    Attributes:
        given: the answers as they stand in the file.
    """

    where: str
    rater: str
    given: Mapping[str, Any]
    understood: Mapping[str, Ranking | Score | Odd]


class Questions:
    """The kinds of the questions of one file. Exports do not tell a label from free text, so that
    is decided over the whole file.

    Args:
        text: questions that are known to be answered in free text.
    """

    def __init__(self, text: Collection[str] = ()) -> None:
        self._known = frozenset(text)
        self._text: set[str] = set()
        self._understood: Counter[str] = Counter()
        self._odd: dict[str, Odd] = {}  # question to why an answer to it is no preference
        # Question to whether all that was not understood were words.
        self._words: dict[str, bool] = {}

    def understand(self, form: Form, rater: str, answers: Mapping[str, tuple[Any, str]]) -> Answers:
        """Reads answers one by one.

        Args:
            answers: question to the answer and to what the tool says that it is about.
        """
        understood: dict[str, Ranking | Score | Odd] = {}
        for question, (value, about) in answers.items():
            try:
                understood[question] = understand_answer(form, question, value, about)
                self._understood[question] += 1
            except Odd as why:
                understood[question] = why
                self._odd.setdefault(question, why)
                self._words[question] = self._words.get(question, True) and isinstance(value, str)
        return Answers(
            form.where,
            rater,
            {question: value for question, (value, _) in answers.items()},
            understood,
        )

    def decide(self, path: Path) -> None:
        """Decides which questions are free text: those known or called so, and those with words
        that are not understood, while other questions are understood throughout.

        Raises:
            PreferenceError: answers to a question are a preference in some records only, or none is
                one anywhere.
        """
        asked = {*self._understood, *self._odd}
        self._text = {q for q in asked if q in self._known}
        called = {q for q in asked if plain_name(q) in COMMENTS}
        sound = {q for q in self._understood if q not in self._odd} - self._text - called
        self._text |= called if sound or set(self._understood) - called else set()
        for question, why in self._odd.items():
            if question in self._text:
                continue
            count = self._understood[question]
            if (count and not (sound and self._words[question])) or not set(
                self._understood
            ) - self._text:
                raise PreferenceError(str(why))
            if count:
                self._text.add(question)
                warnings.warn(
                    f"{path}: the question {question!r} is taken for free text, though {count} of"
                    f" its answers name a reply, a tie or a label, because {why}; take it out, or"
                    " mend these answers, to have it read",
                    stacklevel=2,
                )

    def records(self, answers: Answers) -> Iterator[Ranked | Scored]:
        """Returns the preferences, once the questions are decided; all other answers stand in the
        details."""
        rankings: dict[str, Ranking] = {}
        scores: dict[Messages, dict[str, float]] = {}
        details: dict[str, Any] = {}
        for question, reading in answers.understood.items():
            if question in self._text or isinstance(reading, Odd):
                details[question] = json.loads(json.dumps(answers.given[question], default=str))
            elif isinstance(reading, Ranking):
                rankings[question] = reading
            else:
                scores.setdefault(reading.messages, {})[question] = reading.number
        for question, (talks, tiers) in rankings.items():
            yield Ranked(
                answers.where,
                talks,
                tiers,
                answers.rater,
                aspect=question if len(rankings) > 1 else "",
                details=details,
            )
        for conversation, numbers in scores.items():
            one = next(iter(numbers.values())) if len(numbers) == 1 else None
            aspects = {} if one is not None else numbers
            yield Scored(
                answers.where,
                conversation,
                one,
                aspects=aspects,
                rater=answers.rater,
                details=details,
            )


def text_questions(path: Path) -> frozenset[str]:
    """Returns the questions that Argilla's own settings, in the folder of the records that
    `Dataset.to_disk` wrote, call free text or marks in a text.

    Raises:
        PreferenceError: the settings cannot be read.
    """
    settings = path.parent / ".argilla" / "settings.json"
    if path.is_dir() or not settings.is_file():
        return frozenset()
    try:
        questions = json.loads(settings.read_text(encoding="utf-8"))["questions"]
        return frozenset(
            str(q["name"]) for q in questions if q["settings"]["type"] in ("text", "span")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PreferenceError(f"{settings} is no settings file of Argilla: {error!r}") from error
