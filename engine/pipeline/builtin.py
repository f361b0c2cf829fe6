"""The engine's own entries in the registries, by the same hooks as any plugin's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..hookspecs import Register, hookimpl

if TYPE_CHECKING:
    from typer import Typer


@hookimpl
def register_backends(register: Register) -> None:
    """Registers the backend of this package."""
    register("in-process", "turnwise.engine.policy.in_process:InProcess")


@hookimpl
def register_stages(register: Register) -> None:
    """Registers the stages of this package."""
    register("sft", "turnwise.engine.stages.sft:SFT")
    register("rank", "turnwise.engine.stages.rank:Rank")
    register("preference", "turnwise.engine.stages.preference:Preference")
    register("rl", "turnwise.engine.stages.rl.stage:RL")
    register("evaluate", "turnwise.engine.stages.evaluate:Evaluate")


@hookimpl
def register_commands(app: Typer) -> None:
    """Adds the command `options`."""
    from .options_command import options

    app.command()(options)
