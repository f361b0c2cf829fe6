"""`weighted`: the outcome is the weighted sum of the sources' scores.

    outcome = sum_s weight_s * mean(scores of source s)

A comparison scores each episode by the share of the others it beats (`ranking_scores`). The source
"environment" is the environment's own reward and keeps its turns; other sources speak of the whole
episode, so theirs arrives at the last turn. A source that scores turns only, throughout a group,
says nothing of the outcome: its scores are opinions, for credit methods that need them. An episode
that a source failed on, abstained from or never answered has no reward: leaving a term out would
compare it with others on different terms. A source of weight 0 is not part of the reward, and its
silence costs nothing; its opinions of turns stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...judging import LengthControl
from ...protocols import (
    Combiner,
    Comparison,
    Episode,
    Feedback,
    NoReward,
    Rewards,
    opinions,
    overall,
    ranking_scores,
    silence,
)
from ...tools import did_you_mean


class Weighted(Combiner):
    """Adds up the scores of sources, each with its weight.

    Args:
        weights: source name to weight, one for every source of the run.
        turns: names of sources whose turn scores are rewards and arrive at their turns
            (`reward-model` with `per: turn`); those of other sources are opinions.
        length_control: names of sources whose scores count as if all replies of a group were
            equally long (`turnwise.judging.LengthControl`, words per reply): what a judge gives for
            length alone is learned from earlier updates and taken off.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        turns: Sequence[str] = (),
        length_control: Sequence[str] = (),
    ) -> None:
        self.weights = dict(weights)
        self.turns: tuple[str, ...] = tuple(turns)
        for option, names in (("turns", turns), ("length_control", length_control)):
            for name in names:
                if name not in self.weights or name == "environment":
                    known = [each for each in self.weights if each != "environment"]
                    raise ValueError(
                        f"{option} names the source {name!r}, which is not"
                        f" asked.{did_you_mean(name, known)}"
                    )
        self._controls = {name: LengthControl() for name in length_control}
        # By this update's groups: source, scores, words per reply.
        self._collected: list[tuple[str, list[float], list[float]]] = []

    def combine(
        self, group: Sequence[Episode], feedback: Sequence[Feedback | Comparison]
    ) -> list[Rewards | NoReward]:
        """Rewards each episode by the weighted sum of its scores, less what length explains."""
        off = self._for_length(group, feedback)
        return [self._episode(episode, feedback, off.get(episode.id, {})) for episode in group]

    def _for_length(
        self, group: Sequence[Episode], feedback: Sequence[Feedback | Comparison]
    ) -> dict[str, dict[str, float]]:
        """What length alone adds to each episode's score by each source that is controlled for
        it."""
        off: dict[str, dict[str, float]] = {}
        for name, control in self._controls.items():
            answers = [a for a in feedback if a.stamp.source == name]
            found = [
                (e, [score for a in answers if (score := _score(e, a)) is not None]) for e in group
            ]
            scored = [(e, sum(scores) / len(scores)) for e, scores in found if scores]
            if not scored:
                continue
            scores, words = [score for _, score in scored], [_words(e) for e, _ in scored]
            self._collected.append((name, scores, words))
            for (e, score), level in zip(
                scored, control.apply(scores, words, [0] * len(scored)), strict=True
            ):
                off.setdefault(e.id, {})[name] = score - float(level)
        return off

    def fit(self, feedback: Sequence[Feedback | Comparison]) -> None:
        """Learns from the groups that were combined since the last time."""
        for name, scores, words in self._collected:
            self._controls[name].fit(scores, words, [0] * len(scores))
        self._collected = []

    def metrics(self) -> dict[str, float]:
        """Returns the slope on length of every source that is controlled for it."""
        return {f"{name}/length_slope": control.slope for name, control in self._controls.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns the length controls and the scores collected for them; nothing without
        controls."""
        if not self._controls:
            return {}
        return {
            "controls": {n: c.state_dict() for n, c in self._controls.items()},
            "heard": [list(each) for each in self._collected],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the length controls and the scores collected for them."""
        for name, control in self._controls.items():
            control.load_state_dict(state["controls"][name])
        self._collected = [
            (name, list(scores), list(words)) for name, scores, words in state["heard"]
        ]

    def _episode(
        self, episode: Episode, feedback: Sequence[Feedback | Comparison], off: Mapping[str, float]
    ) -> Rewards | NoReward:
        turns = [0.0] * len(episode.turns)
        for source, weight in self.weights.items():
            if not weight:
                continue
            if source == "environment":
                turns = [
                    total + weight * turn.reward
                    for total, turn in zip(turns, episode.turns, strict=True)
                ]
                continue
            answers = [a for a in feedback if a.stamp.source == source]
            if source in self.turns:
                turn_scores = [a.turn_scores for a in answers if isinstance(a,
                        Feedback) and a.episode == episode.id
                        and a.turn_scores is not None and None not in a.turn_scores]  # fmt: skip
                if not turn_scores:
                    return NoReward(f"source {source!r} did not score every turn")
                for k in range(len(turns)):
                    turns[k] += (
                        weight * sum(each[k] or 0.0 for each in turn_scores) / len(turn_scores)
                    )
                continue
            scores = [score for a in answers if (score := _score(episode, a)) is not None]
            if scores:
                turns[-1] += weight * (sum(scores) / len(scores) - off.get(source, 0.0))
            elif (why := silence(episode, answers)) is not None:
                return NoReward(f"source {source!r} {why}")
        of_turns = opinions(episode, (a for a in feedback if a.stamp.source not in self.turns))
        return Rewards(sum(turns), tuple(turns), of_turns)


def _words(episode: Episode) -> float:
    return sum(len(turn.action.split()) for turn in episode.turns) / len(episode.turns)


def _score(episode: Episode, answer: Feedback | Comparison) -> float | None:
    if isinstance(answer, Feedback):
        return overall(answer) if answer.episode == episode.id else None
    if answer.group != episode.group or answer.status != "scored":
        return None
    return ranking_scores(answer).get(episode.id)
