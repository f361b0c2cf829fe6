"""Holds an environment that says words of its own, and plays it with a policy."""

from __future__ import annotations

from typing import Any

import gymnasium
import turnwise
from turnwise.engine.policy.in_process import InProcess

from support.models import WORDS

ECHO = "test/Echo-v0"


class Echo(gymnasium.Env):
    """Says a number of words, of uneven length; pays for the letter "e" at the end; lasts `turns`
    turns."""

    observation_space = action_space = turnwise.Text(100_000)

    def __init__(self, turns: int = 3, cut: bool = False) -> None:
        self.turns, self.cut = turns, cut

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = self.turns
        return self._say(), {"system": "tell me more"}

    def _say(self) -> str:
        words = WORDS.split()
        return " ".join(
            words[int(i)]
            for i in self.np_random.integers(len(words), size=int(self.np_random.integers(1, 9)))
        )

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        done = self.left == 0
        reward = action.count("e") / (1 + len(action)) if done else 0.0
        return (
            self._say(),
            reward,
            done and not self.cut,
            done and self.cut,
            {"success": reward > 0.05},
        )


gymnasium.register(ECHO, Echo)


def play(
    policy: turnwise.Policy,
    count: int = 6,
    *,
    update: int = 1,
    group: int = 1,
    tokens: int = 12,
    history: Any = "append",
    rows: int = 4,
    temperature: float = 1.0,
    **env: Any,
) -> list[turnwise.Episode]:
    """Plays episodes of the echo environment, with conversations of uneven length."""
    player = turnwise.PolicyPlayer(
        policy, turnwise.Sampling(temperature, tokens), InProcess(policy, rows=rows), history
    )
    chosen = [
        (s, slot) for s in turnwise.starts(ECHO, 7, count, kwargs=env) for slot in range(group)
    ]
    return turnwise.rollout(player, chosen, turnwise.Where("test", "rl", update, 3))
