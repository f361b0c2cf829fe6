"""Serves HTTP/1.1 with limited patience: a connection that sends nothing, or only part of a
request, is closed to make room for others."""

from __future__ import annotations

from asyncio import TimerHandle
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 20.0  # seconds in which a whole request must have come
# Connections that may owe a request at once; the oldest makes room, long before files run out.
WAITING = 400
# Connections and requests at once, beyond which the answer is 503; the usual limit of open files is
# 1,024.
ANSWERED = 900


class Patient(H11Protocol):
    """A connection that is closed when its request takes too long to come, however busily its bytes
    trickle in."""

    waiting: dict[Patient, TimerHandle] = {}  # those that owe a request, the oldest first

    def connection_made(self, transport: Any) -> None:
        """Begins to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Waits on while a request has begun and not ended."""
        super().data_received(data)
        # A head or a body has begun and not ended.
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._wait()
        else:
            self._no_wait()

    def on_response_complete(self) -> None:
        """Waits for the next request where it has begun already."""
        super().on_response_complete()
        if (
            not self.transport.is_closing() and self.conn.trailing_data[0]
        ):  # the beginning of the next request came with this one
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._no_wait()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self in self.waiting:
            return
        if len(self.waiting) >= WAITING:
            next(iter(self.waiting))._give_up()
        self.waiting[self] = self.loop.call_later(PATIENCE, self._give_up)

    def _no_wait(self) -> None:
        if (timer := self.waiting.pop(self, None)) is not None:
            timer.cancel()

    def _give_up(self) -> None:
        self._no_wait()
        self.transport.abort()
