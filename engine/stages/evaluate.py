"""`evaluate`: players on the same starts, with intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from ..config import Stage
from ..environment import starts
from ..episode import Episode, canonical_json, derive_id
from ..rollout import PolicyPlayer, ScriptPlayer, TooManyFailures, Where, rollout
from ..run import Run, Update
from .rl import EnvConfig, check_envs, read_envs


@dataclass(frozen=True, slots=True)
class Score:
    """What a player achieved.

    Attributes:
        outcome: mean return.
        success: share of successes; where the environment does not say, the share of episodes that terminated.
        low, high: 95 % bootstrap interval of `success`.
        outcome_low, outcome_high: the same of `outcome`.
        turns, questions: per episode; a reply that contains "?" counts as a question.
        episodes, failed: how many were played, and how many of them broke in their environment.
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
    optimum: float | None = None


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean."""
    data = np.asarray(values, dtype=float)
    if not len(data):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = data[rng.integers(len(data), size=(draws, len(data)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def score(episodes: Sequence[Episode]) -> Score:
    """Sums up one player's episodes. Failed ones are counted and left out.

    Raises:
        TooManyFailures: every episode failed.
    """
    sound = [e for e in episodes if e.ending != "failed"]
    if not sound:
        raise TooManyFailures(f"all {len(episodes)} episodes failed: {episodes[0].reason if episodes else 'none was played'}")
    returns = [e.env_return for e in sound]
    successes = [float(e.ending == "terminated" if e.success is None else e.success) for e in sound]
    optima = [e.info["optimum"] for e in sound if "optimum" in e.info]
    return Score(
        float(np.mean(returns)), float(np.mean(successes)), *bootstrap(successes), *bootstrap(returns),
        turns=float(np.mean([len(e.turns) for e in sound])),
        questions=float(np.mean([sum("?" in t.action for t in e.turns) for e in sound])),
        episodes=len(episodes), failed=len(episodes) - len(sound), optimum=float(np.mean(optima)) if optima else None,
    )  # fmt: skip


def play_held_out(
    player: Any,
    env: EnvConfig,
    episodes: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    where: Where = Where(stage="evaluate"),
) -> list[Episode]:
    """Plays the starts number 0 to `episodes - 1` that `seed` defines; the same for every player."""
    first = int(derive_id("evaluate", seed)[:8], 16)
    chosen = [(start, 0) for start in starts(env.id, first, episodes, env.options, env.kwargs)]
    return rollout(player, chosen, where, progress=progress)


class Evaluate(Stage):
    """Plays the policy and other players on the same held-out starts. Results go to metrics and to `evaluation.json`.

    Attributes:
        env: as in `rl`.
        episodes: starts per environment.
        players: "policy" and names of the environment's own players.
        temperature, max_new_tokens: of the policy's replies; temperature 0 is greedy.
        seed: of the starts; the same for every run, so that runs can be compared.
    """

    env: Any
    episodes: int = Field(default=300, ge=1)
    players: list[str] = ["policy"]
    temperature: float = Field(default=1.0, ge=0)
    max_new_tokens: int = Field(default=256, ge=1)
    seed: int = 20_000

    @field_validator("env")
    @classmethod
    def _env(cls, value: Any) -> list[EnvConfig]:
        return read_envs(value)

    def check(self, run: Run) -> None:
        check_envs(self.env, [name for name in self.players if name != "policy"], run.plugins)

    def play(self, run: Run) -> Iterator[Update]:
        from ..policy import Sampling

        metrics: dict[str, float] = {}
        table: dict[str, dict[str, Any]] = {}
        labels = [env.id if not env.options else f"{env.id} {canonical_json(env.options)}" for env in self.env]
        for label, env in zip(labels, self.env, strict=True):
            for name in self.players:
                if name == "policy":
                    player: Any = PolicyPlayer(run.policy, Sampling(self.temperature, self.max_new_tokens))
                else:
                    player = ScriptPlayer(name)
                key = name if len(self.env) == 1 else f"{label}/{name}"
                where = Where(run.id, f"{run.stage}/{key}", run.updates + 1, self.seed)
                played = play_held_out(
                    player, env, self.episodes, self.seed, partial(run.status, f"evaluate {key}"),
                    where,
                )  # fmt: skip
                if run.is_main:
                    run.ledger.add_episodes(played)
                table[key] = asdict(score(played))
                metrics |= {f"{key}/{k}": float(v) for k, v in table[key].items() if v is not None}
        if run.is_main:
            (run.folder / "evaluation.json").write_text(json.dumps(table, indent=2) + "\n")
        yield run.finish_update(metrics)
