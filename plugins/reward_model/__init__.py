"""Reward models: trained on comparisons, used as judges."""

from __future__ import annotations

from ...protocols import Register, hookimpl


@hookimpl
def register_stages(register: Register) -> None:
    """Registers the stage that trains a reward model."""
    register("reward-model", "turnwise.plugins.reward_model.stage:TrainRewardModel")


@hookimpl
def register_judges(register: Register) -> None:
    """Registers the reward model as a judge."""
    register("reward-model", "turnwise.plugins.reward_model.judge:RewardModelJudge")
