"""Judges. The rules are here; give them to `feedback=` as objects, or name them in a config."""

from __future__ import annotations

from ..engine.hookspecs import Register, hookimpl
from .panel import SimulatedPanel
from .rules import Length, Questions, Regex, Repetition

__all__ = ["Length", "Questions", "Regex", "Repetition", "SimulatedPanel"]


@hookimpl
def register_judges(register: Register) -> None:
    register("length", Length)
    register("questions", Questions)
    register("regex", Regex)
    register("repetition", Repetition)


@hookimpl
def register_feedback_sources(register: Register) -> None:
    register("simulated-panel", SimulatedPanel)
