"""Numbers at the edges: groups without signal, weights of zero, rounding, the rate that was used,
successes, and updates that taught nothing."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
import turnwise
import yaml
from support.echo import ECHO, play
from support.episodes import conversation
from test_optimizers import close, credited, flat_gradient, gradient_of, moved, token_logprobs
from turnwise.engine.analysis.scores import score
from turnwise.engine.policy.batching import make_batch
from turnwise.engine.records.batch import Pairs
from turnwise.engine.stages.rl.metrics import play_metrics
from turnwise.engine.tensors import group_advantage, turn_advantages
from turnwise.plugins.credit.counterfactual import Counterfactual
from turnwise.plugins.credit.judged import against_other_conversations
from turnwise.plugins.credit.turn_returns import against_others
from turnwise.plugins.optimizers.dpo import DPO
from turnwise.plugins.optimizers.grpo import GRPO
from turnwise.plugins.optimizers.kto import KTO
from turnwise.plugins.optimizers.ppo import PPO
from turnwise.plugins.optimizers.rejection import Rejection, best_of_groups
from typer.testing import CliRunner

DOCS = Path(__file__).parent.parent / "docs"


def weights(policy: turnwise.Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in policy.parameters()])


# Groups without signal.


def half_silent(policy: turnwise.Policy) -> turnwise.Batch:
    """Two groups of two, the second without signal."""
    batch = credited(play(policy, 2, group=2, tokens=5))
    assert batch.credit is not None
    batch.signal = batch.group == 0
    batch.credit = dataclasses.replace(
        batch.credit, advantages=batch.credit.advantages * batch.signal.unsqueeze(1)
    )
    return batch


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_they_count_in_the_mean_and_keep_their_kl(
    mean: Any, kl: float, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder())
    batch = half_silent(policy)
    optimizer = GRPO(
        loss_mean=mean, divisor=9.0 if mean == "constant" else None, kl=kl, micro_tokens=64
    )
    optimizer.setup(policy)
    moved(policy)
    optimizer.prepare(policy, batch)
    ours, metrics = gradient_of(policy, optimizer, batch)

    own, mask = token_logprobs(policy, batch), batch.mask
    assert batch.credit is not None
    assert batch.behaviour_logprobs is not None
    # The policy moved since they were played.
    stale = (own.detach() - batch.behaviour_logprobs).exp().clamp(max=2.0)
    loss = -(own - own.detach()).exp() * batch.credit.advantages * stale
    if kl:
        assert batch.reference_logprobs is not None
        apart = batch.reference_logprobs - own
        loss = loss + kl * (apart.exp() - 1 - apart)
    share = batch.weight.unsqueeze(1) * mask
    if mean == "sequence":
        share = share / mask.sum(1, keepdim=True)
    # All four conversations.
    total = batch.weight.sum() * 9.0 if mean == "constant" else share.sum()
    close(ours, flat_gradient(policy, (loss * share).sum() / total))
    assert metrics["steps"] == 1


def test_a_batch_without_any_signal_is_held_to_the_reference_all_the_same(
    model_folder: Callable[..., Path],
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder())
    episodes = play(policy, 2, group=2, tokens=5)
    for options, steps in (
        ({"kl": 0.5}, 1),
        ({"kl": 0.5, "kl_place": "reward"}, 0),
        ({"kl_place": "measure"}, 0),
        ({}, 0),
    ):
        batch = credited(episodes)
        assert batch.credit is not None
        batch.signal = torch.zeros(4, dtype=torch.bool)
        batch.credit = dataclasses.replace(batch.credit, advantages=batch.credit.advantages * 0)
        target = {"kl_target": 0.01} if options.get("kl") else {}
        optimizer = GRPO(lr=1e-3, warmup=0, **options, **target)
        optimizer.setup(policy)
        moved(policy, 1 + steps)
        before = weights(policy)
        optimizer.prepare(policy, batch)
        metrics = optimizer.update(policy, batch)
        assert metrics["steps"] == steps
        assert torch.equal(before, weights(policy)) == (steps == 0)
        assert ("kl" in metrics) == bool(options), "how far it moved is measured, whatever trained"
        if target:
            assert optimizer._kl.coef != 0.5, "the coefficient follows what was measured"


def test_the_first_update_of_equal_outcomes_moves_nothing(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Policy and reference are one: a penalty would be rounding, and Adam makes a whole step of
    it."""
    for place in ("reward", "loss"):
        stage = {
            "env": ECHO, "updates": 1, "groups": 3, "group_size": 4, "max_new_tokens": 24,
            "poll": 0.0,
            "feedback": [lambda episode: 0.7], "credit": {"name": "outcome", "baseline": "loo"},
            "optimizer": {"name": "grpo", "lr": 1e-3, "warmup": 0, "kl": 0.5, "kl_place": place,
                "micro_tokens": 300},
        }  # fmt: skip
        config = {"policy": str(model_folder()), "threads": 1, "stages": [{"rl": stage}]}
        before = weights(turnwise.Policy.from_pretrained(model_folder()))
        done = turnwise.Run(config, folder=tmp_path / place).finish()
        assert done.metrics[0]["groups_without_signal"] == 3
        assert done.metrics[0]["kl"] == 0
        assert torch.equal(before, weights(done.policy))


# Weights of zero, and the rate that was used.


@pytest.mark.parametrize("kind", [GRPO, PPO, Rejection])
def test_minibatches_without_weight_are_passed_over(
    kind: Any, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder())
    episodes = play(policy, 2, group=2, tokens=5)
    for worth, steps in ((torch.tensor([0.0, 1.0, 0.0, 1.0]), 2), (torch.zeros(4), 0)):
        batch = credited(episodes)
        batch.weight, batch.outcome = worth, torch.tensor([1.0, 1.5, 1.0, 1.5])
        optimizer = kind(lr=1e-2, warmup=10, epochs=1, minibatches=4)
        optimizer.setup(policy)
        before = weights(policy)
        optimizer.prepare(policy, batch)
        metrics = optimizer.update(policy, batch)
        assert metrics["steps"] == steps
        assert torch.equal(before, weights(policy)) == (steps == 0)
        assert all(value == value for value in metrics.values())
        assert metrics.get("lr") == (pytest.approx(1e-2 * steps / 10) if steps else None), (
            "the rate of the last step"
        )


@pytest.mark.parametrize("kind", [DPO, KTO])
def test_comparisons_and_labels_without_weight_are_passed_over(
    kind: Any, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder())
    episodes = play(policy, 2, group=2, tokens=5)
    for worth, steps in (([0.0, 1.0], 1), ([0.0, 0.0], 0)):
        batch = credited(episodes)
        number = torch.tensor([1.0, 1.0])
        batch.pairs = Pairs(
            torch.tensor([0, 2]), torch.tensor([1, 3]), number, number, torch.tensor(worth)
        )
        batch.labels, batch.weight = (
            torch.tensor([1.0, 0.0, 1.0, 0.0]),
            torch.tensor([*worth, 0.0, 0.0]),
        )
        optimizer = kind(lr=1e-2, warmup=10, minibatches=2)
        optimizer.setup(policy)
        before = weights(policy)
        optimizer.prepare(policy, batch)
        metrics = optimizer.update(policy, batch)
        assert metrics["steps"] == steps
        assert torch.equal(before, weights(policy)) == (steps == 0)
        assert all(value == value for value in metrics.values())
        assert metrics.get("lr") == (pytest.approx(1e-3) if steps else None)


# What is equal.


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e6, 1e20])
@pytest.mark.parametrize("offset", [0.0, 1e6, -1e6])
def test_outcomes_differ_whatever_their_offset_and_their_unit(scale: float, offset: float) -> None:
    outcome = scale * (torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64) + offset).float().double()
    group = torch.zeros(3, dtype=torch.long)
    assert group_advantage(outcome, group, "mean").tolist() == pytest.approx(
        [-0.5 * scale, 0.0, 0.5 * scale], rel=1e-3
    )
    assert best_of_groups(outcome, group, 1) == [2]
    returns = outcome.unsqueeze(1)
    mask = torch.ones(3, 1, dtype=torch.bool)
    assert against_others(returns, mask, group)[2, 0] == pytest.approx(0.75 * scale, rel=1e-3)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1e-8 / 3, 1e6 / 3, 1e30 / 7])
def test_equal_numbers_have_no_advantage_under_any_method(value: float) -> None:
    """Three ways to the same number, which float32 rounds apart."""
    outcome = torch.tensor([value, value * (1 + 1e-7), value * 3 / 3])
    group, mask = torch.zeros(3, dtype=torch.long), torch.ones(3, 2, dtype=torch.bool)
    for baseline in ("mean", "loo", "std"):
        assert not group_advantage(outcome, group, baseline).any()
    scores = torch.stack([outcome, outcome], 1)
    assert not against_other_conversations(scores, group).any()
    assert not against_others(scores, mask, group).any()
    assert not turn_advantages(scores.flip(0), outcome, mask).any()
    assert best_of_groups(outcome, group, 1) == []


def test_small_rewards_beside_large_ones_are_kept() -> None:
    """Groups of different environments: the unit of one says nothing of the other's."""
    outcome, group = torch.tensor([0.0, 0.1, 1e9, 2e9]), torch.tensor([0, 0, 1, 1])
    assert group_advantage(outcome, group, "mean").tolist() == pytest.approx(
        [-0.05, 0.05, -5e8, 5e8]
    )
    assert not group_advantage(
        torch.tensor([0.1 + 0.2 - 0.3, 0.0]).double(), torch.tensor([0, 0]), "std"
    ).any()


def test_counterfactual_credit_is_no_rounding(model_folder: Callable[..., Path]) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder())
    batch = credited(play(policy, 1, group=2, tokens=4))
    batch.outcome = torch.full((2,), 0.1)
    batch.branch_values = torch.where(batch.turn_mask, torch.tensor(sum([0.1] * 7) / 7), torch.nan)
    assert not Counterfactual().assign(batch).advantages.any()


def test_rewards_sum_relative_to_what_is_added() -> None:
    turnwise.Rewards(0.25, (1e9, -1e9 + 0.25))
    with pytest.raises(ValueError, match="turn rewards sum"):
        turnwise.Rewards(0.0, (1e-7,))


# States are what was sampled.


def test_replies_that_read_alike_are_other_states() -> None:
    a, b, c = (
        conversation("yes", "yes", id=name, action_ids=ids, logprobs=(-1.0,) * len(ids))
        for name, ids in (("a", (5, 6)), ("b", (7,)), ("c", (5, 6)))
    )
    assert a.state(0) == b.state(0)
    assert a.state(1) != b.state(1)
    assert a.state(1) == c.state(1)


# One rule for success.


class Quiet(gymnasium.Env):
    """Says that it succeeded only when it gets there; every other start never does."""

    observation_space = action_space = turnwise.Text(1000)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.long = bool(self.np_random.random() < 0.5)
        return "go", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return (
            ("on", 0.0, False, False, {})
            if self.long
            else ("done", 1.0, True, False, {"success": True})
        )


gymnasium.register("test/Quiet-v0", Quiet)


def test_training_and_evaluation_count_the_same_successes() -> None:
    from turnwise.engine.environments.registry import starts
    from turnwise.engine.rollout.players import ScriptPlayer
    from turnwise.engine.rollout.rollout import rollout

    episodes = rollout(
        ScriptPlayer(lambda messages: "x"),
        [(s, 0) for s in starts("test/Quiet-v0", 0, 40)],
        max_turns=3,
    )
    arrived = sum(e.ending == "terminated" for e in episodes) / 40
    assert 0.2 < arrived < 0.8
    assert play_metrics(episodes, {})["success"] == score(episodes).success == arrived
    cut = next(e for e in episodes if e.ending == "truncated")
    assert (cut.success, cut.succeeded) == (None, False)


# Updates that teach nothing say so.


def pipeline(folder: Path, model: str, module: str, **rl: Any) -> Path:
    stage = {
        "env": ECHO, "updates": 2, "groups": 2, "group_size": 2, "max_new_tokens": 4, "poll": 0.0,
        "feedback": [{"judge": f"{module}:judge"}], **rl,
    }  # fmt: skip
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"policy": model, "threads": 1, "stages": [{"rl": stage}]}))
    return path


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (
            lambda episode: 1.0,
            "in groups whose members all did equally well. The reward was 1 in every update",
        ),
        (lambda episode: None, "without a reward. Look at why"),
    ],
)
def test_a_run_that_taught_nothing_does_not_end_like_one_that_did(
    says: Any,
    reason: str,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from turnwise.engine.cli.main import app
    from turnwise.engine.report.page import write_report

    module = types.ModuleType("says_nothing")
    module.judge = says  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "says_nothing", module)
    path = pipeline(tmp_path, str(model_folder()), "says_nothing")
    with pytest.warns(
        UserWarning, match="rl: this update taught the policy nothing: of 4 conversations"
    ):
        found = CliRunner().invoke(
            app, ["run", str(path), "--folder", str(tmp_path / "r")], obj=turnwise.Plugins()
        )
    assert found.exit_code == 4
    assert "trained on nothing" in found.stdout
    assert "Nothing learned after update 2" in found.stdout
    assert f"of 8 conversations, 8 were {reason}" in found.stdout
    assert "Finished" not in found.stdout
    page = write_report(tmp_path / "r").read_text()
    assert "rl taught the policy nothing:" in page
    assert "<h2>Credit</h2>" not in page, "there is none to show"


def test_a_run_that_learned_ends_as_ever(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turnwise.engine.cli.main import app

    module = types.ModuleType("says_much")
    module.judge = lambda episode: float(episode.slot)  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "says_much", module)
    path = pipeline(tmp_path, str(model_folder()), "says_much")
    found = CliRunner().invoke(
        app, ["run", str(path), "--folder", str(tmp_path / "r")], obj=turnwise.Plugins()
    )
    assert found.exit_code == 0, found.output
    assert "Finished after update 2" in found.stdout
    assert "taught the policy nothing" not in found.output


# What is refused before anything is loaded, with the name that is meant.


@pytest.mark.parametrize(
    ("rl", "said"),
    [
        (
            {"optimizer": {"name": "grpo", "lr": -1e-3}},
            "grpo.lr: Input should be greater than or equal to 0 (got -0.001)",
        ),
        (
            {"optimizer": {"name": "ppo", "lr": "fast"}},
            "ppo.lr: Input should be a valid number, unable to parse string as a number",
        ),
        (
            {"optimizer": {"name": "grpo", "lr": float("nan")}},
            "optimizer.lr must be a finite number",
        ),
        (
            {"optimizer": {"name": "grpo", "epochs": True}},
            "grpo.epochs: must be a number",
        ),
        (
            {"optimizer": {"name": "rejection", "lr": True}},
            "rejection.lr: must be a number",
        ),
        (
            {"optimizer": {"name": "grpo", "epochs": 0}},
            "grpo.epochs: Input should be greater than or equal to 1 (got 0)",
        ),
        (
            {"optimizer": {"name": "grpo", "minibatches": 1.5}},
            "grpo.minibatches: Input should be a valid integer",
        ),
        (
            {"optimizer": {"name": "grpo", "warmup": -1}},
            "grpo.warmup: Input should be greater than or equal to 0",
        ),
        (
            {"credit": {"name": "turn-returns", "gamma": "x"}},
            "turn-returns.gamma: Input should be a",
        ),
        (
            {"learning_rate": 1e-3},
            "an option of the optimizer, called 'lr': `optimizer: {name: ..., lr: ...}`",
        ),
        ({"lr": 1e-3}, "an option of the optimizer, called 'lr'"),
        ({"beta": 0.1}, "an option of the optimizer, called 'kl'"),
        ({"num_generations": 8}, "Here it is called 'group_size'"),
        ({"gamma": 0.9}, "an option of the credit, called 'gamma'"),
        ({"optimizer": {"name": "grpo", "learning_rate": 1e-3}}, "Here it is called 'lr'"),
        ({"optimizer": {"name": "grpo", "beta": 0.1}}, "Here it is called 'kl'"),
        ({"optimizer": {"name": "ppo", "kl_coef": 0.1}}, "Here it is called 'kl'"),
        (
            {"optimizer": {"name": "grpo", "num_generations": 4}},
            "an option of the stage, called 'group_size'",
        ),
        ({"optimizer": {"name": "grpo", "cliprnge": 4}}, "Did you mean 'clip"),
        (
            {"optimizer": {"name": "ppo", "lam": 0.9}},
            "an option of the credit method, called 'lam'",
        ),
        ({"train_dataset": []}, "`env: {id: turnwise/Prompts-v0"),
        ({"reward_weights": [1.0]}, "a source has its own weight"),
        ({"per_device_train_batch_size": 8}, "an update has `groups` starts of `group_size`"),
        ({"output_dir": "out"}, "it is the run's `folder`"),
        ({"trackers": ["wandb"]}, "they are a pipeline's, next to `policy`"),
        ({"optimizer": {"name": "grpo", "bf16": True}}, "`policy: {model: ..., precision: bf16}`"),
    ],
)
def test_wrong_numbers_and_other_libraries_names(rl: dict[str, Any], said: str) -> None:
    with pytest.raises((turnwise.ConfigError, turnwise.PluginError), match=re.escape(said)):
        turnwise.Run(
            {"policy": "nowhere", "stages": [{"rl": {"env": ECHO, **rl}}]},
            folder="/nonexistent/run",
        )


# The pages' credit methods.


def test_the_credit_methods_of_the_pages_compare_within_their_start(
    model_folder: Callable[..., Path],
) -> None:
    """Two groups, one of an easy start: nobody is credited for how easy it was."""
    policy = turnwise.Policy.from_pretrained(model_folder())
    episodes = play(policy, 2, group=2, tokens=4)
    rewards = lambda outcomes: [  # noqa: E731
        turnwise.Rewards(r, (*([0.0] * (len(e.turns) - 1)), r))
        for e, r in zip(episodes, outcomes, strict=True)
    ]
    for page, name in (("plugins.md", "LastTurnOnly"), ("writing-an-optimizer.md", "LastWord")):
        [code] = [
            c
            for c in re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)
            if f"class {name}" in c
        ]
        where: dict[str, Any] = {}
        exec(code, where)
        groups = make_batch(episodes, rewards([1.0, 1.0, 0.0, 0.0])).group.tolist()
        easy = [1.0 if g == 0 else 0.0 for g in groups]
        assert not where[name]().assign(make_batch(episodes, rewards(easy))).advantages.any()
        first = [groups.index(0) == e for e in range(4)]
        credit = where[name]().assign(make_batch(episodes, rewards([float(f) for f in first])))
        assert float(credit.turn_credit[first.index(True)].max()) > 0
        assert not credit.advantages[[g == 1 for g in groups]].any()
