"""What does it cost to ask a policy over HTTP? The same conversations, in process and by programs.

    python benchmarks/agent_overhead.py --pairs 3

32 conversations at a time, six turns of 32 tokens each, 11.5 M parameters of random weights: as an
environment, as Python functions that use OpenAI's SDK, and (`--commands`) as processes of their own
that speak HTTP. The ways take turns; medians, and the median of each pair's ratio. The bar: at most
15 % over in process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import torch
import turnwise
from speed_work import WORKS, make
from turnwise.learning import InProcess

ROOT = Path(__file__).parent.parent
ENV, TURNS, REPLY, CONVERSATIONS = "turnwise-bench/Questions-v0", 6, 32, 32
SYSTEM = "You answer."


def question(seed: int, turn: int) -> str:
    """Returns what is asked in a turn."""
    return f"What comes after {(seed + turn) % 1000}, and what comes then?"


class Questions(gymnasium.Env[str, str]):
    """Asks so many questions."""

    observation_space = action_space = turnwise.Text(1_000_000)
    metadata = {"special_tokens": True}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        self.seed, self.turn = int(seed or 0), 0
        return question(self.seed, 0), {"system": SYSTEM}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        return question(self.seed, self.turn), 0.0, self.turn == TURNS, False, {}


def ask(endpoint: Any) -> None:
    """Asks the same by OpenAI's SDK."""
    from openai import OpenAI

    with OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
        messages: list[Any] = [{"role": "system", "content": SYSTEM}]
        for turn in range(TURNS):
            messages.append({"role": "user", "content": question(endpoint.seed, turn)})
            made = client.chat.completions.create(model=endpoint.model, messages=messages)
            messages.append(made.choices[0].message)


COMMAND = f"""
import json, os, urllib.request
seed, messages = int(os.environ["TURNWISE_SEED"]), [{{"role": "system", "content": {SYSTEM!r}}}]
for turn in range({TURNS}):
    text = f"What comes after {{(seed + turn) % 1000}}, and what comes then?"
    messages.append({{"role": "user", "content": text}})
    asked = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({{"model": "policy", "messages": messages}}).encode(),
        {{"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}},
    )
    messages.append(json.load(urllib.request.urlopen(asked))["choices"][0]["message"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="A-small", choices=sorted(WORKS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--commands", action="store_true", help="Processes of their own as well.")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    turnwise.Plugins()
    gymnasium.register(ENV, lambda **_: Questions())
    folder = Path(tempfile.mkdtemp())
    folder = make(WORKS[given.model], folder)
    policy = turnwise.Policy.from_pretrained(folder)
    policy.chat.stop_ids = frozenset()  # replies of exactly as many tokens
    backend = InProcess(policy, rows=CONVERSATIONS)
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, REPLY), backend)
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "in process": (ENV, {}),
        "functions, openai": ("turnwise/Agent-v0", {"program": "agent_overhead:ask"}),
    }
    if given.commands:
        command = {"command": [sys.executable, "-c", COMMAND]}
        ways["commands, urllib"] = ("turnwise/Agent-v0", command)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for pair in range(given.pairs + 1):
        for way, (env, kwargs) in ways.items():
            starts = [(s, 0) for s in turnwise.starts(env, pair, CONVERSATIONS, kwargs=kwargs)]
            backend.refresh()
            since = time.perf_counter()
            episodes = turnwise.rollout(player, starts)
            took = time.perf_counter() - since
            assert all(len(e.turns) == TURNS for e in episodes), episodes[0].reason
            if pair:  # the first one warms up
                seconds[way].append(took)
    found = {
        way: {
            "seconds": statistics.median(own), "least": min(own), "most": max(own),
            "over": statistics.median(
                a / b - 1 for a, b in zip(own, seconds["in process"], strict=True)
            ),
        }
        for way, own in seconds.items()
    }  # fmt: skip
    print("| | seconds | over in process |\n| --- | --- | --- |")
    for way, own in found.items():
        spread = f"{own['seconds']:.2f} ({own['least']:.2f} to {own['most']:.2f})"
        print(f"| {way} | {spread} | {own['over']:+.1%} |")
    print(json.dumps(found))
    sys.exit(0 if found["functions, openai"]["over"] <= 0.15 else 1)


if __name__ == "__main__":
    main()
