"""Judges conversations in batches, is killed on the way and starts again; used by
test_judge_economy.py.

    python -m support.judge_worker URL FOLDER WIRE:MOMENT ...

At the moment `submitted` the provider has the batch and nothing here says so yet; at `waiting` its
id is written down. Each is a process of its own, forked from one that has only loaded what it
needs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import turnwise
from turnwise.judges.asking import batches, calls
from turnwise.judges.llm.rubric_judge import RubricJudge

from support.clock import AsyncClock
from support.episodes import conversation
from support.judges import PRICE, RUBRIC, answers, context, model


def judge(wire: str, moment: str, url: str, folder: Path, kill: bool) -> None:
    calls.TIME = AsyncClock(0.05)
    ledger = turnwise.Ledger(folder / "ledger.sqlite")
    asked = model(wire, url, f"{wire}-{moment}")
    own = RubricJudge(
        canaries=0, model=asked, rubric=RUBRIC, batch=True, budget=10.0, prices={asked.name: PRICE}
    )
    if kill:
        name = {"submitted": "_name", "waiting": "_looked"}[moment]
        setattr(batches.BatchCaller, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    said = answers(
        own,
        [conversation("good " * i, id=f"e{i}", seed=i) for i in range(6)],
        context(folder, ledger),
    )
    (folder / "said.json").write_text(json.dumps([[s.score, s.stamp.cost] for s in said]))


def main(url: str, root: Path, jobs: list[str]) -> None:
    for job in jobs:
        wire, moment = job.split(":")
        folder = root / f"{wire}-{moment}"
        folder.mkdir()
        for kill in (True, False):
            pid = os.fork()
            if pid == 0:
                try:
                    judge(wire, moment, url, folder, kill)
                finally:
                    sys.stderr.flush()
                    os._exit(0)
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status) is not kill:
                sys.exit(f"{job}: {'not killed' if kill else 'killed'}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
