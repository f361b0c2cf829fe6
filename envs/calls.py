"""Calls of tools in a reply: found in the spellings that models have, and checked against the
schemas of the tools.

Read are the JSON of Hermes and Qwen (`<tool_call>{...}</tool_call>`), the XML of Qwen3-Coder
(`<function=NAME><parameter=KEY>VALUE</parameter></function>`), the JSON of Llama 3 (`{"name": ...,
"parameters": {...}}`, several with `;` between), Mistral's (`[TOOL_CALLS][{...}]` and
`[TOOL_CALLS]NAME[ARGS]{...}`) and gpt-oss's (`to=functions.NAME ... {...}`). A call that cannot be
made has a fault, in words that its writer can use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for
from referencing import Registry

Schema = Mapping[str, Any]
AT_ONCE = 16  # calls of a reply that are made
LENGTH = 300  # characters of a fault that are quoted
_FUNCTION = re.compile(r"<function=([^>\s]+)>")
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>")
_CHANNEL = re.compile(r"to=functions\.([\w.-]+)(?:\s|json\b|<\|[a-z]+\|>|commentary\b)*(?=\{)")
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w*)?\[ARGS\]")


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool.

    Attributes:
        fault: why it cannot be made; empty where it can.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""


class ToolFailed(Exception):
    """A tool says that it could not do what was asked; the message is its result."""


def calls_in(reply: str, tools: Sequence[Schema]) -> list[Call]:
    """Returns the calls of tools in a reply, in order; none where it is only words.

    Args:
        reply: as the model wrote it.
        tools: the schemas of the tools that there are.
    """
    known = {inner(tool)["name"]: inner(tool) for tool in tools}
    found = []
    for name, arguments, fault in _spelled(reply, known):
        fault = fault or _fault(name, arguments, known)
        found.append(Call(name, {} if fault else arguments, fault))
    return [
        call
        if i < AT_ONCE
        else Call(call.name, fault=f"a reply may make {AT_ONCE} calls, and this is one more")
        for i, call in enumerate(found)
    ]


def written(name: str, arguments: Mapping[str, Any]) -> str:
    """Returns a call as a scripted player writes it, in the JSON of Hermes and Qwen."""
    call = json.dumps({"name": name, "arguments": dict(arguments)})
    return f"<tool_call>\n{call}\n</tool_call>"


def inner(tool: Schema) -> Schema:
    """Returns the part of a tool's schema that has its name and its parameters."""
    found: Schema = tool.get("function", tool)
    return found


def _spelled(reply: str, known: Mapping[str, Schema]) -> Iterator[tuple[str, Any, str]]:
    """Yields (name, arguments, fault) of every call."""
    if "<tool_call>" in reply:
        for block in reply.split("<tool_call>")[1:]:
            inside = block.split("</tool_call>", 1)[0]
            yield from _tagged(inside, known) if "<function=" in inside else [_object(inside)]
    elif "<function=" in reply:
        yield from _tagged(reply, known)
    elif "[TOOL_CALLS]" in reply:
        for block in reply.split("[TOOL_CALLS]")[1:]:
            yield from _bracketed(block)
    elif _CHANNEL.search(reply):
        for match in _CHANNEL.finditer(reply):
            arguments, fault, _ = _json(reply, match.end())
            yield match[1], arguments, fault
    else:
        yield from _bare(reply)


def _tagged(text: str, known: Mapping[str, Schema]) -> Iterator[tuple[str, Any, str]]:
    """Yields the calls of Qwen3-Coder's XML; values are of the type that the schema says."""
    pieces = _FUNCTION.split(text)[1:]
    for name, inside in zip(pieces[::2], pieces[1::2], strict=True):
        parts = _PARAMETER.split(inside.split("</function>", 1)[0])[1:]
        properties = (known.get(name, {}).get("parameters") or {}).get("properties") or {}
        arguments = {
            key: _typed(value.split("</parameter>", 1)[0], properties.get(key))
            for key, value in zip(parts[::2], parts[1::2], strict=True)
        }
        yield name, arguments, ""


def _typed(value: str, schema: Any) -> Any:
    text = value.removeprefix("\n").removesuffix("\n")
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    read, fault, end = _json(text, 0)
    return text if fault or text[end:].strip() else read


def _bracketed(text: str) -> Iterator[tuple[str, Any, str]]:
    """Yields the calls after one of Mistral's marks."""
    if match := _NAMED.match(text):
        arguments, fault, _ = _json(text, match.end())
        yield match[1], arguments, fault
        return
    found, fault, _ = _json(text, 0)
    if fault:
        yield "", {}, fault
        return
    for each in found if isinstance(found, list) else [found]:
        yield _parts(each)


def _bare(reply: str) -> Iterator[tuple[str, Any, str]]:
    """Yields the calls of a reply that is nothing but Llama's JSON objects."""
    meant = reply.strip().startswith("<|python_tag|>")
    text = reply.strip().removeprefix("<|python_tag|>").strip()
    objects, at = [], 0
    while text.startswith("{", at):
        found, fault, at = _json(text, at)
        if fault and meant:
            yield "", {}, fault
        if fault:
            return
        objects.append(found)
        while at < len(text) and text[at] in "; \t\r\n":
            at += 1
    if meant or (
        at == len(text)
        and all(isinstance(o.get("name"), str) and {"parameters", "arguments"} & set(o)
                for o in objects)
    ):  # fmt: skip
        yield from map(_parts, objects)


def _object(text: str) -> tuple[str, Any, str]:
    found, fault, _ = _json(text, 0)
    return ("", {}, fault) if fault else _parts(found)


def _parts(call: Any) -> tuple[str, Any, str]:
    """Returns the name and the arguments that a call's JSON has."""
    own = call.get("function", call) if isinstance(call, dict) else None
    name = own.get("name") if isinstance(own, dict) else None
    if not isinstance(own, dict) or not isinstance(name, str):
        return "", {}, 'a call is {"name": "...", "arguments": {...}}, and this has no name'
    arguments = own.get("arguments", own.get("parameters", {}))
    if isinstance(arguments, str):
        arguments, fault, _ = _json(arguments, 0)
        return name, arguments, fault
    return name, arguments, ""


def _json(text: str, at: int) -> tuple[Any, str, int]:
    """Returns the JSON value that begins at or after a place, what is wrong with it, and where it
    ends."""
    while at < len(text) and text[at].isspace():
        at += 1
    try:
        value, end = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        return {}, f"the call is not valid JSON: {why}", at
    return value, "", end


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _fault(name: str, arguments: Any, known: Mapping[str, Schema]) -> str:
    """Returns why a call cannot be made; empty where it can."""
    if name not in known:
        return f"there is no tool {_short(repr(name))}; there are: {', '.join(known) or 'none'}"
    if not isinstance(arguments, dict):
        return f"the arguments of {name} must be an object, not {_short(json.dumps(arguments))}"
    schema = known[name].get("parameters") or {}
    checker = validator_for(schema)(schema, registry=Registry())  # it fetches nothing
    wrong = best_match(checker.iter_errors(arguments))
    if wrong is None:
        return ""
    where = ".".join(map(str, wrong.absolute_path))
    return f"the arguments of {name}{f' at {where}' if where else ''}: {_short(wrong.message)}"


def _short(text: str) -> str:
    return text if len(text) <= LENGTH else text[: LENGTH - 3] + "..."
