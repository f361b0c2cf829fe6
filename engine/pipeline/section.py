"""The base class of configs: unknown keys are refused, with near ones named."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import ConfigError
from ..util.suggest import did_you_mean, near_names

WHOLE = "the config"


class Section(BaseModel):
    """A part of a config: unknown keys are errors; Python objects (judges, environments) may stand
    among plain data."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)
    called: ClassVar[str] = ""  # in messages; default: the name of the class

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None


def explain(error: ValidationError, model: type[Section]) -> str:
    """Describes the mistakes of a config, one per line, with near names for unknown keys.

    A key that is missing is not named where one was misspelt.
    """
    called = model.called or model.__name__.lower().removesuffix("config")
    unknown = [str(m["loc"][-1]) for m in error.errors() if m["type"] == "extra_forbidden"]
    meant = {near for key in unknown for near in near_names(key, model.model_fields)[:1]}
    lines = [
        f"{called} has no key {key!r}.{did_you_mean(key, model.model_fields)}" for key in unknown
    ]
    for mistake in error.errors():
        where = ".".join(str(part) for part in mistake["loc"]) or called
        if mistake["type"] == "missing" and where not in meant:
            lines.append(f"{called} needs the key {where!r}")
        elif mistake["type"] not in ("extra_forbidden", "missing"):
            message = mistake["msg"].removeprefix("Value error, ")
            got = mistake.get("input")
            shown = f" (got {got!r})" if isinstance(got, (str, int, float, bool)) else ""
            lines.append(f"{where if called == WHOLE else f'{called}.{where}'}: {message}{shown}")
    return "; ".join(lines)
