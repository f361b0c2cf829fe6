"""What stages and commands are built from: runs, their ledger and parts, play, reports.

Names are resolved when they are first used; `running.pyi` lists them.
"""

from __future__ import annotations

from .engine.util.lazy import from_stub

__getattr__, __dir__ = from_stub(__name__, __file__)
