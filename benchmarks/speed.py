"""Times Turnwise beside TRL's GRPOTrainer: the same weights, conversations, threads and sampling.

Both sides run as processes of their own, one after the other, in pairs that take turns, so that a
machine that is busy for a while is so for both. Reported are medians over the pairs of the mean of
all steps but the first, with their range; the ratio is the median of the pairs' ratios. Memory is
the peak of the process.

    pip install trl==1.16.0     # or --target somewhere, and --trl somewhere
    python benchmarks/speed.py A-nano A-small B C --pairs 3
    python benchmarks/speed.py turns-5 turns-40 --alone    # Turnwise only: how cost grows
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from speed_work import WORKS

HERE = Path(__file__).parent


def measure(
    side: str, work: str, steps: int, threads: int, folder: Path, trl: str, options: str
) -> dict[str, Any]:
    """Runs one process of a side and returns what it printed."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "SPEED_BEGAN": str(time.time()),
        "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    if trl and side == "trl":
        environment["PYTHONPATH"] = f"{trl}:{environment.get('PYTHONPATH', '')}"
    command = [
        sys.executable, "-W", "ignore", str(HERE / f"speed_{side}.py"), work, str(folder),
        str(steps), str(threads), options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def summary(found: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of one process, the first step left out where there are more."""
    later = slice(1, None) if len(found["step"]) > 1 else slice(None)
    play, step = sum(found["play"][later]), sum(found["step"][later])
    tokens, count = sum(found["tokens"][later]), len(found["step"][later])
    return {
        "play": play / count,
        "step": step / count,
        "rest": (step - play) / count,
        "rate": tokens / play,
        "each": step / tokens * 1000,
        "memory": found["memory"],
        "first": found["first"],
    }


def shown(values: list[float]) -> str:
    """Returns a median and its range."""
    middle = statistics.median(values)
    return f"{middle:.3g} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    """Prints a table for every work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("works", nargs="+", choices=[*WORKS])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a process; the first is warm-up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="Turnwise only")
    parser.add_argument("--trl", default="", help="folder that trl is installed in")
    parser.add_argument("--options", default="{}", help="of Turnwise's rl stage, as JSON")
    given = parser.parse_args()
    sides = ["turnwise"] if given.alone else ["trl", "turnwise"]
    with tempfile.TemporaryDirectory() as folder:
        for work in given.works:
            rows: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for _ in range(given.pairs):
                for side in sides:
                    options = given.options if side == "turnwise" else "{}"
                    found = measure(
                        side, work, given.steps, given.threads, Path(folder), given.trl, options
                    )
                    rows[side].append(summary(found))
            print(f"\n{work}: {WORKS[work]}")
            print("| | " + " | ".join(sides) + (" | trl : turnwise |" if len(sides) > 1 else " |"))
            print("| --- " * (len(sides) + 1 + (len(sides) > 1)) + "|")
            for key, what in (
                ("play", "play, s"), ("rest", "everything else of a step, s"), ("step", "step, s"),
                ("rate", "tokens per second of play"), ("each", "ms of a step per token"),
                ("memory", "peak memory, MB"), ("first", "start to first update, s"),
            ):  # fmt: skip
                cells = [shown([row[key] for row in rows[side]]) for side in sides]
                if len(sides) > 1:
                    pairs = zip(rows["trl"], rows["turnwise"], strict=True)
                    cells.append(shown([a[key] / b[key] for a, b in pairs]))
                print(f"| {what} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
