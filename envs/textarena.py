"""textarena/GAME-v0: the single-player games of the package TextArena (textarena.ai), as they are.

An observation holds the messages of the game since the last reply; TextArena's default wrappers
repeat the whole history in each, which would double a conversation that keeps its own. A reply
without brackets is taken as a move as a whole, as TextArena's own wrapper does. The first invalid
move is explained and may be replaced; a second one in a row ends most games. The reward comes at
the end and is the game's own: 1 for a win, often a part of it for coming near. Success is a reward
of at least 1.

TextArena draws from the global `random`. Its state is swapped in for every call and out again
after it, so that games neither disturb each other nor anything else: a start is a function of its
seed, as in a process of its own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium

from ..protocols import Message, Text

GAMES = (
    "2048", "Bandit", "Blackjack", "Countdown", "Crosswords", "Cryptarithm", "FifteenPuzzle",
    "FrozenLake", "GuessTheNumber", "LightsOut", "LogicPuzzle", "Mastermind", "Minesweeper",
    "PegJump", "RushHour", "Secretary", "Set", "Slitherlink", "Sudoku", "ThreeCardMonte",
    "TowerOfHanoi",
)  # fmt: skip
_GAME, _ME = -1, 0  # how TextArena numbers who says something


class TextArena(gymnasium.Env[str, str]):
    """A single-player game of TextArena; see the module's docstring.

    Args:
        game: its id in TextArena, such as "GuessTheNumber-v0".
        wins_only: pay 1 for a win and 0 for all else. A game that pays for coming near can be gamed
            by stopping where one is near: in GuessTheNumber "[10]" and then nothing valid earns
            three quarters.
    """

    metadata: dict[str, Any] = {"render_modes": []}
    observation_space = action_space = Text(100_000)

    def __init__(self, game: str, wins_only: bool = False) -> None:
        import textarena

        self._random = random.Random()
        with self._own_random():
            self._game = textarena.make(f"{game}-raw")
        self.name, self.wins_only = game, wins_only
        known = {"expert": _EXPERTS[game]} if game in _EXPERTS else {}
        self.players: Mapping[str, Any] = {"random": _bracketed, **known}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begins a game; its first observation are the rules.

        Raises:
            ValueError: options; a game has none.
        """
        super().reset(seed=seed)
        if options:
            raise ValueError(f"{self.name} takes no reset options, got {', '.join(options)}")
        drawn = int(self.np_random.integers(2**31)) if seed is None else seed
        with self._own_random():
            self._game.reset(num_players=1, seed=drawn)
        return self._news(), {"optimum": 1.0} if self.name in _EXPERTS else {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Makes a move; the reward is 0 until the game ends."""
        move = action if "[" in action or "]" in action else f"[{action}]"
        with self._own_random():
            done, _ = self._game.step(move)
        if not done:
            return self._news(), 0.0, False, False, {}
        rewards, ends = self._game.close()
        how = ends[_ME]
        reward = rewards[_ME]
        info = {"why": str(how.get("reason")), "invalid": bool(how.get("invalid_move"))}
        if isinstance(reward, str):  # a few games swap their reward and their reason
            info, reward = info | {"odd_reward": reward}, 0.0
        won = float(reward) >= 1.0
        paid = float(won) if self.wins_only else float(reward)
        news = self._news() or str(how.get("reason") or "")
        return news, paid, True, False, info | {"success": won}

    def _news(self) -> str:
        """Returns the messages of the game since the last look, the player's own moves left out."""
        _, messages = self._game.get_observation()
        return "\n".join(str(text) for who, text, _ in messages if who == _GAME).strip()

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Makes the global `random` this game's own for the length of a block."""
        outer = random.getstate()
        random.setstate(self._random.getstate())
        try:
            yield
        finally:
            self._random.setstate(random.getstate())
            random.setstate(outer)


# Players are made with `(env, rng)` and called with the conversation so far.
Player = Callable[[Sequence[Message]], str]


def _bracketed(env: gymnasium.Env[str, str], rng: random.Random) -> Player:
    """Says one of the bracketed moves that the game's own words show, or a small number."""

    def play(messages: Sequence[Message]) -> str:
        text = "\n".join(m.content for m in messages if m.role == "user")
        shown = re.findall(r"\[[^\[\]\n]{1,20}\]", text)
        return rng.choice(shown) if shown and rng.random() < 0.9 else f"[{rng.randrange(1, 21)}]"

    return play


def _halves(env: gymnasium.Env[str, str], rng: random.Random) -> Player:
    """Plays GuessTheNumber by halves."""
    return _half


def _tower(env: gymnasium.Env[str, str], rng: random.Random) -> Player:
    """Plays TowerOfHanoi in seven moves."""
    moves = ("[A C]", "[A B]", "[C B]", "[A C]", "[B A]", "[B C]", "[A C]")
    return lambda messages: moves[sum(m.role == "assistant" for m in messages) % len(moves)]


def _half(messages: Sequence[Message]) -> str:
    low, high, guess = 1, 20, 10
    for message in messages:
        if message.role == "assistant":
            guess = int(message.content.strip("[]"))
        elif hint := re.search("target number is (higher|lower)", message.content):
            low, high = (guess + 1, high) if hint[1] == "higher" else (low, guess - 1)
    return f"[{(low + high) // 2}]"


_EXPERTS = {"GuessTheNumber-v0": _halves, "TowerOfHanoi-v0": _tower}
