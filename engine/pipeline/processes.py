"""Several processes that train together: the main one decides, and all receive its decision."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import ConfigError, Interrupted
from ..protocols import RunView

Result = TypeVar("Result")


def check_launch() -> None:
    """Checks that a launcher started what it was asked for.

    Raises:
        ConfigError: it did not, or it would divide weights in its own way.
    """
    env = os.environ
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env and "RANK" not in env:
        raise ConfigError(
            "`accelerate launch` was asked for several processes and started this one alone, which"
            " it does on CPUs: type `torchrun --nproc_per_node 2 -m turnwise run ...` instead"
        )
    for way in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if env.get(f"ACCELERATE_USE_{way}", "false").lower() in ("true", "1"):
            raise ConfigError(
                f"accelerate was told to use {way}. Turnwise divides weights with torch's FSDP2, on"
                " CPUs too, where accelerate's becomes DDP without a word: write `shard: true`"
                " in the pipeline, and let accelerate start plain processes"
                " (`distributed_type: MULTI_GPU`, as in examples/accelerate)"
            )


def leave(run: RunView) -> None:
    """Ends what connects the processes, once all of them are done; one that left alone would end
    the others."""
    if processes(run)[0] > 1:
        import torch

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def broadcast(value: Any) -> Any:
    """Returns the main process's value on every process; all call this together."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def shared(run: RunView, value: Any) -> Any:
    """Returns the main process's value on every process of those that train together."""
    return value if processes(run)[0] == 1 else broadcast(value)


def decided(run: RunView, work: Callable[[], Result]) -> Result:
    """Runs work in the main process, which may wait for feedback, and returns its result on every
    process.

    Raises:
        Interrupted: the run was asked to end meanwhile; on every process, or the others would wait
            for ever.
    """
    done: tuple[Result] | None = None
    if run.is_main:
        with contextlib.suppress(Interrupted):
            done = (work(),)
    done = shared(run, done)
    if done is None:
        raise Interrupted
    return done[0]


def processes(run: RunView) -> tuple[int, int]:
    """Returns how many processes train together, and the number of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 1, 0
    accelerator = run.policy.accelerator
    return accelerator.num_processes, accelerator.process_index
