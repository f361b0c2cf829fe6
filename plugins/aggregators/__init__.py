"""Aggregators: many raters' answers as one estimate per episode. One file each."""

from __future__ import annotations

from ...protocols import Register, hookimpl


@hookimpl
def register_aggregators(register: Register) -> None:
    """Registers the aggregators of this package."""
    register("mean", "turnwise.plugins.aggregators.mean:Mean")
    register("majority", "turnwise.plugins.aggregators.majority:Majority")
    register("dawid-skene", "turnwise.plugins.aggregators.dawid_skene:DawidSkene")
    register("bradley-terry", "turnwise.plugins.aggregators.bradley_terry:BradleyTerry")
    register("plackett-luce", "turnwise.plugins.aggregators.plackett_luce:PlackettLuce")
    register(
        "rater-bradley-terry", "turnwise.plugins.aggregators.rater_bradley_terry:RaterBradleyTerry"
    )
