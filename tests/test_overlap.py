"""Rounds that are begun ahead (`overlap`): judged while the policy is updated, each once, and what
fails there fails when its round comes."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import turnwise
from support.echo import ECHO
from turnwise.engine.errors import TooManyFailures
from turnwise.engine.feedback import judge_source
from turnwise.engine.policy.in_process import InProcess
from turnwise.running import Branch, Elsewhere, PolicyPlayer, Where, episode_id


class Shed(Elsewhere):
    """Plays when it is told to begin, and keeps what it has played until it is asked for."""

    rows = 8

    def __init__(self, policy: turnwise.Policy) -> None:
        self.inside = InProcess(policy, rows=self.rows)
        self.played: dict[tuple[str, ...], list[turnwise.Episode]] = {}

    @staticmethod
    def key(chosen: Sequence[tuple[turnwise.Start | Branch, int]], where: Where) -> tuple[str, ...]:
        return tuple(episode_id(where, start, slot) for start, slot in chosen)

    def begin(self, player: PolicyPlayer, chosen: Any, where: Where, options: Any) -> None:
        own = PolicyPlayer(player.policy, player.sampling, self.inside, player.history)
        self.inside.refresh()
        self.played[self.key(chosen, where)] = turnwise.rollout(own, chosen, where, **options)

    def has_arrived(self, chosen: Any, where: Where) -> bool:
        return self.key(chosen, where) in self.played

    def rollout(
        self, player: PolicyPlayer, chosen: Any, where: Where,
        ended: Callable[[turnwise.Episode], None], options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        if not self.has_arrived(chosen, where):
            self.begin(player, chosen, where, options)
        for episode in self.played.pop(self.key(chosen, where)):
            ended(episode)


class Sheds:
    @turnwise.hookimpl
    def register_backends(self, register: Any) -> None:
        register("shed", Shed)


class Coroutine(turnwise.Judge):
    """Notes what it is asked about, and how many updates there were by then; scores lengths.

    `fails` says of which updates' conversations it knows nothing, `stops` when the run is to end.
    """

    version = "1"

    def __init__(self, fails: Sequence[int] = (), stops: int = 0) -> None:
        self.asked: dict[int, set[int]] = {}
        self.times: Counter[str] = Counter()
        self.fails, self.stops, self.made = fails, stops, 0

    async def score(self, episodes: Sequence[turnwise.Episode]) -> list[turnwise.Feedback]:
        for episode in episodes:
            self.asked.setdefault(episode.update, set()).add(self.made)
            self.times[episode.id] += 1
        if episodes[0].update in self.fails:
            raise RuntimeError("the line is dead")
        return [turnwise.Feedback(e.id, score=float(len(e.turns[0].action))) for e in episodes]

    @turnwise.hookimpl
    def update_finished(self, run: Any, update: int, metrics: Any) -> None:
        self.made = update
        run.stopping = update == self.stops


@pytest.fixture
def make(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., turnwise.Run]:
    def made(judge: Any, *, updates: int = 5, overlap: int = 2, **more: Any) -> turnwise.Run:
        resume = more.pop("resume", False)
        rl = {"env": ECHO, "updates": updates, "groups": 2, "group_size": 3, "max_new_tokens": 4,
              "feedback": [judge], "backend": "shed", "overlap": overlap, "poll": 0.01,
              **more}  # fmt: skip
        config = {"policy": str(model_folder()), "threads": 1, "checkpoint_every": 1,
                  "stages": [{"rl": rl}]}  # fmt: skip
        plugins = turnwise.Plugins({"sheds": Sheds(), "judge": judge})
        return turnwise.Run(config, folder=tmp_path / "run", plugins=plugins, resume=resume)

    return made


def test_each_round_is_asked_about_once_and_ahead(make: Callable[..., turnwise.Run]) -> None:
    judge = Coroutine()
    run = make(judge).finish()
    assert judge.asked == {1: {0}, 2: {0}, 3: {0}, 4: {1}, 5: {2}}
    assert len(judge.times) == 30
    assert set(judge.times.values()) == {1}
    assert [m["staleness/max"] for m in run.metrics] == [0, 1, 2, 2, 2]


def test_what_a_checkpoint_holds_is_asked_about_ahead_too(
    make: Callable[..., turnwise.Run],
) -> None:
    """A run that goes on finds the next rounds in the ledger, and asks about them at once."""
    first = Coroutine(stops=2)
    make(first).finish()
    assert set(first.asked) == {1, 2, 3, 4}, "the checkpoint plays out what was begun, and asks"
    second = Coroutine()
    second.made = 2
    run = make(second, resume=True).finish()
    assert len(run.metrics) == 5
    assert second.asked.get(5) == {2}, "begun by update 3, asked about before it was made"
    straight = Counter(e.update for e in run.ledger.run_episodes(run.id))
    assert straight == Counter(dict.fromkeys(range(1, 6), 6))
    answers = run.ledger.feedback(sorted({e.group for e in run.ledger.run_episodes(run.id)}))
    assert len(answers) == len({a.target for a in answers}) == 30


@pytest.mark.parametrize("overlap", [1, 2])
def test_a_judge_that_fails_ahead_stops_the_run_at_that_round(
    make: Callable[..., turnwise.Run], overlap: int
) -> None:
    """Not the update in which it was asked; and a run that goes on asks it again."""
    with pytest.raises(TooManyFailures, match=r"failed on 6 of 6 requests.*the line is dead"):
        make(Coroutine(fails=[3]), overlap=overlap).finish()
    judge = Coroutine()
    run = make(judge, overlap=overlap, resume=True).finish()
    assert len(run.metrics) == 5
    assert {3, 5} <= set(judge.asked)
    answers = run.ledger.feedback(sorted({e.group for e in run.ledger.run_episodes(run.id)}))
    assert {a.status for a in answers} == {"scored"}


class Breaks(gymnasium.Env[str, str]):
    """Breaks in its sixth game and those after it, as long as it is broken."""

    observation_space = action_space = turnwise.Text(1000)
    games, broken = 0, True

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        type(self).games += 1
        if self.broken and self.games > 12:
            raise RuntimeError("the kettle exploded")
        return f"number {self.np_random.integers(100)}", {}

    def step(self, action: str) -> Any:
        return "over", 1.0, True, False, {}


def test_an_environment_that_breaks_ahead_stops_the_run_at_that_round(
    make: Callable[..., turnwise.Run],
) -> None:
    gymnasium.register("test/Breaks-v0", Breaks)
    run = make(Coroutine(), overlap=1, env="test/Breaks-v0")
    with pytest.raises(TooManyFailures, match="the kettle exploded"):
        run.finish()
    assert len(run.metrics) == 2, "both rounds that could be played have trained"
    Breaks.broken = False
    assert (
        len(make(Coroutine(), overlap=1, env="test/Breaks-v0", resume=True).finish().metrics) == 5
    )


class Learns(Coroutine):
    def learn(self, run: Any) -> None:
        self.knows = run.updates


class Plain(turnwise.Judge):
    version = "1"

    def __init__(self) -> None:
        self.asked: dict[int, set[int]] = {}
        self.made = 0

    def score(self, episodes: Sequence[turnwise.Episode]) -> list[turnwise.Feedback]:
        for episode in episodes:
            self.asked.setdefault(episode.update, set()).add(self.made)
        return [turnwise.Feedback(e.id, score=float(len(e.turns[0].action))) for e in episodes]

    @turnwise.hookimpl
    def update_finished(self, run: Any, update: int, metrics: Any) -> None:
        self.made = update


@pytest.mark.parametrize("kind", [Learns, Plain])
def test_what_answers_when_heard_and_what_learns_is_not_asked_ahead(
    make: Callable[..., turnwise.Run], kind: Any
) -> None:
    judge = kind()
    make(judge, updates=3).finish()
    assert judge.asked == {1: {0}, 2: {1}, 3: {2}}


def test_what_is_judged_ahead_holds_up_no_round(make: Callable[..., turnwise.Run]) -> None:
    """The next round's judge answers only when this round has trained."""

    class Waits(Coroutine):
        async def score(self, episodes: Sequence[turnwise.Episode]) -> list[turnwise.Feedback]:
            while self.made < episodes[0].update - 1:
                await asyncio.sleep(0.01)
            return await super().score(episodes)

    assert len(make(Waits()).finish().metrics) == 5


def episodes(count: int) -> list[turnwise.Episode]:
    def says(said: Any) -> str:
        return "x"

    player = turnwise.ScriptPlayer(says)
    chosen = [(start, 0) for start in turnwise.starts(ECHO, 5, count)]
    return turnwise.rollout(player, chosen, Where("run", "rl", 1, 3))


def asked(source: judge_source.JudgeSource, about: Sequence[turnwise.Episode]) -> None:
    source.request([turnwise.Request("episode", e.id, "", episodes=(e,)) for e in about])


def heard(source: judge_source.JudgeSource) -> list[Any]:
    found: list[Any] = []
    while source.waits():
        found += source.receive()
    return found


def test_a_coroutine_that_blocks_the_loop_spoils_no_other_judge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What stood behind it on the loop is begun again on another."""
    monkeypatch.setattr(judge_source, "LIMIT", 0.5)

    async def blocks(episode: turnwise.Episode) -> float:
        time.sleep(4.0)
        return 1.0

    async def fine(episode: turnwise.Episode) -> float:
        await asyncio.sleep(0.1)
        return 2.0

    for order in (1, -1):
        sources = [judge_source.JudgeSource(judge_source.judge_from(f)) for f in (blocks, fine)]
        for source in sources:
            asked(source, episodes(2))
        with warnings.catch_warnings(action="ignore"):
            answers = {sources[0]: heard(sources[0])} if order == 1 else {}
        asked(sources[1], episodes(3))  # on the new loop, where there is one
        with warnings.catch_warnings(action="ignore"):
            answers |= {source: heard(source) for source in sources[::-1] if source not in answers}
        assert [a.score for a in answers[sources[1]]] == [2.0] * 5
        assert {a.status for a in answers[sources[0]]} <= {"failed", "scored"}


def test_coroutines_of_a_judge_are_bounded_and_cancelled() -> None:
    """So many at a time; one that failed spoils no other; closing cancels the rest."""
    now, most, cancelled = 0, 0, 0

    async def judge(episode: turnwise.Episode) -> float:
        nonlocal now, most, cancelled
        now += 1
        most = max(most, now)
        try:
            await asyncio.sleep(0.05 if stage == "quick" else 3600)
        except asyncio.CancelledError:
            cancelled += 1
            raise
        finally:
            now -= 1
        if episode.start.key == played[0].start.key:
            raise RuntimeError("not this one")
        return 1.0

    played, stage = episodes(150), "quick"
    source = judge_source.JudgeSource(judge_source.judge_from(judge))
    asked(source, played)
    answers = heard(source)
    assert sorted(a.status for a in answers) == ["failed"] + ["scored"] * 149
    assert most == judge_source.AT_A_TIME
    stage = "slow"
    asked(source, played)
    while now < judge_source.AT_A_TIME:
        assert source.receive() == []
    source.close()
    assert not source.waits()
    while now:
        pass
    assert cancelled == judge_source.AT_A_TIME
