"""People: a feedback source, and the service on whose pages they rate (`turnwise rate`)."""

from __future__ import annotations

from ...engine.hookspecs import Register, hookimpl


@hookimpl
def register_feedback_sources(register: Register) -> None:
    register("people", "turnwise.plugins.human.source:People")
