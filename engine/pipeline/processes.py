"""Several processes that train together: one decides, all learn what."""

from __future__ import annotations

import os
from typing import Any

from ..protocols import RunView


def shared(run: RunView, value: Any) -> Any:
    """What the main process has, on every process of those that train together."""
    if processes(run)[0] == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def processes(run: RunView) -> tuple[int, int]:
    """How many processes train together, and which of them this is."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 1, 0
    accelerator = run.policy.accelerator
    return accelerator.num_processes, accelerator.process_index
