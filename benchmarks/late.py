"""What does it cost to learn from answers that come hours later, out of order, and sometimes never?

    python benchmarks/late.py --seeds 0 1 2 3 4 5 6 7 --out runs/bench-late   # about 5 minutes per
        seed on 1 core

Per seed: the demo's small chat model and its SFT, then GRPO twice from there, against simulated
people who rank the conversations of each group (the true outcome is never a reward):

- *at once*: every answer is there before the update that needs it (lockstep, as `rl` does by
  default);
- *late*: answers take hours (exponential, mean 3, of a virtual clock on which playing and training
  take no time, so that as much waits as may), one in ten never comes, requests expire after 8
  hours, and play goes on meanwhile (`pending`, `staleness`).

Same seed, raters, optimizer and number of updates, 50 by default: fewer than the demo's 80, after
which both know all there is to know and nothing could be told apart. The true success of both is
measured on the same 400 held-out stories. The bar: lateness costs less than 10 points, the 90 %
interval of the paired difference over seeds (Student's t) included. A seed whose `summary.json` is
in --out already is not run again. Writes `results.json` and `results.md` into --out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import turnwise
from scipy import stats
from turnwise.engine.analysis.scores import score
from turnwise.engine.pipeline.progress import quiet
from turnwise.engine.stages.evaluate import play_held_out
from turnwise.plugins.demo.support_desk import (
    EVALUATION_SEED,
    GRPO,
    HELD_OUT,
    SFT,
    play_run,
    policy_player,
    small_model,
)

HOUR = 3600.0
STORIES = 400
MARGIN = 0.10
PEOPLE: dict[str, Any] = {"judge": "simulated-panel", "raters": 2, "noise": 0.25}
ARMS: dict[str, dict[str, Any]] = {
    "at once": {**GRPO, "feedback": [PEOPLE]},
    "late": {
        **GRPO, "feedback": [{**PEOPLE, "delay": 3 * HOUR, "unanswered": 0.1,
                "deadline": 8 * HOUR}],
        "pending": 1024, "staleness": 8, "poll": 0.25 * HOUR,
    },
}  # fmt: skip


class Clock:
    """Hours pass when the run sleeps."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def one_seed(seed: int, folder: Path, updates: int) -> dict[str, Any]:
    done = folder / "summary.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if not (folder / "sft" / "policy").is_dir():
        play_run(folder, "sft", small_model(folder, seed), [{"sft": SFT}], seed, threads=1)
    summary: dict[str, Any] = {
        "seed": seed,
        "updates": updates,
        "sft": success(folder / "sft" / "policy"),
        "arms": {},
    }
    for name, stage in ARMS.items():
        clock, since = Clock(), time.perf_counter()
        config = {"policy": str(folder / "sft" / "policy"), "seed": seed, "name": "late",
            "threads": 1, "checkpoint_every": 1000,
                  "stages": [{"rl": {**stage, "updates": updates}}]}  # fmt: skip
        run = turnwise.Run(
            config, folder=folder / name.replace(" ", "-"), clock=clock, sleep=clock.sleep
        ).finish()
        members = run.ledger.members(run.id)
        ages = [m["staleness/mean"] for m in run.metrics if "staleness/mean" in m]
        summary["arms"][name] = {
            "success": success(run.folder / "policy"),
            "hours": clock.now / HOUR,
            "curve": [m["success"] for m in run.metrics],
            "played": len(members),
            "trained": sum(m.used for m in members),
            "too_old": sum(m.reason == "too old" for m in members),
            "no_reward": sum(m.reason.startswith("no reward") for m in members),
            "staleness": statistics.mean(ages) if ages else 0.0,
            "oldest": max((m.get("staleness/max", 0.0) for m in run.metrics), default=0.0),
            "seconds": round(time.perf_counter() - since, 1),
        }
    summary["seconds"] = round(time.perf_counter() - began, 1)
    done.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def success(policy: Path) -> float:
    """On held-out stories, by sampling at temperature 1, as trained."""
    episodes = play_held_out(
        policy_player(turnwise.Policy.from_pretrained(policy)), HELD_OUT, STORIES, EVALUATION_SEED
    )
    found = score(episodes).success
    assert found is not None
    return float(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-late"))
    parser.add_argument("--updates", type=int, default=50)
    arguments = parser.parse_args()
    turnwise.Plugins()  # registers the environments
    quiet()
    found = [
        one_seed(seed, arguments.out / f"seed-{seed}", arguments.updates)
        for seed in arguments.seeds
    ]
    lines = [
        (
            f"Command: `python benchmarks/late.py --seeds {' '.join(map(str, arguments.seeds))}"
            f" --updates {arguments.updates}`. Success on {STORIES} held-out stories."
        ),
        "",
        (
            "| seed | SFT | at once | late | late - at once | hours | trained of played | too old |"
            " no reward | versions behind: mean, most |"
        ),
        "| --- " * 10 + "|",
    ]
    differences = []
    for s in found:
        prompt, late = s["arms"]["at once"], s["arms"]["late"]
        differences.append(late["success"] - prompt["success"])
        lines.append(
            f"| {s['seed']} | {s['sft']:.3f} | {prompt['success']:.3f} | {late['success']:.3f} |"
            f" {differences[-1]:+.3f} | {late['hours']:.0f} | {late['trained']:,} of"
            f" {late['played']:,} | {late['too_old']} | {late['no_reward']} |"
            f" {late['staleness']:.1f}, {late['oldest']:.0f} |"
        )
    mean = statistics.mean(differences)
    lines.append("")
    checks = {}
    if len(differences) > 1:
        half = (
            float(stats.t.ppf(0.95, len(differences) - 1))
            * statistics.stdev(differences)
            / math.sqrt(len(differences))
        )
        lines.append(
            f"Paired difference: {mean:+.3f}, 90 % interval {mean - half:+.3f} to"
            f" {mean + half:+.3f}."
        )
        lines.append("")
        checks[f"late loses less than {100 * MARGIN:.0f} points (90 % interval)"] = (
            mean - half > -MARGIN
        )
    lines += [f"- {'yes' if ok else '**NO**'}: {what}" for what, ok in checks.items()]
    (arguments.out / "results.md").write_text("\n".join(lines) + "\n")
    (arguments.out / "results.json").write_text(
        json.dumps({"checks": checks, "summaries": found}, indent=2) + "\n"
    )
    print("\n".join(lines))
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
