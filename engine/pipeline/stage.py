"""The contract of a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from ..util.section import Section

if TYPE_CHECKING:
    from ..protocols import RunView
    from ..records.update import Update


class Stage(Section):
    """One step of a pipeline: its fields are its options, `play` does the work.

    Every stage derives from this class. It needs `play`; the rest has a default.

    Attributes:
        may_change: option to the keys under it that may change when a run goes on.
    """

    may_change: ClassVar[Mapping[str, frozenset[str]]] = MappingProxyType({})

    @property
    def trains_policy(self) -> bool:
        """Whether it may change the policy."""
        return True

    @property
    def makes_comparisons(self) -> bool:
        """Whether it is there to have conversations compared, for later stages to train on."""
        return False

    @property
    def makes_conversations(self) -> bool:
        """Whether it writes conversations down that a later `sft` stage can read."""
        return False

    def compared_by(self, run: RunView) -> set[str] | None:
        """Returns the names of the sources that compare for it; None: unknown before it was
        played."""
        return None

    def check(self, run: RunView) -> None:
        """Raises ConfigError or PluginError for what cannot work, before anything is played or
        loaded.

        A run calls it before `play`, which may use what was made here.
        """

    def outline(self) -> list[str]:
        """Returns what it will play, ask and train, in lines that begin with a verb, for `turnwise
        run --dry-run`; called after `check`."""
        return []

    def play(self, run: RunView) -> Iterator[Update]:
        """Does the stage's work, update by update. The run is consistent whenever it yields."""
        raise TypeError(f"{type(self).__name__} does not say how it is played")
