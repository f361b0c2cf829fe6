"""Which turn earned the outcome, and who finds out? Credit methods against the truth, and how fast
a policy learns from each.

    python benchmarks/credit.py --out runs/bench-credit   # about an hour on 2 cores, most of it for
        `lm`; resumable
    python benchmarks/credit.py --out runs/bench-credit --parts truth curves --workers 1

Two worlds, small enough to be known exactly, played with 5 and with 20 turns; the reward comes at
the end and nowhere else:

- maze: `turnwise/Maze-v0` with `reward="exit"`, 1 for getting out in time (binary; states recur; a
  wrong turn can be repaired);
- quiz: a topic at every turn, one of four replies right for it, the share of right replies at the
  end (every turn counts, none can be repaired; the topics are the same for all members of a group).

The policy is a table: one softmax per observation. The credit methods are the engine's own, given
batches of episodes.

- truth: at frozen policies of three skill levels, each method's credit of every turn against the
  true advantage A(s, a) = Q(s, a) - V(s), by dynamic programming: bias, spread, rank correlation,
  and extra rollouts per conversation. What learns (critic, redistribution) has seen 1024
  conversations before. For `branch` the rank correlation that binomial noise allows at its number
  of rollouts is simulated beside it.
- curves: two groups of four conversations per step, 15 seeds, from the uniform policy until the
  expected outcome, computed exactly, has closed 80 % of the way from random to optimum. Step sizes
  are chosen per method and cell on seeds 0 to 4, and so is the turn-level method that is compared
  with `outcome`; seeds 5 to 14 confirm. Conversations continued anew count like any other. `truth`
  learns from the true advantages: what there is to win.
- lm: one cell (maze, 20 turns) with the language model, through `turnwise.train`, three seeds each.

Writes results.json, results.md (the page docs/credit-benchmark.md), credit-truth.png and
credit-curves.png into --out. Every cell is kept there, and not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import turnwise
from numpy.typing import NDArray
from scipy.stats import spearmanr
from turnwise.engine.policy.batching import make_batch
from turnwise.engine.records.batch import Batch
from turnwise.engine.records.episode import Episode, Message, Start, Turn
from turnwise.engine.records.rewards import Rewards
from turnwise.envs.maze import MOVES, Maze
from turnwise.plugins.credit.branch import BranchCredit
from turnwise.plugins.credit.counterfactual import Counterfactual
from turnwise.plugins.credit.gae import GAE
from turnwise.plugins.credit.gigpo import GiGPO
from turnwise.plugins.credit.judged import Judged
from turnwise.plugins.credit.outcome import OutcomeCredit
from turnwise.plugins.credit.redistribute import Redistribute
from turnwise.plugins.credit.turn_returns import TurnReturns

Array = NDArray[Any]
CELLS = [("maze", 5), ("maze", 20), ("quiz", 5), ("quiz", 20)]
# Share of replies at random, the others optimal.
SKILLS = {"random": 1.0, "middling": 0.5, "good": 0.1}
SIZE = 4  # conversations per group
# Few when learning: noise, not the number of steps, should limit who learns.
GROUPS = {"truth": 16, "curves": 2}
LIMIT = {5: 10_000, 20: 30_000}  # conversations after which a run counts as never
STEPS = [0.05, 0.1, 0.2, 0.4, 0.8]
CURVES = ["outcome", "gae", "gigpo", "redistribute", "branch", "judged", "turn-returns", "truth"]
TUNE, CONFIRM = range(5), range(5, 15)


# Worlds.


class World(Protocol):
    """A dialogue as tables: S observations, M replies, at most H turns.

    Attributes:
        texts, replies: [S] and [M], what is said.
        optimal: [S, M] bool, the replies that are best.
    """

    turns: int
    texts: list[str]
    replies: list[str]
    optimal: Array

    def begin(self, rng: np.random.Generator, starts: int) -> Array: ...  # so many starts

    def first(self, start: Array) -> Array: ...  # the state each begins in

    # What is heard there, as an index.
    def observe(self, start: Array, state: Array, turn: int) -> Array: ...

    # Next state, is it over.
    def step(self, start: Array, state: Array, action: Array, turn: int) -> tuple[Array, Array]: ...

    def outcome(self, state: Array) -> Array: ...

    def value(self, policy: Array) -> float: ...  # exact expected outcome of a policy [S, M]

    def best(self) -> float: ...  # and of the best one

    def paid(
        self, played: Played, e: int
    ) -> list[float]: ...  # what each turn of a conversation earned, if it were paid at once

    def advantage(self, policy: Array) -> Array: ...  # exact A [H, S, M]


class MazeWorld:
    """`Maze(size, reward="exit", steps=turns)`; a state is a cell."""

    def __init__(self, turns: int) -> None:
        self.turns = turns
        maze = Maze(size=3 if turns == 5 else 6, reward="exit", steps=turns)
        self.cells = sorted(maze.doors.keys() - {maze.exit})
        place = {cell: i for i, cell in enumerate([*self.cells, maze.exit])}
        self.out = len(self.cells)
        self.replies = [f"I go {name}." for name in MOVES]
        self.next = np.array(
            [[place[maze.doors[c].get(name, c)] for name in MOVES] for c in self.cells]
            + [[self.out] * 4]
        )
        self.texts = []
        for cell in self.cells:
            maze.cell = cell
            self.texts.append(maze._where())
        away = np.array([*(maze.distances[c] for c in self.cells), 0])
        self.optimal = away[self.next[: self.out]] < away[: self.out, None]
        self.away = away

    def begin(self, rng: np.random.Generator, starts: int) -> Array:
        return rng.integers(self.out, size=starts)

    def first(self, start: Array) -> Array:
        return start.copy()

    def observe(self, start: Array, state: Array, turn: int) -> Array:
        return state

    def step(self, start: Array, state: Array, action: Array, turn: int) -> tuple[Array, Array]:
        after = self.next[state, action]
        return after, after == self.out

    def outcome(self, state: Array) -> Array:
        return (state == self.out).astype(float)

    def values(self, policy: Array) -> Array:
        """[H + 1, S + 1] chance of getting out from a cell with turn k to play."""
        v = np.zeros((self.turns + 1, self.out + 1))
        v[:, self.out] = 1.0
        for k in reversed(range(self.turns)):
            v[k, : self.out] = (policy * v[k + 1][self.next[: self.out]]).sum(1)
        return v

    def value(self, policy: Array) -> float:
        return float(self.values(policy)[0, : self.out].mean())

    def advantage(self, policy: Array) -> Array:
        v = self.values(policy)
        return v[1:][:, self.next[: self.out]] - v[:-1, : self.out, None]

    def best(self) -> float:
        return float((self.away[: self.out] <= self.turns).mean())

    def paid(self, played: Played, e: int) -> list[float]:
        return [0.0] * int(played.length[e] - 1) + [float(played.outcome[e])]


class QuizWorld:
    """Topics drawn anew at every turn; the state counts right replies."""

    def __init__(self, turns: int, topics: int = 20, choices: int = 4) -> None:
        self.turns = turns
        rng = np.random.default_rng(turns)
        self.texts = [f"The question is about topic {i + 1}." for i in range(topics)]
        self.replies = [f"Reply {chr(97 + i)}." for i in range(choices)]
        self.right = rng.integers(choices, size=topics)
        self.optimal = np.arange(choices) == self.right[:, None]

    def begin(self, rng: np.random.Generator, starts: int) -> Array:
        return rng.integers(len(self.texts), size=(starts, self.turns))

    def first(self, start: Array) -> Array:
        return np.zeros(len(start), dtype=int)

    def observe(self, start: Array, state: Array, turn: int) -> Array:
        return start[:, turn]

    def step(self, start: Array, state: Array, action: Array, turn: int) -> tuple[Array, Array]:
        after = state + (action == self.right[start[:, turn]])
        return after, np.full(len(state), turn + 1 == self.turns)

    def outcome(self, state: Array) -> Array:
        return state / self.turns

    def value(self, policy: Array) -> float:
        return float((policy * self.optimal).sum(1).mean())

    def advantage(self, policy: Array) -> Array:
        chance = (policy * self.optimal).sum(1, keepdims=True)
        return np.repeat(((self.optimal - chance) / self.turns)[None], self.turns, 0)

    def best(self) -> float:
        return 1.0

    def paid(self, played: Played, e: int) -> list[float]:
        return [float(r) / self.turns for r in played.did[e] == self.right[played.seen[e]]]


@cache
def world(name: str, turns: int) -> World:
    return MazeWorld(turns) if name == "maze" else QuizWorld(turns)


# Play.


class Played:
    """Conversations as arrays.

    E of them, H turns: observation, action, state before each turn [E, H]; how many turns [E];
    outcome [E].
    """

    def __init__(
        self,
        w: World,
        policy: Array,
        start: Array,
        state: Array,
        turn: int,
        rng: np.random.Generator,
    ):
        size = len(state)
        self.start, self.outcome = start, np.zeros(size)
        self.seen, self.did, self.state = (np.full((size, w.turns), -1) for _ in range(3))
        self.length = np.full(size, turn)
        alive = np.arange(size)
        total = policy.cumsum(1)
        for k in range(turn, w.turns):
            if not len(alive):
                break
            seen = w.observe(start[alive], state[alive], k)
            did = (rng.random((len(alive), 1)) > total[seen]).sum(1).clip(max=policy.shape[1] - 1)
            self.seen[alive, k], self.did[alive, k], self.state[alive, k] = seen, did, state[alive]
            after, over = w.step(start[alive], state[alive], did, k)
            state[alive] = after
            self.length[alive] = k + 1
            alive = alive[~over]
        self.outcome = w.outcome(state)
        self.final = state


def play(w: World, policy: Array, groups: int, rng: np.random.Generator) -> Played:
    start = np.repeat(w.begin(rng, groups), SIZE, axis=0)
    return Played(w, policy, start, w.first(start), 0, rng)


def branch_values(
    w: World, policy: Array, played: Played, rollouts: int, rng: np.random.Generator
) -> tuple[Any, int]:
    """Mean outcome of continuations from every turn's start [E, H], and how many conversations that
    took. States that members of a group share are valued once, as the engine does."""
    values = torch.full(played.seen.shape, float("nan"))
    cost = 0
    for k in range(w.turns):
        here = np.flatnonzero(played.length > k)
        if not len(here):
            break
        group = here // SIZE
        paths = np.concatenate([group[:, None], played.did[here, :k]], 1)
        _, first, which = np.unique(paths, axis=0, return_index=True, return_inverse=True)
        some = np.repeat(here[first], rollouts)
        again = Played(w, policy, played.start[some], played.state[some, k].copy(), k, rng)
        means = again.outcome.reshape(-1, rollouts).mean(1)
        values[here, k] = torch.tensor(means[which.ravel()], dtype=torch.float32)
        cost += len(some)
    return values, cost


def as_batch(w: World, played: Played, paid_at_turns: bool = False) -> Batch:
    """The conversations as the engine's own batch: one token per reply; paid at the end, or for
    each turn as far as the world knows."""
    heard = [Message("user", text) for text in w.texts]
    over = Message("user", "It is over.")
    episodes, rewards = [], []
    for e in range(len(played.length)):
        turns = tuple(
            Turn(
                heard[played.seen[e, k]],
                w.replies[played.did[e, k]],
                0.0,
                (0,),
                (int(played.did[e, k]),),
                (0.0,),
            )
            for k in range(played.length[e])
        )
        start = Start("bench/credit", int(e // SIZE))
        episodes.append(Episode(str(e), start, turns, "terminated", final=over))
        outcome = float(played.outcome[e])
        at_end = (0.0,) * (len(turns) - 1) + (outcome,)
        rewards.append(Rewards(outcome, tuple(w.paid(played, e)) if paid_at_turns else at_end))
    return make_batch(episodes, rewards)


class Critic:
    """What is expected with turn k to play after observation s: a table, moved towards the means of
    the value targets."""

    def __init__(self, w: World, rate: float = 0.3) -> None:
        self.table, self.rate = np.zeros((w.turns, len(w.texts))), rate

    def values(self, played: Played) -> torch.Tensor:
        turns = np.arange(played.seen.shape[1])
        return torch.tensor(
            np.where(played.seen >= 0, self.table[turns, played.seen], 0.0), dtype=torch.float32
        )

    def learn(self, played: Played, targets: torch.Tensor) -> None:
        e, k = np.nonzero(played.seen >= 0)
        sums, counts = np.zeros_like(self.table), np.zeros_like(self.table)
        np.add.at(sums, (k, played.seen[e, k]), targets.numpy()[e, k])
        np.add.at(counts, (k, played.seen[e, k]), 1.0)
        met = counts > 0
        self.table[met] += self.rate * (sums[met] / counts[met] - self.table[met])


class Method:
    """A credit method at work on a table: what it needs is supplied, what it learns is learned, and
    what it costs is counted."""

    def __init__(self, name: str, w: World) -> None:
        self.name, self.w = name, w
        self.critic = Critic(w)
        self.credit: Any = {
            "outcome": lambda: OutcomeCredit(baseline="loo"),
            "gae": lambda: GAE(unit="turn", turn_lam=0.8),
            "gigpo": GiGPO,
            "redistribute": lambda: Redistribute(features=512),
            "branch": lambda: BranchCredit(rollouts=4),
            "branch-8": lambda: BranchCredit(rollouts=8),
            "branch-32": lambda: BranchCredit(rollouts=32),
            "counterfactual-8": lambda: Counterfactual(rollouts=8),
            "judged": lambda: Judged(scores="delta"),
            "turn-returns": TurnReturns,
            "truth": lambda: None,
        }[name]()

    def assign(self, policy: Array, played: Played, rng: np.random.Generator) -> tuple[Array, int]:
        """Credit of every turn [E, H], and how many conversations it took beside those played."""
        if self.credit is None:  # the true advantages: what no method can beat by much
            return np.nan_to_num(true_advantages(self.w, policy, played)), 0
        batch, cost = as_batch(self.w, played, paid_at_turns=self.name == "turn-returns"), 0
        width = batch.turn_mask.shape[1]
        if "values" in self.credit.needs:
            batch.values, batch.bootstrap = (
                self.critic.values(played)[:, :width],
                torch.zeros(len(played.length)),
            )
        if "branches" in self.credit.needs:
            values, cost = branch_values(self.w, policy, played, self.credit.branches, rng)
            batch.branch_values = values[:, :width]
        # A judge who sees how good the conversation stands, with noise.
        if "turn_scores" in self.credit.needs:
            batch.turn_scores = self._judge(policy, played, rng)[:, :width]
        credit = self.credit.assign(batch)
        if credit.value_targets is not None:
            self.critic.learn(played, credit.value_targets)
        if hasattr(self.credit, "fit"):
            self.credit.fit(batch)
        found = np.zeros(played.seen.shape)
        found[:, :width] = credit.turn_credit.numpy()
        return found, cost

    def _judge(self, policy: Array, played: Played, rng: np.random.Generator) -> torch.Tensor:
        true = true_advantages(self.w, policy, played)
        stands = np.cumsum(np.nan_to_num(true), 1) + 0.1 * rng.standard_normal(true.shape)
        return torch.tensor(np.where(played.seen >= 0, stands, np.nan), dtype=torch.float32)


def true_advantages(w: World, policy: Array, played: Played) -> Array:
    """[E, H], NaN after the end."""
    table = w.advantage(policy)
    turns = np.arange(w.turns)
    return np.where(played.seen >= 0, table[turns, played.seen, played.did], np.nan)


# Part one: the truth.

TRUTH = [
    "outcome",
    "gae",
    "gigpo",
    "redistribute",
    "branch-8",
    "branch-32",
    "counterfactual-8",
    "judged",
]


def truth_cell(name: str, turns: int, skill: str, method: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    w, rng = world(name, turns), np.random.default_rng(7)
    share = SKILLS[skill]
    best = w.optimal / w.optimal.sum(1, keepdims=True)
    policy = (1 - share) * best + share / w.optimal.shape[1]
    m = Method(method, w)
    if method in ("gae", "redistribute"):
        for _ in range(1024 // (GROUPS["truth"] * SIZE)):
            m.assign(policy, play(w, policy, GROUPS["truth"], rng), rng)
    estimates, truths, places, cost, count = [], [], [], 0, 0
    measured: list[Played] = []
    while count < 2048:
        played = play(w, policy, GROUPS["truth"], rng)
        measured.append(played)
        credit, extra = m.assign(policy, played, rng)
        true = true_advantages(w, policy, played)
        here = played.seen >= 0
        estimates.append(credit[here])
        truths.append(true[here])
        turn = np.broadcast_to(np.arange(turns), here.shape)[here]
        places.append((turn * len(w.texts) + played.seen[here]) * len(w.replies) + played.did[here])
        cost += extra
        count += len(played.length)
    estimate, true, place = map(np.concatenate, (estimates, truths, places))
    sums, squares, counts, truth = (
        np.bincount(place, weights=x) for x in (estimate, estimate**2, np.ones_like(estimate), true)
    )
    many = counts >= 8
    means = sums[many] / counts[many]
    variance = (squares[many] / counts[many] - means**2) * counts[many] / (counts[many] - 1)
    off = means - truth[many] / counts[many]
    weight = counts[many] / counts[many].sum()
    # What the mean is off, less what chance explains.
    bias2 = float((weight * (off**2 - variance / counts[many])).sum())
    found = {
        "world": name, "turns": turns, "skill": skill, "method": method,
        "success": float(w.value(policy)),
        "true_std": float(true.std()), "bias": float(np.sqrt(max(bias2, 0.0))),
        "std": float(np.sqrt((weight * variance).sum())),
        "rank": float(spearmanr(estimate, true).statistic) if estimate.std() > 0 else None,
        "rollouts": cost / count,
    }  # fmt: skip
    if method.startswith("branch-") and isinstance(w, MazeWorld) and true.std() > 0.01:
        found["ceiling"] = binomial_ceiling(
            w, policy, int(method.split("-")[1]), measured, true, rng
        )
    return found


def binomial_ceiling(
    w: MazeWorld,
    policy: Array,
    rollouts: int,
    measured: list[Played],
    true: Array,
    rng: np.random.Generator,
    draws: int = 20,
) -> float:
    """The rank correlation with the truth of V(s') - V(s) on these conversations when the two are
    known up to binomial noise of so many rollouts and nothing else: the mean of several draws."""
    v = w.values(policy)
    found = []
    for _ in range(draws):
        estimates = []
        for played in measured:
            turns = np.arange(w.turns)
            noisy = (
                rng.binomial(rollouts, np.where(played.seen >= 0, v[turns, played.state], 0.0))
                / rollouts
            )
            after = np.concatenate([noisy[:, 1:], np.zeros((len(noisy), 1))], 1)
            after[np.arange(len(noisy)), played.length - 1] = played.outcome
            estimates.append((after - noisy)[played.seen >= 0])
        found.append(float(spearmanr(np.concatenate(estimates), true).statistic))
    return statistics.mean(found)


# Part two: learning.


def learn(name: str, turns: int, method: str, step: float, seed: int) -> dict[str, Any]:
    """Conversations (extra ones included) until 80 % of the way from random to optimum, and the
    curve."""
    torch.set_num_threads(1)
    w, rng = world(name, turns), np.random.default_rng(1000 + seed)
    m = Method(method, w)
    logits = np.zeros((len(w.texts), len(w.replies)))
    first, second = np.zeros_like(logits), np.zeros_like(logits)  # Adam's moments
    low, high = w.value(np.full_like(logits, 1 / logits.shape[1])), w.best()
    spent, made, curve = 0, 0, []
    while True:
        policy = np.exp(logits - logits.max(1, keepdims=True))
        policy /= policy.sum(1, keepdims=True)
        closed = (w.value(policy) - low) / (high - low)
        curve.append((spent, round(closed, 4)))
        if closed >= 0.8 or spent >= LIMIT[turns]:
            break
        played = play(w, policy, GROUPS["curves"], rng)
        credit, extra = m.assign(policy, played, rng)
        here = played.seen >= 0
        seen, did, a = played.seen[here], played.did[here], credit[here]
        gradient = np.zeros_like(logits)
        np.add.at(gradient, (seen, did), a)
        weight = np.bincount(seen, weights=a, minlength=len(logits))
        gradient = (gradient - weight[:, None] * policy) / here.sum()
        made += 1
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        logits += step * (first / (1 - 0.9**made)) / (np.sqrt(second / (1 - 0.95**made)) + 1e-8)
        spent += len(played.length) + extra
    return {
        "world": name, "turns": turns, "method": method, "step": step, "seed": seed,
        "reached": closed >= 0.8, "spent": spent,
        "curve": curve[:: max(1, len(curve) // 100)] + curve[-1:],
    }  # fmt: skip


# Part three: the language model.

LM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # optimizer and credit
    "outcome": ({"name": "grpo"}, {"name": "outcome", "baseline": "mean"}),
    "gigpo": ({"name": "grpo"}, {"name": "gigpo"}),
    "turn gae": ({"name": "ppo", "value_clip": None}, {"name": "gae", "unit": "turn"}),
}
LM_ENV: dict[str, Any] = {"id": "turnwise/Maze-v0", "kwargs": {"reward": "exit", "steps": 20}}


def lm_cell(label: str, seed: int, folder: Path) -> dict[str, Any]:
    from turnwise.engine.pipeline.progress import quiet
    from turnwise.engine.stages.environments import EnvConfig
    from turnwise.engine.stages.evaluate import play_held_out
    from turnwise.learning import build_policy

    quiet()
    turnwise.Plugins()
    model = folder / f"sft-{seed}"
    common = {"seed": seed, "threads": 1, "checkpoint_every": 1000}
    if not (model / "sft" / "policy").exists():
        shown = play_held_out(turnwise.ScriptPlayer("demonstrator"), EnvConfig(**LM_ENV), 100, seed)
        small = build_policy(
            model / "model",
            [m.content for e in shown for m in e.messages],
            seed=seed,
            hidden=64,
            layers=2,
            heads=4,
            context=900,
        )
        sft = {
            "env": LM_ENV,
            "episodes": 600,
            "epochs": 1,
            "batch_size": 8,
            "lr": 5e-3,
            "weight_decay": 0.01,
            "micro_tokens": 16384,
        }
        turnwise.Run(
            {**common, "name": "sft", "policy": str(small), "stages": [{"sft": sft}]},
            folder=model / "sft",
        ).finish()
    optimizer, credit = LM[label]
    rl = {
        "env": LM_ENV, "updates": 60, "groups": 16, "group_size": 8, "max_new_tokens": 8,
        "credit": credit,
        "backend": {"name": "in-process", "rows": 128},
        "optimizer": {**optimizer, "lr": 2e-3, "kl": 0.01, "kl_place": "reward",
            "normalise": "whiten", "epochs": 1, "minibatches": 2, "micro_tokens": 16384},
    }  # fmt: skip
    name = label.replace(" ", "-")
    run = turnwise.Run(
        {**common, "name": name, "policy": str(model / "sft" / "policy"), "stages": [{"rl": rl}]},
        folder=folder / f"{name}-{seed}", resume=True,
    ).finish()  # fmt: skip
    curve = [m["success"] for m in run.metrics]
    return {"method": label, "seed": seed, "curve": curve, "last": statistics.mean(curve[-10:])}


# The page.


def kept(
    folder: Path, jobs: list[tuple[str, Any, tuple[Any, ...]]], workers: int
) -> list[dict[str, Any]]:
    """Results of the jobs (file name, function, arguments), those made before read from the
    folder."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [j for j in jobs if not (folder / f"{j[0]}.json").exists()]
    if missing:
        with ProcessPoolExecutor(workers) as pool:
            for (name, _, _), done in zip(missing, pool.map(_call, missing), strict=True):
                (folder / f"{name}.json").write_text(json.dumps(done) + "\n")
    return [json.loads((folder / f"{name}.json").read_text()) for name, _, _ in jobs]


def _call(job: tuple[str, Any, tuple[Any, ...]]) -> dict[str, Any]:
    return job[1](*job[2])


def truth_page(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## Against the true advantage", ""]
    for name, turns in CELLS:
        lines += [
            f"### {name}, {turns} turns",
            "",
            "| method | extra rollouts | "
            + " | ".join(f"{s}: bias | spread | rank" for s in SKILLS)
            + " |",
            "| --- | --- | " + " | ".join(["--- | --- | ---"] * len(SKILLS)) + " |",
        ]
        own = [r for r in rows if (r["world"], r["turns"]) == (name, turns)]
        spread = {s: next(r["true_std"] for r in own if r["skill"] == s) for s in SKILLS}
        lines.append(
            "| *(the truth itself)* | | "
            + " | ".join(f" | {spread[s]:.3f} | " for s in SKILLS)
            + " |"
        )
        for method in TRUTH:
            mine = {r["skill"]: r for r in own if r["method"] == method}
            cost = statistics.mean(r["rollouts"] for r in mine.values())
            cells = " | ".join(
                f"{mine[s]['bias']:.3f} | {mine[s]['std']:.3f} | {_rank(mine[s]['rank'])}"
                for s in SKILLS
            )
            lines.append(f"| {method} | {cost:.0f} | {cells} |")
        lines.append("")
    lines += [
        (
            "Rank correlation of `branch` with the truth, and the most that binomial noise allows"
            " (maze; where the truth spreads by 0.01 or more):"
        ),
        "",
        "| turns | skill | rollouts | branch | binomial ceiling | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in (r for r in rows if "ceiling" in r):
        lines.append(
            f"| {r['turns']} | {r['skill']} | {r['method'].split('-')[1]} | {r['rank']:.3f} |"
            f" {r['ceiling']:.3f} | {r['rank'] / r['ceiling']:.3f} |"
        )
    return [*lines, ""]


def _rank(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def spent(
    rows: list[dict[str, Any]], name: str, turns: int, method: str, step: float, seeds: Any
) -> list[float]:
    own = {
        r["seed"]: r
        for r in rows
        if (r["world"], r["turns"], r["method"], r["step"]) == (name, turns, method, step)
    }
    return [float(own[s]["spent"]) if own[s]["reached"] else float("inf") for s in seeds]


def median_ratio(
    first: list[float], second: list[float], draws: int = 4000
) -> tuple[float, float, float]:
    """Ratio of medians with a percentile bootstrap interval over the seeds, each method's seeds
    drawn for themselves."""
    rng = np.random.default_rng(0)
    a, b = np.array(first), np.array(second)
    ratios = [
        np.median(rng.choice(a, len(a))) / np.median(rng.choice(b, len(b))) for _ in range(draws)
    ]
    low, high = np.quantile(ratios, [0.025, 0.975], method="nearest")
    return float(np.median(a) / np.median(b)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench-credit"))
    parser.add_argument(
        "--parts", nargs="+", choices=["truth", "curves", "lm"], default=["truth", "curves", "lm"]
    )
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    out, workers = arguments.out, arguments.workers
    lines = [
        "# Credit methods, measured",
        "",
        (
            "Command: `python benchmarks/credit.py`; what it does stands at its top. This page is"
            " its output."
        ),
        "",
        "![Rank correlation with the true advantage](figures/credit-truth.png)",
        "",
        "![Learning curves](figures/credit-curves.png)",
        "",
    ]
    checks: dict[str, bool] = {}
    results: dict[str, Any] = {}
    if "truth" in arguments.parts:
        cells = [(n, t, s, m) for n, t in CELLS for s in SKILLS for m in TRUTH]
        rows = kept(out / "truth", [("-".join(map(str, c)), truth_cell, c) for c in cells], workers)
        results["truth"] = rows
        lines += truth_page(rows)
        for k in (8, 32):
            checks[
                "rank correlation of branch is at least 0.9 of what binomial noise allows (K ="
                f" {k})"
            ] = all(
                r["rank"] >= 0.9 * r["ceiling"]
                for r in rows
                if r["method"] == f"branch-{k}" and "ceiling" in r
            )
        draw_truth(rows, out / "credit-truth.png")
    if "curves" in arguments.parts:
        found, page, more = curves(out / "curves", workers)
        results["curves"] = [{k: v for k, v in r.items() if k != "curve"} for r in found]
        lines += page
        checks |= more
        draw_curves(found, out / "credit-curves.png")
    if "lm" in arguments.parts:
        seeds = range(3)
        for seed in seeds:  # the SFT policy all methods of a seed start from
            kept(out / "lm", [(f"outcome-{seed}", lm_cell, ("outcome", seed, out / "lm"))], 1)
        jobs = [
            (f"{m.replace(' ', '-')}-{s}", lm_cell, (m, s, out / "lm")) for m in LM for s in seeds
        ]
        found = kept(out / "lm", jobs, workers)
        results["lm"] = found
        lines += ["## With the language model (maze, 20 turns)", "",
            "| method | success, last 10 of 60 updates: seeds 0, 1, 2 | updates to 0.8 |",
            "| --- | --- | --- |"]  # fmt: skip
        for method in LM:
            own = [r for r in found if r["method"] == method]
            ends = ", ".join(f"{r['last']:.3f}" for r in own)
            when = ", ".join(
                str(
                    next(
                        (i for i in range(5, 61) if statistics.mean(r["curve"][i - 5 : i]) >= 0.8),
                        "never",
                    )
                )
                for r in own
            )
            lines.append(f"| {method} | {ends} | {when} |")
        lines.append("")
    lines += [*(f"- {'yes' if ok else '**NO**'}: {what}" for what, ok in checks.items()), ""]
    (out / "results.md").write_text("\n".join(lines))
    (out / "results.json").write_text(json.dumps({"checks": checks, **results}) + "\n")
    print("\n".join(lines))
    sys.exit(0 if all(checks.values()) else 1)


def curves(folder: Path, workers: int) -> tuple[list[dict[str, Any]], list[str], dict[str, bool]]:
    """Tunes on seeds 0 to 4, confirms on 5 to 14."""
    job = lambda n, t, m, a, s: (f"{n}-{t}-{m}-{a}-{s}", learn, (n, t, m, a, s))  # noqa: E731
    tuned = kept(
        folder,
        [job(n, t, m, a, s) for n, t in CELLS for m in CURVES for a in STEPS for s in TUNE],
        workers,
    )
    best: dict[tuple[str, int, str], float] = {}
    for n, t in CELLS:
        for m in CURVES:
            best[n, t, m] = min(STEPS, key=lambda a: (np.median(spent(tuned, n, t, m, a, TUNE)), a))
    confirmed = kept(
        folder,
        [job(n, t, m, best[n, t, m], s) for n, t in CELLS for m in CURVES for s in CONFIRM],
        workers,
    )
    rows = [r for r in tuned if r["step"] == best[r["world"], r["turns"], r["method"]]] + confirmed
    lines = [
        "## How fast a policy learns from it",
        "",
        (
            "Conversations, extra rollouts included, until 80 % of the way from random to optimum:"
            " median of seeds 5 to 14 (quartiles); step size chosen on seeds 0 to 4."
        ),
        "",
    ]
    halved: list[bool] = []
    for n, t in CELLS:
        lines += [
            f"### {n}, {t} turns",
            "",
            "| method | step | conversations | against outcome (95 % interval) |",
            "| --- | --- | --- | --- |",
        ]
        base = spent(rows, n, t, "outcome", best[n, t, "outcome"], CONFIRM)
        for m in CURVES:
            own = spent(rows, n, t, m, best[n, t, m], CONFIRM)
            low, middle, high = np.quantile(own, [0.25, 0.5, 0.75], method="nearest")
            ratio = median_ratio(own, base) if m != "outcome" else None
            against = f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else ""
            lines.append(
                f"| {m} | {best[n, t, m]:g} | {middle:,.0f} ({low:,.0f} to {high:,.0f}) |"
                f" {against} |"
            )
        others = [m for m in CURVES if m not in ("outcome", "turn-returns", "truth")]
        chosen = min(others, key=lambda m: np.median(spent(rows, n, t, m, best[n, t, m], TUNE)))
        ratio = median_ratio(spent(rows, n, t, chosen, best[n, t, chosen], CONFIRM), base)
        lines += ["", f"Chosen on seeds 0 to 4: `{chosen}`.", ""]
        if t == 20:
            halved.append(ratio[0] <= 0.5 and ratio[2] < 0.7)
            lines[-2] += (
                " Half of outcome's conversations or less, upper bound below 0.7:"
                f" {'yes' if halved[-1] else 'no'}."
            )
    what = (
        "in one of the worlds with 20 turns a method, chosen on other seeds, needs at most half of"
        " outcome's conversations"
    )
    return rows, lines, {what: any(halved)}


def draw_truth(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(CELLS), figsize=(13, 3.4), dpi=150, sharey=True)
    for axis, (name, turns) in zip(axes, CELLS, strict=True):
        for i, skill in enumerate(SKILLS):
            own = {
                r["method"]: r
                for r in rows
                if (r["world"], r["turns"], r["skill"]) == (name, turns, skill)
            }
            axis.plot(
                [own[m]["rank"] or 0.0 for m in TRUTH],
                range(len(TRUTH)),
                "o",
                label=f"{skill} policy",
                color=f"C{i}",
            )
        axis.set_yticks(range(len(TRUTH)), TRUTH)
        axis.invert_yaxis() if axis is axes[0] else None
        axis.set(
            title=f"{name}, {turns} turns",
            xlabel="rank correlation with the truth",
            xlim=(-0.1, 1.05),
        )
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False, fontsize=8
    )
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path)
    plt.close(figure)


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(CELLS), figsize=(13, 3.4), dpi=150, sharey=True)
    for axis, (name, turns) in zip(axes, CELLS, strict=True):
        for i, method in enumerate(CURVES):
            own = [
                r for r in rows if (r["world"], r["turns"], r["method"]) == (name, turns, method)
            ]
            grid = np.geomspace(SIZE, max(r["spent"] for r in own), 200)
            middle = np.median(
                [
                    np.interp(grid, np.array(r["curve"])[:, 0], np.array(r["curve"])[:, 1])
                    for r in own
                ],
                axis=0,
            )
            axis.plot(grid, middle, label=method, color=f"C{i}", linewidth=1.4)
        axis.axhline(0.8, color="0.7", linewidth=0.8)
        axis.set(title=f"{name}, {turns} turns", xlabel="conversations", xscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("closed, of random to optimum")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="upper center",
        ncols=len(CURVES),
        frameon=False,
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
