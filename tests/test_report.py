"""The report: one page, offline, in a real browser, on a wide and a narrow screen."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import turnwise
from turnwise.engine.report.page import write_report

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
        return MARKUP, float(len(action) % 3) / 2, self.left == 0, False, {"success": len(action) % 2 == 0}


gymnasium.register("test/Rude-v0", Rude)


@pytest.fixture(scope="module")
def finished(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> turnwise.Run:
    rl = {"env": "test/Rude-v0", "groups": 2, "group_size": 3, "max_new_tokens": 6, "poll": 0.0}
    config = {
        "policy": str(model_folder()),
        "threads": 1,
        "name": f"a run {MARKUP}",
        "stages": [
            {"rank": {**rl, "updates": 2, "feedback": [{"source": "simulated-panel", "raters": 2}]}},
            {"reward-model": {"members": 2, "lr": 1e-3, "held_out": 0.3, "steps_per_update": 1}},
            {
                "rl": {
                    **rl, "updates": 4, "feedback": [{"judge": "reward-model", "per": "turn"}],
                    "gold": {"episodes": 4, "every": 2}, "optimizer": {"name": "grpo", "lr": 1e-2, "kl": 0.01},
                }
            },
            {"evaluate": {"env": "test/Rude-v0", "episodes": 4, "max_new_tokens": 6, "best_of": {"judge": "reward-model", "n": [1, 2]}}},
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
    assert "reward-model +" in page or "reward-model -" in page, "what the reward model gave each turn"
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
def test_it_opens_offline_without_errors_and_is_readable(width: int, finished: turnwise.Run, browser: Any) -> None:
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
    assert page.title() == f"a run {MARKUP} · Turnwise", "markup in names and conversations stays text"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    assert page.locator("figure svg").count() >= 4
    for box in page.locator("figure svg").all():
        assert box.bounding_box()["width"] > min(300, width * 0.8)
    sizes = page.evaluate("[...document.querySelectorAll('p, td, .said')].map(e => parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 12
    context.close()
