"""Environments that raise, hang and lie in every place: each failure has its cause, and nothing is
left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import turnwise

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "hostile_environments.py"


@pytest.mark.parametrize("episodes", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_each_failure_is_counted_to_its_cause_and_nothing_is_left_behind(episodes: int) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(episodes), "1"],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "LIMIT": "2.5"},
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
        (
            ("ab\u00e9",),
            "step 1: the observation has '\u00e9' (U+00E9) at character 2, which the charset",
        ),
        (
            ("a\udc80",),
            (
                "step 1: the observation is not valid Unicode (U+DC80, a lone surrogate, at"
                " character 1)"
            ),
        ),
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
        (
            ("a", 0.0, True, False, {"success": 0.5}),
            'step 1: info["success"] is 0.5, neither True nor False',
        ),
        ({"tools": "search"}, 'reset: info["tools"] must be a list of tool schemas'),
        (
            {"tools": [{"description": "no name"}]},
            'reset: info["tools"] must be a list of tool schemas',
        ),
        ({"system": "\ud800"}, 'reset: info["system"] is not valid Unicode'),
        ({"role": ["tool"]}, "reset: info[\"role\"] is ['tool']"),
    ],
)
def test_what_is_no_text_no_number_and_no_flag_is_named(given: object, reason: str) -> None:
    GIVEN.append(given)
    [episode] = turnwise.rollout(
        turnwise.ScriptPlayer(lambda said: "x"), [(turnwise.Start("test/Says-v0", 1), 0)]
    )
    assert episode.ending == "failed"
    assert reason in episode.reason


@pytest.mark.parametrize(
    "given",
    [
        ("a", np.float32(1.0), np.bool_(True)),
        ("a", True, 1, 0, {"success": np.bool_(True)}),
        ("a", 1),
    ],
)
def test_numpy_and_zero_and_one_are_fine(given: object) -> None:
    GIVEN.append(given)
    [episode] = turnwise.rollout(
        turnwise.ScriptPlayer(lambda said: "x"), [(turnwise.Start("test/Says-v0", 1), 0)]
    )
    assert (episode.ending, episode.env_return) == ("terminated", 1.0), episode.reason


@pytest.mark.parametrize("limit", [{"max_episode_steps": 3}, {}])
def test_coroutines_registered_the_ordinary_way(limit: dict[str, int]) -> None:
    class Awaited(gymnasium.Env):
        metadata = {"render_modes": [], "concurrency": "thread"}
        observation_space = action_space = turnwise.Text(100)
        closed = 0

        async def reset(
            self, *, seed: int | None = None, options: dict | None = None
        ) -> tuple[str, dict]:  # type: ignore[override]
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
    assert [(e.ending, len(e.turns)) for e in episodes] == [
        ("truncated", 3) if limit else ("terminated", 5)
    ] * 4
    assert Awaited.closed == 4


def test_no_more_live_than_the_environment_says() -> None:
    class Few(gymnasium.Env):
        metadata = {"render_modes": [], "concurrency": "thread", "instances": 2}
        observation_space = action_space = turnwise.Text(100)
        live = most = 0

        def __init__(self) -> None:
            type(self).live += 1
            type(self).most = max(self.live, self.most)

        def reset(
            self, *, seed: int | None = None, options: dict | None = None
        ) -> tuple[str, dict]:
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


def test_what_it_is_made_with_says_how_it_is_stepped() -> None:
    """Two environments of one id: one of them says that it must be alone."""

    class Moody(gymnasium.Env):
        observation_space = action_space = turnwise.Text(100)
        together: ClassVar[dict[str, int]] = {}
        at_work: ClassVar[Counter[str]] = Counter()

        def __init__(self, way: str) -> None:
            self.way, self.metadata = way, {"render_modes": [], "concurrency": way}

        def reset(
            self, *, seed: int | None = None, options: dict | None = None
        ) -> tuple[str, dict]:
            return "hi", {}

        def step(self, action: str) -> tuple:
            self.at_work[self.way] += 1
            until = time.monotonic() + 20 * (self.way == "thread")
            while self.at_work["thread"] < 2 and time.monotonic() < until:
                time.sleep(0.01)  # for another, which comes where it may
            self.together[self.way] = max(self.together.get(self.way, 0), self.at_work[self.way])
            if self.way == "serial":
                time.sleep(0.02)
                self.at_work[self.way] -= 1
            return "bye", 0.0, True, False, {}

    gymnasium.register("test/Moody-v0", Moody)
    chosen = [
        (start, 0)
        for way in ("serial", "thread")
        for start in turnwise.starts("test/Moody-v0", 1, 4, kwargs={"way": way})
    ]
    episodes = turnwise.rollout(turnwise.ScriptPlayer(lambda said: "x"), chosen)
    gymnasium.registry.pop("test/Moody-v0")
    assert [e.ending for e in episodes] == ["terminated"] * 8
    assert Moody.together["serial"] == 1
    assert Moody.together["thread"] > 1


CYCLE: dict[str, object] = {}
CYCLE["itself"] = CYCLE


@pytest.mark.parametrize(
    ("info", "kept"),
    [
        ({"n": 2**70}, {"n": 2**70}),
        ({"n": 10**6000}, {"n": hex(10**6000)}),
        ({"x": np.longdouble(0.5)}, {"x": 0.5}),
        ({"z": np.clongdouble(1)}, {"z": str(np.clongdouble(1).item())}),
        ({"t": np.datetime64("2026-11-29")}, {"t": "2026-11-29"}),
    ],
)
def test_what_an_environment_notes_can_be_written_down(
    info: dict, kept: dict, tmp_path: Path
) -> None:
    GIVEN.append(("abc", 1.0, True, False, info))
    [episode] = turnwise.rollout(
        turnwise.ScriptPlayer(lambda said: "x"), [(turnwise.Start("test/Says-v0", 1), 0)]
    )
    ledger = turnwise.Ledger(tmp_path / "l.sqlite")
    ledger.add_episodes([episode])
    assert ledger.episodes([episode.id])[episode.id].turns[0].info == kept


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("abc", 1.0, True, False, CYCLE), "step 1: info contains itself, or is nested too deeply"),
        (
            {"tools": [{"name": "f", "parameters": {"type": "object", "properties": ["a"]}}]},
            (
                "reset: the parameters of tool 'f' must be a JSON schema whose properties are"
                " schemas by name"
            ),
        ),
        (
            {"tools": [{"name": "f", "parameters": {"properties": {"a": "string"}}}]},
            (
                "reset: the parameters of tool 'f' must be a JSON schema whose properties are"
                " schemas by name"
            ),
        ),
    ],
)
def test_what_cannot_be_written_down_costs_its_own_episode(given: object, reason: str) -> None:
    GIVEN.append(given)
    [episode] = turnwise.rollout(
        turnwise.ScriptPlayer(lambda said: "x"), [(turnwise.Start("test/Says-v0", 1), 0)]
    )
    assert episode.ending == "failed"
    assert reason in episode.reason


class Wanders(gymnasium.Env):
    """Changes the working directory of the whole process."""

    observation_space = action_space = turnwise.Text(1000)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        os.chdir("/")
        return "hello", {}

    def step(self, action: str) -> tuple:
        return "bye", float(len(action)), True, False, {}


gymnasium.register("test/Wanders-v0", Wanders)


def test_a_run_stays_where_it_began(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rl = {"env": "test/Wanders-v0", "updates": 2, "groups": 2, "group_size": 2, "max_new_tokens": 4}
    run = turnwise.Run(
        {
            "policy": str(model_folder()),
            "folder": "r",
            "ledger": "sqlite:///own.sqlite",
            "stages": [{"rl": rl}],
        }
    )
    run.finish()
    assert Path.cwd() == Path("/")
    assert (tmp_path / "r" / "metrics.jsonl").exists()
    assert turnwise.Ledger(tmp_path / "own.sqlite").counts()["episodes"] == 8


class Starts(gymnasium.Env):
    """Starts a program of its own, as a browser or a game server, and hangs."""

    metadata = {"render_modes": [], "concurrency": "process"}
    observation_space = action_space = turnwise.Text(1000)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        self.program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        return str(self.program.pid), {}

    def step(self, action: str) -> tuple:
        if action == "hang":
            time.sleep(600)
        os._exit(3)


gymnasium.register("test/Starts-v0", Starts)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [("hang", "no answer within"), ("die", "its process died with exit code 3")],
)
def test_what_an_environment_started_ends_with_it(reply: str, reason: str) -> None:
    player = turnwise.ScriptPlayer(lambda said: reply)
    [episode] = turnwise.rollout(player, [(turnwise.Start("test/Starts-v0", 1), 0)], step_limit=2.0)
    assert reason in episode.reason
    stat = Path("/proc", episode.turns[0].observation.content, "stat")
    until = time.monotonic() + 60
    while (
        stat.exists()
        and stat.read_text().rpartition(")")[2].split()[0] != "Z"
        and time.monotonic() < until
    ):
        time.sleep(0.01)
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_close_that_fails_where_warnings_are_errors() -> None:
    class Unclosable(Wanders):
        def reset(
            self, *, seed: int | None = None, options: dict | None = None
        ) -> tuple[str, dict]:
            return "hello", {}

        def close(self) -> None:
            raise RuntimeError("it is stuck")

    gymnasium.register("test/Unclosable-v0", Unclosable)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [episode] = turnwise.rollout(
            turnwise.ScriptPlayer(lambda said: "x"), [(turnwise.Start("test/Unclosable-v0", 1), 0)]
        )
    gymnasium.registry.pop("test/Unclosable-v0")
    assert episode.ending == "terminated"


class Calls(gymnasium.Env):
    """Answers as a tool, or with other words, where its options say so."""

    observation_space = action_space = turnwise.Text(1000)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        self.role, self.words = "user", "a result"
        for name, value in (options or {}).items():
            setattr(self, name, value)
        return "hello", {}

    def step(self, action: str) -> tuple:
        return self.words, 1.0, False, False, {"role": self.role}


gymnasium.register("test/Calls-v0", Calls)


@pytest.mark.parametrize("history", ["append", "rerender"])
def test_a_message_that_the_template_refuses_costs_its_own_episode(
    history: Any, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder(), chat_template=PRUDE)
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 4), history=history)
    chosen = [
        (turnwise.Start("test/Calls-v0", k, {"words": words}), 0)
        for k, words in enumerate(["a result", "a rude one", "a result"])
    ]
    ok, refused, fine = turnwise.rollout(player, chosen, max_turns=2)
    assert (ok.ending, fine.ending) == ("truncated", "truncated")
    assert refused.ending == "failed"
    assert refused.reason.startswith("template: ")
    assert len(refused.turns) == 1, "what was said before is kept"


@pytest.mark.parametrize("history", ["append", "rerender"])
def test_a_template_without_a_role_for_tools_shows_results_as_the_users(
    history: Any, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder(), chat_template=NO_TOOLS)
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 4), history=history)
    start = turnwise.Start("test/Calls-v0", 0, {"role": "tool"})
    [episode] = turnwise.rollout(player, [(start, 0)], max_turns=2)
    assert episode.ending == "truncated", episode.reason
    read = policy.tokenizer.decode(episode.turns[1].prompt_ids)
    assert read.endswith("user\na result<|im_end|>\n<|im_start|>assistant\n")


PRUDE = turnwise.CHATML.replace(
    "{% for",
    "{% for m in messages if 'rude' in m.content %}{{ raise_exception('not that') }}{% endfor %}"
    "{% for",
    1,
)
NO_TOOLS = turnwise.CHATML.replace(
    "{% for",
    "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endfor"
    " %}{% for",
    1,
)
