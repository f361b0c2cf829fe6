"""Agents as they are: programs that ask the policy over HTTP, as environments.

The endpoint speaks OpenAI's Chat Completions and Responses and Anthropic's Messages (`wire/`).
"""

from __future__ import annotations

from importlib.util import find_spec

import gymnasium

from ...protocols import hookimpl
from ...tools import install


@hookimpl
def register_envs() -> dict[str, str]:
    """Registers `turnwise/Agent-v0`. Returns why it is not there, where it is not."""
    if not all(map(find_spec, ("starlette", "uvicorn", "jsonschema"))):
        return {"turnwise/Agent-v0": install("agents")}
    gymnasium.register("turnwise/Agent-v0", "turnwise.plugins.agents.environment:Agent")
    return {}
