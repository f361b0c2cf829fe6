"""The pages for those who come from elsewhere: what stands there is run as it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["coming-from-trl.md", "ppo-with-your-reward.md"])
def test_the_scripts_of_the_page_train(
    page: str, model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"hello {i} ?", "topic": "greeting"} for i in range(20)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict[str, Any] = {"model": str(model_folder()), "updates": 1}
    for block in blocks(page):
        small = block.replace("max_new_tokens=64", "max_new_tokens=6, groups=2, max_turns=2")
        assert small != block
        exec(compile(small, page, "exec"), names)
        run = names["run"]
        assert run.updates == 1
        [update] = run.metrics
        assert update["trained"] > 0
        assert update["steps"] > 0
    if page == "coming-from-trl.md":
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert run.episodes()[0].info["data"] == {"topic": "greeting"}


def test_the_page_says_what_trl_does_better() -> None:
    text = (DOCS / "coming-from-trl.md").read_text().split("## What TRL does better")[1]
    assert len(re.findall(r"^[1-9]\. \*\*", text, re.MULTILINE)) >= 5
