"""One environment instance on a thread of its own, or on a thread and a process."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cloudpickle
import gymnasium
from gymnasium.envs.registration import load_env_creator

from ..errors import EnvironmentBroke
from ..util.ids import derive_id
from .conventions import guarded
from .process import Remote, Session, Template, Traits

MAKING = ("make", "start", "move")


class Abandoned(BaseException):
    """The environment did not answer in time: raised in its thread, as soon as it comes back from
    what it waits for."""


@dataclass(slots=True, eq=False)
class Job:
    """One call on one environment."""

    instance: Instance
    verb: str
    arguments: tuple[Any, ...] = ()
    deadline: float = 0.0
    limit: float = 0.0


class Instance:
    """One environment on a thread of its own.

    Attributes:
        env_id, kwargs: what it is made of.
        kind: a key of both.
        traits: its metadata and players, once it was made.
        lost: it did not answer and was abandoned.
        over: its last episode has ended by itself.
    """

    def __init__(
        self, env_id: str, kwargs: Mapping[str, Any], home: Home, done: queue.SimpleQueue[Any]
    ) -> None:
        self.env_id, self.kwargs = env_id, kwargs
        self.kind = derive_id(env_id, kwargs)
        self.traits: Traits | None = None
        self.lost = False
        self.over = True
        self._home, self._done = home, done
        self._session = Session()
        self._remote: Remote | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._arrived = asyncio.Event()
        # Held to settle whether a call was answered or abandoned first.
        self._busy = threading.Lock()
        self._working = False
        self.thread = threading.Thread(
            target=self._live, daemon=True, name=f"turnwise-env {env_id}"
        )
        self.thread.start()

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The environment's metadata; empty as long as it was not made."""
        return self.traits.metadata if self.traits else {}

    # What the main thread calls.

    def do(self, job: Job | None) -> None:
        """Hands a job to the thread; None ends the thread."""
        self._working = job is not None
        self._jobs.put(job)
        self._wake(self._arrived.set)

    def abandon(self) -> bool:
        """Abandons the job in progress. Returns False if it has just answered."""
        with self._busy:
            if not self._working:
                return False
            self.lost = True
            if self._remote is not None:
                self._remote.kill()
            elif self._home.template is not None and self._home.template.can_fork is None:
                self._home.template.kill()  # it hangs in its import
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.thread.ident or 0), ctypes.py_object(Abandoned)
            )
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

    def _next(self) -> Job | None:
        """Returns the next job; while it waits for it, tasks that coroutines left behind (a
        connection's heartbeat) go on."""

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
        """Makes the environment on this thread; returns None if it must live in a process."""
        entry = gymnasium.spec(self.env_id).entry_point
        if isinstance(entry, str):
            load_env_creator(entry)
        if declared_concurrency(self.env_id) == "process":
            return None
        traits = self._session.make(self.env_id, self.kwargs)
        if traits.metadata.get("concurrency") == "process":
            self._session.close()
            return None
        self.traits = traits
        return traits

    def _move(self) -> Traits:
        """Makes the environment in a process of its own."""
        self._remote = Remote(self._home.load(self.env_id))
        traits = self._remote.call("make", self.kwargs)  # a state cannot leave its process
        self.traits = Traits({**traits.metadata, "snapshots": False}, traits.players)
        return self.traits


class Home:
    """The origin of the processes of one environment id."""

    def __init__(self) -> None:
        self.template: Template | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts an interpreter."""
        with self._lock:
            if self.template is None or not self.template.alive:
                self.template = None
                self.template = Template()

    def load(self, env_id: str) -> Template:
        """Returns that interpreter with the environment imported; the caller's own from now on if
        it cannot fork."""
        spec = gymnasium.spec(env_id)
        entry: Any = spec.entry_point
        if isinstance(entry, str) and entry.startswith("__main__:"):
            # The child has another __main__: what stands in the user's script goes by value.
            entry = load_env_creator(entry)
        try:
            payload = cloudpickle.dumps(replace(spec, entry_point=entry, vector_entry_point=None))
        except Exception as error:
            raise EnvironmentBroke(
                f"it cannot be sent to a process of its own ({type(error).__name__}: {error}): put"
                ' it into a module and register it by name, such as "acme.riddle:Riddle"'
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
        """Ends the interpreter, and all processes it made."""
        if self.template is not None:
            self.template.kill()


def declared_concurrency(env_id: str) -> str | None:
    """Returns the concurrency that a class states before one is made; None: a function makes it, or
    its module is not imported yet."""
    entry: Any = gymnasium.spec(env_id).entry_point
    try:
        if isinstance(entry, str):
            module, _, name = entry.partition(":")
            entry = vars(sys.modules[module])[name]  # without what a lazy module would import
        metadata = entry.metadata
    except Exception:  # other people's: it is made under a limit, and says there what is wrong
        return None
    return metadata.get("concurrency", "serial") if isinstance(metadata, Mapping) else None


def busy_seconds(thread: threading.Thread) -> float:
    """Returns the CPU time that a thread has used, as far as the system reports it (Linux)."""
    try:
        with open(f"/proc/self/task/{thread.native_id}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
