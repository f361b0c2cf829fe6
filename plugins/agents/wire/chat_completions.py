"""OpenAI's Chat Completions: `POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .form import (
    ANY,
    Answered,
    Asked,
    Refused,
    WireMessage,
    call_of,
    check_options,
    each,
    event,
    function_schema,
    needed,
    role_of,
    text_in,
    whole,
)

NAME = "chat.completions"
READ = (
    "model", "messages", "tools", "max_tokens", "max_completion_tokens", "stream",
    "stream_options", "logprobs",
)  # fmt: skip
ALLOWED: dict[str, Any] = {
    "temperature": (1,), "top_p": (1,), "n": (1,), "frequency_penalty": (0,),
    "presence_penalty": (0,), "stop": ([],), "logit_bias": ({},), "top_logprobs": (0,),
    "tool_choice": ("auto",), "parallel_tool_calls": (True,), "store": (False,),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "seed": (),
    "reasoning_effort": (), "verbosity": (), "functions": (), "function_call": (), "audio": (),
    "prediction": (), "web_search_options": (), "user": ANY, "metadata": ANY,
    "service_tier": ANY, "prompt_cache_key": ANY, "prompt_cache_retention": ANY,
    "safety_identifier": ANY, "prompt_cache_options": ANY, "moderation": (),
}  # fmt: skip


def read(body: Mapping[str, Any], ignore: Sequence[str] = (), temperature: float = 1.0) -> Asked:
    """Reads a request.

    Raises:
        Refused: it is none, or cannot be honoured.
    """
    check_options(body, READ, ALLOWED, ignore, temperature)
    limits = [whole(body, name) for name in ("max_completion_tokens", "max_tokens")]
    options = body.get("stream_options") or {}
    return Asked(
        needed(body, "model", str),
        tuple(_message(m, f"messages[{i}]") for i, m in enumerate(needed(body, "messages", list))),
        tuple(_tool(tool) for tool in each(body.get("tools"), "tools")),
        min((limit for limit in limits if limit), default=None),
        body.get("stream") is True,
        {
            "logprobs": body.get("logprobs") is True,
            "usage": isinstance(options, Mapping) and options.get("include_usage") is True,
        },
    )


def _tool(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        raise Refused(400, "tools must be of type 'function'", "tools")
    return function_schema(
        function.get("name"), function.get("description"), function.get("parameters")
    )


def _message(message: Any, where: str) -> WireMessage:
    if not isinstance(message, Mapping):
        raise Refused(400, f"{where} must be an object", "messages")
    role = message.get("role")
    text = text_in(message.get("content"), ("text", "refusal"), where)
    if role == "tool":
        answers = message.get("tool_call_id")
        if not isinstance(answers, str):
            raise Refused(400, f"{where}: a tool's message needs `tool_call_id`", "messages")
        return WireMessage("tool", text, (), answers)
    own = role_of(role, where)
    calls = each(message.get("tool_calls"), "tool_calls") if own == "assistant" else ()
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise Refused(400, f"{where}: a call must name a function", "messages")
        given = (call.get("id"), function.get("name"), function.get("arguments"))
        found.append(call_of(*given, where))
    return WireMessage(own, text, tuple(found))


def _finish(answer: Answered) -> str:
    return "length" if answer.cut else "tool_calls" if answer.message.calls else "stop"


def _calls(answer: Answered) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in answer.message.calls
    ]


def _usage(answer: Answered) -> dict[str, int]:
    asked, replied = answer.usage
    return {"prompt_tokens": asked, "completion_tokens": replied, "total_tokens": asked + replied}


def _logprobs(asked: Asked, answer: Answered) -> dict[str, Any] | None:
    if not asked.options["logprobs"] or answer.tokens is None:
        return None
    return {"content": answer.logprobs, "refusal": None}


def _head(asked: Asked, answer: Answered, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{answer.id}",
        "object": kind,
        "created": int(time.time()),
        "model": asked.model,
    }


def written(asked: Asked, answer: Answered) -> dict[str, Any]:
    """Returns an answer as the API's object."""
    text, calls = answer.message.text, _calls(answer)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text or None, "tool_calls": calls}
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _logprobs(asked, answer),
        "finish_reason": _finish(answer),
    }
    head = _head(asked, answer, "chat.completion")
    return {**head, "choices": [choice], "usage": _usage(answer)}


def events(asked: Asked, answer: Answered) -> Iterator[str]:
    """Yields an answer as the API's events; it comes whole, since it is given when it has ended."""
    head = _head(asked, answer, "chat.completion.chunk")

    def chunk(delta: Mapping[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, **more}
        return event({**head, "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    if answer.message.text:
        yield chunk({"content": answer.message.text}, logprobs=_logprobs(asked, answer))
    for index, call in enumerate(_calls(answer)):
        yield chunk({"tool_calls": [{"index": index, **call}]})
    yield chunk({}, _finish(answer))
    if asked.options["usage"]:
        yield event({**head, "choices": [], "usage": _usage(answer)})
    yield "data: [DONE]\n\n"


def refusal(refused: Refused) -> dict[str, Any]:
    """Returns a refusal in OpenAI's form."""
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    error = {"message": str(refused), "type": kind, "param": refused.param or None, "code": None}
    return {"error": error}
