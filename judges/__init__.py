"""Judges: rules, models that judge in several ways, panels of them.

Give them to `feedback=` as objects, or name them in a config. Names are resolved when they are
first used, so that the command line lists judges without loading what they need; `__init__.pyi`
lists them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..protocols import Register, hookimpl
from ..tools import from_stub

if TYPE_CHECKING:
    from typer import Typer

    from ..protocols import ReportSection
    from ..running import Ledger, Run

__getattr__, _names = from_stub(__name__, __file__)  # no `__dir__`: pluggy looks at all it names
__all__ = _names()


@hookimpl
def register_envs() -> None:
    """Registers the environment that asks a model, as judges do."""
    import gymnasium

    gymnasium.register(
        "turnwise/SimulatedUser-v0", "turnwise.judges.users.simulated_user:SimulatedUser"
    )


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
    from .users.command import simulator

    app.command("estimate")(commands.estimate)
    app.command("judges")(commands.judges)
    app.add_typer(simulator, name="simulator")


@hookimpl
def costs(run: Run) -> list[str]:
    from .commands.estimate import without_words

    return without_words(run)


@hookimpl
def report_sections(ledger: Ledger, run: str) -> list[ReportSection]:
    from .commands.audit import audit

    return audit(ledger, run)
