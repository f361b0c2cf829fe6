from .engine.environments.conventions import SampledReply, Tokens
from .engine.environments.registry import starts
from .engine.environments.space import Text
from .engine.errors import (
    ConfigError,
    DatabaseError,
    EnvironmentBroke,
    LedgerError,
    NonFiniteError,
    NoRoom,
    Paused,
    PluginError,
    PreferenceError,
    TooManyFailures,
    TurnwiseError,
    UserFailed,
)
from .engine.hookspecs import Register, hookimpl
from .engine.pipeline.stage import Stage
from .engine.protocols import (
    Aggregator,
    Backend,
    Combiner,
    Context,
    CreditAssigner,
    Curriculum,
    FeedbackSource,
    Giver,
    GroupJudge,
    Judge,
    Learns,
    Optimizer,
    RunView,
)
from .engine.records.episode import Episode, Message, Role, Start, Turn
from .engine.records.feedback import Answer, Comparison, Feedback, Question, Request, Stamp
from .engine.records.report_section import ReportSection
from .engine.records.rewards import (
    Aggregate,
    Estimate,
    NoReward,
    RaterEstimate,
    Rewards,
    opinions,
    overall,
    ranking_scores,
    silence,
)
from .engine.records.sampling import Conversation, Sample, Sampling
from .engine.records.starts import GroupResult, StartNumber
from .engine.records.update import Update
from .engine.util.section import Section

__all__ = [
    "Aggregate", "Aggregator", "Answer", "Backend", "Combiner", "Comparison",
    "ConfigError", "Context", "Conversation", "CreditAssigner", "Curriculum",
    "DatabaseError", "EnvironmentBroke", "Episode", "Estimate", "Feedback",
    "FeedbackSource", "Giver", "GroupJudge", "GroupResult", "Judge", "Learns",
    "LedgerError", "Message", "NoReward", "NoRoom", "NonFiniteError", "Optimizer",
    "Paused", "PluginError", "PreferenceError", "Question", "RaterEstimate", "Register",
    "ReportSection", "Request", "Rewards", "Role", "RunView", "Sample", "SampledReply",
    "Sampling", "Section", "Stage", "Stamp", "Start", "StartNumber", "Text", "Tokens",
    "TooManyFailures", "Turn", "TurnwiseError", "Update", "UserFailed", "hookimpl",
    "opinions", "overall", "ranking_scores", "silence", "starts",
]  # fmt: skip
