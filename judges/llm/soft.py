"""Soft labels: how sure a model was of a choice, read from the log-probabilities of the token at
which it was made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

from ..models.model import Reply
from .transcript import Unreadable, beginnings, json_within


def choice(reply: Reply, field: str, options: Sequence[str]) -> dict[str, float] | None:
    """Returns the chance of each option as the value of a field of the answer, by the alternatives
    to the token where the value begins.

    Options must differ in their first character. Chances are normalised over the options; those
    that are not among the alternatives have none.

    Args:
        reply: one that `read_json` can read.
        field: the path of keys to it, e.g. "better" or "levels.resolved". Only what stands there
            counts, wherever else the name occurs.
        options: the values that the field may have.

    Returns:
        None where the model gave no log-probabilities, or the value cannot be found among its
        tokens.
    """
    at = _begins(
        "".join(token.text for token in reply.tokens), field.split(".")
    )  # a token may be part of a character: only places in tokens agree
    if at is None:
        return None
    start = 0
    for token in reply.tokens:
        end = start + len(token.text)
        if end > at:
            head = token.text[: at - start] if start < at else ""
            masses = dict.fromkeys(options, 0.0)
            for text, logprob in token.alternatives.items():
                if not text.startswith(head):
                    continue
                rest = text[len(head) :].lstrip(' "')
                for option in options:
                    if rest and rest[0] == option[0]:
                        masses[option] += math.exp(logprob)
            total = sum(masses.values())
            return {option: mass / total for option, mass in masses.items()} if total > 0 else None
        start = end
    return None


_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]', flags=re.DOTALL)
_OPENING = re.compile(r'\s*"?')


def _begins(text: str, path: Sequence[str]) -> int | None:
    """Returns where the value at a path of keys begins in an answer's JSON object, after its
    opening quote."""
    try:
        start, _ = json_within(text)
    except Unreadable:  # tokens that are part of a character are no JSON
        start = 0 if text.lstrip().startswith("{") else beginnings(text)[-1]
    above: list[str | None] = []  # keys of the objects that are open; None: a list
    key: str | None = None
    for piece in _PIECE.finditer(text, text.find("{", start)):
        match piece.group():
            case "{" | "[" as opened:
                above.append(key if opened == "{" else None)
            case "}" | "]":
                if len(above) < 2:
                    return None
                above.pop()
            case ":":
                if above and [*above[1:], key] == list(path):
                    opening = _OPENING.match(text, piece.end())
                    return opening.end() if opening else None
            case string:
                key = string[1:-1]
    return None


def mean_level(chances: Mapping[str, float]) -> float:
    """Returns the expected level from chances by level."""
    return sum(float(json.loads(level)) * chance for level, chance in chances.items())
