"""The feedback source `users`: what the users of a served policy said, which `turnwise serve` wrote
to the ledger when they did."""

from __future__ import annotations

from collections.abc import Sequence

from ...protocols import Comparison, Feedback, FeedbackSource, Request


class Users(FeedbackSource):
    """Users are never asked: their feedback comes when it comes, or not at all."""

    gives = "opinions"
    answers_in_ledger = True

    def request(self, requests: Sequence[Request]) -> None:
        """Does nothing."""

    def receive(self) -> Sequence[Feedback | Comparison]:
        """Returns nothing: it is in the ledger."""
        return ()
