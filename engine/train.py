"""`turnwise.train`: reinforcement learning on one or more environments, in one call."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .pipeline.config import RunConfig
from .pipeline.plugins import Plugins
from .pipeline.progress import Display, in_a_line, quiet
from .pipeline.run import Run
from .records.update import Status
from .stages.rl.metrics import idle_stages


def train(
    policy: Any,
    env: Any,
    *,
    feedback: Any = "environment",
    optimizer: Any = "grpo",
    credit: Any = None,
    updates: int = 100,
    seed: int = 0,
    folder: str | Path | None = None,
    threads: int | None = None,
    resume: bool = False,
    plugins: Plugins | None = None,
    on_status: Callable[[Status], None] | None = None,
    **options: Any,
) -> Run:
    """Trains a policy on conversations and returns the finished run.

        run = turnwise.train("Qwen/Qwen2.5-0.5B-Instruct", env="acme/Riddle-v0", updates=200)
        run.policy.save_pretrained("riddler")

    Args:
        policy: a model's folder or hub name, a mapping of `PolicyConfig`, or a `Policy`.
        env: an environment's id, or a mixture `[("a", 0.7), ("b", 0.3)]`.
        feedback: judges, sources or functions; "environment" is the environment's own reward.
        optimizer, credit: a registered name, or a mapping with `name` and options. Default credit:
            what fits the optimizer.
        updates: how many.
        seed: everything random derives from it.
        folder: of the run; default: a new one under `runs/`.
        threads: torch's threads.
        resume: go on with what the folder holds, exactly; from the start if nothing.
        plugins: default: those installed.
        on_status: instead of the progress display, which is shown on a terminal.
        options: any field of the `rl` stage (`groups`, `group_size`, `max_new_tokens`, ...).

    Raises:
        ConfigError, PluginError: the options cannot work; raised before anything is loaded.
        KeyboardInterrupt: Ctrl-C ended it early, with everything saved; SIGTERM raises SystemExit.
    """
    if resume and folder is None:
        raise ConfigError("resume=True goes on with what a folder holds: give the run's `folder`")
    stage = {
        "env": env,
        "feedback": feedback,
        "optimizer": optimizer,
        "credit": credit,
        "updates": updates,
        **options,
    }
    config = RunConfig(
        policy=policy,
        stages=[{"rl": stage}],
        seed=seed,
        threads=threads,
        folder=Path(folder) if folder else _new_folder(env),
    )
    quiet()
    shown = on_status is None and sys.stderr.isatty()
    with Display(enabled=shown, log=on_status is None) as display:
        shows = on_status or display.show
        run = Run(config, resume=resume, plugins=plugins, on_status=shows)
        for update in run:
            if on_status is None and not shown and run.is_main:
                print(in_a_line(update), file=sys.stderr, flush=True)
    _print_end(run, shown=on_status is None)
    if run.signal:  # what the caller does with a finished run is not done with this one
        raise KeyboardInterrupt if run.signal == signal.SIGINT else SystemExit(128 + run.signal)
    return run


def _print_end(run: Run, shown: bool) -> None:
    """Prints how a run ended and where it is, and how an interrupted one goes on."""
    if run.is_main and shown:
        how = f"{'interrupted' if run.stopping else 'finished'} after update {run.updates}"
        print(f"turnwise: {how}; everything is in {run.folder}", file=sys.stderr)
        if run.stopping:
            again = f"turnwise.train(..., folder={str(run.folder)!r}, resume=True)"
            print(f"turnwise: to go on from there: {again}", file=sys.stderr)
    for label, why in ({} if run.stopping else idle_stages(run.metrics)).items():
        print(f"turnwise: {label} taught the policy nothing: {why}", file=sys.stderr)


def _new_folder(env: Any) -> Path:
    first = env[0] if isinstance(env, list) else env
    first = first.get("id", "") if isinstance(first, Mapping) else first
    name = first if isinstance(first, str) else first[0] if isinstance(first, tuple) else "rl"
    stem = name.rsplit("/", 1)[-1].lower()
    number = 1
    while (folder := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return folder
