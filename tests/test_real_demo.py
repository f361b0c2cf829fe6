"""`turnwise demo --real` with a model that is small enough: everything it promises to write, going
on after a stop, and what it measures of language."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import turnwise
from support.command import Command
from support.echo import play
from turnwise.plugins.demo.real import WHOLE, fluency


@pytest.mark.parametrize(
    ("reply", "whole"),
    [
        ("I will send you a new one.", True),
        ("[7]", True),
        ("7 - 6 = 1", True),
        ('"Is it broken?"', True),
        ("Dear customer,\n\nI am sorry!", True),
        ("**My guess is [3].**", True),
        ("and then the", False),
        ("The answer is", False),
        ("", False),
        ("...", False),
    ],
)
def test_what_a_whole_reply_is(reply: str, whole: bool) -> None:
    assert (WHOLE.fullmatch(reply) is not None) == whole


def test_fluency_by_hand(policy: turnwise.Policy) -> None:
    """A reply that was cut is not whole, whatever it looks like; log-probs are a plain pass's."""
    episodes = play(policy, 2, group=2, tokens=6)
    turns = [dataclasses.replace(t, action="Yes.") for t in episodes[0].turns]
    found = fluency([dataclasses.replace(episodes[0], turns=tuple(turns))], policy)
    assert found["whole"] == pytest.approx(sum(not t.cut for t in turns) / len(turns))
    assert found["tokens"] == pytest.approx(sum(len(t.action_ids) for t in turns) / len(turns))
    sampled = [p for t in turns for p in t.logprobs]
    assert found["logprob"] == pytest.approx(sum(sampled) / len(sampled), abs=1e-4)


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    done = Command("demo", "--real", "--task", "gues", "--folder", str(tmp_path)).wait()
    assert (done.returncode, "no task 'gues'; it has guess, sums, desk" in done.stderr) == (1, True)
    for wrong in (["--task", "sums"], ["--real", "--road"], ["--real", "--optimizer", "ppo"]):
        done = Command("demo", *wrong, "--folder", str(tmp_path)).wait()
        assert done.returncode == 2, done.stderr


def test_it_writes_what_it_promises_and_goes_on(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """One small update of two tasks; called again, nothing is played again."""
    folder = tmp_path / "real"
    command = (
        "demo", "--real", "--quick", "--model", str(model_folder()), "--task", "sums",
        "--task", "desk", "--folder", str(folder), "--seed", "3",
    )  # fmt: skip
    done = Command(*command).wait()
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["seed"], list(summary["tasks"])) == (3, ["sums", "desk"])
    for name, task in summary["tasks"].items():
        assert {"policy", "as it came", "policy - as it came", "random"} <= set(task["players"])
        assert 0 <= task["fluency"]["policy"]["whole"] <= 1
        assert task["peak_memory"] > 1e8
        assert "## As it came" in (folder / name / "before-after.md").read_text()
        assert (folder / name / "policy" / "README.md").is_file()
    assert "update 1: outcome" in done.stdout
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/metrics.jsonl")}
    again = Command(*command).wait()
    assert again.returncode == 0, again.stderr[-2000:]
    assert "update 1: outcome" not in again.stdout
    lines = {p: len(p.read_text().splitlines()) for p in before}
    assert set(lines.values()) == {2}, "an update and an evaluation"
    other = json.loads((folder / "summary.json").read_text())
    assert other["tasks"]["sums"]["players"] == summary["tasks"]["sums"]["players"]
