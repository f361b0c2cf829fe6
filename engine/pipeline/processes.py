"""Several processes that train together: the main one decides, and all receive its decision."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import Interrupted
from ..protocols import RunView

Result = TypeVar("Result")


def shared(run: RunView, value: Any) -> Any:
    """Returns the main process's value on every process of those that train together."""
    if processes(run)[0] == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


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
