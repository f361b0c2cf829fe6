from .engine.testing.clock import Clock
from .engine.testing.combiners import check_combiner
from .engine.testing.credit import check_credit
from .engine.testing.environments import check_environment, play
from .engine.testing.episodes import batch, conversation, conversations
from .engine.testing.faults import Unsound
from .engine.testing.judges import check_judge
from .engine.testing.optimizers import check_optimizer, tiny_policy
from .engine.testing.sources import check_feedback_source

__all__ = [
    "Clock", "Unsound", "batch", "check_combiner", "check_credit", "check_environment",
    "check_feedback_source", "check_judge", "check_optimizer", "conversation", "conversations",
    "play", "tiny_policy",
]  # fmt: skip
