"""Reads exports of Argilla."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from ..errors import PreferenceError
from .questions import Answers, Questions
from .records import Unread
from .tools import Form

# Argilla.


def is_argilla(record: Mapping[str, Any]) -> bool:
    """Returns whether a record is one of Argilla's."""
    return _is_nested(record) or any(key.endswith(".responses") for key in record)


def _is_nested(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("fields"), Mapping) and isinstance(
        record.get("responses"), Mapping
    )


def argilla(
    record: Mapping[str, Any], where: str, questions: Questions, unread: Unread
) -> Iterator[Answers]:
    """Reads a record as `records.to_list(flatten=True)`, `to_datasets` or `to_json` export it.

    Only submitted responses are answers.
    """
    answers: dict[str, dict[str, tuple[Any, str]]] = {}
    if _is_nested(record):
        fields = record["fields"]
        for question, responses in record["responses"].items():
            for each in responses if isinstance(responses, Sequence) else [responses]:
                if not isinstance(each, Mapping) or "value" not in each:
                    raise PreferenceError(
                        f"{where}: a response of {question!r} must be {{value, user_id}}, got"
                        f" {each!r}"
                    )
                if "status" not in each:
                    warnings.warn(
                        f"{where}: the responses have no status, so drafts and discarded ones"
                        " cannot be told from answers; export with records.to_list(flatten=True)"
                        " to have it",
                        stacklevel=2,
                    )
                if (
                    each["value"] is not None
                    and _status(each.get("status", "submitted")) == "submitted"
                ):
                    answers.setdefault(str(each.get("user_id")), {})[question] = each["value"], ""
    else:
        own = ("id", "_server_id", "status", "inserted_at", "updated_at", "external_id", "score")
        fields = {
            k: v
            for k, v in record.items()
            if k not in own and not re.search(r"\.(responses|suggestion)(\.\w+)?$", k)
        }
        for key in (k for k in record if k.endswith(".responses")):
            columns = [record[key], record.get(f"{key}.users"), record.get(f"{key}.status")]
            if columns[0] is None:
                continue
            if not all(isinstance(c, Sequence) and len(c) == len(columns[0]) for c in columns):
                raise PreferenceError(
                    f"{where}: `{key}`, `{key}.users` and `{key}.status` must be lists of one"
                    " length"
                )
            for value, user, status in zip(*columns, strict=True):
                if value is not None and _status(status) == "submitted":
                    answers.setdefault(str(user), {})[key.removesuffix(".responses")] = value, ""
    if answers:
        form = Form(fields, where, unread)
        for user, given in answers.items():
            yield questions.understand(form, user, given)


def _status(value: Any) -> str:
    return str(value.value if isinstance(value, Enum) else value)
