"""What does RL on the outcome alone make of a real chat model, on two CPU cores? Runs
`turnwise demo --real` for several seeds, and writes its table.

    python benchmarks/real.py --seeds 0 1 2 --out runs/demo-real

Each task of each seed takes up to 40 minutes; what an earlier call finished is not run again, and
what it left half done goes on. The bars: success on held-out starts rises by at least 20 points on
two of the three tasks, the 95 % interval of the paired difference beginning above 10; the share of
whole replies falls by no more than 5 points; the process never has 4 GB.

Writes `results.json` and `results.md` into --out; docs/demo-real.md quotes them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from turnwise.plugins.demo.real import TASKS

PAIR = "policy - as it came"


def one_seed(seed: int, folder: Path, tasks: list[str]) -> dict[str, Any]:
    """Runs the demo of a seed, unless it is done, and returns its summary."""
    summary = folder / "summary.json"
    done = json.loads(summary.read_text())["tasks"] if summary.exists() else {}
    if not set(tasks) <= set(done):
        command = [sys.executable, "-m", "turnwise", "demo", "--real", "--seed", str(seed)]
        chosen = [part for task in tasks for part in ("--task", task)]
        subprocess.run([*command, *chosen, "--folder", str(folder)], check=True)
    return dict(json.loads(summary.read_text()))


def rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for every task of every seed."""
    return [
        {
            "task": task, "seed": summary["seed"],
            "before": each["players"]["as it came"]["success"],
            "after": each["players"]["policy"]["success"],
            "gain": each["players"][PAIR]["success"],
            "low": each["players"][PAIR]["success_low"],
            "high": each["players"][PAIR]["success_high"],
            "whole": [each["fluency"][who]["whole"] for who in ("as it came", "policy")],
            "logprob": [each["fluency"][who]["logprob"] for who in ("as it came", "policy")],
            "memory": each["peak_memory"] / 1e9, "minutes": each["training_seconds"] / 60,
        }
        for summary in found
        for task, each in summary["tasks"].items()
    ]  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    head = (
        "task", "seed", "as it came", "after RL", "gain", "95 % interval", "whole replies",
        "log-prob as it came", "training, minutes", "peak GB",
    )  # fmt: skip
    text = [" | ".join(head), " | ".join(["---"] * len(head))]
    for task in TASKS:
        for r in (line for line in lines if line["task"] == task):
            cells = (
                task, str(r["seed"]), f"{r['before']:.3f}", f"{r['after']:.3f}",
                f"{r['gain']:+.3f}", f"{r['low']:+.3f} to {r['high']:+.3f}",
                f"{r['whole'][0]:.2f}, {r['whole'][1]:.2f}",
                f"{r['logprob'][0]:.2f}, {r['logprob'][1]:.2f}",
                f"{r['minutes']:.0f}", f"{r['memory']:.1f}",
            )  # fmt: skip
            text.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in text)


def bars(lines: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Returns what is wanted, and whether it holds."""
    risen = [
        task
        for task in TASKS
        if (own := [r for r in lines if r["task"] == task])
        and statistics.median(r["gain"] for r in own) >= 0.2
        and statistics.median(r["low"] for r in own) > 0.1
    ]
    return [
        (f"two of three tasks gain 20 points (medians; {', '.join(risen) or 'none'})",
            len(risen) >= 2),
        ("the share of whole replies falls by no more than 5 points on any",
            all(r["whole"][1] > r["whole"][0] - 0.05 for r in lines)),
        ("the process never has 4 GB", all(r["memory"] < 4 for r in lines)),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("runs/demo-real"))
    given = parser.parse_args()
    found = [one_seed(seed, given.out / f"seed-{seed}", given.tasks) for seed in given.seeds]
    lines = rows(found)
    (given.out / "results.json").write_text(json.dumps(lines, indent=2) + "\n")
    verdicts = [f"- {'yes' if held else 'NO'}: {what}" for what, held in bars(lines)]
    text = table(lines) + "\n\n" + "\n".join(verdicts) + "\n"
    (given.out / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
