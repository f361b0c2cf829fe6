"""One run of a program: its requests as they come, the contexts that they belong to, its reward."""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...protocols import Tokens
from ...tools import derive_id
from .contexts import Context, History, check, longest
from .wire.form import Answered, Asked, Refused, WireMessage

ENDED = (
    "this session has ended, and its program may ask no more: it has ended itself, or the"
    " conversation was cut, by the length of the policy's context or by a limit"
)


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A request that waits for its answer."""

    asked: Asked
    api: str
    answer: Future[Answered] = field(default_factory=Future)

    def resolve(self, answered: Answered) -> None:
        """Answers it; who asked may have gone."""
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_result(answered)

    def refuse(self, refused: Refused) -> None:
        """Refuses it."""
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(refused)


@dataclass(frozen=True, slots=True)
class Over:
    """The end of a program: what it returned, or why it failed."""

    value: Any = None
    fault: str = ""


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
        temperature: 1 may be asked for: it is the run's, whatever that is.
        success: what it has posted of it.
        answers: how many requests were answered.
    """

    def __init__(self, models: Sequence[str], ignore: Sequence[str] = ()) -> None:
        self.key = secrets.token_urlsafe(24)
        self.models, self.ignore = tuple(models), tuple(ignore)
        self.temperature = 1.0
        self.success: bool | None = None
        self.answers = 0
        self._rewards = 0.0
        self._arrived: queue.SimpleQueue[Pending | Over] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: set[Pending] = set()
        self._contexts: list[Context] = []
        # As they were sampled: by what the program received, and what was before.
        self._replies: dict[Any, dict[str, str]] = {}
        self._history = History()

    # On the server's thread.

    def submit(self, asked: Asked, api: str) -> Pending:
        """Puts a request into the queue.

        Raises:
            Refused: it cannot be answered here.
        """
        check(asked, self.models, "to the environment by `models: [...]`")
        with self._lock:
            if self._closed:
                raise Refused(403, ENDED)
            pending = Pending(self._history.whole(asked), api)
            self._waiting.add(pending)
            self._arrived.put(pending)
        return pending

    def post(self, outcome: Mapping[str, Any]) -> Mapping[str, Any]:
        """Takes a reward, or a success, that the program posts; rewards add up.

        Raises:
            Refused: it is neither, or the session has ended.
        """
        reward, success = read_outcome(outcome)
        with self._lock:
            if self._closed:
                raise Refused(403, ENDED)
            self._rewards += reward
            self.success = self.success if success is None else success
        return {"taken": True}

    # On the program's thread, or on the one that waits for it.

    def end(self, over: Over) -> None:
        """Tells that the program has ended."""
        self._arrived.put(over)

    # On the environment's thread.

    def next(self, timeout: float) -> Pending | Over | None:
        """Returns the next request or the end; None if neither comes in time."""
        while True:
            try:
                found = self._arrived.get(timeout=max(0.0, timeout))
            except queue.Empty:
                return None
            if not isinstance(found, Pending) or not found.answer.cancelled():
                return found  # else who asked has gone

    def place(self, asked: Asked) -> Place:
        """Returns the context that a request belongs to: the longest one that it goes on with, by
        messages of a user or of tools; else it opens another one."""
        if (context := longest(self._contexts, asked)) is not None:
            return Place(self._contexts.index(context), False, context.news(asked))
        self._contexts.append(Context(asked.tools_key))
        return Place(len(self._contexts) - 1, True, asked.messages)

    def sampled(self, before: Sequence[WireMessage], message: WireMessage) -> str | None:
        """Returns an earlier reply of the policy's as it was sampled: the one to what was before
        it, or where there is none, the only one that looks like this. None: it is none."""
        alike = self._replies.get(message.key, {})
        own = alike.get(derive_id([m.key for m in before]))
        others = set(alike.values())
        return own if own is not None or len(others) != 1 else others.pop()

    def take_rewards(self) -> float:
        """Returns the rewards that were posted since the last call."""
        with self._lock:
            found, self._rewards = self._rewards, 0.0
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
        id_ = str(self.answers)
        self._contexts[context].replied(pending.asked, message)
        alike = self._replies.setdefault(message.key, {})
        alike[derive_id(pending.asked.keys)] = sampled
        self.answers += 1
        with self._lock:
            self._history.add(id_, pending.asked, message)
            self._waiting.discard(pending)
        pending.resolve(Answered(id_, message, tokens))

    def close(self) -> None:
        """Refuses what waits and whatever comes."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, set()
        for pending in waiting:
            pending.refuse(Refused(403, ENDED))


def read_outcome(value: Any) -> tuple[float, bool | None]:
    """Returns the reward and the success that a program gives: a number, True or False, or
    `{reward: number, success: true}`.

    Raises:
        Refused: it is none of these.
    """
    if isinstance(value, np.generic):
        value = value.item()
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
