"""A run as one looks at it from Python: its metrics as a table and as curves, its conversations,
what each turn was credited with.

The run that is at work and one of the past (`PastRun`) are looked at in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..ledger.ledger import Ledger
from ..records.episode import Episode
from ..records.shown import number, table
from ..records.update import SHOWN
from ..util.suggest import did_you_mean, install
from .folder import open_ledger, read_config, read_evaluation, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from ..policy.policy import Policy


@dataclass(frozen=True, slots=True)
class Trained:
    """A conversation of an update, and how it was trained on.

    Attributes:
        episode: the conversation.
        outcome: its combined reward; None where there was no answer.
        credit: what each turn was credited with; empty where it was not trained on.
        reason: why it was left out; empty where it was not.
    """

    episode: Episode
    outcome: float | None
    credit: tuple[float, ...]
    reason: str

    def __repr__(self) -> str:
        what = f"left out ({self.reason})" if self.reason else f"credit {self._credits}"
        return f"<Trained {self.episode.id}: outcome {self._outcome}, {what}>"

    def _repr_html_(self) -> str:
        return self.episode.html(self.credit, f"{self!r}, {self.episode.ending}")

    @property
    def _outcome(self) -> str:
        return "unknown" if self.outcome is None else number(self.outcome)

    @property
    def _credits(self) -> str:
        return ", ".join(f"{credit:+.3f}" for credit in self.credit)


class RunReader:
    """Looks at a run.

    Attributes:
        id: what its episodes and feedback are filed under.
        name: from the config, or the folder's.
        folder: where everything is.
        metrics: one mapping per update, as in metrics.jsonl: `update`, `stage`, `time`, numbers.
    """

    id: str
    name: str
    folder: Path
    metrics: list[dict[str, Any]]

    @property
    def ledger(self) -> Ledger:
        """Its episodes, requests and feedback."""
        raise TypeError(f"{type(self).__name__} does not say where its ledger is")

    def episodes(self, stage: str | None = None, update: int | None = None) -> list[Episode]:
        """Returns the conversations of a run, or of a stage or an update of it, in order.

        Raises:
            ConfigError: the run has no such stage or update.
        """
        found = self.ledger.run_episodes(self.id, stage=stage, update=update)
        if not found:
            self._check_made(update, stage)
        return found

    def _check_made(self, update: int | None, stage: str | None = None) -> None:
        """Raises `ConfigError` where the run has no such stage, or has not made the update."""
        made = [m["update"] for m in self._lines(stage)]
        if update is not None and update not in made:
            whose, last = (
                f" of {stage}" if stage else "",
                f"{made[0]} to {made[-1]}" if made else "",
            )
            raise ConfigError(f"there is no update {update}{whose}: made are {last or 'none'}")

    def trained(self, update: int | None = None) -> list[Trained]:
        """Returns the conversations of an update, by default the last that trained on any, with
        their rewards and each turn's credit, or why they were left out.

        Raises:
            ConfigError: the run has not made the update.
        """
        self._check_made(update)
        if update is None:
            made = [m["update"] for m in self.metrics if m.get("trained")]
            if not made:
                return []
            update = made[-1]
        members = self.ledger.members(self.id, update)
        known = self.ledger.episodes([m.episode for m in members])
        return [
            Trained(known[m.episode], m.outcome, m.credit if m.used else (), m.reason)
            for m in members
            if m.episode in known
        ]

    def frame(self, stage: str | None = None) -> DataFrame:
        """Returns the metrics as a pandas table, a row per update.

        Args:
            stage: only its updates, and the columns that it has.

        Raises:
            ConfigError: the run has no such stage.
            ImportError: pandas is missing.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(f"tables need pandas: {install('data')}") from error
        lines = self._lines(stage)
        return pandas.DataFrame(lines, index=pandas.Index([m["update"] for m in lines])).drop(
            columns="update", errors="ignore"
        )

    def plot(self, *names: str, stage: str | None = None) -> Figure:
        """Draws metrics over the updates, one below the other.

        Args:
            names: of metrics; default: those that a line of progress shows.
            stage: only its updates.

        Raises:
            ConfigError: the run has no such stage, or none with such a metric.
            ImportError: matplotlib is missing.
        """
        try:
            from .figure import Picture
        except ImportError as error:
            raise ImportError(f"pictures need matplotlib: {install('plots')}") from error
        lines = self._lines(stage)
        known = dict.fromkeys(key for m in lines for key in m if key not in NO_METRIC)
        odd = [name for name in names if name not in known]
        if odd:
            raise ConfigError(f"no update has a metric {odd[0]!r}.{did_you_mean(odd[0], known)}")
        chosen = list(names) or [name for name in SHOWN if name in known]
        if not chosen:
            raise ConfigError(f"name the metrics to draw; there are {', '.join(known) or 'none'}")
        figure = Picture(figsize=(8, 2.4 * len(chosen)), layout="constrained")
        for axes, name in zip(
            figure.subplots(len(chosen), squeeze=False)[:, 0], chosen, strict=True
        ):
            for each in dict.fromkeys(m["stage"] for m in lines if name in m):
                own = [m for m in lines if m["stage"] == each and name in m]
                axes.plot([m["update"] for m in own], [m[name] for m in own], ".-", label=each)
            axes.set_ylabel(name)
            axes.legend(frameon=False)
        axes.set_xlabel("update")
        return figure

    def _lines(self, stage: str | None) -> list[dict[str, Any]]:
        stages = dict.fromkeys(m["stage"] for m in self.metrics)
        if stage is not None and stage not in stages:
            raise ConfigError(f"no update is of a stage {stage!r}.{did_you_mean(stage, stages)}")
        return [m for m in self.metrics if stage in (None, m["stage"])]

    def _repr_html_(self) -> str:
        head = ["stage", "updates", *SHOWN]
        rows = []
        for stage in dict.fromkeys(m["stage"] for m in self.metrics):
            own = self._lines(stage)
            rows.append([stage, len(own), *(_change(own, name) for name in SHOWN)])
        return f"<p><b>{self!r}</b></p>" + table(rows, head)


NO_METRIC = ("update", "stage", "time")


def _change(lines: Sequence[dict[str, Any]], name: str) -> str:
    """Returns a metric's first and last value, as far as there are any."""
    values = [number(m[name]) for m in lines if name in m]
    return " → ".join(dict.fromkeys((values[0], values[-1]))) if values else ""


class PastRun(RunReader):
    """A run of the past, from its folder; it is looked at, and not gone on with.

    Args:
        folder: of the run.
        ledger: the URL of its ledger, where the one in the config had a password.

    Attributes:
        config: what was asked, secrets hidden.
        evaluation: the table of the last `evaluate`, by player; empty without one.

    Raises:
        ConfigError: the folder holds no run, or what it holds cannot be read.
    """

    def __init__(self, folder: str | Path, ledger: str | None = None) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.name = self.config.get("name") or self.folder.name
        self.metrics = read_metrics(self.folder)
        self._ledger, self.id = open_ledger(self.folder, ledger)
        self.evaluation = read_evaluation(self.folder)

    @property
    def ledger(self) -> Ledger:
        """Its episodes, requests and feedback."""
        return self._ledger

    @cached_property
    def policy(self) -> Policy:
        """The policy that it has trained, loaded when it is first used.

        Raises:
            ConfigError: it has not come to its end, and has saved none.
        """
        from ..policy.policy import Policy

        if not (self.folder / "policy").is_dir():
            raise ConfigError(
                f"the run in {self.folder} has saved no policy, which it does at its end; its"
                " checkpoints hold the weights on the way (checkpoints/update-.../policy)"
            )
        return Policy.from_pretrained(self.folder / "policy")

    def __repr__(self) -> str:
        return f"<PastRun {self.name!r} in {self.folder}, {len(self.metrics)} updates>"
