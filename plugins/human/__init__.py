"""People: a feedback source, and the service on whose pages they rate (`turnwise rate`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...protocols import Register, hookimpl

if TYPE_CHECKING:
    from typer import Typer


@hookimpl
def register_judges(register: Register) -> None:
    """Registers people as a source."""
    register("people", "turnwise.plugins.human.source:People")


@hookimpl
def register_renderers(register: Register) -> None:
    """Registers the renderers of messages, "markdown" and "plain"."""
    register("markdown", "turnwise.plugins.human.web.render:make_markdown")
    register("plain", "turnwise.plugins.human.web.render:make_plain")


@hookimpl
def register_commands(app: Typer) -> None:
    """Adds `rate` to the command line."""
    from .command import rate

    app.command("rate")(rate)
