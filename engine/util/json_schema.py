"""JSON that must fit a schema."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from .suggest import install

LARGE = 65536  # characters of a schema that is not kept: clients may send any


def validator(schema: Mapping[str, Any]) -> Any:
    """Returns what checks values against a JSON Schema (any draft that its `$schema` names, else
    2020-12). References to files and addresses are not followed.

    Raises:
        ValueError: no valid schema.
        ImportError: jsonschema is not installed.
    """
    try:
        importlib.import_module("jsonschema")
    except ImportError as error:
        raise ImportError(
            f"a JSON Schema is checked by jsonschema: install it with: {install('tools')}"
        ) from error
    try:
        text = json.dumps(schema, default=dict)
    except TypeError as error:
        raise ValueError(f"no valid JSON Schema: {error}") from error
    return _validator(text) if len(text) < LARGE else _made(text)


def _made(text: str) -> Any:
    import jsonschema
    import referencing

    schema = json.loads(text)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"no valid JSON Schema: at {error.json_path}: {error.message}") from error
    return kind(schema, registry=referencing.Registry())


# Tools are called again and again, and checking a schema takes longer than what it is for.
_validator = lru_cache(256)(_made)


def error_of(validator: Any, value: Any) -> str | None:
    """Returns where and how a value breaks the schema; None where it does not. Of several errors
    the most informative one."""
    from jsonschema.exceptions import best_match

    error = best_match(validator.iter_errors(value))
    return None if error is None else f"at {_short(error.json_path)}: {_short(error.message)}"


def _short(text: str) -> str:
    """Returns a text without its middle where it is long: it ends with what is wrong."""
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def parsed(text: str) -> Any:
    """Parses strict JSON: no NaN, no Infinity.

    Raises:
        ValueError: it is not that.
    """
    value, end = parsed_from(text, 0)
    if text[end:].strip():
        raise ValueError(f"there is more after its end, at character {end}")
    return value


def parsed_from(text: str, at: int) -> tuple[Any, int]:
    """Parses the strict JSON value that begins at a place, after space perhaps. Returns it, and
    where it ends.

    Raises:
        ValueError: there is none.
    """
    while at < len(text) and text[at].isspace():
        at += 1
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refused(name: str) -> Any:
    raise ValueError(f"{name[:20]} is no JSON number that can be kept")


def _finite(text: str) -> float:
    """Returns a number; one beyond what a float holds would be Infinity."""
    return float(text) if math.isfinite(float(text)) else _refused(text)


_DECODER = json.JSONDecoder(parse_constant=_refused, parse_float=_finite)
