"""`dpo`: direct preference optimization over whole conversations, from comparisons, without a reward model and without play.

Rafailov et al. 2023 (arXiv:2305.18290, eq. 7), with conservative labels (Mitchell 2023, cDPO):

    h    = beta * [ log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l) ]
    loss = -[ p log sigma(h) + (1 - p) log sigma(-h) ]         p = (1 - label_smoothing) * P(w better) + label_smoothing / 2

log pi(y) sums over the agent's tokens of a conversation; what it observed is context. With `length_normalise` it is their mean. The
derivative of the loss in each conversation's log-prob is taken first, then each micro-batch is run once with its share: the gradient is
that of the whole minibatch of pairs, whatever fits into memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...engine.learning import Batch
from ...engine.policy import Policy
from ...engine.policy.learner import Learner


def dpo_loss(better: Tensor, worse: Tensor, probability: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The loss of each pair, [P].

    Args:
        better, worse: [P] log pi / pi_ref of the two conversations.
        probability: [P] how sure it is that `better` is better.
    """
    p = (1 - label_smoothing) * probability + label_smoothing / 2
    h = beta * (better - worse)
    return -(p * logsigmoid(h) + (1 - p) * logsigmoid(-h))


class DPO:
    """Args:
    lr, warmup, decay, weight_decay, max_grad_norm, micro_tokens: see `Learner`.
    beta: how closely the policy keeps to the reference.
    label_smoothing: share of every label that is replaced by 1/2.
    length_normalise: mean instead of summed log-probs.
    epochs, minibatches: passes over a batch of pairs, and optimizer steps per pass.
    """

    consumes = frozenset({"comparisons"})
    provides: frozenset[str] = frozenset()

    def __init__(
        self,
        lr: float = 1e-6,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        length_normalise: bool = False,
        epochs: int = 1,
        minibatches: int = 1,
        warmup: int = 10,
        decay: float = 1.0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        micro_tokens: int = 8192,
    ) -> None:
        if beta <= 0 or not 0 <= label_smoothing < 1:
            raise ValueError(f"beta must be positive and label_smoothing in [0, 1), got {beta} and {label_smoothing}")
        self.beta, self.label_smoothing, self.length_normalise = beta, label_smoothing, length_normalise
        self.epochs, self.minibatches = epochs, minibatches
        self._learner: dict[str, Any] = {
            "lr": lr, "warmup": warmup, "decay": decay, "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm, "micro_tokens": micro_tokens,
        }  # fmt: skip

    def setup(self, policy: Policy) -> None:
        policy.freeze_reference()
        self.learner = Learner(policy, **self._learner)

    def prepare(self, policy: Policy, batch: Batch) -> None:
        batch.reference_logprobs = policy.logprobs(batch, micro_tokens=self.learner.micro_tokens, reference=True)

    def update(self, policy: Policy, batch: Batch) -> dict[str, float]:
        pairs = batch.pairs
        assert pairs is not None
        assert batch.reference_logprobs is not None
        length = batch.mask.sum(1).clamp(min=1) if self.length_normalise else torch.ones(len(batch.episodes))
        reference = (batch.reference_logprobs * batch.mask).sum(1) / length
        norms, losses, margins, right = [], 0.0, 0.0, 0.0
        for epoch in range(self.epochs):
            for chosen in self.learner.minibatches(len(pairs.better), self.minibatches, batch.seed, epoch):
                at = torch.tensor(chosen)
                better, worse = pairs.better[at], pairs.worse[at]
                episodes = sorted({*better.tolist(), *worse.tolist()})
                ratio = (self._sums(policy, batch, episodes) / length - reference).requires_grad_()
                each = dpo_loss(ratio[better], ratio[worse], pairs.probability[at], self.beta, self.label_smoothing)
                weight = pairs.weight[at] / pairs.weight[at].sum()
                [slope] = torch.autograd.grad((each * weight).sum(), ratio)
                slope = slope / length
                for micro in self.learner.micro_batches(batch.rows, episodes):
                    out = policy.score(micro, batch.temperature, self.learner.network)
                    self.learner.backward((out.logprobs * slope[micro.episode].to(out.logprobs.device)).sum(), micro)
                norms.append(self.learner.step(batch.progress, [batch.episodes[e].id for e in episodes]))
                gap = (ratio[better] - ratio[worse]).detach()
                losses += float(each.detach().sum())
                margins += float(self.beta * gap.sum())
                right += float((gap > 0).sum())
        count = self.epochs * len(pairs.better)
        return {
            "loss": losses / count, "margin": margins / count, "accuracy": right / count,
            "grad_norm": sum(norms) / len(norms), "lr": self.learner.rate(batch.progress),
        }  # fmt: skip

    @torch.no_grad()
    def _sums(self, policy: Policy, batch: Batch, episodes: list[int]) -> Tensor:
        """Each conversation's summed log-prob, [E]; 0 for those not asked."""
        sums = torch.zeros(len(batch.episodes))
        for micro in self.learner.micro_batches(batch.rows, episodes):
            if micro.weight:
                out = policy.score(micro, batch.temperature, policy.network)
                sums.index_add_(0, micro.episode, out.logprobs.float().cpu())
        return policy.sum_over_processes(sums)

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.learner.load_state_dict(state)
