"""`redistribute`: the outcome taken apart over the turns by a model that learns to foresee it, and nothing of it lost.

    c_k = g(tau_<=k) - g(tau_<k)        credit_k = c_k + (A - sum_l c_l) / K        sum_k credit_k = A

RUDDER (Arjona-Medina et al. 2019, arXiv:1806.07857, section 3): g predicts the outcome from the conversation so far, and a turn gets what it changed
in the prediction. A is the outcome against the others of its group (RLOO), as `outcome` would give it to every turn; what g did not foresee is
spread evenly, so the sum is exact whatever g says.

g is ridge regression on hashed words, fitted to every prefix of every conversation that trained: for each turn so far the pair of what was
heard and what was replied, and the words of the reply; and the words of what was heard last. Its sufficient statistics fade by `forget` per
update, since the policy, and with it what a prefix is worth, changes. It is fitted after it was used, so no conversation is taken
apart by a model that has seen its outcome. Cheap and without further play, but it sees words, not sense: for long free text `branch` or a
critic knows more.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...engine.episode import Episode
from ...engine.learning import Batch, Credit
from ...engine.tensors import group_advantage, spread_turns, turn_sums


class Redistribute:
    """Args:
    features: how many numbers the words are hashed into.
    ridge: how strongly weights are held at zero, in conversations.
    forget: what remains of the statistics per update, above 0 and at most 1.
    """

    needs = frozenset({"group"})

    def __init__(self, features: int = 1024, ridge: float = 1.0, forget: float = 0.9) -> None:
        if features < 8 or ridge <= 0 or not 0 < forget <= 1:
            raise ValueError(f"need features >= 8, ridge > 0 and 0 < forget <= 1, got {features}, {ridge} and {forget}")
        self.features, self.ridge, self.forget = features, ridge, forget
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.moment = torch.zeros(features, dtype=torch.float64)
        self.weights = torch.zeros(features, dtype=torch.float64)

    def assign(self, batch: Batch) -> Credit:
        penalty, _ = turn_sums(batch.token_rewards, batch.turn, batch.mask, batch.turn_mask.shape[1])
        whole = group_advantage(batch.outcome, batch.group, "loo") + group_advantage(penalty.sum(1), batch.group, "loo")
        credit = torch.zeros(batch.turn_mask.shape, dtype=whole.dtype)
        for e, episode in enumerate(batch.episodes):
            foreseen = self._prefixes(episode) @ self.weights
            changes = foreseen[1:] - foreseen[:-1]
            credit[e, batch.turn_mask[e]] = (changes + (whole[e].double() - changes.sum()) / len(changes)).to(credit.dtype)
        return Credit(spread_turns(credit, batch.turn, batch.mask), None, credit)

    def fit(self, batch: Batch) -> None:
        """Learns from the outcomes of the batch."""
        self.gram *= self.forget
        self.moment *= self.forget
        for e, episode in enumerate(batch.episodes):
            seen = self._prefixes(episode)
            self.gram += seen.T @ seen
            self.moment += seen.sum(0) * batch.outcome[e].double()
        self.weights = torch.linalg.solve(self.gram + self.ridge * torch.eye(self.features, dtype=torch.float64), self.moment)

    def _prefixes(self, episode: Episode) -> Tensor:
        """Features of every prefix, from before the first turn to after the last, [K + 1, features]."""
        heard = [turn.observation.content for turn in episode.turns] + [episode.final.content if episode.final else ""]
        said = torch.zeros(self.features, dtype=torch.float64)
        rows = []
        for k, now in enumerate(heard):
            if k:
                said = said.clone()
                for place, sign in self._hashed("pair", [f"{heard[k - 1]}\n{episode.turns[k - 1].action}"]):
                    said[place] += sign
                for place, sign in self._hashed("said", words(episode.turns[k - 1].action)):
                    said[place] += sign
            row = said.clone()
            for place, sign in self._hashed("heard", [now, *words(now)]):
                row[place] += sign
            row[0] += 1.0
            rows.append(row)
        return torch.stack(rows)

    def _hashed(self, kind: str, texts: list[str]) -> Iterator[tuple[int, float]]:
        """The hashing trick (Weinberger et al. 2009): a place and a sign for every text, the same on every machine."""
        for text in texts:
            code = zlib.crc32(f"{kind}\n{text}".encode())
            yield 1 + code // 2 % (self.features - 1), 1.0 if code % 2 else -1.0

    def state_dict(self) -> dict[str, Any]:
        return {"gram": self.gram, "moment": self.moment, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.gram, self.moment, self.weights = (state[name].clone() for name in ("gram", "moment", "weights"))


def words(text: str) -> list[str]:
    """The distinct words of a text, lower case, in order."""
    return list(dict.fromkeys(re.findall(r"\w+", text.lower())))
