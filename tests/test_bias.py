"""Judges' biases: numbers worked out by hand, planted biases found again, and what must not change
them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit
from support.episodes import conversation
from turnwise import Comparison, Episode, Feedback, Stamp
from turnwise.engine.analysis import style as module
from turnwise.engine.analysis.bias import bias_report
from turnwise.engine.analysis.positions import flips, looks, position, rank_by_place
from turnwise.engine.analysis.style import (
    LengthControl,
    length_controlled,
    length_slope,
    self_preference,
    style,
    style_features,
)


def verdict(group: str, first: str, second: str, wins: float, **fields: Any) -> Comparison:
    """What a judge says that saw `first` first: 1 it wins, 0 it loses, 0.5 a tie."""
    tiers = (
        ((first, second),)
        if wins == 0.5
        else ((first,), (second,))
        if wins
        else ((second,), (first,))
    )
    return Comparison(group, tiers, shown={"order": [first, second]}, **fields)


def both(group: str, a: str, b: str, ab: float | None, ba: float | None) -> Comparison:
    """One comparison of a judge that looked in both orders; `ab`: a wins when shown first, `ba`: b
    wins when shown first."""
    orders = [{"order": [a, b], "first": ab}, {"order": [b, a], "first": ba}]
    return Comparison(group, ((a,), (b,)), details={"orders": orders})


def planted(pairs: int, b: float, seed: int, sharp: float = 2.0) -> list[Comparison]:
    """Verdicts in both orders of a judge that takes what is first with probability b, else follows
    a Bradley-Terry model."""
    rng = np.random.default_rng(seed)
    said = []
    for k in range(pairs):
        a = expit(sharp * rng.normal())
        draw = lambda p: float(rng.random() < b or rng.random() < p)  # noqa: E731
        said.append(both(f"g{k}", f"{k}a", f"{k}b", draw(a), draw(1 - a)))
    return said


# Position


def test_by_hand() -> None:
    """Twenty pairs: twelve judged alike in both orders, five times the first twice, once the second
    twice, twice a win and a tie."""
    said = [both(f"g{k}", "a", "b", 1, 0) for k in range(12)]
    said += [both(f"h{k}", "a", "b", 1, 1) for k in range(5)] + [both("i", "a", "b", 0, 0)]
    said += [both("j", "a", "b", 1, 0.5), both("k", "a", "b", 0.5, 1)]
    found = position(said)
    assert found is not None
    assert found.n == 20
    assert found.estimate == pytest.approx((5 - 1 + 0.5 + 0.5) / 20)
    assert found.low < found.estimate < found.high
    turned = flips(said)
    assert turned is not None
    assert turned.n == 20
    assert turned.estimate == pytest.approx((5 + 1 + 0.5 + 0.5) / 20)
    points = f"25.0 points ({100 * found.low:.1f} to {100 * found.high:.1f}) more often"
    assert (
        found.sentence
        == f"what is shown first wins {points} than what is shown last, 20 comparisons in both"
        " orders"
    )
    assert "35.0 % (" in turned.sentence
    assert turned.sentence.endswith("of the verdicts change with the order, 20 pairs")


def test_a_judge_that_likes_the_last_place_is_described_the_right_way_round() -> None:
    found = position([both(f"g{k}", "a", "b", 0, 0) for k in range(30)])
    assert found is not None
    assert found.estimate == -1.0 == found.low
    assert "wins 100.0 points (" in found.sentence
    assert "to 100.0) less often than" in found.sentence


def test_two_comparisons_with_the_orders_swapped_are_the_same_as_one_with_both() -> None:
    said = planted(200, 0.2, 1)
    apart = []
    for comparison in said:
        for n, look in enumerate(comparison.details["orders"]):
            apart.append(
                verdict(
                    comparison.group,
                    *look["order"],
                    look["first"],
                    stamp=Stamp(request=f"{comparison.group}{n}"),
                )
            )
    assert position(apart) == position(said)
    assert flips(apart) == flips(said)


def test_repeated_looks_count_once_and_failed_ones_not_at_all() -> None:
    said = planted(100, 0.1, 2)
    once = position(said)
    again = [
        replace(c, details={"orders": [*c.details["orders"], c.details["orders"][0]]}) for c in said
    ]
    failed = [both(f"f{k}", "a", "b", None, 1) for k in range(50)]
    assert position(again) == once
    assert position(said + failed) == once
    assert [look.scores for look in looks(failed[:1])] == [(1.0, 0.0)]


def test_a_probability_is_a_share_of_a_win() -> None:
    said = [
        Comparison(f"g{k}", (("b",), ("a",)), probability=0.8, shown={"order": order})
        for k in range(10)
        for order in (["a", "b"], ["b", "a"])
    ]
    assert [look.scores for look in looks(said)] == [
        pytest.approx((0.2, 0.8)),
        pytest.approx((0.8, 0.2)),
    ] * 10
    found = position(said)
    assert found is not None
    assert found.estimate == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "entry",
    [{"order": ["a"], "first": 1}, {"order": ["a", "a"], "first": 1}, {"order": ["a", "b"], "first": 2}, {"first": 1}, "ab", None,  # noqa: E501
     {"order": ["a", "b"], "first": "yes"}],
)  # fmt: skip
def test_orders_of_another_form_are_named(entry: Any) -> None:
    with pytest.raises(ValueError, match="group g1 holds"):
        position([Comparison("g1", (("a",), ("b",)), details={"orders": [entry]})])


def test_rankings_in_one_order() -> None:
    """Three places; by hand: scores 1, 1/2, 0 as shown have the bias 1, in reverse -1, the middle
    one on top 1/2."""
    shown = {"order": ["a", "b", "c"]}
    as_shown = Comparison("g", (("a",), ("b",), ("c",)), shown=shown)
    reverse = Comparison("g", (("c",), ("b",), ("a",)), shown=shown)
    middle = Comparison("g", (("b",), ("a",), ("c",)), shown=shown)
    tied = Comparison("g", (("a", "b", "c"),), shown=shown)
    for comparison, worth in ((as_shown, 1.0), (reverse, -1.0), (middle, 0.5), (tied, 0.0)):
        found = position([replace(comparison, group=f"g{k}") for k in range(10)])
        assert found is not None
        assert found.estimate == pytest.approx(worth), comparison.ranking
        assert "in one order each" in found.sentence
    assert {
        k: v.tolist()
        for k, v in rank_by_place([as_shown, middle, verdict("p", "x", "y", 1)]).items()
    } == {
        2: [1, 0],
        3: [0.75, 0.75, 0],
    }


def test_what_is_not_known_is_not_used() -> None:
    unknown = Comparison("g", (("a",), ("b",)))
    partly = Comparison("g", (("a",), ("b",)), shown={"order": ["a", "c"]})
    left_out = Comparison("g", (("b",), ("a",)), shown={"order": ["a", "c", "b"]})
    assert [list(looks([c])) != [] for c in (unknown, partly, left_out)] == [False, False, True]
    assert position([Comparison.failed("g", "timeout"), Comparison.abstained("g"), unknown]) is None
    assert position([both(f"g{k}", "a", "b", 1, 1) for k in range(9)]) is None
    assert flips([verdict(f"g{k}", "a", "b", 1) for k in range(50)]) is None


@pytest.mark.parametrize("b", [0.0, 0.05, 0.1, 0.2])
def test_a_planted_bias_is_found_within_three_points(b: float) -> None:
    """1,000 pairs in both orders, a judge sure of its content; a judge that hesitates as
    Bradley-Terry says needs 4,000."""
    for pairs, sharp, seeds in ((1000, 1e6, 6), (4000, 2.0, 2)):
        found = [position(planted(pairs, b, seed, sharp)) for seed in range(seeds)]
        assert all(f and abs(f.estimate - b) <= 0.03 for f in found)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """100 judges with 60 pairs; also where hardly anything ever flips, where a plain bootstrap
    would say 0 to 0."""
    for b, sharp in ((0.1, 2.0), (0.02, 1e6)):
        found = [position(planted(60, b, seed, sharp)) for seed in range(100)]
        assert sum(f is not None and f.low <= b <= f.high for f in found) >= 90
    nothing = position(planted(60, 0.0, 0, 1e6))
    assert nothing is not None
    assert nothing.estimate == 0
    assert nothing.low < -0.01
    assert nothing.high > 0.01


def test_verdicts_of_one_group_are_not_taken_for_independent() -> None:
    """Ten verdicts a group that all agree are worth one: the interval is that of the groups."""
    few = planted(40, 0.5, 3)
    many = [replace(c, details={"orders": [{**o,
                        "order": [f"{x}-{n}" for x in o["order"]]} for o in c.details["orders"]]})
            for c in few for n in range(10)]  # fmt: skip
    one, ten = position(few), position(many)
    assert one is not None
    assert ten is not None
    assert ten.n == 400
    assert ten.estimate == pytest.approx(one.estimate)
    assert ten.high - ten.low == pytest.approx(one.high - one.low, rel=0.2)


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 5))
def test_shuffling_renaming_and_swapping_change_nothing(rng: random.Random, seed: int) -> None:
    said = planted(30, 0.1, seed)
    old = [f"{k}{s}" for k in range(30) for s in "abg"]
    names = dict(zip(old, rng.sample(old, len(old)), strict=True))
    turned = []
    for c in said:
        orders = [
            {"order": [names[e] for e in o["order"]], "first": o["first"]}
            for o in c.details["orders"]
        ]
        rng.shuffle(orders)
        turned.append(
            replace(
                c,
                group=names[c.group[1:] + "g"],
                ranking=(tuple(names[e] for tier in c.ranking for e in tier),),
                details={"orders": orders},
            )
        )
    rng.shuffle(turned)
    for measure in (position, flips):
        before, after = measure(said), measure(turned)
        assert before is not None
        assert after is not None
        assert (after.estimate, after.low, after.high) == pytest.approx(
            (before.estimate, before.low, before.high), abs=1e-12
        )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=10, max_size=40))
def test_a_judge_without_bias_has_none_whatever_it_says(content: list[int]) -> None:
    said = [both(f"g{k}", "a", "b", v / 2, 1 - v / 2) for k, v in enumerate(content)]
    found, turned = position(said), flips(said)
    assert found is not None
    assert found.estimate == 0
    assert found.low <= 0 <= found.high
    assert turned is not None
    assert turned.estimate == 0


# Style and self-preference


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc", {"length": 3}),
        ("# Title\n## Sub\n#no header\n- one\n* two\n  1. three\n2) four\n**bold** and __bold__ and ** no **\n", {"headers": 2, "lists": 4, "bold": 3}),  # noqa: E501
        ("```\n# comment\n- x\n```\nend?", {"headers": 0, "lists": 0, "questions": 1}),
        ("```py\n# unfinished?", {"headers": 0, "questions": 0}),
        ("どうですか？", {"questions": 1}),
        ("Great question! It is 4.", {"openers": 1, "questions": 0}),
        ("You're absolutely right, sorry.", {"openers": 1}),
        ("That's a great point.", {"openers": 1}),
        ("I completely agree.", {"openers": 1}),
        ("Sure thing!", {"openers": 1}),
        ("Surely not. I agreed once.", {"openers": 0}),
        ("It is a great question.", {"openers": 0}),
        ("I disagree.", {"openers": 0}),
    ],
)  # fmt: skip
def test_features(text: str, expected: dict[str, float]) -> None:
    found = style_features(conversation(text))
    assert {name: found[name] for name in expected} == expected


def test_features_of_a_conversation() -> None:
    found = style_features(conversation("Why?", "Sure. - no list", "- a\n- b", ""))
    assert found == {
        "length": 4 + 15 + 7,
        "lists": 2,
        "headers": 0,
        "bold": 0,
        "questions": 0.25,
        "openers": 0.25,
    }


def pairs_world(pairs: int, seed: int) -> tuple[dict[str, Episode], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    worth, noise = rng.normal(size=(2, pairs, 2))
    length = np.exp(4 + 0.5 * (0.3 * worth + 0.95 * noise)).astype(int)
    played = {
        f"{k}{s}": conversation("x" * length[k, i], id=f"{k}{s}", seed=k)
        for k in range(pairs)
        for i, s in enumerate("ab")
    }
    return played, worth, length


def judge_pairs(
    played: dict[str, Episode], lean: np.ndarray, seed: int, side: float = 0.0
) -> list[Comparison]:
    rng = np.random.default_rng(seed)
    said = []
    for k, z in enumerate(lean):
        a, b = (f"{k}a", f"{k}b") if rng.random() < 0.5 else (f"{k}b", f"{k}a")
        wins = rng.random() < expit((z if a.endswith("a") else -z) + side)
        said.append(verdict(played[a].group, a, b, float(wins)))
    return said


def by_id(values: np.ndarray) -> dict[str, float]:
    return {f"{k}{s}": float(values[k, i]) for k in range(len(values)) for i, s in enumerate("ab")}


def test_the_regression_is_the_optimum_of_its_loss() -> None:
    """Against a general optimiser on the loss of the docstring, and the interval against the
    sandwich written out group by group."""
    played, worth, length = pairs_world(200, 0)
    d = (length[:, 0] - length[:, 1]).astype(float)
    said = judge_pairs(
        played,
        2 * (worth[:, 0] - worth[:, 1]) + 0.8 * np.tanh(d / np.sqrt((d**2).mean())),
        1,
        side=0.4,
    )
    [found] = style(said, played, by_id(worth))
    x, y = [], []
    for c in said:
        a, b = c.shown["order"]
        apart = [by_id(length)[a] - by_id(length)[b], by_id(worth)[a] - by_id(worth)[b]]
        x.append([*apart, 1.0])
        y.append(float(c.ranking[0][0] == a))
    design, won = np.array(x), np.array(y)
    scale = np.sqrt((design[:, :2] ** 2).mean(0))
    design[:, 0], design[:, 1] = np.tanh(design[:, 0] / scale[0]), design[:, 1] / scale[1]
    loss = lambda b: np.logaddexp(0, -(2 * won - 1) * (design @ b)).sum() + 0.05 * b @ b  # noqa: E731
    best = minimize(loss, np.zeros(3), tol=1e-10).x
    assert found.estimate == pytest.approx(2 * expit(best[0] * np.tanh(1)) - 1, abs=1e-5)
    chance = expit(design @ best)
    hessian = sum(
        p * (1 - p) * np.outer(r, r) for p, r in zip(chance, design, strict=True)
    ) + 0.1 * np.eye(3)
    meat = sum((v - p) ** 2 * np.outer(r, r) for v, p, r in zip(won, chance, design, strict=True))
    error = np.sqrt((np.linalg.inv(hessian) @ meat @ np.linalg.inv(hessian))[0, 0] * 200 / 199)
    ends = 2 * expit((best[0] + np.array([-1, 1]) * 1.97196 * error) * np.tanh(1)) - 1
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=1e-4)
    assert (found.kind, found.unit, found.n) == ("length", "net win rate", 200)
    assert f"of {scale[0]:.0f} characters more win" in found.sentence
    assert "the reference holds equal, 200 pairs" in found.sentence


def test_a_planted_taste_is_found_and_none_where_there_is_none() -> None:
    for effect in (0.0, 0.3):
        hits = 0
        for seed in range(10):
            played, worth, length = pairs_world(600, seed)
            d = length[:, 0] - length[:, 1]
            lean = 2 * np.arctanh(effect) * np.tanh(d / np.sqrt((d**2).mean())) / np.tanh(1)
            said = judge_pairs(played, 2 * (worth[:, 0] - worth[:, 1]) + lean, seed)
            [found] = style(said, played, by_id(worth))
            assert abs(found.estimate - effect) < 0.2
            hits += found.low <= effect <= found.high
        assert hits >= 8


def test_a_noisy_reference_makes_good_taste_look_like_bias_and_a_second_one_cures_it() -> None:
    """A judge without bias, longer replies better: biased by one person's scores, not by two
    people's."""
    single, double = [], []
    for seed in range(10):
        played, worth, _ = pairs_world(600, seed)
        said = judge_pairs(played, 2 * (worth[:, 0] - worth[:, 1]), seed)
        one, two = (
            by_id(worth + np.random.default_rng([seed, n]).normal(size=worth.shape)) for n in (1, 2)
        )
        single += style(said, played, one)
        double += style(said, played, one, two)
    assert np.mean([b.estimate for b in single]) > 0.12
    assert abs(np.mean([b.estimate for b in double])) < 0.04
    assert sum(b.low <= 0 <= b.high for b in double) >= 8


def test_without_a_reference_it_says_so() -> None:
    played, worth, _ = pairs_world(100, 0)
    [found] = style(judge_pairs(played, 2 * (worth[:, 0] - worth[:, 1]), 0), played)
    assert found.sentence.endswith("; without a reference, it may be deserved")


def test_scores_are_compared_within_groups_only() -> None:
    """Least squares by hand on two groups' worth of numbers; adding a constant to a group, in score
    and in length, changes nothing."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(10, 100, (40, 4))
    scores = lengths / 50 + rng.normal(size=(40, 4))
    answers, played = [], {}
    for shift in (0, 1000):
        for g in range(40):
            for i in range(4):
                name = f"{shift}-{g}-{i}"
                played[name] = conversation(
                    "x" * int(lengths[g, i] + shift * (g % 3)), id=name, seed=g
                )
                answers.append(Feedback(name, float(scores[g, i] + shift * g)))
    found = [
        style(
            [a for a in answers if a.episode.startswith(f"{s}-")],
            {e: v for e, v in played.items() if e.startswith(f"{s}-")},
        )[0]
        for s in (0, 1000)
    ]
    assert found[0].estimate == pytest.approx(found[1].estimate, abs=1e-9)
    away = lengths - lengths.mean(1, keepdims=True)
    x = np.tanh(away / np.sqrt((away**2).mean()))
    x = (x - x.mean(1, keepdims=True)).ravel()
    y = (scores - scores.mean(1, keepdims=True)).ravel()
    y /= np.sqrt((y**2).mean())
    assert found[0].estimate == pytest.approx(x @ y / (x @ x + 0.1) * np.tanh(1))
    assert found[0].unit == "sd"
    assert found[0].n == 160
    assert "score 0." in found[0].sentence
    assert "sd (" in found[0].sentence


def test_self_preference() -> None:
    """Its family wins 30 points more often than it loses against equals, though the other family
    writes better; style plays no part."""
    rng = np.random.default_rng(0)
    worth = rng.normal([0.0, 1.0], 1.0, (1500, 2))
    played = {f"{k}{s}": conversation("x", id=f"{k}{s}", seed=k) for k in range(1500) for s in "ab"}
    authors = {e: "acme" if e.endswith("a") else "other" for e in played}
    said = judge_pairs(played, worth[:, 0] - worth[:, 1] + 2 * np.arctanh(0.3), 1)
    [found] = self_preference(said, played, authors, "acme", by_id(worth))
    assert found.low <= 0.3 <= found.high
    assert abs(found.estimate - 0.3) < 0.1
    assert found.kind == "own family"
    assert "replies by acme, its own family, win" in found.sentence
    fair = judge_pairs(played, worth[:, 0] - worth[:, 1], 2)
    [none] = self_preference(fair, played, authors, "acme", by_id(worth))
    assert none.low <= 0 <= none.high
    assert self_preference(said[:9], played, authors, "acme", by_id(worth)) == []
    assert self_preference(said, played, dict.fromkeys(played, "acme"), "acme", by_id(worth)) == []
    assert self_preference(said, played, {}, "acme", by_id(worth)) == []
    scores = [Feedback(e, v + 0.5 * (authors[e] == "acme")) for e, v in by_id(worth).items()]
    [scored] = self_preference(scores, played, authors, "acme", by_id(worth))
    spread = np.sqrt(((worth[:, 0] + 0.5 - worth[:, 1]) ** 2).mean()) / 2
    assert scored.estimate == pytest.approx(0.5 / spread, rel=0.02)
    assert scored.unit == "sd"


def test_a_judge_that_only_follows_length_has_a_finite_bias() -> None:
    played, _, length = pairs_world(100, 0)
    [found] = style(judge_pairs(played, 1e6 * (length[:, 0] - length[:, 1]), 0), played)
    assert 0.7 < found.low <= found.estimate <= found.high <= 1


def test_the_report_tells_judges_and_versions_apart() -> None:
    played, worth, _ = pairs_world(60, 0)
    said = []
    for name, version, b in (("one", "1", 0.0), ("one", "2", 1.0), ("two", "1", 0.0)):
        stamp = Stamp(source=name, version=version)
        for k in range(60):
            good = float(worth[k, 0] > worth[k, 1])
            c = both(f"g{k}", f"{k}a", f"{k}b", max(good, b), max(1 - good, b))
            said.append(replace(c, stamp=stamp))
    said += [Comparison.failed("g1", "timeout", stamp=Stamp(source="three"))]
    authors = {e: "acme" if int(e[:-1]) % 2 == (e[-1] == "a") else "other" for e in played}
    found = bias_report(
        said, played.values(), reference=by_id(worth), authors=authors, families={"two": "acme"}
    )
    assert [(b.rater, b.version, b.kind) for b in found] == [
        ("one", "1", "position"), ("one", "1", "flips"), ("one", "1", "length"),
        ("one", "2", "position"), ("one", "2", "flips"), ("one", "2", "length"),
        ("two", "1", "position"), ("two", "1", "flips"), ("two", "1", "length"),
        ("two", "1", "own family"),
    ]  # fmt: skip
    assert [b.estimate for b in found if b.kind in ("position", "flips")] == [0, 0, 1, 1, 0, 0]
    assert bias_report([], []) == []


# Length control


def test_length_control_by_hand() -> None:
    """One group of lengths 0 and 2: deviations -1 and 1, sd 1, x = -tanh 1 and tanh 1; scores 0 and
    1 lie half below and above."""
    x = np.tanh(1)
    slope, sd = length_slope([0, 1], [0, 2], ["g", "g"], ridge=0.5)
    assert sd == 1
    assert slope == pytest.approx(x / (2 * x**2 + 0.5))
    assert length_controlled([0, 1], [0, 2], ["g", "g"], slope, sd).tolist() == pytest.approx(
        [slope * x, 1 - slope * x]
    )
    assert length_controlled([3.0], [7], ["alone"], slope, sd).tolist() == [3.0]
    assert length_slope([], [], []) == (0.0, 0.0)
    assert length_slope([1, 2], [5, 5], ["g", "g"]) == (0.0, 0.0)
    with pytest.raises(ValueError, match="2 values, but 1 groups"):
        length_slope([1, 2], [5, 5], ["g"])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-5, 5), st.integers(0, 500), st.integers(0, 4)), min_size=1, max_size=40
    )
)
def test_groups_keep_their_means_and_a_constant_score_stays(
    rows: list[tuple[float, int, int]],
) -> None:
    scores, lengths, groups = (list(v) for v in zip(*rows, strict=True))
    fair = LengthControl().fit(scores, lengths, groups).apply(scores, lengths, groups)
    for group in set(groups):
        mine = [g == group for g in groups]
        assert fair[mine].mean() == pytest.approx(np.array(scores)[mine].mean(), abs=1e-9)
    assert LengthControl().fit([1.0] * len(rows), lengths, groups).slope == pytest.approx(
        0, abs=1e-12
    )


def test_length_control_takes_the_planted_length_out_and_leaves_the_worth() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), 4)
    worth, length = rng.normal(size=800), rng.integers(10, 400, 800)
    away = module._centred(length, groups.tolist())
    liked = worth + 1.5 * np.tanh(away / away.std())
    control = LengthControl().fit(liked, length, groups.tolist())
    fair = module._centred(control.apply(liked, length, groups.tolist()), groups.tolist())
    assert control.slope == pytest.approx(1.5, abs=0.2)
    assert abs(np.corrcoef(fair, np.tanh(away / away.std()))[0, 1]) < 0.1
    assert np.corrcoef(fair, module._centred(worth, groups.tolist()))[0, 1] > 0.99


def test_length_control_forgets_and_resumes() -> None:
    rng = np.random.default_rng(1)
    control = LengthControl(window=20)
    assert control.apply([1.0, 2.0], [10, 20], ["g", "g"]).tolist() == [1.0, 2.0]
    for taste in (3.0, -3.0):
        for g in range(30):
            length = rng.integers(10, 100, 4)
            control.fit(taste * length / 50 + rng.normal(size=4), length, [g] * 4)
        assert np.sign(control.slope) == np.sign(taste)
    again = LengthControl(window=20)
    again.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert (again.slope, again.sd) == (control.slope, control.sd)
    assert len(again.state_dict()["groups"]) == 20
    for wrong in ({"window": 0}, {"ridge": 0.0}):
        with pytest.raises(ValueError, match="window must be"):
            LengthControl(**wrong)
