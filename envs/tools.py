"""turnwise/Tools-v0: any dialogue, and tools that the player may call in it.

A reply that holds calls (see `calls`) goes to the tools: what each returns is a message of role
"tool", and costs and earns nothing. Every other reply goes to the dialogue, whose rewards, success
and end are the episode's. A call that cannot be made, or that raises, is answered with the reason;
`info["calls"]` has name, arguments and, where it failed, by whose fault: the agent's or the tool's.

Tools are Python functions ("MODULE:FUNCTION"), the public methods of a class ("MODULE:CLASS", one
for every episode), or those of an MCP server (`{mcp: [COMMAND, ...]}` or `{mcp: URL}`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType, MethodType
from typing import Any, Protocol, get_type_hints

import gymnasium
from jsonschema.validators import validator_for
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import to_json

from ..protocols import Text
from .answers import named
from .calls import Call, Schema, ToolFailed, calls_in, inner

LONGEST = 10_000  # characters of a result that are shown


class Toolbox(Protocol):
    """The protocol of what has tools."""

    def open(self) -> Sequence[Schema]:
        """Begins an episode. Returns the schemas of the tools."""

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Calls a tool and returns what it returned, as text.

        Raises:
            ToolFailed: it could not do it. Any other exception ends the episode as failed.
        """

    def close(self) -> None:
        """Frees what the tools hold."""


class Functions:
    """Python functions as tools. Their schemas are made of names, types and docstrings.

    Args:
        make: returns them, for every episode.
    """

    def __init__(self, make: Callable[[], Iterable[Callable[..., Any]]]) -> None:
        self._make = make
        self._functions: dict[str, Callable[..., Any]] = {}

    def open(self) -> Sequence[Schema]:
        """Makes the functions of an episode. Returns their schemas.

        Raises:
            ValueError: the arguments of one have no names.
        """
        self._functions = {f.__name__: f for f in self._make()}
        return [_signature(f).schema for f in self._functions.values()]

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Calls a function. Returns text as it is, and other values as JSON.

        Raises:
            ToolFailed: it raised, or cannot take the arguments.
        """
        function = self._functions[name]
        try:
            given = _signature(function).read(arguments)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise ToolFailed(f"the arguments of {name}: {'; '.join(wrong)}", "agent") from error
        try:
            value = function(**given)
            return value if isinstance(value, str) else to_json(value, fallback=str).decode()
        except Exception as error:
            raise ToolFailed(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Does nothing: functions hold nothing."""


@dataclass(frozen=True, slots=True)
class _Signature:
    """What a function's calls look like: its arguments as a model, whose fields have their names as
    aliases, and its schema."""

    arguments: type[BaseModel]
    schema: Schema

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns arguments in the types that the function asks for."""
        model = self.arguments.model_validate(given)
        fields = self.arguments.model_fields
        return {str(field.alias): getattr(model, key) for key, field in fields.items()}


def _signature(function: Callable[..., Any]) -> _Signature:
    """Returns the signature of a function, or of a method, which all objects of its class share.

    Raises:
        ValueError: its arguments have no names.
    """
    if isinstance(function, MethodType):
        return _signature_of(function.__func__, True)
    return _signature_of(function, False)


@lru_cache(maxsize=1024)
def _signature_of(function: Callable[..., Any], method: bool) -> _Signature:
    hints, fields = get_type_hints(function, include_extras=True), dict[str, Any]()
    name = function.__name__
    for i, parameter in enumerate([*inspect.signature(function).parameters.values()][method:]):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(
                f"the tool {name!r} takes {parameter}: every argument must have a name"
            )
        default = ... if parameter.default is parameter.empty else parameter.default
        field = Field(default, alias=parameter.name, title=parameter.name)
        fields[f"argument_{i}"] = (hints.get(parameter.name, Any), field)
    model = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    parameters = model.model_json_schema()
    for shown in (parameters, *parameters.get("properties", {}).values()):
        shown.pop("title", None)  # the name once more
    schema = {
        "name": name,
        "description": inspect.getdoc(function) or "",
        "parameters": parameters,
    }
    return _Signature(model, {"type": "function", "function": schema})


class WithTools(gymnasium.Env[str, str]):
    """A dialogue with tools; see the module's docstring.

    Args:
        dialogue: where replies without a call go.
        toolboxes: what has the tools.
    """

    observation_space = action_space = Text(1_000_000)

    def __init__(self, dialogue: gymnasium.Env[str, str], toolboxes: Sequence[Toolbox]) -> None:
        if inspect.iscoroutinefunction(dialogue.unwrapped.step):
            raise ValueError(f"{dialogue} has coroutines, and tools take none")
        self.dialogue, self.toolboxes = dialogue, toolboxes
        self._sound: list[Schema] = []
        own = dialogue.unwrapped.metadata
        # It may be copied, and what its tools hold may not.
        self.metadata = {**own, "special_tokens": True, "snapshots": False}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begins the dialogue, and tells of the tools.

        Raises:
            ValueError: two tools have one name.
            jsonschema.SchemaError: a tool's schema is none.
        """
        super().reset(seed=seed)
        observation, info = self.dialogue.reset(seed=seed, options=options)
        self._player = info.get("player")
        self._schemas = list(info.get("tools") or ())
        # What the dialogue has itself goes to the dialogue.
        self._own = {inner(schema)["name"] for schema in self._schemas}
        self._box_of: dict[str, Toolbox] = {}
        for box in self.toolboxes:
            for schema in box.open():
                name = inner(schema)["name"]
                if name in self._box_of or name in self._own:
                    raise ValueError(f"two tools have the name {name!r}")
                if schema not in self._sound:
                    parameters = inner(schema).get("parameters") or {}
                    validator_for(parameters).check_schema(parameters)
                    self._sound.append(schema)
                self._box_of[name] = box
                self._schemas.append(schema)
        return observation, {**info, "tools": self._schemas}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Makes the calls of a reply; one without goes to the dialogue."""
        calls = calls_in(action, self._schemas)
        if not calls or any(call.name in self._own for call in calls):
            observation, reward, terminated, truncated, info = self.dialogue.step(action)
            self._player = info.get("player")
            return observation, float(reward), terminated, truncated, info
        results, kept = [], []
        for call in calls:
            text, fault = self._called(call)
            results.append(text)
            kept.append({"name": call.name, "arguments": dict(call.arguments), "fault": fault})
        info = {"role": "tool", "parts": results, "calls": kept}
        if self._player is not None:
            info["player"] = self._player  # it is still that seat's turn
        return "\n\n".join(results), 0.0, False, False, info

    def _called(self, call: Call) -> tuple[str, str]:
        """Makes a call. Returns its result, and where it failed whose fault it is: "agent" or
        "tool"."""
        if call.fault:
            return f"Error: {call.fault}", "agent"
        try:
            text, fault = self._box_of[call.name].call(call.name, call.arguments), ""
        except ToolFailed as error:
            text, fault = f"Error: {error}", error.fault
        text = text.encode("utf-8", "backslashreplace").decode()
        if len(text) > LONGEST:
            text = f"{text[:LONGEST]} [{len(text) - LONGEST:,} more characters]"
        return text, fault

    def close(self) -> None:
        """Closes the dialogue and the tools."""
        with ExitStack() as closing:
            closing.callback(self.dialogue.close)
            for box in self.toolboxes:
                closing.callback(box.close)


class Tools(WithTools):
    """A registered dialogue, with tools that are named.

    Args:
        env: the dialogue: its id, or `{id: ..., kwargs: {...}}`.
        tools: what can be called in it, see the module's docstring.

    Raises:
        ValueError: there is no such function, class or dialogue, or a tool is none of the three
            kinds.
    """

    def __init__(self, env: str | Mapping[str, Any], tools: Sequence[str | Mapping[str, Any]]):
        spec: dict[str, Any] = {"id": env} if isinstance(env, str) else dict(env)
        if isinstance(tools, str) or not tools or set(spec) - {"id", "kwargs"} or "id" not in spec:
            raise ValueError("Tools takes env: ID or {id, kwargs}, and a list of tools")
        try:
            made = gymnasium.make(spec["id"], disable_env_checker=True, **spec.get("kwargs", {}))
        except gymnasium.error.Error as error:
            raise ValueError(f"the dialogue {spec['id']!r} cannot be made: {error}") from error
        super().__init__(made, [_toolbox(tool) for tool in tools])
        own = made.has_wrapper_attr("players") and made.get_wrapper_attr("players")
        self.players = {name: _of_dialogue(player) for name, player in (own or {}).items()}


def _of_dialogue(player: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a player of the dialogue as one of the whole; it calls no tools."""
    return lambda env, rng: player(env.dialogue.unwrapped, rng)


def _toolbox(tool: str | Mapping[str, Any]) -> Toolbox:
    """Returns what a config names as tools.

    Raises:
        ValueError: it names none.
    """
    if isinstance(tool, Mapping):
        if not set(tool) <= {"mcp", "fresh", "env"} or "mcp" not in tool:
            raise ValueError(
                "a tool is 'MODULE:NAME', {mcp: [COMMAND, ...]} or {mcp: URL}, the latter two"
                f" perhaps with `fresh` and `env`; it is not {dict(tool)}"
            )
        from .mcp_server import MCPTools

        return MCPTools(tool["mcp"], fresh=bool(tool.get("fresh", False)), env=tool.get("env"))
    if not isinstance(tool, str) or ":" not in tool:
        raise ValueError(f"a tool is 'MODULE:NAME', or {{mcp: ...}}; it is not {tool!r}")
    found = named(tool)
    if inspect.isclass(found):
        return Functions(lambda: public_methods(found()))
    if not inspect.isroutine(found) or inspect.iscoroutinefunction(found):
        raise ValueError(f"{tool!r} is neither a class nor a function that returns at once")
    return Functions(lambda: [found])


def public_methods(owner: object) -> list[Callable[..., Any]]:
    """Returns the methods of an object whose names do not begin with an underscore.

    Raises:
        ValueError: one is a coroutine.
    """
    kinds = (FunctionType, staticmethod, classmethod)
    names = [
        name
        for name, member in inspect.getmembers_static(type(owner))
        if isinstance(member, kinds) and not name.startswith("_")
    ]
    methods = [getattr(owner, name) for name in names]
    for method in methods:
        if inspect.iscoroutinefunction(method):
            raise ValueError(
                f"the tool {method.__name__!r} is a coroutine, and tools return at once"
            )
    return methods
