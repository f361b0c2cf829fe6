"""What an update is measured by, from its conversations and its batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...protocols import RunView
from ...records.episode import Episode
from ...records.feedback import Answer, Feedback
from ...records.rewards import NoReward, Rewards, overall
from .experience import Experience

# Why episodes teach nothing: no action token of their group has an advantage.
SILENT = "group without signal"


def play_metrics(
    episodes: Sequence[Episode], rewards: Mapping[str, Rewards | NoReward]
) -> dict[str, float]:
    """Returns the metrics of what was played: counts, and means over episodes that did not fail."""
    sound = [e for e in episodes if e.ending != "failed"]
    outcomes = [r.outcome for r in rewards.values() if isinstance(r, Rewards)]
    metrics = {
        "episodes": float(len(episodes)),
        "return": mean([e.env_return for e in sound]),
        "turns": mean([len(e.turns) for e in sound]),
        "tokens": float(sum(len(t.action_ids or ()) for e in episodes for t in e.turns)),
        "reply_tokens": mean([len(t.action_ids or ()) for e in sound for t in e.turns]),
        "cut_replies": mean([float(t.cut) for e in sound for t in e.turns]),
        "truncated": mean([float(e.ending == "truncated") for e in sound]),
        "failed_episodes": float(len(episodes) - len(sound)),
    }
    if failed := sum(e.user_failed for e in episodes):
        metrics["failed_users"] = float(failed)
    # Whose fault it was that a call of a tool failed; where tools can be called.
    faults = [fault for e in sound for fault in _faults(e)]
    if faults:
        metrics["calls"] = float(len(faults))
        for whose in ("agent", "tool"):
            metrics[f"calls/fault-{whose}"] = mean([float(fault == whose) for fault in faults])
    if outcomes:  # none is not zero
        metrics["outcome"] = mean(outcomes)
    if sound:
        metrics["success"] = mean([float(e.succeeded) for e in sound])
    for seat in sorted({e.start.seat for e in sound} - {""}):
        own = [e for e in sound if e.start.seat == seat]
        metrics[f"success/seat-{seat}"] = mean([float(e.succeeded) for e in own])
        paid = [r.outcome for e in own if isinstance(r := rewards.get(e.id), Rewards)]
        if paid:
            metrics[f"outcome/seat-{seat}"] = mean(paid)
    return metrics


def mixture_metrics(experience: Experience, envs: Sequence[str]) -> dict[str, float]:
    """Returns outcome and success of each environment of a mixture, by its id, or by its place
    where the mixture names an id several times (`outcome/env-0`).

    Args:
        experience: what was played and judged.
        envs: their ids, in the order of the mixture.
    """
    metrics = {}
    for i, env in enumerate(envs if len(envs) > 1 else ()):
        name = env if envs.count(env) == 1 else f"env-{i}"
        own = [
            e
            for e in experience.episodes
            if experience.numbers[e.start.key].env == i and e.ending != "failed"
        ]
        rewards = [experience.rewards.get(e.id) for e in own]
        if paid := [r.outcome for r in rewards if isinstance(r, Rewards)]:
            metrics[f"outcome/{name}"] = mean(paid)
        if own:
            metrics[f"success/{name}"] = mean([float(e.succeeded) for e in own])
    return metrics


def _faults(episode: Episode) -> list[str]:
    """Returns by whose fault each call of a tool failed, empty where it did not: from `calls` in
    the turns' `info`, as the environments with tools write it."""
    listed = [turn.info.get("calls") for turn in episode.turns]
    calls = [call for each in listed if isinstance(each, list) for call in each]
    return [str(call["fault"]) for call in calls if isinstance(call, Mapping) and "fault" in call]


# Why conversations teach nothing: what they are, and what to do about it.
CAUSES = {
    SILENT: (
        "in groups whose members all did equally well",
        (
            "Play starts of other difficulty, let `sft` come first until some conversations"
            " succeed, reward what is half right, or play larger groups (`group_size`)"
        ),
    ),
    "no reward": (
        "without a reward",
        "Look at why their sources abstained or failed: the report and `turnwise judges` say it",
    ),
    "environment failed": (
        "in environments that failed",
        "`turnwise envs --check` and the report say why",
    ),
    "user failed": (
        "with users who did not answer",
        "The report says why; a simulated user's model is named by `user` in the environment's"
        " kwargs",
    ),
    "group too small": (
        "in groups with too few members that got a reward",
        "Look at why the others got none, or lower `min_group`",
    ),
    "no turns": (
        "without a single turn",
        "Their first prompt does not fit the policy's context: make it shorter",
    ),
}


def untaught(lines: Sequence[Mapping[str, Any]]) -> str:
    """Why none of these updates taught the policy anything, and what to do about it; empty where
    one did, or where they are no updates of `rl`."""
    if not lines or any(line.get("trained") != 0 for line in lines):
        return ""
    counts = dict.fromkeys(CAUSES, 0)
    for line in lines:
        known = {why: int(line.get(f"left_out/{why}", 0)) for why in CAUSES}
        known[SILENT] += int(line["episodes"]) - sum(known.values())
        counts = {why: counts[why] + known[why] for why in CAUSES}
    found = sorted((why for why in CAUSES if counts[why]), key=lambda why: -counts[why])
    shown = ", ".join(f"{counts[why]} were {CAUSES[why][0]}" for why in found)
    sound = [line["episodes"] - line.get("failed_episodes", 0) for line in lines]
    cut = sum(round(line.get("truncated", 0) * n) for line, n in zip(lines, sound, strict=True))
    if cut:
        shown += f"; {cut} were cut, by the policy's context or by a limit of turns or calls"
    cure = f". {CAUSES[found[0]][1]}" if found else ""
    outcomes = {
        value
        for line in lines
        for key, value in line.items()
        if key == "outcome" or key.startswith("outcome/seat-")
    }
    if found[:1] == [SILENT] and len(lines) > 1 and len(outcomes) == 1:
        cure = (
            f". The reward was {outcomes.pop():g} in every update: is it computed as it should"
            f" be?{cure[1:]}"
        )
    return f"of {sum(counts.values())} conversations, {shown or 'none was played'}{cure}."


def idle_stages(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The stages of a run of which no update taught the policy anything, and why."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for line in metrics:
        lines.setdefault(line["stage"], []).append(line)
    return {stage: why for stage, own in lines.items() if (why := untaught(own))}


def learned_nothing(metrics: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> bool:
    """Whether a run had stages of `rl` and nothing learned anything in it, in these stages or in
    others.

    Args:
        stages: the labels of its stages of `rl`; one may have made no update at all.
    """
    idle = idle_stages(metrics)
    silent = set(stages) - {line["stage"] for line in metrics}
    return bool(idle or silent) and not any(
        "grad_norm" in line for line in metrics if line["stage"] not in idle
    )


def credit_metrics(batch: Any, turns: int = 8) -> dict[str, float]:
    """How large the credit of the first turns is, and how it spreads: mean and standard deviation
    over the episodes that got so far."""
    metrics = {}
    for k in range(min(turns, batch.turn_mask.shape[1])):
        own = batch.credit.turn_credit[batch.turn_mask[:, k], k].double()
        metrics[f"credit/turn-{k + 1}/mean"] = float(own.mean())
        metrics[f"credit/turn-{k + 1}/std"] = float(own.std(correction=0))
    if batch.turn_scores is not None:
        metrics["credit/scored_turns"] = float(
            (~batch.turn_scores[batch.turn_mask].isnan()).double().mean()
        )
    return metrics


def drift(policy: Any, episodes: Sequence[Episode], sample: int = 8) -> float:
    """Share of episodes whose trained context differs from what the template would render; measured
    on a few."""
    checked = [e for e in episodes if e.history == "append" and len(e.turns) > 1 and not e.forked][
        :sample
    ]
    drifted = 0
    for e in checked:
        context = [i for t in e.turns for i in (*t.prompt_ids, *(t.action_ids or ()))][
            : -len(e.turns[-1].action_ids or ()) or None
        ]
        messages = [m for m in e.messages if m is not e.final][:-1]
        drifted += policy.chat.drift(messages, context, e.tools)
    return drifted / len(checked) if checked else 0.0


def forks(episodes: Sequence[Episode]) -> dict[str, float]:
    """The share of replies after an episode's first that were read in a context of their own, where
    there are any."""
    later = sum(max(0, len(e.turns) - 1) for e in episodes)
    opened = sum(len({turn.context for turn in e.turns}) - 1 for e in episodes if e.turns)
    return {"forks": opened / later} if opened else {}


def mean(values: Sequence[float]) -> float:
    """Returns the mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def feedback_metrics(combiners: Sequence[Any]) -> dict[str, float]:
    """What combiners report of raters and estimates, those that do; in a mixture each environment's
    by its place in `env`."""
    found: dict[str, float] = {}
    for i, combiner in enumerate(combiners):
        where = "feedback" if len(combiners) == 1 else f"feedback/env-{i}"
        found |= {f"{where}/{name}": value for name, value in combiner.metrics().items()}
    return found


def warn_untaught(run: RunView, metrics: Mapping[str, float]) -> None:
    """Warns when an update taught the policy nothing, and again when 10, 100, ...

    in a row did not.
    """
    lines: list[Mapping[str, Any]] = [metrics]
    for line in reversed([line for line in run.metrics if line["stage"] == run.stage]):
        if line.get("trained") != 0:
            break
        lines.append(line)
    if (why := untaught(lines)) and len(lines) in (1, 10, 100, 1000) and run.is_main:
        what = "this update" if len(lines) == 1 else f"the last {len(lines)} updates"
        warnings.warn(f"{run.stage}: {what} taught the policy nothing: {why}", stacklevel=2)


def warn_unread(
    run: RunView, turns: Sequence[str], weights: Mapping[str, float], answers: Iterable[Answer]
) -> None:
    """Warns of sources that count and only score turns, where the credit method reads no scores of
    turns, and no rewards are made of them.

    Args:
        run: the run.
        turns: sources whose scores of turns are rewards.
        weights: of the sources, by name.
        answers: of all sources.
    """
    alone: dict[str, bool] = {}  # by source
    for answer in answers:
        if answer.status == "scored":
            of_turns = isinstance(answer, Feedback) and overall(answer) is None
            alone[answer.stamp.source] = alone.get(answer.stamp.source, True) and of_turns
    for name, only in alone.items():
        if only and weights.get(name) and name not in turns:
            warnings.warn(
                f"{run.stage}: {name!r} scores turns only, and nothing trains on that: the credit"
                " method does not read it. As rewards that come at their turns: the combiner's"
                f" `turns: [{name}]` (`weighted` and `calibrated` have it); as credit: `credit:"
                " judged`; only to be looked at: `weight: 0`",
                stacklevel=2,
            )


def groups_with_signal(
    episodes: Sequence[Episode], rewards: Mapping[str, Rewards | NoReward]
) -> list[str]:
    """Groups in which outcomes differ by more than rounding."""
    import torch

    from ...tensors import rounding

    outcomes: dict[str, list[float]] = {}
    for episode in episodes:
        if isinstance(reward := rewards.get(episode.id), Rewards):
            outcomes.setdefault(episode.group, []).append(reward.outcome)
    return [
        g
        for g, own in outcomes.items()
        if max(own) - min(own) > float(rounding(torch.tensor([max(map(abs, own))])))
    ]
