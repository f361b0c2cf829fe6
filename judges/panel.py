"""A panel of simulated raters: people who do not exist, with noise, tastes and biases that are known.

Methods that learn from comparisons can be tested against a known truth only when the raters' errors are known too. Each rater r
sees an episode's true outcome (the environment's return) through a utility

    u_r(e) = return(e) + sum_f (bias_f + taste_rf) * feature_f(e)             taste_rf ~ N(0, taste^2)

and ranks a group by u_r(e) + noise * Gumbel (the same for the same conversation, so that equal ones are tied), which is Plackett-Luce with scores u_r / noise (so every pair obeys Bradley-Terry).
Biases are shared by the whole panel, tastes are each rater's own and cancel over many raters. Nothing here passes for people:
source, raters and stratum are called simulated wherever they appear.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

from ..engine.episode import Episode, derive_id
from ..engine.feedback import Comparison, Context, Request, Stamp
from ..engine.suggest import did_you_mean

FEATURES: Mapping[str, Callable[[Episode], float]] = {
    "questions": lambda e: float(sum("?" in turn.action for turn in e.turns)),
    "turns": lambda e: float(len(e.turns)),
    "words": lambda e: sum(len(turn.action.split()) for turn in e.turns) / 10,
}


class SimulatedPanel:
    """Args:
    pool: how many raters there are; which of them answer is drawn for each group, `raters` of them.
    noise: scale of the Gumbel noise; 0 ranks exactly by the utility.
    taste: standard deviation of a rater's own liking for each feature.
    bias: the whole panel's liking, feature to weight: "questions" (replies that ask), "turns", "words" (tens of words).
    tie: differences of noisy utility up to this are called a tie.
    seed: of noise and tastes; default: the run's.
    """

    kind = "group"

    def __init__(
        self,
        pool: int = 20,
        noise: float = 0.25,
        taste: float = 0.05,
        bias: Mapping[str, float] | None = None,
        tie: float = 0.0,
        seed: int | None = None,
    ) -> None:
        for name in bias or {}:
            if name not in FEATURES:
                raise ValueError(f"no feature {name!r} to be biased towards.{did_you_mean(name, FEATURES)}")
        if pool < 1 or min(noise, taste, tie) < 0:
            raise ValueError(f"pool must be at least 1, noise, taste and tie not negative: got {pool}, {noise}, {taste}, {tie}")
        self.pool, self.noise, self.taste, self.tie, self.seed = pool, noise, taste, tie, seed
        self.bias = dict(bias or {})
        self._waiting: list[Request] = []

    def open(self, context: Context) -> None:
        if self.seed is None:
            self.seed = context.seed

    def request(self, requests: Sequence[Request]) -> None:
        self._waiting += requests

    def receive(self) -> list[Comparison]:
        waiting, self._waiting = self._waiting, []
        return [self._rank(request) for request in waiting]

    def _rank(self, request: Request) -> Comparison:
        order = list(range(self.pool))
        start = request.episodes[0].start.key  # never an id: those hold the run's name, which must not matter
        random.Random(derive_id("panel", self.seed, start)).shuffle(order)
        rater = order[request.rater_slot % self.pool]
        taste = random.Random(derive_id("taste", self.seed, rater))
        liking = {name: self.bias.get(name, 0.0) + taste.gauss(0, self.taste) for name in FEATURES}
        felt: dict[str, float] = {}
        for episode in request.episodes:
            utility = episode.env_return + sum(weight * FEATURES[name](episode) for name, weight in liking.items())
            heard = [turn.action for turn in episode.turns]  # what was said and where, whatever else it is shown with
            accident = random.Random(derive_id("noise", self.seed, rater, start, heard))
            felt[episode.id] = utility + self.noise * _gumbel(accident)
        ranked = sorted(felt, key=lambda e: -felt[e])
        tiers = [[ranked[0]]]
        for next_best in ranked[1:]:
            if felt[tiers[-1][-1]] - felt[next_best] <= self.tie:
                tiers[-1].append(next_best)
            else:
                tiers.append([next_best])
        return Comparison(
            request.target, tuple(tuple(tier) for tier in tiers), id=derive_id(request.id, "simulated"),
            shown={"order": [e.id for e in request.episodes]},
            stamp=Stamp(request=request.id, rater=f"simulated-{rater}", stratum="simulated"),
        )  # fmt: skip


def _gumbel(rng: random.Random) -> float:
    """The largest of many small accidents: -log of an exponential variate."""
    return -math.log(max(rng.expovariate(1.0), 1e-300))
