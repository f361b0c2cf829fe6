"""A panel of simulated raters whose noise, tastes and biases are known.

Methods that learn from comparisons can be tested against a known truth only when the raters' errors
are known too. Each rater r sees an episode's true outcome (the environment's return) through a
utility

    u_r(e) = return(e) + sum_f (bias_f + taste_rf) * feature_f(e)   taste_rf ~ N(0, taste^2)

and ranks a group by u_r(e) + noise * Gumbel (the same for the same conversation, so that equal ones
are tied), which is Plackett-Luce with scores u_r / noise (so every pair obeys Bradley-Terry).
Biases are shared by the whole panel, tastes are each rater's own and cancel over many raters.
None of them is presented as a person: source, raters and stratum are called simulated wherever they
appear.

Like people they may take their time: an answer comes a while after it was first asked for
(exponential, a rater's own for each group), and some never come. Both are drawn from the rater and
the question, so that a run that is resumed finds the same. Requests that have expired meanwhile, or
were decided without an answer, stay unanswered.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

from ..protocols import Comparison, Context, Episode, FeedbackSource, Request, Stamp
from ..tools import derive_id, did_you_mean

FEATURES: Mapping[str, Callable[[Episode], float]] = {
    "questions": lambda e: float(sum("?" in turn.action for turn in e.turns)),
    "turns": lambda e: float(len(e.turns)),
    "words": lambda e: sum(len(turn.action.split()) for turn in e.turns) / 10,
}


class SimulatedPanel(FeedbackSource):
    """Simulates raters whose errors are known, who compare conversations.

    Args:
        pool: how many raters there are; which of them answer is drawn for each group, `raters` of
            them.
        noise: scale of the Gumbel noise; 0 ranks exactly by the utility.
        taste: standard deviation of a rater's own liking for each feature.
        bias: the whole panel's liking, feature to weight: "questions" (replies that ask), "turns",
            "words" (tens of words).
        tie: differences of noisy utility up to this are called a tie.
        seed: of noise, tastes and delays; default: the run's.
        delay: mean seconds on the run's clock until an answer comes; 0: at once.
        unanswered: share of the requests that are never answered; give the source a `deadline`, or
            the run waits for them for ever.
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
        delay: float = 0.0,
        unanswered: float = 0.0,
    ) -> None:
        for name in bias or {}:
            if name not in FEATURES:
                raise ValueError(
                    f"no feature {name!r} to be biased towards.{did_you_mean(name, FEATURES)}"
                )
        if pool < 1 or min(noise, taste, tie) < 0:
            raise ValueError(
                f"pool must be at least 1, noise, taste and tie not negative: got {pool}, {noise},"
                f" {taste}, {tie}"
            )
        if delay < 0 or not 0 <= unanswered <= 1:
            raise ValueError(
                f"delay must not be negative and unanswered lie between 0 and 1: got {delay},"
                f" {unanswered}"
            )
        self.pool, self.noise, self.taste, self.tie, self.seed = pool, noise, taste, tie, seed
        self.bias = dict(bias or {})
        self.delay, self.unanswered = delay, unanswered
        self._context: Context | None = None
        self._due: dict[str, tuple[float, Request]] = {}  # when each answer comes

    def open(self, context: Context) -> None:
        """Takes the context, and its seed where the panel has none."""
        self._context = context
        if self.seed is None:
            self.seed = context.seed

    def request(self, requests: Sequence[Request]) -> None:
        """Draws for each request whether it is answered, and after which delay."""
        asked: dict[str, float] = {}
        if self.delay:
            if self._context is None:
                raise ValueError(
                    "a panel with a delay needs the run's clock and ledger: open(context) first"
                )
            waiting = self._context.ledger.open_requests(sorted({r.group for r in requests}))
            # First asked, before a restart perhaps.
            asked = {row["id"]: row["time"] for row in waiting}
        for request in requests:
            chance = random.Random(
                derive_id("patience", self.seed, self._rater(request), _seen(request))
            )
            if chance.random() >= self.unanswered:
                delay = chance.expovariate(1 / self.delay) if self.delay else 0.0
                self._due[request.id] = (asked.get(request.id, 0.0) + delay, request)

    def receive(self) -> list[Comparison]:
        """Returns the rankings that are due, of requests that are still open."""
        if self.delay and self._context is not None:
            now, ledger = self._context.clock(), self._context.ledger
            ready = [
                request
                for due, request in sorted(self._due.values(), key=lambda each: each[0])
                if due <= now
            ]
            groups = sorted({request.group for request in ready})
            still, decided = (
                {row["id"] for row in ledger.open_requests(groups)},
                ledger.decided(groups),
            )
            asked = [r for r in ready if r.id in still and not (r.required and r.group in decided)]
        else:
            ready = asked = [request for _, request in self._due.values()]
        for request in ready:
            del self._due[request.id]
        return [self._rank(request) for request in asked]

    def waiting(self) -> str:
        """Returns how many raters are simulated."""
        return f"{self.pool} simulated raters"

    def _rater(self, request: Request) -> int:
        """Returns the number of the rater who answers in this slot."""
        order = list(range(self.pool))
        # Never an id: those hold the run's name, which must not matter.
        start = request.episodes[0].start.key
        random.Random(derive_id("panel", self.seed, start)).shuffle(order)
        return order[request.rater_slot % self.pool]

    def _rank(self, request: Request) -> Comparison:
        start, rater = request.episodes[0].start.key, self._rater(request)
        taste = random.Random(derive_id("taste", self.seed, rater))
        liking = {name: self.bias.get(name, 0.0) + taste.gauss(0, self.taste) for name in FEATURES}
        felt: dict[str, float] = {}
        for episode in request.episodes:
            utility = episode.env_return + sum(
                weight * FEATURES[name](episode) for name, weight in liking.items()
            )
            # By its messages and its start, whatever else it is shown with.
            replies = [turn.action for turn in episode.turns]
            accident = random.Random(derive_id("noise", self.seed, rater, start, replies))
            felt[episode.id] = utility + self.noise * _gumbel(accident)
        ranked = sorted(felt, key=lambda e: -felt[e])
        tiers = [[ranked[0]]]
        for next_best in ranked[1:]:
            if felt[tiers[-1][-1]] - felt[next_best] <= self.tie:
                tiers[-1].append(next_best)
            else:
                tiers.append([next_best])
        return Comparison(
            request.target, tuple(tuple(tier) for tier in tiers),
            id=derive_id(request.id, "simulated"),
            shown={"order": [e.id for e in request.episodes]},
            stamp=Stamp(request=request.id, rater=f"simulated-{rater}", stratum="simulated"),
        )  # fmt: skip


def _seen(request: Request) -> list[list[str]]:
    """Returns the texts a rater is shown: the start, and each conversation's messages."""
    return [
        [request.episodes[0].start.key],
        *([turn.action for turn in e.turns] for e in request.episodes),
    ]


def _gumbel(rng: random.Random) -> float:
    """Draws standard Gumbel noise: -log of an exponential variate."""
    return -math.log(max(rng.expovariate(1.0), 1e-300))
