"""What is checked when a run is resumed: its config, of which some may change, its folder, and the
machine it goes on with."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError, Damaged
from ..ledger.ledger import Ledger
from ..protocols import Giver, Stateful
from . import checkpoint
from .checkpoint import Checkpoint, Position
from .config import flat
from .folder import read_config, read_metrics
from .plugins import Plugins
from .stage import Stage

if TYPE_CHECKING:
    from ..policy.policy import Policy

FREE = (
    "name",
    "threads",
    "shard",
    "folder",
    "checkpoint_every",
    "keep_checkpoints",
    "trackers",
    "stages",
)


def lasting(options: Any, plugins: Plugins) -> Any:
    """Returns a config without the options that judges and sources declare as `may_change`: they
    affect what an answer costs or how long it takes, not what is answered."""
    if isinstance(options, Mapping):
        free = _may_change(options.get("judge"), plugins)
        return {k: lasting(v, plugins) for k, v in options.items() if k not in free}
    if isinstance(options, (list, tuple)):
        return [lasting(each, plugins) for each in options]
    return options


def _may_change(name: Any, plugins: Plugins) -> frozenset[str]:
    """Returns what the class declares that a feedback entry names, registered or as
    "package.module:Class"; nothing for functions and objects."""
    if not isinstance(name, str):
        return frozenset()
    found: Any = None
    if name in plugins.names("judge"):
        found = plugins.factory("judge", name)
    elif ":" in name:
        module, _, attribute = name.partition(":")
        with contextlib.suppress(ImportError, AttributeError, ValueError):
            found = getattr(importlib.import_module(module), attribute)
    return found.may_change if inspect.isclass(found) and issubclass(found, Giver) else frozenset()


def _stages(entries: Any, plugins: Plugins) -> list[dict[str, Any]]:
    """Returns the stages of a config, one by one, without what may change of their parts."""
    found = []
    for entry in flat(lasting(entries, plugins)):
        [(name, options)] = entry.items()
        known = name in plugins.names("stage")  # a plugin may have gone since
        kind = plugins.factory("stage", name) if known else None
        if isinstance(options, Mapping) and inspect.isclass(kind) and issubclass(kind, Stage):
            options = {
                key: {k: v for k, v in value.items() if k not in kind.may_change.get(key, ())}
                if isinstance(value, Mapping)
                else value
                for key, value in options.items()
            }
        found.append({name: options})
    return found


def check_same_run(
    before: Mapping[str, Any], now: Mapping[str, Any], stage: int, done: int, plugins: Plugins
) -> None:
    """Refuses to go on with a run of another config.

    What may change: how often it saves and where it reports, stages that have not begun, the
    `updates` of the present one, and what parts declare as `may_change`.
    """
    for key in sorted({*before, *now} - set(FREE)):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"the run was started with {key}={before.get(key)!r}, and the config now says"
                f" {now.get(key)!r}: put it back to go on, or choose another folder for another run"
            )
    old, new = _stages(before["stages"], plugins), _stages(now["stages"], plugins)
    for i, then in enumerate(old[: stage + 1]):
        [(name, options)] = then.items()
        if i >= len(new):
            raise ConfigError(
                f"stage {i + 1} ({name!r}) has been played and is missing from the config now: put"
                " it back to go on"
            )
        [(other, changed)] = new[i].items()
        a, b = dict(options or {}), dict(changed or {})
        if i == stage and "updates" in b and int(b["updates"]) >= done:
            a.pop("updates", None), b.pop("updates")
        if name != other or a != b:
            keys = sorted(k for k in {*a, *b} if a.get(k) != b.get(k))
            what = (
                f"{name!r} is now {other!r}"
                if name != other
                else f"{', '.join(keys)} of {name!r} changed"
            )
            raise ConfigError(
                f"stage {i + 1} has been played and the config says something else now: {what}. Put"
                " it back to go on; later stages may be added, and the `updates` of the last one"
                " raised"
            )


def check_folder(
    folder: Path, now: Mapping[str, Any], position: Position, same_config: bool, plugins: Plugins
) -> None:
    """Refuses to go on with a folder that lacks what the run had, or holds a run of another config.

    Args:
        folder: of the run.
        now: the config, as config.yaml would show it.
        position: of the checkpoint to go on from; update 0 where there is none.
        same_config: whether the checkpoint itself says that the config is the one of then; a
            config.yaml that is damaged is no loss in that case.
        plugins: those installed.

    Raises:
        CheckpointError: updates were made and no checkpoint is left.
        ConfigError: the config is another one, or cannot be read.
    """
    made = (folder / "metrics.jsonl").exists() and bool(read_metrics(folder))
    if made and not any((folder / "checkpoints").glob("update-*")):
        raise CheckpointError(
            f"the run in {folder} has made updates (metrics.jsonl), and its checkpoints are gone:"
            " put them back to go on, or begin another run in another folder; what was played and"
            " judged is in the ledger all the same"
        )
    try:
        check_same_run(read_config(folder), now, position.stage, position.done, plugins)
    except Damaged as error:
        if not same_config:
            raise
        what = str(error).partition(": put it back")[0]
        warnings.warn(
            f"{what}. It is written again: the config given is the one the run was started with.",
            stacklevel=2,
        )


def read_updates(folder: Path, update: int) -> list[dict[str, Any]]:
    """Returns the metrics of a run up to an update.

    Raises:
        ConfigError: some are missing.
    """
    lines = read_metrics(folder, update) if update else []
    if [line["update"] for line in lines] != list(range(1, update + 1)):
        raise ConfigError(
            f"{folder / 'metrics.jsonl'} should hold the updates 1 to {update} and does not: put"
            " the file back as it was"
        )
    return lines


def restore_start(policy: Policy, folder: Path) -> None:
    """Puts the policy back to where the stage that is gone on with began.

    Args:
        policy: as its config makes it.
        folder: of the checkpoint that the stage began from.

    Raises:
        CheckpointError: it is gone or torn.
    """
    try:
        began = checkpoint.read(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} The stage that is gone on with began from it: put it back as it was, or begin"
            " another run in another folder."
        ) from error
    if (began.folder / "policy").is_dir():
        policy.load_weights(began.folder / "policy")
    policy.version = began.position.version


def restore_parts(parts: Mapping[str, Stateful], found: Checkpoint, policy: Policy | None) -> None:
    """Gives parts their states of a checkpoint, those that learn with the policy as its weights are
    divided.

    Raises:
        ConfigError: it holds the states of other parts.
    """
    states = found.states(policy)
    learning = {name for name, part in parts.items() if part.state_dict()}
    if set(states) - set(parts) or learning - set(states):
        raise ConfigError(
            f"the checkpoint {found.folder} holds the states of {sorted(states)}, but this stage"
            f" has {sorted(learning)}: it is of another config or another version of a plugin"
        )
    for name, state in states.items():
        parts[name].load_state_dict(state)


def own_ledger(
    folder: Path, url: str | None, position: Position, clock: Callable[[], float]
) -> Ledger:
    """Opens the ledger that a run wrote to, with everything that it held when the checkpoint was
    made.

    Args:
        folder: of the run.
        url: where the ledger is; None: in the folder.
        position: of the checkpoint.
        clock: the run's.

    Raises:
        ConfigError, LedgerError: it is gone, empty, another run's or an older copy.
    """
    if url is None and not (folder / "ledger.sqlite").exists():
        raise ConfigError(
            f"the ledger of the run in {folder} is gone (ledger.sqlite). It holds the episodes and"
            " answers that the run trained on; put it back, or start another run whose policy is"
            f" {folder / 'checkpoints' / f'update-{position.update:06d}' / 'policy'}"
        )
    ledger = Ledger(url or folder / "ledger.sqlite", clock=clock, create=False)
    ledger.expect(position.run, position.ledger)
    for episode, update in ledger.deleted_members(position.run).items():
        warnings.warn(
            f"conversation {episode} was deleted; update {update} had trained on it, which its"
            " deletion does not undo",
            stacklevel=2,
        )
    return ledger


def machine(today: date) -> dict[str, Any]:
    """Returns what the last bits of the weights depend on, by name, but for the policy."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "torch": torch.__version__,
        "today": today.isoformat(),
    }


def machine_of(policy: Policy | None) -> dict[str, Any]:
    """Returns what the last bits of the weights depend on in a policy, by name; empty text where
    none is loaded."""
    if policy is None:
        return {"attention": "", "device": ""}
    attention = policy.model.config._attn_implementation or ""  # transformers has no other name
    return {"attention": attention, "device": policy.device.type}


# By name, where a config says it; None for what no config could put back.
MACHINE = {
    "threads": "`threads: {}` in the config",
    "attention": "`attention: {}` in the config (under `policy`)",
    "device": "`device: {}` in the config (under `policy`)",
    "processes": None,
    "torch": None,
}


def check_machine(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Refuses to go on where the last bits of every number would change and the config can say
    otherwise; warns where it cannot.

    Args:
        now, then: what `machine` or `machine_of` returned; what either lacks is not compared.

    Raises:
        ConfigError: the config asks for something else than then.
    """
    differ = []
    for key, where in MACHINE.items():
        if not now.get(key) or not then.get(key) or now[key] == then[key]:
            continue
        if where is not None:
            raise ConfigError(
                f"the run was made with {key} {then[key]} and would go on with {now[key]}, which"
                f" changes the last bits of every number: set {where.format(then[key])}"
            )
        differ.append(f"{key} {then[key]} -> {now[key]}")
    if differ:
        warnings.warn(f"the run goes on, but not bit for bit: {', '.join(differ)}", stacklevel=2)
