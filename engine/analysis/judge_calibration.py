"""How far a judge agrees with people, as numbers and as sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .calibration import (
    Correction,
    Correlations,
    Order,
)
from .prediction_powered import Interval, PoweredMean, Worth


@dataclass(frozen=True, slots=True)
class Part:
    """The statistics of a judge and people over some of the episodes: all, those of one version of
    the judge, or of a window of updates.

    People's score of an episode is the mean over its raters, on the judge's scale (`ranges`). What
    rests on levels is None where either side ranked: scores of rankings have mean 1/2 in every
    group, whatever is thought of it.

    Attributes:
        name: "all", "version ...", "updates 1 to 20".
        labels, judged: episodes that people scored too, and all that the judge scored.
        mean: the average score that people would give.
        bias: mean of people's score less the judge's.
        worth: in human ratings.
        correlations: of the two.
        order, order_within: how often the judge orders two episodes as people do; of all pairs, and
            of pairs of one start.
        alpha: Krippendorff's, at interval level, between the judge and people's mean.
        correction: of single scores.
    """

    name: str
    labels: int
    judged: int
    mean: PoweredMean | None
    bias: Interval | None
    worth: Worth | None
    correlations: Correlations | None
    order: Order | None
    order_within: Order | None
    alpha: float | None
    correction: Correction


@dataclass(frozen=True, slots=True)
class Change:
    """A change between two versions of a judge that followed one another: how much the bias of the
    second lies above that of the first."""

    before: str
    after: str
    difference: Interval


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm that the judge drifted, see `calibration.Drift`.

    Attributes:
        update: where it was raised; `began`: where the drift most likely began.
        shift: mean of people's score less the judge's from there on, less that before.
        labels: residuals added until then.
    """

    update: int
    began: int
    shift: float
    labels: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """A judge calibrated against people's answers. `whole` is None where no episode has both.

    Attributes:
        versions, windows: in order of the updates; those with at least two labelled episodes.
        changes: from each version to the next.
        alarm: None: no drift was noticed, at a chance of 1 % of a false alarm over the whole run.
        watched: residuals that the alarm has been given.
        rankings: how often the judge orders two episodes as a person's ranking does.
        people_correlation: of two people's scores of one episode; people_alpha: Krippendorff's
            among people, at interval level.
        people_agreement: the chance that two people order a pair alike, over pairs that both
            ordered. These three are what a judge can be expected to reach; None where no two people
            looked at the same.
    """

    judge: str
    people: tuple[str, ...]
    whole: Part | None
    versions: tuple[Part, ...] = ()
    windows: tuple[Part, ...] = ()
    changes: tuple[Change, ...] = ()
    alarm: Alarm | None = None
    watched: int = 0
    rankings: Order | None = None
    people_correlation: Interval | None = None
    people_alpha: float | None = None
    people_agreement: float | None = None

    def lines(self) -> list[str]:
        """Returns the results as sentences."""
        people = ", ".join(self.people) or "people"
        if self.whole is None:
            return [
                f"{self.judge}: no episode was scored by the judge and by people ({people});"
                " the two cannot be compared yet."
            ]
        part = self.whole
        lines = [
            f"{self.judge}: people ({people}) scored {part.labels} of the {part.judged} episodes"
            " that it judged."
        ]
        lines += _about(part)
        if self.rankings is not None:
            lines.append(f"It orders {_order(self.rankings)} that people ranked as they do.")
        if self.people_agreement is not None:
            lines.append(
                f"Two people order a pair alike in {self.people_agreement:.0%} of the cases."
            )
        if self.people_correlation is not None:
            alpha = (
                "" if self.people_alpha is None else f"; alpha among people {self.people_alpha:.2f}"
            )
            lines.append(
                "Two people's scores of one episode correlate at"
                f" {_spoken(self.people_correlation)}{alpha}."
            )
        for change in self.changes:
            d = change.difference
            known = "no change can be told" if d.low <= 0 <= d.high else "that is a change"
            lines.append(
                f"From version {change.before} to {change.after} its bias moved by"
                f" {_spoken(d, signed=True)}: {known}."
            )
        for part in (
            *(self.versions if len(self.versions) > 1 else ()),
            *(self.windows if len(self.windows) > 1 else ()),
        ):
            bias = "" if part.bias is None else f", bias {_spoken(part.bias, signed=True)}"
            r = (
                ""
                if part.correlations is None
                else f", correlation {_spoken(part.correlations.pearson)}"
            )
            value = (
                "" if part.worth is None else f", worth {_spoken(part.worth.ratings, 0)} ratings"
            )
            lines.append(f"{part.name}: {part.labels} labels{bias}{r}{value}.")
        if self.alarm is not None:
            a = self.alarm
            lines.append(
                f"It DRIFTED: from about update {a.began} on people's score less the judge's is"
                f" {a.shift:+.3g} from what it was; noticed in update {a.update}, after {a.labels}"
                " labelled starts."
            )
        elif self.watched:
            lines.append(
                f"No drift was noticed over {self.watched} labelled starts (false alarms: 1 % over"
                " a whole run)."
            )
        return lines


def _about(part: Part) -> list[str]:
    lines = []
    if part.worth is not None:
        ratings, limit = part.worth.ratings, part.worth.limit
        if part.mean is not None and not part.mean.power:
            lines.append(
                "This judge is worth no human ratings: it agrees with people too little to help"
                f" ({part.labels} labels)."
            )
        else:
            most = "without limit" if math.isinf(limit) else f"up to {limit:.0f}"
            lines.append(
                f"This judge is worth {_spoken(ratings, 0)} human ratings: so many more would"
                f" narrow people's interval as much as it does; {most} if it judged ever more"
                " episodes."
            )
    if part.mean is not None:
        lines.append(
            f"People would say {_spoken(part.mean.mean)} on average; from their scores alone"
            f" {_spoken(part.mean.human)}; the judge itself says {part.mean.judge:.3g}."
        )
    if part.bias is not None:
        b = part.bias
        how = (
            "is not shown to be biased"
            if b.low <= 0 <= b.high
            else "scores too low"
            if b.estimate > 0
            else "scores too high"
        )
        lines.append(f"It {how}: people's score less the judge's is {_spoken(b, signed=True)}.")
    if part.correlations is not None:
        c, alpha = part.correlations, "" if part.alpha is None else f"; alpha {part.alpha:.2f}"
        lines.append(
            f"Its scores correlate with people's at {_spoken(c.pearson)} (ranks:"
            f" {_spoken(c.spearman)}{alpha})."
        )
    for order, what in (
        (part.order, "of episodes"),
        (part.order_within, "of episodes of one start"),
    ):
        if order is not None:
            lines.append(f"It orders {_order(order)} {what} as people do.")
    kind = {
        "none": "no correction is shown to help",
        "shift": f"a shift of {part.correction.intercept:+.3g} helps",
    }
    linear = f"{part.correction.intercept:.3g} + {part.correction.slope:.3g} x its score"
    more = "".join(f" {w:+.3g} x {name}" for name, w in (part.correction.weights or {}).items())
    how = kind.get(part.correction.kind, f"people's scores are told better by {linear}{more}")
    off = (
        ""
        if math.isinf(part.correction.sd)
        else f"; single scores are then off by {part.correction.sd:.3g} (standard deviation)"
    )
    return [*lines, f"Of its single scores, {how}{off}."]


def _order(order: Order) -> str:
    share, of_ties = order.share, f", {order.judge_ties} left open" if order.judge_ties else ""
    return (
        f"{share.estimate:.0%} ({share.low:.0%} to {share.high:.0%}) of {order.pairs}"
        f" pairs{of_ties}"
    )


def _spoken(interval: Interval, digits: int | None = None, signed: bool = False) -> str:
    def number(x: float) -> str:
        return (
            f"{x:.{digits}f}"
            if digits is not None and math.isfinite(x)
            else f"{x:{'+' if signed else ''}.3g}"
        )

    if math.isinf(interval.width) and math.isinf(interval.low):
        return f"{number(interval.estimate)} (too few labels for an interval)"
    return f"{number(interval.estimate)} ({number(interval.low)} to {number(interval.high)})"
