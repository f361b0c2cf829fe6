"""Settings that are laid over a config: those of `--set stages.rl.optimizer.lr=3e-6`, and of
further files.

An overlay is a mapping that holds what is to be otherwise, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ConfigError
from ..util.suggest import did_you_mean
from ..util.wording import numbered

# The key under which a mapping gives what stands alone otherwise: `optimizer: grpo` is
# `optimizer: {name: grpo}`.
ALONE = {"policy": "model", "env": "id", "feedback": "judge"}


def lay_over(config: Any, overlay: Any, place: tuple[str, ...] = ()) -> Any:
    """Returns a config in which an overlay's settings have taken their places.

    Mappings are merged key by key; anything else takes the place of what was there. For a list the
    overlay may have a mapping: its keys are places counted from 0, or stages by their labels within
    that list (`rl`; the second is `rl-2`).

    Args:
        config: plain data.
        overlay: plain data.
        place: the keys that led here, for messages.

    Raises:
        ConfigError: a list has no such entry, or a setting belongs to something that has none.
    """
    if not isinstance(overlay, Mapping):
        return overlay
    if config is None:
        config = {}
    if isinstance(config, str) and place:
        named = next(key for key in reversed(place) if not key.isdigit())
        config = {ALONE.get(named, "name"): config}
    if isinstance(config, list):
        found = list(config)
        for key, value in overlay.items():
            index, name = _entry(config, str(key), place)
            inner = found[index] if name is None else found[index][name]
            own = lay_over(inner, value, (*place, str(key)))
            found[index] = own if name is None else {name: own}
        return found
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"{'.'.join(place)} is {config!r}, which has no {next(iter(overlay))!r} to set"
        )
    laid = {key: lay_over(config.get(key), value, (*place, key)) for key, value in overlay.items()}
    return {**config, **laid}


def _entry(entries: list[Any], key: str, place: tuple[str, ...]) -> tuple[int, str | None]:
    """Returns the place of a list's entry, and the name of the stage that it is, where stages are
    named."""
    names: dict[int, str] = {}
    if place[-1:] == ("stages",):
        names = {i: next(iter(one)) for i, one in enumerate(entries) if isinstance(one, Mapping)}
    labels = dict(zip(numbered([*names.values()]), names, strict=True))
    if key in labels:
        return labels[key], names[labels[key]]
    if key.isdigit() and int(key) < len(entries):
        return int(key), None
    known = [*labels, *map(str, range(len(entries)))]
    raise ConfigError(f"{'.'.join(place)} has no entry {key!r}.{did_you_mean(key, known)}")


def settings_in(overlay: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every setting of an overlay: its last key, and its value."""
    if isinstance(overlay, Mapping):
        for key, value in overlay.items():
            yield from settings_in(value, name if str(key).isdigit() else str(key))
    else:
        yield name, overlay


def named_after(overlays: list[tuple[str, Any]]) -> str:
    """Returns what a run's default name ends with, so that runs with other settings have other
    folders: the further files, and each setting with its value.

    Args:
        overlays: a file's name, or "" where there is none, and what is laid over.
    """
    words = []
    for file, overlay in overlays:
        words += [file] if file else [f"{key}-{value}" for key, value in settings_in(overlay)]
    return "".join("-" + re.sub(r"[^\w.+]+", "-", word).strip("-") for word in words)[:120]
