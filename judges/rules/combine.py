"""Judges made of others: `rules` combines its members' answers, `not` reverses one.

    - judge: rules
      combine: min
      of:
        - {judge: length, max_words: 40}
        - {judge: forbidden, words: [guarantee]}

Any judges that score single conversations can be members: registered ones, functions, a reward
model, others of this kind. No score is made up: where a member failed the whole failed, where one
abstained the whole abstains, each with the member's name and reason. To leave a term out would
compare conversations on different terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ...judging import Member, ask_judge, make_members
from ...protocols import Episode, Feedback, Judge, Stamp, overall
from ...running import Plugins
from ...tools import derive_id

_COMBINES: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "min": lambda values, weights: min(values),
    "max": lambda values, weights: max(values),
    "product": lambda values, weights: math.prod(values),
    "mean": lambda values, weights: (
        sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    ),
    "sum": lambda values, weights: sum(w * v for w, v in zip(weights, values, strict=True)),
}


class Rules(Judge):
    """Combines several judges' scores of a conversation into one.

    Turn scores are combined in the same way where every member has them; a turn that one member has
    no opinion on has none. `details` holds each member's answer under its name: `{"length":
    {"score": 0.5, "turn_scores": [...], "details": {...}}}`; their costs are summed.

    Args:
        of: the members, as entries of the `feedback` list of a config: a name, a mapping with
            `judge`, its options, and optionally a `name` of its own and a `weight`; or in Python
            judges and functions.
        combine: "min" (all of them must be good), "max" (any of them), "product", "mean" or "sum";
            the last two by the members' weights, 1 where none is given.
        plugins: where names are looked up; the engine gives it.
    """

    def __init__(
        self,
        of: Any,
        combine: Literal["min", "max", "product", "mean", "sum"] = "min",
        *,
        plugins: Plugins | None = None,
    ) -> None:
        if combine not in _COMBINES:
            raise ValueError(f"combine must be {', '.join(map(repr, _COMBINES))}, got {combine!r}")
        made = _scoring(of, plugins)
        weighted = [member.name for member in made if member.weight is not None]
        if weighted and combine not in ("mean", "sum"):
            raise ValueError(
                f"{combine!r} knows no weights, but {weighted[0]!r} has one: use mean or sum, or"
                " leave it out"
            )
        self.weights = [1.0 if member.weight is None else float(member.weight) for member in made]
        if not all(map(math.isfinite, self.weights)) or (
            combine == "mean" and min(self.weights) <= 0
        ):
            raise ValueError(f"weights must be finite, and for a mean positive, got {self.weights}")
        self.combine = combine
        self.members = {member.name: member.given for member in made}
        self.version = derive_id(
            "rules", combine, self.weights, [(member.name, member.version) for member in made]
        )

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Asks all members and combines their answers on each episode."""
        by_judge = {name: ask_judge(judge, episodes) for name, judge in self.members.items()}
        return [
            self._one(e, {name: answers[i] for name, answers in by_judge.items()})
            for i, e in enumerate(episodes)
        ]

    def _one(self, episode: Episode, answers: dict[str, Feedback]) -> Feedback:
        kept = {
            "details": {name: _kept(answer) for name, answer in answers.items()},
            "stamp": _cost(answers.values()),
        }
        for status in ("failed", "abstained"):
            reasons = [
                f"{name} {status}: {answer.reason}"
                for name, answer in answers.items()
                if answer.status == status
            ]
            if reasons:
                return Feedback(episode.id, status=status, reason="; ".join(reasons), **kept)  # type: ignore[arg-type]
        combine = _COMBINES[self.combine]
        scores = [number for answer in answers.values() if (number := overall(answer)) is not None]
        score = combine(scores, self.weights) if len(scores) == len(answers) else None
        by_turn = [
            answer.turn_scores for answer in answers.values() if answer.turn_scores is not None
        ]
        turns = None
        if len(by_turn) == len(answers):
            columns = zip(*by_turn, strict=True)
            turns = tuple(
                None if None in column else combine(column, self.weights) for column in columns
            )
            turns = None if all(number is None for number in turns) else turns
        if score is None and turns is None:
            raise ValueError(
                "some members score turns only and others say nothing of them, so there is nothing"
                " to combine"
            )
        return Feedback(episode.id, score=score, turn_scores=turns, **kept)  # type: ignore[arg-type]


class Not(Judge):
    """Scores 1 less another judge's score, for the conversation and for each turn: good where that
    judge does not find what it looks for.

    Args:
        of: the judge, as a member of `rules`.
        plugins: where names are looked up; the engine gives it.
    """

    def __init__(self, of: Any, *, plugins: Plugins | None = None) -> None:
        [member] = _scoring([of], plugins)
        self.members = {member.name: member.given}
        self.version = derive_id("not", member.name, member.version)

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Asks the one member and turns its answers round."""
        [(name, judge)] = self.members.items()
        return [self._one(name, answer) for answer in ask_judge(judge, episodes)]

    def _one(self, name: str, answer: Feedback) -> Feedback:
        kept = {"details": {name: _kept(answer)}, "stamp": _cost([answer])}
        if answer.status != "scored":
            reason = f"{name} {answer.status}: {answer.reason}"
            return Feedback(answer.episode, status=answer.status, reason=reason, **kept)  # type: ignore[arg-type]
        score = overall(answer)
        turns = None
        if answer.turn_scores is not None:
            turns = tuple(None if number is None else 1.0 - number for number in answer.turn_scores)
        return Feedback(
            answer.episode,
            score=None if score is None else 1.0 - score,
            turn_scores=turns,
            **kept,  # type: ignore[arg-type]
        )


def _scoring(of: Any, plugins: Plugins | None) -> list[Member]:
    members = make_members(of, plugins)
    for member in members:
        if not isinstance(member.given, Judge):
            raise ValueError(
                f"{member.name!r} compares conversations, or answers later; a member must score"
                " single ones at once: score(episodes). List it in `feedback` as a judge of its own"
            )
    return members


def _kept(answer: Feedback) -> dict[str, Any]:
    """Returns a member's answer as JSON data, without empty fields."""
    answers = {
        "score": answer.score,
        "turn_scores": answer.turn_scores and list(answer.turn_scores),
        "aspects": dict(answer.aspects),
        "comment": answer.comment,
        "reason": answer.reason,
        "details": dict(answer.details),
    }
    return {key: value for key, value in answers.items() if value not in (None, "", {})}


def _cost(answers: Any) -> Stamp:
    return Stamp(cost=sum(answer.stamp.cost for answer in answers))
