"""The ways of judging: what is asked, and what answers mean.

By hand-computed tables, and by a judge without bias that reads what it is shown.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import turnwise
from hypothesis import given, settings
from hypothesis import strategies as st
from support.episodes import conversation
from support.judges import (
    RUBRIC,
    Scripted,
    answers,
    blocks,
    bound,
    context,
    model,
    quality,
    unbiased,
    verdict,
)
from support.model_server import Asked, ModelServer
from support.rating import RUN, fill, next_task, person
from turnwise.engine.feedback.sources import Sources
from turnwise.engine.records.feedback import Comparison, Feedback, Request, Stamp
from turnwise.judges.combined.escalation import Escalation
from turnwise.judges.combined.panel import Panel
from turnwise.judges.constitutional.constitution import Constitution, ConstitutionJudge, Principle
from turnwise.judges.llm.checklist import ChecklistJudge
from turnwise.judges.llm.listwise import ListwiseJudge
from turnwise.judges.llm.pairwise import PairwiseJudge
from turnwise.judges.llm.rubric import Rubric
from turnwise.judges.llm.rubric_judge import RubricJudge
from turnwise.judges.llm.soft import choice
from turnwise.judges.llm.transcript import names
from turnwise.judges.models.model import Prompt, Reply, Token
from turnwise.judges.trust.watch import Quarantined

WHICH = "Which is better?"
SHOP = Constitution(
    "shop",
    (
        Principle(name="listen", better="Which asks less?", weight=3),
        Principle(name="kind", better="Which is kinder?"),
    ),
    "The agent serves customers.",
)


def ask(judge: Any, episodes: Sequence[turnwise.Episode], folder: Path) -> list[Any]:
    return answers(judge, episodes, context(folder))


# Rubrics.

SOUND = """\
---
name: helpful
criteria:
  - name: resolved
    question: Was it solved?
    weight: 2
    levels: [no, partly, yes]
---
Judge as the customer would.
"""


def test_a_rubric_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "r.md"
    file.write_text("\ufeff" + SOUND, encoding="utf-8")
    rubric = Rubric.load(str(file))
    assert (rubric.name, rubric.text, rubric.criteria[0].weight) == (
        "helpful",
        "Judge as the customer would.",
        2.0,
    )
    assert rubric.criteria[0].levels == ("no", "partly", "yes")
    for line in (
        "## resolved",
        "Was it solved?",
        "0: no",
        "1: partly",
        "2: yes",
        "Judge as the customer would.",
    ):
        assert line in rubric.prompt.splitlines()
    assert Rubric.load("Was it kind?").criteria[0].levels == (
        "not at all",
        "barely",
        "partly",
        "mostly",
        "fully",
    )
    assert Rubric.load(RUBRIC).version == Rubric.load(RUBRIC).version != rubric.version


WRONG = {
    "no front matter": ("Judge well.", "must begin with front matter"),
    "not YAML": (SOUND.replace("[no,", "[no: ["), "front matter is not YAML"),
    "a criterion without levels": (
        SOUND.replace("    levels: [no, partly, yes]\n", ""),
        r"criteria\.0\.levels",
    ),
    "one level": (SOUND.replace("[no, partly, yes]", "[no]"), r"criteria\.0\.levels"),
    "twelve levels": (
        SOUND.replace("[no, partly, yes]", str(list(range(12)))),
        r"criteria\.0\.levels",
    ),
    "an unknown key": (SOUND.replace("weight: 2", "wieght: 2"), r"criteria\.0\.wieght"),
    "a negative weight": (SOUND.replace("weight: 2", "weight: -1"), r"criteria\.0\.weight"),
    "no weight at all": (
        SOUND.replace("weight: 2", "weight: 0"),
        "at least one criterion needs a weight",
    ),
    "a name of two words": (
        SOUND.replace("name: resolved", "name: well resolved"),
        r"criteria\.0\.name",
    ),
    "no name": (SOUND.replace("name: helpful\n", ""), r"name: "),
    "only a list": ("---\n- a\n---\n", "must be a mapping of names"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_in_a_rubric_is_said_with_its_place(name: str, tmp_path: Path) -> None:
    text, where = WRONG[name]
    file = tmp_path / "r.md"
    file.write_text(text)
    with pytest.raises(ValueError, match=where) as error:
        Rubric.load(str(file))
    assert str(file) in str(error.value)


def test_a_rubric_that_is_not_there_is_no_question(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read missing.md"):
        Rubric.load("missing.md")
    with pytest.raises(ValueError, match="a rubric is needed"):
        Rubric.load("  ")


# levels of (kind: 0-2, weight 1), (right: 0-4, weight 3) and the score by hand
SCORES = [
    ((0, 0), 0.0),
    ((2, 4), 1.0),
    ((2, 0), 0.25),
    ((0, 4), 0.75),
    ((1, 1), (0.5 + 3 * 0.25) / 4),
    ((1, 3), (0.5 + 2.25) / 4),
]


@pytest.mark.parametrize(("given_levels", "score"), SCORES)
def test_scores_of_levels_and_weights(
    given_levels: tuple[int, int], score: float, tmp_path: Path
) -> None:
    kind, right = given_levels
    asked = Scripted(
        lambda p: {**verdict(p.bound, p.user), "levels": {"kind": kind, "right": right}}
    )
    [said] = ask(
        RubricJudge(canaries=0, model=asked, rubric=RUBRIC, cache=False),
        [conversation("yes", id="e")],
        tmp_path,
    )
    assert said.score == pytest.approx(score)
    assert said.aspects == pytest.approx({"kind": kind / 2, "right": right / 4})
    assert said.comment == "I read it."


def test_every_reply_is_scored_by_itself(tmp_path: Path) -> None:
    judge = RubricJudge(canaries=0, model=Scripted(), rubric=RUBRIC, per="reply", cache=False)
    [said] = ask(
        judge, [conversation("good", "bad", "good good", "good good good good", id="e")], tmp_path
    )
    by_hand = [(0.5 + 3 * 0.25) / 4, 0.0, (1 + 3 * 0.5) / 4, 1.0]
    assert said.turn_scores == pytest.approx(by_hand)
    assert said.score == pytest.approx(1.0)
    wrong = Scripted(
        lambda p: {**(v := verdict(p.bound, p.user)), "replies": {"reply_1": v["levels"]}}
    )
    [said] = ask(
        RubricJudge(canaries=0, model=wrong, rubric=RUBRIC, per="reply", cache=False),
        [conversation("a", "b", id="e")],
        tmp_path,
    )
    assert "replies must be reply_1, reply_2, each once" in said.reason


def test_levels_of_several_samples_are_averaged_and_their_spread_is_told(tmp_path: Path) -> None:
    numbers = iter([0, 1, 4])
    asked = Scripted(
        lambda p: {**verdict(p.bound, p.user), "levels": {"kind": 2, "right": next(numbers)}}
    )
    [said] = ask(
        RubricJudge(canaries=0, model=asked, rubric=RUBRIC, samples=3, cache=False),
        [conversation("yes", id="e")],
        tmp_path,
    )
    assert said.score == pytest.approx((1 + 3 * (5 / 3) / 4) / 4)
    assert said.details["spread"] == pytest.approx(0.75)
    numbers = iter([4, 4, 4])
    silent = iter([True, False, False])
    half = Scripted(lambda p: {**asked._say(p), "abstain": next(silent)})
    [said] = ask(
        RubricJudge(canaries=0, model=half, rubric=RUBRIC, samples=3, cache=False),
        [conversation("yes", id="e")],
        tmp_path,
    )
    assert said.score == pytest.approx(1.0), "one of three abstained"
    silent, numbers = iter([True, False]), iter([4, 4])
    [said] = ask(
        RubricJudge(canaries=0, model=half, rubric=RUBRIC, samples=2, cache=False),
        [conversation("yes", id="e")],
        tmp_path,
    )
    assert (said.status, said.score) == ("abstained", None)


def test_conversations_that_share_turns_are_shown_with_the_agents_instructions(
    tmp_path: Path,
) -> None:
    asked = Scripted()
    two = [
        conversation(
            "hello", text, id=f"e{i}", slot=i, system="Sell honestly.", tools=({"name": "look"},)
        )
        for i, text in enumerate("ab")
    ]
    ask(PairwiseJudge(canaries=0, model=asked, rubric=WHICH, cache=False), two, tmp_path)
    beginning, one, other = (data for _, data in blocks(asked.prompts[0].user))
    assert beginning["instructions_of_the_agent"] == "Sell honestly."
    assert beginning["tools_of_the_agent"] == [{"name": "look"}]
    assert [t["reply"] for t in beginning["turns"]] == [{"number": 1, "text": "hello"}]
    assert sorted(t["reply"]["text"] for each in (one, other) for t in each["turns"]) == ["a", "b"]
    assert "instructions_of_the_agent" not in one


# Soft labels.


def tokens(text: str, at: str, chances: Mapping[str, float]) -> list[dict[str, Any]]:
    """A text in tokens of which one, `at` (the last such), has alternatives."""
    head, tail = text[: text.rindex(at)], text[text.rindex(at) + len(at) :]
    sure = lambda t: {  # noqa: E731
        "token": t,
        "logprob": 0.0,
        "top_logprobs": [{"token": t, "logprob": 0.0}],
    }
    options = [{"token": t, "logprob": math.log(p)} for t, p in chances.items()]
    return [sure(head), {"token": at, "logprob": -1.0, "top_logprobs": options}, sure(tail)]


@pytest.mark.parametrize("wire", ["chat", "responses"])
def test_soft_levels_and_preferences_from_log_probabilities(wire: str, tmp_path: Path) -> None:
    def of_levels(asked: Asked, text: str) -> list[dict[str, Any]]:
        return tokens(
            text,
            str(json.loads(text)["levels"]["right"]),
            {"1": 0.1, "2": 0.3, "3": 0.4, " maybe": 0.2},
        )

    with ModelServer(unbiased, token_logprobs=of_levels) as server:
        judge = RubricJudge(
            canaries=0, model=model(wire, server), rubric=RUBRIC, soft="logprobs", cache=False
        )
        [said] = ask(judge, [conversation("good good", id="e")], tmp_path)
        right = (1 * 0.1 + 2 * 0.3 + 3 * 0.4) / 0.8
        assert said.aspects == pytest.approx({"kind": 1.0, "right": right / 4})

        def of_ids(asked: Asked, text: str) -> list[dict[str, Any]]:
            first, second, _ = bound(asked)["properties"]["better"]["enum"]
            better = json.loads(text)["better"]
            other = second if better == first else first
            return tokens(
                text, better, {better[:2]: 0.6, other[0]: 0.2, "neither": 0.1, "none": 0.1}
            )

        server.token_logprobs = of_ids
        judge = PairwiseJudge(
            canaries=0, model=model(wire, server), rubric=WHICH, soft="logprobs", cache=False
        )
        [said] = ask(
            judge, [conversation("bad", id="e0"), conversation("good", id="e1", slot=1)], tmp_path
        )
    assert said.ranking == (("e1",), ("e0",))
    assert said.probability == pytest.approx(0.6 + 0.5 * 0.2), (
        "neither and none begin alike; they count half"
    )


def test_where_the_choice_is_read_from() -> None:
    def of(*parts: str | tuple[str, dict[str, float]]) -> Reply:
        made = [
            (
                Token(p, {p: 0.0})
                if isinstance(p, str)
                else Token(p[0], {k: math.log(v) for k, v in p[1].items()})
            )
            for p in parts
        ]
        return Reply("end", "".join(t.text for t in made), tokens=made)

    split = of('{"better"', ": ", ('"b', {'"b': 0.75, '"c': 0.25}), '234"}')
    assert choice(split, "better", ["b234", "c567"]) == pytest.approx({"b234": 0.75, "c567": 0.25})
    quoted = of('{"why": "', '"better": c', '", "better": "', ("b", {"b": 0.9, "c": 0.1}), '234"}')
    assert choice(quoted, "better", ["b234", "c567"]) == pytest.approx(
        {"b234": 0.9, "c567": 0.1}
    ), "the last one is the field"
    assert choice(of("{}"), "better", ["b"]) is None
    assert choice(Reply("end", '{"better": "b"}'), "better", ["b"]) is None
    assert choice(of('{"better": "', ("b", {"x": 1.0})), "better", ["b", "c"]) is None, (
        "nothing of it is among the alternatives"
    )
    halves = dataclasses.replace(
        split,
        text="\u00e9" + split.text,
        tokens=[Token("\ufffd", {}), Token("\ufffd", {}), *split.tokens],
    )
    assert choice(halves, "better", ["b234", "c567"]) == pytest.approx(
        {"b234": 0.75, "c567": 0.25}
    ), "a character in two tokens"


def test_ids_differ_in_their_first_letter_from_each_other_and_from_neither() -> None:
    for i in range(200):
        firsts = [name[0] for name in names(f"{i:016x}", 17)]
        assert len(set(firsts)) == 17
        assert "n" not in firsts
    with pytest.raises(ValueError, match="cannot be judged in one call"):
        names("0", 99)


def test_soft_levels_need_digits_that_tell_them_apart() -> None:
    long = {
        "name": "r",
        "criteria": [{"name": "c", "question": "?", "levels": [str(i) for i in range(11)]}],
    }
    with pytest.raises(ValueError, match="'c' has more than ten"):
        RubricJudge(canaries=0, model=Scripted(), rubric=long, soft="logprobs")


# Pairs.

A, B = conversation("bad", id="a"), conversation("good", id="b", slot=1)


def first_with(*values: Any) -> Scripted:
    """Says of each call in turn whether the first that is shown is better (1), worse (0) or neither
    (0.5); None abstains."""
    given = iter(values)

    def say(prompt: Prompt) -> Any:
        value, good = next(given), verdict(prompt.bound, prompt.user)
        ids = prompt.bound["properties"]["better"]["enum"]
        return {
            **good,
            "better": ids[{1: 0, 0: 1, 0.5: 2, None: 2}[value]],
            "abstain": value is None,
        }

    return Scripted(say)


# Shown in this order: (a, b), then (b, a). Of each call whether the first is better; the ranking;
# the probability; flipped.
PAIRS: list[tuple[dict[str, Any], tuple[Any, ...], Any, float | None, bool]] = [
    ({}, (1, 0), (("a",), ("b",)), None, False),
    ({}, (0, 1), (("b",), ("a",)), None, False),
    ({}, (1, 1), (("a", "b"),), None, True),
    ({}, (0, 0), (("a", "b"),), None, True),
    ({}, (0.5, 0.5), (("a", "b"),), None, False),
    ({}, (1, 0.5), (("a",), ("b",)), None, False),
    ({"samples": 2, "soft": "samples"}, (1, 1, 0, 0), (("a",), ("b",)), 1.0, False),
    ({"samples": 2, "soft": "samples"}, (1, 0, 0, 0), (("a",), ("b",)), 0.75, False),
    ({"samples": 2, "soft": "samples"}, (0, 0, 0, 1), (("b",), ("a",)), 0.75, False),
    ({"samples": 2, "soft": "samples"}, (1, 0, 1, 0), (("a", "b"),), None, False),
    ({"samples": 3}, (1, 1, 0, 0, 0, 1), (("a",), ("b",)), None, False),
    ({"samples": 3}, (1, None, 1, 0, 0, None), (("a",), ("b",)), None, False),
]


@pytest.mark.parametrize(("options", "firsts", "ranking", "probability", "flipped"), PAIRS)
def test_what_two_orders_make_of_a_pair(
    options: Any,
    firsts: Any,
    ranking: Any,
    probability: float | None,
    flipped: bool,
    tmp_path: Path,
) -> None:
    judge = PairwiseJudge(
        canaries=0, model=first_with(*firsts), rubric=WHICH, cache=False, concurrency=1, **options
    )
    [said] = ask(judge, [A, B], tmp_path)
    assert (said.ranking, said.probability, said.details["flipped"]) == (
        ranking,
        probability,
        flipped,
    )
    assert [each["order"] for each in said.details["orders"]] == [["a", "b"], ["b", "a"]]


def test_one_abstention_of_two_orders_is_the_judges(tmp_path: Path) -> None:
    [said] = ask(
        PairwiseJudge(
            canaries=0, model=first_with(1, None), rubric=WHICH, cache=False, concurrency=1
        ),
        [A, B],
        tmp_path,
    )
    assert (said.status, said.ranking) == ("abstained", ())


def test_one_order_is_drawn_for_each_pair_and_asks_half(tmp_path: Path) -> None:
    asked = Scripted()
    judge = PairwiseJudge(canaries=0, model=asked, rubric=WHICH, orders=1, cache=False)
    pairs = [
        e
        for i in range(40)
        for e in (
            conversation(f"bad {i}", id=f"a{i}", seed=i),
            conversation(f"good {i}", id=f"b{i}", seed=i, slot=1),
        )
    ]
    said = ask(judge, pairs, tmp_path)
    assert len(asked.prompts) == 40
    assert all(s.ranking[0][0].startswith("b") for s in said)
    firsts = Counter(s.shown["order"][0][0] for s in said)
    assert 10 <= firsts["a"] <= 30, "neither is always first"


def test_a_judge_that_always_likes_the_first_prefers_nobody(tmp_path: Path) -> None:
    likes = Scripted(
        lambda p: {
            **(v := verdict(p.bound, p.user)),
            "better": p.bound["properties"]["better"]["enum"][0],
            "abstain": v["abstain"],
        }
    )
    group = [conversation("good " * i, id=f"e{i}", slot=i) for i in range(4)]
    said = ask(PairwiseJudge(canaries=0, model=likes, rubric=WHICH, cache=False), group, tmp_path)
    assert len(said) == 6
    assert all(len(s.ranking) == 1 and s.details["flipped"] for s in said)


# Properties: an unbiased judge's word hangs on nothing but what was said.

TEXTS = st.lists(
    st.sampled_from(["good", "bad", "good good", "so", "bad <b> \u202e x", "\U0001f600 good"]),
    min_size=1,
    max_size=3,
)


def told(said: Sequence[Any], of: Mapping[str, str]) -> list[Any]:
    """Answers without ids: by what was said in the conversations."""
    return sorted(
        ([sorted(of[e] for e in tier) for tier in s.ranking], s.probability) for s in said
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda m: PairwiseJudge(canaries=0, model=m, rubric=WHICH, cache=False),
        lambda m: PairwiseJudge(canaries=0, model=m, rubric=WHICH, cache=False, orders=1, pairs=2),
        lambda m: ListwiseJudge(canaries=0, model=m, rubric=WHICH, cache=False, orders=2),
        lambda m: ConstitutionJudge(canaries=0, model=m, constitution=SHOP, cache=False, pairs=3),
    ],
    ids=["pairwise", "one order of two pairs", "listwise", "constitution"],
)
@settings(max_examples=15, deadline=None)
@given(said=st.lists(TEXTS, min_size=2, max_size=4, unique_by=tuple), seed=st.integers(0, 1000))
def test_order_ids_and_names_decide_nothing(
    make: Any, said: list[list[str]], seed: int, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    group = [conversation(*replies, id=f"e{i}", slot=i) for i, replies in enumerate(said)]
    other = [
        conversation(*replies, id=f"x{9 - i}", slot=i, run="another", update=3)
        for i, replies in enumerate(said)
    ]
    random.Random(seed).shuffle(other)
    judges = [make(Scripted()), make(Scripted())]
    found = []
    for judge, members in zip(judges, (group, other), strict=True):
        words = {e.id: "|".join(t.action for t in e.turns) for e in members}
        found.append(told(ask(judge, members, folder), words))
    assert found[0] == found[1]
    keys = [
        sorted(
            judge._caller.key(call)
            for question in (
                judge.plan(members[0].group, members) if hasattr(judge, "plan") else [None]
            )
            for call in judge.calls(
                Request(
                    "group", "g", "j", episodes=question.episodes if question else tuple(members)
                )
            )
        )
        for judge, members in zip(judges, (group, other), strict=True)
    ]
    assert keys[0] == keys[1], "the same question, by content"
    assert len(set(keys[0])) == len(keys[0])


@settings(max_examples=20, deadline=None)
@given(said=st.lists(TEXTS, min_size=2, max_size=5))
def test_a_list_is_ranked_by_what_it_says(said: list[list[str]], tmp_path_factory: Any) -> None:
    group = [conversation(*replies, id=f"e{i}", slot=i) for i, replies in enumerate(said)]
    [found] = ask(
        ListwiseJudge(canaries=0, model=Scripted(), rubric=WHICH, cache=False),
        group,
        tmp_path_factory.getbasetemp(),
    )
    worth = {
        e.id: quality({"turns": [{"reply": {"text": t.action}} for t in e.turns]}) for e in group
    }
    if len({tuple(replies) for replies in said}) == 1:
        assert found.ranking == (tuple(worth),)
        return
    tiers = [{worth[e] for e in tier} for tier in found.ranking]
    assert all(len(tier) == 1 for tier in tiers), "equals share a tier"
    values = [tier.pop() for tier in tiers]
    assert values == sorted(set(worth.values()), reverse=True)
    assert sorted(e for tier in found.ranking for e in tier) == sorted(worth)


def test_places_of_several_orders_are_averaged(tmp_path: Path) -> None:
    """Two orders say a > b > c and b > a > c: a and b are tied before c."""
    group = [conversation(e, id=e, slot=i) for i, e in enumerate("abc")]
    words = iter([["a", "b", "c"], ["b", "a", "c"]])

    def say(prompt: Prompt) -> Any:
        ids = prompt.bound["properties"]["ranking"]["items"]["items"]["enum"]
        shown = [
            data["turns"][0]["reply"]["text"]
            for label, data in blocks(prompt.user)
            if label == "conversation"
        ]
        of = dict(zip(shown, ids, strict=True))
        return {**verdict(prompt.bound, prompt.user), "ranking": [[of[w]] for w in next(words)]}

    judge = ListwiseJudge(
        canaries=0, model=Scripted(say), rubric=WHICH, orders=2, cache=False, concurrency=1
    )
    [said] = ask(judge, group, tmp_path)
    assert said.ranking == (("a", "b"), ("c",))


def test_versions_differ_where_a_verdict_could() -> None:
    def version(model: Any = None, kind: Any = RubricJudge, **options: Any) -> str:
        options = {"rubric": RUBRIC, **options} if kind is not ConstitutionJudge else options
        return str(kind(model=model or Scripted(), cache=False, **options).version)

    louder = {**RUBRIC, "text": "Loudly."}
    shop = Constitution("shop", SHOP.principles[:1])
    distinct = [
        version(), version(Scripted(name="scripted:2")), version(Scripted(effort="high")),
        version(rubric=louder),
        version(per="reply"), version(samples=2), version(soft="logprobs"),
        version(max_tokens=2048),
        version(kind=PairwiseJudge), version(kind=PairwiseJudge, orders=1),
        version(kind=PairwiseJudge, rubric=WHICH),
        version(kind=ListwiseJudge), version(kind=ListwiseJudge, orders=2),
        version(kind=ConstitutionJudge, constitution=SHOP),
        version(kind=ConstitutionJudge, constitution=shop),
        version(model("messages", "http://127.0.0.1:1")),
        version(model("messages", "http://127.0.0.1:2")),
        version(model("messages", "http://127.0.0.1:1", effort="low")),
        version(model("messages", "http://127.0.0.1:1", "judge-2")),
        version(model("chat", "http://127.0.0.1:1")),
        version(model("responses", "http://127.0.0.1:1")),
        version(model("chat", "http://127.0.0.1:1", extra={"temperature": 0})),
        version(model("chat", "http://127.0.0.1:1", schema="prompt")),
    ]  # fmt: skip
    assert len(set(distinct)) == len(distinct)
    free = version(
        concurrency=3, budget=1.0, prices={"scripted:1": [1, 2]}, timeout=5.0, patience=5.0
    )
    assert free == version(), "how it is asked says nothing of what is said"


# Checklists.


def points(**holds: str) -> Scripted:
    return Scripted(
        lambda p: {
            n: (
                f["enum"][0]
                if n == "verdict_id"
                else {"rationale": "", "holds": holds.get(n, "yes")}
            )
            for n, f in p.bound["properties"].items()
        }
    )


CHECKS = [
    ({}, 1.0),
    ({"polite": "no"}, 3 / 4),
    ({"solved": "no"}, 1 / 4),
    ({"polite": "does not apply", "solved": "no"}, 0.0),
    ({"solved": "does not apply"}, 1.0),
    ({"polite": "does not apply", "solved": "does not apply"}, None),
]


@pytest.mark.parametrize(("holds", "score"), CHECKS)
def test_the_score_of_a_checklist(holds: Any, score: float | None, tmp_path: Path) -> None:
    judge = ChecklistJudge(
        canaries=0,
        model=points(**holds),
        points={"polite": "It is polite.", "solved": "It is solved."},
        weights={"solved": 3.0},
        cache=False,
    )
    [said] = ask(judge, [conversation("yes", id="e")], tmp_path)
    assert said.score == (None if score is None else pytest.approx(score))
    assert said.status == ("scored" if score is not None else "abstained")


def test_a_reference_comes_from_the_start_and_is_shown_to_the_judge_alone(tmp_path: Path) -> None:
    asked = points()
    judge = ChecklistJudge(canaries=0, model=asked, reference={"start": "answer"}, cache=False)
    known = conversation("42", id="e1", options={"answer": "forty-two"})
    reset = conversation("42", id="e2", seed=2, info={"answer": "from reset"})
    without = conversation("42", id="e3", seed=3, options={"question": "?"})
    said = ask(judge, [known, reset, without], tmp_path)
    assert [s.status for s in said] == ["scored", "scored", "failed"]
    assert "the start has no 'answer' to compare with; it has question" in said[2].reason
    shown = {dict(blocks(p.user))["reference"] for p in asked.prompts}
    assert shown == {"forty-two", "from reset"}
    with pytest.raises(ValueError, match="needs points or a reference"):
        ChecklistJudge(canaries=0, model=asked)
    with pytest.raises(ValueError, match="name points: a; got"):
        ChecklistJudge(canaries=0, model=asked, points={"a": "b"}, weights={"c": 1.0})
    with pytest.raises(ValueError, match="cannot be called 'verdict_id'"):
        ChecklistJudge(canaries=0, model=asked, points={"verdict_id": "x"})


# Constitutions.

PRINCIPLES = """\
---
name: shop
principles:
  - name: listen
    better: Which asks less?
    weight: 3
  - name: kind
    better: Which is kinder?
---
The agent serves customers.
"""


def test_a_constitution_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "shop.md"
    file.write_text(PRINCIPLES)
    assert Constitution.load(str(file), ["better"]) == SHOP
    for wrong, why in (
        ("better: W", r"principles\.0\.bitter"),
        ("weight: 3", r"principles\.0\.weight"),
        ("---\nname", "front matter"),
    ):
        text = {"better: W": "bitter: W", "weight: 3": "weight: 0", "---\nname": "name"}[wrong]
        file.write_text(PRINCIPLES.replace(wrong, text, 1))
        with pytest.raises(ValueError, match=why) as error:
            Constitution.load(str(file), ["better"])
        assert str(file) in str(error.value)


def test_principles_are_drawn_by_weight_and_the_same_whichever_is_shown_first() -> None:
    judge = ConstitutionJudge(canaries=0, model=Scripted(), constitution=SHOP, cache=False)
    drawn: Counter[str] = Counter()
    for i in range(2000):
        a, b = conversation(f"one {i}", id=f"a{i}"), conversation(f"two {i}", id=f"b{i}")
        assert judge.principle((a, b)) == judge.principle((b, a))
        drawn[judge.principle((a, b)).name] += 1
    assert drawn["listen"] / 2000 == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 2000))


def test_a_constitution_compares_by_its_principle_and_clamps(tmp_path: Path) -> None:
    asked = first_with(1, 1, 0, 0)
    judge = ConstitutionJudge(
        canaries=0,
        model=asked,
        constitution=SHOP,
        cache=False,
        concurrency=1,
        samples=2,
        soft="samples",
        clamp=True,
    )
    [said] = ask(judge, [A, B], tmp_path)
    assert (said.ranking, said.probability) == ((("a",), ("b",)), 0.6)
    better = judge.principle((A, B)).better
    assert all(f"The principle: {better}" in p.user for p in asked.prompts)
    assert said.details["principle"] == judge.principle((A, B)).name
    with pytest.raises(ValueError, match="clamp is for soft labels"):
        ConstitutionJudge(canaries=0, model=asked, constitution=SHOP, clamp=True)
    with pytest.raises(ValueError, match="'listen' needs `critique`"):
        Constitution.load(SHOP, ["critique"])
    with pytest.raises(ValueError, match="cannot read nowhere.md"):
        Constitution.load("nowhere.md", [])


# Panels.


class Says(turnwise.FeedbackSource):
    """A member that says what it is told to: a number, None (abstains), an exception (fails); of
    pairs 1, 0.5 or 0: whether a is better."""

    def __init__(self, *values: Any, kind: str = "episode") -> None:
        self.kind, self.values, self.version, self._asked = kind, list(values), f"says {values}", []

    def request(self, requests: Sequence[Request]) -> None:
        self._asked += requests

    def receive(self) -> list[Any]:
        asked, self._asked = self._asked, []
        return [
            self._one(r, self.values.pop(0) if len(self.values) > 1 else self.values[0])
            for r in asked
        ]

    def _one(self, r: Request, value: Any) -> Any:
        if isinstance(value, Quarantined):
            raise value
        stamp, kind = Stamp(request=r.id, cost=1.0), Feedback if r.kind == "episode" else Comparison
        more: dict[str, Any] = {"id": f"{r.id}-{r.source}", "stamp": stamp}
        if value is None or value == "failed":
            return (kind.abstained if value is None else kind.failed)(r.target, "so it is", **more)
        if r.kind == "episode":
            return Feedback(r.target, score=value, **more)
        a, b = (e.id for e in r.episodes[:2])
        tiers = {1: ((a,), (b,)), 0: ((b,), (a,)), 0.5: ((a, b),)}
        return Comparison(r.target, value if isinstance(value, tuple) else tiers[value], **more)


def panel(
    *values: Any, kind: str = "episode", weights: Sequence[float] = (), **options: Any
) -> Panel:
    members = [{"judge": Says(v, kind=kind), "name": f"m{i}"} for i, v in enumerate(values)]
    for member, weight in zip(members, weights, strict=False):
        member["weight"] = weight
    return Panel(judges=members, **options)


SCORING: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = [
    ((0.1, 0.2, 0.9), {}, 0.2),
    ((0.1, 0.9), {}, 0.5),
    ((0.0, 0.3, 0.9), {"combine": "mean"}, pytest.approx(0.4)),
    ((0.0, 0.5, 1.0), {"combine": "mean", "weights": [2, 1, 1]}, 0.375),
    ((1.0, 1.0, 0.0), {"combine": "vote"}, 1.0),
    ((1.0, 0.0), {"combine": "vote"}, 0.5),
    ((1.0, 0.0), {"combine": "vote", "tie": "m1"}, 0.0),
    ((1.0, 0.0, 0.0), {"combine": "vote", "weights": [3, 1, 1]}, 1.0),
    ((0.2, None, 0.4), {}, pytest.approx(0.3)),
    ((0.2, "failed", 0.4), {}, pytest.approx(0.3)),
    ((0.2, None, None), {}, "abstained"),
    ((0.2, None, "failed"), {}, "abstained"),
    ((0.2, "failed", "failed"), {}, "failed"),
    ((0.2, None, None), {"quorum": 1}, 0.2),
    ((0.2, None, 0.3), {"quorum": 3}, "abstained"),
]


@pytest.mark.parametrize(("values", "options", "expected"), SCORING)
def test_what_a_panel_makes_of_scores(
    values: Any, options: Any, expected: Any, tmp_path: Path
) -> None:
    [said] = ask(panel(*values, **options), [conversation("yes", id="e")], tmp_path)
    if isinstance(expected, str):
        assert (said.status, said.score) == (expected, None)
        assert "judges answered" in said.reason
        assert "m1: so it is" in said.reason
    else:
        assert said.score == expected
    assert said.stamp.cost == len(values), "all of them are paid"
    assert [said.details["panel"][f"m{i}"]["status"] for i in range(len(values))] == [
        {None: "abstained", "failed": "failed"}.get(v, "scored") for v in values
    ]


COMPARING: list[tuple[tuple[Any, ...], dict[str, Any], Any, float | None]] = [
    ((1, 1, 0), {}, (("a",), ("b",)), pytest.approx(2 / 3)),
    ((0, 0, 0), {}, (("b",), ("a",)), 1.0),
    ((1, 0), {}, (("a", "b"),), None),
    ((1, 0), {"tie": "m1"}, (("b",), ("a",)), None),
    ((1, 0.5), {}, (("a",), ("b",)), 0.75),
    ((1, 0, 0), {"weights": [3, 1, 1]}, (("a",), ("b",)), 0.6),
    ((1, 0, 0), {"weights": [0.3, 0.1, 0.2]}, (("a", "b"),), None),
    ((1, None, "failed"), {}, "abstained", None),
]


@pytest.mark.parametrize(("values", "options", "ranking", "probability"), COMPARING)
def test_what_a_panel_makes_of_comparisons(
    values: Any, options: Any, ranking: Any, probability: Any, tmp_path: Path
) -> None:
    [said] = ask(panel(*values, kind="group", **options), [A, B], tmp_path)
    if isinstance(ranking, str):
        assert (said.status, said.ranking) == (ranking, ())
        return
    assert (said.ranking, said.probability) == (ranking, probability)


def test_a_circle_of_votes_is_a_tie(tmp_path: Path) -> None:
    group = [conversation(e, id=e, slot=i) for i, e in enumerate("abc")]
    circle = [(("a",), ("b",), ("c",)), (("b",), ("c",), ("a",)), (("c",), ("a",), ("b",))]
    [said] = ask(panel(*circle, kind="group"), group, tmp_path)
    assert said.ranking == (("a", "b", "c"),)


def test_a_quarantined_member_leaves_and_the_last_one_takes_the_panel_along(tmp_path: Path) -> None:
    bad = Quarantined("it fell for 3 of 4 canaries")
    with pytest.warns(UserWarning, match="goes on without 'm1': it fell for 3 of 4"):
        said = ask(
            panel(0.2, bad, 0.6),
            [conversation("yes", id="e1"), conversation("no", id="e2", seed=2)],
            tmp_path,
        )
    assert [s.score for s in said] == [pytest.approx(0.4)] * 2
    assert said[0].details["panel"]["m1"] == {"status": "out"}
    with (
        pytest.warns(UserWarning, match="goes on without"),
        pytest.raises(Quarantined, match="1 of 2 judges of the panel .* are left"),
    ):
        ask(panel(bad, bad), [conversation("yes", id="e")], tmp_path)


def test_members_count_by_how_reliable_they_were_found(tmp_path: Path) -> None:
    """One of three says the opposite of the other two; after an update it counts for nothing or
    next to it, and a resume knows."""
    ledger = turnwise.Ledger(tmp_path / "ledger.sqlite")
    episodes = [
        e
        for i in range(30)
        for e in (
            conversation(f"bad {i}", id=f"a{i}", seed=i),
            conversation(f"good {i}", id=f"b{i}", seed=i, slot=1),
        )
    ]
    ledger.add_episodes(episodes)

    def made() -> Panel:
        members = [
            {"judge": Says(v, kind="group"), "name": n}
            for n, v in (("x", 0), ("y", 0), ("liar", 1))
        ]
        return Panel(judges=members, reliability="rater-bradley-terry")

    judge = made()
    said = answers(judge, episodes, context(tmp_path, ledger))

    class Ran:
        id, updates = RUN, 1

        class ledger:
            feedback = staticmethod(lambda **filters: said)

    found = judge.learn(Ran)
    weights = {n: found[f"judges/judge/weight/{n}"] for n in ("x", "y", "liar")}
    assert weights["liar"] < 0.5 * min(weights["x"], weights["y"])
    again = made()
    again.load_state_dict(judge.state_dict())
    assert again._counts == judge._counts
    ledger.close()


def test_panels_that_cannot_work_say_why() -> None:
    for options, why in (
        ({"combine": "max"}, "combine must be"),
        ({"quorum": 4}, "quorum must lie in 1 to 3"),
        ({"tie": "m7"}, "tie must be 'tie' or a member"),
        ({"weights": [1, 2, 1]}, "a median knows no weights"),
        ({"weights": [0, 0, 0], "combine": "mean"}, "weights must be at least 0"),
    ):
        with pytest.raises(ValueError, match=why):
            panel(0.1, 0.2, 0.3, **options)
    with pytest.raises(ValueError, match="all score or all compare"):
        Panel(
            judges=[
                {"judge": Says(1), "name": "m"},
                {"judge": Says(1, kind="group"), "name": "n"},
            ]
        )
    with pytest.raises(ValueError, match="cannot sit on a panel"):
        Panel(
            judges=[
                {"judge": "people", "name": "m"},
                {"judge": Says(1, kind="group"), "name": "n"},
            ]
        )


# Escalation.


def escalation(first: Any, then: Any, **options: Any) -> Escalation:
    return Escalation(
        first={"judge": first, "name": "cheap"}, then={"judge": then, "name": "strong"}, **options
    )


def test_what_goes_up_and_what_does_not(tmp_path: Path) -> None:
    def story(first: Any, kind: str = "episode", **options: Any) -> Any:
        then = Says(0.5, kind=kind)
        episodes = [A, B] if kind == "group" else [A]
        [said] = ask(escalation(first, then, **options), episodes, tmp_path)
        return said

    sure = story(Says(0.9))
    assert (sure.score, sure.stamp.cost) == (0.9, 1.0)
    assert "escalation" not in sure.details
    failed = story(Says("failed"))
    assert (failed.score, failed.stamp.cost) == (0.5, 2.0), "both are paid"
    assert failed.details["escalation"] == {
        "unsure": "failed",
        "first": {"status": "failed", "version": "", "score": None},
    }
    assert story(Says(None)).score == 0.5
    assert story(Says("failed"), failed=False, spread=0.1).status == "failed"
    assert story(panel(0.1, 0.2), spread=0.3).score == pytest.approx(0.15)
    assert story(panel(0.1, 0.9), spread=0.3).details["escalation"]["unsure"] == "spread 0.8"
    assert story(panel(1, 1, 0, kind="group"), kind="group", unsure=0.7).ranking == (("a", "b"),)
    assert story(panel(1, 1, 1, kind="group"), kind="group", unsure=0.7).ranking == (("a",), ("b",))
    flips = PairwiseJudge(canaries=0, model=first_with(1, 1), rubric=WHICH, cache=False)
    assert story(flips, kind="group", unsure=0.5).details["escalation"]["unsure"] == "flipped"


def test_no_more_than_a_share_goes_up(tmp_path: Path) -> None:
    then = Says(0.5)
    said = ask(
        escalation(Says("failed"), then, limit=0.25),
        [conversation(f"{i}", id=f"e{i}", seed=i) for i in range(40)],
        tmp_path,
    )
    up = [s for s in said if s.status == "scored"]
    assert len(up) == 10
    assert all(
        s.details["escalation"] == {"unsure": "failed", "closed": "limit"}
        for s in said
        if s.status == "failed"
    )


def test_where_the_strong_ones_budget_is_spent_the_first_answer_stands(tmp_path: Path) -> None:
    strong = RubricJudge(
        canaries=0,
        model=Scripted(),
        rubric=RUBRIC,
        cache=False,
        budget=0.02,
        prices={"scripted:1": [1.0, 10.0]},
        concurrency=1,
    )
    first = panel(0.0, 0.6, kind="episode")
    episodes = [conversation(f"good good good good {i}", id=f"e{i}", seed=i) for i in range(60)]
    judge = escalation(first, strong, spread=0.5)
    with pytest.warns(UserWarning, match="nothing goes up to 'strong' any more"):
        said = ask(judge, episodes, tmp_path)
    assert {s.score for s in said} == {1.0, 0.3}
    kept = [s for s in said if s.score == 0.3]
    assert 0 < len(kept) < 60
    assert all("budget" in s.details["escalation"]["closed"] for s in kept)


def test_people_come_second_where_the_judge_is_not_sure(tmp_path: Path) -> None:
    from turnwise.plugins.human.desk import Desk

    ledger = turnwise.Ledger(tmp_path / "ledger.sqlite", clock=lambda: 1000.0)
    judge = PairwiseJudge(
        canaries=0,
        model=Scripted(
            lambda p: {
                **(v := verdict(p.bound, p.user)),
                "better": (
                    p.bound["properties"]["better"]["enum"][0]
                    if "tell me" in p.user
                    else v["better"]
                ),
            }
        ),
        rubric=WHICH,
        cache=False,
    )
    unclear = [
        conversation("tell me bad", id="u0", seed=1),
        conversation("tell me good", id="u1", seed=1, slot=1),
    ]
    clear = [conversation("bad", id="c0", seed=2), conversation("good", id="c1", seed=2, slot=1)]
    played: dict[str, list[turnwise.Episode]] = {unclear[0].group: unclear, clear[0].group: clear}
    ledger.add_episodes([*unclear, *clear])
    people = {
        "judge": "people",
        "task": "compare",
        "gold_share": 0.0,
        "random_share": 0.0,
        "undo": 0.0,
    }
    entry = {
        "judge": "escalation",
        "first": {"judge": judge, "name": "cheap"},
        "then": people,
        "unsure": 0.6,
    }
    sources = Sources.make([[entry]], turnwise.Plugins(), 1.0)
    sources.open(tmp_path / "run", ledger, 0, run=RUN)
    sources.ask([played], ledger)
    while len(ledger.open_requests()) > 1:
        sources.receive(ledger)
    [said] = ledger.feedback([clear[0].group])
    assert said.ranking == (("c1",), ("c0",))
    desk, ada = Desk(ledger), person(ledger, "Ada")
    task = None
    for _ in range(20):
        sources.receive(ledger)
        if (task := next_task(desk, ada)) is not None:
            break
    assert task is not None
    assert desk.answer(task.id, ada, fill(task, random.Random(0))) == "new"
    assert next_task(desk, ada) is None, "of the clear one nobody is asked"
    sources.receive(ledger)
    [answer] = ledger.feedback([unclear[0].group])
    assert answer.stamp.rater == ada
    assert ledger.open_requests() == []
    sources.close()
    ledger.close()


# A model in this process.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from turnwise.learning import build_policy

    return build_policy(
        tmp_path_factory.mktemp("tiny"), [json.dumps(RUBRIC)] * 4, context=4096, hidden=32, layers=1
    )


FORM = {
    "type": "object",
    "properties": {
        "better": {"type": "string", "enum": ["b234", "c567", "neither"]},
        "level": {"type": "integer", "enum": [0, 1, 2, 3]},
        "abstain": {"type": "boolean"},
        "tiers": {
            "type": "array",
            "items": {"type": "array", "items": {"type": "string", "enum": ["b234", "c567"]}},
        },
    },
    "required": ["better", "level", "abstain", "tiers"],
    "additionalProperties": False,
}


def test_a_local_models_answers_fit_the_schema_whatever_its_weights(tiny: Path) -> None:
    import asyncio

    import jsonschema
    from turnwise.judges.models.local import Local

    ends: Counter[str] = Counter()
    for temperature in (0.0, 1.0, 5.0):
        asked = Local(str(tiny), device="cpu", temperature=temperature)
        for i in range(6):
            reply = asyncio.run(
                asked.ask(Prompt("You judge.", f"Question {i}", FORM, 400, top_logprobs=5))
            )
            ends[reply.stop] += 1
            assert reply.usage.output > 0
            chances = choice(reply, "better", ["b234", "c567", "neither"])
            assert chances is not None
            assert sum(chances.values()) == pytest.approx(1.0)
            assert min(chances.values()) > 0, "of what the grammar left, all three were there"
            if reply.stop == "end":
                jsonschema.validate(json.loads(reply.text), FORM)
            else:
                assert (reply.stop, reply.usage.output) == ("length", 400)
    assert ends["end"] >= 9
    short = asyncio.run(asked.ask(Prompt("You judge.", "Question", FORM, 3)))
    assert (short.stop, short.reason, short.usage.output) == ("length", "max_tokens", 3)


def test_a_local_judge_scores_or_says_why_not(tiny: Path, tmp_path: Path) -> None:
    judge = RubricJudge(
        canaries=0, model=f"local:{tiny}", rubric=RUBRIC, cache=False, max_tokens=48, budget=1.0
    )
    said = ask(judge, [conversation(f"good {i}", id=f"e{i}", seed=i) for i in range(3)], tmp_path)
    for s in said:
        assert s.status == "scored" or (
            s.score is None and s.reason.startswith("truncated: max_tokens")
        ), s.reason
        assert s.stamp.cost == 0.0
    [said] = ask(judge, [conversation("word " * 9000, id="long")], tmp_path)
    assert said.status == "failed"
    assert "too many for the context" in said.reason


def test_a_local_answer_nobody_waits_for_ends_and_the_next_one_has_its_time(
    tiny: Path, tmp_path: Path
) -> None:
    from turnwise.judges.models.local import Local

    asked = Local(str(tiny), device="cpu")
    asked._loaded = asked._load()
    judge = RubricJudge(
        canaries=0,
        model=asked,
        rubric=RUBRIC,
        cache=False,
        max_tokens=3000,
        timeout=0.2,
        patience=0.5,
    )
    [said] = ask(judge, [conversation("good", id="e")], tmp_path)
    assert (said.status, said.score) == ("failed", None)
    assert said.reason.startswith("timeout: no answer within 0.2 seconds")
    assert asked._loaded.turn.acquire(timeout=3000), "the thread has let go"
    asked._loaded.turn.release()


def test_judges_of_one_local_model_share_it(tiny: Path) -> None:
    """Also where they ask for the first time at once, each from a thread of its own: transformers
    cannot make two models at a time."""
    import asyncio

    from turnwise.judges.models.local import Local

    asked = [Local(str(tiny), device="cpu", dtype=dtype) for dtype in ("auto", "auto", "bfloat16")]

    async def together() -> list[Any]:
        return await asyncio.gather(*(m.ask(Prompt("", "Good?", FORM, 40)) for m in asked))

    assert [r.usage.output > 0 for r in asyncio.run(together())] == [True] * 3
    first, second, other = (m._loaded for m in asked)
    assert first is second
    assert first is not other


def test_the_ids_of_a_call_are_bound_where_they_belong_and_nowhere_else() -> None:
    """A schema may use one object for several fields: binding one must not bind the others (a
    critique is no id)."""
    from turnwise.judges.constitutional.revise import SCHEMA

    bound = Prompt("", "", SCHEMA, choices={"answer_id": ["b222"]}).bound["properties"]
    assert bound["answer_id"] == {"type": "string", "enum": ["b222"]}
    assert bound["critique"] == bound["revision"] == {"type": "string", "maxLength": 512}
    assert "enum" not in SCHEMA["properties"]["answer_id"]


def test_a_rubric_that_looks_like_a_file_is_one(tmp_path: Path) -> None:
    for named in ("rubrics/helpful", "helpful.txt", "none.md"):
        with pytest.raises(ValueError, match="cannot read"):
            Rubric.load(named)
    assert Rubric.load("Good?").criteria[0].question == "Good?"
    assert Rubric.load("Did the agent solve it, e.g. by a refund?").name == "question"


def test_a_run_that_goes_on_asks_the_strong_one_again_whose_budget_was_raised() -> None:
    """What closed an escalation is not part of its state: it may have been mended since. How much
    went up is."""
    before = escalation(Says(0.9), Says(0.5))
    before._seen, before._up, before._closed = 10, 3, "the budget is spent"
    after = escalation(Says(0.9), Says(0.5))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert (after._seen, after._up, after._closed) == (10, 3, "")
