"""Two runs side by side: what was asked otherwise, and how they did on the same starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..analysis.scores import Difference, paired
from ..errors import TurnwiseError
from ..pipeline.folder import stages_in
from ..pipeline.parts import whole_config
from ..pipeline.run import Run
from ..pipeline.view import PastRun
from ..records.episode import Episode
from ..stages.evaluate import BEFORE


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of the config that two runs have otherwise.

    Attributes:
        key: its place, with stages by the labels that they have in the run.
        first, second: what it is there; None: it is not set.
    """

    key: str
    first: Any
    second: Any


@dataclass(frozen=True, slots=True)
class Measured:
    """How the first run's player did, less the second's, where both were evaluated.

    Attributes:
        stage: the label of `evaluate` in the first run.
        env: of the environment.
        player: by name.
        difference: of the starts that both played; None where they share none.
        first, second: how many conversations each played there.
    """

    stage: str
    env: str
    player: str
    difference: Difference | None
    first: int
    second: int


def settings_that_differ(first: PastRun, second: PastRun) -> list[Setting]:
    """Returns what the configs of two runs have otherwise; names and folders are left out. What
    only one of them states is compared with its default, where the run can still be made."""
    one, two = (
        dict(_leaves({k: v for k, v in _by_label(run.config).items() if k not in OWN}))
        for run in (first, second)
    )
    defaults = [_defaults(run) if one.keys() != two.keys() else {} for run in (first, second)]
    stated = [
        {key: own.get(key, others.get(key)) for key in (*one, *two)}
        for own, others in zip((one, two), defaults, strict=True)
    ]
    return [
        Setting(key, stated[0][key], stated[1][key])
        for key in dict.fromkeys((*one, *two))
        if stated[0][key] != stated[1][key]
    ]


def _defaults(run: PastRun) -> dict[str, Any]:
    """Returns every setting of a run with its defaults, by place; none where its parts cannot be
    made here: a plugin, a file or a key that is missing."""
    try:
        return dict(_leaves(_by_label(whole_config(Run(run.config, folder=run.folder)))))
    except (TurnwiseError, ValueError, TypeError, OSError):
        return {}


OWN = ("name", "folder", "ledger")


def _by_label(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "stages": stages_in(config)}


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every value of plain data that holds no others, and its place."""
    inner: Any = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    elif place:
        yield place, value
    for key, each in inner:
        yield from _leaves(each, f"{place}.{key}" if place else str(key))


def outcomes(first: PastRun, second: PastRun) -> list[Measured]:
    """Returns how each player did that both runs evaluated, on the starts that both played, for
    every stage `evaluate` of the first run.

    The starts of `evaluate` are the same in all runs of one `seed` of that stage.
    """
    one, two = _evaluated(first), _evaluated(second)
    found = []
    for (stage, env, player), mine in one.items():
        others = [played for (_, *key), played in two.items() if key == [env, player]]
        if not others:
            continue
        theirs = max(others, key=lambda played: len(mine.keys() & played.keys()))
        shared = [start for start in mine if start in theirs]
        compared = (
            paired([mine[s] for s in shared], [theirs[s] for s in shared]) if shared else None
        )
        found.append(Measured(stage, env, player, compared, len(mine), len(theirs)))
    return found


def _evaluated(run: PastRun) -> dict[tuple[str, str, str], dict[str, Episode]]:
    """Returns what was played in each stage `evaluate`, in each environment and by each player, by
    the conversations' starts."""
    found: dict[tuple[str, str, str], dict[str, Episode]] = {}
    for label, options in stages_in(run.config).items():
        if label.partition("-")[0] != "evaluate":
            continue
        players = _names(options.get("players", ["policy"]))
        made = [m for m in run.metrics if m["stage"] == label]
        if any(key.split("/")[-2:-1] == [BEFORE] for m in made for key in m):
            players.append(BEFORE)  # it was played without being named
        for episode in run.episodes(stage=label):
            if episode.slot < len(players):
                key = label, episode.start.env, players[episode.slot]
                found.setdefault(key, {})[episode.start.key] = episode
    return found


def _names(players: Sequence[Any]) -> list[str]:
    return [p["name"] if isinstance(p, Mapping) else str(p) for p in players]
