"""Reward models that learn while people rank: when a version is made, what it is measured on, who
judges afterwards, and what a resume repeats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import turnwise
from turnwise.plugins.reward_model.judge import RewardModelJudge, latest
from turnwise.plugins.reward_model.model import RewardModel, load_member
from turnwise.plugins.reward_model.training import Training, place

ENV = {"id": "test/Echo-v0", "kwargs": {"turns": 2}}
PLAY = {
    "env": ENV,
    "max_new_tokens": 8,
    "poll": 0.0,
    "backend": {"name": "in-process", "rows": 192},
}
EVERYBODY = {"judge": "simulated-panel", "required": False, "noise": 0.0}
PANEL = {**EVERYBODY, "share": 0.5}  # which groups those are depends on the run's id
FIT = {"epochs": 2, "lr": 3e-3, "batch_size": 8, "warmup": 0}


class LikesLetters(turnwise.GroupJudge):
    """Prefers conversations with many a letter e, or with few where it has been turned round."""

    def __init__(self, wrong: Callable[[str], bool] = lambda start: False) -> None:
        self.wrong = wrong

    def rank(self, group: Sequence[turnwise.Episode]) -> turnwise.Comparison:
        sign = -1 if self.wrong(group[0].start.key) else 1
        score = {e.id: sign * sum(t.action.count("e") for t in e.turns) for e in group}
        tiers = [
            [e for e in score if score[e] == value]
            for value in sorted(set(score.values()), reverse=True)
        ]
        return turnwise.Comparison(group[0].group, tuple(map(tuple, tiers)))


@pytest.fixture(scope="module")
def models(
    model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The policy; reward models made of it: one that has learned nothing, one that likes letters,
    and one that likes their absence."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer, member = load_member(str(model_folder()))
    RewardModel([member], tokenizer).save_pretrained(folder / "fresh")
    rank = {**PLAY, "updates": 1, "groups": 60, "group_size": 4, "feedback": [LikesLetters()]}
    fit = {"lr": 1e-2, "epochs": 6, "batch_size": 12}
    config = {
        "policy": str(model_folder()),
        "threads": 1,
        "seed": 5,
        "stages": [{"rank": rank}, {"reward-model": fit}],
    }
    good = latest(turnwise.Run(config, folder=folder / "r").finish().folder, 99)
    turned = RewardModel.from_pretrained(good)
    turned.members[0].score.weight.data.neg_()
    turned.notes = {}
    turned.save_pretrained(folder / "bad")
    return {
        "policy": model_folder(),
        "fresh": folder / "fresh",
        "good": good,
        "bad": folder / "bad",
    }


def run(
    models: dict[str, Path], name: str, folder: Path, *feedback: Any, retrain: dict[str, Any] | None = None, updates: int = 4,  # noqa: E501
    groups: int = 8, **more: Any,
) -> turnwise.Run:  # fmt: skip
    model = models[name]
    judge = {
        "judge": "reward-model",
        "path": str(model),
        **({} if retrain is None else {"retrain": {**FIT, **retrain}}),
    }
    rl = {**PLAY, "updates": updates, "groups": groups, "group_size": 4,
        "feedback": [judge, *feedback],
          "optimizer": {"name": "grpo", "lr": 1e-3}}  # fmt: skip
    config = {
        "policy": str(models["policy"]),
        "threads": 1,
        "checkpoint_every": 2,
        "stages": [{"rl": rl}],
    }
    return turnwise.Run(config, folder=folder, **more)


def heard(run: turnwise.Run) -> list[int]:
    """Comparisons in the ledger before each update."""
    played = {e.id: e.update for e in run.ledger.run_episodes(run.id)}
    when = [
        played[c.ranking[0][0]]
        for c in run.ledger.feedback(run=run.id, kind="comparison", status="scored", late=True)
    ]
    return [sum(w < m["update"] for w in when) for m in run.metrics]


def versions(run: turnwise.Run, update: int) -> set[str]:
    groups = {e.group for e in run.ledger.run_episodes(run.id, update=update)}
    said = run.ledger.feedback(sorted(groups))
    return {a.stamp.version for a in said if a.stamp.source == "reward-model"}


@pytest.mark.parametrize("every", [3, 6])
def test_it_is_trained_at_the_stated_count_and_not_before(
    every: int, models: dict[str, Path], tmp_path: Path
) -> None:
    done = run(models, "fresh", tmp_path / "r", PANEL, retrain={"every": every}, updates=5).finish()
    counts = heard(done)
    assert 0 < counts[-1] < 8 * 4, "a share of the groups is asked about, and nothing waits for it"
    first = next(i for i, count in enumerate(counts) if count >= every)
    assert first > 0
    assert [m["reward_model/fresh"] for m in done.metrics[: first + 1]] == counts[: first + 1]
    assert ["reward_model/switched" in m for m in done.metrics[: first + 1]] == [False] * first + [
        True
    ]
    assert done.metrics[first]["reward_model/comparisons"] == counts[first]


def test_a_better_version_judges_from_then_on_and_is_saved_with_its_notes(
    models: dict[str, Path], tmp_path: Path
) -> None:
    asked = {"judge": LikesLetters(), "required": False}
    retrain = {"every": 32, "held_out": 0.3, "epochs": 8, "lr": 1e-2}
    done = run(models, "bad", tmp_path / "r", asked, retrain=retrain, updates=2, groups=32).finish()
    metrics = done.metrics[1]
    assert metrics["reward_model/switched"] == 1.0
    assert metrics["reward_model/new_accuracy"] > metrics["reward_model/old_accuracy"]
    folder = done.folder / "reward-model" / "update-000001"
    saved = RewardModel.from_pretrained(folder)
    assert (versions(done, 1), versions(done, 2)) == (
        {RewardModel.from_pretrained(models["bad"]).version},
        {saved.version},
    )
    assert saved.notes["old_accuracy"] == metrics["reward_model/old_accuracy"]
    assert (saved.notes["switched"], saved.notes["new_accuracy"]) == (
        1.0,
        metrics["reward_model/new_accuracy"],
    )
    known = set(saved.notes["known"])
    compared = [
        c
        for c in done.ledger.feedback(run=done.id, kind="comparison", status="scored", late=True)
        if c.id in known
    ]
    assert len(known) == metrics["reward_model/comparisons"]
    played = done.ledger.episodes([e for c in compared for tier in c.ranking for e in tier])
    starts = sorted({e.start.key for e in played.values()}, key=lambda key: place(0, key))
    assert saved.notes["held"] == sorted(starts[: -(-len(starts) * 3 // 10)]), (
        "three tenths of the starts are set aside"
    )
    means = torch.stack([v[:, -1] for v in saved.values(list(played.values()))]).mean(0)
    assert torch.allclose(means, torch.zeros(1), atol=1e-4), "what the policy said latest scores 0"
    assert latest(done.folder, 2) == folder


def test_a_worse_version_is_refused_and_the_present_one_stays(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Poisoned: what is set aside (the starts that come first in its order) was ranked right,
    everything else the wrong way round."""
    asked = {"judge": LikesLetters(lambda start: place(0, start) > 0.35), "required": False}
    retrain = {"every": 25, "epochs": 6, "lr": 1e-2}
    done = run(models, "good", tmp_path / "r", asked, retrain=retrain, groups=24).finish()
    metrics = done.metrics[2]
    assert metrics["reward_model/switched"] == 0.0
    assert metrics["reward_model/new_accuracy"] < metrics["reward_model/old_accuracy"]
    assert metrics["reward_model/pairs"] > 5
    assert [
        p.name for p in (done.folder / "reward-model").iterdir() if p.name.startswith("update")
    ] == []
    notes = json.loads((done.folder / "reward-model" / "refused-000002.json").read_text())
    assert (notes["switched"], notes["new_accuracy"]) == (0.0, metrics["reward_model/new_accuracy"])
    assert versions(done, 1) == versions(done, 4)
    assert [m["reward_model/fresh"] for m in done.metrics] == [
        0.0,
        24.0,
        48.0,
        24.0,
    ], "what was refused is not counted again"


def test_what_was_set_aside_trains_no_later_version(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[set[str]] = []
    fit = Training.fit

    def watched(self: Any, ensemble: Any, data: Any, train: Sequence[int], *rest: Any) -> Any:
        trained.append({data.starts[g] for g in train})
        return fit(self, ensemble, data, train, *rest)

    monkeypatch.setattr(Training, "fit", watched)
    done = run(
        models, "fresh", tmp_path / "r", EVERYBODY, retrain={"every": 8, "held_out": 0.4}, updates=4
    ).finish()
    assert len(trained) >= 2
    held = set()
    for path in sorted((done.folder / "reward-model").glob("*/turnwise-reward-model.json")):
        held |= set(json.loads(path.read_text())["notes"]["held"])
    for path in (done.folder / "reward-model").glob("refused-*.json"):
        held |= set(json.loads(path.read_text())["held"])
    assert held
    assert not any(each & held for each in trained)


class Killed(BaseException):
    pass


def test_it_goes_on_exactly_and_trains_no_version_twice(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrain = {"every": 16, "held_out": 0.3}
    whole = run(
        models, "fresh", tmp_path / "a" / "r", EVERYBODY, retrain=retrain, updates=5
    ).finish()
    made = [m["update"] for m in whole.metrics if "reward_model/switched" in m]
    assert made == [3, 5], (
        "the first is made after the checkpoint that the killed run goes on from, and before it is"
        " killed"
    )

    def kill(status: turnwise.Status) -> None:
        if status.update == 4 and status.phase == "update":
            raise Killed

    with pytest.raises(Killed):
        run(
            models,
            "fresh",
            tmp_path / "b" / "r",
            EVERYBODY,
            retrain=retrain,
            updates=5,
            on_status=kill,
        ).finish()
    shutil.move(tmp_path / "b", tmp_path / "c")  # paths are kept relative to the folder
    trained: list[int] = []
    fit = Training.fit
    monkeypatch.setattr(Training, "fit", lambda self, *rest: trained.append(1) or fit(self, *rest))
    again = run(
        models, "fresh", tmp_path / "c" / "r", EVERYBODY, retrain=retrain, updates=5, resume=True
    ).finish()
    assert len(trained) == len([u for u in made if u > 4])
    for a, b in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    same = (
        "outcome",
        "reward_model/fresh",
        "reward_model/switched",
        "reward_model/new_accuracy",
        "reward_model/comparisons",
    )
    assert [[m.get(k) for k in same] for m in whole.metrics] == [
        [m.get(k) for k in same] for m in again.metrics
    ]
    for update in range(1, 6):
        assert versions(whole, update) == versions(again, update)


def test_without_the_option_nothing_happens(models: dict[str, Path], tmp_path: Path) -> None:
    done = run(models, "fresh", tmp_path / "r", PANEL, updates=3).finish()
    assert not any(k.startswith("reward_model/") for m in done.metrics for k in m)
    assert not (done.folder / "reward-model").exists()
    parts = json.loads((done.folder / "checkpoints" / "update-000003" / "state.json").read_text())[
        "states"
    ]
    assert list(parts) == ["optimizer", "starts"]
    plain = RewardModelJudge(str(models["fresh"]))
    assert plain.learn(done) is None
    assert plain.state_dict() == {}


def test_wrong_options_are_refused(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, match in (
        ({"evry": 3}, "no key 'evry'. Did you mean 'every'"), ({"every": 0}, "every"), ({"held_out": 0}, "held_out"),  # noqa: E501
        ({"members": 3}, "no key 'members'"), ({"steps_per_update": 3}, "no key 'steps_per_update'"),  # noqa: E501
    ):  # fmt: skip
        with pytest.raises((turnwise.PluginError, turnwise.ConfigError), match=match):
            turnwise.Plugins().create(
                "judge", "reward-model", path=str(models["fresh"]), retrain=options
            )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(turnwise.PluginError, match="retrain works in one process"):
        turnwise.Plugins().create("judge", "reward-model", path=str(models["fresh"]), retrain={})
