"""Promise 1: what was sampled is what is trained.

Ids, masks and log-probs of sampler, update and plain forward pass agree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import turnwise
from support.echo import play
from support.models import configs
from turnwise.engine.errors import UntrainableEpisode
from turnwise.engine.policy.batching import make_batch
from turnwise.engine.policy.cache import CachedModel

ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "gpt2",
    "gemma",
    "gemma3-window",
    "gemma3-softcap",
    "mistral-window",
]


def batch_of(episodes: list[turnwise.Episode], temperature: float = 1.0) -> turnwise.Batch:
    rewards = [turnwise.Rewards(e.env_return, tuple(t.reward for t in e.turns)) for e in episodes]
    return make_batch(episodes, rewards, temperature=temperature)


@torch.no_grad()
def plain_logprobs(
    policy: turnwise.Policy, episode: turnwise.Episode, temperature: float = 1.0
) -> list[float]:
    """One unpadded forward pass of the unmodified transformers model, without a cache."""
    contexts: dict[int, list[int]] = {}
    found = []
    for turn in episode.turns:
        before = [] if episode.history == "rerender" else contexts.get(turn.context, [])
        ids = contexts[turn.context] = [*before, *turn.prompt_ids, *turn.action_ids]
        logits = (
            policy.network.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            / temperature
        )
        logprobs = torch.log_softmax(logits.float(), -1)
        begin = len(ids) - len(turn.action_ids)
        found += [float(logprobs[begin + i - 1, token]) for i, token in enumerate(turn.action_ids)]
    return found


def disturb_lora(policy: turnwise.Policy) -> None:
    """Fresh adapters change nothing; these do."""
    torch.manual_seed(1)
    for name, parameter in policy.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampler_update_and_plain_forward_agree(
    architecture: str, lora: bool, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(
        model_folder(architecture),
        lora=(
            {"r": 4, "lora_dropout": 0.1, "fan_in_fan_out": architecture == "gpt2"}
            if lora
            else None
        ),
    )
    if lora:
        disturb_lora(policy)
    episodes = play(policy, 6, rows=4, tokens=10)
    batch = batch_of(episodes)
    update = policy.logprobs(batch, micro_tokens=200)
    lengths = {sum(len(t.prompt_ids) + len(t.action_ids) for t in e.turns) for e in episodes}
    assert len(lengths) > 2, "the conversations should be of uneven length"
    assert min(lengths) > 16, "and longer than the sliding windows"
    for e, episode in enumerate(episodes):
        sampled = [p for t in episode.turns for p in t.logprobs]
        plain = plain_logprobs(policy, episode)
        assert sampled == pytest.approx(plain, abs=1e-5)
        assert update[e][batch.mask[e]].tolist() == pytest.approx(plain, abs=1e-5)
    assert (update[~batch.mask] == 0).all()


@pytest.mark.parametrize("architecture", ["llama", "gemma3-window"])
def test_temperature_is_that_of_the_update(
    architecture: str, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder(architecture))
    [episode] = play(policy, 1, temperature=0.7)
    batch = batch_of([episode], temperature=0.7)
    sampled = [p for t in episode.turns for p in t.logprobs]
    assert sampled == pytest.approx(plain_logprobs(policy, episode, 0.7), abs=1e-5)
    assert policy.logprobs(batch)[0][batch.mask[0]].tolist() == pytest.approx(sampled, abs=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rerender_trains_one_row_per_turn(
    attention: str, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder(), attention=attention)
    episodes = play(policy, 3, history="rerender", cut=True)
    batch = batch_of(episodes)
    assert len(batch.rows) == sum(len(e.turns) + 1 for e in episodes), (
        "a row per turn, and one for the truncated state"
    )
    update = policy.logprobs(batch)
    for e, episode in enumerate(episodes):
        assert update[e][batch.mask[e]].tolist() == pytest.approx(
            plain_logprobs(policy, episode), abs=1e-5
        )


def test_a_reply_is_independent_of_what_else_is_played(policy: turnwise.Policy) -> None:
    together = play(policy, 6, rows=6)
    few = play(policy, 6, rows=2)
    assert [e.id for e in together] == [e.id for e in few]
    assert [[t.action_ids for t in e.turns] for e in together] == [
        [t.action_ids for t in e.turns] for e in few
    ]


def test_ids_are_kept_as_sampled(policy: turnwise.Policy) -> None:
    """A random model samples ids that its tokenizer would never produce from their text; they must
    stay."""
    episodes = play(policy, 8, tokens=16)
    chat = policy.chat
    turns = [t for e in episodes for t in e.turns]
    assert any(
        chat.encoder.encode_text(t.action) != [i for i in t.action_ids if i != chat.end_id]
        for t in turns
    )
    for episode in episodes:
        for before, after in zip(episode.turns, episode.turns[1:], strict=False):
            closing = [] if before.action_ids[-1] == chat.end_id else [chat.end_id]
            assert list(after.prompt_ids) == closing + chat.suffix(after.observation)


def test_a_cut_reply_gets_an_untrained_end(policy: turnwise.Policy) -> None:
    episodes = play(policy, 6, tokens=3)
    cut = [(a, b) for e in episodes for a, b in zip(e.turns, e.turns[1:], strict=False) if a.cut]
    assert cut, "with three tokens a random model rarely ends by itself"
    for before, after in cut:
        assert len(before.action_ids) == 3
        assert policy.chat.end_id not in before.action_ids
        assert after.prompt_ids[0] == policy.chat.end_id


def test_broken_mask_is_found(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that chooses the mask goes red when windows are ignored."""
    policy = turnwise.Policy.from_pretrained(model_folder("mistral-window"))
    monkeypatch.setattr(CachedModel, "STYLES", ("typed", "full", "full"))
    with pytest.raises(ValueError, match="cannot be sampled with a kept KV cache"):
        CachedModel(policy.network)


def test_scripted_turns_are_refused_by_rl(policy: turnwise.Policy) -> None:
    [(start, _)] = [(s, 0) for s in turnwise.starts("test/Echo-v0", 1, 1)]
    episodes = turnwise.rollout(turnwise.ScriptPlayer(lambda said: "hello"), [(start, 0)])
    assert episodes[0].turns[0].action_ids is None
    with pytest.raises(UntrainableEpisode, match="no policy of ours sampled"):
        batch_of(episodes)


def test_context_overflow_truncates_with_its_reason(model_folder: Callable[..., Path]) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder())
    policy.model.config.max_position_embeddings = 60
    episodes = play(policy, 4, turns=50, tokens=20)
    for episode in episodes:
        assert (episode.ending, episode.reason) == ("truncated", "context")
        assert (
            sum(len(t.prompt_ids) + len(t.action_ids) for t in episode.turns)
            + len(episode.final_ids)
            <= 60
        )


def test_the_configurations_are_what_they_claim(tokenizer: Any) -> None:
    found = configs(len(tokenizer))
    assert set(ARCHITECTURES) == set(found)
    assert found["mistral-window"].sliding_window == found["gemma3-window"].sliding_window == 8
