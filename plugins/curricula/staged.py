"""The curriculum `staged`: the weights of a mixture's environments change step by step, from easy
to hard.

    curriculum:
      name: staged
      steps:
        - {weights: [1, 0], success: 0.7}     # until seven of ten conversations succeed
        - {weights: [1, 2], updates: 40}      # for 40 updates
        - {weights: [0, 1]}                   # to the end of the stage

An environment may stand in the mixture several times with other `options` or `kwargs`, a level of
difficulty each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import Any, ClassVar

from pydantic import Field, field_validator

from ...protocols import ConfigError, Curriculum, GroupResult, Section, StartNumber


class Step(Section):
    """One step of the curriculum `staged`. It ends when its success is reached or its updates are
    made, whichever comes first; the last one goes on to the end.

    Attributes:
        weights: of the mixture's environments, in order; they take the place of its own.
        success: mean share of conversations that succeed over `window` updates of this step.
        updates: how many at most.
    """

    weights: list[float] = Field(min_length=1)
    success: float | None = Field(default=None, gt=0, le=1)
    updates: int | None = Field(default=None, ge=1)

    @field_validator("weights")
    @classmethod
    def _some(cls, weights: list[float]) -> list[float]:
        if min(weights) < 0 or not sum(weights) > 0:
            raise ValueError("must be numbers of at least 0, not all of them 0")
        return weights


class Staged(Section, Curriculum):
    """Changes the weights of the environments step by step.

    Attributes:
        steps: in order, see `Step`.
        window: updates over which a step's success is averaged.
    """

    called: ClassVar = "staged"

    steps: list[Step] = Field(min_length=1)
    window: int = Field(default=3, ge=1)

    _step: int = 0
    _played: int = 0  # the step of the last update
    _updates: int = 0  # made in this step
    _success: list[float]  # of the last updates

    def setup(self, weights: Sequence[float]) -> None:
        """Checks the steps against the mixture.

        Raises:
            ConfigError: a step has not one weight per environment, or has no end.
        """
        self._step, self._updates, self._success = 0, 0, []
        for place, step in enumerate(self.steps, 1):
            if len(step.weights) != len(weights):
                raise ConfigError(
                    f"curriculum staged: step {place} has {len(step.weights)} weights, and the"
                    f" stage has {len(weights)} environments: give one for each, 0 for those that"
                    " are not played"
                )
            if place < len(self.steps) and step.success is None and step.updates is None:
                raise ConfigError(
                    f"curriculum staged: step {place} has no end, so that step {place + 1} never"
                    " comes: give it `success` or `updates`"
                )

    def choose(
        self, rng: Random, unplayed: Sequence[int], taken: Collection[StartNumber]
    ) -> StartNumber:
        """Returns the next start of an environment drawn by the step's weights."""
        weights = self.steps[self._step].weights
        [env] = rng.choices(range(len(weights)), weights)
        return StartNumber(env, unplayed[env])

    def learn(self, groups: Sequence[GroupResult]) -> None:
        """Goes on to the next step where this one is over."""
        self._played = self._step
        found = [group.success for group in groups if group.success is not None]
        self._updates += 1
        if found:
            self._success = [*self._success, sum(found) / len(found)][-self.window :]
        step = self.steps[self._step]
        reached = (
            step.success is not None
            and len(self._success) == self.window
            and sum(self._success) / self.window >= step.success
        )
        over = step.updates is not None and self._updates >= step.updates
        if (reached or over) and self._step + 1 < len(self.steps):
            self._step, self._updates, self._success = self._step + 1, 0, []

    def metrics(self) -> Mapping[str, float]:
        """Returns the number of the step that the update was played in, from 1."""
        return {"step": float(self._played + 1)}

    def state_dict(self) -> dict[str, Any]:
        """Returns where it stands."""
        return {"step": self._step, "updates": self._updates, "success": list(self._success)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where it stood; of fewer steps than before, the last one."""
        self._step = min(int(state["step"]), len(self.steps) - 1)
        self._updates, self._success = int(state["updates"]), list(state["success"])
