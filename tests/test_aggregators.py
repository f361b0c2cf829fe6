"""Aggregators against tables worked out by hand, other people's code, brute force and simulated
raters; and the combiner that uses them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import tracemalloc
from typing import Any

import choix
import numpy as np
import pytest
import turnwise
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from scipy.special import expit
from scipy.stats import kendalltau
from support.episodes import conversation
from turnwise import Aggregate, Comparison, Feedback, NoReward, Rewards, Stamp
from turnwise.plugins.aggregators import common as answers
from turnwise.plugins.aggregators.bradley_terry import BradleyTerry
from turnwise.plugins.aggregators.common import Inverse, pairs, ranking_weight, scores
from turnwise.plugins.aggregators.dawid_skene import DawidSkene
from turnwise.plugins.aggregators.majority import Majority
from turnwise.plugins.aggregators.mean import GRID, Mean
from turnwise.plugins.aggregators.plackett_luce import PlackettLuce
from turnwise.plugins.aggregators.rater_bradley_terry import RaterBradleyTerry
from turnwise.plugins.combiners.aggregate import Aggregated

COMPARING: list[Any] = [BradleyTerry, PlackettLuce, RaterBradleyTerry]
SCORING: list[Any] = [Mean, Majority, DawidSkene]


def ranked(
    *tiers: str, rater: str = "w", group: str = "g", left: str = "", **more: Any
) -> Comparison:
    """Tiers of one-letter episodes; `left` lists them as they were displayed."""
    shown = {"order": list(left)} if left else {}
    return Comparison(
        group,
        tuple(tuple(t) for t in tiers),
        shown=shown,
        stamp=Stamp(source="people", rater=rater),
        **more,
    )


def scored(episode: str, score: float, rater: str = "w", **stamp: Any) -> Feedback:
    return Feedback(episode, score, stamp=Stamp(source="people", rater=rater, **stamp))


def numbers(found: Aggregate) -> dict[str, float]:
    return {e: x.score for e, x in found.scores.items()}


# Alike for all.


@pytest.mark.parametrize("kind", COMPARING + SCORING)
def test_empty_and_foreign_answers(kind: Any) -> None:
    assert kind().aggregate([]) == Aggregate({}, {})
    silent = [
        Feedback.failed("a", "ill"),
        Comparison.abstained("g", "unsure"),
        Feedback("a", turn_scores=(1.0,)),
    ]
    assert kind().aggregate(silent) == Aggregate({}, {})
    other = [scored("a", 1.0)] if kind in COMPARING else [ranked("a", "b")]
    if kind is not Majority:
        assert kind().aggregate(other) == Aggregate({}, {}), "what it cannot read is passed over"


@pytest.mark.parametrize("kind", COMPARING + SCORING)
def test_one_rater_and_one_answer_are_finite(kind: Any) -> None:
    said: list[Any] = [ranked("a", "b")] if kind in COMPARING else [scored("a", 1.0)]
    found = kind().aggregate(said)
    assert list(found.raters) == ["w"]
    assert all(x.raters == 1 for x in found.scores.values())
    many: list[Any] = (
        [ranked("a", "b", "c")] * 50
        if kind in COMPARING
        else [scored(e, 1.0, r) for e in "abc" for r in "xyz"]
    )
    found = kind().aggregate(many)
    assert max(abs(x.score) for x in found.scores.values()) < 10, "never beaten, yet finite"
    if kind in COMPARING:
        assert found.scores["a"].score > found.scores["b"].score > found.scores["c"].score
    else:
        assert set(numbers(found).values()) == {1.0}


@pytest.mark.parametrize("wrong", [
    (BradleyTerry, {"variance": 0}), (PlackettLuce, {"variance": -1}), (RaterBradleyTerry, {"side_sd": 0.0}),  # noqa: E501
    (RaterBradleyTerry, {"reliability_sd": float("nan")}), (DawidSkene, {"right": 1.0}), (Majority, {"threshold": float("inf")}),  # noqa: E501
])  # fmt: skip
def test_wrong_options_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="must be|need"):
        wrong[0](**wrong[1])


def test_names_in_the_registry_make_them() -> None:
    plugins = turnwise.Plugins()
    for name in (
        "mean",
        "majority",
        "dawid-skene",
        "bradley-terry",
        "plackett-luce",
        "rater-bradley-terry",
    ):
        assert isinstance(plugins.factory("aggregator", name)(), turnwise.Aggregator)


def some_answers(rng: random.Random, kind: Any) -> list[Any]:
    if kind in SCORING:
        return [
            scored(rng.choice("abcdef"), float(rng.randrange(3)), rng.choice("xyz"))
            for _ in range(12)
        ]
    said = []
    for _ in range(8):
        group, members = rng.choice([("g", "abc"), ("h", "defg")])
        order = rng.sample(members, rng.randint(2, len(members)))
        ties = [[order[0]]]
        for e in order[1:]:
            if rng.random() < 0.25:
                ties[-1].append(e)
            else:
                ties.append([e])
        left = "".join(rng.sample(order, len(order))) if rng.random() < 0.8 else ""
        said.append(ranked(*map("".join, ties), group=group, rater=rng.choice("xyz"), left=left))
    return said


@pytest.mark.parametrize("kind", COMPARING + SCORING)
@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False))
def test_names_and_order_do_not_matter(kind: Any, rng: random.Random) -> None:
    said = some_answers(rng, kind)
    name = dict(zip("abcdefg", rng.sample("tuvwxyz", 7), strict=True))
    other = []
    for a in said:
        stamp = dataclasses.replace(a.stamp, rater=a.stamp.rater * 2)
        if isinstance(a, Feedback):
            other.append(dataclasses.replace(a, episode=name[a.episode], stamp=stamp))
        else:
            tiers = tuple(tuple(name[e] for e in tier[::-1]) for tier in a.ranking)
            shown = {k: [name[e] for e in order] for k, order in a.shown.items()}
            other.append(
                dataclasses.replace(a, group=a.group + "!", ranking=tiers, shown=shown, stamp=stamp)
            )
    rng.shuffle(other)
    one, two = kind().aggregate(said), kind().aggregate(other)
    assert set(two.scores) == {name[e] for e in one.scores}
    for e, x in one.scores.items():
        y = two.scores[name[e]]
        assert (y.score, y.sd, y.prior_sd, y.raters) == pytest.approx(
            (x.score, x.sd, x.prior_sd, x.raters), abs=1e-4
        )
    for r, x in one.raters.items():
        assert (two.raters[r * 2].answers, two.raters[r * 2].reliability) == pytest.approx(
            (x.answers, x.reliability), abs=1e-3
        )


# Scores.


def test_mean_is_what_the_model_says() -> None:
    """Against integrating the model by brute force: mu and v at their best for each rho, rho from
    its exact normal likelihood."""
    said = [
        scored("a", 1.0, "x"),
        scored("a", 2.0, "y"),
        scored("b", 4.0, "x"),
        scored("c", 5.0, "y"),
        scored("c", 7.0, "x"),
    ]
    of, value = np.array([0, 0, 1, 2, 2]), np.array([1.0, 2, 4, 5, 7])
    log, each, spread = [], [], []
    for rho in GRID:
        v = rho * (of[:, None] == of) + (1 - rho) * np.eye(5)  # correlation of the answers
        inverse = np.linalg.inv(v)
        mu = (inverse @ value).sum() / inverse.sum()
        q = (value - mu) @ inverse @ (value - mu)
        log.append(-(np.linalg.slogdet(v)[1] + np.log(inverse.sum()) + 4 * np.log(q)) / 2)
        to = rho * (np.arange(3)[:, None] == of)
        each.append(mu + to @ inverse @ (value - mu))
        spread.append(q / 4 * (rho - np.diag(to @ inverse @ to.T)))
    w = np.exp(np.array(log) - max(log))
    w /= w.sum()
    score = w @ np.array(each)
    sd = np.sqrt(w @ (np.array(spread) + (np.array(each) - score) ** 2))
    found = Mean().aggregate(said)
    assert [found.scores[e].score for e in "abc"] == pytest.approx(score)
    assert [found.scores[e].sd for e in "abc"] == pytest.approx(sd)
    assert [found.scores[e].raters for e in "abc"] == [2, 1, 2]
    assert found.scores["b"].sd > found.scores["c"].sd, "one answer knows less than two"


def test_mean_without_repeats_halves_and_with_many_believes() -> None:
    found = numbers(
        Mean().aggregate([scored("a", 0.0, "x"), scored("b", 1.0, "y"), scored("c", 2.0, "z")])
    )
    assert found == pytest.approx({"a": 0.5, "b": 1.0, "c": 1.5})
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 2, 40)
    said = [
        scored(f"e{i}", t + rng.normal(), f"r{w}") for i, t in enumerate(truth) for w in range(10)
    ]
    sharp = Mean().aggregate(said)
    z = [(sharp.scores[f"e{i}"].score - t) / sharp.scores[f"e{i}"].sd for i, t in enumerate(truth)]
    assert 0.7 < np.std(z) < 1.3
    expected = truth.var(ddof=1) / (truth.var(ddof=1) + 1)
    assert [r.reliability for r in sharp.raters.values()] == pytest.approx([expected] * 10, abs=0.1)
    noisy = [scored(f"e{i}", float(rng.normal(0, 3)), "dice") for i in range(40)]
    raters = Mean().aggregate([*said, *noisy]).raters
    assert min(raters, key=lambda r: raters[r].reliability) == "dice"


def test_majority_counts_and_leaves_ties_tied() -> None:
    said = [scored("a", s, r) for s, r in ((1.0, "x"), (1.0, "y"), (0.0, "z"))] + [
        scored("b", 1.0, "x"),
        scored("b", 0.0, "y"),
    ]
    found = Majority().aggregate([*said, scored("c", 0.5, "x")])
    assert numbers(found) == {"a": 1.0, "b": 0.5, "c": 0.5}
    assert found.scores["a"].sd == pytest.approx((3 * 2 / (25 * 6)) ** 0.5)  # Beta(3, 2)
    assert found.scores["a"].prior_sd == pytest.approx(12**-0.5)
    # z alone is against a, whom the two others are for; x and y are each alone in b.
    assert found.raters["z"].reliability < 0
    compared = [
        ranked("a", "b"),
        ranked("a", "b", rater="x"),
        ranked("b", "a", rater="y"),
        ranked("c", "ab", rater="x"),
    ]
    assert numbers(Majority().aggregate(compared)) == {
        "a": 1.0,
        "b": 0.0,
        "c": 1.0,
    }, "a: two votes of four, and a quarter"
    assert numbers(Majority().aggregate([ranked("a", "b", probability=0.5)])) == {
        "a": 0.5,
        "b": 0.5,
    }
    assert numbers(Majority(threshold=3).aggregate([scored("a", 4.0), scored("b", 2.0)])) == {
        "a": 1.0,
        "b": 0.0,
    }


def test_dawid_skene_by_hand() -> None:
    """Perfect agreement: the posterior after convergence satisfies its own equations, and one step
    of them is checked by hand."""
    said = [
        scored("a", 1.0, "x"),
        scored("a", 1.0, "y"),
        scored("b", 0.0, "x"),
        scored("b", 0.0, "y"),
    ]
    episodes, raters, classes, posterior, confusion, common = DawidSkene().fit(scores(said))
    assert (episodes, raters, classes.tolist()) == (["a", "b"], ["x", "y"], [0.0, 1.0])
    p = posterior[0, 1]  # by symmetry that of b being 0
    right = (4 + p) / (5 + 1)  # of two labels, p + (1 - p) = 1 falls on each class
    assert confusion[0] == pytest.approx(
        np.array([[right, 1 - right], [1 - right, right]]), abs=1e-6
    )
    assert common == pytest.approx([0.5, 0.5])
    assert p == pytest.approx(right**2 / (right**2 + (1 - right) ** 2), abs=1e-6)
    found = DawidSkene().aggregate(said)
    assert found.scores["a"].score == pytest.approx(p)
    assert found.scores["a"].sd == pytest.approx((p * (1 - p)) ** 0.5)
    assert found.raters["x"].reliability == pytest.approx(2 * right - 1, abs=1e-6)
    with pytest.raises(ValueError, match="use aggregator 'mean'"):
        DawidSkene().aggregate([scored("a", k / 100) for k in range(50)])


def test_classes_are_equal_up_to_rounding() -> None:
    """(2, 3, 4) and (4, 3, 2) of 7 points have one mean and two last bits."""
    points = lambda *p: {f"a{j}": (x - 1) / 6 for j, x in enumerate(p)}  # noqa: E731
    rated = [points(*p) for p in itertools.product(range(1, 8), repeat=3)]
    assert len({sum(a.values()) / 3 for a in rated}) > 19, "or there is nothing to see"
    said = [
        Feedback(f"e{i}", aspects=a, stamp=Stamp(rater=f"r{i % 3}")) for i, a in enumerate(rated)
    ]
    assert len({x for _, _, x in scores(said)}) == 19
    assert len(DawidSkene().aggregate(said).scores) == 343
    thirds = [
        Feedback("e", score=1 / 3),
        Feedback("f", score=float(np.float32(1) / np.float32(3))),
        Feedback("g", score=0.34),
    ]
    assert sorted({x for _, _, x in scores(thirds)}) == [1 / 3, 0.34]
    # Added up in binary, a little below 1.5.
    half = Feedback("g", aspects={"a": 0.7, "b": 0.6, "c": 0.2})
    assert Majority().aggregate([half]).scores["g"].score == 0.5


def test_dawid_skene_finds_who_says_the_opposite() -> None:
    rng = random.Random(3)
    said = []
    for i in range(200):
        truth = rng.random() < 0.5
        for w, right in {"good": 0.9, "fair": 0.8, "dice": 0.5, "liar": 0.1}.items():
            said.append(scored(f"e{i}", float(truth == (rng.random() < right)), w))
    raters = DawidSkene().aggregate(said).raters
    assert sorted(raters, key=lambda w: raters[w].reliability) == ["liar", "dice", "fair", "good"]
    assert raters["liar"].reliability == pytest.approx(-0.8, abs=0.15)
    assert raters["dice"].reliability == pytest.approx(0.0, abs=0.2)


def crowd(seed: int, classes: int) -> tuple[Any, list[Any]]:
    """30 raters of 15 labels each on 150 items, 3 per item; right in 35 % to 95 % of the cases,
    else any other class."""
    rng = np.random.default_rng(seed)
    truth, skill = (
        rng.integers(classes, size=150),
        rng.uniform(0.35 if classes > 2 else 0.55, 0.95, 30),
    )
    slots = rng.permutation(np.repeat(np.arange(30), 15)).reshape(150, 3)
    said = []
    for i, k in enumerate(truth):
        for w in slots[i]:
            label = k if rng.random() < skill[w] else (k + rng.integers(1, classes)) % classes
            said.append(scored(f"e{i}", float(label), f"r{w}"))
    return truth, said


def test_dawid_skene_is_no_worse_than_majority_with_sparse_labels() -> None:
    """Two classes, so that both plugins say the same kind of thing; 20 seeds; the interval of the
    paired difference is not below 0."""
    differences = []
    for seed in range(20):
        truth, said = crowd(seed, 2)
        hits = []
        for kind in (DawidSkene, Majority):
            found = numbers(kind().aggregate(said))
            values = np.array([found[f"e{i}"] for i in range(150)])
            hits.append(np.where(values == 0.5, 0.5, (values > 0.5) == truth).mean())
        differences.append(hits[0] - hits[1])
    half = 2.093 * np.std(differences, ddof=1) / 20**0.5
    assert np.mean(differences) + half > 0
    assert np.mean(differences) > -0.01


# Comparisons.


def test_bradley_terry_is_choix_with_the_same_prior() -> None:
    rng = random.Random(1)
    data = [tuple(rng.sample(range(6), 2)) for _ in range(40)]
    said = [ranked("abcdef"[i], "abcdef"[j]) for i, j in data]
    for variance in (0.5, 2.0, 10.0):
        found = BradleyTerry(variance).aggregate(said)
        # Its penalty is alpha * ||s||^2.
        theirs = choix.opt_pairwise(6, data, alpha=1 / (2 * variance), tol=1e-12)
        assert [found.scores[e].score for e in "abcdef"] == pytest.approx(theirs, abs=1e-6)
        luce = PlackettLuce(variance).aggregate(said)
        assert [luce.scores[e].score for e in "abcdef"] == pytest.approx(theirs, abs=1e-6)
        assert [luce.scores[e].sd for e in "abcdef"] == pytest.approx(
            [found.scores[e].sd for e in "abcdef"]
        )


def test_plackett_luce_is_choix_with_the_same_prior() -> None:
    rng = random.Random(2)
    data = [rng.sample(range(5), rng.randint(2, 5)) for _ in range(20)]
    found = PlackettLuce(2.0).aggregate([ranked(*("abcde"[i] for i in r)) for r in data])
    assert [found.scores[e].score for e in "abcde"] == pytest.approx(
        choix.opt_rankings(5, data, alpha=0.25, tol=1e-12), abs=1e-6
    )


def grid_posterior(loglik: Any, size: int, variance: float) -> tuple[list[float], list[float]]:
    """Mean and deviation of each score less the group's mean, by summing over a grid of the
    differences."""
    axis = np.linspace(-8, 8, 801 if size == 2 else 241)
    rest = np.stack(np.meshgrid(*[axis] * (size - 1), indexing="ij"), -1).reshape(-1, size - 1)
    s = np.concatenate([rest, np.zeros((len(rest), 1))], 1)
    s -= s.mean(1, keepdims=True)
    log = loglik(s) - (s**2).sum(1) / (2 * variance)
    w = np.exp(log - log.max())
    w /= w.sum()
    mean = w @ s
    return mean.tolist(), np.sqrt(w @ (s - mean) ** 2).tolist()


def test_deviations_are_those_of_the_posterior() -> None:
    """Twelve comparisons of three; Laplace is an approximation, so within 10 %. The prior's
    deviation is that of a difference."""
    wins = [("a", "b")] * 4 + [("b", "a")] * 2 + [("b", "c")] * 3 + [("a", "c")] * 2 + [("c", "a")]
    at = "abc".index

    def loglik(s: Any) -> Any:
        return sum(-np.logaddexp(0, s[:, at(y)] - s[:, at(x)]) for x, y in wins)

    mean, sd = grid_posterior(loglik, 3, 2.0)
    said = [ranked(x, y) for x, y in wins]
    for found in (BradleyTerry().aggregate(said), PlackettLuce().aggregate(said)):
        assert [found.scores[e].sd for e in "abc"] == pytest.approx(sd, rel=0.1)
        assert [found.scores[e].score for e in "abc"] == pytest.approx(mean, abs=0.15)
        assert found.scores["a"].prior_sd == pytest.approx((2 * 2 / 3) ** 0.5)
        assert 0 < found.scores["c"].reliability < found.scores["b"].reliability < 1

    # Three times a > b = c with Breslow's tie, four times b > a > c.
    def loglik_ranking(s: Any) -> Any:
        left = np.log(np.exp(s).sum(1))
        tie = np.log(np.exp(s[:, 1:]).sum(1))
        rest = np.log(np.exp(s[:, [0, 2]]).sum(1))
        return 3 * (s.sum(1) - left - 2 * tie) + 4 * (s[:, 1] - left + s[:, 0] - rest)

    mean, sd = grid_posterior(loglik_ranking, 3, 2.0)
    luce = PlackettLuce().aggregate([ranked("a", "bc")] * 3 + [ranked("b", "a", "c")] * 4)
    assert [luce.scores[e].sd for e in "abc"] == pytest.approx(sd, rel=0.1)
    assert [luce.scores[e].score for e in "abc"] == pytest.approx(mean, abs=0.15)


def test_ties_and_soft_labels_are_halves() -> None:
    half = BradleyTerry().aggregate([ranked("a", "b"), ranked("b", "a")])
    tied = BradleyTerry().aggregate([ranked("ab"), ranked("ba")])
    soft = BradleyTerry().aggregate([ranked("a", "b", probability=0.5)] * 2)
    for found in (tied, soft):
        assert numbers(found) == pytest.approx(numbers(half), abs=1e-9)
        assert found.scores["a"].sd == pytest.approx(half.scores["a"].sd)
    for kind in COMPARING:
        sure = [
            kind().aggregate([ranked("a", "b", probability=p)] * 3).scores["a"].score
            for p in (0.5, 0.7, 0.9, 1.0)
        ]
        assert sure == sorted(sure)
        assert sure[0] == pytest.approx(0, abs=1e-9)
    # sigma(s_a - s_b) - 0.8 + s_a / (3 * 2) = 0 with s_b = -s_a, three answers
    s = BradleyTerry().aggregate([ranked("a", "b", probability=0.8)] * 3).scores["a"].score
    assert 3 * (expit(2 * s) - 0.8) + s / 2 == pytest.approx(0, abs=1e-9)


def test_a_ranking_as_pairs_knows_as_much_as_plackett_luce() -> None:
    """At equal scores the pairs of a ranking carry its Fisher information: every order once makes
    equal scores."""
    for members in ("ab", "abc", "abcd"):
        said = [ranked(*order) for order in itertools.permutations(members)]
        pair, whole = (
            BradleyTerry().aggregate(said).scores["a"],
            PlackettLuce().aggregate(said).scores["a"],
        )
        assert pair.sd == pytest.approx(whole.sd)
        assert pair.score == pytest.approx(0, abs=1e-9)
    assert [round(ranking_weight(k), 2) for k in (2, 3, 4, 8)] == [1, 0.78, 0.64, 0.38]


def test_groups_do_not_feel_each_other() -> None:
    one = [ranked("a", "b"), ranked("b", "c", rater="x")]
    other = [ranked("d", "e", "f", group="h")] * 3
    for kind in (BradleyTerry, PlackettLuce):
        both, alone = kind().aggregate([*one, *other]), kind().aggregate(one)
        assert {e: numbers(both)[e] for e in "abc"} == pytest.approx(numbers(alone), abs=1e-9)
        assert sum(numbers(both)[e] for e in "def") == pytest.approx(0, abs=1e-9)


def test_entries_of_an_inverse() -> None:
    rng = np.random.default_rng(0)
    group = np.array([2, 0, 1, 0, 2, 0, 3])
    rows, columns = (
        np.array(x)
        for x in zip(
            *[(i, j) for i in range(7) for j in range(7) if group[i] == group[j]], strict=True
        )
    )
    dense = rng.normal(size=(7, 7)) * (group[:, None] == group)
    dense = dense @ dense.T
    found = Inverse(rows, columns, dense[rows, columns], 0.5, 7)
    inverse = np.linalg.inv(dense + 0.5 * np.eye(7))
    every = np.indices((7, 7)).reshape(2, -1)
    assert found.at(*every) == pytest.approx(inverse.ravel()), (
        "0 between parts that nothing connects"
    )
    assert found.diagonal() == pytest.approx(np.diag(inverse))
    x = rng.normal(size=(7, 3))
    assert found.times(x) == pytest.approx(inverse @ x)
    assert found.times(x[:, 0]) == pytest.approx(inverse @ x[:, 0])


def test_more_members_than_columns_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    said = [ranked([f"{a}"], [f"{b}"]) for a, b in rng.integers(0, 12, (40, 2)) if a != b]
    whole = BradleyTerry().aggregate(said)
    monkeypatch.setattr(answers, "COLUMNS", 5)
    for name, estimate in BradleyTerry().aggregate(said).scores.items():
        assert (estimate.score, estimate.sd) == pytest.approx(
            (whole.scores[name].score, whole.scores[name].sd), abs=1e-12
        )


@pytest.mark.parametrize("shape", ["pairs", "one against all", "many against many"])
@pytest.mark.parametrize("kind", [BradleyTerry, PlackettLuce])
def test_twenty_thousand_comparisons_of_one_group(kind: Any, shape: str) -> None:
    """What has the same answer in small has it in large, in memory that grows with the answers and
    not with their square."""
    rng = random.Random(0)
    drawn = {
        "pairs": [(f"a{i}", f"b{i}") for i in range(20_000)],
        "one against all": [("best", f"b{i}") for i in range(2_000)],
        "many against many": [
            tuple(f"{i}" for i in rng.sample(range(500), 2)) for _ in range(20_000)
        ],
    }[shape]
    tracemalloc.start()
    found = kind().aggregate([ranked([one], [other]) for one, other in drawn]).scores
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6
    if shape == "pairs":
        one = kind().aggregate([ranked(["a0"], ["b0"])]).scores
        assert found["a7"].score == pytest.approx(one["a0"].score, abs=1e-9)
    if shape == "one against all":
        assert (
            found["best"].score
            > 3
            > 0
            > found["b7"].score
            == pytest.approx(found["b8"].score, abs=1e-9)
        )
    assert all(math.isfinite(e.score) and e.sd > 0 for e in found.values())


# Raters.


def panel(
    seed: int, *, groups: int = 1, judgements: int = 8, items: int = 60, sides: bool = True
) -> tuple[Any, list[Comparison]]:
    """Six raters, of whom r0 and r1 always take the left one, r2 throws a coin, the others follow
    Bradley-Terry with scores of variance 2.

    One group of 60 items: each stands in four pairs (two random rings over all, repeated pairs left
    out), every pair is judged 8 times, each time by a rater and in an order drawn at random. With
    several groups: all pairs of each.
    """
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 2**0.5, items)
    size = items // groups
    if groups == 1:
        rings = [rng.permutation(items) for _ in range(2)]
        drawn = sorted(
            {tuple(sorted((int(r[i]), int(r[i - 1])))) for r in rings for i in range(items)}
        )
    else:
        drawn = [
            (g * size + i, g * size + j)
            for g in range(groups)
            for i in range(size)
            for j in range(i)
        ]
    said = []
    for i, j in drawn:
        for _ in range(judgements):
            w = int(rng.integers(6))
            left, right = (i, j) if rng.random() < 0.5 else (j, i)
            takes_left = w < 2 or (
                rng.random() < (0.5 if w == 2 else expit(truth[left] - truth[right]))
            )
            best, worst = (left, right) if takes_left else (right, left)
            shown = {"order": [f"e{left}", f"e{right}"]} if sides else {}
            said.append(
                Comparison(
                    f"g{i // size}",
                    ((f"e{best}",), (f"e{worst}",)),
                    shown=shown,
                    stamp=Stamp(rater=f"r{w}"),
                )
            )
    return truth, said


def test_the_gradient_is_the_loss_s() -> None:
    rng = random.Random(5)
    model = RaterBradleyTerry(1.5, 0.7, 0.9)
    p = pairs(some_answers(rng, BradleyTerry))
    for seed in range(5):
        theta = np.random.default_rng(seed).normal(size=len(p.episodes) + 2 * len(p.raters))
        doubt = np.arange(len(p.raters)) / 2
        numeric = [
            (model.loss(theta + step, p, doubt)[0] - model.loss(theta - step, p, doubt)[0]) / 2e-5
            for step in 1e-5 * np.eye(len(theta))
        ]
        assert model.loss(theta, p, doubt)[1] == pytest.approx(numeric, abs=1e-7)


def test_the_arrow_hessian_is_the_loss_s() -> None:
    """Deviations against inverting the whole Hessian, made of differences of the gradient."""
    model = RaterBradleyTerry(1.5, 0.7, 0.9)
    p = pairs(some_answers(random.Random(6), BradleyTerry))
    theta = np.random.default_rng(0).normal(0, 0.3, len(p.episodes) + 2 * len(p.raters)) + 0.5
    doubt = np.ones(len(p.raters))
    hessian = np.stack(
        [
            approx_fprime(theta, lambda t, i=i: model.loss(t, p, doubt)[1][i], 1e-7)
            for i in range(len(theta))
        ]
    )
    variance = np.diag(np.linalg.inv((hessian + hessian.T) / 2))
    scores, raters, _ = model.deviations(theta, p, doubt)
    assert scores == pytest.approx(variance[: len(p.episodes)], rel=1e-4)
    assert raters == pytest.approx(variance[len(p.episodes) :], rel=1e-4)


def test_it_beats_plain_bradley_terry_and_names_the_three() -> None:
    """20 seeds, paired. The rule: reliability below half of the best rater's is careless; |side|
    above 1 and twice its deviation is one-sided."""
    taus = []
    for seed in range(20):
        truth, said = panel(seed)
        plain, ours = BradleyTerry().aggregate(said), RaterBradleyTerry().aggregate(said)
        taus.append(
            [
                kendalltau(truth, [x.scores[f"e{i}"].score for i in range(60)]).statistic
                for x in (plain, ours)
            ]
        )
        best = max(r.reliability for r in ours.raters.values())
        assert {w for w, r in ours.raters.items() if r.reliability < best / 2} == {"r0", "r1", "r2"}
        assert {
            w for w, r in ours.raters.items() if abs(r.side or 0) > max(1, 2 * (r.side_sd or 0))
        } == {"r0", "r1"}
        assert all((ours.raters[w].side or 0) > 0 for w in ("r0", "r1"))
    gain = np.diff(taus).ravel()
    assert gain.mean() - 2.093 * gain.std(ddof=1) / 20**0.5 > 0
    assert gain.mean() > 0.1


def test_deviations_hold_what_they_say() -> None:
    """Where the model is true, errors over deviations spread like 1, and honest raters' reliability
    is about 1."""
    z, honest = [], []
    for seed in range(20, 30):
        truth, said = panel(seed, groups=15)
        found = RaterBradleyTerry().aggregate(said)
        truth = truth - np.repeat(truth.reshape(15, 4).mean(1), 4)
        z += [
            (found.scores[f"e{i}"].score - t) / found.scores[f"e{i}"].sd
            for i, t in enumerate(truth)
        ]
        honest += [found.raters[f"r{w}"].reliability for w in (3, 4, 5)]
    assert 0.8 < np.std(z) < 1.1
    assert 0.75 < np.mean(honest) < 1.1


def test_turning_the_display_round_turns_the_side_and_nothing_else() -> None:
    _, said = panel(3, groups=15, judgements=3)
    turned = [dataclasses.replace(c, shown={"order": c.shown["order"][::-1]}) for c in said]
    one, two = RaterBradleyTerry().aggregate(said), RaterBradleyTerry().aggregate(turned)
    for e, x in one.scores.items():
        assert (two.scores[e].score, two.scores[e].sd) == pytest.approx((x.score, x.sd), abs=1e-4)
    for w, r in one.raters.items():
        assert two.raters[w].side == pytest.approx(-(r.side or 0), abs=1e-4)
        assert two.raters[w].reliability == pytest.approx(r.reliability, abs=1e-4)


def test_without_display_order_no_side_is_estimated() -> None:
    _, said = panel(4, groups=15, judgements=2, sides=False)
    found = RaterBradleyTerry().aggregate(said)
    assert all(r.side is None and r.side_sd is None for r in found.raters.values())
    assert found.raters["r3"].answers == sum(c.stamp.rater == "r3" for c in said)
    some = RaterBradleyTerry().aggregate(
        [*said, ranked("x", "y", rater="r1", group="h", left="xy")]
    )
    assert some.raters["r1"].side is not None
    assert some.raters["r2"].side is None


def test_a_thousand_episodes_are_no_trouble() -> None:
    rng = random.Random(0)
    said: list[Comparison] = []
    for g in range(300):
        members = [f"{g}-{k}" for k in range(4)]
        for _ in range(3):
            order = tuple((e,) for e in rng.sample(members, 4))
            said.append(
                Comparison(
                    f"g{g}",
                    order,
                    shown={"order": members},
                    stamp=Stamp(rater=f"r{rng.randrange(20)}"),
                )
            )
    for kind in COMPARING:
        assert len(kind().aggregate(said).scores) == 1200


# The combiner.


def opinion(e: str, score: float | None, rater: str, stratum: str = "", **more: Any) -> Feedback:
    stamp = Stamp(source=more.pop("source", "people"), rater=rater, stratum=stratum)
    return Feedback(e, score, id=f"{e}/{rater}", stamp=stamp, **more)


def test_aggregated_makes_rewards_of_estimates() -> None:
    group = [
        conversation("ok", "ok", id="a", reward=[0.5, 1.0]),
        conversation("ok", id="b", reward=2.0),
    ]
    said = [
        opinion("a", 1.0, "x"),
        opinion("a", 0.0, "y"),
        opinion("b", 3.0, "x", turn_scores=(0.25,)),
        opinion("b", 9.0, "z", source="other"),
    ]
    combiner = Aggregated({"environment": 10.0, "people": 2.0, "other": 0.0}, Mean())
    combiner.fit(said)
    estimates = Mean().aggregate(said[:3]).scores
    a, b = combiner.combine(group, said)
    assert a == Rewards(
        15 + 2 * estimates["a"].score,
        (5.0, 10 + 2 * estimates["a"].score),
        None,
        estimates["a"].reliability,
    )
    assert isinstance(b, Rewards)
    assert b.turn_scores == (0.25,)
    assert b.outcome == 20 + 2 * estimates["b"].score, "a source of weight 0 is no part of it"
    plain = Aggregated({"people": 2.0}, Mean(), uncertainty="ignore")
    plain.fit(said)
    assert [r.weight for r in plain.combine(group, said)] == [1.0, 1.0]  # type: ignore[union-attr]
    alone = Aggregated({"environment": 1.0, "people": 0.0}, Mean())
    alone.fit(said)
    assert [r.outcome for r in alone.combine(group, said)] == [1.5, 2.0]  # type: ignore[union-attr]


def test_an_episode_without_an_estimate_has_no_reward() -> None:
    group = [conversation("ok", id=name) for name in "abcdef"]
    stamp = Stamp(source="people")
    said = [
        Feedback.failed("a", "timeout", stamp=stamp),
        Feedback.abstained("b", "unsure", stamp=stamp),
        Feedback("d", turn_scores=(1.0,), stamp=stamp), opinion("e", 1.0, "x"),
        opinion("f", 0.0, "x"),
        Feedback.failed("f", "late", stamp=stamp),
    ]  # fmt: skip
    combiner = Aggregated({"people": 1.0}, Mean())
    combiner.fit(said)
    found = combiner.combine(group, said)
    reasons = [r.reason if isinstance(r, NoReward) else "" for r in found]
    assert "failed: timeout" in reasons[0]
    assert "abstained: unsure" in reasons[1]
    assert "did not answer" in reasons[2]
    assert "scored turns only" in reasons[3]
    assert reasons[4:] == ["", ""], "one answer of several is enough"
    turns_only = [Feedback("a", turn_scores=(1.0,), stamp=stamp)]
    assert combiner.combine([group[0]], turns_only) == [Rewards(0.0, (0.0,), (1.0,))]
    rankings = [Comparison(group[0].group, (("a",), ("b",)), stamp=stamp)]
    compared = Aggregated({"people": 1.0}, BradleyTerry())
    compared.fit(rankings)
    *two, left_out = compared.combine(group[:3], rankings)
    assert all(isinstance(r, Rewards) for r in two)
    assert isinstance(left_out, NoReward)
    assert "left it out" in left_out.reason
    wrong_kind = Aggregated({"people": 1.0}, BradleyTerry())
    [nothing] = wrong_kind.combine([group[4]], [opinion("e", 1.0, "x")])
    assert isinstance(nothing, NoReward)
    assert "BradleyTerry makes nothing" in nothing.reason


def test_uncertain_estimates_can_be_left_out() -> None:
    said = [opinion("a", 1.0, r) for r in "vwxyz"] + [opinion("b", 0.0, "x")]
    combiner = Aggregated({"people": 1.0}, Majority(), max_sd=0.2)
    combiner.fit(said)
    a, b = combiner.combine([conversation("ok", id="a"), conversation("ok", id="b")], said)
    assert isinstance(a, Rewards)
    assert a.weight == pytest.approx(1 - (6 / (49 * 8)) * 12)
    assert isinstance(b, NoReward)
    assert "max_sd" in b.reason


def strata() -> tuple[list[Any], list[Any]]:
    group = [conversation("ok", id=name) for name in "abc"]
    likes = {"experts": {"a": 4.0, "b": 0.0, "c": 2.0}, "laymen": {"a": 0.0, "b": 4.0, "c": 3.0}}
    said = [
        opinion(e, x, f"{s}-{k}", s)
        for s, own in likes.items()
        for e, x in own.items()
        for k in range(3 if s == "laymen" else 2)
    ]
    return group, said


def test_objectives() -> None:
    group, said = strata()
    found = {}
    for name, objective in {
        "average": "average",
        "worst": "worst",
        "experts": {"experts": 2.0},
        "both": {"experts": 1, "laymen": 3},
    }.items():
        combiner = Aggregated({"people": 1.0}, Mean(), objective=objective)  # type: ignore[arg-type]
        combiner.fit(said)
        found[name] = [r.outcome for r in combiner.combine(group, said)]  # type: ignore[union-attr]
        metrics = combiner.metrics()
        assert metrics["stratum/gap"] == pytest.approx((4 + 4 + 1) / 3, rel=0.2), (
            "both are reported, whatever counts"
        )
        assert metrics["stratum/experts"] == pytest.approx(2.0, abs=0.01)
        assert metrics["stratum/laymen"] == pytest.approx(7 / 3, abs=0.01)
        assert metrics["raters/count"] == 5
        assert 0 <= metrics["raters/reliability_min"] <= metrics["raters/reliability_mean"] <= 1
    assert max(zip(found["average"], "abc", strict=True))[1] != "a", (
        "three laymen outvote two experts"
    )
    assert max(zip(found["experts"], "abc", strict=True))[1] == "a"
    assert max(zip(found["worst"], "abc", strict=True))[1] == "c", "the only one nobody dislikes"
    alone = {
        s: numbers(Mean().aggregate([a for a in said if a.stamp.stratum == s]))
        for s in ("experts", "laymen")
    }
    assert found["worst"] == pytest.approx([min(alone[s][e] for s in alone) for e in "abc"])
    assert found["both"] == pytest.approx(
        [(alone["experts"][e] + 3 * alone["laymen"][e]) / 4 for e in "abc"]
    )


def test_a_stratum_that_is_silent_is_not_replaced_by_another() -> None:
    group, said = strata()
    said = [a for a in said if not (a.episode == "b" and a.stamp.stratum == "experts")]
    for objective in ("worst", {"experts": 1.0, "laymen": 1.0}):
        combiner = Aggregated({"people": 1.0}, Mean(), objective=objective)  # type: ignore[arg-type]
        combiner.fit(said)
        a, b, c = combiner.combine(group, said)
        assert isinstance(a, Rewards)
        assert isinstance(c, Rewards)
        assert b == NoReward("stratum 'experts' did not answer, and others did")


def test_history_carries_raters_over_and_a_resumed_run_says_the_same() -> None:
    _, said = panel(1, groups=15)
    updates = [
        [
            dataclasses.replace(c, id=str(n), group=f"{u}-{c.group}")
            for n, c in enumerate(said)
            if n % 3 == u
        ]
        for u in range(3)
    ]
    updates = [
        [
            dataclasses.replace(
                c, id=f"{u}/{c.id}", stamp=dataclasses.replace(c.stamp, source="people")
            )
            for c in own
        ]
        for u, own in enumerate(updates)
    ]

    def combined(combiner: Aggregated, own: list[Comparison]) -> list[Any]:
        combiner.fit(own)
        group = [
            conversation("ok", id=e) for e in sorted({e for c in own for t in c.ranking for e in t})
        ]
        return [*combiner.combine(group, own), combiner.metrics()]

    first = Aggregated({"people": 1.0}, RaterBradleyTerry(), history=500)
    combined(first, updates[0])
    combined(first, updates[1])
    state = json.loads(json.dumps(first.state_dict()))
    second = Aggregated({"people": 1.0}, RaterBradleyTerry(), history=500)
    second.load_state_dict(state)
    assert combined(second, updates[2]) == combined(first, updates[2]), "bit for bit"
    assert len(first.state_dict()["answers"]) == 500
    again = json.dumps(first.state_dict())
    first.fit(updates[2])
    assert json.dumps(first.state_dict()) == again, "the same answers once more are no more answers"
    fresh = Aggregated({"people": 1.0}, RaterBradleyTerry(), history=1)
    combined(fresh, updates[2])
    assert len(fresh.state_dict()["answers"]) == len(updates[2]), (
        "those of the present update always count"
    )
    spread = [max(r.reliability_sd for r in c._found.whole.raters.values()) for c in (first, fresh)]  # type: ignore[type-var]
    assert spread[0] < spread[1], "raters are known better from more"


def test_states_hold_every_kind_of_answer() -> None:
    said: list[Any] = [
        opinion("a", 0.1 + 0.2, "x", "s"), opinion("a", None, "y", aspects={"kind": 1 / 3},
            turn_scores=(None, 0.5)),
        Feedback.failed("a", "ill", stamp=Stamp(source="people")),
        ranked("a", "bc", probability=0.75, left="cab", aspect="kind", strength=2.0),
        Comparison.abstained("g", "unsure", stamp=Stamp(source="people")),
    ]  # fmt: skip
    combiner = Aggregated({"people": 1.0}, Mean())
    combiner.fit(said)
    other = Aggregated({"people": 1.0}, Mean())
    other.load_state_dict(json.loads(json.dumps(combiner.state_dict())))
    assert other._answers == said
    assert [a.stamp for a in other._answers] == [a.stamp for a in said]


def test_what_is_played_aside_is_judged_and_not_learned_from() -> None:
    _, said = strata()
    combiner = Aggregated({"people": 1.0}, Mean())
    combiner.fit(said)
    aside = [opinion("d", 4.0, "experts-0"), opinion("d", 4.0, "experts-1")]
    [reward] = combiner.combine([conversation("ok", id="d")], aside)
    assert isinstance(reward, Rewards)
    assert reward.outcome > 3
    assert len(combiner.state_dict()["answers"]) == len(said)


@pytest.mark.parametrize("wrong", [
    {"weights": {"a": 1.0, "b": 0.5}}, {"objective": "best"}, {"objective": {}}, {"objective": {"s": -1.0}}, {"history": 0},  # noqa: E501
    {"max_sd": 0.0}, {"uncertainty": "yes"},
])  # fmt: skip
def test_wrong_options_of_the_combiner_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="weight|must|needs"):
        Aggregated(**{"weights": {"people": 1.0}, "aggregator": Mean(), **wrong})


def test_a_run_with_it_reports_raters(model_folder: Any, tmp_path: Any) -> None:
    from support.echo import ECHO

    def said_of(who: str) -> Any:
        return lambda e: float(sum(t.action.count(who) for t in e.turns))

    stage = {
        "env": {"id": ECHO, "kwargs": {"turns": 2}}, "updates": 2, "groups": 2, "group_size": 3,
        "max_new_tokens": 5, "poll": 0.0,
        "feedback": [{"judge": said_of("e"), "name": "e"}, {"judge": said_of("o"), "name": "o"}],
        "combiner": {"name": "aggregate", "aggregator": "mean", "uncertainty": "ignore"},
    }  # fmt: skip
    run = turnwise.Run(
        {"policy": str(model_folder()), "threads": 1, "stages": [{"rl": stage}]},
        folder=tmp_path / "r",
    ).finish()
    assert run.metrics[-1]["feedback/raters/count"] == 2
    assert "feedback/sd_mean" in run.metrics[-1]
