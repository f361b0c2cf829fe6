"""The optimizer `rejection`: best-of-n fine-tuning, the baseline that everything else must beat.

    loss = - mean over the tokens of the chosen conversations of  log pi

From every group the `best` conversations by outcome are chosen, ties for the last place all
together, and imitated; the others are thrown away (RAFT, Dong et al. 2023, arXiv:2304.06767; the
reranking and fine-tuning of Touvron et al. 2023, arXiv:2307.09288, section 3.2.1). No credit per
turn, no critic, no reference: a conversation is copied whole, its mistakes included. Groups in
which all outcomes are equal have no best and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from ...learning import Batch, Learner, PassOptions, Policy, Sums, rounding
from ...protocols import Optimizer


def best_of_groups(outcome: Tensor, group: Tensor, best: int) -> list[int]:
    """Returns indices of the best episodes of every group, ties for the last place included; none
    of a group whose outcomes are all equal.

    Args:
        outcome: [E].
        group: [E] long.
        best: how many of a group.
    """
    chosen: list[int] = []
    for g in group.unique().tolist():
        members = (group == g).nonzero().flatten()
        own = outcome[members]
        near = float(rounding(own.abs().max()))
        if float(own.max() - own.min()) <= near:
            continue
        last = own.sort(descending=True).values[min(best, len(own)) - 1]
        chosen += members[own >= last - near].tolist()
    return sorted(chosen)


class Rejection(PassOptions, Optimizer):
    """Best-of-n fine-tuning.

    Attributes:
        best: how many conversations of a group are imitated.
    """

    consumes: ClassVar = frozenset({"demonstrations"})

    best: int = Field(default=1, ge=1)

    _learner: Learner

    def setup(self, policy: Policy) -> None:
        """Makes the learner."""
        self._learner = Learner(policy, self)

    def prepare(self, policy: Policy, batch: Batch) -> None:
        """Prepares nothing."""

    def update(self, policy: Policy, batch: Batch) -> dict[str, float]:
        """Trains on the best episodes of every group, in `epochs` passes; returns the metrics."""
        chosen = [
            e for e in best_of_groups(batch.outcome, batch.group, self.best) if batch.weight[e] > 0
        ]
        share = batch.mask * batch.weight.unsqueeze(1)
        sums, tokens, norms = Sums(), 0.0, []
        for epoch in range(self.epochs):
            for places in self._learner.minibatches(
                len(chosen), self.minibatches, batch.seed, epoch
            ):
                episodes = [chosen[i] for i in places]
                total = float(share[episodes].sum())
                for micro in self._learner.micro_batches(batch.rows, episodes):
                    out = policy.score(micro, batch.temperature, self._learner.network)
                    self._learner.backward(-(out.logprobs * micro.take(share)).sum() / total, micro)
                    sums.add(micro, loss=-out.logprobs, entropy=out.entropy)
                norms.append(
                    self._learner.step(batch.progress, [batch.episodes[e].id for e in episodes])
                )
                tokens += float(batch.mask[episodes].sum())
        metrics = (
            sums.means(policy, tokens)
            | {"chosen": len(chosen) / len(batch.episodes)}
            | self._learner.metrics(norms)
        )
        return metrics | ({"chosen_outcome": float(batch.outcome[chosen].mean())} if chosen else {})

    def state_dict(self) -> dict[str, Any]:
        """Returns the learner's state."""
        return self._learner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the learner's state."""
        self._learner.load_state_dict(state)
