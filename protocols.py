"""What plugins derive from, and the records that pass through their hands: episodes, feedback,
rewards, errors.

Names are resolved when they are first used; `protocols.pyi` lists them.
"""

from __future__ import annotations

from .engine.util.lazy import from_stub

__getattr__, __dir__ = from_stub(__name__, __file__)
