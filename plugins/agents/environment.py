"""turnwise/Agent-v0: an agent as it is, a program that asks a model over HTTP.

Each episode runs the program once. It finds the policy under an address of this machine, which
speaks OpenAI's Chat Completions and Responses and Anthropic's Messages, with a key of its own. Each
request is an observation, each completion an action: what the program receives is what was sampled,
and trains. It ends when the program does.

The program is a Python function that takes an `Endpoint` ("MODULE:FUNCTION"), or a command, which
finds the address and its key where the SDKs look (`OPENAI_BASE_URL`, `OPENAI_API_KEY`,
`ANTHROPIC_BASE_URL`, `ANTHROPIC_API_KEY`) and its task in `TURNWISE_TASK`. A reward, or whether it
was a success, is what the function returns, or what is posted to `/reward`; or there is none, and
judges give it.

A request that goes on with an earlier one's messages and its reply is the next turn of that
conversation. Every other one opens a context of its own in the same episode (`Turn.context`): the
policy reads what the request shows and nothing else. Several at a time are answered one by one, in
the order in which they came.

Sampling is the run's. A request that wants it otherwise is refused, unless `ignore` names the
option; a limit of tokens below the run's is honoured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import gymnasium

from ...protocols import EnvironmentBroke, SampledReply, Text
from ...tools import Splits, content_key, read_tasks, split_tasks, task_of, time_of
from .contexts import observed, received
from .program import Command, Endpoint, Function, Program, function_of
from .server import server
from .session import Over, Pending, Session, read_outcome
from .wire.form import Refused

LIMITS = ("requests", "tokens", "seconds")


class Agent(gymnasium.Env[str, str]):
    """A program as an environment; see the module's docstring.

    Args:
        program: "MODULE:FUNCTION".
        command: or a command and its arguments.
        tasks: what programs are to do: a JSONL file, a folder that `datasets` saved, or
            "python:MODULE:FUNCTION"; a row for each episode.
        held_out: share of the tasks that are held out (`options={"split": "held_out"}`).
        models: the names under which programs may ask for the policy.
        ignore: options of requests that are passed over, such as `temperature`.
        variables: environment variables of a command.
        patience: seconds in which a program must ask again, or end.
        limits: of an episode: `requests`, sampled `tokens`, `seconds`; it is truncated there.

    Raises:
        ValueError: neither program nor command, or both; or one of them is none.
    """

    observation_space = action_space = Text(100_000_000)

    def __init__(
        self,
        program: str = "",
        command: Sequence[str] = (),
        tasks: str = "",
        held_out: float = 0.1,
        models: Sequence[str] = ("policy",),
        ignore: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        patience: float = 120.0,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        if bool(program) == bool(command) or isinstance(command, str):
            raise ValueError(
                "an agent is `program: MODULE:FUNCTION`, or `command: [COMMAND, ARGUMENT, ...]`"
            )
        for name, given in (("limits", limits), ("variables", variables)):
            if not isinstance(given or {}, Mapping):
                raise ValueError(f"{name} are values by name, got {given!r}")
        if unknown := set(limits or {}) - set(LIMITS):
            raise ValueError(f"limits are {', '.join(LIMITS)}; not {', '.join(sorted(unknown))}")
        for name, number in {**(limits or {}), "patience": patience, "held_out": held_out}.items():
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not number >= 0:
                raise ValueError(f"{name} must be a number from 0 on, got {number!r}")
        if isinstance(models, str) or isinstance(ignore, str) or not models:
            raise ValueError(f"models and ignore are lists, got {models!r} and {ignore!r}")
        if not held_out < 1 or not patience > 0:
            raise ValueError(f"held_out is in [0, 1) and patience above 0: {held_out}, {patience}")
        self._function = function_of(program) if program else None
        self._command = tuple(map(str, command))
        self._variables = {str(name): str(value) for name, value in (variables or {}).items()}
        self._tasks, self._held_out = tasks, held_out
        self._models, self._ignore = tuple(models), tuple(ignore)
        self._patience, self._limits = patience, dict(limits or {})
        self.metadata = {
            "concurrency": "thread",
            "special_tokens": True,
            "sampled": True,
            "step_limit": patience + 30.0,
        }
        self._session: Session | None = None
        self._program: Program | None = None
        if tasks:
            self._rows()

    def _rows(self) -> Splits:
        return _split(self._tasks, time_of(self._tasks), self._held_out)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Starts the program, and waits for its first request.

        Raises:
            EnvironmentBroke: it ended, or hung, before it asked.
            ValueError: options other than the tasks' `split`.
        """
        super().reset(seed=seed)
        number = int(self.np_random.integers(2**31)) if seed is None else seed
        task: Mapping[str, Any] = {}
        info: dict[str, Any] = {}
        if self._tasks:
            info["row"], task = task_of(self._rows(), options, number, self._tasks)
        elif options:
            raise ValueError(f"an agent without `tasks` has no options, got {', '.join(options)}")
        self.close()
        here = server()
        self._session = session = Session(self._models, self._ignore)
        here.open(session.key, session)
        self._began, self._sampled = time.monotonic(), 0
        endpoint = Endpoint(f"{here.url}/v1", here.url, session.key, self._models[0], task, number)
        if self._function is not None:
            self._program = Function(self._function, endpoint, session.end)
        else:
            self._program = Command(self._command, self._variables, endpoint, session.end)
        found = self._wait()
        if isinstance(found, Over):
            raise EnvironmentBroke(
                f"the program ended before it asked for a reply{_because(found)}"
            )
        observation, more = self._observe(found)
        return observation, {**info, **more}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answers the request, and waits for the next one or the program's end.

        Raises:
            EnvironmentBroke: it failed, or hung.
        """
        assert self._session is not None
        session, pending = self._session, self._pending
        tokens = action.tokens if isinstance(action, SampledReply) else None
        self._sampled += len(tokens.texts) if tokens else 0
        message = received(action, pending.asked.tools, str(session.answers))
        session.answer(pending, self._context, str(action), message, tokens)
        found = self._wait()
        if isinstance(found, Pending):
            observation, info = self._observe(found)
            if reason := self._over_limit():
                info["reason"] = reason
            return observation, session.take_rewards(), False, bool(reason), info
        if found.fault:
            raise EnvironmentBroke(f"the program failed{_because(found)}")
        try:
            reward, success = read_outcome(found.value)
        except Refused as error:
            raise EnvironmentBroke(f"the program returned no outcome: {error}") from error
        success = session.success if success is None else success
        info = {"context": self._context} | ({} if success is None else {"success": success})
        return "", reward + session.take_rewards(), True, False, info

    def _wait(self) -> Pending | Over:
        """Returns the next request, or the program's end.

        Raises:
            EnvironmentBroke: neither comes.
        """
        assert self._session is not None
        until = time.monotonic() + self._patience
        while (left := until - time.monotonic()) > 0:
            if (found := self._session.next(min(left, 1.0))) is not None:
                return found
        raise EnvironmentBroke(f"the program neither asked nor ended within {self._patience:g} s")

    def _over_limit(self) -> str:
        """Returns which limit the episode has reached; empty: none."""
        assert self._session is not None
        used = (self._session.answers, self._sampled, time.monotonic() - self._began)
        for name, value in zip(LIMITS, used, strict=True):
            if value >= self._limits.get(name, float("inf")):
                return name
        return ""

    def _observe(self, pending: Pending) -> tuple[str, dict[str, Any]]:
        """Returns a request as an observation: what is new in its context."""
        assert self._session is not None
        asked, place = pending.asked, self._session.place(pending.asked)
        self._pending, self._context = pending, place.context
        info: dict[str, Any] = {"context": place.context, "api": pending.api}
        if asked.max_tokens is not None:
            info["max_new_tokens"] = asked.max_tokens
        if place.opened:
            info["tools"] = list(asked.tools)
        # Of a context that is opened later it stands in the observation.
        first = place.opened and place.context == 0
        system, message = observed(place.news, self._session.sampled, apart=first)
        if system is not None:
            info["system"] = system
        if message.parts:
            info["parts"] = [{"role": m.role, "content": m.content} for m in message.parts]
        return message.content, {**info, "role": message.role}

    def close(self) -> None:
        """Ends the session and the program."""
        if self._session is not None:
            self._session.close()
            server().close(self._session.key)
            self._session = None
        if self._program is not None:
            self._program.stop()
            self._program = None


def _because(over: Over) -> str:
    return f": {over.fault}" if over.fault else ""


@lru_cache(maxsize=64)
def _split(tasks: str, stamp: int, held_out: float) -> Splits:
    """Returns the tasks of both splits; `stamp` is the file's time, so that one that was written
    again is read again."""
    found = []
    for where, row in read_tasks(tasks):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where} must be an object, got {type(row).__name__}")
        found.append((content_key(row), content_key(row), row))
    return split_tasks(found, held_out)
