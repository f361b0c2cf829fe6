"""`calibrated`: as `weighted`, with a judge's scores corrected by people's answers on a share of
the episodes.

    outcome = sum_s weight_s * mean(scores of source s)   a judge's score f is first replaced by  c
        + s f + sum_k w_k x_k

The correction (`engine.calibration.fit_correction`) is the simplest of none, a shift, a line, and a
line with features x of the conversation that is not worse out of fold. It is fitted on the episodes
that both judged, of the version of the judge that is in force, and there is none before
`min_labels` of these.

- *Whom it helps.* A shift moves all outcomes alike and means nothing to credit that compares within
  groups; it matters where several sources are summed or a critic values outcomes. A line weighs the
  judge against other sources, and the features take out what it wrongly rewards: length, questions,
  turns.
- *People are late.* A source with `share` and `required: false` delays nothing, so that most of
  what it says comes when the episode has trained. Before each update `learn` asks the ledger for
  such answers on the episodes that are kept. What it took up is written to `calibration/` in the
  run's folder, so that a run that goes on after a kill takes up the same. What people say of an
  episode never changes that episode's own reward (unless their source has a weight).
- *Scales.* `ranges: {people: [1, 5], judge: [0, 1]}` puts people's scores on the judge's scale by a
  straight line, so that rewards keep their scale and the bias means something. Without it both are
  taken to be on one scale; where they are not, the correction ends up on people's, and the reward's
  scale jumps as it begins.
- *Rankings* count as the share of the others that an episode beats. They say nothing of levels: no
  mean and no worth is reported then, and no drift is watched.

The alarm (`engine.calibration.Drift`, at 1 % over the whole run) hears one residual per labelled
start, the mean over its episodes, over all versions of the judge.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...judging import (
    KINDS,
    Correction,
    Drift,
    Feature,
    Ranges,
    check_ranges,
    correlations,
    fit_correction,
    luck,
    mean_interval,
    named_features,
    on_scale,
    prediction_powered_mean,
    same_order,
    scores_of,
)
from ...protocols import Answer, Combiner, Comparison, Episode, Feedback, NoReward, Rewards, RunView
from ...tools import derive_id, did_you_mean, files
from .weighted import Weighted

Record = dict[str, Any]  # what is kept of an episode, JSON data: see `_record`


class Calibrated(Combiner):
    """Corrects a judge by what people say, and sums it with other sources.

    Args:
        weights, turns: as in `weighted`.
        judge: name of the source that is corrected, or several.
        people: name of the source that is believed, or several.
        features: of episodes, that the correction may use: `words`, `turns`, `questions`, `lines`,
            or functions of an episode.
        ranges: source to [lowest, highest], where people's scale is not the judge's; a judge
            without a range has [0, 1].
        min_labels: episodes that both must have judged before anything is corrected.
        history: how many of the latest episodes are kept, and judged by.

    Raises:
        ValueError: with what would be right.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        judge: str | Sequence[str],
        people: str | Sequence[str],
        features: Sequence[Feature] = (),
        ranges: Ranges | None = None,
        min_labels: int = 30,
        history: int = 5000,
        turns: Sequence[str] = (),
    ) -> None:
        self.judges, self.people = _names(judge), _names(people)
        for what, names in (("judge", self.judges), ("people", self.people)):
            if not names:
                raise ValueError(
                    f"{what} must name a source; asked are {', '.join(sorted(weights))}"
                )
            for name in names:
                if name not in weights or name == "environment":
                    raise ValueError(
                        f"{what} names the source {name!r}, which is not"
                        f" asked.{did_you_mean(name, weights)}"
                    )
                if what == "judge" and name in turns:
                    raise ValueError(
                        f"the scores of {name!r} arrive at its turns; only scores of whole episodes"
                        " are corrected"
                    )
        if both := set(self.judges) & set(self.people):
            raise ValueError(
                f"{sorted(both)[0]!r} cannot be corrected by itself: name a judge and other sources"
                " as people"
            )
        if min_labels < 4 or history < min_labels:
            raise ValueError(
                f"min_labels must be at least 4 and at most history, got {min_labels} and {history}"
            )
        self.features = named_features(features)
        self.ranges = check_ranges(ranges or {}, [*self.judges, *self.people])
        self.min_labels, self.history = min_labels, history
        self._weighted, self.turns = Weighted(weights, turns), tuple(turns)
        self._records: dict[str, Record] = {}  # by episode, oldest first
        self._present: frozenset[str] = frozenset()  # groups and episodes of the present update
        self._ranked = False  # there are rankings: scores are not levels
        self._watch = {name: Drift() for name in self.judges}
        # The update of each residual.
        self._watched: dict[str, list[int]] = {name: [] for name in self.judges}
        self._warned: set[str] = set()
        # Version of the judge, and its correction.
        self._corrections: dict[str, tuple[str, Correction]] = {}

    def learn(self, run: RunView) -> None:
        """Takes up people's answers on earlier updates' episodes since these have trained."""
        late: dict[str, list[str]] = {}
        for answer in self._late(run):
            for id_, score in scores_of(answer).items():
                if id_ in self._records:
                    if not self._records[id_]["people"]:
                        late.setdefault(self._records[id_]["group"], []).append(id_)
                    self._note(self._records[id_], answer, score)
        for _, ids in sorted(
            late.items(), key=lambda item: (self._records[item[1][0]]["update"], item[0])
        ):
            self._note_people(list(dict.fromkeys(ids)))

    def fit(self, feedback: Sequence[Answer]) -> None:
        """Makes the corrections of this update, from the answers on earlier ones."""
        self._corrections = {name: self._correction(name) for name in self.judges}
        self._present = frozenset(a.target for a in feedback)

    def combine(
        self, group: Sequence[Episode], feedback: Sequence[Answer]
    ) -> list[Rewards | NoReward]:
        """Rewards by the judges' corrected scores, weighted, and records the group's answers."""
        rewards = self._weighted.combine(group, self._corrected(group, feedback))
        # Not played aside.
        if any(e.id in self._present or e.group in self._present for e in group):
            self._record(group, feedback)
        return rewards

    def _corrected(self, group: Sequence[Episode], feedback: Sequence[Answer]) -> list[Answer]:
        episodes = {e.id: e for e in group}
        found: list[Answer] = []
        for answer in feedback:
            version, correction = self._corrections.get(answer.stamp.source, ("", Correction()))
            scores = {i: s for i, s in scores_of(answer).items() if i in episodes}
            if correction.kind == "none" or version != answer.stamp.version or not scores:
                found.append(answer)
                continue
            for id_, score in scores.items():
                better = correction(
                    score, self._features(episodes[id_]) if correction.weights else None
                )
                if isinstance(answer, Feedback):
                    found.append(replace(answer, score=better))
                else:
                    found.append(Feedback(id_, better, id=answer.id, stamp=answer.stamp))
        return found

    # What is known.

    def _record(self, group: Sequence[Episode], feedback: Sequence[Answer]) -> None:
        """Keeps the answers on a group that trains."""
        for e in group:
            self._records.pop(e.id, None)
            self._records[e.id] = {
                "group": e.group, "update": e.update, "luck": luck(e),
                "features": self._features(e), "judge": {}, "people": {},
            }  # fmt: skip
        ids = {e.id for e in group}
        for answer in feedback:
            for id_, score in scores_of(answer).items():
                if id_ in ids:
                    self._note(self._records[id_], answer, score)
        self._note_people([e.id for e in group if self._records[e.id]["people"]])
        while len(self._records) > self.history:
            del self._records[next(iter(self._records))]

    def _note(self, record: Record, answer: Answer, score: float) -> None:
        source = answer.stamp.source
        if source in self.judges:
            record["judge"].setdefault(source, {"version": answer.stamp.version, "scores": []})[
                "scores"
            ].append(score)
        elif source in self.people:
            record["people"][answer.id] = [source, score]
        else:
            return
        self._ranked |= isinstance(answer, Comparison)

    def _note_people(self, ids: Sequence[str]) -> None:
        """Tells the alarms of a start's newly labelled episodes, and warns."""
        if self._ranked:
            return
        for name, drift in self._watch.items():
            residuals = [
                human - judge
                for judge, human, _ in self._both([self._records[i] for i in ids], name)
            ]
            if not residuals:
                continue
            drift.add(math.fsum(residuals) / len(residuals), self._records[ids[0]]["luck"])
            self._watched[name].append(self._records[ids[0]]["update"])
            if drift.alarm is not None and drift.began is not None and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"judge {name!r} drifted: from about update {self._watched[name][drift.began]}"
                    f" on people's score less the judge's is {drift.shift:+.3g} from what it was"
                    f" before (noticed in update {self._watched[name][drift.alarm - 1]}, after"
                    f" {drift.alarm} labelled starts; a false alarm has a chance of 1 % over the"
                    " whole run). Look at `turnwise judges`, or shorten `history`",
                    stacklevel=2,
                )

    def _late(self, run: RunView) -> list[Answer]:
        """People's answers on kept episodes that came since; for an update that is made again those
        that were there the first time."""
        if not self._records:
            return []
        number, key = run.updates + 1, derive_id(sorted(self._records))[:8]
        note = run.folder / "calibration" / f"update-{number:06d}-{key}.json"
        if note.is_file() and (written := files.read_note(note))["run"] == run.id:
            return run.ledger.feedback(ids=written["answers"], late=True, corrected=True)
        known = {id_ for record in self._records.values() for id_ in record["people"]}
        groups = sorted({record["group"] for record in self._records.values()})
        new = run.ledger.feedback(groups, sources=self.people, status="scored", late=True)
        found = [a for a in new if a.id not in known]
        note.parent.mkdir(exist_ok=True)
        files.write(
            note,
            json.dumps({"run": run.id, "update": number, "answers": [a.id for a in found]}) + "\n",
        )
        return found

    def _features(self, episode: Episode) -> dict[str, float]:
        return {name: float(function(episode)) for name, function in self.features.items()}

    # What follows from it.

    def _version(self, judge: str) -> str | None:
        """The version in force: that of the latest episode it judged."""
        return next(
            (
                r["judge"][judge]["version"]
                for r in reversed(self._records.values())
                if judge in r["judge"]
            ),
            None,
        )

    def _both(self, records: Sequence[Record], judge: str) -> list[tuple[float, float, Record]]:
        """The judge's score, people's on its scale, and the record, where there are both."""
        found = []
        for record in records:
            if judge in record["judge"] and record["people"]:
                pairs = [
                    on_scale(score, source, judge, self.ranges)
                    for source, score in record["people"].values()
                ]
                found.append((_mean(record["judge"][judge]["scores"]), _mean(pairs), record))
        return found

    def _of_version(self, judge: str) -> list[Record]:
        version = self._version(judge)
        return [
            r
            for r in self._records.values()
            if judge in r["judge"] and r["judge"][judge]["version"] == version
        ]

    def _correction(self, judge: str) -> tuple[str, Correction]:
        both = self._both(self._of_version(judge), judge)
        if len(both) < self.min_labels:
            return "", Correction(labels=len(both))
        columns = {
            name: [record["features"][name] for *_, record in both] for name in self.features
        }
        groups = [record["group"] for *_, record in both]
        return self._version(judge) or "", fit_correction(
            [f for f, *_ in both], [y for _, y, _ in both], columns, groups
        )

    def metrics(self) -> dict[str, float]:
        """`calibration/...`, with the judge's name where there are several; of the kept episodes
        and the version in force, see docs/calibration.md."""
        found: dict[str, float] = {}
        for name in self.judges:
            where = "calibration" if len(self.judges) == 1 else f"calibration/{name}"
            found |= {
                f"{where}/{key}": value
                for key, value in self._measured(name).items()
                if math.isfinite(value)
            }
        return found

    def _measured(self, judge: str) -> dict[str, float]:
        records = self._of_version(judge)
        both = self._both(records, judge)
        correction = self._corrections.get(judge, ("", Correction()))[1]
        found = {
            "labels": float(len(both)), "judged": float(len(records)),
            "drift": float(self._watch[judge].alarm is not None),
            "correction": float(KINDS.index(correction.kind)), "residual_sd": correction.sd,
        }  # fmt: skip
        if not both:
            return found
        f, y, groups = (
            [f for f, *_ in both],
            [y for _, y, _ in both],
            [record["group"] for *_, record in both],
        )
        if (r := correlations(f, y, groups)) is not None:
            found["correlation"] = r.pearson.estimate
        if (order := same_order(f, y, groups, within=True)) is not None:
            found["order"] = order.share.estimate
        if self._ranked:
            return found
        others = [record for record in records if not record["people"]]
        unlabelled, elsewhere = (
            [_mean(r["judge"][judge]["scores"]) for r in others],
            [r["group"] for r in others],
        )
        mean = prediction_powered_mean(unlabelled, f, y, (elsewhere, groups))
        found |= {
            "bias": mean_interval(np.subtract(y, f), groups).estimate, "judge_mean": mean.judge,
            "mean": mean.mean.estimate,
            "low": mean.mean.low, "high": mean.mean.high, "width": mean.mean.width,
            "human_width": mean.human.width, "worth": mean.worth,
        }  # fmt: skip
        return found

    def state_dict(self) -> dict[str, Any]:
        """The kept episodes and the alarms. Corrections are made of them at the next `fit`."""
        return {
            "records": [[id_, record] for id_, record in self._records.items()],
            "ranked": self._ranked,
            "watch": {name: drift.state_dict() for name, drift in self._watch.items()},
            "watched": self._watched,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the records and the watch for drift of a checkpoint."""
        self._records = dict(state["records"])
        self._ranked = state["ranked"]
        self._watched = {name: list(state["watched"].get(name, ())) for name in self.judges}
        for name, drift in self._watch.items():
            if name in state["watch"]:
                drift.load_state_dict(state["watch"][name])
            if drift.alarm is not None:
                self._warned.add(name)


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
