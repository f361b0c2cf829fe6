"""Agents as they are: programs that ask the policy through the real SDKs. What they receive is what
was sampled and what trains, and what they do wrong costs their own episode."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
import turnwise
from support import agents
from test_promise_1_tokens import batch_of, plain_logprobs
from turnwise.engine.errors import TurnwiseError
from turnwise.engine.policy.in_process import InProcess
from turnwise.engine.policy.network import divide
from turnwise.plugins.agents.session import Session
from turnwise.plugins.agents.wire import chat_completions
from turnwise.plugins.agents.wire.form import Asked, Refused, WireMessage
from turnwise.tools import call_text

AGENT = "turnwise/Agent-v0"


def starts(program: str, count: int = 2, **kwargs: Any) -> list[tuple[turnwise.Start, int]]:
    given = {"program": f"support.agents:{program}", **kwargs} if program else kwargs
    return [(start, 0) for start in turnwise.starts(AGENT, 0, count, kwargs=given)]


def play(
    player: Any, asked: list[tuple[turnwise.Start, int]], **more: Any
) -> list[turnwise.Episode]:
    return turnwise.rollout(player, asked, **more)


def sampling(folder: Path, tokens: int = 8, rows: int = 8) -> turnwise.PolicyPlayer:
    policy = turnwise.Policy.from_pretrained(folder)
    backend = InProcess(policy, rows=rows)
    return turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, tokens), backend)


def check_tokens(player: turnwise.PolicyPlayer, episodes: list[turnwise.Episode]) -> None:
    """Sampler, update and a plain forward pass agree, in every context."""
    batch = batch_of(episodes)
    update = player.policy.logprobs(batch)
    for e, episode in enumerate(episodes):
        plain = plain_logprobs(player.policy, episode)
        assert [p for t in episode.turns for p in t.logprobs] == pytest.approx(plain, abs=1e-5)
        assert update[e][batch.mask[e]].tolist() == pytest.approx(plain, abs=1e-5)


# What a program receives.


@pytest.mark.parametrize(
    "program",
    ["chat", "chat_stream", "responses", "responses_stream", "messages", "messages_stream"],
)
def test_what_a_program_receives_is_what_was_sampled(program: str, wide: Path) -> None:
    player = sampling(wide)
    episodes = play(player, starts(program, 3))
    for episode in episodes:
        assert (episode.ending, episode.reason) == ("terminated", "")
        assert len(episode.turns) == 3
        assert episode.system == agents.SYSTEM
        assert [t.context for t in episode.turns] == [0, 0, 0], "one conversation"
        words = "".join(turn.action for turn in episode.turns)
        assert episode.env_return == words.count("e") / (1 + len(words))
        assert [t.observation.content for t in episode.turns][1:] == [
            "how are you ?",
            "what do you know ?",
        ]
    assert len({e.turns[0].observation.content for e in episodes}) == 3, "each has its seed"
    check_tokens(player, episodes)


class Ordinary(gymnasium.Env[str, str]):
    """What the program `chat` says, as an environment."""

    observation_space = action_space = turnwise.Text(100_000)
    metadata = {"special_tokens": True}

    def __init__(self, **_: Any) -> None:
        pass

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        self.left = ["how are you ?", "what do you know ?"]
        self.words = ""
        return f"hello {(seed or 0) % 97}", {"system": agents.SYSTEM}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.words += action
        if self.left:
            return self.left.pop(0), 0.0, False, False, {}
        return "", self.words.count("e") / (1 + len(self.words)), True, False, {}


def test_it_is_the_conversation_that_an_environment_would_have(wide: Path) -> None:
    """Ids, log-probs, rewards, credit and gradient: to the last bit."""

    def played(entry: Any) -> tuple[list[turnwise.Episode], torch.Tensor, torch.Tensor]:
        gymnasium.registry.pop("tests/Same-v0", None)
        gymnasium.register("tests/Same-v0", entry)
        player = sampling(wide)
        own = turnwise.starts("tests/Same-v0", 0, 2, kwargs={"program": "support.agents:chat"})
        episodes = play(player, [(start, slot) for start in own for slot in range(4)])
        batch = batch_of(episodes)
        batch.credit = turnwise.Plugins().create("credit method", "turn-returns").assign(batch)
        optimizer = turnwise.Plugins().create("optimizer", "grpo", lr=1e-3, kl=0.0)
        optimizer.setup(player.policy)
        optimizer.prepare(player.policy, batch)
        optimizer.update(player.policy, batch)
        weights = torch.cat([p.flatten() for p in player.policy.network.parameters()])
        return episodes, batch.credit.advantages, weights.detach()

    one, credit, weights = played(Ordinary)
    other, other_credit, other_weights = played("turnwise.plugins.agents.environment:Agent")
    for a, b in zip(one, other, strict=True):
        assert [(t.prompt_ids, t.action_ids, t.logprobs, t.reward) for t in a.turns] == [
            (t.prompt_ids, t.action_ids, t.logprobs, t.reward) for t in b.turns
        ]
        assert a.messages == b.messages
    assert torch.equal(credit, other_credit)
    assert torch.equal(weights, other_weights)


TWICE = call_text("add", {"a": 2, "b": 3}) + "\n" + call_text("add", {"a": 4, "b": 5})


@pytest.mark.parametrize("program", ["tools_chat", "tools_responses", "tools_messages"])
def test_calls_of_tools_come_in_the_shape_that_the_sdk_expects(program: str) -> None:
    def script(messages: Any) -> str:
        return "that makes 14" if messages[-1].role == "tool" else f"I add them. {TWICE}"

    [episode] = play(turnwise.ScriptPlayer(script), starts(program, 1))
    assert (episode.ending, episode.reason, episode.success) == ("terminated", "", True)
    first, second = episode.turns
    assert [tool["function"]["name"] for tool in episode.tools] == ["add"]
    assert episode.tools[0]["function"]["parameters"] == agents.ADD["function"]["parameters"]
    assert [part.content for part in second.observation.parts] == ["5", "9"]
    assert second.observation.role == "tool"
    assert second.context == first.context == 0, "the calls were written again, and are the same"


def test_a_call_that_is_none_is_text() -> None:
    replies = iter(['<tool_call>\n{"name": "add", "arguments": \n</tool_call>', "14"])

    def script(messages: Any) -> str:
        return next(replies)

    [episode] = play(turnwise.ScriptPlayer(script), starts("tools_chat", 1))
    assert (episode.ending, len(episode.turns), episode.success) == ("terminated", 1, False)


def test_thoughts_are_the_policys_own(wide: Path) -> None:
    """The program does not see them, and its next request goes on all the same."""

    def script(messages: Any) -> str:
        return "<think>\nhm\n</think>\n\nyes"

    [episode] = play(turnwise.ScriptPlayer(script), starts("chat", 1, ignore=["logprobs"]))
    assert episode.ending == "failed", "a script has no log-probs"
    [episode] = play(turnwise.ScriptPlayer(script), starts("messages", 1))
    assert episode.reason.startswith("step 1: the program failed: AssertionError")


# Contexts.


@pytest.mark.parametrize("history", ["append", "rerender"])
def test_what_does_not_go_on_opens_a_context(history: Any, wide: Path) -> None:
    player = sampling(wide)
    player.history = history
    episodes = play(player, starts("edits", 3))
    for episode in episodes:
        assert episode.reason == ""
        assert [t.context for t in episode.turns] == [0, 0, 1, 1, 0]
        opening = episode.turns[2].observation
        assert [(m.role, m.content) for m in opening.parts] == [
            ("system", "the cat sat"),
            ("user", "tell me"),
        ]
        read = player.policy.tokenizer.decode(episode.turns[2].prompt_ids)
        assert "hello there" not in read
        assert read.count("the cat sat") == 1
        assert episode.forked
    again = [turnwise.Episode.from_dict(json.loads(json.dumps(e.to_dict()))) for e in episodes]
    assert again == episodes
    if history == "append":
        check_tokens(player, episodes)
        rows = batch_of(episodes).rows
        assert [(r.episode, len(r.positions) > 0) for r in rows] == [
            (e, True) for e in range(3) for _ in range(2)
        ]
        for row in rows:
            assert len(row.positions) == len(row.actions)


def test_contexts_train_as_conversations_of_their_own_would(wide: Path) -> None:
    """The gradient of an episode with two contexts is that of its turns, each after what it read:
    computed by a plain forward pass per turn."""
    player = sampling(wide)
    [episode] = play(player, starts("edits", 1))
    batch = batch_of([episode])
    weights = torch.linspace(-1, 1, int(batch.mask.sum()))
    own = list(player.policy.network.model.parameters())

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, own)])

    found = []
    ids: dict[int, list[int]] = {}
    for turn in episode.turns:
        read = ids.setdefault(turn.context, [])
        read += [*turn.prompt_ids, *turn.action_ids]
        logits = player.policy.network.model(input_ids=torch.tensor([read])).logits[0]
        begin = len(read) - len(turn.action_ids)
        found += [
            torch.log_softmax(logits[begin + i - 1], -1)[token]
            for i, token in enumerate(turn.action_ids)
        ]
    expected = gradient((torch.stack(found) * weights).sum())
    per_token = torch.zeros(batch.mask.shape)
    per_token[batch.mask] = weights
    total = torch.zeros_like(expected)
    for micro in divide(batch.rows, 10_000, torch.device("cpu")):
        out = player.policy.network(
            micro.ids, micro.row, micro.position, micro.target, micro.ends, 1.0
        )
        total += gradient((out.logprobs * micro.take(per_token)).sum())
    assert torch.allclose(total, expected, atol=1e-5, rtol=1e-4)


def test_requests_at_a_time_are_answered_one_by_one(wide: Path) -> None:
    player = sampling(wide)
    episodes = play(player, starts("parallel", 2))
    for episode in episodes:
        assert [t.context for t in episode.turns] == [0, 1, 2, 3]
        assert sorted(t.observation.content for t in episode.turns) == [
            f"what is {i} ?" for i in range(4)
        ]
    check_tokens(player, episodes)


def test_a_conversation_that_nobody_sampled_is_a_prompt(wide: Path) -> None:
    player = sampling(wide)
    [episode] = play(player, starts("few_shot", 1))
    [turn] = episode.turns
    assert episode.system == agents.SYSTEM
    assert [m.role for m in turn.observation.parts] == ["user", "assistant", "user"]
    read = player.policy.tokenizer.decode(turn.prompt_ids)
    assert read.count("hello") == 2
    check_tokens(player, [episode])


def test_a_truncated_episode_knows_its_last_state(wide: Path) -> None:
    player = sampling(wide)
    one, other = (
        play(player, starts(program, 1), max_turns=most)[0]
        for program, most in (("asks_for_ever", 3), ("edits", 2))
    )
    assert (one.ending, one.reason, len(one.turns)) == ("truncated", "max_turns", 3)
    assert len(one.final_ids) > 0
    assert (other.ending, other.final_ids) == ("truncated", ()), "another context came next"
    for episode in (one, other):
        [row] = [row for row in batch_of([episode]).rows if row.bootstrap]
        sampled = [i for t in episode.turns for i in (*t.prompt_ids, *t.action_ids)]
        assert list(row.ids) == [*sampled, *episode.final_ids]


def asked(*messages: tuple[str, str], tools: Any = (), model: str = "policy") -> Asked:
    return Asked(model, tuple(WireMessage(*m) for m in messages), tuple(tools))


def test_a_request_goes_on_with_the_longest_conversation_that_it_repeats() -> None:
    session = Session(["policy"])

    def put(request: Asked, reply: str) -> tuple[int, bool, list[str]]:
        pending = session.submit(request, "chat")
        place = session.place(request)
        message = WireMessage("assistant", reply)
        session.answer(pending, place.context, reply, message, None)
        return place.context, place.opened, [m.text for m in place.news]

    hello = ("user", "a")
    assert put(asked(hello), "A") == (0, True, ["a"])
    assert put(asked(hello), "B") == (1, True, ["a"]), "the same again is another conversation"
    longer = [hello, ("assistant", "B"), ("user", "b")]
    assert put(asked(*longer), "C") == (1, False, ["b"])
    assert put(asked(hello, ("assistant", "A"), ("user", "c"), ("user", "d")), "D") == (
        0, False, ["c", "d"]
    )  # fmt: skip
    foreign = [hello, ("assistant", "A"), ("user", "c"), ("assistant", "Z"), ("user", "e")]
    assert put(asked(*foreign), "E")[:2] == (2, True), "nobody sampled Z"
    tool = {"type": "function", "function": {"name": "x"}}
    assert put(asked(*longer, ("assistant", "C"), ("user", "f"), tools=[tool]), "F")[:2] == (
        3,
        True,
    )
    assert put(asked(*longer, ("assistant", "C"), ("user", "g")), "G") == (1, False, ["g"])
    assert put(asked(("system", "s"), hello), "H")[:2] == (4, True)


def test_a_reply_is_the_one_to_what_was_before_it() -> None:
    """Two replies look alike without their thoughts."""
    session = Session(["policy"])
    for question, thought in (("a", "<think>1</think>yes"), ("b", "<think>2</think>yes")):
        pending = session.submit(asked(("user", question)), "chat")
        place = session.place(pending.asked)
        session.answer(pending, place.context, thought, WireMessage("assistant", "yes"), None)
    yes = WireMessage("assistant", "yes")
    assert session.sampled([WireMessage("user", "a")], yes) == "<think>1</think>yes"
    assert session.sampled([WireMessage("user", "b")], yes) == "<think>2</think>yes"
    assert session.sampled([WireMessage("user", "c")], yes) is None, "it may be either"


# What is refused, and how.


def test_what_cannot_be_honoured_is_refused_in_the_sdks_own_way(wide: Path) -> None:
    agents.REFUSALS.clear()
    [episode] = play(sampling(wide), starts("refused", 1))
    assert (episode.ending, episode.reason, len(episode.turns)) == ("terminated", "", 1)
    wanted = [
        ("openai", "temperature=0.2 cannot be honoured"),
        ("openai", "n=2 cannot be honoured"),
        ("openai", "the option 'colour' is not known here"),
        ("openai", "the model 'gpt-5' does not exist here"),
        ("openai", "the last message is of the assistant"),
        ("openai", "'messages' is needed"),
        ("openai", "/v1/embeddings is not served"),
        ("openai", "the key is not known here"),
        ("openai", "no response 'resp_7' is known here"),
        ("anthropic", 'stop_sequences=["x"] cannot be honoured'),
        ("anthropic", "the model 'opus' does not exist here"),
        ("openai", "a part of type 'image_url' cannot be read"),
    ]
    assert len(agents.REFUSALS) == len(wanted)
    for (own, message), (sdk, text) in zip(agents.REFUSALS, wanted, strict=True):
        assert (own, text in message) == (sdk, True), message


def test_what_is_to_be_passed_over_is(wide: Path) -> None:
    kwargs = {"ignore": ["temperature"], "models": ["policy", "gpt-5"]}
    [episode] = play(sampling(wide), starts("pass_over", 1, **kwargs))
    assert (episode.ending, episode.reason) == ("terminated", "")


def test_a_limit_of_tokens_is_honoured_below_the_runs(wide: Path) -> None:
    player = sampling(wide, tokens=6)
    [episode] = play(player, starts("short", 1))
    assert (episode.ending, episode.reason) == ("terminated", "")
    first, second = episode.turns
    assert len(first.action_ids) <= 3
    assert 3 < len(second.action_ids) <= 6 or not second.cut
    check_tokens(player, [episode])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "an agent is `program: MODULE:FUNCTION`, or `command:"),
        ({"program": "a:b", "command": ["c"]}, "an agent is `program:"),
        ({"command": "python x.py"}, "an agent is `program:"),
        ({"program": "support.agents:nothing"}, "has no function 'nothing'"),
        ({"program": "no_such_module:f"}, "cannot import 'no_such_module'"),
        ({"program": "support.agents:chat", "limits": {"turns": 3}}, "not turns"),
        ({"program": "support.agents:chat", "tasks": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"program": "support.agents:chat", "ignore": "temperature"}, "are lists"),
        ({"program": "support.agents:chat", "limits": {"requests": "3"}}, "requests must be a"),
        ({"program": "support.agents:chat", "limits": [3]}, "limits are values by name"),
        ({"program": "support.agents:chat", "patience": "3"}, "patience"),
    ],
)
def test_what_is_no_agent_shows_before_the_run(kwargs: Mapping[str, Any], message: str) -> None:
    from turnwise.engine.stages.environments import EnvConfig, check_envs

    with pytest.raises(TurnwiseError, match=re.escape(message)):
        check_envs([EnvConfig(id=AGENT, kwargs=dict(kwargs))])


# Rewards and tasks.


def test_a_reward_may_be_posted_part_by_part(wide: Path) -> None:
    [episode] = play(sampling(wide), starts("posts", 1))
    assert [turn.reward for turn in episode.turns] == [0.25, 0.5]
    assert episode.success is True


def test_a_program_has_its_task(wide: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    rows = [{"question": f"what is {i} ?", "answer": ""} for i in range(20)]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kwargs = {"tasks": str(tasks), "held_out": 0.3}
    player = sampling(wide)
    train = play(player, starts("of_a_task", 20, **kwargs))
    assert {e.ending for e in train} == {"terminated"}
    assert all(e.success for e in train)
    own = turnwise.starts(AGENT, 0, 20, {"split": "held_out"},
        {"program": "support.agents:of_a_task", **kwargs})  # fmt: skip
    held = play(player, [(start, 0) for start in own])
    seen, kept = ({e.turns[0].observation.content for e in some} for some in (train, held))
    assert seen | kept == {row["question"] for row in rows}
    assert not seen & kept
    assert {e.task for e in train} == {e.info["row"] for e in train}


# Commands.

SCRIPT = """
import json, os, sys, urllib.request
messages = []
for word in ("hello", "more", json.loads(os.environ["TURNWISE_TASK"]).get("question", "and ?")):
    messages.append({"role": "user", "content": word})
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"model": "policy", "messages": messages}).encode(),
        {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]},
    )
    messages.append(json.load(urllib.request.urlopen(request))["choices"][0]["message"])
print("done")
sys.exit(int(os.environ.get("STATUS", "0")))
"""
CURL = """
ask() { curl -sS --fail-with-body "$1" -H "Authorization: Bearer $OPENAI_API_KEY" -d "$2"; }
one=$(ask "$OPENAI_BASE_URL/responses" '{"model": "policy", "input": "hello"}')
id=$(echo "$one" | sed -n 's/.*"id": *"\\(resp_[0-9]*\\)".*/\\1/p')
[ -n "$id" ] || { echo "$one" >&2; exit 9; }
ask "$OPENAI_BASE_URL/responses" \\
  "{\\"model\\": \\"policy\\", \\"input\\": \\"and ?\\", \\"stream\\": true,
    \\"previous_response_id\\": \\"$id\\"}" | grep -q response.completed\\\\\\|response.incomplete
ask "$TURNWISE_URL/reward" '{"reward": 0.5}'
"""


def test_a_command_finds_the_policy_where_sdks_look(wide: Path) -> None:
    player = sampling(wide)
    command = [sys.executable, "-c", SCRIPT]
    episodes = play(player, starts("", 2, command=command))
    assert [(e.ending, e.reason, len(e.turns)) for e in episodes] == [("terminated", "", 3)] * 2
    check_tokens(player, episodes)
    [failed] = play(player, starts("", 1, command=command, variables={"STATUS": "3"}))
    assert failed.ending == "failed"
    assert failed.reason == "step 3: the program failed: status 3: done"


def test_a_shell_script_with_curl_plays(wide: Path) -> None:
    player = sampling(wide)
    [episode] = play(player, starts("", 1, command=["sh", "-c", CURL]))
    assert (episode.ending, episode.reason) == ("terminated", "")
    assert [t.context for t in episode.turns] == [0, 0]
    assert episode.env_return == 0.5
    check_tokens(player, [episode])


def test_a_command_leaves_no_process_behind(wide: Path, tmp_path: Path) -> None:
    """One that hangs is ended with what it has started."""
    note = tmp_path / "pids"
    script = f"sleep 3600 & echo $! > {note}; echo $$ >> {note}; wait"
    kwargs = {"command": ["sh", "-c", script], "patience": 0.5}
    [episode] = play(sampling(wide), starts("", 1, **kwargs))
    assert "neither asked nor ended within 0.5 s" in episode.reason
    pids = [int(pid) for pid in note.read_text().split()]
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_command_that_is_none_fails_its_episode(wide: Path, tmp_path: Path) -> None:
    script = tmp_path / "play.sh"
    script.write_text("exit 0")
    for command, reason in (
        ("/no/such/command", "there is no command '/no/such/command'"),
        (str(script), f"{str(script)!r} may not be executed: `chmod +x` it, or"),
    ):
        [episode] = play(sampling(wide), starts("", 1, command=[command]))
        assert episode.ending == "failed"
        assert episode.reason.startswith(f"reset: {reason}")


def test_a_program_is_named(wide: Path) -> None:
    """In a run, which keeps its config and may go on in another process."""
    with pytest.raises(turnwise.ConfigError, match="program is no plain data .* 'MODULE:NAME'"):
        turnwise.train(
            policy=str(wide), env={"id": AGENT, "kwargs": {"program": agents.chat}}, updates=1
        )


def test_a_command_dies_with_whom_it_plays_for(wide: Path, tmp_path: Path) -> None:
    script, note = tmp_path / "play.py", tmp_path / "pid"
    script.write_text(
        f"""
import turnwise
turnwise.Plugins()
policy = turnwise.Policy.from_pretrained({str(wide)!r})
command = ["sh", "-c", "echo $$ > {note}; exec sleep 3600"]
starts = [(s, 0) for s in turnwise.starts("{AGENT}", 0, 1, kwargs={{"command": command}})]
turnwise.rollout(turnwise.PolicyPlayer(policy, turnwise.Sampling()), starts)
"""
    )
    with subprocess.Popen([sys.executable, str(script)]) as process:
        until = time.monotonic() + 120
        while not (note.exists() and note.read_text().strip()) and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()
    pid = int(note.read_text())
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_a_long_task_is_a_file(wide: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({"question": "x" * 200_000}) + "\n")
    script = SCRIPT.replace(
        'json.loads(os.environ["TURNWISE_TASK"]).get("question", "and ?")',
        'str(len(json.load(open(os.environ["TURNWISE_TASK_FILE"]))["question"]))',
    )
    kwargs = {"command": [sys.executable, "-c", script], "tasks": str(tasks), "held_out": 0}
    [episode] = play(sampling(wide), starts("", 1, **kwargs))
    assert episode.reason == ""
    assert episode.turns[-1].observation.content == "200000"


# What programs do wrong costs their own episode.

WRONG = {
    "crashes": "step 1: the program failed: RuntimeError: the kettle is broken",
    "exits": "step 1: the program failed: SystemExit: 3",
    "never_asks": "reset: the program ended before it asked for a reply",
    "hangs": "step 1: the program neither asked nor ended within 1 s",
    "hangs_at_once": "reset: the program neither asked nor ended within 1 s",
    "odd_outcome": "step 1: the program returned no outcome: an outcome is",
}


def test_programs_that_break_cost_their_own_episodes(wide: Path) -> None:
    player = sampling(wide)
    good = starts("chat", 4)
    bad = [start for name in WRONG for start in starts(name, 1, patience=1.0)]
    episodes = play(player, [*good, *bad])
    assert [e.ending for e in episodes] == ["terminated"] * 4 + ["failed"] * len(WRONG)
    for episode, reason in zip(episodes[4:], WRONG.values(), strict=True):
        assert episode.reason.startswith(reason), episode.reason
    check_tokens(player, episodes[:4])


def test_whoever_asks_after_the_end_is_refused(wide: Path) -> None:
    agents.AFTERWARDS.clear()
    [episode] = play(sampling(wide), starts("asks_after_the_end", 1))
    assert (episode.ending, episode.env_return) == ("terminated", 0.5)
    until = time.monotonic() + 60
    while not agents.AFTERWARDS and time.monotonic() < until:
        time.sleep(0.05)
    assert agents.AFTERWARDS in (["AuthenticationError"], ["PermissionDeniedError"])


def test_an_episode_that_is_cut_ends_its_program(wide: Path) -> None:
    before = threading.active_count()
    limits = [{"requests": 2}, {"tokens": 10}, {"seconds": 0.0}]
    episodes = [
        play(sampling(wide), starts("asks_for_ever", 1, limits=limit))[0] for limit in limits
    ]
    assert [(e.ending, e.reason) for e in episodes] == [
        ("truncated", "requests"),
        ("truncated", "tokens"),
        ("truncated", "seconds"),
    ]
    assert len(episodes[0].turns) == 2
    until = time.monotonic() + 60
    while threading.active_count() > before + 1 and time.monotonic() < until:  # the server's
        time.sleep(0.05)
    assert threading.active_count() <= before + 1


def test_who_does_not_wait_asks_again(wide: Path) -> None:
    [episode] = play(sampling(wide), starts("goes_away", 1))
    assert (episode.ending, episode.reason) == ("terminated", "")
    assert 1 <= len(episode.turns) <= 2


def test_many_programs_at_a_time(wide: Path) -> None:
    player = sampling(wide, rows=32)
    names = ["chat", "responses_stream", "messages", "chat_stream"]
    asked_ = [start for name in names for start in starts(name, 8)]
    episodes = play(player, asked_)
    assert [(e.ending, e.reason, len(e.turns)) for e in episodes] == [("terminated", "", 3)] * 32
    check_tokens(player, episodes)


def test_an_asynchronous_program_without_a_reward(wide: Path) -> None:
    [episode] = play(sampling(wide), starts("awaited", 1))
    assert (episode.ending, episode.env_return, episode.success) == ("terminated", 0.0, None)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"model": 3, "messages": [{"role": "user", "content": "x"}]}',
     b'{"model": "policy", "messages": [3]}', b'{"model": "policy", "messages": [{"role": "x"}]}',
     b'{"model": "policy", "messages": [{"role": "tool", "content": "x"}]}', b"\xff\xfe",
     b'{"model": "policy", "messages": [{"role": "user", "content": "\\ud800"}]}',
     b'{"model": "policy", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0}',
     b'{"model": "policy", "messages": [{"role": "user", "content": "x"}], "tools": [{}]}',
     b'{"model": "policy", "messages": [{"role": "user", "content": "x"}], "tools": 5}',
     b'{"model": "policy", "messages": [{"role": ["user"], "content": "x"}]}',
     b'{"model": "policy", "messages": [{"role": "user", "content": "x"}], "user": NaN}'],
)  # fmt: skip
def test_garbage_is_refused(body: bytes) -> None:
    import httpx2
    from turnwise.plugins.agents.server import server

    here, session = server(), Session(["policy"])
    here.open(session.key, session)
    try:
        for path, header in (("chat/completions", "Authorization"), ("messages", "x-api-key")):
            key = {header: f"Bearer {session.key}" if header[0] == "A" else session.key}
            answer = httpx2.post(f"{here.url}/v1/{path}", content=body, headers=key)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["message"]
    finally:
        here.close(session.key)


# Frameworks.


@pytest.mark.parametrize(
    ("program", "kwargs"),
    [
        ("openai_agents", {}),
        ("openai_agents_chat", {}),
        ("small_agents", {"ignore": ["tool_choice", "stop"]}),
    ],
)
def test_frameworks_run_unchanged(program: str, kwargs: dict[str, Any], wide: Path) -> None:
    """First with replies that call a tool and use its result, then with those of a policy that
    knows nothing."""

    def script(messages: Any) -> str:
        if not any("5" in m.content for m in messages if m.role in ("tool", "user")):
            return call_text("add", {"a": 2, "b": 3})
        return call_text("final_answer", {"answer": "5"}) if program[0] == "s" else "It is 5."

    [episode] = play(turnwise.ScriptPlayer(script), starts(program, 1, **kwargs))
    assert (episode.ending, episode.reason) == ("terminated", "")
    assert episode.env_return == 1.0
    assert len(episode.turns) == 2
    if program == "openai_agents":
        return  # it takes a reply that was cut for a broken model
    player = sampling(wide)
    [episode] = play(player, starts(program, 1, **kwargs))
    assert episode.reason == ""
    check_tokens(player, [episode])


# Training and resuming.


def config(folder: Path, **more: Any) -> dict[str, Any]:
    stage = {
        "env": {"id": AGENT, "kwargs": {"program": "support.agents:chat"}},
        "groups": 2, "group_size": 2, "max_new_tokens": 6, "credit": "turn-returns",
        "optimizer": {"name": "grpo", "lr": 1e-3, "kl": 0.0}, "updates": 3, **more,
    }  # fmt: skip
    return {"policy": str(folder), "stages": [{"rl": stage}]}


def test_a_resumed_run_is_the_same(wide: Path, tmp_path: Path) -> None:
    whole = turnwise.Run(config(wide), folder=tmp_path / "whole").finish()
    for update in (begun := turnwise.Run(config(wide), folder=tmp_path / "parts")):
        if update.number == 1:
            break
    del begun
    again = turnwise.Run(config(wide), folder=tmp_path / "parts", resume=True).finish()
    for a, b in zip(
        whole.policy.network.parameters(), again.policy.network.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_the_share_of_forks_is_shown(wide: Path, tmp_path: Path) -> None:
    own = config(wide, env={"id": AGENT, "kwargs": {"program": "support.agents:edits"}})
    run = turnwise.Run(own, folder=tmp_path / "run")
    metrics = [update.metrics for update in run]
    assert [m["forks"] for m in metrics] == [0.25] * 3
    plain = turnwise.Run(config(wide, updates=1), folder=tmp_path / "plain")
    assert all("forks" not in update.metrics for update in plain)


def test_a_format_reads_what_it_writes() -> None:
    """A reply with words and calls, written by the API and read back, is the same message."""
    read = chat_completions.read(
        {
            "model": "policy",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "1", "content": "b"},
            ],
        },
        (),
    )  # fmt: skip
    assert [m.role for m in read.messages] == ["user", "assistant", "tool"]
    with pytest.raises(Refused, match="role 'robot'"):
        chat_completions.read({"model": "p", "messages": [{"role": "robot"}]}, ())
