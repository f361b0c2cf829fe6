"""What stages that play have in common: which environments, episodes that are recorded as they are
played, and asking about them."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import Interrupted
from ..feedback.sources import Sources
from ..pipeline.processes import processes, shared
from ..protocols import RunView
from ..records.episode import Episode, Start
from ..records.feedback import Answer, Request
from ..rollout.conversation import Branch, Where, episode_id
from ..rollout.elsewhere import refuse_failures
from ..rollout.players import Player, PolicyPlayer
from ..rollout.rollout import rollout
from ..util.secrets import redact

SHORTEST = 0.05  # seconds before the first further look for answers


def play(
    run: RunView,
    player: Player,
    chosen: Sequence[tuple[Start | Branch, int]],
    where: Where,
    *,
    group_ended: Callable[[list[Episode]], None] | None = None,
    **options: Any,
) -> list[Episode]:
    """Plays one episode per start (or branch) and slot, and records them; where the ledger holds
    all of them from before an interruption, returns those.

    Some of them are played again together with the others: fewer at a time would round otherwise.
    What is recorded already stays. With several processes each plays a share, and all get all.

    Args:
        run: whose ledger holds and records them.
        player: who replies.
        chosen: starts or branches, each with its slot.
        where: run, stage, update and seed they are played in.
        group_ended: called with the episodes of a group, recorded, while others are played; not
            with several processes.
        options: of `rollout`.
    """
    ids = [episode_id(where, start, slot) for start, slot in chosen]
    recorded = run.ledger.episodes(ids) if run.is_main else {}
    world, _ = processes(run)
    recorded = shared(run, recorded)
    if len(recorded) == len(set(ids)):
        return [recorded[id_] for id_ in ids]
    if group_ended and world == 1:
        options["ended"] = _by_group(run, chosen, group_ended)
    own, allowed = share(run, chosen), options.get("max_failure_rate", 1.0)
    if world > 1:
        options["max_failure_rate"] = 1.0  # of all, not of a share
    with run.policy.whole() if world > 1 else contextlib.nullcontext():
        played = rollout(player, own, where, environments=run.environments, **options)
    for each in {id(p): p for p in (player, *options.get("others", {}).values())}.values():
        if isinstance(each, PolicyPlayer):
            # What follows needs the room; and what a backend knows of this round would round the
            # next one's log-probs otherwise than in a run that is resumed between them.
            each.backend.refresh()
    if world > 1:
        from accelerate.utils import gather_object

        played = gather_object(played)
        failed = [e.reason for e in played if e.ending == "failed"]
        refuse_failures(failed, len(played), allowed)
    found = {e.id: e for e in played}
    episodes = [found[id_] for id_ in ids]
    if run.is_main:
        played, episodes = episodes, run.ledger.add_episodes(episodes)
        _report_differences(played, episodes)
        run.plugins.call_event("episodes_played", run=run, episodes=episodes)
    return shared(run, episodes)


def share(
    run: RunView, chosen: Sequence[tuple[Start | Branch, int]]
) -> list[tuple[Start | Branch, int]]:
    """Returns what this one of several processes plays: whole matches, in turn."""
    world, rank = processes(run)
    numbers: dict[Any, int] = {}
    return [
        (start, slot)
        for start, slot in chosen
        if numbers.setdefault(
            (start.match if isinstance(start, Start) else start.origin, slot), len(numbers)
        )
        % world
        == rank
    ]


def _report_differences(played: Sequence[Episode], recorded: Sequence[Episode]) -> None:
    """Warns of conversations that the ledger held and that went otherwise when they were played
    again."""
    texts = [[[turn.action for turn in e.turns] for e in own] for own in (played, recorded)]
    if differ := sum(a != b for a, b in zip(*texts, strict=True)):
        warnings.warn(
            f"{differ} conversations that were recorded before the run was interrupted went"
            " otherwise when they were played again: what was recorded counts. An environment"
            " depends on more than its seed and the replies, or the machine is another one",
            stacklevel=2,
        )


def _by_group(
    run: RunView,
    chosen: Sequence[tuple[Start | Branch, int]],
    group_ended: Callable[[list[Episode]], None],
) -> Callable[[Episode], None]:
    """Returns what takes episodes as they end: it records them and hands them on by group."""
    missing = Counter(
        start.key if isinstance(start, Start) else start.origin for start, _ in chosen
    )
    groups: dict[str, list[Episode]] = {}

    def ended(episode: Episode) -> None:
        group = groups.setdefault(episode.group, [])
        group.append(episode)
        if len(group) == missing[episode.origin or episode.start.key]:
            group_ended(run.ledger.add_episodes(sorted(group, key=lambda e: e.slot)))

    return ended


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
        requests: what to ask; default: every source about every episode or group.
        poll, show: as in `wait_for_answers`.

    Returns:
        answers by group.

    Raises:
        Interrupted: as in `wait_for_answers`.
    """
    sources.ask(by_env, run.ledger, requests)
    groups = {key: members for own in by_env for key, members in own.items()}
    return wait_for_answers(run, sources, groups, poll=poll, show=show)


def wait_for_answers(
    run: RunView,
    sources: Sources,
    groups: Mapping[str, Sequence[Episode]],
    *,
    poll: float,
    show: Mapping[str, int] = {},
    notified: set[str] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[str, list[Answer]]:
    """Waits until no required answer about groups that were asked about is missing.

    Args:
        run: the run that asked.
        sources: those that were asked.
        groups: the episodes, by group.
        poll: seconds between looks for answers that come later, at most; the first ones follow
            each other sooner.
        show: for the progress display.
        notified: ids of the answers that listeners know; grows.
        meanwhile: called between looks.

    Returns:
        answers by group.

    Raises:
        Interrupted: the run was asked to end while answers were awaited; what was played and asked
            is kept.
    """
    notified, looks = set() if notified is None else notified, pauses(poll)
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
        meanwhile()
        run.sleep(next(looks))


def pauses(poll: float) -> Iterator[float]:
    """Yields the seconds before each further look for answers: a judge may need less than `poll`,
    and people need more."""
    pause = min(SHORTEST, poll)
    while True:
        yield pause
        pause = min(1.5 * pause, poll)


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
