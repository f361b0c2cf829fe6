"""Rules on replies that a program reads: JSON that follows a schema, and calls of the tools that
the environment offers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from ...protocols import Episode, Feedback, Judge
from ...tools import UnknownForm, calls_in, error_of, parsed, validator


class JsonSchema(Judge):
    """Scores whether replies are JSON that is valid by a schema: 1 or 0, and for `where: all` the
    share of valid ones. `details["errors"]` tells where others fail, `{"turn": 2, "error": "at
    $.items[0].price: 'x' is not of type 'number'"}`.

    Args:
        schema: a JSON Schema (any draft that its `$schema` names, else 2020-12), or the path of a
            JSON or YAML file with one. References to other files or addresses are not followed.
        where: "last" reply, or "all", which scores each.
        fenced: also accept a reply that is one Markdown code block.
    """

    def __init__(
        self,
        schema: Mapping[str, Any] | str,
        where: Literal["last", "all"] = "last",
        fenced: bool = False,
    ) -> None:
        if where not in ("last", "all"):
            raise ValueError(f"where must be 'last' or 'all', got {where!r}")
        self.schema = _loaded(schema) if isinstance(schema, str) else dict(schema)
        self.where, self.fenced = where, fenced
        self._validator = validator(self.schema)

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Scores the share of the replies asked about, all or the last, that fit the schema."""
        answers = []
        for episode in episodes:
            asked = range(len(episode.turns)) if self.where == "all" else [len(episode.turns) - 1]
            wrong = {
                k: error
                for k in asked
                if (error := self._error(episode.turns[k].action)) is not None
            }
            turns = tuple(float(k not in wrong) for k in asked)
            errors = [{"turn": k, "error": error} for k, error in wrong.items()]
            answers.append(
                Feedback(
                    episode.id,
                    score=sum(turns) / len(turns),
                    turn_scores=turns if self.where == "all" else None,
                    details={"errors": errors},
                )
            )
        return answers

    def _error(self, reply: str) -> str | None:
        fence = (
            re.fullmatch(r"\s*```\w*\n(.*?)\n?```\s*", reply, re.DOTALL) if self.fenced else None
        )
        try:
            return error_of(self._validator, parsed(fence[1] if fence else reply))
        except ValueError as error:
            return f"not JSON: {error}"


def _loaded(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(
            f"schema is a mapping, or the path of a JSON or YAML file; there is no file {path!r}"
        )
    text = Path(path).read_text(encoding="utf-8")
    try:
        found = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path!r} is not {'JSON' if path.endswith('.json') else 'YAML'}: {error}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path!r} holds {type(found).__name__}, not a schema, which is a mapping")
    return found


class ToolCalls(Judge):
    """Scores whether tool calls are valid: every call is JSON, names a tool that the environment
    offers (`Episode.tools`), and has the arguments that the tool's schema asks for and no others. 1
    or 0 for a reply with calls, no opinion on one without; the score is the mean over those with
    calls, and a conversation without any abstains. `details["errors"]` tells what is wrong.

    How calls are read: `engine/util/calls.py`. A reply that calls in a form that is not known there
    gets no opinion (`details["unknown"]`).
    """

    def __init__(self) -> None:
        validator({})  # says at once what must be installed

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Scores the share of the turns with tool calls in which every call fits a tool's
        schema."""
        answers = []
        for episode in episodes:
            turns: list[float | None] = []
            errors, unknown = [], []
            for k, turn in enumerate(episode.turns):
                try:
                    calls = calls_in(turn.action, episode.tools)
                except UnknownForm as form:
                    unknown.append({"turn": k, "form": str(form)})
                    turns.append(None)
                    continue
                wrong = [call.fault for call in calls if call.fault]
                errors += [{"turn": k, "error": error} for error in wrong]
                turns.append(float(not wrong) if calls else None)
            called = [score for score in turns if score is not None]
            if called:
                score = sum(called) / len(called)
                details = {"errors": errors} | ({"unknown": unknown} if unknown else {})
                answers.append(
                    Feedback(episode.id, score=score, turn_scores=tuple(turns), details=details)
                )
            elif unknown:
                why = f"a tool was called in a form that is not known: {unknown[0]['form']}"
                answers.append(Feedback.abstained(episode.id, why, details={"unknown": unknown}))
            else:
                answers.append(Feedback.abstained(episode.id, "no tool was called"))
        return answers
