"""What the rating service refuses."""

from __future__ import annotations

from ...engine.errors import TurnwiseError


class DeskError(TurnwiseError):
    """What a rater asks for cannot be given; the message is for them."""


class Used(DeskError):
    """An answer that has trained: it cannot be taken back."""


class NotYours(DeskError):
    """A task that this rater does not hold."""


class NoEntry(TurnwiseError):
    """A link or session that opens nothing. The message is for whoever holds it."""


class Refused(TurnwiseError):
    """A request that must not be done: forged, or by somebody who may not."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FormError(TurnwiseError, ValueError):
    """What a form says cannot be an answer.

    The message is for the rater; `field` names the input.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
