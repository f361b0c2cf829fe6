"""Dialogues as Gymnasium environments: the text space, seeds and starts, stepping safely, and the checker.

An environment is any `gymnasium.Env` whose observation is the new utterance and whose action is the reply, both `str`. The
engine keeps the transcript. Optional conventions, all read from the unwrapped environment or its `info`:

- `info["system"]`, `info["role"]` ("user" or "tool"), `info["tools"]` at reset; `info["role"]` at every step;
- `info["success"]` (bool) at the last step; `info["optimum"]` at reset, the best return this start allows;
- `metadata["concurrency"]`: "serial" (default: all environments step in order on one thread), "thread" (thread-safe, or
  `reset`/`step` are coroutines) or "process" (each in a process of its own);
- `metadata["snapshots"]`: True if a `copy.deepcopy` of it goes on by itself; branching then copies a state instead of replaying it;
- `metadata["special_tokens"]`: True to receive replies with the tokenizer's special tokens in the text;
- `players`, a mapping from names ("expert", "random", "demonstrator") to `(env, rng) -> (conversation -> reply)`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import inspect
import math
import multiprocessing
import queue
import random
import re
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Space

from .episode import Message, Start, derive_id
from .secrets import redact
from .suggest import did_you_mean

PlayerFunction = Callable[[Sequence[Message]], str]


class Text(Space[str]):
    """Any string up to a length. (`gymnasium.spaces.Text` takes only the characters of a stated charset.)

    Args:
        max_length: in characters.
    """

    def __init__(self, max_length: int = 4096, seed: int | np.random.Generator | None = None) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.max_length = int(max_length)
        super().__init__((), np.dtype(object), seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        if mask is not None or probability is not None:
            raise ValueError("Text.sample takes neither mask nor probability")
        length = int(self.np_random.integers(1, min(self.max_length, 64) + 1))
        return "".join(chr(c) for c in self.np_random.integers(32, 127, size=length))

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def to_jsonable(self, sample_n: Iterable[str]) -> list[str]:
        return list(sample_n)

    def from_jsonable(self, sample_n: list[Any]) -> list[str]:
        return [str(x) for x in sample_n]

    def __repr__(self) -> str:
        return f"Text({self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Text) and other.max_length == self.max_length


class EnvironmentBroke(Exception):
    """An environment raised, hung or broke its space. The episode ends as failed with this reason."""


def make_env(env_id: str, **kwargs: Any) -> gymnasium.Env[str, str]:
    """`gymnasium.make`, with near names when the id is unknown.

    Raises:
        LookupError: no such environment, or its module cannot be imported.
        TypeError: options its constructor does not take.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is different from the unwrapped version.*")
            return gymnasium.make(env_id, **kwargs)
    except gymnasium.error.UnregisteredEnv as error:
        raise LookupError(f"no environment {env_id!r}.{did_you_mean(env_id, dialogue_ids())}") from error
    except gymnasium.error.Error as error:
        raise LookupError(f"environment {env_id!r} cannot be made: {error}") from error
    except ModuleNotFoundError as error:
        raise LookupError(f"environment {env_id!r} needs a module that is missing: {error}") from error


def dialogue_ids() -> list[str]:
    """Registered environments that may speak: all but Gymnasium's own, which take arrays and numbers."""
    ids = []
    for name, spec in gymnasium.registry.items():
        entry = spec.entry_point
        module = entry if isinstance(entry, str) else getattr(entry, "__module__", "")
        if (module and not module.startswith("gymnasium.") and spec.namespace is not None) or module.startswith("turnwise."):
            ids.append(name)
    return sorted(ids)


@dataclass(frozen=True, slots=True)
class Observation:
    """What came back from reset or step, checked."""

    message: Message
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()


def _jsonable(value: Any) -> Any:
    """`info` as plain JSON data: numpy scalars become numbers, whatever JSON lacks becomes its text."""
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(v) for v in value]
    if isinstance(value, np.generic):
        return _jsonable(value.item())
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


def _text(env: gymnasium.Env[str, str], value: Any) -> str:
    if not isinstance(value, str):
        raise EnvironmentBroke(f"the observation is {type(value).__name__}, not str")
    if not env.observation_space.contains(value):
        limit = getattr(env.observation_space, "max_length", None)
        raise EnvironmentBroke(
            f"an observation of {len(value):,} characters is outside {env.observation_space}"
            + (f" (limit {limit:,})" if limit else "")
        )
    return value


def _read(env: gymnasium.Env[str, str], result: Any, *, stepped: bool) -> Observation:
    """Checks what `reset` (obs, info) or `step` (obs, reward, terminated, truncated, info) returned."""
    size = 5 if stepped else 2
    if not isinstance(result, tuple) or len(result) != size:
        shape = "(obs, reward, terminated, truncated, info)" if stepped else "(obs, info)"
        raise EnvironmentBroke(f"{'step' if stepped else 'reset'} must return {shape}, got {_short(result)}")
    obs, info = result[0], result[-1]
    if not isinstance(info, Mapping):
        raise EnvironmentBroke(f"info is {type(info).__name__}, not a mapping")
    role = info.get("role", "user")
    if role not in ("user", "tool"):
        raise EnvironmentBroke(f'info["role"] is {role!r}; it may be "user" or "tool"')
    said = {k: _jsonable(v) for k, v in info.items() if k not in ("role", "system", "tools")}
    reward, terminated, truncated = 0.0, False, False
    if stepped:
        try:
            reward = float(result[1])
        except (TypeError, ValueError):
            raise EnvironmentBroke(f"the reward is {_short(result[1])}, not a number") from None
        if not math.isfinite(reward):
            raise EnvironmentBroke(f"the reward is {reward}")
        terminated, truncated = bool(result[2]), bool(result[3])
    system = info.get("system")
    if system is not None and not isinstance(system, str):
        raise EnvironmentBroke(f'info["system"] is {type(system).__name__}, not str')
    return Observation(
        Message(role, _text(env, obs)), reward, terminated, truncated, said, system, tuple(_jsonable(info.get("tools") or ()))
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_loop: asyncio.AbstractEventLoop | None = None
_loop_lock = threading.Lock()


def background(work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
    """Starts a coroutine on the loop that all coroutines of a process share, on a daemon thread, so that sessions and clients opened in
    one call still work in the next."""
    global _loop
    with _loop_lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, daemon=True, name="turnwise-loop").start()
    return asyncio.run_coroutine_threadsafe(work, _loop)


def settle(value: Any) -> Any:
    """The result of a call that may be a coroutine's."""
    if not inspect.isawaitable(value):
        return value

    async def awaited() -> Any:
        return await value

    return background(awaited()).result()


def _reset(env: gymnasium.Env[str, str], start: Start) -> Observation:
    return _read(env, settle(env.reset(seed=start.seed, options=dict(start.options) or None)), stepped=False)


def _step(env: gymnasium.Env[str, str], action: str) -> Observation:
    return _read(env, settle(env.step(action)), stepped=True)


def _guarded(work: Callable[[], Any]) -> tuple[Any, str]:
    """(result, "") or (None, reason). Whatever an environment raises is its own, SystemExit and CancelledError included; this
    never runs on the main thread, so Ctrl-C does not arrive here."""
    try:
        return work(), ""
    except EnvironmentBroke as error:
        return None, str(error)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return None, redact(f"{type(error).__name__}: {error}") + f" ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"


class Worker:
    """A daemon thread that does one thing at a time. One that hangs is abandoned; it cannot hold the exit."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[tuple[Any, str]]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="turnwise-env").start()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job[1].put(_guarded(job[0]))

    def submit(self, work: Callable[[], Any]) -> queue.SimpleQueue[tuple[Any, str]]:
        answer: queue.SimpleQueue[tuple[Any, str]] = queue.SimpleQueue()
        self._jobs.put((work, answer))
        return answer

    def stop(self) -> None:
        """Ends the thread after what it is doing now."""
        self._jobs.put(None)


class ProcessEnv(gymnasium.Env[str, str]):
    """An environment in a process of its own, for those that seed global state or crash the interpreter.

    Args:
        env_id, kwargs: as for `gymnasium.make`; the child imports the environment's module by itself.
    """

    def __init__(self, env_id: str, **kwargs: Any) -> None:
        spec = gymnasium.spec(env_id)
        local = make_env(env_id, **kwargs).unwrapped  # never reset or stepped: for its spaces and its players
        self.observation_space, self.action_space = local.observation_space, local.action_space
        self.metadata = dict(local.metadata)
        self.players = {
            name: lambda _, rng, make=make: make(local, rng) for name, make in (getattr(local, "players", None) or {}).items()
        }
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve_env, args=(child, spec.to_json(), kwargs), daemon=True)
        self._process.start()
        child.close()

    def _call(self, *message: Any) -> Any:
        try:
            self._pipe.send(message)
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(1.0)
            raise EnvironmentBroke(f"its process died with exit code {self._process.exitcode}") from error
        if kind == "error":
            raise EnvironmentBroke(value)
        return value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        return self._call("reset", seed, options)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return self._call("step", action)

    def close(self) -> None:
        self._process.kill()


def _serve_env(pipe: Any, spec_json: str, kwargs: dict[str, Any]) -> None:
    """The child's side of `ProcessEnv`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends after saving
    env: Any = None
    while True:
        try:
            verb, *arguments = pipe.recv()
        except EOFError:
            return

        def work(verb: str = verb, arguments: list[Any] = arguments) -> Any:
            nonlocal env
            if env is None:
                env = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(spec_json), **kwargs)
            if verb == "reset":
                obs, info = settle(env.reset(seed=arguments[0], options=arguments[1]))
                return obs, _jsonable_info(info)
            obs, reward, terminated, truncated, info = settle(env.step(*arguments))
            return obs, reward, terminated, truncated, _jsonable_info(info)

        value, reason = _guarded(work)
        pipe.send(("error", reason) if reason else ("value", value))


def _jsonable_info(info: Any) -> Any:
    return _jsonable(info) if isinstance(info, Mapping) else info


class Stepper:
    """Resets and steps many environments so that none can take the others along.

    Serial environments run in the order given, on one thread, which is what makes a run repeatable; thread-safe ones run side
    by side. Results come back in the order given, whatever the order of completion.

    Args:
        limit: seconds one reset or step may take before its environment counts as hung and is abandoned.
        threads: how many thread-safe environments may step at a time.
    """

    def __init__(self, limit: float = 60.0, threads: int = 16) -> None:
        self.limit = limit
        self._serial = Worker()
        self._pool = [Worker() for _ in range(threads)]

    def run(self, jobs: Sequence[tuple[gymnasium.Env[str, str], Callable[[], Any]]]) -> list[tuple[Any, str]]:
        """(result, "") or (None, reason) per job."""
        results: list[tuple[Any, str]] = [(None, "")] * len(jobs)
        serial: list[int] = []
        side_by_side: list[int] = []
        for i, (env, _) in enumerate(jobs):
            (side_by_side if env.metadata.get("concurrency") in ("thread", "process") else serial).append(i)
        for first in range(0, len(side_by_side), len(self._pool)):
            wave = list(enumerate(side_by_side[first : first + len(self._pool)]))
            answers = [self._pool[slot].submit(jobs[i][1]) for slot, i in wave]
            deadline = time.monotonic() + self.limit
            for (slot, i), answer in zip(wave, answers, strict=True):
                results[i], hung = self._wait(answer, jobs[i][0], deadline)
                if hung:
                    self._pool[slot] = Worker()
        for i in serial:
            results[i], hung = self._wait(self._serial.submit(jobs[i][1]), jobs[i][0], time.monotonic() + self.limit)
            if hung:
                self._serial = Worker()
        return results

    def _wait(
        self, answer: queue.SimpleQueue[tuple[Any, str]], env: gymnasium.Env[str, str], deadline: float
    ) -> tuple[tuple[Any, str], bool]:
        try:
            return answer.get(timeout=max(0.0, deadline - time.monotonic())), False
        except queue.Empty:
            if isinstance(env, ProcessEnv):
                env.close()  # frees the thread that waits for it, too
            return (None, f"no answer within {self.limit:g} s; it was abandoned"), True

    def close(self) -> None:
        for worker in (self._serial, *self._pool):
            worker.stop()

    def reset(self, envs: Sequence[tuple[gymnasium.Env[str, str], Start]]) -> list[tuple[Observation | None, str]]:
        return self.run([(env, partial(_reset, env, start)) for env, start in envs])

    def step(self, envs: Sequence[tuple[gymnasium.Env[str, str], str]]) -> list[tuple[Observation | None, str]]:
        return self.run([(env, partial(_step, env, action)) for env, action in envs])

    def restore(
        self, envs: Sequence[tuple[gymnasium.Env[str, str], Start, Sequence[str]]]
    ) -> list[tuple[list[Observation], str]]:
        """Resets each environment and plays its replies again.

        Returns (observations, "") each, the one of reset first; they stop where the environment ends. Or what came before it
        broke, and the reason.
        """
        found: list[tuple[list[Observation], str]] = []
        for observation, reason in self.reset([(env, start) for env, start, _ in envs]):
            found.append(([] if observation is None else [observation], f"reset: {reason}" if reason else ""))
        for k in range(max((len(actions) for _, _, actions in envs), default=0)):
            going = [
                i
                for i, ((_, _, actions), (seen, reason)) in enumerate(zip(envs, found, strict=True))
                if not reason and k < len(actions) and not (seen[-1].terminated or seen[-1].truncated)
            ]
            stepped = self.step([(envs[i][0], envs[i][2][k]) for i in going])
            for i, (observation, reason) in zip(going, stepped, strict=True):
                seen = found[i][0]
                found[i] = (seen, f"step {k + 1}: {reason}") if observation is None else ([*seen, observation], "")
        return found


def make_instance(env_id: str, **kwargs: Any) -> gymnasium.Env[str, str]:
    """An environment to play in, in its own process if it declares that it is better off there.

    Raises:
        LookupError: no such environment.
        TypeError: it does not take and give text.
    """
    env = make_env(env_id, **kwargs)
    for name in ("observation", "action"):
        space = getattr(env, f"{name}_space", None)
        if not (isinstance(space, (Text, gymnasium.spaces.Text))):
            raise TypeError(
                f"environment {env_id!r} has {name} space {space}; a dialogue needs text in and text out. Wrap it with a "
                "text codec (see docs/environments.md) and give it turnwise.Text spaces."
            )
    if env.metadata.get("concurrency") == "process":
        env.close()
        return ProcessEnv(env_id, **kwargs)
    return env


def starts(
    env_id: str,
    seed: int,
    count: int,
    options: Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    first: int = 0,
) -> list[Start]:
    """Starts number `first` to `first + count - 1` of the sequence that one seed defines; no two of them are alike.

    Seeds have 32 bits, which is what environments in the wild accept; they count up from a place that the seed determines.
    """
    place = int(derive_id("starts", env_id, seed)[:8], 16)
    seeds = [(place + first + i) % 2**32 for i in range(count)]
    return [Start(env_id, s, options or {}, kwargs or {}) for s in seeds]


def replay(env: gymnasium.Env[str, str], start: Start, actions: Sequence[str], limit: float = 60.0) -> list[Observation]:
    """Plays recorded replies again from a start: how a turn's state is reached once more, for branching and for audits.

    Returns the observations, the one of reset first; they stop where the environment ends.

    Raises:
        EnvironmentBroke: the environment raised, hung or broke its contract.
    """
    stepper = Stepper(limit, threads=1)
    [(observations, reason)] = stepper.restore([(env, start, actions)])
    stepper.close()
    if reason:
        raise EnvironmentBroke(f"replay broke after {len(observations)} observations: {reason}")
    return observations


def snapshot(env: gymnasium.Env[str, str]) -> gymnasium.Env[str, str] | None:
    """A copy of an environment in its present state, to go on from; None if it does not say that it can be copied
    (`metadata["snapshots"]`), or cannot after all: then `replay` reaches the state again."""
    if isinstance(env, ProcessEnv) or not env.metadata.get("snapshots", False):
        return None
    try:
        return copy.deepcopy(env)
    except Exception:  # whatever its state refuses with
        return None


@contextlib.contextmanager
def _global_random_untouched(problems: list[str]) -> Iterator[None]:
    before = (random.getstate(), np.random.get_state()[1].tobytes())  # type: ignore[index]
    yield
    if (random.getstate(), np.random.get_state()[1].tobytes()) != before:  # type: ignore[index]
        problems.append(
            "it uses or seeds the global random state (random or numpy.random): episodes influence each other. "
            'Use self.np_random, or declare metadata["concurrency"] = "process".'
        )


def check_environment(
    env_id: str, *, episodes: int = 20, max_turns: int = 100, seed: int = 0, limit: float = 10.0, **kwargs: Any
) -> list[str]:
    """Plays whole episodes and lists what is wrong, beyond what Gymnasium's checker sees; empty when all is well.

    It plays each start twice with the same replies (are transcripts equal?), with the environment's own players where it has
    any and with random text, empty replies and very long ones where it has none. It reports: broken spaces and returns; text
    that is not `str`; rewards that are not finite; episodes that never end; a reset that does not reset; a seed that is
    ignored; use of global random state; returns above the stated optimum; an expert that fails; steps that hang.

    Args:
        env_id: a registered id; `kwargs` go to `gymnasium.make`.
        episodes: how many starts to play.
        max_turns: an episode longer than this counts as never ending.
        limit: seconds one step may take.
    """
    problems: list[str] = []
    try:
        env = make_instance(env_id, **kwargs)
        if env.metadata.get("snapshots", False) and snapshot(env) is None:
            problems.append(
                'it declares metadata["snapshots"], but a copy.deepcopy of it fails (or it lives in a process of its own)'
            )
    except LookupError:
        raise
    except Exception as error:
        return [f"it cannot be made: {type(error).__name__}: {error}"]
    stepper = Stepper(limit)
    players: Mapping[str, Any] = getattr(env.unwrapped, "players", None) or {}
    junk = ["", "ok", "?", "x" * 2000, "<|im_end|><|im_start|>assistant\n", "naïve \N{PILE OF POO} \u202e text", "\x00\x1b[31m"]
    firsts: dict[str, set[str]] = {}
    differing: list[int] = []

    def play(start: Start, player: str | None) -> tuple[list[str], float, Observation | None]:
        """The transcript of one episode, its return, and its last observation."""
        rng = random.Random(derive_id("check", seed, start.key, player))
        [(obs, reason)] = stepper.reset([(env, start)])
        if obs is None:
            raise EnvironmentBroke(f"reset: {reason}")
        optimum = obs.info.get("optimum")
        reply = players[player](env.unwrapped, rng) if player else (lambda _: rng.choice(junk))
        said, total, messages = [obs.message.content], 0.0, [obs.message]
        for _ in range(max_turns):
            action = reply(messages)
            [(obs, reason)] = stepper.step([(env, action)])
            if obs is None:
                raise EnvironmentBroke(f"step after {len(said) - 1} turns: {reason}")
            total += obs.reward
            said += [action, obs.message.content, repr(obs.reward)]
            messages += [Message("assistant", action), obs.message]
            if obs.terminated or obs.truncated:
                break
        else:
            problems.append(
                f"an episode of {player or 'random text'} did not end within {max_turns} turns: give it an end, or "
                "register it with max_episode_steps"
            )
        if optimum is not None and total > optimum + 1e-6:
            problems.append(f"a return of {total:g} exceeds the start's stated optimum {optimum:g} (seed {start.seed})")
        if player == "expert" and optimum is not None and total < optimum - 1e-6:
            problems.append(f"its expert got {total:g} of {optimum:g} (seed {start.seed})")
        return said, total, obs

    try:
        with _global_random_untouched(problems):
            for start in starts(env_id, seed, episodes):
                for player in [*players, None]:
                    once, _, _ = play(start, player)
                    twice, _, _ = play(start, player)
                    firsts.setdefault(start.key, set()).update((once[0], twice[0]))
                    if once != twice:
                        differing.append(start.seed)
    except EnvironmentBroke as error:
        problems.append(str(error))
    stepper.close()
    if differing:
        problems.append(f"the same seed ({differing[0]}, for one) and the same replies gave two different transcripts")
    if any(len(texts) > 1 for texts in firsts.values()):
        problems.append("the first observation depends on earlier episodes: reset does not reset everything")
    if not any("abandoned" in problem for problem in problems):
        env.close()
    kinds = {re.sub(r"[-\d.]+", "#", problem): problem for problem in reversed(problems)}  # one example of each
    return list(kinds.values())[::-1]
