"""Judges. The rules are here; give them to `feedback=` as objects, or name them in a config."""

from __future__ import annotations

from ..engine.hookspecs import Register, hookimpl
from .answers import Exact, Numeric
from .combine import Not, Rules
from .economy import Economy
from .panel import SimulatedPanel
from .rules import Forbidden, Language, Length, Questions, Regex, Repetition, Turns
from .structure import JsonSchema, ToolCalls

__all__ = [
    "Economy", "Exact", "Forbidden", "JsonSchema", "Language", "Length", "Not", "Numeric", "Questions", "Regex", "Repetition", "Rules",
    "SimulatedPanel", "ToolCalls", "Turns",
]  # fmt: skip


@hookimpl
def register_judges(register: Register) -> None:
    register("economy", Economy)
    register("exact", Exact)
    register("forbidden", Forbidden)
    register("json-schema", JsonSchema)
    register("language", Language)
    register("length", Length)
    register("not", Not)
    register("numeric", Numeric)
    register("questions", Questions)
    register("regex", Regex)
    register("repetition", Repetition)
    register("rules", Rules)
    register("tool-calls", ToolCalls)
    register("turns", Turns)


@hookimpl
def register_feedback_sources(register: Register) -> None:
    register("simulated-panel", SimulatedPanel)
