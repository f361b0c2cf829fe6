"""Where the time of decoding and of an update goes: torch's operators, beside the machine's rates.

    python benchmarks/speed_profile.py A-small --rows 32 --length 200

Decoding: one token for each of so many conversations. Update: forward and backward passes over 16
conversations of 349 tokens. Printed are the largest operators' shares of the time; for decoding,
also how long its attention takes beside reading the keys and values once, which no attention can do
without.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import turnwise
from speed_work import WORKS, make
from torch.profiler import ProfilerActivity, profile
from turnwise.engine.policy.cache import CachedModel
from turnwise.learning import Row

STEPS, CONVERSATIONS, TOKENS = 20, 16, 349


def rate(rows: int, inner: int, outer: int) -> float:
    """Returns the machine's GFLOP/s of a matrix product of this shape."""
    left, right = torch.randn(rows, inner), torch.randn(inner, outer)
    for _ in range(5):
        left @ right
    since = time.perf_counter()
    for _ in range(50):
        left @ right
    return 2e-9 * rows * inner * outer * 50 / (time.perf_counter() - since)


def operators(work: Callable[[], object]) -> dict[str, float]:
    """Returns the microseconds of every operator of something, after it ran once."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return {each.key: each.self_cpu_time_total for each in seen.key_averages()}


def shares(found: dict[str, float]) -> str:
    """Returns a line of the five largest operators."""
    whole = sum(found.values())
    largest = sorted(found, key=lambda name: -found[name])[:5]
    return ", ".join(f"{name} {found[name] / whole:.0%}" for name in largest)


def reading(model: CachedModel, rows: int, length: int) -> float:
    """Returns the milliseconds in which what the rows hold is read once: the median of 20."""
    took = []
    for _ in range(20):
        since = time.perf_counter()
        for layer in model._layers:
            for held in (layer.keys, layer.values):
                assert held is not None
                held[:rows, :, :length].sum()
        took.append(1000 * (time.perf_counter() - since))
    return statistics.median(took)


def main() -> None:
    """Prints both profiles."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=list(WORKS))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    work = WORKS[given.work]
    with tempfile.TemporaryDirectory() as folder:
        policy = turnwise.Policy.from_pretrained(make(work, Path(folder)), device="cpu")
    draw = torch.Generator().manual_seed(0)
    size = (given.rows, given.length)
    model, rows = CachedModel(policy.network), list(range(given.rows))
    model.extend(
        rows, [0] * given.rows, torch.randint(0, work.vocabulary, size, generator=draw).tolist()
    )
    held = [given.length]

    def decode() -> None:
        for _ in range(STEPS):
            model.extend(rows, [held[0]] * given.rows, [[5]] * given.rows)
            held[0] += 1

    since = time.perf_counter()
    decode()
    took = time.perf_counter() - since
    found = operators(decode)
    attention = sum(us for name, us in found.items() if "attention" in name) / STEPS / 1000
    print(f"decoding: {1000 * took / STEPS:.1f} ms a token of {given.rows}; {shares(found)}")
    once = reading(model, given.rows, held[0])
    print(f"attention: {attention:.1f} ms a token; to read its keys and values: {once:.1f} ms")
    model.reset()
    ids = torch.randint(0, work.vocabulary, (CONVERSATIONS, TOKENS), generator=draw).tolist()
    positions = tuple(p for p in range(34, TOKENS) if (p - 34) % 58 < 32)
    places = tuple(range(len(positions)))
    batch = [Row(tuple(own), e, positions, places) for e, own in enumerate(ids)]

    def update() -> None:
        for micro in policy.micro_batches(batch, 2048):
            (-policy.score(micro).logprobs.sum()).backward()
        policy.network.zero_grad()

    update()
    since = time.perf_counter()
    update()
    took = time.perf_counter() - since
    head = policy.model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in policy.parameters()) - head
    done = 6e-9 * CONVERSATIONS * (body * TOKENS + head * len(positions)) / took
    best = rate(2048, work.hidden, work.inner)
    print(f"update: {took:.1f} s, {done:.0f} of {best:.0f} GFLOP/s ({done / best:.0%});", end=" ")
    print(shares(operators(update)))


if __name__ == "__main__":
    main()
