"""One environment and its players behind a handful of calls, and the process in which they may
live.

`Session` is what a worker thread or a process keeps; every environment lives in one. A process is
forked off a template: a small interpreter that runs this module (never the user's script), has
imported the environment and shares that memory with all its forks. Where there is no fork, or the
import left threads behind, every environment gets an interpreter of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator

from ..errors import EnvironmentBroke
from ..records.episode import Message
from ..util.wording import failure_of
from .conventions import Observation, guarded, read, text_of
from .registry import make_env
from .space import Text

STARTING = 60.0  # seconds an interpreter may take to come up, which is not the environment's fault


class LazyLoop(asyncio.SelectorEventLoop):
    """An event loop that opens nothing before it is used: most environments never do, and each loop
    costs three files."""

    def __init__(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if self.__dict__:
            raise AttributeError(name)
        super().__init__()
        return getattr(self, name)

    def close(self) -> None:
        """Cancels what still runs and closes the loop; marks it closed where it was never
        opened."""
        if not self.__dict__:
            self._closed = True
        elif not self.is_closed():
            with contextlib.suppress(Exception):
                for task in asyncio.all_tasks(self):
                    task.cancel()
                self.run_until_complete(asyncio.sleep(0))
                self.run_until_complete(self.shutdown_asyncgens())
            super().close()


@dataclass(frozen=True, slots=True)
class Traits:
    """Metadata and players of an environment, known once it was made."""

    metadata: Mapping[str, Any]
    players: tuple[str, ...]


class Session:
    """An environment and its players, on the one thread that makes it. Coroutines run on an event
    loop of that thread.

    Every call returns plain data, or raises `EnvironmentBroke` or whatever the environment raises.
    """

    def __init__(self) -> None:
        self.loop = LazyLoop()
        # Its calls are coroutines, so that its loop should turn between them, too.
        self.awaited = False
        self._env: Any = None
        self._limit: int | None = None
        self._seated: dict[str, Any] = {}  # players of the environment's own, by seat

    def _settled(self, value: Any) -> Any:
        if not inspect.isawaitable(value):
            return value
        self.awaited = True

        async def awaiting() -> Any:
            return await value

        return self.loop.run_until_complete(awaiting())

    def make(self, env_id: str | EnvSpec, kwargs: Mapping[str, Any]) -> Traits:
        """Makes the environment. Its length is counted here and its returns are checked here:
        Gymnasium's wrappers for that do not support coroutines."""
        spec = env_id if isinstance(env_id, EnvSpec) else gymnasium.spec(env_id.rpartition(":")[2])
        asked = dict(kwargs)
        limit = asked.pop("max_episode_steps", None)
        self._limit = spec.max_episode_steps if limit is None else limit
        given = {**asked, "max_episode_steps": -1, "disable_env_checker": True}
        env = (
            gymnasium.make(spec, **given)
            if isinstance(env_id, EnvSpec)
            else make_env(env_id, **given)
        )
        self._env = env
        for name in ("observation", "action"):
            space = getattr(env, f"{name}_space", None)
            if not isinstance(space, (Text, gymnasium.spaces.Text)):
                raise EnvironmentBroke(
                    f"its {name} space is {space}; a dialogue needs text in and text out. Wrap it"
                    " with a text codec (see docs/environments.md) and give it turnwise.Text"
                    " spaces."
                )
        return Traits(_plain(env.metadata), tuple(map(str, self._players)))

    @property
    def _players(self) -> Mapping[str, Any]:
        env = self._env.unwrapped
        return (env.has_wrapper_attr("players") and env.get_wrapper_attr("players")) or {}

    def reset(self, seed: int, options: Mapping[str, Any]) -> Observation:
        """Resets the environment and returns its first observation, checked."""
        self._turns = 0
        result = self._settled(self._env.reset(seed=seed, options=dict(options) or None))
        return read(result, self._env.observation_space, stepped=False)

    def step(self, action: str) -> Observation:
        """Steps the environment and returns its observation, checked; counts its length."""
        seen = read(
            self._settled(self._env.step(action)), self._env.observation_space, stepped=True
        )
        self._turns += 1
        if self._limit is not None and 0 < self._limit <= self._turns and not seen.truncated:
            return replace(seen, truncated=True)
        return seen

    def player(self, name: str, noise: str, seat: str = "") -> None:
        """Makes one of the environment's own players, which replies in this seat from here on;
        `noise` seeds its random numbers."""
        made = self._players[name](self._env.unwrapped, random.Random(noise))
        self._seated[seat] = self._settled(made)

    def reply(self, messages: Sequence[Message], seat: str = "") -> str:
        """Returns the reply of a seat's player to a conversation."""
        return text_of(self._settled(self._seated[seat](messages)), "the reply")

    def copied(self) -> Any:
        """Returns a copy of the environment as it is now, to go on from; None if it cannot be
        copied after all."""
        try:
            return copy.deepcopy((self._env, self._turns))
        except Exception:  # whatever its state refuses with
            return None

    def adopt(self, state: Any) -> bool:
        """Continues from a copy, which itself stays as it is.

        Returns False if it could not be copied once more.
        """
        try:
            state = copy.deepcopy(state)
        except Exception:
            return False
        old = self._env
        self._env, self._turns = state
        self._settled(old.close())
        return True

    def close(self) -> None:
        """Closes the environment."""
        env, self._env = self._env, None
        if env is not None:
            self._settled(env.close())


def _plain(metadata: Any) -> dict[str, Any]:
    """Returns the part of an environment's metadata that the engine reads."""
    names = ("concurrency", "snapshots", "special_tokens", "sampled", "instances", "step_limit")
    found = {name: metadata[name] for name in names if name in metadata}
    limit = found.get("step_limit", 0.0)
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 0:
        raise EnvironmentBroke(
            f'metadata["step_limit"] is {limit!r}; it is how many seconds a call may take'
        )
    instances = found.get("instances")
    if instances is not None and (
        isinstance(instances, bool) or not isinstance(instances, int) or instances < 1
    ):
        raise EnvironmentBroke(
            f'metadata["instances"] is {instances!r}; it is how many may live at a time, at least 1'
        )
    way = found.get("concurrency", "serial")
    if way not in ("serial", "thread", "process"):
        raise EnvironmentBroke(
            f'metadata["concurrency"] is {way!r}; it may be "serial", "thread" or "process"'
        )
    return found


# The process: this side of it.


class Template:
    """An interpreter that imports an environment, and forks processes for its instances.

    Attributes:
        can_fork: known once it was loaded. If it cannot, it can only serve one itself.
    """

    def __init__(self) -> None:
        self.can_fork: bool | None = None
        self._lock = threading.Lock()
        self._pipe, child = Pipe()
        code = f"from turnwise.engine.environments.process import main; main({child.fileno()})"
        command = [sys.executable, "-P", "-c", code]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environ = os.environ | {"PYTHONPATH": paths}
        self._process = subprocess.Popen(
            command,
            pass_fds=[child.fileno()],
            stdin=subprocess.DEVNULL,
            env=environ,
            start_new_session=True,
        )
        child.close()
        if not self._pipe.poll(STARTING):
            self.kill()
        self._receive()

    @property
    def alive(self) -> bool:
        """Whether the interpreter still runs."""
        return self._process.poll() is None

    def load(self, payload: bytes) -> None:
        """Makes the interpreter import the environment, whose recipe is pickled, once."""
        with self._lock:
            if self.can_fork is None:
                self._pipe.send_bytes(payload)
                self.can_fork = self._receive()

    def _receive(self) -> Any:
        try:
            value, reason = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.kill()
            raise EnvironmentBroke(
                f"its process died with exit code {self._process.wait()}"
            ) from error
        if reason:
            raise EnvironmentBroke(reason)
        return value

    def fork(self) -> tuple[int, Connection]:
        """Forks a process for one environment; returns its id, and a pipe to it."""
        with self._lock:
            ours, theirs = Pipe()
            try:
                self._pipe.send("fork")
                reduction.send_handle(self._pipe, theirs.fileno(), self._process.pid)
                return self._receive(), ours
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()

    def serve(self) -> tuple[int, Connection]:
        """Turns the interpreter itself into that process."""
        with self._lock:
            self._pipe.send("serve")
            return self._process.pid, self._pipe

    def reap(self, pid: int, patience: float = 0.0) -> int | None:
        """Ends one of the processes.

        Returns its exit code, if it ended by itself within `patience` seconds.
        """
        if pid == self._process.pid:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(patience)
            self.kill()
            return None
        with self._lock:
            self._pipe.send(("reap", pid, patience))
            return self._receive()

    def kill(self) -> None:
        """Ends the interpreter, and all processes it made."""
        if self._process.returncode is None:
            self._process.terminate()  # so that it can take its forks along
            try:
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        _end_group(self._process.pid)
        self._pipe.close()


class Remote:
    """An environment in a process of its own; its calls are those of `Session`."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._pid, self._pipe = template.fork() if template.can_fork else template.serve()

    def call(self, verb: str, *arguments: Any) -> Any:
        """Makes one call of `Session` in the process; None after the process has died."""
        if not self._pid:  # it has died, and an earlier call raised that
            return None
        try:
            self._pipe.send((verb, *arguments))
            value, reason = self._pipe.recv()
        except (EOFError, OSError) as error:
            code = self._template.reap(self._pid, 1.0)
            self._pid = 0
            raise EnvironmentBroke(f"its process died with exit code {code}") from error
        if reason:
            raise failure_of(reason, EnvironmentBroke)
        return value

    def kill(self) -> None:
        """Kills the process from another thread: the call that waits for it returns."""
        if self._pid:
            _end_group(self._pid)

    def end(self) -> None:
        """Ends the process for good."""
        if self._pid:
            self._template.reap(self._pid)
            self._pid = 0
        self._pipe.close()


# The process: its side of it.


def main(descriptor: int) -> None:
    """Runs the template: imports an environment, then forks, or serves one itself."""
    # Ctrl-C is for the parent, which ends after saving.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.pop("PYTHONPATH", None)
    os.dup2(2, 1)  # what environments print is not the program's output
    pipe = Connection(descriptor)
    pipe.send((None, ""))
    made: set[int] = set()

    def end(*_: Any) -> None:
        for pid in made:
            _end_group(pid)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    spec, reason = guarded(lambda: _load(pipe.recv_bytes()))
    can_fork = sys.platform == "linux" and threading.active_count() == 1
    pipe.send((can_fork, reason))
    while True:
        try:
            asked = pipe.recv()
        except (EOFError, OSError):
            end()
        if asked == "serve":
            serve(pipe, spec)
        elif asked == "fork":
            handle = reduction.recv_handle(pipe)
            pid = os.fork()
            if not pid:
                os.setsid()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                pipe.close()
                serve(Connection(handle), spec)
            os.close(handle)
            made.add(pid)
            pipe.send((pid, ""))
        else:
            made.discard(asked[1])
            pipe.send((_reap(*asked[1:]), ""))


def _reap(pid: int, patience: float) -> int | None:
    """Returns the exit code of a fork; None if it had to be killed."""
    until = time.monotonic() + patience
    # Polled without being reaped, so that its id is not reused before its group is ended.
    while (
        not (ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))
        and time.monotonic() < until
    ):
        time.sleep(0.005)
    _end_group(pid)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


def _end_group(pid: int) -> None:
    """Kills a process and those that it started: browsers and game servers must not outlive their
    environment."""
    for kill in (os.killpg, os.kill):  # it has no group of its own yet in its first moments
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _load(payload: bytes) -> EnvSpec:
    """Reads the recipe of the environment, and imports it."""
    spec: EnvSpec = pickle.loads(payload)
    if isinstance(spec.entry_point, str):
        load_env_creator(spec.entry_point)
    return spec


def serve(pipe: Connection, spec: EnvSpec) -> None:
    """Answers calls about one environment until the pipe is closed."""
    session = Session()
    while True:
        try:
            if session.awaited:  # its connections are served while no call arrives
                session.loop.run_until_complete(session.loop.run_in_executor(None, pipe.poll, None))
            verb, *args = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        asyncio.set_event_loop(session.loop)  # asyncio.run, for one, leaves none
        call = getattr(session, verb)
        answer = guarded(lambda: call(spec, *args) if verb == "make" else call(*args))  # noqa: B023
        with contextlib.suppress(OSError):  # the caller has gone
            pipe.send(answer)
