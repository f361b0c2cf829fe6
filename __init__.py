"""Turnwise aligns multi-turn agents on whole conversations. What you type is here; see README.md.

Importing this loads no torch: names are resolved when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import judges
    from .engine.config import ConfigError, RunConfig, Section, Stage
    from .engine.env_check import check_environment
    from .engine.environment import Text, starts
    from .engine.episode import Episode, Message, Start, Turn
    from .engine.feedback import Comparison, Context, Feedback, FeedbackSource, GroupJudge, Judge, Question, Request, Stamp
    from .engine.hookspecs import hookimpl
    from .engine.instances import replay
    from .engine.learning import Batch, Credit, CreditAssigner, NonFiniteError, Optimizer, Pairs
    from .engine.ledger import Ledger, LedgerError
    from .engine.plugins import PluginError, Plugins
    from .engine.policy import CHATML, Backend, Conversation, Policy, PolicyError, Sample, Sampling, TemplateError
    from .engine.reward import (
        Aggregate,
        Aggregator,
        Combiner,
        Estimate,
        NoReward,
        RaterEstimate,
        Rewards,
        ranked_pairs,
        ranking_scores,
    )  # fmt: skip
    from .engine.rollout import PolicyPlayer, ScriptPlayer, TooManyFailures, Where, rollout
    from .engine.run import Run, Status, Update
    from .engine.train import train

_HOMES = {
    "engine.config": ("ConfigError", "RunConfig", "Section", "Stage"),
    "engine.env_check": ("check_environment",),
    "engine.environment": ("Text", "starts"),
    "engine.episode": ("Episode", "Message", "Start", "Turn"),
    "engine.feedback": (
        "Comparison", "Context", "Feedback", "FeedbackSource", "GroupJudge", "Judge", "Question", "Request", "Stamp",
    ),
    "engine.hookspecs": ("hookimpl",),
    "engine.instances": ("replay",),
    "engine.learning": ("Batch", "Credit", "CreditAssigner", "NonFiniteError", "Optimizer", "Pairs"),
    "engine.ledger": ("Ledger", "LedgerError"),
    "engine.plugins": ("PluginError", "Plugins"),
    "engine.policy": ("CHATML", "Backend", "Conversation", "Policy", "PolicyError", "Sample", "Sampling", "TemplateError"),
    "engine.reward": (
        "Aggregate", "Aggregator", "Combiner", "Estimate", "NoReward", "RaterEstimate", "Rewards", "ranked_pairs", "ranking_scores",
    ),
    "engine.rollout": ("PolicyPlayer", "ScriptPlayer", "TooManyFailures", "Where", "rollout"),
    "engine.run": ("Run", "Status", "Update"),
    "engine.train": ("train",),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Aggregate", "Aggregator", "CHATML", "Backend", "Batch", "Combiner", "Comparison", "ConfigError", "Context", "Conversation", "Credit",
    "CreditAssigner", "Episode", "Estimate", "Feedback", "FeedbackSource", "GroupJudge", "Judge", "Ledger", "LedgerError", "Message",
    "NoReward", "NonFiniteError", "Optimizer", "Pairs", "PluginError", "Plugins", "Policy", "PolicyError", "PolicyPlayer",
    "Question", "RaterEstimate", "Request", "Rewards", "Run", "RunConfig", "Sample", "Sampling", "ScriptPlayer", "Section", "Stage", "Stamp", "Start",
    "Status", "TemplateError", "Text", "TooManyFailures", "Turn", "Update", "Where", "check_environment", "hookimpl", "judges",
    "ranked_pairs", "ranking_scores", "replay", "rollout", "starts", "train",
]  # fmt: skip

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "judges":
        return import_module(".judges", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'turnwise' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
