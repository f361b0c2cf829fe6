"""What stages that play have in common: which environments, episodes that are recorded as they are played, and asking about them."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from ..config import ConfigError, Section
from ..environment import EnvironmentBroke, starts
from ..episode import Episode, Start
from ..feedback import Request
from ..instances import Environments, call
from ..ledger import Answer
from ..plugins import PluginError, Plugins
from ..rollout import Branch, Player, Where, episode_id, rollout
from ..run import Run
from ..secrets import redact
from ..sources import Sources
from ..suggest import did_you_mean


class EnvConfig(Section):
    """One environment of a mixture.

    Attributes:
        id: as registered with Gymnasium.
        weight: its share of the groups.
        options: for `reset`.
        kwargs: for `gymnasium.make`.
        feedback: its own sources, instead of the stage's.
    """

    id: str
    weight: float = Field(default=1.0, gt=0)
    options: dict[str, Any] = {}
    kwargs: dict[str, Any] = {}
    feedback: list[Any] | None = None


def read_envs(value: Any) -> list[EnvConfig]:
    """An id, (id, weight) pairs, mappings, or a list of these."""
    entries = value if isinstance(value, list) else [value]
    result = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {"id": entry}
        elif isinstance(entry, (tuple, list)) and len(entry) == 2:
            entry = {"id": entry[0], "weight": entry[1]}
        if not isinstance(entry, (EnvConfig, Mapping)):
            raise ConfigError(
                f"an environment is given by its id, got {entry!r}: register it with gymnasium.register(id, Class) and give the id"
            )
        result.append(entry if isinstance(entry, EnvConfig) else EnvConfig(**entry))
    return result


def check_envs(envs: Sequence[EnvConfig], players: Sequence[str] = (), plugins: Plugins | None = None) -> None:
    """Makes each environment once, so that a wrong id, option or player shows before the run."""
    environments = Environments()
    try:
        for env in envs:
            try:
                starts(env.id, 0, 1, env.options, env.kwargs)
                made = environments.take(env.id, env.kwargs)
                assert made is not None
                own = call(environments, made, "make").players
            except (LookupError, TypeError, ValueError) as error:
                note = plugins.failures() if plugins is not None and isinstance(error, LookupError) else ""
                raise ConfigError(f"{error}{note}") from error
            except EnvironmentBroke as error:
                raise ConfigError(f"environment {env.id!r}: {error}") from error
            environments.give(made, sound=False)
            for name in players:
                if name not in own:
                    raise ConfigError(f"environment {env.id!r} has no player {name!r}.{did_you_mean(name, own)}")
    finally:
        environments.close()


def component(plugins: Plugins, kind: str, spec: Any, **more: Any) -> Any:
    """A part from what the config says: a registered name, a mapping with `name` and options, or the object itself."""
    if isinstance(spec, str):
        return plugins.create(kind, spec, **more)
    if isinstance(spec, Mapping):
        options = dict(spec)
        if "name" not in options:
            raise PluginError(f"a {kind} given as a mapping needs `name` beside its options, got {dict(spec)}")
        return plugins.create(kind, options.pop("name"), **more, **options)
    return spec


def play(run: Run, player: Player, chosen: Sequence[tuple[Start | Branch, int]], where: Where, **options: Any) -> list[Episode]:
    """One episode per start (or branch) and slot: those the ledger holds from before an interruption, else played now and recorded.

    With several processes each plays a share, and all get all of them.

    Args:
        options: of `rollout`.
    """
    ids = [episode_id(where, start, slot) for start, slot in chosen]
    recorded = run.ledger.episodes(ids) if run.is_main else {}
    world, rank = _processes(run)
    recorded = shared(run, recorded)
    missing = [c for c, id_ in zip(chosen, ids, strict=True) if id_ not in recorded]
    played = rollout(player, missing[rank::world], where, environments=run.environments, **options) if missing else []
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
    run: Run,
    asked: Sequence[tuple[Sources, Mapping[str, Sequence[Episode]]]],
    *,
    poll: float,
    requests: Sequence[Sequence[Request]] | None = None,
    show: Mapping[str, int] = {},
) -> dict[str, list[Answer]] | None:
    """Asks for feedback and waits until no required answer is missing.

    Args:
        asked: sources, and the groups they are asked about.
        poll: seconds between looks for answers that come later.
        requests: what to ask, one list per entry of `asked`; default: every source about every episode or group.
        show: for the progress display.

    Returns:
        what was said, by group. None: the run was interrupted while waiting; what was played and asked is kept.
    """
    groups = {key: members for _, own in asked for key, members in own.items()}
    everybody, told = [sources for sources, _ in asked], set[str]()
    for i, (sources, own) in enumerate(asked):
        sources.ask(own, run.ledger, None if requests is None else requests[i])
    while True:
        ready, said = listen(run, everybody, groups, told)
        if len(ready) == len(groups):
            return said
        if run.stopping:
            return None
        run.status("feedback", len(ready), len(groups), note=waiting_note(run, everybody, list(groups)), **show)
        run.sleep(poll)


def listen(
    run: Run, everybody: Sequence[Sources], groups: Mapping[str, Sequence[Episode]], told: set[str]
) -> tuple[list[str], dict[str, list[Answer]]]:
    """Hears every source once, and tells listeners what is new: also answers that another process wrote into the ledger.

    Args:
        groups: those that were asked about.
        told: ids of the answers that listeners know; grows.

    Returns:
        the groups that wait for no required answer any more, and what is said of all of them. What came between the two questions to
        the ledger belongs to groups that were not ready, so that a ready group's answers are all there.
    """
    heard = [answer for sources in everybody for answer in sources.receive(run.ledger)]
    again = {group for sources in everybody for group in sources.waits_again(run.clock())}
    ready = [key for key in run.ledger.ready_groups(list(groups), run.updates + 1) if key not in again]
    said: dict[str, list[Answer]] = {key: [] for key in groups}
    group_of = {e.id: key for key, members in groups.items() for e in members}
    answers = run.ledger.feedback(list(groups))
    for answer in answers:
        said[group_of.get(answer.target, answer.target)].append(answer)
    new = {answer.id: answer for answer in (*heard, *answers) if answer.id not in told}
    if new:
        told.update(new)
        run.plugins.call_event("feedback_received", run=run, feedback=list(new.values()))
    return ready, said


def waiting_note(run: Run, everybody: Sequence[Sources], groups: Sequence[str]) -> str:
    """What is waited for, for progress displays: "waiting for 12 ratings of 'people' (3 raters active, about 20 minutes)"."""
    given = {source.name: source.given for sources in everybody for source in sources.sources}
    notes = []
    for name, count in Counter(r["source"] for r in run.ledger.open_requests(groups) if r["required"]).items():
        more = ""
        if (tell := getattr(given.get(name), "waiting", None)) is not None:
            with contextlib.suppress(Exception):  # a note must not end a run
                more = f" ({redact(tell())})"
        notes.append(f"{count} {getattr(given.get(name), 'gives', 'ratings')} of {name!r}{more}")
    if again := sum(len(sources.waits_again(run.clock())) for sources in everybody):
        notes.append(f"{again} ratings of sources that failed")
    return "waiting for " + ", ".join(notes)


def shared(run: Run, value: Any) -> Any:
    """What the main process has, on every process of those that train together."""
    if _processes(run)[0] == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _processes(run: Run) -> tuple[int, int]:
    """How many processes train together, and which of them this is."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 1, 0
    accelerator = run.policy.accelerator
    return accelerator.num_processes, accelerator.process_index
