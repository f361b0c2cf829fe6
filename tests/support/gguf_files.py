"""Writes GGUF files as llama.cpp's converter does, for small Llamas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns the rows of queries or keys in llama.cpp's order of rotary halves."""
    size = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, size, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: Any, tokenizer: Any, path: Path) -> None:
    """Writes a Llama with tied embeddings, its weights as they are."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("a small model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens) | {t["content"] for t in data["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        value, parts = tensor.detach().float(), name.split(".")
        if name == "lm_head.weight":
            continue
        if parts[1] != "layers":
            own = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]]
        else:
            part = ".".join(parts[3:-1])
            own = f"blk.{parts[2]}.{NAMES[part]}"
            if part.endswith("q_proj"):
                value = permuted(value, config.num_attention_heads)
            elif part.endswith("k_proj"):
                value = permuted(value, config.num_key_value_heads)
        writer.add_tensor(f"{own}.weight", np.ascontiguousarray(value.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
