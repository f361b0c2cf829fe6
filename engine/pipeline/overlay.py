"""Settings that are laid over a config: those of `--set stages.rl.optimizer.lr=3e-6`, and of
further files.

An overlay is a mapping that holds what is to be otherwise, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..util.ids import derive_id
from ..util.secrets import redacted
from ..util.suggest import did_you_mean
from ..util.wording import numbered
from .options import PARTS

# The key under which a mapping names what stands alone otherwise: `optimizer: grpo` is
# `optimizer: {name: grpo}`.
ALONE = {
    "policy": "model", "env": "id",
    **dict.fromkeys(("feedback", "judge", "judges", "of", "first", "then"), "judge"),
    **dict.fromkeys(PARTS, "name"),
}  # fmt: skip


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
    if isinstance(config, str):
        named = next((key for key in reversed(place) if not key.isdigit()), "")
        config = {ALONE[named]: config} if named in ALONE else {}
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
    laid = {
        key: lay_over(config.get(key), value, (*place, str(key))) for key, value in overlay.items()
    }
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


def named_after(overlays: Sequence[tuple[str, Any]]) -> str:
    """Returns what a run's name ends with, so that runs with other settings have other folders: the
    further files, and each setting with its value; what they are apart from that, as a digest.

    Secrets are not told, and a run keeps its name when they change.

    Args:
        overlays: a file's name, or "" where there is none, and what is laid over.
    """
    words, whole = [], []
    for file, overlay in overlays:
        for key, value in [] if file else settings_in(overlay):
            hidden = redacted({key: value}) != {key: value}
            words.append(key if hidden else f"{key}-{value}")
        words += [file] if file else []
        if set(overlay) != {"seed"}:  # which its name tells
            whole.append(redacted(overlay))
    text = "".join("-" + re.sub(r"[^\w.+-]+", "-", word).strip("-") for word in words)[:80]
    return text + (f"-{derive_id(whole)[:6]}" if whole else "")
