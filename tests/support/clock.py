"""Holds the clock of coroutines, whose time passes only while all of them sleep."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class AsyncClock:
    """Replaces `calls.TIME`, which coroutines await: time passes only while all of them sleep, each
    time after `step` real seconds in which others may do something."""

    held = False  # while questions are still being asked

    def __init__(self, step: float = 0.0) -> None:
        self.step, self.time = step, 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count, self._driver = itertools.count(), None

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        awake = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.time + seconds, next(self._count), awake))
        if self._driver is None or self._driver.done():
            self._driver = asyncio.ensure_future(self._drive())
        await awake

    async def _drive(self) -> None:
        while self._sleepers:
            for _ in range(100):
                await asyncio.sleep(0)
            await asyncio.sleep(self.step)
            while self.held:
                await asyncio.sleep(0.001)
            when, _, awake = heapq.heappop(self._sleepers)
            self.time = max(self.time, when)
            if not awake.done():
                awake.set_result(None)
