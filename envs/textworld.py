"""textworld/Game-v0: text adventures of the package TextWorld, played or made.

With `kwargs: {game: FILE}` a game file (.z8 or .ulx) is played. Without one, worlds are made by
TextWorld's generator with `rooms`, `objects` and a quest of `quest` commands; a start's seed says
which of `worlds` it is. What a command gains in the game's score is its reward; winning or losing
terminates, `steps` commands truncate. A world's optimum is the game's highest score, where the
file next to it says so (TextWorld writes one).

A command is one line of at most 200 characters; control characters and backslashes become spaces,
since they speak to the interpreter of the games and some hang it. What would write or read files
(`save`, `restore`, `script`) is not given to the game: an episode could begin where another ended.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium

from ..protocols import Message, Text
from ..tools import files

RULES = "You play a text adventure. Say one command, such as `open door` or `go north`."
LONGEST = 20_000  # characters of an observation
FILES = ("commands", "noscript", "recording", "replay", "restore", "save", "script", "transcript",
    "unscript")  # fmt: skip
KNOWN = 9  # letters by which the games know a word


class TextWorld(gymnasium.Env[str, str]):
    """A text adventure; see the module's docstring.

    Args:
        game: a game file; None: worlds are made.
        rooms, objects, quest: of a world that is made.
        worlds: how many different ones.
        steps: commands after which an episode is truncated.
        folder: where worlds that were made are kept; default: `textworld` in the folder for
            caches (TURNWISE_CACHE).
    """

    metadata: dict[str, Any] = {"render_modes": []}
    observation_space = action_space = Text(LONGEST)

    def __init__(
        self,
        game: str | None = None,
        rooms: int = 3,
        objects: int = 5,
        quest: int = 4,
        worlds: int = 1,
        steps: int = 30,
        folder: str | None = None,
    ) -> None:
        if game is not None and not Path(game).is_file():
            raise ValueError(f"there is no game file {game}")
        if not all(isinstance(count, int) and count >= 1 for count in (worlds, steps)):
            raise ValueError(
                f"worlds and steps must be whole numbers of at least 1, got {worlds} and {steps}"
            )
        import textworld

        self._given, self._worlds, self._steps = game, worlds, steps
        self._made = {"nb_rooms": rooms, "nb_objects": objects, "quest_length": quest}
        self._folder = Path(folder or files.cache_folder() / "textworld").expanduser()
        self._wanted = textworld.EnvInfos(
            admissible_commands=True, max_score=True, won=True, lost=True, policy_commands=True
        )
        self._game: Any = None
        self.players: Mapping[str, Any] = {"expert": _expert, "random": _admissible}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begins a game; its first observation is the game's own opening.

        Raises:
            ValueError: options; a game has none.
        """
        super().reset(seed=seed)
        if options:
            raise ValueError(f"a TextWorld game takes no reset options, got {', '.join(options)}")
        number = int(self.np_random.integers(2**31)) if seed is None else seed
        self.close()
        import textworld

        self._game = textworld.start(str(self._file(number % self._worlds)), self._wanted)
        state = self._game.reset()
        self._score, self._count = 0.0, 0
        self._look(state)
        known = state.max_score is not None
        optimum = {"optimum": float(state.max_score)} if known else {}
        return _words(state.feedback), {"system": RULES, **optimum}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Gives a command to the game."""
        kept = (sign if sign.isprintable() and sign != "\\" else " " for sign in action)
        command = " ".join("".join(kept).split())[:200]
        words = {word[:KNOWN] for word in re.findall(r"[a-z]+", command.lower())}
        self._count += 1
        if words & {name[:KNOWN] for name in FILES}:
            cut = self._count >= self._steps
            return "You cannot do that here.", 0.0, False, cut, {"success": False} if cut else {}
        state, score, done = self._game.step(command)
        self._look(state)
        gained, self._score = score - self._score, float(score)
        over = bool(state.won or state.lost)
        cut = not over and (bool(done) or self._count >= self._steps)
        info = {"success": bool(state.won)} if over or cut else {}
        return _words(state.feedback), float(gained), over, cut, info

    def close(self) -> None:
        """Ends the game's interpreter."""
        if self._game is not None:
            self._game.close()
            self._game = None

    def _look(self, state: Any) -> None:
        self.commands = list(state.admissible_commands or ["look"])
        self.way = list(state.policy_commands or [])

    def _file(self, number: int) -> Path:
        """Returns the file of a world, which it makes where it is not there."""
        if self._given is not None:
            return Path(self._given)
        from textworld import GameOptions, make

        options = GameOptions()
        options.seeds = number
        for name, value in self._made.items():
            setattr(options, name, value)
        name = "-".join(map(str, (*self._made.values(), number)))
        found = self._folder / f"world-{name}.z8"
        if not found.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            options.path = str(self._folder / f"making-{name}-{os.getpid()}.z8")
            made, _ = make(options)
            parts = Path(made).parent.glob(f"{Path(made).stem}.*")
            # What is looked for comes last: then the rest is there.
            for part in sorted(parts, key=lambda part: part.suffix == found.suffix):
                part.replace(found.with_suffix(part.suffix))
        return found


def _words(text: str) -> str:
    return re.sub(r"[ \t]+\n", "\n", text).strip()[:LONGEST]


def _expert(env: TextWorld, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Says the next command on the way to the end."""
    return lambda messages: env.way[0] if env.way else "look"


def _admissible(env: TextWorld, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Says any command that the game would understand now."""
    return lambda messages: rng.choice(env.commands)
