"""What judges, feedback sources and combiners are built from: sources and their members, agreement,
calibration and bias, preference data.

Names are resolved when they are first used; `judging.pyi` lists them.
"""

from __future__ import annotations

from .engine.util.lazy import from_stub

__getattr__, __dir__ = from_stub(__name__, __file__)
