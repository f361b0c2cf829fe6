"""Holds the words and the small architectures that the models of the tests are built from."""

from __future__ import annotations

import transformers

WORDS = (
    "hello there how are you fine thanks what is it I do not know tell me more please yes no maybe"
    " the cat sat on a mat . ? ! , 1 2 3"
)
SHORT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LLAMA_LIKE = {**SHORT, "intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.2}


def configs(vocabulary: int) -> dict[str, transformers.PreTrainedConfig]:
    """Returns one small configuration per architecture; the windows are shorter than the
    conversations of the tests."""
    common = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    tied = {**LLAMA_LIKE, **common, "tie_word_embeddings": True}
    return {
        "llama": transformers.LlamaConfig(**tied),
        "qwen2": transformers.Qwen2Config(**{**tied, "tie_word_embeddings": False}),
        "qwen3": transformers.Qwen3Config(**tied, head_dim=8),
        "gpt2": transformers.GPT2Config(
            **common, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2,
            resid_pdrop=0.1, attn_pdrop=0.1
        ),
        "gemma": transformers.GemmaConfig(**tied, head_dim=8),
        "gemma3-window": transformers.Gemma3TextConfig(
            **tied, head_dim=8, sliding_window=8, layer_types=["sliding_attention",
                "full_attention"], query_pre_attn_scalar=8
        ),
        "gemma3-softcap": transformers.Gemma3TextConfig(
            **tied, head_dim=8, sliding_window=8, layer_types=["sliding_attention",
                "full_attention"], query_pre_attn_scalar=8,
            final_logit_softcapping=3.0,
        ),
        "mistral-window": transformers.MistralConfig(**tied, sliding_window=8, head_dim=8),
    }  # fmt: skip
