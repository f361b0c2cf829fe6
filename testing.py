"""Checks for the tests of plugins: each takes a part, has it do what a run would have it do, and
raises `Unsound` with all that is wrong; and conversations, batches, a policy and a clock to test
with.

Names are resolved when they are first used; `testing.pyi` lists them.
"""

from __future__ import annotations

from .engine.util.lazy import from_stub

__getattr__, __dir__ = from_stub(__name__, __file__)
