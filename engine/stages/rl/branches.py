"""Samples conversations again from the start of every turn: to value states for credit, and to
audit the credit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import ConfigError, TooManyFailures
from ...records.episode import Episode
from ...records.rewards import Rewards
from ...rollout.conversation import Branch, Where
from .collect import Collector
from .experience import Experience
from .metrics import mean
from .records import record_training


def branch_values(
    collector: Collector,
    experience: Experience,
    episodes: Sequence[Episode],
    count: int,
    label: str,
    number: int,
) -> tuple[Any, dict[str, float]]:
    """Values the state at the start of every turn by the mean outcome of conversations continued
    from there.

    States that several conversations share, the start of a group above all, are valued once.

    Args:
        collector: plays and judges the continuations.
        experience: what the episodes are of; it bears the costs.
        episodes: [E] whose states are valued.
        count: continuations per state.
        label: what they are played for.
        number: of the update.

    Returns:
        [E, K] values, NaN where nothing could be played or judged, and metrics of what it cost.

    Raises:
        Interrupted: the run was asked to end while feedback was awaited.
        ConfigError: an environment does not repeat itself.
        TooManyFailures: more continuations failed than allowed.
    """
    import torch

    run = collector.run
    states = [[e.state(k) for k in range(len(e.turns))] for e in episodes]
    shared_states: dict[tuple[Any, ...], Branch] = {}
    for episode, own in zip(episodes, states, strict=True):
        for k, state in enumerate(own):
            shared_states.setdefault(state, Branch(episode, k))
    chosen = [(branch, slot) for branch in shared_states.values() for slot in range(count)]

    # The continuations are judged like any conversation, and recorded as what never trains.
    extra = Experience(experience.progress, experience.numbers)
    collector.judged_round(
        extra, chosen, Where(run.id, f"{run.stage}/{label}", number, run.seed), label
    )
    _check_continued(extra.episodes, label, collector.settings.max_failure_rate)
    experience.add_costs(extra)
    if run.is_main:
        record_training(run, number, extra, {e.id: label for e in extra.episodes})

    outcomes: dict[tuple[str, int], list[float]] = {}
    for episode in extra.episodes:
        reward = extra.rewards.get(episode.id)
        if isinstance(reward, Rewards) and episode.origin:
            outcomes.setdefault(episode.origin, []).append(reward.outcome)
    values = torch.full((len(episodes), max(map(len, states))), float("nan"))
    for e, own in enumerate(states):
        for k, state in enumerate(own):
            if found := outcomes.get(shared_states[state].origin):
                values[e, k] = mean(found)
    new = [
        sum(len(t.action_ids or ()) for t in e.turns[e.origin[1] if e.origin else 0 :])
        for e in extra.episodes
    ]
    return values, {
        f"{label}/rollouts": float(len(chosen)),
        f"{label}/unjudged": float(len(chosen) - sum(map(len, outcomes.values()))),
        f"{label}/tokens": float(sum(new)),
    }


def _check_continued(episodes: Sequence[Episode], label: str, max_failure_rate: float) -> None:
    """Raises `ConfigError` when an environment does not repeat itself (what survives would be a
    biased choice), `TooManyFailures` when more continuations failed otherwise than allowed."""
    failed = [e for e in episodes if e.ending == "failed"]
    odd = next((e for e in failed if e.reason.startswith("replay:")), None)
    if odd is not None:
        raise ConfigError(
            f"{label}: environment {odd.start.env!r} cannot be continued from the middle of a"
            f" conversation. {odd.reason}. See `turnwise envs --check`; credit 'gae', 'gigpo' and"
            " 'outcome' need no continuations, and an audit can be left out"
        )
    if len(failed) > max_failure_rate * len(episodes):
        raise TooManyFailures(
            f"{label}: {len(failed)} of {len(episodes)} continued conversations failed in their"
            f" environment, more than max_failure_rate={max_failure_rate:g} allows. Reasons:"
            f" {'; '.join(sorted({e.reason for e in failed})[:3])}"
        )


def audit(
    collector: Collector, experience: Experience, batch: Any, number: int, scale: float
) -> dict[str, float]:
    """Measures how the credit of some conversations agrees with the true advantages of their turns.

    Args:
        collector: plays and judges the continuations.
        experience: what the batch is of; it bears the costs.
        batch: what trains, with its credit.
        number: of the update.
        scale: what rewards were divided by.

    Raises:
        Interrupted: the run was asked to end while feedback was awaited.
    """
    from scipy.stats import spearmanr

    from ...tensors import turn_advantages

    options = collector.settings.audit
    assert options is not None
    count = min(options.episodes, len(batch.episodes))
    some = [i * len(batch.episodes) // count for i in range(count)]  # of many starts
    chosen = [batch.episodes[e] for e in some]
    values, metrics = branch_values(
        collector, experience, chosen, options.rollouts, "audit", number
    )
    size = values.shape[1]
    mask = batch.turn_mask[some, :size]
    true = turn_advantages(values / scale, batch.outcome[some], mask)[mask]
    ours = batch.credit.turn_credit[some, :size][mask]
    metrics |= {"audit/true_std": float(true.std(correction=0))}
    if float(true.std(correction=0)) > 0 and float(ours.std(correction=0)) > 0:
        metrics["audit/rank_correlation"] = float(spearmanr(true, ours).statistic)
    return metrics
