"""Compares simulated users with recorded ones: how far to trust what is measured on the former.

Users who are played by models are too helpful, all write alike and are never annoyed, so that
agents look better with them than with people (Zhou et al. 2026, arXiv:2603.11245). So both are
compared in what such users get wrong, as distributions over conversations (as Liu et al. 2026,
arXiv:2605.02624, do), in five aspects of one or two measures each:

    cooperation   share of the agent's questions that are answered with something new
    information   new words in the opening; new words in each later message
    length        words in each message; messages of the user
    style         how little a message is like those of other conversations; share of messages that
                  begin and end like a sentence
    sentiment     of the messages on average; of the last one

Two samples of the same users differ by chance. With d the Kolmogorov-Smirnov distance of a measure
between both sides, and d0 its mean between samples of these sizes drawn from the recorded side, the
aspect's agreement is the mean of 1 - max(0, d - d0) / (1 - d0) over its measures, and the index is
the mean over aspects: 1 where nothing tells them apart, 0 where everything does. A measure that a
side has in fewer than ten conversations (the agent asked no questions) is left out.

The agent must be the same on both sides, and the starts alike: users answer what they are asked.
Conversations are taken to be independent: of those that share a start, only one is to be given.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ...protocols import ConfigError, Message
from ...tools import install

Conversation = Sequence[Message]
Floats = NDArray[np.float64]
FEWEST = 20  # conversations on a side
FEW = 10  # conversations on a side that must have a measure
DRAWS = 400
NEIGHBOURS = 200  # other messages that a message is compared with, at most
# Words that say nothing new: what a message holds besides is information.
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "a about after again all also am an and any are as at be because been before being but by"
        " can could did do does doing don for from get got had has have having he hello her here"
        " hi him his how i if in into is it its just know like me more my no not now of off on one"
        " only or other our out over please s same she so some such t tell than thank thanks that"
        " the their them then there these they this those to too up us very was we well were what"
        " when where which who why will with would yes you your",
    )
)
_ASKS = re.compile("[?\uff1f\u061f\u037e]")  # Latin, full-width, Arabic, Greek
ENDS = tuple(".!?\u3002\uff01\uff1f\u061f\u0964\u2026")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure of both sides.

    Attributes:
        simulated, recorded: its means; None where no conversation of the side has it.
        counts: in how many conversations of both sides it was found.
        distance: between both sides.
        chance: what the distance is on average between two samples of the recorded side.
    """

    name: str
    simulated: float | None
    recorded: float | None
    counts: tuple[int, int]
    distance: float
    chance: float

    @property
    def agreement(self) -> float | None:
        """1 where both sides differ no more than by chance, 0 where they have nothing in common;
        None where too few conversations have it."""
        if min(self.counts) < FEW:
            return None
        return _agreement(self.distance, self.chance)


@dataclass(frozen=True, slots=True)
class Check:
    """The result of a comparison.

    Attributes:
        index: of agreement, 0 to 1; `low` and `high` are its 95 % bootstrap interval (percentiles;
            samples drawn again differ more than what they are drawn from, so that it errs towards
            less agreement).
        p: chance of so small an index, were both sides the same users (a permutation test).
        aspects: their agreements, by name; those that could not be measured are left out.
        measures: by aspect.
        simulated, recorded: how many conversations there were.
    """

    index: float
    low: float
    high: float
    p: float
    aspects: Mapping[str, float]
    measures: Mapping[str, tuple[Measure, ...]]
    simulated: int
    recorded: int


def check(simulated: Sequence[Conversation], recorded: Sequence[Conversation]) -> Check:
    """Compares simulated users with recorded ones.

    Raises:
        ConfigError: a side has too few conversations, or the package for sentiment is missing.
    """
    sides = {
        name: [c for c in side if any(m.role == "user" for m in c)]
        for name, side in (("simulated", simulated), ("recorded", recorded))
    }
    for name, side in sides.items():
        if len(side) < FEWEST:
            raise ConfigError(
                f"{len(side)} {name} conversations in which a user writes, each start counted once"
                f" and failed ones left out: at least {FEWEST} are needed to tell users apart from"
                " chance"
            )
    feeling = _sentiment()
    # As many on both sides: the more there are, the nearer is the nearest.
    others = min(NEIGHBOURS, *(sum(len(_texts(c)) for c in side) for side in sides.values()))
    one, other = (_measured(sides[name], feeling, others) for name in ("simulated", "recorded"))
    chance = _chance(other, len(one))
    distance = _distances(one, other)
    found = {
        aspect: tuple(
            Measure(
                name,
                _average(one[:, k]), _average(other[:, k]),
                (int((~np.isnan(one[:, k])).sum()), int((~np.isnan(other[:, k])).sum())),
                float(np.nan_to_num(distance[k])), float(chance[k]),
            )
            for name, k in named.items()
        )
        for aspect, named in ASPECTS.items()
    }  # fmt: skip
    index = _index(distance, chance)
    low, high = _interval(one, other, chance, index)
    known = {
        aspect: [m.agreement for m in own if m.agreement is not None]
        for aspect, own in found.items()
    }
    aspects = {aspect: float(np.mean(own)) for aspect, own in known.items() if own}
    p = _permuted(one, other, chance, index)
    return Check(index, low, high, p, aspects, found, len(one), len(other))


# What is measured, in columns.
ASPECTS: Mapping[str, Mapping[str, int]] = {
    "cooperation": {"questions answered": 0},
    "information": {"new words in the opening": 1, "new words in a later message": 2},
    "length": {"words in a message": 3, "messages": 4},
    "style": {"like a sentence": 5, "unlike others": 6},
    "sentiment": {"on average": 7, "of the last message": 8},
}


def _measured(
    conversations: Sequence[Conversation], feeling: Callable[[str], float], others: int
) -> Floats:
    """Returns the measures of each conversation, [N, 9]; NaN where it has none (it holds no
    question)."""
    rows = []
    for c, unlike in zip(conversations, _unlike(conversations, others), strict=True):
        feelings = [feeling(text) for text in _texts(c)]
        rows.append([*_informed(c), *_written(c), unlike, _mean(feelings), feelings[-1]])
    return np.array(rows, dtype=np.float64)


def words(text: str) -> list[str]:
    """Returns the words of a text, lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def _texts(conversation: Conversation) -> list[str]:
    """Returns the user's messages."""
    return [m.content for m in conversation if m.role == "user"]


def _informed(conversation: Conversation) -> tuple[float, float, float]:
    """Returns the share of questions answered with something new, new words in the opening, and
    new words in each later message."""
    known: set[str] = set()
    asked, answered, news = False, [], []
    for message in conversation:
        content = set(words(message.content)) - _COMMON
        if message.role == "user":
            news.append(len(content - known))
            if asked:
                answered.append(float(news[-1] > 0))
        if message.role in ("user", "assistant"):
            asked = message.role == "assistant" and _ASKS.search(message.content) is not None
            known |= content
    return _mean(answered), float(news[0]), _mean(news[1:])


def _written(conversation: Conversation) -> tuple[float, float, float]:
    """Returns words in each message, how many messages there are, and the share of those that begin
    and end like a sentence."""
    texts = [text.strip() for text in _texts(conversation)]
    sentences = [float(not t[:1].islower() and t[-1:] in ENDS) for t in texts]
    return _mean([len(words(t)) for t in texts]), float(len(texts)), _mean(sentences)


def _unlike(conversations: Sequence[Conversation], others: int) -> list[float]:
    """Returns how little each conversation's messages are like those of others: 1 less the largest
    share of pairs of words that a message has in common with one of another conversation (Jaccard),
    on average over its messages.

    Args:
        conversations: of one side.
        others: how many messages, drawn by chance, each is compared with.
    """
    rng = random.Random(0)
    pairs = [
        (k, frozenset(pairwise(own)) or frozenset((word, "") for word in own))
        for k, c in enumerate(conversations)
        for own in map(words, _texts(c))
    ]
    apart: list[list[float]] = [[] for _ in conversations]
    for k, own in pairs:
        drawn = rng.sample(pairs, others)
        near = [len(own & o) / len(own | o) for j, o in drawn if j != k and own | o]
        apart[k].append(1 - max(near, default=0.0))
    return [_mean(each) for each in apart]


def _sentiment() -> Callable[[str], float]:
    """Returns VADER's compound score of a text, -1 to 1 (Hutto and Gilbert 2014); it reads English.

    Raises:
        ConfigError: its package is missing.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ConfigError(f"the check needs vaderSentiment: {install('judges')}") from error
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _column_means(rows: Sequence[Floats]) -> Floats:
    """Returns the means of columns, NaN where a column has no number."""
    found = [_average(column) for column in np.array(rows).T]
    return np.array([float("nan") if mean is None else mean for mean in found])


def _average(column: Floats) -> float | None:
    known = column[~np.isnan(column)]
    return float(known.mean()) if len(known) else None


# How both sides differ.


def _distances(one: Floats, other: Floats) -> Floats:
    """Returns the Kolmogorov-Smirnov distance of each measure, [9]; what is NaN is left out. NaN
    where a side has too few."""
    found = []
    for a, b in zip(one.T, other.T, strict=True):
        first, second = (np.sort(side[~np.isnan(side)]) for side in (a, b))
        if min(len(first), len(second)) < FEW:
            found.append(float("nan"))
            continue
        at = np.concatenate([first, second])
        shares = [np.searchsorted(side, at, "right") / len(side) for side in (first, second)]
        found.append(float(np.abs(shares[0] - shares[1]).max()))
    return np.array(found)


def _agreement(distance: float, chance: float) -> float:
    return 1 - max(0.0, distance - chance) / (1 - chance) if chance < 1 else 1.0


def _index(distance: Floats, chance: Floats) -> float:
    """Returns the mean agreement over aspects; a distance that is NaN is left out."""
    each = [
        [_agreement(distance[k], chance[k]) for k in named.values() if not np.isnan(distance[k])]
        for named in ASPECTS.values()
    ]
    return float(np.mean([np.mean(own) for own in each if own]))


def _again(side: Floats, size: int, rng: np.random.Generator) -> Floats:
    """Returns a bootstrap sample of a side."""
    return side[rng.integers(len(side), size=size)]


def _chance(recorded: Floats, size: int) -> Floats:
    """Returns the mean distances between a sample of `size` and one of the recorded side's own
    size, both drawn from the recorded side, [9]."""
    rng = np.random.default_rng(0)
    draws = [
        _distances(_again(recorded, size, rng), _again(recorded, len(recorded), rng))
        for _ in range(DRAWS)
    ]
    return np.nan_to_num(_column_means(draws))


def _interval(one: Floats, other: Floats, chance: Floats, index: float) -> tuple[float, float]:
    """Returns the percentile bootstrap interval, which holds at least the index itself."""
    rng = np.random.default_rng(1)
    found = [
        _index(_distances(_again(one, len(one), rng), _again(other, len(other), rng)), chance)
        for _ in range(DRAWS)
    ]
    low, high = (float(q) for q in np.quantile(found, [0.025, 0.975]))
    return min(low, index), max(high, index)


def _permuted(one: Floats, other: Floats, chance: Floats, index: float) -> float:
    """Returns the share of random divisions of all conversations whose index is as small."""
    rng = np.random.default_rng(2)
    both, small = np.concatenate([one, other]), 0
    for _ in range(DRAWS):
        mixed = rng.permutation(both)
        small += _index(_distances(mixed[: len(one)], mixed[len(one) :]), chance) <= index
    return (small + 1) / (DRAWS + 1)
