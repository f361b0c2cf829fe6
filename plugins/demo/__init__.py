"""The demo: `turnwise demo` learns SupportDesk from scratch, on a laptop CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...engine.hookspecs import hookimpl

if TYPE_CHECKING:
    from typer import Typer


@hookimpl
def register_commands(app: Typer) -> None:
    @app.command()
    def demo(
        seed: Annotated[int, typer.Option(help="Everything random derives from it.")] = 0,
        folder: Annotated[Path, typer.Option(help="Where results go; an earlier demo there is replaced.")] = Path("runs/demo"),
        quick: Annotated[bool, typer.Option(help="A few updates only, to see that everything works.")] = False,
    ) -> None:
        """Builds a small chat model on the spot, fine-tunes it on imperfect demonstrations of SupportDesk, and trains it by PPO and
        by GRPO on the outcome alone."""
        from .demo import run_demo

        run_demo(folder, seed=seed, quick=quick)
