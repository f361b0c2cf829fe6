"""The feedback source `users`: what a served policy's users think of its conversations, which
`turnwise serve` writes to the ledger when it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...protocols import Comparison, Feedback, FeedbackSource, Request
from .wire.form import Refused

THUMBS = {"up": 1.0, "down": 0.0}
LARGEST = 1e6  # score


class Users(FeedbackSource):
    """Users are never asked: their feedback comes when it comes, or not at all."""

    gives = "opinions"
    answers_in_ledger = True

    def request(self, requests: Sequence[Request]) -> None:
        """Does nothing."""

    def receive(self) -> Sequence[Feedback | Comparison]:
        """Returns nothing: it is in the ledger."""
        return ()


def score_in(given: Mapping[str, Any]) -> float:
    """Returns the number that feedback is.

    Raises:
        Refused: it is none.
    """
    unknown = set(given) - {"conversation", "score", "thumbs", "comment", "rater", "id"}
    score: Any = given.get("score")
    thumbs: Any = given.get("thumbs")
    if unknown:
        raise Refused(400, f"feedback has no {', '.join(sorted(unknown))}")
    if isinstance(thumbs, str) and score is None and thumbs in THUMBS:
        return THUMBS[thumbs]
    number = isinstance(score, (int, float)) and not isinstance(score, bool)
    if thumbs is None and number and abs(score) < LARGEST:
        return float(score)
    raise Refused(
        400, f'feedback is a `score`, a number below {LARGEST:,.0f}, or `thumbs`: "up" or "down"'
    )


def text_in(given: Mapping[str, Any], name: str) -> str:
    """Returns a text of feedback; empty where it has none.

    Raises:
        Refused: it is no text, or too long.
    """
    value = given.get(name, "")
    if not isinstance(value, str) or len(value) > 10_000:
        raise Refused(400, f"{name!r} must be a text of at most 10,000 characters")
    return value
