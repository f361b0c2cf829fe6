"""Reads files of other tools: recognises a record's format by its content, and makes episodes and
answers of it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import PreferenceError
from ..records.episode import Episode, Start, Turn
from ..records.feedback import Comparison, Feedback, Stamp
from ..util.ids import derive_id
from .argilla import argilla, is_argilla
from .label_studio import is_label_studio, label_studio
from .questions import Answers, Questions, text_questions
from .records import (
    IMPORTED,
    Messages,
    Ranked,
    Scored,
    Unread,
    check_keys,
    is_transcript,
    messages,
    number,
    rows,
    schemas,
    transcript,
    with_system,
)

KNOWN = (
    "pairs `{prompt, chosen, rejected}` with lists of {role, content}, transcripts `{chosen,"
    " rejected}` with texts of Human and Assistant, labels `{prompt, completion, label}`, steps"
    " `{prompt, completions, labels}`, records of Argilla (`fields` and `responses`, or flat with"
    " `<question>.responses`), and tasks of Label Studio's JSON export (`data` and `annotations`)"
)


class Imported(NamedTuple):
    """The conversations of a file, and the feedback on them."""

    episodes: list[Episode]
    comparisons: list[Comparison]
    scores: list[Feedback]


def read_records(path: Path) -> list[Ranked | Scored]:
    """Reads the rankings and scores of a file, whatever its format. Conversations of a ranking that
    are equal word for word are tied there.

    Raises:
        PreferenceError: a record that cannot be understood; the message names it and says what was
            expected.
    """
    understood: list[Ranked | Scored | Answers] = []
    questions, unread = Questions(text_questions(path)), Unread()
    for where, record in rows(path):
        understood += _read(record, where, questions, unread)
    questions.decide(path)
    found = [
        _tied(one)
        for each in understood
        for one in (questions.records(each) if isinstance(each, Answers) else (each,))
    ]
    if not found:
        raise PreferenceError(f"{path} holds no pair, no label and no submitted answer")
    unread.warn(path)
    return found


def _read(
    record: Any, where: str, questions: Questions, unread: Unread
) -> Iterator[Ranked | Scored | Answers]:
    if not isinstance(record, Mapping):
        raise PreferenceError(
            f"{where} is no record but {type(record).__name__}; known are {KNOWN}"
        )
    if is_label_studio(record):
        yield from label_studio(record, where, questions, unread)
    elif is_argilla(record):
        yield from argilla(record, where, questions, unread)
    else:
        yield _row(
            {key: value for key, value in record.items() if value is not None}, where, unread
        )  # tables fill up with None


def _row(record: Mapping[str, Any], where: str, unread: Unread) -> Ranked | Scored:
    """Reads a row of one of TRL's dataset types, or of HH-RLHF."""
    if isinstance(record.get("data"), Mapping) and "completions" in record:
        raise PreferenceError(
            f"{where} is a task of Label Studio before 1.0 (`completions`); export it from 1.0 on"
            " (`annotations`)"
        )
    if isinstance(record.get("fields"), Mapping) and "responses" in record:
        raise PreferenceError(
            f"{where} is a record of Argilla 1 (`responses` as a list); load the data into Argilla"
            " 2 and export it with its client"
        )
    if "chosen" in record or "rejected" in record:
        parsed: Ranked | Scored = _pair(record, where, unread)
    elif "completions" in record:
        parsed = _steps(record, where, unread)
    elif "completion" in record:
        parsed = _label(record, where, unread)
    else:
        hint = " (of Label Studio export JSON, not JSON-MIN)" if "annotation_id" in record else ""
        raise PreferenceError(
            f"{where} is of no known format{hint}: it has {', '.join(map(str, record))}; known are"
            f" {KNOWN}"
        )
    rater = IMPORTED if record.get("rater") in (None, "") else str(record["rater"])  # 0 is an id
    system, tools = record.get("system"), schemas(record.get("tools"), where)
    if isinstance(parsed, Ranked):
        talks = tuple(with_system(conversation, system, where) for conversation in parsed.talks)
        return dataclasses.replace(parsed, talks=talks, tools=tools, rater=rater)
    return dataclasses.replace(
        parsed, messages=with_system(parsed.messages, system, where), tools=tools, rater=rater
    )


def _pair(record: Mapping[str, Any], where: str, unread: Unread) -> Ranked:
    scores: tuple[str, ...] = next(
        (names for names in SCORES if all(name in record for name in names)), ()
    )
    sides = ("chosen", "rejected")
    # UltraFeedback's `messages` is the chosen conversation again
    again = ("messages",) if record.get("messages") == record.get("chosen") else ()
    check_keys(
        record,
        ("prompt", *sides, "margin", "probability", "rater", "system", "tools", *scores, *again),
        where,
        unread,
    )
    if not all(key in record for key in sides):
        raise PreferenceError(
            f"{where} needs `chosen` and `rejected`, lists of {{role, content}}, or transcripts"
        )
    prompt = record.get("prompt")
    if any(is_transcript(record[key]) for key in sides):
        talks = tuple(_transcript(record[key], prompt or "", where, key) for key in sides)
    else:
        talks = tuple(messages(record[key], where, key, unread) for key in sides)
        # a text with which the whole conversations begin anyway is no second prompt
        if not (
            isinstance(prompt, str)
            and all(
                prompt in [m.content for m in conversation if m.role == "user"][:1]
                for conversation in talks
            )
        ):
            begun = messages(prompt or [], where, "prompt", unread)
            talks = tuple((*begun, *conversation) for conversation in talks)
    margin, probability = (number(record.get(key), where, key) for key in ("margin", "probability"))
    if probability is not None and not 0.5 <= probability <= 1:
        raise PreferenceError(
            f"{where}: probability must lie in 0.5 to 1, got {probability}; below, the rejected one"
            " is preferred"
        )
    if margin is not None and margin < 0:
        raise PreferenceError(
            f"{where}: `margin` must be at least 0, got {margin}; below, the rejected one is"
            " preferred"
        )
    given = {name: number(record[name], where, name) or 0.0 for name in scores}
    apart = given[scores[0]] - given[scores[1]] if scores else 1.0
    if apart < 0:
        raise PreferenceError(
            f"{where}: the rejected one has the higher score, {given}: which is preferred? Mend it"
            " or leave it out"
        )
    if apart == 0 and ((margin or 0) > 0 or (probability or 0.5) > 0.5):
        raise PreferenceError(
            f"{where}: the scores are equal, {given}, and `margin` or `probability` says that one"
            " is better: mend it or leave it out"
        )
    if apart == 0:
        return Ranked(where, talks, ((0, 1),), details=given)
    return Ranked(
        where, talks, ((0,), (1,)), strength=margin, probability=probability, details=given
    )


SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"), ("rating_chosen", "rating_rejected"),
)  # fmt: skip


def _transcript(value: Any, prompt: Any, where: str, key: str) -> Messages:
    if not is_transcript(value):
        raise PreferenceError(
            f"{where}: `{key}` is no whole conversation of Human and Assistant, and the other side"
            f" is; got {value!r}"
        )
    if not isinstance(prompt, str) or not value.startswith(prompt):
        raise PreferenceError(
            f"{where}: transcripts are whole conversations, but these do not begin with `prompt`"
        )
    return transcript(value)


def _label(record: Mapping[str, Any], where: str, unread: Unread) -> Scored:
    check_keys(record, ("prompt", "completion", "label", "rater", "system", "tools"), where, unread)
    begun = messages(record.get("prompt", []), where, "prompt", unread)
    conversation = begun + messages(record["completion"], where, "completion", unread)
    label = record.get("label")
    if not isinstance(label, bool):
        raise PreferenceError(f"{where}: `label` must be true (liked) or false, got {label!r}")
    return Scored(where, conversation, float(label))


def _steps(record: Mapping[str, Any], where: str, unread: Unread) -> Scored:
    """Returns steps as turns: those of our own export as they were played, others as replies with
    no message between them."""
    whole = "messages" in record and isinstance(record.get("turn_scores"), list)
    more = ("messages", "turn_scores") if whole else ()
    check_keys(
        record,
        ("prompt", "completions", "labels", "rater", "system", "tools", *more),
        where,
        unread,
    )
    if whole:
        scores = tuple(number(score, where, "turn_scores") for score in record["turn_scores"])
        return Scored(
            where, messages(record["messages"], where, "messages", unread), turn_scores=scores
        )
    prompt, steps, labels = record.get("prompt"), record["completions"], record.get("labels")
    if isinstance(steps, list) and steps and all(isinstance(step, Mapping) for step in steps):
        raise PreferenceError(
            f"{where}: `completions` are records, as in raw UltraFeedback: pairs or labels must be"
            " made of them first ({prompt, chosen, rejected}, or {prompt, completion, label})"
        )
    if not isinstance(prompt, str) or is_transcript(f"{prompt}\n\nHuman:"):
        raise PreferenceError(
            f"{where}: `prompt` must be a text; steps of a conversation need the columns `messages`"
            " and `turn_scores` besides"
        )
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels):
        raise PreferenceError(f"{where}: `completions` and `labels` must be lists of one length")
    if not all(isinstance(s, str) for s in steps) or not all(isinstance(x, bool) for x in labels):
        raise PreferenceError(f"{where}: `completions` must be texts, and `labels` true or false")
    written = [{"role": "user", "content": prompt}]
    for k, step in enumerate(steps):
        written += [{"role": "user", "content": ""}] if k else []
        written.append({"role": "assistant", "content": step})
    return Scored(
        where,
        messages(written, where, "completions", unread),
        turn_scores=tuple(map(float, labels)),
    )


def _tied(record: Ranked | Scored) -> Ranked | Scored:
    """Removes preferences of a text over itself: tiers that hold equal conversations become one,
    with all between them."""
    if isinstance(record, Scored) or len(set(record.talks)) == len(record.talks):
        return record
    tiers = list(record.tiers)
    for conversation in set(record.talks):
        at = [
            t for t, tier in enumerate(tiers) if any(record.talks[i] == conversation for i in tier)
        ]
        if len(at) > 1:
            tiers[at[0] : at[-1] + 1] = [
                tuple(i for tier in tiers[at[0] : at[-1] + 1] for i in tier)
            ]
    if len(tiers) > 1:
        return dataclasses.replace(record, tiers=tuple(tiers))
    return dataclasses.replace(record, tiers=tuple(tiers), strength=None, probability=None)


def import_data(path: Path, *, run: str, stage: str, update: int) -> Imported:
    """Returns a file's conversations as episodes, its rankings as comparisons, its labels and
    ratings as feedback.

    Conversations that begin alike, up to the first reply, form a group, whatever records they stand
    in; one that stands in several records is one episode. Two equal conversations of one ranking
    are two. A ranking of conversations that began differently is a group of its own.

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
    apart: list[str] = []
    for n, record in enumerate(records, 1):
        talks = record.talks if isinstance(record, Ranked) else (record.messages,)
        opening = _opening(talks, record.tools)
        start = Start(IMPORTED, int(opening[:8], 16), {"file": content, "prompt": opening})
        own = members.setdefault(opening, {})
        ids: list[str] = []
        for i, conversation in enumerate(talks):
            key = (
                derive_id([[m.role, m.content] for m in conversation]),
                talks[:i].count(conversation),
            )
            if key not in own:
                own[key] = derive_id(run, stage, update, start.key, len(own))
                shell = Episode(
                    own[key], start, (), "terminated", run=run, stage=stage, update=update,
                    slot=len(own) - 1, tools=record.tools,
                )  # fmt: skip
                episodes[own[key]] = _episode(conversation, shell, record.where)
            ids.append(own[key])
        try:
            if isinstance(record, Ranked):
                comparisons.append(_comparison(record, episodes[ids[0]].group, ids, n, update))
            else:
                scores.append(_rating(record, episodes[ids[0]], n))
        except (TypeError, ValueError) as error:
            raise PreferenceError(f"{record.where}: {error}") from error
        apart += (
            [record.where]
            if isinstance(record, Ranked) and not shares_opening([episodes[id_] for id_ in ids])
            else []
        )
    if apart:
        warnings.warn(
            f"{path}: {len(apart)} rankings (the first at {apart[0]}) compare conversations that"
            " began differently; they say nothing of which reply is better, and are starts of"
            " their own",
            stacklevel=2,
        )
    return Imported(list(episodes.values()), comparisons, scores)


def _comparison(record: Ranked, group: str, ids: Sequence[str], n: int, update: int) -> Comparison:
    """Returns a ranking as a comparison of episodes.

    Args:
        ids: the episode of each of its conversations.
        n: the record's number in the file.
    """
    return Comparison(
        group,
        tuple(tuple(ids[i] for i in tier) for tier in record.tiers),
        strength=record.strength,
        probability=record.probability,
        aspect=record.aspect,
        details=record.details,
        id=derive_id("imported", group, n, update),
        stamp=Stamp(source=IMPORTED, rater=record.rater),
    )


def _rating(record: Scored, episode: Episode, n: int) -> Feedback:
    """Returns a label or rating as feedback on its episode; `n` is the record's number in the
    file."""
    turns = len(episode.turns)
    if record.turn_scores is not None and len(record.turn_scores) != turns:
        raise ValueError(f"{len(record.turn_scores)} turn scores for {turns} replies")
    return Feedback(
        episode.id,
        score=record.score,
        turn_scores=record.turn_scores,
        aspects=record.aspects,
        details=record.details,
        id=derive_id("label", episode.id, n),
        stamp=Stamp(source=IMPORTED, rater=record.rater),
    )


def _digest(record: Ranked | Scored) -> str:
    """Returns a digest of a record's content; the same wherever it stands."""
    try:
        return derive_id(dataclasses.asdict(record) | {"where": ""})
    except (TypeError, ValueError, RecursionError) as error:
        raise PreferenceError(f"{record.where}: {error}") from error


def _opening(talks: Sequence[Messages], tools: Sequence[Mapping[str, Any]]) -> str:
    """Returns the messages before the first reply, which conversations started from. Where they
    differ, all their openings together."""
    openings = {
        derive_id(
            [[m.role, m.content] for m in takewhile(lambda m: m.role != "assistant", conversation)]
        )
        for conversation in talks
    }
    opening = openings.pop() if len(openings) == 1 else derive_id(sorted(openings))
    return derive_id(opening, list(tools)) if tools else opening


def shares_opening(episodes: Sequence[Episode]) -> bool:
    """Returns whether conversations are answers to the same: they began with the same words."""
    return len({(e.system, e.turns[0].observation) for e in episodes}) == 1


def _episode(conversation: Messages, shell: Episode, where: str) -> Episode:
    """Returns a written conversation as an episode whose turns were not sampled here."""
    system = conversation[0].content if conversation and conversation[0].role == "system" else None
    rest = list(conversation[1:] if system is not None else conversation)
    turns = []
    while len(rest) >= 2:
        observation, reply, *rest = rest
        if observation.role not in ("user", "tool") or reply.role != "assistant":
            raise PreferenceError(
                f"{where}: after the system prompt, messages of the user or a tool must alternate"
                " with the assistant's"
            )
        turns.append(Turn(observation, reply.content, 0.0))
    if not turns or (rest and rest[0].role not in ("user", "tool")):
        raise PreferenceError(
            f"{where}: each conversation needs a message and the assistant's reply to it, in turn"
        )
    return dataclasses.replace(
        shell, turns=tuple(turns), system=system, final=rest[0] if rest else None
    )
