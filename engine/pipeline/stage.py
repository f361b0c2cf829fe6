"""The contract of a stage, and what a run tells of its updates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .section import Section

if TYPE_CHECKING:
    from ..protocols import RunView
    from ..records.update import Update


class Stage(Section):
    """One step of a pipeline: its fields are its options, `play` does the work.

    A stage registered by a plugin need not derive from this class; it needs `play`, and `check` if
    it can tell before the run starts that something will not work.
    """

    def check(self, run: RunView) -> None:
        """Raises ConfigError or PluginError for what cannot work, before anything is played or
        loaded."""

    def play(self, run: RunView) -> Iterator[Update]:
        """Does the stage's work, update by update. The run is consistent whenever it yields."""
        raise TypeError(f"{type(self).__name__} does not say how it is played")
