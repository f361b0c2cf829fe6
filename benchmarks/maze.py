"""Does RL find the way out? `turnwise/Maze-v0` from wandering demonstrators to near the optimum, on
several seeds.

    python benchmarks/maze.py --seeds 0 1 2 --out runs/bench-maze   # about 6 minutes per seed on 2
        cores

Reports, per seed, (R - random) / (optimum - random) on held-out starts, and checks that nothing
ever beats the optimum: no episode of any player (training included) exceeds its own start's
optimum, and no mean exceeds the expected optimum by more than three standard errors. The optimum is
exact, by breadth-first search. Writes `results.json` and `results.md` into --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import turnwise
from turnwise.engine.analysis.scores import score
from turnwise.engine.pipeline.progress import quiet
from turnwise.engine.policy.in_process import InProcess
from turnwise.engine.stages.environments import EnvConfig
from turnwise.engine.stages.evaluate import play_held_out
from turnwise.learning import build_policy

ENV = EnvConfig(id="turnwise/Maze-v0")
TOKENS = 8
SFT: dict[str, Any] = {
    "env": ENV.id, "episodes": 600, "epochs": 1, "batch_size": 8, "lr": 5e-3, "weight_decay": 0.01,
    "micro_tokens": 16384,
}  # fmt: skip
PPO: dict[str, Any] = {
    "env": ENV.id, "updates": 100, "groups": 128, "group_size": 1, "max_new_tokens": TOKENS,
    # returns of about -20 to -1: the critic's own scale
    "feedback": [{"judge": "environment", "weight": 0.05}],
    "backend": {"name": "in-process", "rows": 128}, "credit": {"name": "gae", "lam": 0.95},
    "optimizer": {
        "name": "ppo", "lr": 2e-3, "kl": 0.01, "epochs": 1, "minibatches": 4, "value_clip": None,
        "decay": 0.1,
        "micro_tokens": 16384,
    },
}  # fmt: skip


def leaks(episodes: list[turnwise.Episode]) -> tuple[int, float]:
    """Episodes above their own optimum, and by how many standard errors the mean exceeds the
    expected optimum."""
    above = sum(e.env_return > e.info["optimum"] + 1e-9 for e in episodes)
    gaps = [e.env_return - e.info["optimum"] for e in episodes]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    return above, statistics.mean(gaps) / error if error else 0.0


def one_seed(seed: int, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    demonstrations = play_held_out(turnwise.ScriptPlayer("demonstrator"), ENV, 100, seed)
    texts = [m.content for e in demonstrations for m in e.messages]
    model = build_policy(
        folder / "model", texts, seed=seed, hidden=64, layers=2, heads=4, context=1600
    )
    config = {
        "policy": str(model),
        "seed": seed,
        "name": f"maze-{seed}",
        "threads": 2,
        "checkpoint_every": 1000,
    }
    run = turnwise.Run(
        {**config, "stages": [{"sft": SFT}, {"rl": PPO}]}, folder=folder / "run"
    ).finish()
    players = {
        "policy": turnwise.PolicyPlayer(
            run.policy, turnwise.Sampling(1.0, TOKENS), InProcess(run.policy, rows=128)
        ),
        "expert": turnwise.ScriptPlayer("expert"),
        "random": turnwise.ScriptPlayer("random"),
    }
    played = {name: play_held_out(player, ENV, 400, 20_000) for name, player in players.items()}
    scores = {name: score(episodes) for name, episodes in played.items()}
    low, high = scores["random"].outcome, scores["expert"].optimum
    assert high is not None
    found = {name: leaks(episodes) for name, episodes in played.items()}
    found["training"] = leaks([e for e in run.ledger.run_episodes(run.id) if e.stage == "rl"])
    return {
        "seed": seed,
        "random": low,
        "sft": next(m["return"] for m in run.metrics if m["stage"] == "rl"),
        "policy": scores["policy"].outcome,
        "optimum": high,
        "closed": (scores["policy"].outcome - low) / (high - low),
        "success": scores["policy"].success,
        "above_optimum": sum(above for above, _ in found.values()),
        "worst_standard_errors": max(errors for _, errors in found.values()),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-maze"))
    arguments = parser.parse_args()
    turnwise.Plugins()  # registers the environments
    quiet()
    results = []
    for seed in arguments.seeds:
        results.append(one_seed(seed, arguments.out / f"seed-{seed}"))
        print(results[-1], flush=True)
    checks = {
        "every seed closes 95 % of random -> optimum": all(r["closed"] >= 0.95 for r in results),
        "no episode exceeds its own start's optimum": all(r["above_optimum"] == 0 for r in results),
        "no mean exceeds the expected optimum by 3 standard errors": all(
            r["worst_standard_errors"] <= 3 for r in results
        ),
    }
    lines = [
        (
            f"Command: `python benchmarks/maze.py --seeds {' '.join(map(str, arguments.seeds))}`."
            " Mean return of 400 held-out starts."
        ),
        "",
        "| seed | random | SFT (first RL batch) | PPO | optimum | distance closed | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {r['seed']} | {r['random']:.2f} | {r['sft']:.2f} | {r['policy']:.2f} |"
            f" {r['optimum']:.2f} | {r['closed']:.3f} | {r['seconds']:.0f} |"
            for r in results
        ),
        "",
        *(f"- {'yes' if ok else '**NO**'}: {what}" for what, ok in checks.items()),
        "",
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.md").write_text("\n".join(lines))
    (arguments.out / "results.json").write_text(
        json.dumps({"results": results, "checks": checks}, indent=2) + "\n"
    )
    print("\n".join(lines))
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
