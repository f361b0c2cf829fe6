"""Registers environments that break in every way we know of, as test/<Name>-v0."""

from __future__ import annotations

import os
import random
import threading
from typing import Any

import gymnasium
import turnwise


class Good(gymnasium.Env):
    observation_space = action_space = turnwise.Text(10_000)

    def __init__(self, when: int = 2) -> None:
        self.when = when

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.turn = 0
        return f"hello {self.np_random.integers(1000)}", {}

    def step(self, action: str) -> tuple[Any, ...]:
        self.turn += 1
        return "more", 0.0, self.turn == self.when, False, {}


class Raises(Good):
    def step(self, action: str) -> tuple[Any, ...]:
        raise RuntimeError("the kettle exploded")


class RaisesInReset(Good):
    def reset(self, **_: Any) -> tuple[Any, Any]:
        raise KeyError("no story")


class Exits(Good):
    def step(self, action: str) -> tuple[Any, ...]:
        raise SystemExit(3)


class Hangs(Good):
    def step(self, action: str) -> tuple[Any, ...]:
        threading.Event().wait()
        raise AssertionError


class ReturnsNone(Good):
    def step(self, action: str) -> Any:
        return None


class SaysNone(Good):
    def step(self, action: str) -> tuple[Any, ...]:
        return None, 0.0, False, False, {}


class Sends5MB(Good):
    def step(self, action: str) -> tuple[Any, ...]:
        return "x" * 5_000_000, 0.0, False, False, {}


class RewardNaN(Good):
    def step(self, action: str) -> tuple[Any, ...]:
        return "more", float("nan"), False, False, {}


class RewardNone(Good):
    def step(self, action: str) -> tuple[Any, ...]:
        return "more", None, False, False, {}


class InfoNone(Good):
    def step(self, action: str) -> tuple[Any, ...]:
        return "more", 0.0, False, False, None


class OddRole(Good):
    def step(self, action: str) -> tuple[Any, ...]:
        return "more", 0.0, False, False, {"role": "assistant"}


class Sometimes(Good):
    """Breaks for about a third of the starts, by its seed."""

    def step(self, action: str) -> tuple[Any, ...]:
        if self.np_random.random() < 0.2:
            raise RuntimeError("bad luck")
        return (
            f"more {self.np_random.random():.3f}",
            float(len(action) % 3),
            self.np_random.random() < 0.5,
            False,
            {},
        )


class NeverEnds(Good):
    def step(self, action: str) -> tuple[Any, ...]:
        return "more", 0.0, False, False, {}


class IgnoresSeed(Good):
    def step(self, action: str) -> tuple[Any, ...]:
        return f"more {os.urandom(4).hex()}", 0.0, True, False, {}


class GlobalRandom(Good):
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Any]:
        random.seed(seed)
        return super().reset(seed=seed)


class Remembers(Good):
    count = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.count += 1
        return f"visit number {self.count}", {}


class BeatsItsOptimum(Good):
    def reset(self, **more: Any) -> tuple[Any, Any]:
        return super().reset(**more)[0], {"optimum": 0.5}

    def step(self, action: str) -> tuple[Any, ...]:
        return "more", 1.0, True, False, {}


class WeakExpert(Good):
    players = {"expert": lambda env, rng: lambda said: "hm"}

    def reset(self, **more: Any) -> tuple[Any, Any]:
        return super().reset(**more)[0], {"optimum": 0.5}


class Arrays(gymnasium.Env):
    observation_space = action_space = gymnasium.spaces.Discrete(3)


class Slow(Good):
    """Thread-safe; steps wait until two of them were under way at a time."""

    metadata = {"render_modes": [], "concurrency": "thread"}
    change = threading.Condition()
    at_work = most = 0

    def step(self, action: str) -> tuple[Any, ...]:
        with self.change:
            Slow.at_work += 1
            Slow.most = max(Slow.most, Slow.at_work)
            self.change.notify_all()
            self.change.wait_for(lambda: Slow.most > 1, timeout=600)
            Slow.at_work -= 1
        return super().step(action)


class Async(Good):
    """Coroutines that keep something bound to the event loop between calls."""

    metadata = {"render_modes": [], "concurrency": "thread"}

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Any]:  # type: ignore[override]
        import asyncio

        self.loop = asyncio.get_running_loop()
        return super().reset(seed=seed)

    async def step(self, action: str) -> tuple[Any, ...]:  # type: ignore[override]
        import asyncio

        await asyncio.wait_for(self.loop.create_task(asyncio.sleep(0)), 5)
        return super().step(action)


class OwnProcess(Good):
    metadata = {"render_modes": [], "concurrency": "process"}
    players = {"expert": lambda env, rng: lambda said: "go on"}

    def step(self, action: str) -> tuple[Any, ...]:
        if action == "die":
            os._exit(7)
        if action == "hang":
            threading.Event().wait()
        return f"pid {os.getpid()}", 0.0, True, False, {}


for _name, _kind in list(globals().items()):
    if isinstance(_kind, type) and issubclass(_kind, gymnasium.Env):
        gymnasium.register(
            f"test/{_name}-v0", f"{__name__}:{_name}", order_enforce=False, disable_env_checker=True
        )
