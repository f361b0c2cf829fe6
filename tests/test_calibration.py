"""Judges against people: the powered mean and what it is worth, agreement, correction, the alarm,
and the combiner in a run."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import turnwise
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, ttest_ind
from support.echo import ECHO
from support.episodes import conversation
from turnwise import Comparison, Feedback, Stamp
from turnwise.engine.analysis.calibration import (
    Correction,
    correlations,
    fit_correction,
    mean_difference,
    mean_interval,
    same_order,
)
from turnwise.engine.analysis.drift import Drift
from turnwise.engine.analysis.judge_report import FEATURES, calibrate, named_features, on_scale
from turnwise.engine.analysis.prediction_powered import prediction_powered_mean, worth
from turnwise.engine.records.episode import Episode
from turnwise.engine.records.rewards import NoReward, Rewards
from turnwise.plugins.combiners.calibrated import Calibrated

NUMBERS = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))


# The mean.


def test_a_mean_by_hand() -> None:
    """People 1 2 3 6 6, judge 1 2 3 4 5: slope 1.4, people's mean 3.6; three others with 6 6 6 move
    the judge's mean from 3 to 33/8."""
    found = prediction_powered_mean([6, 6, 6], [1, 2, 3, 4, 5], [1, 2, 3, 6, 6])
    assert found.mean.estimate == pytest.approx(3.6 + 1.4 * (33 / 8 - 3))
    assert found.human.estimate == pytest.approx(3.6)
    assert found.judge == pytest.approx(33 / 8)
    assert found.power == pytest.approx(1.4 * 3 / 8)
    assert found.correlation == pytest.approx(14 / math.sqrt(10 * 21.2))
    assert (found.labels, found.judged, found.clusters) == (5, 8, 5)
    assert found.human_variance == pytest.approx(21.2 / 4 / 5), "s^2 / n, exactly"
    low, high = ttest_1samp([1, 2, 3, 6, 6], 0).confidence_interval(0.95)
    assert (found.human.low, found.human.high) == pytest.approx((low, high))


def test_the_variance_is_the_jackknifes() -> None:
    """Against leaving clusters out one by one, with numpy's own regression."""
    rng = np.random.default_rng(2)
    f, others = rng.normal(size=24), rng.normal(size=60)
    y = f + rng.normal(size=24)
    mine, theirs = np.arange(24) // 3, 5 + np.arange(60) // 4  # clusters 5, 6 and 7 have both

    def estimate(own: np.ndarray, rest: np.ndarray) -> float:
        slope = np.polyfit(f[own], y[own], 1)[0]
        return float(
            y[own].mean() + slope * (np.concatenate([f[own], others[rest]]).mean() - f[own].mean())
        )

    left = {c: estimate(mine != c, theirs != c) for c in {*mine.tolist(), *theirs.tolist()}}
    variance = 0.0
    for stratum in (
        [v for c, v in left.items() if c in mine],
        [v for c, v in left.items() if c not in mine],
    ):
        variance += (
            (len(stratum) - 1)
            / len(stratum)
            * sum((v - sum(stratum) / len(stratum)) ** 2 for v in stratum)
        )
    found = prediction_powered_mean(others, f, y, (theirs.tolist(), mine.tolist()))
    assert found.mean.estimate == pytest.approx(estimate(mine >= 0, theirs >= 0))
    assert found.variance == pytest.approx(variance)
    assert found.clusters == 8


def test_against_the_papers_own_package() -> None:
    """Numbers of ppi-python 0.2.3, `ppi_mean_pointestimate` and `ppi_mean_ci(alpha=0.05)` at lam =
    0, at lam = 1 and with its own tuning. It gives the limit for many
    labels: normal quantiles, and the deviation that divides by n."""
    k, u = np.arange(40), np.arange(400)
    f = np.round(np.sin(1.7 * k) + 0.05 * k, 4)
    y, others = (
        np.round(0.8 * f + 0.3 * np.cos(2.3 * k) + 0.2, 4),
        np.round(np.sin(0.9 * u) + 0.004 * u, 4),
    )
    found = prediction_powered_mean(others, f, y)
    assert found.human.estimate == pytest.approx(0.9986975, abs=1e-7)
    assert found.mean.estimate == pytest.approx(
        0.9986975 + found.power * (0.80644575 - 0.9986975), abs=1e-7
    )
    small = 2.022691 / 1.959964 * math.sqrt(40 / 39)
    assert found.human.width == pytest.approx((1.22833847 - 0.76905653) * small, rel=1e-6)
    tuned = 0.93736398 - 0.75008198
    assert tuned < found.mean.width < 1.1 * tuned
    assert found.mean.estimate == pytest.approx(0.84372298, abs=0.02)


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=5, max_size=12),
    st.lists(NUMBERS, max_size=12),
    st.floats(0.1, 50),
    NUMBERS,
)
def test_the_judges_scale_does_not_matter(
    both: list[tuple[float, float]], others: list[float], scale: float, shift: float
) -> None:
    f, y = [a for a, _ in both], [b for _, b in both]
    one = prediction_powered_mean(others, f, y)
    if (one.correlation**2 * 3 > 0.99 and one.correlation**2 * (len(y) - 2) < 1.01) or np.std(
        f
    ) < 0.1:
        return  # on the edge rounding decides
    two = prediction_powered_mean(
        [shift + scale * x for x in others], [shift + scale * x for x in f], y
    )
    assert two.mean.estimate == pytest.approx(one.mean.estimate, rel=1e-6, abs=1e-6)
    assert two.human == one.human
    assert two.worth == pytest.approx(one.worth, rel=1e-4, abs=1e-4)


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12), st.lists(NUMBERS, max_size=12)
)
def test_a_mean_is_a_number_inside_its_interval(
    both: list[tuple[float, float]], others: list[float]
) -> None:
    found = prediction_powered_mean(others, [a for a, _ in both], [b for _, b in both])
    for interval in (found.mean, found.human):
        assert math.isfinite(interval.estimate)
        assert interval.low <= interval.estimate <= interval.high
    if not others or found.power == 0:
        assert (found.mean, found.power, found.worth) == (
            found.human,
            0.0,
            0.0,
        ), "without help it is people's own"


def test_a_judge_that_helps_nobody_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=30)
    for judge in (-y, np.zeros(30), 0.1 * y + rng.normal(size=30) - 0.1):
        found = prediction_powered_mean(rng.normal(size=200), judge, y)
        if found.correlation**2 <= 1 / 28 or found.correlation < 0:
            assert found.mean == found.human
            assert found.power == 0
            assert found.worth == 0
    assert prediction_powered_mean([1.0, 2.0], -y, y).correlation == pytest.approx(-1)


def test_too_few_or_equal_labels_give_no_interval() -> None:
    assert prediction_powered_mean([1, 2], [1], [5]).mean.width == math.inf
    same = prediction_powered_mean([1, 2], [1, 2, 3, 4], [1, 1, 1, 1])
    assert same.mean.estimate == 1
    assert same.mean.width == math.inf
    assert worth([1, 2], [1, 2, 3, 4, 5], [1] * 5) is None
    grouped = prediction_powered_mean([], [1, 2, 3], [3, 4, 5], ([], ["a", "a", "a"]))
    assert grouped.human.width == math.inf, "one start is one observation"


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="for the same episodes, at least one, got 2 and 1"):
        prediction_powered_mean([], [1, 2], [1])
    with pytest.raises(ValueError, match="at least one"):
        prediction_powered_mean([1], [], [])
    with pytest.raises(ValueError, match="finite"):
        prediction_powered_mean([math.nan], [1], [1])
    with pytest.raises(ValueError, match="level"):
        prediction_powered_mean([1], [1], [1], level=95)
    with pytest.raises(ValueError, match="1 clusters or features are given for 2 episodes"):
        prediction_powered_mean([], [1, 2], [1, 2], ([], ["a"]))


def draw(
    rng: np.random.Generator, kind: str, rho: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A judge's scores and people's: a shift and a scale of its own, correlated at rho before
    people's are rounded."""
    y, noise = rng.normal(size=(2, size))
    f = 0.3 + 0.5 * (rho * y + math.sqrt(1 - rho**2) * noise)
    return (
        f,
        {
            "normal": y,
            "ordinal": 1.0 + np.digitize(y, [-1.5, -0.5, 0.3, 1.0]),
            "binary": (y > 0.5).astype(float),
        }[kind],
    )


def coverage(kind: str, rho: float, runs: int, seed: int, labels: int = 50) -> tuple[float, float]:
    """Share of intervals that hold the truth, and the mean width over that of people alone."""
    # 1 + the sum of Phi(-step) over the steps.
    truth = {"normal": 0.0, "ordinal": 3.165400, "binary": 0.308538}[kind]
    rng, hits, widths, alone = np.random.default_rng(seed), 0, 0.0, 0.0
    for _ in range(runs):
        f, y = draw(rng, kind, rho, 500)
        found = prediction_powered_mean(f[labels:], f[:labels], y[:labels])
        hits += found.mean.low <= truth <= found.mean.high
        widths, alone = widths + found.mean.width, alone + found.human.width
    return hits / runs, widths / alone


@pytest.mark.parametrize("kind", ["normal", "ordinal", "binary"])
@pytest.mark.parametrize("rho", [0.0, 0.3, 0.5, 0.7, 0.9])
def test_the_promise_of_500_simulations(kind: str, rho: float) -> None:
    covered, width = coverage(kind, rho, 500, seed=0)
    assert 0.90 <= covered <= 0.98
    assert width < (1.0 if rho >= 0.5 else 1.01)


def test_what_a_judge_is_worth() -> None:
    """At r^2 = 0.8 and nine times as many judged as labelled, by the limit of many labels: 1 / ((1
    - r^2) + r^2 / 10) = 3.57 times the labels."""
    rng = np.random.default_rng(5)
    f, noise = rng.normal(size=(2, 4000))
    y = f + 0.5 * noise
    found = worth(f[400:], f[:400], y[:400], samples=200)
    assert found is not None
    assert found.ratings.estimate == pytest.approx(400 * 2.57, rel=0.15)
    assert found.ratings.low < 400 * 2.57 < found.ratings.high
    assert found.limit == pytest.approx(400 * 4, rel=0.15)
    assert worth(f[400:], f[:400], y[:400], samples=200) == found, "the same seed"
    exact = worth(f[400:], f[:400], 2 * f[:400], samples=20)
    assert exact is not None
    assert exact.limit == math.inf


# Agreement.


def test_orders_by_hand() -> None:
    """Judge 1 2 2 0 against people 1 2 3 3: five ordered pairs; (2, 3) open, of the others (1,2)
    (1,3) alike and (1,4) (2,4) not."""
    found = same_order([1, 2, 2, 0], [1, 2, 3, 3])
    assert found is not None
    assert (found.pairs, found.judge_ties, found.human_ties) == (5, 1, 1)
    assert found.share.estimate == pytest.approx(2.5 / 5)
    within = same_order([1, 2, 2, 0], [1, 2, 3, 3], ["a", "a", "b", "b"], within=True)
    assert within is not None
    assert (within.pairs, within.human_ties, within.share.estimate) == (1, 1, 1.0)
    assert same_order([1, 2], [3, 3]) is None


def test_the_orders_interval_leaves_clusters_out() -> None:
    rng = np.random.default_rng(1)
    f, y, of = rng.normal(size=12), rng.normal(size=12), np.arange(12) // 3

    def share(keep: np.ndarray) -> float:
        i, j = np.triu_indices(int(keep.sum()), 1)
        a, b = f[keep], y[keep]
        return float((np.sign(a[i] - a[j]) == np.sign(b[i] - b[j])).mean())

    left = np.array([share(of != c) for c in range(4)])
    # T, 3 degrees of freedom.
    half = 3.182446305 * math.sqrt(3 / 4 * ((left - left.mean()) ** 2).sum())
    found = same_order(f, y, of.tolist())
    assert found is not None
    expected = (max(share(of >= 0) - half, 0), min(share(of >= 0) + half, 1))
    assert (found.share.low, found.share.high) == pytest.approx(expected)


def test_correlations_and_their_intervals() -> None:
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(60):
        f, noise = rng.normal(size=(2, 60))
        found = correlations(f, 0.6 * f + 0.8 * noise)
        assert found is not None
        assert found.pearson.low <= found.pearson.estimate <= found.pearson.high
        held += found.pearson.low <= 0.6 <= found.pearson.high
    assert 51 <= held <= 60
    ranks = correlations([1, 2, 3, 4], [1, 10, 100, 1000])
    assert ranks is not None
    assert ranks.spearman.estimate == pytest.approx(1)
    assert ranks.pearson.estimate < 0.9
    assert ranks.pearson.low < ranks.pearson.estimate < ranks.pearson.high
    assert correlations([1, 1, 1], [1, 2, 3]) is None
    lonely = correlations([0, 0, 1], [1, 2, 3])
    assert lonely is not None
    assert (lonely.pearson.low, lonely.pearson.high) == (-1, 1), "without the third nothing varies"
    f, y = np.arange(5.0), np.array([1.0, 3.0, 2.0, 5.0, 4.0])
    z = np.arctanh([np.corrcoef(np.delete(f, i), np.delete(y, i))[0, 1] for i in range(5)])
    half = 2.776445105 * math.sqrt(4 / 5 * ((z - z.mean()) ** 2).sum())  # t, 4 degrees of freedom
    by_hand = correlations(f, y)
    assert by_hand is not None
    expected = np.tanh(np.arctanh(0.8) + np.array([-half, half]))
    assert (by_hand.pearson.low, by_hand.pearson.high) == pytest.approx(tuple(expected))


def test_two_versions_are_compared_as_by_welch() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=20), 0.5 + 2 * rng.normal(size=35)
    found = mean_difference(one, two)
    low, high = ttest_ind(two, one, equal_var=False).confidence_interval(0.95)
    assert (found.estimate, found.low, found.high) == pytest.approx(
        (two.mean() - one.mean(), low, high)
    )
    assert mean_difference([1, 2], [3, 4], (["a", "a"], ["b", "c"])).width == math.inf
    assert mean_interval([1.0, 2.0, 3.0]).width == pytest.approx(2 * 4.302652730 / math.sqrt(3))


# Single scores.


def test_a_ridge_by_hand() -> None:
    """Residuals -3 -1 1 3 on z = (-3 -1 1 3) / sqrt 5: weight z'r / (z'z + 1) = (20 / sqrt 5) / 5,
    so the slope is 1 + 4/5; the error of a line is least."""
    f = np.array([-3.0, -1.0, 1.0, 3.0])
    found = fit_correction(f, 2 * f + 7)
    assert found.kind == "linear"
    assert (found.intercept, found.slope) == pytest.approx((7, 1.8))
    assert found(5) == pytest.approx(7 + 1.8 * 5)


@pytest.mark.parametrize(
    ("kind", "truth"),
    [("none", (0, 1, 0)), ("shift", (1.5, 1, 0)), ("linear", (3, 2, 0)), ("features", (0, 1, 1.5))],
)
def test_the_simplest_map_that_is_not_worse(kind: str, truth: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(7)
    f, x, noise = rng.normal(size=(3, 200))
    words = 50 + 20 * x
    y = truth[0] + truth[1] * f + truth[2] * x + noise
    found = fit_correction(f, y, {"words": words})
    assert found.kind == kind
    assert found.sd == pytest.approx(1, rel=0.15)
    assert found.labels == 200
    guess = np.array([found(a, {"words": b}) for a, b in zip(f, words, strict=True)])
    assert float(((y - guess) ** 2).mean()) < 1.15


def test_a_few_labels_do_no_harm() -> None:
    """A judge without fault: what a fit on 12 labels costs on fresh episodes, over 100 runs,
    against the noise's own 1."""
    rng, cost = np.random.default_rng(1), []
    for _ in range(100):
        f, x, noise = rng.normal(size=(3, 12))
        found = fit_correction(f, f + noise, {"x": x})
        fresh_f, fresh_x = rng.normal(size=(2, 50))
        cost.append(
            float(
                np.mean(
                    [(found(a, {"x": b}) - a) ** 2 for a, b in zip(fresh_f, fresh_x, strict=True)]
                )
            )
        )
    assert np.mean(cost) < 0.05
    assert np.quantile(cost, 0.8) == 0


def test_folds_never_split_a_cluster() -> None:
    """A feature that only names the start fits whoever sees the start's other members, and nobody
    else."""
    rng = np.random.default_rng(3)
    start = np.repeat(np.arange(15), 4)
    taste = rng.normal(size=15)[start]
    f = rng.normal(size=60)
    features = {f"start-{k}": (start == k).astype(float) for k in range(15)}
    y = f + 2 * taste + 0.1 * rng.normal(size=60)
    assert fit_correction(f, y, features, start.tolist()).kind != "features"
    assert fit_correction(f, y, features).kind == "features"


def test_what_cannot_be_corrected() -> None:
    assert fit_correction([1, 2, 3], [5, 6, 7]).kind == "none", "three starts are too few"
    flat = fit_correction([1, 1, 1, 1, 1], [3, 3.1, 2.9, 3, 3.05], {"same": [2] * 5})
    assert flat.kind == "shift"
    assert flat(1) == pytest.approx(3.01)
    with pytest.raises(KeyError):
        Correction("features", weights={"words": 1.0})(1.0, {})


# The alarm.


def alarms(rng: np.random.Generator, values: np.ndarray) -> int | None:
    drift = Drift()
    for value in values:
        drift.add(float(value), float(rng.random()))
    return drift.alarm


def test_evidence_by_hand() -> None:
    """Two residuals: p_1 = 0.9; the second is larger, p_2 = (1 + 0.6) / 2."""
    drift = Drift()
    drift.add(1.0, 0.9)
    drift.add(2.0, 0.6)
    z = [1.2815515655, 0.8416212336]
    mixture = lambda s, m: math.exp(s**2 / (2 * (1 + m))) / math.sqrt(1 + m)  # noqa: E731
    assert drift.evidence == pytest.approx(
        mixture(z[0] + z[1], 2) / 2 + mixture(z[1], 1) / 6 + 1 / 3
    )


def test_false_alarms_are_rare_and_a_shift_is_found() -> None:
    rng = np.random.default_rng(0)
    steady = [alarms(rng, rng.integers(1, 6, 300)) for _ in range(100)]
    assert sum(a is not None for a in steady) <= 3, (
        "1 % in all; more than 3 of 100 has a chance of 2 %"
    )
    found = [
        alarms(rng, np.concatenate([rng.normal(size=100), 1 + rng.normal(size=100)]))
        for _ in range(60)
    ]
    assert all(a is None or a > 100 for a in found[:5])
    assert sum(a is not None for a in found) >= 55, (
        "a shift of one deviation, within 100 labels, after 100 before"
    )


@pytest.mark.slow
def test_false_alarms_over_1000_labels() -> None:
    """Ordinal and heavy-tailed residuals: no more than 1 %, at 400 runs each (more than 9 has a
    chance of 1 %); the shift within 100 labels in 95 %."""
    rng = np.random.default_rng(1)
    for sample in (lambda n: rng.integers(-2, 3, n), lambda n: rng.standard_t(2, n)):
        assert sum(alarms(rng, sample(1000)) is not None for _ in range(400)) <= 9
    for before in (100, 300, 900):
        late = [
            alarms(rng, np.concatenate([rng.normal(size=before), 1 + rng.normal(size=100)]))
            for _ in range(100)
        ]
        assert sum(a is not None and a > before for a in late) >= 92


@pytest.mark.parametrize("values", [[0.0], [1, 1, 2], [0, 1, -1, 1, 3, 3], [0, 0, 0, 1, 1, 1, 1]])
def test_evidence_is_a_martingale(values: list[float]) -> None:
    """Wherever it stands: the mean over the next residual's rank, which is uniform, is what it is
    now."""
    drift = Drift()
    for i, value in enumerate(values):
        drift.add(value, (0.3 + i * 0.618034) % 1)
    before, state, size, found = drift.evidence, drift.state_dict(), len(values) + 1, []
    for p in (np.arange(4000) + 0.5) / 4000:
        ranks = [
            (v, p * size - sum(w < v for w in values), 1 + values.count(v))
            for v in sorted(set(values))
        ]
        between = next(((v, rest / ties) for v, rest, ties in ranks if 0 <= rest < ties), None)
        if between is None:  # a place between two of them
            below = int(p * size)
            ordered = sorted(values)
            between = (ordered[below - 1] + 1e-6 if below else ordered[0] - 1, p * size - below)
        again = Drift()
        again.load_state_dict(state)
        again.add(*between)
        found.append(again.evidence)
    assert np.mean(found) == pytest.approx(before, rel=0.02)


def test_the_alarm_resumes_exactly() -> None:
    rng = np.random.default_rng(3)
    values, lucks = np.concatenate([rng.normal(size=60), 3 + rng.normal(size=30)]), rng.random(90)
    whole, one, two = Drift(), Drift(), Drift()
    raised = [whole.add(v, u) for v, u in zip(values, lucks, strict=True)]
    for v, u in zip(values[:70], lucks[:70], strict=True):
        one.add(v, u)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for v, u in zip(values[70:], lucks[70:], strict=True):
        two.add(v, u)
    assert two.state_dict() == whole.state_dict()
    assert sum(raised) == 1
    assert whole.alarm is not None
    assert raised[whole.alarm - 1]
    assert whole.began is not None
    assert abs(whole.began - 60) <= 3
    assert whole.shift == pytest.approx(3, abs=0.6)


# Answers, reports, the combiner.


def episode(
    number: int, update: int = 1, start: int | None = None, text: str = "yes", slot: int = 0
) -> Episode:
    """Numbers conversations of run "r": many, of which only the place and the text vary."""
    return conversation(
        text,
        id=f"e{number}",
        env="env",
        seed=number if start is None else start,
        run="r",
        update=update,
        slot=slot,
    )


def score(
    target: Episode, value: float, source: str, rater: str = "", version: str = "1"
) -> Feedback:
    id_ = f"{target.id}-{source}-{rater}"
    return Feedback(
        target.id, value, id=id_, stamp=Stamp(source=source, rater=rater, version=version)
    )


def test_scales_and_features() -> None:
    assert [on_scale(v, "people", "judge", {"people": (1, 5)}) for v in (1, 3, 5)] == [0, 0.5, 1]
    assert on_scale(4, "people", "judge", {"people": (1, 5), "judge": (-1, 1)}) == 0.5
    assert on_scale(4, "people", "judge", {}) == 4
    e = conversation("a b c", "is it?\nyes? no")
    assert {n: FEATURES[n](e) for n in FEATURES} == {
        "words": 3.5,
        "turns": 2,
        "questions": 1,
        "lines": 0.5,
    }
    with pytest.raises(ValueError, match="Did you mean 'questions'"):
        named_features(["question"])


def study(
    size: int = 240, labelled: int = 80, drifts: bool = False
) -> tuple[list[Episode], list[Feedback], list[Feedback]]:
    """Groups of four per start, ten starts per update; a judge that is 0.2 too generous, from its
    second version on 0.5; people say 1 to 5."""
    rng = np.random.default_rng(0)
    episodes = [episode(i, 1 + i // 40, i // 4, slot=i % 4) for i in range(size)]
    judged, said = [], []
    for i, e in enumerate(episodes):
        true = rng.uniform(0.2, 0.8)
        second = i >= size // 2
        judged.append(
            score(
                e,
                true + (0.6 if drifts and second else 0.2) + 0.1 * rng.normal(),
                "judge",
                version="2" if second else "1",
            )
        )
        if (i // 4) % (size // labelled) == 0:
            said += [
                score(e, 1 + 4 * (true + 0.1 * rng.normal()), "people", rater)
                for rater in ("ann", "bob")
            ]
    return episodes, judged, said


def test_a_judge_is_calibrated() -> None:
    episodes, judged, said = study()
    found = calibrate(judged, said, episodes, ranges={"people": [1, 5]})
    part = found.whole
    assert part is not None
    assert part.mean is not None
    assert part.bias is not None
    assert part.worth is not None
    assert (found.judge, found.people, part.labels, part.judged) == ("judge", ("people",), 80, 240)
    assert part.bias.low < -0.2 < part.bias.high < 0
    assert part.mean.mean.low < 0.5 < part.mean.mean.high
    assert part.mean.judge == pytest.approx(0.7, abs=0.05)
    assert part.mean.mean.width < part.mean.human.width
    assert part.mean.clusters == 20
    assert part.worth.ratings.estimate > 20
    assert part.correction.kind in ("shift", "linear")
    assert part.correction(0.7) == pytest.approx(0.5, abs=0.05)
    assert part.correlations is not None
    assert part.correlations.pearson.estimate > 0.75
    assert part.order_within is not None
    assert part.order_within.pairs == 20 * 6
    assert [p.name for p in found.versions] == ["version 1", "version 2"]
    assert [p.labels for p in found.versions] == [40, 40]
    assert [p.name for p in found.windows] == [
        "updates 1 to 2",
        "updates 3 to 3",
        "updates 4 to 5",
        "updates 6 to 6",
    ]
    assert sum(p.labels for p in found.windows) == 80
    assert found.changes[0].difference.low < 0 < found.changes[0].difference.high
    assert found.people_correlation is not None
    assert found.people_correlation.estimate > 0.6
    assert found.people_alpha is not None
    assert found.alarm is None
    assert found.watched == 20
    lines = "\n".join(found.lines())
    assert f"This judge is worth {part.worth.ratings.estimate:.0f} (" in lines
    assert "human ratings" in lines
    assert "scores too high" in lines
    assert "No drift was noticed over 20 labelled starts" in lines
    assert calibrate(judged, said, episodes, ranges={"people": [1, 5]}) == found, (
        "the same answers, the same numbers"
    )
    assert (
        calibrate(judged[::-1], said[::-1], episodes[::-1], ranges={"people": [1, 5]}).lines()
        == found.lines()
    ), "in any order"


def test_a_drift_is_named_with_its_update() -> None:
    episodes, judged, said = study(1600, 800, drifts=True)
    found = calibrate(judged, said, episodes, ranges={"people": [1, 5]})
    assert found.alarm is not None
    assert found.alarm.began == pytest.approx(21, abs=1)
    assert 21 <= found.alarm.update <= 24
    assert found.alarm.shift == pytest.approx(-0.4, abs=0.1)
    assert found.changes[0].difference.high < 0
    assert f"DRIFTED: from about update {found.alarm.began}" in "\n".join(found.lines())
    assert "that is a change" in "\n".join(found.lines())


def test_rankings_say_nothing_of_levels() -> None:
    rng = np.random.default_rng(1)
    episodes = [episode(i, 1, i // 3, slot=i % 3) for i in range(60)]
    worth_ = rng.normal(size=60)
    judged = [score(e, worth_[i] + 0.5 * rng.normal(), "judge") for i, e in enumerate(episodes)]
    said = []
    for g in range(20):
        own = range(3 * g, 3 * g + 3)
        for rater in ("ann", "bob"):
            order = sorted(own, key=lambda i: -worth_[i] + 0.3 * rng.normal())
            tiers = (
                [(f"e{order[0]}",), (f"e{order[1]}", f"e{order[2]}")]
                if g % 5 == 0
                else [(f"e{i}",) for i in order]
            )
            said.append(
                Comparison(
                    episodes[3 * g].group,
                    tuple(tiers),
                    id=f"{g}{rater}",
                    stamp=Stamp(source="people", rater=rater),
                )
            )
    found = calibrate(judged, said, episodes)
    assert found.whole is not None
    assert found.whole.mean is None
    assert found.whole.worth is None
    assert found.alarm is None
    assert found.rankings is not None
    assert found.rankings.human_ties == 8
    assert found.rankings.pairs == 40 * 3 - 8
    scores = {f"e{i}": a.score or 0.0 for i, a in enumerate(judged)}
    same = [
        scores[a] > scores[b]
        for c in said
        for k, tier in enumerate(c.ranking)
        for below in c.ranking[k + 1 :]
        for a in tier
        for b in below
    ]
    assert found.rankings.share.estimate == pytest.approx(sum(same) / len(same))
    assert found.people_agreement is not None
    assert found.people_agreement > 0.7
    assert any("pairs that people ranked as they do" in line for line in found.lines())


def test_nothing_in_common_and_two_judges() -> None:
    episodes, judged, said = study()
    silent = calibrate(judged, [Feedback.abstained("e1", stamp=Stamp(source="people"))], episodes)
    assert silent.whole is None
    assert "no episode was scored by the judge and by people" in silent.lines()[0]
    assert calibrate([], [], []).whole is None
    with pytest.raises(ValueError, match="one judge at a time, got answers of 'judge', 'people'"):
        calibrate([*judged, *said], said, episodes)


WEIGHTS = {"judge": 2.0, "people": 0.0, "environment": 1.0}


def feed(
    combiner: Calibrated,
    update: int,
    judge: Callable[[Episode, float], float],
    size: int = 16,
    labelled: bool = True,
) -> list[Any]:
    """An update of groups of four: people like it as it is, the judge says something of that and of
    the text."""
    rng = np.random.default_rng(update)
    episodes = [
        episode(
            1000 * update + i,
            update,
            1000 * update + i // 4,
            "word " * int(rng.integers(1, 40)),
            i % 4,
        )
        for i in range(size)
    ]
    said = []
    for e in episodes:
        true = float(rng.uniform())
        said.append(score(e, judge(e, true), "judge"))
        if labelled:
            said.append(score(e, true + 0.05 * float(rng.normal()), "people"))
    combiner.fit(said)
    return [r for g in range(0, size, 4) for r in combiner.combine(episodes[g : g + 4], said)]


def test_the_combiner_takes_out_what_people_do_not_reward() -> None:
    """A judge that pays for words; people do not. Before `min_labels` its scores are as they
    are."""
    wordy = lambda e, true: true + 0.02 * len(e.turns[0].action.split())  # noqa: E731
    combiner, plain = (
        Calibrated(WEIGHTS, "judge", "people", features=["words"], min_labels=m) for m in (30, 5000)
    )
    for update in (1, 2):
        first, second = feed(combiner, update, wordy), feed(plain, update, wordy)
        assert first == second, (
            "16 labels are too few, and what people say of an episode is not for its own reward"
        )
    own, theirs = feed(combiner, 3, wordy), feed(plain, 3, wordy)
    assert combiner.metrics()["calibration/correction"] == 3
    assert plain.metrics()["calibration/correction"] == 0
    rng = np.random.default_rng(3)
    words, true = [], []
    for _ in range(16):
        words.append(int(rng.integers(1, 40)))
    for _ in range(16):
        true.append(float(rng.uniform()))
        rng.normal()
    outcome, raw = [r.outcome for r in own], [r.outcome for r in theirs]
    assert raw == pytest.approx([2 * (t + 0.02 * w) for t, w in zip(true, words, strict=True)])
    assert np.corrcoef(outcome, true)[0, 1] > 0.98 > 0.9 > np.corrcoef(raw, true)[0, 1]
    assert np.mean(outcome) == pytest.approx(2 * np.mean(true), abs=0.1)


def test_what_the_combiner_reports() -> None:
    combiner = Calibrated(WEIGHTS, "judge", "people")
    assert combiner.metrics() == {
        "calibration/labels": 0,
        "calibration/judged": 0,
        "calibration/drift": 0,
        "calibration/correction": 0,
    }
    rng = np.random.default_rng(9)
    for update in range(1, 9):
        feed(
            combiner,
            update,
            lambda _, true: true + 0.3 + 0.1 * float(rng.normal()),
            labelled=update % 4 == 0,
        )
    found = combiner.metrics()
    assert (found["calibration/labels"], found["calibration/judged"]) == (32, 128)
    assert found["calibration/bias"] == pytest.approx(-0.3, abs=0.06)
    assert found["calibration/low"] < found["calibration/mean"] < found["calibration/high"]
    assert found["calibration/judge_mean"] == pytest.approx(0.8, abs=0.08)
    assert found["calibration/width"] == pytest.approx(
        found["calibration/high"] - found["calibration/low"]
    )
    assert found["calibration/width"] < found["calibration/human_width"]
    assert found["calibration/worth"] > 5
    assert found["calibration/correlation"] > 0.8
    assert found["calibration/order"] > 0.75
    assert all(math.isfinite(v) for v in found.values())


def test_the_alarm_warns_once_and_resumes() -> None:
    combiner = Calibrated(WEIGHTS, "judge", "people", history=160)
    for update in range(1, 21):
        feed(combiner, update, lambda _, true: true)
    restored = Calibrated(WEIGHTS, "judge", "people", history=160)
    restored.load_state_dict(json.loads(json.dumps(combiner.state_dict())))
    for one in (combiner, restored):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for update in range(21, 30):
                feed(one, update, lambda _, true: true + 0.5)
        assert len(caught) == 1
        assert re.match(
            r"judge 'judge' drifted: from about update 2[01] .* is -0\.[345]\d* from what it was",
            str(caught[0].message),
        )
        assert one.metrics()["calibration/drift"] == 1
        assert one.metrics()["calibration/judged"] == 160
    assert combiner.state_dict() == restored.state_dict()
    assert feed(combiner, 30, lambda _, true: true) == feed(restored, 30, lambda _, true: true)
    again = Calibrated(WEIGHTS, "judge", "people", history=160)
    again.load_state_dict(combiner.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(again, 31, lambda _, true: true + 0.5)


def test_a_new_version_begins_anew_and_failures_stay_failures() -> None:
    combiner = Calibrated(WEIGHTS, "judge", "people", min_labels=16)
    feed(combiner, 1, lambda _, true: true + 1)
    group = [episode(i, 2, 2, slot=i) for i in range(3)]
    old = [score(group[0], 1.5, "judge", version="1"), score(group[1], 1.5, "judge", version="2")]
    lost = Feedback.failed("e2", "timeout", stamp=Stamp(source="judge"))
    combiner.fit([*old, lost])
    first, second, third = combiner.combine(group, [*old, lost])
    assert isinstance(first, Rewards)
    assert first.outcome == pytest.approx(2 * 0.5, abs=0.1), "a shift of -1, times the weight"
    assert isinstance(second, Rewards)
    assert second.outcome == pytest.approx(2 * 1.5), "another version is another judge"
    assert isinstance(third, NoReward)
    assert "timeout" in third.reason
    assert combiner.metrics()["calibration/labels"] == 0, "of the version in force"


def test_conversations_played_aside_are_not_kept() -> None:
    combiner = Calibrated(WEIGHTS, "judge", "people", min_labels=16)
    feed(combiner, 1, lambda _, true: true + 1)
    before = json.dumps(combiner.state_dict())
    aside = episode(77, 2, 77)
    [reward] = combiner.combine([aside], [score(aside, 1.2, "judge")])
    assert isinstance(reward, Rewards)
    assert json.dumps(combiner.state_dict()) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"judge": "jugde", "people": "people"}, "Did you mean 'judge'"),
        ({"judge": "judge", "people": "environment"}, "not asked"),
        ({"judge": "judge", "people": ["judge"]}, "by itself"),
        ({"judge": [], "people": "people"}, "must name a source"),
        ({"judge": "judge", "people": "people", "features": ["wrods"]}, "Did you mean 'words'"),
        (
            {"judge": "judge", "people": "people", "ranges": {"poeple": [1, 5]}},
            "Did you mean 'people'",
        ),
        (
            {"judge": "judge", "people": "people", "ranges": {"people": [5, 1]}},
            r"\[lowest, highest\]",
        ),
        ({"judge": "judge", "people": "people", "min_labels": 2}, "at least 4"),
        ({"judge": "judge", "people": "people", "turns": ["judge"]}, "whole episodes"),
    ],
)
def test_what_the_combiner_refuses(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Calibrated(WEIGHTS, **options)


# In a run.


class LatePeople(turnwise.FeedbackSource):
    """Says what the share of "e" in the replies is worth, two updates after they were played; it
    asks the ledger what is open, as a rating service does."""

    version = "1"

    def open(self, context: turnwise.Context) -> None:
        self.ledger = context.ledger

    def request(self, requests: Sequence[turnwise.Request]) -> None:
        pass

    def receive(self) -> list[Feedback]:
        asked = [r for r in self.ledger.open_requests() if r["source"] == "people"]
        known = self.ledger.episodes([r["target"] for r in asked])
        newest = max((e.update for e in known.values()), default=0)
        due = [r for r in asked if known[r["target"]].update <= newest - 2]
        return [
            Feedback(
                r["target"],
                1 + 4 * shares(known[r["target"]]),
                id=r["id"] + "-said",
                stamp=Stamp(request=r["id"]),
            )
            for r in due
        ]


def shares(played: Episode) -> float:
    text = " ".join(turn.action for turn in played.turns)
    return text.count("e") / (1 + len(text))


def crooked(played: Episode) -> float:
    """Rewards words beside what people look at."""
    return 0.2 + shares(played) + 0.05 * FEATURES["words"](played)


class Broken(Exception):
    pass


def test_late_answers_reach_the_correction_and_a_broken_run_resumes_exactly(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, resume: bool = False, **more: Any) -> turnwise.Run:
        feedback = [
            {"judge": crooked, "name": "judge"},
            {"judge": LatePeople(), "name": "people", "required": False, "share": 0.6},
        ]
        rl = {
            "env": {"id": ECHO, "kwargs": {"turns": 2}}, "updates": 7, "groups": 4, "group_size": 3,
            "max_new_tokens": 5, "poll": 0.0,
            "optimizer": {"name": "grpo", "lr": 1e-2, "warmup": 0}, "feedback": feedback,
            "combiner": {"name": "calibrated", "judge": "judge", "people": "people",
                "features": ["words"], "ranges": {"people": [1, 5]}, "min_labels": 6},
        }  # fmt: skip
        config = {
            "policy": str(model_folder()),
            "threads": 1,
            "checkpoint_every": 1,
            "name": "r",
            "stages": [{"rl": {**rl, **more}}],
        }
        return turnwise.Run(config, folder=tmp_path / name, resume=resume)

    whole = run("whole").finish()
    labels = [m["feedback/calibration/labels"] for m in whole.metrics]
    assert labels[:3] == [0, 0, 0], "heard during update 3, known before update 4"
    assert labels[-1] > 6
    assert labels == sorted(labels)
    assert whole.metrics[-1]["feedback/calibration/correction"] > 0
    scores = {
        f.episode: f.score or 0.0
        for f in whole.ledger.feedback(run=whole.id, kind="feedback", status="scored", late=True)
        if f.stamp.source == "judge"
    }
    changed = [
        abs(m.outcome - scores[m.episode])
        for m in whole.ledger.members(whole.id, 7)
        if m.outcome is not None
    ]
    assert min(changed) > 1e-6, "outcomes of the last update are corrected"
    first = [
        abs(m.outcome - scores[m.episode])
        for m in whole.ledger.members(whole.id, 1)
        if m.outcome is not None
    ]
    assert max(first) < 1e-9

    real, count = turnwise.Run.finish_update, [0]

    def breaks(self: turnwise.Run, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] in (5, 8):
            raise Broken
        return real(self, *args, **kwargs)

    monkeypatch.setattr(turnwise.Run, "finish_update", breaks)
    with pytest.raises(Broken):
        run("broken").finish()
    # People's answers of the broken update are in the ledger already when it is made again.
    with pytest.raises(Broken):
        run("broken", resume=True).finish()
    again = run("broken", resume=True).finish()
    assert [m["feedback/calibration/labels"] for m in again.metrics] == labels
    for one, other in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    found = calibrate(
        [
            f
            for f in again.ledger.feedback(
                run=again.id, kind="feedback", status="scored", late=True
            )
            if f.stamp.source == "judge"
        ],
        [
            f
            for f in again.ledger.feedback(
                run=again.id, kind="feedback", status="scored", late=True
            )
            if f.stamp.source == "people"
        ],
        again.ledger.run_episodes(again.id),
        ranges={"people": [1, 5]},
        features=["words"],
    )
    assert found.whole is not None
    assert found.whole.labels >= labels[-1]
    assert "worth" in " ".join(found.lines())
