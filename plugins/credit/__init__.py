"""Credit methods, which turn rewards into advantages. One file each."""

from __future__ import annotations

from ...protocols import Register, hookimpl


@hookimpl
def register_credit(register: Register) -> None:
    """Registers the credit assignments of this package."""
    register("outcome", "turnwise.plugins.credit.outcome:OutcomeCredit")
    register("turn-returns", "turnwise.plugins.credit.turn_returns:TurnReturns")
    register("gae", "turnwise.plugins.credit.gae:GAE")
    register("gigpo", "turnwise.plugins.credit.gigpo:GiGPO")
    register("branch", "turnwise.plugins.credit.branch:BranchCredit")
    register("counterfactual", "turnwise.plugins.credit.counterfactual:Counterfactual")
    register("redistribute", "turnwise.plugins.credit.redistribute:Redistribute")
    register("judged", "turnwise.plugins.credit.judged:Judged")
