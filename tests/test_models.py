"""Models as their configs describe them, weights in half precision, and what is saved for others to
read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
import turnwise
from support.echo import play
from support.models import LLAMA_LIKE
from test_promise_1_tokens import batch_of, plain_logprobs
from turnwise.engine.errors import UnfitModel
from turnwise.engine.policy.batching import make_batch
from turnwise.engine.policy.in_process import InProcess
from turnwise.engine.policy.learner import Learner
from turnwise.engine.policy.options import LearnerOptions
from turnwise.engine.policy.properties import changes_logits, context_length, longest_span
from turnwise.learning import build_model, build_tokenizer

TWO = ["sliding_attention", "full_attention"]


def made(config: T.PreTrainedConfig, folder: Path, tokenizer: Any, scale: float = 1.0) -> Path:
    """A small model with random weights, saved beside its tokenizer."""
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data *= scale
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        **LLAMA_LIKE,
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **more,
    }


CONFIGS: dict[str, Callable[[Any], T.PreTrainedConfig]] = {
    "llama4 chunks": lambda t: T.Llama4TextConfig(
        **small(t), head_dim=8, intermediate_size_mlp=64, num_local_experts=2,
        num_experts_per_tok=1, attention_chunk_size=32,
        no_rope_layers=[1, 0], layer_types=["chunked_attention", "full_attention"],
        interleave_moe_layer_step=1,
    ),
    "gemma3n": lambda t: T.Gemma3nTextConfig(
        **{**small(t), "intermediate_size": [64, 64]}, head_dim=8, sliding_window=32,
        layer_types=TWO,
        vocab_size_per_layer_input=len(t), hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0], altup_num_inputs=2,
    ),
    "gemma3n, layers that share keys": lambda t: T.Gemma3nTextConfig(
        **{**small(t), "intermediate_size": [64] * 4, "num_hidden_layers": 4}, head_dim=8,
        sliding_window=32, layer_types=TWO * 2, num_kv_shared_layers=2,
        vocab_size_per_layer_input=len(t), hidden_size_per_layer_input=8, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4, altup_num_inputs=2,
    ),
    "longrope": lambda t: T.Phi3Config(
        **small(t), original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
                         "long_factor": [1.5, 2.0, 4.0, 8.0],
                         "original_max_position_embeddings": 64},
    ),
    "modernbert window": lambda t: T.ModernBertDecoderConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
        vocab_size=len(t),
        bos_token_id=0, eos_token_id=2, pad_token_id=0, cls_token_id=0, sep_token_id=0,
        intermediate_size=64,
        local_attention=32, global_attn_every_n_layers=2, initializer_range=0.2,
    ),
    "mistral window": lambda t: T.MistralConfig(**small(t), sliding_window=48, head_dim=8),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_sampler_update_and_plain_forward_agree_beyond_every_window(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    policy = turnwise.Policy.from_pretrained(made(CONFIGS[name](tokenizer), tmp_path, tokenizer))
    episodes = play(policy, 3, group=2, rows=4, tokens=24, turns=5)
    batch = batch_of(episodes)
    apart, together = (
        policy.logprobs(batch, micro_tokens=1),
        policy.logprobs(batch, micro_tokens=100_000),
    )
    assert float((apart - together).abs().max()) < 2e-5, "padding changes nothing"
    longest = max(sum(len(t.prompt_ids) + len(t.action_ids) for t in e.turns) for e in episodes)
    assert longest <= policy.context_length
    assert longest > longest_span(policy.model.config) or policy.context_length < 256
    for e, episode in enumerate(episodes):
        plain = torch.tensor(plain_logprobs(policy, episode))
        sampled = torch.tensor([x for t in episode.turns for x in t.logprobs])
        assert torch.allclose(sampled, plain, atol=2e-5)
        assert torch.allclose(apart[e][batch.mask[e]], plain, atol=2e-5)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            lambda t: T.GPTNeoConfig(
                vocab_size=len(t), eos_token_id=2, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=256,  # noqa: E501
                attention_types=[[["global", "local"], 1]], window_size=32, intermediate_size=64,
            ),
            "GPTNeoForCausalLM has layers of the kinds",
        ),
        (
            lambda t: T.Lfm2Config(**small(t), layer_types=["conv", "full_attention"]),
            "Lfm2ForCausalLM has layers of the kinds",
        ),
    ],
    ids=["gpt-neo", "lfm2"],
)  # fmt: skip
def test_models_that_cannot_be_sampled_exactly_are_refused_by_name(
    config: Any, why: str, tokenizer: Any, tmp_path: Path
) -> None:
    policy = turnwise.Policy.from_pretrained(
        made(config(tokenizer), tmp_path, tokenizer), attention="eager"
    )
    with pytest.raises(UnfitModel, match=f"{why}.*another backend"):
        InProcess(policy, rows=2)


def test_state_space_models_are_refused_at_load(tokenizer: Any, tmp_path: Path) -> None:
    config = T.MambaConfig(
        vocab_size=len(tokenizer), eos_token_id=2, hidden_size=32, num_hidden_layers=2, state_size=8
    )
    folder = made(config, tmp_path, tokenizer)
    for attention in ("sdpa", "eager"):
        with pytest.raises(turnwise.PolicyError, match="'mamba' are state-space models"):
            turnwise.Policy.from_pretrained(folder, attention=attention)


def test_a_property_is_read_under_every_name() -> None:
    assert context_length(T.GPT2Config(n_positions=77)) == 77
    assert context_length(T.MptConfig(max_seq_len=99)) == 99
    assert context_length(T.MambaConfig()) == 2**31
    assert longest_span(T.GPTNeoConfig(window_size=31)) == 31
    assert longest_span(T.LlamaConfig()) == 0
    assert not changes_logits(T.LlamaConfig())
    assert changes_logits(T.Gemma2Config(final_logit_softcapping=30.0))
    assert changes_logits(T.GraniteConfig(logits_scaling=8.0))
    assert changes_logits(T.CohereConfig(logit_scale=0.25))
    assert changes_logits(T.RecurrentGemmaConfig(logits_soft_cap=30.0))
    assert not changes_logits(
        T.Gemma2Config(final_logit_softcapping=None, attn_logit_softcapping=50.0)
    )


def test_a_soft_cap_is_respected_where_logits_are_small(tokenizer: Any, tmp_path: Path) -> None:
    """At the first weights it changes next to nothing; it must be in the update all the same."""
    config = T.Gemma3TextConfig(
        **small(tokenizer),
        head_dim=8,
        sliding_window=8,
        layer_types=TWO,
        query_pre_attn_scalar=8,
        final_logit_softcapping=30.0,
    )
    policy = turnwise.Policy.from_pretrained(made(config, tmp_path, tokenizer))
    assert not policy.network.head_is_plain


# Weights in half precision.


def learner_of(
    folder: Path, dtype: str, lr: float = 1e-6
) -> tuple[turnwise.Policy, Learner, list[Any]]:
    policy = turnwise.Policy.from_pretrained(folder, dtype=dtype)
    learner = Learner(policy, LearnerOptions(lr=lr, warmup=0))
    wide = turnwise.Policy.from_pretrained(folder)
    episodes = play(wide, 4, tokens=6)
    batch = make_batch(episodes, [turnwise.Rewards(0.0, (0.0,) * len(e.turns)) for e in episodes])
    return policy, learner, list(batch.rows)


def train(policy: turnwise.Policy, learner: Learner, rows: list[Any], steps: int) -> float:
    count = sum(len(row.positions) for row in rows)
    loss = 0.0
    for _ in range(steps):
        loss = 0.0
        for micro in learner.micro_batches(rows, range(len(rows))):
            part = -policy.score(micro, network=learner.network).logprobs.sum() / count
            learner.backward(part, micro)
            loss += float(part)
        learner.step(0, ["x"])
    return loss


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_as_float32_does(
    dtype: str, model_folder: Callable[..., Path]
) -> None:
    """Steps of this size are far below the spacing of the weights' own numbers."""
    lost = {}
    for kind in ("float32", dtype):
        policy, learner, rows = learner_of(model_folder(), kind, lr=2e-5)
        before = train(policy, learner, rows, 1)
        lost[kind] = before - train(policy, learner, rows, 40)
        assert all(bool(p.isfinite().all()) for p in policy.parameters())
    assert policy.model.dtype == getattr(torch, dtype)
    assert lost["float32"] > 0.01
    assert lost[dtype] == pytest.approx(lost["float32"], rel=0.3)


def test_float32_copies_are_part_of_the_state(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Gone on with from its state, a half-precision learner makes the same weights."""
    policy, learner, rows = learner_of(model_folder(), "bfloat16")
    train(policy, learner, rows, 2)
    policy.save_pretrained(tmp_path)
    state = {
        k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in learner.state_dict().items()
    }
    train(policy, learner, rows, 3)
    again, second, _ = learner_of(tmp_path, "bfloat16")
    second.load_state_dict(state)
    train(again, second, rows, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True)
    )
    assert all(
        torch.equal(v, second.state_dict()[k])
        for k, v in learner.state_dict().items()
        if k.startswith("master")
    )


def test_a_float16_overflow_is_refused_with_its_cure(model_folder: Callable[..., Path]) -> None:
    policy, learner, rows = learner_of(model_folder(), "float16")
    for micro in learner.micro_batches(rows, range(len(rows))):
        learner.backward(-policy.score(micro, network=learner.network).logprobs.sum() * 1e6, micro)
    with pytest.raises(turnwise.NonFiniteError, match="bfloat16 instead of float16"):
        learner.step(0, ["x"])


# Ids that are no token.


def test_ids_that_are_no_token_are_neither_sampled_nor_trained(
    tokenizer: Any, tmp_path: Path
) -> None:
    """Embeddings padded to a round number, with the padding's logits the largest of all."""
    config = T.LlamaConfig(**{**small(tokenizer), "vocab_size": len(tokenizer) + 40})
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(config)
    model.lm_head.weight.data[len(tokenizer) :] = (
        model.lm_head.weight.data[: len(tokenizer)].abs().mean() * 50
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = turnwise.Policy.from_pretrained(tmp_path)
    episodes = play(policy, 6, tokens=12)
    sampled = [i for e in episodes for t in e.turns for i in t.action_ids]
    assert max(sampled) < len(tokenizer)
    batch = batch_of(episodes)
    update = policy.logprobs(batch)
    for e, episode in enumerate(episodes):
        logprobs = torch.tensor([x for t in episode.turns for x in t.logprobs])
        assert torch.allclose(update[e][batch.mask[e]], logprobs, atol=2e-5)


# What is saved.


def test_others_stop_where_the_policy_does(tokenizer: Any, tmp_path: Path) -> None:
    """A base model with a chat template whose end token is not its end of sequence."""
    base = build_tokenizer(["hello there"] * 3, vocabulary=300)
    base.eos_token = "<|endoftext|>"
    model = build_model(base, hidden=32, layers=1)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    model.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    policy = turnwise.Policy.from_pretrained(tmp_path / "base", chat_template=turnwise.CHATML)
    policy.save_pretrained(tmp_path / "saved")
    found = T.GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id
    assert set(found) == {0, policy.chat.end_id} == policy.chat.stop_ids
    again = turnwise.Policy.from_pretrained(tmp_path / "saved")
    assert again.chat.stop_ids == policy.chat.stop_ids


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_on_tied_ends_are_merged_into_the_same_model(
    target: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    policy = turnwise.Policy.from_pretrained(
        model_folder(), lora={"r": 4, "target_modules": ["q_proj", target]}
    )
    torch.manual_seed(1)
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        wanted = policy.network.model(input_ids=ids).logits
        policy.save_pretrained(tmp_path, merge=True)
        merged = T.AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits
        assert torch.allclose(policy.network.model(input_ids=ids).logits, wanted), (
            "the policy itself is as it was"
        )
    assert torch.allclose(merged, wanted, atol=1e-4)


def test_code_that_comes_with_a_model_is_not_run_unasked(tmp_path: Path, tokenizer: Any) -> None:
    folder = made(T.LlamaConfig(**small(tokenizer)), tmp_path / "model", tokenizer)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own-model",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        turnwise.PolicyError, match="Python files of its own.*trust_remote_code: true"
    ):
        turnwise.Policy.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_is_damaged_is_one_message(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(model_folder(), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(
        turnwise.PolicyError, match="cannot load the policy '.*/m'.*SafetensorError"
    ):
        turnwise.Policy.from_pretrained(tmp_path / "m")


def test_the_built_in_template_is_named_and_what_is_none_refused(
    model_folder: Callable[..., Path],
) -> None:
    assert (
        turnwise.Policy.from_pretrained(
            model_folder(), chat_template="chatml"
        ).chat.tokenizer.chat_template
        == turnwise.CHATML
    )
    with pytest.raises(turnwise.PolicyError, match="'CHATML' is no Jinja template.*`chatml`"):
        turnwise.Policy.from_pretrained(model_folder(), chat_template="CHATML")
    with pytest.raises(turnwise.PolicyError, match="lora: .*Here it is called 'r'"):
        turnwise.Policy.from_pretrained(model_folder(), lora={"rank": 4})


@pytest.mark.parametrize(
    ("named", "context", "span"),
    [
        ({"context_length": 64}, 64, 0),
        ({"max_seqlen": 64}, 64, 0),
        ({"n_positions": 64, "n_ctx": 128}, 64, 0),
        ({"n_ctx": 64, "n_positions": 128}, 64, 0),
        ({"max_position_embeddings": -1}, 2**31, 0),
        ({"attn_config": {"sliding_window_size": 32, "max_seq_len": 64}}, 64, 32),
        ({"sliding_window": 32.0, "max_position_embeddings": 64}, 64, 32),
    ],
)
def test_limits_are_read_under_every_name_and_at_every_depth(
    named: dict[str, Any], context: int, span: int
) -> None:
    config = T.PreTrainedConfig(**named)
    assert (context_length(config), longest_span(config)) == (context, span)


# What is saved where something else was, and what others have quantized.


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(5, 15).unsqueeze(0)).logits


def test_a_plain_model_takes_the_place_of_adapters(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    lora = {"r": 4, "init_lora_weights": False}
    policy = turnwise.Policy.from_pretrained(model_folder(), lora=lora)
    folder = tmp_path / "policy"
    policy.save_pretrained(folder)
    assert not (folder / "README.md").exists(), "peft's template tells nothing"
    assert (folder / "generation_config.json").exists(), "what ends a reply is there for others"
    again = turnwise.Policy.from_pretrained(folder)
    again.save_pretrained(folder, merge=True)
    with torch.no_grad():
        expected = logits(policy.network.model)
        merged = T.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.allclose(logits(merged), expected, atol=1e-5)
        assert torch.allclose(
            logits(turnwise.Policy.from_pretrained(folder).model), expected, atol=1e-5
        )
    with pytest.raises(turnwise.PolicyError, match="save adapters into a folder of their own"):
        policy.save_pretrained(folder)


def test_adapters_know_where_their_model_is(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_folder(), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    turnwise.Policy.from_pretrained("tiny", lora={"r": 2}).save_pretrained("adapters")
    monkeypatch.chdir("/")
    turnwise.Policy.from_pretrained(tmp_path / "adapters")
    shutil.rmtree(tmp_path / "tiny")
    with pytest.raises(turnwise.PolicyError, match=r"the adapters in .* belong to '.*tiny'"):
        turnwise.Policy.from_pretrained(tmp_path / "adapters")


def test_weights_that_are_quantized_already_need_adapters(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    packed = T.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = T.AutoModelForCausalLM.from_pretrained(model_folder(), quantization_config=packed)
    shutil.copytree(model_folder(), tmp_path / "q4")
    model.save_pretrained(tmp_path / "q4")
    with pytest.raises(turnwise.PolicyError, match="quantized weights stand still"):
        turnwise.Policy.from_pretrained(tmp_path / "q4")


def test_sampling_values_beside_greedy_decoding_are_dropped(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(model_folder(), tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(
        '{"do_sample": false, "temperature": 0.6, "top_p": 0.9, "top_k": 4}'
    )
    turnwise.Policy.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert "temperature" not in saved


@pytest.mark.parametrize(
    "lora", [{"r": 0}, {"r": "x"}, {"lora_alpha": "a"}, {"target_modules": ["nope"]}]
)
def test_odd_adapters_are_one_message(lora: dict[str, Any], model_folder: Any) -> None:
    with pytest.raises(turnwise.PolicyError, match="^lora: "):
        turnwise.Policy.from_pretrained(model_folder(), lora=lora)


def test_a_device_without_numbers_is_refused(model_folder: Callable[..., Path]) -> None:
    with pytest.raises(turnwise.PolicyError, match="'meta': it holds no numbers"):
        turnwise.Policy.from_pretrained(model_folder(), device="meta")
