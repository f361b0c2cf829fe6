"""What a source is asked about groups, and corrections that come too late."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..ledger.ledger import Ledger
from ..records.episode import Episode
from ..records.feedback import Answer, Request
from ..util.ids import derive_id
from .specs import Source


def _luck(source: str, episode: Episode) -> float:
    """A number in [0, 1) for a group; never of an id, since ids hold the run's name, which must not
    matter."""
    return (
        int(derive_id("share", source, episode.stage, episode.update, episode.start.key)[:12], 16)
        / 16**12
    )


def requests_of(
    source: Source, groups: Mapping[str, Sequence[Episode]], now: float
) -> list[Request]:
    """Returns what a source is asked about groups; what failed in its environment is shown to no
    rater.

    Args:
        source: how it is asked.
        groups: the episodes, by group.
        now: when.
    """
    deadline = None if source.deadline is None else now + source.deadline
    requests = []
    for group, members in groups.items():
        shown = tuple(e for e in members if e.ending != "failed" and e.turns)
        if not shown or _luck(source.name, shown[0]) >= source.share:
            continue
        requests += [
            Request(
                source.kind,
                q.target,
                source.name,
                slot,
                deadline,
                source.required,
                q.ask,
                q.episodes,
            )
            for q in source.given.plan(group, shown)
            for slot in range(source.raters)
            if not (source.kind == "group" and len(q.episodes) < 2)
        ]
    return requests


def in_time(ledger: Ledger, answers: list[Answer]) -> list[Answer]:
    """Makes answers of their own of corrections that come after their group was decided: a source
    cannot know that, and both are kept."""
    corrections = [a for a in answers if a.supersedes is not None]
    if not corrections:
        return answers
    stored = ledger.feedback(ids=[a.id for a in corrections], late=True, corrected=True)
    before = {a.id: a for a in stored}
    episodes = ledger.episodes([a.target for a in corrections])
    group_of = {a.target: a.target for a in corrections}
    group_of |= {id_: episode.group for id_, episode in episodes.items()}
    decided = ledger.decided(sorted(set(group_of.values())))
    alone = {
        a.id
        for a in corrections
        if (before[a.id].supersedes is None if a.id in before else group_of[a.target] in decided)
    }
    return [dataclasses.replace(a, supersedes=None) if a.id in alone else a for a in answers]
