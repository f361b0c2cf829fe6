"""The errors of the rating service."""

from __future__ import annotations

from ...protocols import TurnwiseError


class DeskError(TurnwiseError):
    """A rater's request that cannot be met; the message is for the rater."""


class Used(DeskError):
    """An answer that has trained: it cannot be taken back."""


class NotYours(DeskError):
    """A task that this rater does not hold."""


class NoEntry(TurnwiseError):
    """A link or session that opens nothing. The message is for the person who used it."""


class Refused(TurnwiseError):
    """A request that must not be done: forged, or without the right to it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FormError(TurnwiseError, ValueError):
    """A form whose content cannot be an answer.

    The message is for the rater; `field` names the input.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
