"""A run: a config, a folder, a ledger. Iterating it does the work, one update at a time.

runs/riddle/
  config.yaml          what was asked, secrets hidden
  ledger.sqlite        episodes, requests, feedback, who trained when
  metrics.jsonl        one line per update
  checkpoints/         the last few, each written beside and moved into place whole
  policy/              the result
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import yaml

from .config import ConfigError, PolicyConfig, RunConfig, Stage
from .episode import Episode, derive_id
from .learning import NonFiniteError
from .ledger import Ledger
from .memory import OutOfMemory
from .plugins import Plugins
from .secrets import redacted

if TYPE_CHECKING:
    from .policy import Policy


@dataclass(frozen=True, slots=True)
class Update:
    """What one update did.

    Attributes:
        number: counts through the whole run, from 1.
        stage: name of its stage.
        metrics: numbers, as written to metrics.jsonl.
        episodes: those played for it.
    """

    number: int
    stage: str
    metrics: Mapping[str, float]
    episodes: Sequence[Episode] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Status:
    """What a run is doing, for progress displays.

    Attributes:
        stage, phase: "rl", "play" | "feedback" | "update" | ...
        done, total: of the phase.
        update, updates: of the stage.
        metrics: of the last update.
        note: "waiting for 12 answers of 'people'".
    """

    stage: str
    phase: str
    done: int = 0
    total: int = 0
    update: int = 0
    updates: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


class Run:
    """A run from a config.

    Args:
        config: a `RunConfig`, a mapping like one, or the path of a YAML file.
        folder: overrides the config's.
        plugins: default: those installed.
        clock, sleep: the run's one clock.
        on_status: called with a `Status` whenever something moves.

    Raises:
        ConfigError, PluginError: the config cannot work; nothing was loaded or played yet.
        LedgerError: the folder's ledger cannot be used.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any] | str | Path,
        *,
        folder: str | Path | None = None,
        plugins: Plugins | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        on_status: Callable[[Status], None] | None = None,
    ) -> None:
        if isinstance(config, (str, Path)):
            config = RunConfig.load(config)
        elif isinstance(config, Mapping):
            config = RunConfig(**config)
        self.config = config
        self.plugins = plugins if plugins is not None else Plugins()
        self.clock, self.sleep, self.on_status = clock, sleep, on_status
        self.stages: list[tuple[str, Stage]] = []
        for entry in config.stages:
            [(name, options)] = entry.items()
            if options is not None and not isinstance(options, Mapping):
                raise ConfigError(f"stage {name!r} must be a mapping of its options, got {type(options).__name__}")
            self.stages.append((name, self.plugins.create("stage", name, **(options or {}))))
        for _, stage in self.stages:
            if hasattr(stage, "check"):
                stage.check(self)
        name = config.name or (Path(folder or config.folder or "run").name)
        self.folder = Path(folder or config.folder or Path("runs") / name)
        self.name = name
        self.id = derive_id(name, redacted(config.model_dump(exclude={"folder", "ledger"})))
        self.updates = 0  # made so far, through the whole run
        self.stage = ""
        self.metrics: list[dict[str, Any]] = []
        self.stopping = False
        self._savers: Callable[[], Mapping[str, Mapping[str, Any]]] = dict

    def __repr__(self) -> str:
        return f"<Run {self.name!r} in {self.folder}, {self.updates} updates{', stopped' if self.stopping else ''}>"

    # What stages use.

    @cached_property
    def policy(self) -> Policy:
        """The policy being aligned, loaded when first needed."""
        from .policy import Policy

        given = self.config.policy
        if self.config.threads:
            import torch

            torch.set_num_threads(self.config.threads)
        return (
            Policy.from_pretrained(given.model, **given.model_dump(exclude={"model"}))
            if isinstance(given, PolicyConfig)
            else given
        )

    @cached_property
    def ledger(self) -> Ledger:
        self._prepare_folder()
        return Ledger(self.config.ledger or self.folder / "ledger.sqlite", clock=self.clock)

    @property
    def is_main(self) -> bool:
        """Whether this process writes: of several that train together, one does."""
        return int(os.environ.get("RANK", "0")) == 0

    def status(self, phase: str, done: int = 0, total: int = 0, **more: Any) -> None:
        if self.on_status:
            last = {k: v for k, v in (self.metrics[-1] if self.metrics else {}).items() if isinstance(v, float)}
            self.on_status(Status(self.stage, phase, done, total, **{"metrics": last, **more}))

    def begin(self) -> None:
        """Keeps the policy as it was before the first update, so that there is a checkpoint to go back to from the start."""
        if self.is_main and self.updates == 0:
            self.save_checkpoint()

    def finish_update(
        self,
        metrics: Mapping[str, float],
        *,
        episodes: Sequence[Episode] = (),
        state: Callable[[], Mapping[str, Mapping[str, Any]]] | None = None,
    ) -> Update:
        """Closes an update: counts it, writes its metrics, a checkpoint when one is due, and tells the listeners.

        Args:
            state: gives the state of whatever learns beside the policy, by name, for checkpoints.
        """
        self.updates += 1
        self._savers = state or dict
        line: dict[str, Any] = {"update": self.updates, "stage": self.stage, "time": self.clock(), **metrics}
        self.metrics.append(line)
        if self.is_main:
            with (self.folder / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            if self.updates % self.config.checkpoint_every == 0:
                self.save_checkpoint()
            self.plugins.call_event("update_finished", run=self, update=self.updates, metrics=metrics)
        return Update(self.updates, self.stage, dict(metrics), episodes)

    # The work.

    def __iter__(self) -> Iterator[Update]:
        """Plays the stages, yielding after every update. Ctrl-C ends it after the current update, with everything saved."""
        if self.updates:
            raise ConfigError("this run has been played; make a new Run, in another folder, to play again")
        self._prepare_folder()
        with self._interruptible():
            for name, stage in self.stages:
                self.stage = name
                try:
                    for update in stage.play(self):
                        yield update
                        if self.stopping:
                            break
                except (NonFiniteError, OutOfMemory) as error:
                    kept = sorted((self.folder / "checkpoints").glob("update-*"))
                    raise type(error)(f"{error} The last checkpoint is {kept[-1] if kept else 'missing'}.") from error
                except Exception:  # the policy is as it was after its last update: keep it
                    if self.is_main and self.updates and "policy" in self.__dict__:
                        self.save_checkpoint()
                    raise
                if self.is_main and self.updates and "policy" in self.__dict__:
                    self.save_checkpoint()
                if self.stopping:
                    self.status("stopped")
                    return
            if self.is_main:
                if "policy" in self.__dict__:
                    self.policy.save_pretrained(self.folder / "policy")
                self.plugins.call_event("run_finished", run=self)
            self.status("finished")

    def finish(self) -> Run:
        """Does all the work there is, and returns the run itself."""
        for _ in self:
            pass
        return self

    def _prepare_folder(self) -> None:
        if not self.is_main or "ledger" in self.__dict__:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the run's folder {self.folder} cannot be made: {error.strerror}") from error
        shown = redacted(self.config.model_dump(mode="python", exclude_defaults=True))
        text = yaml.safe_dump(json.loads(json.dumps(shown, default=str)), sort_keys=False)
        target = self.folder / "config.yaml"
        used = (self.folder / "metrics.jsonl").exists() or (self.folder / "ledger.sqlite").exists()
        if used and (not target.exists() or target.read_text() != text):
            raise ConfigError(f"the folder {self.folder} holds a run with another config; choose another folder or name")
        if used:
            raise ConfigError(
                f"the folder {self.folder} holds this run's results already; choose another folder or name, or remove it"
            )
        target.write_text(text)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C asks the run to end after its update; the second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def asked(number: int, frame: FrameType | None) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            self.status("stopping", note="ending after this update; press Ctrl-C again to end at once")

        before = signal.signal(signal.SIGINT, asked)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def save_checkpoint(self) -> Path:
        """Writes policy, learners' states and counters, whole or not at all, and removes the oldest beyond those kept."""
        from safetensors.torch import save_file

        root = self.folder / "checkpoints"
        target, draft = root / f"update-{self.updates:06d}", root / ".draft"
        if target.exists():
            return target
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        self.policy.save_pretrained(draft / "policy")
        plain: dict[str, Any] = {}
        for name, state in self._savers().items():
            tensors = {k: v.contiguous() for k, v in state.items() if hasattr(v, "contiguous")}
            plain[name] = {k: v for k, v in state.items() if k not in tensors}
            save_file(tensors, draft / f"{name}.safetensors")
        note = {"run": self.id, "update": self.updates, "stage": self.stage, "version": self.policy.version, "states": plain}
        (draft / "state.json").write_text(json.dumps(note))
        draft.rename(target)
        for old in sorted(root.glob("update-*"))[: -self.config.keep_checkpoints]:
            shutil.rmtree(old)
        return target
