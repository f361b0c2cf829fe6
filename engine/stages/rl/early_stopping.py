"""Stops early by a measure that is not trained on, and goes back to the best policy."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ...errors import TooManyFailures
from ...protocols import RunView
from ...rollout.conversation import Where
from ..collect import play
from .metrics import mean
from .settings import RLSettings


class BestSoFar:
    """Keeps the policy that did best on the gold measure, and counts how often it has not been
    beaten since."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.value, self.update, self.waited = policy, float("-inf"), 0, 0
        self.weights: list[Any] = []

    def record(self, value: float, update: int) -> None:
        """Records a measurement, and keeps the policy where it is the best so far."""
        self.waited += 1
        if value > self.value:
            self.value, self.update, self.waited = value, update, 0
            self.weights = [p.detach().cpu().clone() for p in self.policy.parameters()]

    def put_back(self) -> None:
        """Puts the best policy's weights back in place."""
        import torch

        from ...policy.sharding import share

        with torch.no_grad():
            for parameter, kept in zip(self.policy.parameters(), self.weights, strict=True):
                parameter.copy_(share(kept, parameter))

    def state_dict(self) -> dict[str, Any]:
        """Returns the best weights, their value and update, and the count of measurements since."""
        kept = {f"weights.{i}": w for i, w in enumerate(self.weights)}
        return {
            **kept,
            "value": self.value if self.weights else None,
            "update": self.update,
            "waited": self.waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a checkpoint's best weights, their value and update, and the count since."""
        self.weights = [state[f"weights.{i}"] for i in range(len(state) - 3)]
        self.value = float("-inf") if state["value"] is None else float(state["value"])
        self.update, self.waited = int(state["update"]), int(state["waited"])


class EarlyStopping:
    """Measures the policy every few updates of a stage, as its `gold` says; without `gold` it does
    nothing.

    Args:
        players: "policy", and other policies that play in seats, by name.
    """

    def __init__(self, run: RunView, settings: RLSettings, players: Mapping[str, Any]) -> None:
        self.run, self.settings, self.players = run, settings, players
        self.best = BestSoFar(run.policy)
        self.seconds = 0.0  # spent on measuring in the present update

    def states(self) -> dict[str, Any]:
        """Returns what a checkpoint must keep, by name."""
        return {"gold": self.best} if self.settings.gold else {}

    @property
    def is_over(self) -> bool:
        """Whether the best policy was not beaten for as long as one is to wait."""
        gold = self.settings.gold
        return gold is not None and gold.patience is not None and self.best.waited >= gold.patience

    def before(self, i: int) -> dict[str, float]:
        """Measures the policy that the stage begins with, before its first update."""
        self.seconds = 0.0
        return self._measure(0) if self.settings.gold and i == 0 else {}

    def after(self, i: int) -> dict[str, float]:
        """Measures the policy after update i where it is time to; at the end the best one is put
        back."""
        gold, last = self.settings.gold, i + 1 == self.settings.updates
        if gold is None or not ((i + 1) % gold.every == 0 or last):
            return {}
        for player in self.players.values():
            player.backend.refresh()
        metrics = self._measure(i + 1)
        if gold.patience is not None and (last or self.is_over):
            self.best.put_back()
            metrics["gold/kept_update"] = float(self.best.update)
        return metrics

    def _measure(self, made: int) -> dict[str, float]:
        """Plays the gold measure's starts with the policy as it is, after `made` updates of this
        stage.

        Raises:
            TooManyFailures: more environments failed than allowed, or all of them; that is no
                measurement.
        """
        run, settings, gold = self.run, self.settings, self.settings.gold
        assert gold is not None
        began = time.perf_counter()
        values: list[float] = []
        successes: list[float] = []
        for env in settings.env:
            own = env.starts(gold.seed, gold.episodes, options=gold.options)
            where = Where(run.id, f"{run.stage}/gold-{made}", run.updates + 1, gold.seed)
            played = play(
                run,
                self.players["policy"],
                [(start, 0) for start in own],
                where,
                max_turns=settings.max_turns,
                step_limit=settings.step_limit,
                schedule=settings.schedule,
                max_failure_rate=settings.max_failure_rate,
                others=self.players,
            )
            sound = [e for e in played if e.ending != "failed"]
            values += [e.env_return for e in sound]
            successes += [float(e.succeeded) for e in sound]
        if not values:
            raise TooManyFailures(
                f"gold: no conversation of {gold.episodes} could be played to its end; nothing was"
                " measured"
            )
        self.best.record(mean(values), run.updates + (made > 0))
        self.seconds += time.perf_counter() - began
        return {
            "gold/return": mean(values),
            "gold/success": mean(successes),
            "seconds/gold": self.seconds,
        }
