"""Backends that play whole conversations in other processes, environments included."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..records.episode import Episode, Start
from ..records.sampling import Conversation, Sample
from .conversation import Branch, Where
from .players import PolicyPlayer


class Elsewhere(ABC):
    """Base of backends that play whole conversations in other processes, each with environments and
    a copy of the policy. A conversation has the id and the noise there that it would have here.

    Attributes:
        rows: how many conversations may live at a time, in all of them together.
    """

    rows: int

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

    def reply(self, conversations: Sequence[Conversation], *_: Any) -> Iterable[Any]:
        """Refuses single replies: its environments are elsewhere, too.

        Raises:
            ConfigError: always.
        """
        samples: list[tuple[Conversation, Sample]] = []
        if conversations:
            raise ConfigError(
                f"the backend {type(self).__name__} plays whole conversations of the policy that"
                " trains, and replies in no seat of a match: take `backend: in-process` there"
            )
        return samples
