"""The text space: any string up to a length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from gymnasium.spaces import Space


class Text(Space[str]):
    """A space of strings up to a length.

    `gymnasium.spaces.Text` takes only the characters of a stated charset.

    Args:
        max_length: in characters.
    """

    def __init__(
        self, max_length: int = 4096, seed: int | np.random.Generator | None = None
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.max_length = int(max_length)
        super().__init__((), np.dtype(object), seed)

    @property
    def is_np_flattenable(self) -> bool:
        """False: texts have no array of a fixed size."""
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Draws 1 to 64 printable ASCII characters, at most `max_length`."""
        if mask is not None or probability is not None:
            raise ValueError("Text.sample takes neither mask nor probability")
        length = int(self.np_random.integers(1, min(self.max_length, 64) + 1))
        return "".join(chr(c) for c in self.np_random.integers(32, 127, size=length))

    def contains(self, x: Any) -> bool:
        """Returns whether this is a string of at most `max_length` characters."""
        return isinstance(x, str) and len(x) <= self.max_length

    def to_jsonable(self, sample_n: Iterable[str]) -> list[str]:
        """Returns the texts as a list."""
        return list(sample_n)

    def from_jsonable(self, sample_n: list[Any]) -> list[str]:
        """Returns the texts of a list that was read from JSON."""
        return [str(x) for x in sample_n]

    def __repr__(self) -> str:
        return f"Text({self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Text) and other.max_length == self.max_length
