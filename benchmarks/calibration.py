"""Is the powered mean honest, and what does a judge save? Simulated judges and people whose truth
is known.

    python benchmarks/calibration.py            # about two minutes on one core; writes the tables
                                                of docs/calibration.md
    python benchmarks/calibration.py --print    # only prints them

- mean: 500 simulations per row, seed 0. 500 episodes that the judge scored, of which people scored
  50 (20 where it says so). Latent normal scores correlate at 0, 0.3, 0.5, 0.7 or 0.9; the judge's
  are 0.3 + 0.5 times its latent ones (biased, and on a narrower scale). Normal: as they are.
  Ordinal: both cut into five grades, skewed to the top. Binary: both cut in two, 31 % and 50 %
  ones. Log-normal: both exp of the latent ones, whose third moment is 6. Starts: four episodes of a
  start share 0.4 of the variance of both, and whole starts are labelled. Truth: the mean over ever
  more episodes.
- alarm: 1000 runs without change, of 1000 labels each, seeds 1 and 2; 200 runs with a shift of one
  deviation after 50, 100, 300 and 900 labels, seed 3.
- correction: 200 fits per row, seed 4; mean squared error on 500 fresh episodes, less the noise's
  own 1.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path

import numpy as np
from turnwise.engine.analysis.calibration import fit_correction
from turnwise.engine.analysis.drift import Drift
from turnwise.engine.analysis.prediction_powered import prediction_powered_mean

PAGE = Path(__file__).parents[1] / "docs" / "calibration.md"
MARKS = "<!-- tables: benchmarks/calibration.py -->", "<!-- end of tables -->"
RHOS = (0.0, 0.3, 0.5, 0.7, 0.9)
STEPS = (-1.5, -0.5, 0.3, 1.0)
DESIGNS = (  # name, kind, labels, episodes of a start
    ("normal", "normal", 50, 1),
    ("ordinal, 1 to 5", "ordinal", 50, 1),
    ("binary", "binary", 50, 1),
    ("normal, starts of 4", "normal", 52, 4),
    ("binary, starts of 4", "binary", 52, 4),
    ("normal, 20 labels", "normal", 20, 1),
    ("log-normal", "log-normal", 50, 1),
)
TRUTH = {"normal": 0.0, "ordinal": 3.165400, "binary": 0.308538, "log-normal": math.exp(0.5)}


def draw(
    rng: np.random.Generator, kind: str, rho: float, size: int, starts: int
) -> tuple[np.ndarray, np.ndarray]:
    latent = rng.normal(size=(2, size))
    if starts > 1:
        shared = np.repeat(rng.normal(size=(2, -(-size // starts))), starts, 1)[:, :size]
        latent = math.sqrt(0.4) * shared + math.sqrt(0.6) * latent
    y, f = latent[0], rho * latent[0] + math.sqrt(1 - rho**2) * latent[1]
    if kind == "ordinal":
        return 1.0 + np.digitize(f, [-2, -1, -0.2, 0.6]), 1.0 + np.digitize(y, STEPS)
    if kind == "binary":
        return (f > 0).astype(float), (y > 0.5).astype(float)
    if kind == "log-normal":
        return 0.3 + 0.5 * np.exp(f), np.exp(y)
    return 0.3 + 0.5 * f, y


def means(runs: int) -> list[str]:
    rows = [
        (
            "| scores | latent correlation | of the scores | coverage | people alone | width /"
            " people's | of the widest 5 % | ratings it is worth |"
        ),
        "| --- " * 8 + "|",
    ]
    for name, kind, labels, starts in DESIGNS:
        for rho in RHOS:
            rng, found, r = np.random.default_rng(0), [], []
            for _ in range(runs):
                f, y = draw(rng, kind, rho, 500, starts)
                r.append(np.corrcoef(f, y)[0, 1])
                of = (np.arange(500) // starts).tolist()
                found.append(
                    prediction_powered_mean(
                        f[labels:], f[:labels], y[:labels], (of[labels:], of[:labels])
                    )
                )
            truth = TRUTH[kind]
            covered = np.mean([x.mean.low <= truth <= x.mean.high for x in found])
            alone = np.mean([x.human.low <= truth <= x.human.high for x in found])
            width = np.mean([x.mean.width for x in found]) / np.mean([x.human.width for x in found])
            widest = np.quantile([x.mean.width / x.human.width for x in found], 0.95)
            rows.append(
                f"| {name} | {rho:g} | {np.mean(r):.2f} | {covered:.1%} | {alone:.1%} | {width:.3f}"
                f" | {widest:.2f} | {np.median([x.worth for x in found]):.0f} |"
            )
    return rows


def alarm(rng: np.random.Generator, values: np.ndarray) -> int | None:
    drift = Drift()
    for value in values:
        if drift.add(float(value), float(rng.random())):
            return drift.alarm
    return None


def alarms(runs: int, shifted: int) -> list[str]:
    rows = ["| residuals | runs | false alarms within 1000 labels |", "| --- " * 3 + "|"]
    for name, seed in (("ordinal, -2 to 2", 1), ("Student's, 2 degrees of freedom", 2)):
        rng = np.random.default_rng(seed)
        sample = (
            (lambda g: g.integers(-2, 3, 1000)) if seed == 1 else (lambda g: g.standard_t(2, 1000))
        )
        rows.append(
            f"| {name} | {runs} | {sum(alarm(rng, sample(rng)) is not None for _ in range(runs))} |"
        )
    rows += [
        "",
        "| labels before the shift | median delay | 90 % within | found within 100 labels |",
        "| --- " * 4 + "|",
    ]
    rng = np.random.default_rng(3)
    for before in (50, 100, 300, 900):
        late = np.array(
            [
                (
                    alarm(rng, np.concatenate([rng.normal(size=before), 1 + rng.normal(size=200)]))
                    or math.inf
                )
                - before
                for _ in range(shifted)
            ]
        )
        ninety = np.quantile(late, 0.9, method="higher")
        rows.append(
            f"| {before} | {np.median(late):.0f} | {ninety:.0f} | {np.mean(late <= 100):.0%} |".replace(  # noqa: E501
                "inf", "over 200"
            )
        )
    return rows


def corrections(runs: int) -> list[str]:
    rows = [
        "| truth | labels | chosen | excess error, corrected | uncorrected |",
        "| --- " * 5 + "|",
    ]
    cases = {
        "f": (0, 1, 0), "f + 0.5": (0.5, 1, 0), "f / 2": (0, 0.5, 0), "f + 0.5 words": (0, 1, 0.5),
        "3 + 2 f (another scale)": (3, 2, 0),
    }  # fmt: skip
    rng = np.random.default_rng(4)
    for name, (shift, slope, words) in cases.items():
        for labels in (15, 30, 100):
            kinds: Counter[str] = Counter()
            errors = []
            for _ in range(runs):
                f, x, noise = rng.normal(size=(3, labels))
                found = fit_correction(f, shift + slope * f + words * x + noise, {"words": x})
                kinds[found.kind] += 1
                f, x = rng.normal(size=(2, 500))
                guess = (
                    found.intercept + found.slope * f + (found.weights or {}).get("words", 0.0) * x
                )
                true = shift + slope * f + words * x
                errors.append((np.mean((true - guess) ** 2), np.mean((true - f) ** 2)))
            corrected, plain = np.mean(errors, 0)
            chosen = ", ".join(f"{kind} {count / runs:.0%}" for kind, count in kinds.most_common())
            rows.append(f"| {name} | {labels} | {chosen} | {corrected:.3f} | {plain:.3f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", help="do not write docs/calibration.md")
    asked = parser.parse_args()
    table = "\n".join([*means(500), "", *alarms(1000, 200), "", *corrections(200)])
    print(table)
    if not asked.print:
        page = PAGE.read_text()
        before, rest = page.split(MARKS[0])
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
