"""The credit method `redistribute`: the outcome, shared out over the turns without loss by a model
that learns to predict it.

    c_k = g(tau_<=k) - g(tau_<k)        credit_k = c_k + (A - sum_l c_l) / K   sum_k credit_k = A

RUDDER (Arjona-Medina et al. 2019, arXiv:1806.07857, section 3): g predicts the outcome from the
conversation so far, and a turn gets what it changed in the prediction. A is the outcome against the
others of its group (RLOO), as `outcome` would give it to every turn; what g did not predict is
spread evenly, so the sum is exact whatever g predicts.

g is ridge regression on hashed words, fitted to every prefix of every conversation that trained:
for each turn so far the pair of observation and reply, and the words of the reply; and the words of
the last observation. A prefix with n turns to go counts 1/(n + 0.1): what is still
to come makes its outcome that much less certain. The sufficient statistics fade by `forget` per
update, since the policy, and with it what a prefix is worth, changes. It is fitted after it was
used, so no conversation is taken apart by a model that has seen its outcome. Cheap and without
further play, but it sees words, not sense: for long free text `branch` or a critic knows more.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ...learning import Batch, Credit, group_advantage, spread_turns, turn_sums
from ...protocols import CreditAssigner, Episode, Section


class Redistribute(Section, CreditAssigner):
    """Distributes the outcome over the turns by a model that learns to predict it.

    Attributes:
        features: how many numbers the words are hashed into.
        ridge: how strongly weights are held at zero, in conversations.
        forget: what remains of the statistics per update.
    """

    needs: ClassVar = frozenset({"group"})

    features: int = Field(default=1024, ge=8)
    ridge: float = Field(default=10.0, gt=0)
    forget: float = Field(default=0.95, gt=0, le=1)

    _gram: Tensor
    _moment: Tensor
    _weights: Tensor

    def model_post_init(self, context: Any) -> None:
        """Begins with empty statistics."""
        self._gram = torch.zeros(self.features, self.features, dtype=torch.float64)
        self._moment = torch.zeros(self.features, dtype=torch.float64)
        self._weights = torch.zeros(self.features, dtype=torch.float64)

    def assign(self, batch: Batch) -> Credit:
        """Credits each turn with the change of the foreseen outcome; the rest is spread evenly."""
        penalty, _ = turn_sums(
            batch.token_rewards, batch.turn, batch.mask, batch.turn_mask.shape[1]
        )
        whole = group_advantage(batch.outcome, batch.group, "loo") + group_advantage(
            penalty.sum(1), batch.group, "loo"
        )
        credit = torch.zeros(batch.turn_mask.shape, dtype=whole.dtype)
        for e, episode in enumerate(batch.episodes):
            foreseen = self._prefixes(episode) @ self._weights
            changes = foreseen[1:] - foreseen[:-1]
            credit[e, batch.turn_mask[e]] = (
                changes + (whole[e].double() - changes.sum()) / len(changes)
            ).to(credit.dtype)
        return Credit(spread_turns(credit, batch.turn, batch.mask), None, credit)

    def fit(self, batch: Batch) -> None:
        """Learns from the outcomes of the batch."""
        prefixes = [self._prefixes(episode) for episode in batch.episodes]
        seen = torch.cat(prefixes)
        outcomes = batch.outcome.double().repeat_interleave(
            torch.tensor([len(p) for p in prefixes])
        )
        left = torch.cat([torch.arange(len(p) - 1, -1, -1, dtype=torch.float64) for p in prefixes])
        weighted = seen / (left + 0.1).unsqueeze(1)
        self._gram = self.forget * self._gram + weighted.T @ seen
        self._moment = self.forget * self._moment + weighted.T @ outcomes
        ridge = self.ridge * torch.eye(self.features, dtype=torch.float64)
        self._weights = torch.linalg.solve(self._gram + ridge, self._moment)

    def _prefixes(self, episode: Episode) -> Tensor:
        """Returns features of every prefix, from before the first turn to after the last, [K + 1,
        features]."""
        observations = [turn.observation.content for turn in episode.turns] + [
            episode.final.content if episode.final else ""
        ]
        prefixes = np.zeros((len(observations), self.features))
        now = np.zeros_like(prefixes)
        now[:, 0] = 1.0
        for k, text in enumerate(observations):
            places, signs = hashed("heard", text, self.features, alone=True)
            np.add.at(now[k], places, signs)
            if k:
                action = episode.turns[k - 1].action
                for places, signs in (
                    hashed("pair", f"{observations[k - 1]}\n{action}", self.features, alone=False),
                    hashed("said", action, self.features, alone=True),
                ):
                    np.add.at(prefixes[k], places, signs)
        return torch.from_numpy(prefixes.cumsum(0) + now)

    def state_dict(self) -> dict[str, Any]:
        """Returns the regression's moments and weights."""
        return {"gram": self._gram, "moment": self._moment, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up copies of the regression's moments and weights."""
        self._gram, self._moment, self._weights = (
            state[name].clone() for name in ("gram", "moment", "weights")
        )


@lru_cache(maxsize=65536)
def hashed(
    kind: str, text: str, features: int, alone: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns places and signs of a text and, if its words count alone too, of each distinct one
    (hashing trick, Weinberger et al. 2009, arXiv:0902.2206); the same on every machine."""
    parts = [text, *dict.fromkeys(re.findall(r"\w+", text.lower()))] if alone else [text]
    codes = np.array([zlib.crc32(f"{kind}\n{part}".encode()) for part in parts])
    return 1 + codes // 2 % (features - 1), np.where(codes % 2, 1.0, -1.0)
