"""Preferences in and out: what is exported and read again, the documented forms of other tools, and
files that are broken."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import turnwise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.episodes import NO_RUN, conversation
from turnwise.engine.analysis.preferences import opinion
from turnwise.engine.errors import PreferenceError
from turnwise.engine.exchange.reading import Imported, import_data, read_records
from turnwise.engine.exchange.records import Ranked, Scored
from turnwise.engine.exchange.writing import export_pairs, export_stepwise, export_unpaired, save
from turnwise.engine.pipeline.folder import open_ledger

HERE = Path(__file__).parent / "exchange"


def in_turn(system: str | None, *words: str) -> turnwise.Episode:
    """Builds a conversation of what is heard and replied in turn, as its rows list it."""
    return conversation(*words[1::2], heard=words[::2], id="?", env="e", system=system, **NO_RUN)


def played(slot: int, *replies: str, seed: int = 1, **more: Any) -> turnwise.Episode:
    """Builds conversations that start alike, with all that a row can hold."""
    heard = [*(f"so {k}" for k in range(len(replies))), "bye"]
    where = {"env": "e", "seed": seed, "slot": slot, **NO_RUN, "system": "be brief", **more}
    return conversation(*replies, heard=heard, id=f"e{seed}{slot}", **where)


def read(path: Path) -> Imported:
    return import_data(path, run="r", stage="rank", update=1)


def written(rows: Sequence[Any], path: Path) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# Out and in again.


def test_pairs_out_and_in(tmp_path: Path) -> None:
    a, b, c = played(0, "one", "two"), played(1, "one", "three"), played(2, "other")
    said = turnwise.Comparison(
        a.group, ((a.id,), (b.id, c.id)), strength=2.0, stamp=turnwise.Stamp(rater="ann")
    )
    rows = export_pairs({e.id: e for e in (a, b, c)}, [said])
    assert len(rows) == 2, "a tie is no pair"
    assert [m["content"] for m in rows[0]["prompt"]] == [
        "be brief",
        "so 0",
        "one",
        "so 1",
    ], "all that both begin with"
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "two"}], (
        "what follows the last reply is nobody's"
    )
    assert [m["content"] for m in rows[1]["prompt"]] == ["be brief", "so 0"]
    assert [m["content"] for m in rows[1]["chosen"]] == ["one", "so 1", "two"]
    assert (rows[0]["margin"], rows[0]["rater"]) == (2.0, "ann")
    for path in (tmp_path / "pairs.jsonl", tmp_path / "pairs"):
        save(rows, path)
        episodes, comparisons, scores = read(path)
        assert [[m.content for m in e.messages] for e in episodes] == [
            ["be brief", "so 0", "one", "so 1", "two"],
            ["be brief", "so 0", "one", "so 1", "three"],
            ["be brief", "so 0", "other"],
        ], "one group of three, not two of two"
        assert len({e.group for e in episodes}) == 1
        ids = [e.id for e in episodes]
        assert [c.ranking for c in comparisons] == [((ids[0],), (ids[1],)), ((ids[0],), (ids[2],))]
        assert all(t.action_ids is None for e in episodes for t in e.turns), (
            "nobody here sampled them"
        )
        assert export_pairs({e.id: e for e in episodes}, comparisons) == rows
        assert not scores
    ledger = turnwise.Ledger(tmp_path / "ledger.sqlite")
    ledger.add_episodes(episodes)
    assert len(ledger.add_feedback(comparisons)) == 2
    assert ledger.add_feedback(read(tmp_path / "pairs.jsonl").comparisons) == [], (
        "twice is once, from file or folder"
    )
    assert [
        c.stamp.rater
        for c in ledger.feedback(run="r", kind="comparison", status="scored", late=True)
    ] == ["ann", "ann"]


def test_every_row_has_the_same_columns() -> None:
    a, b = played(0, "one"), played(1, "two")
    known = {e.id: e for e in (a, b)}
    ranked = lambda **more: turnwise.Comparison(a.group, ((a.id,), (b.id,)), **more)  # noqa: E731
    rows = export_pairs(known, [ranked(), ranked(strength=2.0), ranked(probability=0.7)])
    assert [(r["margin"], r["probability"]) for r in rows] == [(0.0, 1.0), (2.0, 1.0), (0.0, 0.7)]
    assert set(export_pairs(known, [ranked()])[0]) == {"prompt", "chosen", "rejected", "rater"}
    failed = turnwise.Comparison.failed(a.group, "no time")
    assert export_pairs(known, [failed, turnwise.Comparison(a.group, ((a.id, b.id),))]) == []


def test_prompts_of_pairs() -> None:
    """The prompt never ends with a reply and always leaves one to each; conversations without a
    common beginning are no pair."""

    def prompt(one: turnwise.Episode, other: turnwise.Episode) -> list[int]:
        said = turnwise.Comparison("g", (("a",), ("b",)))
        return [len(r["prompt"]) for r in export_pairs({"a": one, "b": other}, [said])]

    assert prompt(in_turn(None, "x", "1", "y", "2"), in_turn(None, "x", "1", "z", "2")) == [1], (
        "they part after a reply"
    )
    assert prompt(in_turn(None, "x", "1"), in_turn(None, "x", "1", "y", "2")) == [1], (
        "one is the other's beginning"
    )
    assert prompt(in_turn(None, "x", "1", "y"), in_turn(None, "x", "1", "y")) == [1], "equal"
    assert prompt(
        in_turn(None, "x", "1", "y", "2", "z", "3"),
        in_turn(None, "x", "1", "y", "2", "z", "4"),
    ) == [5]
    assert prompt(in_turn(None, "x", "1"), in_turn(None, "y", "1")) == []


def test_labels_come_from_scores_and_else_from_rankings() -> None:
    a, b, c = (played(k, f"reply {k}", "more") for k in range(3))
    known = {e.id: e for e in (a, b, c)}
    ranking = turnwise.Comparison(
        a.group, ((a.id,), (b.id,), (c.id,)), stamp=turnwise.Stamp(rater="ben")
    )
    score = turnwise.Feedback(a.id, score=0.6, stamp=turnwise.Stamp(source="judge"))
    unsaid = [
        turnwise.Feedback.failed(b.id, "?"),
        turnwise.Feedback.abstained(b.id),
        turnwise.Feedback(b.id, turn_scores=(1.0,)),
    ]
    rows = list(export_unpaired(known, [score, *unsaid], [ranking], 0.7))
    found = [(r["completion"][0]["content"], r["label"], r["rater"]) for r in rows]
    assert found == [
        ("reply 0", False, "judge"),
        ("reply 2", False, "ben"),
    ], "what was scored is not labelled by its rank too"
    assert list(rows[0]) == ["prompt", "completion", "label", "rater"]
    assert [m["content"] for m in rows[0]["completion"]] == ["reply 0", "so 1", "more"]
    with pytest.raises(PreferenceError, match="0.6 is no label"):
        list(export_unpaired(known, [score], [], None))


def test_steps_are_replies_with_what_was_said_before_them(tmp_path: Path) -> None:
    a = played(0, "one", "two", "three")
    said = turnwise.Feedback(a.id, turn_scores=(1.0, None, 0.0))
    [row] = export_stepwise({a.id: a}, [said], None)
    assert row["prompt"] == "be brief\n\nHuman: so 0\n\nAssistant:"
    assert row["completions"] == [
        " one",
        "\n\nHuman: so 1\n\nAssistant: two\n\nHuman: so 2\n\nAssistant: three",
    ]
    assert row["labels"] == [True, False]
    assert row["turn_scores"] == [1.0, None, 0.0]
    assert list(export_stepwise({a.id: a}, [turnwise.Feedback(a.id, score=1.0)], None)) == []
    with pytest.raises(PreferenceError, match="2 turn scores for 3 replies"):
        list(export_stepwise({a.id: a}, [turnwise.Feedback(a.id, turn_scores=(1.0, 0.0))], None))
    for path in (tmp_path / "steps.jsonl", tmp_path / "steps"):
        save([row], path)
        episodes, comparisons, [back] = read(path)
        assert (back.turn_scores, comparisons) == (said.turn_scores, [])
        assert [m.content for m in episodes[0].messages] == [
            "be brief",
            "so 0",
            "one",
            "so 1",
            "two",
            "so 2",
            "three",
        ]


TEXT = st.text(
    st.characters() | st.sampled_from("\0\n\r\u2028\x85\ud800\udfff é😀"), max_size=8
).map(
    lambda text: json.loads(json.dumps(text))  # two halves of a pair are one character in JSON
)
CONVERSATION = st.builds(
    lambda said, final: [*said, *final],
    st.lists(st.tuples(TEXT, TEXT), max_size=2).map(
        lambda turns: [text for turn in turns for text in turn]
    ),
    st.lists(TEXT, max_size=1),
)


@st.composite
def groups(
    draw: Any,
) -> tuple[dict[str, turnwise.Episode], list[turnwise.Comparison], list[turnwise.Feedback]]:
    """Conversations that started alike, rankings with ties by several raters, scores of wholes and
    of turns."""
    episodes: dict[str, turnwise.Episode] = {}
    comparisons, scores = [], []
    for g in range(draw(st.integers(1, 2))):
        system, opening = draw(st.none() | TEXT), f"{g}{draw(TEXT)}"
        own = [
            in_turn(system, opening, draw(TEXT), *draw(CONVERSATION))
            for _ in range(draw(st.integers(2, 4)))
        ]
        ids = [f"{g}-{i}" for i in range(len(own))]
        episodes |= dict(zip(ids, own, strict=True))
        for rater in draw(st.lists(TEXT.filter(bool), max_size=2)):
            places = draw(st.lists(st.integers(0, 2), min_size=len(ids), max_size=len(ids)))
            tiers = [[i for i, p in zip(ids, places, strict=True) if p == k] for k in range(3)]
            more: dict[str, Any] = {
                "strength": draw(st.none() | st.sampled_from([1.0, 2.5])),
                "probability": draw(st.none() | st.just(0.75)),
            }
            stamp = turnwise.Stamp(rater=rater)
            comparisons.append(
                turnwise.Comparison(
                    f"g{g}", tuple(tuple(t) for t in tiers if t), stamp=stamp, **more
                )
            )
        for id_, e in zip(ids, own, strict=True):
            turns = tuple(
                draw(
                    st.lists(
                        st.sampled_from([None, 0.0, 1.0]),
                        min_size=len(e.turns),
                        max_size=len(e.turns),
                    )
                )
            )
            scores.append(
                turnwise.Feedback(
                    id_,
                    score=draw(st.sampled_from([0.0, 1.0])),
                    turn_scores=turns,
                    stamp=turnwise.Stamp(rater="ann"),
                )
            )
    return episodes, comparisons, scores


def readable(text: str) -> str:
    """Text as it comes back: half characters, which no file can hold, are replaced."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def content(episode: turnwise.Episode) -> tuple[str, ...]:
    return tuple(
        f"{m.role}: {readable(m.content)}" for m in episode.messages if m is not episode.final
    )


def preferred(
    episodes: Mapping[str, turnwise.Episode], comparisons: Sequence[turnwise.Comparison]
) -> Counter[Any]:
    """Every strict preference between different conversations, with how sure, by how much and by
    whom."""
    found: Counter[Any] = Counter()
    for c in comparisons:
        flat = [e for tier in c.ranking for e in tier]
        for i, a in enumerate(flat):
            for b in flat[i + 1 :]:
                sure = opinion(c, a, b)
                assert sure is not None
                strict = any(a in tier and b not in tier for tier in c.ranking)
                if strict and content(episodes[a]) != content(episodes[b]):
                    pair = (content(episodes[a]), content(episodes[b]))
                    found[*pair, sure, c.strength or 0.0, readable(c.stamp.rater)] += 1
    return found


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(groups())
def test_what_is_exported_and_imported_is_the_same(tmp_path: Path, group: Any) -> None:
    episodes, comparisons, scores = group
    path = tmp_path / "data.jsonl"
    for kind, rows in (
        ("pairs", export_pairs(episodes, comparisons)),
        ("unpaired", list(export_unpaired(episodes, scores, [], None))),
        ("stepwise", list(export_stepwise(episodes, scores, None))),
    ):
        save(rows, path)
        if not rows:
            with pytest.raises(PreferenceError, match="holds no pair, no label"):
                read(path)
            continue
        found = read(path)
        known = {e.id: e for e in found.episodes}
        if kind == "pairs":
            assert preferred(known, found.comparisons) == preferred(episodes, comparisons)
            assert len({c.group for c in found.comparisons}) <= 2
        else:
            what = (lambda f: f.score) if kind == "unpaired" else (lambda f: f.turn_scores)
            wanted = [
                f
                for f in scores
                if kind == "unpaired" or any(s is not None for s in f.turn_scores or ())
            ]
            told = Counter(
                (content(known[f.episode]), what(f), f.stamp.rater) for f in found.scores
            )
            assert told == Counter(
                (content(episodes[f.episode]), what(f), readable(f.stamp.rater)) for f in wanted
            )


def test_a_datasets_folder_holds_the_same_and_says_what_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = played(0, "one\0\u2028", "é😀"), played(1, "two")
    rows = export_pairs({a.id: a, b.id: b}, [turnwise.Comparison(a.group, ((a.id,), (b.id,)))])
    save(rows, tmp_path / "set")
    save(rows, tmp_path / "deep" / "set.json")
    assert read(tmp_path / "set") == read(tmp_path / "deep" / "set.json")
    with pytest.raises(PreferenceError, match="lone surrogate.*write .jsonl"):
        save([{"prompt": "\ud800"}], tmp_path / "bad")
    with pytest.raises(PreferenceError, match="ends in .jsonl or .json, or one without"):
        save(rows, tmp_path / "set.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(PreferenceError, match="is a file"):
        save(rows, tmp_path / "file")
    with pytest.raises(PreferenceError, match="no folder that `datasets` saved"):
        read(HERE)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PreferenceError, match=r"pip install 'datasets"):
        save(rows, tmp_path / "set2")
    with pytest.raises(PreferenceError, match=r"pip install 'datasets"):
        read(tmp_path / "set")


# What others write.


def told(record: Ranked | Scored) -> tuple[Any, ...]:
    if isinstance(record, Scored):
        return record.rater, record.messages[-1].content, record.score, dict(record.aspects)
    return record.rater, [[record.talks[i][-1].content for i in tier] for tier in record.tiers]


def test_transcripts_of_hh(tmp_path: Path) -> None:
    first, second = read_records(HERE / "hh.jsonl")
    assert isinstance(first, Ranked)
    assert [[m.role for m in t] for t in first.talks] == [["user", "assistant"] * 2] * 2
    assert told(first) == ("imported", [["What you put doors in."], ["No."]])
    assert told(second) == (
        "imported",
        [["Hi!\n\nHow are you?"], [""]],
    ), "a blank line within a reply is no new speaker"
    packed = tmp_path / "hh.jsonl.gz"
    packed.write_bytes(gzip.compress((HERE / "hh.jsonl").read_bytes(), mtime=0))
    assert read(packed) == read(HERE / "hh.jsonl")
    odd = "Answer briefly.\n\nHuman: Hi\n\nHuman: Anybody?\n\nAssistant: Yes."
    episodes, _, _ = read(
        written([{"chosen": odd, "rejected": odd.replace("Yes", "No")}], tmp_path / "odd.jsonl")
    )
    assert [m.content for m in episodes[0].messages] == [
        "Answer briefly.",
        "Hi\n\nAnybody?",
        "Yes.",
    ]


def test_argilla_flat() -> None:
    records = read_records(HERE / "argilla_flat.json")
    assert [told(r) for r in records] == [
        ("ann", [["A way in."], ["A board on hinges."], ["A hole."]]),
        ("ann", "A way in.", 4.0, {}),
        ("ben", [["A hole."], ["A way in.", "A board on hinges."]]),
    ], "submitted only; ranks that are equal are ties; rating_2 speaks of response_2"
    assert records[0].details == {"why": "It says what it is for."}
    episodes, comparisons, [score] = read(HERE / "argilla_flat.json")
    assert len(episodes) == 3
    assert len({e.group for e in episodes}) == 1
    assert [len(c.ranking) for c in comparisons] == [3, 2]
    assert score.episode == comparisons[0].ranking[0][0], (
        "what was ranked and what was rated is one conversation"
    )


def test_argilla_chat_nested() -> None:
    records = read_records(HERE / "argilla_chat.json")
    assert [told(r) for r in records] == [
        ("u-1", [["Oil the hinges."], ["Break it."]]),
        ("u-2", [["Oil the hinges.", "Break it."]]),
        ("u-1", "Hello, what can I do for you?", None, {"helpful": 5.0, "polite": 3.0}),
    ]
    assert isinstance(records[0], Ranked)
    assert [m.role for m in records[0].talks[0]] == ["user", "assistant", "user", "assistant"]


def test_argilla_without_a_status_warns(tmp_path: Path) -> None:
    record = {
        "fields": {"prompt": "x", "reply": "y"},
        "responses": {"good": [{"value": 3, "user_id": "u"}]},
    }
    with pytest.warns(UserWarning, match="drafts and discarded ones cannot be told"):
        [said] = read_records(written([record], tmp_path / "a.jsonl"))
    assert told(said) == ("u", "y", 3.0, {})


def test_label_studio() -> None:
    records = read_records(HERE / "label_studio.json")
    assert [told(r) for r in records] == [
        ("10", [["A way in."], ["A hole."]]),
        ("ben@example.org", [["A hole."], ["A way in."]]),
        ("10", [["Blue."], ["Red."], ["Seven."]]),
        ("11", [["Red.", "Blue."], ["Seven."]]),
        ("10", "Push.", 4.0, {}),
        ("11", "Push.", 0.0, {}),
    ], "skipped, empty, drafts and predictions are no answers"
    assert records[0].details == {"why": {"text": ["clearer"]}}


def argilla(value: Any, q: str = "q", **fields: Any) -> dict[str, Any]:
    answer = {"value": value, "user_id": "u", "status": "submitted"}
    return {"fields": fields, "responses": {q: [answer]}}


def task(value: Any, kind: str = "pairwise", **data: Any) -> dict[str, Any]:
    return {
        "data": data,
        "annotations": [
            {"completed_by": 1, "result": [{"type": kind, "from_name": "q", "value": value}]}
        ],
    }


SAID = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
PAIR = {"chosen": SAID, "rejected": [SAID[0], {"role": "assistant", "content": "z"}]}
STEP = {"prompt": "9.8 or 9.11?", "completions": ["0.8 > 0.11.", "9.8."], "labels": [True, False]}
TWICE = task({"choices": ["answer1"]}, "choices", prompt="x", answer1="a", answer2="b")
TWICE["annotations"][0]["result"] *= 2
BROKEN: list[tuple[Any, str]] = [
    ("{", r":1 is not JSON"),
    (json.dumps(PAIR) + "\n" + json.dumps(PAIR)[:-1] + "\n" + json.dumps(PAIR) + "\n",
        r":2 is not JSON: .*, column \d{2,}"),
    (b"\xff\xfa", r":1 is not text in UTF-8: .*; write the file as UTF-8"),
    (b"\xff\xfe", "holds no pair"),  # UTF-16, and empty
    ("", "holds no pair"),
    ("[1]", r"record 1 is no record but int; known are pairs"),
    ({**PAIR, "margin": float("nan")}, "`margin` must be a finite number, got nan"),
    ({**PAIR, "score_chosen": 1, "score_rejected": 1, "margin": 2}, "the scores are equal"),
    ({**PAIR, "score_chosen": 1, "score_rejected": 1, "probability": 0.9}, "the scores are equal"),
    ({**PAIR, "margin": "much"}, "`margin` must be a finite number, got 'much'"),
    ({**PAIR, "margin": 10**400}, "an integer beyond all floats"),
    ({**PAIR, "margin": True}, "`margin` must be a finite number, got True"),
    ({**PAIR, "margin": -1}, "`margin` must be at least 0"),
    ({**PAIR, "probability": "0.9"}, "`probability` must be a finite number, got '0.9'"),
    ({**PAIR, "score_chosen": 1, "score_rejected": 2}, "the rejected one has the higher score"),
    ({**PAIR, "chosen_score": "3", "rejected_score": 2}, "`chosen_score` must be a finite number"),
    ({**PAIR, "images": ["a.png"]}, "`images` is part of the conversation"),
    ({**PAIR, "history": SAID}, "`history` is part of the conversation"),
    ({**PAIR, "weight": 0.5}, "`weight` is part of the conversation, or of its weight"),
    ({**PAIR, "system": "be brief", "chosen": [{"role": "system", "content": "be long"}, *SAID]},
        "`system` is another text"),
    ({**PAIR, "system": ["x"]}, "`system` must be a text"),
    ({**PAIR, "tools": "[{"}, "`tools` is not JSON"),
    ({**PAIR, "tools": {"name": "f"}}, "`tools` must be a list of JSON schemas"),
    ({**PAIR, "chosen": [SAID[0], {**SAID[1], "tool_calls": [{"function": {"name": "f"}}]}]},
        "has `tool_calls`; messages here are texts"),
    ({**PAIR, "chosen": [SAID[0], {"role": "assistant", "content": None,
                    "function_call": {"name": "f"}}]}, "has `function_call`"),
    ({**PAIR, "rejected": [SAID[0], {**SAID[1], "reasoning_content": "hm"}]},
        "`rejected` has `reasoning_content`.*write it into `content`"),
    ({**PAIR, "rejected": [SAID[0], {**SAID[1], "weight": 0}]},
        "messages here are texts: only fine-tuning .sft. knows it"),
    ({"chosen": [{"from": "human", "value": "x"}], "rejected": []},
        "must be called {role, content} .human is user"),
    ({"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": ""},
        "`rejected` is no whole conversation of Human and Assistant"),
    ({"data": {"text": "x"}, "completions": [{"id": 1, "result": []}]},
        "a task of Label Studio before 1.0"),
    ({"instruction": "x", "completions": [{"response": "y", "annotations": None}]},
        "as in raw UltraFeedback"),
    ({"fields": {"text": "x"}, "responses": [{"user_id": 1, "values": {}}]},
        "a record of Argilla 1"),
    ('{"chosen": 1, "chosen": 2}', "the key 'chosen' stands twice"),
    ('{\n  "chosen": []\n}', "one value per line is needed, or one array of all"),
    ('[{"chosen": [],\n "rejected": x}]', r":2 is not JSON"),
    (b"PK\x03\x04xx", "a zip archive: unpack it"),
    (b"\x28\xb5\x2f\xfdxx", "packed by zstd"),
    (b"PAR1xx", "a parquet file"),
    ("version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    (gzip.compress(b"x" * 999, mtime=0)[:-9], "cut off or damaged after line 0"),
    (gzip.compress(b"x" * 999, mtime=0).replace(b"\xcb", b"\xcc") + b"y", "damaged|not JSON"),
    ({**PAIR, "probability": 0.2}, "probability must lie in 0.5 to 1"),
    ({"text": "hi"}, "is of no known format: it has text; known are pairs"),
    ({"text1": "a", "q": "left", "annotation_id": 1}, "not JSON-MIN"),
    ({"chosen": []}, "needs `chosen` and `rejected`"),
    ({"chosen": [], "rejected": []}, "each conversation needs"),
    ({"chosen": "hi", "rejected": "ho"}, "`chosen` is a text; conversations are needed"),
    ({"prompt": [{"role": "user", "content": "x"}], "chosen": [{"role": "user", "content": "y"}],
            "rejected": []}, "must alternate"),
    ({"prompt": [{"role": "boss", "content": "x"}], "chosen": [], "rejected": []},
        "has the role 'boss'"),
    ({"prompt": [{"role": "user", "content": 3}], "chosen": [], "rejected": []},
        "with a text, got"),
    ({"prompt": {"role": "user", "content": "x"}, "chosen": [], "rejected": []},
        "`prompt` must be a list"),
    ({"completion": [], "label": "good"}, "must be true .liked. or false"),
    ({"completion": [], "label": True}, "each conversation needs"),
    ({**STEP, "labels": [True]}, "lists of one length"),
    ({**STEP, "labels": [1, 0]}, "true or false"),
    ({**STEP, "prompt": "\n\nHuman: hi\n\nAssistant:"},
        "need the columns `messages` and `turn_scores`"),
    ({"messages": SAID, "turn_scores": [1, 1], "completions": []}, "2 turn scores for 1"),
    (argilla("reply_1", prompt="x", question="y", reply_1="a", reply_2="b"),
        "which of the fields prompt, question is the prompt"),
    (argilla("reply_3", prompt="x", reply_1="a", reply_2="b"),
        "'reply_3' names no field .prompt, reply_1, reply_2."),
    (argilla(["a", "b"], prompt="x", reply_1="a", reply_2="b"), "'a' is no place in a ranking"),
    (argilla(["reply_1", "reply-1"], prompt="x", reply_1="a", reply_2="b"),
        "'reply-1' is no place in a ranking"),
    (argilla(["reply_1"], prompt="x", reply_1="a", reply_2="b"),
        "leaves out reply_2: it may be a choice of several"),
    (argilla([{"value": "reply_1", "rank": 1}], prompt="x", reply_1="a", reply_2="b"),
        "fewer than two"),
    (argilla(4, "rating_1", prompt="x", a_1="a", a_2="b", b_1="c", b_2="d"),
        "which conversation does 'rating_1' speak of"),
    (task({"choices": ["answer1", "answer2"]}, "choices", prompt="x", answer1="a", answer2="b"),
        "no choice, ranking or rating"),
    (TWICE, "no choice, ranking or rating"),
    ({"prompt": "\n\nHuman: other", "chosen": "\n\nHuman: x\n\nAssistant: y",
            "rejected": "\n\nHuman: x\n\nAssistant: z"}, "do not begin with `prompt`"),
    (argilla("reply_1", reply_1="a", reply_2="b"), "no field holds the prompt"),
    (argilla(4, prompt="x", reply_1="a", reply_2="b"), "which conversation does 'q' speak of"),
    (argilla("tie", prompt="x", one="a", two="b"), "which fields are the replies"),
    (argilla([{"label": "x", "start": 0, "end": 1}], prompt="x", reply="a"),
        "is no place in a ranking"),
    (argilla({"a": 1}, prompt="x", reply="a"), "no choice, ranking or rating"),
    ({"prompt": "x", "q.responses": ["a"], "q.responses.users": [],
            "q.responses.status": ["submitted"]}, "lists of one length"),
    (task({"selected": "left"}, prompt="x", first="a", second="b"), "which fields are the replies"),
    (task({"ranker": {"good": ["a"], "bad": ["b"]}}, "ranker", prompt="x", items=[]),
        "the buckets good, bad have no order"),
    (task({"ranker": {"rank": ["a", "b"]}}, "ranker", prompt="x", items=[{"id": "a", "body": "1"}]),
        "holds the ranked items a, b"),
    (task({"ranker": {"rank": ["a", "b"]}}, "ranker", prompt="x", items=[{"id": "a"}, {"id": "b"}]),
        "has no `body`"),
    (task("left", prompt="x"), "every result must have `type`, `value` and `from_name`"),
    ({"data": {}, "annotations": [3]}, "every annotation must have a `result`"),
    ({"data": {}, "annotations": [{"result": [3]}]}, "every result must have"),
    ({"fields": {}, "responses": {"q": [3]}}, "must be {value, user_id}"),
    (task({"rating": 1e999}, "rating", prompt="x", reply="y"),
        "`q` must be a finite number, got inf"),
]  # fmt: skip


@pytest.mark.parametrize(("broken", "message"), BROKEN)
def test_broken_files_say_where_and_what(broken: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    line = broken if isinstance(broken, (str, bytes)) else json.dumps(broken)
    path.write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(PreferenceError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_an_answer_that_is_understood_here_and_not_there_is_an_error(tmp_path: Path) -> None:
    fields = {"prompt": "x", "reply_1": "a", "reply_2": "b"}
    good, odd = argilla("reply_1", **fields), argilla("Reply one, I think", **fields)
    with pytest.raises(
        PreferenceError, match=r":2: the answer 'Reply one, I think' names no field"
    ):
        read(written([good, odd], tmp_path / "a.jsonl"))
    good["responses"]["why"] = [
        {"value": "Reply one is best", "user_id": "u", "status": "submitted"}
    ]
    [said] = read_records(written([good], tmp_path / "b.jsonl"))
    assert said.details == {"why": "Reply one is best"}, (
        "another question may have any answer; it is kept"
    )


def test_metadata_beside_the_replies_is_not_taken_for_them(tmp_path: Path) -> None:
    flat = {"prompt": "x", "response_1": "a", "response_2": "b", "model_1": "m", "model_2": "n"}
    answers = {
        "q.responses": ["left", "both"],
        "q.responses.users": ["u", "v"],
        "q.responses.status": ["submitted"] * 2,
    }
    records = read_records(written([flat | answers], tmp_path / "a.jsonl"))
    assert [told(r) for r in records] == [("u", [["a"], ["b"]]), ("v", [["a", "b"]])]


def test_other_numbered_fields_do_not_hide_a_single_reply(tmp_path: Path) -> None:
    chat = "\n\nHuman: x\n\nAssistant: y\n\nHuman: z"
    [said] = read_records(
        written(
            [argilla("Yes", prompt=chat, reply="w", note_1="?", note_2="!")], tmp_path / "a.jsonl"
        )
    )
    assert isinstance(said, Scored)
    assert ([m.content for m in said.messages], said.score) == (["x", "y", "z", "w"], 1.0)


def test_many_numbered_replies_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    fields = {"prompt": "x", **{f"answer{n}": f"a{n}" for n in (10, 2, 1)}}
    [said] = read_records(written([argilla("answer10", **fields)], tmp_path / "a.jsonl"))
    assert told(said) == ("u", [["a10"], ["a1", "a2"]]), "one chosen: the others are tied below it"


def test_steps_of_others_are_replies_with_nothing_between(tmp_path: Path) -> None:
    [episode], _, [score] = read(written([STEP], tmp_path / "s.jsonl"))
    assert [m.content for m in episode.messages] == ["9.8 or 9.11?", "0.8 > 0.11.", "", "9.8."]
    assert score.turn_scores == (1.0, 0.0)


def chat(heard: str, reply: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": heard}, {"role": "assistant", "content": reply, **more}]


def test_what_a_record_holds_beside_the_words_is_kept_or_named_once(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    row = {
        "chosen": chat("x", "y", name="bot"),
        "rejected": chat("x", "z"),
        "system": "be brief",
        "tools": json.dumps([tool]),
    }
    more = {
        "score_chosen": 4,
        "score_rejected": 2.5,
        "category": "doors",
        "images": [],
        "notes": None,
    }
    path = written([row | more, row | more], tmp_path / "a.jsonl")
    with pytest.warns(
        UserWarning, match=r"nothing is made of what they hold: category .2x., message.name .2x.$"
    ) as warned:
        episodes, [said, _], _ = read(path)
    assert len(warned) == 1
    assert [(e.system, e.tools) for e in episodes] == [("be brief", (tool,))] * 2
    assert dict(said.details) == {"score_chosen": 4.0, "score_rejected": 2.5}
    assert len({e.group for e in episodes}) == 1
    [first, *_] = read(
        written([{k: v for k, v in row.items() if k != "tools"}], tmp_path / "b.jsonl")
    ).episodes
    assert first.group not in {e.group for e in episodes}, "with other tools it is another start"


def test_a_prompt_as_text_beside_whole_conversations(tmp_path: Path) -> None:
    """As in UltraFeedback, binarized: `prompt` and `messages` say again what `chosen` says."""
    row = {
        "prompt": "x",
        "chosen": chat("x", "y"),
        "rejected": chat("x", "z"),
        "messages": chat("x", "y"),
    }
    [said] = read_records(written([row], tmp_path / "a.jsonl"))
    assert isinstance(said, Ranked)
    assert [[m.content for m in talk] for talk in said.talks] == [["x", "y"], ["x", "z"]]
    with pytest.raises(PreferenceError, match="`prompt` is a text"):
        read(written([row | {"prompt": "another"}], tmp_path / "b.jsonl"))


def test_equal_is_not_preferred(tmp_path: Path) -> None:
    same = {"chosen": chat("x", "y"), "rejected": chat("x", "y"), "margin": 2, "probability": 0.9}
    level = {
        "chosen": chat("x", "y"),
        "rejected": chat("x", "z"),
        "chosen-rating": 3,
        "rejected-rating": 3.0,
    }
    _, comparisons, _ = read(written([same, level], tmp_path / "a.jsonl"))
    assert [([len(t) for t in c.ranking], c.strength, c.probability) for c in comparisons] == [
        ([2], None, None)
    ] * 2
    fields = {"prompt": "x", "reply_1": "a", "reply_2": "b", "reply_3": "a", "reply_4": "c"}
    [said] = read_records(
        written(
            [argilla(["reply_4", "reply_1", "reply_2", "reply_3"], **fields)], tmp_path / "b.jsonl"
        )
    )
    assert told(said) == ("u", [["c"], ["a", "b", "a"]]), "between equals there is no room"


def test_what_began_differently_is_a_start_of_its_own(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "be brief"}]
    rows = [
        {"chosen": system + chat(f"a{i % 3}", "y"), "rejected": system + chat(f"b{i % 3}", "z")}
        for i in range(6)
    ]
    with pytest.warns(
        UserWarning,
        match=r"6 rankings .the first at .*a.jsonl:1. compare conversations that began differently",
    ):
        episodes, comparisons, _ = read(written(rows, tmp_path / "a.jsonl"))
    assert len({c.group for c in comparisons}) == 3, (
        "rows that say it of the same two are of one start"
    )
    assert len(episodes) == 6


def test_thousands_of_rows_that_begin_alike(tmp_path: Path) -> None:
    rows = [{"chosen": chat("Hi", f"y{i}"), "rejected": chat("Hi", f"z{i}")} for i in range(5_000)]
    episodes, comparisons, _ = read(written(rows, tmp_path / "a.jsonl"))
    assert (len(episodes), len(comparisons), len({c.group for c in comparisons})) == (
        10_000,
        5_000,
        1,
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("shape", ["lines", "crlf", "array", "gz"])
def test_encodings_line_ends_and_arrays(encoding: str, shape: str, tmp_path: Path) -> None:
    rows = [
        {"chosen": chat("Grüß Gott", "日本"), "rejected": chat("Grüß Gott", "😀")},
        {"chosen": chat("x", "y"), "rejected": chat("x", "z")},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = {
        "array": json.dumps(rows, ensure_ascii=False, indent=1),
        "crlf": "\r\n\r\n".join(lines),
    }.get(shape, "\n\n".join(lines) + "\n")
    content = text.encode(encoding)
    path = tmp_path / "data"
    path.write_bytes(gzip.compress(content, mtime=0) if shape == "gz" else content)
    assert [r.talks[0][1].content for r in read_records(path) if isinstance(r, Ranked)] == [
        "日本",
        "y",
    ]


def test_half_characters_are_replaced_and_counted(tmp_path: Path) -> None:
    row = {"chosen": chat("x\ud83d", "y\udc00\ud83d"), "rejected": chat("x\ud83d", "whole 😀")}
    path = written([PAIR, row], tmp_path / "a.jsonl")
    with pytest.warns(
        UserWarning,
        match=(
            r"a.jsonl: 4 half characters .lone surrogates, the first at .*a.jsonl:2. are read as"
            r" U\+FFFD"
        ),
    ):
        episodes = read(path).episodes
    assert [m.content for m in episodes[2].messages] == ["x\ufffd", "y\ufffd\ufffd"]
    assert episodes[3].messages[1].content == "whole 😀"


def test_a_datasets_folder_of_several_splits_or_damaged(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    folder = tmp_path / "set"
    DatasetDict(
        {name: Dataset.from_list([PAIR] * n) for name, n in (("train", 2), ("test", 1))}
    ).save_to_disk(str(folder))
    with pytest.warns(UserWarning, match="has the splits train, test: 'train' is read"):
        assert len(read(folder).comparisons) == 2
    [table] = (folder / "train").glob("*.arrow")
    table.write_bytes(table.read_bytes()[:-40])
    with pytest.raises(PreferenceError, match="damaged"):
        read(folder)


def test_comments_are_not_answers(tmp_path: Path) -> None:
    """Argilla's exports do not tell a label from free text: that is decided over the whole file, by
    the name, the other answers and the settings."""

    def row(
        i: int, question: str, value: Any, other: str, words: str, **fields: Any
    ) -> dict[str, Any]:
        one = lambda value: [{"value": value, "user_id": "u", "status": "submitted"}]  # noqa: E731
        return {
            "fields": {"prompt": f"hi {i}", **fields},
            "responses": {question: one(value), other: one(words)},
        }

    two = {"response_1": "a", "response_2": "b"}
    path = tmp_path / "records.json"
    for words in ("Response 2", "same", "good", "No.", "a bit too long"):
        [said] = read_records(
            written([row(1, "order", ["response_1", "response_2"], "Comment", words, **two)], path)
        )
        assert (told(said), said.details) == (("u", [["a"], ["b"]]), {"Comment": words})
    rated = [
        row(i, "rating", 2 + i, "thoughts", words, response="a")
        for i, words in enumerate(("good", "a bit too long", "Fine by me"))
    ]
    with pytest.warns(
        UserWarning, match="'thoughts' is taken for free text, though 1 of its answers"
    ):
        found = read_records(written(rated, path))
    assert [told(said) for said in found] == [("u", "a", 2.0 + i, {}) for i in range(3)]
    assert [said.details["thoughts"] for said in found] == ["good", "a bit too long", "Fine by me"]
    [said] = read_records(written([row(1, "rating", 2, "liked", "no", response="a")], path))
    assert told(said) == (
        "u",
        "a",
        None,
        {"rating": 2.0, "liked": 0.0},
    ), "nothing says that it is free text"
    settings = tmp_path / ".argilla" / "settings.json"
    settings.parent.mkdir()
    settings.write_text(
        json.dumps({"questions": [{"name": "liked", "settings": {"type": "text"}}]})
    )
    [said] = read_records(path)
    assert (told(said), said.details) == (("u", "a", 2.0, {}), {"liked": "no"})
    settings.write_text("[]")
    with pytest.raises(PreferenceError, match="is no settings file of Argilla"):
        read_records(path)
    settings.unlink()
    [said] = read_records(written([argilla("yes", "comment", prompt="x", reply="a")], path))
    assert told(said) == (
        "u",
        "a",
        1.0,
        {},
    ), "where nothing else is answered, a question may be called so"


def test_who_has_the_number_0_and_who_said_nothing(tmp_path: Path) -> None:
    flat = {"prompt": "x", "response_1": "a", "response_2": "b"}
    answers = {
        "q.responses": ["left", None],
        "q.responses.users": [0, 1],
        "q.responses.status": ["submitted"] * 2,
    }
    [said] = read_records(written([flat | answers], tmp_path / "a.jsonl"))
    assert told(said) == ("0", [["a"], ["b"]])
    [pair] = read_records(written([PAIR | {"rater": 0}], tmp_path / "b.jsonl"))
    assert pair.rater == "0"
    [nobody] = read_records(written([PAIR | {"rater": ""}], tmp_path / "c.jsonl"))
    assert nobody.rater == "imported"


def test_results_without_a_value_are_kept_in_the_details(tmp_path: Path) -> None:
    judged = task({"selected": "left"}, prompt="x", answer1="a", answer2="b")
    judged["annotations"][0]["result"].append(
        {"type": "relation", "from_id": "p", "to_id": "q", "direction": "right"}
    )
    [said] = read_records(written([judged], tmp_path / "a.jsonl"))
    assert told(said) == ("1", [["a"], ["b"]])
    assert said.details == {"relation": {"from_id": "p", "to_id": "q", "direction": "right"}}


KEYS = st.sampled_from(
    ["prompt", "chosen", "rejected", "completion", "completions", "label", "labels", "messages",
        "turn_scores", "margin", "rater", "role",
     "content", "fields", "responses", "data", "annotations", "result", "type", "value", "ranker",
     "rank", "items", "id", "body", "a_1",
     "a_2", "q.responses", "q.responses.users", "q.responses.status", "completed_by", "status",
     "probability", "author", "text"]
)  # fmt: skip
WORDS = st.sampled_from(
    [
        "user",
        "assistant",
        "a_1",
        "left",
        "tie",
        "yes",
        "submitted",
        "ranker",
        "pairwise",
        "rating",
        "\ud800",
        "",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=30,
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.dictionaries(KEYS, JSON, min_size=1, max_size=8), min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore")
def test_no_file_brings_it_down(tmp_path: Path, records: list[Any]) -> None:
    with contextlib.suppress(PreferenceError):
        read(written(records, tmp_path / "f.jsonl"))


# Runs.


def done(model: Path, folder: Path, *stages: dict[str, Any], **more: Any) -> turnwise.Run:
    return turnwise.Run(
        {"policy": str(model), "threads": 1, "stages": list(stages), **more}, folder=folder
    ).finish()


def test_the_data_of_every_stage_takes_every_format(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rank = {"rank": {"data": HERE / "label_studio.json"}}
    kto = {"preference": {"data": HERE / "argilla_flat.json", "optimizer": "kto", "threshold": 3}}
    stages = (
        rank,
        {"reward-model": {"data": HERE / "hh.jsonl", "held_out": 0}},
        {"preference": {}},
        kto,
    )
    run = done(model_folder(), tmp_path / "r", *stages)
    last = {m["stage"]: m for m in run.metrics}
    assert (last["rank"]["comparisons"], last["rank"]["scores"], last["rank"]["episodes"]) == (
        4.0,
        2.0,
        6.0,
    )
    assert last["reward-model"]["comparisons"] == 4.0 + 2.0
    found = last["preference"]["pairs"], last["preference"]["undecided_or_too_long"]
    assert found == (
        3.0,
        1.0,
    ), "the data of a stage is for that stage; raters who contradict one another decide nothing"
    assert last["preference-2"]["labelled"] == 1.0
    raters = {
        c.stamp.rater
        for c in run.ledger.feedback(run=run.id, kind="comparison", status="scored", late=True)
    }
    assert raters == {"10", "ben@example.org", "11", "imported", "ann", "ben"}


def test_what_cannot_be_trained_on_is_an_error_and_nothing_is_imported(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    ratings = written(
        [argilla(4, prompt="x", reply="y"), argilla(2, prompt="x", reply="z")],
        tmp_path / "ratings.jsonl",
    )
    broken = written([PAIR, {"chosen": 1}], tmp_path / "broken.jsonl")
    for i, (stage, message) in enumerate(
        [
            (
                {"preference": {"data": ratings, "optimizer": "kto"}},
                "a score of 4 is no label .0 or 1.: state the `threshold`",
            ),
            ({"preference": {"data": ratings}}, "holds labels or ratings, no comparison"),
            ({"reward-model": {"data": ratings}}, "holds labels or ratings, no comparison"),
            ({"rank": {"data": broken}}, "broken.jsonl:2 needs `chosen`"),
            ({"preference": {"data": broken, "optimizer": "kto"}}, "broken.jsonl:2 needs `chosen`"),
        ]
    ):
        with pytest.raises(PreferenceError, match=message):
            done(model_folder(), tmp_path / str(i), stage)
        assert turnwise.Ledger(tmp_path / str(i) / "ledger.sqlite").counts()["episodes"] == 0


def test_export_of_a_run(
    model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from turnwise.engine.cli.results import export
    from turnwise.engine.report.page import write_report

    ledger = f"sqlite:///{tmp_path / 'elsewhere.sqlite'}"
    run = done(
        model_folder(),
        tmp_path / "r",
        {"rank": {"data": HERE / "label_studio.json"}},
        ledger=ledger,
    )
    other, rated = sorted(
        run.ledger.feedback(run=run.id, kind="feedback", status="scored", late=True),
        key=lambda f: f.score or 0.0,
    )
    score = lambda **more: turnwise.Feedback(rated.episode, **more)  # noqa: E731
    run.ledger.add_feedback(
        [
            score(score=5.0, turn_scores=(1.0,), id="new", supersedes=rated.id),
            turnwise.Feedback.failed(rated.episode, "no time", id="failed"),
            turnwise.Feedback.abstained(rated.episode, id="abstained"),
        ]
    )
    assert sorted(
        f.score
        for f in run.ledger.feedback(run=run.id, kind="feedback", status="scored", late=True)
        if f.score is not None
    ) == sorted([5.0, other.score])
    export(tmp_path / "r", tmp_path / "pairs")
    assert "7 pairs of 4 comparisons" in capsys.readouterr().out
    assert len(read(tmp_path / "pairs").comparisons) == 7
    export(tmp_path / "r", tmp_path / "labels.jsonl", form="unpaired", threshold=4.5)
    said = [
        (r["completion"][0]["content"], r["label"])
        for r in map(json.loads, (tmp_path / "labels.jsonl").read_text().splitlines())
    ]
    assert sorted(said)[:2] == [
        ("A hole.", False),
        ("A hole.", True),
    ], "one rater's best is the other's worst"
    assert ("Push.", True) in said
    assert ("Push.", False) in said
    assert len([s for s in said if s[0] == "Push."]) == 2, (
        "superseded, failed and abstained ones are not there"
    )
    export(tmp_path / "r", tmp_path / "steps.jsonl", form="stepwise", stage=["rank"])
    [row] = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    assert row["labels"] == [True]
    with pytest.raises(PreferenceError, match="a score of 5 is no label"):
        export(tmp_path / "r", tmp_path / "x.jsonl", form="unpaired")
    with pytest.raises(
        turnwise.ConfigError, match="has nothing to write as pairs in rl: 0 comparisons"
    ):
        export(tmp_path / "r", tmp_path / "x.jsonl", stage=["rl"])
    assert not (tmp_path / "x.jsonl").exists()
    assert write_report(tmp_path / "r").exists(), "the report finds the ledger in the same place"

    config = (tmp_path / "r" / "config.yaml").read_text()
    assert ledger in config
    (tmp_path / "r" / "config.yaml").write_text(
        config.replace(ledger, "postgresql+psycopg://***@host/db")
    )
    with pytest.raises(
        turnwise.ConfigError, match="whose password is not kept: give the URL with --ledger"
    ):
        export(tmp_path / "r", tmp_path / "x.jsonl")
    assert open_ledger(tmp_path / "r", ledger)[1] == run.id
    with pytest.raises(turnwise.ConfigError, match="holds no run"):
        export(tmp_path, tmp_path / "x.jsonl")


def test_aspects_count_as_their_mean() -> None:
    from turnwise.engine.exchange.writing import export_unpaired

    e = conversation("yo")
    said = [turnwise.Feedback("e", aspects={"kind": 1.0, "true": 0.25}, id="f")]
    assert [row["label"] for row in export_unpaired({"e": e}, said, [], 0.6)] == [True]
    assert [row["label"] for row in export_unpaired({"e": e}, said, [], 0.7)] == [False]
