"""Clients of a served policy: what each may do, and for how long."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from .session import Pending
from .wire.form import Asked, Refused


class Serves(Protocol):
    """What serves clients, see `Serving`."""

    models: tuple[str, ...]
    ignore: tuple[str, ...]
    temperature: float

    def submit(self, client: Client, asked: Asked, api: str) -> Pending:
        """Takes a request."""

    def ask(self, work: Callable[[], Any]) -> Future[Any]:
        """Has something done between two tokens."""

    def feedback(self, client: Client, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Records feedback."""

    def forget(self, client: Client, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Deletes a conversation."""


@dataclass(slots=True, eq=False)
class Client:
    """A client of a served policy, known by its key.

    Attributes:
        name: recorded with conversations, in place of the key.
        serving: what replies.
        expires: when the key ends, in seconds since 1970; None: never.
        per_minute: how many requests it may make; 0: any number.
    """

    name: str
    serving: Serves
    expires: float | None = None
    per_minute: int = 0
    _asked: deque[float] = field(default_factory=deque)

    @property
    def temperature(self) -> float:
        """The one that may be asked for."""
        return self.serving.temperature

    @property
    def models(self) -> Sequence[str]:
        """The names that the policy answers to."""
        return self.serving.models

    @property
    def ignore(self) -> Sequence[str]:
        """Options of requests that are passed over."""
        return self.serving.ignore

    def admit(self) -> None:
        """Counts a request.

        Raises:
            Refused: the key has expired, or has asked too often.
        """
        now = time.time()
        if self.expires is not None and now >= self.expires:
            raise Refused(401, f"the key of {self.name!r} has expired")
        while self._asked and self._asked[0] < now - 60:
            self._asked.popleft()
        if self.per_minute and len(self._asked) >= self.per_minute:
            raise Refused(429, f"{self.name!r} may ask {self.per_minute} times a minute")
        self._asked.append(now)

    def submit(self, asked: Asked, api: str) -> Pending:
        """Takes a request; see `Serving.submit`."""
        self.admit()
        return self.serving.submit(self, asked, api)

    def feedback(self, given: Mapping[str, Any]) -> Future[Any]:
        """Takes feedback; see `Serving.feedback`."""
        self.admit()
        return self.serving.ask(lambda: self.serving.feedback(self, given))

    def forget(self, given: Mapping[str, Any]) -> Future[Any]:
        """Forgets a conversation; see `Serving.forget`."""
        self.admit()
        return self.serving.ask(lambda: self.serving.forget(self, given))
