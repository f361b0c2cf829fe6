"""Judges with known faults, measured: planted biases against what `turnwise.engine.analysis.bias`
finds, and canaries against gullible judges.

    python benchmarks/judge_bias.py            # three minutes on one core; writes the tables of
                                               docs/judge-bias.md
    python benchmarks/judge_bias.py --print    # only prints them

- pairs: two replies each, worth s ~ N(0, 1), lengths log-normal and longer where the reply is
better (correlation 0.3), the first written by the judge's family. The judge's log-odds are 2 (s_i -
s_j) plus what is planted; in the rows "sure of itself" it picks the better one. Position: with
probability b it takes what is shown first, a new draw for each look. Length: beta tanh(d / sd).
Self-preference: delta for its family's. These two are planted as coefficients and stated as net win
rates between equals, 2 sigma(beta tanh(1)) - 1 and 2 sigma(delta) - 1.
- lists: the whole group is ranked by s + Gumbel noise, or as shown with probability b.
- the reference is s itself; or s + N(0, 1), as one person would say it; or two such, independent.
- canaries: beside one verdict in ten, kinds as in `KINDS`; a judge falls for each kind with the
  given probability, sound: 1 %.

20 seeds. "within 3": runs whose estimate is within 3 points of the truth; "covered": runs whose 95
% interval holds it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit
from turnwise import Comparison, Episode, Feedback, Message, Stamp, Start, Turn
from turnwise.engine.analysis.positions import Bias, position
from turnwise.engine.analysis.style import self_preference, style
from turnwise.judges.trust.canaries import KINDS, Quarantine, Schedule

SEEDS = range(20)
PAGE = Path(__file__).parents[1] / "docs" / "judge-bias.md"
MARKS = "<!-- tables: benchmarks/judge_bias.py -->", "<!-- end of tables -->"
SURE = 1e6  # log-odds per unit of worth of a judge that makes no mistakes


def world(seed: int, pairs: int) -> tuple[dict[str, Episode], np.ndarray, np.ndarray]:
    """Episodes by id, "0a" and "0b" being the first pair; worth and lengths, [pairs, 2]."""
    rng = np.random.default_rng(seed)
    worth, noise = rng.normal(size=(2, pairs, 2))
    length = np.exp(5 + 0.5 * (0.3 * worth + 0.91**0.5 * noise)).astype(int)
    heard = Message("user", "?")
    played = {
        f"{k}{side}": Episode(
            f"{k}{side}", Start("planted", k), (Turn(heard, "x" * length[k, i], 0.0),), "terminated"
        )
        for k in range(pairs)
        for i, side in enumerate("ab")
    }
    return played, worth, length


def judged(
    seed: int,
    played: Mapping[str, Episode],
    lean: np.ndarray,
    first: float = 0.0,
    both: bool = True,
) -> list[Comparison]:
    """What a judge says of every pair in both orders, or in one that is drawn: its log-odds for "a"
    are `lean`, [pairs]; with probability `first` it takes what is shown first."""
    rng = np.random.default_rng([seed, 1])
    said = []
    for k, a in enumerate(expit(lean)):
        orders = [("a", "b"), ("b", "a")]
        looked: list[dict[str, Any]] = []
        for one, other in orders if both else [orders[rng.integers(2)]]:
            wins = rng.random() < first or rng.random() < (a if one == "a" else 1 - a)
            looked.append({"order": [f"{k}{one}", f"{k}{other}"], "first": float(wins)})
        sides = f"{k}a", f"{k}b"
        sure = float(
            np.mean(
                [
                    look["first"] if look["order"] == list(sides) else 1 - look["first"]
                    for look in looked
                ]
            )
        )
        best, worst = sides if sure >= 0.5 else sides[::-1]
        tiers = (sides,) if sure == 0.5 else ((best,), (worst,))
        details = {"orders": looked}
        said.append(
            Comparison(played[best].group, tiers, details=details, stamp=Stamp(rater="judge"))
        )
    return said


def ranked(seed: int, groups: int, size: int, first: float) -> list[Comparison]:
    """Whole groups ranked in one drawn order."""
    rng = np.random.default_rng([seed, 2])
    said = []
    for g in range(groups):
        ids = [f"{g}-{i}" for i in range(size)]
        order = [ids[i] for i in rng.permutation(size)]
        by_worth = [
            ids[i] for i in np.argsort(-(rng.normal(size=size) + 0.5 * rng.gumbel(size=size)))
        ]
        best = order if rng.random() < first else by_worth
        said.append(Comparison(f"g{g}", tuple((e,) for e in best), shown={"order": order}))
    return said


def by_id(values: np.ndarray) -> dict[str, float]:
    """[pairs, 2] by episode id."""
    return {
        f"{k}{side}": float(values[k, i]) for k in range(len(values)) for i, side in enumerate("ab")
    }


def row(name: str, truth: float, found: Sequence[Bias]) -> str:
    error = np.array([bias.estimate for bias in found]) - truth
    covered = sum(bias.low <= truth <= bias.high for bias in found)
    mean = 100 * float(np.mean(error) + truth)
    return (
        f"| {name} | {100 * truth:.1f} | {mean:.1f} | {100 * np.sqrt((error**2).mean()):.1f} |"
        f" {100 * np.abs(error).max():.1f} | {sum(np.abs(error) <= 0.03)} of {len(found)} |"
        f" {covered} of {len(found)} |"
    )


HEAD = (
    "| planted | truth | measured, mean | typical error | largest | within 3 | covered |\n| --- |"
    " --- | --- | --- | --- | --- | --- |"
)


def positions() -> str:
    lines = [HEAD]
    for both, sharp, pairs in (
        (True, SURE, 1000),
        (True, 2.0, 1000),
        (True, 2.0, 4000),
        (False, 2.0, 1000),
        (False, 2.0, 4000),
    ):
        for b in (0.0, 0.05, 0.1, 0.2):
            found = []
            for seed in SEEDS:
                played, worth, _ = world(seed, pairs)
                found.append(
                    position(judged(seed, played, sharp * (worth[:, 0] - worth[:, 1]), b, both))
                )
            kind = "both orders" if both else "one order"
            sure = ", sure of itself" if sharp == SURE else ""
            lines.append(row(f"{pairs:,} pairs, {kind}{sure}", b, [f for f in found if f]))
    for groups in (250, 1000):
        for b in (0.0, 0.1):
            lists = [position(ranked(seed, groups, 8, b)) for seed in SEEDS]
            lines.append(row(f"{groups:,} lists of 8, one order", b, [f for f in lists if f]))
    return "\n".join(lines)


def tastes() -> str:
    lines = [HEAD]
    for people in (0, 1, 2):
        for what in ("length", "own family"):
            for effect in (0.0, 0.05, 0.1, 0.2):
                found: list[Bias] = []
                for seed in SEEDS:
                    played, worth, length = world(seed, 1000)
                    apart = length[:, 0] - length[:, 1]
                    strength = 2 * np.arctanh(effect)  # tanh(x / 2) = 2 sigma(x) - 1
                    planted = (
                        np.tanh(apart / np.sqrt((apart**2).mean())) / np.tanh(1)
                        if what == "length"
                        else 1.0
                    )
                    said = judged(
                        seed, played, 2 * (worth[:, 0] - worth[:, 1]) + strength * planted
                    )
                    noise = np.random.default_rng([seed, 3]).normal(size=(2, *worth.shape))
                    heard = [by_id(worth + n) for n in noise[:people]] or [by_id(worth)]
                    if what == "length":
                        found += style(said, played, *heard)
                    else:
                        found += self_preference(
                            said, played, {e: e[-1] for e in played}, "a", *heard
                        )
                lines.append(
                    row(
                        f"{what}, reference: {('the truth', 'one person', 'two people')[people]}",
                        effect,
                        found,
                    )
                )
    for effect in (0.0, 0.2):
        found = []
        for seed in SEEDS:
            played, worth, length = world(seed, 500)
            away = length - length.mean(1, keepdims=True)
            x = np.tanh(away / np.sqrt((away**2).mean()))
            raw = worth + 0.5 * np.random.default_rng([seed, 4]).normal(size=worth.shape)
            spread = np.sqrt(((raw - raw.mean(1, keepdims=True)) ** 2).mean())
            # effect in sd of the final scores: planted as slope * spread, which a little more
            # spread from the bias itself makes smaller
            score = raw + effect * spread / np.tanh(1) * x
            final = np.sqrt(((score - score.mean(1, keepdims=True)) ** 2).mean())
            for bias in style(
                [Feedback(e, v) for e, v in by_id(score).items()], played, by_id(worth)
            ):
                shift = effect - effect * spread / final  # to the planted unit
                found.append(
                    Bias(
                        bias.kind,
                        bias.estimate + shift,
                        bias.low + shift,
                        bias.high + shift,
                        bias.unit,
                        bias.n,
                        "",
                    )
                )
        lines.append(
            row("length, 1,000 scores (hundredths of an sd), reference: the truth", effect, found)
        )
    return "\n".join(lines)


@cache
def calendar(seed: int, verdicts: int) -> list[str | None]:
    schedule = Schedule(0.1, KINDS, seed)
    return [schedule.kind(n) for n in range(verdicts)]


def watched(
    seed: int, falls: Mapping[str, float], verdicts: int, together: int, recheck: bool
) -> tuple[int | None, int]:
    """After how many verdicts a judge was quarantined (None: never), and how many canaries that
    took; `together` verdicts are asked at a time."""
    quarantine, rng, planned = Quarantine(), random.Random(seed), calendar(seed % 50, verdicts)
    asked = 0
    for start in range(0, verdicts, together):
        suspect = quarantine.suspect if recheck else None
        for kind in [k for plan in planned[start : start + together] if (k := suspect or plan)]:
            asked += 1
            quarantine.saw(kind, rng.random() < falls.get(kind, falls["other"]))
        if quarantine.quarantined:
            return min(start + together, verdicts), asked
    return None, asked


JUDGES = {
    "falls for everything": {"other": 1.0},
    "obeys `override` and `forged`, else sound": {"override": 1.0, "forged": 1.0, "other": 0.01},
    "falls for `constant` only": {"constant": 1.0, "other": 0.01},
    "falls for half of everything": {"other": 0.5},
    "falls for half of `constant` only": {"constant": 0.5, "other": 0.01},
}


def canaries() -> str:
    lines = [
        "| judge | asked | within 60 verdicts | half are found after | 95 % after |",
        "| --- | --- | --- | --- | --- |",
    ]
    for together, recheck, name in (
        (1, True, "one by one"),
        (16, True, "16 at a time"),
        (1, False, "one by one, no suspects"),
    ):
        for judge, falls in JUDGES.items():
            when = sorted(
                watched(seed, falls, 2000, together, recheck)[0] or 2001 for seed in range(200)
            )
            lines.append(
                f"| {judge} | {name} | {sum(w <= 60 for w in when) / 2:.1f} % | {when[99]} |"
                f" {when[189]} |"
            )
    lines += [
        "",
        (
            "| judge, 1,000 runs each | within 60 verdicts | within 10,000 verdicts | canaries per"
            " verdict |"
        ),
        "| --- | --- | --- | --- |",
    ]
    for share in (0.01, 0.05, 0.1, 0.15):
        runs = [watched(seed, {"other": share}, 10_000, 1, True) for seed in range(1000)]
        early, late = (
            sum(w is not None and w <= limit for w, _ in runs) / 10 for limit in (60, 10_000)
        )
        each = np.mean([asked / (w or 10_000) for w, asked in runs])
        lines.append(
            f"| falls for {share:.0%} of every kind | {early:.1f} % | {late:.1f} % | {each:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--print", action="store_true", help="do not write the page")
    only_print = parser.parse_args().print
    parts = {"Position": positions(), "Length and own family": tastes(), "Canaries": canaries()}
    tables = "\n\n".join(f"### {title}\n\n{table}" for title, table in parts.items())
    print(tables)
    if not only_print:
        page = PAGE.read_text()
        begin, end = page.index(MARKS[0]) + len(MARKS[0]), page.index(MARKS[1])
        PAGE.write_text(f"{page[:begin]}\n\n{tables}\n\n{page[end:]}")


if __name__ == "__main__":
    main()
