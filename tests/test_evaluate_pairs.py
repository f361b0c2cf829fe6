"""`evaluate`: pairs on the same starts, a judge asked in both orders, and the best of n."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import turnwise
from support.episodes import conversation
from turnwise.engine.analysis.scores import bootstrap, paired

ENV = {"id": "test/Echo-v0", "kwargs": {"turns": 2}}


def evaluate(folder: Path, model: Path, **options: Any) -> dict[str, Any]:
    stage = {"env": ENV, "episodes": 12, "max_new_tokens": 5, "poll": 0.0, **options}
    run = turnwise.Run(
        {"policy": str(model), "threads": 1, "stages": [{"evaluate": stage}]}, folder=folder
    ).finish()
    evaluate.run = run  # type: ignore[attr-defined]
    return dict(json.loads((folder / "evaluation.json").read_text()))


def test_paired_differences_by_hand() -> None:
    def episode(seed: int, value: float, ending: Any = "terminated") -> turnwise.Episode:
        more = {"turn_info": {"success": value > 0.5}, "ending": ending}
        return conversation("y", id=f"{seed}{value}", seed=seed, reward=value, **more)

    first = [episode(0, 1.0), episode(1, 0.4), episode(2, 0.9), episode(3, 0.0, "failed")]
    second = [episode(0, 0.2), episode(1, 0.6), episode(2, 0.9), episode(3, 1.0)]
    found = paired(first, second)
    assert found.pairs == 3, "a start that one could not play is left out for both"
    assert found.outcome == pytest.approx((0.8 - 0.2 + 0.0) / 3)
    assert found.success == pytest.approx((1 - 1 + 0) / 3)
    assert (found.outcome_low, found.outcome_high) == pytest.approx(bootstrap([0.8, -0.2, 0.0]))
    assert found.win_rate is None
    with pytest.raises(ValueError, match="same starts"):
        paired(first, second[::-1])


def test_other_policies_play_the_same_starts(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    players = ["policy", {"name": "same", "policy": str(model_folder())}]
    table = evaluate(tmp_path / "r", model_folder(), players=players)
    run = evaluate.run  # type: ignore[attr-defined]
    episodes = run.ledger.run_episodes(run.id)
    assert len(episodes) == 24
    by_start: dict[str, set[int]] = {}
    for e in episodes:
        by_start.setdefault(e.start.key, set()).add(e.slot)
    assert set(map(tuple, by_start.values())) == {(0, 1)}
    assert table["policy - same"]["pairs"] == 12
    assert table["policy - same"]["outcome_low"] <= 0 <= table["policy - same"]["outcome_high"], (
        "they are the same policy"
    )


class First(turnwise.GroupJudge):
    """Prefers whatever is shown first."""

    def rank(self, group: Sequence[turnwise.Episode]) -> turnwise.Comparison:
        return turnwise.Comparison(group[0].group, tuple((e.id,) for e in group))


class Longer(turnwise.GroupJudge):
    """Prefers the longer conversation, whatever the order; now and then it fails."""

    def __init__(self, fails: int = 10**9) -> None:
        self.calls, self.fails = itertools.count(1), fails

    def rank(self, group: Sequence[turnwise.Episode]) -> turnwise.Comparison:
        if next(self.calls) % self.fails == 0:
            raise TimeoutError("busy")
        length = {e.id: sum(len(t.action) for t in e.turns) for e in group}
        tiers = [
            tuple(e for e in length if length[e] == n)
            for n in sorted(set(length.values()), reverse=True)
        ]
        return turnwise.Comparison(group[0].group, tuple(tiers))


def test_a_judge_that_looks_at_the_place_prefers_nobody(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    players = ["policy", {"name": "other", "policy": str(model_folder())}]
    table = evaluate(tmp_path / "r", model_folder(), players=players, judge=First())
    found = table["policy - other"]
    assert (found["win_rate"], found["flips"], found["unjudged"]) == (0.5, 1.0, 0)


def test_a_judges_verdicts_are_recorded_and_its_failures_are_no_ties(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    players = ["policy", {"name": "other", "policy": str(model_folder())}]
    table = evaluate(tmp_path / "r", model_folder(), players=players, judge=Longer(fails=6))
    run = evaluate.run  # type: ignore[attr-defined]
    found = table["policy - other"]
    played = {(e.start.key, e.slot): e for e in run.ledger.run_episodes(run.id)}
    length = {k: sum(len(t.action) for t in e.turns) for k, e in played.items()}
    assert found["unjudged"] == 4, "24 questions, every sixth failed, each of them spoils its pair"
    assert found["flips"] == 0
    said = run.ledger.feedback(sorted({e.group for e in played.values()}))
    assert len(said) == 24
    assert sum(a.status == "failed" for a in said) == 4
    spoiled = {a.target for a in said if a.status == "failed"}
    keys = {e.start.key: e.group for e in played.values()}
    wins = [
        0.5 if length[k, 0] == length[k, 1] else float(length[k, 0] > length[k, 1]) for k,
        g in keys.items() if g not in spoiled
    ]  # fmt: skip
    assert found["win_rate"] == pytest.approx(sum(wins) / len(wins))


def test_best_of_n_is_chosen_by_the_judge(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """A judge that knows the truth: the best of n is the mean of the maxima over all subsets."""

    def truth(episode: turnwise.Episode) -> float:
        return episode.env_return

    table = evaluate(tmp_path / "r", model_folder(), best_of={"judge": truth, "n": [1, 2, 4]})
    run = evaluate.run  # type: ignore[attr-defined]
    groups: dict[str, list[float]] = {}
    for e in run.ledger.run_episodes(run.id):
        if e.slot > 0:
            groups.setdefault(e.group, []).append(e.env_return)
    assert {len(g) for g in groups.values()} == {4}
    for n in (1, 2, 4):
        expected = [
            sum(map(max, subsets)) / len(subsets)
            for g in groups.values()
            for subsets in [list(itertools.combinations(g, n))]
        ]
        assert table[f"best-of-{n}"]["outcome"] == pytest.approx(sum(expected) / len(expected))
        assert table[f"best-of-{n}"]["proxy"] == pytest.approx(table[f"best-of-{n}"]["outcome"])
    kl = []
    for own in groups.values():  # replies of the same return are one choice
        shares = {value: own.count(value) / 4 for value in own}
        below = lambda value: sum(v < value for v in own) / 4  # noqa: B023, E731
        chosen = {v: (below(v) + share) ** 4 - below(v) ** 4 for v, share in shares.items()}
        kl.append(sum(q * math.log(q / shares[v]) for v, q in chosen.items()))
    assert sum(kl) / len(kl) - 1e-9 <= table["best-of-4"]["kl"] < 0.636, (
        "at most log n - (n - 1) / n, and less with ties"
    )
    assert table["best-of-4"]["outcome"] > table["best-of-1"]["outcome"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "length"}, "must compare conversations"),
        ({"best_of": {"judge": First()}}, "must score single conversations"),
        (
            {"players": ["policy", {"name": "policy", "policy": "x"}]},
            "two players have the same name",
        ),
        (
            {"players": ["policy", {"name": "x", "policy": "runs/no/where"}]},
            "there is no policy in runs/no/where",
        ),
        ({"players": [{"name": "x"}]}, "needs the key 'policy'"),
        ({"best_of": {"judge": "lenght"}}, "Did you mean 'length'"),
    ],
)
def test_what_cannot_work_is_refused_first(
    options: dict[str, Any], message: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises((turnwise.ConfigError, turnwise.PluginError), match=message):
        evaluate(tmp_path / "r", model_folder(), **options)
    assert not (tmp_path / "r").exists()
