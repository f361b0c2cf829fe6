"""Programs: a Python function on a thread, or a command in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from ...protocols import EnvironmentBroke
from ...tools import TIED, named, one_line, worded
from .session import Over

LONGEST = 100_000  # characters of a task that a variable may hold
PATIENCE = 2.0  # seconds that a command has to end after it was asked to
KEPT = 2000  # bytes of what a command wrote last


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a program is given: where the policy is, and what to do.

    Attributes:
        base_url: for OpenAI's SDK.
        anthropic_base_url: for Anthropic's.
        api_key: its own; it ends with the episode.
        model: the policy's name.
        task: a row of `tasks`.
        seed: of the episode's start: the same in all episodes of a group.
    """

    base_url: str
    anthropic_base_url: str
    api_key: str
    model: str
    task: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of a command."""
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_API_KEY": self.api_key,
            "ANTHROPIC_BASE_URL": self.anthropic_base_url,
            "ANTHROPIC_API_KEY": self.api_key,
            "TURNWISE_URL": self.anthropic_base_url,
            "TURNWISE_KEY": self.api_key,
            "TURNWISE_MODEL": self.model,
            "TURNWISE_TASK": json.dumps(dict(self.task)),
            "TURNWISE_SEED": str(self.seed),
        }


class Program(Protocol):
    """A program that is running."""

    def stop(self) -> None:
        """Ends it, where that can be done."""


class Function:
    """A Python function, on a thread. A thread cannot be ended: its next request is refused."""

    def __init__(
        self, function: Callable[[Endpoint], Any], endpoint: Endpoint, end: Callable[[Over], None]
    ) -> None:
        def run() -> None:
            try:
                value = function(endpoint)
                if inspect.iscoroutine(value):
                    value = asyncio.run(value)
            except BaseException as error:  # its end, whatever it is, and not ours
                end(Over(fault=worded(error)))
            else:
                end(Over(value))

        threading.Thread(target=run, daemon=True, name="turnwise-program").start()

    def stop(self) -> None:
        """Does nothing: see above."""


class Command:
    """A command, with the processes of its group. It has failed if its status is not 0.

    Raises:
        EnvironmentBroke: there is no such command.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        endpoint: Endpoint,
        end: Callable[[Over], None],
    ) -> None:
        if shutil.which(command[0]) is None:
            what = f"there is no command {command[0]!r}"
            if os.access(command[0], os.X_OK) and Path(command[0]).is_file():
                what += f"; the file in this folder is ./{command[0]}"
            elif Path(command[0]).is_file():
                what = (
                    f"{command[0]!r} may not be executed: `chmod +x` it, or name what runs it, as"
                    f" in `command: [bash, {command[0]}]`"
                )
            raise EnvironmentBroke(what)
        self._wrote: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._task: Path | None = None
        given = endpoint.variables
        if len(given["TURNWISE_TASK"]) > LONGEST:  # than a variable may be
            file, name = tempfile.mkstemp(prefix="turnwise-task-", suffix=".json")
            self._task = Path(name)
            with os.fdopen(file, "w") as task:
                task.write(given.pop("TURNWISE_TASK"))
            given["TURNWISE_TASK_FILE"] = name
        local = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        try:
            self._process = subprocess.Popen(
                [*TIED, *command], env={**os.environ, **local, **variables, **given},
                stdin=subprocess.DEVNULL, stdout=self._wrote, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError:
            self._clean()
            raise

        def wait() -> None:
            status = self._process.wait()
            end(Over(fault=f"status {status}: {self._last_line()}" if status else ""))

        self._waiting = threading.Thread(target=wait, daemon=True, name="turnwise-program")
        self._waiting.start()

    def _last_line(self) -> str:
        size = self._wrote.seek(0, os.SEEK_END)
        self._wrote.seek(max(0, size - KEPT))
        lines = self._wrote.read().decode(errors="replace").strip().splitlines()
        return one_line(lines[-1]) if lines else "it wrote nothing"

    def stop(self) -> None:
        """Asks its processes to end, and ends them."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, how)
            self._waiting.join(PATIENCE)
        self._clean()

    def _clean(self) -> None:
        self._wrote.close()
        if self._task is not None:
            self._task.unlink(missing_ok=True)


def function_of(program: str) -> Callable[[Endpoint], Any]:
    """Returns the function "MODULE:FUNCTION" names.

    Raises:
        ValueError: there is none, or it is a class.
    """
    found = named(program)
    if inspect.isclass(found):
        raise ValueError(
            f"program {program!r} is a class; a function that takes an `Endpoint` is it"
        )
    return found
