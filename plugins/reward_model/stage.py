"""`reward-model`: learns from comparisons which of two conversations people would prefer.

    P(i better than j) = sigma(r_i - r_j)

r is read at the end of a conversation's last reply; with `prefixes`, at the end of every reply, so that it is a value per turn. All
conversations of one start stand in one batch element with all their pairs, each read once (InstructGPT's K-wise batches). Several
members are an ensemble: same beginning, other heads, other order of the data, other groups left out (bootstrap). Afterwards every
member is shifted so that the conversations of the latest round, which the policy as it is played, score 0 on average.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...engine.config import ConfigError, Stage
from ...engine.episode import Episode, derive_id
from ...engine.feedback import Comparison
from ...engine.memory import explained_memory
from ...engine.policy.learner import Learner
from ...engine.policy.model import divide
from ...engine.preferences import Pair, opinion, pairs, rater_agreement, truth_agreement
from ...engine.run import Run, Update
from ...engine.stages.play import shared
from ...engine.stages.preference import Chosen, comparing
from .losses import bradley_terry, calibration_error, centering, k_wise, plackett_luce
from .model import RewardModel, load_member


class TrainRewardModel(Stage):
    """Attributes:
    model: folder or hub name of a causal or sequence-classification model to begin from; default: the policy as it stands.
    data: a file or folder of comparisons made elsewhere (docs/preference-data.md), besides what the run has had compared so far.
    members: size of the ensemble.
    loss: "pairs" (mean over all pairs), "k-wise" (mean per start, then over starts), or "plackett-luce" (whole rankings).
    margin: weight of the raters' grades as a margin; 0: none.
    label_smoothing: share of every label that is replaced by 1/2.
    centering: weight of (r_i + r_j)^2.
    prefixes: weight of the same loss after every earlier reply, turn by turn, for a value per turn.
    bootstrap: share of the starts that each member of an ensemble sees.
    held_out: share of the starts that train nothing and measure accuracy.
    epochs, batch_size: passes, and starts per optimizer step.
    lr, warmup, decay, weight_decay, max_grad_norm, micro_tokens: see `Learner`.
    steps_per_update: optimizer steps per update of the run.
    """

    model: str | None = None
    data: Path | None = None
    members: int = Field(default=1, ge=1)
    loss: Literal["pairs", "k-wise", "plackett-luce"] = "k-wise"
    margin: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    centering: float = Field(default=0.01, ge=0)
    prefixes: float = Field(default=0.0, ge=0)
    bootstrap: float = Field(default=1.0, gt=0, le=1)
    held_out: float = Field(default=0.1, ge=0, lt=1)
    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=16, ge=1)
    lr: float = Field(default=1e-5, gt=0)
    warmup: int = 20
    decay: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_tokens: int = 16384
    steps_per_update: int = Field(default=25, ge=1)

    def check(self, run: Run) -> None:
        if self.data is not None and not self.data.exists():
            raise ConfigError(f"reward-model.data: there is no file or folder {self.data}")
        if self.data is None and len(comparing(run)) == 1:
            raise ConfigError("reward-model has nothing to learn from: put a `rank` stage before it, or give `data`")

    def play(self, run: Run) -> Iterator[Update]:
        chosen, learners = Chosen(), Ensemble(self, run)
        done = run.begin({"chosen": chosen, "members": learners})
        data = Data(run, chosen.comparisons(run, self.data))
        long = {e.id for e in data.episodes if not learners.model.fits(e)}
        if long:
            data = Data(run, [c for c in (_without(c, long) for c in data.comparisons) if c is not None])
        train, held = data.split(self.held_out, run.config.seed)
        steps = self.epochs * math.ceil(max(1, round(len(train) * self.bootstrap)) / self.batch_size)
        updates = math.ceil(steps / self.steps_per_update)
        rows = learners.model.rows(data.episodes)
        losses: list[float] = []
        norm = 0.0
        for step in range(done * self.steps_per_update, steps):
            for m, (learner, member) in enumerate(zip(learners.learners, learners.model.members, strict=True)):
                groups = self._groups(train, step, derive_id("reward-model", run.config.seed, run.stage, m))
                with explained_memory("training the reward model", "`micro_tokens` or `batch_size`"):
                    loss = self._loss(learners.model, member, rows, data, groups)
                    loss.backward()
                norm = learner.step(step / steps, [f"start {g}" for g in groups])
                losses.append(float(loss.detach()))
            run.status("fit", step + 1, steps, update=math.ceil((step + 1) / self.steps_per_update), updates=updates)
            if (step + 1) % self.steps_per_update == 0 or step + 1 == steps:
                metrics = {
                    "loss": sum(losses) / len(losses), "grad_norm": norm, "lr": learners.learners[0].rate(step / steps),
                    "starts": float(len(train)), "too_long": float(len(long)), "comparisons": float(len(data.comparisons)),
                }  # fmt: skip
                losses = []
                if step + 1 == steps:
                    metrics |= self._finish(run, learners.model, data, held)
                yield run.finish_update(metrics)

    def _groups(self, train: Sequence[int], step: int, seed: str) -> list[int]:
        """The starts of one step: each member's own share of them, in an order of its own, epoch by epoch."""
        generator = torch.Generator().manual_seed(int(seed, 16) % 2**63)
        share = torch.randperm(len(train), generator=generator)[: max(1, round(len(train) * self.bootstrap))]
        per_epoch = math.ceil(len(share) / self.batch_size)
        epoch, place = divmod(step, per_epoch)
        order = torch.Generator().manual_seed(int(derive_id(seed, epoch), 16) % 2**63)
        shuffled = share[torch.randperm(len(share), generator=order)]
        return [train[i] for i in shuffled[place * self.batch_size : (place + 1) * self.batch_size].tolist()]

    def _loss(self, model: RewardModel, member: Any, rows: Sequence[Any], data: Data, groups: Sequence[int]) -> Tensor:
        """The loss over some starts, every conversation read once."""
        wanted = sorted({e for g in groups for e in data.members[g]})
        chosen = [rows[e] for e in wanted]
        micros = divide(chosen, self.micro_tokens, model.device)
        scores = torch.cat([model.read(member, micro) for micro in micros])
        place = {
            (e, k): i
            for i, (e, k) in enumerate((e, k) for micro in micros for e, k in zip(micro.episode.tolist(), micro.action.tolist(), strict=True))
        }  # fmt: skip
        last = {e: place[e, len(rows[e].positions) - 1] for e in wanted}
        found = [(i, data.index[p.first], data.index[p.second], p) for i, g in enumerate(groups) for p in data.pairs[g]]
        index = lambda values: torch.tensor(values, dtype=torch.long, device=scores.device)  # noqa: E731
        number = lambda values: torch.tensor(values, dtype=scores.dtype, device=scores.device)  # noqa: E731
        first, second = scores[index([last[a] for _, a, _, _ in found])], scores[index([last[b] for _, _, b, _ in found])]
        probability = number([p.probability for *_, p in found])
        weight = number([float(p.raters) for *_, p in found])
        margin = self.margin * number([p.margin for *_, p in found])
        if self.loss == "plackett-luce":
            rankings = [c for g in groups for c in data.by_group[g]]
            flat = [index([last[data.index[e]] for tier in c.ranking for e in tier]) for c in rankings]
            total = torch.stack(
                [plackett_luce(scores[own], _places(c)) for own, c in zip(flat, rankings, strict=True)]
            ).mean()  # fmt: skip
        else:
            each = bradley_terry(first, second, probability, margin, self.label_smoothing)
            group = index([i for i, *_ in found])
            total = k_wise(each, group, weight) if self.loss == "k-wise" else (each * weight).sum() / weight.sum()
        if self.prefixes:
            earlier = [
                (n, place[a, k], place[b, k])
                for n, (_, a, b, _) in enumerate(found)
                for k in range(min(len(rows[a].positions), len(rows[b].positions)) - 1)
            ]
            if earlier:
                at, left, right = (index(column) for column in zip(*earlier, strict=True))
                each = bradley_terry(scores[left], scores[right], probability[at], margin[at], self.label_smoothing)
                total = total + self.prefixes * (each * weight[at]).sum() / weight[at].sum()
        return total + self.centering * (centering(first, second) * weight).sum() / weight.sum()

    def _finish(self, run: Run, model: RewardModel, data: Data, held: Sequence[int]) -> dict[str, float]:
        """Shifts the scores, measures what was held out, and saves."""
        values = model.values(data.episodes, micro_tokens=self.micro_tokens)
        finals = torch.stack([v[:, -1] for v in values])  # [E, M]
        sampled = [e for e, episode in enumerate(data.episodes) if episode.turns[0].action_ids is not None]
        stages = {data.episodes[e].update: data.episodes[e].stage for e in sampled}
        latest = stages[max(stages)] if stages else ""  # the policy as it is, not what it was in earlier rounds
        played = [e for e in sampled if data.episodes[e].stage == latest]
        means = finals[played or slice(None)].mean(0)
        model.offsets = [before + float(mean) for before, mean in zip(model.offsets, means, strict=True)]
        scores = (finals - means).mean(1)
        metrics = {f"held_out/{k}": v for k, v in data.measure(scores, held).items()}
        metrics["disagreement"] = float(finals.std(1, correction=0).mean())
        model.notes = {"run": run.id, "update": run.updates + 1, "comparisons": len(data.comparisons), **metrics}
        if run.is_main:
            model.save_pretrained(run.folder / "reward-model" / f"update-{run.start:06d}")
        return metrics


def _without(comparison: Comparison, episodes: set[str]) -> Comparison | None:
    """The same ranking of the other episodes; None where fewer than two are left."""
    tiers = [tuple(e for e in tier if e not in episodes) for tier in comparison.ranking]
    left = tuple(tier for tier in tiers if tier)
    return dataclasses.replace(comparison, ranking=left) if sum(map(len, left)) > 1 else None


def _places(comparison: Comparison) -> list[list[int]]:
    """The ranking's tiers as places in the flat list of its episodes."""
    tiers, at = [], 0
    for tier in comparison.ranking:
        tiers.append(list(range(at, at + len(tier))))
        at += len(tier)
    return tiers


class Data:
    """Comparisons by start, with their episodes and pairs."""

    def __init__(self, run: Run, comparisons: Sequence[Comparison]) -> None:
        self.comparisons = comparisons
        ids = list(dict.fromkeys(e for c in self.comparisons for tier in c.ranking for e in tier))
        found = run.ledger.episodes(ids)
        self.episodes: list[Episode] = [found[id_] for id_ in ids]
        self.index = {id_: e for e, id_ in enumerate(ids)}
        by_group: dict[str, list[Comparison]] = {}
        for comparison in self.comparisons:
            by_group.setdefault(comparison.group, []).append(comparison)
        # By start, not by id: ids hold the run's name, which must not matter.
        self.by_group = sorted(by_group.values(), key=lambda each: self._start(each[0]))
        self.pairs: list[list[Pair]] = [pairs(each) for each in self.by_group]
        self.members = [sorted({self.index[e] for p in each for e in (p.first, p.second)}) for each in self.pairs]

    def _start(self, comparison: Comparison) -> tuple[str, int]:
        episode = self.episodes[self.index[comparison.ranking[0][0]]]
        return episode.start.key, episode.update

    def split(self, held_out: float, seed: int) -> tuple[list[int], list[int]]:
        """Indices of the starts to train on and to measure on, by start: what is held out stays so whatever else arrives."""
        place = [int(derive_id("held out", seed, self.episodes[m[0]].start.key), 16) / 2**64 for m in self.members]
        train = [g for g, p in enumerate(place) if p >= held_out]
        return train or list(range(len(place))), [g for g, p in enumerate(place) if p < held_out]

    def measure(self, scores: Tensor, held: Sequence[int]) -> dict[str, float]:
        """Accuracy against the raters and against the environment's return, with what single raters reach as the ceiling."""
        comparisons = [c for g in held for c in self.by_group[g]]
        found = [p for g in held for p in self.pairs[g]]
        if not found:
            return {}
        value = lambda id_: float(scores[self.index[id_]])  # noqa: E731
        truth = {e.id: e.env_return for e in self.episodes}
        difference = torch.tensor([value(p.first) - value(p.second) for p in found])
        votes = torch.tensor([p.probability for p in found])
        weight = torch.tensor([float(p.raters) for p in found])
        decided = [
            (sure > 0.5) == (value(a) > value(b))
            for c in comparisons
            for i, tier in enumerate(c.ranking)
            for a in tier
            for lower in c.ranking[i + 1 :]
            for b in lower
            for sure in [opinion(c, a, b) or 0.0]
        ]
        differ = [p for p in found if truth[p.first] != truth[p.second]]
        right = [(truth[p.first] > truth[p.second]) == (value(p.first) > value(p.second)) for p in differ]
        measured: dict[str, float | None] = {
            "pairs": float(len(found)),
            "accuracy": sum(decided) / len(decided) if decided else None,
            "rater_agreement": rater_agreement(comparisons),
            "calibration_error": calibration_error(torch.sigmoid(difference), votes, weight),
            "truth_pairs": float(len(differ)),
            "truth_accuracy": sum(right) / len(right) if right else None,
            "rater_truth_agreement": truth_agreement(comparisons, truth),
        }
        return {name: float(v) for name, v in measured.items() if v is not None}


class Ensemble:
    """The models of the ensemble, each with its own optimizer, as one state."""

    def __init__(self, stage: TrainRewardModel, run: Run) -> None:
        seed = int(derive_id("head", run.config.seed, run.stage)[:8], 16)
        name = stage.model
        if name is None:
            name = str(run.folder / ".reward-model-start")
            if run.is_main:
                shutil.rmtree(name, ignore_errors=True)
                run.policy.save_pretrained(name, merge=True)
            shared(run, None)  # written before anybody reads it
        loaded = [load_member(name, seed + m) for m in range(stage.members)]
        device = run.policy.device if stage.model is None else "cuda" if torch.cuda.is_available() else "cpu"
        if stage.model is None:
            shared(run, None)  # read by all before it goes
            if run.is_main:
                shutil.rmtree(name)
        self.model = RewardModel([m.to(device) for _, m in loaded], loaded[0][0])
        self.learners = [
            Learner(
                None, [member], lr=stage.lr, warmup=stage.warmup, decay=stage.decay, weight_decay=stage.weight_decay,
                max_grad_norm=stage.max_grad_norm, micro_tokens=stage.micro_tokens,
            )
            for member in self.model.members
        ]  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for m, (member, learner) in enumerate(zip(self.model.members, self.learners, strict=True)):
            state |= {f"{m}.learner.{k}": v for k, v in learner.state_dict().items()}
            state |= {f"{m}.weights.{k}": v.detach().clone() for k, v in member.named_parameters()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for m, (member, learner) in enumerate(zip(self.model.members, self.learners, strict=True)):
            head = f"{m}.learner."
            learner.load_state_dict({k.removeprefix(head): v for k, v in state.items() if k.startswith(head)})
            for name, parameter in member.named_parameters():
                parameter.copy_(state[f"{m}.weights.{name}"])
