"""Combiners: feedback to rewards."""

from __future__ import annotations

from ...protocols import Register, hookimpl


@hookimpl
def register_combiners(register: Register) -> None:
    """Registers the combiners of this package."""
    register("weighted", "turnwise.plugins.combiners.weighted:Weighted")
    register("aggregate", "turnwise.plugins.combiners.aggregate:Aggregated")
    register("calibrated", "turnwise.plugins.combiners.calibrated:Calibrated")
