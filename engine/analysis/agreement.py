"""Agreement among raters, raw and beyond chance. Pure functions in numpy.

Ratings are a list of units (whatever was rated), each a mapping rater -> value; raters may be
missing anywhere. Notation: n_uc raters gave unit u the value c, n_u rated it at all, n_c counts the
value over all units that at least two rated, n is their sum.

    percent agreement  p_o   = mean over units of  sum_c n_uc (n_uc - 1) / (n_u (n_u - 1))
    Krippendorff       alpha = 1 - (n - 1) D_o / D_e   (Krippendorff 2004, Content Analysis, ch. 11)
                       D_o   = sum_u sum_{c,k} n_uc n_uk d(c, k)^2 / (n_u - 1)   D_e = sum_{c,k} n_c
                             n_k d(c, k)^2
    Gwet               AC1   = (p_o - p_e) / (1 - p_e)   p_e = sum_c pi_c (1 - pi_c) / (Q - 1)
                       (Gwet 2008, doi:10.1348/000711006X126600)

with d^2 = [c != k] (nominal), (c - k)^2 (interval), and (r_c - r_k)^2 (ordinal), r_c being the mean
rank of c among all n values: Krippendorff's sum over the values between is the same thing. pi_c is
the mean over all rated units of n_uc / n_u, Q the number of values seen.

Report all three. Where one value is very common, alpha (like every kappa) may be near 0 although
raters hardly ever differ, because by chance they would hardly ever differ either; AC1 does not do
that. None stands where a number would be undefined: no unit that two rated, or only one value seen.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..records.feedback import Comparison
from .preferences import opinions

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


Level = Literal["nominal", "ordinal", "interval"]
Units = Sequence[Mapping[str, Any]]
EQUAL = 1e-6  # numbers that differ by no more are the same up to rounding


def percent_agreement(units: Units) -> float | None:
    """Returns the chance that two raters of one unit agree, every unit counting once; None where no
    unit has two raters."""
    count = _counts(units)[0]
    size = _of_units(count)
    several = size > 1
    if not several.any():
        return None
    agreed = (_of_units(count.power(2)) - size)[several]
    return float((agreed / (size * (size - 1))[several]).mean())


def krippendorff_alpha(units: Units, level: Level = "nominal") -> float | None:
    """Returns Krippendorff's alpha.

    1: raters agree wholly; 0: as often as by chance; below: less often than that. From 0.8 on data
    count as reliable, from 0.667 as good enough for tentative conclusions (Krippendorff 2004, ch.
    11).

    Args:
        units: values may be anything hashable for "nominal"; "ordinal" and "interval" need numbers.
        level: what differences mean.

    Raises:
        ValueError: an unknown level, or values that are no numbers where numbers are needed.
    """
    count, place = _paired(units, level)
    return _optional(_alphas(count, place, level, np.ones((1, count.shape[0])))[0])


def alpha_interval(
    units: Units,
    level: Level = "nominal",
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Returns the percentile interval of alpha by the bootstrap over units (the same seed gives the
    same interval).

    Units are what a study draws, so whole units are resampled, with all their ratings. Draws in
    which only one value occurs have no alpha and are left out. With fewer than about 20 units it is
    too narrow, as any bootstrap. Krippendorff's own bootstrap draws pairs as if they were
    independent and is narrower still where many raters rate a unit.

    Args:
        units: ratings, as for `krippendorff_alpha`.
        level: of measurement, as for `krippendorff_alpha`.
        clusters: what each unit belongs to, where units hang together (pairs of one ranking,
            aspects of one conversation): these are then resampled whole.
        confidence: share of the draws inside.
        samples: how many draws.
        seed: of the draws.
    """
    if not 0 < confidence < 1 or samples < 1:
        raise ValueError(
            f"need confidence between 0 and 1 and at least one sample, got {confidence} and"
            f" {samples}"
        )
    count, place = _paired(units, level)
    if not count.shape[0]:
        return None
    whole = list(range(len(units))) if clusters is None else clusters
    kept = [c for c, unit in zip(whole, units, strict=True) if len(unit) > 1]
    number = {c: i for i, c in enumerate(dict.fromkeys(kept))}
    drawn = np.random.default_rng(seed).multinomial(
        len(number), np.full(len(number), 1 / len(number)), samples
    )
    alphas = _alphas(count, place, level, drawn[:, [number[c] for c in kept]].astype(float))
    alphas = alphas[np.isfinite(alphas)]
    if not len(alphas):
        return None
    low, high = np.quantile(alphas, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def gwet_ac1(units: Units) -> float | None:
    """Returns Gwet's AC1, agreement beyond chance, where chance is raters who guess on hard units
    only: steady when one value is very common.

    Several raters, several values, missing ratings: units that one rater rated count in how common
    the values are.
    """
    agreed = percent_agreement(units)
    count = _counts(units)[0]
    if agreed is None or count.shape[1] < 2:
        return None
    share = (1 / _of_units(count)) @ count / count.shape[0]
    chance = float((share * (1 - share)).sum()) / (count.shape[1] - 1)
    return (agreed - chance) / (1 - chance)


def comparison_units(comparisons: Iterable[Comparison]) -> list[dict[str, str]]:
    """Returns rankings as units for the statistics above: one per compared pair of episodes (and
    aspect), "first", "tie" or "second" by rater.

    The first of a pair is the one whose id comes first, which has nothing to do with its worth or
    its place on the screen. Pairs of one ranking are not independent, so an interval over them is
    too narrow where groups have more than two members. Where a rater answered twice, the later
    answer counts. A rater is `stamp.rater`, or `stamp.source` where that is empty.
    """
    units: dict[tuple[str, str, str, str], dict[str, str]] = {}
    for comparison in comparisons:
        for first, second, sure in opinions(comparison):
            side = "tie" if sure == 0.5 else "first" if sure > 0.5 else "second"
            unit = units.setdefault((comparison.group, comparison.aspect, first, second), {})
            unit[comparison.stamp.rater or comparison.stamp.source] = side
    return list(units.values())


def rounded(values: Iterable[float]) -> dict[float, float]:
    """Maps numbers that are equal up to rounding (1e-6) to the least of them: means of aspects, or
    a float32 and a float64, differ in their last bits."""
    same: dict[float, float] = {}
    least = -math.inf
    for value in sorted(set(values)):
        least = least if value - least <= EQUAL else value
        same[value] = least
    return same


def _counts(units: Units) -> tuple[csr_matrix, list[Hashable]]:
    """Returns [units, values], how many raters gave each value, for units with at least one rating;
    and the values, in order. Numbers that are equal up to rounding are one value.

    Raises:
        ValueError: a value that is not finite.
    """
    # Here, since the command line loads this file before it knows what is asked.
    from scipy.sparse import csr_matrix

    seen = {value for unit in units for value in unit.values()}
    reals = {value for value in seen if isinstance(value, (float, np.floating))}
    if odd := [value for value in reals if not math.isfinite(value)]:
        raise ValueError(f"{odd[0]} is no rating: leave out raters who gave none")
    same = (
        rounded(float(value) for value in seen if isinstance(value, (int, float, np.number)))
        if reals
        else {}
    )
    values: list[Any]
    try:
        values = sorted({same.get(value, value) for value in seen})
    except TypeError:  # labels of several kinds; their order does not matter then
        values = sorted({same.get(value, value) for value in seen}, key=repr)
    place = {value: k for k, value in enumerate(values)}
    rated = [unit for unit in units if unit]
    row = [u for u, unit in enumerate(rated) for _ in unit]
    column = [place[same.get(value, value)] for unit in rated for value in unit.values()]
    return csr_matrix((np.ones(len(row)), (row, column)), (len(rated), len(values))), values


def _of_units(count: csr_matrix) -> NDArray[np.float64]:
    """Returns the sum over the values, [units]."""
    return np.asarray(count.sum(1), dtype=np.float64).ravel()


def _paired(units: Units, level: Level) -> tuple[csr_matrix, NDArray[np.float64]]:
    """Returns the counts of units with at least two ratings, and where each value stands on the
    scale."""
    if level not in ("nominal", "ordinal", "interval"):
        raise ValueError(f"level must be 'nominal', 'ordinal' or 'interval', got {level!r}")
    count, values = _counts([unit for unit in units if len(unit) > 1])
    if level == "nominal":
        return count, np.zeros(len(values))
    if not all(isinstance(value, (int, float, np.number)) for value in values):
        raise ValueError(
            f"level {level!r} needs numbers, got {values[:3]}: give the categories numbers, or use"
            " 'nominal'"
        )
    return count, np.array(values, dtype=float)


def _alphas(
    count: csr_matrix, place: NDArray[np.float64], level: Level, times: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Returns alpha, [B], when unit u counts times[b, u] times; nan where it is undefined."""
    size = _of_units(count)
    apart = (size**2 - _of_units(count.power(2))) / (size - 1)
    found = np.full(len(times), np.nan)
    for b in range(len(times)):
        common = times[b] @ count  # [values]
        total = common.sum()
        if level == "nominal":
            observed = apart
            expected = total**2 - (common**2).sum()
        else:
            # Centred: squares of large numbers would cancel badly.
            stands = place - common @ place / max(total, 1)
            if level == "ordinal":
                stands = np.cumsum(common) - common / 2 - total / 2
            observed = 2 * (size * (count @ stands**2) - (count @ stands) ** 2) / (size - 1)
            expected = 2 * (total * (common @ stands**2) - (common @ stands) ** 2)
        if expected > 0 and (common > 0).sum() > 1:
            found[b] = 1 - (total - 1) * (times[b] @ observed) / expected
    return found


def _optional(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
