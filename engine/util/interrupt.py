"""Ctrl-C and SIGTERM, answered once in order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def interruptible(asked: Callable[[int], None], ending: Callable[[], bool]) -> Iterator[None]:
    """Lets the first Ctrl-C or SIGTERM ask for an end in order; one that comes while the end is on
    its way ends at once.

    Outside the main thread, which signals do not reach, nothing changes.

    Args:
        asked: called with the number of the first signal.
        ending: whether the end is on its way.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def answer(number: int, frame: FrameType | None) -> None:
        if ending():
            raise KeyboardInterrupt
        asked(number)

    before = {number: signal.signal(number, answer) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
