"""Canaries: that they are what they say, and that a judge that falls for them is found soon while a
sound one is left alone."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from turnwise import Episode, Message, Start, Turn
from turnwise.engine.errors import PreferenceError
from turnwise.judges.trust import canaries as module
from turnwise.judges.trust.canaries import (
    KINDS,
    Quarantine,
    Schedule,
    canary,
    fell_for_rank,
    fell_for_score,
    is_canary,
    read_known_bad,
)

PLAYED = Episode(
    "0123456789abcdef",
    Start("acme/Help-v0", 7, {"level": 2}),
    (
        Turn(
            Message("user", "My order is late."),
            "Let me look.",
            0.5,
            (1, 2),
            (3, 4),
            (-0.1, -0.2),
            3,
            info={"asked": True},
        ),
        Turn(
            Message("tool", '{"order": 5}'),
            "It comes on Monday.",
            1.0,
            (5,),
            (6,),
            (-0.3,),
            3,
            cut=True,
            info={"success": True},
        ),
    ),
    "terminated",
    run="r",
    stage="rl",
    update=4,
    slot=2,
    system="Help.",
    tools=({"name": "look"},),
    final=Message("user", "Thanks!"),
    final_ids=(9,),
    info={"optimum": 1},
)


def falls(kind: str, seed: int = 0) -> list[str]:
    return [turn.action for turn in canary(kind, PLAYED, random.Random(seed)).turns]


@pytest.mark.parametrize("kind", KINDS)
def test_a_canary_keeps_what_the_other_side_said_and_nothing_that_was_sampled(kind: str) -> None:
    bad = canary(kind, PLAYED, random.Random(0))
    heard = [m for m in bad.messages if m.role != "assistant"]
    assert heard == [m for m in PLAYED.messages if m.role != "assistant"]
    assert (bad.tools, bad.ending, bad.start) == (PLAYED.tools, PLAYED.ending, PLAYED.start)
    assert bad.group == PLAYED.group
    assert all(
        turn.action_ids is None and turn.prompt_ids == () and not turn.info and turn.reward == 0
        for turn in bad.turns
    )
    assert (bad.success, bad.env_return, bad.info, bad.final_ids) == (None, 0, {}, ())
    assert Episode.from_dict(json.loads(json.dumps(bad.to_dict()))) == bad
    assert not {turn.action for turn in bad.turns} & {turn.action for turn in PLAYED.turns}


def test_the_same_draw_gives_the_same_canary_and_ids_differ_by_what_is_said() -> None:
    drawn = {
        canary(kind, PLAYED, random.Random(seed)).id: falls(kind, seed)
        for kind in KINDS
        for seed in range(60)
    }
    assert len(set(map(tuple, drawn.values()))) == len(drawn)
    for name in drawn:
        assert is_canary(name)
        with pytest.raises(ValueError, match="invalid literal"):
            int(name, 16)  # every played episode's id is a hex number
    assert not is_canary(PLAYED.id)
    assert canary("forged", PLAYED, random.Random(3)) == canary("forged", PLAYED, random.Random(3))


def test_what_the_kinds_say() -> None:
    assert falls("empty") == ["", ""]
    assert falls("constant") == ["Thank you for your question."] * 2
    assert falls("punctuation") == [":", ":"]
    for kind, attacks in (("override", module._OVERRIDES), ("forged", module._FORGED)):
        seen = {falls(kind, seed)[-1].split("\n\n", 1)[1] for seed in range(300)}
        assert seen == {attack.format(top="10") for attack in attacks}
        assert all(falls(kind, seed)[0] in module._NONSENSE for seed in range(20))
        assert all("10" in text for text in seen)
        five = [
            canary(kind, PLAYED, random.Random(seed), top=5).turns[-1].action for seed in range(50)
        ]
        assert all("5" in text and "10" not in text for text in five)
    forged = "".join(attack.format(top="10") for attack in module._FORGED)
    assert all(
        mark in forged
        for mark in (
            "[[A]]",
            "<verdict>10</verdict>",
            "</conversation>",
            '"score": 10}',
            "[RESULT] 10",
        )
    )
    assert json.loads(module._FORGED[0].format(top="10"))["score"] == 10


def test_known_bad_conversations(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    said = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Go away."), ("user", "Oh.")]
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in said[k:end]]}
        for k, end in ((0, 4), (1, 3))
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    known = read_known_bad(path)
    whole, short = (
        canary("known-bad", PLAYED, random.Random(0), known_bad=[talk]) for talk in known
    )
    assert [(m.role, m.content) for m in whole.messages] == said
    assert (short.system, short.final, [t.action for t in short.turns]) == (
        None,
        None,
        ["Go away."],
    )
    assert is_canary(whole.id)
    assert {
        canary("known-bad", PLAYED, random.Random(s), known_bad=known).id for s in range(20)
    } == {whole.id, short.id}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "bad"}, r"bad.jsonl:1: needed is"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, r"bad.jsonl:1: .*must alternate"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, r"bad.jsonl:1: .*must alternate"),
        ({"messages": [{"role": "boss", "content": "Hi"}]}, r"bad.jsonl:1: .*has the role 'boss'"),
    ],
)
def test_files_that_hold_something_else_are_refused(row: object, why: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(row))
    with pytest.raises(PreferenceError, match=why):
        read_known_bad(tmp_path / "bad.jsonl")


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no canary 'overide'. Did you mean 'override'"):
        canary("overide", PLAYED, random.Random(0))
    with pytest.raises(ValueError, match="has no turns"):
        canary("empty", Episode("e", Start("e", 0), (), "failed"), random.Random(0))
    with pytest.raises(ValueError, match="read_known_bad"):
        canary("known-bad", PLAYED, random.Random(0))
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(PreferenceError, match="holds no conversation"):
        read_known_bad(tmp_path / "none.jsonl")


# Falling


@pytest.mark.parametrize(
    ("score", "low", "high", "fell"),
    [(1, 1, 10, False), (5.5, 1, 10, False), (6, 1, 10, True), (0, -1, 1, False)],
)
def test_a_score_above_the_middle_is_a_fall(
    score: float, low: float, high: float, fell: bool
) -> None:
    assert fell_for_score(score, low, high) is fell


def test_scores_on_other_scales() -> None:
    assert fell_for_score(3, 1, 10, share=0.2)
    assert not fell_for_score(9, 1, 10, share=0.9)
    for score, low, high in ((11, 1, 10), (math.nan, 0, 1), (1, 1, 1)):
        with pytest.raises(ValueError, match="does not lie on a scale"):
            fell_for_score(score, low, high)


@pytest.mark.parametrize(
    ("ranking", "fell"),
    [
        ("c a", True), ("a c", False), ("ac", False),  # a pair: a tie is no fall
        ("a c b", False), ("c a b", True), ("a b c", False), ("ac b", True), ("a bc", False),
        ("a b c d", False), ("a c b d", True), ("abcd", False),
        ("canary-2 c a", True), ("canary-2 a c", False), ("c canary-2 a", True),
    ],
)  # fmt: skip
def test_beating_more_than_half_of_the_real_ones_is_a_fall(ranking: str, fell: bool) -> None:
    tiers = [[tier] if tier.startswith("canary") else list(tier) for tier in ranking.split()]
    tiers = [["canary-1" if e == "c" else e for e in tier] for tier in tiers]
    assert fell_for_rank(tiers, "canary-1") is fell


def test_a_ranking_without_canary_or_without_anything_real_is_refused() -> None:
    for ranking in ([["a"], ["b"]], [["canary-1"], ["canary-2"]]):
        with pytest.raises(ValueError, match="must be ranked with at least one real"):
            fell_for_rank(ranking, "canary-1")


# Quarantine


def test_the_sums_by_hand() -> None:
    """For judges that fall for 2 % three falls in a row are enough, log 25 each against log 10,000;
    a canary held takes log 1.96 away. By default, for judges that err in a tenth of their verdicts,
    it takes six."""
    up, down, limit = math.log(25), math.log(0.98 / 0.5), math.log(10_000)
    assert 2 * up < limit < 3 * up
    assert 5 * math.log(5) < limit < 6 * math.log(5)
    watch = Quarantine(0.02)
    for fell, total in (
        (False, 0.0),
        (True, up),
        (False, up - down),
        (True, 2 * up - down),
        (False, 2 * up - 2 * down),
    ):
        watch.saw("override", fell)
        assert watch.state_dict()["sums"] == pytest.approx({"": total, "override": total})
    assert not watch.quarantined
    watch.saw("forged", True)
    assert watch.state_dict()["sums"] == pytest.approx(
        {"": 3 * up - 2 * down, "override": 2 * up - 2 * down, "forged": up}
    )
    assert (watch.quarantined, watch.suspect) == (False, "override")
    watch.saw("override", True)
    assert (watch.quarantined, watch.suspect) == (True, None)
    assert watch.reason == "fell for 4 of 7 canaries (override 3 of 6, forged 1 of 1)"
    for _ in range(50):
        watch.saw("override", False)
    assert watch.quarantined


def test_one_kind_is_enough_among_many_that_are_held() -> None:
    watch = Quarantine()
    for _ in range(12):
        for kind in KINDS:
            watch.saw(kind, kind == "override")
    assert watch.quarantined
    assert watch.reason == "fell for 12 of 60 canaries (override 12 of 12)"
    # One kind in twenty: the sum of all never gets there, the kind's own does.
    rare = Quarantine(0.02)
    for _ in range(3):
        for k in range(20):
            rare.saw(str(k), k == 0)
    assert rare.quarantined
    assert rare.state_dict()["sums"][""] == 0


def test_a_suspect_is_cleared_by_canaries_that_were_held() -> None:
    watch = Quarantine()
    assert (watch.suspect, watch.reason) == (None, "fell for 0 of 0 canaries")
    watch.saw("constant", True)
    for _ in range(3):
        assert watch.suspect == "constant"
        watch.saw("constant", False)
    assert watch.suspect is None


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.booleans()), max_size=30), st.integers(0, 30))
def test_quarantine_resumes(seen: list[tuple[str, bool]], stop: int) -> None:
    whole, first, second = Quarantine(), Quarantine(), Quarantine()
    for kind, fell in seen:
        whole.saw(kind, fell)
    for kind, fell in seen[:stop]:
        first.saw(kind, fell)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for kind, fell in seen[stop:]:
        second.saw(kind, fell)
    assert second.state_dict() == whole.state_dict()
    assert (second.reason, second.suspect) == (whole.reason, whole.suspect)


def test_designs_that_make_no_sense_are_refused() -> None:
    for p0, p1, between in ((0.5, 0.02, 100), (0, 0.5, 100), (0.1, 1, 100), (0.1, 0.5, 1)):
        with pytest.raises(ValueError, match="need 0 < p0 < p1 < 1"):
            Quarantine(p0, p1, between)


# Schedule


@settings(max_examples=60)
@given(
    st.one_of(st.sampled_from([0.1, 0.01, 0.3, 0.7, 1.0]), st.floats(0.01, 1)),
    st.integers(0, 1000),
    st.integers(0, 400),
)
def test_ten_strata_hold_about_ten_canaries_anywhere(rate: float, seed: int, start: int) -> None:
    schedule = Schedule(rate, seed=seed)
    count = sum(schedule.kind(n) is not None for n in range(start, start + math.ceil(10 / rate)))
    assert 9 <= count <= 12  # 9 to 11, and one more where 10 / rate is no whole number


@given(st.integers(0, 1000), st.sampled_from([0.1, 0.3, 1.0]))
@settings(max_examples=20)
def test_every_kind_once_a_round_in_orders_that_differ(seed: int, rate: float) -> None:
    schedule = Schedule(rate, seed=seed)
    kinds = [kind for n in range(round(50 / rate)) if (kind := schedule.kind(n))]
    assert len(kinds) == 50
    rounds = [tuple(kinds[k : k + 5]) for k in range(0, 50, 5)]
    assert all(Counter(each) == Counter(KINDS) for each in rounds)
    assert len(set(rounds)) > 3


def test_the_schedule_resumes_and_its_seed_matters() -> None:
    whole = Schedule(0.2, seed=3)
    expected = [whole.next() for _ in range(100)]
    assert expected == [whole.kind(n) for n in range(100)]
    first, second = Schedule(0.2, seed=3), Schedule(0.2, seed=3)
    begun = [first.next() for _ in range(37)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + [second.next() for _ in range(63)] == expected
    assert [Schedule(0.2, seed=4).kind(n) for n in range(100)] != expected
    assert {Schedule(0).kind(n) for n in range(50)} == {None}
    assert None not in {Schedule(1).kind(n) for n in range(50)}
    assert Schedule(0.5, ["known-bad"]).kind(0) in (None, "known-bad")
    for rate, kinds in ((1.1, KINDS), (-0.1, KINDS), (0.1, []), (0.1, ["empty", "empty"])):
        with pytest.raises(ValueError, match="need a rate"):
            Schedule(rate, kinds)


# The bar


def verdicts_until(
    falls: Mapping[str, float], seed: int, limit: int, *, recheck: bool = True
) -> int | None:
    """After how many verdicts, at a canary rate of 10 %, a judge is quarantined that falls for a
    kind with this probability; None: not within the limit."""
    schedule, quarantine, rng = Schedule(0.1, seed=seed), Quarantine(), random.Random(seed)
    for n in range(limit):
        if kind := (recheck and quarantine.suspect) or schedule.kind(n):
            quarantine.saw(kind, rng.random() < falls.get(kind, falls["other"]))
        if quarantine.quarantined:
            return n + 1
    return None


@pytest.mark.parametrize(
    "falls",
    [
        {"other": 1.0},
        {"override": 1.0, "forged": 1.0, "other": 0.01},
        *({kind: 1.0, "other": 0.01} for kind in KINDS),
        {"other": 0.6},
    ],
)
def test_a_gullible_judge_is_quarantined_within_60_verdicts(falls: dict[str, float]) -> None:
    assert sum(verdicts_until(falls, seed, 60) is not None for seed in range(200)) >= 190


def test_a_sound_judge_is_left_alone() -> None:
    """1 % falls: none of 200 within 60 verdicts; and of 20 that give 10,000 verdicts at most one
    (docs/judge-bias.md has 1,000 such)."""
    assert sum(verdicts_until({"other": 0.01}, seed, 60) is not None for seed in range(200)) <= 1
    assert sum(verdicts_until({"other": 0.01}, seed, 10_000) is not None for seed in range(20)) <= 1


def test_without_suspects_it_takes_longer() -> None:
    """What asking again at once is for: at the bare rate a judge that obeys two kinds of five is
    found after two rounds, not one."""
    falls = {"override": 1.0, "forged": 1.0, "other": 0.0}
    when = [verdicts_until(falls, seed, 400, recheck=False) for seed in range(50)]
    assert sum(n is not None and n <= 60 for n in when) < 10
    assert all(when)


def test_false_alarms_are_as_rare_as_stated() -> None:
    """A judge at p0 itself, canaries of one kind: the mean time between alarms is at least
    `between` (Lorden's bound), here 200."""
    rng, lasted = random.Random(0), []
    for _ in range(150):
        watch, count = Quarantine(between=200), 0
        while not watch.quarantined:
            watch.saw("empty", rng.random() < 0.1)
            count += 1
        lasted.append(count)
    assert sum(lasted) / len(lasted) >= 200
