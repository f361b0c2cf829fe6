"""Where a request belongs, and what the policy reads of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...protocols import Message
from ...tools import call_text, calls_in, without_thoughts, words_in
from .wire.form import Asked, FunctionCall, Refused, WireMessage

REMEMBERED = 10_000  # responses


@dataclass(slots=True)
class Context:
    """A conversation that requests go on with.

    Attributes:
        tools: what they were in its first request.
        messages: what the last request showed, and the reply to it.
    """

    tools: str
    messages: list[Any] = field(default_factory=list)

    def news(self, asked: Asked) -> tuple[WireMessage, ...]:
        """Returns what a request adds to it, messages of a user or of tools; nothing where the
        request does not go on with it."""
        size = len(self.messages)
        if asked.keys[:size] != self.messages or asked.tools_key != self.tools:
            return ()
        added = asked.messages[size:]
        return added if all(m.role in ("user", "tool") for m in added) else ()

    def replied(self, asked: Asked, message: WireMessage) -> None:
        """Takes up a request and the reply to it."""
        self.messages = [*asked.keys, message.key]


def longest(contexts: Iterable[Context], asked: Asked) -> Context | None:
    """Returns the longest context that a request goes on with."""
    fit = [context for context in contexts if context.news(asked)]
    return max(fit, key=lambda context: len(context.messages), default=None)


class History:
    """What responses were, for requests that name the one they go on from; the latest ones."""

    def __init__(self) -> None:
        self._messages: dict[str, tuple[WireMessage, ...]] = {}  # in their order

    def add(self, id_: str, asked: Asked, message: WireMessage) -> None:
        """Takes up a reply; instructions are a request's own and are not handed down."""
        own = asked.options.get("instructions") is not None
        self._messages[f"resp_{id_}"] = (*asked.messages[own:], message)
        while len(self._messages) > REMEMBERED:
            del self._messages[next(iter(self._messages))]

    def forget(self, conversation: str) -> None:
        """Forgets the replies of a conversation, whose ids begin with its own."""
        gone = [id_ for id_ in self._messages if id_.startswith(f"resp_{conversation}-")]
        for id_ in gone:
            del self._messages[id_]

    def whole(self, asked: Asked) -> Asked:
        """Returns a request with all messages of its conversation.

        Raises:
            Refused: there is no such response.
        """
        previous = asked.options.get("previous")
        if previous is None:
            return asked
        if previous not in self._messages:
            raise Refused(404, f"no response {previous!r} is known here", "previous_response_id")
        own = asked.options["instructions"] is not None
        head, news = asked.messages[:own], asked.messages[own:]
        return replace(asked, messages=(*head, *self._messages[previous], *news))


def check(asked: Asked, models: Sequence[str], advice: str) -> None:
    """Checks that the policy can reply to a request.

    Args:
        asked: the request.
        models: the names that it answers to.
        advice: how others are given.

    Raises:
        Refused: it is for another model, or does not end with a message to reply to.
    """
    if asked.model not in models:
        raise Refused(
            404, f"the model {asked.model!r} does not exist here; there is"
            f" {', '.join(map(repr, models))}. Other names are given {advice}", "model",
        )  # fmt: skip
    last = asked.messages[-1]
    if last.role not in ("user", "tool"):
        raise Refused(
            400, f"the last message is of the {last.role}: the policy replies to a user or to the"
            " result of a tool", "messages",
        )  # fmt: skip


def observed(
    news: Sequence[WireMessage],
    sampled: Callable[[Sequence[WireMessage], WireMessage], str | None],
    apart: bool,
) -> tuple[str | None, Message]:
    """Returns messages as the policy reads them: the system prompt and one observation.

    Args:
        news: what is new in the context.
        sampled: takes what was before a message and the message, and returns it as it was sampled,
            where it is an earlier reply.
        apart: whether the system prompt stands apart; else it is a part of the observation.
    """
    leading = 0
    while apart and news[leading].role == "system":
        leading += 1
    system = "\n\n".join(m.text for m in news[:leading]) if leading else None
    shown = list(enumerate(news))[leading:]
    parts = [Message(m.role, _text(m, sampled(news[:i], m))) for i, m in shown]
    return system, Message.joined("tool" if parts[-1].role == "tool" else "user", parts)


def _text(message: WireMessage, own: str | None) -> str:
    """Returns a message's text: the policy's own replies as it wrote them, another assistant's
    calls in the form that is asked of it."""
    if message.role != "assistant" or own is not None:
        return message.text if own is None else own
    calls = [call_text(call.name, _arguments(call)) for call in message.calls]
    return "\n".join(filter(None, [message.text, *calls]))


def _arguments(call: FunctionCall) -> Mapping[str, Any]:
    """Returns a call's arguments, as far as they are an object."""
    try:
        found = json.loads(call.arguments)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


def received(reply: str, tools: Sequence[Mapping[str, Any]], id_: str) -> WireMessage:
    """Returns a reply as a program receives it: its words without thoughts, and its calls. What was
    meant as a call and is none stays text."""
    try:
        calls = [call for call in calls_in(reply, tools) if call.name] if tools else []
    except Exception:  # a form that is not known, or a schema that cannot be followed
        calls = []
    made = tuple(
        FunctionCall(f"call_{id_}_{i}", call.name, json.dumps(dict(call.arguments)))
        for i, call in enumerate(calls)
    )
    if made:
        return WireMessage("assistant", words_in(reply), made)
    words = without_thoughts(reply)
    return WireMessage("assistant", str(reply) if words == reply else words.strip())
