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
    return asyncio.run_coroutine_threadsafe(work, _loop(name))


def _loop(name: str) -> asyncio.AbstractEventLoop:
    """Returns the loop of this name, which turns."""
    with _loops_lock:
        if name not in _loops:
            loop = _loops[name] = asyncio.new_event_loop()
            threading.Thread(target=_turn, args=(loop,), daemon=True, name=name).start()
        return _loops[name]


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    """Runs a loop for ever: a SystemExit or KeyboardInterrupt of a task comes out of the loop, and
    is ignored here."""
    while True:
        with contextlib.suppress(BaseException):
            loop.run_forever()


def settle(value: Any, limit: float | None = None) -> Any:
    """Returns the result of a call that may be a coroutine's: a judge's, a scripted player's. What
    is late is cancelled.

    Args:
        value: what the call returned.
        limit: seconds a coroutine may take; None: it is waited for.

    Raises:
        NoAnswer: it took longer than `limit` seconds.
        PartFailed: it raised what would end a process (SystemExit) or a task (CancelledError).
        Exception: whatever else it raised.
    """
    if not inspect.isawaitable(value):
        return value
    answer = begin(value)
    done, _ = concurrent.futures.wait([answer], limit)
    if done:
        return answer.result()
    answer.cancel()
    leave_blocked()
    raise NoAnswer(f"no answer within {limit:g} s")


def answering_loop() -> asyncio.AbstractEventLoop:
    """Returns the loop of other people's coroutines; another after that was left behind."""
    return _loop(ANSWERS)


def begin(value: Awaitable[Any], task: str = "") -> concurrent.futures.Future[Any]:
    """Starts what other people's call returned, on a loop apart from that of the model judges.

    Args:
        value: what it returned.
        task: what the work is called, by which `leave_blocked` names it.
    """

    async def awaited() -> Any:
        own = asyncio.current_task()
        assert own is not None
        own.set_name(task)
        try:
            return await value
        except BaseException as error:
            if own.cancelling():
                return None  # it was late: its result is dropped
            if isinstance(error, Exception):
                raise
            raise PartFailed(worded(error)) from error

    return background(awaited(), ANSWERS)


def leave_blocked() -> str | None:
    """Leaves the loop of other people's coroutines behind where one of them blocks it: the next
    ones have another, and those that had begun there do not end.

    Returns:
        what the one that blocks it is called; None: none does.
    """
    loop = answering_loop()
    if concurrent.futures.wait([background(asyncio.sleep(0), ANSWERS)], LETTING_GO).done:
        return None
    task = asyncio.current_task(loop)
    with _loops_lock:
        if _loops.get(ANSWERS) is loop:
            del _loops[ANSWERS]
    return task.get_name() if task else ""
