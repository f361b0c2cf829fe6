"""The worlds of the credit benchmark are what they say: the real maze, and values that agree with
counting every game."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from support.scripts import benchmark
from turnwise.engine.environments.registry import make_env

credit = benchmark("credit")


@pytest.mark.parametrize("turns", [5, 20])
def test_the_table_is_the_maze(turns: int) -> None:
    """The same replies from the same cells: the same words, end and outcome as in the registered
    environment."""
    world, rng = credit.world("maze", turns), np.random.default_rng(0)
    env: Any = make_env(
        "turnwise/Maze-v0", size=3 if turns == 5 else 6, reward="exit", steps=turns
    ).unwrapped
    policy = np.full((len(world.texts), 4), 0.25)
    played = credit.play(world, policy, 16, rng)
    for e in range(len(played.length)):
        env.reset(seed=0)
        env.cell, total = world.cells[played.start[e]], 0.0
        for k in range(played.length[e]):
            assert env._where() == world.texts[played.seen[e, k]]
            _, reward, over, _, _ = env.step(world.replies[played.did[e, k]])
            total += reward
            assert over == (k + 1 == played.length[e])
        assert total == played.outcome[e]


def test_values_and_advantages_are_those_of_all_games_counted() -> None:
    world = credit.world("maze", 5)
    raw = np.random.default_rng(1).random((len(world.texts), 4))
    policy = raw / raw.sum(1, keepdims=True)

    def count(cell: int, turn: int) -> float:
        """The chance of getting out, by going through every sequence of replies."""
        total = 0.0
        for replies in itertools.product(range(4), repeat=5 - turn):
            chance, here = 1.0, cell
            for reply in replies:
                if here != world.out:
                    chance, here = chance * policy[here, reply], world.next[here, reply]
                else:
                    chance *= 0.25  # it is over: every continuation counts once
            total += chance * (here == world.out)
        return total

    advantage = world.advantage(policy)
    assert world.value(policy) == pytest.approx(np.mean([count(c, 0) for c in range(world.out)]))
    for cell, reply, turn in ((0, 1, 0), (3, 2, 2), (5, 0, 4)):
        after = world.next[cell, reply]
        worth = 1.0 if after == world.out else count(after, turn + 1)
        assert advantage[turn, cell, reply] == pytest.approx(worth - count(cell, turn))
    quiz = credit.world("quiz", 20)
    even = np.full((len(quiz.texts), 4), 0.25)
    played = credit.play(quiz, even, 2000, np.random.default_rng(2))
    assert played.outcome.mean() == pytest.approx(quiz.value(even), abs=0.01)
    paid = [quiz.paid(played, e) for e in range(50)]
    assert [sum(p) for p in paid] == pytest.approx(played.outcome[:50].tolist())
