"""Built-in dialogues, and those of other packages where these are installed. Importing this
registers nothing; the `register_envs` hook does."""

from __future__ import annotations

from importlib.util import find_spec

import gymnasium

from ..protocols import hookimpl
from ..tools import install

NEEDS = {  # the module that environments need, and the extra that brings it
    "turnwise/Tools-v0": ("jsonschema", "tools"),
    "turnwise/Shop-v0": ("jsonschema", "tools"),
    "textarena/...": ("textarena", "textarena"),
    "pettingzoo/...": ("pettingzoo", "pettingzoo"),
    "textworld/Game-v0": ("textworld", ""),
    "openenv": ("openenv", "openenv"),
    "reasoning-gym/...": ("reasoning_gym", "reasoning-gym"),
    "verifiers/Taskset-v0": ("verifiers", ""),
}


@hookimpl
def register_envs() -> dict[str, str]:
    """Registers the environments of this package with Gymnasium. Returns why others are not, by
    id."""
    missing = {
        name: install(extra) if extra else f"pip install {module}"
        for name, (module, extra) in NEEDS.items()
        if find_spec(module) is None
    }
    _register_own()
    if find_spec("textarena"):
        from .textarena import OTHERS

        missing |= {f"textarena/{game}-v0": why for why, games in OTHERS.items() for game in games}
        _register_textarena()
    if find_spec("pettingzoo"):
        from .pettingzoo import GAMES as BOARDS

        for board in BOARDS:
            gymnasium.register(
                f"pettingzoo/{board}",
                "turnwise.envs.pettingzoo:PettingZoo",
                max_episode_steps=100,
                kwargs={"game": board},
            )
    if find_spec("textworld"):
        gymnasium.register("textworld/Game-v0", "turnwise.envs.textworld:TextWorld")
    if find_spec("openenv"):
        gymnasium.register("openenv", "turnwise.envs.openenv:OpenEnv")
    if find_spec("verifiers"):
        gymnasium.register("verifiers/Taskset-v0", "turnwise.envs.verifiers:Taskset")
    if find_spec("reasoning_gym"):
        from .reasoning_gym import GENERATORS

        for generator in GENERATORS:
            gymnasium.register(
                f"reasoning-gym/{generator}",
                "turnwise.envs.reasoning_gym:ReasoningGym",
                kwargs={"generator": generator},
            )
    return missing


def _register_own() -> None:
    """Registers the dialogues that need no other package, and those with tools."""
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
    gymnasium.register("turnwise/Prompts-v0", "turnwise.envs.prompts:Prompts")
    if find_spec("jsonschema"):
        gymnasium.register("turnwise/Tools-v0", "turnwise.envs.tools:Tools", max_episode_steps=100)
        gymnasium.register("turnwise/Shop-v0", "turnwise.envs.shop:Shop", max_episode_steps=30)
    from .toy_text import CODECS

    for name in CODECS:
        gymnasium.register(
            f"toy-text/{name}",
            "turnwise.envs.toy_text:ToyText",
            max_episode_steps=200,
            kwargs={"name": name},
        )


def _register_textarena() -> None:
    from .textarena import GAMES, SEVERAL

    for game, seats in {**dict.fromkeys(GAMES, 1), **SEVERAL}.items():
        gymnasium.register(
            f"textarena/{game}-v0",
            "turnwise.envs.textarena:TextArena",
            max_episode_steps=100 if seats == 1 else 200,
            kwargs={"game": f"{game}-v0"},
        )
