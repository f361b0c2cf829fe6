"""Reports on a judge against the people who rated some of the same episodes: from answers to
numbers, and to sentences. The statistics: `engine/analysis/calibration`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations

import numpy as np

from ..records.episode import Episode
from ..records.feedback import Answer, Comparison
from ..records.rewards import overall, ranked_pairs, ranking_scores
from ..util.ids import derive_id
from ..util.suggest import did_you_mean
from ..util.wording import name_of
from .agreement import krippendorff_alpha
from .calibration import (
    Correlations,
    Order,
    correlations,
    fit_correction,
    mean_difference,
    mean_interval,
    order_of,
    same_order,
)
from .drift import Drift
from .judge_calibration import Alarm, Calibration, Change, Part
from .prediction_powered import prediction_powered_mean, worth
from .preferences import rater_agreement

Feature = str | Callable[[Episode], float]
Ranges = Mapping[str, Sequence[float]]

FEATURES: Mapping[str, Callable[[Episode], float]] = {
    "words": lambda e: sum(len(turn.action.split()) for turn in e.turns) / max(len(e.turns), 1),
    "turns": lambda e: float(len(e.turns)),
    "questions": lambda e: sum(turn.action.count("?") for turn in e.turns) / max(len(e.turns), 1),
    "lines": lambda e: sum(turn.action.count("\n") for turn in e.turns) / max(len(e.turns), 1),
}
"""What a correction may take into account, by name: words, question marks and line breaks per
reply, and turns."""


def named_features(features: Sequence[Feature]) -> dict[str, Callable[[Episode], float]]:
    """Returns features by name; a function goes by its own name.

    Raises:
        ValueError: an unknown name, or one that is there twice.
    """
    found: dict[str, Callable[[Episode], float]] = {}
    for feature in features:
        name = feature if isinstance(feature, str) else name_of(feature)
        if isinstance(feature, str) and feature not in FEATURES:
            raise ValueError(f"there is no feature {feature!r}.{did_you_mean(feature, FEATURES)}")
        if name in found:
            raise ValueError(f"two features are called {name!r}")
        found[name] = FEATURES[feature] if isinstance(feature, str) else feature
    return found


def check_ranges(ranges: Ranges, names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Returns ranges by source, checked.

    Raises:
        ValueError: a source that is not there, or a range that is none.
    """
    known, found = list(names), {}
    for name, limits in ranges.items():
        if name not in known:
            raise ValueError(
                f"ranges names the source {name!r}, which takes no part.{did_you_mean(name, known)}"
            )
        if len(limits) != 2 or not -math.inf < limits[0] < limits[1] < math.inf:
            raise ValueError(f"the range of {name!r} must be [lowest, highest], got {limits!r}")
        found[name] = (float(limits[0]), float(limits[1]))
    return found


def on_scale(value: float, source: str, judge: str, ranges: Ranges) -> float:
    """Converts a person's score to the judge's scale: the straight line from the range of the
    source to the judge's, [0, 1] where that has none. A source without a range is on the judge's
    scale already."""
    if source not in ranges:
        return value
    (low, high), (bottom, top) = ranges[source], ranges.get(judge, (0.0, 1.0))
    return bottom + (value - low) / (high - low) * (top - bottom)


def scores_of(answer: Answer) -> dict[str, float]:
    """Returns an answer's scores of whole episodes, by id: a score or the mean of the aspects; a
    ranking as the share of the others each beats. Empty where it failed, abstained or is about
    turns only."""
    if isinstance(answer, Comparison):
        return dict(ranking_scores(answer)) if answer.status == "scored" else {}
    score = overall(answer)
    return {} if score is None else {answer.episode: score}


@dataclass(frozen=True, slots=True)
class _Row:
    """An episode that the judge scored; `human` is None where no person did."""

    episode: Episode
    version: str
    judge: float
    human: float | None


def calibrate(
    judge_answers: Sequence[Answer],
    human_answers: Sequence[Answer],
    episodes: Iterable[Episode],
    *,
    ranges: Ranges | None = None,
    features: Sequence[Feature] = (),
    windows: int = 4,
    level: float = 0.95,
) -> Calibration:
    """Computes all statistics of a judge from people's answers on some of its episodes. Pure: the
    same answers give the same numbers.

    Args:
        judge_answers: of one judge (one `stamp.source`), in force, of all its versions
            (`stamp.version`); late ones too.
        human_answers: of people, from any sources.
        episodes: those the answers speak of; answers on others are passed over.
        ranges: source to [lowest, highest], where people's scale is not the judge's; see
            `on_scale`.
        features: of episodes, for the correction of single scores: names of `FEATURES`, or
            functions of an episode.
        windows: of updates, with about equally many labels and at least 20 each.
        level: of the intervals.

    Raises:
        ValueError: answers of several judges, an unknown feature, or ranges that cannot be used.
    """
    judges = sorted({a.stamp.source for a in judge_answers})
    if len(judges) > 1:
        raise ValueError(
            f"calibrate looks at one judge at a time, got answers of {', '.join(map(repr, judges))}"
        )
    judge = judges[0] if judges else ""
    people = tuple(sorted({a.stamp.source for a in human_answers}))
    limits = check_ranges(ranges or {}, [judge, *people, *(ranges or {})])
    functions = named_features(features)
    known = {e.id: e for e in episodes}
    theirs = _means(human_answers, known, judge, limits)
    rows = _rows(judge_answers, theirs, known, judge)
    levels = not any(
        isinstance(a, Comparison) and a.status == "scored" for a in (*judge_answers, *human_answers)
    )
    labelled = [row for row in rows if row.human is not None]
    if not labelled:
        return Calibration(judge, people, None)
    part = lambda name, some: _part(name, some, functions, levels, level)  # noqa: E731
    by_version = _labelled_versions(rows)
    alarm, watched = _watched(labelled) if levels else (None, 0)
    rankings = [a for a in human_answers if isinstance(a, Comparison) and a.status == "scored"]
    of_people = _people_correlation(theirs, level) if levels else None
    return Calibration(
        judge=judge,
        people=people,
        whole=part("all", rows),
        versions=tuple(part(f"version {v or 'unnamed'}", some) for v, some in by_version.items()),
        windows=tuple(part(name, some) for name, some in _windows(rows, windows)),
        changes=(
            tuple(_change(one, other, by_version, level) for one, other in pairwise(by_version))
            if levels
            else ()
        ),
        alarm=alarm,
        watched=watched,
        rankings=_ranked(rankings, {row.episode.id: row.judge for row in rows}, level),
        people_correlation=None if of_people is None else of_people.pearson,
        people_alpha=krippendorff_alpha(list(theirs.values()), "interval") if levels else None,
        people_agreement=rater_agreement(rankings),
    )


def _labelled_versions(rows: Iterable[_Row]) -> dict[str, list[_Row]]:
    """Returns the answers by the judge's version, of those versions with more than one label."""
    by_version: dict[str, list[_Row]] = {}
    for row in rows:
        by_version.setdefault(row.version, []).append(row)
    return {v: some for v, some in by_version.items() if _labels(some) > 1}


def _rows(
    judge_answers: Sequence[Answer],
    theirs: Mapping[str, Mapping[str, float]],
    known: Mapping[str, Episode],
    judge: str,
) -> list[_Row]:
    """Returns the episodes that a judge scored, in the order they were played, with the newest
    version's score and people's mean.

    Args:
        theirs: people's scores by episode and rater.
    """
    judged = _means(judge_answers, known, judge, {})
    versions: dict[str, str] = {}
    for answer in sorted(judge_answers, key=lambda a: (a.stamp.time, a.id)):
        versions |= dict.fromkeys(scores_of(answer), answer.stamp.version)
    return [
        _Row(
            known[id_],
            versions[id_],
            _mean(list(judged[id_].values())),
            _mean(list(theirs[id_].values())) if id_ in theirs else None,
        )
        for id_ in sorted(judged, key=lambda i: (known[i].update, known[i].group, known[i].slot, i))
    ]


def _people_correlation(
    theirs: Mapping[str, Mapping[str, float]], level: float
) -> Correlations | None:
    """Returns how people's scores of one episode agree with each other, each pair of raters both
    ways round; None: no episode has two."""
    own = [
        [score for _, score in sorted(theirs[id_].items())]
        for id_ in sorted(theirs)
        if len(theirs[id_]) > 1
    ]
    twice = [(i, a, b) for i, values in enumerate(own) for a, b in permutations(values, 2)]
    if not twice:
        return None
    return correlations(
        [a for _, a, _ in twice], [b for *_, b in twice], [i for i, *_ in twice], level=level
    )


def _means(
    answers: Sequence[Answer], known: Mapping[str, Episode], judge: str, ranges: Ranges
) -> dict[str, dict[str, float]]:
    """Returns the scores by episode and rater; of several answers of one rater the mean."""
    by_rater: dict[str, dict[str, list[float]]] = {}
    for answer in answers:
        rater = answer.stamp.rater or answer.stamp.source
        for id_, value in scores_of(answer).items():
            if id_ in known:
                by_rater.setdefault(id_, {}).setdefault(rater, []).append(
                    on_scale(value, answer.stamp.source, judge, ranges)
                )
    return {
        id_: {rater: _mean(values) for rater, values in own.items()}
        for id_, own in by_rater.items()
    }


def _part(
    name: str,
    rows: Sequence[_Row],
    functions: Mapping[str, Callable[[Episode], float]],
    levels: bool,
    level: float,
) -> Part:
    labelled, others = (
        [r for r in rows if r.human is not None],
        [r for r in rows if r.human is None],
    )
    f, y = [r.judge for r in labelled], [r.human for r in labelled if r.human is not None]
    groups, elsewhere = [r.episode.group for r in labelled], [r.episode.group for r in others]
    unlabelled, clusters = [r.judge for r in others], (elsewhere, groups)
    columns = {n: [function(r.episode) for r in labelled] for n, function in functions.items()}
    return Part(
        name=name,
        labels=len(labelled),
        judged=len(rows),
        mean=prediction_powered_mean(unlabelled, f, y, clusters, level) if levels else None,
        bias=mean_interval(np.subtract(y, f), groups, level) if levels else None,
        worth=worth(unlabelled, f, y, clusters, level=level) if levels else None,
        correlations=correlations(f, y, groups, level=level),
        order=same_order(f, y, groups, level=level) if levels else None,
        order_within=same_order(f, y, groups, within=True, level=level),
        alpha=(
            krippendorff_alpha(
                [{"judge": a, "people": b} for a, b in zip(f, y, strict=True)], "interval"
            )
            if levels
            else None
        ),
        correction=fit_correction(f, y, columns, groups),
    )


def _labels(rows: Sequence[_Row]) -> int:
    return sum(row.human is not None for row in rows)


def _windows(rows: Sequence[_Row], most: int) -> list[tuple[str, list[_Row]]]:
    """Returns windows of consecutive updates, with about equally many labels."""
    count = min(most, _labels(rows) // 20)
    if count < 2:
        return []
    found: list[list[_Row]] = [[]]
    seen = 0
    for update in sorted({row.episode.update for row in rows}):
        if seen >= len(found) * _labels(rows) / count:
            found.append([])
        own = [row for row in rows if row.episode.update == update]
        found[-1] += own
        seen += _labels(own)
    named = (
        (f"updates {some[0].episode.update} to {some[-1].episode.update}", some)
        for some in found
        if _labels(some) > 1
    )
    return list(named)


def _change(one: str, other: str, by_version: Mapping[str, Sequence[_Row]], level: float) -> Change:
    sides = [
        [row for row in by_version[version] if row.human is not None] for version in (one, other)
    ]
    first, second = ([(row.human or 0.0) - row.judge for row in side] for side in sides)
    groups = ([row.episode.group for row in sides[0]], [row.episode.group for row in sides[1]])
    return Change(
        one or "unnamed", other or "unnamed", mean_difference(first, second, groups, level)
    )


def _watched(labelled: Sequence[_Row]) -> tuple[Alarm | None, int]:
    """Runs the alarm over all labelled starts, in order of their updates."""
    drift, updates = Drift(), []
    by_group: dict[str, list[_Row]] = {}
    for row in labelled:
        by_group.setdefault(row.episode.group, []).append(row)
    for own in by_group.values():
        updates.append(own[0].episode.update)
        drift.add(_mean([(row.human or 0.0) - row.judge for row in own]), luck(own[0].episode))
    if drift.alarm is None or drift.began is None:
        return None, len(drift)
    return Alarm(updates[drift.alarm - 1], updates[drift.began], drift.shift, drift.alarm), len(
        drift
    )


def luck(episode: Episode) -> float:
    """Returns a number in [0, 1) for an episode's start, which no score depends on; it breaks ties
    in `Drift`."""
    return (
        int(derive_id("luck", episode.stage, episode.update, episode.start.key)[:12], 16) / 16**12
    )


def _ranked(
    rankings: Sequence[Comparison], scores: Mapping[str, float], level: float
) -> Order | None:
    """Compares people's rankings with the judge's scores, pair by pair."""
    human, judge, groups = [], [], []
    for comparison in rankings:
        strict = set(ranked_pairs(comparison))
        for pair in combinations(scores_of(comparison), 2):
            if pair[0] in scores and pair[1] in scores:
                human.append(1.0 if pair in strict else -1.0 if pair[::-1] in strict else 0.0)
                judge.append(float(np.sign(scores[pair[0]] - scores[pair[1]])))
                groups.append(comparison.group)
    place = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    numbers = [place[group] for group in groups]
    return order_of(human, judge, (numbers, numbers), level=level) if human else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
