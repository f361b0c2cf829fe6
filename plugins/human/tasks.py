"""The four kinds of task, and how a form becomes an answer.

    rank      K conversations that started alike: a rank each, ties allowed, and whether all of them
              are bad
    compare   two of them side by side: -3 (the first is much better) to 3 (the second is much
              better), 0 is a tie
    score     one conversation on named aspects, 1 to `scale` points each; kept as 0 to 1
    mark      one conversation: turns good (+1) or bad (-1), and the first turn where it went wrong

Everything a browser sends passes through here. What does not fit is refused with the field's name;
nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...protocols import Comparison, Episode, Feedback
from .errors import FormError

TASKS = ("rank", "compare", "score", "mark")
GRADES = {
    -3: "A is much better", -2: "A is better", -1: "A is slightly better", 0: "Equally good",
    1: "B is slightly better", 2: "B is better", 3: "B is much better",
}  # fmt: skip
COMMENT = 10_000  # characters, as browsers count them: in UTF-16, a line break is one
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read(
    task: str,
    form: Mapping[str, str],
    shown: Sequence[Episode],
    aspects: Sequence[str],
    scale: int,
    more: Mapping[str, Any],
) -> Feedback | Comparison:
    """Reads an answer from a form.

    Args:
        task: what was asked: "rank", "compare", ...
        form: field names to what they hold.
        shown: the conversations, in the order they were displayed.
        aspects: names of what a conversation gets points for.
        scale: the most points that an aspect can get; the least is 1.
        more: goes into the answer's `details`.

    Raises:
        FormError: a field that is missing or holds what it cannot hold.
    """
    comment = form.get("comment", "").replace("\r\n", "\n").strip()
    if (length := len(comment.encode("utf-16-le", "replace")) // 2) > COMMENT:
        raise FormError(
            "comment", f"The comment is too long: {length:,} of {COMMENT:,} characters."
        )
    fields: dict[str, Any] = {
        "comment": comment,
        "shown": {"order": [e.id for e in shown]},
        "details": dict(more),
    }
    kind: Any = Comparison if task in ("rank", "compare") else Feedback
    target = shown[0].group if task in ("rank", "compare") else shown[0].id
    if form.get("verdict") == "cannot":
        return kind.abstained(
            target,
            form.get("reason", "").strip()[:COMMENT] or "the rater could not judge",
            **fields,
        )
    if task == "rank":
        return _ranking(form, shown, fields)
    if task == "compare":
        grade = _whole(
            form, "preference", -3, 3, "Say which one is better, or that they are equally good."
        )
        first, second = (e.id for e in shown)
        ranking = (
            ((first, second),)
            if grade == 0
            else ((first,), (second,))
            if grade < 0
            else ((second,), (first,))
        )
        return Comparison(target, ranking, strength=float(abs(grade)), **fields)
    if task == "score":
        points = {
            a: _whole(form, f"aspect-{a}", 1, scale, f"Give points for {a!r}.") for a in aspects
        }
        return Feedback(
            target, aspects={a: (p - 1) / (scale - 1) for a, p in points.items()}, **fields
        )
    return _marks(form, shown[0], fields)


def _ranking(
    form: Mapping[str, str], shown: Sequence[Episode], fields: dict[str, Any]
) -> Comparison:
    places = [
        _whole(form, f"rank-{i}", 1, len(shown), f"Give conversation {LETTERS[i]} a rank.")
        for i in range(len(shown))
    ]
    tiers = [
        tuple(e.id for e, p in zip(shown, places, strict=True) if p == place)
        for place in sorted(set(places))
    ]
    if form.get("all_bad"):
        fields["details"]["all_bad"] = True
    return Comparison(shown[0].group, tuple(tiers), **fields)


def _marks(form: Mapping[str, str], episode: Episode, fields: dict[str, Any]) -> Feedback:
    turns: list[float | None] = []
    for k in range(len(episode.turns)):
        mark = form.get(f"turn-{k}", "")
        if mark not in ("", "good", "bad"):
            raise FormError(
                f"turn-{k}", f"A reply is good, bad, or left unmarked, not {mark[:20]!r}."
            )
        turns.append({"good": 1.0, "bad": -1.0}.get(mark))
    wrong = form.get("first_wrong", "")
    if wrong not in ("", "none"):
        first = _whole(form, "first_wrong", 0, len(turns) - 1, "Choose one of the replies.")
        if turns[first] == 1.0:
            raise FormError(
                "first_wrong",
                f"Reply {first + 1} is marked good, and as the one where it went wrong.",
            )
        turns[first] = -1.0
        fields["details"]["first_wrong"] = first
    elif wrong == "none":
        fields["details"]["first_wrong"] = None
        turns = [0.0 if t is None else t for t in turns]  # looked at, with nothing to mark
    if all(t is None for t in turns):
        raise FormError("first_wrong", "Mark at least one reply, or say that nothing went wrong.")
    return Feedback(episode.id, turn_scores=tuple(turns), **fields)


def _whole(form: Mapping[str, str], field: str, low: int, high: int, missing: str) -> int:
    text = form.get(field, "").strip()
    if not text:
        raise FormError(field, missing)
    try:
        value = int(text) if len(text) < 8 and text.isascii() else None
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise FormError(field, f"{field} must be a whole number from {low} to {high}.")
    return value


def common(episodes: Sequence[Episode]) -> int:
    """Returns the number of messages that all of them begin with."""
    conversations = [e.messages for e in episodes]
    same = 0
    while (
        all(len(m) > same for m in conversations)
        and len({(m[same].role, m[same].content) for m in conversations}) == 1
    ):
        same += 1
    return same


def known(answer: Feedback | Comparison, shown: Sequence[Episode] = ()) -> dict[str, Any]:
    """Returns an answer in the form of a known one: {"ranking": tiers}, {"score": number}, or
    {"first_wrong": turn, or None}.

    Args:
        answer: the one that is taken for right.
        shown: the conversations it is about, of which those that are ranked apart must differ.

    Raises:
        ValueError: no answer could disagree with it, or it does not hold enough.
    """
    if isinstance(answer, Comparison):
        if len(answer.ranking) < 2:
            raise ValueError("an answer in which all are equal cannot be gold")
        contents = {e.id: tuple((m.role, m.content) for m in e.messages) for e in shown}
        tiers = [{contents[e] for e in tier if e in contents} for tier in answer.ranking]
        if any(one & other for i, one in enumerate(tiers) for other in tiers[i + 1 :]):
            raise ValueError(
                "conversations with the same words cannot be told apart by a rater: they cannot"
                " be gold"
            )
        return {"ranking": [sorted(tier) for tier in answer.ranking]}
    if answer.turn_scores is None:
        numbers = [answer.score] if answer.score is not None else list(answer.aspects.values())
        points = [p for p in numbers if p is not None]
        if any(not 0 <= p <= 1 for p in points):
            raise ValueError(
                f"scores that are gold lie in 0 (worst) to 1 (best), got {max(points, key=abs):g}:"
                " bring other scales there first, such as (stars - 1) / 4"
            )
        mean = sum(points) / len(points) if points else 0.5
        if abs(mean - 0.5) < 1e-9:
            raise ValueError("a score in the middle cannot be gold")
        return {"score": mean}
    if "first_wrong" in answer.details:
        return {"first_wrong": answer.details["first_wrong"]}
    marks = answer.turn_scores
    if any(m not in (None, -1, 0, 1) for m in marks):
        raise ValueError(
            "marks that are gold are -1, 0 or 1, or true and false: other numbers do not tell"
            " which of them are bad"
        )
    if any(m is not None and m < 0 for m in marks):
        return {"first_wrong": next(k for k, m in enumerate(marks) if m is not None and m < 0)}
    if any(m is not None and m > 0 for m in marks):  # labels: true and false
        return {"first_wrong": next((k for k, m in enumerate(marks) if m == 0), None)}
    raise ValueError("marks that do not say whether and where it went wrong cannot be gold")


def agrees(answer: Feedback | Comparison, gold: Mapping[str, Any]) -> bool:
    """Returns whether an answer to a gold item is right: two thirds of the pairs ordered as they
    should be, points on the right half, the right turn.

    Args:
        answer: the rater's.
        gold: as `known` returns it.
    """
    if answer.status != "scored":
        return False
    if isinstance(answer, Comparison):
        place = {e: i for i, tier in enumerate(answer.ranking) for e in tier}
        tiers = gold["ranking"]
        pairs = [
            (a, b)
            for i, tier in enumerate(tiers)
            for a in tier
            for lower in tiers[i + 1 :]
            for b in lower
        ]
        return sum(place[a] < place[b] for a, b in pairs) >= 2 / 3 * len(pairs)
    if "first_wrong" in gold:
        try:
            # A rater who marks the right reply as bad has found it, chosen as the first or not.
            return known(answer) == gold
        except ValueError:
            return False
    mean = sum(answer.aspects.values()) / len(answer.aspects)
    return (mean - 0.5) * (gold["score"] - 0.5) > 0
