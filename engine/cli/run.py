"""`turnwise run`."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from ..errors import TurnwiseError
from .app import MODULE, import_module


def run(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A pipeline in YAML.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where the run goes; default runs/<name>.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the config's seed.")] = None,
    resume: Annotated[
        bool,
        typer.Option(help="Go on with what the folder holds, exactly; from the start if nothing."),
    ] = False,
    module: Annotated[str | None, MODULE] = None,
) -> None:
    """Runs a pipeline: sft, rank, reward-model, rl, evaluate, and stages of plugins."""
    from ..pipeline.config import RunConfig
    from ..pipeline.folder import read_evaluation
    from ..pipeline.progress import Display, in_a_line, quiet
    from ..pipeline.run import Run
    from ..report.scores import print_scores
    from ..stages.rl.metrics import idle_stages, learned_nothing
    from ..stages.rl.stage import RL

    import_module(module, context.obj)
    read = RunConfig.load(config)
    if seed is not None:
        read.seed = seed
    quiet()
    warnings.filterwarnings("ignore", message="the run is paused")  # printed at the end
    main = os.environ.get("RANK", "0") == "0"
    options = [f"--folder {folder}"] if folder else []
    options += [f"--seed {seed}"] if seed is not None else []
    options += [f"--module {module}"] if module else []
    again = " ".join(["turnwise run --resume", str(config), *options])
    with Display(sys.stderr.isatty() and main, log=main) as display:
        going = Run(read, folder=folder, resume=resume, plugins=context.obj, on_status=display.show)
        try:
            for update in going:
                if going.is_main and not sys.stderr.isatty():
                    print(in_a_line(update), flush=True)
        except TurnwiseError as error:
            if going.updates:
                error.add_note(f"To go on after update {going.updates}:  {again}")
            raise
    if not going.is_main:
        return
    idle = {} if going.stopping else idle_stages(going.metrics)
    own = [label for label, stage in going.stages if isinstance(stage, RL)]
    nothing = not going.stopping and learned_nothing(going.metrics, own)
    ended = "Nothing learned" if nothing else "Finished"
    how = "Paused" if going.paused else "Stopped" if going.stopping else ended
    print(
        f"{how} after update {going.updates}. Everything is in {going.folder}."
        + (f"\n{going.paused}" if going.paused else "")
    )
    for stage, why in idle.items():
        print(f"{stage} taught the policy nothing: {why}")
    if going.stopping:
        print(f"To go on from there:  {again}")
    if table := read_evaluation(going.folder):
        print_scores(table)
    if going.paused:
        raise typer.Exit(3)
    if going.stopping:
        raise typer.Exit(128 + (going.signal or signal.SIGINT))
    if nothing:
        raise typer.Exit(4)
