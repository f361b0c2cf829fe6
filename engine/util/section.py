"""The base class of configs: unknown keys are refused, with near ones named."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from ..errors import ConfigError
from .suggest import did_you_mean, near_names

WHOLE = "the config"


class Section(BaseModel):
    """A part of a config: unknown keys are errors; Python objects (judges, environments) may stand
    among plain data."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)
    called: ClassVar[str] = ""  # in messages; default: the name of the class

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses a truth value for a number, which pydantic would take for 0 or 1. Text that is a
        number is one: YAML reads `1e-3` as text."""
        if isinstance(value, bool) and is_number(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("must be a number")
        return value

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None


@classmethod  # type: ignore[misc]
def of_the_default(kind: type[Section], value: Any, info: ValidationInfo) -> Any:
    """Reads options that name no part as those of the field's default part; for `field_validator`
    of mode "before"."""
    if isinstance(value, Mapping) and "name" not in value:
        return {"name": kind.model_fields[str(info.field_name)].default, **value}
    return value


def is_number(kind: Any) -> bool:
    """Returns whether an annotation stands for a number, or a number or None."""
    if get_origin(kind) is Annotated:
        return is_number(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        several = [each for each in get_args(kind) if each is not type(None)]
        return bool(several) and all(map(is_number, several))
    return kind in (int, float)


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
        where = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "missing" and where not in meant:
            lines.append(f"{called} needs the key {where!r}")
        elif mistake["type"] not in ("extra_forbidden", "missing"):
            message = mistake["msg"].removeprefix("Value error, ")
            got = mistake.get("input")
            shown = f" (got {got!r})" if isinstance(got, (str, int, float, bool)) else ""
            place = [*([] if called == WHOLE and where else [called]), *([where] if where else [])]
            lines.append(f"{'.'.join(place)}: {message}{shown}")
    return "; ".join(lines)
