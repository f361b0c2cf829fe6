"""Judges: rules, models that judge in several ways, panels of them. Give them to `feedback=` as objects, or name them in a config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.hookspecs import Register, hookimpl
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

if TYPE_CHECKING:
    from typer import Typer

    from ..engine.ledger import Ledger
    from ..engine.report.section import Section

__all__ = [
    "ChecklistJudge", "Constitution", "ConstitutionJudge", "Economy", "Escalation", "Exact", "Forbidden", "JsonSchema", "Language", "Length",
    "ListwiseJudge", "ModelJudge", "Not", "Numeric", "PairwiseJudge", "Panel", "Questions", "Regex", "Repetition", "Rubric", "RubricJudge",
    "Rules", "SimulatedPanel", "ToolCalls", "Turns",
]  # fmt: skip


@hookimpl
def register_judges(register: Register) -> None:
    register("checklist", ChecklistJudge)
    register("constitution", ConstitutionJudge)
    register("economy", Economy)
    register("exact", Exact)
    register("forbidden", Forbidden)
    register("json-schema", JsonSchema)
    register("language", Language)
    register("length", Length)
    register("listwise", ListwiseJudge)
    register("not", Not)
    register("numeric", Numeric)
    register("pairwise", PairwiseJudge)
    register("questions", Questions)
    register("regex", Regex)
    register("repetition", Repetition)
    register("rubric", RubricJudge)
    register("rules", Rules)
    register("tool-calls", ToolCalls)
    register("turns", Turns)


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
    register("escalation", Escalation)
    register("panel", Panel)
    register("simulated-panel", SimulatedPanel)


@hookimpl
def register_commands(app: Typer) -> None:
    from . import audit, estimate

    app.command("estimate")(estimate.command)
    app.command("judges")(audit.command)


@hookimpl
def report_sections(ledger: Ledger, run: str) -> list[Section]:
    from .audit import audit

    return audit(ledger, run)
