"""From collected episodes to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...records.episode import Episode


def make_rl_batch(
    used: Sequence[Episode], rewards: Mapping[str, Any], version: int, temperature: float, progress: float, seed: str
) -> Any:
    from ...policy.batching import make_batch

    return make_batch(
        used,
        [rewards[e.id] for e in used],
        version=version,
        temperature=temperature,
        progress=progress,
        seed=int(seed[:12], 16),
    )


def check_finite(batch: Any) -> None:
    """Raises NonFiniteError when an outcome, an advantage or a value target is not a finite number."""
    from ...errors import NonFiniteError

    for name, tensor in (
        ("outcome", batch.outcome),
        ("advantage", batch.credit.advantages),
        ("value target", batch.credit.value_targets),
    ):
        if tensor is not None and not bool(tensor.isfinite().all()):
            bad = [batch.episodes[e].id for e in range(len(tensor)) if not bool(tensor[e].isfinite().all())]
            raise NonFiniteError(
                f"the {name} of {len(bad)} episodes is not a finite number: {', '.join(bad[:5])}. Look at what their feedback sources "
                "said and at the weights of the combiner; nothing was trained on them."
            )


def spread(outcome: Any) -> float:
    """The standard deviation of the outcomes; 1 where they differ by rounding only."""
    from ...tensors import rounding

    spread = float(outcome.double().std(correction=0))
    return spread if spread > float(rounding(outcome.abs().max())) else 1.0


def outcome_signal(batch: Any) -> Any:
    """[E] whether any action token of the episode's group has an advantage."""
    import torch

    return torch.isin(batch.group, batch.group[(batch.credit.advantages != 0).any(1)])
