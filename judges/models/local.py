"""The model `local:FOLDER`: a transformers model in this process, free of charge.

Its answer is bound to the schema while it is made: a grammar (llguidance) leaves only tokens that
can continue a valid answer. What is judged is tokenized so that it cannot become a control token of
the model's chat template.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ...learning import located
from ...protocols import PluginError
from ...tools import derive_id, install
from .model import Model, ModelError, Prompt, Reply, Token, Usage


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A model in memory, its tokenizer in three forms, and the turn to use it: two answers at once
    would share the same cores."""

    model: Any
    tokenizer: Any
    chat: Any
    grammar: Any
    turn: threading.Lock = field(default_factory=threading.Lock)


_LOADED: WeakValueDictionary[Any, _Loaded] = WeakValueDictionary()


class Local(Model):
    """A transformers model in this process.

    Args:
        model: a folder, hub name or short name of a causal model with a chat template.
        dtype: as transformers takes it.
        device: default: the GPU where there is one.
        temperature: 0 takes the likeliest token.
    """

    at_once = 1

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: str | None = None,
        temperature: float = 0.0,
    ) -> None:
        self.name = f"local:{model}"
        model = str(located(model))
        self.settings = {
            "dtype": dtype,
            "temperature": temperature,
            "weights": _fingerprint(Path(model)),
        }
        if importlib.util.find_spec("llguidance") is None:
            raise PluginError(f"a local judge needs llguidance: {install('judges')}")
        self._where, self._dtype, self._device, self._temperature = (
            model,
            dtype,
            device,
            temperature,
        )
        self._loaded: _Loaded | None = None

    async def ask(self, prompt: Prompt) -> Reply:
        """Generates the answer in a thread, which ends early when it is not waited for any more."""
        gone = threading.Event()
        try:
            return await asyncio.to_thread(self._answer, prompt, gone)
        finally:
            gone.set()  # a thread cannot be cancelled: it looks for itself

    def _load(self) -> _Loaded:
        """Returns the model, which all judges that ask it share."""
        from ...learning import LOADING

        key = (self._where, self._dtype, self._device, self.settings["weights"])
        with LOADING:
            if (found := _LOADED.get(key)) is None:
                found = _LOADED[key] = self._read()
        return found

    def _read(self) -> _Loaded:
        import llguidance.hf
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ...learning import ChatFormat

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self._where, trust_remote_code=False)
            model: Any = AutoModelForCausalLM.from_pretrained(
                self._where, dtype=self._dtype, use_safetensors=True, trust_remote_code=False
            )
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ModelError(
                "account",
                f"{self.name} brings code of its own, which a local judge does not run"
                " (trust_remote_code=False): serve it where you trust it, and ask it by"
                " `openai-chat` and its `url`",
            ) from error
        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        chat = ChatFormat(tokenizer)
        grammar = llguidance.hf.from_tokenizer(
            tokenizer, n_vocab=model.config.vocab_size, eos_token=chat.end_id
        )
        return _Loaded(model.to(device).eval(), tokenizer, chat, grammar)

    def _answer(self, prompt: Prompt, gone: threading.Event) -> Reply:
        if self._loaded is None:
            self._loaded = self._load()
        with self._loaded.turn:
            return self._generated(self._loaded, prompt, gone)

    def _generated(self, loaded: _Loaded, prompt: Prompt, gone: threading.Event) -> Reply:
        import torch

        from ...learning import context_length
        from ...protocols import Message

        model, tokenizer, chat = loaded.model, loaded.tokenizer, loaded.chat
        ids = chat.prompt([Message("system", prompt.system), Message("user", prompt.user)])
        room = context_length(model.config) - len(ids)
        if room < 16:
            raise ModelError(
                "request",
                f"the question has {len(ids)} tokens, too many for the context of {self.name}",
            )
        bound = Bound(loaded.grammar, prompt.bound, len(ids), gone)
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids], device=model.device),
                max_new_tokens=min(prompt.max_tokens, room), logits_processor=[bound],
                eos_token_id=chat.end_id, pad_token_id=chat.end_id, do_sample=self._temperature > 0,
                temperature=self._temperature or None, top_k=None, top_p=None,
                output_scores=prompt.top_logprobs > 0, return_dict_in_generate=True,
            )  # fmt: skip
        generated = out.sequences[0, len(ids) :].tolist()
        ended = bool(generated) and generated[-1] == chat.end_id
        text = tokenizer.decode(generated[:-1] if ended else generated)
        tokens = []
        # Of what the grammar left.
        for id_, scores in zip(generated[: len(generated) - ended], out.scores or (), strict=False):
            best = torch.log_softmax(scores[0].float(), -1).topk(
                min(prompt.top_logprobs, scores.shape[-1])
            )
            found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            tokens.append(
                Token(
                    tokenizer.decode([id_]),
                    {tokenizer.decode([i]): p for i, p in found if math.isfinite(p)},
                )
            )
        usage = Usage(fresh=len(ids), output=len(generated))
        return Reply(
            "end" if ended else "length",
            text,
            usage,
            "" if ended else "max_tokens",
            self.name,
            tokens=tokens,
        )


def _fingerprint(folder: Path) -> str:
    """Returns a mark of a folder's weights that differs from that of earlier weights there; empty
    for a hub's name, which does not change."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return (
        derive_id([[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files])
        if files
        else ""
    )


class Bound:
    """A logits processor that leaves only tokens that can continue a valid answer.

    Args:
        grammar: llguidance's tokenizer.
        read: how many ids the model has read before its answer.
        gone: set once the answer is not waited for any more.
    """

    def __init__(
        self, grammar: Any, schema: Mapping[str, Any], read: int, gone: threading.Event
    ) -> None:
        import llguidance

        self._matcher = llguidance.LLMatcher(
            grammar,
            llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), defaults={"whitespace_flexible": False}
            ),
        )
        if self._matcher.get_error():
            raise ModelError(
                "request", f"the schema cannot be made a grammar: {self._matcher.get_error()}"
            )
        self._read, self._gone = read, gone

    def __call__(self, ids: Any, logits: Any) -> Any:
        """Returns the logits with the tokens that the grammar does not allow at minus infinity."""
        import numpy as np
        import torch

        if self._gone.is_set():
            raise ModelError("timeout", "this answer is not waited for any more")
        new = ids[0, self._read :].tolist()
        if new:
            self._matcher.consume_tokens(new[-1:])
        mask = np.unpackbits(
            np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little"
        )[: logits.shape[-1]]
        allowed = torch.from_numpy(mask).to(logits.device).bool()
        return logits.masked_fill(~allowed, float("-inf"))
