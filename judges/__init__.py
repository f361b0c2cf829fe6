"""Judges: rules, models that judge in several ways, panels of them.

Give them to `feedback=` as objects, or name them in a config.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..protocols import Register, hookimpl

if TYPE_CHECKING:
    from typer import Typer

    from ..protocols import ReportSection
    from ..running import Ledger
    from .combined.escalation import Escalation
    from .combined.panel import Panel
    from .constitutional.constitution import Constitution, ConstitutionJudge
    from .llm.checklist import ChecklistJudge
    from .llm.judge import ModelJudge
    from .llm.listwise import ListwiseJudge
    from .llm.pairwise import PairwiseJudge
    from .llm.rubric import Rubric
    from .llm.rubric_judge import RubricJudge
    from .models.model import BatchModel, Model, ModelError, Prompt, Reply, Token, Usage
    from .rules.answers import Exact, Numeric
    from .rules.combine import Not, Rules
    from .rules.economy import Economy
    from .rules.structure import JsonSchema, ToolCalls
    from .rules.text import Forbidden, Language, Length, Questions, Regex, Repetition, Turns
    from .simulated import SimulatedPanel


# Names are resolved when first used: the command line lists judges without loading what they need.
# (No `__dir__`: pluggy looks at all it names.)
_HOMES = {
    "combined.escalation": ("Escalation",),
    "combined.panel": ("Panel",),
    "constitutional.constitution": ("Constitution", "ConstitutionJudge"),
    "llm.checklist": ("ChecklistJudge",),
    "llm.judge": ("ModelJudge",),
    "llm.listwise": ("ListwiseJudge",),
    "llm.pairwise": ("PairwiseJudge",),
    "llm.rubric": ("Rubric",),
    "llm.rubric_judge": ("RubricJudge",),
    "models.model": ("BatchModel", "Model", "ModelError", "Prompt", "Reply", "Token", "Usage"),
    "rules.answers": ("Exact", "Numeric"),
    "rules.combine": ("Not", "Rules"),
    "rules.economy": ("Economy",),
    "rules.structure": ("JsonSchema", "ToolCalls"),
    "rules.text": ("Forbidden", "Language", "Length", "Questions", "Regex", "Repetition", "Turns"),
    "simulated": ("SimulatedPanel",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BatchModel", "ChecklistJudge", "Constitution", "ConstitutionJudge", "Economy",
    "Escalation", "Exact", "Forbidden", "JsonSchema", "Language", "Length", "ListwiseJudge",
    "Model", "ModelError", "ModelJudge", "Not", "Numeric", "PairwiseJudge", "Panel", "Prompt",
    "Questions", "Regex", "Repetition", "Reply", "Rubric", "RubricJudge", "Rules",
    "SimulatedPanel", "Token", "ToolCalls", "Turns", "Usage",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


@hookimpl
def register_judges(register: Register) -> None:
    register("checklist", "turnwise.judges.llm.checklist:ChecklistJudge")
    register("constitution", "turnwise.judges.constitutional.constitution:ConstitutionJudge")
    register("economy", "turnwise.judges.rules.economy:Economy")
    register("escalation", "turnwise.judges.combined.escalation:Escalation")
    register("exact", "turnwise.judges.rules.answers:Exact")
    register("forbidden", "turnwise.judges.rules.text:Forbidden")
    register("json-schema", "turnwise.judges.rules.structure:JsonSchema")
    register("language", "turnwise.judges.rules.text:Language")
    register("length", "turnwise.judges.rules.text:Length")
    register("listwise", "turnwise.judges.llm.listwise:ListwiseJudge")
    register("not", "turnwise.judges.rules.combine:Not")
    register("numeric", "turnwise.judges.rules.answers:Numeric")
    register("pairwise", "turnwise.judges.llm.pairwise:PairwiseJudge")
    register("panel", "turnwise.judges.combined.panel:Panel")
    register("questions", "turnwise.judges.rules.text:Questions")
    register("regex", "turnwise.judges.rules.text:Regex")
    register("repetition", "turnwise.judges.rules.text:Repetition")
    register("rubric", "turnwise.judges.llm.rubric_judge:RubricJudge")
    register("rules", "turnwise.judges.rules.combine:Rules")
    register("simulated-panel", "turnwise.judges.simulated:SimulatedPanel")
    register("tool-calls", "turnwise.judges.rules.structure:ToolCalls")
    register("turns", "turnwise.judges.rules.text:Turns")


@hookimpl
def register_models(register: Register) -> None:
    register("anthropic", "turnwise.judges.models.anthropic:Anthropic")
    register("openai", "turnwise.judges.models.openai:OpenAI")
    register("openai-chat", "turnwise.judges.models.openai:OpenAIChat")
    register("local", "turnwise.judges.models.local:Local")


@hookimpl
def register_stages(register: Register) -> None:
    register("revise", "turnwise.judges.constitutional.revise:Revise")


@hookimpl
def register_commands(app: Typer) -> None:
    from .commands import commands

    app.command("estimate")(commands.estimate)
    app.command("judges")(commands.judges)


@hookimpl
def report_sections(ledger: Ledger, run: str) -> list[ReportSection]:
    from .commands.audit import audit

    return audit(ledger, run)
