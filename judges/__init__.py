"""Judges. The rules are here; give them to `feedback=` as objects, or name them in a config."""

from __future__ import annotations

from ..engine.hookspecs import Register, hookimpl
from .rules import Length, Questions, Regex, Repetition

__all__ = ["Length", "Questions", "Regex", "Repetition"]


@hookimpl
def register_judges(register: Register) -> None:
    register("length", Length)
    register("questions", Questions)
    register("regex", Regex)
    register("repetition", Repetition)
