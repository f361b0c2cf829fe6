"""The `env:` of a stage: one environment or a mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from ..environments.pool import Environments, call
from ..environments.registry import starts
from ..errors import ConfigError, EnvironmentBroke
from ..pipeline.plugins import Plugins
from ..util.section import Section
from ..util.suggest import did_you_mean


class EnvConfig(Section):
    """One environment of a mixture.

    Attributes:
        id: as registered with Gymnasium.
        weight: its share of the groups.
        options: for `reset`.
        kwargs: for `gymnasium.make`.
        feedback: its own sources, instead of the stage's.
    """

    id: str
    weight: float = Field(default=1.0, gt=0)
    options: dict[str, Any] = {}
    kwargs: dict[str, Any] = {}
    feedback: list[Any] | None = None


def read_envs(value: Any) -> list[EnvConfig]:
    """Reads the `env:` of a stage: an id, (id, weight) pairs, mappings, or a list of these."""
    entries = value if isinstance(value, list) else [value]
    result = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {"id": entry}
        elif isinstance(entry, (tuple, list)) and len(entry) == 2:
            entry = {"id": entry[0], "weight": entry[1]}
        if not isinstance(entry, (EnvConfig, Mapping)):
            raise ConfigError(
                f"an environment is given by its id, got {entry!r}: register it with"
                " gymnasium.register(id, Class) and give the id"
            )
        result.append(entry if isinstance(entry, EnvConfig) else EnvConfig(**entry))
    return result


def check_envs(
    envs: Sequence[EnvConfig], players: Sequence[str] = (), plugins: Plugins | None = None
) -> None:
    """Makes each environment once, so that a wrong id, option or player shows before the run."""
    environments = Environments()
    try:
        for env in envs:
            try:
                starts(env.id, 0, 1, env.options, env.kwargs)
                made = environments.take(env.id, env.kwargs)
                assert made is not None
                own = call(environments, made, "make").players
            except (LookupError, TypeError, ValueError) as error:
                note = (
                    plugins.failures()
                    if plugins is not None and isinstance(error, LookupError)
                    else ""
                )
                raise ConfigError(f"{error}{note}") from error
            except EnvironmentBroke as error:
                raise ConfigError(f"environment {env.id!r}: {error}") from error
            environments.give(made, sound=False)
            for name in players:
                if name not in own:
                    raise ConfigError(
                        f"environment {env.id!r} has no player {name!r}.{did_you_mean(name, own)}"
                    )
    finally:
        environments.close()
