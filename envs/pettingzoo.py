"""pettingzoo/tictactoe_v3 and connect_four_v3: board games of PettingZoo's classic family as
dialogues of two seats.

The seats have PettingZoo's names, "player_1" (or "player_0") and so on. An observation is the board
as the seat sees it, X for its own pieces, and the moves it may make; a reply's last number is its
move. An illegal move ends the game by PettingZoo's own rule: it costs the mover 1; the other has
not won by it (`info["opponent_invalid"]`). A reply without a number is illegal too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import gymnasium

from ..protocols import Message, Text


@dataclass(frozen=True, slots=True)
class Board:
    """How a game is put into words.

    Attributes:
        rules: the system prompt.
        rows, columns: of the board.
        numbered: whether every field is a move: free ones show its number.
    """

    rules: str
    rows: int
    columns: int
    numbered: bool = False

    def draw(self, planes: Any) -> str:
        """Draws the board from its planes [rows, columns, 2], of the seat itself and of the
        other."""
        lines = []
        for row in range(self.rows):
            signs = []
            for column in range(self.columns):
                mine, theirs = planes[row][column][:2]
                free = str(row * self.columns + column) if self.numbered else "."
                signs.append("X" if mine else "O" if theirs else free)
            lines.append(" ".join(signs))
        return "\n".join(lines)


GAMES: Mapping[str, Board] = {
    "tictactoe_v3": Board(
        "You play tic-tac-toe: three in a row win. You are X. Say the number of a free field.",
        rows=3,
        columns=3,
        numbered=True,
    ),
    "connect_four_v3": Board(
        "You play Connect Four: four in a row win, across, down or aslant. You are X. Say the"
        " number of a column, 0 to 6: your piece falls to the lowest free field in it.",
        rows=6,
        columns=7,
    ),
}


class PettingZoo(gymnasium.Env[str, str]):
    """A board game of two seats; see the module's docstring.

    Args:
        game: its name in PettingZoo's classic family.
    """

    metadata: dict[str, Any] = {"render_modes": []}
    observation_space = action_space = Text(10_000)

    def __init__(self, game: str) -> None:
        self.board = GAMES[game]
        self._game = import_module(f"pettingzoo.classic.{game}").env()
        self.players: Mapping[str, Any] = {"random": _legal}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begins a game; the rules are the system prompt."""
        super().reset(seed=seed)
        self._game.reset(seed=seed, options=options)
        self._seats = list(self._game.agents)
        return self._shown(), {"system": self.board.rules, "player": self._game.agent_selection}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Makes the move that is the reply's last number."""
        mover = self._game.agent_selection
        numbers = re.findall(r"\d+", action)
        move = int(numbers[-1]) if numbers and len(numbers[-1]) < 4 else -1
        legal = move in self._moves()
        if legal:
            self._game.step(move)
        over = not legal or any(self._game.terminations.values())
        if not over:
            return self._shown(), 0.0, False, False, {"player": self._game.agent_selection}
        rewards = self._game.rewards if legal else {mover: -1.0}
        own, *others = [mover, *(seat for seat in self._seats if seat != mover)]
        ended = {seat: float(rewards.get(seat, 0.0)) for seat in (own, *others)}
        seats = {
            seat: {
                "reward": ended[seat],
                "success": ended[seat] > 0,
                "opponent_invalid": not legal,
            }
            for seat in others
        }
        info = {"success": ended[own] > 0, "invalid": not legal, "seats": seats, "player": own}
        return "The game is over.", ended[own], True, False, info

    def close(self) -> None:
        """Closes PettingZoo's environment."""
        self._game.close()

    def _moves(self) -> list[int]:
        mask = self._game.observe(self._game.agent_selection)["action_mask"]
        return [int(move) for move in mask.nonzero()[0]]

    def _shown(self) -> str:
        planes = self._game.observe(self._game.agent_selection)["observation"]
        moves = ", ".join(map(str, self._moves()))
        return f"{self.board.draw(planes)}\nYou may play {moves}."


def _legal(env: PettingZoo, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Makes any legal move."""
    return lambda messages: str(rng.choice(env._moves()))
