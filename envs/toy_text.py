"""toy-text/FrozenLake-v1, CliffWalking-v1, Taxi-v4 and Blackjack-v1: Gymnasium's own, in words.

A field is told by its row and column, a move is a word of the reply. A reply with no move in it, or
with two, changes nothing and is asked for again; where the environment itself has no end
(CliffWalking, Taxi) `max_episode_steps` truncates. Rewards are the environment's own, step by step.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium

from ..protocols import Message, Text

TAXI_STANDS = ("red", "green", "yellow", "blue", "in the taxi")


def _cell(place: int, width: int) -> str:
    return f"row {place // width + 1}, column {place % width + 1}"


def _taxi(state: Any) -> str:
    row, column, passenger, target = state // 100, state // 20 % 5, state // 4 % 5, state % 4
    where = TAXI_STANDS[passenger]
    waits = "sits in the taxi" if passenger == 4 else f"waits at the {where} stand"
    return (
        f"The taxi is in row {row + 1}, column {column + 1}. The passenger {waits} and wants to the"
        f" {TAXI_STANDS[target]} stand."
    )


def _cards(state: Any) -> str:
    total, dealer, ace = (int(part) for part in state)
    return f"You have {total}{' with an ace as 11' if ace else ''}; the dealer shows {dealer}."


@dataclass(frozen=True, slots=True)
class Codec:
    """How an environment is put into words.

    Attributes:
        system: the rules.
        moves: the word for every action, in order.
        describe: an observation in words; it is given the made environment, too.
        any_end: whether every end is a success, and not only one with a reward above 0.
    """

    system: str
    moves: tuple[str, ...]
    describe: Callable[[Any, Any], str]
    any_end: bool = False


CODECS: Mapping[str, Codec] = {
    "FrozenLake-v1": Codec(
        "You walk over a frozen lake with holes in it, and the ice may let you slide. You start in"
        " row 1, column 1, and want to the last row and column.",
        ("left", "down", "right", "up"),
        lambda state, env: f"You stand in {_cell(int(state), env.unwrapped.ncol)}.",
    ),
    "CliffWalking-v1": Codec(
        "You walk on a field of 4 rows and 12 columns, from row 4, column 1 to row 4, column 12."
        " Between them, in row 4, is a cliff: who steps there starts again. Every step costs 1, the"
        " cliff 100.",
        ("up", "right", "down", "left"),
        lambda state, env: f"You stand in {_cell(int(state), 12)}.",
        any_end=True,
    ),
    "Taxi-v4": Codec(
        "You drive a taxi on a field of 5 rows and 5 columns with walls. The stands are red (row 1,"
        " column 1), green (row 1, column 5), yellow (row 5, column 1) and blue (row 5, column 4)."
        " Fetch the passenger, bring them to their stand and let them out there. Every step costs"
        " 1, a wrong pickup or dropoff 10.",
        ("south", "north", "east", "west", "pickup", "dropoff"),
        lambda state, env: _taxi(int(state)),
    ),
    "Blackjack-v1": Codec(
        "You play Blackjack: come as near to 21 as you can, not beyond it, and nearer than the"
        " dealer.",
        ("stick", "hit"),
        lambda state, env: _cards(state),
    ),
}


class ToyText(gymnasium.Env[str, str]):
    """One of Gymnasium's toy texts; see the module's docstring.

    Args:
        name: its id.
        **kwargs: for `gymnasium.make`, such as `is_slippery=False`.
    """

    metadata: dict[str, Any] = {"render_modes": []}
    observation_space = action_space = Text(10_000)

    def __init__(self, name: str, **kwargs: Any) -> None:
        self.codec = CODECS[name]
        self._env = gymnasium.make(name, disable_env_checker=True, **kwargs)
        self.players: Mapping[str, Any] = {"random": _random}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begins again; the rules are the system prompt."""
        super().reset(seed=seed)
        self._state, _ = self._env.reset(seed=seed, options=options)
        words = ", ".join(self.codec.moves)
        return self._words(), {"system": f"{self.codec.system} Say one of: {words}."}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Makes the move that a reply names."""
        named = [
            i for i, word in enumerate(self.codec.moves) if re.search(rf"(?i)\b{word}\b", action)
        ]
        if len(named) != 1:
            text = f"Say one of: {', '.join(self.codec.moves)}. {self._words()}"
            return text, 0.0, False, False, {"invalid": True}
        self._state, reward, terminated, truncated, _ = self._env.step(named[0])
        won = terminated and (self.codec.any_end or float(reward) > 0)
        info = {"success": won} if terminated or truncated else {}
        return self._words(), float(reward), terminated, truncated, info

    def close(self) -> None:
        """Closes Gymnasium's environment."""
        self._env.close()

    def _words(self) -> str:
        return self.codec.describe(self._state, self._env)


def _random(env: ToyText, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Says any of the moves."""
    return lambda messages: rng.choice(env.codec.moves)
