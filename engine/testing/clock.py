"""A clock whose time passes only while it is waited for."""

from __future__ import annotations

from collections.abc import Callable


class Clock:
    """Tells a time that passes when a run sleeps, at least a second at once, or when a test sets
    `now`.

        turnwise.Run(config, clock=clock, sleep=clock.sleep)

    Args:
        now: the time it begins at, in seconds.
        meanwhile: what happens while a run sleeps.
    """

    def __init__(self, now: float = 1000.0, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.now, self.meanwhile = now, meanwhile

    def __call__(self) -> float:
        """Returns the time, in seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Lets time pass, and does what happens meanwhile."""
        self.now += max(seconds, 1.0)
        self.meanwhile()
