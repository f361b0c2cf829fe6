"""Built-in dialogues. Importing this registers nothing; the `register_envs` hook does."""

from __future__ import annotations

import gymnasium

from ..protocols import hookimpl


@hookimpl
def register_envs() -> None:
    """Registers the environments of this package with Gymnasium."""
    gymnasium.register(
        "turnwise/SupportDesk-v0", "turnwise.envs.support_desk:SupportDesk", max_episode_steps=12
    )
    gymnasium.register("turnwise/Maze-v0", "turnwise.envs.maze:Maze", max_episode_steps=40)
    gymnasium.register(
        "turnwise/MazePO-v0",
        "turnwise.envs.maze:Maze",
        max_episode_steps=40,
        kwargs={"observed": False},
    )
    gymnasium.register(
        "turnwise/TwentyQuestions-v0", "turnwise.envs.twenty_questions:TwentyQuestions"
    )
