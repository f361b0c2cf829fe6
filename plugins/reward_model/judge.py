"""A reward model as a judge: `feedback: [reward-model]` in `rl`, `best_of: {judge: reward-model}`
in `evaluate`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ...protocols import ConfigError, Context, Episode, Feedback, Judge, RunView, Stamp
from .losses import combine
from .model import NOTE, RewardModel
from .retrain import Retrain, Versions


class RewardModelJudge(Judge):
    """Judges by a reward model, or by an ensemble of them.

    Args:
        path: the reward model's folder or hub name; default: the latest that this run has trained
            so far.
        combine: what becomes of an ensemble: "mean", "min", or "uwo" (mean minus `penalty` times
            the variance).
        penalty: of "uwo".
        clip: scores are kept within plus and minus this.
        per: "outcome", one score; or "turn", also what each reply added to it, for credit and
            combiners that use turns.
        micro_tokens: tokens per forward pass.
        device: default: the GPU where there is one.
        retrain: trains new versions as comparisons arrive, see `Retrain`; in `rl`.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        combine: Literal["mean", "min", "uwo"] = "mean",
        penalty: float = 1.0,
        clip: float | None = None,
        per: Literal["outcome", "turn"] = "outcome",
        micro_tokens: int = 16384,
        device: str | None = None,
        retrain: Mapping[str, Any] | None = None,
    ) -> None:
        if combine not in ("mean", "min", "uwo"):
            raise ValueError(f"combine must be 'mean', 'min' or 'uwo', got {combine!r}")
        if per not in ("outcome", "turn"):
            raise ValueError(f"per must be 'outcome' or 'turn', got {per!r}")
        if clip is not None and clip <= 0:
            raise ValueError(f"clip must be positive, got {clip}")
        self.path, self.combine, self.penalty, self.clip, self.per = (
            path,
            combine,
            penalty,
            clip,
            per,
        )
        self.micro_tokens, self.device = micro_tokens, device
        # The stage that must come before it is used.
        self.after = "reward-model" if path is None else ""
        self._model: RewardModel | None = None
        if path is not None and Path(path).is_dir():
            self._model = RewardModel.from_pretrained(path, device=device)
        self._versions: Versions | None = None
        if retrain is not None:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError(
                    "retrain works in one process: the others would wait for the training of the"
                    " reward model until their connection is given up. Train it between rl stages"
                    " (`repeat: [rank, reward-model, rl]`), or use one process"
                )
            self._versions = Versions(Retrain(**retrain), device, self._take)

    def learn(self, run: RunView) -> Mapping[str, float] | None:
        """Trains another version of the model when one is due; returns its metrics."""
        return self._versions.learn(run) if self._versions is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of its versions; nothing where it does not retrain."""
        return self._versions.state_dict() if self._versions is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the state of its versions."""
        if self._versions is not None:
            self._versions.load_state_dict(state)

    def open(self, context: Context) -> None:
        """Loads the model, from `path` or the run's latest one."""
        if self._versions is not None:
            self._versions.begin(
                self.path or latest(context.folder, context.update), context.folder
            )
        elif self._model is None:
            self._model = RewardModel.from_pretrained(
                self.path or latest(context.folder, context.update), device=self.device
            )

    def _take(self, model: RewardModel) -> None:
        self._model = model

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Scores each episode by the combined value at its end, and turns by its changes where
        asked."""
        model: Any = self._model
        if model is None:
            raise ConfigError(
                "the judge reward-model has no model: give it `path`, or use it in a run after a"
                " reward-model stage"
            )
        answers = []
        for episode, members in zip(
            episodes, model.values(episodes, micro_tokens=self.micro_tokens), strict=True
        ):
            values = combine(members, self.combine, self.penalty)
            score = float(values[-1])
            steps = (
                torch.diff(values, prepend=values.new_zeros(1)).tolist()
                if self.per == "turn"
                else None
            )
            if self.clip is not None and abs(score) > self.clip:
                clipped = self.clip if score > 0 else -self.clip
                if steps is not None:
                    steps[-1] += clipped - score
                score = clipped
            answers.append(
                Feedback(
                    episode.id, score=score, turn_scores=None if steps is None else tuple(steps),
                    details={"members": members[:, -1].tolist()},
                    stamp=Stamp(version=model.version),
                )
            )  # fmt: skip
        return answers


def latest(folder: Path, update: int) -> Path:
    """The newest reward model that the run in this folder had trained by an update.

    Raises:
        ConfigError: there is none.
    """
    found = [
        p.parent
        for p in sorted((folder / "reward-model").glob(f"*/{NOTE}"))
        if int(p.parent.name.split("-")[-1]) <= update
    ]
    if not found:
        raise ConfigError(
            f"no reward model has been trained in {folder} yet: put a `reward-model` stage before"
            " this one, or give the judge a `path`"
        )
    return found[-1]
