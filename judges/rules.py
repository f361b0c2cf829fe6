"""Rule judges: cheap, exact, and never in a bad mood. Scores lie in [0, 1]; 1 is good.

Any plain function of an episode is a judge too: `feedback=[lambda episode: float("please" in episode.turns[-1].action)]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from ..engine.episode import Episode
from ..engine.feedback import Feedback


class Length:
    """Replies within a number of words. A reply over the limit loses in proportion: twice as long scores 0.

    Args:
        max_words: per reply.
    """

    def __init__(self, max_words: int = 60) -> None:
        if max_words < 1:
            raise ValueError(f"max_words must be at least 1, got {max_words}")
        self.max_words = max_words

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        answers = []
        for episode in episodes:
            words = [len(turn.action.split()) for turn in episode.turns]
            turns = tuple(max(0.0, 1.0 - max(0, n - self.max_words) / self.max_words) for n in words)
            answers.append(Feedback(episode.id, score=sum(turns) / len(turns), turn_scores=turns))
        return answers


class Regex:
    """Replies that match a pattern, or do not.

    Args:
        pattern: a regular expression, searched without regard to case.
        where: "last" reply, "any" or "all" of them.
        forbid: score 1 when it does not match.
    """

    def __init__(self, pattern: str, where: Literal["last", "any", "all"] = "any", forbid: bool = False) -> None:
        if where not in ("last", "any", "all"):
            raise ValueError(f"where must be 'last', 'any' or 'all', got {where!r}")
        try:
            self._pattern = re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        self.pattern, self.where, self.forbid = pattern, where, forbid

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        answers = []
        for episode in episodes:
            hits = [bool(self._pattern.search(turn.action)) for turn in episode.turns]
            found = {"last": hits[-1], "any": any(hits), "all": all(hits)}[self.where]
            answers.append(Feedback(episode.id, score=float(found != self.forbid)))
        return answers


class Repetition:
    """The share of replies that do not repeat an earlier reply of the conversation, wording aside from case and spaces."""

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        answers = []
        for episode in episodes:
            seen: set[str] = set()
            turns = []
            for turn in episode.turns:
                said = " ".join(turn.action.lower().split())
                turns.append(float(said not in seen))
                seen.add(said)
            answers.append(Feedback(episode.id, score=sum(turns) / len(turns), turn_scores=tuple(turns)))
        return answers


class Questions:
    """Few questions: 1 up to `allowed` question marks in the agent's replies, then `cost` less for each further one.

    Args:
        allowed: free questions per conversation.
        cost: per further question.
    """

    def __init__(self, allowed: int = 3, cost: float = 0.25) -> None:
        self.allowed, self.cost = allowed, cost

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        asked = [sum(turn.action.count("?") for turn in episode.turns) for episode in episodes]
        return [
            Feedback(episode.id, score=max(0.0, 1.0 - self.cost * max(0, n - self.allowed)))
            for episode, n in zip(episodes, asked, strict=True)
        ]
