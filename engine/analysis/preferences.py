"""Comparisons as preferences: agreement of raters with one another and with a known truth. Files of
them: `engine/exchange`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from ..errors import PreferenceError
from ..records.feedback import Comparison


@dataclass(frozen=True, slots=True)
class Pair:
    """Two episodes of a group, and how all raters together compared them.

    Attributes:
        first, second: their ids.
        probability: mean over the raters of how sure they are that the first is better, by the
            weights of their sources; a tie is 0.5.
        margin: mean of the raters' grades by the same weights, where they gave any; 0 otherwise.
        weight: the sum of these weights; where none are stated, how many raters there were.
    """

    first: str
    second: str
    probability: float
    margin: float
    weight: float


def opinion(comparison: Comparison, first: str, second: str) -> float | None:
    """Returns how sure a rater is that the first episode is better: 1, 0, 0.5 for a tie, or their
    own probability. None: not compared."""
    place = {
        episode: tier for tier, episodes in enumerate(comparison.ranking) for episode in episodes
    }
    if first not in place or second not in place:
        return None
    if place[first] == place[second]:
        return 0.5
    sure = 1.0 if comparison.probability is None else comparison.probability
    return sure if place[first] < place[second] else 1 - sure


def opinions(comparison: Comparison) -> Iterator[tuple[str, str, float]]:
    """Returns every pair of episodes in a comparison, in the order of their ids, and the rater's
    `opinion` on the first."""
    sure = 1.0 if comparison.probability is None else comparison.probability
    place = {
        episode: tier for tier, episodes in enumerate(comparison.ranking) for episode in episodes
    }
    for a, b in combinations(sorted(place), 2):
        yield a, b, 0.5 if place[a] == place[b] else sure if place[a] < place[b] else 1 - sure


def connected(comparisons: Iterable[Comparison]) -> list[list[Comparison]]:
    """Divides the comparisons of every group into parts that share no episode, directly or through
    others.

    What is never compared, not even through others, tells nothing of one another: 20,000 pairs of
    one start are 20,000 parts.

    Returns:
        The parts in the order of their first comparisons, each in the order of the comparisons.
    """
    above: dict[tuple[str, str], tuple[str, str]] = {}

    def top(node: tuple[str, str]) -> tuple[str, str]:
        above.setdefault(node, node)
        while above[node] != node:
            above[node] = above[above[node]]
            node = above[node]
        return node

    found = list(comparisons)
    nodes = [[(c.group, episode) for tier in c.ranking for episode in tier] for c in found]
    for own in nodes:
        for node in own[1:]:
            above[top(node)] = top(own[0])
    parts: dict[tuple[str, str], list[Comparison]] = {}
    for comparison, own in zip(found, nodes, strict=True):
        parts.setdefault(top(own[0]), []).append(comparison)
    return list(parts.values())


def pairs(comparisons: Iterable[Comparison], weights: Mapping[str, float] = {}) -> list[Pair]:
    """Returns every compared pair of episodes, over all raters; the comparisons must be in force
    and scored.

        probability = sum_c w(c) p(c) / sum_c w(c)        over the comparisons c of the pair, w by
                                                          the source of c

    Args:
        comparisons: of any number of raters and groups.
        weights: source to what each of its opinions counts, at least 0; 1 for those that are not
            named. What weighs 0 is left out.
    """
    votes_of: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for comparison in comparisons:
        weight = weights.get(comparison.stamp.source, 1.0)
        if not weight:
            continue
        for a, b, sure in opinions(comparison):
            votes_of.setdefault((a, b), []).append((weight, sure, comparison.strength or 0.0))
    found = []
    for (a, b), votes in votes_of.items():
        total = sum(w for w, *_ in votes)
        found.append(
            Pair(
                a,
                b,
                sum(w * p for w, p, _ in votes) / total,
                sum(w * m for w, _, m in votes) / total,
                float(total),
            )
        )
    return found


def rater_agreement(comparisons: Iterable[Comparison]) -> float | None:
    """Returns the chance that two raters of one source and pair agree, over all pairs that two
    raters ordered strictly; None where none did.

        sum over pairs of (agreeing raters, two by two) / sum over pairs of (raters, two by two)

    Two sources (people and a panel, two judges) are not two raters of one kind; `source_agreement`
    measures them. Answers of one rater to one pair are not two raters'; an answer without a rater's
    own name counts as that of a separate rater.

    It is a ceiling: a model that knew the raters' common taste would agree with single raters no
    more often than they do with one another, up to their noise.
    """
    name = lambda c: "" if c.stamp.rater == c.stamp.source else c.stamp.rater  # noqa: E731
    return _share(_agreeing(votes, name) for votes in _strict(comparisons, by_source=True))


def source_agreement(comparisons: Iterable[Comparison]) -> float | None:
    """Returns the same for answers of different sources to one pair; None where no two sources
    ordered the same pair."""
    return _share(
        _agreeing(votes, lambda c: c.stamp.source)
        for votes in _strict(comparisons, by_source=False)
    )


def _strict(
    comparisons: Iterable[Comparison], *, by_source: bool
) -> list[list[tuple[Comparison, bool]]]:
    """Returns, by pair (and source), who ordered it strictly, and whether the first is the better
    one."""
    by_order: dict[tuple[str, ...], list[tuple[Comparison, bool]]] = {}
    for comparison in comparisons:
        for a, b, sure in opinions(comparison):
            if sure != 0.5:
                key = (
                    comparison.stamp.source if by_source else "",
                    comparison.group,
                    comparison.aspect,
                    a,
                    b,
                )
                by_order.setdefault(key, []).append((comparison, sure > 0.5))
    return list(by_order.values())


def _agreeing(
    votes: Sequence[tuple[Comparison, bool]], name: Callable[[Comparison], str]
) -> tuple[int, int]:
    """Counts the pairs of answers by different names that agree, and all such pairs."""
    by_name: dict[str, list[int]] = {}  # per name: votes against, votes for
    for comparison, first in votes:
        by_name.setdefault(name(comparison), [0, 0])[first] += 1
    twos = lambda n: n * (n - 1) // 2  # noqa: E731
    against, for_it = (sum(n[side] for n in by_name.values()) for side in (0, 1))
    own = [n for who, n in by_name.items() if who]  # every unnamed answer is a separate rater's
    agreed = twos(against) + twos(for_it) - sum(twos(n[0]) + twos(n[1]) for n in own)
    return agreed, twos(against + for_it) - sum(twos(sum(n)) for n in own)


def _share(counted: Iterable[tuple[int, int]]) -> float | None:
    agreed = total = 0
    for a, n in counted:
        agreed, total = agreed + a, total + n
    return agreed / total if total else None


def truth_agreement(comparisons: Iterable[Comparison], truth: Mapping[str, float]) -> float | None:
    """Returns how often a single rater orders two episodes as the truth does, over pairs that both
    order strictly; None where there are none.

    Args:
        comparisons: of single raters.
        truth: episode id to a known true outcome.
    """
    return _share(
        (int((sure > 0.5) == (truth[a] > truth[b])), 1)
        for comparison in comparisons
        for a, b, sure in opinions(comparison)
        if sure != 0.5 and truth[a] != truth[b]
    )


def liked(score: float, threshold: float | None) -> bool:
    """Returns whether a score is that of something liked: from the threshold on; without one,
    scores must be labels, 0 or 1.

    Raises:
        PreferenceError: a score that is no label, and no threshold.
    """
    if threshold is None and score not in (0.0, 1.0):
        raise PreferenceError(
            f"a score of {score:g} is no label (0 or 1): state the `threshold` from which on a"
            " score means liked (`--threshold` of export)"
        )
    return score >= (1.0 if threshold is None else threshold)
