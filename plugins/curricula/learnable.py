"""The curriculum `learnable`: starts that go well sometimes and badly sometimes are played again.

A group teaches by the differences of its outcomes: where all conversations succeed, or none, there
is nothing to compare. So every start that was played keeps the variance of its group's outcomes,

    v = mean((R - mean(R))^2),  with 0 and 1 for outcomes and a success rate p:  v = p (1 - p)

("learnability": Rutherford et al. 2024, No Regrets), halved with what it was before when the start
is played again. A share `new` of the groups begins at starts that were never played; the others
come back by their v. What was too hard or too easy changes as the policy does: a share `stale` of
those that come back are the ones played longest ago, whatever their v (Jiang et al. 2021,
Prioritized Level Replay). Environments of a mixture are drawn by their weights, as ever.

The starts that train are no longer a fair sample: outcomes in the report are those of starts of
middling difficulty, and only play on held-out starts (`gold`, `evaluate`) says how good the policy
is.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import Any, ClassVar

from pydantic import Field

from ...protocols import Curriculum, GroupResult, Section, StartNumber

KEPT = 4096  # starts that are remembered where their number has no end


class Learnable(Section, Curriculum):
    """Plays starts again by how much the outcomes of their groups differ.

    Attributes:
        new: share of the groups whose start was never played, as long as there are such.
        stale: share of the other groups whose start is the one played longest ago.
        starts: how many starts each environment has, such as the rows of a data set; when all were
            played, all groups are of known ones. None: there is no end of them.
    """

    called: ClassVar = "learnable"
    needs: ClassVar = frozenset({"group"})

    new: float = Field(default=0.5, ge=0, le=1)
    stale: float = Field(default=0.1, ge=0, le=1)
    starts: int | None = Field(default=None, ge=1)

    _weights: list[float]
    # Of every start that was played: the variance of its outcomes, and in which update it was.
    _known: dict[StartNumber, tuple[float, int]]
    _updates: int = 0
    _share_new: float = 0.0

    def setup(self, weights: Sequence[float]) -> None:
        """Keeps the weights."""
        self._weights, self._known, self._updates = list(weights), {}, 0

    def choose(
        self, rng: Random, unplayed: Sequence[int], taken: Collection[StartNumber]
    ) -> StartNumber | None:
        """Returns a new start, one that came out mixed, or the one played longest ago; None where
        all starts there are being played."""
        free = [
            [s for s in sorted(self._known) if s.env == env and s not in taken]
            for env in range(len(self._weights))
        ]
        more = [self.starts is None or number < self.starts for number in unplayed]
        weights = [
            weight if more[env] or free[env] else 0.0 for env, weight in enumerate(self._weights)
        ]
        if not any(weights):
            return None
        [env] = rng.choices(range(len(weights)), weights)
        known, mixed = free[env], [s for s in free[env] if self._known[s][0] > 0]
        if more[env] and (not mixed or rng.random() < self.new):
            return StartNumber(env, unplayed[env])
        if not mixed or rng.random() < self.stale:
            return min(known, key=lambda s: (self._known[s][1], s.number))
        [start] = rng.choices(mixed, [self._known[s][0] for s in mixed])
        return start

    def learn(self, groups: Sequence[GroupResult]) -> None:
        """Takes up how much the outcomes of every group differed."""
        self._updates += 1
        played = [group for group in groups if group.start not in self._known]
        self._share_new = len(played) / len(groups) if groups else 0.0
        for group in groups:
            before = self._known.get(group.start, (0.0, 0))[0]
            if not group.outcomes:  # all of it failed: what it teaches is to be seen, and soon
                self._known.setdefault(group.start, (0.0, 0))
                continue
            if len(group.outcomes) < 2:
                found = before
            elif group.start in self._known:
                found = (before + statistics.pvariance(group.outcomes)) / 2
            else:
                found = statistics.pvariance(group.outcomes)
            self._known[group.start] = (found, self._updates)
        if self.starts is None and len(self._known) > KEPT:
            best = sorted(self._known, key=lambda s: (self._known[s], s), reverse=True)[:KEPT]
            self._known = {start: self._known[start] for start in sorted(best)}

    def metrics(self) -> Mapping[str, float]:
        """Returns the share of groups that began at a new start, how many starts are known, and
        the share of those whose outcomes differed."""
        mixed = sum(variance > 0 for variance, _ in self._known.values())
        return {
            "new": self._share_new,
            "known": float(len(self._known)),
            "mixed": mixed / max(len(self._known), 1),
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns every known start with what is known of it."""
        known = [[*start, *found] for start, found in self._known.items()]
        return {"known": known, "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` returned."""
        self._updates = int(state["updates"])
        self._known = {
            StartNumber(int(env), int(number)): (float(variance), int(update))
            for env, number, variance, update in state["known"]
        }
