"""`weighted`: the outcome is the weighted sum of what the sources said.

    outcome = sum_s weight_s * mean(scores of source s)

A comparison scores each episode by the share of the others it beats (`engine.reward.ranking_scores`). The source "environment" is
the environment's own reward and keeps its turns; other sources speak of the whole episode, so theirs arrives at the last turn.
A source that scores turns only, throughout a group, says nothing of the outcome: its scores are opinions, for credit methods that need them.
An episode that a source failed on, abstained from or never answered has no reward: leaving a term out would compare it with others
on different terms. A source of weight 0 is not part of the reward, and its silence costs nothing; its opinions of turns stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...engine.episode import Episode
from ...engine.feedback import Comparison, Feedback
from ...engine.reward import NoReward, Rewards, opinions, overall, ranking_scores, silence
from ...engine.suggest import did_you_mean


class Weighted:
    """Args:
    weights: source name to weight, one for every source of the run.
    turns: names of sources whose turn scores are rewards and arrive at their turns (`reward-model` with `per: turn`); those of
        other sources are opinions.
    """

    def __init__(self, weights: Mapping[str, float], turns: Sequence[str] = ()) -> None:
        self.weights, self.turns = dict(weights), tuple(turns)
        for name in self.turns:
            if name not in self.weights:
                raise ValueError(f"turns names the source {name!r}, which is not asked.{did_you_mean(name, self.weights)}")

    def combine(self, group: Sequence[Episode], feedback: Sequence[Feedback | Comparison]) -> list[Rewards | NoReward]:
        return [self._episode(episode, feedback) for episode in group]

    def _episode(self, episode: Episode, feedback: Sequence[Feedback | Comparison]) -> Rewards | NoReward:
        turns = [0.0] * len(episode.turns)
        for source, weight in self.weights.items():
            if not weight:
                continue
            if source == "environment":
                turns = [total + weight * turn.reward for total, turn in zip(turns, episode.turns, strict=True)]
                continue
            answers = [a for a in feedback if a.stamp.source == source]
            if source in self.turns:
                said = [a.turn_scores for a in answers if isinstance(a, Feedback) and a.episode == episode.id
                        and a.turn_scores is not None and None not in a.turn_scores]  # fmt: skip
                if not said:
                    return NoReward(f"source {source!r} did not score every turn")
                for k in range(len(turns)):
                    turns[k] += weight * sum(each[k] or 0.0 for each in said) / len(said)
                continue
            scores = [score for a in answers if (score := _score(episode, a)) is not None]
            if scores:
                turns[-1] += weight * sum(scores) / len(scores)
            elif (why := silence(episode, answers)) is not None:
                return NoReward(f"source {source!r} {why}")
        of_turns = opinions(episode, (a for a in feedback if a.stamp.source not in self.turns))
        return Rewards(sum(turns), tuple(turns), of_turns)


def _score(episode: Episode, answer: Feedback | Comparison) -> float | None:
    if isinstance(answer, Feedback):
        return overall(answer) if answer.episode == episode.id else None
    if answer.group != episode.group or answer.status != "scored":
        return None
    return ranking_scores(answer).get(episode.id)
