"""Conversations with each turn's credit, and its true advantage where continuations estimate it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..ledger.ledger import Ledger
from ..ledger.rows import Member
from ..records.episode import Episode
from ..records.shown import tint
from .transcript import printable

State = tuple[Any, ...]  # a start and the replies so far


@dataclass(frozen=True, slots=True)
class Credited:
    """A turn as the page shows it.

    Attributes:
        credit: what the credit method gave it.
        true: its true advantage, and the standard error of that; None where nothing was continued
            from here.
        colour: CSS colour, green for credit and red for blame, stronger for more.
    """

    observation: str
    role: str
    reply: str
    credit: float
    true: tuple[float, float] | None
    colour: str


def credited(ledger: Ledger, run: str, count: int = 3) -> list[dict[str, Any]]:
    """Returns some conversations of the last update that was trained with credit: those whose
    turns' true advantages are known before others, and those whose turns were credited most
    differently first."""
    rounds = [
        (stage, update)
        for stage, update in ledger.rounds(run)
        if stage.split("-")[0] == "rl" and "/" not in stage
    ]
    for stage, update in reversed(rounds):
        members = {m.episode: m for m in ledger.members(run, update)}
        played = [
            e
            for e in ledger.run_episodes(run, stage=stage, update=update)
            if e.id in members and any(members[e.id].credit)
        ]
        if not played:
            continue
        values = state_values(ledger, run, stage, update, members)
        shown = [(e, members[e.id], turn_truths(e, members[e.id].outcome, values)) for e in played]
        shown.sort(
            key=lambda each: (
                -sum(t is not None for t in each[2]),
                -_spread(each[1].credit),
                each[0].id,
            )
        )
        largest = max(abs(c) for _, member, _ in shown[:count] for c in member.credit)
        return [
            _conversation(*each, largest, where=f"{stage}, update {update}")
            for each in shown[:count]
        ]
    return []


def state_values(
    ledger: Ledger, run: str, stage: str, update: int, members: Mapping[str, Member]
) -> dict[State, tuple[float, float]]:
    """Returns the mean outcome and its standard error of every state that an audit continued
    conversations from.

    Branches that credit was made of are no measure of it.
    """
    outcomes: dict[State, list[float]] = {}
    for episode in ledger.run_episodes(run, stage=f"{stage}/audit", update=update):
        member = members.get(episode.id)
        if episode.origin and member is not None and member.outcome is not None:
            outcomes.setdefault(episode.state(episode.origin[1]), []).append(member.outcome)
    return {
        state: (statistics.mean(own), statistics.pstdev(own) / len(own) ** 0.5)
        for state, own in outcomes.items()
        if len(own) > 1
    }


def turn_truths(
    episode: Episode, outcome: float | None, values: Mapping[State, tuple[float, float]]
) -> list[tuple[float, float] | None]:
    """Returns A_k = V(s_{k+1}) - V(s_k) and its standard error for every turn, the end being worth
    the outcome."""
    if outcome is None:
        return [None] * len(episode.turns)
    known = [values.get(episode.state(k)) for k in range(len(episode.turns))] + [(outcome, 0.0)]
    return [
        (
            (after[0] - before[0], (after[1] ** 2 + before[1] ** 2) ** 0.5)
            if before and after
            else None
        )
        for before, after in pairwise(known)
    ]


def _spread(credit: Sequence[float]) -> float:
    return max(credit) - min(credit)


def _conversation(
    episode: Episode,
    member: Member,
    truths: Sequence[tuple[float, float] | None],
    largest: float,
    where: str,
) -> dict[str, Any]:
    turns = [
        Credited(
            printable(turn.observation.content),
            turn.observation.role,
            printable(turn.action),
            credit,
            true,
            tint(credit, largest),
        )
        for turn, credit, true in zip(episode.turns, member.credit, truths, strict=True)
    ]
    return {
        "turns": turns,
        "final": printable(episode.final.content) if episode.final else "",
        "outcome": member.outcome,
        "where": f"{where}, episode {episode.id}",
    }
