"""Turnwise aligns multi-turn agents on whole conversations. What you type is here; see README.md.

Importing this loads no torch: names are resolved when they are first used; `__init__.pyi` lists
them.
"""

from __future__ import annotations

from typing import Any

from .engine.util.lazy import from_stub

_resolve, __dir__ = from_stub(__name__, __file__)
__all__ = __dir__()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("turnwise")
    return _resolve(name)
