"""The pictures of a report: which metrics they show, and how they are drawn."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..analysis.overoptimisation import fit_law
from ..analysis.scores import bootstrap
from ..feedback.specs import ENVIRONMENT
from ..ledger.rows import Member
from ..records.episode import Episode
from ..stages.environments import read_envs

COLOURS = {"truth": "#1f77b4", "proxy": "#d1620b", "other": "#5a6b7b"}


@dataclass(frozen=True, slots=True)
class Series:
    """A series of numbers over updates (or over another axis), with their intervals where episodes
    give them."""

    name: str
    updates: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: str = COLOURS["truth"]
    style: str = "-"


def sees_return(options: Mapping[str, Any]) -> str:
    """Returns whether a stage's feedback holds the environment's own return, by its config: "all",
    "some" (of its environments) or "none"."""

    def holds(feedback: Any) -> bool:
        specs = feedback if isinstance(feedback, list) else [feedback]
        plain = [{"judge": s} if isinstance(s, str) else s for s in specs]
        return any(
            s.get("judge") == ENVIRONMENT and float(s.get("weight", 1.0)) != 0
            for s in plain if isinstance(s, Mapping)
        )  # fmt: skip

    common = options.get("feedback", [ENVIRONMENT])
    envs = read_envs(options["env"]) if "env" in options else []
    seen = {holds(common if env.feedback is None else env.feedback) for env in envs} or {
        holds(common)
    }
    return "some" if len(seen) > 1 else "all" if True in seen else "none"


def draw_pictures(
    metrics: Sequence[Mapping[str, Any]],
    episodes: Mapping[int, Sequence[Episode]],
    members: Sequence[Member],
    options: Mapping[str, Any],
) -> list[tuple[str, list[str]]]:
    """Draws (caption, SVGs) pairs; only those for which there is data."""
    if len(metrics) < 2:
        return []
    outcome_of = {m.episode: m.outcome for m in members if m.outcome is not None}
    played = {u: [e for e in each if e.ending != "failed"] for u, each in episodes.items()}
    pictures = _outcomes(metrics, played, outcome_of, options) if outcome_of else []
    if any("success" in m for m in metrics):
        wins = _measured("success", played, lambda e: float(e.succeeded), COLOURS["truth"])
        gold = _logged(metrics, "gold/success", "on held-out starts", COLOURS["proxy"])
        pictures.append(("Success per update.", _draw([[s for s in (wins, gold) if s.values]])))
    if any(played.values()) and outcome_of:
        pictures.append(_habits(played))
    if starts := _curriculum(metrics):
        pictures.append(("Which starts were played.", _draw([[s] for s in starts])))
    learning = [[_logged(metrics, key, name, COLOURS["other"])] for key, name in LEARNING.items()]
    if learning := [[s] for [s] in learning if len(s.values) > 1]:
        pictures.append(("How it learned.", _draw(learning)))
    return pictures


# Metrics of an update that are drawn where they are logged, and their names.
LEARNING = {
    "kl_episode": "KL to the reference, nats per conversation",
    "entropy": "entropy per token",
    "clip_fraction": "share of tokens clipped",
    "explained_variance": "explained variance of the critic",
    "audit/rank_correlation": "rank correlation of credit with the truth",
    "loss": "loss",
    "pending": "conversations pending",
    "staleness/mean": "versions that trained conversations are behind",
    "too_old": "conversations left out as too old",
    "rater_agreement": "agreement of two raters",
    "source_agreement": "agreement of two sources",
    "truth_agreement": "raters' agreement with the environment's return",
}


def _outcomes(
    metrics: Sequence[Mapping[str, Any]],
    played: Mapping[int, Sequence[Episode]],
    outcome_of: Mapping[str, float],
    options: Mapping[str, Any],
) -> list[tuple[str, list[str]]]:
    """Draws what the policy trains on and, where that is something else, the environment's own
    return, per update and over the distance from the reference."""
    trained = _measured(
        "what it trains on", played, lambda e: outcome_of.get(e.id), COLOURS["proxy"]
    )
    truth = _measured("the environment's return", played, lambda e: e.env_return, COLOURS["truth"])
    same = all(
        math.isclose(a, b, rel_tol=1e-6) for a, b in zip(trained.values, truth.values, strict=False)
    )
    if same:
        caption = "Outcome per update, mean of its episodes with 95 % bootstrap intervals."
        return [(caption, _draw([[truth]]))]
    sees = {
        "none": "which it does not see",
        "some": "which is part of that in some of the environments",
        "all": "which is part of that",
    }[sees_return(options)]
    caption = (
        "Proxy and truth: what the policy trains on (orange), and the environment's own return,"
        f" {sees} (blue). 95 % bootstrap intervals. Where the first rises while the second falls,"
        " the reward is being gamed."
    )
    return [(caption, _draw([[trained], [truth]])), *_over_distance(metrics, trained, truth)]


def _habits(played: Mapping[int, Sequence[Episode]]) -> tuple[str, list[str]]:
    """Draws the habits that a gamed reward breeds."""
    habits = [
        _measured(
            "questions per conversation",
            played,
            lambda e: float(sum("?" in t.action for t in e.turns)),
        ),
        _measured("repeated replies per conversation", played, _repeats),
        _measured(
            "words per reply",
            played,
            lambda e: float(np.mean([len(t.action.split()) for t in e.turns] or [0])),
        ),
        _measured("turns", played, lambda e: float(len(e.turns))),
    ]
    caption = (
        "Habits that a gamed reward breeds: needless questions, repetition, padding. 95 %"
        " bootstrap intervals."
    )
    return caption, _draw([[s] for s in habits])


def _over_distance(
    metrics: Sequence[Mapping[str, Any]], proxy: Series, truth: Series
) -> list[tuple[str, list[str]]]:
    """Draws proxy and truth over the distance from the reference, and where the law of
    over-optimisation puts the peak of the truth."""
    far = {m["update"]: math.sqrt(max(m["kl_episode"], 0.0)) for m in metrics if "kl_episode" in m}
    places = [i for i, u in enumerate(truth.updates) if u in far]
    d = [far[truth.updates[i]] for i in places]
    if len(set(d)) < 3:
        return []
    order = np.argsort(d)
    gain = [truth.values[i] - truth.values[places[0]] for i in places]
    law = fit_law(d, gain, "rl")
    grid = np.linspace(max(min(x for x in d if x > 0), 1e-3), max(d), 100)
    sorted_ = lambda values: [values[k] for k in order]  # noqa: E731
    shown = [
        [
            Series(
                "what it trains on",
                sorted_(d),
                sorted_([proxy.values[i] for i in places]),
                colour=COLOURS["proxy"],
                style="o",
            )
        ],
        [
            Series(
                "the environment's return",
                sorted_(d),
                sorted_([truth.values[i] for i in places]),
                style="o",
            ),
            Series(
                "fitted law",
                grid.tolist(),
                (law(grid) + truth.values[places[0]]).tolist(),
                colour="#222222",
            ),
        ],
    ]
    turns = (
        f"which turns at sqrt KL = {law.peak:.2f}"
        if law.peak < 10 * max(d)
        else "which does not turn in sight"
    )
    if law.peak == 0:
        turns = "which only falls"
    caption = (
        "The same over the distance from the reference, sqrt of the KL per conversation. The law d"
        f" (a - b log d) of Gao et al. (2022) fitted to the truth's gain has a = {law.a:.3f} and b"
        f" = {law.b:.3f}, {turns}. A fit to one run is a rough guide."
    )
    return [(caption, [_panel(series, "sqrt KL to the reference") for series in shown])]


def _repeats(episode: Episode) -> float:
    replies = [" ".join(t.action.lower().split()) for t in episode.turns]
    return float(len(replies) - len(set(replies)))


def _logged(metrics: Sequence[Mapping[str, Any]], key: str, name: str, colour: str) -> Series:
    found = [(m["update"], m[key]) for m in metrics if key in m]
    return Series(name, [u for u, _ in found], [v for _, v in found], colour=colour)


def _curriculum(metrics: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Returns what a curriculum reports, and what it is for; none where nothing was chosen."""
    names = sorted({key for m in metrics for key in m if key.startswith("curriculum/")})
    if not names:
        return []
    shown = {"groups_without_signal_share": "share of groups without signal"}
    shown |= {key: key.removeprefix("curriculum/").replace("_", " ") for key in names}
    found = [_logged(metrics, key, name, COLOURS["other"]) for key, name in shown.items()]
    return [series for series in found if len(series.values) > 1]


def _measured(
    name: str, played: Mapping[int, Sequence[Episode]], value: Any, colour: str = COLOURS["other"]
) -> Series:
    updates, means, lows, highs = [], [], [], []
    for update, episodes in played.items():
        found = [v for v in map(value, episodes) if v is not None]
        if found:
            low, high = bootstrap(found, draws=300)
            updates.append(update)
            means.append(float(np.mean(found)))
            lows.append(low)
            highs.append(high)
    return Series(name, updates, means, lows, highs, colour)


def _draw(panels: Sequence[Sequence[Series]]) -> list[str]:
    """Draws each panel as an SVG element that scales with its place on the page."""
    return [_panel(series) for series in panels]


def _panel(drawn: Sequence[Series], xlabel: str = "update") -> str:
    from matplotlib import pyplot as plt

    with plt.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "turnwise",
            "font.size": 10,
            "font.family": "sans-serif",
        }
    ):
        figure, axis = plt.subplots(figsize=(4.8, 2.7))
        for series in drawn:
            axis.plot(
                series.updates,
                series.values,
                series.style,
                color=series.colour,
                linewidth=1.4,
                markersize=3,
                label=series.name,
            )
            if series.low is not None and series.high is not None:
                axis.fill_between(
                    series.updates,
                    series.low,
                    series.high,
                    color=series.colour,
                    alpha=0.2,
                    linewidth=0,
                )
        shown = [v for s in drawn for each in (s.values, s.low or (), s.high or ()) for v in each]
        # A constant: no axis that zooms into nothing.
        if shown and max(shown) - min(shown) <= 1e-9 * max(map(abs, shown)):
            ends = sorted({0.0, shown[0]}) if shown[0] else [0.0, 1.0]
            margin = 0.1 * (ends[1] - ends[0])
            axis.set_ylim(ends[0] - margin, ends[1] + margin)
        axis.set_title(" / ".join(s.name for s in drawn), fontsize=10, loc="left")
        axis.set_xlabel(xlabel)
        axis.spines[["top", "right"]].set_visible(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)
