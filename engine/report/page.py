"""`turnwise report RUN`: one self-contained HTML page of a run, made from its folder alone.

Every number on it comes from `metrics.jsonl`, `evaluation.json` or rows of the ledger; the page
says which. No script, no font, no picture is loaded from anywhere.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..analysis.overoptimisation import fit_law
from ..analysis.scores import bootstrap
from ..errors import ConfigError
from ..feedback.specs import ENVIRONMENT
from ..ledger.ledger import Ledger
from ..ledger.rows import Member
from ..pipeline.config import flat
from ..pipeline.folder import open_ledger, read_config, read_evaluation, read_metrics
from ..pipeline.plugins import Plugins
from ..records.episode import Episode
from ..records.feedback import Feedback
from ..stages.environments import read_envs
from ..stages.rl.metrics import idle_stages
from ..util import files
from ..util.secrets import redact
from ..util.suggest import install
from .credit import credited
from .transcript import printable

COLOURS = {"truth": "#1f77b4", "proxy": "#d1620b", "other": "#5a6b7b"}


@dataclass(frozen=True, slots=True)
class Series:
    """Numbers over updates (or over another axis), with their intervals where episodes tell
    them."""

    name: str
    updates: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: str = COLOURS["truth"]
    style: str = "-"


@dataclass(frozen=True, slots=True)
class Rewarded:
    """A turn as the page shows it."""

    who: str
    text: str
    mine: bool
    note: str


def write_report(
    folder: str | Path,
    target: str | Path | None = None,
    ledger_url: str | None = None,
    plugins: Plugins | None = None,
) -> Path:
    """Writes the page of the run in a folder, by default to `report.html` in it, and returns its
    path.

    Args:
        ledger_url: where its ledger is, if its config cannot say, see `open_ledger`.
        plugins: whose sections are added; default: those installed.

    Raises:
        ConfigError: the folder holds no run, or the page's libraries are missing (the extra
            `plots`).
    """
    try:
        import jinja2
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"reports need {error.name}: {install('plots')}") from error
    matplotlib.use("Agg")
    folder = Path(folder)
    log = folder / "metrics.jsonl"
    if not (folder / "config.yaml").is_file() or not log.is_file():
        near = sorted(folder.glob("*/metrics.jsonl"), key=lambda p: p.stat().st_mtime)
        hint = f" Did you mean {str(near[-1].parent)!r}?" if near else ""
        raise ConfigError(
            f"{folder} holds no run with metrics to report (config.yaml, metrics.jsonl).{hint}"
        )
    config, metrics = read_config(folder), read_metrics(folder)
    ledger, run = open_ledger(folder, ledger_url)
    names = list(dict.fromkeys(line["stage"] for line in metrics))
    asked = _stages(config)
    stages = [
        _stage(name, [m for m in metrics if m["stage"] == name], ledger, run, asked.get(name, {}))
        for name in names
    ]
    table = read_evaluation(folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        name=config.get("name") or folder.name,
        updates=len(metrics),
        counts=ledger.counts(run),
        spend=ledger.spend(run),
        stages=stages,
        players={k: v for k, v in table.items() if "pairs" not in v},
        pairs={k: v for k, v in table.items() if "pairs" in v},
        options=[
            (k, redact(yaml.safe_dump(v, sort_keys=False, allow_unicode=True)))
            for k, v in asked.items()
        ],
        idle=idle_stages(metrics),
        failures=_failures(ledger, run),
        examples=_examples(ledger, run),
        credited=credited(ledger, run),
        sections=(plugins or Plugins()).report_sections(ledger, run),
        number=_number,
    )
    ledger.close()
    path = Path(target) if target is not None else folder / "report.html"
    try:
        files.write(path, page)
    except OSError as error:
        raise ConfigError(f"the report {path} cannot be written: {error}") from error
    return path


def _number(value: Any, digits: int = 3) -> str:
    if not isinstance(value, (int, float)):
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return (
        f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.{digits}f}"
    )


def _stages(config: Mapping[str, Any]) -> dict[str, Any]:
    """What each stage was asked, by its label."""
    names: list[str] = []
    asked = {}
    for stage in flat(config["stages"]):
        [(name, options)] = stage.items()
        names.append(name)
        asked[name if names.count(name) == 1 else f"{name}-{names.count(name)}"] = options or {}
    return asked


def _sees_return(options: Mapping[str, Any]) -> str:
    """Whether a stage's feedback holds the environment's own return, as its config says: "all",
    "some" (of its environments) or "none"."""

    def holds(feedback: Any) -> bool:
        specs = feedback if isinstance(feedback, list) else [feedback]
        plain = [{"judge": s} if isinstance(s, str) else s for s in specs]
        return any(
            ENVIRONMENT in (s.get("judge"), s.get("source")) and float(s.get("weight", 1.0)) != 0
            for s in plain if isinstance(s, Mapping)
        )  # fmt: skip

    common = options.get("feedback", [ENVIRONMENT])
    envs = read_envs(options["env"]) if "env" in options else []
    seen = {holds(common if env.feedback is None else env.feedback) for env in envs} or {
        holds(common)
    }
    return "some" if len(seen) > 1 else "all" if True in seen else "none"


def _failures(ledger: Ledger, run: str) -> list[dict[str, Any]]:
    """Episodes that ended in their environment's failure: by environment and reason, how many, and
    one of them."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for stage, update in ledger.rounds(run):
        for e in ledger.run_episodes(run, stage=stage, update=update):
            if e.ending == "failed":
                # "step 3: ..." and "step 5: ..." are one.
                reason = re.sub(r"^(\w+) \d+:", r"\1:", e.reason)
                row = found.setdefault(
                    (e.start.env, reason),
                    {"env": e.start.env, "reason": printable(reason), "count": 0, "example": ""},
                )
                row["count"] += 1
                row["example"] = (
                    row["example"]
                    or f"{stage}, update {update}, seed {e.start.seed}, episode {e.id}"
                )
    return sorted(found.values(), key=lambda row: -row["count"])


def _stage(
    name: str,
    metrics: Sequence[Mapping[str, Any]],
    ledger: Ledger,
    run: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What a stage did: numbers of the ledger, of its last update, and its pictures."""
    made = [line["update"] for line in metrics]
    members = [m for own in ledger.members_by_update(run, made).values() for m in own]
    episodes: dict[int, list[Episode]] = {update: [] for update in made}
    for episode in ledger.run_episodes(run, stage=name):
        if episode.update in episodes:
            episodes[episode.update].append(episode)
    played = [e for each in episodes.values() for e in each]
    used = sum(m.used for m in members)
    why: dict[str, int] = {}
    for m in members:
        if not m.used and m.reason not in ("branches", "audit"):  # those were never meant to train
            reason = m.reason.split(":")[0]
            why[reason] = why.get(reason, 0) + 1
    said = ledger.feedback_summary(sorted({e.group for e in played}))
    return {
        "name": name,
        "updates": len(metrics),
        "episodes": len(played),
        "failed": sum(e.ending == "failed" for e in played),
        "used": used,
        "left_out": sorted(why.items()),
        "said": said,
        "last": {
            k: v
            for k, v in metrics[-1].items()
            if k not in ("update", "stage", "time") and isinstance(v, (int, float))
        },
        "pictures": _pictures(metrics, episodes, members, options),
    }


def _pictures(
    metrics: Sequence[Mapping[str, Any]],
    episodes: Mapping[int, Sequence[Episode]],
    members: Sequence[Member],
    options: Mapping[str, Any],
) -> list[tuple[str, list[str]]]:
    """(caption, SVGs) pairs; only what there is something to draw of."""
    if len(metrics) < 2:
        return []
    pictures = []
    outcome_of = {m.episode: m.outcome for m in members if m.outcome is not None}
    curve = lambda key, name, colour=COLOURS["other"]: _logged(metrics, key, name, colour)  # noqa: E731
    played = {u: [e for e in each if e.ending != "failed"] for u, each in episodes.items()}
    if outcome_of:
        trained = _measured(
            "what it trains on", played, lambda e: outcome_of.get(e.id), COLOURS["proxy"]
        )
        truth = _measured(
            "the environment's return", played, lambda e: e.env_return, COLOURS["truth"]
        )
        same = all(
            math.isclose(a, b, rel_tol=1e-6)
            for a, b in zip(trained.values, truth.values, strict=False)
        )
        if same:
            pictures.append(
                (
                    "Outcome per update, mean of its episodes with 95 % bootstrap intervals.",
                    _draw([[truth]]),
                )
            )
        else:
            sees = {
                "none": "which it does not see",
                "some": "which is part of that in some of the environments",
                "all": "which is part of that",
            }[_sees_return(options)]
            caption = (
                "Proxy and truth: what the policy trains on (orange), and the environment's own"
                f" return, {sees} (blue). 95 % bootstrap intervals. Where the first rises while the"
                " second falls, the reward is being gamed."
            )
            pictures.append((caption, _draw([[trained], [truth]])))
            pictures += _over_distance(metrics, trained, truth)
    if any("success" in m for m in metrics):
        wins = _measured("success", played, lambda e: float(e.succeeded), COLOURS["truth"])
        gold = curve("gold/success", "on held-out starts", COLOURS["proxy"])
        pictures.append(("Success per update.", _draw([[s for s in (wins, gold) if s.values]])))
    if any(played.values()) and outcome_of:
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
        pictures.append((caption, _draw([[s] for s in habits])))
    learning = [
        [s]
        for s in (
            curve("kl_episode", "KL to the reference, nats per conversation"),
            curve("entropy", "entropy per token"),
            curve("clip_fraction", "share of tokens clipped"),
            curve("explained_variance", "explained variance of the critic"),
            curve("audit/rank_correlation", "rank correlation of credit with the truth"),
            curve("loss", "loss"),
            curve("pending", "conversations pending"),
            curve("staleness/mean", "versions that trained conversations are behind"),
            curve("too_old", "conversations left out as too old"),
            curve("rater_agreement", "agreement of two raters"),
            curve("source_agreement", "agreement of two sources"),
            curve("truth_agreement", "raters' agreement with the environment's return"),
        )
        if len(s.values) > 1
    ]
    if learning:
        pictures.append(("How it learned.", _draw(learning)))
    return pictures


def _over_distance(
    metrics: Sequence[Mapping[str, Any]], proxy: Series, truth: Series
) -> list[tuple[str, list[str]]]:
    """Proxy and truth over the distance from the reference, and where the law of over-optimisation
    says that the truth turns."""
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
    said = [" ".join(t.action.lower().split()) for t in episode.turns]
    return float(len(said) - len(set(said)))


def _logged(metrics: Sequence[Mapping[str, Any]], key: str, name: str, colour: str) -> Series:
    found = [(m["update"], m[key]) for m in metrics if key in m]
    return Series(name, [u for u, _ in found], [v for _, v in found], colour=colour)


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
    """Each panel as an SVG element that scales with its place on the page."""
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


def _examples(ledger: Ledger, run: str, count: int = 2) -> list[dict[str, Any]]:
    """Conversations of the first and of the last update that played: those of training, and those
    of the gold measure, which plays the same starts every time. What began alike is compared, the
    largest changes first; what did not is only shown."""
    rounds = [
        (stage, update)
        for stage, update in ledger.rounds(run)
        if stage.split("/")[0].split("-")[0] == "rl"
    ]
    examples = []
    for kind in ([r for r in rounds if "/" not in r[0]], [r for r in rounds if "/gold-" in r[0]]):
        if len(kind) < 2 or kind[0][1] == kind[-1][1]:
            continue  # one update is no before and after
        before, after = (
            ledger.run_episodes(run, stage=stage, update=update)
            for stage, update in (kind[0], kind[-1])
        )
        later = {e.start.key: e for e in after}
        common = [(e, later[e.start.key]) for e in before if e.start.key in later]
        changed = [
            (a, b) for a, b in common if [t.action for t in a.turns] != [t.action for t in b.turns]
        ]
        gained = sorted(changed, key=lambda p: p[0].env_return - p[1].env_return)
        for a, b in (gained or list(zip(before, after, strict=False)))[:count]:
            shown = {"before": _shown(a, ledger, kind[0]), "after": _shown(b, ledger, kind[-1])}
            examples.append({"caption": _compared(a, b), **shown})
    return examples


def _compared(before: Episode, after: Episode) -> str:
    """What two conversations tell of each other."""
    if before.start.key != after.start.key:
        return "From different starts: how it went then and now, which says nothing of a gain."
    gain = after.env_return - before.env_return
    if gain > 0:
        return f"From the same start: the return rose by {gain:g}, one of the largest gains."
    return (
        "From the same start: the return is the same."
        if gain == 0
        else f"From the same start: the return fell by {-gain:g}."
    )


def _shown(episode: Episode, ledger: Ledger, place: tuple[str, int]) -> dict[str, Any]:
    """A conversation with what each turn earned."""
    said = [
        f
        for f in ledger.feedback([episode.group])
        if isinstance(f, Feedback) and f.episode == episode.id
    ]
    lines = [Rewarded("system", printable(episode.system), False, "")] if episode.system else []
    for k, turn in enumerate(episode.turns):
        notes = [f"reward {turn.reward:g}"] if turn.reward or k == len(episode.turns) - 1 else []
        for f in said:
            if f.turn_scores is not None and f.turn_scores[k] is not None:
                notes.append(f"{f.stamp.source} {f.turn_scores[k]:+.2f}")
        if turn.cut:
            notes.append("cut at the token limit")
        lines.append(
            Rewarded(turn.observation.role, printable(turn.observation.content), False, "")
        )
        lines.append(Rewarded("assistant", printable(turn.action), True, ", ".join(notes)))
    if episode.final:
        lines.append(Rewarded(episode.final.role, printable(episode.final.content), False, ""))
    scores = [f"{f.stamp.source} {f.score:.3f}" for f in said if f.score is not None]
    ended = episode.ending + (f" ({episode.reason})" if episode.reason else "")
    return {
        "lines": lines,
        "end": (
            f"{ended}; return {episode.env_return:g}" + (f"; {', '.join(scores)}" if scores else "")
        ),
        "where": f"{place[0]}, update {place[1]}, episode {episode.id}",
    }
