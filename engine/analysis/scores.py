"""Scores episodes, with bootstrap intervals, and compares players on the same starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import TooManyFailures
from ..records.episode import Episode

Z = 1.959964  # of the normal distribution, for 95 %


@dataclass(frozen=True, slots=True)
class Score:
    """The results of one player.

    Attributes:
        outcome: mean return.
        success: share of successes, see `Episode.succeeded`.
        low, high: 95 % bootstrap interval of `success`, over tasks.
        outcome_low, outcome_high: the same of `outcome`.
        turns, questions: per episode; a reply that contains "?" counts as a question.
        episodes, failed: how many were played, and how many of them broke in their environment.
        tasks: how many different ones they were about: rows of a data set, else starts.
        unanswered: how many ended before there was a reply, such as those whose first prompt does
            not fit the policy's context.
        failed_users: how many of the failed ones did so because their user did not answer.
        optimum: mean of the starts' optima, where the environment knows them.
    """

    outcome: float
    success: float
    low: float
    high: float
    outcome_low: float
    outcome_high: float
    turns: float
    questions: float
    episodes: int
    failed: int
    tasks: int
    unanswered: int = 0
    failed_users: int = 0
    optimum: float | None = None


def bootstrap(
    values: Sequence[float],
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
    tasks: Sequence[str] | None = None,
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the mean.

    Args:
        tasks: what each value is about; values of one task are drawn together, since they are not
            independent. None: each is a task of its own.
    """
    data = np.asarray(values, dtype=float)
    if not len(data):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    _, place = np.unique(list(tasks or range(len(data))), return_inverse=True)
    if place.max() + 1 == len(data):
        means = data[rng.integers(len(data), size=(draws, len(data)))].mean(1)
    else:
        sums, counts = np.bincount(place, data), np.bincount(place)
        drawn = rng.integers(len(sums), size=(draws, len(sums)))
        means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_interval(values: Sequence[float], tasks: Sequence[str]) -> tuple[float, float]:
    """Returns the 95 % interval of a share: the bootstrap's over tasks, and Wilson's where all
    values are 0, or all 1, which the bootstrap takes for certain."""
    if not values or 0 < sum(values) < len(values):
        return bootstrap(values, tasks=tasks)
    count = len(set(tasks))
    reach = Z**2 / (count + Z**2)
    return (1.0 - reach, 1.0) if values[0] else (0.0, reach)


def score(episodes: Sequence[Episode]) -> Score:
    """Summarises one player's episodes. Failed ones are counted and left out.

    Raises:
        TooManyFailures: every episode failed.
    """
    sound = [e for e in episodes if e.ending != "failed"]
    if not sound:
        raise TooManyFailures(
            f"all {len(episodes)} episodes failed:"
            f" {episodes[0].reason if episodes else 'none was played'}"
        )
    returns = [e.env_return for e in sound]
    successes = [float(e.succeeded) for e in sound]
    tasks = [e.task for e in sound]
    optima = [e.info["optimum"] for e in sound if "optimum" in e.info]
    return Score(
        float(np.mean(returns)), float(np.mean(successes)), *share_interval(successes, tasks),
        *bootstrap(returns, tasks=tasks),
        turns=float(np.mean([len(e.turns) for e in sound])),
        questions=float(np.mean([sum("?" in t.action for t in e.turns) for e in sound])),
        episodes=len(episodes), failed=len(episodes) - len(sound), tasks=len(set(tasks)),
        unanswered=sum(not e.turns for e in sound),
        failed_users=sum(e.user_failed for e in episodes),
        optimum=float(np.mean(optima)) if optima else None,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two players on the same starts, first minus second.

    Attributes:
        outcome, success: mean differences.
        outcome_low, outcome_high, success_low, success_high: 95 % bootstrap intervals over the
            starts.
        pairs: starts that both played to an end.
        win_rate: share of starts on which a judge prefers the first player, ties half, each pair
            shown in both orders; None without a judge.
        win_low, win_high: its interval.
        flips: share of the pairs whose verdict turned when their order did.
        unjudged: pairs on which the judge failed or abstained; never counted as a loss or a tie.
    """

    outcome: float
    outcome_low: float
    outcome_high: float
    success: float
    success_low: float
    success_high: float
    pairs: int
    win_rate: float | None = None
    win_low: float | None = None
    win_high: float | None = None
    flips: float | None = None
    unjudged: int = 0


def paired(first: Sequence[Episode], second: Sequence[Episode], **judged: Any) -> Difference:
    """Compares two players start by start; starts that either of them failed to play are left out.

    Args:
        first, second: their episodes, in the order of the same starts.
        judged: the fields of a judge's verdict.

    Raises:
        ValueError: other starts.
    """
    if [e.start.key for e in first] != [e.start.key for e in second]:
        raise ValueError(
            "a paired comparison needs both players' episodes from the same starts, in the same"
            " order"
        )
    sound = [
        (a, b) for a, b in zip(first, second, strict=True) if "failed" not in (a.ending, b.ending)
    ]
    outcomes = [a.env_return - b.env_return for a, b in sound]
    successes = [float(a.succeeded) - float(b.succeeded) for a, b in sound]
    mean = lambda values: float(np.mean(values)) if values else float("nan")  # noqa: E731
    tasks = [a.task for a, _ in sound]
    return Difference(
        mean(outcomes), *bootstrap(outcomes, tasks=tasks),
        mean(successes), *bootstrap(successes, tasks=tasks),
        pairs=len(sound), **judged
    )  # fmt: skip
