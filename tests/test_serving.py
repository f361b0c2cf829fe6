"""A policy that is served: conversations through the real SDKs, recorded with what trains, feedback
on them whenever it comes, and training on both."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
import torch
import transformers
import turnwise
from test_agents import check_tokens
from torch.optim.optimizer import register_optimizer_step_pre_hook
from turnwise.engine.errors import ConfigError, LedgerError, TurnwiseError
from turnwise.engine.ledger.rows import Member
from turnwise.engine.policy.in_process import InProcess
from turnwise.plugins.agents.clients import Client
from turnwise.plugins.agents.server import Server
from turnwise.plugins.agents.serving import Serving
from turnwise.plugins.optimizers.grpo import GRPO

POSTS = {"/feedback": Client.feedback, "/forget": Client.forget}


class Here:
    """A policy that is served within this process, with two clients."""

    def __init__(self, folder: Path, ledger: Path | None, **options: Any) -> None:
        policy = turnwise.Policy.from_pretrained(folder)
        backend = InProcess(policy, rows=options.pop("rows", 8))
        tokens = options.pop("tokens", 8)
        self.player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, tokens), backend)
        self.ledger = None if ledger is None else turnwise.Ledger(ledger)
        self.serving = Serving(self.player, ["policy"], self.ledger, **options)
        self.server = Server(POSTS)
        self.url = self.server.url
        self.http = httpx2.Client()
        self._clients: dict[str, openai.OpenAI] = {}
        for name in ("one", "two"):
            self.server.open(f"key-of-{name}-0123456789", Client(name, self.serving))
        self._thread = threading.Thread(target=self.serving.run, daemon=True)
        self._thread.start()

    def openai(self, name: str = "one") -> openai.OpenAI:
        if name not in self._clients:
            self._clients[name] = openai.OpenAI(
                base_url=f"{self.url}/v1", api_key=f"key-of-{name}-0123456789", max_retries=0
            )
        return self._clients[name]

    def post(self, path: str, body: Any, name: str = "one") -> httpx2.Response:
        headers = {"Authorization": f"Bearer key-of-{name}-0123456789"}
        return self.http.post(f"{self.url}{path}", json=body, headers=headers)

    def stop(self) -> list[turnwise.Episode]:
        """Ends it. Returns what was recorded."""
        self.serving.stop()
        self._thread.join()
        self.server.stop()
        for client in (self.http, *self._clients.values()):
            client.close()
        if self.ledger is None:
            return []
        self.ledger.settle()
        return self.ledger.run_episodes("served")


@pytest.fixture
def here(wide: Path, tmp_path: Path) -> Iterator[Here]:
    served = Here(wide, tmp_path / "served.sqlite")
    yield served
    served.serving.stop()


def talk(
    client: openai.OpenAI, words: list[str], messages: list[Any] | None = None
) -> tuple[list[Any], str]:
    """Leads a conversation. Returns its messages and the id of its last response."""
    messages = [] if messages is None else messages
    last = ""
    for word in words:
        messages.append({"role": "user", "content": word})
        made = client.chat.completions.create(model="policy", messages=messages)
        messages.append(made.choices[0].message.to_dict())
        last = made.id
    return messages, last


def test_what_is_recorded_is_what_was_sampled(here: Here) -> None:
    talk(here.openai(), ["hello", "how are you ?", "tell me more"])
    client = anthropic.Anthropic(base_url=here.url, api_key="key-of-two-0123456789", max_retries=0)
    client.messages.create(
        model="policy", max_tokens=4, system="the cat",
        messages=[{"role": "user", "content": "hello"}],
    )  # fmt: skip
    responses = here.openai("two").responses
    first = responses.create(model="policy", input="hello", instructions="more")
    responses.create(
        model="policy", input="and ?", instructions="more", previous_response_id=first.id
    )
    episodes = here.stop()
    by_client = {}
    for episode in episodes:
        by_client.setdefault(episode.info["client"], []).append(len(episode.turns))
        assert (episode.ending, episode.run) == ("terminated", "served")
        assert episode.info["temperature"] == 1.0
    assert {name: sorted(own) for name, own in by_client.items()} == {"one": [3], "two": [1, 2]}
    check_tokens(here.player, episodes)


def test_small_packets_do_not_wait_for_each_other(here: Here) -> None:
    """An answer comes when it is there, and not 40 ms later, when the client's kernel has
    acknowledged its head."""
    client, seconds = here.openai(), []
    for i in range(40):
        since = time.perf_counter()
        client.chat.completions.create(
            model="policy", messages=[{"role": "user", "content": f"hello {i}"}], max_tokens=1
        )
        seconds.append(time.perf_counter() - since)
    assert min(seconds[10:]) < 0.035, "however busy the machine is, one of them is quick"


def test_many_at_a_time_and_more_than_there_are_places(wide: Path, tmp_path: Path) -> None:
    here = Here(wide, tmp_path / "served.sqlite", rows=4)
    client = here.openai()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: talk(client, [f"hello {i}", "and ?", "more"]), range(16)))
    episodes = here.stop()
    replies = sum(len(e.turns) for e in episodes)
    assert replies == 48, "each request was answered once"
    assert 16 <= len(episodes) <= 48
    check_tokens(here.player, episodes)


def test_nobody_goes_on_with_anothers_conversation(here: Here) -> None:
    messages, _ = talk(here.openai("one"), ["hello"])
    talk(here.openai("two"), ["more"], list(messages))
    talk(here.openai("one"), ["more"], list(messages))
    lengths = {e.info["client"]: [len(e.turns)] for e in here.stop()}
    assert lengths == {"one": [2], "two": [1]}


def test_an_idle_conversation_ends(wide: Path, tmp_path: Path) -> None:
    here = Here(wide, tmp_path / "served.sqlite", idle=0.2)
    messages, _ = talk(here.openai(), ["hello"])
    assert here.ledger is not None
    until = time.monotonic() + 60
    while not here.ledger.run_episodes("served") and time.monotonic() < until:
        time.sleep(0.05)
    talk(here.openai(), ["more"], messages)
    first, second = sorted(here.stop(), key=lambda e: len(e.turns[0].observation.parts))
    assert [m.role for m in second.turns[0].observation.parts] == ["user", "assistant", "user"]
    assert len(first.turns) == len(second.turns) == 1
    check_tokens(here.player, [first, second])


# Feedback.


def test_feedback_comes_by_conversation_or_response(here: Here) -> None:
    messages, last = talk(here.openai(), ["hello", "more"])
    given = {"conversation": last, "thumbs": "up", "comment": "good", "rater": "ann", "id": "7"}
    taken = here.post("/feedback", given)
    assert taken.status_code == 200, taken.text
    assert taken.json()["new"] is True
    conversation = taken.json()["conversation"]
    assert last == f"chatcmpl-{conversation}-1"
    assert here.post("/feedback", given).json()["new"] is False, "the same again"
    other = here.post("/feedback", {**given, "thumbs": "down"})
    assert other.status_code == 409
    assert "is recorded with other content" in other.text
    assert here.post("/feedback", {"conversation": conversation, "score": 0.25}).json()["new"]
    talk(here.openai(), ["and ?"], messages)  # feedback has ended the first one
    episodes = here.stop()
    assert sorted(len(e.turns) for e in episodes) == [1, 2]
    assert here.ledger is not None
    answers = here.ledger.feedback(run="served", late=True)
    assert sorted((a.target, a.score, a.comment, a.stamp.source) for a in answers) == [
        (conversation, 0.25, "", "users"), (conversation, 1.0, "good", "users")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"conversation": "0123456789abcdef", "score": 1}, 404, "no conversation"),
        ({"score": 1}, 400, "`conversation` is needed"),
        ({"conversation": "x"}, 400, "feedback is a `score`"),
        ({"conversation": "x", "score": True}, 400, "feedback is a `score`"),
        ({"conversation": "x", "score": 1e300}, 400, "feedback is a `score`"),
        ({"conversation": "x", "thumbs": "sideways"}, 400, "feedback is a `score`"),
        ({"conversation": "x", "score": 1, "stars": 5}, 400, "feedback has no stars"),
        ({"conversation": "x", "score": 1, "comment": 3}, 400, "'comment' must be a text"),
        ({"conversation": "x", "thumbs": ["up"]}, 400, "feedback is a `score`"),
    ],
)
def test_what_is_no_feedback_is_refused(here: Here, body: Any, status: int, message: str) -> None:
    taken = here.post("/feedback", body)
    assert taken.status_code == status
    assert message in taken.json()["error"]["message"]


def test_feedback_on_anothers_conversation_is_refused(here: Here) -> None:
    _, last = talk(here.openai("one"), ["hello"])
    assert here.post("/feedback", {"conversation": last, "score": 1}, "two").status_code == 404
    assert here.post("/forget", {"conversation": last}, "two").status_code == 404
    assert here.post("/feedback", {"conversation": last, "score": 1}, "one").status_code == 200


def test_without_a_ledger_nothing_is_recorded(wide: Path) -> None:
    here = Here(wide, None)
    _, last = talk(here.openai(), ["hello"])
    taken = here.post("/feedback", {"conversation": last, "score": 1})
    assert (taken.status_code, "`--ledger`" in taken.text) == (404, True)
    assert here.stop() == []


def test_what_is_redacted_is_recorded_without_tokens(wide: Path, tmp_path: Path) -> None:
    def redact(text: str) -> str:
        return re.sub(r"\d{4}", "####", text)

    here = Here(wide, tmp_path / "served.sqlite", redact=redact)
    _, secret = talk(here.openai(), ["hello", "my number is 1234"])
    talk(here.openai(), ["hello there"])
    here.post("/feedback", {"conversation": secret, "score": 1, "comment": "call 5678"})
    episodes = here.stop()
    cleaned, plain = sorted(episodes, key=lambda e: -len(e.turns))
    assert cleaned.turns[1].observation.content == "my number is ####"
    assert all(t.action_ids is None for t in cleaned.turns)
    assert plain.turns[0].action_ids is not None
    for path in tmp_path.glob("served.sqlite*"):
        content = path.read_bytes()
        assert b"1234" not in content
        assert b"5678" not in content


def test_a_conversation_is_deleted_for_good(here: Here, tmp_path: Path) -> None:
    _, gone = talk(here.openai(), ["hello there"])
    id_ = here.post("/feedback", {"conversation": gone, "score": 1}).json()["conversation"]
    _, kept = talk(here.openai(), ["another"])
    _, opened = talk(here.openai(), ["open"])
    here.post("/feedback", {"conversation": kept, "score": 1})
    assert here.ledger is not None
    before = here.ledger.mark("served")
    answer = here.post("/forget", {"conversation": gone}).json()
    assert answer == {"conversation": id_, "deleted": [id_], "trained_in": []}
    assert len(here.post("/forget", {"conversation": opened}).json()["deleted"]) == 1
    assert here.post("/forget", {"conversation": gone}).status_code == 404
    assert here.post("/feedback", {"conversation": gone, "score": 1}).status_code == 404
    episodes = here.stop()
    assert [e.turns[0].observation.content for e in episodes] == ["another"]
    assert [a.target for a in here.ledger.feedback(run="served")] == [episodes[0].id]
    assert here.ledger.mark("served") == before, "what is deleted still counts"


def test_what_went_on_with_a_conversation_is_deleted_with_it(here: Here, tmp_path: Path) -> None:
    """A client sees one conversation; what it said stands in all that went on with it."""
    messages, first = talk(here.openai(), ["the code is xyzzy"])
    here.post("/feedback", {"conversation": first, "score": 1, "comment": "plugh"})
    _, second = talk(here.openai(), ["and ?"], messages)
    here.post("/feedback", {"conversation": second, "score": 1})
    _, third = talk(here.openai(), ["more"], messages)
    deleted = here.post("/forget", {"conversation": first}).json()["deleted"]
    assert len(set(deleted)) == 3
    assert third.split("-")[1] in deleted
    for path in tmp_path.glob("served.sqlite*"):
        content = path.read_bytes()
        assert b"plugh" not in content, path
    assert here.stop() == []


def test_a_response_goes_on_after_feedback(here: Here) -> None:
    responses = here.openai().responses
    first = responses.create(model="policy", input="hello")
    assert here.post("/feedback", {"conversation": first.id, "score": 1}).status_code == 200
    responses.create(model="policy", input="and ?", previous_response_id=first.id)
    one, two = sorted(here.stop(), key=lambda e: "continues" in e.info)
    assert two.info["continues"] == one.id


# What goes wrong is one client's business.

ODD = [
    ("/v1/responses", {"input": "x", "previous_response_id": ["a"]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[" * 100_000}}]},
        {"role": "tool", "tool_call_id": "1", "content": "y"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 20_000}]}),
    ("/v1/responses", {"input": [{"type": "image", "x": 1}]}),
    ("/v1/messages", {"max_tokens": 3, "messages": [{"role": "user", "content": 7}]}),
]  # fmt: skip


def test_odd_requests_end_nothing(here: Here) -> None:
    with ThreadPoolExecutor(4) as pool:
        good = pool.submit(talk, here.openai(), ["hello", "and ?", "more"])
        for path, body in ODD:
            answer = here.post(path, {"model": "policy", **body})
            assert answer.status_code in (200, 400), answer.text
            assert answer.status_code == 200 or answer.json()["error"]["message"]
        assert len(good.result()[0]) == 6
    assert any(len(e.turns) == 3 for e in here.stop())


def test_a_hook_that_fails_costs_its_conversation(wide: Path, tmp_path: Path) -> None:
    def redact(text: str) -> Any:
        return {"boom": None}.get(text, text) if "raise" not in text else 1 / 0

    here = Here(wide, tmp_path / "served.sqlite", redact=redact)
    for word in ("raise", "boom", "hello"):
        talk(here.openai(), [word])
    with pytest.warns(UserWarning, match="could not be redacted"):
        episodes = here.stop()
    assert [e.turns[0].observation.content for e in episodes] == ["hello"]


def test_a_ledger_that_is_locked_is_tried_again(wide: Path, tmp_path: Path) -> None:
    place = tmp_path / "served.sqlite"
    here = Here(wide, place, idle=0.1)
    here.ledger = here.serving.recorder.ledger = turnwise.Ledger(place, lock_timeout=0.1)
    _, last = talk(here.openai(), ["hello"])
    other = turnwise.Ledger(place)
    with other.writing():
        assert here.post("/feedback", {"conversation": last, "score": 1}).status_code == 503
        talk(here.openai(), ["still here"])
    until = time.monotonic() + 60
    while len(other.run_episodes("served")) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert here.post("/feedback", {"conversation": last, "score": 1}).status_code == 200
    assert len(here.stop()) == 2


def test_feedback_while_a_reply_is_sampled_waits_for_it(wide: Path, tmp_path: Path) -> None:
    here = Here(wide, tmp_path / "served.sqlite", tokens=400)
    here.player.policy.chat.stop_ids = frozenset()  # a reply of 400 tokens takes a while
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    client = here.openai()
    made = client.chat.completions.create(model="policy", messages=messages, max_tokens=3)
    messages += [made.choices[0].message.to_dict(), {"role": "user", "content": "more"}]
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(client.chat.completions.create, model="policy", messages=messages)
        while not any(c.pending for c in here.serving._open):
            time.sleep(0.001)
        assert here.post("/feedback", {"conversation": made.id, "score": 1}).status_code == 200
        assert second.result().usage.completion_tokens == 400
    [episode] = here.stop()
    assert len(episode.turns) == 2


def test_what_comes_too_late_is_refused(here: Here) -> None:
    _, last = talk(here.openai(), ["hello"])
    here.serving.stop()
    here._thread.join()
    assert here.post("/feedback", {"conversation": last, "score": 1}).status_code == 503
    assert here.post(
        "/v1/responses", {"model": "policy", "input": "hello"}
    ).status_code == 503  # fmt: skip
    here.server.stop()
    assert not here.server._thread.is_alive()


def test_idle_conversations_end_while_others_go_on(wide: Path, tmp_path: Path) -> None:
    here = Here(wide, tmp_path / "served.sqlite", idle=0.2, tokens=200)
    here.player.policy.chat.stop_ids = frozenset()
    talk(here.openai(), ["hello"])
    busy = threading.Event()

    def keep_busy(i: int) -> None:
        while not busy.is_set():
            talk(here.openai(), [f"more {i}"])

    with ThreadPoolExecutor(3) as pool:
        for i in range(3):
            pool.submit(keep_busy, i)
        until = time.monotonic() + 60
        assert here.ledger is not None
        while not here.ledger.run_episodes("served") and time.monotonic() < until:
            time.sleep(0.05)
        busy.set()
    assert here.stop()


def test_the_temperature_is_the_servers(wide: Path, tmp_path: Path) -> None:
    here = Here(wide, tmp_path / "served.sqlite")
    here.serving.temperature = 0.7  # as it would be made with
    client = here.openai()
    hello: list[Any] = [{"role": "user", "content": "hello"}]
    client.chat.completions.create(model="policy", messages=hello, temperature=0.7)
    assert client.responses.create(model="policy", input="hello").temperature == 0.7
    with pytest.raises(openai.BadRequestError, match=r"0\.7 may be asked for"):
        client.chat.completions.create(model="policy", messages=hello, temperature=1)
    here.stop()


# Training on it.


def rl(**more: Any) -> dict[str, Any]:
    return {
        "episodes": "ledger", "feedback": ["users"], "groups": 4, "group_size": 1, "updates": 100,
        "credit": {"name": "turn-returns", "baseline": "none"}, "max_new_tokens": 8,
        "optimizer": {"name": "grpo", "lr": 1e-3, "kl": 0.0, "normalise": "whiten"}, **more,
    }  # fmt: skip


def served_ledger(
    folder: Path, ledger: Path, count: int, judge: Any, prompts: int = 5, **more: Any
) -> None:
    """Serves conversations of one turn, with feedback out of order; a tenth has none."""
    here = Here(folder, ledger, rows=32, **more)
    client = here.openai()

    def one(i: int) -> tuple[str, str]:
        messages: list[Any] = [{"role": "user", "content": f"hello {i % prompts}"}]
        made = client.chat.completions.create(model="policy", messages=messages)
        return made.id, made.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(one, range(count)))
    random.Random(0).shuffle(replies)
    for k, (id_, text) in enumerate(replies):
        if k % 10:
            posted = here.post("/feedback", {"conversation": id_, "score": judge(text)})
            assert posted.status_code == 200, posted.text
    here.stop()


def likes_e(text: str) -> float:
    return float("e" in text)


def test_it_trains_once_on_what_has_feedback(wide: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "served.sqlite"
    served_ledger(wide, ledger, 20, likes_e)  # 18 with feedback
    config = {"policy": str(wide), "ledger": f"sqlite:///{ledger}", "stages": [{"rl": rl()}]}
    run = turnwise.Run({**config, "name": "tuesday"}, folder=tmp_path / "tuesday").finish()
    assert run.updates == 4, "four updates of four; two wait for more"
    members = [m for u in range(1, 5) for m in run.ledger.members(run.id, u)]
    assert len({m.episode for m in members}) == len(members) == 16
    assert all(m.used for m in members)
    assert [line["staleness/max"] for line in run.metrics] == [0, 1, 2, 3]
    assert all("success" not in line for line in run.metrics), "users say how well it went"
    weights = [line["weight/stale-1"] for line in run.metrics if "weight/stale-1" in line]
    assert weights == pytest.approx([1.0], abs=0.5)
    again = turnwise.Run({**config, "name": "wednesday"}, folder=tmp_path / "wednesday").finish()
    assert again.updates == 0, "nothing trains twice"
    with pytest.raises(LedgerError, match=f"trained in update 1 of run {run.id}"):
        run.ledger.add_members("another", 1, [Member(members[0].episode, "g", True)])
    assert run.policy.version == 4
    run.policy.save_pretrained(tmp_path / "trained")
    assert turnwise.Policy.from_pretrained(tmp_path / "trained").version == 4


def test_a_killed_run_makes_the_update_that_it_had_decided(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / "served.sqlite"
    served_ledger(wide, ledger, 20, likes_e)
    copies = [tmp_path / name for name in ("whole.sqlite", "killed.sqlite")]
    for copy in copies:
        copy.write_bytes(ledger.read_bytes())

    def config(place: Path) -> dict[str, Any]:
        stages = [{"rl": rl(updates=3)}]
        return {"policy": str(wide), "ledger": f"sqlite:///{place}", "stages": stages, "name": "x"}

    whole = turnwise.Run(config(copies[0]), folder=tmp_path / "whole").finish()
    assert whole.updates == 3
    killed = turnwise.Run(config(copies[1]), folder=tmp_path / "killed")
    update, updates = GRPO.update, []

    def dies(self: Any, *given: Any) -> Any:
        updates.append(given)
        if len(updates) == 2:
            raise RuntimeError("the power is gone")
        return update(self, *given)

    monkeypatch.setattr(GRPO, "update", dies)
    with pytest.raises(RuntimeError, match="the power is gone"):
        killed.finish()
    monkeypatch.undo()
    decided = {m.episode for m in killed.ledger.members(killed.id, 2)}
    assert len(decided) == 4
    late = turnwise.Ledger(copies[1])
    late.add_feedback([turnwise.Feedback(e, 0.5, id=f"late {e}",
        stamp=turnwise.Stamp(source="users")) for e in decided])  # fmt: skip
    again = turnwise.Run(config(copies[1]), folder=tmp_path / "killed", resume=True).finish()
    for a, b in zip(
        whole.policy.network.parameters(), again.policy.network.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_what_is_too_old_leaves_without_training(wide: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "served.sqlite"
    served_ledger(wide, ledger, 20, likes_e)
    config = {
        "policy": str(wide), "ledger": f"sqlite:///{ledger}",
        "stages": [{"rl": rl(staleness=1)}],
    }  # fmt: skip
    run = turnwise.Run(config, folder=tmp_path / "run").finish()
    assert run.updates == 2
    left = [m for m in run.ledger.members(run.id, 3) if not m.used]
    assert {m.reason for m in left} == {"too old"}
    assert len(left) == 10


def test_a_deleted_conversation_is_named_when_the_run_goes_on(wide: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "served.sqlite"
    served_ledger(wide, ledger, 12, likes_e)
    config = {"policy": str(wide), "ledger": f"sqlite:///{ledger}", "name": "x"}
    stages = [{"rl": rl(updates=1)}]
    run = turnwise.Run({**config, "stages": stages}, folder=tmp_path / "run").finish()
    [first, *_] = run.ledger.members(run.id, 1)
    assert run.ledger.forget([first.episode]) == {first.episode: (run.id, 1)}
    more = [{"rl": rl(updates=2)}]
    with pytest.warns(UserWarning, match=f"{first.episode} was deleted; update 1 had trained"):
        again = turnwise.Run(
            {**config, "stages": more}, folder=tmp_path / "run", resume=True
        ).finish()
    assert again.updates == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": "turnwise/Maze-v0"}, "leave out env"),
        ({"feedback": ["environment"]}, "say whose feedback counts"),
        ({"credit": "outcome"}, "each served conversation has its own"),
        ({"gold": {}}, "leave out gold"),
        ({"feedback": ["no-such"]}, "no-such"),
        ({"feedback": ["users", "length"]}, "'length' gives no feedback unasked"),
    ],
)
def test_what_cannot_train_on_served_conversations(
    options: dict[str, Any],
    message: str,
    wide: Path,
    tmp_path: Path,
) -> None:
    config = {"policy": str(wide), "stages": [{"rl": rl(**options)}]}
    with pytest.raises(TurnwiseError, match=message):
        turnwise.Run(config, folder=tmp_path / "run").finish()


def test_a_ledger_without_served_conversations_is_refused(wide: Path, tmp_path: Path) -> None:
    config = {
        "policy": str(wide), "ledger": f"sqlite:///{tmp_path / 'typo.sqlite'}",
        "stages": [{"rl": rl()}],
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"typo\.sqlite holds no served conversation"):
        turnwise.Run(config, folder=tmp_path / "run").finish()


def test_another_temperature_is_refused(wide: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "served.sqlite"
    served_ledger(wide, ledger, 8, likes_e)
    config = {
        "policy": str(wide), "ledger": f"sqlite:///{ledger}",
        "stages": [{"rl": rl(temperature=0.7)}],
    }  # fmt: skip
    with pytest.raises(ConfigError, match="were sampled at temperature 1.0"):
        turnwise.Run(config, folder=tmp_path / "run").finish()


def test_only_this_policys_own_conversations_train(wide: Path, tmp_path: Path) -> None:
    """Not those of another model, nor those of a later version of it."""
    ledger = tmp_path / "served.sqlite"
    served_ledger(wide, ledger, 12, likes_e)
    later, other = tmp_path / "later", tmp_path / "other"
    policy = turnwise.Policy.from_pretrained(wide)
    policy.version = 20
    policy.save_pretrained(later)
    with torch.no_grad():
        policy.network.model.get_input_embeddings().weight.add_(0.01)
    policy.save_pretrained(other)
    (other / "turnwise.json").unlink()
    for folder in (later, other):
        served_ledger(folder, ledger, 12, likes_e)
    config = {"policy": str(wide), "ledger": f"sqlite:///{ledger}", "stages": [{"rl": rl()}]}
    run = turnwise.Run(config, folder=tmp_path / "run").finish()
    assert run.updates == 2, "ten of the thirty with feedback are its own"
    assert all(line["staleness/max"] >= 0 for line in run.metrics)
    # The command says so too, and does not end like one that trained.
    evaluate = {
        "evaluate": {"env": "turnwise/SupportDesk-v0", "episodes": 1, "players": ["random"]}
    }
    stages = [*config["stages"], evaluate]
    (tmp_path / "again.yaml").write_text(json.dumps({**config, "name": "again", "stages": stages}))
    again = [str(Path(sys.executable).with_name("turnwise")), "run", "again.yaml"]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "Nothing learned after update 1" in done.stdout, "the evaluation is one"
    assert "nothing trained: 2 conversations that users scored wait" in done.stderr
    others = "besides them there are 10 of a later version of this policy, 10 of another policy"
    assert others in done.stderr


LETTERS = "aegtxz"


def six_letters(wide: Path, folder: Path) -> Path:
    """A model that answers "hello 0" with one of six letters."""
    policy = turnwise.Policy.from_pretrained(wide)
    prompt = policy.chat.prompt([turnwise.Message("user", "hello 0")])
    model = transformers.AutoModelForCausalLM.from_pretrained(wide)
    with torch.no_grad():
        state = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        head = torch.nn.Linear(len(state), len(policy.tokenizer), bias=False)
        head.weight[:] = -20 * state / (state @ state)  # a logit of -20
        for token in policy.tokenizer.convert_tokens_to_ids(list(LETTERS)):
            head.weight[token] = 0.1 * torch.randn(len(state))
    model.config.tie_word_embeddings = False
    model.lm_head = head
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def test_importance_weights_take_away_the_bias_of_an_older_policy(
    wide: Path, tmp_path: Path
) -> None:
    """The first update trains on its own policy's conversations, the second on conversations of the
    policy before it. One prompt and one of six letters, so that what a gradient is expected to be
    can be summed over all that can be said."""
    torch.manual_seed(0)
    start, ledger, half = six_letters(wide, tmp_path / "start"), tmp_path / "s.sqlite", 270
    served_ledger(start, ledger, 2 * half * 10 // 9, likes_e, tokens=1, prompts=1)
    taken: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []  # gradient, parameters before

    def before_step(*_: Any) -> None:
        parameters = dict(network.named_parameters())
        gradient = torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])
        taken.append((gradient, {k: v.detach().clone() for k, v in parameters.items()}))

    stage = rl(groups=half, updates=2, max_new_tokens=1)
    stage["optimizer"] = {
        "name": "grpo", "lr": 0.03, "kl": 0.0, "weight_cap": 1e9, "max_grad_norm": 1e9,
    }  # fmt: skip
    config = {"policy": str(start), "ledger": f"sqlite:///{ledger}", "stages": [{"rl": stage}]}
    run = turnwise.Run(config, folder=tmp_path / "run")
    network = run.policy.network
    hook = register_optimizer_step_pre_hook(before_step)
    try:
        run.finish()
    finally:
        hook.remove()

    words = run.policy.tokenizer.convert_tokens_to_ids(list(LETTERS))
    worth = torch.tensor([likes_e(letter) for letter in LETTERS])
    said = []  # by update, the numbers of the letters
    for update in (1, 2):
        ids = [m.episode for m in run.ledger.members(run.id, update)]
        turns = [e.turns[0] for e in run.ledger.episodes(ids).values()]
        said.append(torch.tensor([words.index(turn.action_ids[0]) for turn in turns]))
        prompt = torch.tensor([turns[0].prompt_ids])

    def logprobs(update: int) -> torch.Tensor:
        """Log-probs of the six letters under the policy before an update."""
        for name, parameter in network.named_parameters():
            parameter.data.copy_(taken[update - 1][1][name])
        return network.model(input_ids=prompt).logits[0, -1].log_softmax(-1)[words]

    def gradient(update: int, shares: torch.Tensor) -> torch.Tensor:
        """-sum_a shares_a R_a grad log pi(a) for the policy before an update."""
        network.zero_grad()
        (-(logprobs(update) * shares * worth).sum()).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    with torch.no_grad():
        old, new = logprobs(1).exp(), logprobs(2).exp()
    counts = [torch.bincount(letters, minlength=6) / half for letters in said]
    for update, weights in ((1, torch.ones(6)), (2, new / old)):
        by_hand = gradient(update, counts[update - 1] * weights)
        apart = float((taken[update - 1][0] - by_hand).norm() / by_hand.norm())
        assert apart < 1e-4, "each conversation counts as often as it should"

    # Along the gradient that the policy's own conversations would give, without weights the bias is
    # known to the last digit, and with them there is none; both up to chance.
    true = gradient(2, new)
    along = true / true.norm()
    bias = float(along @ gradient(2, old) - true.norm())
    each = torch.stack([along @ gradient(2, letter) for letter in torch.eye(6)])[said[1]]
    for found, expected in ((each, bias), (each * (new / old)[said[1]], 0.0)):
        left, error = float(found.mean() - true.norm()), float(found.std()) / half**0.5
        assert abs(left - expected) < 5 * error
        assert abs(bias) > 3 * error, "a bias that this many conversations show"


@pytest.mark.slow
def test_the_policy_learns_from_what_its_users_liked(wide: Path, tmp_path: Path) -> None:
    """Three days of service, each followed by training on that day's feedback."""
    folder, ledger = str(wide), tmp_path / "served.sqlite"
    liked: list[float] = []
    for day in range(4):
        seen: list[float] = []

        def judge(text: str, seen: list[float] = seen) -> float:
            seen.append(likes_e(text))
            return seen[-1]

        served_ledger(Path(folder), ledger, 120, judge, tokens=4)
        liked.append(sum(seen) / len(seen))
        stage = rl(groups=36, max_new_tokens=4, updates=3)
        stage["optimizer"] = {**stage["optimizer"], "lr": 0.03}
        config = {
            "policy": folder, "ledger": f"sqlite:///{ledger}", "name": f"day {day}",
            "stages": [{"rl": stage}],
        }  # fmt: skip
        run = turnwise.Run(config, folder=tmp_path / f"day-{day}").finish()
        folder = str(tmp_path / f"policy-{day}")
        run.policy.save_pretrained(folder)
    assert liked[-1] > liked[0] + 0.2, liked


# The command.


def start_serving(arguments: list[str], cwd: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("turnwise")), "serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if "Ctrl-C" in line:
            break
    assert "/v1; conversations are" in read, read
    return process, read


def test_the_command_serves_and_records(wide: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        "app: 0123456789abcdef-app\n"
        "old: {key: 0123456789abcdef-old, expires: 2020-01-01}\n"
        "slow: {key: 0123456789abcdef-slow, per_minute: 2}\n"
    )
    arguments = [str(wide), "--ledger", "served.sqlite", "--keys", str(keys), "--model", "gpt-x",
                 "--max-new-tokens", "8"]  # fmt: skip
    process, read = start_serving(arguments, tmp_path)
    url = re.search(r"(http://\S+)/v1;", read)[1]  # type: ignore[index]

    def client(name: str) -> openai.OpenAI:
        key = f"0123456789abcdef-{name}"
        return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)

    hello: list[Any] = [{"role": "user", "content": "hello"}]
    made = client("app").chat.completions.create(model="gpt-x", messages=hello)
    assert [m.id for m in client("app").models.list()] == ["gpt-x"]
    with pytest.raises(openai.AuthenticationError, match="has expired"):
        client("old").chat.completions.create(model="gpt-x", messages=hello)
    for _ in range(2):
        client("slow").chat.completions.create(model="gpt-x", messages=hello)
    with pytest.raises(openai.RateLimitError, match="2 times a minute"):
        client("slow").chat.completions.create(model="gpt-x", messages=hello)
    posted = httpx2.post(
        f"{url}/feedback", json={"conversation": made.id, "score": 1},
        headers={"x-api-key": "0123456789abcdef-app"},
    )  # fmt: skip
    assert posted.status_code == 200, posted.text
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    ledger = turnwise.Ledger(tmp_path / "served.sqlite", create=False)
    assert len(ledger.run_episodes("served")) == 3
    [answer] = ledger.feedback(run="served")
    command = [str(Path(sys.executable).with_name("turnwise")), "forget",
               str(tmp_path / "served.sqlite"), f"chatcmpl-{answer.target}-0"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{answer.target} is deleted\n"


@pytest.mark.slow
def test_what_was_scored_outlives_a_kill(wide: Path, tmp_path: Path) -> None:
    process, read = start_serving([str(wide), "--ledger", "served.sqlite"], tmp_path)
    url = re.search(r"(http://\S+)/v1;", read)[1]  # type: ignore[index]
    key = re.search(r"The key: (\S+)", read)[1]  # type: ignore[index]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    hello: list[Any] = [{"role": "user", "content": "hello"}]
    made = client.chat.completions.create(model="policy", messages=hello, max_tokens=4)
    posted = httpx2.post(
        f"{url}/feedback", json={"conversation": made.id, "thumbs": "up"},
        headers={"x-api-key": key},
    )  # fmt: skip
    assert posted.status_code == 200
    process.kill()
    process.wait()
    ledger = turnwise.Ledger(tmp_path / "served.sqlite", create=False)
    [answer] = ledger.feedback(run="served")
    assert ledger.episodes([answer.target])[answer.target].turns[0].observation.content == "hello"


@pytest.mark.parametrize(
    ("keys", "message"),
    [("app: short", "at least 16"), ("[]", "a key for each name"),
     ("app: {key: 0123456789abcdef, colour: red}", "`expires`"),
     ("app: {key: 0123456789abcdef, expires: soon}", "a day or a time"),
     ("a: 0123456789abcdef\nb: 0123456789abcdef", "two names have one key"),
     ("a: b: 0123456789abcdef", "line 1"),
     ("0123456789abcdef: name", "entry 1 must be"),
     ("a: {key: 0123456789abcdef, per_minute: -3}", "from 1 on")],
)  # fmt: skip
def test_odd_keys_are_refused(keys: str, message: str, tmp_path: Path) -> None:
    from turnwise.plugins.agents.command import _keys

    (tmp_path / "keys.yaml").write_text(keys)
    with pytest.raises(ValueError, match=re.escape(message)):
        _keys(tmp_path / "keys.yaml")
