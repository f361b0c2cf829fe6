"""`turnwise run`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import TurnwiseError
from ..util.secrets import redact
from .app import MODULE, SETTINGS, import_module, load_config

if TYPE_CHECKING:
    from ..pipeline.run import Run


def run(
    context: typer.Context,
    configs: Annotated[
        list[Path],
        typer.Argument(
            help="A pipeline in YAML; settings of further files take its settings' places."
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Option(help="Where the run goes; default runs/<name>, with what --set says."),
    ] = None,
    settings: Annotated[list[str] | None, SETTINGS] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=...")] = None,
    resume: Annotated[
        bool,
        typer.Option(help="Go on with what the folder holds, exactly; from the start if nothing."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check all of it, print it with every default, and what it would do."
        ),
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            help="The Ray cluster at which stages with `backend: ray` play, as RAY_ADDRESS says it."
        ),
    ] = None,
    module: Annotated[str | None, MODULE] = None,
) -> None:
    """Runs a pipeline: sft, rank, reward-model, rl, evaluate, and stages of plugins."""
    from ..pipeline.processes import leave
    from ..pipeline.progress import Display, in_a_line, quiet
    from ..pipeline.run import Run

    import_module(module, context.obj)
    given = [*(settings or []), *([f"seed={seed}"] if seed is not None else [])]
    read = load_config(configs, given)
    if dry_run:
        _print_outline(Run(read, folder=folder, plugins=context.obj))
        return
    quiet()
    warnings.filterwarnings("ignore", message="the run is paused")  # printed at the end
    if ray:
        os.environ["RAY_ADDRESS"] = ray
    main = os.environ.get("RANK", "0") == "0"
    options = ["--folder", str(folder)] if folder else []
    options += ["--ray", ray] if ray else []
    options += [word for text in given for word in ("--set", text)]
    options += ["--module", module] if module else []
    again = redact(shlex.join(["turnwise", "run", "--resume", *map(str, configs), *options]))
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
    leave(going)
    if not going.is_main:
        return
    _print_end(going, again)


def _print_end(going: Run, again: str) -> None:
    """Prints how a run ended, and ends the command with the status that says so.

    Args:
        going: the run.
        again: the command that goes on with it.
    """
    from ..pipeline.folder import read_evaluation
    from ..report.scores import print_scores
    from ..report.verdict import PAIR, verdict
    from ..stages.rl.metrics import idle_stages, learned_nothing
    from ..stages.rl.stage import RL

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
        if any(name.rpartition("/")[2] == PAIR for name in table):
            print(f"Did it get better? {verdict(table)}")
    if going.paused:
        raise typer.Exit(3)
    if going.stopping:
        raise typer.Exit(128 + (going.signal or signal.SIGINT))
    if nothing:
        raise typer.Exit(4)


def _print_outline(planned: Run) -> None:
    """Prints a run's whole config, and what each stage would do.

    Raises:
        PolicyError: its policy cannot be loaded, as far as this machine's folders tell.
    """
    import yaml

    from ..pipeline.parts import whole_config
    from ..policy.loading import find_model

    print("# All that holds, every default written out; the run takes the config as it was given.")
    print(yaml.safe_dump(whole_config(planned), sort_keys=False).rstrip())
    print(f"\nNothing was loaded, played or asked. It would go to {planned.folder}:")
    for label, stage in planned.stages:
        print(f"  {label}")
        for line in stage.outline() or ["(says nothing of what it will do)"]:
            print(f"    {line}")
    if costs := planned.plugins.costs(planned):
        print(
            "It would pay, the words of the conversations left out (`turnwise estimate` has them):"
        )
        for line in costs:
            print(f"  {line}")
    print("What fits in memory: `turnwise fits`.")
    policy = planned.config.policy
    given = (policy, None) if isinstance(policy, str) else (policy.model, policy.gguf)
    find_model(*given, fetch=False)
