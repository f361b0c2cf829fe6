"""Comparisons as preferences: how raters agree with one another and with a known truth, and the files that others read and write.

A file in the conversational preference format has one JSON object per line: `prompt`, `chosen` and `rejected` are lists of
`{role, content}`; `prompt` is what both conversations begin with and may be left out. Optional: `margin` (how much better),
`probability` (how sure, 0.5 to 1), `rater`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from .episode import Episode, Message, Start, Turn, derive_id
from .feedback import Comparison, Feedback, Stamp

IMPORTED = "imported"  # the environment, the source and the rater of what was played and compared elsewhere


class PreferenceError(ValueError):
    """A file of preferences, or a comparison, that cannot be used. The message says where."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What all raters together said of two episodes of a group.

    Attributes:
        first, second: their ids.
        probability: mean over the raters of how sure they are that the first is better; a tie is 0.5.
        margin: mean of the raters' grades, where they gave any; 0 otherwise.
        raters: how many there were.
    """

    first: str
    second: str
    probability: float
    margin: float
    raters: int


def opinion(comparison: Comparison, first: str, second: str) -> float | None:
    """How sure a rater is that the first episode is better: 1, 0, 0.5 for a tie, or their own probability. None: not compared."""
    place = {episode: tier for tier, episodes in enumerate(comparison.ranking) for episode in episodes}
    if first not in place or second not in place:
        return None
    if place[first] == place[second]:
        return 0.5
    sure = 1.0 if comparison.probability is None else comparison.probability
    return sure if place[first] < place[second] else 1 - sure


def pairs(comparisons: Iterable[Comparison]) -> list[Pair]:
    """Every pair of episodes that somebody compared, over all raters; the comparisons must be in force and scored."""
    said: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for comparison in comparisons:
        ranked = sorted(episode for tier in comparison.ranking for episode in tier)
        for a, b in combinations(ranked, 2):
            sure = opinion(comparison, a, b)
            if sure is not None:
                said.setdefault((a, b), []).append((sure, comparison.strength or 0.0))
    return [
        Pair(a, b, sum(p for p, _ in votes) / len(votes), sum(m for _, m in votes) / len(votes), len(votes))
        for (a, b), votes in said.items()
    ]


def rater_agreement(comparisons: Sequence[Comparison]) -> float | None:
    """The chance that two raters of one pair agree, over all pairs that two raters ordered strictly; None where none did.

    It is a ceiling: a model that knew the raters' common taste would agree with single raters no more often than they do with one
    another, up to their noise.
    """
    by_group: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        by_group.setdefault(comparison.group, []).append(comparison)
    agreed: list[float] = []
    for same in by_group.values():
        for one, other in combinations(same, 2):
            for a, b in combinations(sorted({e for tier in one.ranking for e in tier}), 2):
                first, second = opinion(one, a, b), opinion(other, a, b)
                if first is not None and second is not None and 0.5 not in (first, second):
                    agreed.append(float((first > 0.5) == (second > 0.5)))
    return sum(agreed) / len(agreed) if agreed else None


def truth_agreement(comparisons: Iterable[Comparison], truth: Mapping[str, float]) -> float | None:
    """How often a single rater orders two episodes as the truth does, over pairs that both order strictly; None where there are none.

    Args:
        truth: episode id to a known true outcome.
    """
    agreed: list[float] = []
    for comparison in comparisons:
        for a, b in combinations(sorted(e for tier in comparison.ranking for e in tier), 2):
            sure = opinion(comparison, a, b)
            if sure is not None and sure != 0.5 and truth[a] != truth[b]:
                agreed.append(float((sure > 0.5) == (truth[a] > truth[b])))
    return sum(agreed) / len(agreed) if agreed else None


# Files.


def export_pairs(episodes: Mapping[str, Episode], comparisons: Iterable[Comparison]) -> Iterator[dict[str, Any]]:
    """Comparisons as records of the conversational preference format, one per strictly ordered pair and rater.

    `prompt` is what both conversations begin with, up to and with the last message that is not the assistant's.
    """
    for comparison in comparisons:
        if comparison.status != "scored":
            continue
        for i, tier in enumerate(comparison.ranking):
            for better in tier:
                for worse in (e for lower in comparison.ranking[i + 1 :] for e in lower):
                    yield _record(episodes[better], episodes[worse], comparison)


def _record(better: Episode, worse: Episode, comparison: Comparison) -> dict[str, Any]:
    chosen, rejected = ([{"role": m.role, "content": m.content} for m in e.messages] for e in (better, worse))
    same = _common(chosen, rejected)
    record: dict[str, Any] = {"prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}
    if comparison.strength is not None:
        record["margin"] = comparison.strength
    if comparison.probability is not None:
        record["probability"] = comparison.probability
    return record | {"rater": comparison.stamp.rater or comparison.stamp.source}


def import_labels(path: Path, *, run: str, stage: str, update: int) -> tuple[list[Episode], list[Feedback]]:
    """A file in the unpaired preference format, `{prompt, completion, label}` per line, as episodes and feedback: score 1 for true, 0 for
    false.

    Args:
        run, stage, update: where they are recorded.

    Raises:
        PreferenceError: a line that is no such record; the message names it.
    """
    episodes: list[Episode] = []
    said: list[Feedback] = []
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    for number, where, record in _records(path):
        try:
            prompt = _messages(record.get("prompt") or [], where, "prompt")
            talk, label = [*prompt, *_messages(record["completion"], where, "completion")], record["label"]
        except (KeyError, AttributeError) as error:
            raise PreferenceError(f"{where} needs `completion`, a list of {{role, content}}, and `label`") from error
        if not isinstance(label, bool):
            raise PreferenceError(f"{where}: `label` must be true (liked) or false, got {label!r}")
        start = Start(IMPORTED, number % 2**32, {"file": content})
        id_ = derive_id(run, stage, update, start.key, 0)
        episodes.append(_episode(talk, Episode(id_, start, (), "terminated", run=run, stage=stage, update=update), where))
        stamp = Stamp(source=IMPORTED, rater=str(record.get("rater", IMPORTED)))
        said.append(Feedback(id_, score=float(label), id=derive_id("label", id_), stamp=stamp))
    if not said:
        raise PreferenceError(f"{path} holds no record")
    return episodes, said


def import_pairs(path: Path, *, run: str, stage: str, update: int) -> tuple[list[Episode], list[Comparison]]:
    """A file in the conversational preference format as episodes and comparisons.

    Conversations that begin alike, up to the first reply, form a group, whatever lines they stand on; one that stands on several lines
    is one episode.

    Args:
        run, stage, update: where they are recorded.

    Raises:
        PreferenceError: a line that is no such pair; the message names it.
    """
    episodes: dict[str, Episode] = {}
    comparisons: list[Comparison] = []
    members: dict[str, dict[str, str]] = {}  # per start: a conversation's content to its episode's id
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    for number, where, record in _records(path):
        try:
            prompt = _messages(record.get("prompt") or [], where, "prompt")
            talks = [[*prompt, *_messages(record[key], where, key)] for key in ("chosen", "rejected")]
        except (KeyError, AttributeError) as error:
            raise PreferenceError(
                f"{where} needs `chosen` and `rejected`, lists of {{role, content}}; for kto, `completion` and `label` do too"
            ) from error
        opening = derive_id([[m.role, m.content] for m in talks[0][: _common(*talks)]])
        start = Start(IMPORTED, int(opening[:8], 16), {"file": content, "prompt": opening})
        own = members.setdefault(opening, {})
        pair = []
        for talk in talks:
            said = derive_id([[m.role, m.content] for m in talk])
            if said not in own:
                id_, slot = derive_id(run, stage, update, start.key, len(own)), len(own)
                shell = Episode(id_, start, (), "terminated", run=run, stage=stage, update=update, slot=slot)
                episodes[id_] = _episode(talk, shell, where)
                own[said] = id_
            pair.append(episodes[own[said]])
        try:
            comparison = Comparison(
                pair[0].group, tuple((e.id,) for e in pair), strength=record.get("margin"),
                probability=record.get("probability"), id=derive_id("imported", pair[0].group, number, update),
                stamp=Stamp(source=IMPORTED, rater=str(record.get("rater", IMPORTED))),
            )  # fmt: skip
        except ValueError as error:
            raise PreferenceError(f"{where}: {error}") from error
        if comparison.probability is not None and not 0.5 <= comparison.probability <= 1:
            raise PreferenceError(f"{where}: probability must lie in 0.5 to 1, got {comparison.probability}")
        comparisons.append(comparison)
    if not comparisons:
        raise PreferenceError(f"{path} holds no pair")
    return list(episodes.values()), comparisons


def _records(path: Path) -> Iterator[tuple[int, str, Any]]:
    """(line number, where that is, what stands there) of a file with one JSON value per line."""
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield number, where, json.loads(line)
                except json.JSONDecodeError as error:
                    raise PreferenceError(f"{where} is not JSON: {error}") from error


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many messages two conversations begin with alike, up to the first reply: what they started from."""
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        message = first[same]
        if (message["role"] if isinstance(message, Mapping) else message.role) == "assistant":
            break
        same += 1
    return same


def _messages(value: Any, where: str, key: str) -> list[Message]:
    if isinstance(value, str):
        raise PreferenceError(
            f"{where}: `{key}` is a text; conversations are needed, lists of {{role, content}} (for one reply: "
            '[{"role": "assistant", "content": "..."}])'
        )
    said = []
    for m in value:
        if not isinstance(m, Mapping) or not isinstance(m.get("content"), str):
            raise PreferenceError(f"{where}: every message of `{key}` must be {{role, content}} with a text, got {m!r}")
        if m.get("role") not in ("system", "user", "assistant", "tool"):
            raise PreferenceError(
                f"{where}: `{key}` has the role {m.get('role')!r}; there are system, user, assistant and tool"
            )
        said.append(Message(m["role"], m["content"]))
    return said


def _episode(talk: Sequence[Message], shell: Episode, where: str) -> Episode:
    """A written conversation as an episode whose turns nobody here sampled."""
    system = talk[0].content if talk and talk[0].role == "system" else None
    rest = list(talk[1:] if system is not None else talk)
    turns = []
    while len(rest) >= 2:
        heard, reply, *rest = rest
        if heard.role not in ("user", "tool") or reply.role != "assistant":
            raise PreferenceError(f"{where}: after the system prompt, roles must alternate, somebody else and the assistant")
        turns.append(Turn(heard, reply.content, 0.0))
    if not turns or (rest and rest[0].role not in ("user", "tool")):
        raise PreferenceError(f"{where}: each conversation needs a message and the assistant's reply to it, in turn")
    return dataclasses.replace(shell, turns=tuple(turns), system=system, final=rest[0] if rest else None)
