"""A pool of environments: each lives on one worker, which makes, resets, steps and closes it, every
call under a time limit.

    instance = environments.take(start.env, start.kwargs) environments.ask(instance, "reset", seed,
    options)  ->  environments.wait()  ->  [(instance, value, reason)] environments.give(instance)

A worker is a thread, or a thread and a process of its own. Nothing that an environment does on it
reaches another: what it raises is its reason; one that does not answer is abandoned, its thread
told to stop, its process killed.
"""

from __future__ import annotations

import os
import queue
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import EnvironmentBroke, NoRoom
from ..records.episode import Start
from ..util.ids import derive_id
from ..util.wording import NoRoomReason
from .conventions import Observation
from .instance import MAKING, Home, Instance, Job, busy_seconds, declared_concurrency
from .process import STARTING
from .registry import check_id

PROCESSES = max(8, 2 * (os.cpu_count() or 1))
# Environments of one id that may be at work at a time, where they say that they can.
SIDE_BY_SIDE = 64
AGAIN = 10.0  # seconds after which more are tried again where there was no room
PATIENCE = 1.0  # seconds in which an abandoned thread may stop before it is named


class _Lane:
    """A queue of calls of which a fixed number may run at a time."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.waiting: deque[Job] = deque()
        self.running: set[Job] = set()


class Environments:
    """A pool of instances by the kind of environment, those in use and those that wait to be used
    again.

    Serial environments do one thing at a time, in the order asked, which is what makes a run
    repeatable; others go side by side. A serial one that did not answer has broken that already:
    from then on its kind has a queue of its own, so that it does not delay the others.

    Attributes:
        limit: seconds one call may take before its environment is abandoned.
        failures: closes that failed, by environment and reason.
    """

    def __init__(self, limit: float = 60.0) -> None:
        self.limit = limit
        self.failures: Counter[tuple[str, str]] = Counter()
        self._idle: dict[str, list[Instance]] = {}
        # Instances by environment, idle and closing ones included: what they share, such as a
        # server, they share whatever they are made with.
        self._count: Counter[str] = Counter()
        # By kind: an environment's id and what it is made with.
        self._making: Counter[str] = Counter()
        # How many may be played where one was told to wait, and until when.
        self._room: dict[str, tuple[int, float]] = {}
        self._metadata: dict[str, Mapping[str, Any]] = {}
        self._homes: dict[str, Home] = {}
        self._lanes: dict[tuple[str, ...], _Lane] = {}
        self._hung: set[str] = set()
        self._abandoned: list[tuple[Instance, str, float, float]] = []
        self._ended: list[Instance] = []
        self._warned: set[str] = set()
        self._looked = 0.0
        self._done: queue.SimpleQueue[tuple[Job, Any, str]] = queue.SimpleQueue()

    def metadata(self, env_id: str, kwargs: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Returns an environment's metadata; None as long as none was made."""
        return self._metadata.get(derive_id(env_id, kwargs))

    def take(self, env_id: str, kwargs: Mapping[str, Any]) -> Instance | None:
        """Takes an environment to play in, perhaps not made yet; None if that has to wait: no more
        may live at a time (`metadata["instances"]`), or the first of its kind is only being made
        and its metadata are not known yet.

        Raises:
            LookupError: no such environment.
        """
        kind = derive_id(env_id, kwargs)
        if idle := self._idle.get(kind):
            return idle.pop()
        known = self._metadata.get(kind)
        if known is None and self._making[kind]:
            return None
        if known is not None and self._count[env_id] >= self._most(kind, known):
            others = [own for own in self._idle.values() if own and own[0].env_id == env_id]
            if others:
                self.ask(others[0].pop(), "close")
            return None
        check_id(env_id)
        self._count[env_id] += 1
        self._making[kind] += 1
        return Instance(env_id, kwargs, self._homes.setdefault(env_id, Home()), self._done)

    def _most(self, kind: str, metadata: Mapping[str, Any]) -> float:
        """Returns how many of a kind may live."""
        room, until = self._room.get(kind, (0, 0.0))
        limit = float(metadata.get("instances", float("inf")))
        return min(room, limit) if time.monotonic() < until else limit

    def give(self, instance: Instance, *, sound: bool) -> None:
        """Returns an environment to the pool; one that failed is closed and never used again, one
        that is still at work abandoned."""
        under_way = [
            (lane, job) for lane in self._lanes.values() for job in (*lane.waiting, *lane.running)
        ]
        for lane, job in under_way:
            if job.instance is not instance:
                continue
            if job.verb in MAKING:
                self._making[instance.kind] -= 1
            if job in lane.waiting:
                lane.waiting.remove(job)
                continue
            lane.running.remove(job)
            if instance.abandon():
                self._abandon(job)
        if instance.lost:
            return
        # Where there may only be so many, none is kept in the middle of an episode.
        if sound and (instance.over or "instances" not in instance.metadata):
            self._idle.setdefault(instance.kind, []).append(instance)
        else:
            self.ask(instance, "close")
            self._dispatch()  # now: it may be long until something is waited for again

    def has_no_room(self, instance: Instance, reason: str) -> None:
        """Returns an environment that cannot begin before another one has ended: from now on no
        more of its kind are taken than there are besides it."""
        others = self._count[instance.env_id] - 1
        self._room[instance.kind] = max(1, others), time.monotonic() + AGAIN
        if not others:
            self._warn(
                instance.env_id, "full", f"environment {instance.env_id!r}: {reason}; it is waited"
                " for until it has",
            )  # fmt: skip
        self.give(instance, sound=False)

    def ask(self, instance: Instance, verb: str, *arguments: Any) -> None:
        """Starts one call of `Session`; `wait` returns its result."""
        job = Job(instance, verb, arguments)
        self._lane(job).waiting.append(job)

    def wait(self, *, block: bool = True) -> list[tuple[Instance, Any, str]]:
        """Waits until at least one call has ended; without `block` only looks which have.

        Returns what was answered: (instance, result, "") or (instance, None, reason).
        """
        answered: list[tuple[Instance, Any, str]] = []
        while True:
            running = self._dispatch()
            self._notice()
            if not running:
                return answered
            try:
                until = min(job.deadline for job in running) - time.monotonic()
                job, value, reason = (
                    self._done.get(timeout=max(0.0, until))
                    if block and not answered
                    else self._done.get_nowait()
                )
            except queue.Empty:
                overdue = [job for job in running if job.deadline <= time.monotonic()]
                if answered or not (block or overdue):
                    return answered
                found = [
                    (job, None, self._abandon(job)) for job in overdue if job.instance.abandon()
                ]
            else:
                found = (
                    [(job, value, reason)] if job in running else []
                )  # an instance that was given back: its answer is dropped
            for job, value, reason in found:
                for lane in self._lanes.values():
                    lane.running.discard(job)
                if not self._went_on(job, value, reason):
                    answered.append((job.instance, value, reason))
            if block and found and not answered:
                return []

    def close(self) -> None:
        """Closes all instances in the pool, ends threads and processes, and names what could not be
        ended."""
        for own in self._idle.values():
            for instance in own:
                self.ask(instance, "close")
        self._idle.clear()
        while any(lane.waiting or lane.running for lane in self._lanes.values()):
            self.wait()
        until = time.monotonic() + PATIENCE
        for thread in [i.thread for i in self._ended] + [i.thread for i, *_ in self._abandoned]:
            thread.join(max(0.01, until - time.monotonic()))
        self._ended.clear()
        for home in self._homes.values():
            home.close()
        self._homes.clear()
        self._notice(last=True)

    def _lane(self, job: Job) -> _Lane:
        env_id, kind = job.instance.env_id, job.instance.kind
        if self._way(job.instance) == "process" or job.verb in ("start", "move"):
            return self._lanes.setdefault(("process", env_id), _Lane(PROCESSES))
        if self._way(job.instance) == "thread":
            return self._lanes.setdefault(("thread", env_id), _Lane(SIDE_BY_SIDE))
        if kind not in self._hung:
            return self._lanes.setdefault((), _Lane(1))
        if job.verb == "close":
            return self._lanes.setdefault(("close", env_id), _Lane(SIDE_BY_SIDE))
        return self._lanes.setdefault((kind,), _Lane(1))

    def _way(self, instance: Instance) -> str:
        known = self._metadata.get(instance.kind)
        return (
            (declared_concurrency(instance.env_id) or "serial")
            if known is None
            else known.get("concurrency", "serial")
        )

    def _dispatch(self) -> list[Job]:
        """Starts the calls that may start. Returns all that are running."""
        for lane in self._lanes.values():
            while lane.waiting and len(lane.running) < lane.width:
                job = lane.waiting.popleft()
                job.limit = self._limit(job)
                job.deadline = time.monotonic() + job.limit
                lane.running.add(job)
                job.instance.do(job)
        return [job for lane in self._lanes.values() for job in lane.running]

    def _limit(self, job: Job) -> float:
        """Returns how many seconds a call may take: the pool's limit, or the environment's own
        where that is more."""
        if job.verb == "start":
            return max(self.limit, STARTING)
        return max(self.limit, self._metadata.get(job.instance.kind, {}).get("step_limit", 0.0))

    def _went_on(self, job: Job, value: Any, reason: str) -> bool:
        """Handles an answer that is the engine's own business; returns whether it was one."""
        instance = job.instance
        if job.verb == "close":
            self._closed(instance, reason)
            return True
        if job.verb in MAKING and not reason:
            if job.verb == "make" and value is None:
                self.ask(instance, "start")
                return True
            if job.verb == "start":
                self.ask(instance, "move")
                return True
            self._metadata[instance.kind] = value.metadata
        if job.verb in MAKING:
            self._making[instance.kind] -= 1
        if isinstance(value, Observation):
            instance.over = value.terminated
        return False

    def _closed(self, instance: Instance, reason: str) -> None:
        if not instance.lost:
            self._count[instance.env_id] -= 1
            instance.do(None)
            self._ended.append(instance)
            self._ended = [one for one in self._ended if one.thread.is_alive()]
        if reason:
            self.failures[instance.env_id, reason] += 1
            self._warn(
                instance.env_id,
                "close",
                f"environment {instance.env_id!r}: close: {reason}; the run goes on",
            )

    def _abandon(self, job: Job) -> str:
        """Removes an instance that did not answer. Returns the reason."""
        instance = job.instance
        self._count[instance.env_id] -= 1
        self._abandoned.append(
            (instance, job.verb, time.monotonic(), busy_seconds(instance.thread))
        )
        if self._way(instance) == "serial" and instance.kind not in self._hung:
            self._hung.add(instance.kind)
            queued = [waiting for lane in self._lanes.values() for waiting in lane.waiting]
            for lane in self._lanes.values():
                lane.waiting.clear()
            for waiting in queued:  # those of its kind make room for the others
                self._lane(waiting).waiting.append(waiting)
        return f"no answer within {job.limit:g} s; it was abandoned"

    def _notice(self, *, last: bool = False) -> None:
        """Warns of threads that were told to stop and did not."""
        now = time.monotonic()
        if not last and now < self._looked + PATIENCE:
            return
        self._looked = now
        left = []
        for instance, verb, since, busy in self._abandoned:
            if not instance.thread.is_alive():
                continue
            left.append((instance, verb, since, busy))
            if not last and now - since < PATIENCE:
                continue
            burns = busy_seconds(instance.thread) - busy > 0.3 * (now - since)
            does = (
                "burns CPU time that all lack" if burns else "sleeps, and holds what it has opened"
            )
            self._warn(
                instance.env_id,
                "hangs",
                f"environment {instance.env_id!r}: a call ({verb}) did not come back in time"
                " and its thread cannot be stopped; it"
                f" {does}."
                ' Declare metadata["concurrency"] = "process": processes can be killed.',
            )
        self._abandoned = left
        if last and left:
            kinds = Counter(instance.env_id for instance, *_ in left)
            _tell(
                f"{len(left)} abandoned threads of environments are still there: "
                + ", ".join(f"{env_id} ({count})" for env_id, count in kinds.items())
            )

    def _warn(self, env_id: str, kind: str, text: str) -> None:
        """Warns once per environment and kind."""
        if f"{env_id} {kind}" not in self._warned:
            self._warned.add(f"{env_id} {kind}")
            _tell(text)


def _tell(text: str) -> None:
    """Warns, or prints where warnings are errors (an environment may have made them so)."""
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        print(f"turnwise: warning: {text}", file=sys.stderr)


def replay(start: Start, replies: Sequence[str], limit: float = 60.0) -> list[Observation]:
    """Plays recorded replies again from a start, to reach a turn's state once more for branching
    and for audits.

    Returns the observations, the one of reset first; they stop where the environment ends.

    Raises:
        EnvironmentBroke: the environment raised, hung or broke its contract.
        LookupError: no such environment.
    """
    environments = Environments(limit)
    instance = environments.take(start.env, start.kwargs)
    assert instance is not None
    seen: list[Observation] = []
    try:
        call(environments, instance, "make")
        seen.append(call(environments, instance, "reset", start.seed, start.options))
        for reply in replies:
            if seen[-1].terminated or seen[-1].truncated:
                break
            seen.append(call(environments, instance, "step", reply))
    except EnvironmentBroke as error:
        raise EnvironmentBroke(f"replay broke after {len(seen)} observations: {error}") from error
    finally:
        environments.give(instance, sound=False)
        environments.close()
    return seen


def call(environments: Environments, instance: Instance, verb: str, *arguments: Any) -> Any:
    """Makes one call and waits for its result.

    Raises:
        EnvironmentBroke: it failed; the message begins with the verb.
        NoRoom: no more of it may live.
    """
    environments.ask(instance, verb, *arguments)
    while not (answered := environments.wait()):
        pass
    [(_, value, reason)] = answered
    if isinstance(reason, NoRoomReason):
        raise NoRoom(f"{verb}: {reason}")
    if reason:
        raise EnvironmentBroke(f"{verb}: {reason}")
    return value
