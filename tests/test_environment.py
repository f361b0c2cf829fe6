"""The text space, environments that break, the checker, and other people's environments."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import types
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import support.environments  # noqa: F401 - registers them
import turnwise
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st
from turnwise.engine.environments.pool import Environments
from turnwise.engine.environments.registry import make_env
from turnwise.engine.errors import EnvironmentBroke
from turnwise.engine.stages.environments import EnvConfig, check_envs


def played(
    env: str, count: int = 2, reply: str = "yes", **options: object
) -> list[turnwise.Episode]:
    chosen = [(s, 0) for s in turnwise.starts(env, 1, count)]
    return turnwise.rollout(turnwise.ScriptPlayer(lambda said: reply), chosen, **options)  # type: ignore[arg-type]


@given(st.text(max_size=200))
def test_the_text_space_takes_any_string(text: str) -> None:
    space = turnwise.Text(200)
    assert text in space
    assert space.from_jsonable(space.to_jsonable([text])) == [text]


def test_the_text_space() -> None:
    space = turnwise.Text(5, seed=0)
    assert "123456" not in space
    assert 3 not in space
    assert space == turnwise.Text(5) != turnwise.Text(6)
    assert all(space.sample() in space for _ in range(50))
    with pytest.raises(ValueError):
        turnwise.Text(0)


@pytest.mark.parametrize("env", ["turnwise/SupportDesk-v0", "turnwise/Maze-v0", "test/Good-v0"])
def test_gymnasiums_own_checker_has_no_complaint(env: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make_env(env).unwrapped, skip_render_check=True)
    batch = gymnasium.make_vec(env, num_envs=2, vectorization_mode="sync")
    observations, _ = batch.reset(seed=1)
    assert len(observations) == 2


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ("Raises", "RuntimeError: the kettle exploded (environments.py:"),
        ("RaisesInReset", "reset: KeyError: 'no story'"),
        ("Exits", "SystemExit: 3"),
        ("Hangs", "no answer within 0.3 s"),
        ("ReturnsNone", "step must return (obs, reward, terminated, truncated, info), got None"),
        ("SaysNone", "the observation is NoneType, not str"),
        ("Sends5MB", "5,000,000 characters is outside Text(10000)"),
        ("RewardNaN", "the reward is nan"),
        ("RewardNone", "the reward is None, not a number"),
        ("InfoNone", "info is NoneType"),
        ("OddRole", "info[\"role\"] is 'assistant'"),
    ],
)
def test_a_broken_environment_ends_its_own_episode_as_failed(env: str, reason: str) -> None:
    good = [(s, 0) for s in turnwise.starts("test/Good-v0", 1, 2)]
    bad = [(s, 0) for s in turnwise.starts(f"test/{env}-v0", 1, 1)]
    episodes = turnwise.rollout(
        turnwise.ScriptPlayer(lambda said: "yes"), [good[0], *bad, good[1]], step_limit=0.3
    )
    assert [e.ending for e in episodes] == ["terminated", "failed", "terminated"]
    assert reason in episodes[1].reason
    assert episodes[1].env_return == 0.0


def test_too_many_failures_stop_the_play_and_quote_the_reasons() -> None:
    with pytest.raises(turnwise.TooManyFailures, match="the kettle exploded"):
        played("test/Raises-v0", 4, max_failure_rate=0.25)


def test_a_hung_environment_does_not_hold_the_exit() -> None:
    code = """
    import turnwise, support.environments
    turnwise.Plugins()
    chosen = [(s, 0) for s in turnwise.starts("test/Hangs-v0", 1, 2)]
    episodes = turnwise.rollout(turnwise.ScriptPlayer(lambda said: "yes"), chosen, step_limit=0.2)
    print([e.ending for e in episodes])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    assert done.stdout.strip() == "['failed', 'failed']", done.stderr


def test_thread_safe_environments_step_side_by_side() -> None:
    episodes = played("test/Slow-v0", 8)
    assert [e.ending for e in episodes] == ["terminated"] * 8, (
        "one that stepped alone would have waited in vain"
    )


def test_coroutines_share_one_loop() -> None:
    assert [e.ending for e in played("test/Async-v0", 3)] == ["terminated"] * 3


def test_an_environment_in_its_own_process() -> None:
    [fine] = played("test/OwnProcess-v0", 1)
    assert fine.ending == "terminated", fine.reason
    assert fine.messages[-1].content.startswith("pid ")
    assert fine.messages[-1].content != f"pid {os.getpid()}"
    [dead] = played("test/OwnProcess-v0", 1, reply="die")
    assert (dead.ending, "exit code 7" in dead.reason) == ("failed", True)
    [hung] = played("test/OwnProcess-v0", 1, reply="hang", step_limit=3.0)
    assert (hung.ending, "no answer" in hung.reason) == ("failed", True)
    [helped] = turnwise.rollout(
        turnwise.ScriptPlayer("expert"), [(turnwise.starts("test/OwnProcess-v0", 1, 1)[0], 0)]
    )
    assert (helped.ending, helped.turns[0].action) == ("terminated", "go on")


@pytest.mark.parametrize(
    ("env", "finding"),
    [
        ("Raises", "the kettle exploded"),
        ("NeverEnds", "did not end within 30 turns"),
        ("IgnoresSeed", "two different transcripts"),
        ("GlobalRandom", "global random state"),
        ("Remembers", "reset does not reset everything"),
        ("BeatsItsOptimum", "exceeds the start's stated optimum 0.5"),
        ("WeakExpert", "its expert got 0 of 0.5"),
        ("SaysNone", "not str"),
        ("Hangs", "no answer within 0.3 s"),
    ],
)
def test_the_checker_finds_what_gymnasiums_misses(env: str, finding: str) -> None:
    problems = turnwise.check_environment(f"test/{env}-v0", episodes=4, max_turns=30, limit=0.3)
    assert any(finding in problem for problem in problems), problems


def test_the_checker_passes_good_ones() -> None:
    for env in ("turnwise/SupportDesk-v0", "turnwise/Maze-v0", "test/Good-v0"):
        assert turnwise.check_environment(env) == []


def test_unknown_environments_and_wrong_spaces_say_what_to_do() -> None:
    player = turnwise.ScriptPlayer(lambda said: "yes")
    with pytest.raises(LookupError, match=r"Did you mean 'turnwise/SupportDesk-v0'"):
        turnwise.rollout(player, [(turnwise.Start("turnwise/SuportDesk-v0", 1), 0)])
    with pytest.raises(turnwise.ConfigError, match="Wrap it with a text codec"):
        check_envs([EnvConfig(id="test/Arrays-v0")])
    with pytest.raises(turnwise.ConfigError, match="not made with 'depth'. Known: .*layout"):
        check_envs([EnvConfig(id="turnwise/Maze-v0", kwargs={"depth": 3})])
    with pytest.raises(turnwise.ConfigError, match="'lay_out'. Did you mean 'layout'"):
        check_envs([EnvConfig(id="turnwise/Maze-v0", kwargs={"lay_out": 3})])
    with pytest.raises(turnwise.ConfigError, match="it needs 'tools'. It is made with: env, tools"):
        check_envs([EnvConfig(id="turnwise/Tools-v0", kwargs={"env": "turnwise/Maze-v0"})])
    with pytest.raises(turnwise.ConfigError, match="stands under `seats`, outside of `kwargs`"):
        seats = {"num_players": {"0": "policy"}}
        check_envs([EnvConfig(id="textarena/TicTacToe-v0", kwargs=seats)])
    with pytest.raises(
        LookupError, match="has no player 'exprt'; it has: expert, random, demonstrator"
    ):
        turnwise.rollout(
            turnwise.ScriptPlayer("exprt"), [(turnwise.starts("turnwise/Maze-v0", 1, 1)[0], 0)]
        )


class Crowded(gymnasium.Env[str, str]):
    """Stands for a server that plays two at a time."""

    metadata: dict[str, Any] = {"concurrency": "thread"}
    observation_space = action_space = turnwise.Text(100)
    playing: set[int] = set()
    others = 0  # how many others have, for the next tries

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if Crowded.others:
            Crowded.others -= 1
        if Crowded.others or len(self.playing) >= 2:
            raise turnwise.protocols.NoRoom("two are played")
        self.playing.add(id(self))
        self.left = 3
        return f"hello {seed}", {}

    def step(self, action: str) -> Any:
        self.left -= 1
        if not self.left:
            self.close()
        return "and?", 0.0, not self.left, False, {}

    def close(self) -> None:
        self.playing.discard(id(self))


class Limited(Crowded):
    """Says how many may be played."""

    metadata: dict[str, Any] = {"concurrency": "thread", "instances": 2}


gymnasium.register("test/Crowded-v0", Crowded)
gymnasium.register("test/Limited-v0", Limited)


@pytest.mark.parametrize("schedule", ["deterministic", "ready-first"])
def test_where_there_is_no_room_episodes_wait(schedule: Any, policy: turnwise.Policy) -> None:
    """Nothing fails, and a policy that replies to all at a time does not wait for them."""
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 3))
    starts = [(start, 0) for start in turnwise.starts("test/Crowded-v0", 0, 7)]
    episodes = turnwise.rollout(player, starts, schedule=schedule)
    assert [(e.ending, len(e.turns)) for e in episodes] == [("terminated", 3)] * 7
    assert Crowded.playing == set()


def test_an_episode_that_is_cut_leaves_its_room(policy: turnwise.Policy) -> None:
    """Also where nothing is asked of the pool afterwards, as during an update."""
    environments = Environments()
    starts = [(start, 0) for start in turnwise.starts("test/Limited-v0", 0, 2)]
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 3))
    cut = turnwise.rollout(player, starts, max_turns=1, environments=environments)
    assert [e.reason for e in cut] == ["max_turns"] * 2
    until = time.monotonic() + 30
    while Crowded.playing and time.monotonic() < until:
        time.sleep(0.05)
    assert Crowded.playing == set()
    environments.close()


def test_room_that_others_have_is_waited_for() -> None:
    Crowded.others = 5
    starts = [(start, 0) for start in turnwise.starts("test/Crowded-v0", 0, 3)]
    with pytest.warns(RuntimeWarning, match="two are played; it is waited for"):
        episodes = turnwise.rollout(turnwise.ScriptPlayer(lambda said: "x"), starts[:1])
    assert [e.ending for e in episodes] == ["terminated"]


class Splits(gymnasium.Env[str, str]):
    """Knows one option of `reset`, and breaks by itself where it was made so."""

    observation_space = action_space = turnwise.Text(100)

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if self.broken:
            raise OSError("no connection")
        if set(options or {}) - {"split"}:
            raise KeyError("no such option")
        return "hello", {}


gymnasium.register("test/Splits-v0", Splits)


def test_wrong_reset_options_show_before_the_run() -> None:
    """Also those of a later stage, or of held-out starts; an environment that breaks whatever it
    is given costs its own episodes."""
    check_envs([EnvConfig(id="test/Splits-v0", options={"split": "held_out"})])
    for own, other in (({"spilt": 1}, None), ({}, {"spilt": 1})):
        with pytest.raises(turnwise.ConfigError, match="reset: KeyError"):
            check_envs([EnvConfig(id="test/Splits-v0", options=own)], options=other)
    broken = EnvConfig(id="test/Splits-v0", options={"spilt": 1}, kwargs={"broken": True})
    check_envs([broken])


def test_replay_reaches_the_same_states() -> None:
    [start] = turnwise.starts("turnwise/Maze-v0", 3, 1)
    [episode] = turnwise.rollout(turnwise.ScriptPlayer("random"), [(start, 0)])
    observations = turnwise.replay(start, [t.action for t in episode.turns])
    assert [o.message for o in observations] == [
        *(t.observation for t in episode.turns),
        episode.final,
    ]
    [bad] = turnwise.starts("test/Raises-v0", 1, 1)
    with pytest.raises(
        EnvironmentBroke, match="replay broke after 1 observations: step: RuntimeError"
    ):
        turnwise.replay(bad, ["x"])


def test_starts_are_distinct_and_32_bit() -> None:
    seeds = [s.seed for s in turnwise.starts("turnwise/Maze-v0", 1, 100_000)]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**32
    assert (
        turnwise.starts("turnwise/Maze-v0", 1, 3, first=2)[0]
        == turnwise.starts("turnwise/Maze-v0", 1, 3)[2]
    )


def test_truncation_and_its_reasons() -> None:
    [cut] = played("test/NeverEnds-v0", 1, max_turns=3)
    assert (cut.ending, cut.reason, len(cut.turns)) == ("truncated", "max_turns", 3)
    [limit] = turnwise.rollout(
        turnwise.ScriptPlayer(lambda said: "hm"),
        [(turnwise.starts("turnwise/Maze-v0", 1, 1)[0], 0)],
    )
    assert (limit.ending, limit.reason, len(limit.turns)) == ("truncated", "environment", 40)


def test_other_peoples_environments_work_unchanged(tmp_path: Path, model_folder: object) -> None:
    """The example in docs/environments.md: FrozenLake through a codec of a dozen lines, and a
    user's own environment, from a folder that has an `envs` package of its own."""
    page = (Path(__file__).parents[1] / "docs" / "environments.md").read_text()
    blocks = [b.split("```")[0] for b in page.split("```python\n")[1:]]
    codec = next(b for b in blocks if "FrozenLake" in b)
    riddle = next(b for b in blocks if "class Riddle" in b)
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").write_text(
        "MINE = 'the user has an envs package of their own'\n" + riddle
    )
    (tmp_path / "lake.py").write_text(codec)
    (tmp_path / "script.py").write_text(
        textwrap.dedent(f"""
        import envs, lake, turnwise
        assert envs.MINE
        run = turnwise.train({str(model_folder())!r}, env=[("acme/Riddle-v0", 0.5), ("text/FrozenLake-v0", 0.5)],  # noqa
                             updates=2, groups=4, group_size=2, max_new_tokens=6, max_turns=4, threads=1)
        import turnwise.envs.support_desk
        seen = {{e.start.env for e in run.ledger.run_episodes(run.id)}}
        assert seen == {{"acme/Riddle-v0", "text/FrozenLake-v0"}}, seen
        print("trained", run.updates)
        """)  # noqa: E501
    )  # type: ignore[operator]
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "trained 2" in done.stdout, done.stderr[-3000:]


def test_a_module_that_raises_while_it_is_looked_up_costs_its_own_episodes() -> None:
    """A lazy module, whose environment needs a package that is missing."""

    def missing(name: str) -> None:
        raise ImportError("an extra is missing")

    module = types.ModuleType("lazy_environments")
    module.__getattr__ = missing  # type: ignore[method-assign]
    sys.modules["lazy_environments"] = module
    gymnasium.register("test/Lazy-v0", "lazy_environments:Env")
    starts = [(s, 0) for e in ("test/Lazy-v0", "test/Echo-v0") for s in turnwise.starts(e, 0, 2)]
    try:
        episodes = turnwise.rollout(turnwise.ScriptPlayer(lambda heard: "hello"), starts)
    finally:
        del gymnasium.registry["test/Lazy-v0"], sys.modules["lazy_environments"]
    assert [e.ending for e in episodes] == ["failed", "failed", "terminated", "terminated"]
    assert "an extra is missing" in episodes[0].reason


def test_progress_is_told_whenever_conversations_have_ended() -> None:
    told: list[tuple[int, int]] = []
    starts = [(s, 0) for s in turnwise.starts("test/Echo-v0", 0, 5)]
    turnwise.rollout(
        turnwise.ScriptPlayer(lambda heard: "hello"), starts, progress=lambda *at: told.append(at)
    )
    assert [total for _, total in told] == [5] * len(told)
    counts = [done for done, _ in told]
    assert counts == sorted(set(counts))
    assert counts[-1] == 5
