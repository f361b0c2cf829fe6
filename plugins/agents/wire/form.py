"""What the three APIs have in common: a request, the answer to it, and a refusal.

A request is read strictly. An option that changes what the policy would say and cannot be honoured
is refused, unless the environment was told to pass over it: what is sampled is what is trained, and
the run decides how it is sampled.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ....protocols import Role, Tokens
from ....tools import canonical_json, parsed, validator

ROLES: Mapping[str, Role] = {
    "developer": "system", "system": "system", "user": "user", "assistant": "assistant",
}  # fmt: skip
ANY = object()  # an option that makes no difference to what is sampled


class Refused(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        param: the part of the request at fault; empty: none in particular.
    """

    def __init__(self, status: int, message: str, param: str = "") -> None:
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A call of a tool; its arguments are JSON, as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class WireMessage:
    """A message of a request, or the policy's reply as a program receives it.

    Attributes:
        role: system, user, assistant or tool.
        text: its words.
        calls: of tools, which an assistant makes.
        answers: the id of the call that a tool's message is the result of.
    """

    role: Role
    text: str
    calls: tuple[FunctionCall, ...] = ()
    answers: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What must be equal for two messages to be the same: programs write a call's arguments
        again in their own way."""
        calls = tuple((c.id, c.name, _same_json(c.arguments)) for c in self.calls)
        return (self.role, self.text, calls, self.answers)


def _same_json(text: str) -> str:
    try:
        return json.dumps(parsed(text), sort_keys=True)
    except (ValueError, RecursionError):
        return text


@dataclass(frozen=True)
class Asked:
    """A request for a reply.

    Attributes:
        model: as named.
        messages: of the whole conversation.
        tools: schemas, in OpenAI's form.
        max_tokens: the most that the reply may have, where the request limits it.
        stream: whether the reply is sent as events.
        options: what only its own API reads again.
    """

    model: str
    messages: tuple[WireMessage, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    max_tokens: int | None = None
    stream: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def keys(self) -> list[Any]:
        """What must be equal of each message for two requests to begin alike."""
        return [message.key for message in self.messages]

    @cached_property
    def tools_key(self) -> str:
        """The same of the tools."""
        return canonical_json(list(self.tools))


@dataclass(frozen=True, slots=True)
class Answered:
    """A reply to a request.

    Attributes:
        id: of the reply, without the API's prefix.
        message: the reply.
        tokens: those that were sampled; None: none were.
    """

    id: str
    message: WireMessage
    tokens: Tokens | None

    @property
    def cut(self) -> bool:
        """Whether the reply ended at a limit."""
        return self.tokens is not None and self.tokens.cut

    @property
    def usage(self) -> tuple[int, int]:
        """How many tokens were read, and how many were sampled."""
        return (0, 0) if self.tokens is None else (self.tokens.read, len(self.tokens.texts))

    @property
    def logprobs(self) -> list[dict[str, Any]]:
        """The tokens and their log-probs, in OpenAI's form; none where none were sampled."""
        if self.tokens is None:
            return []
        return [
            {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
            for text, logprob in zip(self.tokens.texts, self.tokens.logprobs, strict=True)
        ]


def check_options(
    body: Mapping[str, Any],
    read: Collection[str],
    allowed: Mapping[str, Any],
    ignore: Sequence[str],
    temperature: float,
) -> None:
    """Checks all options of a request that are not read.

    Args:
        body: the request.
        read: the names of what is read.
        allowed: by name the values that change nothing, `ANY` where none does.
        ignore: options that are passed over, whatever they say.
        temperature: the one that may be asked for.

    Raises:
        Refused: an option that cannot be honoured.
    """
    for name, value in body.items():
        if name in read or name in ignore or value is None:
            continue
        if name not in allowed:
            raise Refused(400, f"the option {name!r} is not known here", name)
        values = (temperature,) if name == "temperature" else allowed[name]
        if values is not ANY and value not in values:
            others = " or ".join(json.dumps(each) for each in values) or "none"
            raise Refused(
                400,
                f"{name}={json.dumps(value)[:200]} cannot be honoured: the run decides how replies"
                f" are sampled ({others} may be asked for). To pass over it: `ignore: [{name}]` of"
                f" the environment, or `turnwise serve --ignore {name}`",
                name,
            )


def needed(body: Mapping[str, Any], name: str, kind: type) -> Any:
    """Returns a part of a request.

    Raises:
        Refused: it is missing, or of another kind.
    """
    value = body.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) or not value:
        raise Refused(400, f"{name!r} is needed: {_KINDS[kind]}, got {_short(value)}", name)
    return value


_KINDS = {str: "a text", list: "a list", int: "a whole number"}


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 200 else f"{text[:200]}..."


def whole(body: Mapping[str, Any], name: str) -> int | None:
    """Returns a number of tokens that a request may give.

    Raises:
        Refused: it is no whole number of at least 1.
    """
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Refused(400, f"{name!r} must be a whole number of at least 1, got {value!r}", name)
    return min(value, 2**31 - 1)


def text_in(content: Any, kinds: Collection[str], where: str) -> str:
    """Returns a message's words, which are a text or a list of parts.

    Raises:
        Refused: a part that is no text; the policy reads nothing else.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(400, f"{where}: the content must be a text or a list of parts", "messages")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in kinds or not isinstance(part.get("text"), str):
            raise Refused(
                400, f"{where}: a part of type {kind!r} cannot be read; the policy reads text",
                "messages",
            )  # fmt: skip
        texts.append(part["text"])
    return "\n\n".join(texts)


def function_schema(name: Any, description: Any, parameters: Any) -> dict[str, Any]:
    """Returns a tool's schema in OpenAI's form.

    Raises:
        Refused: its name or its parameters are none.
    """
    if not isinstance(name, str) or not name or not isinstance(parameters or {}, Mapping):
        raise Refused(400, f"a tool needs a name and a JSON schema, got {name!r}", "tools")
    function: dict[str, Any] = {"name": name}
    if isinstance(description, str) and description:
        function["description"] = description
    function["parameters"] = dict(parameters or {"type": "object", "properties": {}})
    try:
        validator(function["parameters"])
    except (ValueError, TypeError, RecursionError) as error:
        raise Refused(400, f"the tool {name!r}: {error}", "tools") from None
    return {"type": "function", "function": function}


def each(value: Any, name: str) -> Sequence[Any]:
    """Returns a list that may be missing.

    Raises:
        Refused: it is something else.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise Refused(400, f"{name!r} must be a list, got {_short(value)}", name)
    return value


def role_of(role: Any, where: str) -> Role:
    """Returns a role of OpenAI's as it is called here.

    Raises:
        Refused: there is none of that name.
    """
    if not isinstance(role, str) or role not in ROLES:
        raise Refused(400, f"{where}: there is no role {role!r} here", "messages")
    return ROLES[role]


def call_of(id_: Any, name: Any, arguments: Any, where: str) -> FunctionCall:
    """Returns a call of a tool.

    Raises:
        Refused: a part of it is no text.
    """
    if not all(isinstance(each, str) for each in (id_, name, arguments)):
        raise Refused(400, f"{where}: a call has an id, a name and arguments as text", "messages")
    return FunctionCall(id_, name, arguments)


def event(data: Mapping[str, Any], name: str = "") -> str:
    """Returns a server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n"
