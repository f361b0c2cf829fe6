"""docs/metrics.md has a line for every metric that a pipeline of all stages writes, docs/errors.md
one for every error."""

from __future__ import annotations

import inspect
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import turnwise
from turnwise.engine import errors

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
DESK = "turnwise/SupportDesk-v0"
PLAY: dict[str, Any] = {"env": DESK, "max_new_tokens": 6, "max_turns": 2}
SMALL = {**PLAY, "updates": 1, "groups": 4, "group_size": 3}


def letters(episode: turnwise.Episode) -> float:
    return float(len(episode.turns[-1].action))


PAID = {**SMALL, "feedback": [letters]}
STAGES: list[dict[str, Any]] = [
    {"sft": {"env": DESK, "episodes": 16, "batch_size": 8}},
    {"rank": {**SMALL, "feedback": [{"judge": "simulated-panel", "raters": 2}]}},
    {"reward-model": {"members": 2}},
    {"preference": {"optimizer": "dpo"}},
    {"preference": {"optimizer": "kto"}},
    {"rl": {**SMALL, "env": [[DESK, 0.5], ["turnwise/Maze-v0", 0.5]],
            "feedback": ["environment", "length", {"judge": "reward-model"}],
            "optimizer": {"name": "ppo", "kl": 0.05, "kl_target": 6, "target_kl": 1.0},
            "gold": {"every": 1, "episodes": 4}, "audit": {"episodes": 1, "rollouts": 2}}},
    {"rl": {**PAID, "optimizer": {"name": "grpo", "kl": 0.05}, "curriculum": "learnable",
            "credit": "turn-returns", "resample": 1}},
    {"rl": {**PAID, "optimizer": "rejection"}},
    {"rl": {**PAID, "credit": "branch", "combiner": {"name": "aggregate", "aggregator": "mean"}}},
    {"evaluate": {"env": DESK, "episodes": 4, "max_new_tokens": 6, "players": ["policy", "random"],
                  "best_of": {"judge": "reward-model", "n": [1, 2]}}},
]  # fmt: skip


def patterns() -> list[str]:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    found = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(found) == len(set(found)), "a metric has two lines"
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_metric_has_a_line(roomy: str, tmp_path: Path) -> None:
    run = turnwise.Run({"policy": roomy, "stages": STAGES}, folder=tmp_path / "r").finish()
    known = patterns()
    keys = {key for update in run.metrics for key in update}
    assert [k for k in sorted(keys) if not any(fnmatchcase(k, p) for p in known)] == []
    assert len(keys) > 100


def test_every_error_has_a_line() -> None:
    text = (PAGE.parent / "errors.md").read_text()
    names = [name for name, kind in vars(errors).items()
             if inspect.isclass(kind) and issubclass(kind, errors.TurnwiseError)]  # fmt: skip
    assert len(names) > 20
    assert [name for name in names if f"`{name}`" not in text and f".{name}`" not in text] == []
