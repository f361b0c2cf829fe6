"""Text adventures, board games and environments on servers, against the packages themselves."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import turnwise
from test_agents import check_tokens, sampling
from turnwise.engine.environments.pool import Environments
from turnwise.tools import call_text, derive_id

turnwise.Plugins()


def script(*moves: str) -> turnwise.ScriptPlayer:
    return turnwise.ScriptPlayer(
        lambda messages: moves[sum(m.role == "assistant" for m in messages) % len(moves)]
    )


# PettingZoo.


def board(
    game: str, first: Sequence[str], second: Sequence[str], seat: str = "player_1"
) -> turnwise.Episode:
    names = {"player_1": "player_2", "player_2": "player_1", "player_0": "player_1"}
    start = turnwise.Start(f"pettingzoo/{game}", 0, {}, {}, seat, {names[seat]: "other"})
    return turnwise.rollout(script(*first), [(start, 0)], others={"other": script(*second)})[0]


@pytest.mark.parametrize("game", ["tictactoe_v3", "connect_four_v3"])
def test_board_games_pass_the_check(game: str) -> None:
    assert turnwise.check_environment(f"pettingzoo/{game}", episodes=6) == []


def test_tic_tac_toe_by_pettingzoos_rules() -> None:
    """X takes the first row; nine moves without three in a row are a draw; a field that is taken,
    or none, loses."""
    won = board("tictactoe_v3", ["0", "I take 1.", "2"], ["3", "4"])
    assert (won.env_return, won.success, won.ending) == (1.0, True, "terminated")
    assert won.turns[1].observation.content == (
        "X 1 2\nO 4 5\n6 7 8\nYou may play 1, 2, 4, 5, 6, 7, 8."
    )
    lost = board("tictactoe_v3", ["3", "4"], ["0", "1", "2"], seat="player_2")
    assert (lost.env_return, lost.success) == (-1.0, False)
    draw = board("tictactoe_v3", ["0", "2", "3", "7", "8"], ["1", "4", "6", "5"])
    assert (draw.env_return, draw.success, len(draw.turns)) == (0.0, False, 5)
    for move in ("3", "none", "9", "99999999999999999999"):
        broken = board("tictactoe_v3", ["0", move], ["3"])
        assert (broken.env_return, broken.turns[-1].info["invalid"]) == (-1.0, True)
    given = board("tictactoe_v3", ["0"], ["0"])
    assert (given.env_return, given.success) == (0.0, False)
    assert given.turns[-1].info["opponent_invalid"]


def test_four_in_a_row_win() -> None:
    won = board("connect_four_v3", ["0"], ["1"], seat="player_0")
    assert (won.env_return, won.success, len(won.turns)) == (1.0, True, 4)
    assert won.turns[1].observation.content.splitlines()[5] == "X O . . . . ."


# TextWorld, where it is installed: it brings a package under the GPL.


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("textworld", reason="`pip install textworld` to try its adapter")
    return str(tmp_path_factory.mktemp("worlds"))


def adventure(folder: str, player: Any, count: int = 4, **kwargs: Any) -> list[turnwise.Episode]:
    given = {"folder": folder, "worlds": 2, **kwargs}
    starts = [(turnwise.Start("textworld/Game-v0", seed, {}, given), 0) for seed in range(count)]
    return turnwise.rollout(player, starts)


def test_adventures_are_made_and_won(worlds: str) -> None:
    won = adventure(worlds, turnwise.ScriptPlayer("expert"))
    assert [(e.env_return, e.success, e.ending) for e in won] == [(1.0, True, "terminated")] * 4
    assert [t.reward for t in won[0].turns] == [0.0] * (len(won[0].turns) - 1) + [1.0]
    assert won[0].info["optimum"] == 1.0
    firsts = [e.turns[0].observation.content for e in won]
    assert firsts[0] == firsts[2] != firsts[1] == firsts[3], "two worlds, by the seed"
    files = list(Path(worlds).glob("*.z8"))
    again = adventure(worlds, turnwise.ScriptPlayer("expert"), game=str(files[0]), worlds=1)
    assert len({e.turns[0].observation.content for e in again}) == 1


def test_what_hangs_a_games_interpreter_does_not(worlds: str) -> None:
    said = ["\x00", "quit", "dance", "a\nb", "x" * 500, "\x1b[31m", "restart"]
    [episode] = adventure(worlds, script(*said), count=1, steps=8)
    assert (episode.ending, episode.success, episode.env_return) == ("truncated", False, 0.0)
    assert len(episode.turns) == 8


def test_no_command_writes_or_reads_files(
    worlds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An episode that could go on where another one ended would be no start of its seed."""
    monkeypatch.chdir(tmp_path)
    said = ["save", "look then save", "SAVE", "restore", "script", "transcript", "recordings",
        "look. restore", "\\save", "replay", "commands"]  # fmt: skip
    [episode] = adventure(worlds, script(*said), count=1, steps=len(said))
    heard = [turn.observation.content for turn in episode.turns[1:]]
    assert heard == ["You cannot do that here."] * (len(said) - 1)
    assert list(tmp_path.iterdir()) == []


def test_adventures_pass_the_check(worlds: str) -> None:
    assert turnwise.check_environment("textworld/Game-v0", episodes=2, folder=worlds, steps=8) == []
    [found] = turnwise.check_environment("textworld/Game-v0", episodes=1, game="/no/such.z8")
    assert "there is no game file /no/such.z8" in found


# verifiers, where it is installed: it needs openai below 3.

TASKSET = """
import verifiers.v1 as vf


class Data(vf.TaskData):
    answer: int = 0


class Task(vf.Task[Data]):
    @vf.reward
    async def right(self, trace) -> float:
        if trace.last_reply == "crash":
            raise IndexError("crashed")
        return float(trace.last_reply.split()[-1:] == [str(self.data.answer)])

    @vf.metric
    async def words(self, trace) -> float:
        return float(len(trace.last_reply.split()))


class Sums(vf.Taskset[Task]):
    def load(self):
        for i in range(12):
            yield Task(Data(prompt=f"{i} + {i + 1}?", system_prompt="Add.", answer=2 * i + 1))


__all__ = ["Sums"]
"""


@pytest.fixture
def tasksets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes task sets as modules, and returns their ids."""
    pytest.importorskip("verifiers", reason="`pip install verifiers` to try its adapter")
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str = TASKSET) -> str:
        name = f"taskset_{derive_id(text, str(tmp_path))[:8]}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def test_a_task_set_of_verifiers(tasksets: Callable[..., str]) -> None:
    name = tasksets()
    given = {"taskset": name, "held_out": 0.25}
    starts = turnwise.starts("verifiers/Taskset-v0", 0, 24, {}, given)
    by_rule = lambda messages: str(  # noqa: E731
        sum(map(int, re.findall(r"\d+", messages[-1].content)))
    )
    right = turnwise.rollout(turnwise.ScriptPlayer(by_rule), [(s, 0) for s in starts])
    assert {(e.env_return, e.success, e.ending) for e in right} == {(1.0, True, "terminated")}
    assert {e.system for e in right} == {"Add."}
    assert right[0].turns[0].info["metrics"] == {"words": 1.0}
    wrong = turnwise.rollout(script("It is 100"), [(starts[0], 0)])
    assert [(e.env_return, e.success) for e in wrong] == [(0.0, False)]
    [broken] = turnwise.rollout(script("crash"), [(starts[0], 0)])  # its own reward raises
    assert (broken.ending, "IndexError" in broken.reason) == ("failed", True)
    held = turnwise.starts("verifiers/Taskset-v0", 0, 24, {"split": "held_out"}, given)
    apart = turnwise.rollout(script("1"), [(s, 0) for s in held])
    rows = [{e.info["row"] for e in some} for some in (right, apart)]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == 12
    assert turnwise.check_environment("verifiers/Taskset-v0", episodes=3, **given) == []


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("class Task(vf.Task[Data]):", "class Task(vf.Task[Data]):\n    NEEDS_CONTAINER = True",
            "needs a container: that runs in verifiers' own harness"),
        ("    @vf.metric", "    async def setup(self, trace, runtime): ...\n\n    @vf.metric",
            "needs a runtime that it prepares"),
        ("    @vf.metric", "    async def finalize(self, trace, runtime): ...\n\n    @vf.metric",
            "needs a runtime that it prepares"),
        ("async def words(self, trace)", "async def words(self, trace, runtime)",
            "task 0 of .* needs a runtime for 'words'"),
        ("answer=2 * i + 1", "answer=1, image='python:3'", "task 0 of .* needs an image"),
        ('prompt=f"{i} + {i + 1}?"', "prompt=None", "does not begin with one text of the user"),
        ("vf.Taskset[Task]", "dict", "taskset"),
    ],
)  # fmt: skip
def test_a_task_set_that_needs_more_is_refused(
    old: str, new: str, why: str, tasksets: Callable[..., str]
) -> None:
    assert old in TASKSET
    name = tasksets(TASKSET.replace(old, new))
    [found] = turnwise.check_environment("verifiers/Taskset-v0", episodes=1, taskset=name)
    assert re.search(why, found)


HARNESS = """
import verifiers.v1 as vf


class Adder(vf.Toolset[vf.ToolsetConfig, vf.State]):
    TOOL_PREFIX = None

    @vf.tool
    def add(self, a: int, b: int) -> str:
        "Adds two numbers."
        return str(a + b)


class Data(vf.TaskData):
    answer: int = 0


class Task(vf.Task[Data]):
    @classmethod
    def toolsets(cls, config):
        return [Adder(vf.ToolsetConfig())]

    @vf.reward
    async def right(self, trace) -> float:
        return float(trace.last_reply.split()[-1:] == [str(self.data.answer)])


class Sums(vf.Taskset[Task]):
    def load(self):
        for i in range(12):
            yield Task(Data(prompt=f"{i} + {i + 1}?", system_prompt="Add.", answer=2 * i + 1))


__all__ = ["Sums"]

if __name__ == "__main__":  # in the process of the tool's server
    Adder.run()
"""


def test_verifiers_own_harness_asks_the_policy(
    tasksets: Callable[..., str], tmp_path: Path, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program, in a process of its own, with a task's tools on an MCP server."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"row": {i}}}\n' for i in range(12)))
    example = Path(__file__).parent.parent / "examples" / "agents" / "verifiers_harness.py"
    given = {
        "command": [sys.executable, str(example), tasksets(HARNESS)],
        "tasks": str(tmp_path / "rows.jsonl"), "held_out": 0.0, "patience": 300.0,
    }  # fmt: skip
    starts = [(start, 0) for start in turnwise.starts("turnwise/Agent-v0", 0, 3, kwargs=given)]

    def adds(messages: Any) -> str:
        if messages[-1].role == "tool":
            return f"It is {messages[-1].content}"
        a, b = map(int, re.findall(r"\d+", messages[-1].content))
        return call_text("add", {"a": a, "b": b})

    for episode in turnwise.rollout(turnwise.ScriptPlayer(adds), starts):
        assert (episode.ending, episode.reason) == ("terminated", "")
        assert (episode.env_return, len(episode.turns)) == (1.0, 2)
        assert [tool["function"]["name"] for tool in episode.tools] == ["add"]
    player = sampling(wide)
    sampled = turnwise.rollout(player, starts)
    assert [(e.ending, e.reason, e.env_return) for e in sampled] == [("terminated", "", 0.0)] * 3
    check_tokens(player, sampled)


# OpenEnv, where it is installed: it brings seventy packages.


@pytest.fixture
def server() -> Iterator[Callable[..., str]]:
    pytest.importorskip("openenv", reason="`pip install -e '.[openenv]'` to try its adapter")
    import uvicorn
    from openenv.core.env_server import http_server
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State

    class Said(Action):
        text: str = ""

    class Seen(Observation):
        text: str = ""
        steps: int = 0

    class Echo(Environment):
        """Repeats what it is sent; pays 1 at the third step."""

        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed: int | None = None, episode_id: Any = None, **more: Any) -> Seen:
            self.steps, self.seed = 0, seed
            return Seen(text=f"seed {seed}", reward=0.0, done=False)

        def step(self, action: Said, timeout_s: Any = None, **more: Any) -> Seen:
            time.sleep(0.02)
            self.steps += 1
            over = self.steps == 3
            return Seen(text=f"{self.seed}: {action.text}", reward=float(over), done=over)

        @property
        def state(self) -> State:
            return State(step_count=self.steps)

    running: list[tuple[Any, threading.Thread]] = []

    def started(sessions: int) -> str:
        app = http_server.create_app(Echo, Said, Seen, max_concurrent_envs=sessions)
        own = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        thread = threading.Thread(target=own.run, daemon=True)
        thread.start()
        while not own.started:
            time.sleep(0.02)
        running.append((own, thread))
        return f"http://127.0.0.1:{own.servers[0].sockets[0].getsockname()[1]}"

    yield started
    for own, thread in running:
        own.should_exit = True
        thread.join(10)


@pytest.mark.parametrize("stated", [4, 6, 16])
def test_sixteen_episodes_on_a_server_of_four_sessions(
    server: Callable[..., str], stated: int
) -> None:
    """All end and none fails, also where more are stated than there are."""
    kwargs = {"url": server(4), "sessions": stated}
    starts = [(turnwise.Start("openenv", seed, {}, kwargs), 0) for seed in range(16)]
    episodes = turnwise.rollout(script("hello"), starts)
    assert [e.reason for e in episodes] == [""] * 16
    assert [(e.env_return, e.success) for e in episodes] == [(1.0, True)] * 16
    assert [e.messages[-1].content for e in episodes] == [f"{seed}: hello" for seed in range(16)]


def test_a_policy_plays_on_a_server(server: Callable[..., str], policy: turnwise.Policy) -> None:
    """It replies when all have answered, so that none may wait for a session of another's."""
    kwargs = {"url": server(2), "sessions": 2}
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 4))
    starts = [(turnwise.Start("openenv", seed, {}, kwargs), 0) for seed in range(6)]
    for most in (1, 10):
        episodes = turnwise.rollout(player, starts, max_turns=most, step_limit=20)
        assert [e.reason for e in episodes] == ["max_turns" if most == 1 else ""] * 6


def test_a_policy_waits_for_sessions_that_others_have(
    server: Callable[..., str], policy: turnwise.Policy
) -> None:
    """Also where more are stated than there are, and it replies to all at a time; an episode that
    is cut keeps none."""
    kwargs = {"url": server(2), "sessions": 8}
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 4))
    starts = [(turnwise.Start("openenv", seed, {}, kwargs), 0) for seed in range(8)]
    environments = Environments()
    episodes = turnwise.rollout(player, starts, max_turns=2, environments=environments)
    assert [e.reason for e in episodes] == ["max_turns"] * 8
    both = [turnwise.rollout(script("x"), [start]) for start in starts[:2]]  # of another pool
    assert [e.ending for [e] in both] == ["terminated"] * 2
    environments.close()


def test_what_a_server_lacks_is_named(server: Callable[..., str]) -> None:
    url = server(2)
    for kwargs, reason in (
        ({"url": "http://127.0.0.1:9"}, "refused"),
        ({"url": url, "action_field": "text", "observation_field": "words"}, "no 'words'"),
    ):
        [episode] = turnwise.rollout(script("x"), [(turnwise.Start("openenv", 0, {}, kwargs), 0)])
        assert episode.ending == "failed"
        assert reason in episode.reason
    assert json.dumps(turnwise.check_environment("openenv", episodes=2, url=url)) == "[]"
