"""The curriculum `uniform`: every group begins at a start that was never played; environments of a
mixture are drawn by their weights.

The rows of a data set come in their order, so that every row is played once before one comes again,
in a mixture too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import ClassVar

from ...protocols import Curriculum, Section, StartNumber


class Uniform(Section, Curriculum):
    """Plays every start once, in order."""

    called: ClassVar = "uniform"

    _weights: list[float]

    def setup(self, weights: Sequence[float]) -> None:
        """Keeps the weights."""
        self._weights = list(weights)

    def choose(
        self, rng: Random, unplayed: Sequence[int], taken: Collection[StartNumber]
    ) -> StartNumber:
        """Returns the next start of an environment drawn by weight."""
        [env] = rng.choices(range(len(self._weights)), self._weights)
        return StartNumber(env, unplayed[env])
