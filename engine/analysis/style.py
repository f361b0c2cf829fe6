"""Style biases: what verdicts follow in the words, which may be length, format, flattery, or the
judge's own family."""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, stdtrit

from ..records.episode import Episode
from ..records.feedback import Comparison, Feedback
from ..records.rewards import overall
from .positions import (
    FEWEST,
    LINEAR,
    PRIOR,
    Answers,
    Bias,
    Floats,
    counted,
    in_points,
    looks,
    turned_positive,
)
from .preferences import opinion

# Style and self-preference

_CODE = re.compile(r"```.*?(```|\Z)", re.DOTALL)
_MARKS = {
    "lists": re.compile(r"^[ \t]*(?:[-*+]|\d+[.)])[ \t]+\S", re.MULTILINE),
    "headers": re.compile(r"^#{1,6}[ \t]+\S", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
}
_ASKS = re.compile("[?？؟]")
_AGREES = re.compile(
    r"\W*(?:(?:what |that(?:'|’)s |that is )?an? )?"
    r"(?:(?:(?:great|good|excellent|fantastic|wonderful|brilliant|insightful|interesting"
    r"|fascinating) "
    r"(?:question|point|idea|thinking|observation|catch|job|choice)|excellent|perfect|fantastic|wonderful|brilliant|"
    r"absolutely|certainly|definitely|"
    r"of course|exactly|indeed|sure(?: thing)?|i (?:completely |totally |fully |absolutely"
    r" |couldn(?:'|’)t )?agree|"
    r"you(?:(?:'|’)re| are) (?:(?:so|absolutely|completely|totally|quite) )?(?:right|correct)|"
    r"(?:thank you|thanks) for (?:asking|sharing|pointing))\b)",
    re.IGNORECASE,
)
_MORE = {
    "length": "of {:.0f} characters more",
    "lists": "with {:.1f} more list items",
    "headers": "with {:.1f} more headers",
    "bold": "with {:.1f} more bold passages",
    "questions": "that ask in {:.0%} more of their turns",
    "openers": "that open with praise or agreement in {:.0%} more of their turns",
}


def style_features(episode: Episode) -> dict[str, float]:
    """Measures the style of the assistant's replies: `length` (characters in all), counts of list
    items, headers and bold passages (Markdown outside of code), the share of replies that ask
    (`questions`) and that begin with praise or agreement (`openers`, English)."""
    replies = [turn.action for turn in episode.turns]
    prose = [_CODE.sub("", text) for text in replies]
    marks = {
        name: float(sum(len(mark.findall(text)) for text in prose)) for name, mark in _MARKS.items()
    }
    share = lambda pattern: sum(bool(pattern(text)) for text in prose) / max(len(prose), 1)  # noqa: E731
    return {
        "length": float(sum(map(len, replies))),
        **marks,
        "questions": share(_ASKS.search),
        "openers": share(_AGREES.match),
    }


def style(
    answers: Answers,
    episodes: Mapping[str, Episode],
    reference: Mapping[str, float] | None = None,
    second: Mapping[str, float] | None = None,
) -> list[Bias]:
    """Measures how much a judge likes one sd more of each feature of style, all others and the
    reference being equal.

    A feature that differs in fewer than ten groups is left out. From comparisons in net win rate,
    from scores in sd.

    Args:
        answers: of one judge.
        episodes: by id; answers on others are skipped.
        reference, second: episode id to worth, see the top of `engine/analysis/bias`; episodes they
            do not hold are skipped.
    """
    looks_like = {name: style_features(episode) for name, episode in episodes.items()}
    features = {name: {e: row[name] for e, row in looks_like.items()} for name in (*_MORE,)}
    found = []
    for effect in _effects(answers, episodes, features, reference, second):
        who = f"replies {_MORE[effect.name].format(effect.sd)}"
        found.append(
            effect.bias(who, "those that the reference holds equal" if reference else "the others")
        )
    return (
        found
        if reference
        else [
            replace(b, sentence=b.sentence + "; without a reference, it may be deserved")
            for b in found
        ]
    )


def self_preference(
    answers: Answers,
    episodes: Mapping[str, Episode],
    authors: Mapping[str, str],
    family: str,
    reference: Mapping[str, float],
    second: Mapping[str, float] | None = None,
) -> list[Bias]:
    """Measures how much a judge prefers what its own family wrote to what others wrote, the
    reference being equal.

    One entry from comparisons in net win rate, one from scores in sd; none where fewer than ten
    groups hold both kinds.

    Args:
        answers: of one judge.
        episodes: by id; answers on others are skipped.
        authors: episode id to the family that wrote it; other episodes are skipped.
        family: the judge's own.
        reference, second: episode id to worth, by a rater who is not of the family.
    """
    own = {"own family": {e: float(authors[e] == family) for e in episodes if e in authors}}
    return [
        effect.bias(
            f"replies by {family}, its own family,", "others that the reference holds equal"
        )
        for effect in _effects(answers, episodes, own, reference, second)
    ]


class _Effect(NamedTuple):
    name: str
    sd: float
    unit: str
    estimate: float
    low: float
    high: float
    n: int

    def bias(self, who: str, against: str) -> Bias:
        found = self.estimate, self.low, self.high
        if self.unit == "sd":
            size, least, most, negative = turned_positive(*found)
            text = (
                f"{who} score {size:.2f} sd ({least:.2f} to {most:.2f})"
                f" {'lower' if negative else 'higher'} than {against}"
            )
        else:
            text = f"{who} win {in_points(*found)} than {against}"
        number = counted(self.n, "score" if self.unit == "sd" else "pair")
        return Bias(self.name, *found, self.unit, self.n, f"{text}, {number}")


def _effects(
    answers: Answers,
    episodes: Mapping[str, Episode],
    features: Mapping[str, Mapping[str, float]],
    reference: Mapping[str, float] | None,
    second: Mapping[str, float] | None,
) -> Iterator[_Effect]:
    """Estimates the effect of one sd more of each feature (one more of a linear one) on comparisons
    and on scores; all by episode id."""
    listed = list(answers)
    opinions = {"reference": reference, "second": second if reference else None}
    terms = {**features, **{name: value for name, value in opinions.items() if value}}
    known = set(episodes).intersection(*terms.values())

    pairs = [pair for pair in _pairs(listed) if pair.first in known and pair.second in known]
    columns = {
        name: np.array([value[p.first] - value[p.second] for p in pairs])
        for name, value in terms.items()
    }
    wins, sides = np.array([p.wins for p in pairs]), np.array([p.side for p in pairs])
    for name, sd, low, beta, high in _fit(columns, [p.group for p in pairs], wins, sides):
        reach = 1 / sd if name in LINEAR else np.tanh(1)
        estimate, least, most = (float(2 * expit(b * reach) - 1) for b in (beta, low, high))
        yield _Effect(name, sd, "net win rate", estimate, least, most, len(pairs))

    marks: dict[str, list[float]] = defaultdict(list)
    for answer in listed:
        if (
            isinstance(answer, Feedback)
            and answer.episode in known
            and (number := overall(answer)) is not None
        ):
            marks[answer.episode].append(number)
    groups = [episodes[e].group for e in marks]
    columns = {name: _centred([value[e] for e in marks], groups) for name, value in terms.items()}
    scores = _centred([float(np.mean(each)) for each in marks.values()], groups)
    spread = float(np.sqrt((scores**2).mean())) if len(scores) else 0.0
    if spread > 0:
        for name, sd, low, beta, high in _fit(columns, groups, scores / spread, None):
            reach = 1 / sd if name in LINEAR else float(np.tanh(1))
            yield _Effect(name, sd, "sd", beta * reach, low * reach, high * reach, len(scores))


class _Pair(NamedTuple):
    """A compared pair: `wins` is the probability that the first is better; `side` 1 where it was
    shown first, 0 where the order is unknown."""

    group: str
    first: str
    second: str
    wins: float
    side: float


def _pairs(answers: Answers) -> Iterator[_Pair]:
    for answer in answers:
        if not isinstance(answer, Comparison) or answer.status != "scored":
            continue
        seen = list(looks([answer]))
        for look in seen:
            for (one, high), (other, low) in combinations(
                zip(look.order, look.scores, strict=True), 2
            ):
                wins = high if len(look.order) == 2 else (1 + float(np.sign(high - low))) / 2
                yield _Pair(look.group, one, other, wins, 1.0)
        if not seen:
            for one, other in combinations([e for tier in answer.ranking for e in tier], 2):
                yield _Pair(answer.group, one, other, opinion(answer, one, other) or 0.0, 0.0)


def _fit(
    columns: Mapping[str, Floats], groups: Sequence[Hashable], outcomes: Floats, side: Floats | None
) -> Iterator[tuple[str, float, float, float, float]]:
    """Returns (name, sd, low, coefficient, high) of every feature that differs in enough groups.

    Args:
        columns: [N] differences of each feature, of "reference" and of "second", where there are
            such.
        groups: [N].
        outcomes: [N] probabilities, for the logistic regression; centred scores, for the other.
        side: [N] of the logistic regression; None: least squares.
    """
    number = (
        np.unique(np.array(groups, dtype=str), return_inverse=True)[1]
        if len(groups)
        else np.zeros(0, int)
    )
    count = len(set(groups))
    kept: dict[str, tuple[float, Floats]] = {}
    for name, d in columns.items():
        if name == "second":
            continue
        differs = np.abs(d) > 1e-9 * np.abs(d).max(initial=0.0)
        if len(set(number[differs])) >= FEWEST:
            sd = float(np.sqrt((d**2).mean()))
            x = d / sd if name in LINEAR else np.tanh(d / sd)
            kept[name] = sd, x if side is not None else _centred(x, groups)
    if "second" in columns and "reference" in kept:
        sd, first = kept.pop("reference")
        known = np.stack([*(x for _, x in kept.values()), columns["second"]], 1)
        kept["reference"] = (
            sd,
            np.asarray(known @ np.linalg.lstsq(known, first, rcond=None)[0], np.float64),
        )
    design = [x for _, x in kept.values()] + ([side] if side is not None and side.any() else [])
    if not kept or count <= 2 * len(design):
        return
    x = np.stack(design, 1)
    beta, inverse = _logistic(x, outcomes) if side is not None else _least_squares(x, outcomes)
    residual = outcomes - (expit(x @ beta) if side is not None else x @ beta)
    pull = np.zeros((count, x.shape[1]))
    np.add.at(pull, number, residual[:, None] * x)
    error = np.sqrt(np.diagonal(inverse @ (pull.T @ pull) @ inverse) * count / (count - 1))
    wide = stdtrit(count - 1, 0.975) * error
    for k, (name, (sd, _)) in enumerate(kept.items()):
        if name != "reference":
            yield name, sd, float(beta[k] - wide[k]), float(beta[k]), float(beta[k] + wide[k])


def _logistic(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Returns the mode under a N(0, 1 / PRIOR) prior, [F], by Newton's method, and the inverse of
    the loss's Hessian there."""
    loss = lambda b: float((np.logaddexp(0, x @ b) - y * (x @ b)).sum() + PRIOR * (b @ b) / 2)  # noqa: E731
    beta = np.zeros(x.shape[1])
    while True:
        chance = expit(x @ beta)
        slope = x.T @ (chance - y) + PRIOR * beta
        inverse = np.linalg.inv(
            (x * (chance * (1 - chance))[:, None]).T @ x + PRIOR * np.eye(len(beta))
        )
        step = inverse @ slope
        before = loss(beta)
        while loss(beta - step) > before + 1e-12 * abs(before):
            step = step / 2
        beta = beta - step
        if np.abs(step).max() < 1e-8:
            return beta, inverse


def _least_squares(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Returns the same for y = x b + e, e ~ N(0, 1)."""
    inverse = np.linalg.inv(x.T @ x + PRIOR * np.eye(x.shape[1])).astype(np.float64)
    return inverse @ (x.T @ y), inverse


# Scores at equal length


def length_slope(
    scores: ArrayLike, lengths: ArrayLike, groups: Sequence[Hashable], ridge: float = 5.0
) -> tuple[float, float]:
    """Estimates how much a judge's score follows length within groups, and the scale of lengths,
    for `length_controlled`.

    With x = tanh((length - its group's mean) / sd) less its group's mean, slope = sum x s / (sum
    x^2 + ridge): towards 0 with little data.

    Args:
        scores, lengths: [N].
        groups: [N].
        ridge: in units of sum x^2, to which one episode adds about 0.4.

    Returns:
        slope, in the scores' unit per x; sd, the root mean square deviation of lengths from their
        group's mean.
    """
    away = _centred(lengths, groups)
    sd = float(np.sqrt((away**2).mean())) if len(away) else 0.0
    x = _stretch(lengths, groups, sd)
    return float(x @ _centred(scores, groups) / (x @ x + ridge)), sd


def length_controlled(
    scores: ArrayLike, lengths: ArrayLike, groups: Sequence[Hashable], slope: float, sd: float
) -> Floats:
    """Returns the scores [N] that a judge would have given, were all of a group equally long (the
    idea of Dubois et al. 2024, arXiv:2404.04475, within groups): score - slope x. Groups keep their
    means. What length truly earned is taken away with the rest."""
    return np.asarray(scores, float) - slope * _stretch(lengths, groups, sd)


class LengthControl:
    """Length control for a judge in a run: fitted to the groups it has scored lately, since a
    policy's lengths and a judge's taste change.

    Args:
        window: how many groups it remembers.
        ridge: see `length_slope`.

    Raises:
        ValueError: a window below 1 or a ridge that is not positive.
    """

    def __init__(self, window: int = 512, ridge: float = 5.0) -> None:
        if window < 1 or not ridge > 0:
            raise ValueError(
                f"window must be at least 1 and ridge positive, got {window} and {ridge}"
            )
        self.window, self.ridge = window, ridge
        self.slope, self.sd = 0.0, 0.0
        self._groups: deque[tuple[list[float], list[float]]] = deque(maxlen=window)

    def fit(
        self, scores: ArrayLike, lengths: ArrayLike, groups: Sequence[Hashable]
    ) -> LengthControl:
        """Adds scores and lengths, [N] each, failed and abstained left out; a group must be given
        whole."""
        s, n = np.asarray(scores, float), np.asarray(lengths, float)
        for group in dict.fromkeys(groups):
            mine = np.array([g == group for g in groups])
            if mine.sum() > 1:
                self._groups.append((s[mine].tolist(), n[mine].tolist()))
        return self._refit()

    def _refit(self) -> LengthControl:
        number = [g for g, (s, _) in enumerate(self._groups) for _ in s]
        s, n = ([v for each in self._groups for v in each[k]] for k in (0, 1))
        self.slope, self.sd = length_slope(s, n, number, self.ridge)
        return self

    def apply(self, scores: ArrayLike, lengths: ArrayLike, groups: Sequence[Hashable]) -> Floats:
        """Returns the scores at equal length, [N]; unchanged as long as nothing was fitted."""
        return length_controlled(scores, lengths, groups, self.slope, self.sd)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain JSON data."""
        return {"groups": [list(each) for each in self._groups]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._groups = deque(((list(s), list(n)) for s, n in state["groups"]), maxlen=self.window)
        self._refit()


def _stretch(lengths: ArrayLike, groups: Sequence[Hashable], sd: float) -> Floats:
    """Returns tanh of a length's deviation from its group's mean in sd, centred again, [N]."""
    away = _centred(lengths, groups)
    return _centred(np.tanh(away / sd), groups) if sd > 0 else np.zeros(len(away))


# Means, intervals, words


def _centred(values: ArrayLike, groups: Sequence[Hashable]) -> Floats:
    """Returns values less the mean of their group, [N]."""
    v = np.asarray(values, float)
    number = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    at = np.array([number[group] for group in groups], dtype=int)
    if len(at) != len(v):
        raise ValueError(f"{len(v)} values, but {len(at)} groups")
    return v - (np.bincount(at, v) / np.maximum(np.bincount(at), 1))[at] if len(v) else v
