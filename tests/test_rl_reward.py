"""What keeps RL honest: adaptive KL, clipped and whitened rewards, early stopping on a gold
measure; trackers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
import turnwise
from hypothesis import given
from hypothesis import strategies as st
from support.echo import play
from turnwise.engine.policy.batching import make_batch
from turnwise.engine.records.rewards import clipped
from turnwise.engine.stages.rl.early_stopping import BestSoFar
from turnwise.plugins.optimizers.kl import KL, KLOptions


class Breaks(gymnasium.Env):
    """Lasts a turn; breaks where it is told to."""

    observation_space = action_space = turnwise.Text(1000)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.broken = bool(options and options.get("break"))
        return "hello", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.broken:
            raise RuntimeError("broken")
        return "bye", -1.0, True, False, {}


gymnasium.register("test/Breaks-v0", Breaks)


def run(folder: Path, model: Path, *, resume: bool = False, **rl: Any) -> turnwise.Run:
    stage = {
        "env": "test/Echo-v0",
        "updates": 3,
        "groups": 3,
        "group_size": 4,
        "max_new_tokens": 6,
        "poll": 0.0,
        **rl,
    }
    return turnwise.Run(
        {"policy": str(model), "threads": 1, "stages": [{"rl": stage}]},
        folder=folder,
        resume=resume,
    )


def test_the_adaptive_controller_by_hand(policy: turnwise.Policy) -> None:
    """Ziegler et al.: the coefficient moves by gain * clip(KL / target - 1, -0.2, 0.2)."""
    episodes = play(policy, 3)
    batch = make_batch(episodes, [turnwise.Rewards(0.0, (0.0,) * 3) for _ in episodes])
    apart = 0.01 * float(batch.mask.sum(1).float().mean())
    for target, factor in ((apart / 10, 1.02), (apart * 10, 0.98), (apart / 1.1, 1.01)):
        kl = KL(KLOptions(kl=0.5, kl_target=target))
        policy.freeze_reference()
        kl.prepare(policy, batch, 8192)
        kl._measured = {"kl": 0.01, "kl_episode": apart}
        found = kl.measure()
        assert found["kl_episode"] == pytest.approx(apart, rel=1e-3)
        assert found["kl"] == pytest.approx(0.01, rel=1e-3)
        assert found["kl_coef"] == 0.5, "what this update was made with"
        assert kl.coef == pytest.approx(0.5 * factor, rel=1e-3)
    fixed = KL(KLOptions(kl=0.5))
    fixed.prepare(policy, batch, 8192)
    assert fixed.measure()["kl_episode"] == pytest.approx(0.0, abs=1e-4), (
        "reference and policy are one"
    )
    assert fixed.coef == 0.5
    with pytest.raises(ValueError, match="kl_target needs kl to be positive"):
        KLOptions(kl_target=1.0)
    with pytest.raises(ValueError, match="leave kl at 0"):
        KLOptions(kl=0.1, kl_place="measure")


@pytest.mark.slow
def test_the_coefficient_holds_the_kl_near_its_target(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def letters(episode: turnwise.Episode) -> float:
        return sum(t.action.count("e") for t in episode.turns) / 10

    def last(folder: str, **options: Any) -> float:
        optimizer = {"name": "ppo", "lr": 1e-2, "warmup": 2, **options}
        done = run(
            tmp_path / folder,
            model_folder(),
            updates=25,
            groups=8,
            feedback=[letters],
            optimizer=optimizer,
        ).finish()
        return sum(m["kl_episode"] for m in done.metrics[-5:]) / 5

    free = last("free", kl_place="measure")
    held = last("held", kl=1.0, kl_target=0.1)
    assert held < free / 2, (held, free)


def test_measuring_the_kl_changes_nothing(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [
        run(tmp_path / name, model_folder(), optimizer={"name": "ppo", "lr": 1e-3, **more}).finish()
        for name, more in (("without", {}), ("with", {"kl_place": "measure"}))
    ]
    assert "kl_episode" in runs[1].metrics[-1]
    assert "kl_episode" not in runs[0].metrics[-1]
    weights = [torch.cat([p.flatten() for p in r.policy.parameters()]) for r in runs]
    assert torch.equal(*weights)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=5), st.floats(0.1, 5))
def test_clipped_rewards_still_sum_to_their_outcome(turns: list[float], limit: float) -> None:
    before = turnwise.Rewards(sum(turns), tuple(turns))
    after = clipped(before, limit)
    assert after.outcome == min(max(before.outcome, -limit), limit)
    assert after.turns[:-1] == before.turns[:-1]


def test_clip_and_whitening_reach_the_update(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    seen: list[Any] = []

    class Looks(turnwise.Optimizer):
        consumes, provides = frozenset({"advantages"}), frozenset()
        setup = prepare = lambda self, *a: None

        def update(self, policy: Any, batch: Any) -> dict[str, float]:
            seen.append((batch.outcome.clone(), batch.turn_rewards.sum(1)))
            return {}

    def big(episode: turnwise.Episode) -> float:
        return 100.0 * episode.slot

    done = run(
        tmp_path / "clip",
        model_folder(),
        feedback=[big],
        optimizer=Looks(),
        reward_clip=150.0,
        updates=1,
    ).finish()
    assert sorted(set(seen[-1][0].tolist())) == [0.0, 100.0, 150.0]
    assert {m.outcome for m in done.ledger.members(done.id)} == {
        0.0,
        100.0,
        150.0,
    }, "what the ledger says is what trained"
    run(
        tmp_path / "white",
        model_folder(),
        feedback=[big],
        optimizer=Looks(),
        reward_whiten=True,
        updates=1,
    ).finish()
    outcome, turns = seen[-1]
    assert float(outcome.std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert float(outcome.mean()) > 1, "the mean is not taken away"
    assert torch.allclose(outcome, turns, atol=1e-5)


def test_best_so_far(policy: turnwise.Policy) -> None:
    best = BestSoFar(policy)
    before = [p.detach().clone() for p in policy.parameters()]
    best.record(0.5, 1)
    for parameter in policy.parameters():
        parameter.data += 1.0
    best.record(0.4, 2)
    best.record(0.5, 3)
    assert (best.value, best.update, best.waited) == (0.5, 1, 2), "as good is not better"
    again = BestSoFar(policy)
    again.load_state_dict(best.state_dict())
    again.put_back()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert (again.value, again.update, again.waited) == (0.5, 1, 2)
    fresh = BestSoFar(policy)
    fresh.load_state_dict(BestSoFar(policy).state_dict())
    assert fresh.value == float("-inf")


def test_a_reward_that_is_gamed_is_stopped_by_the_gold_measure(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The proxy pays against the truth; the stage ends early, and with the policy that was best in
    truth."""

    def against(episode: turnwise.Episode) -> float:
        return -20.0 * episode.env_return

    gold = {"episodes": 40, "every": 2, "patience": 2}
    options = {
        "groups": 12,
        "feedback": [against],
        "optimizer": {"name": "grpo", "lr": 1e-2, "warmup": 1},
        "gold": gold,
    }
    done = run(tmp_path / "r", model_folder(), updates=30, **options).finish()
    made = len(done.metrics)
    assert made < 30
    golds = {m["update"]: m["gold/return"] for m in done.metrics if "gold/return" in m}
    assert list(golds)[:3] == [1, 2, 4], "the start is measured in the first update"
    assert done.metrics[-1]["gold/return"] < done.metrics[0]["gold/return"], "it was getting worse"
    kept = done.metrics[-1]["gold/kept_update"]
    best = max(golds.values())
    assert golds[int(kept) or 1] == best
    if kept == 0:
        start = turnwise.Policy.from_pretrained(model_folder())
        assert all(
            torch.equal(a, b)
            for a, b in zip(start.parameters(), done.policy.parameters(), strict=True)
        )
    assert [
        u.number for u in run(tmp_path / "r", model_folder(), updates=30, resume=True, **options)
    ] == [], "it stays stopped"


def test_metrics_reach_tensorboard(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage = {
        "env": "test/Echo-v0",
        "updates": 3,
        "groups": 2,
        "group_size": 2,
        "max_new_tokens": 4,
        "poll": 0.0,
    }
    config = {
        "policy": str(model_folder()),
        "threads": 1,
        "name": "traced",
        "trackers": ["tensorboard"],
        "stages": [{"rl": stage}],
    }
    done = turnwise.Run(config, folder=tmp_path / "r").finish()
    events = EventAccumulator(str(tmp_path / "r" / "tracking" / "traced"))
    events.Reload()
    points = events.Scalars("rl/outcome")
    assert [p.step for p in points] == [1, 2, 3]
    assert [p.value for p in points] == pytest.approx(
        [m["outcome"] for m in done.metrics], abs=1e-6
    )
    with pytest.raises(turnwise.ConfigError, match="Did you mean 'tensorboard'"):
        turnwise.Run({**config, "trackers": ["tensorbord"]}, folder=tmp_path / "s")
    with pytest.raises(turnwise.ConfigError, match="'wandb' is not installed: pip install wandb"):
        turnwise.Run({**config, "trackers": ["wandb"]}, folder=tmp_path / "s")


def test_equal_outcomes_are_not_blown_up_by_whitening(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    options = {
        "feedback": [lambda e: 0.1],
        "optimizer": {"name": "ppo", "lr": 1e-3},
        "reward_whiten": True,
        "updates": 1,
    }
    done = run(tmp_path / "r", model_folder(), **options).finish()
    assert done.metrics[-1]["value_loss"] < 1.0


def test_a_gold_measure_that_cannot_be_played_is_no_number(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    gold = {"episodes": 4, "options": {"break": True}}
    with pytest.raises(turnwise.TooManyFailures, match="of 4 episodes failed"):
        run(tmp_path / "r", model_folder(), env="test/Breaks-v0", gold=gold, updates=2).finish()


def test_gold_without_patience_only_measures(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"optimizer": {"name": "grpo", "lr": 1e-2}, "updates": 3}
    plain = run(tmp_path / "plain", model_folder(), **options).finish()
    watched = run(
        tmp_path / "watched",
        model_folder(),
        gold={"episodes": 3, "every": 1, "patience": None},
        **options,
    ).finish()
    assert all("gold/return" in m for m in watched.metrics)
    weights = [torch.cat([p.flatten() for p in r.policy.parameters()]) for r in (plain, watched)]
    assert torch.equal(*weights), "the last policy is kept, and measuring changes nothing"


def test_a_report_on_a_shared_ledger_is_of_its_own_run(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from turnwise.engine.report.page import write_report

    shared = f"sqlite:///{tmp_path / 'team.sqlite'}"
    for name, groups in (("a", 2), ("b", 5)):
        stage = {
            "env": "test/Echo-v0",
            "updates": 1,
            "groups": groups,
            "group_size": 2,
            "max_new_tokens": 4,
            "poll": 0.0,
        }
        config = {
            "policy": str(model_folder()),
            "threads": 1,
            "name": name,
            "ledger": shared,
            "stages": [{"rl": stage}],
        }
        turnwise.Run(config, folder=tmp_path / name).finish()
    assert "· 4 episodes" in write_report(tmp_path / "a").read_text()
    assert "· 10 episodes" in write_report(tmp_path / "b").read_text()
