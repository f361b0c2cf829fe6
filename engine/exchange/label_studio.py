"""Reads exports of Label Studio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import PreferenceError
from .questions import Answers, Questions
from .records import Unread
from .tools import Form, Tiers

# Label Studio.


def is_label_studio(record: Mapping[str, Any]) -> bool:
    """Returns whether a record is one of Label Studio's."""
    return isinstance(record.get("data"), Mapping) and isinstance(
        record.get("annotations"), Sequence
    )


def label_studio(
    record: Mapping[str, Any], where: str, questions: Questions, unread: Unread
) -> Iterator[Answers]:
    """Reads a task of Label Studio's JSON export.

    Skipped (cancelled) annotations, drafts and predictions are no answers.
    """
    form = None
    for annotation in record["annotations"]:
        if not isinstance(annotation, Mapping) or not isinstance(
            annotation.get("result"), Sequence
        ):
            raise PreferenceError(
                f"{where}: every annotation must have a `result`, a list; got {annotation!r}"
            )
        if annotation.get("was_cancelled"):
            continue
        answers: dict[str, tuple[Any, str]] = {}
        for result in annotation["result"]:
            kind, value = (
                (result.get("type"), result.get("value"))
                if isinstance(result, Mapping)
                else (None, None)
            )
            if isinstance(kind, str) and "value" not in result:  # a relation between regions
                value = {kind: {k: v for k, v in result.items() if k != "type"}}
            elif not isinstance(kind, str) or not isinstance(value, Mapping):
                raise PreferenceError(
                    f"{where}: every result must have `type`, `value` and `from_name`; got"
                    f" {result!r}"
                )
            answer = value.get({"pairwise": "selected", "textarea": "text"}.get(kind, kind), value)
            if kind == "choices":
                answer = (
                    answer[0]
                    if isinstance(answer, list) and len(answer) == 1
                    else {"choices": answer}
                )
            elif (
                kind == "ranker"
                and isinstance(answer, Mapping)
                and all(isinstance(ids, list) for ids in answer.values())
            ):
                answer = Tiers({str(bucket): list(map(str, ids)) for bucket, ids in answer.items()})
            elif kind == "textarea":
                answer = {"text": answer}  # words, whatever they are
            question = str(result.get("from_name", kind))
            # Of several regions: about parts of a text, not about conversations.
            if question in answers:
                answer = {"several": [answers[question][0], answer]}
            answers[question] = answer, str(result.get("to_name", ""))
        by = annotation.get("completed_by")
        rater = (
            (by["email"] if by.get("email") else by.get("id")) if isinstance(by, Mapping) else by
        )
        form = form or Form(record["data"], where, unread)
        yield questions.understand(form, str(rater), answers)
