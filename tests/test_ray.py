"""Play on Ray: what workers play is what would be played here, whoever is lost on the way."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import psutil
import pytest
import torch
import turnwise
import yaml
from support.command import Command
from test_processes import run_of, weights
from turnwise.engine.errors import PluginError
from turnwise.engine.policy.in_process import InProcess
from turnwise.plugins.backends.ray import Ray
from turnwise.running import Where

DESK = "turnwise/SupportDesk-v0"
WHERE = Where("run", "rl", 1, 3)


class Slow(gymnasium.Env[str, str]):
    """Waits at every step, and needs what it is told."""

    observation_space = action_space = turnwise.Text(1000)
    metadata: ClassVar[dict[str, Any]] = {"concurrency": "thread"}

    def __init__(self, breaks: bool = False) -> None:
        self.breaks = breaks

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.left = 4
        return f"number {self.np_random.integers(100)}", {}

    def step(self, action: str) -> Any:
        if self.breaks:
            raise RuntimeError("the kettle exploded")
        time.sleep(0.1)
        self.left -= 1
        return (
            f"{self.left} to go, after {len(action)}",
            float(len(action)),
            not self.left,
            False,
            {},
        )


class Rare(Slow):
    metadata: ClassVar[dict[str, Any]] = {"resources": {"unobtainium": 2}}


gymnasium.register("test/Slow-v0", Slow, disable_env_checker=True)
gymnasium.register("test/Rare-v0", Rare, disable_env_checker=True)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster on this machine, as the plugin starts one."""
    yield
    if "ray" in sys.modules:
        import ray

        ray.shutdown()


@pytest.fixture
def policy(model_folder: Callable[..., Path]) -> turnwise.Policy:
    return turnwise.Policy.from_pretrained(model_folder(), device="cpu")


def played(
    policy: turnwise.Policy, backend: Any, env: str = DESK, starts: int = 6, **options: Any
) -> tuple[list[turnwise.Episode], Counter[str]]:
    """What is played with a backend, and how often each episode was handed on."""
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 6), backend)
    chosen = [(s, slot) for s in turnwise.starts(env, 5, starts) for slot in range(2)]
    ends: Counter[str] = Counter()
    found = turnwise.rollout(player, chosen, WHERE, ended=lambda e: ends.update([e.id]), **options)
    assert [(e.start.key, e.slot) for e in found] == [(s.key, slot) for s, slot in chosen]
    return found, ends


def assert_alike(one: list[turnwise.Episode], other: list[turnwise.Episode]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.id, a.start, a.ending) == (b.id, b.start, b.ending)
        for mine, theirs in zip(a.turns, b.turns, strict=True):
            assert (mine.action_ids, mine.prompt_ids) == (theirs.action_ids, theirs.prompt_ids)
            assert mine.observation == theirs.observation
            assert mine.policy_version == theirs.policy_version
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_workers_play_what_is_played_here(policy: turnwise.Policy) -> None:
    backend = Ray(policy, workers=2, rows=8)
    for version in range(2):
        here, _ = played(policy, InProcess(policy, rows=16))
        there, ends = played(policy, backend)
        assert_alike(here, there)
        assert set(ends.values()) == {1}
        assert len(ends) == 12
        assert {t.policy_version for e in there for t in e.turns} == {version}
        with torch.no_grad():  # other weights are sent, and the version with them
            for parameter in policy.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        policy.version += 1


@pytest.mark.parametrize("moments", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_lost_worker_loses_and_repeats_nothing(moments: int, policy: turnwise.Policy) -> None:
    """Killed by SIGKILL while both have conversations under way: after the first that arrives, or
    the fifth, of the twelve that they share."""
    here, _ = played(policy, InProcess(policy, rows=16), "test/Slow-v0")
    backend = Ray(policy, workers=2, rows=4)
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 6), backend)
    chosen = [(s, slot) for s in turnwise.starts("test/Slow-v0", 5, 6) for slot in range(2)]
    for moment in range(moments):
        ends: Counter[str] = Counter()

        def ended(episode: turnwise.Episode, ends: Counter[str] = ends, at: int = moment) -> None:
            ends.update([episode.id])
            if ends.total() == 1 + at % 5:
                os.kill(workers()[at % 2], signal.SIGKILL)

        with pytest.warns(UserWarning, match="a worker of Ray was lost"):
            there = turnwise.rollout(player, chosen, WHERE, ended=ended)
        assert_alike(here, there)
        assert {e.ending for e in there} == {"terminated"}
        assert set(ends.values()) == {1}
        assert len(ends) == 12


def workers() -> list[int]:
    """The processes of this one's cluster that play."""
    return [
        each.pid for each in psutil.Process().children(recursive=True)
        if any("ray::Worker" in part for part in each.cmdline())
    ]  # fmt: skip


def test_a_new_backend_plays_its_own_policy(model_folder: Callable[..., Path]) -> None:
    """Also where it stands in memory where another stood, and adapters alone are sent again."""
    lora = {"r": 4, "target_modules": "all-linear"}
    policies = [turnwise.Policy.from_pretrained(model_folder(), device="cpu", lora=lora)
                for _ in range(2)]  # fmt: skip
    with torch.no_grad():
        for parameter in policies[1].model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    for policy in policies:
        here, _ = played(policy, InProcess(policy, rows=16))
        backend = Ray(policy, workers=1, rows=16)
        there, _ = played(policy, backend)
        assert_alike(here, there)
        del backend


def test_an_environment_that_is_registered_again_is_the_new_one(policy: turnwise.Policy) -> None:
    backend = Ray(policy, workers=1, rows=8)
    said = []
    for word in ("old", "new"):
        gymnasium.register("test/Word-v0", word_says(word), disable_env_checker=True)
        found, _ = played(policy, backend, "test/Word-v0", 1)
        said.append(found[0].turns[0].observation.content)
        gymnasium.registry.pop("test/Word-v0")
    assert said == ["old", "new"]


def word_says(word: str) -> Any:
    class Says(gymnasium.Env[str, str]):
        observation_space = action_space = turnwise.Text(1000)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return word, {}

        def step(self, action: str) -> Any:
            return "done", 1.0, True, False, {}

    return Says


class Alone(Slow):
    """A server with room for one."""

    metadata: ClassVar[dict[str, Any]] = {"instances": 1, "render_modes": []}


gymnasium.register("test/Alone-v0", Alone, disable_env_checker=True)


@pytest.mark.slow
def test_what_may_live_alone_lives_on_one_worker_and_others_make_room(
    policy: turnwise.Policy,
) -> None:
    from turnwise.plugins.backends import ray as plugin

    played(policy, Ray(policy, workers=2, rows=8))
    played(policy, Ray(policy, workers=1, rows=8, cpus=2), starts=1)  # no room beside the two
    [(needs, number)] = plugin._workers
    assert (dict(needs)["CPU"], number) == (2, 0)
    began = threading.active_count()
    found, _ = played(policy, Ray(policy, workers=2, rows=8), "test/Alone-v0", 1)
    assert {e.ending for e in found} == {"terminated"}
    assert len(plugin._workers) == 1
    assert threading.active_count() <= began + 2


def test_what_fails_here_ends_what_plays_there(policy: turnwise.Policy) -> None:
    from turnwise.plugins.backends import ray as plugin

    def full(_: turnwise.Episode) -> None:
        raise OSError("the disk is full")

    backend = Ray(policy, workers=1, rows=2)
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 6), backend)
    chosen = [(s, 0) for s in turnwise.starts("test/Slow-v0", 5, 6)]
    with pytest.raises(OSError, match="the disk is full"):
        turnwise.rollout(player, chosen, WHERE, ended=full)
    assert not [number for _, number in plugin._workers if number == 0]  # the one that played
    found, _ = played(policy, backend, "test/Slow-v0", 1)  # another worker, at once
    assert {e.ending for e in found} == {"terminated"}


def test_a_run_on_ray_ends_well_when_it_is_asked_to(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Ray has a handler of SIGTERM of its own, which ends the process."""
    rl = {"env": DESK, "updates": 400, "groups": 1, "group_size": 2, "max_new_tokens": 4,
          "backend": {"name": "ray", "workers": 1, "rows": 8}}  # fmt: skip
    config = {"policy": str(model_folder()), "checkpoint_every": 1000, "stages": [{"rl": rl}]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    run = Command("run", str(tmp_path / "c.yaml"), "--folder", str(tmp_path / "run"))
    until = time.monotonic() + 240
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < until
        assert not run.is_over
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGTERM)
    done = run.wait()
    assert done.returncode == 143, done.stderr
    made = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert (tmp_path / "run" / "checkpoints" / f"update-{made:06d}").is_dir()


def test_failures_there_are_failures_here(policy: turnwise.Policy) -> None:
    backend = Ray(policy, workers=2, rows=8)
    gymnasium.register("test/Broken-v0", Slow, kwargs={"breaks": True}, disable_env_checker=True)
    found, _ = played(policy, backend, "test/Broken-v0")
    assert {e.ending for e in found} == {"failed"}
    assert "the kettle exploded" in found[0].reason
    with pytest.raises(turnwise.TooManyFailures, match="more than max_failure_rate=0.2"):
        played(policy, backend, "test/Broken-v0", max_failure_rate=0.2)
    with torch.no_grad():
        next(iter(policy.parameters())).fill_(float("nan"))
    with pytest.raises(turnwise.NonFiniteError, match="logits are not finite"):
        played(policy, backend)


def test_more_than_there_is_is_refused(policy: turnwise.Policy) -> None:
    with pytest.raises(turnwise.ConfigError, match=r"6 workers need 6 CPU \(there are"):
        played(policy, Ray(policy, workers=5000))
    with pytest.raises(turnwise.ConfigError, match=r"2 unobtainium \(there are 0\)"):
        played(policy, Ray(policy, workers=1), "test/Rare-v0")
    with pytest.raises(ValueError, match="workers must be at least 1"):
        Ray(policy, workers=0)


def test_without_ray_it_says_what_to_install(
    policy: turnwise.Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PluginError, match=r"needs the package ray: pip install"):
        played(policy, Ray(policy))


def test_a_cluster_that_is_not_there_is_named_at_once(tmp_path: Path) -> None:
    stage = {"env": DESK, "backend": "ray", "updates": 1, "max_new_tokens": 4}
    config = {"policy": str(tmp_path / "policy"), "stages": [{"rl": stage}]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    turnwise.engine.policy.tiny.build_policy(tmp_path / "policy", ["hello"], hidden=16, layers=1)
    done = Command("run", str(tmp_path / "c.yaml"), "--ray", "127.0.0.1:9", cwd=tmp_path).wait()
    assert done.returncode == 1
    assert "no Ray cluster answers at 127.0.0.1:9: [Errno 111]" in done.stderr


def test_conversations_are_begun_ahead_by_the_policy_of_then(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """With `overlap: 1` an update trains on what the policy before it sampled, on starts of its
    own; its weights correct for it."""
    rl = {"env": DESK, "updates": 4, "groups": 2, "group_size": 3, "max_new_tokens": 6,
          "feedback": [{"judge": "length", "min_words": 6}], "optimizer": {"lr": 1e-3},
          "backend": {"name": "ray", "workers": 1}, "overlap": 1}  # fmt: skip
    config = {"policy": str(model_folder()), "threads": 1, "stages": [{"rl": rl}]}
    run = turnwise.Run(config, folder=tmp_path / "run").finish()
    played = run.ledger.run_episodes(run.id)
    versions = {
        e.update: {t.policy_version for t in e.turns}
        for e in sorted(played, key=lambda e: e.update)
    }
    assert versions == {1: {0}, 2: {0}, 3: {1}, 4: {2}}
    assert len({e.start.key for e in played}) == 8
    assert [m["staleness/max"] for m in run.metrics] == [0.0, 1.0, 1.0, 1.0]
    assert all(m["trained"] >= 3 for m in run.metrics)
    for changed, why in (
        ({"backend": "in-process"}, "cannot be begun ahead"),
        ({"pending": 12}, "overlap begins each update's conversations ahead"),
    ):
        wrong = {**config, "stages": [{"rl": {**rl, **changed}}]}
        with pytest.raises(turnwise.ConfigError, match=why):
            turnwise.Run(wrong, folder=tmp_path / why.split()[0]).finish()


class Attentive(turnwise.Judge):
    """Notes what it is asked about, and in which update; it answers when it is let go."""

    version = "1"

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []  # the episode's update, the updates made by then
        self.ids: Counter[str] = Counter()
        self.run: Any = None

    async def score(self, episodes: Sequence[turnwise.Episode]) -> list[turnwise.Feedback]:
        self.asked += [(e.update, len(self.run.metrics)) for e in episodes]
        self.ids.update(e.id for e in episodes)
        return [turnwise.Feedback(e.id, score=float(len(e.turns[0].action))) for e in episodes]


class Patient(turnwise.protocols.Optimizer):
    """Updates when all that was begun has been asked about: on a busy machine, too."""

    consumes = frozenset({"advantages"})

    def __init__(self, judge: Attentive) -> None:
        self.judge = judge

    def update(self, policy: turnwise.Policy, batch: turnwise.Batch) -> dict[str, float]:
        run, until = self.judge.run, time.monotonic() + 120
        mine = len(run.metrics) + 1
        while mine < 4 and not any(update == mine + 1 for update, _ in self.judge.asked):
            assert time.monotonic() < until
            policy.meanwhile()  # as after each backward pass
            time.sleep(0.05)
        return {"loss": 0.0}


class Listener:
    def __init__(self) -> None:
        self.told: list[str] = []
        self.played: list[str] = []

    @turnwise.hookimpl
    def feedback_received(self, run: Any, feedback: Any) -> None:
        self.told += [answer.id for answer in feedback]

    @turnwise.hookimpl
    def episodes_played(self, run: Any, episodes: Any) -> None:
        self.played += [episode.id for episode in episodes]


def test_what_is_played_ahead_is_judged_while_the_policy_is_updated(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Each conversation is asked about once, and each answer and conversation told once."""
    judge, listener = Attentive(), Listener()
    rl = {"env": DESK, "updates": 4, "groups": 2, "group_size": 3, "max_new_tokens": 6,
          "feedback": [judge], "optimizer": Patient(judge),
          "backend": {"name": "ray", "workers": 1}, "overlap": 1}  # fmt: skip
    config = {"policy": str(model_folder()), "threads": 1, "stages": [{"rl": rl}]}
    run = turnwise.Run(config, folder=tmp_path / "run",
                       plugins=turnwise.Plugins({"listener": listener}))  # fmt: skip
    judge.run = run
    run.finish()
    ahead = dict(judge.asked)
    assert ahead == {1: 0, 2: 0, 3: 1, 4: 2}
    assert set(judge.ids.values()) == {1}
    assert len(judge.ids) == 24
    for told in (listener.told, listener.played):
        assert len(told) == len(set(told)) == 24


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [0, 2])
def test_a_run_whose_driver_is_killed_goes_on_exactly(
    overlap: int, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rl = {"env": DESK, "updates": 4, "groups": 3, "group_size": 3, "max_new_tokens": 8,
          "feedback": [{"judge": "length", "min_words": 6}],
          "backend": {"name": "ray", "workers": 2, "rows": 8}, "overlap": overlap}  # fmt: skip
    config = {"policy": str(model_folder()), "threads": 1, "checkpoint_every": 1,
              "stages": [{"rl": rl}]}  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))

    def run(name: str, *more: str) -> Command:
        return Command("run", str(tmp_path / "c.yaml"), "--folder", str(tmp_path / name), *more)

    assert run("straight").wait().returncode == 0
    killed = run("killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert run("killed", "--resume").wait().returncode == 0
    first, second = (turnwise.PastRun(tmp_path / name) for name in ("straight", "killed"))
    assert first.ledger.counts() == second.ledger.counts()
    one, two = (
        (tmp_path / name / "policy" / "model.safetensors").read_bytes()
        for name in ("straight", "killed")
    )
    assert one == two


@pytest.mark.slow
def test_processes_that_divide_nothing_do_not_begin_ahead(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rl = {"env": DESK, "updates": 3, "max_new_tokens": 8, "overlap": 1,
          "backend": {"name": "ray", "workers": 1}}  # fmt: skip
    config = {"policy": str(model_folder()), "threads": 1, "stages": [{"rl": rl}]}
    with pytest.raises(AssertionError, match="with several processes needs `shard: true`"):
        run_of(2, config, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [0, 1])
def test_processes_with_a_share_of_the_weights_each_play_on_ray(
    overlap: int, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Two, with a cluster each: they send the whole weights of now, and make the updates of one
    process, also where conversations are begun ahead."""
    rl = {"env": DESK, "updates": 3, "groups": 3, "group_size": 3, "max_new_tokens": 8,
          "feedback": [{"judge": "length", "min_words": 6}], "optimizer": {"lr": 0.01},
          "backend": {"name": "ray", "workers": 1}, "overlap": overlap}  # fmt: skip
    config = {"policy": str(model_folder()), "threads": 1, "checkpoint_every": 1,
              "stages": [{"rl": rl}]}  # fmt: skip
    one, two = (
        run_of(processes, {**config, **more}, tmp_path / str(processes))
        for processes, more in ((1, {}), (2, {"shard": True}))
    )
    found = [turnwise.PastRun(folder) for folder in (one, two)]
    texts = [
        [(e.start.key, e.slot, [t.action_ids for t in e.turns]) for e in sorted(
            run.ledger.run_episodes(run.id), key=lambda e: (e.update, e.start.key, e.slot))]
        for run in found
    ]  # fmt: skip
    assert texts[0] == texts[1]
    for run in found:
        assert [m.get("staleness/max") for m in run.metrics] == [0, 1, 1] or not overlap
        assert all(m["steps"] == 1 for m in run.metrics)
        assert overlap or all(m["weight_off_one"] < 1e-3 for m in run.metrics)
    for a, b in zip(weights(one).values(), weights(two).values(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)
