"""Calls of tools in a reply: found in the spellings that models have, and checked against the
schemas of the tools.

Read are the JSON of Hermes and Qwen (`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`,
any number of them, with or without other text), the elements of Qwen3-Coder
(`<function=NAME><parameter=KEY>VALUE</parameter></function>`, within `<tool_call>` or alone, or
with JSON in place of the parameters) and of MiniMax and Claude (`<invoke name="NAME">`), GLM's
(`<tool_call>NAME<arg_key>..</arg_key><arg_value>..</arg_value></tool_call>`), what follows
`[TOOL_CALLS]` (Mistral, `NAME[ARGS]{...}` too), `<|python_tag|>` (Llama), `<|tool_call|>` (Granite,
Phi) or `commentary to=functions.NAME` (gpt-oss), and replies that are nothing but JSON: calls, a
list of them, or OpenAI's form with `function` or `tool_calls`.

The first mark in a reply says how its calls are spelled, and each is read to its end: what an
argument quotes is no call. Nor is what stands in thoughts: in `<think>`, or before a `</think>`
that nothing opened; but what an argument quotes is no thought either. Where gpt-oss's messages have
their marks (`<|message|>`), calls are those that are addressed to a function.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import TurnwiseError
from .json_schema import error_of, parsed, parsed_from, validator
from .suggest import did_you_mean

Schema = Mapping[str, Any]
DEEPEST = 20  # how far arguments may be nested
CLOSINGS = 8  # ends of thoughts after which a reply that is JSON is looked for
LENGTH = 200  # characters of a reply that a fault quotes

_ELEMENT = re.compile(r"""<(?:function=|function name=|invoke name=)["']?([\w.:-]+)["']?>""")
_PARAMETER = re.compile(r"""\s*<parameter(?:=| name=)["']?([\w.:-]+)["']?[^>]*>\n?""")
_CLOSED = re.compile(r"\s*</(?:function|invoke)>")
_CHANNEL = re.compile(
    r"(?:\bto=functions\.([\w.-]+)\s*<\|channel\|>\s*commentary"
    r"|\bcommentary\s+to=functions\.([\w.-]+))(?:\s|json\b|<\|[a-z]+\|>)*(?=\{)"
)
_ADDRESSED = re.compile(
    r"\bto=functions\.([\w.-]+)"
    r"(?:\s|json\b|code\b|commentary\b|analysis\b|<\|(?:channel|constrain)\|>)*<\|message\|>"
)
_MESSAGE_END = re.compile(r"<\|(?:call|end|return|start|channel)\|>")
_THOUGHTS = re.compile(r"<(/?)(?:think|thinking|reasoning)>|\[(/?)THINK\]")
_VALUE = re.compile(r"<parameter\b.*?</parameter>|<arg_value>.*?</arg_value>", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w*)?\[ARGS\]")
_LISTS = ("[TOOL_CALLS]", "<|python_tag|>", "<|tool_call|>")
# What models that have a token for it begin or divide a call with.
MARKERS = frozenset((*_LISTS, "<tool_call>", "</tool_call>", "[ARGS]", "[CALL_ID]"))
_MARK = re.compile(
    "|".join(["<tool_call>", *map(re.escape, _LISTS), _ELEMENT.pattern, _CHANNEL.pattern])
)
_OTHER = re.compile(  # DeepSeek, Kimi, Cohere, InternLM, Jamba, Gemma, Llama's Python
    r"<[|｜]tool[▁_]|<\|action_start\|>|<\|START_ACTION\|>|</?tool_calls?>|</?function_calls?>"
    r"|<start_function_call>|```tool_code|<[\w-]+:tool_call>|<\|tool_"
    r"|\A\[\s*[A-Za-z_][\w.]*\(.*\)\s*\]\Z",
    re.DOTALL,
)
# Invalid JSON that was meant as a call.
_TRIED = re.compile(r'"(?:name|function)"\s*:.*"(?:arguments|parameters)"\s*:', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool.

    Attributes:
        arguments: as far as they could be read.
        fault: why it cannot be made, in words that its writer can use; empty where it can.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""


class UnknownForm(TurnwiseError, ValueError):
    """A reply calls tools in a form that is not known here."""


class _Texts(dict[str, str]):
    """Arguments whose values were written as text, without their types."""


_Spelled = str | Mapping[str, Any]  # a call as data, or the text of what was tried


def calls_in(reply: str, tools: Sequence[Schema]) -> list[Call]:
    """Returns the calls of tools in a reply, in order; none where it is only words.

    Args:
        reply: as the model wrote it.
        tools: the schemas of the tools that there are, in OpenAI's, Anthropic's or MCP's form. An
            argument that a tool's `properties` do not name is a fault, unless its schema allows
            `additionalProperties`.

    Raises:
        UnknownForm: it makes them in another way.
        ValueError: a tool has no name, or no valid schema.
        ImportError: jsonschema is not installed.
    """
    spelled = _spelled(reply)
    known = dict(map(tool_schema, tools)) if spelled else {}
    return [_checked(call, known) for call in spelled]


def words_in(reply: str) -> str:
    """Returns the words of a reply that makes calls: what stands before the first one, without
    thoughts."""
    words = without_thoughts(reply)
    mark = _MARK.search(words) or _ADDRESSED.search(words)
    return words[: mark.start()].strip() if mark else ""


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """Returns a call as a scripted player writes it, in the JSON of Hermes and Qwen."""
    call = json.dumps({"name": name, "arguments": dict(arguments)})
    return f"<tool_call>\n{call}\n</tool_call>"


def tool_schema(tool: Schema) -> tuple[str, dict[str, Any]]:
    """Returns a tool's name and the schema of its arguments.

    Raises:
        ValueError: it has no name.
    """
    inner = tool.get("function", tool)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError(f"a tool of the environment has no name: {json.dumps(tool)[:LENGTH]}")
    schemas = [inner[k] for k in ("parameters", "input_schema", "inputSchema") if inner.get(k)]
    schema: dict[str, Any] = {"type": "object", **(schemas[0] if schemas else {})}
    composed = set(schema) & {"patternProperties", "allOf", "anyOf", "oneOf", "$ref"}
    if "properties" in schema and not composed:
        schema.setdefault("additionalProperties", False)
    return inner["name"], schema


# What is written.


def _spelled(reply: str) -> list[_Spelled]:
    """Returns the calls a reply tries to make."""
    for text in (reply.strip(), without_thoughts(reply).strip()):
        if text[:1] in ("{", "[") and (values := _whole(text)) is not None:
            return values if values and all(map(_is_call, values)) else []
    if "<|message|>" in text and (calls := list(_addressed(text))):
        return calls
    mark = _MARK.search(text)
    if mark is None:
        if form := _OTHER.search(text):
            raise UnknownForm(f"{text[form.start() : form.start() + 100]!r}")
        return [text] if text[:1] in ("{", "[") and _TRIED.search(text) else []
    if mark[0] == "<tool_call>":
        return list(_tagged(text, mark.start()))
    if mark[0] in _LISTS:
        return list(_listed(text, mark[0], mark.start()))
    if mark[0].startswith("<"):
        return list(_elements(text, mark.start()))
    return list(_channels(text))


def without_thoughts(reply: str) -> str:
    """Returns a reply without its thoughts: some templates open them themselves, so that the reply
    has only their end."""
    kept, begin, opened = "", 0, False
    arguments = iter(_arguments(reply) if _THOUGHTS.search(reply) else ())
    quoted = next(arguments, None)
    for mark in _THOUGHTS.finditer(reply):
        while quoted and quoted[1] <= mark.start():
            quoted = next(arguments, None)
        if quoted and quoted[0] <= mark.start():
            continue
        if mark[1] or mark[2]:  # closes them
            kept, begin, opened = kept if opened else "", mark.end(), False
        elif not opened:
            kept, opened = kept + reply[begin : mark.start()], True
    return kept if opened else kept + reply[begin:]


def _arguments(reply: str) -> list[tuple[int, int]]:
    """Returns where the arguments of calls stand, whether they are thoughts or not, in order."""
    found, until = list[tuple[int, int]](), 0
    for mark in re.finditer(f"{_MARK.pattern}|{_ADDRESSED.pattern}|{_NAMED.pattern}", reply):
        at = _after(reply, mark.end(), "")
        if at < until or not reply.startswith(("{", "["), at):
            continue
        try:
            until = parsed_from(reply, at)[1]
        except ValueError:
            continue
        found.append((at, until))
    # A reply may be nothing but JSON after its thoughts.
    ends = [mark.end() for mark in _THOUGHTS.finditer(reply) if mark[1] or mark[2]]
    for at in (_after(reply, end, "") for end in ends[:CLOSINGS]):
        if reply.startswith(("{", "["), at) and _whole(reply[at:].rstrip()) is not None:
            found.append((at, len(reply)))
            break
    return sorted([*found, *(value.span() for value in _VALUE.finditer(reply))])


def _whole(text: str) -> list[Any] | None:
    """Returns the values of a reply that is nothing but JSON (Llama puts `;` between two); None
    where it is not."""
    values, at = list[Any](), 0
    while at < len(text):
        try:
            value, at = parsed_from(text, at)
        except ValueError:
            return None
        values += _each(value)
        at = _after(text, at)
    return values


def _tagged(text: str, at: int) -> Iterator[_Spelled]:
    """Yields the calls that begin with <tool_call>."""
    while at >= 0:
        at = _after(text, at + len("<tool_call>"), "")
        end = text.find("</tool_call>", at)
        end = len(text) if end < 0 else end
        if text.startswith(("{", "["), at):
            calls, at = _values(text, at, end)
            yield from calls
        elif element := _ELEMENT.match(text, at):
            calls, at = _in_row(text, element)
            yield from calls
        else:
            yield from _inside(text[at:end])
            at = end
        at = text.find("<tool_call>", at)


def _listed(text: str, mark: str, at: int) -> Iterator[_Spelled]:
    """Yields the calls that follow a mark, named or in JSON."""
    while at >= 0:
        at = _after(text, at + len(mark), "")
        if named := _NAMED.match(text, at):
            try:
                arguments, at = parsed_from(text, named.end())
            except ValueError:
                arguments, at = text[named.end() :], len(text)
            yield {"name": named[1], "arguments": arguments}
        elif text.startswith(("{", "["), at):
            calls, at = _values(text, at, len(text))
            yield from calls
        else:
            yield from _inside(text[at:])
            return
        at = text.find(mark, at)


def _elements(text: str, at: int) -> Iterator[_Spelled]:
    """Yields the calls that are elements, wherever they stand."""
    while element := _ELEMENT.search(text, at):
        calls, at = _in_row(text, element)
        yield from calls


def _channels(text: str) -> Iterator[_Spelled]:
    """Yields the calls in the channel for them."""
    at = 0
    while match := _CHANNEL.search(text, at):
        try:
            arguments, at = parsed_from(text, match.end())
        except ValueError:
            arguments, at = text[match.end() :], len(text)
        yield {"name": match[1] or match[2], "arguments": arguments}


def _addressed(text: str) -> Iterator[_Spelled]:
    """Yields the messages that are addressed to a function."""
    at = 0
    while header := _ADDRESSED.search(text, at):
        at = _after(text, header.end(), "")
        try:
            arguments, at = parsed_from(text, at)
        except ValueError:
            end = _MESSAGE_END.search(text, at)
            until = end.start() if end else len(text)
            arguments, at = text[at:until], until
        yield {"name": header[1], "arguments": arguments}


def _values(text: str, at: int, end: int) -> tuple[list[_Spelled], int]:
    """Returns the calls of the JSON values that follow each other, and where they end; what cannot
    be read is a text up to `end`."""
    calls: list[_Spelled] = []
    while text.startswith(("{", "["), at):
        try:
            value, until = parsed_from(text, at)
        except ValueError:
            return [*calls, text[at:end]], end
        found = _each(value) or [text[at:until]]
        calls += [call if isinstance(call, Mapping) else json.dumps(call) for call in found]
        at = _after(text, until)
    return calls, at


def _in_row(text: str, element: re.Match[str]) -> tuple[list[_Spelled], int]:
    """Returns the calls of the elements that follow each other, and where they end."""
    calls: list[_Spelled] = []
    following: re.Match[str] | None = element
    while following:
        call, at = _element(text, following)
        calls.append(call)
        following = _ELEMENT.match(text, _after(text, at))
    return calls, at


def _element(text: str, opening: re.Match[str]) -> tuple[_Spelled, int]:
    """Returns the call of an element, and where it ends; one that does not end is text."""
    name, at, texts = opening[1], opening.end(), _Texts()
    while parameter := _PARAMETER.match(text, at):
        end = text.find("</parameter>", parameter.end())
        if end < 0:
            return text[opening.start() :], len(text)
        texts[parameter[1]] = text[parameter.end() : end].removesuffix("\n")
        at = end + len("</parameter>")
    arguments: Any = texts
    if not texts and not _CLOSED.match(text, at):
        try:
            arguments, at = parsed_from(text, at)
        except ValueError:
            end = text.find("</", at)
            end = len(text) if end < 0 else end
            arguments, at = text[at:end], end
    closing = _CLOSED.match(text, at)
    if closing is None:
        return text[opening.start() : at], at
    return {"name": name, "arguments": arguments}, closing.end()


def _inside(text: str) -> list[_Spelled]:
    """Returns the calls between marks that are neither JSON nor elements.

    Raises:
        UnknownForm: it is another language.
    """
    pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", text, re.DOTALL)
    bare = re.fullmatch(r"\s*([\w.-]+)\s*(?:<arg_key>.*</arg_value>\s*)?", text, re.DOTALL)
    if bare:
        texts = _Texts((key.strip(), value) for key, value in pairs)
        return [{"name": bare[1], "arguments": texts}]
    if re.match(r"\s*(<|[\w.]+\s*[(:\[]|\[\s*[\w.]+\()", text):
        raise UnknownForm(f"{text.strip()[:100]!r}")
    return [text]


def _after(text: str, at: int, skipped: str = ";") -> int:
    """Returns the next place that is neither space nor a separator."""
    while at < len(text) and (text[at].isspace() or text[at] in skipped):
        at += 1
    return at


def _each(value: Any) -> list[Any]:
    if isinstance(value, Mapping) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    return value if isinstance(value, list) else [value]


def _is_call(value: Any) -> bool:
    """Returns whether JSON is a call, and not an answer in JSON that has a name in it."""
    if not isinstance(value, Mapping):
        return False
    inner = value.get("function", value)
    return (
        isinstance(inner, Mapping)
        and "name" in inner
        and bool({"arguments", "parameters"} & set(inner))
    )


# What is wrong with it.


def _checked(call: _Spelled, known: Mapping[str, Schema]) -> Call:
    """Returns a call with its arguments in their types, or with its fault."""
    if isinstance(call, str):
        if call.startswith("<"):
            return Call("", fault=f"a call that does not end: {_quoted(call)}")
        try:
            parsed(call)
        except ValueError as error:
            return Call("", fault=f"not a JSON object: {error}: {_quoted(call)}")
        return Call("", fault=f"not a JSON object with a name: {_quoted(call)}")
    inner = call.get("function", call)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        return Call("", fault=f"a call without the name of a tool: {_quoted(json.dumps(call))}")
    name, arguments = inner["name"], inner.get("arguments", inner.get("parameters"))
    if arguments is None:
        arguments = {}
    if isinstance(arguments, _Texts):
        schema = known.get(name, {})
        arguments = {key: _typed(text, schema, key) for key, text in arguments.items()}
    try:
        arguments = parsed(arguments) if isinstance(arguments, str) else arguments
        unread = _unkeepable(arguments)
    except ValueError as error:
        unread = f"are not JSON: {error}"
    kept = arguments if isinstance(arguments, Mapping) and not unread else {}
    if name not in known:
        return Call(name[:LENGTH], kept, f"no tool {_quoted(name)}.{did_you_mean(name, known)}")
    if unread:
        return Call(name, fault=f"the arguments of {name!r} {unread}")
    wrong = error_of(validator(known[name]), arguments)
    return Call(name, kept, f"{name!r} {wrong}") if wrong else Call(name, arguments)


def _quoted(text: str) -> str:
    """Returns the beginning of a text in quotation marks, in signs that every file holds."""
    return ascii(text.strip()[:LENGTH])


def _unkeepable(value: Any) -> str:
    """Returns why a JSON value could not be written down; empty where it could."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            part
            for each in level
            if isinstance(each, (dict, list))
            for part in (each.values() if isinstance(each, dict) else each)
        ]
    if level:
        return f"are nested more than {DEEPEST} deep"
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "are not valid Unicode: half a surrogate pair is in them"
    return ""


def _typed(text: str, schema: Schema, key: str) -> Any:
    """Returns a value that was written as text: unchanged where the tool asks for a type that takes
    a text, else parsed as JSON or as Python writes it."""
    place = schema.get("properties", {}).get(key)
    if isinstance(place, Mapping) and {"type", "anyOf", "oneOf", "enum", "$ref"} & set(place):
        whole = {k: schema[k] for k in ("$schema", "$defs", "definitions") if k in schema}
        if error_of(validator({**whole, **place}), text) is None:
            return text
    written = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)
    try:
        return parsed(written)
    except ValueError:
        return text
