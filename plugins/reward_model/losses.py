"""The losses of a reward model. Pure functions of scores; P pairs, R rankings.

Sources: Bradley and Terry 1952; with a margin, Touvron et al. 2023 (Llama 2, arXiv:2307.09288, eq.
2); centering, Eisenstein et al. 2023 (arXiv:2312.09244, eq. 2); K-wise, Ouyang et al. 2022
(InstructGPT, arXiv:2203.02155, eq. 1); soft labels, Lee et al. 2023 (RLAIF, arXiv:2309.00267);
Plackett 1975, Luce 1959, ties after Breslow 1974.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(
    first: Tensor,
    second: Tensor,
    probability: Tensor,
    margin: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns the negative log-likelihood of each pair, [P].

        -[p log sigma(d - m) + (1 - p) log sigma(-d - m)],  d = r_first - r_second,  p = (1 - s) p'
        + s / 2

    With p' = 1 and s = 0 this is the Bradley-Terry loss with a margin; p' between is a soft label.

    Args:
        first, second: [P] scores.
        probability: [P] how sure it is that the first is better.
        margin: [P] or a number, not negative: how much better the better one should be.
        label_smoothing: s in [0, 1).
    """
    p = (1 - label_smoothing) * probability + label_smoothing / 2
    d = first - second
    return -(p * logsigmoid(d - margin) + (1 - p) * logsigmoid(-d - margin))


def k_wise(pair_losses: Tensor, group: Tensor, weight: Tensor) -> Tensor:
    """Averages losses as InstructGPT does: over the pairs of each group, then over groups, so that
    a start with many conversations counts once.

    Args:
        pair_losses: [P].
        group: [P] long, 0 to G - 1.
        weight: [P] how many raters gave the comparison, by the weights of their sources.

    Returns:
        a number.
    """
    groups = int(group.max()) + 1
    total = pair_losses.new_zeros(groups).index_add(0, group, pair_losses * weight)
    count = pair_losses.new_zeros(groups).index_add(0, group, weight)
    return (total[count > 0] / count[count > 0]).mean()


def plackett_luce(scores: Tensor, tiers: Sequence[Sequence[int]]) -> Tensor:
    """Returns the negative log-likelihood of one ranking under Plackett-Luce.

        -sum_k sum_{i in tier k} [ r_i - log sum_{j in tiers k, k+1, ...} exp r_j ]

    For a strict ranking the last term is 0 and the rest is the chain of choices; members of a tie
    are each chosen from all that were left when the tie began (Breslow).

    Args:
        scores: [n].
        tiers: places in `scores`, best first.

    Returns:
        a number.
    """
    total = scores.new_zeros(())
    left = [i for tier in tiers for i in tier]
    for tier in tiers:
        among = torch.logsumexp(scores[left], 0)
        total = total + sum((among - scores[i] for i in tier), start=scores.new_zeros(()))
        left = left[len(tier) :]
    return total


def centering(first: Tensor, second: Tensor) -> Tensor:
    """Returns (r_first + r_second)^2 of each pair, [P]: keeps the scores' free constant near zero
    while they are learned."""
    return (first + second) ** 2


def combine(members: Tensor, how: str, penalty: float = 1.0) -> Tensor:
    """Combines an ensemble's scores into one (Coste et al. 2023, arXiv:2310.02743): "mean"; "min",
    the worst case; "uwo", mean minus `penalty` times the members' variance.

    Args:
        members: [M, ...].
        how: "mean", "min" or "uwo".
        penalty: what "uwo" takes off per unit of variance.

    Returns:
        [...].

    Raises:
        ValueError: an unknown way.
    """
    if how == "mean":
        return members.mean(0)
    if how == "min":
        return members.amin(0)
    if how == "uwo":
        return members.mean(0) - penalty * members.var(0, correction=0)
    raise ValueError(
        f"unknown way to combine an ensemble {how!r}; there are 'mean', 'min' and 'uwo'"
    )


def calibration_error(predicted: Tensor, observed: Tensor, weight: Tensor, bins: int = 10) -> float:
    """Returns the expected calibration error: over bins of predicted probability, the mean distance
    of the mean prediction from the mean observation, weighted by how much lies in each bin (Guo et
    al. 2017, arXiv:1706.04599, eq. 3).

    Args:
        predicted, observed, weight: [P].
        bins: how many, of equal width.
    """
    place = (predicted * bins).long().clamp(0, bins - 1)
    count, ours, theirs = (
        torch.zeros(bins, dtype=torch.float64).index_add(0, place, values.double())
        for values in (weight, predicted * weight, observed * weight)
    )
    return float((ours - theirs).abs().sum() / count.sum())
