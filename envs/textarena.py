"""textarena/GAME-v0: the games of the package TextArena (textarena.ai), as they are, for one player
or several.

An observation holds the messages of the game since the last reply; TextArena's default wrappers
repeat the whole history in each, which would double a conversation that keeps its own. A reply
without brackets is taken as a move as a whole, as TextArena's own wrapper does. The first invalid
move is explained and may be replaced; a second one in a row ends most games. The reward comes at
the end and is the game's own: 1 for a win, often a part of it for coming near. Success is a reward
of at least 1.

A game of several players has the seats "0", "1", ...; each reads what the game tells it and what
the others write. Success is a reward above 0, unless it came of another's invalid move
(`info["opponent_invalid"]`): who plays against a beginner would learn to wait.

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
    "PegJump", "RushHour", "Secretary", "Set", "Slitherlink", "Sokoban", "Sudoku",
    "ThreeCardMonte", "TowerOfHanoi",
)  # fmt: skip
SEVERAL = {
    "Alquerque": 2, "Battleship": 2, "Breakthrough": 2, "Briscola": 2, "Chopsticks": 2,
    "ColonelBlotto": 2, "ConnectFour": 2, "Crusade": 2, "GameOfPureStrategy": 2,
    "GermanWhist": 2, "Golf": 2, "HighSociety": 2, "IndianPoker": 2,
    "IteratedMatchingPennies": 2, "IteratedPrisonersDilemma": 2,
    "IteratedRockPaperScissors": 2, "IteratedTwoThirdsAverage": 2,
    "IteratedUltimatumGame": 2, "KuhnPoker": 2, "LiarsDice": 2, "LinesOfAction": 2,
    "MarketEntryGame": 2, "MemoryGame": 2, "NewRecruit": 2, "Nim": 2, "Othello": 2,
    "PigDice": 2, "Poker": 2, "QuantumTicTacToe": 2, "SantoriniBaseFixed": 2, "SecretMafia": 6,
    "SettlersOfCatan": 4,
    "SimpleBlindAuction": 2, "SimpleNegotiation": 2, "SimpleTak": 2, "Snake": 2,
    "SpiteAndMalice": 2, "Stratego": 2, "Surround": 2, "Taboo": 4, "Tak": 2,
    "ThreePlayerGOPS": 3, "ThreePlayerIPD": 3, "ThreePlayerTicTacToe": 3, "TicTacToe": 2,
    "TruthAndDeception": 2, "TwoDollar": 2, "UltimateTicTacToe": 2, "WildTicTacToe": 2,
}  # fmt: skip
OTHERS = {  # what keeps them from being played
    "its list of words is fetched from the network": (
        "Codenames", "DontSayIt", "Hangman", "LetterAuction", "SpellingBee", "WordChains",
        "WordLadder", "WordSearch", "Wordle",
    ),
    "it asks a model of OpenRouter": ("Debate", "GuessWho", "ScenarioPlanning", "TwentyQuestions"),
    "the package lacks a part of it": (
        "BabyAiText", "ScorableGames", "UsedCar", "UsedCarNegotiation",
    ),
    "it imports chess, which is under the GPL": ("Chess",),
    "its code is no Python of this version": (
        "Checkers", "IteratedStagHunt", "Klondike", "ReverseTicTacToe", "UltimateTexasHoldem",
    ),
    "it breaks when it is played": ("CharacterConclave", "PublicGoodsGame"),
}  # fmt: skip
_GAME = -1  # how TextArena numbers the game among those who say something


class TextArena(gymnasium.Env[str, str]):
    """A game of TextArena; see the module's docstring.

    Args:
        game: its id in TextArena, such as "GuessTheNumber-v0".
        num_players: how many play it; default: as few as can.
        wins_only: pay 1 for a success and 0 for all else. A game that pays for coming near can be
            gamed by stopping where one is near: in GuessTheNumber "[10]" and then nothing valid
            earns three quarters.
    """

    metadata: dict[str, Any] = {"render_modes": []}
    observation_space = action_space = Text(100_000)

    def __init__(self, game: str, num_players: int | None = None, wins_only: bool = False) -> None:
        fewest = SEVERAL.get(game.removesuffix("-v0"), 1)
        seats = fewest if num_players is None else num_players
        if not isinstance(seats, int) or seats < fewest:
            raise ValueError(
                f"num_players must be a whole number of at least {fewest}, got {num_players!r}; who"
                " replies in each seat stands under `seats`, outside of `kwargs`"
            )
        self._random = random.Random()
        self.name, self.seats, self.wins_only = game, seats, wins_only
        known = {"expert": _EXPERTS[game]} if game in _EXPERTS else {}
        self.players: Mapping[str, Any] = {"random": _bracketed if seats == 1 else _shown, **known}

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
        self._random.seed(drawn)  # some games draw before they are given theirs
        import textarena

        with self._own_random():  # a new one: some games do not reset all that they hold
            self._game = textarena.make(f"{self.name}-raw")
            self._game.reset(num_players=self.seats, seed=drawn)
        optimum = {"optimum": 1.0} if self.name in _EXPERTS else {}
        return self._news(), {**optimum, **self._addressed()}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Makes a move; the reward is 0 until the game ends."""
        move = action if "[" in action or "]" in action else f"[{action}]"
        mover = self._mover
        with self._own_random():
            done, _ = self._game.step(move)
        if not done:
            return self._news(), 0.0, False, False, self._addressed()
        own, reward = self._end(mover)
        seats = {}
        for seat in set(range(self.seats)) - {mover}:
            other, paid = self._end(seat)
            seats[str(seat)] = {"reward": paid, **other}
        news = self._news() or own["why"]
        return news, reward, True, False, own | self._addressed() | {"seats": seats}

    def _end(self, seat: int) -> tuple[dict[str, Any], float]:
        """Returns how the game ended for a seat, and what it pays."""
        rewards, ends = self._game.close()
        how, reward = ends[seat], (rewards or {}).get(seat, 0.0)
        info = {"why": str(how.get("reason") or ""), "invalid": bool(how.get("invalid_move"))}
        if isinstance(reward, str):  # a few games swap their reward and their reason
            info, reward = info | {"odd_reward": reward}, 0.0
        won = float(reward) >= 1.0
        if self.seats > 1:
            invalid = any(ends[other].get("invalid_move") for other in ends if other != seat)
            info["opponent_invalid"] = bool(invalid)
            won = float(reward) > 0 and not invalid
        return info | {"success": won}, float(won) if self.wins_only else float(reward)

    def _addressed(self) -> dict[str, str]:
        """Returns whom the last news was for, where there are several."""
        return {"player": str(self._mover)} if self.seats > 1 else {}

    def _news(self) -> str:
        """Returns what the game and others have told the player whose turn it is since its last
        look; its own moves are left out."""
        self._mover, messages = self._game.get_observation()
        shown = [
            str(text) if who == _GAME else f"[Player {who}] {text}"
            for who, text, _ in messages
            if who != self._mover
        ]
        return "\n".join(shown).strip()

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


def _shown(env: gymnasium.Env[str, str], rng: random.Random) -> Player:
    """Says one of the bracketed moves that the latest message shows, or a small number."""

    def play(messages: Sequence[Message]) -> str:
        found = re.findall(r"\[(?!GAME|Player)[^\[\]\n]{1,20}\]", messages[-1].content)
        return rng.choice(found) if found else f"[{rng.randrange(9)}]"

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
