"""`turnwise report RUN`: one self-contained HTML page of a run, made from its folder alone.

Every number on it comes from `metrics.jsonl`, `evaluation.json` or rows of the ledger; the page
says which. No script, no font, no picture is loaded from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from ..ledger.ledger import Ledger
from ..pipeline.folder import (
    open_ledger,
    read_config,
    read_evaluation,
    read_metrics,
    stages_in,
)
from ..pipeline.plugins import Plugins
from ..records.episode import Episode
from ..records.feedback import Feedback
from ..stages.rl.metrics import idle_stages
from ..util import files
from ..util.secrets import redact
from ..util.suggest import install
from .credit import credited
from .pictures import draw_pictures
from .transcript import printable
from .verdict import verdict


@dataclass(frozen=True, slots=True)
class Rewarded:
    """A turn with its reward, as the page shows it."""

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
    _check_run(folder)
    config, metrics = read_config(folder), read_metrics(folder)
    ledger, run = open_ledger(folder, ledger_url)
    names = list(dict.fromkeys(line["stage"] for line in metrics))
    asked = stages_in(config)
    stages = [
        _stage(name, [m for m in metrics if m["stage"] == name], ledger, run, asked.get(name, {}))
        for name in names
    ]
    table = read_evaluation(folder)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
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
        verdict=verdict(table),
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


def _check_run(folder: Path) -> None:
    """Raises `ConfigError` where a folder holds no run with metrics."""
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        near = sorted(folder.glob("*/metrics.jsonl"), key=lambda p: p.stat().st_mtime)
        hint = f" Did you mean {str(near[-1].parent)!r}?" if near else ""
        raise ConfigError(
            f"{folder} holds no run with metrics to report (config.yaml, metrics.jsonl).{hint}"
        )


def _number(value: Any, digits: int = 3) -> str:
    if not isinstance(value, (int, float)):
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return (
        f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.{digits}f}"
    )


def _failures(ledger: Ledger, run: str) -> list[dict[str, Any]]:
    """Lists episodes that ended in their environment's failure: by environment and reason, how
    many, and one of them."""
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
    """Returns the data of one stage: numbers of the ledger, of its last update, and its
    pictures."""
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
    summary = ledger.feedback_summary(sorted({e.group for e in played}))
    return {
        "name": name,
        "updates": len(metrics),
        "episodes": len(played),
        "failed": sum(e.ending == "failed" for e in played),
        "used": used,
        "left_out": sorted(why.items()),
        "answers": summary,
        "last": {
            k: v
            for k, v in metrics[-1].items()
            if k not in ("update", "stage", "time") and isinstance(v, (int, float))
        },
        "pictures": draw_pictures(metrics, episodes, members, options),
    }


def _examples(ledger: Ledger, run: str, count: int = 2) -> list[dict[str, Any]]:
    """Returns conversations of the first and of the last update that played: those of training, and
    those of the gold measure, which plays the same starts every time. What began alike is compared,
    the largest changes first; what did not is only shown."""
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
    """Returns how two conversations differ."""
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
    """Returns a conversation with each turn's reward."""
    shown = [
        f
        for f in ledger.feedback([episode.group])
        if isinstance(f, Feedback) and f.episode == episode.id
    ]
    lines = [Rewarded("system", printable(episode.system), False, "")] if episode.system else []
    for k, turn in enumerate(episode.turns):
        notes = [f"reward {turn.reward:g}"] if turn.reward or k == len(episode.turns) - 1 else []
        for f in shown:
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
    scores = [f"{f.stamp.source} {f.score:.3f}" for f in shown if f.score is not None]
    ended = episode.ending + (f" ({episode.reason})" if episode.reason else "")
    return {
        "lines": lines,
        "end": (
            f"{ended}; return {episode.env_return:g}" + (f"; {', '.join(scores)}" if scores else "")
        ),
        "where": f"{place[0]}, update {place[1]}, episode {episode.id}",
    }
