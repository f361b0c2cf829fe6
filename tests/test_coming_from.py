"""Pages whose scripts train: for those who come from elsewhere, and with rewards of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


PAGES = [
    *sorted(path.name for path in DOCS.glob("coming-from-*.md")),
    "ppo-with-your-reward.md",
    "verifiable-rewards.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_the_scripts_of_the_page_train(
    page: str, roomy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"hello {i} ?", "topic": "greeting"} for i in range(20)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = ({"prompt": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(20))
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    names: dict[str, Any] = {}
    for block in blocks(page):
        small = block.replace("max_new_tokens=64", "max_new_tokens=6, groups=2, max_turns=2")
        small = small.replace('"max_new_tokens": 64', '"max_new_tokens": 6, "max_turns": 2')
        small = small.replace('"updates": updates', '"updates": updates, "groups": 2')
        assert small != block
        small = re.sub(r"^model = .*", f"model = {roomy!r}", small, flags=re.MULTILINE)
        small = re.sub(r"^updates = .*", "updates = 1", small, flags=re.MULTILINE)
        exec(compile(small, page, "exec"), names)
        run = names["run"]
        update = run.metrics[-1]
        assert update["failed_episodes"] == 0
        if page not in ("coming-from-verl.md", "coming-from-verifiers.md", "verifiable-rewards.md"):
            # There a policy of random weights gets the same for all it does.
            assert update["trained"] > 0
            assert update["steps"] > 0
    if page == "coming-from-trl.md":
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert run.episodes()[0].info["data"] == {"topic": "greeting"}


def test_the_page_says_what_trl_does_better() -> None:
    text = (DOCS / "coming-from-trl.md").read_text().split("## What TRL does better")[1]
    assert len(re.findall(r"^[1-9]\. \*\*", text, re.MULTILINE)) >= 5
