"""Credit methods: how rewards become advantages, one file each."""

from __future__ import annotations

from ...engine.hookspecs import Register, hookimpl


@hookimpl
def register_credit(register: Register) -> None:
    register("outcome", "turnwise.plugins.credit.outcome:OutcomeCredit")
    register("gae", "turnwise.plugins.credit.gae:GAE")
