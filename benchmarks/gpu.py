"""How near to the machine's limits a policy decodes and learns, for shapes that people use.

    python benchmarks/gpu.py 0.5B                          # on a GPU, bfloat16
    python benchmarks/gpu.py 1.5B --conversations 128
    python benchmarks/gpu.py 11.5M --device cpu --dtype float32 --conversations 16 --threads 1

Decoding: replies of `--new` tokens to prompts of `--prompt` tokens, by the in-process backend, by
the same with a compiled model (`--compile`), and by `generate` of transformers, in turns, medians.
The limit is the time in which memory gives the weights once, at the rate of a copy that is measured
here. Update: forward and backward passes and AdamW's step of `grpo` on these conversations, in
floating-point operations (6 for each weight and token, the head at the replies only) beside the
rate of a matrix product of the model's own shape. Weights are random.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import turnwise
from speed_work import SMALL, SMOL, Work, make
from turnwise.learning import InProcess, make_batch
from turnwise.protocols import Rewards, Sampling, Turn
from turnwise.running import Plugins

SHAPES = {
    "11.5M": Work(*SMALL),
    "135M": Work(*SMOL),
    "0.5B": Work("0.5B", 896, 24, 14, 2, 4864, 151_936),
    "1.5B": Work("1.5B", 1536, 28, 12, 2, 8960, 151_936),
}
ROUNDS = 5


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Returns how long something takes, until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    since = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - since


def copy_rate(device: torch.device, size: int = 2**28) -> float:
    """Returns bytes that memory reads and writes per second, of a copy of 256 MiB."""
    one = torch.zeros(size, dtype=torch.uint8, device=device)
    other = torch.zeros_like(one)
    return 2 * size / min(seconds(lambda: other.copy_(one), device) for _ in range(10))


def product_rate(rows: int, inner: int, outer: int, dtype: torch.dtype, device: Any) -> float:
    """Returns floating-point operations per second of a matrix product."""
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, outer, device=device, dtype=dtype)
    took = min(seconds(lambda: left @ right, device) for _ in range(20))
    return 2.0 * rows * inner * outer / took


def main() -> None:
    """Prints both measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu measures this machine")
    if given.threads:
        torch.set_num_threads(given.threads)
    work = SHAPES[given.shape]
    with tempfile.TemporaryDirectory() as folder:
        policy = turnwise.Policy.from_pretrained(
            make(work, Path(folder)), device=given.device, dtype=given.dtype,
            attention=given.attention,
        )  # fmt: skip
    device = policy.parameters()[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{given.shape} on {name}, {given.dtype}, {given.conversations} conversations of"
        f" {given.prompt} + {given.new} tokens")  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    size = (given.conversations, given.prompt)
    prompts = torch.randint(3, 512, size, generator=draw)
    decode(policy, prompts, given, device)
    update(policy, prompts, given, work, device)


def decode(
    policy: turnwise.Policy, prompts: torch.Tensor, given: argparse.Namespace, device: torch.device
) -> None:
    """Prints tokens per second of each way of decoding."""
    from turnwise.engine.records.sampling import Conversation

    policy.chat.stop_ids = frozenset()  # replies of exactly as many tokens
    sampling = Sampling(1.0, given.new)

    def of(backend: InProcess) -> Callable[[], Any]:
        def play() -> None:
            talks = [Conversation(row, ids, seed=row) for row, ids in enumerate(prompts.tolist())]
            list(backend.reply(talks, sampling))
            backend.refresh()

        return play

    def generate() -> None:
        policy.model.generate(
            prompts.to(device), attention_mask=torch.ones_like(prompts).to(device),
            do_sample=True, top_k=0, top_p=1.0, max_new_tokens=given.new,
            min_new_tokens=given.new, pad_token_id=0,
        )  # fmt: skip

    rows = len(prompts)
    ways = {"in process": of(InProcess(policy, rows=rows)), "generate": generate}
    if given.compile:
        ways["compiled"] = of(InProcess(policy, rows=rows, compile=True))
    took: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad(), policy.autocast():
        for each in range(ROUNDS + 1):  # the first one warms up
            for way, work in ways.items():
                took[way].append(seconds(work, device)) if each else work()
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    limit = rows / (weights / copy_rate(device))
    for way, all_of_it in took.items():
        rate = rows * given.new / statistics.median(all_of_it)
        print(f"decoding, {way}: {rate:,.0f} tokens/s, prefill included ({min(all_of_it):.2f} to"
            f" {max(all_of_it):.2f} s); {rate / limit:.0%} of what memory allows")  # fmt: skip


def update(
    policy: turnwise.Policy, prompts: torch.Tensor, given: argparse.Namespace, work: Work,
    device: torch.device,
) -> None:  # fmt: skip
    """Prints how fast an update is."""
    optimizer = Plugins().create("optimizer", "grpo", lr=1e-6, kl=0.0)
    optimizer.setup(policy)
    actions = torch.randint(3, 512, (len(prompts), given.new)).tolist()
    episodes, rewards = [], []
    for number, (prompt, reply) in enumerate(zip(prompts.tolist(), actions, strict=True)):
        turn = Turn(
            turnwise.Message("user", "?"), "!", float(number % 2), tuple(prompt), tuple(reply),
            (-1.0,) * len(reply), 0, False,
        )  # fmt: skip
        start = turnwise.Start("gpu", number // 8)
        episodes.append(
            turnwise.Episode(f"e{number}", start, (turn,), "terminated", slot=number % 8)
        )
        rewards.append(Rewards(turn.reward, (turn.reward,)))
    batch = make_batch(episodes, rewards)
    batch.credit = Plugins().create("credit method", "outcome").assign(batch)

    def one() -> None:
        optimizer.prepare(policy, batch)
        optimizer.update(policy, batch)

    one()
    took = statistics.median(seconds(one, device) for _ in range(3))
    head = policy.model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in policy.parameters()) - head
    tokens = len(prompts) * (given.prompt + given.new)
    done = 6.0 * (body * tokens + head * len(prompts) * given.new) / took
    dtype = policy.parameters()[0].dtype
    best = product_rate(2048, work.hidden, work.inner, dtype, device)
    print(f"update: {took:.2f} s, {tokens / took:,.0f} tokens/s, {done / 1e12:.2f} of"
        f" {best / 1e12:.2f} TFLOP/s ({done / best:.0%})")  # fmt: skip


if __name__ == "__main__":
    main()
