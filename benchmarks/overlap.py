"""What a slow judge costs a run on Ray, with and without playing ahead: seconds per update.

    python benchmarks/overlap.py [--updates 8] [--pairs 3] [--latency 2] [--groups 12]

One worker and the update share the machine, with a thread each. The judge waits, and computes
nothing. Settings take turns; the first two updates of each, which start workers, do not count.

A round takes play P, judgement J and update U, and with `overlap: N` there are N + 1 of them at a
time: an update takes the longest of P, U and (P + J + U) / (N + 1).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import turnwise
from turnwise.engine.policy.tiny import build_policy

SETTINGS = {
    "no latency, overlap 1": (0.0, 1), "overlap 2": (None, 2), "overlap 1": (None, 1),
    "overlap 0": (None, 0),
}  # fmt: skip


class Slow(turnwise.Judge):
    """Scores the words of the first reply, after a while."""

    version = "1"

    def __init__(self, latency: float) -> None:
        self.latency = latency

    async def score(self, episodes: Sequence[turnwise.Episode]) -> list[turnwise.Feedback]:
        """Waits once for all."""
        await asyncio.sleep(self.latency)
        return [turnwise.Feedback(e.id, score=float(len(e.turns[0].action) % 7)) for e in episodes]


def seconds(folder: Path, latency: float, overlap: int, updates: int, groups: int) -> float:
    """Returns the median time from one update to the next."""
    rl: dict[str, Any] = {
        "env": "turnwise/SupportDesk-v0", "updates": updates + 2, "groups": groups, "group_size": 8,
        "max_new_tokens": 24, "feedback": [Slow(latency)], "overlap": overlap, "poll": 0.05,
        "optimizer": {"lr": 1e-5}, "backend": {"name": "ray", "workers": 1, "rows": 96},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as run:
        config = {"policy": str(folder), "threads": 1, "stages": [{"rl": rl}],
                  "checkpoint_every": 1000}  # fmt: skip
        times = [
            float(m["time"]) for m in turnwise.Run(config, folder=Path(run) / "r").finish().metrics
        ]
    apart = [b - a for a, b in itertools.pairwise(times[1:])]
    return statistics.median(apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--latency", type=float, default=2.0)
    parser.add_argument("--groups", type=int, default=12)
    given = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        build_policy(folder, ["I need help with my order, please."] * 5, hidden=192, layers=4)
        for _ in range(given.pairs):
            for name, (latency, overlap) in SETTINGS.items():
                wait = given.latency if latency is None else latency
                made = seconds(Path(folder), wait, overlap, given.updates, given.groups)
                found[name].append(made)
    base = statistics.median(found["no latency, overlap 1"])
    print(f"| a judge of {given.latency:g} s | seconds per update | of the throughput |")
    print("| --- | --- | --- |")
    for name, each in found.items():
        middle = statistics.median(each)
        print(
            f"| {name} | {middle:.2f} ({min(each):.2f} to {max(each):.2f}) | {base / middle:.0%} |"
        )


if __name__ == "__main__":
    main()
