"""turnwise/Maze-v0: find the way out of a small maze in words. Every reply costs 1.

The maze is a graph of cells with walls between them, drawn once from `layout`; the exit is in the
last corner, the start anywhere else. States repeat: a player that walks in a circle meets the
same sentence again, which credit methods that compare returns at equal states need. The optimum of
a start is minus the length of the shortest way, found by breadth-first search.

With `observed=False` (turnwise/MazePO-v0) the cell is not named, only the ways that are open: the
player has to remember its moves to know its position. With `reward="exit"` nothing is paid on the
way: 1 for getting out, 0 for being still inside after `steps` replies.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import gymnasium

from ..protocols import Message, Text

SYSTEM = "Find the way out. Say where you go: north, east, south or west."
MOVES = {"north": (-1, 0), "east": (0, 1), "south": (1, 0), "west": (0, -1)}
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")

Cell = tuple[int, int]


def draw_maze(size: int, seed: int, loops: float = 0.2) -> dict[Cell, dict[str, Cell]]:
    """Draws a maze as cell -> direction -> neighbour.

    It is a spanning tree by random depth-first search, plus a share of the other openings.
    """
    rng = random.Random(f"maze {size} {seed}")
    cells = [(row, column) for row in range(size) for column in range(size)]
    doors: dict[Cell, dict[str, Cell]] = {cell: {} for cell in cells}

    def neighbours(cell: Cell) -> list[tuple[str, Cell]]:
        around = [(name, (cell[0] + dr, cell[1] + dc)) for name, (dr, dc) in MOVES.items()]
        return [(name, other) for name, other in around if other in doors]

    def open_door(cell: Cell, name: str, other: Cell) -> None:
        opposite = {"north": "south", "south": "north", "east": "west", "west": "east"}[name]
        doors[cell][name], doors[other][opposite] = other, cell

    stack, seen = [cells[0]], {cells[0]}
    while stack:
        unseen = [(name, other) for name, other in neighbours(stack[-1]) if other not in seen]
        if not unseen:
            stack.pop()
            continue
        name, other = rng.choice(unseen)
        open_door(stack[-1], name, other)
        seen.add(other)
        stack.append(other)
    for cell in cells:
        for name, other in neighbours(cell):
            if other not in doors[cell].values() and rng.random() < loops / 2:
                open_door(cell, name, other)
    return doors


def distances(doors: dict[Cell, dict[str, Cell]], exit_: Cell) -> dict[Cell, int]:
    """Returns the number of steps from every cell to the exit."""
    found, queue = {exit_: 0}, deque([exit_])
    while queue:
        cell = queue.popleft()
        for other in doors[cell].values():
            if other not in found:
                found[other] = found[cell] + 1
                queue.append(other)
    return found


class Maze(gymnasium.Env[str, str]):
    """A maze that is walked by words; see the module's docstring.

    Args:
        size: cells per side, 2 to 8.
        layout: seed from which the maze is drawn.
        observed: whether the cell is named.
        reward: "steps": -1 for every reply; "exit": 1 on the way out, else 0.
        steps: replies after which it is over; None: no limit.
    """

    metadata: dict[str, Any] = {"render_modes": []}
    players: ClassVar[Mapping[str, Any]]  # below
    observation_space = action_space = Text(1024)

    def __init__(
        self,
        size: int = 4,
        layout: int = 0,
        observed: bool = True,
        reward: Literal["steps", "exit"] = "steps",
        steps: int | None = None,
    ) -> None:
        if reward not in ("steps", "exit"):
            raise ValueError(f"reward must be 'steps' or 'exit', got {reward!r}")
        if not 2 <= size <= len(WORDS):
            raise ValueError(f"size must be 2 to {len(WORDS)}, got {size}")
        self.doors = draw_maze(size, layout)
        self.exit = (size - 1, size - 1)
        self.observed, self.reward, self.steps = observed, reward, steps
        self.distances = distances(self.doors, self.exit)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Draws the cell to start from; `optimum` of the info is the best return from there."""
        super().reset(seed=seed)
        cells = sorted(self.doors.keys() - {self.exit})
        self.cell, self.replies = cells[int(self.np_random.integers(len(cells)))], 0
        away = self.distances[self.cell]
        if self.reward == "exit":
            optimum = float(self.steps is None or away <= self.steps)
        else:
            optimum = -float(away if self.steps is None else min(away, self.steps))
        return self._where(), {"system": SYSTEM, "optimum": optimum}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Moves in the one direction that the reply names; ends at the exit or after `steps`
        replies."""
        named = [name for name in MOVES if re.search(rf"\b{name}\b", action.lower())]
        if len(named) != 1:
            text = "Say one direction. "
        elif named[0] not in self.doors[self.cell]:
            text = "There is a wall. "
        else:
            text = ""
            self.cell = self.doors[self.cell][named[0]]
        self.replies += 1
        out = self.cell == self.exit
        earned = float(out) if self.reward == "exit" else -1.0
        if out or self.replies == self.steps:
            return (
                "You are out." if out else "It is too late.",
                earned,
                True,
                False,
                {"success": out},
            )
        return text + self._where(), earned, False, False, {"success": False}

    def _where(self) -> str:
        row, column = self.cell
        ways = " or ".join(self.doors[self.cell])
        here = f"You are in row {WORDS[row]}, column {WORDS[column]}. " if self.observed else ""
        return f"{here}You can go {ways}."


def _expert(env: Maze, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Returns a player that has the map, sees its position, and takes a shortest way."""

    def reply(conversation: Sequence[Message]) -> str:
        ways = env.doors[env.cell]
        return f"I go {min(ways, key=lambda name: (env.distances[ways[name]], name))}."

    return reply


def _random(env: Maze, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Returns a player that picks any of the four directions."""
    return lambda conversation: f"I go {rng.choice(list(MOVES))}."


def _demonstrator(env: Maze, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Returns a player that wanders: mostly through an open door, now and then in the right
    direction, sometimes into a wall."""
    expert, lost = _expert(env, rng), _random(env, rng)

    def reply(conversation: Sequence[Message]) -> str:
        luck = rng.random()
        if luck < 0.15:
            return expert(conversation)
        return (
            lost(conversation) if luck < 0.3 else f"I go {rng.choice(list(env.doors[env.cell]))}."
        )

    return reply


Maze.players = {"expert": _expert, "random": _random, "demonstrator": _demonstrator}
