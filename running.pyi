from .engine.analysis.scores import Score, score
from .engine.cli.app import import_module, load_config
from .engine.environments.conventions import Observation
from .engine.environments.pool import Environments
from .engine.ledger.database import Database, Words, again
from .engine.ledger.ledger import Ledger
from .engine.ledger.store import SLOTS, keep
from .engine.pipeline.config import RunConfig
from .engine.pipeline.folder import open_ledger, read_config
from .engine.pipeline.parts import component, declared
from .engine.pipeline.plugins import Plugins
from .engine.pipeline.progress import Display, quiet
from .engine.pipeline.run import Run
from .engine.pipeline.signature import checked_options
from .engine.policy.fetching import fetch
from .engine.policy.known import KNOWN
from .engine.report.curves import draw_curves
from .engine.report.page import write_report
from .engine.report.scores import print_scores
from .engine.report.transcript import printable, transcript
from .engine.rollout.conversation import Branch, LiveEpisode, Reply, Where, episode_id
from .engine.rollout.elsewhere import Elsewhere
from .engine.rollout.players import PolicyPlayer, ScriptPlayer, in_order
from .engine.rollout.rollout import rollout
from .engine.stages.collect import play
from .engine.stages.environments import EnvConfig, check_envs
from .engine.stages.evaluate import Evaluate, play_held_out
from .engine.stages.play_options import JudgedPlayOptions, PlayOptions
from .engine.stages.preference import (
    Chosen,
    Weights,
    check_weights,
    comparing,
    comparisons_of,
    weighed,
)
from .engine.stages.rank import Rank
from .engine.stages.rl.parts import make_parts
from .engine.stages.rl.recorded import RUN
from .engine.stages.rl.settings import SERVED, RLSettings
from .engine.stages.rl.stage import RL
from .engine.stages.sft import read_conversations

__all__ = [
    "Branch", "Chosen", "Database", "Display", "Elsewhere", "EnvConfig", "Environments",
    "Evaluate", "JudgedPlayOptions", "KNOWN", "Ledger", "LiveEpisode", "Observation",
    "PlayOptions", "Plugins", "PolicyPlayer", "RL", "RLSettings", "RUN", "Rank", "Reply", "Run",
    "RunConfig", "SERVED", "SLOTS", "Score", "ScriptPlayer", "Weights", "Where", "Words",
    "again", "check_envs", "check_weights", "checked_options", "comparing", "comparisons_of",
    "component", "declared", "draw_curves", "episode_id", "fetch", "import_module", "in_order",
    "keep",
    "load_config", "make_parts", "open_ledger", "play", "play_held_out", "print_scores",
    "printable", "quiet", "read_config", "read_conversations", "rollout", "score", "transcript",
    "weighed", "write_report",
]  # fmt: skip
