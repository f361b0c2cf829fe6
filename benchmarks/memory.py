"""The memory that play and an update take: 32 conversations of some 300 tokens, on a real model.

    turnwise model get smollm2-135m
    python benchmarks/memory.py smollm2-135m --lora --activation-memory 0.3
    python benchmarks/memory.py smollm2-135m --activation-memory 0.3

Prints resident memory in MB: after loading, the peak of play, and the peaks of the first update and
of the second (GRPO, AdamW), in the one process that does all of it. Linux only: it asks the kernel.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import gymnasium
import torch
import turnwise
from turnwise.engine.policy.fitting import Setting, Shape
from turnwise.learning import InProcess, make_batch

TURNS, REPLY, WORDS = 5, 32, 18


class Talk(gymnasium.Env):
    """Answers with as many words every time."""

    observation_space = action_space = turnwise.Text(1_000_000)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        """Opens a conversation."""
        self.turns = 0
        return f"Tell me of the number {int(seed or 0) % 1000}. " + "and then " * WORDS, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answers a reply."""
        self.turns += 1
        return "and what comes then " * (WORDS // 4), 0.0, self.turns == TURNS, False, {}


def resident(name: str) -> float:
    """Returns a field of the process's memory, in MB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def peak_of(work: Any) -> tuple[Any, float, float]:
    """Runs something. Returns its result, the peak of resident memory in MB, and seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    since = time.perf_counter()
    result = work()
    return result, resident("VmHWM"), time.perf_counter() - since


def predict(given: argparse.Namespace) -> None:
    """Prints what `turnwise fits` expects of the same."""
    setting = Setting(
        given.conversations, given.tokens, lora=16 if given.lora else None, dtype=given.dtype,
        quantize=given.quantize, activation_memory=given.activation_memory,
    )  # fmt: skip
    peaks = Shape(given.model).peaks(setting)
    print(f"predicted: play {peaks.play / 2**20:.0f} MB, update {peaks.update / 2**20:.0f} MB")


def main() -> None:
    """Prints a line for each phase."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--lora", action="store_true", help="Train adapters of rank 16.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", choices=["nf4", "int8"], help="The weights below adapters.")
    parser.add_argument("--activation-memory", type=float, default=None, help="GiB")
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=348, help="Of a conversation, predicted.")
    parser.add_argument("--predict", action="store_true", help="As `turnwise fits` does, instead.")
    given = parser.parse_args()
    if given.predict:
        predict(given)
        return
    torch.set_num_threads(given.threads)
    gymnasium.register("memory/Talk-v0", lambda **_: Talk())
    policy = turnwise.Policy.from_pretrained(
        given.model, lora={"r": 16} if given.lora else None, dtype=given.dtype, device="cpu",
        quantize=given.quantize,
    )  # fmt: skip
    policy.chat.stop_ids = frozenset()  # replies of exactly as many tokens
    optimizer = turnwise.Plugins().create(
        "optimizer", "grpo", lr=1e-6, kl=0.0, activation_memory=given.activation_memory
    )
    optimizer.setup(policy)
    trained = "LoRA" if given.lora else "all weights"
    print(f"{given.model}, {trained}, {given.quantize or given.dtype}")
    print(f"loaded: {resident('VmRSS'):.0f} MB")
    backend = InProcess(policy, rows=given.conversations)
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, REPLY), backend)
    groups = turnwise.starts("memory/Talk-v0", 0, given.conversations // 4)
    starts = [(start, slot) for start in groups for slot in range(4)]
    episodes, peak, took = peak_of(lambda: turnwise.rollout(player, starts))
    tokens = [sum(len(t.prompt_ids) + len(t.action_ids or ()) for t in e.turns) for e in episodes]
    print(f"play: {peak:.0f} MB, {took:.0f} s, {sum(tokens) / len(tokens):.0f} tokens each")
    backend.refresh()

    def update() -> dict[str, float]:
        rewards = [turnwise.Rewards(r, (0.0,) * (TURNS - 1) + (r,)) for r in map(float, range(32))]
        batch = make_batch(episodes, (rewards * len(episodes))[: len(episodes)])
        batch.credit = turnwise.Plugins().create("credit method", "outcome").assign(batch)
        optimizer.prepare(policy, batch)
        return dict(optimizer.update(policy, batch))

    _, first, _ = peak_of(update)  # AdamW has no moments yet, until its step
    metrics, peak, took = peak_of(update)
    print(f"first update: {first:.0f} MB")
    print(f"update: {peak:.0f} MB, {took:.0f} s, gradient's norm {metrics['grad_norm']:.3g}")


if __name__ == "__main__":
    main()
