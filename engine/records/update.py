"""Reports of a run: its updates and its present activity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .episode import Episode
from .shown import number, table

# The metrics that a line about an update shows, of those that it has.
SHOWN = (
    "outcome",
    "success",
    "kl",
    "loss",
    "rater_agreement",
    "source_agreement",
    "held_out/accuracy",
)


@dataclass(frozen=True, slots=True)
class Update:
    """A report of one update.

    Attributes:
        number: counts through the whole run, from 1.
        stage: name of its stage.
        metrics: numbers, as written to metrics.jsonl.
        episodes: those played for it.
    """

    number: int
    stage: str
    metrics: Mapping[str, float]
    episodes: Sequence[Episode] = field(default=(), repr=False)

    def __repr__(self) -> str:
        known = {name: self.metrics[name] for name in SHOWN if name in self.metrics}
        shown = ", ".join(f"{name} {number(value)}" for name, value in known.items())
        return f"<Update {self.number} of {self.stage!r}{f': {shown}' if shown else ''}>"

    def _repr_html_(self) -> str:
        return table(((k, number(v)) for k, v in self.metrics.items()), ("metric", repr(self)))


@dataclass(frozen=True, slots=True)
class Status:
    """The present activity of a run, for progress displays.

    Attributes:
        stage, phase: "rl", "play" | "feedback" | "update" | ...
        done, total: of the phase.
        update, updates: of the stage.
        metrics: of the last update.
        note: "waiting for 12 ratings of 'people' (3 raters active)".
    """

    stage: str
    phase: str
    done: int = 0
    total: int = 0
    update: int = 0
    updates: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
