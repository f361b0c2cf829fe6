"""The optimizer `dpo`: direct preference optimization over whole conversations or single turns,
from comparisons, without a reward model and without play.

With h = log pi/pi_ref of the better conversation less that of the worse, and p the probability that
the better one is better:

    "sigmoid"   -[ p log sigma(beta h) + (1 - p) log sigma(-beta h) ]   Rafailov et al. 2023
                (arXiv:2305.18290, eq. 7); soft p: Mitchell 2023 (cDPO)
    "ipo"       p (h - 1/(2 beta))^2 + (1 - p) (h + 1/(2 beta))^2   Azar et al. 2023
                (arXiv:2310.12036, eq. 17)
    "hinge"     p max(0, 1 - beta h) + (1 - p) max(0, 1 + beta h)   Zhao et al. 2023 (SLiC-HF,
                arXiv:2305.10425)

    p = (1 - label_smoothing) * P(better is better) + label_smoothing / 2

log pi sums over the agent's tokens; what it observed is context. With `length_normalise` it is
their mean (the papers sum; trl takes the mean for ipo, and only there). With `unit: turn` only the
first turn in which the two conversations differ counts: both were asked the same, and what came
later was another conversation. Pairs without such a turn are left out and counted.

The derivative of the loss in each turn's log-prob is taken first, then each micro-batch is run once
with its share: the gradient is that of the whole minibatch of pairs, whatever fits into memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from ...learning import Batch, Learner, PassOptions, Policy, turn_sums
from ...protocols import Episode, Optimizer

Form = Literal["sigmoid", "ipo", "hinge"]


def dpo_loss(
    better: Tensor,
    worse: Tensor,
    probability: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    form: Form = "sigmoid",
) -> Tensor:
    """Returns the loss of each pair, [P].

    Args:
        better, worse: [P] log pi / pi_ref of the two conversations.
        probability: [P] how sure it is that `better` is better.
        beta: how much log-ratios weigh; for "ipo", half the inverse of the margin aimed at.
        label_smoothing: 0 to 1: how far `probability` is drawn towards 1/2.
        form: "sigmoid", "ipo" or "hinge".

    Raises:
        ValueError: an unknown form.
    """
    p = (1 - label_smoothing) * probability + label_smoothing / 2
    h = better - worse
    if form == "sigmoid":
        return -(p * logsigmoid(beta * h) + (1 - p) * logsigmoid(-beta * h))
    if form == "ipo":
        return p * (h - 1 / (2 * beta)) ** 2 + (1 - p) * (h + 1 / (2 * beta)) ** 2
    if form == "hinge":
        return p * relu(1 - beta * h) + (1 - p) * relu(1 + beta * h)
    raise ValueError(f"unknown form {form!r}; there are 'sigmoid', 'ipo' and 'hinge'")


def parting(one: Episode, other: Episode) -> int | None:
    """Returns the first turn in which two conversations reply differently to the same words; None
    if their observations differ first."""
    for k, (a, b) in enumerate(zip(one.turns, other.turns, strict=False)):
        if a.observation != b.observation:
            return None
        if a.action != b.action:
            return k
    return None


class DPO(PassOptions, Optimizer):
    """Direct preference optimization on pairs of conversations.

    Attributes:
        beta: how closely the policy keeps to the reference.
        loss: "sigmoid", "ipo" or "hinge".
        unit: "conversation", or "turn": from the turn on in which two conversations part.
        label_smoothing: share of every label that is replaced by 1/2.
        length_normalise: mean instead of summed log-probs.
    """

    consumes: ClassVar = frozenset({"comparisons"})

    beta: float = Field(default=0.1, gt=0)
    loss: Form = "sigmoid"
    unit: Literal["conversation", "turn"] = "conversation"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    length_normalise: bool = False

    _learner: Learner

    def setup(self, policy: Policy) -> None:
        """Freezes the reference and makes the learner."""
        policy.freeze_reference()
        self._learner = Learner(policy, self)

    def prepare(self, policy: Policy, batch: Batch) -> None:
        """Computes the reference's log-probs of the batch."""
        batch.reference_logprobs = policy.logprobs(
            batch, micro_tokens=self.micro_tokens, reference=True
        )

    def update(self, policy: Policy, batch: Batch) -> dict[str, float]:
        """Trains on the batch's pairs, in `epochs` passes; returns the metrics."""
        pairs = batch.pairs
        assert pairs is not None
        assert batch.reference_logprobs is not None
        reference, length = turn_sums(
            batch.reference_logprobs, batch.turn, batch.mask, batch.turn_mask.shape[1]
        )
        better_share, worse_share, kept = self._shares(batch, length)
        usable, kept = len(kept), [p for p in kept if pairs.weight[p] > 0]
        norms, losses, margins, right, count = [], 0.0, 0.0, 0.0, 0
        for epoch in range(self.epochs):
            for chosen in self._learner.minibatches(len(kept), self.minibatches, batch.seed, epoch):
                at = torch.tensor([kept[i] for i in chosen])
                better, worse = pairs.better[at], pairs.worse[at]
                episodes = sorted({*better.tolist(), *worse.tolist()})
                mine = replace(batch, rows=tuple(r for r in batch.rows if r.episode in episodes))
                now = policy.logprobs(mine, micro_tokens=self.micro_tokens)
                ratio = (
                    turn_sums(now, batch.turn, batch.mask, batch.turn_mask.shape[1])[0] - reference
                ).requires_grad_()
                first = (ratio[better] * better_share[at]).sum(1)
                second = (ratio[worse] * worse_share[at]).sum(1)
                each = dpo_loss(
                    first, second, pairs.probability[at], self.beta, self.label_smoothing, self.loss
                )
                weight = pairs.weight[at] / pairs.weight[at].sum()
                [slope] = torch.autograd.grad((each * weight).sum(), ratio)
                for micro in self._learner.micro_batches(batch.rows, episodes):
                    out = policy.score(micro, batch.temperature, self._learner.network)
                    own = slope[micro.episode, batch.turn[micro.episode, micro.action]].to(
                        out.logprobs.device
                    )
                    self._learner.backward((out.logprobs * own).sum(), micro)
                norms.append(
                    self._learner.step(batch.progress, [batch.episodes[e].id for e in episodes])
                )
                gap = (first - second).detach()
                losses += float(each.detach().sum())
                margins += float(self.beta * gap.sum())
                right += float((gap > 0).sum())
                count += len(chosen)
        means = (
            {"loss": losses / count, "margin": margins / count, "accuracy": right / count}
            if count
            else {}
        )
        return {
            **means,
            **self._learner.metrics(norms),
            "pairs_without_turn": float(len(pairs.better) - usable),
        }

    def _shares(self, batch: Batch, length: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Returns how much each turn of the better and of the worse conversation counts in a pair,
        [P, K] each, and the pairs that can train."""
        assert batch.pairs is not None
        better_share = torch.zeros(len(batch.pairs.better), length.shape[1])
        worse_share, kept = torch.zeros_like(better_share), []
        for p, (b, w) in enumerate(
            zip(batch.pairs.better.tolist(), batch.pairs.worse.tolist(), strict=True)
        ):
            turn = parting(batch.episodes[b], batch.episodes[w]) if self.unit == "turn" else None
            if self.unit == "turn" and turn is None:
                continue
            kept.append(p)
            for share, e in ((better_share, b), (worse_share, w)):
                which = slice(None) if turn is None else slice(turn, turn + 1)
                share[p, which] = (
                    1.0 / float(length[e, which].sum().clamp(min=1))
                    if self.length_normalise
                    else 1.0
                )
        return better_share, worse_share, kept

    def state_dict(self) -> dict[str, Any]:
        """Returns the learner's state."""
        return self._learner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the learner's state."""
        self._learner.load_state_dict(state)
