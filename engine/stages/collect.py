"""What stages that play have in common: which environments, episodes that are recorded as they are
played, and asking about them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import Interrupted
from ..feedback.sources import Sources
from ..pipeline.processes import processes, shared
from ..protocols import RunView
from ..records.episode import Episode, Start
from ..records.feedback import Answer, Request
from ..rollout.conversation import Branch, Where, episode_id
from ..rollout.players import Player
from ..rollout.rollout import rollout
from ..util.secrets import redact


def play(
    run: RunView,
    player: Player,
    chosen: Sequence[tuple[Start | Branch, int]],
    where: Where,
    **options: Any,
) -> list[Episode]:
    """One episode per start (or branch) and slot: those the ledger holds from before an
    interruption, else played now and recorded.

    With several processes each plays a share, and all get all of them.

    Args:
        run: whose ledger holds and records them.
        player: who replies.
        chosen: starts or branches, each with its slot.
        where: run, stage, update and seed they are played in.
        options: of `rollout`.
    """
    ids = [episode_id(where, start, slot) for start, slot in chosen]
    recorded = run.ledger.episodes(ids) if run.is_main else {}
    world, rank = processes(run)
    recorded = shared(run, recorded)
    missing = [c for c, id_ in zip(chosen, ids, strict=True) if id_ not in recorded]
    played = (
        rollout(player, missing[rank::world], where, environments=run.environments, **options)
        if missing
        else []
    )
    if world > 1:
        from accelerate.utils import gather_object

        played = gather_object(played)
    if run.is_main and played:
        place = {id_: i for i, id_ in enumerate(ids)}
        played = run.ledger.add_episodes(sorted(played, key=lambda e: place[e.id]))
        run.plugins.call_event("episodes_played", run=run, episodes=played)
    found = recorded | {e.id: e for e in played}
    return [found[id_] for id_ in ids]


def grouped(episodes: Sequence[Episode]) -> dict[str, list[Episode]]:
    """Episodes by group, in order."""
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    return groups


def ask(
    run: RunView,
    sources: Sources,
    by_env: Sequence[Mapping[str, Sequence[Episode]]],
    *,
    poll: float,
    requests: Sequence[Request] | None = None,
    show: Mapping[str, int] = {},
) -> dict[str, list[Answer]]:
    """Asks for feedback and waits until no required answer is missing.

    Args:
        run: the run that asks.
        sources: those that are asked.
        by_env: for each environment, the groups that its sources are asked about.
        poll: seconds between looks for answers that come later.
        requests: what to ask; default: every source about every episode or group.
        show: for the progress display.

    Returns:
        answers by group.

    Raises:
        Interrupted: the run was asked to end while answers were awaited; what was played and asked
            is kept.
    """
    groups = {key: members for own in by_env for key, members in own.items()}
    notified = set[str]()
    sources.ask(by_env, run.ledger, requests)
    while True:
        ready, answers = listen(run, sources, groups, notified)
        if len(ready) == len(groups):
            return answers
        if run.stopping:
            raise Interrupted
        run.status(
            "feedback",
            len(ready),
            len(groups),
            note=waiting_note(run, sources, list(groups)),
            **show,
        )
        run.sleep(poll)


def listen(
    run: RunView,
    sources: Sources,
    groups: Mapping[str, Sequence[Episode]],
    notified: set[str],
) -> tuple[list[str], dict[str, list[Answer]]]:
    """Hears every source once, and tells listeners what is new: also answers that another process
    wrote into the ledger.

    Args:
        run: the run that asks.
        sources: those to hear.
        groups: those that were asked about.
        notified: ids of the answers that listeners know; grows.

    Returns:
        the groups that wait for no required answer any more, and the feedback on all of them. What
        came between the two questions to the ledger belongs to groups that were not ready, so that
        a ready group's answers are all there.
    """
    received = sources.receive(run.ledger)
    again = sources.waits_again(run.clock())
    ready = [
        key for key in run.ledger.ready_groups(list(groups), run.updates + 1) if key not in again
    ]
    by_group: dict[str, list[Answer]] = {key: [] for key in groups}
    group_of = {e.id: key for key, members in groups.items() for e in members}
    answers = run.ledger.feedback(list(groups))
    for answer in answers:
        by_group[group_of.get(answer.target, answer.target)].append(answer)
    new = {answer.id: answer for answer in (*received, *answers) if answer.id not in notified}
    if new:
        notified.update(new)
        run.plugins.call_event("feedback_received", run=run, feedback=list(new.values()))
    return ready, by_group


def waiting_note(run: RunView, sources: Sources, groups: Sequence[str]) -> str:
    """Returns what is waited for, for progress displays: "waiting for 12 ratings of 'people' (3
    raters active, about 20 minutes)"."""
    given = sources.by_name()
    notes = []
    for name, count in Counter(
        r["source"] for r in run.ledger.open_requests(groups) if r["required"]
    ).items():
        more = ""
        gives = "ratings"
        if name in given:  # else it was asked by an earlier stage
            gives = given[name].gives
            with contextlib.suppress(Exception):  # a note must not end a run
                more = f" ({redact(note)})" if (note := given[name].waiting()) else ""
        notes.append(f"{count} {gives} of {name!r}{more}")
    if again := len(sources.waits_again(run.clock())):
        notes.append(f"{again} ratings of sources that failed")
    return "waiting for " + ", ".join(notes)
