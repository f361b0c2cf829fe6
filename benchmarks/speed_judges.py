"""How much of a run's speed is left when a judge takes 2 seconds an answer: 64 conversations an
update, of six turns, each scored by a rubric judge that asks a server on this machine.

    python benchmarks/speed_judges.py --model A-nano --rounds 1

Three ways take turns, each a run of its own: a judge that answers at once; the slow one, with each
update waiting for its own answers; and the slow one with `pending`, which plays the next round
while the last is judged (one version stale). Printed are the mean of the seconds per update, the
first left out, their range, and the share of the speed without latency. With `pending` every other
update plays two rounds, and the next one none.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import torch
import turnwise
from speed_turnwise import Talk
from speed_work import GROUP, REPLY, WORKS, make

SERVER = Path(__file__).parents[1] / "tests" / "support" / "model_server.py"
VERDICTS = f"{Path(__file__).with_name('speed_verdicts.py')}:verdict"
CONVERSATIONS = 64
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "no latency": (False, {}),
    "each update waits": (True, {}),
    "`pending: 128`, `staleness: 1`": (True, {"pending": 2 * CONVERSATIONS, "staleness": 1}),
}


def serve(seconds: float) -> tuple[subprocess.Popen[str], str]:
    """Starts a server that answers after so many seconds; returns it and its address."""
    command = [sys.executable, str(SERVER), "--behaviour", VERDICTS, "--seconds", str(seconds)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, server.stdout.readline().split()[-1]


def updates(policy: turnwise.Policy, url: str, more: dict[str, Any], count: int) -> list[float]:
    """Makes updates; returns the seconds of each but the first."""
    judge = {
        "judge": "rubric", "rubric": "Was it kind?", "concurrency": CONVERSATIONS, "cache": False,
        "canaries": 0,
        "model": {
            "provider": "openai-chat", "model": "slow", "url": f"{url}/v1", "api_key": "none",
        },
    }  # fmt: skip
    stage: dict[str, Any] = {
        "env": "speed/Talk-v0", "updates": count, "groups": CONVERSATIONS // GROUP,
        "group_size": GROUP, "max_new_tokens": REPLY, "poll": 0.05, "feedback": [judge],
        "optimizer": {"name": "grpo", "lr": 1e-6, "kl": 0.0}, **more,
    }  # fmt: skip
    took = []
    with tempfile.TemporaryDirectory() as folder:
        config = {"policy": policy, "stages": [{"rl": stage}], "checkpoint_every": 1000}
        run = turnwise.Run(config, folder=Path(folder) / "run")
        since = time.perf_counter()
        for _ in run:
            took.append(time.perf_counter() - since)
            since = time.perf_counter()
    return took[1:]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="A-small", choices=["A-nano", "A-small"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    Talk.work = WORKS[given.model]
    gymnasium.register("speed/Talk-v0", lambda **_: Talk())
    servers = {slow: serve(2.0 if slow else 0.0) for slow in (False, True)}
    took: dict[str, list[float]] = {name: [] for name in WAYS}
    try:
        with tempfile.TemporaryDirectory() as folder:
            policy = turnwise.Policy.from_pretrained(make(Talk.work, Path(folder)), device="cpu")
            policy.chat.stop_ids = frozenset()
            for _ in range(given.rounds):
                for name, (slow, more) in WAYS.items():
                    took[name] += updates(policy, servers[slow][1], more, given.updates)
    finally:
        for server, _ in servers.values():
            server.kill()
    print("| | seconds per update | share of the speed without latency |\n| --- | --- | --- |")
    whole = statistics.mean(took["no latency"])
    for name, own in took.items():
        mean = statistics.mean(own)
        print(f"| {name} | {mean:.2f} ({min(own):.2f} to {max(own):.2f}) | {whole / mean:.0%} |")


if __name__ == "__main__":
    main()
