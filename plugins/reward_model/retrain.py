"""A reward model that keeps learning while people rank: `{judge: reward-model, retrain: {every:
64}}` in `rl`.

Before each update the judge counts the run's comparisons in force that are new to it. When there
are `every` of them, a new version is trained, and the present one keeps judging unless the
new one is at least as good at what neither has seen.

- *Measured on fresh starts.* Of the starts that were compared for the first time, a share is held
  out, and at least one; old and new version are asked about those. What is held out stays so: no
  later version trains on it.
- *Trained from the present version, on everything else that was ever compared.* The present weights
  are what the scores that the policy has learned from came from, so that a new version moves them
  as little as the rankings demand; and nothing else need be kept, while a training from scratch
  needs the model that the first version began from and as many epochs as that had. The old
  comparisons are among the data, so nothing is forgotten for the new ones.
- *The same zero.* As after the stage `reward-model`, the policy's latest conversations, here those
  that were newly compared, score 0.
- *Written down.* A version is saved as `reward-model/update-N` (N updates were made before it), a
  refusal as `reward-model/refused-N.json`. A run that goes on takes what is written and trains
  nothing twice, and feedback on later updates' conversations does not count yet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ...protocols import Comparison, RunView
from ...running import comparing, comparisons_of
from ...tools import derive_id, files
from .model import NOTE, RewardModel
from .training import Data, Ensemble, Training, finals, place


class Retrain(Training):
    """Options of a reward model that is trained again during a run.

    Attributes:
        every: a new version is trained when this many comparisons are new.
        held_out: share of the starts compared for the first time that train nothing and decide
            between the versions.

    How it learns: see `Training`.
    """

    every: int = Field(default=64, ge=1)
    held_out: float = Field(default=0.2, gt=0, lt=1)


class Versions:
    """The versions of a judge's reward model: which one judges, what it knows, and when the next
    one is made.

    Args:
        options: of the training.
        device: where models are loaded.
        taken: called with every model that begins to judge.
    """

    def __init__(
        self, options: Retrain, device: str | None, taken: Callable[[RewardModel], None]
    ) -> None:
        self.options, self.device, self.taken = options, device, taken
        self._path, self._folder = "", Path()
        # Comparisons that the present version, or one that was refused, was made from.
        self._known: set[str] = set()
        self._held: set[str] = set()  # starts that no version may train on

    def begin(self, path: Path | str, folder: Path) -> None:
        """Sets the version to begin with; `folder` is the run's."""
        self._folder, self._path = folder, _within(path, folder)
        self._take(self._load())

    def learn(self, run: RunView) -> dict[str, float]:
        """Trains a new version if it is time, and returns metrics of it; the engine calls this
        before an update."""
        self._version = run.folder / "reward-model" / f"update-{run.updates:06d}"
        self._refusal = run.folder / "reward-model" / f"refused-{run.updates:06d}.json"
        if found := self._written(run):
            return found
        comparisons = self._comparisons(run)
        fresh = {c.id for c in comparisons} - self._known
        found = self._compete(run, comparisons, fresh) if len(fresh) >= self.options.every else {}
        return found or {"reward_model/fresh": float(len(fresh))}

    def _written(self, run: RunView) -> dict[str, float]:
        """Takes over the decision from when this update was first made; empty where there was
        none."""
        notes = _notes(self._version / NOTE)
        if notes.get("run") == run.id and "switched" in notes:
            self._path = _within(self._version, run.folder)
            self._take(self._load())
            return _metrics(notes)
        notes = _notes(self._refusal)
        if notes.get("run") == run.id:
            self._learned(notes)
            return _metrics(notes)
        return {}

    def _compete(
        self, run: RunView, comparisons: Sequence[Comparison], fresh: set[str]
    ) -> dict[str, float]:
        """Trains a version, compares it with the present one on what neither has seen, and records
        which of them judges.

        Empty where there is nothing to tell them apart by yet: no start was compared for the first
        time, or raters only saw ties.
        """
        model, options = self._load(), self.options
        data, _ = Data.readable(run.ledger, comparisons, model)
        known = {
            start
            for start, answers in zip(data.starts, data.by_group, strict=True)
            if any(c.id not in fresh for c in answers)
        }
        new = sorted(set(data.starts) - known, key=lambda start: place(run.seed, start))
        heldout = set(new[: math.ceil(options.held_out * len(new))])
        train = [g for g, start in enumerate(data.starts) if start not in self._held | heldout]
        held = [g for g, start in enumerate(data.starts) if start in heldout]
        if not train or not held:
            return {}
        was = data.measure(finals(model, data.episodes, options.micro_tokens).mean(1), held)
        if "accuracy" not in was:
            return {}
        seeds = [
            derive_id("retrain", run.seed, run.stage, run.updates, m)
            for m in range(len(model.members))
        ]
        for step in options.fit(Ensemble(model, options), data, train, seeds):
            run.status("fit", step.made, step.steps)
        values = finals(model, data.episodes, options.micro_tokens)
        now = data.measure(values.mean(1), held)
        better = now["accuracy"] >= was["accuracy"]
        notes = {
            "run": run.id, "update": run.updates + 1, "from": self._path, "switched": float(better),
            "old_accuracy": was["accuracy"],
            "new_accuracy": now["accuracy"], "pairs": now["pairs"], "comparisons": len(comparisons),
            "fresh": len(fresh),
            "known": sorted(c.id for c in comparisons), "held": sorted(self._held | heldout),
        }  # fmt: skip
        if better:
            latest = [
                e
                for g, start in enumerate(data.starts)
                if start not in known
                for e in data.members[g]
            ]
            model.shift(values[sorted(set(latest))].mean(0))
            model.notes = notes
            model.save_pretrained(self._version)
            self._path = _within(self._version, run.folder)
            self._take(model)
        else:
            self._refusal.parent.mkdir(exist_ok=True)
            files.write(self._refusal, json.dumps(notes, indent=2) + "\n")
            self._learned(notes)
        return _metrics(notes)

    def state_dict(self) -> dict[str, Any]:
        """Returns the version's path, the comparisons it knows, and the starts held out."""
        return {"path": self._path, "heard": sorted(self._known), "held": sorted(self._held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a checkpoint's version; takes up the comparisons known and the starts held out."""
        if state["path"] != self._path:
            self._path = state["path"]
            self._take(self._load())
        self._known, self._held = set(state["heard"]), set(state["held"])

    def _load(self) -> RewardModel:
        inside = self._folder / self._path
        return RewardModel.from_pretrained(
            inside if inside.is_dir() else self._path, device=self.device
        )

    def _take(self, model: RewardModel) -> None:
        self._learned(model.notes)
        self.taken(model)

    def _learned(self, notes: Mapping[str, Any]) -> None:
        self._known |= set(notes.get("known", ()))
        self._held |= set(notes.get("held", ()))

    def _comparisons(self, run: RunView) -> list[Comparison]:
        """Returns the run's comparisons, of any source and however late, up to this update: a run
        that goes on finds later answers too."""
        found = comparisons_of(run, stages=comparing(run))
        shown = run.ledger.episodes([c.ranking[0][0] for c in found if c.id not in self._known])
        return [
            c for c in found if c.id in self._known or shown[c.ranking[0][0]].update <= run.updates
        ]


def _within(path: Path | str, folder: Path) -> str:
    """Returns a path as it is kept: relative to the run's folder where it lies there, so that the
    folder may move."""
    try:
        return str(Path(path).resolve().relative_to(folder.resolve()))
    except ValueError:
        return str(path)


def _notes(path: Path) -> dict[str, Any]:
    """Reads the notes of a saved version or of a refusal; empty where there are none."""
    if not path.is_file():
        return {}
    found = files.read_note(path)
    return dict(found.get("notes", found))


def _metrics(notes: Mapping[str, Any]) -> dict[str, float]:
    named = ("old_accuracy", "new_accuracy", "pairs", "switched", "comparisons", "fresh")
    return {f"reward_model/{name}": float(notes[name]) for name in named}
