"""Families of models: the same numbers in sampling, training and a plain forward pass, an update of
every kind, and weights that transformers reads back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
import turnwise
from support.echo import play
from test_models import made, small
from test_promise_1_tokens import batch_of, plain_logprobs

TWO = ["sliding_attention", "full_attention"]
ATTENTION = {"gemma2": "eager"}  # it caps its attention's logits; "sdpa" elsewhere
MIXED = {"num_experts_per_tok": 2, "head_dim": 8}
FAMILIES: dict[str, Callable[[Any], T.PreTrainedConfig]] = {
    "llama": lambda t: T.LlamaConfig(**small(t)),
    "qwen2": lambda t: T.Qwen2Config(**small(t)),
    "qwen3": lambda t: T.Qwen3Config(**small(t), head_dim=8),
    "gemma2": lambda t: T.Gemma2Config(
        **small(t), head_dim=8, sliding_window=8, layer_types=TWO, query_pre_attn_scalar=8
    ),
    "gemma3": lambda t: T.Gemma3TextConfig(
        **small(t), head_dim=8, sliding_window=8, layer_types=TWO, query_pre_attn_scalar=8
    ),
    "mistral": lambda t: T.MistralConfig(**small(t), sliding_window=8, head_dim=8),
    "phi3": lambda t: T.Phi3Config(**small(t)),
    "gpt2": lambda t: T.GPT2Config(
        vocab_size=len(t), n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    ),
    "gpt-neox": lambda t: T.GPTNeoXConfig(
        vocab_size=len(t), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=256, initializer_range=0.2,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    ),
    "olmo2": lambda t: T.Olmo2Config(**small(t)),
    "smollm3": lambda t: T.SmolLM3Config(**small(t)),
    "granite": lambda t: T.GraniteConfig(**small(t), logits_scaling=2.0, residual_multiplier=0.5),
    "mixtral": lambda t: T.MixtralConfig(**small(t), **MIXED, num_local_experts=4),
    "qwen3-moe": lambda t: T.Qwen3MoeConfig(
        **small(t), **MIXED, num_experts=4, moe_intermediate_size=32
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_it_samples_what_it_trains(family: str, tokenizer: Any, tmp_path: Path) -> None:
    policy = turnwise.Policy.from_pretrained(
        made(FAMILIES[family](tokenizer), tmp_path, tokenizer),
        attention=ATTENTION.get(family, "sdpa"),
    )
    episodes = play(policy, 4, group=2, rows=3, tokens=12, turns=3)
    batch = batch_of(episodes)
    trained = policy.logprobs(batch, micro_tokens=300)
    for e, episode in enumerate(episodes):
        plain = plain_logprobs(policy, episode)
        assert [p for t in episode.turns for p in t.logprobs or ()] == pytest.approx(
            plain, abs=1e-4
        )
        assert trained[e][batch.mask[e]].tolist() == pytest.approx(plain, abs=1e-4)


def unmasked(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
) -> tuple[Any, None]:
    """Attends to all tokens before one and within a sliding window, as flash attention does: there
    is no mask."""
    assert attention_mask is None
    queries, keys = query.shape[2], key.shape[2]
    at = torch.arange(keys - queries, keys).unsqueeze(1) - torch.arange(keys)
    seen = (at >= 0) & (at < (options.get("sliding_window") or keys))
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    weights = query @ key.transpose(2, 3) * options["scaling"]
    if cap := options.get("softcap"):
        weights = cap * torch.tanh(weights / cap)
    weights = weights.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3"])
def test_attention_without_masks_trains_and_is_sampled_in_another_way(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    """Flash attention needs a GPU; one that has its limits is put in its place."""
    T.AttentionInterface.register("unmasked", unmasked)
    T.AttentionMaskInterface.register("unmasked", lambda **_: None)
    folder = made(FAMILIES[family](tokenizer), tmp_path, tokenizer)
    policy = turnwise.Policy.from_pretrained(folder, attention="unmasked")
    episodes = play(policy, 4, group=2, rows=3, tokens=12, turns=3)
    assert policy.model.config._attn_implementation == "unmasked"
    batch = batch_of(episodes)
    trained = policy.logprobs(batch, micro_tokens=300)
    usual = turnwise.Policy.from_pretrained(folder, attention=ATTENTION.get(family, "sdpa"))
    for e, episode in enumerate(episodes):
        sampled = [p for t in episode.turns for p in t.logprobs or ()]
        assert sampled == pytest.approx(plain_logprobs(usual, episode), abs=1e-4)
        assert trained[e][batch.mask[e]].tolist() == pytest.approx(sampled, abs=1e-4)


def written(*texts: str) -> list[dict[str, str]]:
    """Messages of a user and an assistant in turns."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_makes_updates_of_every_kind(family: str, tokenizer: Any, tmp_path: Path) -> None:
    data, pairs = tmp_path / "talks.jsonl", tmp_path / "pairs.jsonl"
    data.write_text(
        json.dumps({"messages": written("hello", "yes please", "tell me", "no")}) + "\n"
    )
    pair = {
        "prompt": written("hello"),
        "chosen": written("", "yes")[1:],
        "rejected": written("", "no")[1:],
    }
    pairs.write_text(json.dumps(pair) + "\n")
    play_options = {
        "env": "test/Echo-v0", "updates": 1, "groups": 2, "group_size": 4, "max_new_tokens": 8,
    }  # fmt: skip
    folder = made(FAMILIES[family](tokenizer), tmp_path / "model", tokenizer)
    stages = [
        {"sft": {"data": str(data), "epochs": 1, "lr": 1e-3}},
        {"rl": {**play_options, "optimizer": {"name": "grpo", "lr": 1e-3, "kl": 0.01}}},
        {"rl": {**play_options, "optimizer": {"name": "ppo", "lr": 1e-3}}},
        {"preference": {"data": str(pairs), "optimizer": {"name": "dpo", "lr": 1e-3}}},
    ]
    chosen = {"model": str(folder), "attention": ATTENTION.get(family, "sdpa")}
    config = {"policy": chosen, "threads": 1, "stages": stages}
    run, before = turnwise.Run(config, folder=tmp_path / "run"), None
    for update in run:
        weights = torch.cat([p.detach().flatten() for p in run.policy.parameters()])
        assert bool(weights.isfinite().all())
        assert before is None or not torch.equal(weights, before), update.stage
        before = weights
    assert {u["stage"] for u in run.metrics} == {"sft", "rl", "rl-2", "preference"}
    again = T.AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "policy", attn_implementation=chosen["attention"]
    ).eval()
    ids = torch.arange(5, 45).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, run.policy.model(ids).logits)
