"""Environments that raise, hang and lie in every place: each failure has its cause, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import turnwise

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "hostile_environments.py"


@pytest.mark.parametrize("episodes", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_each_failure_is_counted_to_its_cause_and_nothing_is_left_behind(episodes: int) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(episodes)], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{episodes} episodes, {episodes * 2 // 5} of them" in done.stdout


class Says(gymnasium.Env):
    """Returns what its options say; at reset what `at_reset` says."""

    observation_space = gymnasium.spaces.Text(100, charset="abc ")
    action_space = turnwise.Text(100)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        return "abc", GIVEN[-1] if isinstance(GIVEN[-1], dict) else {}

    def step(self, action: str) -> tuple:
        given = GIVEN[-1] if isinstance(GIVEN[-1], tuple) else ()
        return (*given, *("abc", 1.0, True, False, {})[len(given) :])


GIVEN: list[object] = []
gymnasium.register("test/Says-v0", Says)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("ab\u00e9",), "step 1: the observation has '\u00e9' (U+00E9) at character 2, which the charset"),
        (("a\udc80",), "step 1: the observation is not valid Unicode (U+DC80, a lone surrogate, at character 1)"),
        ((b"abc",), "step 1: the observation is bytes, not str"),
        (("a", "0.5"), "step 1: the reward is '0.5', not a number"),
        (("a", np.array("0.5")), "step 1: the reward is array('0.5'"),
        (("a", None), "step 1: the reward is None"),
        (("a", -1.7e308), "step 1: the reward is -1.7e+308; beyond 1e+15"),
        (("a", 10**400), "not a number"),
        (("a", 0.0, None), "step 1: terminated is None, neither True nor False"),
        (("a", 0.0, "False"), "step 1: terminated is 'False', not a number"),
        (("a", 0.0, True, float("nan")), "step 1: truncated is nan"),
        (("a", 0.0, True, 2), "step 1: truncated is 2, neither True nor False"),
        (("a", 0.0, True, False, {"success": "false"}), "step 1: info[\"success\"] is 'false'"),
        (("a", 0.0, True, False, {"success": 0.5}), 'step 1: info["success"] is 0.5, neither True nor False'),
        ({"tools": "search"}, 'reset: info["tools"] must be a list of tool schemas'),
        ({"tools": [{"description": "no name"}]}, 'reset: info["tools"] must be a list of tool schemas'),
        ({"system": "\ud800"}, 'reset: info["system"] is not valid Unicode'),
        ({"role": ["tool"]}, "reset: info[\"role\"] is ['tool']"),
    ],
)
def test_what_is_no_text_no_number_and_no_flag_is_named(given: object, reason: str) -> None:
    GIVEN.append(given)
    [episode] = turnwise.rollout(turnwise.ScriptPlayer(lambda said: "x"), [(turnwise.Start("test/Says-v0", 1), 0)])
    assert episode.ending == "failed"
    assert reason in episode.reason


@pytest.mark.parametrize(
    "given", [("a", np.float32(1.0), np.bool_(True)), ("a", True, 1, 0, {"success": np.bool_(True)}), ("a", 1)]
)
def test_numpy_and_zero_and_one_are_fine(given: object) -> None:
    GIVEN.append(given)
    [episode] = turnwise.rollout(turnwise.ScriptPlayer(lambda said: "x"), [(turnwise.Start("test/Says-v0", 1), 0)])
    assert (episode.ending, episode.env_return) == ("terminated", 1.0), episode.reason


@pytest.mark.parametrize("limit", [{"max_episode_steps": 3}, {}])
def test_coroutines_registered_the_ordinary_way(limit: dict[str, int]) -> None:
    class Awaited(gymnasium.Env):
        metadata = {"render_modes": [], "concurrency": "thread"}
        observation_space = action_space = turnwise.Text(100)
        closed = 0

        async def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:  # type: ignore[override]
            self.turn = 0
            return "hi", {}

        async def step(self, action: str) -> tuple:  # type: ignore[override]
            self.turn += 1
            return "more", 0.0, self.turn == 5, False, {}

        async def close(self) -> None:  # type: ignore[override]
            type(self).closed += 1

    gymnasium.register("test/Awaited-v0", Awaited, **limit)  # type: ignore[arg-type]
    chosen = [(s, 0) for s in turnwise.starts("test/Awaited-v0", 1, 4)]
    episodes = turnwise.rollout(turnwise.ScriptPlayer(lambda said: "x"), chosen)
    gymnasium.registry.pop("test/Awaited-v0")
    assert [(e.ending, len(e.turns)) for e in episodes] == [("truncated", 3) if limit else ("terminated", 5)] * 4
    assert Awaited.closed == 4


def test_no_more_live_than_the_environment_says() -> None:
    class Few(gymnasium.Env):
        metadata = {"render_modes": [], "concurrency": "thread", "instances": 2}
        observation_space = action_space = turnwise.Text(100)
        live = most = 0

        def __init__(self) -> None:
            type(self).live += 1
            type(self).most = max(self.live, self.most)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
            return "hi", {}

        def step(self, action: str) -> tuple:
            return "bye", 0.0, True, False, {}

        def close(self) -> None:
            type(self).live -= 1

    gymnasium.register("test/Few-v0", Few)
    chosen = [(s, 0) for s in turnwise.starts("test/Few-v0", 1, 12)]
    episodes = turnwise.rollout(turnwise.ScriptPlayer(lambda said: "x"), chosen)
    gymnasium.registry.pop("test/Few-v0")
    assert [e.ending for e in episodes] == ["terminated"] * 12
    assert (Few.most, Few.live) == (2, 0)
