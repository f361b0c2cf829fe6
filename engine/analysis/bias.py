"""Biases of a judge: what its verdicts follow in addition to the content, which may be the place on
the page, length and format, or its own family.

Pure functions in numpy. Everything is measured on answers a run holds anyway (in force, of one
judge; `bias_report` takes many and sorts them). All results on pairs have one unit: the net win
rate, P(wins) - P(loses); "3 points" are 0.03 of it.

Position. A verdict shows K episodes in an order, the k-th (from 0) in place p = k / (K - 1), and
gives each a normalised rank s in [0, 1], 1 the best (for two: the probability that it wins). What
the first place is worth over the last is minus the slope of s on p; for a pair s_first - s_last:

    bias = mean of  - sum_k (p_k - 1/2)(s_k - 1/2) / sum_k (p_k - 1/2)^2

A judge that ignores the content with probability b and ranks as shown has bias b, whatever it
thinks of the content: in the mean over an order and its reverse the content cancels. So where
enough was looked at in both orders, that alone is used, the mean of the two being one observation;
else every verdict is one, and the order must have been drawn at random. The deviation of the
estimate over n such observations:

    both orders  sqrt(v / n)   v = b (1 - b) where the judge is sure of the content, (1 - b^2) / 2
                 where it tosses a coin
    one order    sqrt((1 - b^2) / n)

Style and family. Of two episodes i (shown first, where that is known) and j, with d the difference
of a feature, sd its root mean square, and r what a reference says (people, a gold judge), in one
logistic regression with a N(0, 10) prior:

    logit P(i beats j) = side + sum_f beta_f tanh(d_f / sd_f) + rho (r_i - r_j) / sd_r
    effect of f        = 2 sigma(beta_f tanh(1)) - 1

(after Dubois et al. 2024, arXiv:2404.04475; features as in the style control of LMSYS, 2024). The
effect is the net win rate of what has one sd more of f over an equally good one. Scores: the same
terms, centred in each group, against the score in sd within groups, by least squares; the effect is
beta_f tanh(1) sd. Self-preference is the effect of "written by the judge's own family", a linear
term.

Without a reference an effect may be deserved. With a noisy one a part of it may be: where longer
replies are better, length tells the judge's good taste better than a single person's scores do, and
passes for a bias. Two references with independent errors cure that: r is then what the second and
the features of style predict of the first (regression calibration, Carroll et al. 2006, Measurement
Error in Nonlinear Models, ch. 4). What noise is left makes effects smaller, since pairs that look
equal are not quite.

Intervals are 95 %, groups being what was drawn: percentiles of the bootstrap over groups for means,
cluster-robust errors (Liang and Zeger 1986, doi:10.1093/biomet/73.1.13) with Student's t for
regressions. Two artificial verdicts, one for either extreme, are drawn along with the means, so
that thirty pairs without a fault do not prove that there is none (Bonett and Price 2012,
doi:10.3102/1076998611411915).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..records.episode import Episode
from ..records.feedback import Comparison, Feedback
from .positions import Answers, Bias, flips, position
from .style import self_preference, style


def bias_report(
    answers: Answers,
    episodes: Iterable[Episode],
    *,
    reference: Mapping[str, float] | None = None,
    second: Mapping[str, float] | None = None,
    authors: Mapping[str, str] | None = None,
    families: Mapping[str, str] | None = None,
) -> list[Bias]:
    """Measures every bias of every judge for which there are enough answers; judges are in the
    order of their names.

    Args:
        answers: in force, of any number of judges; a judge is `stamp.rater` (`stamp.source` where
            that is empty) in one `stamp.version`.
        episodes: what was judged.
        reference: episode id to what it is worth by a better judge: people's scores, an aggregate,
            a gold judge.
        second: the same by others, with errors of their own; give the scores of one half of the
            people here and of the other half there.
        authors: episode id to the model family that wrote it.
        families: judge to the family that it is of; with `reference` and `authors`, self-preference
            is measured.
    """
    played = {episode.id: episode for episode in episodes}
    judges: dict[tuple[str, str], list[Feedback | Comparison]] = defaultdict(list)
    for answer in answers:
        if answer.status == "scored":
            judges[answer.stamp.rater or answer.stamp.source, answer.stamp.version].append(answer)
    report: list[Bias] = []
    for (rater, version), own in sorted(judges.items()):
        found = [position(own), flips(own), *style(own, played, reference, second)]
        if (
            reference is not None
            and authors is not None
            and families is not None
            and rater in families
        ):
            found += self_preference(own, played, authors, families[rater], reference, second)
        report += [
            replace(bias, rater=rater, version=version) for bias in found if bias is not None
        ]
    return report
