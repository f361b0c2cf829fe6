"""One run of a program: its requests as they come, the contexts that they belong to, its reward."""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from ...protocols import Tokens
from ...tools import canonical_json
from .wire.form import Answered, Asked, Refused, WireMessage

ENDED = "this session has ended: its program may ask no more"


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A request that waits for its answer."""

    asked: Asked
    api: str
    answer: Future[Answered] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Over:
    """The end of a program: what it returned, or why it failed."""

    value: Any = None
    fault: str = ""


@dataclass(slots=True)
class _Context:
    """A conversation that requests went on with."""

    messages: list[Any]
    tools: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request belongs.

    Attributes:
        context: its number.
        opened: whether it is the first one there.
        news: the messages that were not in the context before.
    """

    context: int
    opened: bool
    news: tuple[WireMessage, ...]


class Session:
    """The requests of one program, from its first to its last.

    Requests come on the server's thread and are taken one at a time by the environment's.

    Args:
        models: the names that the policy answers to.
        ignore: options of requests that are passed over.

    Attributes:
        key: what the program shows with every request.
        rewards: the sum of what it has posted since it was taken last.
        success: what it has posted of it.
    """

    def __init__(self, models: Sequence[str], ignore: Sequence[str] = ()) -> None:
        self.key = secrets.token_urlsafe(24)
        self.models, self.ignore = tuple(models), tuple(ignore)
        self.success: bool | None = None
        self.rewards = 0.0
        self._arrived: queue.SimpleQueue[Pending | Over] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: set[Pending] = set()
        self._contexts: list[_Context] = []
        self._replies: dict[Any, str] = {}  # as they were sampled, by what the program received
        self._history: dict[str, tuple[WireMessage, ...]] = {}  # by the id of a response
        self._answers = 0

    # On the server's thread.

    def submit(self, asked: Asked, api: str) -> Pending:
        """Puts a request into the queue.

        Raises:
            Refused: it cannot be answered here.
        """
        if asked.model not in self.models:
            raise Refused(
                404,
                f"the model {asked.model!r} does not exist here; there is"
                f" {', '.join(map(repr, self.models))}. Other names are given to the environment by"
                " `models: [...]`",
                "model",
            )
        if (previous := asked.options.get("previous")) is not None:
            with self._lock:
                earlier = self._history.get(previous)
            if earlier is None:
                raise Refused(
                    404, f"no response {previous!r} in this session", "previous_response_id"
                )
            own = 1 if asked.options["instructions"] is not None else 0
            head, news = asked.messages[:own], asked.messages[own:]
            asked = replace(asked, messages=(*head, *earlier, *news))
        last = asked.messages[-1]
        if last.role not in ("user", "tool"):
            raise Refused(
                400, f"the last message is of the {last.role}: the policy replies to a user or to"
                " the result of a tool", "messages",
            )  # fmt: skip
        pending = Pending(asked, api)
        with self._lock:
            if self._closed:
                raise Refused(403, ENDED)
            self._waiting.add(pending)
            self._arrived.put(pending)
        return pending

    def post(self, outcome: Mapping[str, Any]) -> None:
        """Takes a reward, or a success, that the program posts; rewards add up.

        Raises:
            Refused: it is neither, or the session has ended.
        """
        reward, success = read_outcome(outcome)
        with self._lock:
            if self._closed:
                raise Refused(403, ENDED)
            self.rewards += reward
            self.success = self.success if success is None else success

    # On the program's thread, or on the one that waits for it.

    def end(self, over: Over) -> None:
        """Tells that the program has ended."""
        self._arrived.put(over)

    # On the environment's thread.

    def next(self, timeout: float) -> Pending | Over | None:
        """Returns the next request or the end; None if neither comes in time."""
        try:
            found = self._arrived.get(timeout=max(0.0, timeout))
        except queue.Empty:
            return None
        if isinstance(found, Pending) and found.answer.cancelled():
            return self.next(timeout)  # who asked has gone
        return found

    def place(self, asked: Asked) -> Place:
        """Returns the context that a request belongs to: the longest one that it goes on with, by
        messages of a user or of tools; else it opens another one."""
        keys, tools = [m.key for m in asked.messages], canonical_json(list(asked.tools))
        best = None
        for number, context in enumerate(self._contexts):
            size = len(context.messages)
            goes_on = context.tools == tools and keys[:size] == context.messages
            if not goes_on or any(m.role not in ("user", "tool") for m in asked.messages[size:]):
                continue
            if size < len(keys) and (best is None or size > len(self._contexts[best].messages)):
                best = number
        if best is not None:
            return Place(best, False, asked.messages[len(self._contexts[best].messages) :])
        self._contexts.append(_Context([], tools))
        return Place(len(self._contexts) - 1, True, asked.messages)

    def reply_before(self, message: WireMessage) -> str | None:
        """Returns an earlier reply of the policy's as it was sampled; None: it is none."""
        return self._replies.get(message.key)

    def take_rewards(self) -> float:
        """Returns the rewards that were posted since the last call."""
        with self._lock:
            found, self.rewards = self.rewards, 0.0
        return found

    def answer(
        self,
        pending: Pending,
        context: int,
        sampled: str,
        message: WireMessage,
        tokens: Tokens | None,
    ) -> None:
        """Answers a request.

        Args:
            pending: the request.
            context: its context.
            sampled: the reply as it was sampled.
            message: the reply as the program receives it.
            tokens: of the reply.
        """
        messages = (*pending.asked.messages, message)
        self._contexts[context].messages = [m.key for m in messages]
        self._replies[message.key] = sampled
        own = 1 if pending.asked.options.get("instructions") is not None else 0
        with self._lock:
            self._history[f"resp_{self._answers}"] = messages[own:]
            self._waiting.discard(pending)
        if pending.answer.set_running_or_notify_cancel():
            pending.answer.set_result(Answered(self._answers, message, tokens))
        self._answers += 1

    @property
    def answers(self) -> int:
        """How many requests were answered."""
        return self._answers

    def close(self) -> None:
        """Refuses what waits and whatever comes."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, set()
        for pending in waiting:
            if pending.answer.set_running_or_notify_cancel():
                pending.answer.set_exception(Refused(403, ENDED))


def read_outcome(value: Any) -> tuple[float, bool | None]:
    """Returns the reward and the success that a program gives: a number, True or False, or
    `{reward: number, success: true}`.

    Raises:
        Refused: it is none of these.
    """
    if isinstance(value, Mapping):
        given = dict(value)
        reward, success = given.pop("reward", 0.0), given.pop("success", None)
        number = isinstance(reward, (int, float)) and not isinstance(reward, bool)
        if number and isinstance(success, (bool, type(None))) and not given:
            return float(reward), success
    elif isinstance(value, bool):
        return float(value), value
    elif isinstance(value, (int, float)):
        return float(value), None
    elif value is None:
        return 0.0, None
    raise Refused(
        400, "an outcome is a reward, a number; or whether it was a success, true or false; or"
        f" {{reward, success}}; it is {value!r:.200}",
    )  # fmt: skip
