"""Out-of-memory errors with advice on what to lower."""

from __future__ import annotations

from typing import Any

from ..errors import OutOfMemory


class explained_memory:
    """Turns an out-of-memory error into one that says what to lower."""

    def __init__(self, what: str, lower: str) -> None:
        self.what, self.lower = what, lower

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import torch

        text = str(error).lower()
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError)
            and ("not enough memory" in text or "can't allocate memory" in text)
        ):
            raise OutOfMemory(
                f"memory ran out in {self.what}: lower {self.lower}, or train adapters alone"
                f" (`lora` under `policy`). ({str(error).splitlines()[0]})"
            ) from error
