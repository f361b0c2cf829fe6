"""The optimizer `kto`: learns from thumbs up and thumbs down on single conversations, without
pairs.

Ethayarajh et al. 2024 (arXiv:2402.01306, eq. 8), with r = log pi(y|x) / pi_ref(y|x) summed over the
agent's tokens:

    loss = w_up   * (1 - sigma(beta (r - z0)))      for a conversation that was liked
           w_down * (1 - sigma(beta (z0 - r)))      for one that was not
    z0   = max(0, mean of r over replies paired with another conversation's observations)

z0 estimates the KL of the policy to the reference on replies that do not answer the observations
before them (section 4.1): the replies of each conversation of the batch are put behind the
observations of another. It takes no gradient; a batch with the same observations throughout has
z0 = 0. The paper advises weights with w_up * (number liked) between 1 and 4/3 of w_down * (number
disliked) where the two are unequal.

As in `dpo`, the derivative in each conversation's log-prob is taken first, then each micro-batch is
run once with its share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ...learning import Batch, Learner, PassOptions, Policy, Row, row_of
from ...protocols import Optimizer


def kto_loss(
    ratio: Tensor,
    liked: Tensor,
    z0: Tensor | float,
    beta: float,
    up: float = 1.0,
    down: float = 1.0,
) -> Tensor:
    """Returns the loss of each conversation, [E].

    Args:
        ratio: [E] log pi / pi_ref.
        liked: [E] bool.
        z0: the KL they are measured against, nats.
        beta: how much log-ratios weigh.
        up, down: weights of liked and of other conversations.
    """
    towards = torch.where(liked, ratio - z0, z0 - ratio)
    weight = torch.where(
        liked, torch.as_tensor(up, dtype=ratio.dtype), torch.as_tensor(down, dtype=ratio.dtype)
    )
    return weight * (1 - torch.sigmoid(beta * towards))


def mismatched(rows: Sequence[Row]) -> list[Row]:
    """Pairs each conversation's replies with the observations of the next conversation of the batch
    whose observations differ, as far as it goes. Conversations whose observations all others share
    are left out."""
    parts = [segments(row) for row in rows]
    result = []
    for i, (row, own) in enumerate(zip(rows, parts, strict=True)):
        for other in parts[i + 1 :] + parts[:i]:
            places = [
                (other[k][0] if k < len(other) else read, action)
                for k, (read, action) in enumerate(own)
            ]
            if places != own:
                result.append(row_of(places, row.episode))
                break
    return result


def segments(row: Row) -> list[tuple[list[int], list[int]]]:
    """Returns (ids read, ids replied) per turn of a row."""
    found: list[tuple[list[int], list[int]]] = []
    end = 0
    for position in row.positions:
        if position > end or not found:
            found.append((list(row.ids[end:position]), []))
        found[-1][1].append(row.ids[position])
        end = position + 1
    return found


class KTO(PassOptions, Optimizer):
    """Optimization on liked and disliked conversations (KTO).

    Attributes:
        beta: how closely the policy keeps to the reference.
        up, down: weights of liked and disliked conversations.
    """

    consumes: ClassVar = frozenset({"labels"})

    beta: float = Field(default=0.1, gt=0)
    up: float = Field(default=1.0, gt=0)
    down: float = Field(default=1.0, gt=0)

    _learner: Learner

    def setup(self, policy: Policy) -> None:
        """Freezes the reference and makes the learner."""
        policy.freeze_reference()
        self._learner = Learner(policy, self)

    def prepare(self, policy: Policy, batch: Batch) -> None:
        """Computes the reference's log-probs of the batch, and of its mismatched conversations."""
        batch.reference_logprobs = policy.logprobs(
            batch, micro_tokens=self.micro_tokens, reference=True
        )
        fitting = [r for r in mismatched(batch.rows) if len(r.ids) <= policy.context_length]
        batch.extras["mismatched"] = fitting, self._sums(policy, batch, fitting, reference=True)

    def update(self, policy: Policy, batch: Batch) -> dict[str, float]:
        """Trains on the batch's labels, in `epochs` passes; returns the metrics."""
        assert batch.labels is not None
        assert batch.reference_logprobs is not None
        liked, reference = batch.labels > 0.5, (batch.reference_logprobs * batch.mask).sum(1)
        strangers, strange_reference = batch.extras["mismatched"]
        norms, losses, kls = [], 0.0, []
        rewards = torch.zeros(len(batch.episodes))
        counted = (batch.weight > 0).nonzero().flatten().tolist()
        for epoch in range(self.epochs):
            for places in self._learner.minibatches(
                len(counted), self.minibatches, batch.seed, epoch
            ):
                chosen = [counted[i] for i in places]
                mine = set(chosen)
                reference_rows = [r for r in strangers if r.episode in mine]
                apart = (self._sums(policy, batch, reference_rows) - strange_reference)[
                    [r.episode for r in reference_rows]
                ]
                z0 = apart.mean().clamp(min=0) if reference_rows else torch.tensor(0.0)
                own = [r for r in batch.rows if r.episode in mine]
                ratio = (self._sums(policy, batch, own) - reference).requires_grad_()
                weight = batch.weight[chosen] / batch.weight[chosen].sum()
                each = kto_loss(ratio[chosen], liked[chosen], z0, self.beta, self.up, self.down)
                [slope] = torch.autograd.grad((each * weight).sum(), ratio)
                for micro in self._learner.micro_batches(batch.rows, chosen):
                    out = policy.score(micro, batch.temperature, self._learner.network)
                    self._learner.backward(
                        (out.logprobs * slope[micro.episode].to(out.logprobs.device)).sum(), micro
                    )
                norms.append(
                    self._learner.step(batch.progress, [batch.episodes[e].id for e in chosen])
                )
                losses += float(each.detach().sum())
                kls.append(float(z0))
                rewards[chosen] = self.beta * (ratio[chosen] - z0).detach()
        metrics = {"liked": float(liked.float().mean()), **self._learner.metrics(norms)}
        if norms:
            metrics |= {"loss": losses / (self.epochs * len(counted)), "kl": sum(kls) / len(kls)}
        for name, which in (
            ("liked", liked & (batch.weight > 0)),
            ("disliked", ~liked & (batch.weight > 0)),
        ):
            if bool(which.any()):
                metrics[f"reward/{name}"] = float(rewards[which].mean())
        return metrics

    def _sums(
        self, policy: Policy, batch: Batch, rows: Sequence[Row], reference: bool = False
    ) -> Tensor:
        """Returns each conversation's summed log-prob over some rows, [E]; 0 for those without a
        row."""
        part = replace(batch, rows=tuple(rows))
        return policy.logprobs(part, micro_tokens=self.micro_tokens, reference=reference).sum(1)

    def state_dict(self) -> dict[str, Any]:
        """Returns the learner's state."""
        return self._learner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the learner's state."""
        self._learner.load_state_dict(state)
