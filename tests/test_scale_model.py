"""The model of what an update costs (`benchmarks/scale.py`) against cases counted by hand; that it
is near what is measured, its `check` says."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from scale import Speed, Work, course, fitted, ready_first, together

SPEED = Speed(step=0.01, row=0.001, prompt=0.0001, update=2.0, token=0.001, send=0.5)
EVEN = Work(conversations=8, turns=3, reply=10, read=5, vary=False, judge=4.0)


def test_a_line_is_fitted_and_is_nowhere_below_zero() -> None:
    assert fitted([(1.0, 5.0), (2.0, 7.0), (3.0, 9.0)]) == pytest.approx((3.0, 2.0))
    assert fitted([(1.0, 1.0), (2.0, 4.0)]) == (0.0, 3.0)


def test_play_is_what_its_steps_take() -> None:
    """Three turns of ten steps with eight in each, and forty tokens read before each."""
    one = 3 * (8 * 5 * 0.0001 + 10 * (0.01 + 8 * 0.001))
    assert together(SPEED, EVEN, 8, random.Random(0)) == pytest.approx(one)
    # Whoever waits for nobody begins a few tokens' reading apart.
    assert ready_first(SPEED, EVEN, 8, random.Random(0)) == pytest.approx(one, rel=0.2)
    alone = 3 * (5 * 0.0001 + 10 * 0.011)
    assert ready_first(SPEED, EVEN, 1, random.Random(0)) == pytest.approx(alone)


def test_slow_environments_are_waited_for_together_or_not() -> None:
    slow = Work(64, 8, 10, 5, latency=1.0)
    times = [play(SPEED, slow, 64, random.Random(0)) for play in (together, ready_first)]
    assert times[0] > 1.2 * times[1]


@pytest.mark.parametrize("overlap", [0, 1, 2, 5])
def test_overlap_has_as_many_rounds_under_way(overlap: int) -> None:
    """On two workers, four conversations each: an update takes the longest of play, update, and
    all of a round divided by the rounds that are under way."""
    play = 0.5 + together(SPEED, EVEN, 4, random.Random(0))
    update = 2.0 + 0.001 * 8 * 3 * 15
    found = course(SPEED, EVEN, 2, overlap, "deterministic", rounds=40)
    whole = (play + 4.0 + update) / (overlap + 1)
    assert found.seconds == pytest.approx(max(play, update, whole), rel=0.02)
    assert found.updating == pytest.approx(update / found.seconds, rel=0.02)
    assert found.staleness == pytest.approx(overlap, abs=0.01)
