"""What has tools, for `turnwise/Tools-v0`: the contract, and Python functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any, Protocol, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import to_json

Schema = Mapping[str, Any]


class ToolFailed(Exception):
    """A tool says that it could not do what was asked; the message is its result.

    Attributes:
        fault: whose fault it is: "agent" or "tool".
    """

    def __init__(self, message: str, fault: str = "tool") -> None:
        super().__init__(message)
        self.fault = fault


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
