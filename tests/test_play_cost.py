"""Play asks the model for what is needed, and no more: shared beginnings once, little padding, room
for what lives."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import turnwise
from hypothesis import given
from hypothesis import strategies as st
from support.echo import play
from test_promise_1_tokens import ARCHITECTURES, plain_logprobs
from turnwise.engine.policy.cache import CachedModel
from turnwise.engine.policy.in_process import InProcess
from turnwise.engine.policy.prefixes import SHORTEST, alike, waves
from turnwise.engine.policy.threads import MARGIN, faster_threads
from turnwise.engine.records.sampling import Conversation
from turnwise.engine.util.ids import derive_id

SYSTEM = "the cat sat on a mat . " * 14


class Uneven(gymnasium.Env):
    """Has a long system prompt, and ends after a number of turns that nobody knows before."""

    observation_space = action_space = turnwise.Text(100_000)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return f"hello there {seed}", {"system": SYSTEM}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.np_random.bit_generator.advance(len(action))  # members of a group end apart
        done = bool(self.np_random.random() < 0.25)
        words = int(self.np_random.integers(1, 4))
        return "tell me " * words, 0.0, done, False, {}


gymnasium.register("test/Uneven-v0", Uneven)


class Counted(CachedModel):
    """Counts the tokens it is fed, and those that the model is run on."""

    def __init__(self, network: Any) -> None:
        self.fed = {"prefill": 0, "decode": 0}
        self.calls = {"prefill": 0, "decode": 0}
        self.run = {"prefill": 0, "decode": 0}
        super().__init__(network)
        self.fed = {"prefill": 0, "decode": 0}
        self.run = {"prefill": 0, "decode": 0}

    def extend(self, rows: Any, lengths: Any, feeds: Any) -> torch.Tensor:
        self.what = "decode" if max(map(len, feeds)) == 1 else "prefill"
        self.calls[self.what] += 1
        self.fed[self.what] += sum(map(len, feeds))
        return super().extend(rows, lengths, feeds)

    def _forward(self, ids: torch.Tensor, *more: Any) -> torch.Tensor:
        self.run[self.what] += ids.numel()
        return super()._forward(ids, *more)


@pytest.mark.parametrize("rows", [4, 16, 32, 128])
def test_little_is_padding_whatever_the_number_of_rows(
    rows: int, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder())
    backend = InProcess(policy, rows=rows)
    backend._model = counted = Counted(policy.network)
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 4), backend)
    starts = [(s, slot) for s in turnwise.starts("test/Uneven-v0", 0, 4) for slot in range(8)]
    episodes = turnwise.rollout(player, starts, max_turns=6)
    assert counted.run["prefill"] <= 1.15 * counted.fed["prefill"]
    assert counted.run["decode"] == counted.fed["decode"]
    prompts = [len(e.turns[0].prompt_ids) for e in episodes]
    rest = sum(len(t.prompt_ids) for e in episodes for t in e.turns[1:])
    assert len({len(e.turns) for e in episodes}) > 3, "they should end apart"
    assert min(prompts) > 100
    # One system prompt, four questions; the rest is fed once.
    assert counted.fed["prefill"] + 32 < 2 * max(prompts) + rest + 32 * len(episodes)


@pytest.mark.parametrize("history", ["append", "rerender"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_beginnings_change_nothing(
    architecture: str, history: Any, model_folder: Callable[..., Path]
) -> None:
    """Groups, refilled rows and conversations rendered again, against a plain forward pass."""
    policy = turnwise.Policy.from_pretrained(model_folder(architecture))
    for episode in play(policy, 3, group=4, rows=5, tokens=10, history=history):
        sampled = [p for t in episode.turns for p in t.logprobs or ()]
        assert sampled == pytest.approx(plain_logprobs(policy, episode), abs=1e-5)


def test_room_is_made_for_what_lives_and_given_back(policy: turnwise.Policy) -> None:
    backend = InProcess(policy, rows=128)
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 12), backend)
    starts = [(s, 0) for s in turnwise.starts("test/Echo-v0", 0, 3)]
    episodes = turnwise.rollout(player, starts)
    longest = max(
        sum(len(t.prompt_ids) + len(t.action_ids or ()) for t in e.turns) for e in episodes
    )
    for layer in backend._model._layers:
        assert layer.keys is not None
        assert layer.keys.shape[0] == 3
        assert layer.keys.shape[2] <= 1.5 * longest + 64 + 1
    backend.refresh()
    assert all(not layer.is_initialized for layer in backend._model._layers)


def test_weights_that_changed_are_seen_by_whoever_plays_next(
    model_folder: Callable[..., Path],
) -> None:
    """One player before and after a change, which nobody told its backend of."""
    policy = turnwise.Policy.from_pretrained(model_folder())
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 8))
    starts = [(s, slot) for s in turnwise.starts("test/Echo-v0", 0, 2) for slot in range(2)]
    before = policy.reply([turnwise.Message("user", "hello there")], seed=1)
    assert policy.reply("hello there", seed=1) == before
    turnwise.rollout(player, starts)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    for episode in turnwise.rollout(player, starts):
        sampled = [p for t in episode.turns for p in t.logprobs or ()]
        assert sampled == pytest.approx(plain_logprobs(policy, episode), abs=1e-5)
    after = policy.reply([turnwise.Message("user", "hello there")], seed=1)
    assert after != before


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(
    lambda few: [7] * (SHORTEST if sum(few) % 3 else 2) + few
)


@given(st.lists(tokens, min_size=1, max_size=8), st.dictionaries(st.integers(0, 12), tokens))
def test_a_beginning_is_taken_from_one_that_is_there(
    prompts: list[list[int]], held: dict[int, list[int]]
) -> None:
    """Every conversation is fed once, after the one it copies from; what it copies is its own
    beginning; a token is left to feed."""
    rows = list(range(len(prompts)))
    there = {row: ids for row, ids in held.items() if row not in rows}
    fed = []
    for wave in waves(prompts, rows, held):
        for member, shared in zip(wave.members, wave.shared, strict=True):
            if shared is None:
                continue
            row, size = shared
            source = held[row] if row == rows[member] else there[row]
            assert source[:size] == prompts[member][:size]
            assert SHORTEST <= size < len(prompts[member])
        there |= {rows[member]: prompts[member] for member in wave.members}
        fed += wave.members
    assert sorted(fed) == rows


def test_alike_counts_what_is_in_common() -> None:
    long = np.arange(40)
    other = long.copy()
    other[20] = 99
    assert alike(long, long) == 40
    assert alike(long, long[:30]) == 30
    assert alike(long, other) == 20
    assert alike(long, long + 1) == 0
    assert alike(long, long[: SHORTEST - 1]) == 0


class Waits(gymnasium.Env):
    """The first conversation's environment answers when the others have gone on without it."""

    observation_space = action_space = turnwise.Text(100_000)
    metadata: dict[str, Any] = {"concurrency": "thread"}
    gone_on = threading.Event()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        self.first, self.steps = seed == FIRST[0], 0
        return "hello there", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.first and self.steps == 1 and not self.gone_on.wait(PATIENCE[0]):
            raise RuntimeError("nobody went on")
        if self.steps == 3:
            self.gone_on.set()
        return "tell me more", 0.0, self.steps == 4, False, {}


FIRST, PATIENCE = [0], [60.0]
gymnasium.register("test/Waits-v0", Waits)


@pytest.mark.parametrize("schedule", ["ready-first", "deterministic"])
def test_a_slow_environment_delays_nobody_who_is_ready(
    schedule: Any, policy: turnwise.Policy
) -> None:
    """In step, the first conversation waits for others that wait for it."""
    starts = [(s, 0) for s in turnwise.starts("test/Waits-v0", 0, 4)]
    FIRST[0], PATIENCE[0] = starts[0][0].seed, 60.0 if schedule == "ready-first" else 0.2
    Waits.gone_on.clear()
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 4))
    episodes = turnwise.rollout(player, starts, schedule=schedule)
    waited, *others = episodes
    assert [e.ending for e in others] == ["terminated"] * 3
    assert waited.ending == ("terminated" if schedule == "ready-first" else "failed")


def test_schedules_play_the_same_conversations(policy: turnwise.Policy) -> None:
    """Noise belongs to a conversation's turn, whoever else is replied to."""
    found = []
    for schedule in ("deterministic", "ready-first"):
        player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 8))
        starts = [(s, 0) for s in turnwise.starts("test/Echo-v0", 0, 6)]
        episodes = turnwise.rollout(player, starts, schedule=schedule)
        found.append([[t.action_ids for t in e.turns] for e in episodes])
    assert found[0] == found[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_who_arrives_joins_the_batch_half_way(
    architecture: str, model_folder: Callable[..., Path]
) -> None:
    """The same replies as alone, in fewer calls than one after the other."""
    policy = turnwise.Policy.from_pretrained(model_folder(architecture))
    policy.chat.stop_ids = frozenset()
    sampling = turnwise.Sampling(1.0, 30)

    def conversations() -> list[Conversation]:
        texts = ["hello there", "tell me", "hello there", "the cat sat on a mat"]
        prompts = [policy.chat.prompt([turnwise.Message("user", text)]) for text in texts]
        return [Conversation(row, ids, seed=row) for row, ids in enumerate(prompts)]

    alone = {}
    for conversation in conversations():
        [(_, alone[conversation.row])] = InProcess(policy).reply([conversation], sampling)
    backend = InProcess(policy)
    backend._model = counted = Counted(policy.network)
    first, second, *rest = conversations()
    later = [[second], [], rest]
    ended = []
    for conversation, sample in backend.reply(
        [first], sampling, lambda: later.pop(0) if later else []
    ):
        ended.append(conversation.row)
        own = alone[conversation.row]
        assert sample.ids == own.ids
        assert sample.logprobs == pytest.approx(own.logprobs, abs=1e-5)
    assert ended == [0, 1, 2, 3]
    # 30 tokens from the last one's arrival on, which is after 24
    assert counted.calls["decode"] < 60 < 4 * 29


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3-window"])
def test_a_compiled_model_samples_alike(
    architecture: str, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder(architecture))
    plain, compiled = (
        play_with(policy, InProcess(policy, rows=3, compile=each)) for each in (False, True)
    )
    for one, other in zip(plain, compiled, strict=True):
        for a, b in zip(one.turns, other.turns, strict=True):
            assert a.action_ids == b.action_ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def play_with(policy: turnwise.Policy, backend: InProcess) -> list[turnwise.Episode]:
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 12), backend)
    starts = turnwise.starts("test/Echo-v0", 0, 5)
    return turnwise.rollout(player, [(start, 0) for start in starts], max_turns=3)


class Asked(turnwise.FeedbackSource):
    """Tells that it was asked."""

    version = "1"
    event = threading.Event()

    def __init__(self) -> None:
        self.waiting_for: dict[str, turnwise.Request] = {}
        self.times: dict[str, int] = {}

    def request(self, requests: Sequence[turnwise.Request]) -> None:
        self.waiting_for |= {r.id: r for r in requests}
        self.times |= {r.id: self.times.get(r.id, 0) + 1 for r in requests}
        self.event.set()

    def receive(self) -> list[turnwise.Feedback]:
        ready, self.waiting_for = list(self.waiting_for.values()), {}
        return [
            turnwise.Feedback(
                r.target,
                score=float(r.episodes[0].slot),
                id=f"a-{r.id}",
                stamp=turnwise.Stamp(request=r.id),
            )
            for r in ready
        ]


class Unlike(gymnasium.Env):
    """One in two conversations ends at once; the others go on when that one is being judged."""

    observation_space = action_space = turnwise.Text(100_000)
    metadata: dict[str, Any] = {"concurrency": "thread"}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        self.long, self.steps = seed == FIRST[0], 0
        return "hello there", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.long and self.steps == 2 and not Asked.event.wait(60.0):
            raise RuntimeError("nobody judged meanwhile")
        return "tell me more", 0.0, not self.long or self.steps == 2, False, {}


gymnasium.register("test/Unlike-v0", Unlike)


def test_judging_begins_while_others_play(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    source = Asked()
    Asked.event.clear()
    stage = {
        "env": "test/Unlike-v0", "feedback": [source], "updates": 1, "groups": 2, "group_size": 2,
        "max_new_tokens": 4, "optimizer": "grpo",
    }  # fmt: skip
    config = {"policy": str(model_folder()), "threads": 1, "stages": [{"rl": stage}]}
    run = turnwise.Run(config, folder=tmp_path / "run")
    seed = int(derive_id("starts", 0, "rl")[:8], 16)
    FIRST[0] = turnwise.starts("test/Unlike-v0", seed, 1)[0].seed
    [update] = run
    assert sorted(len(e.turns) for e in update.episodes) == [1, 1, 2, 2]
    assert {e.ending for e in update.episodes} == {"terminated"}
    assert set(source.times.values()) == {1}, "each was asked about once"
    assert len(source.times) == 4


def test_a_round_recorded_in_part_is_played_as_a_whole(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    """A kill may come when one group of a round is in the ledger: what follows is the same to the
    last bit, and what was recorded stays."""
    runs = []
    for name in ("whole", "part"):
        stage = {
            "env": "test/Echo-v0", "updates": 1, "groups": 3, "group_size": 2,
            "max_new_tokens": 8, "optimizer": "grpo",
        }  # fmt: skip
        config = {
            "policy": str(model_folder()), "threads": 1, "name": "same", "stages": [{"rl": stage}],
        }  # fmt: skip
        run = turnwise.Run(config, folder=tmp_path / name)
        if runs:
            run.ledger.add_episodes(runs[0][0].episodes[2:4])
        [update] = run
        weights = [p.detach().clone() for p in run.policy.parameters()]
        runs.append((update, weights))
    (whole, theirs), (part, ours) = runs
    assert [e.id for e in whole.episodes] == [e.id for e in part.episodes]
    assert [e.turns for e in whole.episodes] == [e.turns for e in part.episodes]
    assert all(bool((a == b).all()) for a, b in zip(theirs, ours, strict=True))


def test_a_replay_that_differs_is_reported_and_the_record_counts(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    stage = {
        "env": "test/Echo-v0", "updates": 1, "groups": 2, "group_size": 2, "max_new_tokens": 8,
    }  # fmt: skip
    config = {
        "policy": str(model_folder()), "threads": 1, "name": "same", "stages": [{"rl": stage}],
    }  # fmt: skip
    [whole] = turnwise.Run(config, folder=tmp_path / "whole")
    first = whole.episodes[0]
    other = dataclasses.replace(first.turns[0], action="something else")
    changed = dataclasses.replace(first, turns=(other, *first.turns[1:]))
    run = turnwise.Run(config, folder=tmp_path / "part")
    run.ledger.add_episodes([changed])
    with pytest.warns(UserWarning, match="1 conversations that were recorded .* what was recorded"):
        [part] = run
    assert part.episodes[0].turns[0].action == "something else"
    assert [e.turns for e in part.episodes[1:]] == [e.turns for e in whole.episodes[1:]]


def test_the_faster_number_of_threads_is_measured() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        number, times = faster_threads()
        assert number == (1 if times > MARGIN else 2)
        assert torch.get_num_threads() == 2, "measuring changes nothing"
        torch.set_num_threads(1)
        assert faster_threads() == (1, 1.0)
    finally:
        torch.set_num_threads(before)


class Attended(torch.overrides.TorchFunctionMode):
    """Notes how many heads of keys attention is asked to read."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: set[int] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.heads.add(args[1].shape[1])
        return function(*args, **(kwargs or {}))


def test_keys_of_grouped_queries_are_not_copied(wide: Path) -> None:
    """Neither for a prompt, nor for a single token, nor in an update."""
    policy = turnwise.Policy.from_pretrained(wide)
    config = policy.model.config
    assert config.num_attention_heads > config.num_key_value_heads
    model = CachedModel(policy.network)
    with Attended() as seen:
        model.extend([0, 1], [0, 0], [[5, 6, 7], [5, 6, 7, 8]])
        model.extend([0, 1], [3, 4], [[9], [9]])
        policy.network.model(
            input_ids=torch.tensor([[5, 6, 7], [5, 6, 0]]),
            attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
        )
    assert seen.heads == {config.num_key_value_heads}
