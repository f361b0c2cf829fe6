"""Backends that play whole conversations in other processes, environments included."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn

from ..errors import ConfigError, TooManyFailures
from ..records.episode import Episode, Start
from .conversation import Branch, Where, episode_id
from .players import PolicyPlayer

Schedule = Literal["deterministic", "ready-first"]
Progress = Callable[[int, int], None]  # (episodes finished, episodes in all)


class Elsewhere(ABC):
    """Base of backends that play whole conversations in other processes, each with environments and
    a copy of the policy. A conversation has the id and the noise there that it would have here.

    Attributes:
        rows: how many conversations may live at a time, in all of them together.
    """

    rows: int

    @abstractmethod
    def begin(
        self,
        player: PolicyPlayer,
        chosen: Sequence[tuple[Start | Branch, int]],
        where: Where,
        options: Mapping[str, Any],
    ) -> None:
        """Begins to play, with the policy as it is now, what `rollout` will be asked for with the
        same starts and place; returns at once."""

    @abstractmethod
    def has_arrived(self, chosen: Sequence[tuple[Start | Branch, int]], where: Where) -> bool:
        """Returns whether all of what was begun with these starts and this place is here, so that
        `rollout` would wait for nothing; returns at once."""

    @abstractmethod
    def rollout(
        self,
        player: PolicyPlayer,
        chosen: Sequence[tuple[Start | Branch, int]],
        where: Where,
        ended: Callable[[Episode], None],
        options: Mapping[str, Any],
    ) -> None:
        """Plays one episode per start (or branch) and slot.

        Args:
            player: whose policy replies.
            chosen: starts or branches, each with its slot.
            where: run, stage, update and seed they are played in.
            ended: takes every episode when it has ended, once each.
            options: further ones of `rollout`, plain data.
        """

    def refresh(self) -> None:
        """Takes up nothing: weights are sent when they have changed and something is played."""
        return

    def reply(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses single replies: its environments are elsewhere, too.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"the backend {type(self).__name__} plays whole conversations of the policy that"
            " trains, and replies in no seat of a match: take `backend: in-process` there"
        )


def begin_elsewhere(
    player: PolicyPlayer,
    starts: Iterable[tuple[Start | Branch, int]],
    where: Where,
    *,
    max_turns: int = 1000,
    step_limit: float = 60.0,
    schedule: Schedule = "deterministic",
) -> None:
    """Begins to play, with the policy as it is now, what `rollout` will be asked for; arguments as
    there.

    Raises:
        ConfigError: the player's backend plays here, where one thing is done at a time.
    """
    if not isinstance(player.backend, Elsewhere):
        raise ConfigError(
            "conversations cannot be begun ahead (`overlap`) where they are played in this process:"
            " take a backend that plays elsewhere, such as `backend: ray`"
        )
    player.backend.begin(player, list(starts), where, plain(max_turns, step_limit, schedule))


def has_arrived(
    player: PolicyPlayer, starts: Sequence[tuple[Start | Branch, int]], where: Where
) -> bool:
    """Returns whether `rollout` would wait for nothing: all that was begun elsewhere is here."""
    return isinstance(player.backend, Elsewhere) and player.backend.has_arrived(starts, where)


def plain(max_turns: int, step_limit: float, schedule: Schedule) -> dict[str, Any]:
    """Returns the options of `rollout` that are the same wherever it is played."""
    return {"max_turns": max_turns, "step_limit": step_limit, "schedule": schedule}


class Counting:
    """Conversations that are played elsewhere, as they end."""

    def __init__(
        self,
        chosen: Sequence[tuple[Start | Branch, int]],
        where: Where,
        max_failure_rate: float,
        progress: Progress | None,
        ended: Callable[[Episode], None] | None,
    ) -> None:
        self.ids = [episode_id(where, start, slot) for start, slot in chosen]
        self.max_failure_rate, self.progress, self.ended = max_failure_rate, progress, ended
        self.done: dict[str, Episode] = {}
        self.failed: list[str] = []

    def take(self, episode: Episode) -> None:
        """Takes an episode that has ended."""
        self.done[episode.id] = episode
        if episode.ending == "failed":
            self.failed.append(episode.reason)
            refuse_failures(self.failed, len(self.ids), self.max_failure_rate)
        if self.ended:
            self.ended(episode)
        if self.progress:
            self.progress(len(self.done), len(self.ids))

    def episodes(self) -> list[Episode]:
        """Returns all of them, in the order of the starts."""
        return [self.done[id_] for id_ in self.ids]


def refuse_failures(failed: Sequence[str], total: int, allowed: float) -> None:
    """Raises `TooManyFailures`, with some reasons, where more episodes failed than the allowed
    share of all."""
    if len(failed) > allowed * total:
        reasons = sorted(set(failed))[:3]
        raise TooManyFailures(
            f"{len(failed)} of {total} episodes failed in their environment or by their user, more"
            f" than max_failure_rate={allowed:g} allows. Reasons: {'; '.join(reasons)}"
        )
