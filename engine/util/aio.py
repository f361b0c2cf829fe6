"""Runs coroutines from ordinary code, on one loop per process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import threading
from collections.abc import Awaitable, Coroutine
from typing import Any

from ..errors import NoAnswer, PartFailed
from .wording import worded

_loops: dict[str, asyncio.AbstractEventLoop] = {}
_loops_lock = threading.Lock()
ANSWERS = "turnwise-answers"  # the loop of other people's coroutines
LETTING_GO = 1.0  # seconds in which a loop must show that nothing blocks it


def background(
    work: Coroutine[Any, Any, Any], name: str = "turnwise-loop"
) -> concurrent.futures.Future[Any]:
    """Starts a coroutine on the loop of this name, which all such coroutines of a process share, on
    a daemon thread, so that sessions and clients opened in one call still work in the next."""
    with _loops_lock:
        if name not in _loops:
            loop = _loops[name] = asyncio.new_event_loop()
            threading.Thread(target=_turn, args=(loop,), daemon=True, name=name).start()
        return asyncio.run_coroutine_threadsafe(work, _loops[name])


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    """Runs a loop for ever: a SystemExit or KeyboardInterrupt of a task comes out of the loop, and
    is ignored here."""
    while True:
        with contextlib.suppress(BaseException):
            loop.run_forever()


def settle(value: Any, limit: float | None = None) -> Any:
    """Returns the result of a call that may be a coroutine's: a judge's, a scripted player's.

    Args:
        value: what the call returned.
        limit: seconds a coroutine may take; None: it is waited for.

    Raises:
        NoAnswer, PartFailed, Exception: as `outcome`.
    """
    return outcome(begin(value), limit) if inspect.isawaitable(value) else value


def begin(value: Awaitable[Any]) -> concurrent.futures.Future[Any]:
    """Starts what other people's call returned, on a loop apart from that of the model judges."""

    async def awaited() -> Any:
        try:
            return await value
        except BaseException as error:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                return None  # it was late: its result is dropped
            if isinstance(error, Exception):
                raise
            raise PartFailed(worded(error)) from error

    return background(awaited(), ANSWERS)


def outcome(answer: concurrent.futures.Future[Any], limit: float | None = None) -> Any:
    """Waits for what `begin` started and returns its result. What is late is cancelled; where it
    blocks the loop, that is left behind, and the next ones have another.

    Raises:
        NoAnswer: it took longer than `limit` seconds from now.
        PartFailed: it raised what would end a process (SystemExit) or a task (CancelledError).
        Exception: whatever else it raised.
    """
    done, _ = concurrent.futures.wait([answer], limit)
    if done:
        return answer.result()
    answer.cancel()
    if not concurrent.futures.wait([background(asyncio.sleep(0), ANSWERS)], LETTING_GO).done:
        with _loops_lock:
            _loops.pop(ANSWERS, None)
    raise NoAnswer(f"no answer within {limit:g} s")
