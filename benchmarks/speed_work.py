"""The work that both sides are timed on: shapes of models, conversations, and the tokenizer."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPLY = 32  # tokens of every reply, exactly
BYE = "goodbye"  # what an environment that has heard enough says last
GROUP = 8
LETTERS = "aeiou bcdfghklmnprstvwz"


@dataclass(frozen=True)
class Work:
    """One comparison.

    Attributes:
        name: of the model's shape.
        hidden, layers, heads, kv_heads, inner, vocabulary: of a Llama.
        dialogues: per step, in groups of eight.
        turns: replies of a conversation, at most.
        system: tokens of the system prompt, about.
        uneven: whether a conversation ends after a number of turns drawn from a geometric
            distribution of mean 10.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    dialogues: int = 32
    turns: int = 6
    system: int = 16
    uneven: bool = False


NANO = ("0.6 M", 128, 2, 4, 4, 512, 512)
SMALL = ("11.5 M", 320, 8, 5, 5, 896, 4096)
SMOL = ("135 M", 576, 30, 9, 3, 1536, 49152)
WORKS = {
    "A-nano": Work(*NANO),
    "A-small": Work(*SMALL),
    "B": Work(*SMALL, dialogues=16, turns=20, system=512, uneven=True),
    "C": Work(*SMOL, dialogues=16),
    "turns-5": Work(*SMALL, dialogues=8, turns=5),
    "turns-10": Work(*SMALL, dialogues=8, turns=10),
    "turns-20": Work(*SMALL, dialogues=8, turns=20),
    "turns-40": Work(*SMALL, dialogues=8, turns=40),
    "turns-80": Work(*SMALL, dialogues=8, turns=80),
}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% if m['tool_calls'] %}{% for c in m['tool_calls'] %}{{ c['function'] | tojson }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentence(seed: Any, words: int) -> str:
    """Returns words of the tokenizer's own, the same for a seed."""
    draw = random.Random(repr(seed))
    return " ".join(f"w{draw.randrange(100)}" for _ in range(words))


def system_of(work: Work) -> str:
    """Returns the system prompt."""
    return sentence("system", work.system)


def question(start: int) -> str:
    """Returns what a conversation opens with."""
    return sentence(("start", start), 8)


def answer(start: int, turn: int, reply: str) -> str:
    """Returns what the environment answers, about 20 tokens."""
    return sentence((start, turn, zlib.crc32(reply.encode()) % 16), 20)


def length(work: Work, start: int, first: str) -> int:
    """Returns how many replies a conversation has; uneven ones differ within a group too."""
    if not work.uneven:
        return work.turns
    draw = random.Random(repr((start, zlib.crc32(first.encode()))))
    turns = 1
    while turns < work.turns and draw.random() > 0.1:
        turns += 1
    return turns


def reward(replies: list[str]) -> float:
    """Returns a number that depends on every reply, so that groups have a signal."""
    return zlib.crc32("|".join(replies).encode()) % 1000 / 1000


def make(work: Work, folder: Path) -> Path:
    """Writes a model with random weights and its tokenizer, once; returns the folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    target = folder / f"model-{work.vocabulary}-{work.hidden}"
    if (target / "config.json").exists():
        return target
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [f" w{i}" for i in range(100)] + [f"w{i}" for i in range(100)] + [f" {BYE}", BYE]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(words * 50, trainer)
    draw = random.Random(0)
    missing = work.vocabulary - tokenizer.get_vocab_size()
    extra: set[str] = set()
    while len(extra) < missing:
        extra.add("<" + "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(8)) + ">")
    tokenizer.add_tokens(sorted(extra))
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=work.vocabulary, hidden_size=work.hidden, num_hidden_layers=work.layers,
            num_attention_heads=work.heads, num_key_value_heads=work.kv_heads,
            intermediate_size=work.inner, max_position_embeddings=8192, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(target)
    whole.save_pretrained(target)
    return target
