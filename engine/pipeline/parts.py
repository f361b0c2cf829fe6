"""Makes the parts that a config names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import PluginError
from .plugins import Plugins


def component(plugins: Plugins, kind: str, spec: Any, **more: Any) -> Any:
    """Returns the part that a config describes: by a registered name, a mapping with `name` and
    options, or the object itself."""
    if isinstance(spec, str):
        return plugins.create(kind, spec, **more)
    if isinstance(spec, Mapping):
        options = dict(spec)
        if "name" not in options:
            raise PluginError(
                f"a {kind} given as a mapping needs `name` with its options, got {dict(spec)}"
            )
        return plugins.create(kind, options.pop("name"), **more, **options)
    return spec
