"""Scores question economy: questions asked against answers used. A question is worth its price when
a later reply makes use of its answer.

The agent's questions are its sentences that end with a question mark. What became of each:

    used         its topic's `used_by` matches a later reply; without a topic: the answer brought
                 words that were new to the conversation, and a later reply takes one of them up
    repeated     the same topic, or a question with the same content and question words, was asked
                 before: never used, whatever follows
    told         its topic's `told` matched an earlier message to the agent: never used
    unanswered   nothing, or no further reply, came after it
    unused       the rest

The score is 1 - cost * (questions that were not used). It has no floor unless `minimum` sets one:
where another judge pays for questions (clarification, warmth), a policy that has reached a floor
asks the next one for nothing, and learns to ask without end. Turn scores put each cost at the reply
that asked: 0, or minus `cost` for every question in it that was not used, so that they sum to the
score less 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...protocols import Episode, Feedback, Judge
from ...tools import did_you_mean
from .text import Pattern

# Of a sentence; a point inside (3.5) is none.
_END = re.compile(r"(?<=[?？؟])(?![!?！？؟])|(?<=[.!])(?=\s)|(?<=[。！\n])")
_QUESTION = re.compile(r"[?？؟][!?！？؟]*$")
_ADDRESS = re.compile(r"https?://\S+")  # may hold a question mark, and asks nothing
_ASKING = frozenset(["how", "what", "when", "where", "which", "who", "whom", "whose", "why"])

# English words that carry no content of their own; what is left of an answer is what was learned.
_FUNCTION_WORDS = """
    a about above actually after again ago all already also always am an and another any anything \
are as at back be
    because been before being below both but by can cannot could did do does doing done down each \
either else even ever
    every everything few for from further get gets getting give given go goes going good got \
great had has have having he
    hello help her here hers hi him his how however i if in into is it its itself just know let \
like little long look made
    make many may maybe me mean might mine more most much must my need needs never no none nor \
not nothing now of off oh
    ok okay on once one only or other our ours out over own perhaps please quite rather really \
right said same say says
    see seem shall she should since so some something soon sorry still such sure take tell than \
thank thanks that the
    their theirs them then there these they thing things think this those though through to told \
too under until up upon
    us use used very want was way we well went were what when where whether which while who whom \
whose why will with
    without would yes yet you your yours
"""
_EMPTY = frozenset(_FUNCTION_WORDS.split())


@dataclass(frozen=True, slots=True)
class _Topic:
    """A topic of questions, and how the use of an answer shows."""

    name: str
    asks: Pattern
    used_by: Pattern
    answered_by: Pattern | None


@dataclass(frozen=True, slots=True)
class _Asked:
    """One question: the reply it stands in, its words, its topic if it has one, and whether that or
    the same was asked before."""

    turn: int
    text: str
    topic: _Topic | None
    repeated: bool


class Economy(Judge):
    """Scores conversations by their question economy; `details` counts `asked`, `used`
    and `unused`, and lists `questions`, each with its `turn`, `text`, `topic` and `state`.

    How a policy could exploit the rule, and its limits: a question that belongs to several topics
    counts once for each, so nothing is saved by cramming; a request without a question mark is not
    seen; without topics, repeating the other side's words counts as taking them up, and a plain
    "yes" brings no new word, so yes-or-no questions need a topic. The words that are left out as
    empty are English: state topics for other languages.

    Args:
        topics: mappings with `asks`, a regular expression that finds a question of this topic, and
            `used_by`, one that finds replies in which its answer is put to use; optional `told`,
            one that finds the answer in what the agent hears, and a `name`. All are searched
            without regard to case.
        cost: of each question that was not used.
        minimum: the lowest score, below 1; default: none. Turn scores have no floor.
    """

    def __init__(
        self,
        topics: Sequence[Mapping[str, str]] = (),
        cost: float = 0.25,
        minimum: float | None = None,
    ) -> None:
        if not (math.isfinite(cost) and cost > 0):
            raise ValueError(f"cost must be positive, got {cost}")
        if minimum is not None and not minimum < 1:
            raise ValueError(
                "minimum must be below 1, the score of a conversation that wastes no question, got"
                f" {minimum}"
            )
        self.topics, self.cost, self.minimum = [dict(topic) for topic in topics], cost, minimum
        self._topics = [_topic(i, topic) for i, topic in enumerate(self.topics)]
        names = [topic.name for topic in self._topics]
        if len(set(names)) < len(names):
            raise ValueError(f"two topics have one name: {', '.join(names)}")

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Scores 1 less `cost` for each question that was not used, at least `minimum`."""
        return [self._episode(episode) for episode in episodes]

    def _episode(self, episode: Episode) -> Feedback:
        questions = [(asked, self._state(episode, asked)) for asked in self._asked(episode)]
        wasted = [asked.turn for asked, state in questions if state != "used"]
        score = 1.0 - self.cost * len(wasted)
        return Feedback(
            episode.id,
            score=score if self.minimum is None else max(self.minimum, score),
            turn_scores=tuple(
                -self.cost * wasted.count(k) if k in wasted else 0.0
                for k in range(len(episode.turns))
            ),
            details={
                "asked": len(questions),
                "used": len(questions) - len(wasted),
                "unused": len(wasted),
                "questions": [
                    {
                        "turn": asked.turn,
                        "text": asked.text,
                        "topic": asked.topic.name if asked.topic else None,
                        "state": state,
                    }
                    for asked, state in questions
                ],
            },
        )

    def _asked(self, episode: Episode) -> Iterator[_Asked]:
        topics: set[str] = set()
        others: set[frozenset[str]] = set()
        for k, turn in enumerate(episode.turns):
            sentences = map(str.strip, _END.split(_ADDRESS.sub("", turn.action)))
            for text in filter(_QUESTION.search, sentences):
                about = [topic for topic in self._topics if topic.asks.search(text)]
                for topic in about:
                    yield _Asked(k, text, topic, topic.name in topics)
                    topics.add(topic.name)
                if not about:
                    same = content(text) | (_ASKING & frozenset(text.lower().split()))
                    yield _Asked(k, text, None, same in others)
                    others.add(same)

    def _state(self, episode: Episode, asked: _Asked) -> str:
        before = [turn.observation.content for turn in episode.turns[: asked.turn + 1]]
        later = [turn.action for turn in episode.turns[asked.turn + 1 :]]
        if asked.repeated:
            return "repeated"
        if (
            asked.topic
            and asked.topic.answered_by
            and any(map(asked.topic.answered_by.search, before))
        ):
            return "told"
        if not later:
            return "unanswered"
        if asked.topic:
            return "used" if any(map(asked.topic.used_by.search, later)) else "unused"
        text = " ".join([*before, *(turn.action for turn in episode.turns[: asked.turn + 1])])
        learned = content(episode.turns[asked.turn + 1].observation.content) - content(text)
        return "used" if learned & content(" ".join(later)) else "unused"


def content(text: str) -> frozenset[str]:
    """Returns the words of a text that carry content: numbers, and words other than function words,
    without a plural's or a genitive's s."""
    words = re.findall(r"[^\W_]+(?:['’.,-][^\W_]+)*", text.lower())
    plain = {re.sub(r"['’]s$|(?<=\w\w[^s\W])s$", "", word) for word in words if word not in _EMPTY}
    return (
        frozenset(word for word in plain if len(word) > 2 or any(c.isdigit() for c in word))
        - _EMPTY
    )


def _topic(number: int, given: Mapping[str, Any]) -> _Topic:
    known = ("name", "asks", "used_by", "told")
    for key in given:
        if key not in known:
            raise ValueError(f"topic {number} has no key {key!r}.{did_you_mean(str(key), known)}")
    for key in ("asks", "used_by"):
        if not given.get(key):
            raise ValueError(
                f"topic {number} needs `asks` and `used_by`, both regular expressions; it has"
                f" {dict(given)}"
            )
    answered = Pattern(given["told"]) if given.get("told") else None
    return _Topic(
        str(given.get("name", given["asks"])),
        Pattern(given["asks"]),
        Pattern(given["used_by"]),
        answered,
    )
