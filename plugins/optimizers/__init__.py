"""Optimizers, a file each; two files hold what PPO and GRPO share."""

from __future__ import annotations

from ...protocols import Register, hookimpl


@hookimpl
def register_optimizers(register: Register) -> None:
    """Registers the optimizers of this package."""
    register("ppo", "turnwise.plugins.optimizers.ppo:PPO")
    register("grpo", "turnwise.plugins.optimizers.grpo:GRPO")
    register("dpo", "turnwise.plugins.optimizers.dpo:DPO")
    register("kto", "turnwise.plugins.optimizers.kto:KTO")
    register("rejection", "turnwise.plugins.optimizers.rejection:Rejection")
