"""Who of the collected episodes trains, and the record of it that the ledger keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...ledger.rows import Member
from ...protocols import RunView
from ...records.episode import Episode
from ...records.rewards import NoReward, Rewards
from .experience import Experience


def trainable(
    episodes: Sequence[Episode], rewards: Mapping[str, Rewards | NoReward], min_group: int
) -> tuple[list[Episode], dict[str, str]]:
    """Divides episodes into those that train and the others.

    Args:
        episodes: those that were played.
        rewards: by episode id.
        min_group: groups with fewer rewarded episodes are dropped; 0: credit does not compare
            within groups.

    Returns:
        those that train, and by id why the others are left out.
    """
    left_out: dict[str, str] = {}
    for episode in episodes:
        if episode.ending == "failed":
            left_out[episode.id] = f"{'user' if episode.user_failed else 'environment'} failed"
        elif not episode.turns:
            left_out[episode.id] = "no turns"
        elif isinstance(rewards[episode.id], NoReward):
            left_out[episode.id] = "no reward"
    size = Counter(e.group for e in episodes if e.id not in left_out)
    for episode in episodes:
        if episode.id not in left_out and size[episode.group] < min_group:
            left_out[episode.id] = "group too small"
    return [e for e in episodes if e.id not in left_out], left_out


def record_training(
    run: RunView,
    number: int,
    experience: Experience,
    left_out: Mapping[str, str],
    batch: Any = None,
    scale: float = 1.0,
) -> None:
    """Writes down who trains in update `number`, on which feedback and with which credit, before
    the update happens.

    Args:
        run: whose ledger it is written to.
        number: of the update.
        experience: what was played for it.
        left_out: why episodes do not train, by id.
        batch: what trains; None: nothing does.
        scale: what rewards were divided by.
    """
    credit = {}
    if batch is not None:
        for i, episode in enumerate(batch.episodes):
            credit[episode.id] = tuple(
                (scale * batch.credit.turn_credit[i, batch.turn_mask[i]]).tolist()
            )
    members = []
    for e in experience.episodes:
        reward = experience.rewards.get(e.id)
        why = left_out.get(e.id, "")
        if isinstance(reward, NoReward):
            why = f"{why}: {reward.reason}"
        elif e.ending == "failed":
            why = f"{why}: {e.reason}"
        outcome = reward.outcome if isinstance(reward, Rewards) else None
        used = tuple(
            a.id for a in experience.feedback.get(e.group, ()) if a.target in (e.id, e.group)
        )
        members.append(
            Member(e.id, e.group, e.id not in left_out, why, outcome, used, credit.get(e.id, ()))
        )
    run.ledger.add_members(run.id, number, members)
