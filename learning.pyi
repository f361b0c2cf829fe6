from .engine.pipeline.processes import broadcast, processes, shared
from .engine.policy.activations import kept_bytes, recomputed
from .engine.policy.batching import make_batch, row_of
from .engine.policy.chat import ChatFormat
from .engine.policy.in_process import InProcess
from .engine.policy.known import located
from .engine.policy.learner import Learner, Sums
from .engine.policy.loading import LOADING
from .engine.policy.network import Micro, Output, divide
from .engine.policy.options import LearnerOptions, PassOptions, SupervisedOptions
from .engine.policy.policy import Policy
from .engine.policy.properties import context_length, trunk
from .engine.policy.sharding import outline
from .engine.policy.template import CHATML
from .engine.policy.tiny import build_model, build_policy, build_tokenizer
from .engine.records.batch import Batch, Credit, Row
from .engine.tensors import (
    apart,
    bilevel_gae,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    group_advantage,
    group_counts,
    group_largest,
    importance_weight,
    kl_estimate,
    place_turn_rewards,
    returns_to_go,
    rounding,
    spread_turns,
    turn_advantages,
    turn_edges,
    turn_sums,
    whiten,
)
from .engine.util.memory import explained_memory, peak_memory

__all__ = [
    "Batch", "CHATML", "ChatFormat", "Credit", "InProcess", "LOADING", "Learner",
    "LearnerOptions", "Micro", "Output", "PassOptions", "Policy", "Row", "Sums",
    "SupervisedOptions", "apart", "bilevel_gae", "broadcast", "build_model", "build_policy",
    "build_tokenizer", "clipped_policy_loss", "clipped_value_loss", "context_length",
    "divide", "explained_memory", "explained_variance", "gae", "group_advantage",
    "group_counts", "group_largest", "importance_weight", "kept_bytes", "kl_estimate",
    "located", "make_batch", "outline", "peak_memory", "place_turn_rewards", "processes",
    "recomputed", "returns_to_go", "rounding", "row_of", "shared", "spread_turns", "trunk",
    "turn_advantages", "turn_edges", "turn_sums", "whiten",
]  # fmt: skip
