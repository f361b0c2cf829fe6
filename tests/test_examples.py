"""Every example: the scripts train a tiny model, the pipelines are checked whole."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import turnwise
from support.command import Command

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
PIPELINES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains(
    name: str, roomy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    made = importlib.import_module(name)
    more: dict[str, Any] = {"seconds": 0.05} if name == "rating_with_delay" else {}
    try:
        run = made.main(roomy, updates=1, **more)
    finally:
        del sys.modules[name]
    assert isinstance(run, turnwise.Run)
    assert run.updates == 1
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60
    if name in ("ppo_reward_function", "dpo_own_preferences"):
        assert run.metrics[-1]["steps"] >= 1


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_sound(name: str, tmp_path: Path) -> None:
    keys = {"OPENAI_API_KEY": "k-test", "ANTHROPIC_API_KEY": "k-test"}
    done = Command(  # a policy that may be had: another one's folder is made by the demo
        "run", f"examples/{name}", "--set", "policy=somebody/small", "--dry-run",
        cwd=EXAMPLES.parent, env=keys,
    ).wait()  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Nothing was loaded, played or asked" in done.stdout


def test_the_page_lists_every_example() -> None:
    listed = set(re.findall(r"^\| `([\w./]+?)/?` \|", (EXAMPLES / "README.md").read_text(), re.M))
    assert listed == {f"{name}.py" for name in SCRIPTS} | set(PIPELINES) | {
        "accelerate",
        "agents",
        "deploy",
        *(f"notebooks/{path.name}" for path in EXAMPLES.glob("notebooks/*.ipynb")),
    }
