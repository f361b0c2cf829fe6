"""Runs the command line in a process of its own, forked from one that has torch loaded: of a
command's seconds most are spent on imports otherwise."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["turnwise.engine.pipeline.run", "turnwise.engine.policy.policy",
        "transformers.models.llama.modeling_llama", "scipy.stats"]
)  # fmt: skip


def command_line(
    *arguments: str,
    cwd: Path | None = None,
    given: str = "",
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m turnwise`, with this process's environment but for what libraries read when
    they are imported, and returns its exit status and what it printed.

    Args:
        cwd: the folder to run it in.
        given: standard input.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "in").write_text(given)
        process = _FORKS.Process(
            target=_run, args=(arguments, str(cwd or Path.cwd()), dict(os.environ), folder)
        )
        process.start()
        process.join()
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    command = [sys.executable, "-m", "turnwise", *arguments]
    assert process.exitcode is not None
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


def _run(arguments: tuple[str, ...], cwd: str, env: dict[str, str], folder: str) -> None:
    """Becomes the command: its files, folder, environment and arguments."""
    for number, name in enumerate(("in", "out", "err")):
        flags = os.O_RDONLY if name == "in" else os.O_WRONLY | os.O_CREAT
        os.dup2(os.open(os.path.join(folder, name), flags), number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
        for number, mode in enumerate(("r", "w", "w"))
    )
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["turnwise", *arguments]
    sys.path[0] = cwd
    runpy.run_module("turnwise", run_name="__main__", alter_sys=True)
