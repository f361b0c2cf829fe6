"""The rule judges: hand-computed tables, the economy of scripted players, judges of judges,
functions named in a config."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import turnwise
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.episodes import NO_RUN, conversation
from turnwise import judges
from turnwise.engine.feedback.judge_source import ask_judge
from turnwise.engine.feedback.sources import Sources
from turnwise.engine.feedback.specs import make_members, make_source
from turnwise.engine.records.feedback import version_of
from turnwise.judges.rules import text as text_rules
from turnwise.judges.rules.answers import numbers
from turnwise.judges.rules.economy import content

DESK = "turnwise/SupportDesk-v0"


def dialogue(*replies: str, **fields: Any) -> turnwise.Episode:
    """Builds what an agent replied; in the tables below "(heard) reply" tells what it had heard."""
    pairs = [
        each[1:].partition(") ")[::2] if each.startswith("(") else (f"turn {k}", each)
        for k, each in enumerate(replies)
    ]
    where = {"env": "x/Y-v0", "seed": 0, **NO_RUN, **fields}
    return conversation(*(reply for _, reply in pairs), heard=[h for h, _ in pairs], **where)


def judged(judge: Any, *said: str, **fields: Any) -> turnwise.Feedback:
    [answer] = ask_judge(judge, [dialogue(*said, **fields)])
    return answer


def test_limits_on_words_and_turns() -> None:
    length = judges.Length(4, min_words=2)
    assert judged(
        length, "one", "one two", "a b c d", "a b c d e", "a b c d e f g h i"
    ).turn_scores == (
        0.5,
        1.0,
        1.0,
        0.75,
        0.0,
    )
    turns = judges.Turns(4, min_turns=2)
    assert [judged(turns, *"x" * n).score for n in (1, 2, 4, 5, 8, 12)] == [
        0.5,
        1.0,
        1.0,
        0.75,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("entry", "reply", "found"),
    [
        ("ass", "a class of its own", False),
        ("ass", "What an ASS!", True),
        ("straße", "IN DER STRASSE", True),
        ("free money", "free \n  MONEY", True),
        ("free money", "free, money", False),
        ("sucker", "s\u200bu\u00adcker", True),
        ("sucker", "ｓｕｃｋｅｒ", True),
        ("naïve", "nai\u0308ve", True),
        ("c++", "I like C++.", True),
        ("笨蛋", "他是笨蛋吗", True),
        ("हिंद", "हिंदी", False),
        ("/colou?rs?/", "Colors", True),
        ("/^no/", "say no", False),
        (r"/\S{9}/", "short ones", False),
    ],
)
def test_what_is_forbidden_is_found_as_whole_words(entry: str, reply: str, found: bool) -> None:
    answer = judged(judges.Forbidden([entry]), "fine", reply)
    assert answer.score == float(not found)
    assert answer.turn_scores == (1.0, float(not found))
    assert answer.details == {"found": [{"turn": 1, "said": [entry]}] if found else []}


@given(st.text(max_size=8).filter(str.strip), st.text(max_size=12), st.text(max_size=12))
def test_a_forbidden_phrase_between_spaces_is_always_found(
    phrase: str, before: str, after: str
) -> None:
    if phrase.startswith("/") or not text_rules._folded(phrase).split():
        return
    assert (
        judges.Forbidden([phrase])._phrases_in(f"{before} {phrase.upper()} {after}")
        or phrase.upper().casefold() != phrase.casefold()
    )


def test_forbidden_words_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# rude\nidiot\n\n/damn(ed)?/\n")
    judge = judges.Forbidden(str(path))
    assert judge.words == ["idiot", "/damn(ed)?/"]
    assert judged(judge, "an idiot").score == 0.0
    version = version_of(judge)
    path.write_text("idiot\n")
    assert version_of(judges.Forbidden(str(path))) != version


def test_repetition_of_replies_and_of_ngrams() -> None:
    assert judged(judges.Repetition(), "Go on.", "go  ON.", "Stop.").turn_scores == (1.0, 0.0, 1.0)
    assert judged(judges.Repetition(), "", "").turn_scores == (1.0, 0.0)
    # bigrams: "ha ha" four times, one new; then (ha, ha) old, (ha, no) new; then both are old
    assert judged(judges.Repetition(2), "ha ha ha ha ha", "ha ha no", "ha no").turn_scores == (
        0.25,
        0.5,
        0.0,
    )
    assert judged(judges.Repetition(3), "ok", "ok").turn_scores == (1.0, 0.0)


def test_language() -> None:
    english = judges.Language("en")
    answer = judged(
        english,
        "When did you buy it?",
        "Ich erstatte Ihnen das Geld.",
        "ok",
        "42 17",
        "We will repair it for free.",
    )
    assert answer.turn_scores == (1.0, 0.0, None, None, 1.0)
    assert answer.score == pytest.approx(2 / 3)
    assert answer.details["languages"] == ["en", "de", None, None, "en"]
    assert (
        judged(
            judges.Language(["de", "en"]), "Wann haben Sie es gekauft?", "Have you opened the box?"
        ).score
        == 1.0
    )
    nothing = judged(english, "ok", "😀")
    assert (nothing.status, nothing.reason) == ("abstained", "the language of no reply can be told")


@pytest.mark.parametrize(
    ("reference", "reply", "right"),
    [
        ("Paris", ' **"PARIS"**.\n', True),
        ("Paris", "It is Paris.", False),
        (["Paris", "city of light"], "City of  Light!", True),
        ("3.5", "35", False),
        ("-5", "5", False),
        (5, "5.", True),
        ("Straße", "STRASSE", True),
        ("½", "1⁄2", True),
    ],
)
def test_exact(reference: Any, reply: str, right: bool) -> None:
    assert judged(judges.Exact(reference), "Lyon", reply).score == float(right)


def test_the_answer_is_where_the_pattern_last_finds_it() -> None:
    judge = judges.Exact("b", pattern=r"answer is (\w+)")
    assert judged(judge, "The answer is A. No: the answer is B, of course.").score == 1.0
    assert judged(judge, "B").details == {"answer": None}
    assert judged(judge, "B").score == 0.0
    assert judged(judges.Numeric(7, pattern="####(.*)"), "3 + 4 #### 7\nand 5 thanks").score == 1.0


def test_references_that_differ_by_conversation() -> None:
    start = turnwise.Start("x/Y-v0", 0, {"answer": "blue", "n": 3})
    assert judged(judges.Exact({"option": "answer"}), "Blue.", start=start).score == 1.0
    assert judged(judges.Numeric({"option": "n"}), "three: 3", start=start).score == 1.0
    assert (
        judged(judges.Exact({"info": "truth"}), "red", info={"truth": ["red", "crimson"]}).score
        == 1.0
    )
    missing = judged(judges.Exact({"option": "anwser"}), "blue", start=start)
    assert missing.status == "failed"
    assert (
        "the start's options have no 'anwser' to compare with. Did you mean 'answer'"
        in missing.reason
    )
    by_function = judges.Exact(lambda e: {"x/Y-v0": "blue"}.get(e.start.env))
    assert judged(by_function, "blue").score == 1.0
    assert judged(by_function, "blue", start=turnwise.Start("x/Z-v0", 0)).status == "abstained"
    wrong = judged(judges.Numeric({"info": "truth"}), "1", info={"truth": "many"})
    assert (wrong.status, "must be one number, got 'many'" in wrong.reason) == ("failed", True)


NUMBERS: dict[str, list[float]] = {
    "It costs 1,234,567.5.": [1234567.5], "1 000": [1, 0], "1\u202f000": [1000],
    "1'000 or 1_000": [1000, 1000], "1{,}234": [1234],
    "1,2,3": [1, 2, 3], "1,5": [1, 5], "-5, −7 and +3": [-5, -7, 3], "3-5": [3, 5], "(2)-1": [2, 1],
    "-$5.20 or $-5": [-5.2, -5],
    "1.5e-3": [0.0015], "1.5 × 10^-3": [0.0015], "10⁶": [1e6], "2x10^{3}": [2000],
    "10^{-2}": [0.01], "1e5x": [1],
    "50%, 12.5 %": [0.5, 0.125], r"25\%": [0.25], "3/4": [0.75], "1 3/4": [1.75], "-2½": [-2.5],
    r"\frac{3}{4}": [0.75],
    "12/05/2020": [12, 5, 2020], "1/0": [1, 0], "H2O and v1.2.3": [], "covid-19": [19],
    "is...5": [5], "5kg": [5], "x=.5": [0.5],
    r"\boxed{-12}": [-12], "1e999": [math.inf], "none": [], "": [],
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_as_people_write_them(text: str) -> None:
    assert numbers(text) == pytest.approx(NUMBERS[text])


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_back(value: float) -> None:
    for written in (repr(value), f"{value:.17e}", f"so it is {value!r}."):
        assert numbers(written) == [pytest.approx(value, rel=1e-12)]
    if abs(value) < 1e15:
        assert numbers(f"{value:,.3f}") == [pytest.approx(value, rel=1e-12, abs=6e-4)]


def test_numeric() -> None:
    assert numbers("1.234,5 und 1,5 %", ",") == pytest.approx([1234.5, 0.015])
    assert judged(judges.Numeric("50%"), "That is half, 0.5").score == 1.0
    assert judged(judges.Numeric(50), "50%").score == 0.0
    assert judged(judges.Numeric(10, tolerance=0.5), "9.5").score == 1.0
    assert judged(judges.Numeric(10, tolerance=0.5), "9.4").score == 0.0
    assert judged(judges.Numeric(1000, relative=0.01), "1,009").score == 1.0
    assert judged(judges.Numeric(0), "0.0000001").score == 0.0
    assert judged(judges.Numeric([1, 2]), "first 5, then 2").details == {"answer": 2.0}
    for reply in ("no idea", "1e999", "9" * 5000):
        answer = judged(judges.Numeric(1), "1", reply)
        assert (answer.status, answer.score, answer.details) == ("scored", 0.0, {"answer": None})


SCHEMA = {
    "type": "object",
    "properties": {
        "items": {
            "type": "array",
            "items": {"type": "object", "properties": {"price": {"type": "number"}}},
        }
    },
    "required": ["items"],
}


def test_json_schema(tmp_path: Path) -> None:
    good, bad = '{"items": [{"price": 1.5}]}', '{"items": [{"price": "x"}]}'
    last = judges.JsonSchema(SCHEMA)
    assert judged(last, bad, good).score == 1.0
    answer = judged(last, good, bad)
    assert (answer.score, answer.turn_scores) == (0.0, None)
    assert answer.details == {
        "errors": [{"turn": 1, "error": "at $.items[0].price: 'x' is not of type 'number'"}]
    }
    every = judged(
        judges.JsonSchema(SCHEMA, where="all"),
        good,
        bad,
        "hello",
        '{"items": [NaN]}',
        "[" * 100_000,
    )
    assert (every.score, every.turn_scores) == (0.2, (1.0, 0.0, 0.0, 0.0, 0.0))
    assert [e["error"].split(":")[0] for e in every.details["errors"][1:]] == ["not JSON"] * 3
    fenced = f"```json\n{good}\n```"
    assert [judged(judges.JsonSchema(SCHEMA, fenced=f), fenced).score for f in (False, True)] == [
        0.0,
        1.0,
    ]
    for name, text in (
        ("s.json", json.dumps(SCHEMA)),
        ("s.yaml", yaml.safe_dump(SCHEMA, sort_keys=False)),
    ):
        (tmp_path / name).write_text(text)
        read = judges.JsonSchema(str(tmp_path / name))
        assert judged(read, good).score == 1.0
        assert version_of(read) == version_of(last)


def test_a_schema_reaches_for_nothing_outside() -> None:
    away = judged(judges.JsonSchema({"$ref": "https://example.com/schema.json"}), "1")
    assert (away.status, "Unresolvable" in away.reason) == ("failed", True)


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
}
TOOLS: dict[str, Any] = {
    "openai": {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    "bare": {"name": "weather", "parameters": WEATHER},
    "anthropic": {"name": "weather", "input_schema": WEATHER},
    "mcp": {"name": "weather", "inputSchema": WEATHER},
}
GOOD = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'
CALLS = [
    (f"Let me look.\n<tool_call>\n{GOOD}\n</tool_call>", 1.0),
    (f"<tool_call>{GOOD}</tool_call><tool_call>{GOOD}</tool_call>", 1.0),
    (f"<tool_call>{GOOD}</tool_call><tool_call>{{}}</tool_call>", 0.0),
    (GOOD, 1.0),
    (f"[{GOOD}, {GOOD}]", 1.0),
    (f"[TOOL_CALLS] [{GOOD}]", 1.0),
    ("[TOOL_CALLS] oh", 0.0),
    ('{"name": "weather", "parameters": {"city": "Rome"}}', 1.0),
    (
        (
            '{"type": "function", "function": {"name": "weather", "arguments": "{\\"city\\":'
            ' \\"Rome\\"}"}}'
        ),
        1.0,
    ),
    (
        (
            '{"content": null, "tool_calls": [{"function": {"name": "weather", "arguments":'
            ' "{\\"city\\": 3}"}}]}'
        ),
        0.0,
    ),
    ('{"content": "hi", "tool_calls": []}', None),
    ('<tool_call>{"name": "weather", "arguments": {"city": "Rome"}', 0.0),
    ('{"name": "weather", "arguments": {"city": "Rome"', 0.0),
    ('<tool_call>{"name": "wether", "arguments": {"city": "Rome"}}</tool_call>', 0.0),
    ('<tool_call>{"name": "weather", "arguments": {}}</tool_call>', 0.0),
    ('<tool_call>{"name": "weather", "arguments": {"city": "Rome", "days": 0}}</tool_call>', 0.0),
    ('<tool_call>{"name": "weather", "arguments": {"city": "Rome", "unit": "K"}}</tool_call>', 0.0),
    ('<tool_call>{"name": "weather", "arguments": "Rome"}</tool_call>', 0.0),
    ("<tool_call>[]</tool_call>", 0.0),
    ("It rains in Rome.", None),
    ('{"name": "Bob", "age": 3}', None),
    ("{not json", None),
    ("[1, 2]", None),
    (f"<think>maybe <tool_call>{{}}</tool_call></think>{GOOD}", 1.0),
    (f"<think>I could <tool_call>{GOOD}</tool_call>", None),
]


@pytest.mark.parametrize("form", TOOLS)
def test_tool_calls(form: str) -> None:
    answer = judged(judges.ToolCalls(), *(reply for reply, _ in CALLS), tools=(TOOLS[form],))
    wanted = [score for _, score in CALLS]
    assert list(answer.turn_scores or ()) == wanted
    called = [score for score in wanted if score is not None]
    assert answer.score == pytest.approx(sum(called) / len(called))
    errors = {error["turn"]: error["error"] for error in answer.details["errors"]}
    assert set(errors) == {k for k, score in enumerate(wanted) if score == 0.0}
    assert "no tool 'wether'. Did you mean 'weather'" in errors[13]
    assert errors[15] == "'weather' at $.days: 0 is less than the minimum of 1"
    assert "'unit' was unexpected" in errors[16]


def test_tool_calls_where_none_is_called_or_offered() -> None:
    assert judged(judges.ToolCalls(), "hello", tools=(TOOLS["bare"],)).status == "abstained"
    assert judged(judges.ToolCalls(), GOOD).score == 0.0
    open_ended = {"name": "weather", "parameters": {**WEATHER, "additionalProperties": True}}
    assert judged(judges.ToolCalls(), CALLS[16][0], tools=(open_ended,)).score == 1.0
    assert judged(judges.ToolCalls(), CALLS[16][0], tools=({"name": "weather"},)).score == 1.0
    assert judged(judges.ToolCalls(), GOOD, tools=({"description": "x"},)).status == "failed"


# --- question economy ---


def states(answer: turnwise.Feedback) -> list[str]:
    return [question["state"] for question in answer.details["questions"]]


def test_what_became_of_each_question() -> None:
    judge = judges.Economy(
        topics=[{"asks": "colou?r", "used_by": r"\bpaint\b", "told": "red|blue"}], cost=0.1
    )
    answer = judged(
        judge,
        "(Hello, my name is Ada.) Who made it? What colour is it?",
        "(Bosch, in red.) What color did you say? Where do you live?",
        "(In Bristol.) Who made it? See https://x.org/?q=1 now. Does it weigh 3.5 kg?",
        "(I told you.) Then I paint it, and send it to Bristol.",
        "(Fine.) Anything else?",
    )
    assert states(answer) == [
        "unused",
        "used",
        "repeated",
        "used",
        "repeated",
        "unused",
        "unanswered",
    ]
    assert [question["topic"] for question in answer.details["questions"]][1:3] == [
        "colou?r",
        "colou?r",
    ]
    assert answer.score == pytest.approx(1 - 0.5)
    assert answer.turn_scores == pytest.approx((-0.1, -0.1, -0.2, 0.0, -0.1))
    assert (answer.details["asked"], answer.details["used"], answer.details["unused"]) == (7, 2, 5)
    told = judged(judge, "(It is red.) Is that the colour?", "(As I said.) I paint it.")
    assert states(told) == ["told"]


def test_a_sentence_of_many_topics_is_many_questions() -> None:
    topics = [{"asks": "when", "used_by": "days"}, {"asks": "box", "used_by": "credit"}]
    assert states(
        judged(
            judges.Economy(topics),
            "When did you get it, and is the box open?",
            "Here is your credit.",
        )
    ) == [
        "unused",
        "used",
    ]


@pytest.mark.parametrize(
    ("reply", "asked"),
    [
        ("Is it 3.5 kg?! Really.", ["Is it 3.5 kg?!"]),
        (
            "Fine. Who?? And\nwhere?Why (or when?) not?",
            ["Who??", "where?", "Why (or when?", ") not?"],
        ),
        ("好。多少钱？什么时候？", ["多少钱？", "什么时候？"]),
        ("See http://x.org/?a=b. No question.", []),
    ],
)
def test_questions_are_sentences(reply: str, asked: list[str]) -> None:
    questions = judged(judges.Economy(), reply).details["questions"]
    assert [question["text"] for question in questions] == asked


def test_an_answer_counts_only_by_words_that_are_new() -> None:
    judge = judges.Economy()
    assert states(
        judged(judge, "(My kettle broke.) What broke?", "(The kettle.) I fix the kettle.")
    ) == ["unused"]
    assert states(
        judged(judge, "Which number is on it?", "(It says 4711.) Number 4711 is recalled.")
    ) == ["used"]
    assert states(judged(judge, "Is it red?", "(Yes.) Then yes, I will.")) == ["unused"]
    assert (
        states(
            judged(
                judge,
                "Who is the manager?",
                "(Ms Rossi.) Where is the manager?",
                "(In Milan.) Rossi, Milan.",
            )
        )
        == ["used"] * 2
    )
    assert content("Ada's kettles, 3.5 of them, that's it") == {"ada", "kettle", "3.5"}


@given(st.integers(1, 60))
def test_asking_more_never_becomes_cheaper(n: int) -> None:
    """A policy that another judge pays per question must never reach a point from which the next
    one is free."""
    judge = judges.Economy(cost=0.25)
    scores = [
        judged(judge, *(f"Is it thing{i}?" for i in range(count)), "Bye.").score or 0.0
        for count in (n, n + 1)
    ]
    assert scores[1] == pytest.approx(scores[0] - 0.25)
    answer = judged(judge, *(f"Is it thing{i}?" for i in range(n)), "Bye.")
    assert sum(s or 0.0 for s in answer.turn_scores or ()) == pytest.approx(
        (answer.score or 0.0) - 1
    )
    assert judged(
        judges.Economy(minimum=0.0), *(f"Is it thing{i}?" for i in range(n)), "Bye."
    ).score == max(0.0, 1 - n / 4)


ECONOMY = r"""
judge: economy
cost: 0.1
topics:
  - name: what
    asks: 'what went|what happened'
    used_by: '\b(refund|money back|replacement|new one|repair|fix|trace|track|discount|credit|voucher)\b'
    told: >-
      never arrived|did not come|waiting for|nobody brought|pieces|cracked|smashed|dent|stopped working|does not turn|strange noise|
      until it quit|changed my mind|do not need|the same one|not what I hoped
  - name: when
    asks: 'when did|how long ago'
    used_by: '\b(trace|track|repair|fix|discount|refund|money back|replacement|new one)\b'
    told: '\b(days|weeks|months|years|half a year|ages) (old|ago)\b|last week|on Monday|in the spring|since I was at school'
  - name: box
    asks: '\bbox\b'
    used_by: '\b(refund|money back|store credit|voucher)\b'
    told: 'sealed|never opened|untouched|box is open|unwrapped|tried it'
  - name: wish
    asks: 'would you like|do you prefer'
    used_by: '\b(refund|money back|replacement|new one)\b'
    told: 'money back|return what I paid|on my card|another one|a fresh one|still like to have one'
"""  # noqa: E501


def play(player: str, count: int = 200) -> list[turnwise.Episode]:
    turnwise.Plugins()
    starts = [(start, 0) for start in turnwise.starts(DESK, 5, count)]
    return turnwise.rollout(turnwise.ScriptPlayer(player), starts, turnwise.Where())


def test_the_economy_of_the_desk_s_players() -> None:
    """The desk knows which questions did not matter or were told already; the rule, which reads
    words only, nearly agrees."""
    judge = make_members([yaml.safe_load(ECONOMY)], turnwise.Plugins())[0].given
    unused, wasted, per = {}, {}, {}
    for player in ("expert", "hasty", "forgetful", "interrogator"):
        episodes = play(player)
        answers = ask_judge(judge, episodes)
        last = [episode.turns[-1].info for episode in episodes]
        assert [answer.details["asked"] for answer in answers] == [
            info["questions"] for info in last
        ]
        unused[player] = sum(answer.details["unused"] for answer in answers)
        wasted[player] = sum(info["needless"] + info["repeated"] for info in last)
        per[player] = unused[player] / max(1, sum(answer.details["asked"] for answer in answers))
        assert sum(answer.score or 0.0 for answer in answers) == pytest.approx(
            len(answers) - 0.1 * unused[player]
        )
        if player == "forgetful":
            repeats = [
                (a.turn_scores or ())[q["turn"]]
                for a in answers
                for q in a.details["questions"]
                if q["state"] == "repeated"
            ]
            assert len(repeats) > 40
            assert max(s or 0.0 for s in repeats) < 0
    assert unused["expert"] == unused["hasty"] == wasted["expert"] == 0
    assert per["interrogator"] > 0.5
    assert per["forgetful"] > 0.25
    assert unused["interrogator"] == pytest.approx(wasted["interrogator"], rel=0.25)
    assert unused["forgetful"] == pytest.approx(wasted["forgetful"], rel=0.25)


# --- judges made of judges ---


def of_score(score: Any, turns: Any = None, name: str = "x") -> dict[str, Any]:
    def judge(episode: turnwise.Episode) -> Any:
        if isinstance(score, str):
            kind = getattr(turnwise.Feedback, score)
            return kind(episode.id, "why not")
        return turnwise.Feedback(
            episode.id, score=score, turn_scores=turns, stamp=turnwise.Stamp(cost=0.5)
        )

    return {"judge": judge, "name": name}


@pytest.mark.parametrize(
    ("combine", "weights", "wanted"),
    [
        ("min", (), 0.25),
        ("max", (), 0.5),
        ("product", (), 0.125),
        ("mean", (), 0.375),
        ("mean", (3, 1), 0.4375),
        ("sum", (2, -1), 0.75),
    ],
)
def test_members_are_combined(combine: Any, weights: Sequence[float], wanted: float) -> None:
    of = [of_score(0.5, (0.5, 0.5), "a"), of_score(0.25, (None, 0.25), "b")]
    of = [each | {"weight": w} for each, w in zip(of, weights, strict=True)] if weights else of
    answer = judged(judges.Rules(of, combine), "x", "y")
    assert answer.score == pytest.approx(wanted)
    assert answer.turn_scores == (None, pytest.approx(wanted))
    assert answer.details["b"] == {"score": 0.25, "turn_scores": [None, 0.25]}
    assert answer.stamp.cost == 1.0
    assert (
        judged(
            judges.Rules([of[0], {**of[1], "judge": lambda e: 0.25}], combine), "x", "y"
        ).turn_scores
        is None
    )


@pytest.mark.parametrize("combine", ["min", "max", "product", "mean", "sum"])
def test_what_failed_or_abstained_is_no_number(combine: Any) -> None:
    good, failed, silent = (
        of_score(1.0, name="good"),
        of_score("failed", name="ill"),
        of_score("abstained", name="shy"),
    )
    answer = judged(judges.Rules([good, silent], combine), "x")
    assert (answer.status, answer.reason) == ("abstained", "shy abstained: why not")
    answer = judged(judges.Rules([good, silent, failed], combine), "x")
    assert (answer.status, answer.reason) == ("failed", "ill failed: why not")
    assert answer.details == {
        "good": {"score": 1.0},
        "shy": {"reason": "why not"},
        "ill": {"reason": "why not"},
    }


def test_a_member_that_breaks_breaks_its_own_episode_only() -> None:
    def picky(episode: turnwise.Episode) -> float:
        return 1 / len(episode.turns[0].action)

    answers = judges.Rules([picky, judges.Turns(1)]).score(
        [dialogue("xy"), dialogue(""), dialogue("x")]
    )
    assert [a.status for a in answers] == ["scored", "failed", "scored"]
    assert answers[1].reason.startswith(
        "picky failed: ZeroDivisionError: division by zero (test_rules.py:"
    )


def test_not_and_nesting() -> None:
    spec = {
        "judge": "rules",
        "combine": "max",
        "of": [
            {"judge": "not", "of": {"judge": "length", "max_words": 2}},
            {
                "judge": "rules",
                "name": "both",
                "of": [{"judge": "regex", "pattern": "please"}, {"judge": "turns", "max_turns": 2}],
            },
        ],
    }
    source = make_source(spec, turnwise.Plugins())
    [answer] = ask_judge(source.given.judge, [dialogue("a b c", "d")])
    assert (answer.score, answer.turn_scores) == (0.25, None)
    assert answer.details["not"]["details"]["length"]["turn_scores"] == [0.5, 1.0]
    assert answer.details["both"]["details"] == {"regex": {"score": 0.0}, "turns": {"score": 1.0}}
    assert judged(judges.Not(judges.Length(2)), "a b c", "d").turn_scores == (0.5, 0.0)
    assert judged(judges.Not(of_score("abstained")), "x").reason == "x abstained: why not"
    assert source.version == make_source(spec, turnwise.Plugins()).version
    spec["of"][1]["of"][0]["pattern"] = "thanks"
    assert source.version != make_source(spec, turnwise.Plugins()).version


def test_members_are_opened_and_keep_their_state(tmp_path: Path) -> None:
    opened: list[str] = []

    class Learner(turnwise.Judge):
        after = "reward-model"
        state = 0

        def open(self, context: turnwise.Context) -> None:
            opened.append(context.name)

        def close(self) -> None:
            opened.append("closed")

        def score(self, episodes: Sequence[turnwise.Episode]) -> list[turnwise.Feedback]:
            return [turnwise.Feedback(e.id, score=1.0) for e in episodes]

        def state_dict(self) -> dict[str, int]:
            return {"state": self.state}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.state = state["state"]

    inner = Learner()
    sources = Sources.make(
        [[{"judge": judges.Rules([judges.Not(inner)]), "name": "whole"}]], turnwise.Plugins(), 0.5
    )
    sources.open(tmp_path, turnwise.Ledger(f"sqlite:///{tmp_path}/ledger.sqlite"), 0)
    sources.close()
    assert opened == ["whole.Not.Learner", "closed"]
    assert sources.givers()["source-0-whole.Not.Learner"] is inner
    with pytest.raises(
        turnwise.PluginError, match=r"'whole.Not.Learner' needs what a 'reward-model' stage makes"
    ):
        sources.check_order([])


def test_a_judge_that_cannot_be_opened_leaves_no_other_open(tmp_path: Path) -> None:
    log: list[str] = []

    class Logs(turnwise.Judge):
        def __init__(self, name: str, wrong: str = "") -> None:
            self.name, self.wrong = name, wrong

        def open(self, context: turnwise.Context) -> None:
            if self.wrong == "open":
                raise RuntimeError("no key")
            log.append(f"open {self.name}")

        def close(self) -> None:
            log.append(f"close {self.name}")
            if self.wrong == "close":
                raise RuntimeError("no line")

    def made(wrong: str) -> Sources:
        entries = [{"judge": Logs(n, wrong if n == "c" else ""), "name": n} for n in "abcd"]
        return Sources.make([entries], turnwise.Plugins(), 0.5)

    ledger = turnwise.Ledger(tmp_path / "l.sqlite")
    with pytest.raises(RuntimeError, match="no key"):
        made("open").open(tmp_path, ledger, 0)
    assert log == ["open a", "open b", "close b", "close a"]
    log.clear()
    sources = made("close")
    sources.open(tmp_path, ledger, 0)
    with pytest.raises(RuntimeError, match="no line"):
        sources.close()
    assert log[4:] == ["close d", "close c", "close b", "close a"]
    ledger.close()


class Ranks(turnwise.GroupJudge):
    def rank(self, group: Sequence[turnwise.Episode]) -> turnwise.Comparison:
        return turnwise.Comparison("g", tuple((e.id,) for e in group))


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ([], "a list of at least one judge"),
        ({"judge": "length"}, "a list of at least one judge"),
        (["lenght"], "Did you mean 'length'"),
        ([{"judge": "length", "max_word": 3}], "Did you mean 'max_words'"),
        ([{"judge": "length", "max_words": 0}], "max_words must be at least 1"),
        (["length", "length"], "two members are called 'length': give one a `name`"),
        ([{"judge": "length", "deadline": 3}], "has no setting 'deadline' of its own"),
        (["simulated-panel"], "'simulated-panel' compares conversations, or answers later"),
        ([Ranks()], "'Ranks' compares conversations"),
        ([{"judge": "length", "weight": 2}], "'min' knows no weights, but 'length' has one"),
    ],
)
def test_members_that_cannot_be(of: Any, message: str) -> None:
    with pytest.raises(turnwise.PluginError, match=message):
        make_source({"judge": "rules", "of": of}, turnwise.Plugins())


def test_the_plugins_of_a_run_are_its_own_and_no_option() -> None:
    with pytest.raises(turnwise.PluginError, match="judge 'rules' has no option 'plugins'"):
        make_source({"judge": "rules", "of": ["length"], "plugins": 3}, turnwise.Plugins())
    given: list[turnwise.Plugins] = []

    def factory(deep: int, plugins: turnwise.Plugins) -> Callable[[turnwise.Episode], float]:
        given.append(plugins)
        return lambda episode: float(deep)

    plugin = types.ModuleType("mine")
    plugin.register_judges = turnwise.hookimpl(
        lambda register: register("mine", factory), specname="register_judges"
    )  # type: ignore[attr-defined]
    plugins = turnwise.Plugins({"mine": plugin})
    assert judged(make_members([{"judge": "mine", "deep": 3}], plugins)[0].given, "x").score == 3.0
    assert given == [plugins]


# --- plain functions ---


def polite(episode: turnwise.Episode, word: str = "please", *, cost: float = 1.0) -> float:
    return 1 - cost * (word not in episode.turns[-1].action)


def per_turn(episode: turnwise.Episode) -> list[float | None]:
    return [float(len(turn.action)) or None for turn in episode.turns]


class Counts(turnwise.Judge):
    def __init__(self, letter: str) -> None:
        self.letter = letter

    def score(self, episodes: Sequence[turnwise.Episode]) -> list[turnwise.Feedback]:
        return [
            turnwise.Feedback(e.id, score=e.turns[0].action.count(self.letter)) for e in episodes
        ]


counts_e = Counts("e")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "my_rules", sys.modules[__name__])
    return "my_rules"


def test_functions_named_in_a_config(module: str) -> None:
    plugins = turnwise.Plugins()
    source = make_source(
        {"judge": "my_rules:polite", "word": "thanks", "cost": 0.25, "weight": 2}, plugins
    )
    assert (source.name, source.weight, source.kind) == ("polite", 2, "episode")
    assert judged(source.given.judge, "no").score == 0.75
    assert judged(make_source("my_rules:polite", plugins).given.judge, "please").score == 1.0
    assert (
        judged(
            make_source({"judge": "my_rules:Counts", "letter": "a"}, plugins).given.judge, "banana"
        ).score
        == 3.0
    )
    assert judged(make_source("my_rules:counts_e", plugins).given.judge, "eel").score == 2.0
    whole = {
        "judge": "rules",
        "of": ["my_rules:polite", {"judge": "my_rules:polite", "word": "x", "name": "x"}],
    }
    assert judged(make_source(whole, plugins).given.judge, "x").details == {
        "polite": {"score": 0.0},
        "x": {"score": 1.0},
    }
    versions = {
        make_source({"judge": "my_rules:polite", "word": word}, plugins).version
        for word in ("a", "b")
    }
    assert len({*versions, make_source("my_rules:polite", plugins).version}) == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "no_such.module:judge",
            "module 'no_such.module' cannot be imported.*package.module:function",
        ),
        ("my_rules:polit", "module 'my_rules' has no 'polit'. Did you mean 'polite'"),
        (
            {"judge": "my_rules:polite", "words": "x"},
            "judge 'my_rules:polite' has no option 'words'. Did you mean 'word'",
        ),
        ("my_rules:Counts", "judge 'my_rules:Counts' needs the option 'letter'"),
        (
            {"judge": "my_rules:counts_e", "letter": "x"},
            "is an object already and takes no options",
        ),
        ("my_rules:DESK", "is no judge"),
        (":polite", "the form is package.module:function"),
    ],
)
def test_functions_that_cannot_be_had(module: str, spec: Any, message: str) -> None:
    with pytest.raises(turnwise.PluginError, match=f"(?i){message}"):
        make_source(spec, turnwise.Plugins())


def test_functions_of_turns() -> None:
    judge = make_source(per_turn, turnwise.Plugins()).given.judge
    answer = judged(judge, "abc", "", "a")
    assert (answer.score, answer.turn_scores) == (None, (3.0, None, 1.0))
    assert judged(judge, "").status == "abstained"
    import numpy as np

    arrays = make_source(
        lambda e: np.array([len(t.action) for t in e.turns]), turnwise.Plugins()
    ).given.judge
    assert judged(arrays, "ab", "c").turn_scores == (2.0, 1.0)
    assert (
        judged(make_source(lambda e: np.float32(0.5), turnwise.Plugins()).given.judge, "x").score
        == 0.5
    )
    short = judged(make_source(lambda e: [1.0], turnwise.Plugins()).given.judge, "a", "b")
    assert (short.status, short.reason) == ("failed", "it scored 1 turns of an episode of 2")
    assert (
        judged(make_source(lambda e: "0.5", turnwise.Plugins()).given.judge, "a").status == "failed"
    )


# --- settings ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: judges.Length(5, min_words=6), "between 0 and max_words=5"),
        (lambda: judges.Turns(0), "max_turns must be at least 1"),
        (lambda: judges.Turns(2, min_turns=3), "between 0 and max_turns=2"),
        (lambda: judges.Repetition(0), "ngram must be at least 1"),
        (lambda: judges.Questions(-1), "must not be negative"),
        (lambda: judges.Questions(1, -0.5), "must not be negative"),
        (lambda: judges.Forbidden("no/such/file.txt"), "there is no file"),
        (lambda: judges.Forbidden([]), "nothing that is forbidden"),
        (lambda: judges.Forbidden(["ok", " "]), "a forbidden entry must be"),
        (lambda: judges.Forbidden([3]), "numbers need quotes"),  # type: ignore[list-item]
        (lambda: judges.Forbidden(["/(/"]), "not a regular expression"),
        (lambda: judges.Language("eng"), "no language 'eng'"),
        (lambda: judges.Language([]), "names none"),
        (lambda: judges.Language("en", certainty=0), "certainty"),
        (lambda: judges.Exact(""), "not empty"),
        (lambda: judges.Exact([]), "not empty"),
        (lambda: judges.Exact(True), "need quotes"),
        (lambda: judges.Exact({"options": "x"}), r"\{option: name\}"),
        (lambda: judges.Exact("x", pattern="(a)(b)"), "at most one"),
        (lambda: judges.Numeric("x"), "must be one number, got 'x'"),
        (lambda: judges.Numeric([]), "names no number"),
        (lambda: judges.Numeric(math.inf), "must be one number"),
        (lambda: judges.Numeric(1, tolerance=-1), "must not be negative"),
        (lambda: judges.Numeric(1, relative=1), "below 1"),
        (lambda: judges.Numeric(1, decimal=";"), "decimal must be"),
        (lambda: judges.JsonSchema({"type": "objekt"}), "no valid JSON Schema: at \\$.type"),
        (lambda: judges.JsonSchema("none.json"), "there is no file"),
        (lambda: judges.JsonSchema({}, where="any"), "where must be"),  # type: ignore[arg-type]
        (lambda: judges.Economy(cost=0), "cost must be positive"),
        (lambda: judges.Economy(cost=math.inf), "cost must be positive"),
        (lambda: judges.Economy(minimum=1), "minimum must be below 1"),
        (lambda: judges.Economy([{"asks": "x"}]), "needs `asks` and `used_by`"),
        (lambda: judges.Economy([{"ask": "x", "used_by": "y"}]), "Did you mean 'asks'"),
        (lambda: judges.Economy([{"asks": "(", "used_by": "y"}]), "not a regular expression"),
        (lambda: judges.Economy([{"asks": "x", "used_by": "y"}] * 2), "two topics have one name"),
        (lambda: judges.Rules(["length"], "median"), "combine must be"),  # type: ignore[arg-type]
        (lambda: judges.Rules([{"judge": "length", "weight": -1}], "mean"), "for a mean positive"),
        (lambda: judges.Rules([{"judge": "length", "weight": math.nan}], "sum"), "must be finite"),
    ],
)
def test_settings_that_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_different_settings_are_different_versions() -> None:
    made: list[Callable[[], Any]] = [
        lambda: judges.Length(5), lambda: judges.Length(5, 1), lambda: judges.Turns(5),
        lambda: judges.Turns(5, 1),
        lambda: judges.Forbidden(["a"]), lambda: judges.Forbidden(["b"]),
        lambda: judges.Repetition(), lambda: judges.Repetition(2),
        lambda: judges.Language("en"), lambda: judges.Language("de"),
        lambda: judges.Language("en", 0.9),
        lambda: judges.Exact("a"), lambda: judges.Exact("b"), lambda: judges.Exact({"option": "a"}),
        lambda: judges.Exact("a", "(.)"),
        lambda: judges.Exact(polite), lambda: judges.Exact(per_turn),
        lambda: judges.Numeric(1), lambda: judges.Numeric(1, 1), lambda: judges.Numeric(1, 0, 0.1),
        lambda: judges.Numeric(1, decimal=","),
        lambda: judges.JsonSchema({}), lambda: judges.JsonSchema({"type": "string"}),
        lambda: judges.JsonSchema({}, "all"),
        lambda: judges.JsonSchema({}, fenced=True), lambda: judges.ToolCalls(),
        lambda: judges.Economy(), lambda: judges.Economy(cost=1), lambda: judges.Economy(minimum=0),
        lambda: judges.Economy([{"asks": "x", "used_by": "y"}]),
        lambda: judges.Economy([{"asks": "x", "used_by": "z"}]),
        lambda: judges.Rules([judges.Length(5)]), lambda: judges.Rules([judges.Length(6)]),
        lambda: judges.Rules([judges.Length(5)], "max"),
        lambda: judges.Rules([{"judge": judges.Length(5), "weight": 2}, polite], "sum"),
        lambda: judges.Rules([judges.Length(5), polite], "sum"),
        lambda: judges.Rules([partial(polite, word="a")]),
        lambda: judges.Rules([partial(polite, word="b")]),
        lambda: judges.Not(judges.Length(5)), lambda: judges.Not(judges.Length(6)),
    ]  # fmt: skip
    versions = [version_of(make()) for make in made]
    assert versions == [version_of(make()) for make in made]
    assert len(set(versions)) == len(versions)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("jsonschema", {"judge": "json-schema", "schema": {}}),
        ("py3langid.langid", {"judge": "language", "languages": "en"}),
    ],
)
def test_what_must_be_installed_is_said_before_the_run(
    name: str, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    text_rules._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install .*'jsonschema"):
        make_source(spec, turnwise.Plugins())
    text_rules._identifier.cache_clear()


@settings(deadline=None)  # the language model is loaded once
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
@example(
    [
        "a " * 50_000,
        "1" * 100_000,
        "1." * 50_000,
        "{[" * 50_000,
        '{"name": ' * 2_000,
        "½" * 10_000,
        "-" * 100_000,
    ]
)
def test_no_reply_breaks_a_rule(replies: list[str]) -> None:
    rules: list[Any] = [
        judges.Length(), judges.Turns(2), judges.Regex("x"), judges.Forbidden(["x y", "/z+/"]),
        judges.Repetition(2), judges.Questions(),
        judges.Exact("x"), judges.Numeric(3), judges.JsonSchema({"type": "object"}, "all"),
        judges.ToolCalls(), judges.Economy(),
        judges.Language("en"),
    ]  # fmt: skip
    e = conversation(*replies, heard=[r[::-1] for r in replies])
    for rule in rules:
        [answer] = ask_judge(rule, [e])
        assert answer.status in ("scored", "abstained"), (rule, answer.reason)
        assert answer.score is None or answer.score <= 1.0


def _xml(name: str = "weather", **values: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<function={name}>\n{inner}</function>"


GLM = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"  # noqa: E501
FAMILIES = [
    (f"I look.\n<tool_call>\n{_xml(city='Rome', days='3')}\n</tool_call>", 1.0),
    (_xml(city="Rome"), 1.0),
    # A text that looks like a number is a text where one is asked for.
    (f"<tool_call>\n{_xml(city='3')}\n</tool_call>", 1.0),
    (f"<tool_call>\n{_xml(city='Rome', days='many')}\n</tool_call>", 0.0),
    (f"<tool_call>\n{_xml(town='Rome')}\n</tool_call>", 0.0),
    (f"<tool_call>\n{_xml('wether', city='Rome')}\n</tool_call>", 0.0),
    (f"<tool_call>\n{_xml(city='Rome')[:-20]}\n", 0.0),
    ('<function=weather>{"city": "Rome"}</function>', 1.0),
    (GLM, 1.0),
    (GLM.replace(">3<", ">0<"), 0.0),
    (
        (
            '<minimax:tool_call>\n<invoke name="weather">\n<parameter'
            ' name="city">Rome</parameter>\n</invoke>\n</minimax:tool_call>'
        ),
        1.0,
    ),
    ('[TOOL_CALLS]weather[ARGS]{"city": "Rome"}', 1.0),
    ('<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}', 1.0),
    ('<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome"}}]', 1.0),
    (f"I could use <tool_call> here.\n</think>\n\n<tool_call>\n{GOOD}\n</tool_call>", 1.0),
    (f"hm\n</think>\n{GOOD}", 1.0),
    (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        None,
    ),
    (
        (
            '<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city":'
            ' "Rome"}<|tool_call_end|>'
        ),
        None,
    ),
    ("[weather(city='Rome')]", None),
    ("```tool_code\nweather(city='Rome')\n```", None),
    ("<tool_call>weather(city='Rome')</tool_call>", None),
]


@pytest.mark.parametrize(("reply", "score"), FAMILIES)
def test_tool_calls_of_every_family_of_models(reply: str, score: float | None) -> None:
    """Valid is 1, wrong is 0, and a form that nobody here can read is neither."""
    answer = judged(judges.ToolCalls(), reply, tools=(TOOLS["bare"],))
    assert answer.score == score, answer
    if score is None:
        assert answer.status == "abstained"
        assert "form that is not known" in answer.reason


def test_a_pattern_that_never_ends_costs_its_own_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    from turnwise.judges.rules import text as rules

    monkeypatch.setattr(rules, "SECONDS", 0.1)
    endless = judges.Regex(r"^(\w|\w\w)+$")
    answer = judged(endless, "a" * 60 + "!")
    assert answer.status == "failed"
    assert "did not end within" in answer.reason
    assert judged(endless, "fine").score == 1.0
    assert judged(judges.Forbidden([r"/^(\w|\w\w)+$/"]), "a" * 60 + "!").status == "failed"
