"""OpenAI's Responses: `POST /v1/responses`.

A request may name the response that it goes on from (`previous_response_id`), within its session.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from .chat_completions import refusal
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

NAME = "responses"
LOGPROBS = "message.output_text.logprobs"
READ = (
    "model", "input", "instructions", "tools", "max_output_tokens", "stream",
    "previous_response_id", "include",
)  # fmt: skip
ALLOWED: dict[str, Any] = {
    "temperature": (1,), "top_p": (1,), "top_logprobs": (0,), "tool_choice": ("auto",),
    "parallel_tool_calls": (True,), "truncation": ("disabled",), "background": (False,),
    "text": ({}, {"format": {"type": "text"}}), "reasoning": ({},), "conversation": (),
    "max_tool_calls": (), "prompt": (), "context_management": (), "store": ANY, "metadata": ANY,
    "user": ANY, "service_tier": ANY, "prompt_cache_key": ANY, "prompt_cache_retention": ANY,
    "safety_identifier": ANY, "stream_options": ANY, "prompt_cache_options": ANY,
    "moderation": (), "image": (), "access_programs": (),
}  # fmt: skip
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")


def read(body: Mapping[str, Any], ignore: Sequence[str] = (), temperature: float = 1.0) -> Asked:
    """Reads a request. The messages of the response that it goes on from are not among its own.

    Raises:
        Refused: it is none, or cannot be honoured.
    """
    check_options(body, READ, ALLOWED, ignore, temperature)
    include = each(body.get("include"), "include")
    previous = body.get("previous_response_id")
    if previous is not None and not isinstance(previous, str):
        raise Refused(400, "'previous_response_id' must be a text", "previous_response_id")
    for name in include:
        if name not in INCLUDED and "include" not in ignore:
            raise Refused(400, f"{name!r} cannot be included", "include")
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not items:
        raise Refused(400, "'input' is needed: a text or a list of items", "input")
    instructions = body.get("instructions")
    system = [] if instructions is None else [WireMessage("system", str(instructions))]
    return Asked(
        needed(body, "model", str),
        (*system, *_messages(items)),
        tuple(_tool(tool) for tool in each(body.get("tools"), "tools")),
        whole(body, "max_output_tokens"),
        body.get("stream") is True,
        {
            "logprobs": LOGPROBS in include,
            "previous": previous,
            "temperature": temperature,
            "instructions": instructions,
        },
    )


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise Refused(400, "tools must be of type 'function'", "tools")
    return function_schema(tool.get("name"), tool.get("description"), tool.get("parameters"))


def _messages(items: Sequence[Any]) -> list[WireMessage]:
    """Returns items as messages; an assistant's words and the calls after them are one."""
    found: list[WireMessage] = []
    for i, item in enumerate(items):
        where = f"input[{i}]"
        kind = item.get("type", "message") if isinstance(item, Mapping) else None
        if kind == "message":
            role = role_of(item.get("role"), where)
            text = text_in(item.get("content"), ("input_text", "output_text", "text"), where)
            found.append(WireMessage(role, text))
        elif kind == "function_call":
            call = call_of(item.get("call_id"), item.get("name"), item.get("arguments"), where)
            follows = bool(found) and found[-1].role == "assistant"
            last = found.pop() if follows else WireMessage("assistant", "")
            found.append(replace(last, calls=(*last.calls, call)))
        elif kind == "function_call_output":
            text = text_in(item.get("output"), ("input_text", "output_text"), where)
            found.append(WireMessage("tool", text, (), str(item.get("call_id"))))
        else:
            raise Refused(400, f"{where}: an item of type {kind!r} cannot be read", "input")
    return found


def _output(asked: Asked, answer: Answered) -> list[dict[str, Any]]:
    message, n = answer.message, answer.id
    status = "incomplete" if answer.cut else "completed"
    output: list[dict[str, Any]] = []
    if message.text or not message.calls:
        part = {
            "type": "output_text",
            "text": message.text,
            "annotations": [],
            "logprobs": answer.logprobs if asked.options["logprobs"] else [],
        }
        own = {"id": f"msg_{n}", "type": "message", "role": "assistant", "status": status}
        output.append({**own, "content": [part]})
    output += [
        {
            "id": f"fc_{n}_{i}",
            "type": "function_call",
            "status": status,
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        }
        for i, call in enumerate(message.calls)
    ]
    return output


def written(asked: Asked, answer: Answered) -> dict[str, Any]:
    """Returns an answer as the API's object."""
    read_, replied = answer.usage
    tools = [{"type": "function", "strict": False, **tool["function"]} for tool in asked.tools]
    return {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "incomplete" if answer.cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if answer.cut else None,
        "instructions": asked.options["instructions"],
        "max_output_tokens": asked.max_tokens,
        "model": asked.model,
        "output": _output(asked, answer),
        "parallel_tool_calls": True,
        "previous_response_id": asked.options["previous"],
        "temperature": asked.options["temperature"],
        "tool_choice": "auto",
        "tools": tools,
        "top_p": 1.0,
        "metadata": {},
        "usage": {
            "input_tokens": read_,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": replied,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read_ + replied,
        },
    }


def events(asked: Asked, answer: Answered) -> Iterator[str]:
    """Yields an answer as the API's events; it comes whole, since it is given when it has ended."""
    number = count()

    def named(kind: str, **data: Any) -> str:
        return event({"type": kind, "sequence_number": next(number), **data}, kind)

    whole_ = written(asked, answer)
    begun = {**whole_, "status": "in_progress", "output": [], "usage": None}
    begun["incomplete_details"] = None
    yield named("response.created", response=begun)
    yield named("response.in_progress", response=begun)
    for index, item in enumerate(whole_["output"]):
        at = {"output_index": index, "item_id": item["id"]}
        started = {**item, "status": "in_progress"}
        if item["type"] == "message":
            [part] = item["content"]
            inner = {**at, "content_index": 0}
            logprobs = part["logprobs"]
            empty = {**part, "text": "", "logprobs": []}
            yield named(
                "response.output_item.added", output_index=index, item={**started, "content": []}
            )
            yield named("response.content_part.added", **inner, part=empty)
            yield named(
                "response.output_text.delta", **inner, delta=part["text"], logprobs=logprobs
            )
            yield named("response.output_text.done", **inner, text=part["text"], logprobs=logprobs)
            yield named("response.content_part.done", **inner, part=part)
        else:
            arguments = item["arguments"]
            yield named(
                "response.output_item.added", output_index=index, item={**started, "arguments": ""}
            )
            yield named("response.function_call_arguments.delta", **at, delta=arguments)
            yield named(
                "response.function_call_arguments.done",
                **at,
                name=item["name"],
                arguments=arguments,
            )
        yield named("response.output_item.done", output_index=index, item=item)
    ended = "response.incomplete" if answer.cut else "response.completed"
    yield named(ended, response=whole_)


__all__ = ["NAME", "events", "read", "refusal", "written"]
