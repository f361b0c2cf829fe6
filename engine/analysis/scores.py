"""Scores episodes, with bootstrap intervals, and compares players on the same starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import TooManyFailures
from ..records.episode import Episode


@dataclass(frozen=True, slots=True)
class Score:
    """The results of one player.

    Attributes:
        outcome: mean return.
        success: share of successes, see `Episode.succeeded`.
        low, high: 95 % bootstrap interval of `success`.
        outcome_low, outcome_high: the same of `outcome`.
        turns, questions: per episode; a reply that contains "?" counts as a question.
        episodes, failed: how many were played, and how many of them broke in their environment.
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
    failed_users: int = 0
    optimum: float | None = None


def bootstrap(
    values: Sequence[float], seed: int = 0, draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the mean."""
    data = np.asarray(values, dtype=float)
    if not len(data):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = data[rng.integers(len(data), size=(draws, len(data)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
    optima = [e.info["optimum"] for e in sound if "optimum" in e.info]
    return Score(
        float(np.mean(returns)), float(np.mean(successes)), *bootstrap(successes),
        *bootstrap(returns),
        turns=float(np.mean([len(e.turns) for e in sound])),
        questions=float(np.mean([sum("?" in t.action for t in e.turns) for e in sound])),
        episodes=len(episodes), failed=len(episodes) - len(sound),
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
    return Difference(
        mean(outcomes), *bootstrap(outcomes), mean(successes), *bootstrap(successes),
        pairs=len(sound), **judged
    )  # fmt: skip
