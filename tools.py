"""Small tools that plugins share with the engine: derived ids, secrets, suggestions, coroutines.

Names are resolved when they are first used; `tools.pyi` lists them.
"""

from __future__ import annotations

from .engine.util.lazy import from_stub

__getattr__, __dir__ = from_stub(__name__, __file__)
