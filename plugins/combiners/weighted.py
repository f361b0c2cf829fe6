"""`weighted`: the outcome is the weighted sum of what the sources said.

    outcome = sum_s weight_s * mean(scores of source s)

A comparison scores each episode by the share of the others it beats (`engine.reward.ranking_scores`). The source "environment" is
the environment's own reward and keeps its turns; other sources speak of the whole episode, so theirs arrives at the last turn.
A source that scores turns only, throughout a group, says nothing of the outcome: its scores are opinions, for credit methods that need them.
An episode that a source failed on, abstained from or never answered has no reward: leaving a term out would compare it with others
on different terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...engine.episode import Episode
from ...engine.feedback import Comparison, Feedback
from ...engine.reward import NoReward, Rewards, ranking_scores
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
        opinions: list[tuple[float | None, ...]] = []
        for source, weight in self.weights.items():
            if source == "environment":
                turns = [total + weight * turn.reward for total, turn in zip(turns, episode.turns, strict=True)]
                continue
            if source in self.turns:
                said = [a.turn_scores for a in feedback if isinstance(a, Feedback) and a.stamp.source == source
                        and a.episode == episode.id and a.turn_scores is not None and None not in a.turn_scores]  # fmt: skip
                if not said:
                    return NoReward(f"source {source!r} did not score every turn")
                for k in range(len(turns)):
                    turns[k] += weight * sum(each[k] or 0.0 for each in said) / len(said)
                continue
            scores: list[float] = []
            missing, of_turns = "did not answer", False
            for answer in (a for a in feedback if a.stamp.source == source):
                if isinstance(answer, Feedback) and answer.episode == episode.id:
                    if answer.status != "scored":
                        missing = f"{answer.status}: {answer.reason}"
                        continue
                    if answer.score is not None:
                        scores.append(answer.score)
                    elif answer.aspects:
                        scores.append(sum(answer.aspects.values()) / len(answer.aspects))
                    if answer.turn_scores is not None:
                        opinions.append(answer.turn_scores)
                        if answer.score is None and not answer.aspects:
                            missing, of_turns = "scored turns only, unlike others of its group", True
                elif isinstance(answer, Comparison) and answer.group == episode.group:
                    ranked = ranking_scores(answer) if answer.status == "scored" else {}
                    if episode.id in ranked:
                        scores.append(ranked[episode.id])
                    else:
                        missing = f"{answer.status}: {answer.reason}" if answer.status != "scored" else "left it out"
            if of_turns and not scores and not any(_says_outcome(a) for a in feedback if a.stamp.source == source):
                continue  # it has opinions of turns, and none of any outcome
            if not scores:
                return NoReward(f"source {source!r} {missing}")
            turns[-1] += weight * sum(scores) / len(scores)
        return Rewards(sum(turns), tuple(turns), _mean_opinion(opinions, len(turns)))


def _says_outcome(answer: Feedback | Comparison) -> bool:
    if answer.status != "scored":
        return False
    return isinstance(answer, Comparison) or answer.score is not None or bool(answer.aspects)


def _mean_opinion(opinions: Sequence[tuple[float | None, ...]], turns: int) -> tuple[float | None, ...] | None:
    if not opinions:
        return None
    means = []
    for k in range(turns):
        said = [o[k] for o in opinions if k < len(o) and o[k] is not None]
        means.append(sum(said) / len(said) if said else None)  # type: ignore[arg-type]
    return tuple(means)
