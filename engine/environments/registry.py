"""Finds and makes registered environments, and draws their starts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import gymnasium
from gymnasium.envs.registration import load_env_creator

from ..records.episode import Start
from ..util.ids import derive_id
from ..util.suggest import did_you_mean, near_names

MISSING: dict[str, str] = {}  # why environments are not registered, by id or "namespace/..."


def make_env(env_id: str, **kwargs: Any) -> gymnasium.Env[str, str]:
    """Calls `gymnasium.make`, with near names when the id is unknown.

    Raises:
        LookupError: no such environment, or its module cannot be imported.
        TypeError: options its constructor does not take.
    """
    try:
        return gymnasium.make(env_id, **kwargs)
    except gymnasium.error.UnregisteredEnv as error:
        raise LookupError(no_environment(env_id)) from error
    except gymnasium.error.Error as error:
        raise LookupError(f"environment {env_id!r} cannot be made: {error}") from error
    except ModuleNotFoundError as error:
        raise LookupError(
            f"environment {env_id!r} needs a module that is missing: {error}"
        ) from error
    except TypeError as error:
        takes = _takes(env_id)
        odd = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        missing = re.search(
            r"missing \d+ required [\w-]+ arguments?: ('\w+'(?:.* '\w+')?)", str(error)
        )
        if odd and takes and odd[1] not in takes:
            raise TypeError(
                f"it is not made with {odd[1]!r}.{did_you_mean(odd[1], takes)} What `reset` takes"
                " stands under `options`, not under `kwargs`."
            ) from error
        if missing and takes:
            raise TypeError(
                f"it needs {missing[1]}. It is made with: {', '.join(sorted(takes))}."
            ) from error
        raise


def _takes(env_id: str) -> list[str]:
    """Returns what an environment may be made with, beyond what its registration says."""
    spec = gymnasium.spec(env_id.rpartition(":")[2])
    if spec.entry_point is None:
        return []
    entry = spec.entry_point
    try:
        known = inspect.signature(load_env_creator(entry) if isinstance(entry, str) else entry)
    except (TypeError, ValueError):  # a builtin that does not say
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = [p.name for p in known.parameters.values() if p.kind in named]
    return [name for name in taken if name not in spec.kwargs]


def no_environment(env_id: str) -> str:
    """Returns the error message for an id that is not registered."""
    if why := MISSING.get(env_id) or MISSING.get(f"{env_id.partition('/')[0]}/..."):
        return f"environment {env_id!r} cannot be played here: {why}"
    near = near_names(env_id, dialogue_ids())
    return (
        f"no environment {env_id!r}."
        + (f" Did you mean {' or '.join(map(repr, near))}?" if near else "")
        + " One of your own is registered when its module is imported (on the command line:"
        " `--module NAME`), those that come with Turnwise by `turnwise.Plugins()`; `turnwise envs`"
        " lists them."
    )


def dialogue_ids() -> list[str]:
    """Returns the registered environments that may be dialogues: all but Gymnasium's own, which
    take arrays and numbers."""
    ids = []
    for name, spec in gymnasium.registry.items():
        entry = spec.entry_point
        named = inspect.isroutine(entry) or inspect.isclass(entry)
        module = entry if isinstance(entry, str) else (entry if named else type(entry)).__module__
        if (
            module and not module.startswith("gymnasium.") and spec.namespace is not None
        ) or module.startswith("turnwise."):
            ids.append(name)
    return sorted(ids)


def starts(
    env_id: str,
    seed: int,
    count: int,
    options: Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    first: int = 0,
) -> list[Start]:
    """Returns starts number `first` to `first + count - 1` of the sequence that one seed defines;
    no two of them are alike.

    Seeds have 32 bits, which is what environments in the wild accept; they count up from a place
    that the seed determines.
    """
    place = int(derive_id("starts", env_id, seed)[:8], 16)
    seeds = [(place + first + i) % 2**32 for i in range(count)]
    return [Start(env_id, s, options or {}, kwargs or {}) for s in seeds]


def check_id(env_id: str) -> None:
    """Raises `LookupError` with near names if the environment is not registered."""
    try:
        gymnasium.spec(env_id)
    except gymnasium.error.Error as error:
        raise LookupError(no_environment(env_id)) from error
