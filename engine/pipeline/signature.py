"""The options of a part, checked against its signature before it is made.

What a factory takes stands in its signature, so the signature is its option model: pydantic checks
values against the annotations, ranges and choices among them (`Annotated[int, Field(ge=1)]`,
`Literal["mean", "min"]`). This holds for parts of plugins as for those that come along.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from ..errors import PluginError
from ..util.secrets import redacted
from ..util.section import Section, is_number
from ..util.suggest import did_you_mean, near_names

# Parameters that the engine fills: no config can, but `policy` is passed as options are.
PLUGINS, POLICY = "plugins", "policy"


def checked_options(
    what: str, factory: Callable[..., Any], positional: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns options as a factory takes them: text that is a number is one, where a number is
    taken (YAML reads `1e-3` as text).

    Args:
        what: the part, for messages, e.g. "judge 'length'".
        factory: a class or function.
        positional: how many of its first parameters are given by position, and are no options.
        options: by name.

    Raises:
        PluginError: an option that the factory does not take, with near ones that it does; a value
            that does not fit its annotation; one that is missing.
    """
    parameters = parameters_of(factory)
    if parameters is None:
        return dict(options)  # a builtin without a signature speaks for itself
    parameters = [p for p in parameters[positional:] if p.name != PLUGINS]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for option in options:
            if option not in named:
                raise PluginError(f"{what} has no option {option!r}.{did_you_mean(option, named)}")
    missing = [
        name
        for name, p in named.items()
        if p.default is p.empty and name not in options and name != POLICY
    ]
    if missing:
        raise PluginError(f"{what} needs the option {', '.join(map(repr, missing))}")
    if inspect.isclass(factory) and issubclass(factory, Section):
        return dict(options)  # it checks its values itself, all of them at once
    kinds = _annotations(factory)
    return {
        name: _fitting(what, name, kinds[name], value)
        if name in kinds and name != POLICY
        else value
        for name, value in options.items()
    }


def parameters_of(factory: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """Returns what a factory takes; None for a builtin that does not say."""
    try:
        return list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):
        return None


def _fitting(what: str, name: str, kind: Any, value: Any) -> Any:
    """Returns a value as its annotation has it."""
    try:
        if is_number(kind) and isinstance(value, bool):
            raise PluginError(f"{what}: {name}: must be a number, got {value}")
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        [first, *_] = error.errors()
        within = ".".join(map(str, first["loc"]))
        place = f"{name}.{within}" if within and isinstance(value, (Mapping, list)) else name
        message = first["msg"].removeprefix("Value error, ")
        shown = redacted({name: value})[name]
        near = near_names(str(value), [k for k in get_args(kind) if isinstance(k, str)])[:1]
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise PluginError(f"{what}: {place}: {message}, got {shown!r}{hint}") from None


def _adapter(kind: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a kind that brings a configuration of its own
        return TypeAdapter(kind)


def _annotations(factory: Callable[..., Any]) -> dict[str, Any]:
    """Returns what the parameters of a factory are annotated with; those whose names are imported
    for type checkers only are left out, and not checked.

    The fields of a dataclass are annotated in the modules of its base classes.
    """
    found: dict[str, Any] = {}
    if inspect.isclass(factory):
        for kind in reversed(factory.__mro__):
            found |= _evaluated(inspect.get_annotations(kind), vars(sys.modules[kind.__module__]))
    made = factory.__init__ if inspect.isclass(factory) else factory
    if inspect.isfunction(made):
        found |= _evaluated(inspect.get_annotations(made), made.__globals__)
    return found


def _evaluated(annotations: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, kind in annotations.items():
        try:
            found[name] = eval(kind, dict(names)) if isinstance(kind, str) else kind
        except (NameError, AttributeError):
            continue
    return found
