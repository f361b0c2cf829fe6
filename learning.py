"""What credit methods, optimizers and reward models are built from: the maths on tensors, batches,
the policy and its learner.

Names are resolved when they are first used; `learning.pyi` lists them.
"""

from __future__ import annotations

from .engine.util.lazy import from_stub

__getattr__, __dir__ = from_stub(__name__, __file__)
