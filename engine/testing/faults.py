"""What a check has found, raised all at once."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator
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


def secret_faults(part: Any) -> list[str]:
    """Returns faults for each secret that a part shows in its `repr`, its text or its version.

    A secret is a text whose attribute's name says so, by the rule by which runs hide them.
    """
    own = {name: value for name, value in vars(part).items() if isinstance(value, str) and value}
    shown = {"repr": repr(part), "str": str(part), "version": version_of(part)}
    return [
        f"its {place} shows the secret in the attribute {name!r}: logs and ledgers would keep it"
        for name, value in own.items()
        for place, text in shown.items()
        if redacted({name: value}) != {name: value} and value in text
    ]
