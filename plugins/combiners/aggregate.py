"""`aggregate`: many raters' answers become one estimate per episode, and that is the reward.

    outcome = w * score + w_environment * the environment's own reward   weight = reliability = 1 -
        (sd / prior sd)^2

An aggregator (`mean`, `majority`, `dawid-skene`, `bradley-terry`, `plackett-luce`,
`rater-bradley-terry`) makes the estimates of all answers of sources with a weight, people and
judges together. How good a rater is can only be told from many answers: `fit` keeps the latest of
them, and the estimates of an update are made together with that history. What a resumed run
estimates is the same, bit for bit.

Raters who belong to strata (`stamp.stratum`: experts and laymen, countries, models) may want
different things. The objective says whose estimate counts:

    average             all raters together, whatever their stratum
    worst               the lowest of the strata's estimates (Rawls; as in group DRO, Sagawa et al.
                        2020, arXiv:1911.08731)
    {stratum: weight}   sum of weight * estimate, over the sum of weights; other strata do not count

For the last two the aggregator is run per stratum. An episode must then have been spoken of by each
stratum that the mapping gives a weight, or, for the worst, by each that spoke of its group: the
lowest of two is not comparable with the only one. Every stratum is reported, also where it does not
count: `stratum/gap` is how far the highest estimate of an episode lies above the lowest, on
average.

As in `weighted`, the environment's reward keeps its turns, turn scores are opinions, and an episode
without an estimate has no reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ...protocols import (
    Aggregate,
    Aggregator,
    Answer,
    Combiner,
    Comparison,
    Episode,
    Estimate,
    Feedback,
    NoReward,
    Rewards,
    Stamp,
    opinions,
    silence,
)


class Aggregated(Combiner):
    """Makes one estimate of many raters' answers the reward.

    Args:
        weights: source name to weight; "environment" is the environment's own reward, 0 leaves a
            source out. The others share one weight: who deserves how much is the aggregator's
            business.
        aggregator: an object with `aggregate(answers)`; in a config a name, or a mapping with
            `name` and options.
        objective: "average": all raters together; "worst": the lowest stratum's estimate; or a
            mapping of strata to weights.
        history: how many of the latest answers estimates are made from; those of the present update
            always count.
        max_sd: episodes whose estimate has a larger deviation have no reward; None: all have.
        uncertainty: "weight" (an episode counts as much as its estimate is reliable) or "ignore".

    Raises:
        ValueError: with what would be right.
    """

    turns = ()  # scores of turns are opinions here

    def __init__(
        self,
        weights: Mapping[str, float],
        aggregator: Aggregator,
        objective: Literal["average", "worst"] | Mapping[str, float] = "average",
        history: int = 20_000,
        max_sd: float | None = None,
        uncertainty: Literal["weight", "ignore"] = "weight",
    ) -> None:
        self.environment = weights.get("environment", 0.0)
        self.sources = frozenset(
            name for name, weight in weights.items() if weight and name != "environment"
        )
        shared = {weights[name] for name in self.sources}
        if len(shared) > 1:
            raise ValueError(
                "sources that are aggregated share one weight (0 leaves one out), got"
                f" { ({n: weights[n] for n in sorted(self.sources)}) }: the aggregator weighs"
                " raters itself; use combiner 'weighted' for a sum of sources"
            )
        self.weight = shared.pop() if shared else 0.0
        if isinstance(objective, Mapping):
            if (
                not objective
                or not all(math.isfinite(w) and w >= 0 for w in objective.values())
                or not sum(objective.values())
            ):
                raise ValueError(
                    "objective needs weights of at least 0, one of them positive, got"
                    f" {dict(objective)}"
                )
        elif objective not in ("average", "worst"):
            raise ValueError(
                "objective must be 'average', 'worst' or a mapping of strata to weights, got"
                f" {objective!r}"
            )
        if history < 1:
            raise ValueError(f"history must be at least 1, got {history}")
        if max_sd is not None and not max_sd > 0:
            raise ValueError(f"max_sd must be positive or None, got {max_sd}")
        if uncertainty not in ("weight", "ignore"):
            raise ValueError(f"uncertainty must be 'weight' or 'ignore', got {uncertainty!r}")
        self.aggregator, self.objective, self.history = aggregator, objective, history
        self.max_sd, self.uncertainty = max_sd, uncertainty
        self._answers: list[Answer] = []  # the history, oldest first
        self._present: frozenset[str] = frozenset()  # groups and episodes of the present update
        self._found = Found(Aggregate({}, {}), {})

    def fit(self, feedback: Sequence[Answer]) -> None:
        """Remembers the feedback and makes the estimates of this update, with all that is
        remembered."""
        new = [a for a in feedback if a.stamp.source in self.sources]
        again = {a.id for a in new if a.id}
        old = [a for a in self._answers if a.id not in again]
        keep = max(self.history - len(new), 0)
        self._answers = [*(old[-keep:] if keep else ()), *new]
        self._present = frozenset(a.target for a in new)
        self._found = self._estimate(self._answers)

    def combine(
        self, group: Sequence[Episode], feedback: Sequence[Answer]
    ) -> list[Rewards | NoReward]:
        """Rewards each episode by the aggregator's estimates from the answers remembered."""
        answers = [a for a in feedback if a.stamp.source in self.sources]
        found = self._found
        # Conversations played for measurement, which must not train anything.
        if any(a.target not in self._present for a in answers):
            found = self._estimate([*self._answers, *answers])
        spoke = [
            s for s, each in sorted(found.strata.items()) if any(e.id in each.scores for e in group)
        ]
        return [self._episode(episode, answers, feedback, found, spoke) for episode in group]

    def _estimate(self, answers: Sequence[Answer]) -> Found:
        strata: dict[str, list[Answer]] = {}
        for answer in answers:
            strata.setdefault(answer.stamp.stratum, []).append(answer)
        whole = self.aggregator.aggregate(answers)
        if len(strata) == 1:
            return Found(whole, dict.fromkeys(strata, whole))
        return Found(
            whole, {s: self.aggregator.aggregate(own) for s, own in sorted(strata.items())}
        )

    def _episode(
        self,
        episode: Episode,
        answers: Sequence[Answer],
        feedback: Sequence[Answer],
        found: Found,
        spoke: Sequence[str],
    ) -> Rewards | NoReward:
        turns = [self.environment * turn.reward for turn in episode.turns]
        of_turns = opinions(episode, feedback)
        if not self.sources:
            return Rewards(sum(turns), tuple(turns), of_turns)
        if self.objective == "average":
            parts = {"": (1.0, found.whole.scores.get(episode.id))}
        elif self.objective == "worst":
            parts = {s: (1.0, found.strata[s].scores.get(episode.id)) for s in spoke}
        else:
            assert isinstance(self.objective, Mapping)
            total = sum(self.objective.values())
            silent = Aggregate({}, {})
            parts = {
                s: (w / total, found.strata.get(s, silent).scores.get(episode.id))
                for s, w in self.objective.items()
                if w
            }
        estimates = [
            (share, estimate) for share, estimate in parts.values() if estimate is not None
        ]
        if not estimates:
            why = silence(episode, answers)
            if why is None:
                return Rewards(sum(turns), tuple(turns), of_turns)
            aggregator = type(self.aggregator).__name__
            numbers = any(
                a.status == "scored" and a.target in (episode.id, episode.group) for a in answers
            )
            return NoReward(
                f"{aggregator} makes nothing of the raters' answers: {why}"
                if numbers
                else f"raters: {why}"
            )
        if missing := [s for s, (_, estimate) in parts.items() if estimate is None]:
            return NoReward(f"stratum {missing[0]!r} did not answer, and others did")
        if self.objective == "worst":
            estimates = [(1.0, min((e for _, e in estimates), key=lambda e: e.score))]
        score = sum(share * e.score for share, e in estimates)
        sd = math.sqrt(sum((share * e.sd) ** 2 for share, e in estimates))
        before = math.sqrt(sum((share * e.prior_sd) ** 2 for share, e in estimates))
        if self.max_sd is not None and sd > self.max_sd:
            return NoReward(
                f"uncertain: the estimate's deviation {sd:.3g} is above max_sd {self.max_sd:g}"
            )
        weight = 1.0
        # Where nothing varies, nothing is uncertain.
        if self.uncertainty == "weight" and before > 0:
            weight = Estimate(score, sd, before, 0).reliability
            if not weight:
                return NoReward(
                    "uncertain: the raters' answers left the estimate as uncertain as it was before"
                )
        turns[-1] += self.weight * score
        return Rewards(sum(turns), tuple(turns), of_turns, weight)

    def metrics(self) -> dict[str, float]:
        """Of the estimates that `fit` made last: raters over the whole history, estimates and
        strata over the present update."""
        raters = self._found.whole.raters.values()
        found: dict[str, float] = {"raters/count": float(len(raters))} if raters else {}
        if raters:
            found["raters/reliability_min"] = min(r.reliability for r in raters)
            found["raters/reliability_mean"] = _mean([r.reliability for r in raters])
        if sides := [abs(r.side) for r in raters if r.side is not None]:
            found["raters/side_max"] = max(sides)
        spoken_of = self._spoken_of()
        present = {
            e: estimate for e, estimate in self._found.whole.scores.items() if e in spoken_of
        }
        if present:
            found["sd_mean"] = _mean([e.sd for e in present.values()])
            found["reliability_mean"] = _mean([e.reliability for e in present.values()])
        strata = {
            s: {e: x.score for e, x in a.scores.items() if e in present}
            for s, a in self._found.strata.items()
        }
        if len(strata) > 1:
            found |= {
                f"stratum/{s or 'unnamed'}": _mean(list(own.values()))
                for s, own in strata.items()
                if own
            }
            each = [[own[e] for own in strata.values() if e in own] for e in present]
            if gaps := [max(scores) - min(scores) for scores in each if len(scores) > 1]:
                found["stratum/gap"] = _mean(gaps)
        return found

    def _spoken_of(self) -> frozenset[str]:
        """Episodes that the present update's answers speak of."""
        ranked = (
            e
            for a in self._answers
            if isinstance(a, Comparison) and a.group in self._present
            for t in a.ranking
            for e in t
        )
        return self._present | frozenset(ranked)

    def state_dict(self) -> dict[str, Any]:
        """The history. All else is made of it at the next `fit`."""
        return {"answers": [_plain(a) for a in self._answers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the answers of a checkpoint."""
        self._answers = [_answer(record) for record in state["answers"]]


class Found:
    """Estimates of all raters together, and of each stratum by itself."""

    def __init__(self, whole: Aggregate, strata: Mapping[str, Aggregate]) -> None:
        self.whole, self.strata = whole, strata


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _plain(answer: Answer) -> dict[str, Any]:
    """What an aggregator reads of an answer, as JSON values."""
    stamp = {
        "source": answer.stamp.source,
        "rater": answer.stamp.rater,
        "stratum": answer.stamp.stratum,
    }
    common: dict[str, Any] = {
        "id": answer.id,
        "status": answer.status,
        "reason": answer.reason,
        **stamp,
    }
    if "order" in answer.shown:
        common["order"] = list(answer.shown["order"])
    if isinstance(answer, Feedback):
        turns = None if answer.turn_scores is None else list(answer.turn_scores)
        return {
            **common,
            "episode": answer.episode,
            "score": answer.score,
            "turns": turns,
            "aspects": dict(answer.aspects),
        }
    return {
        **common, "group": answer.group, "ranking": [list(tier) for tier in answer.ranking],
        "strength": answer.strength,
        "probability": answer.probability, "aspect": answer.aspect,
    }  # fmt: skip


def _answer(record: Mapping[str, Any]) -> Answer:
    fields: dict[str, Any] = {
        "id": record["id"], "status": record["status"], "reason": record["reason"],
        "shown": {"order": record["order"]} if "order" in record else {},
        "stamp": Stamp(source=record["source"], rater=record["rater"], stratum=record["stratum"]),
    }  # fmt: skip
    if "episode" in record:
        turns = None if record["turns"] is None else tuple(record["turns"])
        return Feedback(record["episode"], record["score"], turns, record["aspects"], **fields)
    return Comparison(
        record["group"],
        tuple(map(tuple, record["ranking"])),
        record["strength"],
        record["probability"],
        record["aspect"],
        **fields,
    )
