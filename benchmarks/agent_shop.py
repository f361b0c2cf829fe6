"""Does an agent that knows nothing of Turnwise learn? A loop over tool calls, in Shop-v0's shop.

    python benchmarks/agent_shop.py --seeds 0 1 2 --out runs/bench-agent-shop

The agent (examples/agents/tool_loop.py) asks the policy by OpenAI's SDK. A Llama of four layers,
made on the spot, first learns to repeat lists of words, numbers and addresses, then copies
demonstrators of the shop, who forget its policies in a third of their cases. From there the agent
is trained by GRPO with turn credit on nothing but whether the database was right when the customer
left, once for each seed. It and the policy that it began with serve 200 held-out customers, whose
items no training customer has. The bar: the 95 % interval of the paired difference lies above 0.

Writes `results.json` and `results.md` into --out; called again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import turnwise
from shop import ENV, TOKENS, finish, untrained
from turnwise.engine.pipeline.progress import quiet

ROOT = Path(__file__).parent.parent
EPISODES = 200
COPIED, SHOWN = 20_000, 7000  # lists that are repeated first; demonstrations, and lists beside them
COLOURS = ("red", "green", "blue", "black", "white")
THINGS = ("pan", "mug", "bag", "lamp", "kettle", "clock", "rug", "chair", "mirror")
NAMES = ("ann", "ben", "cleo", "dan", "eva", "finn", "gina", "hugo")
SFT = {"batch_size": 64, "lr": 3e-3, "decay": 0.1, "micro_tokens": 16384}


def copying(count: int, longest: int) -> list[dict[str, Any]]:
    """Returns conversations in which a list is said, and repeated."""
    rng = random.Random(0)

    def word() -> str:
        kind = rng.randrange(4)
        if kind < 2:
            return f"W{rng.randrange(1000, 10000)}"
        if kind == 2:
            return f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
        return f"{rng.choice(NAMES)}@example.com"

    said = [json.dumps([word() for _ in range(rng.randint(2, longest))]) for _ in range(count)]
    return [
        {"messages": [{"role": role, "content": text} for role in ("user", "assistant")]}
        for text in said
    ]


def beginning(folder: Path) -> str:
    """Makes the policy that RL begins with. Returns its folder."""
    model = folder / "model"
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        starts = [(start, 0) for start in turnwise.starts(ENV, 0, SHOWN)]
        shown = [
            {"messages": [{"role": m.role, "content": m.content} for m in e.messages],
             "tools": e.tools}
            for e in turnwise.rollout(turnwise.ScriptPlayer("demonstrator"), starts)
        ]  # fmt: skip
        for name, rows in (
            ("copy", copying(COPIED, 12)), ("rows", [*shown, *copying(SHOWN, 14)]),
        ):  # fmt: skip
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines)
        untrained(0, model)
    policy = str(model)
    for name, data, own in (
        ("copy", "copy", {"epochs": 2, "steps_per_update": 50}),
        ("mix", "rows", {"steps_per_update": 25}),
    ):
        sft = {**SFT, **own, "data": str(folder / f"{data}.jsonl")}
        config = {"seed": 0, "name": name, "policy": policy, "stages": [{"sft": sft}]}
        policy = str(finish(config, folder / name).folder / "policy")
    return policy


def agent(tasks: str) -> dict[str, Any]:
    """Returns the agent as an environment."""
    kwargs = {"program": "examples.agents.shop:play", "held_out": 0.0}
    return {
        "id": "turnwise/Agent-v0",
        "kwargs": {**kwargs, "tasks": f"python:examples.agents.shop:{tasks}"},
    }


def one(seed: int, start: str, folder: Path, updates: int) -> dict[str, Any]:
    """Trains with a seed and returns its row."""
    began = time.perf_counter()
    rl = {
        "env": agent("training"), "updates": updates, "groups": 8, "group_size": 8,
        "max_new_tokens": TOKENS, "credit": "turn-returns",
        "optimizer": {"name": "grpo", "lr": 3e-4, "kl": 0.02, "decay": 0.1, "micro_tokens": 16384},
        "backend": {"name": "in-process", "rows": 64},
    }  # fmt: skip
    evaluate = {
        "env": agent("held_out"), "episodes": EPISODES, "max_new_tokens": TOKENS,
        "players": ["policy", {"name": "sft", "policy": start}],
    }  # fmt: skip
    config = {
        "seed": seed, "name": "shop", "policy": start, "checkpoint_every": 10,
        "stages": [{"rl": rl}, {"evaluate": evaluate}],
    }  # fmt: skip
    run = finish(config, folder)
    found = next(m for m in run.metrics if m["stage"] == "evaluate")
    trained = [m for m in run.metrics if m["stage"] == "rl"]
    return {
        "seed": seed,
        "before": found["sft/success"], "after": found["policy/success"],
        "gain": found["policy - sft/success"],
        "low": found["policy - sft/success_low"], "high": found["policy - sft/success_high"],
        "curve": [m["success"] for m in trained], "forks": [m.get("forks", 0.0) for m in trained],
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the rows, one per seed."""
    text = ["| seed | after SFT | after RL | gain | 95 % interval | minutes |"]
    text.append("| --- | --- | --- | --- | --- | --- |")
    text += [
        f"| {r['seed']} | {r['before']:.3f} | {r['after']:.3f} | {r['gain']:+.3f} |"
        f" {r['low']:+.3f} to {r['high']:+.3f} | {r['seconds'] / 60:.0f} |"
        for r in lines
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-agent-shop"))
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # the examples
    turnwise.Plugins()  # registers the environments
    quiet()
    lines, start = [], beginning(given.out)
    for seed in given.seeds:
        lines.append(one(seed, start, given.out / f"seed-{seed}", given.updates))
        print({k: v for k, v in lines[-1].items() if k != "curve"}, flush=True)
        (given.out / "results.json").write_text(json.dumps(lines, indent=2) + "\n")
        (given.out / "results.md").write_text(table(lines))
    print(table(lines))
    sys.exit(0 if all(r["low"] > 0 for r in lines) else 1)


if __name__ == "__main__":
    main()
