"""Checks of a config when a run is resumed: what of it may change."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..protocols import Giver
from .config import flat
from .plugins import Plugins
from .stage import Stage

FREE = ("name", "threads", "folder", "checkpoint_every", "keep_checkpoints", "trackers", "stages")


def lasting(options: Any, plugins: Plugins) -> Any:
    """Returns a config without the options that judges and sources declare as `may_change`: they
    affect what an answer costs or how long it takes, not what is answered."""
    if isinstance(options, Mapping):
        free = _may_change(options.get("judge"), plugins)
        return {k: lasting(v, plugins) for k, v in options.items() if k not in free}
    if isinstance(options, (list, tuple)):
        return [lasting(each, plugins) for each in options]
    return options


def _may_change(name: Any, plugins: Plugins) -> frozenset[str]:
    """Returns what the class declares that a feedback entry names, registered or as
    "package.module:Class"; nothing for functions and objects."""
    if not isinstance(name, str):
        return frozenset()
    found: Any = None
    if name in plugins.names("judge"):
        found = plugins.factory("judge", name)
    elif ":" in name:
        module, _, attribute = name.partition(":")
        with contextlib.suppress(ImportError, AttributeError, ValueError):
            found = getattr(importlib.import_module(module), attribute)
    return found.may_change if inspect.isclass(found) and issubclass(found, Giver) else frozenset()


def _stages(entries: Any, plugins: Plugins) -> list[dict[str, Any]]:
    """Returns the stages of a config, one by one, without what may change of their parts."""
    found = []
    for entry in flat(lasting(entries, plugins)):
        [(name, options)] = entry.items()
        known = name in plugins.names("stage")  # a plugin may have gone since
        kind = plugins.factory("stage", name) if known else None
        if isinstance(options, Mapping) and inspect.isclass(kind) and issubclass(kind, Stage):
            options = {
                key: {k: v for k, v in value.items() if k not in kind.may_change.get(key, ())}
                if isinstance(value, Mapping)
                else value
                for key, value in options.items()
            }
        found.append({name: options})
    return found


def check_same_run(
    before: Mapping[str, Any], now: Mapping[str, Any], stage: int, done: int, plugins: Plugins
) -> None:
    """Refuses to go on with a run of another config.

    What may change: how often it saves and where it reports, stages that have not begun, the
    `updates` of the present one, and what parts declare as `may_change`.
    """
    for key in sorted({*before, *now} - set(FREE)):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"the run was started with {key}={before.get(key)!r}, and the config now says"
                f" {now.get(key)!r}: put it back to go on, or choose another folder for another run"
            )
    old, new = _stages(before["stages"], plugins), _stages(now["stages"], plugins)
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
