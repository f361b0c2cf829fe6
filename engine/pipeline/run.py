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
import errno
import json
import os
import re
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import (
    CheckpointError,
    ConfigError,
    Damaged,
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
from ..util.secrets import config_in_use, redact, redacted
from . import checkpoint
from .checkpoint import Checkpoint, Position
from .config import PolicyConfig, RunConfig
from .folder import read_config, read_metrics
from .parts import make_stages
from .plugins import Plugins
from .resume import check_same_run

if TYPE_CHECKING:
    from ..environments.pool import Environments
    from ..policy.policy import Policy
    from ..protocols import Stateful


class Run:
    """A run from a config.

    Args:
        config: a `RunConfig`, a mapping like one, or the path of a YAML file.
        folder: overrides the config's.
        resume: go on with what the folder holds, exactly; from the start if it holds nothing.
            Stages may have been added, and the `updates` of the last one raised.
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
        resume: bool = False,
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
        self.name = config.name or (Path(folder or config.folder or "run").name)
        if not (folder or config.folder) and _path_safe(self.name) != self.name:
            raise ConfigError(
                f"the run's name {self.name!r} is to be its folder under runs/, so it can hold no /"
                " or \\, no control character, and not only dots: choose another name, or say"
                " where the run goes (folder)"
            )
        self.folder = Path(
            folder or config.folder or Path("runs") / self.name
        ).absolute()  # an environment may change the directory
        config_in_use(config.model_dump())
        self.id = derive_id(self.name, redacted(config.model_dump(exclude={"folder", "ledger"})))
        self.updates = 0  # made so far, through the whole run
        self.start = 0  # the update after which the present stage began
        self.stage = ""
        # Chat templates may write it: a resumed run keeps it.
        self.today = date.fromtimestamp(clock())
        self.metrics: list[dict[str, Any]] = []
        self.stopping = False
        self.paused = ""  # why a source could not go on, where that ended the run
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
        # The checkpoint that the stage gone on with began from.
        self._stage_start: Path | None = None
        self._lock: Any = None
        if config.trackers:
            from .tracking import check

            check(config.trackers)

    def __repr__(self) -> str:
        return (
            f"<Run {self.name!r} in {self.folder}, {self.updates}"
            f" updates{', stopped' if self.stopping else ''}>"
        )

    # What stages use, see `RunView`.

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
        """The policy being aligned, loaded when first needed; in a resumed run as it was when the
        present stage began."""
        import torch

        from ..policy.policy import Policy

        given = self.config.policy
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        if isinstance(given, PolicyConfig):
            with torch.random.fork_rng():
                torch.manual_seed(self.config.seed)  # new LoRA adapters are drawn
                policy = Policy.from_pretrained(given.model, **given.model_dump(exclude={"model"}))
        else:
            policy = given
        if self._resume:
            self._open()
        policy.chat.template.today = self.today
        if self._stage_start is not None:
            try:
                began = checkpoint.read(self._stage_start)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error} The stage that is gone on with began from it: put it back as it was,"
                    " or begin another run in another folder."
                ) from error
            if (began.folder / "policy").is_dir():
                policy.load_weights(began.folder / "policy")
            policy.version = began.position.version
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
            last = {
                k: v
                for k, v in (self.metrics[-1] if self.metrics else {}).items()
                if isinstance(v, float)
            }
            self.on_status(Status(self.stage, phase, done, total, **{"metrics": last, **more}))

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
            if (
                self.is_main
                and not (self.folder / "checkpoints" / f"update-{self.updates:06d}").exists()
            ):
                self.save_checkpoint()
            return 0
        found, self._from = self._from, None
        if (found.folder / "policy").is_dir():
            self.policy.load_weights(found.folder / "policy")
            self.policy.version = found.position.version
            self._check_machine(found.position.machine, ("attention", "device"))
        if found.position.done:
            states = found.states()
            learning = {name for name, part in self._parts.items() if part.state_dict()}
            if set(states) - set(self._parts) or learning - set(states):
                raise ConfigError(
                    f"the checkpoint {found.folder} holds the states of {sorted(states)}, but this"
                    f" stage has {sorted(learning)}: it is of another config or another version of"
                    " a plugin"
                )
            for name, state in states.items():
                self._parts[name].load_state_dict(state)
        self._done = found.position.done
        return self._done

    def finish_update(
        self, metrics: Mapping[str, float], *, episodes: Sequence[Episode] = ()
    ) -> Update:
        """Closes an update: counts it, writes its metrics, a checkpoint when one is due, and tells
        the listeners."""
        self.updates += 1
        self._done += 1
        line: dict[str, Any] = {
            "update": self.updates,
            "stage": self.stage,
            "time": self.clock(),
            **metrics,
        }
        self.metrics.append(line)
        if self.is_main:
            if not self._begun and not any((self.folder / "checkpoints").glob("update-*")):
                # A folder with updates and no checkpoint has lost them.
                self._save(Position(self.id, 0, 0, 0, 0, 0), None)
            files.append(self.folder / "metrics.jsonl", json.dumps(line))
            self.ledger.settle()
            if self._begun and self.updates % self.config.checkpoint_every == 0:
                self.save_checkpoint()
            if self._tracker is not None:
                self._tracker.log(self.stage, self.updates, metrics)
            self.plugins.call_event(
                "update_finished", run=self, update=self.updates, metrics=metrics
            )
        return Update(self.updates, self.stage, dict(metrics), episodes)

    # The work.

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
            with self._interruptible():
                yield from self._stages()
        except OSError as error:
            if error.errno not in DISK:
                raise
            raise CheckpointError(
                f"the disk of {self.folder} cannot be written to: {error}. Everything up to the"
                " last checkpoint stands; make room and go on with `turnwise run --resume`."
            ) from error
        finally:
            self._close()

    def _stages(self) -> Iterator[Update]:
        first = self._from.position.stage if self._from is not None else 0
        for index, (label, stage) in enumerate(self.stages):
            if index < first:
                continue
            self.stage, self._index, self._begun, self._parts, self._done = (
                label,
                index,
                False,
                {},
                0,
            )
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
            if self.is_main and self._done and not (stopping and not self._begun):
                self.save_checkpoint()
            if stopping:
                self.status("stopped")
                return
            self._from = None  # a stage that never begins has nothing to go on with
        if self.is_main:
            if "policy" in self.__dict__:
                checkpoint.save_policy(self.policy, self.folder / "policy")
            self.plugins.call_event("run_finished", run=self)
        self.status("finished")

    def _all_stop(self) -> bool:
        """Whether the run is to end here; of several processes the main one decides, or the others
        would wait for it for ever."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "policy" in self.__dict__:
            from accelerate.utils import broadcast_object_list

            if self.policy.accelerator.num_processes > 1:
                [self.stopping] = broadcast_object_list([self.stopping])
        return self.stopping

    def finish(self) -> Run:
        """Does all the work there is, and returns the run itself."""
        for _ in self:
            pass
        return self

    def save_checkpoint(self) -> Path:
        """Writes where the run stands now, and removes the oldest checkpoints beyond those kept."""
        stage, done, start = (
            (self._index, self._done, self.start)
            if self._begun
            else (self._index + 1, 0, self.updates)
        )  # a stage that does not say what learns in it can only be gone on from its end
        policy = self.__dict__.get("policy")
        return self._save(
            Position(self.id, self.updates, stage, done, start, policy.version if policy else 0),
            policy,
        )

    def _save(self, position: Position, policy: Policy | None) -> Path:
        self.ledger.settle()
        root = self.folder / "checkpoints"
        whole = replace(position, machine=self._machine(policy), ledger=self.ledger.mark(self.id))
        target = checkpoint.save(root, whole, policy, self._parts)
        checkpoint.prune(root, self.config.keep_checkpoints)
        return target

    def _machine(self, policy: Policy | None) -> dict[str, Any]:
        """What the last bits of the weights depend on."""
        import torch

        return {
            "threads": torch.get_num_threads(),
            "attention": getattr(policy.model.config, "_attn_implementation", "") if policy else "",
            "device": policy.device.type if policy else "",
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "torch": torch.__version__,
            "today": self.today.isoformat(),
        }

    # Opening the folder.

    @cached_property
    def _from(self) -> Checkpoint | None:
        """The checkpoint to go on from; None once the stage it lies in has begun."""
        return checkpoint.newest(self.folder / "checkpoints") if self._resume else None

    @cached_property
    def _tracker(self) -> Any:
        if not self.config.trackers:
            return None
        from .tracking import Tracker

        return Tracker(
            self.config.trackers,
            _path_safe(self.name),
            self.folder,
            redacted(self.config.model_dump(mode="python")),
        )

    def _open(self) -> None:
        """Claims the folder, checks that what it holds and what is asked belong together, and takes
        up where it stood."""
        if self._opened:
            return
        if self.is_main:
            if isinstance(self.config.policy, PolicyConfig) and not self.folder.exists():
                from ..policy.loading import find_model

                find_model(self.config.policy.model)  # nothing is left behind where it is not there
            self._claim()
        self._opened = True
        if not self.is_main and not self._resume:
            return  # the main process looks after the folder
        shown = json.loads(
            json.dumps(
                redacted(self.config.model_dump(mode="python", exclude_defaults=True)), default=str
            )
        )
        used = any(
            (self.folder / name).exists()
            for name in ("metrics.jsonl", "ledger.sqlite", "checkpoints")
        )
        if (
            used
            and self._is_unspent()
            and not (self._resume and int(os.environ.get("WORLD_SIZE", "1")) > 1)
        ):
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
            used = False
        target = self.folder / "config.yaml"
        try:
            if used and not self._resume:
                with contextlib.suppress(Damaged):
                    if read_config(self.folder) != shown:
                        raise ConfigError(
                            f"the folder {self.folder} holds a run with another config; choose"
                            " another folder or name, or remove it"
                        )
                raise ConfigError(
                    f"the folder {self.folder} holds this run's results already: go on with"
                    " `turnwise run --resume` (or resume=True), choose another folder or name, or"
                    " remove it"
                )
            self._take_up(shown, used)
            if self.is_main:
                text = yaml.safe_dump(shown, sort_keys=False)
                if not target.exists() or target.read_bytes() != text.encode():
                    files.write(target, text)
        except Exception:
            self._close()
            raise

    def _is_unspent(self) -> bool:
        """Whether the folder's run ended before anything was played, judged or learned, so that
        another one may begin in its place."""
        if {path.name for path in (self.folder / "checkpoints").glob("*")} - {"update-000000"}:
            return False
        try:
            if (self.folder / "metrics.jsonl").exists() and read_metrics(self.folder):
                return False
            if (self.folder / "ledger.sqlite").exists():
                with contextlib.closing(
                    Ledger(self.folder / "ledger.sqlite", create=False)
                ) as ledger:
                    return not any(ledger.counts().values())
        # what is damaged may have held something
        except (ConfigError, DatabaseError, CheckpointError):
            return False
        return True

    def _claim(self) -> None:
        """One process at a time works in a folder.

        The lock is the operating system's: it ends with the process, however that ends.
        """
        from filelock import FileLock, Timeout

        for path, own in (
            (self.folder / name, own) for own, names in OWN.items() for name in names
        ):
            odd = path.is_symlink() or (path.exists() and path.is_dir() != (own == "folder"))
            # These may lie on another disk.
            if odd and not (path.name == "checkpoints" and path.is_dir()):
                what = (
                    "a symbolic link"
                    if path.is_symlink()
                    else "a folder"
                    if path.is_dir()
                    else "a file"
                )
                raise ConfigError(
                    f"{path} is {what}, and a run puts a {own} of its own in that place: move it"
                    " away, or choose another folder"
                )
        pid = self.folder / "run.pid"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / "run.lock")
            self._lock.acquire(timeout=0)
            pid.write_text(f"{os.getpid()}\n")
        except Timeout:
            self._lock = None
            who = (
                f"process {pid.read_text(errors='replace').strip()}"
                if pid.exists()
                else "another process"
            )
            raise ConfigError(
                f"the run in {self.folder} is at work in {who}: wait for it, stop it (Ctrl-C, or"
                " kill -TERM), or choose another folder"
            ) from None
        except OSError as error:
            self._close()
            raise ConfigError(
                f"the run's folder {self.folder} cannot be made or written to: {error}"
            ) from error

    def _close(self) -> None:
        if (environments := self.__dict__.pop("environments", None)) is not None:
            environments.close()
        if "_tracker" in self.__dict__ and self._tracker is not None:
            self._tracker.finish()
        if self.is_main and "ledger" in self.__dict__:
            # It has warned already, or warns when it is used next.
            with contextlib.suppress(DatabaseError):
                self.ledger.settle()
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.folder / "run.pid").unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def _take_up(self, shown: Mapping[str, Any], used: bool) -> None:
        """Checks that what the folder holds is whole and this run's, and puts counters, id and
        metrics to where the checkpoint stands."""
        found, log = self._from, self.folder / "metrics.jsonl"
        if found is None and used and log.exists() and read_metrics(self.folder):
            raise CheckpointError(
                f"the run in {self.folder} has made updates (metrics.jsonl), and its checkpoints"
                " are gone: put them back to go on, or begin another run in another folder; what"
                " was played and judged is in the ledger all the same"
            )
        position = found.position if found is not None else Position(self.id, 0, 0, 0, 0, 0)
        try:
            if used:
                check_same_run(
                    read_config(self.folder), shown, position.stage, position.done, self.plugins
                )
        except Damaged as error:
            if position.run != self.id:
                raise
            what = str(error).partition(": put it back")[0]
            warnings.warn(
                f"{what}. It is written again: the config given is the one the run was started"
                " with.",
                stacklevel=2,
            )
        if found is None:
            if self.is_main:
                log.unlink(missing_ok=True)
            return
        if self.is_main:
            self.__dict__["ledger"] = self._own_ledger(found)
        if self.config.threads:
            import torch

            torch.set_num_threads(self.config.threads)
        now, then = self._machine(None), position.machine
        self._check_machine(then, ("threads",))
        differ = [
            f"{key} {then[key]} -> {now[key]}"
            for key in ("processes", "torch")
            if now[key] != then.get(key, now[key])
        ]
        if differ:
            warnings.warn(
                f"the run goes on, but not bit for bit: {', '.join(differ)}", stacklevel=2
            )
        lines = read_metrics(self.folder, position.update) if position.update else []
        if [line["update"] for line in lines] != list(range(1, position.update + 1)):
            raise ConfigError(
                f"{log} should hold the updates 1 to {position.update} and does not: put the file"
                " back as it was"
            )
        if self.is_main:
            files.write(log, "".join(json.dumps(line) + "\n" for line in lines))
        self.metrics, self.updates, self.id = lines, position.update, position.run
        self._stage_start = self.folder / "checkpoints" / f"update-{position.start:06d}"
        if then.get("today"):
            self.today = date.fromisoformat(then["today"])

    def _own_ledger(self, found: Checkpoint) -> Ledger:
        """The ledger that the run wrote to, with everything that it held when the checkpoint was
        made.

        Raises:
            ConfigError, LedgerError: it is gone, empty, another run's or an older copy.
        """
        if self.config.ledger is None and not (self.folder / "ledger.sqlite").exists():
            raise ConfigError(
                f"the ledger of the run in {self.folder} is gone (ledger.sqlite). It holds the"
                " episodes and answers that the run trained on; put it back, or start another run"
                f" whose policy is {found.folder / 'policy'}"
            )
        ledger = Ledger(
            self.config.ledger or self.folder / "ledger.sqlite", clock=self.clock, create=False
        )
        ledger.expect(found.position.run, found.position.ledger)
        return ledger

    def _check_machine(self, then: Mapping[str, Any], keys: Sequence[str]) -> None:
        """Refuses to go on where the last bits of every number would change."""
        now = self._machine(self.__dict__.get("policy"))
        for key in keys:
            if then.get(key) and now[key] != then[key]:
                raise ConfigError(
                    f"the run was made with {key} {then[key]} and would go on with {now[key]},"
                    f" which changes the last bits of every number: set `{key}: {then[key]}` in the"
                    " config" + (" (under `policy`)" if key != "threads" else "")
                )

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM asks the run to end after its update; the second one ends it
        at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def asked(number: int, frame: FrameType | None) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping, self.signal = True, number
            self.status(
                "stopping", note="ending after this update; press Ctrl-C again to end at once"
            )

        before = {
            number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# What a disk that is full or fails says.
DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)
OWN = {
    "file": ("config.yaml", "metrics.jsonl", "evaluation.json", "run.pid", "run.lock"),
    "folder": ("policy", "checkpoints"),
}


def _path_safe(name: str) -> str:
    """A name as one step of a path: it leads nowhere else."""
    safe = (
        re.sub(r"[/\\\x00-\x1f\x7f]", "-", name)
        .encode("utf-8", "replace")[:200]
        .decode(errors="ignore")
    )
    return safe if safe.strip(". ") else "-"
