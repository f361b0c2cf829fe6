"""Is a credit method's expected gradient the gradient of what the policy is after? Not sampled:
enumerated.

    python benchmarks/credit_bias.py                # about a minute on 1 core; writes its tables
                                                    into docs/credit.md

A world so small that all its conversations can be listed: at most three turns, two states "A" and
"B" that recur, chance in where a reply leads, and in B the reply "y" ends the conversation. A
tabular policy gives every reply its probability. For a method that compares within groups every
group of G conversations is formed, weighted with its probability, and given to the method's own
`assign`; then

    E g = sum over groups  P(group)  1/G  sum over its tokens  A_t grad log pi(token t)
    J   = expected outcome (less the KL to the reference, where the penalty is in the reward)

    bias   = |E g - grad J| / |grad J|        0: unbiased
    cosine = the angle's between them         1: right in direction; below 0 it points away

over four policies and two ways of paying (at every turn; at the end alone). The mean over
conversations is that of `loss_mean: constant`. Normalising advantages over the batch (`normalise:
whiten`) is the optimizer's and not part of it.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from turnwise.engine.policy.batching import make_batch
from turnwise.engine.records.batch import Batch
from turnwise.engine.records.episode import Episode, Message, Start, Turn
from turnwise.engine.records.rewards import Rewards
from turnwise.engine.tensors import kl_estimate
from turnwise.plugins.credit.branch import BranchCredit
from turnwise.plugins.credit.counterfactual import Counterfactual
from turnwise.plugins.credit.gae import GAE
from turnwise.plugins.credit.gigpo import GiGPO
from turnwise.plugins.credit.judged import Judged
from turnwise.plugins.credit.outcome import OutcomeCredit
from turnwise.plugins.credit.redistribute import Redistribute
from turnwise.plugins.credit.turn_returns import TurnReturns

PAGE = Path(__file__).parents[1] / "docs" / "credit.md"
TURNS, SEEDS, PAID, COEF = 3, (0, 1, 2, 3), ("turns", "end"), 0.3
LEADS = {
    ("A", "x"): {"A": 0.5, "B": 0.5},
    ("A", "y"): {"B": 1.0},
    ("B", "x"): {"A": 0.3, "B": 0.7},
    ("B", "y"): {},
}
PAY = {("A", "x"): 0.1, ("A", "y"): -0.2, ("B", "x"): 0.3, ("B", "y"): 0.5}
LAST = {("A", "x"): 0.2, ("A", "y"): 0.0, ("B", "x"): 1.0, ("B", "y"): 0.6}
# Replies as tokens: each is one token; or "x" is said in two, so that the policy chooses where a
# reply ends.
ONE: dict[tuple[int, ...], str] = {(1,): "x", (2,): "y"}
MANY: dict[tuple[int, ...], str] = {(3, 4): "x", (3, 5): "x", (2,): "y"}
GAMMA, COARSE = 0.9, 0.5


@dataclass(frozen=True)
class Told:
    """One conversation in full.

    Attributes:
        steps: (state, tokens of the reply, reward) per turn.
        chance: the probability of where its replies led.
        cut: it ended because the turns were over.
    """

    steps: tuple[tuple[str, tuple[int, ...], float], ...]
    chance: float
    cut: bool

    @property
    def outcome(self) -> float:
        return sum(reward for _, _, reward in self.steps)


@dataclass(frozen=True)
class World:
    """The conversations there are, the policy's probabilities, and what is true of both.

    Args:
        seed: of the policy's probabilities.
        paid: "turns" or "end".
        many: whether the reply "x" is said in two tokens, so that the policy chooses where a reply
            ends.
        cut: whether conversations that run out of turns count as truncated.
    """

    seed: int
    paid: str
    many: bool = False
    cut: bool = False

    @property
    def replies(self) -> Mapping[tuple[int, ...], str]:
        return MANY if self.many else ONE

    @property
    def choices(self) -> list[tuple[str, tuple[int, ...]]]:
        """Where the policy chooses: (state, tokens of the reply so far)."""
        return [
            (s, p)
            for s in "AB"
            for p in sorted({r[:k] for r in self.replies for k in range(len(r))})
        ]

    def options(self, prefix: tuple[int, ...]) -> list[int]:
        return sorted(
            {
                r[len(prefix)]
                for r in self.replies
                if r[: len(prefix)] == prefix and len(r) > len(prefix)
            }
        )

    def logprobs(self) -> dict[tuple[str, tuple[int, ...]], dict[int, float]]:
        """Per place of choice, the log-probability of each token."""
        rng, found = np.random.default_rng(self.seed), {}
        for place in self.choices:
            logits = rng.normal(size=len(self.options(place[1])))
            logits -= np.log(np.exp(logits).sum())
            found[place] = dict(zip(self.options(place[1]), logits.tolist(), strict=True))
        return found

    def conversations(self) -> list[Told]:
        def told(state: str, turn: int) -> Iterator[tuple[tuple[Any, ...], float, bool]]:
            for tokens, reply in self.replies.items():
                over = not LEADS[state, reply]
                last = over or turn + 1 == TURNS
                reward = PAY[state, reply] * (self.paid == "turns") + LAST[state, reply] * last
                if last:
                    yield ((state, tokens, reward),), 1.0, self.cut and not over
                    continue
                for following, chance in LEADS[state, reply].items():
                    for steps, rest, cut in told(following, turn + 1):
                        yield ((state, tokens, reward), *steps), chance * rest, cut

        return [Told(*each) for each in told("A", 0)]

    @cache  # noqa: B019 - a handful of worlds
    def value(self, state: str, turn: int, prefix: tuple[int, ...] = ()) -> float:
        """What is expected from here on, this turn's reward included; `prefix` is what of the reply
        is said already."""
        total = 0.0
        for token, logprob in self.logprobs()[state, prefix].items():
            tokens = (*prefix, token)
            whole = tokens in self.replies
            worth = (
                self.worth(state, turn, self.replies[tokens])
                if whole
                else self.value(state, turn, tokens)
            )
            total += math.exp(logprob) * worth
        return total

    def worth(self, state: str, turn: int, reply: str) -> float:
        """What is expected from this turn on once the reply is given."""
        last = not LEADS[state, reply] or turn + 1 == TURNS
        after = (
            0.0
            if last
            else sum(p * self.value(s, turn + 1) for s, p in LEADS[state, reply].items())
        )
        return PAY[state, reply] * (self.paid == "turns") + LAST[state, reply] * last + after


@cache
def slopes(
    world: World,
) -> tuple[list[Told], NDArray[np.float64], list[NDArray[np.float64]], NDArray[np.float64]]:
    """All conversations, their probabilities [T], per conversation the gradients of its tokens'
    log-probs [tokens, parameters], and its summed log-probs [T]."""
    logprobs, told = world.logprobs(), world.conversations()
    places = [(place, token) for place in world.choices for token in logprobs[place]]
    chances, each, sums = [], [], []
    for one in told:
        rows, total = [], 0.0
        for state, tokens, _ in one.steps:
            for k, token in enumerate(tokens):
                place = (state, tokens[:k])
                total += logprobs[place][token]
                rows.append(
                    [(p == place) * ((t == token) - math.exp(logprobs[p][t])) for p, t in places]
                )
        each.append(np.array(rows))
        chances.append(one.chance * math.exp(total))
        sums.append(total)
    return told, np.array(chances), each, np.array(sums)


@cache
def batch_of(world: World, groups: tuple[tuple[int, ...], ...], kl: bool) -> Batch:
    """Groups of conversations as the engine lays them out, with exact values of everything that a
    method may need."""
    told, logprobs, episodes, rewards = world.conversations(), world.logprobs(), [], []
    values, branch, penalties = [], [], []
    for g, members in enumerate(groups):
        for slot, i in enumerate(members):
            one, turns, before = told[i], [], 0.0
            own_values, own_branch, own_scores, own_penalty = [], [], [], []
            for k, (state, tokens, reward) in enumerate(one.steps):
                logs = [logprobs[state, tokens[:n]][t] for n, t in enumerate(tokens)]
                turns.append(
                    Turn(
                        Message("user", f"state {state}"),
                        world.replies[tokens],
                        reward,
                        (0,),
                        tokens,
                        tuple(logs),
                    )
                )
                own_values += [world.value(state, k, tokens[:n]) for n in range(len(tokens))]
                own_penalty += [
                    -COEF * (log + math.log(len(world.options(tokens[:n])))) * kl
                    for n, log in enumerate(logs)
                ]  # the reference is the uniform policy
                own_branch.append(before + world.value(state, k))
                before += reward
                own_scores.append(
                    before
                    + (world.value(one.steps[k + 1][0], k + 1) if k + 1 < len(one.steps) else 0.0)
                )
            ending = "truncated" if one.cut else "terminated"
            episodes.append(
                Episode(
                    f"{g}-{slot}", Start("world", g), tuple(turns), cast(Any, ending), slot=slot
                )
            )
            rewards.append(
                Rewards(one.outcome, tuple(r for _, _, r in one.steps), tuple(own_scores))
            )
            values.append(own_values)
            branch.append(own_branch)
            penalties.append(own_penalty)
    batch = make_batch(episodes, rewards)
    batch.values, batch.bootstrap = torch.zeros(batch.mask.shape), torch.zeros(len(episodes))
    batch.branch_values = torch.full(batch.turn_mask.shape, math.nan)
    for e in range(len(episodes)):
        batch.values[e, batch.mask[e]] = torch.tensor(values[e])
        batch.token_rewards[e, batch.mask[e]] = torch.tensor(penalties[e])
        batch.branch_values[e, batch.turn_mask[e]] = torch.tensor(branch[e])
    return batch


@dataclass(frozen=True)
class Row:
    """A line of the table: a method as it is set, and in which world.

    Attributes:
        make: the credit method for a world.
        sizes: group sizes.
        change: what is done to the batch first (a critic that errs).
        why: what one would use it for all the same.
    """

    name: str
    make: Callable[[World], Any]
    why: str
    sizes: tuple[int, ...] = (2, 3)
    world: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[World, Batch], None] | None = None
    kl: bool = False


def wrong(world: World, batch: Batch) -> None:
    """A critic that is right in order only."""
    assert batch.values is not None
    batch.values = (COARSE * batch.values + 0.2) * batch.mask


def misjudged(world: World, batch: Batch) -> None:
    """A judge who is right in order only while the conversation lasts."""
    assert batch.turn_scores is not None
    batch.turn_scores = batch.turn_scores.clone()
    last = torch.arange(batch.turn_mask.shape[1]) == batch.turn_mask.sum(1, keepdim=True) - 1
    batch.turn_scores = torch.where(last, batch.turn_scores, COARSE * batch.turn_scores + 0.2)


def true_of_actions(world: World, batch: Batch) -> None:
    """Scores of single replies: what is expected of the whole conversation once this reply was
    given to these words."""
    assert batch.turn_scores is not None
    batch.turn_scores = batch.turn_scores.clone()
    for e, episode in enumerate(batch.episodes):
        before = 0.0
        for k, turn in enumerate(episode.turns):
            batch.turn_scores[e, k] = before + world.worth(
                turn.observation.content[-1], k, turn.action
            )
            before += turn.reward


@cache
def fitted(world: World) -> Redistribute:
    """Fitted on 4,096 conversations of the policy, as the updates before would have done."""
    _, chances, _, _ = slopes(world)
    drawn = np.random.default_rng(7).choice(len(chances), 4096, p=chances / chances.sum())
    method = Redistribute()
    method.fit(batch_of(world, tuple((int(i),) for i in drawn), False))
    return method


ROWS = (
    Row(
        "`outcome`, `baseline: std` (default)",
        lambda w: OutcomeCredit(),
        "GRPO as everybody runs it: starts count alike whatever their spread, so one `lr` fits;"
        " starts where success is rare weigh more",
    ),
    Row(
        "`outcome`, `mean`",
        lambda w: OutcomeCredit(baseline="mean"),
        "Dr. GRPO: the right direction, (G-1)/G of its length; the step size is `lr`'s anyway",
    ),
    Row(
        "`outcome`, `loo`",
        lambda w: OutcomeCredit(baseline="loo"),
        "RLOO: nothing to weigh up but its noise",
    ),
    Row(
        "`outcome`, `loo`, KL in the reward",
        lambda w: OutcomeCredit(baseline="loo"),
        "as before",
        kl=True,
    ),
    Row(
        "`outcome`, `loo`, `truncated: count` (default)",
        lambda w: OutcomeCredit(baseline="loo"),
        "unbiased for the outcome as it counts: what a conversation had when it was cut",
        world={"cut": True},
    ),
    Row(
        "`outcome`, `loo`, `truncated: drop`",
        lambda w: OutcomeCredit(baseline="loo", truncated="drop"),
        "a conversation that was cut says nothing of its end; but what leads to being cut is then"
        " neither praised nor blamed",
        world={"cut": True},
    ),
    Row("`turn-returns`", lambda w: TurnReturns(), "rewards at turns"),
    Row("`turn-returns`, KL in the reward", lambda w: TurnReturns(), "as before", kl=True),
    Row(
        "`turn-returns`, `baseline: none`",
        lambda w: TurnReturns(baseline="none"),
        "single conversations; whiten in the optimizer against the noise",
        (1,),
    ),
    Row(
        "`turn-returns`, `gamma: 0.9`",
        lambda w: TurnReturns(gamma=GAMMA),
        "what comes much later is mostly luck: less noise for a nearer aim",
    ),
    Row(
        "`gigpo` (default, `gamma` 0.95)",
        lambda w: GiGPO(),
        "states that recur: turns are compared where they were taken, and it learns faster for it",
    ),
    Row("`gigpo`, `gamma: 1`", lambda w: GiGPO(gamma=1.0), "as before, without the discount"),
    Row(
        "`gigpo`, `omega: 0`",
        lambda w: GiGPO(omega=0.0),
        "it is `outcome` with `mean`; the larger `omega`, the more of the bias above",
    ),
    Row(
        "`gigpo`, `similarity: 0.8` that takes A and B for one",
        lambda w: GiGPO(similarity=0.8),
        "states in many words; too low a share compares what is not alike",
    ),
    Row(
        "`gigpo`, `baseline: std`",
        lambda w: GiGPO(baseline="std"),
        "the paper's other form: what is compared counts alike whatever its spread",
    ),
    Row(
        "`gae` `token`, `lam: 1`, any critic",
        lambda w: GAE(lam=1.0),
        "no bias, and the noise of the whole rest",
        (1,),
        change=wrong,
    ),
    Row(
        "`gae` `token`, `lam` 0.95 (default), exact critic",
        lambda w: GAE(),
        "the critic takes the noise of what comes later",
        (1,),
    ),
    Row(
        "`gae` `token`, `lam` 0.95, a critic that errs",
        lambda w: GAE(),
        "the usual case: less noise, and the critic's errors in the gradient",
        (1,),
        change=wrong,
    ),
    Row(
        "`gae` `token`, `gamma: 0.9`, exact critic",
        lambda w: GAE(gamma=GAMMA),
        "as `gamma` of `turn-returns`, and the critic's values are of another aim",
        (1,),
    ),
    Row(
        "`gae` `turn`, `turn_lam: 1`, any critic",
        lambda w: GAE(unit="turn", turn_lam=1.0),
        "as `token` at 1",
        (1,),
        change=wrong,
    ),
    Row(
        "`gae` `turn`, `turn_lam` 0.95, exact critic",
        lambda w: GAE(unit="turn"),
        "many turns: the least noise of all that play nothing extra",
        (1,),
        {"many": True},
    ),
    Row(
        "`gae` `turn`, `turn_lam` 0.95, a critic that errs",
        lambda w: GAE(unit="turn"),
        "as `token`, at turns",
        (1,),
        change=wrong,
    ),
    Row(
        "`gae` `turn`, `turn_gamma: 0.9`, exact critic",
        lambda w: GAE(unit="turn", turn_gamma=GAMMA),
        "as `gamma` of `token`",
        (1,),
    ),
    Row(
        "`gae` `turn`, exact critic, KL in the reward",
        lambda w: GAE(unit="turn", turn_lam=1.0),
        "as before",
        (1,),
        kl=True,
    ),
    Row(
        "`gae` `bilevel`, `lam` 1 and `turn_lam` 1",
        lambda w: GAE(unit="bilevel", lam=1.0, turn_lam=1.0),
        "as `token` at 1",
        (1,),
        {"many": True},
    ),
    Row(
        "`gae` `bilevel` (default 0.95), exact critic",
        lambda w: GAE(unit="bilevel"),
        "VAGEN's: a critic for turns and tokens; V is read where the last token was chosen, which"
        " depends on that choice's place",
        (1,),
        {"many": True},
    ),
    Row(
        "`gae` `bilevel`, `lam` 0, `turn_lam` 0, exact critic",
        lambda w: GAE(unit="bilevel", lam=0.0, turn_lam=0.0),
        "shows what the line above is made of",
        (1,),
        {"many": True},
    ),
    Row(
        "`branch`",
        lambda w: BranchCredit(),
        "needs an environment that repeats itself, and pays for its precision in play",
        (1,),
    ),
    Row(
        "`branch`, KL in the reward",
        lambda w: BranchCredit(),
        "a penalty is charged to its own turn and to none before it",
        (1,),
        kl=True,
    ),
    Row(
        "`counterfactual`",
        lambda w: Counterfactual(),
        "as `branch`, with the luck of what came after",
        (1,),
    ),
    Row(
        "`counterfactual`, KL in the reward",
        lambda w: Counterfactual(),
        "as `branch`",
        (1,),
        kl=True,
    ),
    Row(
        "`judged`, `scores: delta`, a judge who is right",
        lambda w: Judged(scores="delta", initial=w.value("A", 0)),
        "as good as the judge",
        (1,),
    ),
    Row(
        "`judged`, `scores: delta`, KL in the reward",
        lambda w: Judged(scores="delta", initial=w.value("A", 0)),
        "as `branch`",
        (1,),
        kl=True,
    ),
    Row(
        "`judged`, `scores: delta`, `initial` wrong by 1",
        lambda w: Judged(scores="delta", initial=w.value("A", 0) + 1.0),
        "a constant on the first turn: noise alone",
        (1,),
    ),
    Row(
        "`judged`, `scores: delta`, `outcome: 1`",
        lambda w: Judged(scores="delta", initial=w.value("A", 0), outcome=1.0),
        "holds the judge to what came out: the sum of two right gradients",
    ),
    Row(
        "`judged`, `scores: delta`, a judge who errs",
        lambda w: Judged(scores="delta", initial=w.value("A", 0)),
        "the usual case: what the judge gets wrong is trained",
        (1,),
        change=misjudged,
    ),
    Row(
        "`judged`, `scores: delta`, `smear: 0.5`",
        lambda w: Judged(scores="delta", initial=w.value("A", 0), smear=0.5),
        "where a judge notices late what an earlier turn had done",
        (1,),
    ),
    Row(
        "`judged`, `scores: absolute` (default), score = Q(s, a)",
        lambda w: Judged(),
        "a judge of replies; the mean of the others is its baseline",
        change=true_of_actions,
    ),
    Row(
        "`redistribute`, before it has learned",
        lambda w: Redistribute(),
        "`outcome` spread evenly, 1/K for each turn",
    ),
    Row(
        "`redistribute`, after 4,096 conversations",
        fitted,
        "nearly free of noise, and of play; wrong by what its words do not say",
    ),
)


@dataclass(frozen=True)
class Measured:
    """What a row came to at one group size, over worlds: the median and the largest bias, and the
    smallest cosine."""

    bias: float
    largest: float
    smallest: float

    @property
    def cells(self) -> tuple[str, str]:
        bias = "0" if self.largest < 1e-5 else f"{self.bias:.2f} ({self.largest:.2f})"
        return (
            bias,
            (
                "1"
                if self.smallest > 1 - 1e-6
                else "above 0.99"
                if self.smallest > 0.99
                else f"{self.smallest:.2f}"
            ),
        )


def expected(world: World, row: Row, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """E g and grad J."""
    told, chances, each, sums = slopes(world)
    groups = tuple(itertools.combinations_with_replacement(range(len(told)), size))
    batch = batch_of(world, groups, row.kl)
    if row.change:
        batch = copy.copy(batch)
        row.change(world, batch)
    advantages = row.make(world).assign(batch).advantages.double().numpy()
    found, e = np.zeros(each[0].shape[1]), 0
    for members in groups:
        orders = math.factorial(size) / math.prod(
            math.factorial(members.count(i)) for i in set(members)
        )
        chance = orders * math.prod(chances[i] for i in members) / size
        for i in members:
            found += chance * (advantages[e, : len(each[i])] @ each[i])
            e += 1
    aims = np.array([one.outcome for one in told]) - COEF * row.kl * (sums - reference(world))
    return found, sum(p * r * grads.sum(0) for p, r, grads in zip(chances, aims, each, strict=True))


def reference(world: World) -> NDArray[np.float64]:
    """Summed log-probs of every conversation [T] under the reference, which chooses every token
    alike."""
    return np.array(
        [
            -sum(
                math.log(len(world.options(t[:n]))) for _, t, _ in one.steps for n in range(len(t))
            )
            for one in world.conversations()
        ]
    )


def kl_in_the_loss(estimator: str) -> Measured:
    """The gradient of the estimator's mean over conversations of its sum over tokens, against that
    of the conversations' KL."""
    biases, cosines = [], []
    for seed in SEEDS:
        world = World(seed, "end")
        told, chances, each, sums = slopes(world)
        logprobs, found = world.logprobs(), np.zeros(each[0].shape[1])
        for one, chance, grads in zip(told, chances, each, strict=True):
            own = torch.tensor(
                [logprobs[s, t[:n]][t[n]] for s, t, _ in one.steps for n in range(len(t))],
                requires_grad=True,
            )
            base = torch.tensor(
                [
                    -math.log(len(world.options(t[:n])))
                    for _, t, _ in one.steps
                    for n in range(len(t))
                ]
            )
            [slope] = torch.autograd.grad(kl_estimate(own, base, estimator).sum(), own)
            found += chance * (slope.double().numpy() @ grads)
        true = sum(
            p * r * grads.sum(0)
            for p, r, grads in zip(chances, sums - reference(world), each, strict=True)
        )
        biases.append(float(np.linalg.norm(found - true) / np.linalg.norm(true)))
        cosines.append(float(found @ true / (np.linalg.norm(found) * np.linalg.norm(true))))
    return Measured(float(np.median(biases)), max(biases), min(cosines))


def measured(row: Row, size: int) -> Measured:
    biases, cosines = [], []
    for seed, paid in itertools.product(SEEDS, PAID):
        found, true = expected(World(seed, paid, **row.world), row, size)
        biases.append(float(np.linalg.norm(found - true) / np.linalg.norm(true)))
        cosines.append(
            float(found @ true / (np.linalg.norm(found) * np.linalg.norm(true) + 1e-300))
        )
    return Measured(float(np.median(biases)), max(biases), min(cosines))


def verdict(found: list[Measured]) -> str:
    if max(m.largest for m in found) < 1e-5:
        return "unbiased"
    return "right in direction" if min(m.smallest for m in found) > 1 - 1e-6 else "biased"


def line(row: Row, sizes: tuple[int, ...]) -> list[str]:
    """The cells of a row's numbers: verdict, bias and cosine at these group sizes."""
    found = [measured(row, size) for size in sizes]
    return [
        verdict(found),
        *("; ".join(column) for column in zip(*(m.cells for m in found), strict=True)),
    ]


def markdown() -> str:
    """The tables: per group size the median bias and the largest, and the smallest cosine."""
    lines = [
        (
            "| method | its gradient is | groups of | bias, median (largest) | cosine, smallest |"
            " why all the same |"
        ),
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in ROWS:
        sizes = "; ".join(map(str, row.sizes)) if row.sizes != (1,) else "any"
        state, bias, cosine = line(row, row.sizes)
        lines.append(f"| {row.name} | {state} | {sizes} | {bias} | {cosine} | {row.why} |")
    lines += [
        "",
        "| KL to the reference in the loss | bias, median (largest) | cosine, smallest |",
        "| --- | --- | --- |",
    ]
    for estimator in ("k2", "k3"):
        bias, cosine = kl_in_the_loss(estimator).cells
        lines.append(f"| `kl_place: loss`, `{estimator}` | {bias} | {cosine} |")
    return "\n".join(lines)


BEGIN, END = "<!-- written by benchmarks/credit_bias.py -->\n", "\n<!-- end -->"


def main() -> None:
    text = PAGE.read_text()
    PAGE.write_text(
        re.sub(
            f"{BEGIN}.*?{END}", lambda _: BEGIN + markdown() + END, text, count=1, flags=re.DOTALL
        )
    )


if __name__ == "__main__":
    main()
