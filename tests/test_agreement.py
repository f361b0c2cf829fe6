"""Agreement statistics against published tables and ones worked out by hand, and what must not
change them."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from turnwise import Comparison, Stamp
from turnwise.engine.analysis.agreement import (
    alpha_interval,
    comparison_units,
    gwet_ac1,
    krippendorff_alpha,
    percent_agreement,
)

# Krippendorff's four observers and twelve units ("Computing Krippendorff's Alpha-Reliability",
# 2011, section C); 0 is missing.
OBSERVERS = {
    "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    "C": [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
}
TEXTBOOK = [{name: row[u] for name, row in OBSERVERS.items() if row[u]} for u in range(12)]
LEVELS: list[Any] = ["nominal", "ordinal", "interval"]


@pytest.mark.parametrize(
    ("level", "alpha"), [("nominal", 0.743421), ("ordinal", 0.815388), ("interval", 0.849107)]
)
def test_the_textbook_data(level: Any, alpha: float) -> None:
    assert krippendorff_alpha(TEXTBOOK, level) == pytest.approx(alpha, abs=1e-6)


def test_gwet_s_number_for_the_same_data() -> None:
    # Published with the irrCAC package.
    assert gwet_ac1(TEXTBOOK) == pytest.approx(0.77544, abs=1e-5)
    assert percent_agreement(TEXTBOOK) == pytest.approx(
        9 / 11
    )  # of eleven units: eight agree, two are 3 to 1, one is split four ways


def test_a_common_value_makes_alpha_small_and_not_ac1() -> None:
    """90 of 100 units "yes" by both, 5 and 5 split: 90 % agreement, alpha near 0 by hand, AC1 0.89
    (Gwet 2008, table of the paradox)."""
    units = [{"a": 1, "b": 1}] * 90 + [{"a": 1, "b": 0}] * 5 + [{"a": 0, "b": 1}] * 5
    assert percent_agreement(units) == pytest.approx(0.9)
    share = 190 / 200
    assert krippendorff_alpha(units) == pytest.approx(1 - 199 * 20 / (200**2 - 190**2 - 10**2))
    assert krippendorff_alpha(units) == pytest.approx(-0.0474, abs=1e-4)
    chance = 2 * share * (1 - share)
    assert gwet_ac1(units) == pytest.approx((0.9 - chance) / (1 - chance))
    assert gwet_ac1(units) == pytest.approx(0.8895, abs=1e-4)


def test_what_is_undefined_is_none() -> None:
    for units in ([], [{}], [{"a": 1}, {"b": 2}]):
        assert percent_agreement(units) is None
        assert krippendorff_alpha(units) is None
        assert alpha_interval(units) is None
        assert gwet_ac1(units) is None
    same = [{"a": 1, "b": 1}] * 3
    assert percent_agreement(same) == 1.0
    assert krippendorff_alpha(same) is None
    assert krippendorff_alpha(same, "interval") is None
    assert alpha_interval(same) is None
    assert gwet_ac1(same) is None
    assert gwet_ac1([*same, {"a": 2}]) == 1.0, "a value that only one rater used is a category"


def test_wrong_arguments_say_what_would_be_right() -> None:
    words = [{"a": "good", "b": "bad"}]
    for wrong in ("ratio", ""):
        with pytest.raises(ValueError, match="nominal"):
            krippendorff_alpha(words, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="numbers"):
        krippendorff_alpha(words, "ordinal")
    assert krippendorff_alpha(words) == 0.0
    with pytest.raises(ValueError, match="confidence"):
        alpha_interval(words, confidence=1.0)


ratings = st.lists(
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 4), max_size=4), max_size=12
)


@settings(max_examples=60, deadline=None)
@given(ratings, st.randoms(use_true_random=False))
def test_order_and_names_do_not_matter(units: list[dict[str, int]], rng: random.Random) -> None:
    renamed = [{f"rater {name}": value for name, value in unit.items()} for unit in units]
    rng.shuffle(renamed)
    recoded = [{name: "zyxwv"[value] for name, value in unit.items()} for unit in units]
    for level in LEVELS:
        assert krippendorff_alpha(renamed, level) == pytest.approx(krippendorff_alpha(units, level))
    shifted = [{name: 10.0 + 3 * value for name, value in unit.items()} for unit in units]
    assert krippendorff_alpha(shifted, "interval") == pytest.approx(
        krippendorff_alpha(units, "interval")
    )
    stretched = [{name: 2.0**value for name, value in unit.items()} for unit in units]
    assert krippendorff_alpha(stretched, "ordinal") == pytest.approx(
        krippendorff_alpha(units, "ordinal")
    )
    for statistic in (percent_agreement, gwet_ac1, krippendorff_alpha):
        assert statistic(renamed) == pytest.approx(statistic(units))
        assert statistic(recoded) == pytest.approx(statistic(units))
    agreed = percent_agreement(units)
    if agreed is not None and agreed < 1:
        alpha = krippendorff_alpha(units)
        assert alpha is not None
        assert alpha < 1


def test_the_interval_holds_alpha_and_is_repeatable() -> None:
    rng = random.Random(0)
    units = []
    for _ in range(300):
        truth = rng.randrange(4)
        units.append({r: truth if rng.random() < 0.8 else rng.randrange(4) for r in "abc"})
    found = alpha_interval(units, seed=1)
    assert found is not None
    assert found == alpha_interval(units, seed=1)
    assert found != alpha_interval(units, seed=2)
    alpha = krippendorff_alpha(units)
    assert alpha is not None
    assert found[0] < alpha < found[1]
    assert found[0] < 0.8**2 < found[1], "beyond chance two raters agree where both know"
    wide = alpha_interval(units[:20], seed=1)
    assert wide is not None
    assert wide[1] - wide[0] > 2 * (found[1] - found[0])


def ranking(who: str, *tiers: str, **more: Any) -> Comparison:
    return Comparison(
        "g", tuple(tuple(t) for t in tiers), stamp=Stamp(source="people", rater=who), **more
    )


def test_numbers_are_equal_up_to_rounding() -> None:
    units = [{"a": 0.1 + 0.2, "b": 0.3}, {"a": 1.0, "b": 1}, {"a": 0.3, "b": 1.0}]
    exact = [{"a": 0.3, "b": 0.3}, {"a": 1.0, "b": 1.0}, {"a": 0.3, "b": 1.0}]
    for measure in (percent_agreement, krippendorff_alpha, gwet_ac1):
        assert measure(units) == measure(exact)
    assert percent_agreement(units) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="nan is no rating"):
        percent_agreement([{"a": float("nan"), "b": 1.0}])


def test_as_many_values_as_units() -> None:
    """Ratings on a continuous scale: memory goes with the ratings, not with ratings times
    values."""
    rng = random.Random(0)
    units = [{"a": (x := rng.random()), "b": x + rng.gauss(0, 0.1)} for _ in range(20_000)]
    tracemalloc.start()
    alpha = krippendorff_alpha(units, "interval")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert alpha == pytest.approx(1 - 0.01 / 2 / (1 / 12 + 0.01 / 2), abs=0.01), (
        "the share of the variance that is not noise"
    )


def test_rankings_become_units() -> None:
    said = [
        ranking("x", "a", "bc"), ranking("y", "b", "a"), ranking("z", "b", "a", probability=0.5),
        ranking("y", "a", "b"),
        Comparison.failed("g", "ill"), Comparison("g", (("c",), ("a",)),
            stamp=Stamp(source="judge")),
    ]  # fmt: skip
    assert comparison_units(said) == [
        {"x": "first", "y": "first", "z": "tie"},
        {"x": "first", "judge": "second"},
        {"x": "tie"},
    ]
    assert percent_agreement(comparison_units(said)) == pytest.approx((1 / 3 + 0) / 2)
    apart = comparison_units([ranking("x", "a", "b"), ranking("y", "b", "a", aspect="kind")])
    assert len(apart) == 2, "what is better and what is kinder are two questions"
