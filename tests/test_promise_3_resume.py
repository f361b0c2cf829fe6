"""Promise 3: killed anywhere (SIGKILL), a run resumes to the same weights, ledger and metrics as
one that was never killed."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import turnwise
from safetensors.torch import load_file
from turnwise.learning import build_policy

WORKER = Path(__file__).parent / "support" / "resume_worker.py"
PIPELINE = """
policy: {model}
threads: 1
seed: 3
checkpoint_every: 2
stages:
  - sft: {{env: turnwise/SupportDesk-v0, episodes: 24, batch_size: 8, steps_per_update: 1, lr: \
1.0e-3}}
  - rank: {{env: turnwise/SupportDesk-v0, updates: 3, groups: 4, group_size: 3, max_new_tokens: \
6, poll: 0,
           feedback: [{{judge: simulated-panel, raters: 2, noise: 0.5}}]}}
  - reward-model: {{members: 2, lr: 1.0e-3, batch_size: 4, epochs: 2, held_out: 0.2, \
steps_per_update: 1}}
  - rl: {{env: turnwise/SupportDesk-v0, updates: 4, groups: 2, group_size: 2, max_new_tokens: 6, \
poll: 0,
         feedback: [{{judge: reward-model, combine: min}}, {{judge: length, max_words: 3}}], \
gold: {{episodes: 3, every: 2, patience: 9}},
         optimizer: {{name: ppo, lr: 1.0e-3, kl: 0.1, kl_target: 0.1}}}}
  - preference: {{optimizer: {{name: dpo, lr: 1.0e-3}}, batch_size: 16}}
  - rl: {{env: turnwise/SupportDesk-v0, updates: 2, groups: 3, group_size: 3, max_new_tokens: 6, \
poll: 0,
         feedback: [environment, {{judge: questions, weight: 0.1}}, {{judge: length, max_words: \
3}}],
         credit: {{name: redistribute, features: 16}}, resample: 1, audit: {{episodes: 1, \
rollouts: 2}}, curriculum: learnable,
         optimizer: {{name: grpo, lr: 1.0e-3, kl: 0.1}}}}
  - rl: {{env: turnwise/SupportDesk-v0, updates: 1, groups: 2, group_size: 2, max_new_tokens: 6, \
poll: 0, max_turns: 3,
         feedback: [{{judge: length, max_words: 3}}], credit: {{name: branch, rollouts: 2}}, \
optimizer: {{name: ppo, lr: 1.0e-3, critic: separate}}}}
  - rl: {{env: turnwise/SupportDesk-v0, updates: 5, groups: 2, group_size: 3, max_new_tokens: 6, \
pending: 18, staleness: 2, poll: 0.05, curriculum: {{name: learnable, new: 0.3}},
         feedback: [{{judge: simulated-panel, raters: 2, noise: 0.5, delay: 4, unanswered: 0.2, \
deadline: 9}}],
         optimizer: {{name: grpo, lr: 1.0e-3}}}}
  - evaluate: {{env: turnwise/SupportDesk-v0, episodes: 6, players: [policy, expert], \
max_new_tokens: 6,
               best_of: {{judge: reward-model, n: [1, 2]}}}}
"""


Work = Callable[[list[dict[str, Any]]], list[int]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    """Plays jobs in children of one process, and returns what became of each: 0, or minus the
    signal that ended it."""
    log = tmp_path_factory.mktemp("worker") / "stderr"
    with log.open("w") as errors, subprocess.Popen(
        [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=errors, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None

        def work(jobs: list[dict[str, Any]]) -> list[int]:
            found = []
            for job in jobs:
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
                assert answer, log.read_text()[-4000:]
                found.append(int(answer))
            assert "Traceback" not in log.read_text(), log.read_text()[-4000:]
            return found

        yield work
        process.stdin.close()


def rows(folder: Path) -> dict[str, list[Any]]:
    """The ledger's tables without timestamps."""
    found: dict[str, list[Any]] = {}
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        db.row_factory = sqlite3.Row
        for table in ("episodes", "requests", "feedback", "members"):
            plain = [
                {k: row[k] for k in tuple(row.keys()) if k != "time"}
                for row in db.execute(f"select * from {table}")
            ]
            for row in plain:
                if isinstance(row.get("content"), bytes):
                    row["content"] = json.loads(zlib.decompress(row["content"]))
            found[table] = sorted(plain, key=lambda row: str(row.get("id") or row.get("episode")))
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "time" and not k.startswith("seconds/")}
        for line in lines
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("policy/*.safetensors")) + sorted(
        folder.glob("reward-model*/**/*.safetensors")
    )
    return {
        f"{f.relative_to(folder)}:{name}": value
        for f in files
        for name, value in load_file(f).items()
    }


def assert_same(folder: Path, whole: Path) -> None:
    mine, theirs = weights(folder), weights(whole)
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs), "bit for bit"
    assert metrics(folder) == metrics(whole), "no gap, no repetition"
    mine_rows, their_rows = rows(folder), rows(whole)
    for table, expected in their_rows.items():
        assert mine_rows[table] == expected, table
    assert (folder / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()


@pytest.fixture(scope="module")
def whole(work: Work, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A run that was never disturbed: its config, its folder and the moments it could have been
    killed at. It looks for late answers at a steady `poll`, or a kill would move the hours at which
    questions are asked."""
    folder = tmp_path_factory.mktemp("whole")
    demonstrations = turnwise.rollout(
        turnwise.ScriptPlayer("demonstrator"),
        [(s, 0) for s in turnwise.starts("turnwise/SupportDesk-v0", 0, 60)],
    )
    texts = [m.content for e in demonstrations for m in e.messages]
    model = build_policy(folder / "model", texts, hidden=32, layers=1, heads=2)
    config = folder / "pipeline.yaml"
    config.write_text(PIPELINE.format(model=model))
    job = {"config": str(config), "folder": str(folder / "run"), "resume": False, "kill": None}
    assert work([{**job, "count": str(folder / "events.json")}]) == [0]
    return config, folder / "run", json.loads((folder / "events.json").read_text())


def kinds(whole: tuple[Path, Path, list[str]]) -> list[str]:
    """The moments by what happens, whichever stage it happens in."""
    return [event.split(": ")[1] for event in whole[2]]


def killed_at(
    moments: list[int], whole: tuple[Path, Path, list[str]], folder: Path, work: Work
) -> None:
    config, run, _ = whole
    folder.mkdir(exist_ok=True)
    for moment in moments:
        job = {"config": str(config), "folder": str(folder / f"{moment}"), "resume": True}
        assert work([{**job, "kill": moment}, {**job, "kill": None}]) == [-signal.SIGKILL, 0]
        assert_same(folder / f"{moment}", run)
        shutil.rmtree(folder / f"{moment}")


def spread(events: list[str], count: int) -> list[int]:
    """Moments over the whole run, every kind of event among them."""
    even = [i * (len(events) - 1) // (count - 1) for i in range(count)]
    sorts = list(dict.fromkeys(events))
    for i, kind in enumerate(sorts[: count - 2]):
        places = [p for p, e in enumerate(events) if e == kind]
        even[1 + i * (count - 2) // len(sorts)] = places[len(places) * (i + 1) // (len(sorts) + 1)]
    return sorted(set(even))


def test_killed_at_four_moments(
    whole: tuple[Path, Path, list[str]], work: Work, tmp_path: Path
) -> None:
    """In a ledger's commit, where a checkpoint is put in place, in the last step, and in the second
    round that is played before an update, where nothing is left of the first but the ledger; fifty
    more are slow."""
    events = kinds(whole)
    commits, renames, steps = (
        [i for i, e in enumerate(events) if e == name]
        for name in ("commit", "before rename", "before step")
    )
    pending = [i for i, e in enumerate(whole[2]) if e.startswith("rl-4: ")]
    first = next(i for i in pending if events[i] == "commit")
    second = next(i for i in pending if i > first and events[i] == "before reply")
    moments = [commits[len(commits) // 3], renames[2 * len(renames) // 3], steps[-1], second]
    killed_at(sorted(moments), whole, tmp_path, work)


@pytest.mark.slow
def test_killed_while_feedback_is_pending(
    whole: tuple[Path, Path, list[str]], work: Work, tmp_path: Path
) -> None:
    """Answers take a while there, come out of order or never: in the middle of play, when a
    decision is written, and of an update."""
    ages = [line["staleness/max"] for line in metrics(whole[1]) if line["stage"] == "rl-4"]
    assert len(ages) == 5
    assert max(ages) > 0, "play went on meanwhile"
    own = [
        (i, event.split(": ")[1]) for i, event in enumerate(whole[2]) if event.startswith("rl-4: ")
    ]
    replies, commits, steps = (
        [i for i, e in own if e == name] for name in ("before reply", "commit", "before step")
    )
    killed_at(
        [replies[len(replies) // 2], commits[len(commits) // 2], steps[3]], whole, tmp_path, work
    )


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_killed_at_fifty_moments(
    whole: tuple[Path, Path, list[str]], work: Work, tmp_path: Path
) -> None:
    moments = spread(kinds(whole), 54)
    assert len(moments) >= 50
    killed_at(moments, whole, tmp_path, work)


SMALL = """
policy: {model}
threads: 1
checkpoint_every: 1
stages:
  - evaluate: {{env: turnwise/SupportDesk-v0, episodes: 1, max_new_tokens: 2}}
  - rl: {{env: turnwise/SupportDesk-v0, updates: 1, groups: 1, group_size: 2, max_new_tokens: 2, \
max_turns: 2, poll: 0, optimizer: {{name: grpo, lr: 1.0e-3}}}}
"""


def test_killed_inside_what_is_put_in_place(model_folder: Any, work: Work, tmp_path: Path) -> None:
    """At each step of the first files and of the last: config.yaml, the first checkpoint,
    evaluation.json, the policy at the end."""
    config = tmp_path / "pipeline.yaml"
    config.write_text(SMALL.format(model=model_folder()))
    job = {"config": str(config), "folder": str(tmp_path / "run"), "resume": False, "kill": None}
    assert work([{**job, "count": str(tmp_path / "events.json")}]) == [0]
    events = json.loads((tmp_path / "events.json").read_text())
    files = [
        i
        for i, event in enumerate(events)
        if event.split(": ")[1].endswith(("fsync", "rename", "replace"))
    ]
    table = next(i for i, event in enumerate(events) if event == "evaluate: before replace")
    moments = sorted({*files[:3], table, table + 1, *files[-4:]})
    killed_at(moments, (config, tmp_path / "run", events), tmp_path / "killed", work)


AGENT = """
policy: {model}
threads: 1
checkpoint_every: 1
stages:
  - rl:
      env: {{id: turnwise/Agent-v0, kwargs: {{command: ["{python}", "{program}"]}}}}
      updates: 4
      groups: 2
      group_size: 2
      max_new_tokens: 6
      poll: 0
      credit: turn-returns
      optimizer: {{name: grpo, lr: 1.0e-3}}
  - evaluate:
      env: {{id: turnwise/Agent-v0, kwargs: {{command: ["{python}", "{program}"]}}}}
      episodes: 4
      max_new_tokens: 6
"""
PROGRAM = """
import json, os, urllib.request

def post(path, body):
    head = {"Authorization": "Bearer " + os.environ["TURNWISE_KEY"]}
    url = os.environ["TURNWISE_URL"] + path
    asked = urllib.request.Request(url, json.dumps(body).encode(), head)
    return json.load(urllib.request.urlopen(asked))

def ask(messages):
    made = post("/v1/chat/completions", {"model": "policy", "messages": messages})
    return made["choices"][0]["message"]

first = [{"role": "user", "content": "hello " + os.environ["TURNWISE_SEED"][-2:]}]
first += [ask(first), {"role": "user", "content": "how are you ?"}]
words = ask(first)["content"]
summary = [{"role": "user", "content": "it was: " + words[:20]}]
post("/reward", {"reward": words.count("e") / (1 + len(words))})
ask(summary)
"""


@pytest.fixture(scope="module")
def with_programs(
    work: Work, wide: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[str]]:
    """A run that was never disturbed, whose agents are programs that fork."""
    folder = tmp_path_factory.mktemp("programs")
    program, config = folder / "agent.py", folder / "pipeline.yaml"
    program.write_text(PROGRAM)
    config.write_text(AGENT.format(model=wide, python=sys.executable, program=program))
    job = {"config": str(config), "folder": str(folder / "run"), "resume": False, "kill": None}
    assert work([{**job, "count": str(folder / "events.json")}]) == [0]
    played = rows(folder / "run")["episodes"]
    assert {tuple(t["context"] for t in e["content"]["turns"]) for e in played} == {(0, 0, 1)}
    return config, folder / "run", json.loads((folder / "events.json").read_text())


def test_killed_while_programs_run(
    with_programs: tuple[Path, Path, list[str]], work: Work, tmp_path: Path
) -> None:
    """While a reply is sampled for them, and in a step; twenty more are slow."""
    events = kinds(with_programs)
    replies, steps = (
        [i for i, e in enumerate(events) if e == name] for name in ("before reply", "before step")
    )
    killed_at([replies[len(replies) // 2], steps[1]], with_programs, tmp_path, work)


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_killed_at_twenty_moments_while_programs_run(
    with_programs: tuple[Path, Path, list[str]], work: Work, tmp_path: Path
) -> None:
    moments = spread(kinds(with_programs), 22)
    assert len(moments) >= 20
    killed_at(moments, with_programs, tmp_path, work)
