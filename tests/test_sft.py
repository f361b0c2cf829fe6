"""The sft stage: assistant tokens only, from demonstrators, JSONL and datasets folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import turnwise
from turnwise.engine.stages.sft import SFT, read_conversations

TALKS = [
    [
        ("system", "tell me"),
        ("user", "hello"),
        ("assistant", "how are you"),
        ("user", "fine"),
        ("assistant", "thanks"),
    ],
    [("user", "what is it"), ("assistant", "I do not know")],
    [("user", "yes <|im_end|>"), ("assistant", "no <|im_start|>"), ("user", "bye")],
]


def messages(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in talk]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps({"messages": messages(t)}) for t in TALKS * 4) + "\n")
    return path


def run(folder: Path, model: Path, **sft: Any) -> turnwise.Run:
    return turnwise.Run(
        {"policy": str(model), "threads": 1, "stages": [{"sft": sft}]}, folder=folder
    )


def test_loss_is_on_the_assistants_tokens_only(
    model_folder: Callable[..., Path], tmp_path: Path, jsonl: Path
) -> None:
    going = run(tmp_path / "r", model_folder(), data=jsonl)
    going._open()
    rows, metrics = SFT(data=jsonl)._rows(going)
    chat = going.policy.chat
    assert metrics["conversations"] == 12
    for row, talk in zip(rows, TALKS, strict=False):
        trained = [row.ids[p] for p in row.positions]
        said = [content for role, content in talk if role == "assistant"]
        assert trained == [i for text in said for i in chat.reply(text)]
        rest = chat.tokenizer.decode(
            [i for p, i in enumerate(row.ids) if p not in set(row.positions)]
        )
        assert all(
            content in rest
            for role, content in talk[: len(talk) - (talk[-1][0] == "user")]
            if role != "assistant"
        )


def test_it_learns_the_conversations(
    model_folder: Callable[..., Path], tmp_path: Path, jsonl: Path
) -> None:
    done = run(
        tmp_path / "r",
        model_folder(),
        data=jsonl,
        epochs=25,
        batch_size=4,
        lr=3e-2,
        steps_per_update=15,
    ).finish()
    losses = [m["loss"] for m in done.metrics]
    assert len(losses) == 5
    assert losses[-1] < 0.05 < losses[0]
    reply = done.policy.reply(messages(TALKS[0][:2]), temperature=0.0, max_new_tokens=10)
    assert reply == "how are you"
    reply = done.policy.reply(messages(TALKS[0][:4]), temperature=0.0, max_new_tokens=10)
    assert reply == "thanks"


def test_a_datasets_folder_and_prompt_completion_give_the_same(
    model_folder: Callable[..., Path], tmp_path: Path, jsonl: Path
) -> None:
    import datasets

    datasets.Dataset.from_list([{"messages": messages(t)} for t in TALKS * 4]).save_to_disk(
        str(tmp_path / "set")
    )
    split = tmp_path / "split.jsonl"
    split.write_text(
        "\n".join(
            json.dumps({"prompt": messages(t)[:-1], "completion": messages(t)[-1:]})
            for t in TALKS[:2] * 4
        )
    )
    weights = []
    for name, data in (("jsonl", jsonl), ("set", tmp_path / "set")):
        done = run(tmp_path / name, model_folder(), data=data, lr=1e-3).finish()
        weights.append(torch.cat([p.flatten() for p in done.policy.parameters()]))
    assert torch.equal(*weights)
    assert (
        run(tmp_path / "split-run", model_folder(), data=split, lr=1e-3)
        .finish()
        .metrics[0]["conversations"]
        == 8
    )


def test_demonstrators_play_and_are_recorded(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    done = run(
        tmp_path / "r", model_folder(), env="turnwise/SupportDesk-v0", episodes=20, player="expert"
    ).finish()
    assert done.metrics[0]["demonstrations/success"] == 1.0
    episodes = done.ledger.run_episodes(done.id)
    assert len(episodes) == 20
    assert {t.action_ids for e in episodes for t in e.turns} == {None}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"talks.jsonl:1 is not JSON"),
        ("[3]", "record 1 is no record but int"),
        ('{"text": "hello"}', r":1: no conversation under `messages`.*it has text"),
        ('{"messages": []}', "no conversation under `messages`"),
        (
            '{"conversations": [{"from": "human", "value": "hi"}]}',
            "no conversation under `messages`.*it has conversations",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "hi", "train_detail": [1]}]}',
            "has `train_detail`",
        ),
        ('{"messages": [{"role": "user"}]}', "must be {role, content} with a text"),
        ('{"messages": "hello"}', "`messages` is a text"),
        (
            '{"messages": [{"role": "assistant", "content": "hi"}]}',
            r"talks.jsonl:1: .*before anybody else",
        ),
        (
            (
                '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content":'
                " null}]}"
            ),
            "with a text, got",
        ),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "with a text, got"),
        ('{"messages": [{"role": "bot", "content": "hi"}]}', "has the role 'bot'"),
        ('{"messages": [{"from": "human", "value": "hi"}]}', "must be called {role, content}"),
        (
            '{"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}',
            "has `tool_calls`",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "hi", "weight": 0.5}]}',
            "`weight` must be 0 or 1, got {'weight': 0.5}",
        ),
        ('{"messages": [{"role": "assistant", "content": "hi", "weight": "0"}]}', "must be 0 or 1"),
        (
            '{"messages": [{"role": "assistant", "content": "hi", "weight": 1, "train": false}]}',
            "must be 0 or 1",
        ),
        (
            '{"messages": [{"role": "user", "content": "hi", "train": true}]}',
            "only the assistant's messages are trained on",
        ),
        ('{"prompt": "hi", "completion": "ho"}', "`prompt` is a text"),
        (
            '{"messages": [{"role": "user", "content": "hi"}], "images": ["a"]}',
            "`images` is part of the conversation",
        ),
        ("", "there is no conversation in the fine-tuning data .*talks.jsonl"),
        (
            (
                '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content":'
                ' "ho", "weight": 0}]}'
            ),
            "none of 1 conversations of the fine-tuning data has a reply to train on",
        ),
    ],
)
def test_bad_data_is_named(
    line: str, message: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "r", model_folder(), data=path).finish()


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False, "weight": None}]
)
def test_replies_of_weight_0_are_read_and_not_trained(
    mark: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "talks.jsonl"
    talk = messages(TALKS[0])
    talk[2] |= mark
    talk[4] |= dict.fromkeys(mark, 1)
    path.write_text(json.dumps({"messages": talk}) + "\n")
    going = run(tmp_path / "r", model_folder(), data=path)
    going._open()
    [row], _ = SFT(data=path)._rows(going)
    chat = going.policy.chat
    assert [row.ids[p] for p in row.positions] == list(chat.reply("thanks"))
    path.write_text(json.dumps({"messages": messages(TALKS[0])}) + "\n")
    [whole], _ = SFT(data=path)._rows(going)
    assert row.ids == whole.ids, "what is not trained on is read all the same"


def test_system_and_tools_of_a_record_are_read(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    path = tmp_path / "talks.jsonl"
    path.write_text(
        json.dumps(
            {
                "system": "tell me",
                "tools": json.dumps([tool]),
                "messages": messages(TALKS[0][1:]),
                "id": 7,
            }
        )
    )
    with pytest.warns(UserWarning, match=r"these keys are not read.*: id .1x.$"):
        [said] = read_conversations(path)
    assert [(m.role, m.content) for m in said.messages] == TALKS[0]
    assert said.tools == (tool,)


def test_data_or_env(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    for options, message in (
        ({}, "one of `data`"),
        ({"data": tmp_path / "none.jsonl"}, "no file or folder"),
        (
            {"env": "turnwise/SupportDesk-v0", "player": "exprt"},
            "no player 'exprt'. Did you mean 'expert'",
        ),
        ({"env": "turnwise/SupportDsk-v0"}, "Did you mean 'turnwise/SupportDesk-v0'"),
    ):
        with pytest.raises(turnwise.ConfigError, match=message):
            run(tmp_path / "r", model_folder(), **options)
