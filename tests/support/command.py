"""Runs the command line in a process of its own, forked from one that has torch loaded: of a
command's seconds most are spent on imports otherwise."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from threading import Thread

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["turnwise.engine.pipeline.run", "turnwise.engine.policy.policy",
        "transformers.models.llama.modeling_llama", "scipy.stats"]
)  # fmt: skip


class Command:
    """A command at work, with this process's environment but for what libraries read when they are
    imported.

    Args:
        arguments: of `python -m turnwise`.
        cwd: the folder to run it in.
        given: standard input.
        env: environment variables that it has more; PYTHONPATH is one of them.
    """

    def __init__(
        self,
        *arguments: str,
        cwd: Path | None = None,
        given: str = "",
        env: Mapping[str, str] = {},
    ) -> None:
        self.arguments = arguments
        self._folder = tempfile.TemporaryDirectory()
        folder = self._folder.name
        Path(folder, "in").write_text(given)
        # Pipes, since a test may forbid the command to write files.
        self._printed: dict[str, str] = {}
        self._readers = [
            Thread(target=self._read, args=(name,), daemon=True) for name in ("out", "err")
        ]
        for name, reader in zip(("out", "err"), self._readers, strict=True):
            os.mkfifo(Path(folder, name))
            reader.start()
        self._process = _FORKS.Process(
            target=_run,
            args=(arguments, str(cwd or Path.cwd()), {**os.environ, **env}, folder),
            daemon=True,
        )
        self._process.start()

    def _read(self, name: str) -> None:
        self._printed[name] = Path(self._folder.name, name).read_text()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_over(self) -> bool:
        return not self._process.is_alive()

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Waits for its end. Returns its exit status and what it printed."""
        self._process.join()
        for reader in self._readers:
            reader.join()
        self._folder.cleanup()
        out, err = self._printed["out"], self._printed["err"]
        command = [sys.executable, "-m", "turnwise", *self.arguments]
        assert self._process.exitcode is not None
        return subprocess.CompletedProcess(command, self._process.exitcode, out, err)


def _run(arguments: tuple[str, ...], cwd: str, env: dict[str, str], folder: str) -> None:
    """Becomes the command: its files, folder, environment and arguments."""
    for number, name in enumerate(("in", "out", "err")):
        flags = os.O_RDONLY if name == "in" else os.O_WRONLY
        os.dup2(os.open(os.path.join(folder, name), flags), number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
        for number, mode in enumerate(("r", "w", "w"))
    )
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["turnwise", *arguments]
    sys.path[0:1] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_module("turnwise", run_name="__main__", alter_sys=True)
