"""Turnwise aligns multi-turn agents on whole conversations. What you type is here; see README.md.

Importing this loads no torch: names are resolved when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from .engine.pipeline.section import Section
    from .engine.pipeline.stage import Stage
    from .engine.policy.chat import CHATML
    from .engine.policy.policy import Policy
    from .engine.protocols import (
        Aggregator,
        Backend,
        Combiner,
        Context,
        CreditAssigner,
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


_HOMES = {
    "engine.environments.checker": ("check_environment",),
    "engine.environments.pool": ("replay",),
    "engine.environments.registry": ("starts",),
    "engine.environments.space": ("Text",),
    "engine.errors": (
        "ConfigError",
        "LedgerError",
        "NonFiniteError",
        "PluginError",
        "PolicyError",
        "TemplateError",
        "TooManyFailures",
    ),
    "engine.hookspecs": ("hookimpl",),
    "engine.ledger.ledger": ("Ledger",),
    "engine.pipeline.config": ("RunConfig",),
    "engine.pipeline.plugins": ("Plugins",),
    "engine.pipeline.run": ("Run",),
    "engine.pipeline.section": ("Section",),
    "engine.pipeline.stage": ("Stage",),
    "engine.policy.chat": ("CHATML",),
    "engine.policy.policy": ("Policy",),
    "engine.protocols": (
        "Aggregator",
        "Backend",
        "Combiner",
        "Context",
        "CreditAssigner",
        "FeedbackSource",
        "GroupJudge",
        "Judge",
        "Optimizer",
    ),
    "engine.records.batch": ("Batch", "Credit", "Pairs"),
    "engine.records.episode": ("Episode", "Message", "Start", "Turn"),
    "engine.records.feedback": ("Comparison", "Feedback", "Question", "Request", "Stamp"),
    "engine.records.rewards": (
        "Aggregate",
        "Estimate",
        "NoReward",
        "RaterEstimate",
        "Rewards",
        "ranked_pairs",
        "ranking_scores",
    ),
    "engine.records.sampling": ("Conversation", "Sample", "Sampling"),
    "engine.records.update": ("Status", "Update"),
    "engine.rollout.conversation": ("Where",),
    "engine.rollout.players": ("PolicyPlayer", "ScriptPlayer"),
    "engine.rollout.rollout": ("rollout",),
    "engine.train": ("train",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Aggregate", "Aggregator", "CHATML", "Backend", "Batch", "Combiner", "Comparison",
    "ConfigError", "Context", "Conversation", "Credit",
    "CreditAssigner", "Episode", "Estimate", "Feedback", "FeedbackSource", "GroupJudge", "Judge",
    "Ledger", "LedgerError", "Message",
    "NoReward", "NonFiniteError", "Optimizer", "Pairs", "PluginError", "Plugins", "Policy",
    "PolicyError", "PolicyPlayer",
    "Question", "RaterEstimate", "Request", "Rewards", "Run", "RunConfig", "Sample", "Sampling",
    "ScriptPlayer", "Section", "Stage", "Stamp", "Start",
    "Status", "TemplateError", "Text", "TooManyFailures", "Turn", "Update", "Where",
    "check_environment", "hookimpl", "judges",
    "ranked_pairs", "ranking_scores", "replay", "rollout", "starts", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "judges":
        return import_module(".judges", __name__)
    if name == "__version__":
        return import_module("importlib.metadata").version("turnwise")
    if name not in _HOME:
        raise AttributeError(f"module 'turnwise' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
