"""Comparisons as pairs, agreement by hand, and the panel of simulated raters."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import turnwise
from support.episodes import NO_RUN, conversation
from turnwise.engine.analysis.preferences import (
    connected,
    opinion,
    pairs,
    rater_agreement,
    source_agreement,
    truth_agreement,
)
from turnwise.judges.simulated import SimulatedPanel


def ranked(*tiers: str, group: str = "g", **more: Any) -> turnwise.Comparison:
    return turnwise.Comparison(group, tuple(tuple(t) for t in tiers), **more)


def test_pairs_average_over_raters() -> None:
    said = [ranked("a", "b", "c"), ranked("b", "ac"), ranked("a", "b", strength=2.0)]
    found = {(p.first, p.second): (p.probability, p.margin, p.weight) for p in pairs(said)}
    assert found == {
        ("a", "b"): (pytest.approx(2 / 3), pytest.approx(2 / 3), 3),
        ("a", "c"): (0.75, 0.0, 2),
        ("b", "c"): (1.0, 0.0, 2),
    }
    [soft] = pairs([ranked("b", "a", probability=0.8)])
    assert soft.probability == pytest.approx(0.2), "how sure it is that the first, a, is better"


def test_sources_count_by_their_weights() -> None:
    """By hand: people say a > b twice and give a grade once, the judge says b > a and is 0.8 sure,
    c is compared by it alone."""
    people, judge = turnwise.Stamp(source="people"), turnwise.Stamp(source="judge")
    said = [
        ranked("a", "b", stamp=people, strength=2.0),
        ranked("a", "b", stamp=people),
        ranked("b", "a", stamp=judge, probability=0.8),
        ranked("b", "c", stamp=judge),
    ]
    table = {
        # weights                       a better than b, its margin and weight     b better than c
        (): ((2.2 / 3, 2 / 3, 3.0), (1.0, 0.0, 1.0)),
        (("judge", 0.5),): ((2.1 / 2.5, 2 / 2.5, 2.5), (1.0, 0.0, 0.5)),
        (("people", 3.0), ("judge", 2.0)): ((6.4 / 8, 6 / 8, 8.0), (1.0, 0.0, 2.0)),
        (("people", 0.0),): ((0.2, 0.0, 1.0), (1.0, 0.0, 1.0)),
        (("judge", 0.0),): ((1.0, 1.0, 2.0), None),
        (("judge", 0.0), ("people", 0.0)): (None, None),
    }
    for weights, expected in table.items():
        found = {
            (p.first, p.second): (p.probability, p.margin, p.weight)
            for p in pairs(said, dict(weights))
        }
        for pair, values in zip((("a", "b"), ("b", "c")), expected, strict=True):
            assert found.get(pair) == (None if values is None else pytest.approx(values)), (
                weights,
                pair,
            )


def test_agreement_by_hand() -> None:
    same, turned, tied = ranked("a", "b", "c"), ranked("b", "a", "c"), ranked("a", "bc")
    # one against the other: (a,b) differ, (a,c) and (b,c) agree; with the tie, (b,c) does not count
    assert rater_agreement([same, turned]) == pytest.approx(2 / 3)
    assert rater_agreement([same, tied]) == 1.0
    assert rater_agreement([same]) is None
    truth = {"a": 1.0, "b": 0.0, "c": 0.0}
    assert truth_agreement([same], truth) == 1.0, "pairs that are equal in truth do not count"
    assert truth_agreement([turned], truth) == 0.5
    assert truth_agreement([tied], {"a": 0.0, "b": 0.0, "c": 0.0}) is None


def test_agreement_is_of_different_raters_of_one_source() -> None:
    by = lambda rater, source="people": turnwise.Stamp(rater=rater, source=source)  # noqa: E731
    ann, ben, cy = (ranked("a", "b", stamp=by(r)) for r in ("ann", "ben", "cy"))
    judge = ranked("b", "a", stamp=by("", "judge"))
    assert rater_agreement([ann, judge]) is None, "two sources are not two raters"
    assert source_agreement([ann, judge]) == 0.0
    assert source_agreement([ann, ben, judge]) == 0.0
    assert source_agreement([ann, ben]) is None
    assert rater_agreement([ann, ranked("b", "a", stamp=by("ann"))]) is None, (
        "who changed their mind is one rater"
    )
    turned = ranked("b", "a", stamp=by("dan"))
    assert rater_agreement([ann, ben, cy, turned]) == 3 / 6, "of six twos of raters three agree"
    assert rater_agreement([judge, ranked("b", "a", stamp=by("", "judge"))]) == 1.0, (
        "unnamed: each is somebody else"
    )
    other = ranked("b", "a", stamp=by("ben"), aspect="tone")
    assert rater_agreement([ann, other]) is None, "what was compared on another aspect"


def test_counting_is_looking_at_every_two() -> None:
    rng = random.Random(3)
    said = []
    for _ in range(60):
        places = [rng.randrange(3) for _ in range(4)]
        tiers = [tuple(e for e, p in zip("abcd", places, strict=True) if p == k) for k in range(3)]
        stamp = turnwise.Stamp(rater=rng.choice("uvwxyz"), source=rng.choice(["one", "two"]))
        said.append(
            turnwise.Comparison(rng.choice("gh"), tuple(t for t in tiers if t), stamp=stamp)
        )
    for found, alike in (
        (rater_agreement(said), lambda x, y: x.source == y.source and x.rater != y.rater),
        (source_agreement(said), lambda x, y: x.source != y.source),
    ):
        agreed = [
            (opinion(x, a, b) > 0.5) == (opinion(y, a, b) > 0.5)  # type: ignore[operator]
            for x, y in combinations(said, 2)
            if x.group == y.group and alike(x.stamp, y.stamp)
            for a, b in combinations("abcd", 2)
            if 0.5 not in (opinion(x, a, b), opinion(y, a, b))
        ]
        assert found == pytest.approx(sum(agreed) / len(agreed))


def test_what_nothing_connects_is_apart() -> None:
    ab, bc, de, other = (
        ranked("a", "b"),
        ranked("b", "c"),
        ranked("d", "e"),
        ranked("a", "b", group="h"),
    )
    assert connected([ab, de, bc, other]) == [[ab, bc], [de], [other]]
    assert connected([]) == []
    many = [turnwise.Comparison("g", ((f"{i}",), (f"{i + 1}",))) for i in range(20_000)]
    assert [len(part) for part in connected(many)] == [20_000]
    assert len(pairs(many)) == 20_000
    assert rater_agreement(many) is None


def asked(
    panel: SimulatedPanel, *episodes: turnwise.Episode, slots: int = 1
) -> list[turnwise.Comparison]:
    panel.request(
        [
            turnwise.Request("group", episodes[0].group, "panel", slot, episodes=episodes)
            for slot in range(slots)
        ]
    )
    return panel.receive()


def worth(slot: int, value: float, *replies: str, seed: int = 1) -> turnwise.Episode:
    """Builds a conversation by what it is worth, paid for its last reply."""
    where = {"id": f"e{seed}-{slot}", "env": "e", "seed": seed, "slot": slot, **NO_RUN}
    reward = [*[0.0] * (len(replies) - 1), value]
    return conversation(*replies, heard="so", reward=reward, **where)


def test_the_panels_errors_are_the_ones_it_was_given() -> None:
    """Every pair obeys Bradley-Terry at u / noise: 1 against 0.4 at noise 0.5 is right in
    sigma(1.2) of the cases."""
    panel = SimulatedPanel(pool=50, noise=0.5, taste=0.0, seed=1)
    wins = 0
    for seed in range(2000):
        good, bad = worth(0, 1.0, "a", seed=seed), worth(1, 0.4, "b", seed=seed)
        [said] = asked(panel, bad, good)
        wins += said.ranking[0] == (good.id,)
    expected = 1 / (1 + math.exp(-1.2))
    assert wins / 2000 == pytest.approx(
        expected, abs=4 * math.sqrt(expected * (1 - expected) / 2000)
    )


def test_without_noise_it_ranks_by_truth_and_bias() -> None:
    short, long = worth(0, 0.5, "done"), worth(1, 0.4, "why?", "when?", "done")
    assert asked(SimulatedPanel(noise=0, taste=0, seed=0), long, short)[0].ranking == (
        (short.id,),
        (long.id,),
    )
    biased = SimulatedPanel(noise=0, taste=0, bias={"questions": 0.1}, seed=0)
    assert asked(biased, short, long)[0].ranking == (
        (long.id,),
        (short.id,),
    ), "two questions outweigh a tenth"
    tied = SimulatedPanel(noise=0, taste=0, tie=0.2, seed=0)
    assert asked(tied, long, short)[0].ranking == ((short.id, long.id),)


def test_tastes_differ_by_rater_and_cancel() -> None:
    panel = SimulatedPanel(pool=200, noise=0, taste=0.3, seed=0)
    first: Counter[str] = Counter()
    for seed in range(60):
        plain, asks = worth(0, 0.5, "done", seed=seed), worth(1, 0.5, "why?", seed=seed)
        said = asked(panel, plain, asks, slots=10)
        assert len({c.stamp.rater for c in said}) == 10, "no rater ranks a group twice"
        first.update(c.ranking[0][0].split("-")[1] for c in said)
    assert 0.35 < first["0"] / 600 < 0.65


def test_the_panel_is_named_as_simulated_and_repeats_itself() -> None:
    panel = SimulatedPanel(seed=3)
    episodes = [worth(i, i / 4, "x") for i in range(4)]
    said = asked(panel, *episodes, slots=3)
    assert all(
        c.stamp.rater.startswith("simulated-") and c.stamp.stratum == "simulated" for c in said
    )
    assert asked(SimulatedPanel(seed=3), *episodes, slots=3) == said
    assert [c.id for c in asked(SimulatedPanel(seed=4), *episodes, slots=3)] == [c.id for c in said]
    with pytest.raises(ValueError, match="Did you mean 'questions'"):
        SimulatedPanel(bias={"question": 1.0})
