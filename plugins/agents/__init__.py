"""Agents as they are: programs that ask the policy over HTTP, as environments, and a policy that is
served (`turnwise serve`) and learns from what its users say.

Both speak OpenAI's Chat Completions and Responses and Anthropic's Messages (`wire/`).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import gymnasium

from ...protocols import Register, hookimpl
from ...tools import install

if TYPE_CHECKING:
    from typer import Typer


@hookimpl
def register_envs() -> dict[str, str]:
    """Registers `turnwise/Agent-v0`. Returns why it is not there, where it is not."""
    if not all(map(find_spec, ("starlette", "uvicorn", "jsonschema"))):
        return {"turnwise/Agent-v0": install("agents")}
    gymnasium.register("turnwise/Agent-v0", "turnwise.plugins.agents.environment:Agent")
    return {}


@hookimpl
def register_judges(register: Register) -> None:
    """Registers the users of a served policy as a source."""
    register("users", "turnwise.plugins.agents.users:Users")


@hookimpl
def register_commands(app: Typer) -> None:
    """Adds `serve` and `forget` to the command line."""
    from .command import forget, serve

    app.command("serve")(serve)
    app.command("forget")(forget)
