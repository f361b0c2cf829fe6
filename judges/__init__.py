"""Judges: rules, models that judge in several ways, panels of them. Give them to `feedback=` as objects, or name them in a config."""

from __future__ import annotations

from ..engine.hookspecs import Register, hookimpl
from .checklist import ChecklistJudge
from .constitution import Constitution, ConstitutionJudge
from .escalation import Escalation
from .judge import ModelJudge
from .listwise import ListwiseJudge
from .pairwise import PairwiseJudge
from .panel import Panel
from .rubric import Rubric
from .rules import Length, Questions, Regex, Repetition
from .scoring import RubricJudge
from .simulated import SimulatedPanel

__all__ = [
    "ChecklistJudge", "Constitution", "ConstitutionJudge", "Escalation", "Length", "ListwiseJudge", "ModelJudge", "PairwiseJudge", "Panel", "Questions", "Regex",
    "Repetition", "Rubric", "RubricJudge", "SimulatedPanel",
]  # fmt: skip


@hookimpl
def register_judges(register: Register) -> None:
    register("checklist", ChecklistJudge)
    register("constitution", ConstitutionJudge)
    register("length", Length)
    register("listwise", ListwiseJudge)
    register("pairwise", PairwiseJudge)
    register("questions", Questions)
    register("regex", Regex)
    register("repetition", Repetition)
    register("rubric", RubricJudge)


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
