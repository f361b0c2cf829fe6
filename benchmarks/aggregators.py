"""Does it help to know who rates? Aggregators against simulated raters whose faults are known.

    python benchmarks/aggregators.py            # under a minute on one core; writes the tables of
                                                docs/aggregators.md
    python benchmarks/aggregators.py --print    # only prints them

- comparisons: six raters, of whom two always take what is shown on the left, one throws a coin,
  three follow Bradley-Terry with the true scores, which are N(0, 2), as the priors say. Every pair
  is judged 8 times (2 in the sparse design), each time by a rater drawn at random, the side drawn
  at random. Two designs: 60 items in one group, each in four pairs (two random rings, 120 pairs
  less repeated ones); 15 groups of 4 with all their pairs, as in training. Kendall's tau with the
  truth, within groups; spread of (estimate - truth) / sd, which is 1 for honest deviations. The
  rule that names careless raters: reliability below half of the best rater's; one-sided ones:
  |side| above 1 and above twice its deviation.
- labels: 30 raters with 15 labels each on 150 items, 3 per item, classes alike frequent. A rater is
  right with a chance that is uniform in 0.55 to 0.95 (two classes) or 0.35 to 0.95 (three), else
  gives any other class. Accuracy of the most probable class, ties of the vote half or a third.

20 seeds; intervals are 95 % t intervals, of paired differences where two are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.special import expit
from scipy.stats import kendalltau, t
from turnwise import Aggregate, Comparison, Feedback, Stamp
from turnwise.plugins.aggregators.bradley_terry import BradleyTerry
from turnwise.plugins.aggregators.common import scores
from turnwise.plugins.aggregators.dawid_skene import DawidSkene
from turnwise.plugins.aggregators.rater_bradley_terry import RaterBradleyTerry

SEEDS = range(20)
PAGE = Path(__file__).parents[1] / "docs" / "aggregators.md"
MARKS = "<!-- tables: benchmarks/aggregators.py -->", "<!-- end of tables -->"
BAD, LEFT = {"r0", "r1", "r2"}, {"r0", "r1"}


def panel(
    seed: int, groups: int, judgements: int, items: int = 60
) -> tuple[np.ndarray, list[Comparison]]:
    """True scores, and what six raters say of pairs."""
    rng = np.random.default_rng(seed)
    truth, size = rng.normal(0, 2**0.5, items), items // groups
    if groups == 1:
        rings = [rng.permutation(items) for _ in range(2)]
        drawn = sorted(
            {tuple(sorted((int(r[i]), int(r[i - 1])))) for r in rings for i in range(items)}
        )
    else:
        drawn = [
            (g * size + i, g * size + j)
            for g in range(groups)
            for i in range(size)
            for j in range(i)
        ]
    said = []
    for i, j in drawn:
        for _ in range(judgements):
            w = int(rng.integers(6))
            left, right = (i, j) if rng.random() < 0.5 else (j, i)
            takes_left = w < 2 or (
                rng.random() < (0.5 if w == 2 else expit(truth[left] - truth[right]))
            )
            best, worst = (left, right) if takes_left else (right, left)
            shown = {"order": [f"e{left}", f"e{right}"]}
            said.append(
                Comparison(
                    f"g{i // size}",
                    ((f"e{best}",), (f"e{worst}",)),
                    shown=shown,
                    stamp=Stamp(rater=f"r{w}"),
                )
            )
    return truth, said


def crowd(seed: int, classes: int) -> tuple[np.ndarray, list[Feedback]]:
    """True classes, and sparse labels."""
    rng = np.random.default_rng(seed)
    truth, skill = (
        rng.integers(classes, size=150),
        rng.uniform(0.35 if classes > 2 else 0.55, 0.95, 30),
    )
    slots = rng.permutation(np.repeat(np.arange(30), 15)).reshape(150, 3)
    said = []
    for i, k in enumerate(truth):
        for w in slots[i]:
            label = k if rng.random() < skill[w] else (k + rng.integers(1, classes)) % classes
            said.append(Feedback(f"e{i}", float(label), stamp=Stamp(rater=f"r{w}")))
    return truth, said


def tau(truth: np.ndarray, found: Aggregate, groups: int) -> tuple[float, list[float]]:
    """Mean over groups of Kendall's tau, and errors over deviations, both within groups."""
    score, sd = (
        np.array([getattr(found.scores[f"e{i}"], what) for i in range(len(truth))])
        for what in ("score", "sd")
    )
    rows, ranks = truth.reshape(groups, -1), score.reshape(groups, -1)
    z = (score - (rows - rows.mean(1, keepdims=True)).ravel()) / sd
    taus = [kendalltau(x, y).statistic for x, y in zip(rows, ranks, strict=True)]
    return float(np.mean(np.nan_to_num(taus))), z.tolist()  # all tied: nothing is known, which is 0


def interval(values: Sequence[float]) -> str:
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} ± {half:.3f}"


def comparisons() -> str:
    lines = [
        (
            "| design | tau, `bradley-terry` | tau, `rater-bradley-terry` | difference | error / sd"
            " | runs that name exactly the three, the two |"
        ),
        "| --- | --- | --- | --- | --- | --- |",
    ]
    people = ["| rater | reliability | side bias |", "| --- | --- | --- |"]
    for name, groups, judgements in (
        ("one group of 60, 8 per pair", 1, 8),
        ("15 groups of 4, 8 per pair", 15, 8),
        ("15 groups of 4, 2 per pair", 15, 2),
    ):
        plain, ours, z, named, sided = [], [], [], 0, 0
        each: dict[str, list[tuple[float, float]]] = {f"r{w}": [] for w in range(6)}
        for seed in SEEDS:
            truth, said = panel(seed, groups, judgements)
            plain.append(tau(truth, BradleyTerry().aggregate(said), groups)[0])
            found = RaterBradleyTerry().aggregate(said)
            value, errors = tau(truth, found, groups)
            ours.append(value)
            z += errors
            best = max(r.reliability for r in found.raters.values())
            named += {w for w, r in found.raters.items() if r.reliability < best / 2} == BAD
            sided += {
                w
                for w, r in found.raters.items()
                if abs(r.side or 0) > max(1, 2 * (r.side_sd or 0))
            } == LEFT
            for w, r in found.raters.items():
                each[w].append((r.reliability, r.side or 0.0))
        gain = [b - a for a, b in zip(plain, ours, strict=True)]
        lines.append(
            f"| {name} | {interval(plain)} | {interval(ours)} | {interval(gain)} | {np.std(z):.2f}"
            f" | {named} and {sided} of {len(SEEDS)} |"
        )
        if groups == 1:
            kinds = {"always left": ("r0", "r1"), "coin": ("r2",), "honest": ("r3", "r4", "r5")}
            for kind, members in kinds.items():
                own = np.array([x for w in members for x in each[w]])
                (low, low_side), (high, high_side) = own.min(0), own.max(0)
                people.append(
                    f"| {kind} | {own[:, 0].mean():.2f} ({low:.2f} to {high:.2f}) |"
                    f" {own[:, 1].mean():.2f} ({low_side:.2f} to {high_side:.2f}) |"
                )
    return "\n".join(
        [*lines, "", "Raters in the first design, mean and range over all seeds:", "", *people]
    )


def labels() -> str:
    lines = [
        (
            "| classes | majority | `dawid-skene` | difference | its own confidence | difference"
            " with `right: 8, wrong: 2` | difference without prior |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for classes in (2, 3):
        rows = []
        for seed in SEEDS:
            truth, said = crowd(seed, classes)
            votes = np.zeros((len(truth), classes))
            for answer in said:
                votes[int(answer.episode[1:]), int(answer.score or 0)] += 1
            best = votes == votes.max(1, keepdims=True)
            majority = (best[np.arange(len(truth)), truth] / best.sum(1)).mean()
            hits = []
            for model in (
                DawidSkene(),
                DawidSkene(right=8, wrong=2),
                DawidSkene(right=1e-6, wrong=1e-7),
            ):
                episodes, _, _, posterior, _, _ = model.fit(scores(said))
                own = np.array([truth[int(e[1:])] for e in episodes])
                hits += [(posterior.argmax(1) == own).mean(), posterior.max(1).mean()]
            rows.append(
                (
                    majority,
                    hits[0],
                    hits[0] - majority,
                    hits[1],
                    hits[2] - majority,
                    hits[4] - majority,
                )
            )
        columns = list(zip(*rows, strict=True))
        lines.append(f"| {classes} | " + " | ".join(interval(c) for c in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Aggregators against simulated raters.")
    parser.add_argument(
        "--print", action="store_true", help="print the tables and leave the page as it is"
    )
    only_print = parser.parse_args().print
    tables = f"{comparisons()}\n\nSparse labels:\n\n{labels()}"
    print(tables)
    if not only_print:
        before, rest = PAGE.read_text().split(MARKS[0])
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
