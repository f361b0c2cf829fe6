"""Sends metrics to TensorBoard, Weights & Biases and their kin, through accelerate's trackers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..util.secrets import redacted
from ..util.suggest import did_you_mean
from .claim import path_safe
from .config import RunConfig


class Tracker:
    """Sends every update's metrics to the config's trackers, if it has any, one chart per stage and
    metric, the run's update as the step.

    Args:
        config: the run's; trackers receive it with its secrets hidden.
        name: the run's, which they call the project.
        folder: the run's; what trackers keep locally goes to `tracking/` in it.

    Raises:
        ConfigError: an unknown tracker, or one whose package is not installed.
    """

    def __init__(self, config: RunConfig, name: str, folder: Path) -> None:
        self._trackers: dict[str, Any] = {}
        if not config.trackers:
            return
        known, project = check(config.trackers), path_safe(name)
        shown = _flat(redacted(config.model_dump(mode="python")))
        for each in config.trackers:
            kind = known[each]
            options = (
                {"logging_dir": str(folder / "tracking")} if kind.requires_logging_directory else {}
            )
            tracker = kind(project, **options)
            tracker.start()
            tracker.store_init_configuration(shown)
            self._trackers[each] = tracker

    def log(self, stage: str, update: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of one update to every tracker."""
        self._each(
            lambda tracker: tracker.log(
                {f"{stage}/{name}": value for name, value in metrics.items()}, step=update
            )
        )

    def finish(self) -> None:
        """Ends every tracker."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, act: Callable[[Any], None]) -> None:
        """Calls `act` on every tracker; one that fails (its service is away, its disk is full) is
        left out from then on, with a warning, and the run goes on."""
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                del self._trackers[name]
                warnings.warn(
                    f"the tracker {name!r} failed and gets no more metrics; they are all in"
                    f" metrics.jsonl: {type(error).__name__}: {error}",
                    stacklevel=2,
                )


def check(names: Sequence[str]) -> dict[str, Any]:
    """Returns accelerate's trackers by name; raises `ConfigError` unless those wanted are among
    them and installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ConfigError(f"no tracker {name!r}.{did_you_mean(name, known)}")
        if name not in installed:
            raise ConfigError(f"tracker {name!r} is not installed: pip install {name}")
    return known


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns a config as one level of plain values, which is what every tracker takes."""
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {prefix: value if isinstance(value, (bool, int, float, str)) else str(value)}
    found: dict[str, Any] = {}
    for key, inner in items:
        found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found
