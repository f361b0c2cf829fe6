"""Trains a reward model on comparisons: the options, the data, the loss, and the one loop that the
stage and retraining judges share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...judging import Pair, connected, opinion, pairs, rater_agreement, truth_agreement
from ...learning import (
    Learner,
    Micro,
    Policy,
    SupervisedOptions,
    divide,
    explained_memory,
    kept_bytes,
    recomputed,
)
from ...protocols import Comparison, Episode
from ...running import Ledger
from ...tools import derive_id
from .losses import bradley_terry, calibration_error, centering, k_wise, plackett_luce
from .model import RewardModel


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step of every member.

    Attributes:
        made, steps: how many are made now, and will be in all.
        losses: each member's.
        norm, lr: of the gradient, and the rate it was made with.
    """

    made: int
    steps: int
    losses: list[float]
    norm: float
    lr: float


class Training(SupervisedOptions):
    """The options by which a reward model learns from comparisons.

    Attributes:
        loss: "pairs" (mean over all pairs), "k-wise" (mean per start, then over starts), or
            "plackett-luce" (whole rankings).
        margin: weight of the raters' grades as a margin; 0: none.
        label_smoothing: share of every label that is replaced by 1/2.
        centering: weight of (r_i + r_j)^2.
        prefixes: weight of the same loss after every earlier reply, turn by turn, for a value per
            turn.
        bootstrap: share of the starts that each member of an ensemble sees.
        epochs, batch_size: passes, and starts per optimizer step.
    """

    loss: Literal["pairs", "k-wise", "plackett-luce"] = "k-wise"
    margin: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    centering: float = Field(default=0.01, ge=0)
    prefixes: float = Field(default=0.0, ge=0)
    bootstrap: float = Field(default=1.0, gt=0, le=1)
    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=16, ge=1)
    micro_tokens: int = Field(default=16384, ge=1)

    def steps(self, train: Sequence[int]) -> int:
        """Returns how many optimizer steps each member makes on these groups."""
        return self.epochs * math.ceil(max(1, round(len(train) * self.bootstrap)) / self.batch_size)

    def fit(
        self,
        ensemble: Ensemble,
        data: Data,
        train: Sequence[int],
        seeds: Sequence[str],
        done: int = 0,
    ) -> Iterator[Step]:
        """Trains the members side by side, a step of each at a time.

        Args:
            ensemble: the members and their learners; changed in place.
            data: the comparisons and their conversations.
            train: the groups of the data to train on.
            seeds: each member's, for its share of the groups and their order.
            done: steps that were made already.
        """
        steps, model = self.steps(train), ensemble.model
        kept = 0.0 if self.activation_memory is None else kept_bytes(model.members[0])[0]
        rows = model.rows(data.episodes)
        for step in range(done, steps):
            losses, norm = [], 0.0
            for learner, member, seed in zip(ensemble.learners, model.members, seeds, strict=True):
                groups = self._groups(train, step, seed)
                with explained_memory(
                    "training the reward model",
                    "`activation_memory`, `micro_tokens` or `batch_size`",
                ):
                    loss = self._loss(ensemble, member, rows, data, groups, kept)
                    if loss.requires_grad:
                        loss.backward()
                    ensemble.add_up(member)
                norm = learner.step(step / steps, [f"start {g}" for g in groups])
                losses.append(float(loss.detach()))
            yield Step(step + 1, steps, losses, norm, ensemble.learners[0].rate)

    def _groups(self, train: Sequence[int], step: int, seed: str) -> list[int]:
        """Returns the starts of one step: each member's own share of them, in an order of its own,
        epoch by epoch."""
        generator = torch.Generator().manual_seed(int(seed, 16) % 2**63)
        share = torch.randperm(len(train), generator=generator)[
            : max(1, round(len(train) * self.bootstrap))
        ]
        per_epoch = math.ceil(len(share) / self.batch_size)
        epoch, place = divmod(step, per_epoch)
        order = torch.Generator().manual_seed(int(derive_id(seed, epoch), 16) % 2**63)
        shuffled = share[torch.randperm(len(share), generator=order)]
        return [
            train[i]
            for i in shuffled[place * self.batch_size : (place + 1) * self.batch_size].tolist()
        ]

    def _loss(
        self,
        ensemble: Ensemble,
        member: Any,
        rows: Sequence[Any],
        data: Data,
        groups: Sequence[int],
        kept: float = 0.0,
    ) -> Tensor:
        """Computes the loss over some starts, every conversation read once; `kept` is how many
        bytes that keeps for a token, until the loss is known."""
        wanted = sorted({e for g in groups for e in data.members[g]})
        chosen = [rows[e] for e in wanted]
        micros = divide(chosen, self.micro_tokens, ensemble.model.device)
        kept *= sum(micro.ids.numel() for micro in micros)
        too_much = kept > (self.activation_memory or 0.0) * 2**30
        with recomputed(member) if too_much else nullcontext():
            scores = ensemble.scores(member, micros)
        place = {
            (e, k): i
            for i, (e, k) in enumerate((e, k) for micro in micros for e,
                k in zip(micro.episode.tolist(), micro.action.tolist(), strict=True))
        }  # fmt: skip
        last = {e: place[e, len(rows[e].positions) - 1] for e in wanted}
        found = [
            (i, data.index[p.first], data.index[p.second], p)
            for i, g in enumerate(groups)
            for p in data.pairs[g]
        ]
        index = lambda values: torch.tensor(values, dtype=torch.long, device=scores.device)  # noqa: E731
        number = lambda values: torch.tensor(values, dtype=scores.dtype, device=scores.device)  # noqa: E731
        first = scores[index([last[a] for _, a, _, _ in found])]
        second = scores[index([last[b] for _, _, b, _ in found])]
        probability = number([p.probability for *_, p in found])
        weight = number([p.weight for *_, p in found])
        margin = self.margin * number([p.margin for *_, p in found])
        if self.loss == "plackett-luce":
            rankings = [c for g in groups for c in data.by_group[g]]
            flat = [
                index([last[data.index[e]] for tier in c.ranking for e in tier]) for c in rankings
            ]
            each = torch.stack(
                [
                    plackett_luce(scores[own], _places(c))
                    for own, c in zip(flat, rankings, strict=True)
                ]
            )
            counts = number([data.weights.get(c.stamp.source, 1.0) for c in rankings])
            total = (each * counts).sum() / counts.sum()
        else:
            each = bradley_terry(first, second, probability, margin, self.label_smoothing)
            group = index([i for i, *_ in found])
            total = (
                k_wise(each, group, weight)
                if self.loss == "k-wise"
                else (each * weight).sum() / weight.sum()
            )
        if self.prefixes:
            earlier = [
                (n, place[a, k], place[b, k])
                for n, (_, a, b, _) in enumerate(found)
                for k in range(min(len(rows[a].positions), len(rows[b].positions)) - 1)
            ]
            if earlier:
                at, left, right = (index(column) for column in zip(*earlier, strict=True))
                each = bradley_terry(
                    scores[left], scores[right], probability[at], margin[at], self.label_smoothing
                )
                total = total + self.prefixes * (each * weight[at]).sum() / weight[at].sum()
        return total + self.centering * (centering(first, second) * weight).sum() / weight.sum()


class Ensemble:
    """The members of a reward model, each with its own optimizer, as one state.

    Args:
        model: of these members.
        options: of their learners.
        policy: of the run, where several processes train together; None: this one trains alone.
    """

    def __init__(self, model: RewardModel, options: Training, policy: Policy | None = None) -> None:
        self.model, self.policy = model, policy
        self.learners = [Learner(None, options, [member]) for member in model.members]

    def scores(self, member: Any, micros: Sequence[Micro]) -> Tensor:
        """Returns a member's scores of all action tokens of some micro-batches. With several
        processes each reads its share, and has the others' scores without a gradient: the loss is
        the same in all of them, and their gradients add up to its gradient."""
        if self.policy is None:
            return torch.cat([self.model.read(member, micro) for micro in micros])
        accelerator = self.policy.accelerator
        mine = range(accelerator.process_index, len(micros), accelerator.num_processes)
        own = {i: self.model.read(member, micros[i]) for i in mine}
        sizes = [len(micro.episode) for micro in micros]
        known = torch.zeros(sum(sizes), device=self.model.device)
        for i, part in enumerate(known.split(sizes)):
            if i in own:
                part.copy_(own[i].detach())
        known = self.policy.sum_over_processes(known)
        return torch.cat([own.get(i, part) for i, part in enumerate(known.split(sizes))])

    def add_up(self, member: nn.Module) -> None:
        """Adds up the gradients of all processes."""
        if self.policy is None:
            return
        for parameter in member.parameters():
            if parameter.requires_grad:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.policy.sum_over_processes(own)

    def state_dict(self) -> dict[str, Any]:
        """Returns every member's weights and its learner's state."""
        state: dict[str, Any] = {}
        for m, (member, learner) in enumerate(zip(self.model.members, self.learners, strict=True)):
            state |= {f"{m}.learner.{k}": v for k, v in learner.state_dict().items()}
            state |= {f"{m}.weights.{k}": v.detach().clone() for k, v in member.named_parameters()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up every member's weights and its learner's state."""
        for m, (member, learner) in enumerate(zip(self.model.members, self.learners, strict=True)):
            head = f"{m}.learner."
            learner.load_state_dict(
                {k.removeprefix(head): v for k, v in state.items() if k.startswith(head)}
            )
            for name, parameter in member.named_parameters():
                parameter.copy_(state[f"{m}.weights.{name}"])


class Data:
    """Comparisons by start, with their episodes and pairs.

    Args:
        weights: of their sources, see `engine.preferences.pairs`; what weighs 0 must not be among
            the comparisons.
    """

    def __init__(
        self, ledger: Ledger, comparisons: Sequence[Comparison], weights: Mapping[str, float] = {}
    ) -> None:
        self.comparisons, self.weights = comparisons, weights
        ids = list(dict.fromkeys(e for c in self.comparisons for tier in c.ranking for e in tier))
        found = ledger.episodes(ids)
        self.episodes: list[Episode] = [found[id_] for id_ in ids]
        self.index = {id_: e for e, id_ in enumerate(ids)}
        # By start, not by id: ids hold the run's name, which must not matter.
        self.by_group = sorted(
            connected(self.comparisons), key=lambda each: min(map(self._place, each))
        )
        self.pairs: list[list[Pair]] = [pairs(each, weights) for each in self.by_group]
        self.members = [
            sorted({self.index[e] for p in each for e in (p.first, p.second)})
            for each in self.pairs
        ]

    def _place(self, comparison: Comparison) -> tuple[str, int, int]:
        return min(
            (e.start.key, e.update, e.slot)
            for tier in comparison.ranking
            for id_ in tier
            for e in [self.episodes[self.index[id_]]]
        )

    @classmethod
    def readable(
        cls,
        ledger: Ledger,
        comparisons: Sequence[Comparison],
        model: RewardModel,
        weights: Mapping[str, float] = {},
    ) -> tuple[Data, int]:
        """Returns the data without conversations that are too long for a model, and how many those
        were."""
        data = cls(ledger, comparisons, weights)
        long = {e.id for e in data.episodes if not model.fits(e)}
        short = [c for c in (_without(c, long) for c in comparisons) if c is not None]
        return (cls(ledger, short, weights) if long else data), len(long)

    @property
    def starts(self) -> list[str]:
        """Returns the key of each group's start."""
        return [self.episodes[m[0]].start.key for m in self.members]

    def latest(self) -> list[int]:
        """Returns the conversations of the latest round, by the policy as it is, not as it was in
        earlier ones; all, where no policy played."""
        sampled = [
            e for e, episode in enumerate(self.episodes) if episode.turns[0].action_ids is not None
        ]
        stages = {self.episodes[e].update: self.episodes[e].stage for e in sampled}
        latest = stages[max(stages)] if stages else ""
        return [e for e in sampled if self.episodes[e].stage == latest] or list(
            range(len(self.episodes))
        )

    def split(self, held_out: float, seed: int) -> tuple[list[int], list[int]]:
        """Returns indices of the groups to train on and to measure on, by start: what is held out
        stays so whatever else arrives."""
        places = [place(seed, start) for start in self.starts]
        train = [g for g, p in enumerate(places) if p >= held_out]
        return train or list(range(len(places))), [g for g, p in enumerate(places) if p < held_out]

    def measure(self, scores: Tensor, held: Sequence[int]) -> dict[str, float]:
        """Measures accuracy against the raters and against the environment's return, with the
        accuracy of single raters as the ceiling."""
        comparisons = [c for g in held for c in self.by_group[g]]
        found = [p for g in held for p in self.pairs[g]]
        if not found:
            return {}
        value = lambda id_: float(scores[self.index[id_]])  # noqa: E731
        truth = {e.id: e.env_return for e in self.episodes}
        difference = torch.tensor([value(p.first) - value(p.second) for p in found])
        votes = torch.tensor([p.probability for p in found])
        weight = torch.tensor([p.weight for p in found])
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
        right = [
            (truth[p.first] > truth[p.second]) == (value(p.first) > value(p.second)) for p in differ
        ]
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


def finals(model: RewardModel, episodes: Sequence[Episode], micro_tokens: int) -> Tensor:
    """Returns each member's score of whole conversations, [E, M]."""
    return torch.stack([v[:, -1] for v in model.values(episodes, micro_tokens=micro_tokens)])


def place(seed: int, start: str) -> float:
    """Returns a start's place in [0, 1) in the order by which starts are held out: the same
    whatever other starts there are."""
    return int(derive_id("held out", seed, start), 16) / 2**64


def _without(comparison: Comparison, episodes: set[str]) -> Comparison | None:
    """Returns the same ranking of the other episodes; None where fewer than two are left."""
    tiers = [tuple(e for e in tier if e not in episodes) for tier in comparison.ranking]
    left = tuple(tier for tier in tiers if tier)
    return dataclasses.replace(comparison, ranking=left) if sum(map(len, left)) > 1 else None


def _places(comparison: Comparison) -> list[list[int]]:
    """Returns the ranking's tiers as places in the flat list of its episodes."""
    tiers, at = [], 0
    for tier in comparison.ranking:
        tiers.append(list(range(at, at + len(tier))))
        at += len(tier)
    return tiers
