from . import judges
from .engine.environments.checker import check_environment
from .engine.environments.pool import replay
from .engine.environments.registry import starts
from .engine.environments.space import Text
from .engine.errors import (
    ConfigError,
    LedgerError,
    NonFiniteError,
    PluginError,
    PolicyError,
    TemplateError,
    TooManyFailures,
)
from .engine.hookspecs import hookimpl
from .engine.ledger.ledger import Ledger
from .engine.pipeline.config import RunConfig
from .engine.pipeline.plugins import Plugins
from .engine.pipeline.run import Run
from .engine.pipeline.stage import Stage
from .engine.pipeline.view import PastRun, Trained
from .engine.policy.policy import Policy
from .engine.policy.template import CHATML
from .engine.protocols import (
    Aggregator,
    Backend,
    Combiner,
    Context,
    CreditAssigner,
    Curriculum,
    FeedbackSource,
    GroupJudge,
    Judge,
    Optimizer,
)
from .engine.records.batch import Batch, Credit, Pairs
from .engine.records.episode import Episode, Message, Start, Turn
from .engine.records.feedback import Comparison, Feedback, Question, Request, Stamp
from .engine.records.rewards import (
    Aggregate,
    Estimate,
    NoReward,
    RaterEstimate,
    Rewards,
    ranked_pairs,
    ranking_scores,
)
from .engine.records.sampling import Conversation, Sample, Sampling
from .engine.records.update import Status, Update
from .engine.rollout.conversation import Where
from .engine.rollout.players import PolicyPlayer, ScriptPlayer
from .engine.rollout.rollout import rollout
from .engine.train import train
from .engine.util.section import Section

__all__ = [
    "Aggregate", "Aggregator", "Backend", "Batch", "CHATML", "Combiner", "Comparison",
    "ConfigError", "Context", "Conversation", "Credit", "CreditAssigner", "Curriculum", "Episode",
    "Estimate", "Feedback", "FeedbackSource", "GroupJudge", "Judge", "Ledger", "LedgerError",
    "Message", "NoReward", "NonFiniteError", "Optimizer", "Pairs", "PastRun", "PluginError",
    "Plugins", "Policy", "PolicyError", "PolicyPlayer", "Question", "RaterEstimate", "Request",
    "Rewards", "Run", "RunConfig", "Sample", "Sampling", "ScriptPlayer", "Section", "Stage",
    "Stamp", "Start", "Status", "TemplateError", "Text", "TooManyFailures", "Trained",
    "Turn", "Update", "Where", "check_environment", "hookimpl", "judges",
    "ranked_pairs", "ranking_scores", "replay", "rollout", "starts", "train",
]  # fmt: skip

__version__: str
