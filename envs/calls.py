"""Calls of tools in a reply: found in the spellings that models have, and checked against the
schemas of the tools.

The first marker in a reply says how its calls are spelled; what stands in an argument is no call,
nor is what stands in thoughts. Read are the JSON of Hermes and Qwen (in `<tool_call>` and its end),
the XML of Qwen3-Coder (`<function=NAME><parameter=KEY>VALUE</parameter></function>`), the JSON of
Llama 3 (`{"name": ..., "parameters": {...}}`, several with `;` between), Mistral's
(`[TOOL_CALLS][{...}]` and `[TOOL_CALLS]NAME[ARGS]{...}`) and gpt-oss's (`to=functions.NAME ...
{...}`). A call that cannot be made has a fault, in words that its writer can use.
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
Spelled = tuple[str, Any, str]  # name, arguments, fault
AT_ONCE = 16  # calls of a reply that are made
DEEPEST = 20  # how far arguments may be nested
LENGTH = 300  # characters of a fault that are quoted
_CHANNEL = re.compile(
    r"(?:\bto=functions\.([\w.-]+)\s*<\|channel\|>\s*commentary|commentary\s+to=functions\.([\w.-]+))"
    r"(?:\s|json\b|<\|[a-z]+\|>)*(?=\{)"
)
_MARKS = re.compile(rf"<tool_call>|<function=|\[TOOL_CALLS\]|{_CHANNEL.pattern}")
_FUNCTION = re.compile(r"<function=([^>\s]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>")
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
    """A tool says that it could not do what was asked; the message is its result.

    Attributes:
        fault: whose fault it is: "agent" or "tool".
    """

    def __init__(self, message: str, fault: str = "tool") -> None:
        super().__init__(message)
        self.fault = fault


def calls_in(reply: str, tools: Sequence[Schema]) -> list[Call]:
    """Returns the calls of tools in a reply, in order; none where it is only words.

    Args:
        reply: as the model wrote it.
        tools: the schemas of the tools that there are.
    """
    known = {inner(tool)["name"]: inner(tool) for tool in tools}
    found: list[Call] = []
    for name, arguments, fault in _spelled(reply.rpartition("</think>")[2], known):
        if len(found) == AT_ONCE:
            why = f"a reply may make {AT_ONCE} calls; this one and those after it were not made"
            return [*found, Call(_short(name), fault=why)]
        fault = fault or _fault(name, arguments, known)
        found.append(Call(_short(name), {} if fault else arguments, fault))
    return found


def written(name: str, arguments: Mapping[str, Any]) -> str:
    """Returns a call as a scripted player writes it, in the JSON of Hermes and Qwen."""
    call = json.dumps({"name": name, "arguments": dict(arguments)})
    return f"<tool_call>\n{call}\n</tool_call>"


def inner(tool: Schema) -> Schema:
    """Returns the part of a tool's schema that has its name and its parameters."""
    found: Schema = tool.get("function", tool)
    return found


def _spelled(reply: str, known: Mapping[str, Schema]) -> Iterator[Spelled]:
    """Yields the calls of a reply, in the spelling of the first one."""
    plain = reply.strip()
    first = _MARKS.search(reply)
    if plain.startswith(("{", "<|python_tag|>")):
        yield from _bare(plain)
    elif first is None:
        return
    elif first[0] == "<tool_call>":
        yield from _tagged(reply, known)
    elif first[0] == "<function=":
        yield from _functions(reply, first.start(), known)
    elif first[0] == "[TOOL_CALLS]":
        yield from _bracketed(reply)
    else:
        at = 0
        while match := _CHANNEL.search(reply, at):
            arguments, fault, at = _json(reply, match.end())
            yield match[1] or match[2], arguments, fault


def _tagged(text: str, known: Mapping[str, Schema]) -> Iterator[Spelled]:
    """Yields the calls that begin with <tool_call>: JSON, or the XML of Qwen3-Coder."""
    at = text.find("<tool_call>")
    while at >= 0:
        at += len("<tool_call>")
        begin, empty = _space(text, at), True
        if text.startswith("<function=", begin):
            end = text.find("</tool_call>", begin)
            yield from _functions(text, begin, known, len(text) if end < 0 else end)
            at, empty = (len(text) if end < 0 else end), False
        while text.startswith(("{", "["), begin):
            found, fault, at = _json(text, begin)
            yield from [("", {}, fault)] if fault else _parts(found)
            begin, empty = (_space(text, at) if not fault else len(text)), False
        if empty:
            yield "", {}, _json(text, begin)[1]
        at = text.find("<tool_call>", at)


def _functions(
    text: str, at: int, known: Mapping[str, Schema], end: int | None = None
) -> Iterator[Spelled]:
    """Yields the calls of Qwen3-Coder's XML; values are of the types that the schema says."""
    end = len(text) if end is None else end
    while match := _FUNCTION.search(text, at, end):
        name, at, arguments = match[1], match.end(), dict[str, Any]()
        schema = known.get(name, {}).get("parameters") or {}
        while value := _PARAMETER.match(text, at):
            close = text.find("</parameter>", value.end())
            stop = len(text) if close < 0 else close
            arguments[value[1]] = _typed(text[value.end() : stop], value[1], schema)
            at = stop + len("</parameter>")
        end = max(end, at)
        yield name, arguments, ""


def _typed(value: str, key: str, schema: Schema) -> Any:
    """Returns a value as text, or as what it spells where the schema wants no text."""
    text = value.removeprefix("\n").removesuffix("\n")
    spelled = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)
    read, fault, end = _json(spelled, 0)
    own = (schema.get("properties") or {}).get(key)
    if fault or spelled[end:].strip() or own is False:
        return text
    if isinstance(own, Mapping) and {"type", "anyOf", "oneOf", "enum", "$ref"} & set(own):
        checker = validator_for(schema)(schema, registry=Registry()).evolve(schema=own)
        return text if checker.is_valid(text) else read
    return read


def _bracketed(text: str) -> Iterator[Spelled]:
    """Yields the calls after Mistral's marks."""
    at = text.find("[TOOL_CALLS]")
    while at >= 0:
        at += len("[TOOL_CALLS]")
        match = _NAMED.match(text, at)
        found, fault, end = _json(text, match.end() if match else at)
        if match or fault:
            yield match[1] if match else "", found, fault
        else:
            yield from _parts(found)
        at = text.find("[TOOL_CALLS]", end)


def _bare(text: str) -> Iterator[Spelled]:
    """Yields the calls of a reply that is nothing but Llama's JSON objects."""
    meant = text.startswith("<|python_tag|>")
    text = text.removeprefix("<|python_tag|>").strip()
    objects, at = [], 0
    while text.startswith("{", at):
        found, fault, at = _json(text, at)
        if fault:
            yield from [("", {}, fault)] if meant else []
            return
        objects.append(found)
        while at < len(text) and text[at] in "; \t\r\n":
            at += 1
    if meant and not objects:
        yield "", {}, _json(text, 0)[1]
    elif meant or (
        at == len(text)
        and all(
            isinstance(o.get("name"), str) and {"parameters", "arguments"} & set(o) for o in objects
        )
    ):
        for each in objects:
            yield from _parts(each)


def _parts(value: Any) -> Iterator[Spelled]:
    """Yields the name and the arguments that a call's JSON has, or those of several."""
    for call in value if isinstance(value, list) else [value]:
        own = call.get("function", call) if isinstance(call, dict) else None
        name = own.get("name") if isinstance(own, dict) else None
        if not isinstance(own, dict) or not isinstance(name, str):
            yield "", {}, 'a call is {"name": "...", "arguments": {...}}, and this has no name'
            continue
        arguments, fault = own.get("arguments", own.get("parameters")), ""
        arguments = {} if arguments is None else arguments
        if isinstance(arguments, str):
            arguments, fault, _ = _json(arguments, 0)
        yield name, arguments, fault


def _space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _json(text: str, at: int) -> tuple[Any, str, int]:
    """Returns the JSON value that begins at a place, what is wrong with it, and where it ends."""
    at = _space(text, at)
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
        return f"there is no tool {_short(ascii(name))}; there are: {', '.join(known) or 'none'}"
    if not isinstance(arguments, dict):
        return f"the arguments of {name} must be an object, not {_short(json.dumps(arguments))}"
    if _depth(arguments) > DEEPEST:
        return f"the arguments of {name} are nested more than {DEEPEST} deep"
    try:
        json.dumps(arguments, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return f"the arguments of {name} are not valid Unicode: half a surrogate pair is in them"
    schema = known[name].get("parameters") or {}
    checker = validator_for(schema)(schema, registry=Registry())  # it fetches nothing
    wrong = best_match(checker.iter_errors(arguments))
    if wrong is None:
        return ""
    where = _short(".".join(map(str, wrong.absolute_path)))
    return f"the arguments of {name}{f' at {where}' if where else ''}: {_short(wrong.message)}"


def _depth(value: Any) -> int:
    """Returns how deep a JSON value is nested, as far as it matters."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        level = [
            part
            for each in level
            if isinstance(each, (dict, list))
            for part in (each.values() if isinstance(each, dict) else each)
        ]
        depth += 1
    return depth


def _short(text: str) -> str:
    """Returns a text with its middle left out where it is long: faults end with what is wrong."""
    return text if len(text) <= LENGTH else f"{text[: LENGTH // 2]} ... {text[-LENGTH // 2 :]}"
