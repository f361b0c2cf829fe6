"""Writes the contents of a ledger as rows of TRL's dataset types.

Every row of a file has the same keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysis.preferences import liked
from ..errors import PreferenceError
from ..records.episode import Episode, Message
from ..records.feedback import Comparison, Feedback
from ..util.suggest import install

FORMATS = ("pairs", "unpaired", "stepwise")
_SPEAKERS = {"user": "Human", "tool": "Tool", "assistant": "Assistant"}


def export_pairs(
    episodes: Mapping[str, Episode], comparisons: Iterable[Comparison]
) -> list[dict[str, Any]]:
    """Returns comparisons as rows `{prompt, chosen, rejected, rater}`, one per strictly ordered
    pair and rater.

    `prompt` is what both conversations begin with, up to and with a message that is not the
    assistant's; what follows the last reply is left out, and so are pairs that have no message in
    common. Where some raters gave a grade or a probability, every row has `margin` or
    `probability`: 0 and 1 where none was given.
    """
    found: list[tuple[dict[str, Any], Comparison]] = []
    for comparison in comparisons:
        if comparison.status != "scored":
            continue
        for i, tier in enumerate(comparison.ranking):
            for better in tier:
                for worse in (e for lower in comparison.ranking[i + 1 :] for e in lower):
                    chosen, rejected = _messages(episodes[better]), _messages(episodes[worse])
                    if same := _prompt(chosen, rejected):
                        row: dict[str, Any] = {
                            "prompt": _plain(chosen[:same]),
                            "chosen": _plain(chosen[same:]),
                            "rejected": _plain(rejected[same:]),
                        }
                        found.append((row, comparison))
    graded = any(c.strength is not None for _, c in found)
    unsure = any(c.probability is not None for _, c in found)
    for row, comparison in found:
        if graded:
            row["margin"] = comparison.strength or 0.0
        if unsure:
            row["probability"] = 1.0 if comparison.probability is None else comparison.probability
        row["rater"] = _rater(comparison)
    return [row for row, _ in found]


def export_unpaired(
    episodes: Mapping[str, Episode],
    scores: Iterable[Feedback],
    comparisons: Iterable[Comparison],
    threshold: float | None,
) -> Iterator[dict[str, Any]]:
    """Returns scores of whole conversations as rows `{prompt, completion, label, rater}`, one per
    rater: true from the threshold on. Aspects count as their mean.

    Of conversations without a score, the first tier of a ranking is true and its last false.

    Raises:
        PreferenceError: a score that is no label, and no threshold.
    """
    labels: list[tuple[str, bool, str]] = []
    for answer in scores:
        value = answer.score  # where only aspects were scored, their mean
        if value is None and answer.aspects:
            value = sum(answer.aspects.values()) / len(answer.aspects)
        if answer.status == "scored" and value is not None:
            labels.append((answer.episode, liked(value, threshold), _rater(answer)))
    scored = {episode for episode, *_ in labels}
    for comparison in comparisons:
        if comparison.status == "scored" and len(comparison.ranking) > 1:
            for tier, label in ((comparison.ranking[0], True), (comparison.ranking[-1], False)):
                labels += [(e, label, _rater(comparison)) for e in tier if e not in scored]
    for id_, label, rater in labels:
        conversation = _messages(episodes[id_])
        same = _prompt(conversation, conversation[: _replies(conversation)[0] + 1])
        yield {
            "prompt": _plain(conversation[:same]),
            "completion": _plain(conversation[same:]),
            "label": label,
            "rater": rater,
        }


def export_stepwise(
    episodes: Mapping[str, Episode], scores: Iterable[Feedback], threshold: float | None
) -> Iterator[dict[str, Any]]:
    """Returns turn scores as rows `{prompt, completions, labels}`, one per conversation and rater:
    a step is the conversation up to and with the next reply that was scored, in the notation of
    HH-RLHF, and its label is that of this reply. `messages` and `turn_scores` have it exactly.

    Raises:
        PreferenceError: a score that is no label, and no threshold.
    """
    for answer in scores:
        if answer.status != "scored" or answer.turn_scores is None:
            continue
        conversation = _messages(episodes[answer.episode])
        turns = len(episodes[answer.episode].turns)
        ends = _replies(conversation)[-turns:]  # a prompt may hold earlier ones
        if len(ends) != len(answer.turn_scores):
            raise PreferenceError(
                f"feedback {answer.id!r} has {len(answer.turn_scores)} turn scores for {len(ends)}"
                " replies"
            )
        marked = [
            (end, score)
            for end, score in zip(ends, answer.turn_scores, strict=True)
            if score is not None
        ]
        if not marked:
            continue
        text = [
            m.content if m.role == "system" else f"\n\n{_SPEAKERS[m.role]}: {m.content}"
            for m in conversation
        ]
        first = ends[0]
        # Belongs to the prompt: the policy was asked, and the first step is its answer.
        lead = "\n\nAssistant:"
        text[first] = text[first].removeprefix(lead)
        starts = [first, *(end + 1 for end, _ in marked[:-1])]
        yield {
            "prompt": "".join(text[:first]) + lead,
            "completions": [
                "".join(text[a : end + 1]) for a, (end, _) in zip(starts, marked, strict=True)
            ],
            "labels": [liked(score, threshold) for _, score in marked],
            "messages": _plain(conversation),
            "turn_scores": list(answer.turn_scores),
            "rater": _rater(answer),
        }


def save(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Writes rows as JSON lines (a name that ends in .jsonl or .json) or as a `datasets` folder (a
    name without an ending).

    Raises:
        PreferenceError: another ending; `datasets` is missing; a text that a datasets folder cannot
            hold.
    """
    if out.suffix in (".jsonl", ".json"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("wb") as file:
            # A lone surrogate has no UTF-8: backslashreplace writes it as JSON's own escape.
            for row in rows:
                file.write(
                    json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
                )
        return
    if out.suffix:
        raise PreferenceError(
            f"{out}: give a name that ends in .jsonl or .json, or one without an ending for a"
            " datasets folder"
        )
    if out.is_file():
        raise PreferenceError(f"{out} is a file; a datasets folder needs another name")
    try:
        from datasets import Dataset
    except ImportError as error:
        raise PreferenceError(
            f"writing a datasets folder needs datasets: {install('data')}"
        ) from error
    try:
        Dataset.from_list([dict(row) for row in rows]).save_to_disk(str(out))
    except UnicodeEncodeError as error:
        raise PreferenceError(
            f"a conversation has a lone surrogate, which a datasets folder cannot hold ({error}):"
            " write .jsonl instead"
        ) from error


def _messages(episode: Episode) -> list[Message]:
    """Returns the conversation up to and with its last reply.

    Raises:
        PreferenceError: it has several contexts.
    """
    if episode.forked:
        raise PreferenceError(
            f"episode {episode.id} has several contexts, which these files cannot hold"
        )
    whole = [m for m in episode.messages if m is not episode.final]
    return [each for message in whole for each in message.speakers]


def _replies(conversation: Sequence[Message]) -> list[int]:
    return [i for i, m in enumerate(conversation) if m.role == "assistant"]


def _prompt(one: Sequence[Message], other: Sequence[Message]) -> int:
    """Returns how many messages both begin with, so that the last of them is not the assistant's
    and a reply is left to each."""
    same = 0
    while same < min(len(one), len(other)) - 1 and one[same] == other[same]:
        same += 1
    while same and one[same - 1].role == "assistant":
        same -= 1
    return same


def _plain(conversation: Sequence[Message]) -> list[dict[str, str]]:
    unjoined = (m for message in conversation for m in message.unjoined)
    return [{"role": m.role, "content": m.content} for m in unjoined]


def _rater(answer: Comparison | Feedback) -> str:
    return answer.stamp.rater or answer.stamp.source
