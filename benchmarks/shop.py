"""Does a tiny policy learn to use tools, and to keep policies that nothing enforces? Shop-v0.

    python benchmarks/shop.py --seeds 0 1 2 --out runs/bench-shop

A Llama of four layers, made on the spot, first copies demonstrators, who forget the shop's policies
in a third of their cases; then it trains by GRPO on nothing but whether the database was right at
the end. It, its copy from before RL, and the demonstrator play 200 held-out starts, whose items no
training start has. The bar: the 95 % interval of the paired difference to its start lies above 0.

Writes `results.json` and `results.md` into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import turnwise
from turnwise.engine.pipeline.progress import quiet
from turnwise.learning import build_policy

ENV = "turnwise/Shop-v0"
TOKENS, DEMONSTRATIONS, UPDATES, EPISODES = 72, 6000, 60, 200
SFT = {
    "env": ENV, "player": "demonstrator", "episodes": DEMONSTRATIONS, "epochs": 2,
    "batch_size": 32, "lr": 3e-3, "decay": 0.1, "micro_tokens": 16384, "steps_per_update": 50,
}  # fmt: skip
RL = {
    "env": ENV, "updates": UPDATES, "groups": 16, "group_size": 8, "max_new_tokens": TOKENS,
    "optimizer": {"name": "grpo", "lr": 5e-4, "kl": 0.02, "decay": 0.1, "micro_tokens": 16384},
    "backend": {"name": "in-process", "rows": 128},
}  # fmt: skip


def finish(config: dict[str, Any], folder: Path) -> turnwise.Run:
    """Makes a run, or goes on with it where an earlier call left it."""
    return turnwise.Run(config, folder=folder, resume=(folder / "config.yaml").exists()).finish()


def untrained(seed: int, folder: Path) -> Path:
    """Makes a model of random weights that knows the shop's words."""
    starts = [(start, 0) for start in turnwise.starts(ENV, seed, 300)]
    seen = turnwise.rollout(turnwise.ScriptPlayer("demonstrator"), starts)
    texts = [m.content for e in seen for m in e.messages]
    texts += [json.dumps(tool) for tool in seen[0].tools] * 20
    return build_policy(folder, texts, seed=seed, hidden=128, layers=4, heads=4, context=2048)


def one(seed: int, folder: Path) -> dict[str, Any]:
    """Trains with a seed and returns its row."""
    began = time.perf_counter()
    shared = {"seed": seed, "name": "shop", "checkpoint_every": 20}
    model = untrained(seed, folder / "model")
    finish({**shared, "policy": str(model), "stages": [{"sft": SFT}]}, folder / "sft")
    start = str(folder / "sft" / "policy")
    evaluate = {
        "env": {"id": ENV, "options": {"split": "held_out"}}, "episodes": EPISODES,
        "players": ["policy", {"name": "sft", "policy": start}, "demonstrator"],
        "max_new_tokens": TOKENS,
    }  # fmt: skip
    config = {**shared, "policy": start, "stages": [{"rl": RL}, {"evaluate": evaluate}]}
    run = finish(config, folder / "rl")
    found = next(m for m in run.metrics if m["stage"] == "evaluate")
    return {
        "seed": seed,
        "before": found["sft/success"], "after": found["policy/success"],
        "demonstrator": found["demonstrator/success"],
        "gain": found["policy - sft/success"],
        "low": found["policy - sft/success_low"], "high": found["policy - sft/success_high"],
        "curve": [m["success"] for m in run.metrics if m["stage"] == "rl"],
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the rows, one per seed."""
    text = ["| seed | demonstrator | after SFT | after RL | gain | 95 % interval | minutes |"]
    text.append("| --- | --- | --- | --- | --- | --- | --- |")
    text += [
        f"| {r['seed']} | {r['demonstrator']:.3f} | {r['before']:.3f} | {r['after']:.3f} |"
        f" {r['gain']:+.3f} | {r['low']:+.3f} to {r['high']:+.3f} | {r['seconds'] / 60:.0f} |"
        for r in lines
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-shop"))
    given = parser.parse_args()
    turnwise.Plugins()  # registers the environment
    quiet()
    lines = []
    for seed in given.seeds:
        lines.append(one(seed, given.out / f"seed-{seed}"))
        print({k: v for k, v in lines[-1].items() if k != "curve"}, flush=True)
        (given.out / "results.json").write_text(json.dumps(lines, indent=2) + "\n")
        (given.out / "results.md").write_text(table(lines))
    print(table(lines))
    sys.exit(0 if all(r["low"] > 0 for r in lines) else 1)


if __name__ == "__main__":
    main()
