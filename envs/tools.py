"""turnwise/Tools-v0: any dialogue, and tools that the player may call in it.

A reply that holds calls (`turnwise.tools.calls_in`) goes to the tools: what each returns is a
message of role "tool", and costs and earns nothing. Every other reply goes to the dialogue, whose
rewards, success and end are the episode's. A call that cannot be made, or that raises, is answered
with the reason; `info["calls"]` has name, arguments and, where it failed, by whose fault: the
agent's or the tool's.

Tools are Python functions ("MODULE:FUNCTION"), the public methods of a class ("MODULE:CLASS", one
for every episode), or those of an MCP server (`{mcp: [COMMAND, ...]}` or `{mcp: URL}`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import FunctionType
from typing import Any

import gymnasium

from ..protocols import Text
from ..tools import Call, UnknownForm, calls_in, named, tool_schema, validator
from .toolbox import Functions, Schema, Toolbox, ToolFailed

FORM = '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'
AT_ONCE = 16  # calls of a reply that are made
LONGEST = 10_000  # characters of a result that are shown
MIXED = "call {!r} and {!r} in replies of their own; nothing of this one was done"


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
            ValueError: two tools have one name, or the schema of one is none.
        """
        super().reset(seed=seed)
        observation, info = self.dialogue.reset(seed=seed, options=options)
        self._player = info.get("player")
        self._schemas = list(info.get("tools") or ())
        # What the dialogue has itself goes to the dialogue.
        self._own = {name for name, _ in map(tool_schema, self._schemas)}
        self._box_of: dict[str, Toolbox] = {}
        for box in self.toolboxes:
            for schema in box.open():
                name, parameters = tool_schema(schema)
                if name in self._box_of or name in self._own:
                    raise ValueError(f"two tools have the name {name!r}")
                if schema not in self._sound:
                    validator(parameters)  # says what is wrong with it
                    self._sound.append(schema)
                self._box_of[name] = box
                self._schemas.append(schema)
        return observation, {**info, "tools": self._schemas}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Makes the calls of a reply; one without goes to the dialogue."""
        try:
            calls = calls_in(action, self._schemas)
        except UnknownForm as form:
            why = f"the call {form} is in a form that is not known; write {FORM}"
            calls = [Call("", fault=why)]
        if len(calls) > AT_ONCE:
            why = f"a reply may make {AT_ONCE} calls; this one and those after it were not made"
            calls[AT_ONCE:] = [Call(calls[AT_ONCE].name, fault=why)]
        if not calls or any(call.name in self._own for call in calls):
            if attached := [call.name for call in calls if call.name in self._box_of]:
                # Nothing of such a reply is done: the dialogue would not know a part of it.
                own = next(call.name for call in calls if call.name in self._own)
                return self._answered(
                    [
                        Call(
                            call.name, call.arguments, call.fault or MIXED.format(own, attached[0])
                        )
                        for call in calls
                    ]
                )
            observation, reward, terminated, truncated, info = self.dialogue.step(action)
            self._player = info.get("player")
            return observation, float(reward), terminated, truncated, info
        return self._answered(calls)

    def _answered(self, calls: Sequence[Call]) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Makes calls; the observation is a message with each one's result."""
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
        try:
            super().__init__(made, [_toolbox(tool) for tool in tools])
        except BaseException:
            made.close()
            raise
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
        if not set(tool) <= {"mcp", "fresh", "env", "token"} or "mcp" not in tool:
            raise ValueError(
                "a tool is 'MODULE:NAME', {mcp: [COMMAND, ...]}, perhaps with `fresh` and `env`, or"
                f" {{mcp: URL}}, perhaps with `token`; it is not {dict(tool)}"
            )
        from .mcp_server import MCPTools

        return MCPTools(
            tool["mcp"], bool(tool.get("fresh", False)), tool.get("env"), tool.get("token")
        )
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
