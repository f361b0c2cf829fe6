"""A run: a config, a folder, a ledger. Iterating it does the work, one update at a time.

runs/riddle/
  config.yaml          what was asked, secrets hidden
  ledger.sqlite        episodes, requests, feedback, who trained when
  metrics.jsonl        one line per update
  checkpoints/         the last few, and the one the present stage began from
  policy/              the result
  run.pid              the process that is at it

A run that was stopped, killed or extended goes on exactly (`resume=True`): its weights, its ledger
and its metrics become those of a run that was never interrupted. That works because checkpoints
exist only between updates, noise and ids are derived and not drawn, and what the ledger holds
already (episodes, answers, members) wins over its replay.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import (
    ConfigError,
    DatabaseError,
    Interrupted,
    NonFiniteError,
    OutOfMemory,
    Paused,
)
from ..ledger.ledger import Ledger
from ..records.episode import Episode
from ..records.update import Status, Update
from ..util import files
from ..util.ids import derive_id
from ..util.interrupt import interruptible
from ..util.secrets import config_in_use, redact, redacted
from . import checkpoint
from .card import model_card
from .checkpoint import Checkpoint, Position
from .claim import (
    Claim,
    folder_named,
    has_results,
    is_unspent,
    refuse_results,
    shown_config,
    write_config,
)
from .config import PolicyConfig, RunConfig
from .parts import choose_threads, load_policy, make_stages, use_threads
from .plugins import Plugins
from .processes import broadcast, check_launch, shared
from .resume import (
    check_folder,
    check_machine,
    machine,
    machine_of,
    own_ledger,
    read_updates,
    restore_parts,
    restore_start,
)
from .view import RunReader

if TYPE_CHECKING:
    from ..environments.pool import Environments
    from ..policy.policy import Policy
    from ..protocols import Stateful
    from .tracking import Tracker


class Run(RunReader):
    """A run from a config.

    Args:
        config: a `RunConfig`, a mapping like one, or the path of a YAML file.
        folder: overrides the config's.
        resume: go on with what the folder holds, exactly; from the start if it holds nothing.
            Stages may have been added, and the `updates` of the last one raised.
        plugins: default: those installed.
        clock, sleep: the run's one clock.
        on_status: called with a `Status` whenever something moves.

    Attributes:
        stage: the label of the stage at work; empty before the first.
        updates: how many were made so far, through all stages.
        policy: what is being aligned, loaded when it is first used.
        stopping: whether it was asked to end, or had to.
        paused: why a source could not go on, where that ended the run.

    Raises:
        ConfigError, PluginError: the config cannot work; nothing was loaded or played yet.
        LedgerError: the folder's ledger cannot be used.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any] | str | Path,
        *,
        folder: str | Path | None = None,
        resume: bool = False,
        plugins: Plugins | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        on_status: Callable[[Status], None] | None = None,
    ) -> None:
        check_launch()
        if isinstance(config, (str, Path)):
            config = RunConfig.load(config)
        elif isinstance(config, Mapping):
            config = RunConfig(**config)
        self.config = config
        self.plugins = plugins if plugins is not None else Plugins()
        self.clock, self.sleep, self.on_status = clock, sleep, on_status
        given = folder or config.folder
        self.name = config.name or Path(given or "run").name
        self.folder = Path(given).absolute() if given else folder_named(self.name)
        config_in_use(config.model_dump())
        self.id = derive_id(self.name, redacted(config.model_dump(exclude={"folder", "ledger"})))
        self.updates = 0  # made so far, through the whole run
        self.start = 0  # the update after which the present stage began
        self.stage = ""
        self.today = date.fromtimestamp(clock())  # chat templates may write it; a resume keeps it
        self.metrics: list[dict[str, Any]] = []
        self.stopping = False
        self.paused = ""
        self.signal = 0  # the one that asked the run to end: Ctrl-C is 2, SIGTERM 15
        self.stages = make_stages(config.stages, self.plugins)
        for label, stage in self.stages:
            self.stage = label
            stage.check(self)
        self.stage = ""
        self._parts: Mapping[str, Stateful] = {}
        self._index = self._done = 0  # the stage's place, and the updates it has made
        self._begun = self._played = self._opened = False
        self._resume = resume
        self._threads = config.threads  # of a resumed run those it was made with, by default
        self._stage_start: Path | None = None  # the checkpoint that the present stage began from
        self._claim = Claim(self.folder)
        if config.trackers:
            from .tracking import check

            check(config.trackers)

    def __repr__(self) -> str:
        return (
            f"<Run {self.name!r} in {self.folder}, {self.updates}"
            f" updates{', stopped' if self.stopping else ''}>"
        )

    @property
    def seed(self) -> int:
        """Everything random derives from it."""
        return self.config.seed

    @cached_property
    def environments(self) -> Environments:
        """The environments to play in, which live as long as the run is at work."""
        from ..environments.pool import Environments

        return Environments()

    @cached_property
    def policy(self) -> Policy:
        """The policy being aligned, loaded when first needed; as the present stage began."""
        policy = load_policy(self.config)
        if self._resume:
            self._open()
        elif policy.accelerator.num_processes > 1:  # one day for all, over midnight too
            self.today = broadcast(self.today)
        if self._threads is None and policy.device.type == "cpu":
            choose_threads()
        policy.chat.template.today = self.today
        policy.card = partial(model_card, self.name, shown_config(self.config), self.metrics)
        if self._stage_start is not None:
            restore_start(policy, self._stage_start)
        if self.config.shard:
            policy.shard()
        return policy

    @cached_property
    def ledger(self) -> Ledger:
        """The run's ledger, opened when it is first used."""
        self._open()
        return Ledger(self.config.ledger or self.folder / "ledger.sqlite", clock=self.clock)

    @property
    def before(self) -> list[str]:
        """The labels of the stages before the present one."""
        labels = [label for label, _ in self.stages]
        return labels[: labels.index(self.stage)]

    @property
    def is_main(self) -> bool:
        """Whether this process writes: of several that train together, one does."""
        return int(os.environ.get("RANK", "0")) == 0

    def status(self, phase: str, done: int = 0, total: int = 0, **more: Any) -> None:
        """Reports what is being done to `on_status`."""
        if self.on_status:
            last = self.metrics[-1].items() if self.metrics else ()
            more = {"metrics": {k: v for k, v in last if isinstance(v, float)}, **more}
            self.on_status(Status(self.stage, phase, done, total, **more))

    def begin(self, parts: Mapping[str, Stateful] | None = None) -> int:
        """Tells the run what learns in addition to the policy; a stage calls this once, when all
        of it is set up.

        In a resumed run the weights and states of the last checkpoint are put in place.

        Args:
            parts: by name, all that may have a state.

        Returns:
            how many updates of this stage are made already; the stage goes on after them.
        """
        self._parts, self._begun = dict(parts or {}), True
        if self._from is None:
            here = self.folder / "checkpoints" / f"update-{self.updates:06d}"
            if self._writes and (self.config.shard or not here.exists()):
                self.save_checkpoint()
            return 0
        found, self._from = self._from, None
        if (found.folder / "policy").is_dir():
            self.policy.load_weights(found.folder / "policy")
            self.policy.version = found.position.version
            check_machine(machine_of(self.policy), found.position.machine)
        if found.position.done:
            restore_parts(self._parts, found, self.__dict__.get("policy"))
        self._done = found.position.done
        return self._done

    def finish_update(
        self, metrics: Mapping[str, float], *, episodes: Sequence[Episode] = ()
    ) -> Update:
        """Closes an update: counts it, writes its metrics, a checkpoint when one is due, and tells
        the listeners."""
        self.updates += 1
        self._done += 1
        line = {"update": self.updates, "stage": self.stage, "time": self.clock(), **metrics}
        self.metrics.append(line)
        if self.is_main:
            if not self._begun and not any((self.folder / "checkpoints").glob("update-*")):
                # A folder with updates and no checkpoint has lost them.
                self._save(Position(self.id, 0, 0, 0, 0, 0), None)
            files.append(self.folder / "metrics.jsonl", json.dumps(line))
            self.ledger.settle()
        if self._writes and self._begun and self.updates % self.config.checkpoint_every == 0:
            self.save_checkpoint()
        if self.is_main:
            self._tracker.log(self.stage, self.updates, metrics)
            self.plugins.call_event(
                "update_finished", run=self, update=self.updates, metrics=metrics
            )
        return Update(self.updates, self.stage, dict(metrics), episodes)

    def __iter__(self) -> Iterator[Update]:
        """Plays the stages, yielding after every update.

        Ctrl-C (or SIGTERM) ends it after the current update, with everything saved; `resume` goes
        on from there. So does a source that needs a human decision (a budget is spent): `paused`
        says why.
        """
        if self._played:
            raise ConfigError(
                "this run has been played; make a new Run with resume=True, or in another folder,"
                " to play again"
            )
        self._played = True
        try:
            self._open()
            if self.is_main:
                self.ledger  # noqa: B018 - every run has one, used or not: one that is missing later was lost
            with interruptible(self._asked_to_end, lambda: self.stopping):
                yield from self._stages()
        except OSError as error:
            checkpoint.name_full_disk(error, self.folder)
            raise
        finally:
            self._close()

    def _stages(self) -> Iterator[Update]:
        first = self._from.position.stage if self._from is not None else 0
        for index, (label, stage) in list(enumerate(self.stages))[first:]:
            self.stage, self._index = label, index
            self._begun, self._parts, self._done = False, {}, 0
            self.start = self._from.position.start if self._from is not None else self.updates
            try:
                for update in stage.play(self):
                    yield update
                    if self._all_stop():
                        break
            except Interrupted:
                pass  # asked to end while it waited
            except (NonFiniteError, OutOfMemory) as error:
                kept = sorted((self.folder / "checkpoints").glob("update-*"))
                raise type(error)(
                    f"{error} The last checkpoint is {kept[-1] if kept else 'missing'}."
                ) from error
            except Paused as error:
                if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                    raise  # the other processes wait for this one; the launcher ends them
                self.paused, self.stopping = redact(str(error)), True
                warnings.warn(f"the run is paused: {self.paused}", stacklevel=2)
            stopping = self._all_stop()  # it may have been asked while the stage waited
            if self._writes and self._done and not (stopping and not self._begun):
                self.save_checkpoint()
            if stopping:
                self.status("stopped")
                return
            self._from = None  # a stage that never begins has nothing to go on with
        if self._writes and "policy" in self.__dict__:
            checkpoint.save_policy(self.policy, self.folder / "policy")
        if self.is_main:
            self.plugins.call_event("run_finished", run=self)
        self.status("finished")

    def _asked_to_end(self, number: int) -> None:
        self.stopping, self.signal = True, number
        self.status("stopping", note="ending after this update; press Ctrl-C again to end at once")

    def _all_stop(self) -> bool:
        """Whether the run is to end here, which the main process decides for all of them."""
        if "policy" in self.__dict__:
            self.stopping = shared(self, self.stopping)
        return self.stopping

    def finish(self) -> Run:
        """Does all the work there is, and returns the run itself."""
        for _ in self:
            pass
        return self

    def push_to_hub(self, repo: str, *, private: bool = False, merge: bool = False) -> str:
        """Uploads the policy that the run, once played, has trained, with its card; see `push`."""
        from ..policy.hub import push

        if not self._begun:
            raise ConfigError("play the run first: what it trained is not loaded (`finish()`)")
        return push(self.policy, repo, private=private, merge=merge)

    @property
    def _writes(self) -> bool:
        """Whether this process takes part in writing checkpoints."""
        return self.policy.saves if "policy" in self.__dict__ else self.is_main

    def save_checkpoint(self) -> Path:
        """Writes where the run stands now, and removes the oldest checkpoints beyond those kept."""
        place = (self._index, self._done, self.start)
        if not self._begun:  # what learns in it is not known: it is gone on from its end
            place = (self._index + 1, 0, self.updates)
        version = policy.version if (policy := self.__dict__.get("policy")) else 0
        return self._save(Position(self.id, self.updates, *place, version), policy)

    def _save(self, position: Position, policy: Policy | None) -> Path:
        if self.is_main:
            self.ledger.settle()
            here, held = machine(self.today) | machine_of(policy), self.ledger.mark(self.id)
            position = replace(position, machine=here, ledger=held)
        root, keep = self.folder / "checkpoints", self.config.keep_checkpoints
        return checkpoint.save(root, position, policy, self._parts, keep)

    @cached_property
    def _from(self) -> Checkpoint | None:
        """The checkpoint to go on from; None once the stage it lies in has begun."""
        return checkpoint.newest(self.folder / "checkpoints") if self._resume else None

    @cached_property
    def _tracker(self) -> Tracker:
        from .tracking import Tracker

        return Tracker(self.config, self.name, self.folder)

    def _open(self) -> None:
        """Checks that there is a model, or nothing is left behind; claims the folder, checks that
        what it holds and what is asked belong together, and takes up where it stood."""
        if self._opened:
            return
        if self.is_main:
            if isinstance(self.config.policy, PolicyConfig) and not self.folder.exists():
                from ..policy.loading import find_model

                find_model(self.config.policy.model, self.config.policy.gguf)
            self._claim.take()
        self._opened = True
        if not self.is_main and not self._resume:
            return  # the main process looks after the folder
        shown = shown_config(self.config)
        used = has_results(self.folder)
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if used and is_unspent(self.folder) and (alone or not self._resume):
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
            used = False
        try:
            if used and not self._resume:
                refuse_results(self.folder, shown)
            self._take_up(shown, used)
            if self.is_main:
                write_config(self.folder, shown)
        except Exception:
            self._close()
            raise

    def _close(self) -> None:
        if (environments := self.__dict__.pop("environments", None)) is not None:
            environments.close()
        if "_tracker" in self.__dict__:
            self._tracker.finish()
        if self.is_main and "ledger" in self.__dict__:
            # It has warned already, or warns when it is used next.
            with contextlib.suppress(DatabaseError):
                self.ledger.settle()
        self._claim.release()

    def _take_up(self, shown: Mapping[str, Any], used: bool) -> None:
        """Checks that what the folder holds is whole and this run's, and puts counters, id and
        metrics to where the checkpoint stands."""
        found, log = self._from, self.folder / "metrics.jsonl"
        position = found.position if found is not None else Position(self.id, 0, 0, 0, 0, 0)
        if used:
            check_folder(self.folder, shown, position, position.run == self.id, self.plugins)
        if found is None:
            if self.is_main:
                log.unlink(missing_ok=True)
            return
        if self.is_main:
            self.__dict__["ledger"] = own_ledger(
                self.folder, self.config.ledger, position, self.clock
            )
        then = position.machine
        self._threads = self._threads or then.get("threads")
        use_threads(self._threads)
        check_machine(machine(self.today), then)
        lines = read_updates(self.folder, position.update)
        if self.is_main:
            files.write(log, "".join(json.dumps(line) + "\n" for line in lines))
        self.metrics, self.updates, self.id = lines, position.update, position.run
        self._stage_start = self.folder / "checkpoints" / f"update-{position.start:06d}"
        if then.get("today"):
            self.today = date.fromisoformat(then["today"])
