"""Reads what others wrote: tells a record's format by its content, and makes episodes and answers of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..episode import Episode, Start, Turn, derive_id
from ..feedback import Comparison, Feedback, Stamp
from ..preferences import PreferenceError
from .records import IMPORTED, Ranked, Scored, Talk, is_transcript, messages, rows, transcript
from .tools import Questions, argilla, is_argilla, is_label_studio, label_studio

KNOWN = (
    "pairs `{prompt, chosen, rejected}` with lists of {role, content}, transcripts `{chosen, rejected}` with texts of Human and Assistant, "
    "labels `{prompt, completion, label}`, steps `{prompt, completions, labels}`, records of Argilla (`fields` and `responses`, or flat "
    "with `<question>.responses`), and tasks of Label Studio's JSON export (`data` and `annotations`)"
)


class Imported(NamedTuple):
    """What a file holds: conversations, and what was said of them."""

    episodes: list[Episode]
    comparisons: list[Comparison]
    scores: list[Feedback]


def read_records(path: Path) -> list[Ranked | Scored]:
    """What somebody said in a file, whatever its format.

    Raises:
        PreferenceError: a record that cannot be understood; the message names it and says what was expected.
    """
    found: list[Ranked | Scored] = []
    questions = Questions()
    for where, record in rows(path):
        found += _read(record, where, questions)
    questions.check()
    if not found:
        raise PreferenceError(f"{path} holds no pair, no label and no answer that somebody submitted")
    return found


def _read(record: Any, where: str, questions: Questions) -> Iterator[Ranked | Scored]:
    if not isinstance(record, Mapping):
        raise PreferenceError(f"{where} is no record but {type(record).__name__}; known are {KNOWN}")
    if is_label_studio(record):
        yield from label_studio(record, where, questions)
    elif is_argilla(record):
        yield from argilla(record, where, questions)
    else:
        yield _row({key: value for key, value in record.items() if value is not None}, where)  # tables fill up with None


def _row(record: Mapping[str, Any], where: str) -> Ranked | Scored:
    """A row of one of TRL's dataset types, or of HH-RLHF."""
    if "chosen" in record or "rejected" in record:
        return _pair(record, where)
    if "completions" in record:
        return _steps(record, where)
    if "completion" in record:
        return _label(record, where)
    hint = " (of Label Studio export JSON, not JSON-MIN)" if "annotation_id" in record else ""
    raise PreferenceError(f"{where} is of no known format{hint}: it has {', '.join(map(str, record))}; known are {KNOWN}")


def _pair(record: Mapping[str, Any], where: str) -> Ranked:
    if "chosen" not in record or "rejected" not in record:
        raise PreferenceError(f"{where} needs `chosen` and `rejected`, lists of {{role, content}}, or transcripts")
    if all(is_transcript(record[key]) for key in ("chosen", "rejected")):
        prompt = record.get("prompt", "")
        if not isinstance(prompt, str) or not all(record[key].startswith(prompt) for key in ("chosen", "rejected")):
            raise PreferenceError(f"{where}: transcripts are whole conversations, but these do not begin with `prompt`")
        talks = tuple(transcript(record[key]) for key in ("chosen", "rejected"))
    else:
        begun = messages(record.get("prompt", []), where, "prompt")
        talks = tuple((*begun, *messages(record[key], where, key)) for key in ("chosen", "rejected"))
    return Ranked(
        where, talks, ((0,), (1,)), _rater(record), strength=record.get("margin"), probability=record.get("probability")
    )  # fmt: skip


def _label(record: Mapping[str, Any], where: str) -> Scored:
    talk = messages(record.get("prompt", []), where, "prompt") + messages(record["completion"], where, "completion")
    label = record.get("label")
    if not isinstance(label, bool):
        raise PreferenceError(f"{where}: `label` must be true (liked) or false, got {label!r}")
    return Scored(where, talk, float(label), rater=_rater(record))


def _steps(record: Mapping[str, Any], where: str) -> Scored:
    """Steps as turns: those of our own export as they were played, others as replies with nothing said between them."""
    if "messages" in record and isinstance(record.get("turn_scores"), list):
        return Scored(
            where, messages(record["messages"], where, "messages"), turn_scores=tuple(record["turn_scores"]), rater=_rater(record)
        )  # fmt: skip
    prompt, steps, labels = record.get("prompt"), record["completions"], record.get("labels")
    if not isinstance(prompt, str) or is_transcript(f"{prompt}\n\nHuman:"):
        raise PreferenceError(
            f"{where}: `prompt` must be a text; steps of a conversation need the columns `messages` and `turn_scores` besides"
        )
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels):
        raise PreferenceError(f"{where}: `completions` and `labels` must be lists of one length")
    if not all(isinstance(s, str) for s in steps) or not all(isinstance(x, bool) for x in labels):
        raise PreferenceError(f"{where}: `completions` must be texts, and `labels` true or false")
    said = [{"role": "user", "content": prompt}]
    for k, step in enumerate(steps):
        said += [{"role": "user", "content": ""}] if k else []
        said.append({"role": "assistant", "content": step})
    return Scored(where, messages(said, where, "completions"), turn_scores=tuple(map(float, labels)), rater=_rater(record))


def _rater(record: Mapping[str, Any]) -> str:
    return str(record.get("rater") or IMPORTED)


def import_data(path: Path, *, run: str, stage: str, update: int) -> Imported:
    """A file's conversations as episodes, its rankings as comparisons, its labels and ratings as feedback.

    Conversations that begin alike, up to the first reply, form a group, whatever records they stand in; one that stands in several
    records is one episode. Two equal conversations of one ranking are two.

    Args:
        run, stage, update: where they are recorded.

    Raises:
        PreferenceError: a record that cannot be understood; the message names it.
    """
    records = read_records(path)
    content = derive_id([_digest(record) for record in records])
    episodes: dict[str, Episode] = {}
    members: dict[
        str, dict[tuple[str, int], str]
    ] = {}  # per start: a conversation's content, and which of equal ones, to its id
    comparisons: list[Comparison] = []
    scores: list[Feedback] = []
    for number, record in enumerate(records, 1):
        talks = record.talks if isinstance(record, Ranked) else (record.talk,)
        opening = derive_id([[m.role, m.content] for m in talks[0][: common(talks)]])
        start = Start(IMPORTED, int(opening[:8], 16), {"file": content, "prompt": opening})
        own = members.setdefault(opening, {})
        ids: list[str] = []
        for i, talk in enumerate(talks):
            key = derive_id([[m.role, m.content] for m in talk]), talks[:i].count(talk)
            if key not in own:
                own[key] = derive_id(run, stage, update, start.key, len(own))
                shell = Episode(own[key], start, (), "terminated", run=run, stage=stage, update=update, slot=len(own) - 1)
                episodes[own[key]] = _episode(talk, shell, record.where)
            ids.append(own[key])
        stamp = Stamp(source=IMPORTED, rater=record.rater)
        try:
            if isinstance(record, Ranked):
                if record.probability is not None and not 0.5 <= record.probability <= 1:
                    raise ValueError(f"probability must lie in 0.5 to 1, got {record.probability}")
                group = episodes[ids[0]].group
                comparisons.append(
                    Comparison(
                        group,
                        tuple(tuple(ids[i] for i in tier) for tier in record.tiers),
                        strength=record.strength,
                        probability=record.probability,
                        aspect=record.aspect,
                        details=record.details,
                        id=derive_id("imported", group, number, update),
                        stamp=stamp,
                    )
                )
            else:
                turns = len(episodes[ids[0]].turns)
                if record.turn_scores is not None and len(record.turn_scores) != turns:
                    raise ValueError(f"{len(record.turn_scores)} turn scores for {turns} replies")
                scores.append(
                    Feedback(
                        ids[0],
                        score=record.score,
                        turn_scores=record.turn_scores,
                        aspects=record.aspects,
                        details=record.details,
                        id=derive_id("label", ids[0], number),
                        stamp=stamp,
                    )
                )
        except (TypeError, ValueError) as error:
            raise PreferenceError(f"{record.where}: {error}") from error
    return Imported(list(episodes.values()), comparisons, scores)


def _digest(record: Ranked | Scored) -> str:
    """Of what a record says; the same wherever it stands."""
    try:
        return derive_id(dataclasses.asdict(record) | {"where": ""})
    except (TypeError, ValueError, RecursionError) as error:
        raise PreferenceError(f"{record.where}: {error}") from error


def common(talks: tuple[Talk, ...]) -> int:
    """How many messages conversations begin with alike, up to the first reply: what they started from."""
    same = 0
    while all(same < len(talk) and talk[same] == talks[0][same] and talk[same].role != "assistant" for talk in talks):
        same += 1
    return same


def _episode(talk: Talk, shell: Episode, where: str) -> Episode:
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
