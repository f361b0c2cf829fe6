"""Where the time of decoding and of an update goes: torch's operators, beside the machine's rates.

    python benchmarks/speed_profile.py A-small --rows 32 --length 200

Decoding: one token for each of so many conversations. Update: forward and backward passes over 16
conversations of 349 tokens. Printed are the largest operators' shares of the time.
"""

from __future__ import annotations

import argparse
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


def shares(work: Callable[[], object]) -> str:
    """Returns a line of the five largest operators of something, after it ran once."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    found = seen.key_averages()
    whole = sum(each.self_cpu_time_total for each in found)
    largest = sorted(found, key=lambda each: -each.self_cpu_time_total)[:5]
    return ", ".join(f"{each.key} {each.self_cpu_time_total / whole:.0%}" for each in largest)


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
    print(f"decoding: {1000 * took / STEPS:.1f} ms a token of {given.rows}; {shares(decode)}")
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
    print(shares(update))


if __name__ == "__main__":
    main()
