"""Live progress on a terminal: stage, phase, speed, outcome, KL, time left."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import Counter
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from ..records.update import SHOWN, Status, Update


def quiet() -> None:
    """Turns off other libraries' progress bars and advice, which would break up ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")


COUNTS = ("comparisons", "conversations", "changed")


def in_a_line(update: Update) -> str:
    """Summarises an update in one line, for where no bars are shown."""
    metrics = update.metrics
    found = {key: metrics[key] for key in SHOWN if key in metrics}
    found = found or {key: value for key, value in metrics.items() if key.endswith("/success")}
    shown = [
        f"{update.stage} {update.number}",
        *(f"{key} {value:z.4f}" for key, value in found.items()),
    ]
    shown += [f"{key} {metrics[key]:.0f}" for key in COUNTS if key in metrics]
    if failed := metrics.get("failed_episodes"):
        users = metrics.get("failed_users", 0.0)
        whose = f", {users:.0f} of them by their user" if users else " in their environment"
        reasons = Counter(e.reason for e in update.episodes if e.ending == "failed")
        why = f" ({reasons.most_common(1)[0][0][:200]})" if reasons else ""
        shown.append(f"{failed:.0f} episodes failed{whose}{why}")
    if metrics.get("trained") == 0:
        shown.append("trained on nothing")
    return "  ".join(shown)


class Display:
    """Shows a run's `Status` as two bars: updates of the stage, and the phase within the update.

    Args:
        enabled: False shows no bars (a pipe, a notebook, another process).
        log: where there are no bars, notes of what is waited for are printed, at most one a minute.
    """

    def __init__(self, enabled: bool = True, log: bool = False) -> None:
        self._log, self._logged = log, -math.inf
        console = Console(stderr=True)
        name, bar = (22, 24) if console.width >= 110 else (12, 8)
        # A narrow terminal cuts the notes, not the counters.
        whole = Column(no_wrap=True, min_width=9)
        self._progress = Progress(
            TextColumn(f"[bold]{{task.description:<{name}}}",
                table_column=Column(no_wrap=True, min_width=name)), BarColumn(bar),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=whole),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
            console=console, transient=False, disable=not enabled,
        )  # fmt: skip
        self._stage: TaskID | None = None
        self._phase: TaskID | None = None
        self._stage_name = ""

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, status: Status) -> None:
        """Shows a run's status."""
        progress = self._progress
        if progress.disable:
            if self._log and status.note and time.monotonic() - self._logged > 60:
                self._logged = time.monotonic()
                print(f"{status.stage}: {status.note}", flush=True)
            return
        if status.updates and (
            self._stage is None or self._stage_name != f"{status.stage}{status.updates}"
        ):
            self._stage_name = f"{status.stage}{status.updates}"
            self._stage = progress.add_task(status.stage, total=status.updates, note="")
        if self._stage is not None and status.updates:
            finished = (
                status.updates
                if status.update == status.updates and status.done == status.total
                else status.update - 1
            )
            progress.update(self._stage, completed=finished, note=_summary(status))
        if self._phase is None:
            self._phase = progress.add_task("", total=1, note="")
        note = status.note or (
            f"{status.metrics['tokens'] / max(1e-9, status.metrics['seconds/play']):,.0f} tokens/s"
            if status.metrics.get("seconds/play")  # an update on what was played earlier has none
            else ""
        )
        progress.update(
            self._phase,
            description=f"  {status.phase}",
            completed=status.done,
            total=status.total or 1,
            note=note,
        )


def _summary(status: Status) -> str:
    shown = {"outcome": "outcome", "success": "success", "kl": "KL", "loss": "loss"}
    parts = [
        f"{label} {status.metrics[key]:z.3f}"
        for key, label in shown.items()
        if key in status.metrics
    ]
    if "trained" in status.metrics:
        parts.append(
            f"trained on {status.metrics['trained']:.0f} of {status.metrics['episodes']:.0f}"
        )
    return "  ".join(parts)
