"""Does the whole road hold? `turnwise demo --road` on several seeds, and what each step is worth.

    python benchmarks/road.py --seeds 0 1 2 3 4 --out runs/bench-road   # about 10 minutes per seed
        on 2 cores

Checks, over the seeds: PPO against the reward model gains 25 points of true success over SFT in the
median and loses on none; the reward model is right about the truth as often as single raters, less
3 points, on at least 2,000 held-out pairs; training takes under 12 minutes (on two threads). A seed
whose `summary.json` is in --out already is not run again. Writes `results.json` and `results.md`
into --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import turnwise
from turnwise.plugins.demo.rlhf import run_road

PLAYERS = ("expert", "random", "demonstrator", "sft", "best-of-4", "best-of-16", "ppo-rm", "grpo")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-road"))
    parser.add_argument(
        "--threads",
        type=int,
        help="torch's; with 1, two seeds at a time take less time than one after the other",
    )
    arguments = parser.parse_args()
    turnwise.Plugins()  # registers the environments
    found = []
    for seed in arguments.seeds:
        done = arguments.out / f"seed-{seed}" / "summary.json"
        found.append(
            json.loads(done.read_text())
            if done.exists()
            else run_road(done.parent, seed=seed, threads=arguments.threads)
        )
    gains = [s["players"]["ppo-rm"]["success"] - s["players"]["sft"]["success"] for s in found]
    models = [s["reward_model"] for s in found]
    training = [s["seconds"]["sft"] + s["seconds"]["grpo"] + s["seconds"]["road"] for s in found]
    checks = {
        "PPO against the reward model gains 25 points of true success over SFT (median)": (
            statistics.median(gains) >= 0.25
        ),
        "it is below SFT on none": min(gains) >= 0,
        "pair accuracy against the truth >= single raters' - 3 points (every seed)": all(
            m["pair_accuracy"] >= m["rater_agreement"] - 0.03 for m in models
        ),
        "on at least 2,000 held-out pairs (every seed)": all(
            m["truth_pairs"] >= 2000 for m in models
        ),
        "training and evaluation take under 12 minutes (every seed)": max(training) < 720,
    }
    lines = [
        (
            f"Command: `python benchmarks/road.py --seeds {' '.join(map(str, arguments.seeds))}`."
            " Success on 400 held-out stories."
        ),
        "",
        "| seed | "
        + " | ".join(PLAYERS)
        + " | gain, 95 % | pair accuracy | single raters | calibration error | seconds |",
        "| --- " * (len(PLAYERS) + 6) + "|",
    ]
    for summary, seconds in zip(found, training, strict=True):
        model, pair = summary["reward_model"], summary["pairs"]["ppo-rm - sft"]
        scores = " | ".join(f"{summary['players'][name]['success']:.3f}" for name in PLAYERS)
        lines.append(
            f"| {summary['seed']} | {scores} | {pair['success_low']:+.3f} to"
            f" {pair['success_high']:+.3f} | {model['pair_accuracy']:.3f} |"
            f" {model['rater_agreement']:.3f} | {model['calibration_error']:.3f} | {seconds:.0f} |"
        )
    medians = [statistics.median(s["players"][name]["success"] for s in found) for name in PLAYERS]
    lines += [
        (
            f"| median | {' | '.join(f'{m:.3f}' for m in medians)} |"
            f" {statistics.median(gains):+.3f} | | | | |"
        ),
        "",
    ]
    lines += [f"- {'yes' if ok else '**NO**'}: {what}" for what, ok in checks.items()]
    (arguments.out / "results.md").write_text("\n".join(lines) + "\n")
    (arguments.out / "results.json").write_text(
        json.dumps({"checks": checks, "summaries": found}, indent=2) + "\n"
    )
    print("\n".join(lines))
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
