"""The part that all gradient optimizers share: AdamW with warm-up, micro-batches, clipping, and
refusal of numbers that are not finite.

An optimizer's own file holds its loss and reads top to bottom; this file holds nothing of any
algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, PolicyError
from ..records.batch import Row
from ..util.ids import derive_id
from ..util.memory import give_back_freed
from .activations import fitted, kept_bytes
from .network import Micro
from .options import LearnerOptions
from .policy import Policy
from .quantization import adamw_8bit, restored

# And what losses are scaled by: float16 has few small numbers.
HALF = {torch.bfloat16: 1.0, torch.float16: 1024.0}


class Learner:
    """An AdamW optimizer over the policy and further modules (a critic).

    Weights in half precision have a float32 copy each, which is what AdamW moves: its steps are
    smaller than the spacing of their numbers, and would be lost one by one. After a step the
    weights are the copy, rounded. The copies are part of the state.

    Args:
        policy: what is trained; None trains the modules alone, in this process alone.
        options: the rate and its course, and the size of a forward pass.
        modules: trained along with it, already on its device.
        betas: AdamW's.
    """

    def __init__(
        self,
        policy: Policy | None,
        options: LearnerOptions,
        modules: Sequence[nn.Module] = (),
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self.policy, self.options = policy, options
        if options.activation_memory is not None:
            give_back_freed()  # before anything is played
        self.network: Any = policy.wrapped() if policy is not None else None
        self.modules = (
            [policy.prepared(m) for m in modules] if policy is not None else list(modules)
        )
        own = policy.parameters() if policy is not None else []
        self._parameters = [*own, *(p for m in modules for p in m.parameters())]
        self._masters = [
            nn.Parameter(p.detach().float()) if p.dtype in HALF else p for p in self._parameters
        ]
        self._scale = max((HALF[p.dtype] for p in self._parameters if p.dtype in HALF), default=1.0)
        if options.moments == "8bit" and policy is not None and policy.is_sharded:
            raise PolicyError(
                "moments in 8 bits cannot be divided among processes: leave out `moments: 8bit`, or"
                " `shard` of the policy"
            )
        make = adamw_8bit if options.moments == "8bit" else torch.optim.AdamW
        self.adam: Any = make(
            self._masters, lr=options.lr, weight_decay=options.weight_decay, betas=betas
        )
        self.steps = 0
        self.rate = 0.0  # of the last step

    def minibatches(self, size: int, parts: int, seed: int, epoch: int = 0) -> Iterator[list[int]]:
        """Divides `size` items into `parts` at random, keyed by the seed and the epoch."""
        generator = torch.Generator().manual_seed(
            int(derive_id("minibatch", seed, epoch), 16) % 2**63
        )
        order = torch.randperm(size, generator=generator).tolist()
        parts = min(parts, size)
        for i in range(parts):
            yield order[i * size // parts : (i + 1) * size // parts]

    def micro_batches(self, rows: Sequence[Row], episodes: Sequence[int]) -> list[Micro]:
        """Returns this process's micro-batches of the rows of some episodes."""
        chosen = set(episodes)
        wanted = [row for row in rows if row.episode in chosen and row.positions]
        assert self.policy is not None
        tokens, room = self.options.micro_tokens, self.options.activation_memory
        again = False
        if room is not None and wanted:
            longest = max(len(row.ids) for row in wanted)
            tokens, again = fitted(self._kept, room * 2**30, tokens, longest)
        return self.policy.my_share(self.policy.micro_batches(wanted, tokens, again))

    @cached_property
    def _kept(self) -> tuple[float, float]:
        assert self.policy is not None
        with self.policy.autocast(), self.policy.whole():
            return kept_bytes(self.policy.model)

    def backward(self, loss: Tensor, micro: Micro) -> None:
        """Adds the gradient of a share of a loss.

        The shares of all micro-batches of all processes add up to it.
        """
        assert self.policy is not None
        accelerator = self.policy.accelerator
        # DDP and FSDP average over processes.
        accelerator.backward(loss * micro.weight * accelerator.num_processes * self._scale)
        self.policy.meanwhile()

    def discard(self) -> None:
        """Forgets the gradient that was added up."""
        for parameter in (*self._parameters, *self._masters):
            parameter.grad = None

    def step(self, progress: float, what: Sequence[str]) -> float:
        """Clips, checks and applies the gradient; returns its norm before clipping.

        Args:
            progress: share of the stage done, for the schedule.
            what: the names of what the gradient is of, for the message.

        Raises:
            NonFiniteError: the gradient is NaN or infinite; the step is not taken.
        """
        from .sharding import full

        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
            if self._scale != 1.0 and master.grad is not None:
                master.grad /= self._scale
        norm = torch.nn.utils.clip_grad_norm_(self._masters, self.options.max_grad_norm)
        norm = full(norm)
        if not bool(torch.isfinite(norm)):
            self.discard()
            overflow = (
                "load the policy in bfloat16 instead of float16, " if self._scale != 1.0 else ""
            )
            raise NonFiniteError(
                f"the gradient is not finite (norm {float(norm)}) at optimizer step"
                f" {self.steps + 1}, in a minibatch of {len(what)} episodes:"
                f" {', '.join(what[:5])}{', ...' if len(what) > 5 else ''}. Go back to the last"
                f" checkpoint; {overflow}lower lr or max_grad_norm, and look at these episodes'"
                " rewards."
            )
        self.rate = self._rate(progress)
        for group in self.adam.param_groups:
            group["lr"] = self.rate
        self.adam.step()
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        self.discard()
        self.steps += 1
        return float(norm)

    @torch.no_grad()
    def put(self, parameter: Tensor, value: Tensor) -> None:
        """Puts a saved value into a parameter: this process's share of it, where it holds one."""
        from .sharding import share

        parameter.copy_(share(value, parameter))

    def metrics(self, norms: Sequence[float]) -> dict[str, float]:
        """Returns an update's metrics from the norms of its steps' gradients: how many they were,
        the mean norm, the last one's rate."""
        metrics = {"grad_norm": sum(norms) / len(norms), "lr": self.rate} if norms else {}
        return {"steps": float(len(norms)), **metrics}

    def _rate(self, progress: float) -> float:
        """Returns the learning rate of the next step."""
        lr, warmup, decay = self.options.lr, self.options.warmup, self.options.decay
        warm = min(1.0, (self.steps + 1) / warmup) if warmup else 1.0
        return lr * warm * (1 - (1 - decay) * progress)

    def state_dict(self) -> dict[str, Any]:
        """Returns Adam's moments, the step count and float32 copies of weights, as flat tensors and
        numbers."""
        state: dict[str, Any] = {"steps": self.steps}
        for i, (parameter, master) in enumerate(zip(self._parameters, self._masters, strict=True)):
            if master is not parameter:
                state[f"master.{i}"] = master.detach()
            for name, value in self.adam.state.get(master, {}).items():
                kept = torch.as_tensor(value)
                # Moments in 8 bits share their tables, and a file holds no tensor twice.
                state[f"adam.{i}.{name}"] = kept.clone() if name.startswith("qmap") else kept
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        from .sharding import share

        self.steps = int(state["steps"])
        for i, master in enumerate(self._masters):
            if f"master.{i}" in state:
                self.put(master, state[f"master.{i}"])
            own = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"adam.{i}.")}
            if own and self.options.moments == "8bit":
                self.adam.state[master] = restored(own, master.device)
            elif own:
                self.adam.state[master] = {
                    name: value.clone()
                    if name == "step"
                    else share(value.clone().to(master.device, master.dtype), master)
                    for name, value in own.items()
                }


class Sums:
    """Metrics summed over tokens, divided once at the end, over all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}

    def add(self, micro: Micro, **values: Tensor) -> None:
        """Adds the values of a micro-batch's tokens to the sums of their names."""
        for name, value in values.items():
            self._sums[name] = (
                self._sums.get(name, 0.0) + float(value.detach().sum()) * micro.weight
            )

    def means(self, policy: Policy, count: float) -> dict[str, float]:
        """Returns the sums over all processes, divided by a count."""
        names = sorted(self._sums)
        total = policy.sum_over_processes(
            torch.tensor([self._sums[name] for name in names], dtype=torch.float64)
        )
        return {
            name: float(value) / max(count, 1.0) for name, value in zip(names, total, strict=True)
        }
