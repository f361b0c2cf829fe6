"""Episodes, feedback and rewards: frozen records that refuse nonsense and survive a round trip."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import turnwise
from hypothesis import given
from hypothesis import strategies as st
from turnwise.engine.records.feedback import version_of
from turnwise.engine.util.ids import canonical_json, derive_id

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
turns = st.builds(
    lambda text, action, ids, reward, info: turnwise.Turn(
        turnwise.Message("user", text), action, reward, (1, 2), tuple(ids),
        tuple(-0.5 for _ in ids), 3, False, info
    ),
    st.text(), st.text(), st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
    st.floats(-10, 10), st.dictionaries(st.text(), json_values, max_size=2),
)  # fmt: skip


@given(st.lists(turns, max_size=3), st.dictionaries(st.text(), json_values, max_size=2), st.text())
def test_episodes_survive_json(played: list[turnwise.Turn], options: dict, reason: str) -> None:
    episode = turnwise.Episode(
        "e", turnwise.Start("a/B-v0", 3, options), tuple(played), "truncated", reason,
        final=turnwise.Message("tool", reason),
        final_ids=(1,), origin=("x", 2), tools=({"name": "t"},),
    )  # fmt: skip
    assert turnwise.Episode.from_dict(json.loads(canonical_json(episode.to_dict()))) == episode


def test_groups_are_starts_of_one_update() -> None:
    make = lambda **k: turnwise.Episode("e", turnwise.Start("a", 1), (), "terminated", **k)  # noqa: E731
    assert make(update=1, slot=0).group == make(update=1, slot=1).group
    assert make(update=1).group != make(update=2).group
    assert make(update=1).group != make(update=1, origin=("e", 0)).group, (
        "branches are groups of their own"
    )
    assert turnwise.Start("a", 1, {"x": (1, 2)}).key == turnwise.Start("a", 1, {"x": [1, 2]}).key


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "7", "seven", [1]])
def test_scores_that_are_no_numbers_are_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="finite number"):
        turnwise.Feedback("e", score=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite number"):
        turnwise.Feedback("e", score=1.0, turn_scores=(bad,))  # type: ignore[arg-type]


def test_numbers_of_libraries_are_numbers() -> None:
    assert turnwise.Feedback("e", score=np.float32(0.5)).score == 0.5
    assert turnwise.Feedback("e", turn_scores=[np.int64(1), None]).turn_scores == (1.0, None)


def test_failed_and_abstained_are_never_a_number() -> None:
    for status in ("failed", "abstained"):
        with pytest.raises(ValueError, match="must not carry a score"):
            turnwise.Feedback("e", score=0.0, status=status)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="must not carry a ranking"):
            turnwise.Comparison("g", (("a",), ("b",)), status=status)  # type: ignore[arg-type]
    assert turnwise.Feedback.failed("e", "timeout").score is None
    for nothing in ({}, {"turn_scores": ()}, {"turn_scores": (None, None)}):
        with pytest.raises(ValueError, match="needs a score"):
            turnwise.Feedback("e", **nothing)


def test_comparisons_are_checked() -> None:
    for ranking, message in (
        ((("a", "a"),), "twice"),
        ((("a",),), "at least two"),
        ((("a", "b"), ()), "empty tier"),
    ):
        with pytest.raises(ValueError, match=message):
            turnwise.Comparison("g", ranking)


def test_rankings_become_scores_and_pairs() -> None:
    comparison = turnwise.Comparison("g", [["a"], ["b", "c"], ["d"]])
    assert turnwise.ranking_scores(comparison) == {"a": 1.0, "b": 0.5, "c": 0.5, "d": 0.0}
    assert turnwise.ranked_pairs(comparison) == [
        ("a", "b"),
        ("a", "c"),
        ("a", "d"),
        ("b", "d"),
        ("c", "d"),
    ]


@given(st.lists(st.integers(1, 3), min_size=2, max_size=5))
def test_ranking_scores_average_to_a_half(sizes: list[int]) -> None:
    names = iter(range(100))
    comparison = turnwise.Comparison("g", [[str(next(names)) for _ in range(n)] for n in sizes])
    scores = turnwise.ranking_scores(comparison)
    assert sum(scores.values()) / len(scores) == pytest.approx(0.5)


def test_rewards_are_one_sum_seen_twice() -> None:
    assert turnwise.Rewards(1.5, (1.0, 0.5)).outcome == 1.5
    with pytest.raises(ValueError, match="sum to"):
        turnwise.Rewards(1.0, (1.0, 0.5))
    with pytest.raises(ValueError, match="finite"):
        turnwise.Rewards(math.nan, (math.nan,))


def test_turns_have_ids_and_logprobs_or_neither() -> None:
    message = turnwise.Message("user", "x")
    with pytest.raises(ValueError, match="or neither"):
        turnwise.Turn(message, "a", 0.0, action_ids=(1,))
    with pytest.raises(ValueError, match="1 action_ids but 2 logprobs"):
        turnwise.Turn(message, "a", 0.0, action_ids=(1,), logprobs=(0.0, 0.0))


def judge_a(episode: turnwise.Episode) -> float:
    return 1.0


def test_versions_tell_judges_apart() -> None:
    regex = turnwise.judges.Regex
    assert version_of(regex("a")) != version_of(regex("b"))
    assert version_of(regex("a")) == version_of(regex("a"))
    assert version_of(partial(judge_a, 1)) != version_of(partial(judge_a, 2))
    assert version_of(judge_a) != version_of(regex("a"))


def test_ids_do_not_depend_on_the_order_of_keys() -> None:
    assert derive_id({"a": 1, "b": 2}) == derive_id({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": math.nan})
