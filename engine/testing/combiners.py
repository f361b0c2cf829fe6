"""`check_combiner`: has feedback on canned conversations combined."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..protocols import Combiner
from ..records.episode import Episode
from ..records.feedback import Feedback, Stamp
from ..records.rewards import NoReward, Rewards
from .episodes import conversations
from .faults import faults_of, short


def check_combiner(make: Callable[[], Combiner], *, sources: Sequence[str] = ("testing",)) -> None:
    """Has groups of conversations rewarded, and lists what is wrong: rewards of another number, or
    that depend on the order of episodes or of feedback; a reward where every source has failed or
    abstained; one of several that failed and counts as a score of 0; feedback or episodes that it
    changes; what it raises.

    Args:
        make: makes it, with weights for `sources` and for "environment".
        sources: the names of the sources that the feedback is of.

    Raises:
        Unsound: with all faults.
    """
    group = conversations()[:2]
    scores = [
        Feedback(e.id, score=float(i), stamp=Stamp(source=source))
        for i, e in enumerate(group)
        for source in sources
    ]
    with faults_of(make()) as faults:
        combined = partial(_combined, make, faults)
        base = combined(group, scores)
        if not _alike(combined(group[::-1], scores), base):
            faults.append("its rewards depend on the order of the conversations")
        if not _alike(combined(group, scores[::-1]), base):
            faults.append("its rewards depend on the order in which feedback came")
        for word, silent in (("failed", Feedback.failed), ("abstained", Feedback.abstained)):
            nothing = [
                silent(e.id, "testing", stamp=Stamp(source=s)) for e in group for s in sources
            ]
            for name, reward in combined(group, nothing).items():
                if isinstance(reward, Rewards):
                    faults.append(
                        f"where every source has {word} on {name!r} it gives {short(reward)}: that"
                        " is no number. Return NoReward with the reason"
                    )
        for source in sources if len(sources) > 1 else ():
            _check_one_failed(combined, group[1], group, scores, source, faults)


def _combined(
    make: Callable[[], Combiner], faults: list[str], episodes: Any, feedback: Any
) -> dict[str, Rewards | NoReward]:
    before = copy.deepcopy([e.to_dict() for e in episodes]), list(feedback)
    combiner = make()  # what one has learned of an order is no fault
    try:
        combiner.fit(feedback)
        found = list(combiner.combine(episodes, feedback))
    except Exception as error:
        faults.append(f"it raises {type(error).__name__}: {error}")
        return {}
    if ([e.to_dict() for e in episodes], list(feedback)) != before:
        faults.append("it changes the episodes or the feedback that it is shown")
    if len(found) != len(episodes):
        faults.append(f"it gives {len(found)} rewards for {len(episodes)} conversations")
        return {}
    odd = [r for r in found if not isinstance(r, (Rewards, NoReward))]
    if odd:
        faults.append(f"it gives {short(odd[0])}, which is neither Rewards nor NoReward")
    for reward, episode in zip(found, episodes, strict=True):
        if isinstance(reward, Rewards) and len(reward.turns) != len(episode.turns):
            faults.append(
                f"its rewards for {episode.id!r} have {len(reward.turns)} turns, and the"
                f" conversation {len(episode.turns)}"
            )
    return {e.id: r for e, r in zip(episodes, found, strict=True)}


def _check_one_failed(
    combined: Callable[[Any, Any], Mapping[str, Any]],
    one: Episode,
    group: Sequence[Episode],
    scores: Sequence[Feedback],
    source: str,
    faults: list[str],
) -> None:
    """Notes where a conversation whose other scores are not 0 has the same reward when a source has
    failed on it as when that scored 0, and others when it scored less or more."""
    rest = [f for f in scores if (f.episode, f.stamp.source) != (one.id, source)]
    stamp = Stamp(source=source)

    def given(answer: Feedback) -> Any:
        return combined(group, [answer, *rest]).get(one.id)

    failed = given(Feedback.failed(one.id, "testing", stamp=stamp))
    low, zero, high = (
        given(Feedback(one.id, score=score, stamp=stamp)) for score in (-100.0, 0.0, 100.0)
    )
    if _same(failed, zero) and not _same(zero, low) and not _same(zero, high):
        faults.append(
            f"where {source!r} has failed it counts as a score of 0: what failed is never a score."
            " Leave it out of what it is weighed with, or return NoReward"
        )


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether rewards are the same, up to rounding."""
    return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)


def _same(one: Any, other: Any) -> bool:
    if not (isinstance(one, Rewards) and isinstance(other, Rewards)):
        return type(one) is type(other)
    return math.isclose(one.outcome, other.outcome, abs_tol=1e-9)
