"""Starts by their numbers, and how play from them went: what a curriculum chooses by.

The starts that a stage may play of one environment are a sequence, numbered from 0: number `n` has
the seed that follows that of `n - 1`, and of a data set the row that follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class StartNumber(NamedTuple):
    """One start of a stage.

    Attributes:
        env: which environment of the mixture.
        number: of the start in that environment's sequence.
    """

    env: int
    number: int


@dataclass(frozen=True, slots=True)
class GroupResult:
    """How the conversations of a group went.

    Attributes:
        start: where they began.
        outcomes: one per conversation that got a reward, 0 or more.
        success: share of the conversations that succeeded; those whose environment failed are left
            out, and None says that there were no others.
    """

    start: StartNumber
    outcomes: tuple[float, ...]
    success: float | None
