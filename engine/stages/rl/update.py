"""One update: from collected experience to a changed policy."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, cast

from ...errors import NonFiniteError
from ...records.rewards import Rewards
from ...util.ids import derive_id
from ...util.memory import explained_memory
from .branches import audit, branch_values
from .collect import Collector
from .experience import Experience
from .metrics import (
    SILENT,
    credit_metrics,
    drift,
    feedback_metrics,
    forks,
    groups_with_signal,
    mixture_metrics,
    play_metrics,
)
from .records import record_training, trainable

if TYPE_CHECKING:
    from torch import Tensor

    from ...records.batch import Batch
    from ...records.episode import Episode


class Trainer:
    """Trains the policy on what a collector collects."""

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self.run, self.settings, self.parts = collector.run, collector.settings, collector.parts

    def update(self, experience: Experience, i: int) -> dict[str, float]:
        """Makes an update. Returns its metrics.

        Args:
            experience: what was collected for it.
            i: its index in the stage, from 0; in records it has its number in the run, from 1.

        Raises:
            Interrupted: the run was asked to end while branches were judged; nothing was trained.
            NonFiniteError: an outcome, an advantage or a value target is not a finite number.
        """
        run, number = self.run, self.run.updates + 1
        self.collector.check_turns(experience.episodes)
        used, left_out = self._choose(experience)
        metrics = play_metrics(experience.episodes, experience.rewards) | experience.metrics
        if self.settings.episodes == "ledger":
            metrics.pop("success", None)  # their users say how well they went
        metrics |= mixture_metrics(experience, [env.id for env in self.settings.env])
        metrics |= {
            f"left_out/{why}": float(n) for why, n in Counter(left_out.values()).items()
        } | {"trained": 0.0}
        if used:
            run.status("update", **experience.progress)
            with explained_memory(
                "the update", "`activation_memory` or `micro_tokens` of the optimizer, or `groups`"
            ):
                batch, scale = self._batch(used, experience, i, number)
                if self.settings.pending or self.settings.overlap:
                    ages = batch.staleness.double()
                    metrics |= {
                        "staleness/mean": float(ages.mean()),
                        "staleness/max": float(ages.max()),
                    }
                metrics |= self._credit(batch, scale, experience, i, number)
                signals = zip(used, batch.signal.tolist(), strict=True)
                left_out |= {e.id: SILENT for e, has_signal in signals if not has_signal}
                # Before the step: what trained is known even if the process dies in it.
                if run.is_main:
                    record_training(run, number, experience, left_out, batch, scale)
                made = self.parts.optimizer.update(run.policy, batch)
                metrics |= {**made, "trained": float(batch.signal.sum())}
                run.policy.version += int(made.get("steps", 1) > 0)
        elif run.is_main:
            record_training(run, number, experience, left_out)
        failed = experience.answers["failed"] / max(experience.answers.total(), 1)
        return {
            **metrics,
            **feedback_metrics(self.parts.combiners),
            "drift": drift(run.policy, experience.episodes),
            **forks(experience.episodes),
            "judge_failure_rate": failed,
            "spend": experience.spend,
        }

    def _choose(self, experience: Experience) -> tuple[list[Episode], dict[str, str]]:
        """Returns the episodes that train, and by id why others are left out."""
        within_groups = "group" in self.parts.credit.needs
        min_group = self.settings.min_group if within_groups else 0
        used, left_out = trainable(experience.episodes, experience.rewards, min_group)
        if self.settings.resample:  # what was replaced does not train
            kept = set(groups_with_signal(experience.episodes, experience.rewards))
            left_out |= {e.id: SILENT for e in used if e.group not in kept}
            used = [e for e in used if e.group in kept]
        return used, left_out

    def _batch(
        self, used: list[Episode], experience: Experience, i: int, number: int
    ) -> tuple[Batch, float]:
        """Returns the batch, its rewards whitened where wanted, and what they were divided by."""
        from ...policy.batching import make_batch

        settings = self.settings
        batch = make_batch(
            used,
            # episodes without a reward have been left out
            [cast(Rewards, experience.rewards[e.id]) for e in used],
            version=self.run.policy.version,
            temperature=settings.temperature,
            progress=i / settings.updates,
            seed=int(derive_id(self.run.seed, number)[:12], 16),
        )
        scale = spread(batch.outcome) if settings.reward_whiten else 1.0
        batch.outcome, batch.turn_rewards = batch.outcome / scale, batch.turn_rewards / scale
        return batch, scale

    def _credit(
        self, batch: Batch, scale: float, experience: Experience, i: int, number: int
    ) -> dict[str, float]:
        """Assigns credit to the batch. Returns metrics of it.

        In this order: the optimizer prepares the batch (values, KL penalty), branches are played
        where the credit method needs them, credit is assigned, audited where it is due, says which
        groups have a signal, and the credit method learns from the batch.
        """
        run, settings, parts, metrics = self.run, self.settings, self.parts, dict[str, float]()
        parts.optimizer.prepare(run.policy, batch)
        if "branches" in parts.credit.needs:
            values, metrics = branch_values(
                self.collector,
                experience,
                batch.episodes,
                parts.credit.branches,
                "branches",
                number,
            )
            batch.branch_values = values / scale
        batch.credit = parts.credit.assign(batch)
        check_finite(batch)
        if "advantages" in parts.optimizer.consumes:
            metrics |= credit_metrics(batch)
        if settings.audit and (i % settings.audit.every == 0 or i + 1 == settings.updates):
            metrics |= audit(self.collector, experience, batch, number, scale)
        # Of other methods a token without advantage was as good as expected, which is a signal too.
        if parts.credit.needs & {"group", "branches"}:
            batch.signal = has_advantages(batch)
        groups, without = int(batch.group.max()) + 1, len(set(batch.group[~batch.signal].tolist()))
        metrics |= {
            "groups_without_signal": float(without),
            "groups_without_signal_share": without / groups,
        }
        parts.credit.fit(batch)
        return metrics


def check_finite(batch: Batch) -> None:
    """Raises `NonFiniteError` when an outcome, an advantage or a value target is not a finite
    number."""
    assert batch.credit is not None
    for name, tensor in (
        ("outcome", batch.outcome),
        ("advantage", batch.credit.advantages),
        ("value target", batch.credit.value_targets),
    ):
        if tensor is not None and not bool(tensor.isfinite().all()):
            bad = [
                batch.episodes[e].id
                for e in range(len(tensor))
                if not bool(tensor[e].isfinite().all())
            ]
            raise NonFiniteError(
                f"the {name} of {len(bad)} episodes is not a finite number: {', '.join(bad[:5])}."
                " Look at the answers of their feedback sources and at the weights of the combiner;"
                " nothing was trained on them."
            )


def spread(outcome: Tensor) -> float:
    """Returns the standard deviation of outcomes [E]; 1 where they differ by rounding only."""
    from ...tensors import rounding

    deviation = float(outcome.double().std(correction=0))
    return deviation if deviation > float(rounding(outcome.abs().max())) else 1.0


def has_advantages(batch: Batch) -> Tensor:
    """Returns [E] whether any action token of the episode's group has an advantage."""
    import torch

    assert batch.credit is not None
    return torch.isin(batch.group, batch.group[(batch.credit.advantages != 0).any(1)])
