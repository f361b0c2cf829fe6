"""Judges: rules, models that judge in several ways, panels of them. Give them to `feedback=` as objects, or name them in a config."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..engine.hookspecs import Register, hookimpl

if TYPE_CHECKING:
    from typer import Typer

    from ..engine.ledger import Ledger
    from ..engine.report.section import Section
    from .answers import Exact, Numeric
    from .checklist import ChecklistJudge
    from .combine import Not, Rules
    from .constitution import Constitution, ConstitutionJudge
    from .economy import Economy
    from .escalation import Escalation
    from .judge import ModelJudge
    from .listwise import ListwiseJudge
    from .pairwise import PairwiseJudge
    from .panel import Panel
    from .rubric import Rubric
    from .rules import Forbidden, Language, Length, Questions, Regex, Repetition, Turns
    from .scoring import RubricJudge
    from .simulated import SimulatedPanel
    from .structure import JsonSchema, ToolCalls

# Names are resolved when first used: the command line lists judges without loading what they need. (No `__dir__`: pluggy looks at all it
# names.)
_HOMES = {
    "answers": ("Exact", "Numeric"),
    "checklist": ("ChecklistJudge",),
    "combine": ("Not", "Rules"),
    "constitution": ("Constitution", "ConstitutionJudge"),
    "economy": ("Economy",),
    "escalation": ("Escalation",),
    "judge": ("ModelJudge",),
    "listwise": ("ListwiseJudge",),
    "pairwise": ("PairwiseJudge",),
    "panel": ("Panel",),
    "rubric": ("Rubric",),
    "rules": ("Forbidden", "Language", "Length", "Questions", "Regex", "Repetition", "Turns"),
    "scoring": ("RubricJudge",),
    "simulated": ("SimulatedPanel",),
    "structure": ("JsonSchema", "ToolCalls"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ChecklistJudge", "Constitution", "ConstitutionJudge", "Economy", "Escalation", "Exact", "Forbidden", "JsonSchema", "Language", "Length",
    "ListwiseJudge", "ModelJudge", "Not", "Numeric", "PairwiseJudge", "Panel", "Questions", "Regex", "Repetition", "Rubric", "RubricJudge",
    "Rules", "SimulatedPanel", "ToolCalls", "Turns",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


@hookimpl
def register_judges(register: Register) -> None:
    register("checklist", "turnwise.judges.checklist:ChecklistJudge")
    register("constitution", "turnwise.judges.constitution:ConstitutionJudge")
    register("economy", "turnwise.judges.economy:Economy")
    register("exact", "turnwise.judges.answers:Exact")
    register("forbidden", "turnwise.judges.rules:Forbidden")
    register("json-schema", "turnwise.judges.structure:JsonSchema")
    register("language", "turnwise.judges.rules:Language")
    register("length", "turnwise.judges.rules:Length")
    register("listwise", "turnwise.judges.listwise:ListwiseJudge")
    register("not", "turnwise.judges.combine:Not")
    register("numeric", "turnwise.judges.answers:Numeric")
    register("pairwise", "turnwise.judges.pairwise:PairwiseJudge")
    register("questions", "turnwise.judges.rules:Questions")
    register("regex", "turnwise.judges.rules:Regex")
    register("repetition", "turnwise.judges.rules:Repetition")
    register("rubric", "turnwise.judges.scoring:RubricJudge")
    register("rules", "turnwise.judges.combine:Rules")
    register("tool-calls", "turnwise.judges.structure:ToolCalls")
    register("turns", "turnwise.judges.rules:Turns")


@hookimpl
def register_models(register: Register) -> None:
    register("anthropic", "turnwise.judges.models.anthropic:Anthropic")
    register("openai", "turnwise.judges.models.openai:OpenAI")
    register("openai-chat", "turnwise.judges.models.openai:OpenAIChat")
    register("local", "turnwise.judges.models.local:Local")


@hookimpl
def register_stages(register: Register) -> None:
    register("revise", "turnwise.judges.revise:Revise")


@hookimpl
def register_feedback_sources(register: Register) -> None:
    register("escalation", "turnwise.judges.escalation:Escalation")
    register("panel", "turnwise.judges.panel:Panel")
    register("simulated-panel", "turnwise.judges.simulated:SimulatedPanel")


@hookimpl
def register_commands(app: Typer) -> None:
    from . import commands

    app.command("estimate")(commands.estimate)
    app.command("judges")(commands.judges)


@hookimpl
def report_sections(ledger: Ledger, run: str) -> list[Section]:
    from .audit import audit

    return audit(ledger, run)
