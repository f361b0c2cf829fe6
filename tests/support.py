"""What several tests use: small configurations, an echoing environment, and playing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import gymnasium
import torch
import transformers
import turnwise
from turnwise.engine.policy.in_process import InProcess
from turnwise.engine.records.batch import Batch, Credit

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
    """One small configuration per architecture; the windows are shorter than the conversations of
    the tests."""
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


ECHO = "test/Echo-v0"


class Echo(gymnasium.Env):
    """Says a number of words, of uneven length; pays for the letter "e" at the end; lasts `turns`
    turns."""

    observation_space = action_space = turnwise.Text(100_000)

    def __init__(self, turns: int = 3, cut: bool = False) -> None:
        self.turns, self.cut = turns, cut

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = self.turns
        return self._say(), {"system": "tell me more"}

    def _say(self) -> str:
        words = WORDS.split()
        return " ".join(
            words[int(i)]
            for i in self.np_random.integers(len(words), size=int(self.np_random.integers(1, 9)))
        )

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        done = self.left == 0
        reward = action.count("e") / (1 + len(action)) if done else 0.0
        return (
            self._say(),
            reward,
            done and not self.cut,
            done and self.cut,
            {"success": reward > 0.05},
        )


gymnasium.register(ECHO, Echo)


def play(
    policy: turnwise.Policy,
    count: int = 6,
    *,
    update: int = 1,
    group: int = 1,
    tokens: int = 12,
    history: Any = "append",
    rows: int = 4,
    temperature: float = 1.0,
    **env: Any,
) -> list[turnwise.Episode]:
    """Episodes of the echo environment, with conversations of uneven length."""
    player = turnwise.PolicyPlayer(
        policy, turnwise.Sampling(temperature, tokens), InProcess(policy, rows=rows), history
    )
    chosen = [
        (s, slot) for s in turnwise.starts(ECHO, 7, count, kwargs=env) for slot in range(group)
    ]
    return turnwise.rollout(player, chosen, turnwise.Where("test", "rl", update, 3))


def select(batch: Batch, keep: Sequence[int]) -> Batch:
    """The batch of some of its episodes only; groups keep their indices' order but are numbered
    anew."""
    place = {e: i for i, e in enumerate(keep)}
    index = torch.tensor(list(keep))
    size = len(batch.episodes)

    def part(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == size:
            return value[index]
        if isinstance(value, Credit):
            return Credit(
                part(value.advantages), part(value.value_targets), part(value.turn_credit)
            )
        return value

    fields = {f.name: part(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
    fields |= {
        "episodes": tuple(batch.episodes[e] for e in keep),
        "rows": tuple(
            dataclasses.replace(r, episode=place[r.episode])
            for r in batch.rows
            if r.episode in place
        ),
        "group": torch.unique(batch.group[index], return_inverse=True)[1],
        "extras": {k: part(v) for k, v in batch.extras.items()},
        "pairs": None,
    }
    return Batch(**fields)
