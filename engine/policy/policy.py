"""The policy: any transformers causal language model with a chat template.

Log-probs are computed for action tokens only: hidden states are gathered at the positions that
predict them, and the head is applied to those in chunks, so a tensor [batch, length, vocabulary]
never exists.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PolicyError, UnfitModel
from ..records.batch import Batch, Row
from ..records.episode import Message
from ..records.sampling import Conversation, Sampling
from ..util.files import read_note, write
from .activations import layers
from .chat import ChatFormat
from .in_process import InProcess
from .known import located
from .loading import (
    ADAPTER_FILES,
    connected,
    found_device,
    load,
    on_device,
    savable,
    template_of,
    with_adapters,
)
from .network import Micro, Network, Output, divide, micro_batch
from .properties import context_length, fingerprint, is_adapted, setting
from .weights import adapters_of, check_alike, merged, read_weights

NOTE = "turnwise.json"  # what a saved policy's folder says of it besides


class Policy:
    """A language model that replies to conversations and says how likely a reply was.

    It is made by `Policy.from_pretrained`.

    Attributes:
        model: the transformers model (its LoRA adapters inside, if any).
        tokenizer, chat: the tokenizer, and how it renders conversations.
        version: updates made so far, by earlier runs too where it was saved by one.
        lineage: what the model that all of them began with is known by.
        gguf: the GGUF file that it was loaded from; None: from none.
        card: makes the README.md of what is saved, given whether that is adapters alone; None: it
            has none. A run that ends sets it.
        meanwhile: called after each backward pass: what should not wait until an update is made.
    """

    def __init__(self, model: Any, tokenizer: Any, *, precision: str = "no") -> None:
        self.tokenizer = tokenizer
        self.version = 0
        self.lineage = fingerprint(model)
        self.gguf: str | None = None
        self.card: Callable[[bool], str] | None = None
        self.meanwhile: Callable[[], None] = lambda: None
        if precision not in ("no", "bf16"):
            raise PolicyError(f"precision must be 'no' or 'bf16', got {precision!r}")
        self.precision = precision
        self._reference: Network | None = None
        self._reference_weights: list[Tensor] | None = None
        self._outline: Network | None = None  # without weights, once they are divided
        self._wrapped: Any = None
        # Dropout would make the log-probs of an update differ from the sampler's; LoRA's too.
        model.eval()
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > vocabulary:
            raise PolicyError(
                f"the tokenizer has {len(tokenizer)} tokens but the model embeds {vocabulary}: they"
                " do not belong together, or the model's embeddings must be resized first"
                " (model.resize_token_embeddings)"
            )
        try:
            self.network = Network(model, set(tokenizer.get_vocab().values()))
        except UnfitModel as error:
            raise PolicyError(str(error)) from error
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        stops = eos if isinstance(eos, list) else [eos]
        self.chat = ChatFormat(
            tokenizer, stop_ids=[i for i in stops if i is not None and i < vocabulary]
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        gguf: str | None = None,
        lora: Mapping[str, Any] | None = None,
        quantize: str | None = None,
        dtype: str = "float32",
        precision: str = "no",
        device: str | None = None,
        attention: str = "sdpa",
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> Policy:
        """Loads a model and its tokenizer from a local folder or by hub name; a folder with LoRA
        adapters is loaded with them.

        Args:
            name: folder or hub name, or one of `turnwise model get`.
            gguf: a GGUF file in it, whose weights are made plain; saving writes safetensors.
            lora: options of `peft.LoraConfig` (`{"r": 16, "lora_alpha": 32}`) to train adapters
                instead of all weights.
            quantize: "nf4" or "int8": weights in 4 or 8 bits, on which adapters are trained.
            dtype: of the weights: "float32", "bfloat16", "float16" or "auto" (as saved). Weights in
                half precision are trained through a float32 copy, see `Learner`.
            precision: "no", or "bf16" to compute in bfloat16 over float32 weights.
            device: "cpu", "cuda", "mps"; default: what accelerate finds.
            attention: transformers' attention implementation: "sdpa", "eager" or
                "flash_attention_2".
            chat_template: a Jinja template instead of the tokenizer's; "chatml" is
                `turnwise.CHATML`, for base models.
            trust_remote_code: run the Python files that come with the model; without it a model
                that needs them is refused.

        Raises:
            PolicyError: no such model, weights that are not safetensors, peft or bitsandbytes
                missing, quantized weights without adapters, tokenizer and model that do not fit.
            TemplateError: no chat template, or one that cannot carry a conversation.
        """
        file = Path(located(name)) / NOTE
        note = read_note(file) if file.is_file() else {}
        gguf = gguf or note.get("gguf")  # that adapters were trained on
        device = found_device(device)
        model, tokenizer = load(
            name, gguf=gguf, quantize=quantize, dtype=dtype, device=device, attention=attention,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if chat_template is not None:
            tokenizer.chat_template = template_of(chat_template)
        model = with_adapters(model, Path(name), lora)
        packed = quantize or setting(model.config, "quantization_config")
        if not packed:
            model = on_device(model, device)
        elif not is_adapted(model):
            raise PolicyError(
                f"{'quantized weights' if quantize is None else f'weights in {quantize}'} stand"
                " still, and only adapters on them can be trained: say which, as in `policy:"
                " {model: ..., lora: {r: 16}}`"
            )
        policy = cls(model, tokenizer, precision=precision)
        policy.gguf = gguf
        if note:
            policy.version, policy.lineage = int(note["version"]), str(note["lineage"])
        return policy

    def __repr__(self) -> str:
        kind, count = type(self.model).__name__, sum(p.numel() for p in self.model.parameters())
        return f"<Policy {kind}, {count:,} parameters on {self.device}, version {self.version}>"

    @property
    def model(self) -> Any:
        """The transformers model, with any LoRA layers in place."""
        return self.network.lm

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @cached_property
    def context_length(self) -> int:
        """The most tokens the model may read; fewer where what samples its replies reads fewer."""
        return context_length(self.model.config.get_text_config())

    @property
    def hidden_size(self) -> int:
        """The size of hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    def parameters(self) -> list[nn.Parameter]:
        """Returns what is trained: the adapters with LoRA, else everything."""
        return [p for p in self.network.parameters() if p.requires_grad]

    @cached_property
    def accelerator(self) -> Any:
        """The accelerator that connects the processes that train together."""
        return connected(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context that sets the precision of passes, in sampling and training alike."""
        if self.precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def shard(self) -> None:
        """Divides the weights among the processes that train together, in place: each holds its
        share of them, of their gradients and of the optimizer's moments (FSDP2). One process alone
        has nothing to divide.

        Raises:
            PolicyError: weights in 4 or 8 bits, which cannot be divided.
        """
        if setting(self.model.config, "quantization_config") is not None:
            raise PolicyError(
                "quantized weights cannot be divided among processes: leave out `shard`, so that"
                " each process has them, or `quantize`"
            )
        if self.accelerator.num_processes > 1 and not self.is_sharded:
            from .sharding import outline

            self._outline = outline(self.network)
            self.prepared(self.network)
            with torch.no_grad():  # FSDP's first pass must be one of all of it
                self.score(micro_batch([Row((0, 0), 0, (1,), (0,))], self.device))

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a share of the weights."""
        return self._outline is not None

    @property
    def saves(self) -> bool:
        """Whether this process takes part in `save_pretrained`: the main one, which writes, and all
        where each holds a share of the weights."""
        return self.is_sharded or self.accelerator.is_main_process

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which this process has all weights, to sample with; all processes
        enter it together. Only weights that are divided are gathered for it."""
        if not self.is_sharded:
            return contextlib.nullcontext()
        from .sharding import whole

        return whole(self.network)

    def copied_network(self) -> Network:
        """Returns a copy of the network, whole in this process; all processes call this
        together."""
        if self._outline is None:
            return copy.deepcopy(self.network)
        from .sharding import filled

        return filled(self._outline, self.network)

    def wrapped(self) -> Any:
        """Returns the network as it is trained (DDP with several processes)."""
        if self._wrapped is None:
            self._wrapped = self.network if self.is_sharded else self.prepared(self.network)
        return self._wrapped

    def prepared(self, module: nn.Module) -> Any:
        """Returns a module as it is trained along with the policy: divided as its weights are, or
        DDP with several processes, or itself."""
        if not self.is_sharded:
            return self.accelerator.prepare_model(module)
        from .sharding import shard

        shard(module, layers(module), self.device)
        return module

    def micro_batches(
        self, rows: Sequence[Row], tokens: int, recompute: bool = False
    ) -> list[Micro]:
        """Divides rows into micro-batches, see `divide`. How rows are divided never changes a sum
        over action tokens beyond rounding.

        Args:
            recompute: layers are computed again for the gradient. Nothing is shared then: what
                stands in a cache would be put there twice.
        """
        shares = self.network.can_share and not recompute and not self.is_sharded
        if self.is_sharded and not self.network.head_is_plain:
            tokens = 1  # it passes row by row, and each process must make as many passes
        found = divide(rows, tokens, self.device, shares)
        return [dataclasses.replace(micro, recompute=recompute) for micro in found]

    def score(self, micro: Micro, temperature: float = 1.0, network: Any = None) -> Output:
        """Returns a micro-batch's log-probs, those of logits / temperature, at its action tokens,
        with gradient where enabled."""
        run = network if network is not None else self.wrapped()
        with self.autocast():
            return run(
                micro.ids, micro.row, micro.position, micro.target, micro.ends, temperature,
                micro.shared, micro.recompute,
            )  # fmt: skip

    @torch.no_grad()
    def logprobs(
        self, batch: Batch, *, micro_tokens: int = 8192, reference: bool = False
    ) -> Tensor:
        """Returns the log-probs of every action token, [E, A] float32 on the CPU, 0 at padding; of
        the reference policy if asked."""
        result = torch.zeros(batch.mask.shape)
        with self.reference() if reference else contextlib.nullcontext(self.network) as network:
            for micro in self.my_share(self.micro_batches(batch.rows, micro_tokens)):
                out = self.score(micro, batch.temperature, network)
                if micro.weight:
                    result[micro.episode, micro.action] = out.logprobs.float().cpu()
        return self.sum_over_processes(result)

    def my_share(self, micros: Sequence[Micro]) -> list[Micro]:
        """Returns this process's micro-batches: as many for each, the last ones repeated with
        weight 0 where they do not divide."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        rounds = -(-len(micros) // world)
        share = []
        for i in range(rounds):
            at = i * world + rank
            share.append(
                micros[at] if at < len(micros) else dataclasses.replace(micros[-1], weight=0.0)
            )
        return share

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over all processes."""
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.accelerator.device), "sum").to(tensor.device)

    # The reference: the policy as it was when an optimizer that needs one was set up.

    def freeze_reference(self) -> None:
        """Keeps the present weights as the reference: a copy of the model; with LoRA of the
        adapters alone, and of this process's share where weights are divided."""
        if self.is_lora or self.is_sharded:
            self._reference_weights = [p.detach().clone() for p in self.parameters()]
        else:
            self._reference = copy.deepcopy(self.network).requires_grad_(False)

    @property
    def is_lora(self) -> bool:
        """Whether LoRA adapters are trained instead of all weights."""
        return is_adapted(self.network.model)

    @contextlib.contextmanager
    def reference(self) -> Iterator[Network]:
        """Provides the reference network, for use within the context.

        Raises:
            PolicyError: `freeze_reference` was never called.
        """
        if self._reference is not None:
            yield self._reference
        elif self._reference_weights is not None:
            present = [p.detach().clone() for p in self.parameters()]
            self._put(self._reference_weights)
            try:
                yield self.network
            finally:
                self._put(present)
        else:
            raise PolicyError(
                "the policy has no reference: call policy.freeze_reference() before it is trained"
            )

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)

    # Talking and saving.

    def reply(
        self,
        messages: str | Sequence[Message] | Sequence[Mapping[str, str]],
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> str:
        """Samples one reply to a user's message, or to a conversation given as messages (or dicts
        with role and content)."""
        turns = [Message("user", messages)] if isinstance(messages, str) else messages
        given = [m if isinstance(m, Message) else Message(**m) for m in turns]  # type: ignore[arg-type]
        conversation = Conversation(0, self.chat.prompt(given), given, seed)
        sampling, backend = Sampling(temperature, max_new_tokens), self._talker
        with self.whole():
            backend.refresh()  # gathered weights do not show that they have changed
            [(_, sample)] = backend.reply([conversation], sampling)
        return self.chat.text(sample.ids)

    @cached_property
    def _talker(self) -> InProcess:
        return InProcess(self, rows=1)

    def save_pretrained(self, folder: str | Path, *, merge: bool = False) -> None:
        """Writes model and tokenizer so that `from_pretrained` (ours and transformers') reads them
        back. Where weights are divided all processes call this together, and the main one writes.

        Args:
            merge: fold LoRA adapters into the weights and save a plain model; else only the
                adapters are saved. A plain model takes the place of adapters in the folder.

        Raises:
            PolicyError: adapters, into a folder that holds a whole model.
        """
        folder, plain = Path(folder), merge or not self.is_lora
        if not plain and (folder / "config.json").exists():
            raise PolicyError(
                f"{folder} holds a whole model: save adapters into a folder of their own"
            )
        network = self.network
        if self._outline is not None:
            from .sharding import filled

            main = self.accelerator.is_main_process
            network = filled(self._outline, self.network, "cpu", keep=main)
            if not main:
                return
        model: Any = merged(network) if plain and self.is_lora else network.model
        for each in (self.model, model):  # where generate() and servers look for what ends a reply
            if each.generation_config is not None:
                savable(each.generation_config).eos_token_id = sorted(self.chat.stop_ids)
        model.save_pretrained(str(folder))
        for name in ADAPTER_FILES if plain else ("README.md",):  # would be loaded; peft's, not ours
            (folder / name).unlink(missing_ok=True)
        if not plain and self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))
        gguf = None if plain else self.gguf
        note = {"version": self.version, "lineage": self.lineage, "gguf": gguf}
        write(folder / NOTE, json.dumps(note) + "\n")
        if self.card is not None:
            (folder / "README.md").write_text(self.card(not plain), encoding="utf-8")

    @torch.no_grad()
    def load_weights(self, folder: str | Path) -> None:
        """Loads the weights that `save_pretrained` wrote (adapters with LoRA) into this policy, in
        place.

        Raises:
            PolicyError: they are of another model; nothing was changed.
        """
        own = adapters_of(self.network) if self.is_lora else dict(self.model.named_parameters())
        found = read_weights(folder, self.network)
        check_alike(found, own, folder)
        from .sharding import share

        for name, parameter in own.items():
            parameter.copy_(share(found[name], parameter))
