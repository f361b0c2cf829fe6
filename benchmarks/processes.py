"""What an update takes with several processes, each with all weights (DDP) or with its share of
them (FSDP2): the bytes that a process keeps, its peak, its seconds.

    python benchmarks/processes.py MODEL [--processes 1 2] [--conversations 8] [--tokens 200]

Every row is a launch of its own, one after the other, with one thread per process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import turnwise
from turnwise.engine.policy.batching import make_batch
from turnwise.engine.testing.episodes import conversation
from turnwise.plugins.credit.outcome import OutcomeCredit
from turnwise.plugins.optimizers.grpo import GRPO


def measure(model: str, shard: bool, conversations: int, tokens: int) -> dict[str, float]:
    """Makes two updates of GRPO with a KL term; returns what this process kept and took."""
    policy = turnwise.Policy.from_pretrained(model, device="cpu")
    if shard:
        policy.shard()
    optimizer = GRPO(lr=1e-6, kl=0.01, micro_tokens=512, activation_memory=0.5)
    optimizer.setup(policy)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    episodes = [
        conversation(("Well?", "a"), id=f"{i}", tokens=[tokens], seed=i // 4, rewards=[i % 2])
        for i in range(conversations)
    ]
    rewards = [turnwise.Rewards(float(i % 2), (float(i % 2),)) for i in range(conversations)]
    for _ in range(2):
        batch = make_batch(episodes, rewards)
        optimizer.prepare(policy, batch)
        batch.credit = OutcomeCredit().assign(batch)
        began = time.perf_counter()
        optimizer.update(policy, batch)
        seconds = time.perf_counter() - began

    def held(tensors: Iterable[torch.Tensor]) -> int:
        from torch.distributed.tensor import DTensor

        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return sum(t.numel() * t.element_size() for t in local)

    state = optimizer._learner.adam.state.values()
    moments = [v for each in state for v in each.values() if isinstance(v, torch.Tensor)]
    return {
        "weights": held(policy.network.parameters()) / 2**20,
        "moments": held(moments) / 2**20,
        "before": before / 1024,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds": seconds,
        "processes": policy.accelerator.num_processes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--shard", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.out:
        torch.set_num_threads(1)
        found = measure(given.model, given.shard, given.conversations, given.tokens)
        Path(f"{given.out}-{os.environ.get('RANK', '0')}").write_text(json.dumps(found))
        if found["processes"] > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        return
    print("| processes | weights | kept: weights, moments (MiB) | peak (MiB) | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for number in given.processes:
        for shard in (False, True) if number > 1 else (False,):
            with tempfile.TemporaryDirectory() as folder:
                out = f"{folder}/found"
                lead = [
                    "-m", "torch.distributed.run", f"--nproc_per_node={number}",
                    "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0",
                ] if number > 1 else []  # fmt: skip
                own = [
                    __file__, given.model, "--conversations", str(given.conversations),
                    "--tokens", str(given.tokens), "--out", out,
                    *(["--shard"] if shard else []),
                ]  # fmt: skip
                subprocess.run(
                    [sys.executable, *lead, *own], check=True, capture_output=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                rows = [json.loads(p.read_text()) for p in sorted(Path(folder).iterdir())]
            assert [row["processes"] for row in rows] == [number] * number
            most = {key: max(row[key] for row in rows) for key in rows[0]}
            how = "a share in each" if shard else "all in each"
            print(
                f"| {number} | {how if number > 1 else 'all'} | {most['weights']:,.0f},"
                f" {most['moments']:,.0f} | {most['peak']:,.0f} | {most['seconds']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
