"""The JSON schema of a pipeline file, for editors that complete keys and mark what is wrong.

It is made from what is installed: the options of every stage, optimizer, judge and so on, plugins'
among them, with the words of their docstrings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter

from ..feedback.specs import SETTINGS, Source
from ..pipeline.config import PolicyConfig, RunConfig
from ..pipeline.options import KINDS, PARTS, nested, options_of
from ..pipeline.plugins import Plugins
from ..pipeline.signature import annotations_of
from ..util.section import Section

NUMBER = r"^[-+]?[0-9.]+([eE][-+]?[0-9]+)?$"


def config_schema(plugins: Plugins) -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of a pipeline file."""
    known = {
        kind: {name: _options(plugins.factory(kind, name)) for name in plugins.names(kind)}
        for kind in KINDS
    }
    stages = [
        {
            "type": "object", "required": [name], "additionalProperties": False,
            "properties": {name: {"anyOf": [own, {"type": "null"}]}}, "title": name,
        }
        for name, own in known["stage"].items()
    ]  # fmt: skip
    repeat = {
        "type": "object",
        "required": ["times", "stages"],
        "additionalProperties": False,
        "properties": {
            "times": {"type": "integer", "minimum": 1},
            "stages": {"$ref": "#/$defs/stages"},
        },
    }
    stages.append(
        {"type": "object", "required": ["repeat"], "additionalProperties": False,
         "properties": {"repeat": repeat}, "title": "repeat"}
    )  # fmt: skip
    whole, policy = _options(RunConfig), _options(PolicyConfig)
    whole["properties"] |= {
        "policy": {"anyOf": [{"type": "string"}, policy]},
        "stages": {"$ref": "#/$defs/stages"},
    }
    parts = {key: _named(known[kind]) for key, kind in PARTS.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A Turnwise pipeline",
        **whole,
        "$defs": {
            "stages": {"type": "array", "minItems": 1, "items": {"anyOf": stages}},
            "source": _source(known["judge"]),
            **parts,
        },
    }


def _options(factory: Callable[..., Any]) -> dict[str, Any]:
    """Returns the schema of a part's options; what is no plain type may be anything."""
    found: dict[str, Any] = {}
    needed = []
    for option in options_of(factory):
        for key, default in zip(option.keys, option.defaults, strict=True):
            found[key] = {**_type(factory, key), "description": option.text}
            if default == "needed":
                needed.append(key)
    schema = {"type": "object", "properties": found, "additionalProperties": False}
    return schema | ({"required": needed} if needed else {})


def _type(factory: Callable[..., Any], key: str) -> dict[str, Any]:
    """Returns the schema of one option's values."""
    if key in PARTS:
        return {"$ref": f"#/$defs/{key}"}
    if key == "feedback":
        one = {"$ref": "#/$defs/source"}
        return {"anyOf": [one, {"type": "array", "items": one}]}
    if inspect.isclass(factory) and issubclass(factory, Section):
        if inner := dict(nested(factory)).get(key):
            return {"anyOf": [_options(inner), {"type": "null"}]}
        kind: Any = factory.model_fields[key].rebuild_annotation()
    else:
        kind = annotations_of(factory).get(key, Any)
    try:
        schema = TypeAdapter(kind).json_schema()
    except Exception:  # a kind that JSON has no word for
        return {}
    return {} if "$defs" in schema else _with_text(schema)


def _with_text(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns a schema in which a number may be written as text, as a run takes it."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [_with_text(each) for each in schema["anyOf"]]}
    if schema.get("type") not in ("number", "integer"):
        return schema
    more: dict[str, Any] = {key: schema[key] for key in ("title", "default") if key in schema}
    return {**more, "anyOf": [schema, {"type": "string", "pattern": NUMBER}]}


def _named(parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the schema of a part that is given by its name, or a mapping with `name` and
    options; options alone are those of the default."""
    every = {key: value for own in parts.values() for key, value in own["properties"].items()}
    alone = {
        "type": "object",
        "properties": every,
        "not": {"required": ["name"]},
        "additionalProperties": False,
    }
    return {"anyOf": [{"enum": sorted(parts)}, {"type": "null"}, alone, *_by("name", parts, {})]}


def _source(judges: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the schema of an entry of `feedback`."""
    known = _options(Source)["properties"]
    asked = {key: known[key] for key in SETTINGS}
    environment: dict[str, Any] = {"environment": {"properties": {}}}
    others = {
        "type": "object",
        "required": ["judge"],
        "properties": {"judge": {"type": "string", "pattern": ":"}},
    }
    named = [{"enum": ["environment", *sorted(judges)]}, {"type": "string", "pattern": ":"}]
    return {"anyOf": [*named, *_by("judge", {**environment, **judges}, asked), others]}


def _by(
    key: str, parts: Mapping[str, dict[str, Any]], more: Mapping[str, Any]
) -> list[dict[str, Any]]:
    return [
        {
            "type": "object",
            "required": [key, *own.get("required", ())],
            "properties": {key: {"const": name}, **more, **own["properties"]},
            "additionalProperties": False,
            "title": name,
        }
        for name, own in sorted(parts.items())
    ]
