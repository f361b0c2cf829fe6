"""Feedback that comes late: what trains when, what is left out, what a stop or a kill changes
(nothing), and what staleness costs."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import turnwise
from support.echo import ECHO
from support.episodes import NO_RUN, conversation
from turnwise.engine.feedback.sources import Sources
from turnwise.engine.ledger.rows import Member
from turnwise.engine.stages.rl.pending import ENDED, OLD
from turnwise.engine.tensors import group_advantage, importance_weight
from turnwise.judges.simulated import SimulatedPanel
from turnwise.plugins.optimizers.grpo import GRPO
from turnwise.plugins.optimizers.policy_loss import PolicyLoss, PolicyLossOptions
from turnwise.testing import Clock

HOUR = 3600.0
RL = {"env": {"id": ECHO, "kwargs": {"turns": 2}}, "updates": 6, "groups": 2, "group_size": 3,
    "max_new_tokens": 5, "poll": 600.0,
      "optimizer": {"name": "grpo", "lr": 1e-2, "warmup": 0}}  # fmt: skip


def make(
    folder: Path,
    model: Any,
    clock: Clock,
    resume: bool = False,
    plugins: Any = None,
    every: int = 1,
    **rl: Any,
) -> turnwise.Run:
    config = {
        "policy": str(model),
        "threads": 1,
        "checkpoint_every": every,
        "name": "r",
        "stages": [{"rl": {**RL, **rl}}],
    }
    return turnwise.Run(
        config, folder=folder, clock=clock, sleep=clock.sleep, resume=resume, plugins=plugins
    )


def people(delay: float = 2 * HOUR, **more: Any) -> dict[str, Any]:
    return {"judge": "simulated-panel", "delay": delay, "raters": 2, **more}


def flat(run: turnwise.Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


def test_with_answers_at_once_it_is_lockstep(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    whole = make(tmp_path / "lockstep", model_folder(), Clock(), feedback=[people(0)]).finish()
    ahead = make(
        tmp_path / "pending", model_folder(), Clock(), feedback=[people(0)], pending=18
    ).finish()
    assert torch.equal(flat(ahead), flat(whole)), "never ahead while there is something to train on"
    own = {"pending", "too_old", "staleness/mean", "staleness/max"}
    for mine, theirs in zip(ahead.metrics, whole.metrics, strict=True):
        assert {k: v for k, v in mine.items() if k not in own and not k.startswith("seconds/")} == {
            k: v for k, v in theirs.items() if not k.startswith("seconds/")
        }
        assert (
            mine["pending"],
            mine["too_old"],
            mine["staleness/max"],
            mine["seconds/waited"],
        ) == (0, 0, 0, 0)
    assert ahead.clock() == 1000.0, "nobody slept"


class Watched(SimulatedPanel):
    """Counts, whenever it is looked at, how many episodes raters are being asked about."""

    most = 0
    version = "watched"

    def receive(self) -> list[turnwise.Comparison]:
        assert self._context is not None
        ledger = self._context.ledger
        groups = {r["group"] for r in ledger.open_requests()}
        type(self).most = max(type(self).most, 3 * len(groups - set(ledger.decided(list(groups)))))
        return super().receive()


@pytest.fixture(scope="module")
def late(
    model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> turnwise.Run:
    """People who answer hours later, out of order, and sometimes never."""
    Watched.most = 0
    source = {
        "judge": Watched(delay=2 * HOUR, unanswered=0.25, seed=3),
        "raters": 2,
        "deadline": 9 * HOUR,
    }
    options = {"updates": 20, "pending": 18, "staleness": 3, "feedback": [source]}
    return make(tmp_path_factory.mktemp("late") / "r", model_folder(), Clock(), **options).finish()


def test_play_goes_on_within_its_limits(late: turnwise.Run) -> None:
    assert late.updates == 20
    assert Watched.most == 18, "what waits fills the room and never exceeds it"
    assert max(m["staleness/max"] for m in late.metrics) == 3
    assert any(m["staleness/mean"] > 0 for m in late.metrics)
    assert sum(m["seconds/waited"] for m in late.metrics) == late.clock() - 1000.0
    assert all(m["weight_off_one"] < 1e-5 for m in late.metrics if m["staleness/max"] == 0)
    assert any(m["weight_off_one"] > 1e-3 for m in late.metrics if m["staleness/max"] > 0)


def test_every_episode_is_accounted_for_once(late: turnwise.Run) -> None:
    episodes = {e.id: e for e in late.ledger.run_episodes(late.id)}
    members = {m.episode: m for m in late.ledger.members(late.id)}
    assert set(members) == set(episodes)
    trained: dict[int, set[str]] = {}
    version = 0
    for number in range(1, 21):
        own = late.ledger.members(late.id, number)
        trained[number] = {m.group for m in own if m.used or m.reason == "group without signal"}
        assert len(trained[number]) == 2, "neither the old nor the unrewarded count"
        left = [m for m in own if m.reason == OLD]
        assert len(left) == late.metrics[number - 1]["too_old"]
        for m in own:
            age = version - episodes[m.episode].turns[0].policy_version
            assert (age > 3) == (m.reason == OLD)
        version += any(m.used for m in own)
    assert len(set.union(*trained.values())) == 40, "no group trains twice"
    assert any(m.reason == OLD for m in members.values())
    silent = [m for m in members.values() if m.reason.startswith("no reward")]
    assert silent
    assert all(not m.used and m.outcome is None and "did not answer" in m.reason for m in silent)
    assert late.ledger.ready_groups(sorted({e.group for e in episodes.values()})) == []
    assert len(members) == 3 * 40 + len(silent) + sum(m.reason == OLD for m in members.values()), (
        "no more is played than is needed"
    )


def test_it_pays_in_time(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    clocks = Clock(), Clock()
    make(tmp_path / "a", model_folder(), clocks[0], feedback=[people()]).finish()
    make(tmp_path / "b", model_folder(), clocks[1], feedback=[people()], pending=24).finish()
    assert clocks[1].now - 1000 < 0.6 * (clocks[0].now - 1000)


@pytest.mark.parametrize(
    ("night", "every"),
    [
        (0.5, 1), (3, 1), (5, 100),
        pytest.param(5, 1, marks=pytest.mark.slow), pytest.param(3, 100, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_stopped_for_the_night_it_goes_on_as_if_nothing_had_been(
    night: float, every: int, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "feedback": [people(unanswered=0.1, deadline=6 * HOUR)],
        "pending": 18,
        "staleness": 2,
        "every": every,
    }
    whole = make(tmp_path / "whole", model_folder(), Clock(), **options).finish()
    clock = Clock()
    going = make(tmp_path / "r", model_folder(), clock, **options)

    def evening() -> None:
        going.stopping = going.stopping or clock.now >= 1000.0 + night * HOUR

    clock.meanwhile = evening
    going.finish()
    assert going.updates < 6
    clock.meanwhile = lambda: None
    again = make(tmp_path / "r", model_folder(), clock, resume=True, **options).finish()
    assert torch.equal(flat(again), flat(whole))
    drop = lambda m: {k: v for k, v in m.items() if k != "time" and not k.startswith("seconds/")}  # noqa: E731
    assert [drop(m) for m in again.metrics] == [drop(m) for m in whole.metrics]
    assert again.ledger.counts() == whole.ledger.counts()
    assert again.ledger.members(again.id) == whole.ledger.members(whole.id)


def test_answers_that_come_during_the_night_are_there_in_the_morning(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    clock = Clock()
    going = make(tmp_path / "r", model_folder(), clock, feedback=[people()], pending=18)
    clock.meanwhile = lambda: setattr(going, "stopping", True)
    going.finish()
    assert going.updates == 0
    clock.meanwhile = lambda: None
    clock.now += 24 * HOUR
    again = make(
        tmp_path / "r", model_folder(), clock, resume=True, feedback=[people()], pending=18
    )
    for update in again:
        assert update.metrics["seconds/waited"] == 0.0, (
            "three rounds were played in the evening, and all was said of them"
        )
        assert update.metrics["staleness/max"] == update.number - 1
        if update.number == 3:
            break


def test_a_decision_stands_whatever_is_said_afterwards(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power fails in an update that was decided; when it is back, a day later, everybody has
    answered."""
    options: dict[str, Any] = {"feedback": [people()], "pending": 18}
    whole = make(tmp_path / "whole", model_folder(), Clock(), **options)
    for update in whole:
        if update.number == 3:
            break
    decided = {m.group for m in whole.ledger.members(whole.id, 3)}
    played = list(dict.fromkeys(e.group for e in whole.ledger.run_episodes(whole.id)))
    assert set(played) - {m.group for m in whole.ledger.members(whole.id)}, "others wait"
    calls: list[int] = []

    def fails(self: GRPO, policy: Any, batch: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no power")
        return real(self, policy, batch)

    real, clock = GRPO.update, Clock()
    monkeypatch.setattr(GRPO, "update", fails)
    with pytest.raises(RuntimeError, match="no power"):
        make(tmp_path / "r", model_folder(), clock, **options).finish()
    clock.now += 24 * HOUR
    again = make(tmp_path / "r", model_folder(), clock, resume=True, **options)
    for update in again:
        assert update.number == 3
        break
    assert {m.group for m in again.ledger.members(again.id, 3)} == decided
    assert torch.equal(flat(again), flat(whole))


def test_what_a_stage_that_is_stopped_early_leaves_is_given_up(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "feedback": [people()],
        "pending": 18,
        "gold": {"episodes": 2, "every": 1, "patience": 1},
    }
    still = {**RL["optimizer"], "lr": 1e-12}  # the gold measure never rises
    done = make(tmp_path / "r", model_folder(), Clock(), optimizer=still, **options).finish()
    assert done.updates == 1
    why = [m.reason for m in done.ledger.members(done.id, 1)]
    assert why.count(ENDED) == done.metrics[0]["pending"] > 0


def test_a_stage_that_had_ended_can_be_extended(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Cut short, it gives up what is pending; what is played when it goes on after all is new."""
    options: dict[str, Any] = {"feedback": [people()], "pending": 12, "staleness": 1}
    clock = Clock()
    for update in make(tmp_path / "r", model_folder(), clock, **options):
        if update.number == 2:
            break
    done = make(tmp_path / "r", model_folder(), clock, resume=True, updates=2, **options).finish()
    given_up = {m.episode for m in done.ledger.members(done.id) if m.reason == ENDED}
    assert len(given_up) >= 6, "nobody is asked about it any more"
    assert {m.episode for m in done.ledger.members(done.id)} == {
        e.id for e in done.ledger.run_episodes(done.id)
    }
    more = make(tmp_path / "r", model_folder(), clock, resume=True, **options).finish()
    assert more.updates == 6
    assert {m.episode for m in more.ledger.members(more.id) if m.reason == ENDED} == given_up
    assert {m.episode for m in more.ledger.members(more.id)} == {
        e.id for e in more.ledger.run_episodes(more.id)
    }


class Service(turnwise.FeedbackSource):
    """A rating service in another process: it alone writes into the ledger, and the source hears
    nothing."""

    version = "1"

    def __init__(self) -> None:
        self.ledger: Any = None
        self.asked: list[turnwise.Request] = []

    def request(self, requests: Sequence[turnwise.Request]) -> None:
        self.asked += requests

    def receive(self) -> list[Any]:
        return []

    def waiting(self) -> str:
        return "3 raters active, about 20 minutes"

    def work(self, url: Path) -> None:
        """Two ratings, and the first of them corrected."""
        ledger = turnwise.Ledger(url)
        for request in self.asked[:2]:
            stamp = turnwise.Stamp(request=request.id, source="Service", rater="ann")
            ledger.add_feedback(
                [
                    turnwise.Feedback(
                        request.target,
                        score=len(self.asked) / 10,
                        id=f"s-{request.id}",
                        stamp=stamp,
                    )
                ]
            )
        self.asked = self.asked[2:]
        ledger.close()


class Listener:
    def __init__(self) -> None:
        self.told: list[str] = []

    @turnwise.hookimpl
    def feedback_received(self, run: Any, feedback: Any) -> None:
        self.told += [answer.id for answer in feedback]


@pytest.mark.parametrize("pending", [0, 12])
def test_listeners_hear_what_another_process_wrote(
    pending: int, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    clock, service, listener, notes = Clock(), Service(), Listener(), set()
    plugins = turnwise.Plugins({"listener": listener})
    run = make(
        tmp_path / "r",
        model_folder(),
        clock,
        feedback=[service, lambda e: 1.0],
        pending=pending,
        updates=3,
        plugins=plugins,
    )
    run.on_status = lambda status: notes.add(status.note)
    clock.meanwhile = lambda: service.work(tmp_path / "r" / "ledger.sqlite")
    run.finish()
    there = [
        f.id
        for number in (1, 2, 3)
        for m in run.ledger.members(run.id, number)
        for f in run.ledger.feedback(ids=m.feedback, late=True, corrected=True)
    ]
    assert set(there) <= set(listener.told)
    assert len(listener.told) == len(set(listener.told)), "each once"
    assert run.ledger.counts()["feedback"] - len(listener.told) <= 0
    assert "waiting for 4 ratings of 'Service' (3 raters active, about 20 minutes)" in notes


class Office(turnwise.FeedbackSource):
    """People who answer after two hours; during an outage they say that they could not."""

    version = "1"

    def __init__(self, outage: bool) -> None:
        self._outage = outage
        self._due: dict[str, tuple[float, turnwise.Request]] = {}

    def open(self, context: turnwise.Context) -> None:
        self._clock = context.clock

    def request(self, requests: Sequence[turnwise.Request]) -> None:
        self._due |= {r.id: (self._clock() + 2 * HOUR, r) for r in requests}

    def receive(self) -> list[turnwise.Feedback]:
        ready = [r for due, r in self._due.values() if due <= self._clock()]
        self._due = {k: v for k, v in self._due.items() if v[1] not in ready}
        stamp = lambda r: turnwise.Stamp(request=r.id)  # noqa: E731
        if self._outage and self._clock() > 1000 + 3 * HOUR:
            return [
                turnwise.Feedback.failed(r.target, "closed", id=f"o-{r.id}", stamp=stamp(r))
                for r in ready
            ]
        return [
            turnwise.Feedback(
                r.target, score=float(r.episodes[0].slot), id=f"p-{r.id}", stamp=stamp(r)
            )
            for r in ready
        ]


def test_an_outage_stops_the_run_and_is_asked_again(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    clock = Clock()
    going = make(tmp_path / "r", model_folder(), clock, feedback=[Office(True)], pending=12)
    with pytest.raises(turnwise.TooManyFailures, match="closed"):
        going.finish()
    assert 0 < going.updates < 6
    done = make(
        tmp_path / "r", model_folder(), clock, resume=True, feedback=[Office(False)], pending=12
    ).finish()
    assert done.updates == 6
    assert all(m.outcome is not None for m in done.ledger.members(done.id) if m.reason != ENDED)


def test_nobody_at_work_is_said(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    clock = Clock()
    run = make(
        tmp_path / "r",
        model_folder(),
        clock,
        feedback=[people(unanswered=1.0, deadline=HOUR)],
        pending=12,
    )
    clock.meanwhile = lambda: setattr(run, "stopping", clock.now > 1000 + 5 * HOUR)
    with pytest.warns(UserWarning, match="got no reward at all.*Are there raters at work"):
        run.finish()
    assert run.updates == 0


def test_a_combiner_learns_once_from_what_trains(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from turnwise.plugins.combiners.weighted import Weighted

    class Learns(Weighted):
        def __init__(self) -> None:
            super().__init__({"SimulatedPanel": 1.0})
            self.heard: list[str] = []

        def fit(self, feedback: Any) -> None:
            self.heard += [answer.id for answer in feedback]

        def state_dict(self) -> dict[str, Any]:
            return {"heard": self.heard}

        def load_state_dict(self, state: Any) -> None:
            self.heard = list(state["heard"])

    combiner = Learns()
    source = {"judge": SimulatedPanel(delay=HOUR, seed=1), "raters": 2}
    done = make(
        tmp_path / "r", model_folder(), Clock(), feedback=[source], combiner=combiner, pending=18
    ).finish()
    used = {id_ for m in done.ledger.members(done.id) for id_ in m.feedback}
    assert len(combiner.heard) == len(set(combiner.heard)) == 6 * 2 * 2
    assert set(combiner.heard) == used


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pending": 5}, "no room for a single round of play, which has groups \\* group_size = 6"),
        ({"pending": 24, "staleness": 2}, "room for 4 rounds.*give at most 18"),
        (
            {"pending": 12, "resample": 1},
            "resample replaces groups before an update.*raise `groups`",
        ),
        (
            {"pending": 12, "audit": {}},
            "an audit needs judges that answer at once.*leave `pending` out",
        ),
        ({"pending": 12, "credit": "branch"}, "'branch' needs judges that answer at once"),
        ({"staleness": 2}, "give `pending` too"),
        ({"pending": -1}, "pending"),
    ],
)
def test_pairings_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, turnwise.PluginError), match="(?s)" + message):
        make(tmp_path / "r", model_folder(), Clock(), **options)


# The panel's patience.


def request(seed: int, slot: int = 0) -> turnwise.Request:
    pair = tuple(
        conversation(
            str(i), heard="so", id=f"{seed}-{i}", env="e", seed=seed, reward=1.0, slot=i, **NO_RUN
        )
        for i in range(2)
    )
    return turnwise.Request("group", pair[0].group, "panel", slot, episodes=pair)


def test_the_panels_delays_are_exponential_and_survive_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    ledger = turnwise.Ledger(tmp_path / "ledger.sqlite", clock=clock)
    requests = [request(seed) for seed in range(400)]
    ledger.add_episodes([e for r in requests for e in r.episodes])
    ledger.add_requests(requests)

    def opened() -> SimulatedPanel:
        panel = SimulatedPanel(delay=HOUR, unanswered=0.1, seed=1)
        panel.open(turnwise.Context("panel", tmp_path, clock, 0, 0, ledger))
        panel.request(requests)
        return panel

    panel = opened()
    assert panel.receive() == []
    clock.now += HOUR
    early = panel.receive()
    assert len(early) / 360 == pytest.approx(1 - 2.718281828**-1, abs=0.08)
    # Asked again after a restart, an hour later: what was due is there, and the rest comes when it
    # would have.
    again = opened()
    assert {a.id for a in again.receive()} == {a.id for a in early}
    clock.now += 2 * HOUR
    late = panel.receive()
    assert late == again.receive()
    assert [a.target for a in late] != [
        r.target for r in requests if r.target in {a.target for a in late}
    ], "out of order"
    clock.now += 1000 * HOUR
    assert len(early) + len(late) + len(panel.receive()) == pytest.approx(360, abs=20)
    with pytest.raises(ValueError, match="unanswered lie between 0 and 1"):
        SimulatedPanel(unanswered=2.0)
    with pytest.raises(ValueError, match="open\\(context\\) first"):
        SimulatedPanel(delay=1.0).request(requests[:1])


# What staleness costs, where it can be counted out. The policy is a softmax over a few words; the
# conversations come from an older one.

NEW, STALE = (
    torch.tensor([0.9, -0.3, 0.2], dtype=torch.float64),
    torch.tensor([-0.4, 0.5, 0.1], dtype=torch.float64),
)
WORTH = torch.tensor([1.0, 0.0, 0.6], dtype=torch.float64)


class Tokens:
    """What a loss needs to know of a batch of tokens: all of them, in order."""

    row = torch.zeros(0, dtype=torch.long)

    @staticmethod
    def take(per_token: torch.Tensor) -> torch.Tensor:
        return per_token.flatten()


def loss_of(
    logprobs: torch.Tensor,
    stale: torch.Tensor,
    advantages: torch.Tensor,
    chance: torch.Tensor,
    cap: float | None,
) -> Any:
    """Our loss of conversations [E, A], each as often as the stale policy says it; cap None:
    without weights."""
    form = PolicyLoss(PolicyLossOptions(loss_mean="constant", divisor=1.0))
    prox = logprobs.detach()
    losses, _ = form.per_token(logprobs.flatten(), Tokens(), prox.flatten(), advantages)  # type: ignore[arg-type]
    weight = torch.ones_like(prox) if cap is None else importance_weight(prox, stale, cap)
    return (losses.view_as(prox) * weight * chance.unsqueeze(1)).sum()


def grouped_gradient(cap: float | None) -> torch.Tensor:
    """GRPO's expected ascent direction, over all groups of three one-word replies with
    leave-one-out advantages."""
    theta = NEW.clone().requires_grad_()
    logp, stale = theta.log_softmax(0), STALE.log_softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for said in itertools.product(range(3), repeat=3):
        index = torch.tensor(said)
        advantages = group_advantage(
            WORTH[index], torch.zeros(3, dtype=torch.long), "loo"
        ).unsqueeze(1)
        chance = stale[index].sum().exp().expand(3) / 3
        total = total + loss_of(
            logp[index].unsqueeze(1), stale[index].unsqueeze(1), advantages, chance, cap
        )
    return -torch.autograd.grad(total, theta)[0]


def test_one_token_the_weights_make_a_stale_policys_gradient_the_policys_own() -> None:
    new, stale = NEW.softmax(0), STALE.softmax(0)

    def by_hand(shares: torch.Tensor) -> torch.Tensor:
        """sum_a shares_a (R_a - b) grad log pi(a), with b the mean outcome of the others, who are
        stale; grad_k = [a = k] - pi_k."""
        advantage = WORTH - (stale * WORTH).sum()
        return shares * advantage - new * (shares * advantage).sum()

    true = new * (WORTH - (new * WORTH).sum())  # of E[R] by softmax calculus, no sampling anywhere
    ratio = new / stale
    assert float(ratio.max()) > 2, "a cap of 2 truncates something"
    assert torch.allclose(grouped_gradient(1e9), true, atol=1e-10, rtol=0)
    assert torch.allclose(grouped_gradient(None), by_hand(stale), atol=1e-10, rtol=0)
    assert torch.allclose(
        grouped_gradient(2.0), by_hand(stale * ratio.clamp(max=2.0)), atol=1e-10, rtol=0
    )
    # The bias of a cap is what it cuts off, (pi - c mu)+ of each word, and so less than that of no
    # weights at all.
    cut = (new - 2.0 * stale).clamp(min=0)
    assert torch.allclose(true - grouped_gradient(2.0), by_hand(cut), atol=1e-10, rtol=0)
    bias = [float((grouped_gradient(cap) - true).norm()) for cap in (1e9, 3.0, 2.0, 1.5)]
    assert bias == sorted(bias)
    assert bias[2] < float((grouped_gradient(None) - true).norm())


# Two words: the second depends on the first. tables: logits [3] of the first word, [3, 3] of the
# second after each first.
FIRST = (
    torch.tensor([0.8, -0.2, 0.1], dtype=torch.float64),
    torch.tensor([0.0, 0.3, -0.3], dtype=torch.float64),
)
SECOND = (
    torch.tensor([[0.5, -0.5, 0.0], [0.1, 0.9, -0.4], [-0.7, 0.2, 0.6]], dtype=torch.float64),
    torch.tensor([[-0.3, 0.4, 0.1], [0.6, 0.0, 0.2], [0.3, -0.1, -0.5]], dtype=torch.float64),
)
# The outcome of each two words.
PAIRS = torch.tensor([[1.0, 0.2, 0.0], [0.3, 0.9, 0.5], [0.1, 0.0, 0.7]], dtype=torch.float64)


def two_token_gradient(
    first: Any, second: Any, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our expected ascent direction for (new, stale) tables, over all nine replies, each token's
    advantage being the outcome."""
    a, b = first[0].clone().requires_grad_(), second[0].clone().requires_grad_()
    said = torch.tensor(list(itertools.product(range(3), repeat=2)))
    table = lambda x, y: torch.stack(  # noqa: E731
        [x.log_softmax(-1)[said[:, 0]], y.log_softmax(-1)[said[:, 0], said[:, 1]]], 1
    )
    stale = table(first[1], second[1])
    outcome = PAIRS[said[:, 0], said[:, 1]].unsqueeze(1).expand(-1, 2)
    total = loss_of(table(a, b), stale, outcome, stale.sum(1).exp(), cap)
    grad = torch.autograd.grad(total, (a, b))
    return -grad[0], -grad[1]


def expected(
    first_p: torch.Tensor,
    second_p: torch.Tensor,
    then: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
) -> Any:
    """By hand: sum_s d(s) sum_a p(a | s) Q(s, a) grad log pi(a | s) at both words.

    Args:
        first_p: shares of the first words in the gradient at the first word.
        second_p: [3, 3] shares of the pairs in the gradient at the second word.
        then: [3, 3] by whom the second word is said when the first is valued.
        first, second: the policy's own probabilities.
    """
    value = (then * PAIRS).sum(1)
    at_first = first_p * value - first * (first_p * value).sum()
    pair = second_p * PAIRS
    return at_first, pair - second * pair.sum(1, keepdim=True)


def test_two_tokens_what_the_weights_correct_and_what_they_leave() -> None:
    p, mu = (x.softmax(0) for x in FIRST)
    q, nu = (x.softmax(1) for x in SECOND)
    close = lambda ours, theirs: all(  # noqa: E731
        torch.allclose(x, y, atol=1e-10, rtol=0) for x, y in zip(ours, theirs, strict=True)
    )
    true = expected(p, p.unsqueeze(1) * q, q, p, q)
    # The policy moved at the second word only: there the weighted gradient is exact, whatever the
    # first word is.
    same = (FIRST[0], FIRST[0])
    assert torch.allclose(two_token_gradient(same, SECOND, 1e9)[1], true[1], atol=1e-10, rtol=0)
    assert not torch.allclose(two_token_gradient(same, SECOND, None)[1], true[1], atol=1e-2, rtol=0)
    # It moved at the first word only: there it is exact too.
    assert torch.allclose(
        two_token_gradient(FIRST, (SECOND[0], SECOND[0]), 1e9)[0], true[0], atol=1e-10, rtol=0
    )
    assert not torch.allclose(
        two_token_gradient(FIRST, (SECOND[0], SECOND[0]), None)[0], true[0], atol=1e-2, rtol=0
    )
    # It moved at both. Each word is chosen as the policy would, but after words of the old policy,
    # and valued by how that went on.
    ours = two_token_gradient(FIRST, SECOND, 1e9)
    assert close(ours, expected(p, mu.unsqueeze(1) * q, nu, p, q))
    assert not close(ours, true)
    # Without weights the choice itself is the old policy's; and with a cap of 1.2, the part of it
    # that the cap lets through.
    assert close(
        two_token_gradient(FIRST, SECOND, None), expected(mu, mu.unsqueeze(1) * nu, nu, p, q)
    )
    some = expected((mu * 1.2).minimum(p), mu.unsqueeze(1) * (nu * 1.2).minimum(q), nu, p, q)
    assert close(two_token_gradient(FIRST, SECOND, 1.2), some)
    # On-policy all of them are the same.
    fresh = (FIRST[0], FIRST[0]), (SECOND[0], SECOND[0])
    assert close(two_token_gradient(*fresh, 1.2), true)
    assert close(two_token_gradient(*fresh, None), true)


def test_lockstep_has_none_of_it(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        done = make(
            tmp_path / "r", model_folder(), Clock(), updates=2, feedback=[people()]
        ).finish()
    assert not {"pending", "too_old", "staleness/mean", "seconds/waited"} & set(done.metrics[0])


def test_a_correction_that_comes_after_training_is_kept_and_stops_nothing(
    ledger: turnwise.Ledger,
) -> None:
    """A source of anybody's cannot know what has trained; it repeats itself until heard."""

    class Corrects(turnwise.FeedbackSource):
        version = "1"
        answers: ClassVar[list[turnwise.Feedback]] = []

        def request(self, requests: Sequence[turnwise.Request]) -> None:
            pass

        def receive(self) -> list[turnwise.Feedback]:
            return self.answers

    played = [conversation("a", id=f"e{i}", slot=i) for i in range(2)]
    group = played[0].group
    ledger.add_episodes(played)
    sources = Sources.make([[Corrects()]], turnwise.Plugins(), 1.0)
    first = [turnwise.Feedback(e.id, score=0.0, id=f"first-{e.id}") for e in played]
    in_time = turnwise.Feedback("e0", score=0.5, id="in-time", supersedes="first-e0")
    Corrects.answers = [*first, in_time]
    sources.receive(ledger)
    used = ("in-time", "first-e1")
    members = [Member(e.id, group, True, outcome=0.5, feedback=used) for e in played]
    ledger.add_members("run", 1, members)
    late = turnwise.Feedback("e1", score=1.0, id="late", supersedes="first-e1")
    Corrects.answers = [*first, in_time, late]
    for _ in range(2):
        sources.receive(ledger)
    assert [a.id for a in ledger.feedback([group])] == ["first-e1", "in-time"]
    [kept] = [a for a in ledger.feedback([group], late=True) if a.id == "late"]
    assert kept.supersedes is None
    Corrects.answers = [dataclasses.replace(late, score=0.7)]
    with pytest.raises(turnwise.LedgerError, match="other content"):
        sources.receive(ledger)
