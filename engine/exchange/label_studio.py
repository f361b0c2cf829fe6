"""Read exports of Label Studio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import PreferenceError
from .records import Unread
from .tools import Answers, Form, Questions, Tiers

# Label Studio.


def is_label_studio(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("data"), Mapping) and isinstance(
        record.get("annotations"), Sequence
    )


def label_studio(
    record: Mapping[str, Any], where: str, questions: Questions, unread: Unread
) -> Iterator[Answers]:
    """A task of Label Studio's JSON export.

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
            said = value.get({"pairwise": "selected", "textarea": "text"}.get(kind, kind), value)
            if kind == "choices":
                said = said[0] if isinstance(said, list) and len(said) == 1 else {"choices": said}
            elif (
                kind == "ranker"
                and isinstance(said, Mapping)
                and all(isinstance(ids, list) for ids in said.values())
            ):
                said = Tiers({str(bucket): list(map(str, ids)) for bucket, ids in said.items()})
            elif kind == "textarea":
                said = {"text": said}  # words, whatever they are
            question = str(result.get("from_name", kind))
            # Of several regions: about parts of a text, not about conversations.
            if question in answers:
                said = {"several": [answers[question][0], said]}
            answers[question] = said, str(result.get("to_name", ""))
        by = annotation.get("completed_by")
        rater = (
            (by["email"] if by.get("email") else by.get("id")) if isinstance(by, Mapping) else by
        )
        form = form or Form(record["data"], where, unread)
        yield questions.hear(form, str(rater), answers)
