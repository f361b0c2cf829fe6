"""Conversion of records to rows of the ledger, and back."""

from __future__ import annotations

import dataclasses
import json
import zlib
from typing import Any

from ..errors import LedgerError
from ..records.episode import Episode
from ..records.feedback import Answer, Comparison, Feedback, Stamp
from ..util.ids import canonical_json

LARGEST = 1 << 28  # bytes of an episode: what unpacks to more is no conversation


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """An episode of an update: how it was trained on, or why it was left out.

    Attributes:
        used: whether it was in the gradient.
        reason: why not.
        outcome: the combined reward.
        feedback: ids of the feedback the reward was made from.
        credit: what each turn was credited with.
    """

    episode: str
    group: str
    used: bool
    reason: str = ""
    outcome: float | None = None
    feedback: tuple[str, ...] = ()
    credit: tuple[float, ...] = ()


def decode_episode(id_: str, content: bytes) -> Episode:
    """Returns an episode as it was recorded.

    Raises:
        LedgerError: what is recorded cannot be read.
    """
    try:
        unpacking = zlib.decompressobj()
        text = unpacking.decompress(content, LARGEST)
        if not unpacking.eof:
            raise ValueError(
                "it is cut short"
                if len(text) < LARGEST
                else f"it unpacks to more than {LARGEST} bytes"
            )
        return Episode.from_dict(json.loads(text))
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            f"the ledger is damaged: its episode {id_} cannot be read ({type(error).__name__}:"
            f" {error})"
        ) from error


def encode_answer(answer: Answer) -> str:
    """Returns an answer's content, without its stamp: the part that must not change under one
    id."""
    data = dataclasses.asdict(answer)
    del data["stamp"]
    return canonical_json(data)


def decode_answer(row: Any) -> Answer:
    """Returns an answer as it was recorded.

    Raises:
        LedgerError: what is recorded cannot be read.
    """
    stamp = Stamp(
        row["request"],
        row["source"],
        row["version"],
        row["time"],
        row["cost"],
        row["rater"],
        row["stratum"],
    )
    kind: type[Answer] = Comparison if row["kind"] == "comparison" else Feedback
    try:
        return kind(**json.loads(row["content"]), stamp=stamp)
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            f"the ledger is damaged: its answer {row['id']} cannot be read ({type(error).__name__}:"
            f" {error})"
        ) from error
