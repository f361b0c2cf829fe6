"""Environments at work: each lives on one worker, which makes, resets, steps and closes it, every call under a limit.

    instance = environments.take(start.env, start.kwargs)
    environments.ask(instance, "reset", seed, options)  ->  environments.wait()  ->  [(instance, value, reason)]
    environments.give(instance)

A worker is a thread, or a thread and a process of its own. Nothing that an environment does on it reaches another: what it raises is its
reason; one that does not answer is abandoned, its thread told to stop, its process killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import queue
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cloudpickle
import gymnasium
from gymnasium.envs.registration import load_env_creator

from .env_process import STARTING, Remote, Session, Template, Traits
from .environment import EnvironmentBroke, Observation, guarded, no_environment
from .episode import Start, derive_id

MAKING = ("make", "start", "move")
PROCESSES = max(8, 2 * (os.cpu_count() or 1))
SIDE_BY_SIDE = 64  # environments of one id that may be at work at a time, where they say that they can
PATIENCE = 1.0  # seconds in which an abandoned thread may stop before it is named


class Abandoned(BaseException):
    """Raised in the thread of an environment that did not answer in time, as soon as it comes back from what it waits for."""


@dataclass(slots=True, eq=False)
class _Job:
    """One call on one environment."""

    instance: Instance
    verb: str
    arguments: tuple[Any, ...] = ()
    deadline: float = 0.0


class Instance:
    """One environment on a thread of its own.

    Attributes:
        env_id, kwargs: what it is made of.
        traits: what it says of itself, once it was made.
        lost: it did not answer and was abandoned.
    """

    def __init__(self, env_id: str, kwargs: Mapping[str, Any], home: _Home, done: queue.SimpleQueue[Any]) -> None:
        self.env_id, self.kwargs = env_id, kwargs
        self.traits: Traits | None = None
        self.lost = False
        self._home, self._done = home, done
        self._session = Session()
        self._remote: Remote | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._arrived = asyncio.Event()
        self._busy = threading.Lock()  # held to settle whether a call was answered or abandoned first
        self._working = False
        self.thread = threading.Thread(target=self._live, daemon=True, name=f"turnwise-env {env_id}")
        self.thread.start()

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.traits.metadata if self.traits else {}

    # What the main thread calls.

    def do(self, job: _Job | None) -> None:
        """Lets it do something; None ends the thread."""
        self._working = job is not None
        self._jobs.put(job)
        self._wake(self._arrived.set)

    def abandon(self) -> bool:
        """Gives up on what it is doing. False: it has just answered."""
        with self._busy:
            if not self._working:
                return False
            self.lost = True
            if self._remote is not None:
                self._remote.kill()
            elif self._home.template is not None and self._home.template.can_fork is None:
                self._home.template.kill()  # it hangs in its import
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread.ident or 0), ctypes.py_object(Abandoned))
        self._wake(lambda: None)
        return True

    def _wake(self, how: Callable[[], Any]) -> None:
        if self._session.awaited:  # then the thread may be asleep in its loop
            with contextlib.suppress(RuntimeError):  # a closed one
                self._session.loop.call_soon_threadsafe(how)

    # What its thread does.

    def _live(self) -> None:
        with contextlib.suppress(Abandoned):
            try:
                self._serve()
            except Abandoned:
                self._call("close")
            finally:
                if self._remote is not None:
                    guarded(self._remote.end)
                guarded(self._session.loop.close)

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            asyncio.set_event_loop(self._session.loop)  # asyncio.run, for one, leaves none
            answer = self._call(job.verb, *job.arguments)
            with self._busy:
                self._working = False
                if self.lost:
                    raise Abandoned
            self._done.put((job, *answer))

    def _next(self) -> _Job | None:
        """The next job; while it waits for it, tasks that coroutines left behind (a connection's heartbeat) go on."""

        async def arrived() -> None:
            while self._jobs.empty():
                self._arrived.clear()
                if self._jobs.empty():
                    await self._arrived.wait()

        if self._session.awaited:
            self._session.loop.run_until_complete(arrived())
        return self._jobs.get()

    def _call(self, verb: str, *arguments: Any) -> tuple[Any, str]:
        own = {"make": self._make, "start": self._home.start, "move": self._move}
        if verb in own:
            return guarded(own[verb])
        if self._remote is None:
            return guarded(partial(getattr(self._session, verb), *arguments))
        return guarded(partial(self._remote.call, verb, *arguments))

    def _make(self) -> Traits | None:
        """Makes it here; None: it wants to live in a process."""
        entry = gymnasium.spec(self.env_id).entry_point
        if isinstance(entry, str):
            load_env_creator(entry)
        if _declared(self.env_id) == "process":
            return None
        traits = self._session.make(self.env_id, self.kwargs)
        if traits.metadata.get("concurrency") == "process":
            self._session.close()
            return None
        self.traits = traits
        return traits

    def _move(self) -> Traits:
        """Makes it in a process of its own."""
        self._remote = Remote(self._home.load(self.env_id))
        traits = self._remote.call("make", self.kwargs)  # a state cannot leave its process
        self.traits = Traits({**traits.metadata, "snapshots": False}, traits.players)
        return self.traits


class _Home:
    """Where the processes of one environment id come from."""

    def __init__(self) -> None:
        self.template: Template | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Has an interpreter ready."""
        with self._lock:
            if self.template is None or not self.template.alive:
                self.template = None
                self.template = Template()

    def load(self, env_id: str) -> Template:
        """That interpreter, the environment imported; its own from now on if it cannot fork."""
        spec = gymnasium.spec(env_id)
        entry: Any = spec.entry_point
        if isinstance(entry, str) and entry.startswith("__main__:"):
            entry = load_env_creator(entry)  # the child has another __main__: what stands in the user's script goes by value
        try:
            payload = cloudpickle.dumps(replace(spec, entry_point=entry, vector_entry_point=None))
        except Exception as error:
            raise EnvironmentBroke(
                f"it cannot be sent to a process of its own ({type(error).__name__}: {error}): put it into a module and register it by "
                'name, such as "acme.riddle:Riddle"'
            ) from error
        self.start()
        with self._lock:
            template = self.template
            assert template is not None
            template.load(payload)
            if not template.can_fork:
                self.template = None
            return template

    def close(self) -> None:
        if self.template is not None:
            self.template.kill()


class _Lane:
    """Calls of which some may run at a time: one, or several."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.waiting: deque[_Job] = deque()
        self.running: set[_Job] = set()


class Environments:
    """Instances by the kind of environment, those in use and those that wait to be used again.

    Serial environments do one thing at a time, in the order asked, which is what makes a run repeatable; others go side by side.
    A serial one that did not answer has broken that already: its like queue among themselves from then on, so that they hold up
    nobody else.

    Attributes:
        limit: seconds one call may take before its environment is abandoned.
        failures: closes that failed, by environment and reason.
    """

    def __init__(self, limit: float = 60.0) -> None:
        self.limit = limit
        self.failures: Counter[tuple[str, str]] = Counter()
        self._idle: dict[str, list[Instance]] = {}
        self._count: Counter[str] = Counter()  # instances by environment, idle and closing ones included
        self._making: Counter[str] = Counter()
        self._instances: dict[str, int | None] = {}  # how many may live at a time, where known
        self._metadata: dict[str, Mapping[str, Any]] = {}
        self._homes: dict[str, _Home] = {}
        self._lanes: dict[tuple[str, ...], _Lane] = {}
        self._hung: set[str] = set()
        self._abandoned: list[tuple[Instance, str, float, float]] = []
        self._ended: list[Instance] = []
        self._warned: set[str] = set()
        self._looked = 0.0
        self._done: queue.SimpleQueue[tuple[_Job, Any, str]] = queue.SimpleQueue()

    def metadata(self, env_id: str) -> Mapping[str, Any] | None:
        """What an environment says of itself; None as long as none was made."""
        return self._metadata.get(env_id)

    def take(self, env_id: str, kwargs: Mapping[str, Any]) -> Instance | None:
        """An environment to play in, perhaps not made yet; None if that has to wait: no more may live at a time
        (`metadata["instances"]`), or the first of its kind is only being made, which will tell.

        Raises:
            LookupError: no such environment.
        """
        key = derive_id(env_id, kwargs)
        if idle := self._idle.get(key):
            return idle.pop()
        known = self._metadata.get(env_id)
        if known is None and self._making[env_id]:
            return None
        if known is not None and self._count[env_id] >= known.get("instances", float("inf")):
            others = [own for own in self._idle.values() if own and own[0].env_id == env_id]
            if others:
                self.ask(others[0].pop(), "close")
            return None
        check_id(env_id)
        self._count[env_id] += 1
        self._making[env_id] += 1
        return Instance(env_id, kwargs, self._homes.setdefault(env_id, _Home()), self._done)

    def give(self, instance: Instance, *, sound: bool) -> None:
        """Takes an environment back; one that failed is closed and never used again, one that is still at work abandoned."""
        under_way = [(lane, job) for lane in self._lanes.values() for job in (*lane.waiting, *lane.running)]
        for lane, job in under_way:
            if job.instance is not instance:
                continue
            if job.verb in MAKING:
                self._making[instance.env_id] -= 1
            if job in lane.waiting:
                lane.waiting.remove(job)
                continue
            lane.running.remove(job)
            if instance.abandon():
                self._abandon(job)
        if instance.lost:
            return
        if sound:
            self._idle.setdefault(derive_id(instance.env_id, instance.kwargs), []).append(instance)
        else:
            self.ask(instance, "close")

    def ask(self, instance: Instance, verb: str, *arguments: Any) -> None:
        """Asks for one call of `Session`; `wait` tells what came of it."""
        job = _Job(instance, verb, arguments)
        self._lane(job).waiting.append(job)

    def wait(self) -> list[tuple[Instance, Any, str]]:
        """Waits until something has happened. Returns what was answered: (instance, result, "") or (instance, None, reason)."""
        answered: list[tuple[Instance, Any, str]] = []
        while True:
            running = self._dispatch()
            self._notice()
            if not running:
                return answered
            try:
                until = min(job.deadline for job in running) - time.monotonic()
                job, value, reason = self._done.get_nowait() if answered else self._done.get(timeout=max(0.0, until))
            except queue.Empty:
                if answered:
                    return answered
                overdue = [job for job in running if job.deadline <= time.monotonic()]
                found = [(job, None, self._abandon(job)) for job in overdue if job.instance.abandon()]
            else:
                found = (
                    [(job, value, reason)] if job in running else []
                )  # nobody waits for an answer of one that was given back
            for job, value, reason in found:
                for lane in self._lanes.values():
                    lane.running.discard(job)
                if not self._went_on(job, value, reason):
                    answered.append((job.instance, value, reason))
            if found and not answered:
                return []

    def close(self) -> None:
        """Closes all that wait to be used again, ends threads and processes, and names what could not be ended."""
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

    def _lane(self, job: _Job) -> _Lane:
        env_id = job.instance.env_id
        if self._way(env_id) == "process" or job.verb in ("start", "move"):
            return self._lanes.setdefault(("process", env_id), _Lane(PROCESSES))
        if self._way(env_id) == "thread":
            return self._lanes.setdefault(("thread", env_id), _Lane(SIDE_BY_SIDE))
        if env_id not in self._hung:
            return self._lanes.setdefault((), _Lane(1))
        if job.verb == "close":
            return self._lanes.setdefault(("close", env_id), _Lane(SIDE_BY_SIDE))
        return self._lanes.setdefault((env_id,), _Lane(1))

    def _way(self, env_id: str) -> str:
        known = self._metadata.get(env_id)
        return (_declared(env_id) or "serial") if known is None else known.get("concurrency", "serial")

    def _dispatch(self) -> list[_Job]:
        """Begins what may begin. Returns all that is under way."""
        for lane in self._lanes.values():
            while lane.waiting and len(lane.running) < lane.width:
                job = lane.waiting.popleft()
                limit = max(self.limit, STARTING) if job.verb == "start" else self.limit
                job.deadline = time.monotonic() + limit
                lane.running.add(job)
                job.instance.do(job)
        return [job for lane in self._lanes.values() for job in lane.running]

    def _went_on(self, job: _Job, value: Any, reason: str) -> bool:
        """Whether what was answered is the engine's own business, which goes on here."""
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
            self._metadata[instance.env_id] = value.metadata
        if job.verb in MAKING:
            self._making[instance.env_id] -= 1
        return False

    def _closed(self, instance: Instance, reason: str) -> None:
        if not instance.lost:
            self._count[instance.env_id] -= 1
            instance.do(None)
            self._ended.append(instance)
            self._ended = [one for one in self._ended if one.thread.is_alive()]
        if reason:
            self.failures[instance.env_id, reason] += 1
            self._warn(instance.env_id, "close", f"environment {instance.env_id!r}: close: {reason}; the run goes on")

    def _abandon(self, job: _Job) -> str:
        """Writes an instance off that did not answer. Returns the reason."""
        instance = job.instance
        self._count[instance.env_id] -= 1
        self._abandoned.append((instance, job.verb, time.monotonic(), _busy_seconds(instance.thread)))
        if self._way(instance.env_id) == "serial" and instance.env_id not in self._hung:
            self._hung.add(instance.env_id)
            queued = [waiting for lane in self._lanes.values() for waiting in lane.waiting]
            for lane in self._lanes.values():
                lane.waiting.clear()
            for waiting in queued:  # those of its kind make room for the others
                self._lane(waiting).waiting.append(waiting)
        return f"no answer within {self.limit:g} s; it was abandoned"

    def _notice(self, *, last: bool = False) -> None:
        """Names the threads that were told to stop and did not."""
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
            burns = _busy_seconds(instance.thread) - busy > 0.3 * (now - since)
            self._warn(
                instance.env_id,
                "hangs",
                f"environment {instance.env_id!r}: a call ({verb}) did not come back within {self.limit:g} s and its thread cannot be "
                f"stopped; it {'burns CPU time that everybody else lacks' if burns else 'sleeps, and holds what it has opened'}. "
                'Declare metadata["concurrency"] = "process": processes can be killed.',
            )
        self._abandoned = left
        if last and left:
            kinds = Counter(instance.env_id for instance, *_ in left)
            _tell(
                f"{len(left)} abandoned threads of environments are still there: "
                + ", ".join(f"{env_id} ({count})" for env_id, count in kinds.items())
            )

    def _warn(self, env_id: str, kind: str, text: str) -> None:
        """Once per environment and kind."""
        if f"{env_id} {kind}" not in self._warned:
            self._warned.add(f"{env_id} {kind}")
            _tell(text)


def _tell(text: str) -> None:
    """Warns, and no more than that where warnings are errors (an environment may have made them so)."""
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        print(f"turnwise: warning: {text}", file=sys.stderr)


def check_id(env_id: str) -> None:
    """Raises `LookupError` with near names if no such environment is registered."""
    try:
        gymnasium.spec(env_id)
    except gymnasium.error.Error as error:
        raise LookupError(no_environment(env_id)) from error


def _declared(env_id: str) -> str | None:
    """The way of working that a class states before one is made; None: a function makes it, or its module is not imported yet."""
    entry: Any = gymnasium.spec(env_id).entry_point
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        entry = getattr(sys.modules.get(module), name, None)
    said = getattr(entry, "metadata", None)
    return said.get("concurrency", "serial") if isinstance(said, Mapping) else None


def _busy_seconds(thread: threading.Thread) -> float:
    """CPU time that a thread has used, as far as the system tells (Linux)."""
    try:
        with open(f"/proc/self/task/{thread.native_id}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def replay(start: Start, replies: Sequence[str], limit: float = 60.0) -> list[Observation]:
    """Plays recorded replies again from a start: how a turn's state is reached once more, for branching and for audits.

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
    """One call, waited for.

    Raises:
        EnvironmentBroke: it failed; the message begins with the verb.
    """
    environments.ask(instance, verb, *arguments)
    while not (answered := environments.wait()):
        pass
    [(_, value, reason)] = answered
    if reason:
        raise EnvironmentBroke(f"{verb}: {reason}")
    return value
