"""Rules on replies that a program reads: JSON that follows a schema, and calls of the tools that
the environment offers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from ...protocols import Episode, Feedback, Judge, TurnwiseError
from ...tools import did_you_mean
from .text import INSTALL


class JsonSchema(Judge):
    """Scores whether replies are JSON that is valid by a schema: 1 or 0, and for `where: all` the
    share of valid ones. `details["errors"]` tells where others fail, `{"turn": 2, "error": "at
    $.items[0].price: 'x' is not of type 'number'"}`.

    Args:
        schema: a JSON Schema (any draft that its `$schema` names, else 2020-12), or the path of a
            JSON or YAML file with one. References to other files or addresses are not followed.
        where: "last" reply, or "all", which scores each.
        fenced: also accept a reply that is one Markdown code block.
    """

    def __init__(
        self,
        schema: Mapping[str, Any] | str,
        where: Literal["last", "all"] = "last",
        fenced: bool = False,
    ) -> None:
        if where not in ("last", "all"):
            raise ValueError(f"where must be 'last' or 'all', got {where!r}")
        self.schema = _loaded(schema) if isinstance(schema, str) else dict(schema)
        self.where, self.fenced = where, fenced
        self._validator = validator(self.schema)

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Scores the share of the replies asked about, all or the last, that fit the schema."""
        answers = []
        for episode in episodes:
            asked = range(len(episode.turns)) if self.where == "all" else [len(episode.turns) - 1]
            wrong = {
                k: error
                for k in asked
                if (error := self._error(episode.turns[k].action)) is not None
            }
            turns = tuple(float(k not in wrong) for k in asked)
            errors = [{"turn": k, "error": error} for k, error in wrong.items()]
            answers.append(
                Feedback(
                    episode.id,
                    score=sum(turns) / len(turns),
                    turn_scores=turns if self.where == "all" else None,
                    details={"errors": errors},
                )
            )
        return answers

    def _error(self, reply: str) -> str | None:
        fence = (
            re.fullmatch(r"\s*```\w*\n(.*?)\n?```\s*", reply, re.DOTALL) if self.fenced else None
        )
        try:
            return error_of(self._validator, parsed(fence[1] if fence else reply))
        except ValueError as error:
            return f"not JSON: {error}"


def _loaded(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(
            f"schema is a mapping, or the path of a JSON or YAML file; there is no file {path!r}"
        )
    text = Path(path).read_text(encoding="utf-8")
    try:
        found = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path!r} is not {'JSON' if path.endswith('.json') else 'YAML'}: {error}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path!r} holds {type(found).__name__}, not a schema, which is a mapping")
    return found


def validator(schema: Mapping[str, Any]) -> Any:
    """Makes a `jsonschema` validator that opens no file and no address.

    Raises:
        ValueError: no valid schema.
        ImportError: jsonschema is not installed.
    """
    try:
        import jsonschema
        import referencing
    except ImportError as error:
        raise ImportError(
            f"the judges 'json-schema' and 'tool-calls' need jsonschema: {INSTALL}"
        ) from error
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(dict(schema))
    except jsonschema.SchemaError as error:
        raise ValueError(f"no valid JSON Schema: at {error.json_path}: {error.message}") from error
    return kind(dict(schema), registry=referencing.Registry())


def error_of(validator: Any, value: Any) -> str | None:
    """Returns where and how a value breaks the schema; None where it does not. Of several errors
    the most informative one."""
    from jsonschema.exceptions import best_match

    error = best_match(validator.iter_errors(value))
    return None if error is None else f"at {error.json_path}: {error.message[:300]}"


def parsed(text: str) -> Any:
    """Parses strict JSON: no NaN, no Infinity.

    Raises:
        ValueError: it is not that.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class ToolCalls(Judge):
    """Scores whether tool calls are valid: every call is JSON, names a tool that the environment
    offers (`Episode.tools`), and has the arguments that the tool's schema asks for and no others. 1
    or 0 for a reply with calls, no opinion on one without; the score is the mean over those with
    calls, and a conversation without any abstains. `details["errors"]` tells what is wrong.

    Calls are read as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them
    with or without other text (Hermes, Qwen); as
    `<function=NAME><parameter=KEY>VALUE</parameter></function>`, within `<tool_call>` or alone
    (Qwen3-Coder), or with JSON in place of the parameters; as
    `<tool_call>NAME<arg_key>..</arg_key><arg_value>..</arg_value></tool_call>` (GLM); as `<invoke
    name="NAME">` with `<parameter name="KEY">` (MiniMax, Claude); after `[TOOL_CALLS]` (Mistral,
    `NAME[ARGS]{...}` too), `<|python_tag|>` (Llama) or `<|tool_call|>` (Granite, Phi); or as a
    reply that is nothing but JSON: one call or a list of them, with `arguments` or `parameters`, or
    in OpenAI's form with `function` or `tool_calls`. Arguments may be an object, or a string that
    holds one; values that are written as text are read by the type that the tool's schema gives
    them. A reply that calls in a form that is not known here gets no opinion
    (`details["unknown"]`). Thoughts are not looked at: what stands in `<think>`, and all before a
    `</think>` that nothing opened. Tools are read in OpenAI's, Anthropic's and MCP's form. An
    argument that a tool's `properties` do not name is an error unless its schema allows
    `additionalProperties`.
    """

    def __init__(self) -> None:
        validator({})  # says at once what must be installed

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Scores the share of the turns with tool calls in which every call fits a tool's
        schema."""
        answers = []
        for episode in episodes:
            tools = {name: validator(schema) for name, schema in map(_tool, episode.tools)}
            turns: list[float | None] = []
            errors, unknown = [], []
            for k, turn in enumerate(episode.turns):
                try:
                    calls = _calls(turn.action)
                except UnknownForm as form:
                    unknown.append({"turn": k, "form": str(form)})
                    turns.append(None)
                    continue
                wrong = [error for call in calls if (error := _call_error(call, tools)) is not None]
                errors += [{"turn": k, "error": error} for error in wrong]
                turns.append(float(not wrong) if calls else None)
            called = [score for score in turns if score is not None]
            if called:
                score = sum(called) / len(called)
                details = {"errors": errors} | ({"unknown": unknown} if unknown else {})
                answers.append(
                    Feedback(episode.id, score=score, turn_scores=tuple(turns), details=details)
                )
            elif unknown:
                why = f"a tool was called in a form that is not known: {unknown[0]['form']}"
                answers.append(Feedback.abstained(episode.id, why, details={"unknown": unknown}))
            else:
                answers.append(Feedback.abstained(episode.id, "no tool was called"))
        return answers


def _tool(tool: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns a tool's name and the schema of its arguments."""
    inner = tool.get("function", tool)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError(f"a tool of the environment has no name: {json.dumps(tool)[:200]}")
    schemas = [
        inner[key] for key in ("parameters", "input_schema", "inputSchema") if inner.get(key)
    ]
    schema: dict[str, Any] = {"type": "object", **(schemas[0] if schemas else {})}
    if "properties" in schema and not set(schema) & {
        "patternProperties",
        "allOf",
        "anyOf",
        "oneOf",
        "$ref",
    }:
        schema.setdefault("additionalProperties", False)
    return inner["name"], schema


class UnknownForm(TurnwiseError, ValueError):
    """A reply calls tools in a form that is not known here, so its validity cannot be judged."""


class Texts(dict[str, str]):
    """Arguments whose values were written as text, without their types."""


def _calls(reply: str) -> list[str | Mapping[str, Any]]:
    """Returns the calls a reply tries to make: as data where they could be read, else the text of
    what was tried.

    Raises:
        UnknownForm: it makes them in another way.
    """
    visible = _without_thoughts(reply)
    if "<tool_call>" in visible:
        inside = [part.partition("</tool_call>") for part in visible.split("<tool_call>")[1:]]
        return [each for text, end, _ in inside for each in (_inside(text) if end else [text])]
    if calls := _elements(visible):
        return calls
    visible = visible.strip()
    for mark in ("[TOOL_CALLS]", "<|python_tag|>", "<|tool_call|>"):
        if mark in visible:
            text = visible.partition(mark)[2].removesuffix("<|/tool_call|>").strip()
            named = re.findall(r"\s*([\w.-]+)\[ARGS\](.*?)(?=\[TOOL_CALLS\]|\Z)", text, re.DOTALL)
            if named:
                return [{"name": name, "arguments": arguments} for name, arguments in named]
            return _inside(text)
    if form := _OTHER.search(visible):
        raise UnknownForm(f"{visible[form.start() : form.start() + 100]!r}")
    if visible[:1] not in ("{", "["):
        return []
    try:
        values = _listed(parsed(visible))
    except ValueError:
        return [visible] if _TRIED.search(visible) else []
    return values if values and all(map(_is_call, values)) else []


def _without_thoughts(reply: str) -> str:
    """Returns a reply without its thoughts: some templates open them themselves, so that the reply
    has only their end."""
    text = re.sub(r"<(think|thinking|reasoning)>.*?(</\1>|\Z)", "", reply, flags=re.DOTALL)
    text = re.sub(r"\[THINK\].*?(\[/THINK\]|\Z)", "", text, flags=re.DOTALL)
    return re.split(r"</(?:think|thinking|reasoning)>|\[/THINK\]", text)[-1]


def _inside(text: str) -> list[str | Mapping[str, Any]]:
    """Returns the calls between marks of tool calls."""
    if calls := _elements(text):
        return calls
    pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", text, re.DOTALL)
    bare = re.fullmatch(r"\s*([\w.-]+)\s*(?:<arg_key>.*</arg_value>\s*)?", text, re.DOTALL)
    if bare and (pairs or "_" in bare[1]):
        return [{"name": bare[1], "arguments": Texts((key.strip(), value) for key, value in pairs)}]
    if re.match(r"\s*(<|[\w.]+\s*[(:\[]|\[\s*[\w.]+\()", text):
        raise UnknownForm(f"{text.strip()[:100]!r}")
    return _read(text)


def _elements(text: str) -> list[str | Mapping[str, Any]]:
    """Returns calls written as elements: `<function=NAME>`, `<invoke name="NAME">`, with parameters
    as elements or as JSON. One that does not end is returned as text."""
    calls: list[str | Mapping[str, Any]] = []
    for start, name, inner, end in _ELEMENT.findall(text):
        found = _PARAMETER.findall(inner)
        if not end:
            calls.append(f"{start}{inner}")
        elif found or not inner.strip():
            calls.append({"name": name, "arguments": Texts(found)})
        else:
            calls.append({"name": name, "arguments": inner})
    return calls


_ELEMENT = re.compile(
    r"""(<(?:function=|function name=|invoke name=)["']?([\w.:-]+)["']?>)(.*?)(</function>|</invoke>|(?=<function=|<invoke )|\Z)""",  # noqa: E501
    re.DOTALL,
)
_PARAMETER = re.compile(
    r"""<parameter(?:=| name=)["']?([\w.:-]+)["']?[^>]*>\n?(.*?)\n?(?:</parameter>|(?=<parameter)|\Z)""",  # noqa: E501
    re.DOTALL,
)
_OTHER = re.compile(  # DeepSeek, Kimi, Cohere, InternLM, Jamba, Gemma, gpt-oss, Llama's Python
    r"<[|｜]tool[▁_]|<\|action_start\|>|<\|START_ACTION\|>|</?tool_calls?>|</?function_calls?>|<start_function_call>|```tool_code"
    r"|<\|channel\|>commentary to=|<[\w-]+:tool_call>|<\|tool_|\A\[\s*[A-Za-z_][\w.]*\(.*\)\s*\]\Z",
    re.DOTALL,
)
# Invalid JSON that was meant as a call.
_TRIED = re.compile(r'"(?:name|function)"\s*:.*"(?:arguments|parameters)"\s*:', re.DOTALL)


def _read(text: str) -> list[str | Mapping[str, Any]]:
    try:
        return [
            each if isinstance(each, Mapping) else json.dumps(each)
            for each in _listed(parsed(text))
        ] or [text]
    except ValueError:
        return [text]


def _listed(value: Any) -> list[Any]:
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


def _call_error(call: str | Mapping[str, Any], tools: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with a call; None: nothing."""
    if isinstance(call, str):
        return f"not a JSON object: {call.strip()[:200]!r}"
    inner = call.get("function", call)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        return f"a call without the name of a tool: {json.dumps(call)[:200]}"
    name, arguments = inner["name"], inner.get("arguments", inner.get("parameters", {}))
    if name not in tools:
        return f"no tool {name!r}.{did_you_mean(name, tools)}"
    if isinstance(arguments, Texts):
        arguments = {key: _typed(text, tools[name].schema, key) for key, text in arguments.items()}
    if isinstance(arguments, str):
        try:
            arguments = parsed(arguments)
        except ValueError as error:
            return f"the arguments of {name!r} are not JSON: {error}"
    wrong = error_of(tools[name], arguments)
    return None if wrong is None else f"{name!r} {wrong}"


def _typed(text: str, schema: Mapping[str, Any], key: str) -> Any:
    """Returns a value that was written as text: unchanged where the tool takes a text there, else
    parsed as JSON or as Python writes it."""
    place = schema.get("properties", {}).get(key)
    if isinstance(place, Mapping):
        whole = {k: schema[k] for k in ("$schema", "$defs", "definitions") if k in schema} | dict(
            place
        )
        if error_of(validator(whole), text) is None:
            return text
    written = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)
    try:
        return parsed(written)
    except ValueError:
        return text
