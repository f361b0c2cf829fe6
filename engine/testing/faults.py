"""What a check has found, raised all at once."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..records.feedback import version_of
from ..util.secrets import redacted


class Unsound(AssertionError):
    """A part of a plugin does what it must not; the message has one fault per line."""


@contextlib.contextmanager
def faults_of(part: Any) -> Iterator[list[str]]:
    """Provides a list for the faults of a part.

    Raises:
        Unsound: on leaving, where the list is not empty.
    """
    faults: list[str] = []
    yield faults
    if faults:
        listed = "\n".join(f"- {fault}" for fault in dict.fromkeys(faults))
        raise Unsound(f"{type(part).__name__} is unsound:\n{listed}")


def short(value: Any) -> str:
    """Returns a value's `repr`, cut where it is long."""
    shown = reprlib.Repr()
    shown.maxother = shown.maxstring = 80
    return shown.repr(value)


def secret_faults(part: Any, answers: Iterable[Any] = ()) -> list[str]:
    """Returns faults for each secret that a part shows in its `repr`, its text, its version or its
    answers.

    A secret is a text of some length whose attribute's name, or key in an attribute that is a
    mapping, says so, by the rule by which runs hide them; `env:NAME` names where one stands.
    """
    shown = {"repr": repr(part), "str": str(part), "version": version_of(part)}
    shown |= {"answer": " ".join(map(repr, answers))}
    return [
        f"its {place} shows the secret in the attribute {name!r}: logs and ledgers would keep it"
        for name, secret in _secrets(vars(part))
        for place, text in shown.items()
        if secret in text
    ]


def _secrets(holder: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """Yields the secrets among the values of a mapping and of those in it, each with its place."""
    for name, value in holder.items():
        where = f"{place}.{name}" if place else str(name)
        if isinstance(value, Mapping):
            yield from _secrets(value, where)
        elif (
            isinstance(value, str)
            and len(value) >= 8
            and not value.startswith("env:")
            and redacted({str(name): value}) != {str(name): value}
        ):
            yield where, value
