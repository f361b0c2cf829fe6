from .asking.calls import Call
from .combined.escalation import Escalation
from .combined.panel import Panel
from .constitutional.constitution import Constitution, ConstitutionJudge
from .llm.checklist import ChecklistJudge
from .llm.judge import ModelJudge
from .llm.listwise import ListwiseJudge
from .llm.pairwise import PairwiseJudge
from .llm.rubric import Rubric
from .llm.rubric_judge import RubricJudge
from .llm.transcript import RULES, conversation, fenced, read_json
from .models.model import BatchModel, Model, ModelError, Prompt, Reply, Token, Usage
from .rules.answers import Exact, Numeric
from .rules.combine import Not, Rules
from .rules.economy import Economy
from .rules.structure import JsonSchema, ToolCalls
from .rules.text import Forbidden, Language, Length, Questions, Regex, Repetition, Turns
from .simulated import SimulatedPanel

__all__ = [
    "BatchModel", "Call", "ChecklistJudge", "Constitution", "ConstitutionJudge", "Economy",
    "Escalation", "Exact", "Forbidden", "JsonSchema", "Language", "Length", "ListwiseJudge",
    "Model", "ModelError", "ModelJudge", "Not", "Numeric", "PairwiseJudge", "Panel", "Prompt",
    "Questions", "RULES", "Regex", "Repetition", "Reply", "Rubric", "RubricJudge", "Rules",
    "SimulatedPanel", "Token", "ToolCalls", "Turns", "Usage", "conversation", "fenced",
    "read_json",
]  # fmt: skip
