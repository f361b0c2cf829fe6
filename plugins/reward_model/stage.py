"""The stage `reward-model`: learns from comparisons which of two conversations people would prefer.

    P(i better than j) = sigma(r_i - r_j)

r is read at the end of a conversation's last reply; with `prefixes`, at the end of every reply, so
that it is a value per turn. All conversations of one start stand in one batch element with all
their pairs, each read once (InstructGPT's K-wise batches). Several members are an ensemble: same
beginning, other heads, other order of the data, other groups left out (bootstrap). Afterwards every
member is shifted so that the conversations of the latest round, which the present policy played,
score 0 on average.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import Field

from ...learning import processes, shared
from ...protocols import ConfigError, RunView, Stage, Update
from ...running import Chosen, Weights, check_weights, comparing, weighed
from ...tools import derive_id
from .model import RewardModel, load_member
from .training import Data, Ensemble, Training, finals


class TrainRewardModel(Training, Stage):
    """The stage `reward-model`: trains a reward model on comparisons.

    Attributes:
        model: folder, hub name or short name of a causal or sequence-classification model to begin
            from; default: the policy as it stands.
        data: a file or folder of comparisons made elsewhere (docs/preference-data.md), in addition
            to the run's comparisons so far.
        members: size of the ensemble.
        held_out: share of the starts that train nothing and measure accuracy.
        weights: source name to the weight of each of its comparisons; 1 for those not named, 0
            leaves a source out.
        steps_per_update: optimizer steps per update of the run.

    How they learn: see `Training`.
    """

    model: str | None = None
    data: Path | None = None
    members: int = Field(default=1, ge=1)
    held_out: float = Field(default=0.1, ge=0, lt=1)
    weights: Weights = {}
    steps_per_update: int = Field(default=25, ge=1)

    @property
    def trains_policy(self) -> bool:
        """False: it trains another model."""
        return False

    def outline(self) -> list[str]:
        """Returns what it learns from."""
        where = f"and those in {self.data}" if self.data is not None else "so far"
        passes = f"{self.epochs} passes over the comparisons {where}"
        return [f"trains {self.members} reward models, {passes}"]

    def check(self, run: RunView) -> None:
        """Checks that there are comparisons to learn from, and that the weights fit them."""
        if self.data is not None and not self.data.exists():
            raise ConfigError(f"reward-model.data: there is no file or folder {self.data}")
        if self.data is None and len(comparing(run)) == 1:
            raise ConfigError(
                "reward-model has nothing to learn from: put a `rank` stage before it, or give"
                " `data`"
            )
        check_weights(run, "reward-model", self.weights, self.data)

    def play(self, run: RunView) -> Iterator[Update]:
        """Fits the ensemble to comparisons; an update is `steps_per_update` steps of each
        member."""
        together = run.policy if processes(run)[0] > 1 else None
        chosen, ensemble = Chosen(), Ensemble(self._beginning(run), self, together)
        model = ensemble.model
        done = run.begin({"chosen": chosen, "members": ensemble})
        comparisons = weighed("reward-model", chosen.comparisons(run, self.data), self.weights)
        data, long = Data.readable(run.ledger, comparisons, model, self.weights)
        train, held = data.split(self.held_out, run.seed)
        seeds = [derive_id("reward-model", run.seed, run.stage, m) for m in range(self.members)]
        updates = -(-self.steps(train) // self.steps_per_update)
        losses: list[float] = []
        for step in self.fit(ensemble, data, train, seeds, done * self.steps_per_update):
            losses += step.losses
            run.status(
                "fit",
                step.made,
                step.steps,
                update=-(-step.made // self.steps_per_update),
                updates=updates,
            )
            if step.made % self.steps_per_update == 0 or step.made == step.steps:
                metrics = {
                    "loss": sum(losses) / len(losses), "grad_norm": step.norm, "lr": step.lr,
                    "starts": float(len(train)),
                    "too_long": float(long), "comparisons": float(len(data.comparisons)),
                }  # fmt: skip
                losses = []
                if step.made == step.steps:
                    metrics |= self._finish(run, model, data, held, chosen.ids)
                yield run.finish_update(metrics)

    def _beginning(self, run: RunView) -> RewardModel:
        """Loads the members before they learn: the same model, each with a head of its own."""
        seed = int(derive_id("head", run.seed, run.stage)[:8], 16)
        name = self.model
        if name is None:
            name = str(run.folder / ".reward-model-start")
            if run.is_main:
                shutil.rmtree(name, ignore_errors=True)
            if run.policy.saves:
                run.policy.save_pretrained(name, merge=True)
            shared(run, None)  # written before any process reads it
        loaded = [load_member(name, seed + m) for m in range(self.members)]
        device = (
            run.policy.device
            if self.model is None
            else "cuda"
            if torch.cuda.is_available()
            else "cpu"
        )
        if self.model is None:
            shared(run, None)  # read by all before it goes
            if run.is_main:
                shutil.rmtree(name)
        return RewardModel(
            [m.to(device) for _, m in loaded], loaded[0][0], today=run.today.isoformat()
        )

    def _finish(
        self,
        run: RunView,
        model: RewardModel,
        data: Data,
        held: Sequence[int],
        known: Sequence[str],
    ) -> dict[str, float]:
        """Shifts the scores, measures on what was held out, and saves."""
        values = finals(model, data.episodes, self.micro_tokens)
        means = values[data.latest()].mean(0)
        model.shift(means)
        metrics = {
            f"held_out/{k}": v for k, v in data.measure((values - means).mean(1), held).items()
        }
        metrics["disagreement"] = float(values.std(1, correction=0).mean())
        model.notes = {
            "run": run.id, "update": run.updates + 1, "comparisons": len(data.comparisons),
            **metrics, "known": list(known),
            "held": sorted({data.starts[g] for g in held}),
        }  # fmt: skip
        if run.is_main:
            model.save_pretrained(run.folder / "reward-model" / f"update-{run.start:06d}")
        return metrics
