"""The report: one page, offline, in a real browser, on a wide and a narrow screen."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import turnwise
from support.episodes import conversation
from turnwise.engine.report.page import write_report
from turnwise.engine.report.transcript import printable

MARKUP = "<script>document.title='hacked'</script><img src=x onerror=alert(1)>"


class Rude(gymnasium.Env):
    """Says what must never become markup."""

    observation_space = action_space = turnwise.Text(10_000)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 2
        return f"hello {MARKUP}", {"system": "tell me more"}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return (
            MARKUP,
            float(len(action) % 3) / 2,
            self.left == 0,
            False,
            {"success": len(action) % 2 == 0},
        )


gymnasium.register("test/Rude-v0", Rude)


@pytest.fixture(scope="module")
def finished(
    model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> turnwise.Run:
    rl = {"env": "test/Rude-v0", "groups": 2, "group_size": 3, "max_new_tokens": 6, "poll": 0.0}
    config = {
        "policy": str(model_folder()),
        "threads": 1,
        "name": f"a run {MARKUP}",
        "stages": [
            {"rank": {**rl, "updates": 2, "feedback": [{"judge": "simulated-panel",
                            "raters": 2}]}},
            {"reward-model": {"members": 2, "lr": 1e-3, "held_out": 0.3, "steps_per_update": 1}},
            {
                "rl": {
                    **rl, "updates": 4, "feedback": [{"judge": "reward-model", "per": "turn"}],
                    "gold": {"episodes": 4, "every": 2},
                    "optimizer": {"name": "grpo", "lr": 1e-2, "kl": 0.01},
                }
            },
            {"evaluate": {"env": "test/Rude-v0", "episodes": 4, "max_new_tokens": 6,
                    "best_of": {"judge": "reward-model", "n": [1, 2]}}},
        ],
    }  # fmt: skip
    return turnwise.Run(config, folder=tmp_path_factory.mktemp("report") / "run").finish()


def test_its_numbers_are_those_of_the_ledger(finished: turnwise.Run) -> None:
    page = write_report(finished.folder).read_text()
    counts = finished.ledger.counts()
    assert f"{counts['episodes']:,} episodes" in page
    assert f"{counts['feedback']:,} answers" in page
    used = sum(m.used for m in finished.ledger.members(finished.id))
    assert f"<td>{used}</td>" in page.split("What was trained on what")[1].split("</section>")[0]
    table = json.loads((finished.folder / "evaluation.json").read_text())
    assert f"{table['best-of-2']['proxy']:.3f}" in page
    assert "simulated-panel: 8" in page
    assert MARKUP not in page
    assert "Before and after" in page
    shown = page.split("<h2>Credit</h2>")[1].split("</section>")[0]
    credits = [f"credit {c:+.3f}" for m in finished.ledger.members(finished.id) for c in m.credit]
    assert set(re.findall(r"credit [+-][\d.]+", shown)) <= set(credits)
    assert shown.count("credit +") + shown.count("credit -") >= 3
    found = re.findall(r"</b>(.*?)(?:<i>|</div>)", shown, re.DOTALL)
    words = [html.unescape(text) for text in found]
    assert len(words) >= 6
    assert all(text.strip() for text in words[::2]), "what was asked is there"
    turns = [t for e in finished.ledger.run_episodes(finished.id) for t in e.turns]
    replied = {printable(t.action) for t in turns}
    assert set(words[1::2]) <= replied
    assert "reward-model +" in page or "reward-model -" in page, (
        "what the reward model gave each turn"
    )
    assert "Proxy and truth" in page


def test_bad_folders_are_one_message(tmp_path: Path, finished: turnwise.Run) -> None:
    with pytest.raises(turnwise.ConfigError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(turnwise.ConfigError, match="Did you mean"):
        write_report(finished.folder.parent)
    copy = tmp_path / "copy"
    shutil.copytree(finished.folder, copy)
    (copy / "ledger.sqlite").unlink()
    with pytest.raises(turnwise.ConfigError, match="the ledger of the run .* is gone"):
        write_report(copy)


@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_offline_without_errors_and_is_readable(
    width: int, finished: turnwise.Run, browser: Any
) -> None:
    path = write_report(finished.folder)
    assert path.stat().st_size < 5_000_000
    context = browser.new_context(offline=True, viewport={"width": width, "height": 900})
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
    page.goto(path.as_uri())
    assert said == []
    assert page.title() == f"a run {MARKUP} · Turnwise", (
        "markup in names and conversations stays text"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    assert page.locator("figure svg").count() >= 4
    for box in page.locator("figure svg").all():
        assert box.bounding_box()["width"] > min(300, width * 0.8)
    sizes = page.evaluate(
        "[...document.querySelectorAll('p, td, .said')].map(e =>"
        " parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
    context.close()


class Frail(gymnasium.Env):
    """Breaks in some of its starts, in one of two ways."""

    observation_space = action_space = turnwise.Text(1000)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.kind, self.left = int(self.np_random.integers(4)), 2
        return "go", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        if self.kind == 0 or (self.kind == 1 and not self.left):
            raise RuntimeError("the server hung up")
        return "on", float(len(action) % 3), not self.left, False, {}


gymnasium.register("test/Frail-v0", Frail)


def reported(model: str, folder: Path, **rl: Any) -> str:
    stage = {
        "env": "test/Frail-v0",
        "updates": 1,
        "groups": 12,
        "group_size": 2,
        "max_new_tokens": 6,
        "poll": 0.0,
        **rl,
    }
    turnwise.Run({"policy": model, "threads": 1, "stages": [{"rl": stage}]}, folder=folder).finish()
    return write_report(folder).read_text()


def test_what_failed_is_shown_with_its_reason_and_one_update_is_no_before_and_after(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    page = reported(str(model_folder()), tmp_path / "r", max_failure_rate=1.0)
    [table] = re.findall(r"<h3>Environments that failed</h3>(.*?)</table>", page, re.DOTALL)
    run, ledger = open_run(tmp_path / "r")
    failed = [e for e in ledger.run_episodes(run) if e.ending == "failed"]
    assert len({e.reason for e in failed}) == 2, "it broke in its first step and in its second"
    assert table.count("test/Frail-v0") == 1, "which is one reason"
    assert f"<td>{len(failed)}</td>" in table
    assert "the server hung up" in table
    assert f"episode {failed[0].id}" in table
    assert "Before and after" not in page


def open_run(folder: Path) -> tuple[str, Any]:
    from turnwise.engine.pipeline.folder import open_ledger

    ledger, run = open_ledger(folder, None)
    return run, ledger


def test_the_caption_says_what_the_config_says(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Whether the policy trains on the environment's return is no matter of numbers."""
    brief = {"judge": "length", "max_words": 3}
    for name, feedback, said in (
        (
            "all",
            ["environment", {**brief, "weight": 0.1}],
            "the environment&#39;s own return, which is part of that (blue)",
        ),
        ("none", [brief], "the environment&#39;s own return, which it does not see (blue)"),
        ("unseen", [{"judge": "environment", "weight": 0}, brief], "which it does not see (blue)"),
    ):
        page = reported(
            str(model_folder()),
            tmp_path / name,
            updates=2,
            groups=4,
            feedback=feedback,
            env="test/Rude-v0",
        )
        assert said in page, name
        assert "gained most" not in page
        shown = page.split("<h2>Before and after</h2>")[1]
        assert (
            shown.count(
                "From different starts: how it went then and now, which says nothing of a gain."
            )
            == 2
        )


def test_examples_say_what_changed() -> None:
    from turnwise.engine.report.page import _compared

    played = lambda seed, reward: conversation("x", seed=seed, reward=reward)  # noqa: E731
    assert (
        _compared(played(1, 0.0), played(1, 0.5))
        == "From the same start: the return rose by 0.5, one of the largest gains."
    )
    assert (
        _compared(played(1, 0.5), played(1, 0.5)) == "From the same start: the return is the same."
    )
    assert (
        _compared(played(1, 0.5), played(1, 0.25))
        == "From the same start: the return fell by 0.25."
    )


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e6])
def test_a_constant_is_drawn_as_one(value: float) -> None:
    from turnwise.engine.report.pictures import Series, _panel

    svg = _panel([Series("flat", [1, 2, 3], [value] * 3, [value] * 3, [value] * 3)])
    ticks = [
        float(t.replace("\N{MINUS SIGN}", "-"))
        for t in re.findall(r">([\N{MINUS SIGN}\d.]+)</text>", svg)
    ]
    assert 0.0 in ticks, "its axis goes to zero and does not zoom into nothing"
