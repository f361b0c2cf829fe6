"""Data sets of prompts as environments: what counts as an answer, which row a seed asks, splits
that share nothing, and what is wrong with a file in one message."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pytest
import turnwise
from hypothesis import given, settings
from hypothesis import strategies as st
from turnwise import testing
from turnwise.engine.analysis.scores import score
from turnwise.envs.answers import check_of, last_number, number
from turnwise.envs.prompts import Prompts
from turnwise.judges.llm.transcript import conversation as shown_to_judges
from turnwise.judging import export_stepwise
from turnwise.plugins.human.web.pages import blocks

PROMPTS = "turnwise/Prompts-v0"
turnwise.Plugins()


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} + {i + 1}?", "answer": str(2 * i + 1)} for i in range(count)]


def written(folder: Path, content: Sequence[Mapping[str, Any]], name: str = "tasks.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(file)


@pytest.mark.parametrize(
    ("kind", "answer", "right", "wrong"),
    [
        ("numeric", "42", ["42", "It is 42.", "6 * 7 = 42", "**42**", "$42", "42.0", "\\boxed{42}",
            "<answer>42</answer>, not 7", "so 42!", "042"],
            ["-42", "420", "4.2", "42 or 7", "none", "", "1/42"]),
        ("numeric", 1234.5, ["1,234.5", "1234.50", "x = 1234.5"], ["1234", "12345", "1,23,4.5"]),
        ("numeric", "-1", ["-1", "The answer is -1", "\N{MINUS SIGN}1"], ["1", "2 - 1 = 1", "11"]),
        ("numeric", 0.5, ["0.5", ".5", "0.50"], ["5", "0,5", "1/2"]),
        ("numeric", 1234567890, ["1234567890", "1,234,567,890"], ["1234567000", "1234567891"]),
        ("exact", "Paris", ["Paris", " Paris\n", "<answer>Paris</answer>"], ["paris", "Paris."]),
        ("choice", "B", ["B", "(B)", "b", "B. Because", "The answer is B", "A is wrong, so B.",
            "B. A whale", "B. I am sure.", "The answer is B, I think", "Option B", "I say (B)"],
            ["A", "Because", "C or B or A", "", "C. B whales", "A. B", "I am"]),
        ("regex", r"(?i)\bpar(is|ee)\b", ["It is Paris.", "PARIS"], ["Parisian", "London"]),
    ],
)  # fmt: skip
def test_what_counts_as_an_answer(
    kind: str, answer: Any, right: list[str], wrong: list[str]
) -> None:
    check = check_of(kind).score
    row = {"prompt": "?", "answer": answer}
    assert check_of(kind).fault(row) == ""
    assert {reply: check(reply, row) for reply in right} == dict.fromkeys(right, 1.0)
    assert {reply: check(reply, row) for reply in wrong} == dict.fromkeys(wrong, 0.0)


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "It is {}.", "({:,})", "={} "]))
def test_whole_numbers_are_read_back(value: int, form: str) -> None:
    assert last_number("1 and " + form.format(value)) == value


def test_codes_are_no_numbers() -> None:
    assert [number(t) for t in ("007", "0110", "0", "0.5", "1e3", "nan", "12:30", "1_0")] == [
        None, None, 0, Decimal("0.5"), 1000, None, None, None,
    ]  # fmt: skip


def longest_word(reply: str, row: Mapping[str, Any]) -> float:
    return max(map(len, reply.split())) / float(row["answer"])


def nothing(reply: str, row: Mapping[str, Any]) -> None:
    return None


def test_a_function_of_ones_own_checks() -> None:
    check = check_of(f"python:{__name__}:longest_word")
    assert check.score("a bird", {"answer": 8}) == 0.5
    with pytest.raises(ValueError, match="nothing returned None, which is no number"):
        check_of(f"python:{__name__}:nothing").score("x", {"answer": 1})
    for wrong, why in (
        ("numerical", "answer must be one of numeric, exact, choice, regex, none or python:MODULE"),
        ("python:nowhere:f", "cannot import 'nowhere'"),
        (f"python:{__name__}:missing", "has no function 'missing'"),
    ):
        with pytest.raises(ValueError, match=why):
            check_of(wrong)


def asked(data: str, seeds: Sequence[int], split: str = "train", **kwargs: Any) -> list[str]:
    env = Prompts(data, **kwargs)
    return [env.reset(seed=seed, options={"split": split})[0] for seed in seeds]


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_an_epoch_asks_every_row_once(
    tmp_path_factory: Any, count: int, first: int, rng: random.Random
) -> None:
    """From any seed on, in an order that neither shuffling the file nor a restart changes."""
    folder = tmp_path_factory.mktemp("data")
    data = written(folder, rows(count))
    seeds = range(first, first + count)
    found = asked(data, seeds, held_out=0.0)
    assert sorted(found) == sorted(r["prompt"] for r in rows(count))
    mixed = rows(count)
    rng.shuffle(mixed)
    assert asked(written(folder, mixed, "mixed.jsonl"), seeds, held_out=0.0) == found


def test_splits_share_no_question(tmp_path: Path) -> None:
    """Twice in the file is once in the data, and a file that grows keeps its held-out rows."""
    data = written(tmp_path, rows(400) + [{**r, "note": "again"} for r in rows(400)])
    train, held = (
        set(asked(data, range(900), split, held_out=0.25)) for split in ("train", "held_out")
    )
    assert not train & held
    assert len(train) + len(held) == 400
    assert 70 < len(held) < 130
    longer = written(tmp_path, rows(500), "longer.jsonl")
    assert held <= set(asked(longer, range(900), "held_out", held_out=0.25))


def test_no_question_is_on_both_sides(tmp_path: Path) -> None:
    """Whatever else differs: answers, choices and their order, system prompts, spaces. Rows that
    differ so are rows of their own."""
    variants: list[dict[str, Any]] = []
    for i in range(60):
        for k in range(4):
            more = [{"answer": str(k)}, {"system": "Be brief."}, {"choices": ["x", "y"]},
                {"choices": ["y", "x"], "prompt": f" {i} + 1? "}][k]  # fmt: skip
            variants.append({"prompt": f"{i} + 1?", "answer": "1", **more})
    data = written(tmp_path, variants)
    train, held = (
        {text.split("?")[0].strip() for text in asked(data, range(300), split, held_out=0.3)}
        for split in ("train", "held_out")
    )
    assert not train & held
    assert len(train) + len(held) == 60
    env = Prompts(data, held_out=0.0)
    assert len({env.reset(seed=seed)[1]["row"] for seed in range(240)}) == 240


def test_intervals_are_over_rows(tmp_path: Path) -> None:
    """A row that comes again with other seeds is no further evidence."""
    data = written(tmp_path, rows(4))
    kwargs = {"data": data, "held_out": 0.0}
    starts = [(s, 0) for s in turnwise.starts(PROMPTS, 0, 80, kwargs=kwargs)]
    right = {r["prompt"]: r["answer"] for r in rows(2)}
    episodes = turnwise.rollout(
        turnwise.ScriptPlayer(lambda said: right.get(said[-1].content, "no")), starts
    )
    found = score(episodes)
    assert (found.success, found.tasks, found.episodes) == (0.5, 4, 80)
    assert (found.low, found.high) == (0.0, 1.0), "of four rows two are right"
    none = score([e for e in episodes if not e.succeeded])
    reach = 1.959964**2 / (2 + 1.959964**2)
    assert (none.low, none.high) == (0.0, pytest.approx(reach)), "none of two is not certainly none"


def test_copies_of_a_row_are_one_whatever_their_order(tmp_path: Path) -> None:
    """And a column may have any name."""
    copies = [{"prompt": "a?", "answer": "1", "key": k, "solution": k} for k in ("x", "y", "z")]
    found = []
    for order in (copies, copies[::-1]):
        env = Prompts(written(tmp_path, order), held_out=0.0)
        env.reset(seed=0)
        found.append(dict(env.row))
    assert found[0] == found[1]
    assert found[0]["key"] == found[0]["solution"]


def test_a_file_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    data = written(tmp_path, rows(1))
    env = Prompts(data, held_out=0.0)
    assert env.reset(seed=0)[0] == "0 + 1?"
    written(tmp_path, [{"prompt": "new?", "answer": "1"}])
    assert env.reset(seed=0)[0] == "new?"


def test_messages_choices_and_system_prompts(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Largest?"}]
    data = written(tmp_path, [{"prompt": messages, "answer": "B", "choices": ["cat", "whale"]}])
    env = Prompts(data, "choice", held_out=0.0, system="Other.")
    text, info = env.reset(seed=1)
    assert text == "Largest?\nA. cat\nB. whale"
    assert info["system"] == "Be brief."
    assert env.step("B")[1:3] == (1.0, True)


def test_what_was_said_before_stands_before(
    model_folder: Any, tmp_path: Path, plugins: turnwise.Plugins
) -> None:
    """A prompt of several messages, as other trainers take it: the reply goes on from there."""
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Largest?"},
    ]
    data = written(tmp_path, [{"prompt": said, "topic": "size"}])
    kwargs = {"data": data, "answer": "none", "held_out": 0.0}
    testing.check_environment(PROMPTS, episodes=2, **kwargs)
    policy = turnwise.Policy.from_pretrained(model_folder())
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 5))
    [start] = turnwise.starts(PROMPTS, 0, 1, kwargs=kwargs)
    [episode] = turnwise.rollout(player, [(start, 0)])
    asked = [m for message in episode.messages[:2] for m in message.unjoined]
    assert [{"role": m.role, "content": m.content} for m in asked] == said
    assert episode._repr_html_().count("<small>assistant</small>") == 2
    assert episode.info["data"] == {"topic": "size"}
    prompt = policy.tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    assert list(episode.turns[0].prompt_ids) == list(prompt)
    [turn] = shown_to_judges(episode)["turns"]
    assert [each["from"] for each in turn["heard"]] == ["user", "assistant", "user"]
    page = "".join(b.html for b in blocks(episode, plugins.create("renderer", "plain")))
    speakers = re.findall(r"<strong>(\w+)</strong>", page)
    assert speakers == ["Person", "Assistant", "Person"]
    scored = turnwise.Feedback(episode.id, turn_scores=(1.0,), id="f")
    [row] = export_stepwise({episode.id: episode}, [scored], 0.5)
    assert "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Largest?" in row["prompt"]
    assert len(row["completions"]) == 1


def test_a_row_may_have_any_column_and_roles_tell_rows_apart(tmp_path: Path) -> None:
    odd = {"prompt": "Hi", "before": "2020", "said": 3}
    env = Prompts(written(tmp_path, [odd]), "none", held_out=0.0)
    assert env.reset(seed=0)[1]["data"] == {"before": "2020", "said": 3}
    three = [{"role": role, "content": text} for role, text in
             (("user", "a"), ("assistant", "b"), ("user", "c"))]  # fmt: skip
    data = written(tmp_path, [{"prompt": "a b c"}, {"prompt": three}], "two.jsonl")
    assert {len(start[1].get("parts", ())) for start in (
        Prompts(data, "none", held_out=0.0).reset(seed=seed) for seed in range(2)
    )} == {0, 3}  # fmt: skip


def test_a_wrong_answer_may_be_replaced(tmp_path: Path) -> None:
    data = written(tmp_path, rows(1))
    env = Prompts(data, "numeric", turns=3, on_wrong="No. Again.", held_out=0.0)
    env.reset(seed=0)
    assert env.step("2") == ("No. Again.", 0.0, False, False, {})
    assert env.step("1") == ("", 1.0, True, False, {"success": True})
    env.reset(seed=0)
    assert [env.step("2")[2] for _ in range(3)] == [False, False, True]


def test_the_folder_of_a_data_set_and_a_function(tmp_path: Path) -> None:
    datasets.Dataset.from_list(rows(5)).save_to_disk(str(tmp_path / "set"))
    assert len(set(asked(str(tmp_path / "set"), range(5), held_out=0.0))) == 5
    assert len(set(asked(f"python:{__name__}:seven", range(7), held_out=0.0))) == 7


def seven() -> list[dict[str, Any]]:
    return [{**row, "choices": ("x", "y")} for row in rows(7)]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"prompt": "a"}\n', r"tasks.jsonl:1 must have `prompt` and `answer`; it has prompt"),
        ('{"prompt": "a", "answer": 1}\n\n{x\n', r"tasks.jsonl:3 is not JSON"),
        (
            '{"prompt": [], "answer": 1}\n',
            "1: `prompt` must be text, or messages with a `role`",
        ),
        ('{"prompt": 5, "answer": 1}\n', "1: `prompt` must be text"),
        (
            '{"prompt": [{"role": "user", "content": ["x"]}], "answer": 1}\n',
            "1: `prompt` must",
        ),
        (
            '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],'
            ' "answer": 1}\n',
            "1: `prompt` must",
        ),
        ('{"prompt": " ", "answer": 1}\n', "1: `prompt` must be text"),
        ('{"prompt": "a", "answer": 1, "system": 5}\n', "1: `system` must be a text, got 5"),
        ('{"prompt": "a", "answer": 1, "choices": "red"}\n', "1: `choices` must be a list"),
        (
            '{"prompt": "a", "answer": 1, "choices": {"text": ["x"], "label": ["A"]}}\n',
            "1: `choices` must be a list",
        ),
        ("[1]\n", "record 1 must have `prompt` and `answer`; it has int"),
    ],
)
def test_a_file_that_is_wrong_is_named(content: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text(content)
    with pytest.raises(ValueError, match=why):
        Prompts(str(tmp_path / "tasks.jsonl"))


@pytest.mark.parametrize(
    ("kind", "row", "why"),
    [
        ("numeric", {"answer": "#### 18"}, ":2: the answer '#### 18' is no number"),
        ("choice", {"answer": "Paris"}, ":2: the answer 'Paris' is none of the letters A to J"),
        ("choice", {"answer": "C", "choices": ["x", "y"]}, "'C' is none of the letters A to B"),
        ("regex", {"answer": "(a"}, r":2: the answer '\(a' is no pattern"),
        ("regex", {"answer": ""}, ":2: the answer '' is found in every reply"),
        ("exact", {"answer": None}, ":2: the answer None is no text"),
    ],
)
def test_an_answer_that_no_reply_could_give_is_named(
    kind: str, row: dict[str, Any], why: str, tmp_path: Path
) -> None:
    good = {"prompt": "1?", "answer": "1" if kind != "choice" else "A"}
    data = written(tmp_path, [good, {"prompt": "2?", **row}])
    with pytest.raises(ValueError, match=why):
        Prompts(data, kind)


def test_mistakes(tmp_path: Path) -> None:
    data = written(tmp_path, rows(3))
    half: Any = 1.5
    five: Any = 5
    with pytest.raises(ValueError, match="turns must be a whole number of at least 1"):
        Prompts(data, turns=0)
    with pytest.raises(ValueError, match=r"turns must be a whole number .* got 1\.5"):
        Prompts(data, turns=half)
    with pytest.raises(ValueError, match="on_wrong and system must be texts, got 5"):
        Prompts(data, on_wrong=five)
    with pytest.raises(ValueError, match="cannot be read"):
        Prompts(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="has no rows in the split 'test'; there are train"):
        Prompts(data).reset(seed=0, options={"split": "test"})
    with pytest.raises(ValueError, match="takes the option split, not splt"):
        Prompts(data).reset(seed=0, options={"splt": "held_out"})


def test_it_passes_the_check_and_is_played(tmp_path: Path) -> None:
    data = written(tmp_path, rows(50))
    kwargs = {"data": data, "answer": "numeric", "turns": 2}
    assert turnwise.check_environment(PROMPTS, episodes=4, **kwargs) == []
    starts = turnwise.starts(PROMPTS, 1, 40, kwargs=kwargs)
    episodes = turnwise.rollout(turnwise.ScriptPlayer("expert"), [(s, 0) for s in starts])
    assert all(e.succeeded for e in episodes)
    assert len({e.info["row"] for e in episodes}) == 40


def test_a_check_that_raises_costs_its_own_episode(tmp_path: Path) -> None:
    data = written(tmp_path, rows(4))
    kwargs = {"data": data, "answer": f"python:{__name__}:nothing", "held_out": 0.0}
    starts = turnwise.starts(PROMPTS, 1, 2, kwargs=kwargs)
    episodes = turnwise.rollout(turnwise.ScriptPlayer("expert"), [(s, 0) for s in starts])
    assert [e.ending for e in episodes] == ["failed", "failed"]
    assert "returned None, which is no number" in episodes[0].reason


def test_prompts_without_answers_are_for_judges(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"Say {i}", "topic": i}) + "\n" for i in range(9))
    )
    kwargs = {"data": str(path), "answer": "none", "turns": 2, "on_wrong": "Again."}
    played = testing.play("turnwise/Prompts-v0", "one", "two", **kwargs)
    assert [t.observation.content for t in played.turns][1] == "Again."
    assert (played.ending, played.env_return, played.success) == ("terminated", 0.0, None)
    assert set(played.info["data"]) == {"topic"}
    assert "optimum" not in played.info
    with pytest.raises(ValueError, match="must have `prompt` and `answer`; it has prompt, topic"):
        Prompts(str(path))
