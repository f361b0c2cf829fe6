"""The options of a part, checked against its signature before it is made.

What a factory takes stands in its signature, so the signature is its option model: pydantic checks
values against the annotations, ranges and choices among them (`Annotated[int, Field(ge=1)]`,
`Literal["mean", "min"]`). This holds for parts of plugins as for those that come along.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..errors import PluginError
from ..util.secrets import redacted
from ..util.section import Section, is_number
from ..util.suggest import did_you_mean, near_names

# Parameters that the engine fills: no config can, but `policy` is passed as options are.
PLUGINS, POLICY = "plugins", "policy"
SHOWN = 200  # characters of a value in a message


def checked_options(
    what: str, factory: Callable[..., Any], positional: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns options as a factory takes them: what was given, but for text where a number is
    taken, which becomes one (YAML reads `1e-3` as text).

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
    kinds = annotations_of(factory)
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
    """Returns a value that fits its annotation: the same, or the number that a text is."""
    if is_number(kind) and isinstance(value, bool):
        raise PluginError(f"{what}: {name}: must be a number, got {value}")
    adapter = _adapter(kind)
    if adapter is None:
        return value
    try:
        found = adapter.validate_python(value)
    except ValidationError as error:
        raise PluginError(f"{what}: {_described(name, kind, value, error)}") from None
    # Whatever else pydantic makes of a value (a set of a list, an iterator) is its own.
    return found if isinstance(value, str) and is_number(kind) else value


def _described(name: str, kind: Any, value: Any, error: ValidationError) -> str:
    """Returns what is wrong with a value, and where in it; secrets are not shown."""
    mistakes = error.errors()
    place, at = name, value
    for step in mistakes[0]["loc"]:  # the branches of a union stand there too
        inside = isinstance(at, Mapping) and step in at
        if inside or (isinstance(at, Sequence) and isinstance(step, int) and step < len(at)):
            place, at = f"{place}.{step}", at[step]
    wanted = dict.fromkeys(m["msg"].removeprefix("Value error, ") for m in mistakes)
    message = ", or ".join([*wanted][:3])
    if repr(redacted({name: value})[name]) != repr(value):  # arrays compare one by one
        quotes = ": put it in quotes" if isinstance(at, (int, float)) else ""
        return f"{place}: {message}, got {type(at).__name__}, which is not shown here{quotes}"
    near = near_names(str(at), [k for k in get_args(kind) if isinstance(k, str)])[:1]
    hint = f". Did you mean {near[0]!r}?" if near else ""
    shown = repr(at)
    return f"{place}: {message}, got {shown if len(shown) < SHOWN else shown[:SHOWN] + '...'}{hint}"


def _adapter(kind: Any) -> TypeAdapter[Any] | None:
    """Returns what checks values against an annotation; None where pydantic cannot."""
    # A kind may bring a configuration of its own.
    for config in (ConfigDict(arbitrary_types_allowed=True), None):
        try:
            return TypeAdapter(kind, config=config)
        except Exception:  # whatever an annotation is that means something to its author alone
            continue
    return None


def annotations_of(factory: Callable[..., Any]) -> dict[str, Any]:
    """Returns what the parameters of a factory are annotated with; what cannot be read, as a name
    that is imported for type checkers only, is left out, and not checked.

    The fields of a dataclass are annotated in the modules of its base classes.
    """
    while isinstance(factory, functools.partial):
        factory = factory.func
    if inspect.isclass(factory) and dataclasses.is_dataclass(factory):
        found: dict[str, Any] = {}
        for kind in reversed(factory.__mro__):
            found |= _evaluated(inspect.get_annotations(kind), vars(sys.modules[kind.__module__]))
        return found
    made: Any = factory.__init__ if inspect.isclass(factory) else factory
    if not inspect.isroutine(made):
        made = type(made).__call__
    made = inspect.unwrap(made.__func__ if inspect.ismethod(made) else made)
    if not inspect.isfunction(made):
        return {}
    return _evaluated(inspect.get_annotations(made), made.__globals__)


def _evaluated(annotations: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, kind in annotations.items():
        try:
            kind = eval(kind, dict(names)) if isinstance(kind, str) else kind
        except Exception:  # an annotation may be any text
            continue
        found[name] = kind.type if isinstance(kind, dataclasses.InitVar) else kind
    return found
