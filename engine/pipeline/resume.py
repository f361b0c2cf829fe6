"""Checks of a config when a run is resumed: what of it may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .config import flat

FREE = ("name", "threads", "folder", "checkpoint_every", "keep_checkpoints", "trackers", "stages")
MEANS = (
    "budget",
    "prices",
    "cache",
    "concurrency",
    "timeout",
    "patience",
    "batch",
    "canaries",
    "known_bad",
)  # options of parts that ask a model


def meant(value: Any) -> Any:
    """Returns a config without the limits on what asking models may cost and how long it may take,
    which do not affect what is asked."""
    if isinstance(value, Mapping):
        asks = bool({"judge", "source", "model"} & set(value)) and "every" not in value
        return {k: meant(v) for k, v in value.items() if not (asks and k in MEANS)}
    return [meant(v) for v in value] if isinstance(value, (list, tuple)) else value


def check_same_run(
    before: Mapping[str, Any], now: Mapping[str, Any], stage: int, done: int
) -> None:
    """Refuses to go on with a run of another config.

    What may change: how often it saves and where it reports, stages that have not begun, the
    `updates` of the present one, and judges' `MEANS`.
    """
    for key in sorted({*before, *now} - set(FREE)):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"the run was started with {key}={before.get(key)!r}, and the config now says"
                f" {now.get(key)!r}: put it back to go on, or choose another folder for another run"
            )
    old, new = flat(meant(before["stages"])), flat(meant(now["stages"]))
    for i, then in enumerate(old[: stage + 1]):
        [(name, options)] = then.items()
        if i >= len(new):
            raise ConfigError(
                f"stage {i + 1} ({name!r}) has been played and is missing from the config now: put"
                " it back to go on"
            )
        [(other, changed)] = new[i].items()
        a, b = dict(options or {}), dict(changed or {})
        if i == stage and "updates" in b and int(b["updates"]) >= done:
            a.pop("updates", None), b.pop("updates")
        if name != other or a != b:
            keys = sorted(k for k in {*a, *b} if a.get(k) != b.get(k))
            what = (
                f"{name!r} is now {other!r}"
                if name != other
                else f"{', '.join(keys)} of {name!r} changed"
            )
            raise ConfigError(
                f"stage {i + 1} has been played and the config says something else now: {what}. Put"
                " it back to go on; later stages may be added, and the `updates` of the last one"
                " raised"
            )
