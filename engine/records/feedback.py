"""Feedback on an episode, comparisons of a group, and the requests for them.

A plugin author writes one of three: a `Judge` (one episode at a time, at once), a `GroupJudge`
(compares what started alike) or a `FeedbackSource` (answers when it answers: people, batch APIs).
The engine makes a source of any judge.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..util.ids import derive_id
from .episode import Episode
from .shown import brief, in_a_table

Status = Literal["scored", "abstained", "failed"]


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, str) or not math.isfinite(number):
        raise ValueError(
            f"{name} must be a finite number or None, got {value!r}; use Feedback.failed(...) for"
            " failures"
        )
    return number


def _check_fields(answer: Feedback | Comparison) -> None:
    """Raises `ValueError` for a field of another type than it has."""
    for name in ("comment", "reason", "id"):
        if not isinstance(value := getattr(answer, name), str):
            raise ValueError(f"{name} must be text, got {type(value).__name__}")
    if not isinstance(answer.supersedes, (str, type(None))):
        raise ValueError(
            f"supersedes must be the id of a feedback, got {type(answer.supersedes).__name__}"
        )
    if answer.status not in get_args(Status):
        raise ValueError(
            f"status must be one of {', '.join(get_args(Status))}, got {answer.status!r}"
        )
    if not isinstance(answer.stamp, Stamp):
        raise ValueError(
            f"stamp must be a Stamp, got {type(answer.stamp).__name__}; judges leave it alone"
        )


@dataclass(frozen=True, slots=True)
class Stamp:
    """The engine's record of where an answer came from. Judges leave it alone.

    Attributes:
        request: the request that was answered; None for unrequested feedback.
        source, version: the source that gave it, and its version.
        time: when it was received, seconds on the run's clock.
        cost: money or tokens' price, in the currency of the run's budget.
        rater, stratum: who within the source, where it has several people or models, and the
            stratum they belong to.
    """

    request: str | None = None
    source: str = ""
    version: str = ""
    time: float = 0.0
    cost: float = 0.0
    rater: str = ""
    stratum: str = ""

    def __repr__(self) -> str:
        return brief(self)


@dataclass(frozen=True, slots=True)
class Feedback:
    """One rater's feedback on one episode.

    Attributes:
        episode: id of the episode.
        score: one number for the whole episode.
        turn_scores: one number, or None for "no opinion", per turn.
        aspects: named scores ("helpful": 0.8).
        comment: free text.
        status: `scored`; `abstained` (looked, gave no score) or `failed` (could not look). The last
            two are never a number: they carry no score and give the reason.
        shown: what the rater saw and in which order, JSON data; required to measure position bias
            later.
        details: further parts of the answer (a rationale, the first wrong turn), JSON data.
        id: made by the giver. The same id with the same content (everything but the stamp) again is
            a no-op, with other content an error. Left empty by judges: the engine derives it from
            the request and the attempt.
        supersedes: id of an earlier feedback that this one corrects.

    Raises:
        ValueError: a score that is not finite; a score together with a status other than `scored`;
            `scored` without any score.
    """

    episode: str
    score: float | None = None
    turn_scores: tuple[float | None, ...] | None = None
    aspects: Mapping[str, float] = field(default_factory=dict)
    comment: str = ""
    status: Status = "scored"
    reason: str = ""
    shown: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    supersedes: str | None = None
    stamp: Stamp = field(default=Stamp(), compare=False)

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return in_a_table(self)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        _check_fields(self)
        set_(self, "score", _number("score", self.score))
        if self.turn_scores is not None:
            set_(
                self,
                "turn_scores",
                tuple(_number("turn score", value) for value in self.turn_scores),
            )
        set_(
            self,
            "aspects",
            {str(name): _number(f"aspect {name!r}", value) for name, value in self.aspects.items()},
        )
        numbers = (self.score, *(self.turn_scores or ()), *self.aspects.values())
        says_something = any(value is not None for value in numbers)
        if self.status == "scored" and not says_something:
            raise ValueError(
                "scored feedback needs a score, turn_scores or aspects; use Feedback.abstained(...)"
                " otherwise"
            )
        if self.status != "scored" and says_something:
            raise ValueError(f"{self.status} feedback must not carry a score")

    @classmethod
    def failed(cls, episode: str, reason: str, **fields: Any) -> Feedback:
        """Returns feedback that the rater could not give, with the reason."""
        return cls(episode, status="failed", reason=reason, **fields)

    @classmethod
    def abstained(cls, episode: str, reason: str = "", **fields: Any) -> Feedback:
        """Returns feedback by which the rater abstains."""
        return cls(episode, status="abstained", reason=reason, **fields)

    @property
    def target(self) -> str:
        """The id of the episode."""
        return self.episode


@dataclass(frozen=True, slots=True)
class Comparison:
    """One rater's comparison of a group: a ranking with ties.

    Attributes:
        group: key of the group (`Episode.group`).
        ranking: tiers of episode ids, best first; ids in one tier are tied. Episodes left out were
            not compared.
        strength: how much better the first tier is, in the rater's own grades (1 slightly, 2
            clearly, ...), if asked.
        probability: for two episodes, how sure the rater is that the first is better, in [0.5, 1];
            a soft label.
        aspect: what they were compared on; empty: as a whole.

    Raises:
        ValueError: an episode ranked twice; an empty tier; a ranking together with a status other
            than `scored`; `scored` with fewer than two episodes.
    """

    group: str
    ranking: tuple[tuple[str, ...], ...] = ()
    strength: float | None = None
    probability: float | None = None
    aspect: str = ""
    comment: str = ""
    status: Status = "scored"
    reason: str = ""
    shown: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    supersedes: str | None = None
    stamp: Stamp = field(default=Stamp(), compare=False)

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return in_a_table(self)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        _check_fields(self)
        set_(self, "ranking", tuple(tuple(tier) for tier in self.ranking))
        set_(self, "strength", _number("strength", self.strength))
        set_(self, "probability", _number("probability", self.probability))
        if not all(self.ranking):
            raise ValueError("an empty tier in the ranking")
        ranked = [episode for tier in self.ranking for episode in tier]
        if len(set(ranked)) != len(ranked):
            raise ValueError("an episode stands twice in the ranking")
        if self.status == "scored" and len(ranked) < 2:
            raise ValueError("a scored comparison ranks at least two episodes")
        if self.status != "scored" and ranked:
            raise ValueError(f"a comparison that {self.status} must not carry a ranking")

    @classmethod
    def failed(cls, group: str, reason: str, **fields: Any) -> Comparison:
        """Returns a comparison that the rater could not make, with the reason."""
        return cls(group, status="failed", reason=reason, **fields)

    @classmethod
    def abstained(cls, group: str, reason: str = "", **fields: Any) -> Comparison:
        """Returns a comparison by which the rater abstains."""
        return cls(group, status="abstained", reason=reason, **fields)

    @property
    def target(self) -> str:
        """The key of the group."""
        return self.group


@dataclass(frozen=True, slots=True)
class Question:
    """A question that a source wants to be asked about a group, see `FeedbackSource`.

    Attributes:
        target: an episode's id or the group's key.
        episodes: what there is to look at.
        ask: what exactly is asked, JSON data.
    """

    target: str
    episodes: tuple[Episode, ...]
    ask: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """A question to a source: score this episode, or compare this group.

    Attributes:
        kind: "episode" or "group".
        target: the episode's id or the group's key.
        source: name of the source asked.
        rater_slot: 0 .. overlap-1, when several raters answer the same question.
        deadline: seconds on the run's clock after which it counts as expired; None: waits for ever.
        required: a group trains only when its required requests are closed; the others are for
            calibration and audits.
        ask: what exactly is asked, where a source knows several tasks (aspects, mark turns, ...),
            JSON data.
        episodes: what there is to look at; one episode, or those of the group to be compared.
    """

    kind: str
    target: str
    source: str
    rater_slot: int = 0
    deadline: float | None = None
    required: bool = True
    ask: Mapping[str, Any] = field(default_factory=dict)
    episodes: tuple[Episode, ...] = ()

    def __repr__(self) -> str:
        return brief(self)

    @property
    def group(self) -> str:
        """The group that waits for it."""
        return self.episodes[0].group if self.episodes else self.target

    @property
    def item(self) -> str:
        """A digest of what is asked, the same for every rater."""
        return derive_id(
            self.kind, self.target, self.source, dict(self.ask), [e.id for e in self.episodes]
        )

    @property
    def id(self) -> str:
        """The id of the request, derived from its key."""
        shown = [e.id for e in self.episodes]
        return derive_id(
            self.kind, self.target, self.source, self.rater_slot, dict(self.ask), shown
        )


def version_of(source: Any) -> str:
    """Returns a source's own `.version`, else a hash of its source code and of its settings (public
    attributes that are JSON data or functions).

    Two differently configured judges must never pass for one another: verdicts are cached and
    compared by version.
    """
    declared = getattr(source, "version", None)
    if declared is not None:
        return str(declared)
    settings: dict[str, Any] = {}
    while True:
        if isinstance(source, functools.partial):
            settings |= {"args": repr(source.args), "keywords": repr(source.keywords)}
            source = source.func
        elif inspect.ismethod(source):
            settings["self"] = version_of(source.__self__)
            source = source.__func__
        else:
            break
    try:
        own = vars(source)
    except TypeError:  # it has slots
        own = {}
    for name, value in sorted(own.items()):
        if not name.startswith("_"):
            plain = isinstance(value, (str, int, float, bool, list, tuple, dict, type(None)))
            settings[name] = (
                repr(value) if plain else version_of(value) if inspect.isfunction(value) else ""
            )
    kind = source if inspect.isfunction(source) or inspect.isclass(source) else type(source)
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):
        code = f"{kind.__module__}.{kind.__qualname__}"
    return "src-" + derive_id(code, settings)


Answer = Feedback | Comparison
