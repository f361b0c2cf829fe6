"""Soft labels: how sure a model was of a choice, read from the log-probabilities of the token at which it was made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

from .models import Reply


def choice(reply: Reply, field: str, options: Sequence[str]) -> dict[str, float] | None:
    """The chance of each option as the value of a field of the answer, by the alternatives to the token where the value begins.

    Options must differ in their first character. Chances are normalised over the options; those that are not among the alternatives have none.

    Returns:
        None where the model gave no log-probabilities, or the value cannot be found among its tokens.
    """
    text = "".join(token.text for token in reply.tokens)  # not the reply's: a character in several tokens reads otherwise there
    found = None
    for found in re.finditer(rf'"{re.escape(field)}"\s*:\s*"?', text):  # noqa: B007 - the last one is the field, a rationale may quote it
        pass
    if found is None:
        return None
    at, start = found.end(), 0
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


def mean_level(chances: Mapping[str, float]) -> float:
    """The expected level, of chances by level."""
    return sum(float(json.loads(level)) * chance for level, chance in chances.items())
