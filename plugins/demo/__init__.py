"""The demo: `turnwise demo` learns SupportDesk from scratch, on a laptop CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...protocols import hookimpl

if TYPE_CHECKING:
    from typer import Typer


@hookimpl
def register_commands(app: Typer) -> None:
    """Adds `turnwise demo`."""
    app.command()(demo)


def demo(
    seed: Annotated[int, typer.Option(help="Everything random derives from it.")] = 0,
    folder: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Where results go: runs/demo, runs/demo-road or runs/demo-real/seed-N. An"
                " earlier demo there is replaced; --real goes on with it."
            )
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A few updates only, to see that everything works.")
    ] = False,
    road: Annotated[
        bool, typer.Option(help="The whole road: rankings, a reward model, PPO against it.")
    ] = False,
    real: Annotated[
        bool,
        typer.Option(help="A pretrained chat model on three tasks, by RL alone: slow."),
    ] = False,
    task: Annotated[
        list[str] | None, typer.Option(help="Only these tasks of --real: guess, sums, desk.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Another chat model for --real: a folder or hub name.")
    ] = "",
    optimizer: Annotated[
        str, typer.Option(help="One RL run with this optimizer instead of PPO and GRPO.")
    ] = "",
    credit: Annotated[
        str, typer.Option(help="One RL run with this credit method instead of PPO and GRPO.")
    ] = "",
) -> None:
    """Builds a small chat model on the spot, fine-tunes it on imperfect demonstrations of
    SupportDesk, and trains it by PPO and by GRPO on the outcome alone."""
    if (road or real) and (optimizer or credit):
        raise typer.BadParameter(
            "--optimizer and --credit are for the plain demo, not for --road or --real"
        )
    if (task or model) and not real:
        raise typer.BadParameter("--task and --model belong to --real")
    if road and real:
        raise typer.BadParameter("--road and --real are two demos: choose one")
    if real:
        from .real import MODEL, run_real

        run_real(
            folder or Path("runs/demo-real") / f"seed-{seed}",
            seed=seed,
            tasks=task or (),
            model=model or MODEL,
            quick=quick,
        )
    elif road:
        from .rlhf import run_road

        run_road(folder or Path("runs/demo-road"), seed=seed, quick=quick)
    else:
        from .support_desk import run_demo

        run_demo(
            folder or Path("runs/demo"),
            seed=seed,
            quick=quick,
            optimizer=optimizer,
            credit=credit,
        )
