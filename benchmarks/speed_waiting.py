"""How much of the throughput is left when environments are slow: 64 conversations at a time whose
steps take 200 ms in the mean, with a heavy tail (lognormal, sigma 1.2), in threads.

    python benchmarks/speed_waiting.py --model A-small --rounds 3 --threads 1
    python benchmarks/speed_waiting.py --model A-small --ray 2

With `--ray` workers on this machine play, each its share of the 64 at a time. Rounds of the three
ways of playing take turns; printed are medians and ranges of tokens per second, and the share of
the throughput without latency.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import torch
import turnwise
from speed_work import WORKS, answer, make, question
from turnwise.engine.environments.pool import Environments
from turnwise.engine.rollout.elsewhere import Schedule
from turnwise.learning import InProcess
from turnwise.plugins.backends.ray import Ray

MEAN, SIGMA = 0.2, 1.2
TURNS, AT_A_TIME = 6, 64


class Slow(gymnasium.Env):
    """Answers after a while, which is the same for the same start and turn."""

    observation_space = action_space = turnwise.Text(1_000_000)
    metadata: dict[str, Any] = {"concurrency": "thread"}

    def __init__(self, waits: bool) -> None:
        self.waits = waits

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        """Opens a conversation."""
        self.start, self.turns = int(seed or 0), 0
        return question(self.start), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Hears a reply."""
        self.turns += 1
        if self.waits:
            draw = random.Random(repr((self.start, self.turns)))
            time.sleep(draw.lognormvariate(math.log(MEAN) - SIGMA**2 / 2, SIGMA))
        done = self.turns == TURNS
        return answer(self.start, self.turns, action), 0.0, done, False, {}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", type=int, default=0, help="workers; 0: in this process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--conversations", type=int, default=192)
    parser.add_argument("--model", default="A-small", choices=["A-nano", "A-small"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    gymnasium.register("speed/Slow-v0", lambda **_: Slow(waits=True))
    gymnasium.register("speed/Quick-v0", lambda **_: Slow(waits=False))
    ways: dict[str, tuple[bool, Schedule]] = {
        "no latency": (False, "deterministic"),
        "deterministic": (True, "deterministic"),
        "ready-first": (True, "ready-first"),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        policy = turnwise.Policy.from_pretrained(
            make(WORKS[given.model], Path(folder)), device="cpu"
        )
        policy.chat.stop_ids = frozenset()
        for _ in range(given.rounds + 1):  # the first one warms up
            for name, (slow, schedule) in ways.items():
                env = "speed/Slow-v0" if slow else "speed/Quick-v0"
                starts = [(s, 0) for s in turnwise.starts(env, 0, given.conversations)]
                backend: Any = (
                    Ray(policy, workers=given.ray, rows=AT_A_TIME // given.ray)
                    if given.ray
                    else InProcess(policy, rows=AT_A_TIME)
                )
                player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 32), backend)
                environments = Environments()
                since = time.perf_counter()
                episodes = turnwise.rollout(
                    player, starts, schedule=schedule, environments=environments
                )
                took = time.perf_counter() - since
                environments.close()
                tokens = sum(len(t.action_ids or ()) for e in episodes for t in e.turns)
                rates[name].append(tokens / took)
    whole = rates["no latency"][1:]
    print("| | tokens per second | share of the throughput without latency |\n| --- | --- | --- |")
    for name in ways:
        own = rates[name][1:]
        share = [a / b for a, b in zip(own, whole, strict=True)]
        print(
            f"| {name} | {statistics.median(own):.0f} ({min(own):.0f} to {max(own):.0f}) |"
            f" {statistics.median(share):.0%} ({min(share):.0%} to {max(share):.0%}) |"
        )


if __name__ == "__main__":
    main()
