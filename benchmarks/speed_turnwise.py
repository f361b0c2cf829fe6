"""One process of Turnwise at work: `python speed_turnwise.py WORK FOLDER STEPS THREADS [JSON]`,
with the time it was started in SPEED_BEGAN.

Prints a line of JSON: seconds of play and of whole steps, tokens, the peak of memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import torch
import turnwise
from speed_work import (
    BYE,
    GROUP,
    REPLY,
    WORKS,
    Work,
    answer,
    length,
    make,
    question,
    reward,
    system_of,
)


class Talk(gymnasium.Env):
    """Answers with words of its own until it has heard enough."""

    observation_space = action_space = turnwise.Text(1_000_000)
    work: Work

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        """Opens a conversation."""
        self.start = int(seed or 0)
        self.replies: list[str] = []
        return question(self.start), {"system": system_of(self.work)}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Hears a reply."""
        self.replies.append(action)
        if len(self.replies) >= length(self.work, self.start, self.replies[0]):
            return BYE, reward(self.replies), True, False, {}
        return answer(self.start, len(self.replies), action), 0.0, False, False, {}


def main() -> None:
    """Runs updates and prints what they took."""
    name, folder, steps, threads, *more = sys.argv[1:]
    work, options = WORKS[name], json.loads(more[0]) if more else {}
    torch.set_num_threads(int(threads))
    Talk.work = work
    gymnasium.register("speed/Talk-v0", lambda **_: Talk())
    policy = turnwise.Policy.from_pretrained(make(work, Path(folder)), device="cpu")
    policy.chat.stop_ids = frozenset()  # replies of exactly as many tokens
    stage: dict[str, Any] = {
        "env": "speed/Talk-v0", "updates": int(steps), "groups": work.dialogues // GROUP,
        "group_size": GROUP, "max_new_tokens": REPLY, "max_turns": 1000,
        "optimizer": {"name": "grpo", "lr": 1e-6, "kl": 0.0}, **options,
    }  # fmt: skip
    found: dict[str, Any] = {"play": [], "step": [], "tokens": []}
    with tempfile.TemporaryDirectory() as runs:
        config = {"policy": policy, "stages": [{"rl": stage}], "checkpoint_every": 1000}
        run = turnwise.Run(config, folder=Path(runs) / "run")
        ready, since = time.time(), time.perf_counter()
        for update in run:
            found["play"].append(update.metrics["seconds/play"])
            found["step"].append(time.perf_counter() - since)
            found["tokens"].append(
                sum(len(t.action_ids or ()) for e in update.episodes for t in e.turns)
            )
            since = time.perf_counter()
            if len(found["step"]) == int(steps):
                break
    found["first"] = ready - float(os.environ["SPEED_BEGAN"]) + found["step"][0]
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main()
