"""Curricula: which starts are played, by a hand-made history; that groups without signal become
rare; and that rows of a data set come once each."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import turnwise
from hypothesis import given
from hypothesis import strategies as st
from turnwise.engine.errors import ConfigError, PluginError
from turnwise.plugins.curricula.learnable import KEPT, Learnable
from turnwise.plugins.curricula.staged import Staged
from turnwise.plugins.curricula.uniform import Uniform
from turnwise.protocols import Curriculum, GroupResult, StartNumber
from turnwise.running import write_report
from turnwise.testing import Clock


class Luck(gymnasium.Env[str, str]):
    """Succeeds by chance of the reply's letters: never from nine starts of ten, half the time from
    the tenth."""

    observation_space = action_space = turnwise.Text(1000)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.fair = self.np_random.random() < 0.1
        return "more", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        won = self.fair and sum(map(ord, action)) % 2 == 0
        return "", float(won), True, False, {"success": won}


gymnasium.register("test/Luck-v0", Luck)


def made(curriculum: Curriculum, weights: tuple[float, ...] = (1.0,)) -> Any:
    curriculum.setup(weights)
    return curriculum


def result(start: tuple[int, int], *outcomes: float) -> GroupResult:
    success = sum(o > 0.5 for o in outcomes) / len(outcomes) if outcomes else None
    return GroupResult(StartNumber(*start), outcomes, success)


def draws(
    curriculum: Any, unplayed: list[int], taken: set[tuple[int, int]], times: int = 4000
) -> Counter[StartNumber]:
    """How often every start is chosen, of many draws of one state."""
    gone = {StartNumber(*start) for start in taken}
    return Counter(curriculum.choose(random.Random(i), tuple(unplayed), gone) for i in range(times))


def test_uniform_counts_every_environment_for_itself() -> None:
    found = draws(made(Uniform(), (3.0, 1.0)), [7, 2], set())
    assert set(found) == {(0, 7), (1, 2)}
    assert found[StartNumber(0, 7)] / 4000 == pytest.approx(0.75, abs=0.03)


def test_learnable_by_hand() -> None:
    """Variances: start 0 has 1/4, start 1 3/16, start 2 none, start 3 was not rewarded. Of the
    groups 30 % are new; of the others 20 % the start played longest ago, and before all others the
    one that nothing is known of; the rest 4 : 3."""
    own = made(Learnable(new=0.3, stale=0.2))
    assert draws(own, [0], set()) == {StartNumber(0, 0): 4000}, "nothing is known yet"
    own.learn([result((0, 2), 1, 1, 1)])
    own.learn([result((0, 0), 0, 1), result((0, 1), 0, 0, 0, 1), result((0, 3))])
    assert own.metrics() == {"new": 1.0, "known": 4.0, "mixed": 0.5}
    found = draws(own, [4], set())
    expected = {4: 0.3, 3: 0.7 * 0.2, 0: 0.7 * 0.8 * 4 / 7, 1: 0.7 * 0.8 * 3 / 7}
    for number, share in expected.items():
        assert found[StartNumber(0, number)] / 4000 == pytest.approx(share, abs=0.03), number
    assert set(found) == {(0, n) for n in expected}
    # The start that came again went well throughout: half of what it had before is left.
    own.learn([result((0, 0), 1, 1), result((0, 4), 0, 0)])
    assert own.metrics() == {"new": 0.5, "known": 5.0, "mixed": 0.4}
    assert own.state_dict()["known"][1] == [0, 0, 0.125, 3]


def test_learnable_on_a_data_set_of_known_size() -> None:
    own = made(Learnable(new=0.5, stale=0.0, starts=3))
    own.learn([result((0, n), 0, 0) for n in range(3)])
    # All were played, and none has a signal: the one played longest ago.
    assert draws(own, [3], {(0, 0)}, 20) == {StartNumber(0, 1): 20}
    own.learn([result((0, 2), 0, 1)])
    assert draws(own, [3], set(), 20) == {StartNumber(0, 2): 20}
    assert own.choose(random.Random(0), (3,), {StartNumber(0, n) for n in range(3)}) is None


def test_learnable_forgets_the_starts_that_teach_least() -> None:
    own = made(Learnable())
    own.learn([result((0, n), 0, float(n % 2)) for n in range(KEPT + 100)])
    assert own.metrics()["known"] == KEPT
    assert own.metrics()["mixed"] == pytest.approx((KEPT / 2 + 50) / KEPT)


@given(
    groups=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 9), st.lists(st.booleans(), max_size=4)),
        max_size=30,
    ),
    taken=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 9))),
    new=st.floats(0, 1),
    stale=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_what_is_taken_is_never_chosen_and_a_state_chooses_alike(
    groups: Any, taken: Any, new: float, stale: float, seed: int
) -> None:
    own = made(Learnable(new=new, stale=stale), (1.0, 2.0))
    for env, number, won in groups:
        own.learn([result((env, number), *map(float, won))])
    again = made(Learnable(new=new, stale=stale), (1.0, 2.0))
    again.load_state_dict(json.loads(json.dumps(own.state_dict())))
    gone = {StartNumber(*start) for start in taken}
    chosen = own.choose(random.Random(seed), (10, 10), gone)
    assert chosen is not None
    assert chosen not in gone
    assert chosen == again.choose(random.Random(seed), (10, 10), gone)
    assert again.metrics()["known"] == own.metrics()["known"]


def test_staged_step_by_step() -> None:
    steps = [
        {"weights": [1, 0], "success": 0.75},
        {"weights": [1, 3], "updates": 2},
        {"weights": [0, 1]},
    ]
    own = made(Staged(steps=steps, window=2), (1.0, 1.0))
    assert draws(own, [5, 6], set(), 50) == {StartNumber(0, 5): 50}
    own.learn([result((0, 0), 1, 1)])
    assert own.metrics() == {"step": 1.0}, "one update is no window of two"
    own.learn([result((0, 1), 0, 1)])
    assert own.metrics() == {"step": 1.0}, "that of the update"
    own.learn([])
    assert own.metrics() == {"step": 2.0}, "(1 + 1/2) / 2 = 0.75"
    again = made(Staged(steps=steps, window=2), (1.0, 1.0))
    again.load_state_dict(json.loads(json.dumps(own.state_dict())))
    assert draws(again, [5, 6], set())[StartNumber(1, 6)] / 4000 == pytest.approx(0.75, abs=0.03)
    again.learn([])
    assert draws(again, [5, 6], set(), 50) == {StartNumber(1, 6): 50}
    again.learn([result((1, 0), 1, 1)])
    assert again.metrics() == {"step": 3.0}, "the last one goes on"


@pytest.mark.parametrize(
    ("curriculum", "message"),
    [
        ({"name": "staged", "steps": [{"weights": [1, 1]}]}, "has 2 weights, and the stage has 1"),
        ({"name": "staged", "steps": [{"weights": [1]}, {"weights": [1]}]}, "step 1 has no end"),
        ({"name": "staged", "steps": [{"weights": [0]}]}, "not all of them 0"),
        ({"name": "staged"}, "needs the option 'steps'"),
        ({"name": "learnable", "new": 2}, "less than or equal to 1"),
        ("learnible", "Did you mean 'learnable'"),
        ({"name": "learnable", "fresh": 1}, "no option 'fresh'"),
        (object(), r"derive its class from turnwise\.Curriculum"),
    ],
)
def test_what_cannot_work_is_refused(
    curriculum: Any, message: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    stage = {"env": "test/Luck-v0", "curriculum": curriculum}
    with pytest.raises((ConfigError, PluginError), match=message):
        turnwise.Run(
            {"policy": str(model_folder()), "stages": [{"rl": stage}]}, folder=tmp_path / "r"
        ).finish()


def run(folder: Path, model: Path, **rl: Any) -> turnwise.Run:
    stage = {
        "env": "test/Luck-v0", "groups": 8, "group_size": 4, "max_new_tokens": 4, "poll": 0.0,
        "optimizer": {"name": "grpo", "lr": 0.0}, **rl,
    }  # fmt: skip
    return turnwise.Run(
        {"policy": str(model), "threads": 1, "stages": [{"rl": stage}]}, folder=folder
    )


class Stubborn(Curriculum):
    """Chooses one start for ever."""

    def choose(self, rng: Any, unplayed: Any, taken: Any) -> StartNumber:
        return StartNumber(0, 5)


def test_a_curriculum_that_repeats_itself_is_named(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(PluginError, match=r"Stubborn chose StartNumber.*is being played"):
        run(tmp_path / "r", model_folder(), curriculum=Stubborn()).finish()


def without_signal(done: turnwise.Run) -> float:
    last = done.metrics[3:]
    return sum(m["groups_without_signal_share"] for m in last) / len(last)


def test_groups_without_signal_become_rare(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """One start of ten has a signal, seven times of eight. The policy does not learn here, so that
    only the choice of starts differs."""
    model = model_folder()
    uniform = run(tmp_path / "u", model, updates=12).finish()
    chosen = run(
        tmp_path / "l", model, updates=12, curriculum={"name": "learnable", "new": 0.25}
    ).finish()
    assert without_signal(uniform) > 0.8
    assert without_signal(chosen) < 0.6
    assert "curriculum/new" not in uniform.metrics[-1]
    assert 0 < chosen.metrics[-1]["curriculum/new"] < 0.7
    page = write_report(chosen.folder).read_text()
    assert "Which starts were played." in page


def test_rows_of_a_mixture_come_once_each(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Two data sets of 12 and 6 rows, 2 : 1. With a counter of its own each is gone through before
    a row comes again."""
    envs = []
    for name, count in (("a", 12), ("b", 6)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(
            "".join(
                json.dumps({"prompt": f"{name}{i}", "answer": "x"}) + "\n" for i in range(count)
            )
        )
        kwargs = {"data": str(file), "answer": "exact", "held_out": 0.0}
        envs.append({"id": "turnwise/Prompts-v0", "weight": count, "kwargs": kwargs})
    done = run(tmp_path / "r", model_folder(), updates=3, groups=6, group_size=2, env=envs).finish()
    first = [e for e in done.ledger.run_episodes(done.id) if e.slot == 0]
    rows = Counter(e.turns[0].observation.content for e in first)
    for name, count in (("a", 12), ("b", 6)):
        own = [times for row, times in rows.items() if row[0] == name]
        assert max(own) - (min(own) if len(own) == count else 0) <= 1, rows
    assert sum(done.metrics[0][f"curriculum/env-{i}"] for i in (0, 1)) == 1.0


def test_an_environment_named_twice_has_two_sequences(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    env = [{"id": "test/Luck-v0", "feedback": ["environment"]}, {"id": "test/Luck-v0"}]
    done = run(tmp_path / "r", model_folder(), updates=1, env=env).finish()
    episodes = done.ledger.run_episodes(done.id)
    assert len({e.start.key for e in episodes}) == 8


class Slowly(turnwise.FeedbackSource):
    """Answers at every fourth look."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.looks = 0

    def request(self, requests: Any) -> None:
        self.asked += [r for r in requests if r.id not in {a.id for a in self.asked}]

    def receive(self) -> list[turnwise.Feedback]:
        self.looks += 1
        if self.looks % 4:
            return []
        done, self.asked = self.asked, []
        return [
            turnwise.Feedback(
                r.target,
                score=float(sum(map(ord, r.episodes[0].turns[-1].action)) % 2),
                stamp=turnwise.Stamp(request=r.id),
                id=f"on-{r.id}",
            )
            for r in done
        ]


@pytest.mark.parametrize("curriculum", ["uniform", "learnable"])
def test_stopped_while_feedback_is_awaited_the_same_starts_come_again(
    curriculum: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """In an update without a checkpoint of its own: what was played for it is played for it, and
    nothing is passed over."""

    def make(folder: Path, resume: bool = False, stop: int = 0) -> turnwise.Run:
        stage = {
            "env": "test/Luck-v0", "updates": 4, "groups": 2, "group_size": 3,
            "max_new_tokens": 4, "poll": 0.0, "curriculum": curriculum, "feedback": [Slowly()],
        }  # fmt: skip
        config = {"policy": str(model_folder()), "threads": 1, "stages": [{"rl": stage}]}
        clock = Clock()
        made = turnwise.Run(config, folder=folder, resume=resume, clock=clock, sleep=clock.sleep)
        clock.meanwhile = lambda: setattr(made, "stopping", made.updates + 1 == stop)
        return made

    whole = make(tmp_path / "whole").finish()
    stopped = make(tmp_path / "part", stop=3).finish()
    assert stopped.stopping
    assert len(stopped.metrics) == 2
    again = make(tmp_path / "part", resume=True).finish()
    starts = [
        sorted((e.update, e.start.key) for e in done.ledger.run_episodes(done.id))
        for done in (whole, again)
    ]
    assert starts[0] == starts[1]


def test_a_pool_that_is_all_in_play_does_not_end_a_resumed_run(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """All four starts wait for answers when the run is broken off."""
    rl = {
        "updates": 4, "groups": 2, "group_size": 2, "pending": 8,
        "curriculum": {"name": "learnable", "starts": 4}, "max_new_tokens": 4,
        "env": "test/Luck-v0", "poll": 1.0,
        "feedback": [{"judge": "simulated-panel", "raters": 1, "delay": 6}],
    }  # fmt: skip
    config = {"policy": str(model_folder()), "threads": 1, "stages": [{"rl": rl}]}
    clock = Clock()
    more: dict[str, Any] = {"clock": clock, "sleep": clock.sleep}
    whole = turnwise.Run(config, folder=tmp_path / "whole", **more).finish()
    next(iter(turnwise.Run(config, folder=tmp_path / "part", **more)))
    again = turnwise.Run(config, folder=tmp_path / "part", resume=True, **more).finish()
    assert len(again.metrics) == len(whole.metrics) == 4


def test_fewer_starts_than_groups_are_refused_and_resampling_makes_do(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    few = {"curriculum": {"name": "learnable", "starts": 8}, "updates": 2}
    done = run(tmp_path / "r", model_folder(), resample=2, **few).finish()
    assert [m["episodes"] for m in done.metrics] == [32.0, 32.0]
    with pytest.raises(ConfigError, match="has 8 starts left .* and 9 are needed"):
        run(tmp_path / "r2", model_folder(), groups=9, **few).finish()


def test_one_conversation_per_start_has_nothing_to_compare(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    ppo = {"group_size": 1, "optimizer": "ppo", "curriculum": "learnable"}
    with pytest.raises(ConfigError, match="needs group_size of at least 2, got 1"):
        run(tmp_path / "r", model_folder(), **ppo).finish()
