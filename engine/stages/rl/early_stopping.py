"""Early stopping on a measure that is not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ...pipeline.section import Section


class Gold(Section):
    """Early stopping: the environment's own return on held-out starts, played every few updates.

    The policy that did best is kept; when it has not been beaten `patience` times in a row the stage ends, and the policy goes back to
    it, as it does at the stage's end. What is trained on may be a proxy (a reward model); this is the measure it stands for.

    Attributes:
        episodes: how many starts; the same every time.
        every: updates between measurements; the start is measured too.
        patience: measurements without a new best after which the stage ends; None: only measures, and keeps the last policy.
        options: for `reset`, to choose held-out content; default: those of the training environment.
        seed: of the starts.
    """

    episodes: int = Field(default=200, ge=1)
    every: int = Field(default=5, ge=1)
    patience: int | None = Field(default=3, ge=1)
    options: dict[str, Any] | None = None
    seed: int = 30_000


class BestSoFar:
    """The policy that did best on the gold measure, and how often it has not been beaten since."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.value, self.update, self.waited = policy, float("-inf"), 0, 0
        self.weights: list[Any] = []

    def hear(self, value: float, update: int) -> None:
        self.waited += 1
        if value > self.value:
            self.value, self.update, self.waited = value, update, 0
            self.weights = [p.detach().cpu().clone() for p in self.policy.parameters()]

    def put_back(self) -> None:
        import torch

        with torch.no_grad():
            for parameter, kept in zip(self.policy.parameters(), self.weights, strict=True):
                parameter.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        kept = {f"weights.{i}": w for i, w in enumerate(self.weights)}
        return {**kept, "value": self.value if self.weights else None, "update": self.update, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights = [state[f"weights.{i}"] for i in range(len(state) - 3)]
        self.value = float("-inf") if state["value"] is None else float(state["value"])
        self.update, self.waited = int(state["update"]), int(state["waited"])
