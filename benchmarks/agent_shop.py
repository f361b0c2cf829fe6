"""Does an agent that knows nothing of Turnwise learn? A loop over tool calls, in Shop-v0's shop.

    python benchmarks/agent_shop.py --seeds 0 1 2 --out runs/bench-agent-shop

The agent (examples/agents/tool_loop.py) asks the policy by OpenAI's SDK. A Llama of four layers,
made on the spot, first learns to repeat lists of numbers, things and addresses, then copies
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
import re
import sys
import time
from pathlib import Path
from typing import Any

import turnwise
from shop import ENV, TOKENS, finish
from transformers import AutoTokenizer
from turnwise.engine.pipeline.progress import quiet
from turnwise.envs.shop import COLOURS, HELD_OUT, NAMES, NOUNS
from turnwise.learning import build_policy

ROOT = Path(__file__).parent.parent
EPISODES = 200
COPIED, SHOWN = 32_000, 6000  # lists that are repeated first; demonstrations
THINGS = (*NOUNS, *HELD_OUT)
SFT = {"decay": 0.1, "micro_tokens": 16384}
# The tools by their signatures: their schemas are ten times as long.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.first and tools %}{% for tool in tools %} {{ tool.function.name }}("
    "{{ (tool.function.parameters.properties or {}) | join(', ') }}){% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def untrained(folder: Path) -> None:
    """Makes a model of random weights that knows the shop's words, and numbers digit by digit: an
    order's number is copied, and what is copied must have been seen in other places."""
    starts = [(start, 0) for start in turnwise.starts(ENV, 0, 300)]
    seen = turnwise.rollout(turnwise.ScriptPlayer("demonstrator"), starts)
    texts = [re.sub(r"\d", r" \g<0> ", m.content) for e in seen for m in e.messages]
    texts += [f"{colour} {thing}" for colour in COLOURS for thing in THINGS] * 20
    build_policy(folder, texts, seed=0, hidden=128, layers=4, heads=4, context=2048)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def copying(count: int, longest: int) -> list[dict[str, Any]]:
    """Returns conversations in which things are named, and repeated as a list."""
    rng = random.Random(0)

    def word() -> str:
        kind = rng.randrange(4)
        if kind < 2:
            return f"W{rng.randrange(1000, 10000)}"
        if kind == 2:
            return f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
        return f"{rng.choice(NAMES)}@example.com"

    rows = []
    for _ in range(count):
        named = [word() for _ in range(rng.randint(1, longest))]
        listed = json.dumps(named)
        asked = listed if rng.random() < 0.5 else f"It is {', '.join(named)}."
        pair = zip(("user", "assistant"), (asked, listed), strict=True)
        rows.append({"messages": [{"role": role, "content": text} for role, text in pair]})
    return rows


def shown(count: int) -> list[dict[str, Any]]:
    """Returns conversations of demonstrators; each result of a tool is a message of its own, as
    the agent sends them."""
    starts = [(start, 0) for start in turnwise.starts(ENV, 0, count)]
    return [
        {
            "messages": [
                {"role": one.role, "content": one.content} for m in e.messages for one in m.unjoined
            ],
            "tools": e.tools,
        }
        for e in turnwise.rollout(turnwise.ScriptPlayer("demonstrator"), starts)
    ]


def beginning(folder: Path) -> str:
    """Makes the policy that RL begins with. Returns its folder."""
    model = folder / "model"
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("copy", copying(COPIED, 6)), ("shown", shown(SHOWN))):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines)
        untrained(model)
    policy = str(model)
    for name, own in (
        ("copy", {"batch_size": 64, "lr": 3e-3, "steps_per_update": 50}),
        ("shown", {"batch_size": 32, "lr": 2e-3, "epochs": 2, "steps_per_update": 25}),
    ):
        sft = {**SFT, **own, "data": str(folder / f"{name}.jsonl")}
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
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
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
