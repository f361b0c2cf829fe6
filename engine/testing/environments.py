"""`check_environment`: plays whole episodes of an environment, and finds what would falsify a
run."""

from __future__ import annotations

from typing import Any

import gymnasium

from ..environments import checker
from ..environments.registry import starts
from ..pipeline.plugins import Plugins
from ..records.episode import Episode
from ..rollout.players import ScriptPlayer
from ..rollout.rollout import rollout
from .faults import Unsound


def check_environment(env_id: str, **options: Any) -> None:
    """Plays whole episodes as `turnwise.check_environment` does, which says what is looked for, and
    fails where it finds anything.

    Args:
        env_id: a registered id.
        options: of `turnwise.check_environment`.

    Raises:
        Unsound: with all faults.
        LookupError: no such environment.
    """
    _register(env_id)
    problems = checker.check_environment(env_id, **options)
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise Unsound(f"environment {env_id!r} is unsound:\n{listed}")


def play(env_id: str, *replies: str, seed: int = 0, **kwargs: Any) -> Episode:
    """Plays one episode with replies that are written down.

    Args:
        env_id: a registered id.
        replies: one after the other; an episode that goes on after the last is truncated.
        seed: of its start.
        kwargs: for `gymnasium.make`.

    Raises:
        LookupError: no such environment.
    """
    _register(env_id)

    def scripted(messages: Any) -> str:
        return replies[sum(message.role == "assistant" for message in messages)]

    [start] = starts(env_id, seed, 1, None, kwargs)
    [episode] = rollout(ScriptPlayer(scripted), [(start, 0)], max_turns=len(replies))
    return episode


def _register(env_id: str) -> None:
    """Has plugins register their environments, in a process in which nothing has yet."""
    if env_id not in gymnasium.registry:
        Plugins()
