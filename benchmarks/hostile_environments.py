"""What other people's environments cost the others: 2,000 episodes over some that raise, hang and
lie in every place.

    python benchmarks/hostile_environments.py [episodes [rounds]]

Serial, thread-safe, coroutine and process environments; making, reset, step, close and players.
Asserts that each failure is counted to its cause and that nothing is left behind, and prints how
fast the good ones were with and without the bad ones. What is lost is mostly one LIMIT: the
serial ones do one thing at a time, so the first of their kind that hangs holds them all up until it
is abandoned; its like queue among themselves from then on.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
import warnings
from collections import Counter
from statistics import median
from typing import Any

import gymnasium
import turnwise
from turnwise.engine.environments.pool import Environments

LIMIT = float(os.environ.get("LIMIT", "0.5"))  # seconds of a call; more on a busy machine
HANG = 4 * LIMIT
PLACES, HOWS, WAYS = (
    ("make", "reset", "step", "close", "player"),
    ("raises", "hangs", "lies"),
    ("serial", "thread", "async", "process"),
)


class Hostile(gymnasium.Env):
    """Does something in some place: raises, hangs for longer than the limit, or returns what it
    should not."""

    observation_space: Any = turnwise.Text(1000)
    action_space = turnwise.Text(1000)

    def __init__(self, place: str = "", how: str = "") -> None:
        self.place, self.how = place, how
        self.players = {"expert": lambda env, rng: lambda said: env.does("player", "go on")}
        self.observation_space = self.does("make", self.observation_space)

    def does(self, place: str, otherwise: Any) -> Any:
        if place == self.place and self.how == "raises":
            raise RuntimeError("on purpose")
        if place == self.place and self.how == "hangs":
            time.sleep(HANG)
        return b"a lie" if place == self.place and self.how == "lies" else otherwise

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.turn = 0
        return self.does("reset", "hello"), {}

    def step(self, action: str) -> Any:
        self.turn += 1
        time.sleep(0.005)
        return self.does("step", "more"), 0.0, self.turn == 3, False, {"at": time.monotonic()}

    def close(self) -> None:
        self.does("close", None)


class Threaded(Hostile):
    metadata = {"render_modes": [], "concurrency": "thread"}


class InProcess(Hostile):
    metadata = {"render_modes": [], "concurrency": "process"}


class Coroutines(Threaded):
    """Hangs by blocking, but for `close`, where it waits."""

    async def reset(self, **more: Any) -> Any:  # type: ignore[override]
        await asyncio.sleep(0)
        return Hostile.reset(self, **more)

    async def step(self, action: str) -> Any:  # type: ignore[override]
        await asyncio.sleep(0)
        return Hostile.step(self, action)

    async def close(self) -> None:  # type: ignore[override]
        if self.place == "close" and self.how == "hangs":
            await asyncio.sleep(HANG)
        self.does("close", None)


for _way, _kind in zip(WAYS, (Hostile, Threaded, Coroutines, InProcess), strict=True):
    for _name in ("good", "bad"):
        gymnasium.register(f"{_name}/{_way}-v0", _kind)  # type: ignore[arg-type]


def starts(count: int, bad: bool) -> list[tuple[turnwise.Start, int]]:
    """60 % good ones; with `bad`, the bad ones among them."""
    kinds = [{"place": p, "how": h} for p in PLACES for h in HOWS]
    found = []
    for i in range(count):
        way = WAYS[i // 5 % len(WAYS)]
        if i % 5 < 3:
            found.append((turnwise.Start(f"good/{way}-v0", i), 0))
        elif bad:
            found.append(
                (
                    turnwise.Start(
                        f"bad/{way}-v0", i, {}, kinds[(i // 20 * 2 + i % 5 - 3) % len(kinds)]
                    ),
                    0,
                )
            )
    return found


def left() -> tuple[int, int, int, float]:
    """Threads, files, child processes, and megabytes of memory of this process."""
    gc.collect()
    children = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                children += int(file.read().rpartition(")")[2].split()[1]) == os.getpid()
        except OSError:
            continue
    with open("/proc/self/status") as file:
        memory = next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024
    return threading.active_count(), len(os.listdir("/proc/self/fd")), children, memory


def play(count: int, bad: bool) -> tuple[float, list[turnwise.Episode], Environments]:
    """Seconds until the last good episode ended, all episodes, and what they were played in,
    closed."""
    environments, began = Environments(), time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they name what hangs and what cannot be closed
        found = turnwise.rollout(
            turnwise.ScriptPlayer("expert"),
            starts(count, bad),
            step_limit=LIMIT,
            environments=environments,
        )
        environments.close()
    ended = max(e.turns[-1].info["at"] for e in found if e.start.env.startswith("good"))
    return ended - began, found, environments


def check(
    found: list[turnwise.Episode], environments: Environments
) -> Counter[tuple[str, str, str]]:
    """Failures by way, place and what was done there; asserts that each is counted to its cause."""
    counted: Counter[tuple[str, str, str]] = Counter()
    words = {"raises": "on purpose", "hangs": "no answer within", "lies": ""}
    for e in found:
        if e.start.env.startswith("good"):
            assert e.ending == "terminated", (e.start, e.reason)
            continue
        place, how = e.start.kwargs["place"], e.start.kwargs["how"]
        counted[e.start.env.split("/")[1], place, how] += 1
        if place == "close":
            assert e.ending == "terminated", (e.start, e.reason)
            continue
        assert e.ending == "failed", e.start
        assert e.reason.startswith(place), (e.start, e.reason)
        assert words[how] in e.reason, (e.start, e.reason)
    closes = sum(n for (_, place, how), n in counted.items() if place == "close" and how != "lies")
    named = sum(environments.failures.values())
    # How many are closed at all depends on how many lived at a time.
    assert (closes > 0) == (named > 0), environments.failures
    assert named <= closes, environments.failures
    return counted


def main(count: int, rounds: int) -> None:
    play(100, False)  # imports, and what the first time costs
    speeds = []
    before = left()
    for _ in range(rounds):
        alone, _, _ = play(count, False)
        mixed, found, environments = play(count, True)
        counted = check(found, environments)
        speeds.append(alone / mixed)
        print(f"the good ones: {alone:.2f} s alone, {mixed:.2f} s among the bad ones")
    after = left()
    until = time.monotonic() + 10 * HANG
    # Those that hang do so for a while only.
    while after[:3] != before[:3] and time.monotonic() < until:
        time.sleep(0.1)
        after = left()
    print(
        f"{len(found)} episodes, {sum(counted.values())} of them in environments that break in"
        f" {len(counted)} ways"
    )
    print(f"the good ones keep {median(speeds):.0%} of their speed (median of {rounds})")
    print(
        "threads, files, processes, MB before and after:",
        before[:3],
        f"{before[3]:.0f}",
        after[:3],
        f"{after[3]:.0f}",
    )
    assert after[:3] == before[:3]


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:]]
    main(*given, *(2000, 5)[len(given) :])
