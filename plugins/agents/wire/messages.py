"""Anthropic's Messages: `POST /v1/messages`."""

from __future__ import annotations

import json
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
    text_in,
    whole,
)

NAME = "messages"
READ = ("model", "messages", "system", "tools", "max_tokens", "stream")
ALLOWED: dict[str, Any] = {
    "temperature": (1,), "top_p": (1,), "top_k": (), "stop_sequences": ([],),
    "tool_choice": ({"type": "auto"},), "thinking": ({"type": "disabled"},), "mcp_servers": ([],),
    "container": (), "context_management": (), "output_config": (), "output_format": (),
    "metadata": ANY, "service_tier": ANY, "cache_control": ANY, "inference_geo": ANY,
    "user_profile_id": ANY, "workspace_id": ANY, "diagnostics": ANY, "speed": ("standard",),
}  # fmt: skip
ERRORS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error",
}  # fmt: skip


def read(body: Mapping[str, Any], ignore: Sequence[str] = (), temperature: float = 1.0) -> Asked:
    """Reads a request.

    Raises:
        Refused: it is none, or cannot be honoured.
    """
    check_options(body, READ, ALLOWED, ignore, temperature)
    found: list[WireMessage] = []
    if body.get("system"):
        found.append(WireMessage("system", text_in(body["system"], ("text",), "system")))
    for i, message in enumerate(needed(body, "messages", list)):
        found += _message(message, f"messages[{i}]")
    needed(body, "max_tokens", int)
    return Asked(
        needed(body, "model", str),
        tuple(found),
        tuple(_tool(tool) for tool in each(body.get("tools"), "tools")),
        whole(body, "max_tokens"),
        body.get("stream") is True,
    )


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") not in (None, "custom"):
        raise Refused(400, "tools must have a name and an `input_schema`", "tools")
    return function_schema(tool.get("name"), tool.get("description"), tool.get("input_schema"))


def _message(message: Any, where: str) -> list[WireMessage]:
    """Returns a message; results of tools come first, each as one of its own."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ("user", "assistant"):
        raise Refused(400, f"{where}: the role must be user or assistant, got {role!r}", "messages")
    content = message.get("content")
    blocks = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    results, calls, others = [], [], []
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_result" and role == "user":
            text = text_in(block.get("content"), ("text",), where)
            results.append(WireMessage("tool", text, (), str(block.get("tool_use_id"))))
        elif kind == "tool_use" and role == "assistant":
            arguments = json.dumps(block.get("input") or {})
            calls.append(call_of(block.get("id"), block.get("name"), arguments, where))
        else:
            others.append(block)
    text = text_in(others, ("text",), where)
    if results and not text:
        return results
    return [*results, WireMessage(role, text, tuple(calls))]


def _blocks(answer: Answered) -> list[dict[str, Any]]:
    message = answer.message
    text = [{"type": "text", "text": message.text}] if message.text or not message.calls else []
    uses = [
        {"type": "tool_use", "id": c.id, "name": c.name, "input": json.loads(c.arguments)}
        for c in message.calls
    ]
    return [*text, *uses]


def _finish(answer: Answered) -> str:
    return "max_tokens" if answer.cut else "tool_use" if answer.message.calls else "end_turn"


def written(asked: Asked, answer: Answered) -> dict[str, Any]:
    """Returns an answer as the API's object."""
    read_, replied = answer.usage
    return {
        "id": f"msg_{answer.id}",
        "type": "message",
        "role": "assistant",
        "model": asked.model,
        "content": _blocks(answer),
        "stop_reason": _finish(answer),
        "stop_sequence": None,
        "usage": {"input_tokens": read_, "output_tokens": replied},
    }


def events(asked: Asked, answer: Answered) -> Iterator[str]:
    """Yields an answer as the API's events; it comes whole, since it is given when it has ended."""

    def named(kind: str, **data: Any) -> str:
        return event({"type": kind, **data}, kind)

    whole_ = written(asked, answer)
    usage = {**whole_["usage"], "output_tokens": 0}
    begun = {**whole_, "content": [], "stop_reason": None, "usage": usage}
    yield named("message_start", message=begun)
    for index, block in enumerate(whole_["content"]):
        if block["type"] == "text":
            empty, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            given = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
            empty, delta = {**block, "input": {}}, given
        yield named("content_block_start", index=index, content_block=empty)
        yield named("content_block_delta", index=index, delta=delta)
        yield named("content_block_stop", index=index)
    ended = {"stop_reason": whole_["stop_reason"], "stop_sequence": None}
    yield named("message_delta", delta=ended, usage={"output_tokens": answer.usage[1]})
    yield named("message_stop")


def refusal(refused: Refused) -> dict[str, Any]:
    """Returns a refusal in Anthropic's form."""
    kind = ERRORS.get(refused.status, "invalid_request_error")
    kind = "api_error" if refused.status >= 500 else kind
    return {"type": "error", "error": {"type": kind, "message": str(refused)}}
