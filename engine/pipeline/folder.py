"""Reads a run's folder: its config, metrics, evaluation and ledger."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import CheckpointError, ConfigError, Damaged, LedgerError
from ..ledger.ledger import Ledger
from ..util.secrets import HIDDEN
from ..util.suggest import near_names
from ..util.wording import numbered
from .checkpoint import UNREADABLE, Position, checkpoint_folders, position_in
from .config import flat


def last_position(folder: Path) -> Position:
    """Returns the position of the run in a folder at its last checkpoint whose note can be read;
    its other files are not looked at.

    Raises:
        CheckpointError: the folder has no such checkpoint.
    """
    why = "it has no checkpoint"
    for each in checkpoint_folders(folder / "checkpoints", reverse=True):
        try:
            return position_in(json.loads((each / "state.json").read_text()))
        except UNREADABLE as error:
            why = (
                f"none of its checkpoints can be read, {each.name}: {type(error).__name__}: {error}"
            )
    raise CheckpointError(f"{folder} holds no run: {why}.")


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the config of the run in a folder, from its config.yaml.

    Raises:
        Damaged: there is none, or it cannot be read.
    """
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not all(
            len(stage) == 1 for stage in flat(config["stages"])
        ):
            raise ValueError(
                f"it should be a mapping with a list of `stages`, and is {type(config).__name__}"
            )
    except OSError as error:
        siblings = {str(p.parent) for p in folder.parent.glob("*/config.yaml")} - {str(folder)}
        near = near_names(str(folder), siblings)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise Damaged(
            f"{folder} holds no run: its config.yaml cannot be read ({error.strerror}).{hint}"
        ) from error
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise Damaged(
            f"{path} is damaged ({type(error).__name__}: {' '.join(str(error).split())}): put it"
            " back as it was, or go on with the run by `turnwise run --resume` and the config it"
            " was started with, which writes it again"
        ) from error
    return config


def stages_in(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the options of each stage of a config, by the stage's label."""
    stages = [next(iter(stage.items())) for stage in flat(config["stages"])]
    labels = numbered([name for name, _ in stages])
    return {label: options or {} for label, (_, options) in zip(labels, stages, strict=True)}


def read_metrics(folder: Path, updates: int | None = None) -> list[dict[str, Any]]:
    """Returns the updates of the run in a folder, from its metrics.jsonl. A last line that was cut
    short (a crash, a full disk) is left out.

    Args:
        folder: of the run.
        updates: look at no more lines than these.

    Raises:
        ConfigError: there is no such file, or another line is damaged.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{folder} holds no run with metrics: {error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:updates], start=1):
        try:
            entry = json.loads(line)
            if (
                not isinstance(entry, dict)
                or type(entry["update"]) is not int
                or type(entry["stage"]) is not str
            ):
                raise ValueError("it should hold the metrics of an update")
        except UNREADABLE as error:
            if number == len(lines):
                warnings.warn(
                    f"{path}: line {number}, the last, is cut short and left out.", stacklevel=2
                )
                break
            raise ConfigError(
                f"{path}, line {number} is damaged ({type(error).__name__}: {error}): put the file"
                " back as it was"
            ) from error
        found.append(entry)
    return found


def read_evaluation(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the table that a stage `evaluate` left in a run's folder; empty where there is none,
    and with a warning where it is damaged."""
    path = folder / "evaluation.json"
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for name, row in table.items():
            numbers = (
                ("success_low", "outcome_high") if "pairs" in row else ("outcome", "low", "high")
            )
            if not all(isinstance(row[number], (int, float)) for number in numbers):
                raise ValueError(f"{name!r} has no numbers")
    except UNREADABLE as error:
        warnings.warn(
            f"{path} is damaged and left out ({error}): its numbers stand in metrics.jsonl too,"
            " under `evaluate`.",
            stacklevel=2,
        )
        return {}
    return table


def open_ledger(folder: Path, url: str | None = None) -> tuple[Ledger, str]:
    """Opens the ledger of the run in a folder, where its config says that it is; returns it, and
    the run's id.

    Args:
        folder: of the run.
        url: where it is instead; needed where the URL in the config had a password, which no folder
            keeps.

    Raises:
        ConfigError: the folder holds no run, or its ledger cannot be opened or is not the run's.
    """
    config = read_config(folder)
    try:
        position = last_position(folder)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    url = url or config.get("ledger")
    if url is None and not (folder / "ledger.sqlite").is_file():
        raise ConfigError(
            f"the ledger of the run in {folder} is gone (ledger.sqlite): put it back to read it"
        )
    if url is not None and HIDDEN in url:
        raise ConfigError(
            f"the ledger of the run in {folder} is at {url}, whose password is not kept: give the"
            " URL with --ledger"
        )
    try:
        ledger = Ledger(url or folder / "ledger.sqlite", create=False)
        ledger.expect(position.run, position.ledger)
    except LedgerError as error:
        raise ConfigError(f"the ledger of the run in {folder} cannot be read: {error}") from error
    return ledger, position.run
