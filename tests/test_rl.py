"""The rl stage: it learns, it counts, it refuses, and what fails is never scored."""

from __future__ import annotations

import json
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import turnwise
from support import environments
from support.echo import ECHO
from turnwise.engine.errors import OutOfMemory
from turnwise.engine.feedback.sources import Sources
from turnwise.engine.util.ids import derive_id
from turnwise.plugins.optimizers.grpo import GRPO
from turnwise.plugins.optimizers.ppo import PPO
from turnwise.testing import Clock


def run(
    folder: Path,
    model: Any,
    plugins: turnwise.Plugins | None = None,
    *,
    clock: Any = None,
    seed: int = 0,
    resume: bool = False,
    **rl: Any,
) -> turnwise.Run:
    stage = {
        "env": "test/Echo-v0",
        "updates": 2,
        "groups": 3,
        "group_size": 4,
        "max_new_tokens": 6,
        "poll": 0.0,
        **rl,
    }
    config = {
        "policy": model if isinstance(model, turnwise.Policy) else str(model),
        "threads": 1,
        "seed": seed,
        "stages": [{"rl": stage}],
    }
    more = {"clock": clock, "sleep": clock.sleep} if clock else {}
    return turnwise.Run(config, folder=folder, plugins=plugins, resume=resume, **more)


def letters(episode: turnwise.Episode) -> float:
    text = "".join(t.action for t in episode.turns)
    return text.count("e") / (1 + len(text))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("ppo", {"credit": "outcome"}),
        ("grpo", {"credit": {"name": "outcome", "baseline": "loo"}}),
    ],
)
def test_it_learns_from_a_plain_function(
    optimizer: str, options: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"name": optimizer, "lr": 1e-2, "warmup": 2}
    done = run(
        tmp_path / "r", model_folder(), updates=15, groups=8, group_size=4, optimizer=settings,
        feedback=[letters], **options,
        env={"id": "test/Echo-v0", "kwargs": {"turns": 2}},
    ).finish()  # fmt: skip
    outcomes = [m["outcome"] for m in done.metrics]
    assert sum(outcomes[-3:]) / 3 > 2 * sum(outcomes[:3]) / 3, outcomes
    assert done.metrics[0]["weight_off_one"] < 1e-5, "on-policy, the importance weight is one"
    assert done.policy.version == 15


def test_the_same_seed_gives_the_same_weights(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = run(
            tmp_path / name, model_folder(), seed=seed, optimizer={"name": "ppo", "lr": 1e-3}
        ).finish()
        weights.append(torch.cat([p.flatten() for p in done.policy.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_groups_without_signal_are_skipped_and_counted(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    flat = run(tmp_path / "flat", model_folder(), feedback=[lambda episode: 1.0]).finish()
    assert [m["groups_without_signal"] for m in flat.metrics] == [3.0, 3.0]
    assert "loss" not in flat.metrics[0]
    assert flat.policy.version == 0, "nothing was learned from nothing"
    members = flat.ledger.members(flat.id, 1)
    assert {m.reason for m in members} == {"group without signal"}

    def one_group(episode: turnwise.Episode) -> float:
        return float(episode.slot) if int(episode.group, 16) % 2 else 0.5

    some = run(tmp_path / "some", model_folder(), feedback=[one_group], groups=6).finish()
    for m in some.metrics:
        played = list(some.ledger.run_episodes(some.id, update=m["update"]))
        assert m["groups_without_signal"] == sum(
            1 for g in {e.group for e in played} if int(g, 16) % 2 == 0
        )


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1e6 / 3])
def test_equal_outcomes_carry_no_signal_whatever_their_rounding(
    value: float, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    done = run(
        tmp_path / "r", model_folder(), feedback=[lambda episode: value], group_size=8, updates=1
    ).finish()
    assert done.metrics[0]["groups_without_signal"] == 3.0
    assert done.policy.version == 0


def test_numbers_beyond_float32_stop_the_run(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(
        turnwise.NonFiniteError,
        match=r"outcome of \d+ episodes is not a finite number.*update-000000",
    ):
        run(tmp_path / "r", model_folder(), feedback=[lambda episode: 1e39]).finish()


class Flaky(turnwise.FeedbackSource):
    """People behind a network that fails now and then."""

    def __init__(self, failures: int) -> None:
        self.failures, self.asked = failures, []

    def request(self, requests: Sequence[turnwise.Request]) -> None:
        self.asked += requests

    def receive(self) -> list[turnwise.Feedback]:
        self.failures -= 1
        if self.failures >= 0:
            raise ConnectionError("503 from the office")
        ready, self.asked = self.asked, []
        return [
            turnwise.Feedback(
                r.target, score=letters(r.episodes[0]), id=r.id, stamp=turnwise.Stamp(request=r.id)
            )
            for r in ready
        ]


def test_a_source_that_cannot_be_heard_is_tried_again(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="'Flaky' could not be heard: ConnectionError: 503"):
        done = run(tmp_path / "r", model_folder(), feedback=[Flaky(3)]).finish()
    assert done.ledger.counts()["feedback"] == 24
    with (
        pytest.warns(UserWarning, match="trying again"),
        pytest.raises(turnwise.TooManyFailures, match="10 times in a row: ConnectionError"),
    ):
        run(tmp_path / "down", model_folder(), feedback=[Flaky(100)]).finish()


def test_details_that_are_no_json_are_a_failure(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def odd(episode: turnwise.Episode) -> turnwise.Feedback:
        return turnwise.Feedback(episode.id, score=1.0, details={"p": float("nan")})

    with pytest.raises(turnwise.TooManyFailures, match="not plain JSON data"):
        run(tmp_path / "r", model_folder(), feedback=[odd]).finish()


def test_a_context_too_small_for_the_first_prompt_says_so(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder())
    policy.model.config.max_position_embeddings = 8
    with pytest.raises(turnwise.ConfigError, match="does not fit the policy's context of 8 tokens"):
        run(tmp_path / "r", policy).finish()


def test_rerender_at_the_edge_of_the_context(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """GPT-2 has learned positions: a row beyond them would be an error."""
    env = {"id": "test/Echo-v0", "kwargs": {"turns": 60}}
    done = run(
        tmp_path / "r",
        model_folder("gpt2"),
        env=env,
        history="rerender",
        max_new_tokens=20,
        optimizer="ppo",
        groups=2,
        updates=1,
    ).finish()
    assert {e.reason for e in done.ledger.run_episodes(done.id)} == {"context"}


def test_the_reference_of_loaded_adapters_is_what_was_loaded(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    first = turnwise.Policy.from_pretrained(model_folder(), lora={"r": 4})
    for name, parameter in first.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    first.save_pretrained(tmp_path / "adapters")
    options = {"name": "ppo", "kl": 0.1, "lr": 1e-2, "warmup": 0}
    done = run(tmp_path / "r", tmp_path / "adapters", optimizer=options).finish()
    assert done.metrics[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(done.metrics[1]["kl"]) > 1e-5
    with pytest.raises(turnwise.PolicyError, match="adapters already"):
        turnwise.Policy.from_pretrained(tmp_path / "adapters", lora={"r": 4})


def mood_of(episode: turnwise.Episode) -> int:
    return int(derive_id(episode.start.key, episode.slot), 16) % 4


class Grumpy(turnwise.Judge):
    """Fails, abstains, or scores, by the episode."""

    def score(self, episodes: Sequence[turnwise.Episode]) -> list[turnwise.Feedback]:
        answers = []
        for e in episodes:
            mood = mood_of(e)
            if mood == 0:
                raise TimeoutError("the model did not answer")
            answers.append(
                turnwise.Feedback.abstained(e.id, "tired")
                if mood == 1
                else turnwise.Feedback(e.id, score=float(mood))
            )
        return answers


def test_what_failed_is_never_scored(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Promise 4. Failed and abstained episodes leave the baseline; small groups are dropped and
    counted."""
    done = run(
        tmp_path / "r", model_folder(), feedback=[Grumpy()], groups=6, group_size=4, min_group=3
    ).finish()
    for number in (1, 2):
        episodes = {e.id: e for e in done.ledger.run_episodes(done.id, update=number)}
        said = {
            f.episode: f for f in done.ledger.feedback(list({e.group for e in episodes.values()}))
        }
        members = {m.episode: m for m in done.ledger.members(done.id, number)}
        assert set(said) == set(members) == set(episodes)
        sound: dict[str, int] = {}
        for name, e in episodes.items():
            mood = mood_of(e)
            assert said[name].status == ("failed", "abstained", "scored", "scored")[mood]
            sound[e.group] = sound.get(e.group, 0) + (mood > 1)
        for name, member in members.items():
            mood = mood_of(episodes[name])
            if mood < 2:
                assert not member.used
                assert member.outcome is None, "no number stands for a failure"
                assert ("the model did not answer", "tired")[mood] in member.reason
            else:
                assert member.outcome == float(mood)
                assert member.used or member.reason in ("group too small", "group without signal")
                assert member.used is False or sound[member.group] >= 3
        metrics = done.metrics[number - 1]
        assert metrics["left_out/no reward"] == sum(mood_of(e) < 2 for e in episodes.values())
        scored = [mood_of(e) for e in episodes.values() if mood_of(e) > 1]
        assert metrics["outcome"] == pytest.approx(sum(scored) / len(scored))


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (lambda e: 1 / 0, "ZeroDivisionError"),
        (lambda e: float("nan"), "finite number"),
        (lambda e: "good", "finite number"),
    ],
)
def test_a_judge_that_fails_too_often_stops_the_run(
    judge: Any, reason: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    going = run(tmp_path / "r", model_folder(), feedback=[judge])
    with pytest.raises(turnwise.TooManyFailures, match=reason):
        going.finish()
    statuses = {
        f.status
        for f in going.ledger.feedback([e.group for e in going.ledger.run_episodes(going.id)])
    }
    assert statuses == {"failed"}, "what failed is recorded, before the run stops"
    assert going.ledger.members(going.id) == []


def test_a_judge_that_dies_late_stops_the_run_at_once_with_the_work_kept(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    calls: list[int] = []

    def dies(episode: turnwise.Episode) -> float:
        calls.append(1)
        if len(calls) > 3 * 12:
            raise ConnectionError("the judge is gone")
        return letters(episode)

    going = run(tmp_path / "r", model_folder(), feedback=[dies], updates=30)
    with pytest.raises(turnwise.TooManyFailures, match="12 of 12 requests.*the judge is gone"):
        going.finish()
    assert going.updates == 3, "three good updates do not pay for a dead judge"
    with pytest.raises(turnwise.ConfigError, match="has been played"):
        going.finish()

    # When the judge is back, the run goes on with what it failed on, and with nothing else anew.
    heard: list[str] = []

    def back(episode: turnwise.Episode) -> float:
        heard.append(episode.id)
        return letters(episode)

    back.__name__ = back.__qualname__ = dies.__name__
    again = run(
        tmp_path / "r",
        model_folder(),
        feedback=[{"judge": back, "name": "dies"}],
        updates=5,
        resume=True,
    )
    again.config.stages[0]["rl"]["feedback"] = going.config.stages[0]["rl"]["feedback"]
    again.finish()
    assert again.updates == 5
    assert len(heard) == len(set(heard)) == 2 * 12, "only what failed, and what came after"
    assert all(m.outcome is not None for m in again.ledger.members(again.id))
    assert again.ledger.counts()["feedback"] == 5 * 12 + 12, "the failures are kept, superseded"


class Miscounts(turnwise.Judge):
    def score(self, episodes: Sequence[turnwise.Episode]) -> list[turnwise.Feedback]:
        return [turnwise.Feedback(e.id, score=1.0) for e in episodes][:-1]


class Swaps(turnwise.Judge):
    def score(self, episodes: Sequence[turnwise.Episode]) -> list[turnwise.Feedback]:
        return [turnwise.Feedback(e.id, score=1.0) for e in reversed(episodes)]


@pytest.mark.parametrize(
    ("judge", "reason"),
    [(Miscounts(), "11 answers for 12 episodes"), (Swaps(), "must keep the order")],
)
def test_answers_that_do_not_fit_are_failures(
    judge: Any, reason: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(turnwise.TooManyFailures, match=reason):
        run(tmp_path / "r", model_folder(), feedback=[judge]).finish()


class Slow(turnwise.FeedbackSource):
    """People: each answers after a while of its own; some never do."""

    version = "1"

    def open(self, context: turnwise.Context) -> None:
        self.clock, self.due = context.clock, {}

    def request(self, requests: Sequence[turnwise.Request]) -> None:
        for r in requests:
            patience = int(r.id, 16) % 50
            self.due[r.id] = (
                (self.clock() + 7200 * patience / 50, r) if patience > 5 else (float("inf"), r)
            )

    def receive(self) -> list[turnwise.Feedback]:
        ready = [r for when, r in self.due.values() if when <= self.clock()]
        self.due = {k: v for k, v in self.due.items() if v[1] not in ready}
        stamp = lambda r: turnwise.Stamp(request=r.id)  # noqa: E731
        return [
            turnwise.Feedback(
                r.target, score=letters(r.episodes[0]), id=f"p-{r.id}", stamp=stamp(r)
            )
            for r in ready
        ]


def test_answers_that_come_hours_later_train_and_those_that_never_come_expire(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    clock = Clock(0.0)
    source = {"judge": Slow(), "deadline": 3 * 3600}
    done = run(
        tmp_path / "r",
        model_folder(),
        clock=clock,
        feedback=[source],
        poll=600.0,
        updates=2,
        groups=6,
    ).finish()
    assert clock.now > 2 * 3600
    members = done.ledger.members(done.id)
    requests = 2 * 6 * 4
    assert len(members) == requests
    unanswered = [m for m in members if "did not answer" in m.reason]
    assert 0 < len(unanswered) < requests / 3
    assert all(not m.used and m.outcome is None for m in unanswered)
    assert done.ledger.counts()["feedback"] == requests - len(unanswered)


def test_environments_that_fail_never_train(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    done = run(
        tmp_path / "r",
        model_folder(),
        env="test/Sometimes-v0",
        updates=2,
        groups=8,
        max_failure_rate=0.9,
    ).finish()
    episodes = {e.id: e for e in done.ledger.run_episodes(done.id)}
    failed = {e.id for e in episodes.values() if e.ending == "failed"}
    assert failed
    assert sum(m["failed_episodes"] for m in done.metrics) == len(failed)
    for member in done.ledger.members(done.id):
        if member.episode in failed:
            assert (member.used, member.outcome) == (False, None)
            assert "bad luck" in member.reason
    with pytest.raises(turnwise.TooManyFailures, match="bad luck"):
        run(
            tmp_path / "strict",
            model_folder(),
            env="test/Sometimes-v0",
            groups=8,
            max_failure_rate=0.0,
        ).finish()


def test_a_mixture_has_its_own_feedback_for_each(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    envs = [
        {"id": "test/Echo-v0", "weight": 0.5, "feedback": [letters]},
        {"id": "test/Good-v0", "weight": 0.5, "feedback": [lambda e: 7.0]},
    ]
    done = run(tmp_path / "r", model_folder(), env=envs, groups=8, updates=1).finish()
    episodes = {e.id: e for e in done.ledger.run_episodes(done.id)}
    assert {e.start.env for e in episodes.values()} == {"test/Echo-v0", "test/Good-v0"}
    for member in done.ledger.members(done.id):
        if episodes[member.episode].start.env == "test/Good-v0":
            assert member.outcome == 7.0
    assert done.metrics[0]["outcome/test/Good-v0"] == 7.0


class Counts(turnwise.Judge):
    """Pays every conversation 1, and keeps how many it has seen."""

    made: ClassVar[list[Counts]] = []

    def __init__(self, pay: float = 1.0) -> None:
        self.pay, self.seen, self.opened, self.closed, self.taken_up = pay, 0, 0, 0, 0
        Counts.made.append(self)

    def open(self, context: turnwise.Context) -> None:
        self.opened += 1

    def close(self) -> None:
        self.closed += 1

    def score(self, episodes: Sequence[turnwise.Episode]) -> list[turnwise.Feedback]:
        self.seen += len(episodes)
        return [turnwise.Feedback(e.id, score=self.pay) for e in episodes]

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.seen = self.taken_up = state["seen"]


class CountsPlugin:
    @turnwise.hookimpl
    def register_judges(self, register: Callable[..., None]) -> None:
        register("counts", Counts)


def test_a_judge_that_environments_of_a_mixture_name_is_made_once(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """By another name, or with other options, it is another judge."""
    own, other = {"judge": "counts", "name": "own"}, {"judge": "counts"}
    envs = [
        {"id": "test/Echo-v0", "feedback": [{**other, "raters": 2}]},
        {"id": "test/Good-v0", "feedback": [{**other, "weight": 2.0}, own]},
        {"id": "test/Good-v0", "feedback": [{**other, "pay": 3.0}]},
    ]
    options: dict[str, Any] = {"env": envs, "groups": 9, "updates": 2}
    plugins = turnwise.Plugins({"counts": CountsPlugin()})
    Counts.made.clear()
    done = run(tmp_path / "r", model_folder(), plugins, **options).finish()
    used = [judge for judge in Counts.made if judge.opened]
    assert [(judge.pay, judge.opened, judge.closed) for judge in used] == [
        (1.0, 1, 1), (1.0, 1, 1), (3.0, 1, 1),
    ]  # fmt: skip
    answers = done.ledger.feedback(run=done.id)
    given = Counter((a.stamp.source, a.score) for a in answers)
    assert [j.seen for j in used] == [given["counts", 1.0], given["own", 1.0], given["counts", 3.0]]
    assert len({judge.seen for judge in used}) == 3, "or swapped states could not be seen"
    each = Counter(a.target for a in answers if a.stamp.source == "counts")
    for e in done.ledger.run_episodes(done.id):
        assert each[e.id] == (2 if e.start.env == "test/Echo-v0" else 1), "raters of its own entry"
    assert {m.outcome for m in done.ledger.members(done.id)} == {1.0, 2.0 + 1.0, 3.0}
    Counts.made.clear()
    run(tmp_path / "r", model_folder(), plugins, **{**options, "updates": 3}, resume=True).finish()
    assert [j.taken_up for j in Counts.made if j.opened] == [j.seen for j in used]


class Named:
    """Two of these look alike, and are not."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Named()"


class PaysNamed(turnwise.Judge):
    def __init__(self, named: Named) -> None:
        self.named = named

    def score(self, episodes: Sequence[turnwise.Episode]) -> list[turnwise.Feedback]:
        return [turnwise.Feedback(e.id, score=self.named.value) for e in episodes]


def test_options_that_only_look_alike_make_two_judges(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    plugins = turnwise.Plugins({"named": NamedPlugin()})
    envs = [
        {"id": f"test/{env}-v0", "feedback": [{"judge": "named", "named": Named(value)}]}
        for env, value in (("Echo", 1.0), ("Good", 2.0))
    ]
    done = run(tmp_path / "r", model_folder(), plugins, env=envs, groups=8, updates=1).finish()
    assert done.metrics[0]["outcome/test/Echo-v0"] == 1.0
    assert done.metrics[0]["outcome/test/Good-v0"] == 2.0


class NamedPlugin:
    @turnwise.hookimpl
    def register_judges(self, register: Callable[..., None]) -> None:
        register("named", PaysNamed)


def test_a_run_does_not_go_on_with_an_optimizer_of_another_class_or_rate(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Given as an object too."""
    folder, options = tmp_path / "r", {"updates": 1, "feedback": [letters]}
    run(folder, model_folder(), optimizer=PPO(lr=1e-3), **options).finish()
    shown = (folder / "config.yaml").read_text()
    assert "turnwise.plugins.optimizers.ppo.PPO" in shown
    for other in (GRPO(lr=1e-3), PPO(lr=1e-2)):
        with pytest.raises(turnwise.ConfigError, match="optimizer of 'rl' changed"):
            run(folder, model_folder(), optimizer=other, resume=True, **options).finish()
    run(
        folder, model_folder(), optimizer=PPO(lr=1e-3), resume=True, **{**options, "updates": 2}
    ).finish()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"judge": "length", "raters": "two"}, "'length': raters: Input should be a valid"),
        ({"judge": "length", "raters": 0}, "raters: Input should be greater than or equal to 1"),
        ({"judge": "length", "weight": True}, "weight: must be a number .got True"),
        ({"judge": "length", "deadline": "1h"}, "deadline: Input should be a valid number"),
        ({"judge": "length", "required": "maybe"}, "required: Input should be a valid boolean"),
        ({"judge": "length", "share": None}, "share: Input should be a valid number"),
        ({"judge": "length", "name": ["a"]}, "`name` of a feedback entry must be a text"),
        ({"judge": "environment", "weight": "x"}, "weight of 'environment' must be a number"),
        ({"judge": "environment", "wieght": 2}, "takes a `weight` only, got"),
        ({"source": "people"}, "needs `judge`"),
    ],
)
def test_settings_of_a_feedback_entry_are_checked(entry: Any, message: str) -> None:
    with pytest.raises(turnwise.PluginError, match=message):
        Sources.make([[entry]], turnwise.Plugins(), 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": "grpo", "credit": "gae"},
            (
                "gae' needs a critic's values, which optimizer 'grpo' does not have: use optimizer"
                " 'ppo'"
            ),
        ),
        ({"optimizer": "grpo", "group_size": 1}, "needs group_size of at least 2"),
        ({"optimizer": "grop"}, "Did you mean 'grpo'"),
        ({"credit": "gea"}, "Did you mean 'gae'"),
        ({"feedback": ["lenght"]}, "Did you mean 'length'"),
        ({"feedback": [{"judge": "length", "max_word": 3}]}, "Did you mean 'max_words'"),
        ({"feedback": [letters, letters]}, "two feedback sources are called 'letters'"),
        ({"feedback": [turnwise.judges.Length]}, "a class of them: give an instance"),
        ({"feedback": [3]}, "is no judge"),
        ({"feedback": []}, "at least one source"),
        ({"env": environments.Good}, "register it with gymnasium.register"),
        ({"env": "test/Eco-v0"}, "Did you mean 'test/Echo-v0'"),
        ({"env": [("test/Echo-v0", -1)]}, "weight"),
        ({"group": 3}, "'rl' has no option 'group'. Did you mean 'groups'"),
        ({"temperature": 0}, "temperature"),
        ({"top_p": 0.9}, "'rl' has no option 'top_p'"),
        ({"credit": {"lam": 1.0}}, "needs `name`"),
        ({"optimizer": {"name": "ppo", "learning_rate": 1.0}}, "no option 'learning_rate'"),
        ({"optimizer": {"name": "grpo", "kl": 0.1, "kl_estimator": "k1"}}, "mean is zero"),
        ({"backend": "in-proces"}, "Did you mean 'in-process'"),
        ({"backend": {"name": "in-process", "row": 3}}, "no option 'row'. Did you mean 'rows'"),
        (
            {"credit": {"name": "gae", "lam": 2}, "optimizer": "ppo"},
            "gae.lam: Input should be less than or equal to 1",
        ),
        ({"env": {"id": "turnwise/Maze-v0", "kwargs": {"size": 99}}}, "size must be 2 to 8"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_happens(
    options: dict[str, Any], message: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, turnwise.PluginError), match="(?s)" + message):
        run(tmp_path / "r", model_folder(), **options)
    assert not (tmp_path / "r").exists()


def test_damaged_weights_stop_the_run_with_the_last_checkpoint_whole(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder())
    going = run(tmp_path / "r", policy, updates=5)
    going.config.checkpoint_every = 1
    with pytest.raises(
        turnwise.NonFiniteError,
        match=r"logits are not finite in a conversation of \d+ tokens.*last checkpoint",
    ):
        for update in going:
            if update.number == 2:
                next(iter(policy.parameters())).data[:] = float("nan")
    [*_, last] = sorted((tmp_path / "r" / "checkpoints").iterdir())
    assert last.name == "update-000002"
    kept = turnwise.Policy.from_pretrained(last / "policy")
    assert all(bool(torch.isfinite(p).all()) for p in kept.parameters())


def test_a_gradient_that_is_not_finite_changes_nothing_and_names_the_episodes(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def infinite(episode: turnwise.Episode) -> float:
        return 1e38 * episode.slot

    policy = turnwise.Policy.from_pretrained(model_folder())
    before = [p.clone() for p in policy.parameters()]
    going = run(
        tmp_path / "r", policy, feedback=[infinite], credit={"name": "outcome", "baseline": "loo"}
    )
    with pytest.raises(turnwise.NonFiniteError, match="minibatch of 12 episodes: "):
        going.finish()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_out_of_memory_says_what_to_lower(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """A real allocation that cannot succeed, where the optimizer works."""

    class Greedy(turnwise.Optimizer):
        consumes, provides = frozenset({"advantages"}), frozenset()
        setup = prepare = lambda self, *a: None

        def update(self, policy: Any, batch: Any) -> dict[str, float]:
            torch.empty(2**50)
            return {}

    with pytest.raises(
        OutOfMemory,
        match="memory ran out in the update: lower `activation_memory` or `micro_tokens`",
    ):
        run(tmp_path / "r", model_folder(), optimizer=Greedy()).finish()


def test_a_run_leaves_a_folder_that_tells_what_happened(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    going = run(tmp_path / "r", model_folder(), updates=3, optimizer={"name": "ppo", "lr": 1e-3})
    going.config.checkpoint_every = 1
    numbers = [update.number for update in going]
    assert numbers == [1, 2, 3]
    lines = [
        json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["update"] for line in lines] == [1, 2, 3]
    kept = {p.name for p in (tmp_path / "r" / "checkpoints").iterdir()}
    assert kept == {
        "update-000000",
        "update-000002",
        "update-000003",
    }, "the last two, and where the stage began"
    saved = turnwise.Policy.from_pretrained(tmp_path / "r" / "policy")
    assert all(
        torch.equal(a, b)
        for a, b in zip(saved.parameters(), going.policy.parameters(), strict=True)
    )
    # What a checkpoint holds is enough to go on from: the optimizer's state reads back equal.
    from safetensors.torch import load_file

    last = tmp_path / "r" / "checkpoints" / "update-000003"
    state = {
        **load_file(last / "optimizer.safetensors"),
        **json.loads((last / "state.json").read_text())["states"]["optimizer"],
    }
    fresh = going.plugins.create("optimizer", "ppo", lr=1e-3)
    fresh.setup(saved)
    fresh.load_state_dict(state)
    again = fresh.state_dict()
    assert set(again) == set(state)
    assert all(torch.equal(torch.as_tensor(again[k]), torch.as_tensor(state[k])) for k in state)
    with pytest.raises(
        turnwise.ConfigError, match="holds a run with another config|results already"
    ):
        run(tmp_path / "r", model_folder(), updates=3).finish()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_ended_before_it_did_anything_gives_way_to_another(
    model_folder: Callable[..., Path], tmp_path: Path, resume: bool
) -> None:
    def begin(**policy: Any) -> turnwise.Run:
        rl = {
            "env": "turnwise/SupportDesk-v0",
            "updates": 1,
            "groups": 2,
            "group_size": 2,
            "max_new_tokens": 4,
        }
        config = {
            "policy": {"model": str(model_folder()), **policy},
            "name": "r",
            "stages": [{"rl": rl}],
        }
        return turnwise.Run(config, folder=tmp_path / "r", resume=resume)

    with pytest.raises(turnwise.PolicyError):
        begin(lora={"rank": 4}).finish()
    assert (tmp_path / "r" / "config.yaml").exists()
    assert begin(lora={"r": 4}).finish().updates == 1
    with pytest.raises(turnwise.ConfigError, match="another config.*or remove it|put it back"):
        begin(lora={"r": 2}).finish()


def test_ctrl_c_ends_after_the_update_with_everything_saved(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    import os
    import signal

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    going = run(tmp_path / "r", model_folder(), updates=50)
    seen = []
    for update in going:
        seen.append(update.number)
        if update.number == 2:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert seen[-1] < 50
    assert going.stopping
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == seen[-1]
    assert (tmp_path / "r" / "checkpoints" / f"update-{seen[-1]:06d}" / "policy").is_dir()
    assert (
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
    ) == before, "the old behaviour is back"


def test_stale_episodes_are_weighted(policy: turnwise.Policy) -> None:
    """With an older behaviour policy the weight is min(cap, prox / behaviour), and the first ratio
    is one."""
    from support.echo import play
    from turnwise.engine.policy.batching import make_batch
    from turnwise.engine.tensors import importance_weight

    episodes = play(policy, 4)
    for parameter in policy.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    policy.version = 3
    batch = make_batch(
        episodes,
        [turnwise.Rewards(e.env_return, tuple(t.reward for t in e.turns)) for e in episodes],
        version=3,
    )
    assert batch.staleness.tolist() == [3] * 4
    prox = policy.logprobs(batch)
    weight = importance_weight(prox, batch.behaviour_logprobs, 2.0)[batch.mask]
    assert float(weight.max()) <= 2.0
    assert float((weight - 1).abs().max()) > 1e-3


def test_lora_trains_adapters_only_and_the_reference_is_the_base(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = {"model": str(model_folder()), "lora": {"r": 4}}
    stage = {"env": "test/Echo-v0", "updates": 2, "groups": 3, "group_size": 4, "max_new_tokens": 6,
             "optimizer": {"name": "ppo", "lr": 1e-2, "kl": 0.1, "warmup": 0}}  # fmt: skip
    done = turnwise.Run(
        {"policy": config, "threads": 1, "stages": [{"rl": stage}]}, folder=tmp_path / "r"
    ).finish()
    assert done.metrics[0]["kl"] == pytest.approx(0.0, abs=1e-5), (
        "before the first update policy and reference are one"
    )
    assert abs(done.metrics[1]["kl"]) > 1e-5
    base = turnwise.Policy.from_pretrained(model_folder())
    trained = dict(done.policy.network.named_parameters())
    assert all("lora" in n for n, p in trained.items() if p.requires_grad)
    back = turnwise.Policy.from_pretrained(tmp_path / "r" / "policy")
    assert back.is_lora
    adapters = {n: p for n, p in back.network.named_parameters() if "lora" in n}
    assert all(torch.equal(p, trained[n]) for n, p in adapters.items())
    done.policy.save_pretrained(tmp_path / "merged", merge=True)
    merged = turnwise.Policy.from_pretrained(tmp_path / "merged")
    assert not merged.is_lora
    ids = torch.arange(5, 15).unsqueeze(0)
    with torch.no_grad():
        logits = [p.model(input_ids=ids).logits for p in (done.policy, merged, base)]
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-4)


def test_train_in_one_call(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[turnwise.Status] = []
    arguments = {
        "env": "test/Echo-v0",
        "feedback": letters,
        "updates": 1,
        "groups": 2,
        "group_size": 2,
        "max_new_tokens": 4,
        "threads": 1,
    }
    done = turnwise.train(str(model_folder()), **arguments, on_status=seen.append)
    again = turnwise.train(done.policy, **arguments)
    assert (done.folder, again.folder) == (
        Path.cwd() / "runs/echo-v0-1",
        Path.cwd() / "runs/echo-v0-2",
    )
    assert {"play", "update", "finished"} <= {s.phase for s in seen}
    assert isinstance(
        done.policy.reply([{"role": "user", "content": "hello"}], max_new_tokens=5), str
    )


def per_turn(episode: turnwise.Episode) -> list[float]:
    return [float(turn.action.count("e")) for turn in episode.turns]


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ({}, True),
        ({"feedback": ["environment", {"judge": per_turn, "weight": 0.1}]}, True),
        ({"feedback": ["environment", {"judge": per_turn, "weight": 0}]}, False),
        ({"combiner": {"name": "weighted", "turns": ["per_turn"]}}, False),
        ({"credit": "judged"}, False),
    ],
)
def test_scores_of_turns_that_nothing_reads_are_warned_of(
    more: dict[str, Any], warned: bool, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    stage = {"env": {"id": ECHO, "kwargs": {"turns": 2}}, "feedback": [per_turn], "updates": 1,
             "groups": 2, "group_size": 2, "max_new_tokens": 5}  # fmt: skip
    config = {"policy": str(model_folder()), "stages": [{"rl": {**stage, **more}}]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = turnwise.Run(config, folder=tmp_path / "r").finish()
    said = [w for w in caught if "'per_turn' scores turns only, and nothing" in str(w.message)]
    assert bool(said) == warned
    if "combiner" in more:
        rewards = {m.episode: m.outcome for m in run.ledger.members(run.id)}
        played = run.episodes("rl")
        assert [rewards[e.id] for e in played] == [sum(per_turn(e)) for e in played]


def test_train_goes_on_with_its_folder(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    small = {"env": ECHO, "groups": 2, "group_size": 2, "max_new_tokens": 5, "seed": 3}
    given = {"policy": str(model_folder()), **small}
    turnwise.train(**given, updates=1, folder=tmp_path / "r")
    run = turnwise.train(**given, updates=2, folder=tmp_path / "r", resume=True)
    whole = turnwise.train(**given, updates=2, folder=tmp_path / "whole")
    assert [m["update"] for m in run.metrics] == [1, 2]
    for a, b in zip(run.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(turnwise.ConfigError, match="give the run's `folder`"):
        turnwise.train(**given, updates=2, resume=True)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_script_does_not_go_on_with_half_a_run(
    number: int, raised: type[BaseException], model_folder: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Everything is saved, the way on is said, and what follows `train` is not reached."""
    small = {"env": ECHO, "groups": 2, "group_size": 2, "max_new_tokens": 5, "updates": 3}
    folder, asked = tmp_path / "r", [True]

    def feedback(episode: turnwise.Episode) -> float:
        if asked:
            asked.clear()
            signal.raise_signal(number)
        return float(len(episode.turns[-1].action))

    with pytest.raises(raised):
        turnwise.train(str(model_folder()), **small, feedback=[feedback], folder=folder)
    said = capsys.readouterr().err
    assert "interrupted after update 1" in said
    assert f"turnwise.train(..., folder={str(folder)!r}, resume=True)" in said
    run = turnwise.train(
        str(model_folder()), **small, feedback=[feedback], folder=folder, resume=True
    )
    assert [m["update"] for m in run.metrics] == [1, 2, 3]
