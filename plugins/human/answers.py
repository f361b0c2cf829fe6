"""The tasks that raters see and the answers they give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...protocols import Answer, Comparison, Episode, Feedback, Stamp
from ...tools import canonical_json, derive_id


@dataclass(frozen=True, slots=True)
class Task:
    """An item in a rater's hands.

    Attributes:
        shown: the conversations, in the order they are displayed.
        draft: the form as they left it; after an answer, what they answered.
        study: the options of its `People` source, with the task as it was when it was asked.
    """

    id: str
    source: str
    study: Mapping[str, Any]
    shown: tuple[Episode, ...]
    draft: Mapping[str, str]
    status: str


@dataclass(frozen=True, slots=True)
class RatedAnswer:
    """An answer and its circumstances.

    Attributes:
        seconds: from when the task was handed out.
        chosen: how the item was: "value", "random" or "gold".
        right: of gold, whether the first answer was.
    """

    item: str
    source: str
    task: str
    rater: str
    answer: Answer
    seconds: float
    chosen: str
    right: bool | None
    time: float
    gold: bool


def encode_form(form: Mapping[str, str]) -> str:
    """Encodes a form as JSON, without what belongs to the session."""
    return json.dumps({k: v for k, v in form.items() if k != "csrf"})


def encode_answer(answer: Answer) -> str:
    """Encodes an answer as JSON."""
    keep = (
        "ranking",
        "strength",
        "score",
        "turn_scores",
        "aspects",
        "comment",
        "status",
        "reason",
        "shown",
        "details",
    )
    return canonical_json(
        {"target": answer.target}
        | {f.name: getattr(answer, f.name) for f in fields(answer) if f.name in keep}
    )


def decode_answer(row: Any) -> Answer:
    """Decodes an answer in the form that the ledger takes."""
    study, answer = json.loads(row["settings"]), json.loads(row["answer"])
    kind: type[Answer] = Comparison if "ranking" in answer else Feedback
    declared = json.loads(row["strata"])
    stratum = next((declared[name] for name in study["strata"] if declared.get(name)), "")
    stamp = Stamp(
        row["request"], row["source"], study["version"], row["answered"], 0.0, row["rater"], stratum
    )
    return kind(
        answer.pop("target"), **answer, id=derive_id(row["id"], row["attempt"]), stamp=stamp
    )
