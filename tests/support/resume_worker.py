"""Plays a pipeline in children of its own and kills them with SIGKILL at chosen moments; used by
test_promise_3_resume.py.

    python resume_worker.py      each line of its input is a job: {"config", "folder", "resume",
                                 "kill": moment or null, "count": path or null}; each line of its
                                 output says what became of it: 0, or minus a signal

A moment is the how-manieth of the events that matter to durability, counted in the child: a ledger
transaction about to commit or just committed, a file synced, renamed or replaced, weights written,
an optimizer step, a reply sampled. The children are forked from one parent that has loaded torch
but computed nothing, since loading takes longer than the run.

Time is a number in a file beside the run's folder that grows when the run sleeps: what a run waits
for depends on the hour, and only with a clock that a kill does not set back, or forward, are two
runs the same.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import sqlalchemy
import torch
import turnwise
import turnwise.engine.policy
import turnwise.engine.policy.batching
import turnwise.engine.policy.tiny
from turnwise.engine.pipeline.progress import quiet
from turnwise.engine.policy import in_process as backends
from turnwise.engine.policy import learner
from turnwise.engine.policy import policy as model

# What a run imports as it goes, and each child would again.
PRELOADED = (
    "gymnasium", "sqlalchemy.dialects.sqlite", "transformers.models.llama.modeling_llama",
    "turnwise.judges", "turnwise.engine.pipeline.builtin", "turnwise.engine.stages.evaluate",
    "turnwise.engine.stages.preference", "turnwise.engine.stages.rank",
    "turnwise.engine.stages.rl.stage", "turnwise.engine.stages.sft", "turnwise.envs.support_desk",
    "turnwise.plugins.combiners.weighted", "turnwise.plugins.optimizers.dpo",
    "turnwise.plugins.optimizers.grpo", "turnwise.plugins.optimizers.ppo",
    "turnwise.plugins.reward_model.stage",
)  # fmt: skip


class KeptClock:
    """Keeps its time in a file, which a kill sets neither back nor forward: a `Clock` would begin
    anew in every child."""

    def __init__(self, folder: str) -> None:
        self.file = Path(f"{folder}.clock")

    def __call__(self) -> float:
        return float(self.file.read_text()) if self.file.exists() else 0.0

    def sleep(self, seconds: float) -> None:
        self.file.write_text(str(self() + seconds))


def watch(kill: int | None, where: list[str]) -> list[str]:
    """Lets every event pass by a counter that kills at the wanted one; returns the list of events,
    which grows.

    Args:
        where: whose last entry is the stage at work.
    """
    seen: list[str] = []

    def event(name: str) -> None:
        seen.append(f"{where[-1]}: {name}")
        if len(seen) - 1 == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str, *, after: bool = True) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            event(f"before {name}")
            result = original(*args, **kwargs)
            if after:
                event(f"after {name}")
            return result

        setattr(owner, name, wrapped)

    around(os, "rename")
    around(os, "replace")
    around(os, "fsync", after=False)
    around(model.Policy, "save_pretrained")
    around(learner.Learner, "step")
    around(backends.InProcess, "reply", after=False)
    around(turnwise.Run, "finish_update", after=False)

    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "commit")
    def committing(connection: Any) -> None:
        if connection.get_execution_options().get("writing"):
            event("commit")

    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "begin")
    def beginning(connection: Any) -> None:
        if connection.get_execution_options().get("writing"):
            event("begin")

    return seen


def child(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    quiet()
    where, clock = [""], KeptClock(job["folder"])
    seen = watch(job["kill"], where)
    run = turnwise.Run(
        Path(job["config"]), folder=job["folder"], resume=job["resume"], clock=clock,
        sleep=clock.sleep,
        on_status=lambda status: where.append(status.stage),
    )  # fmt: skip
    run.finish()
    if job.get("count"):
        Path(job["count"]).write_text(json.dumps(seen))


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a run prints is no answer
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        ended = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        print(ended, file=answers, flush=True)


if __name__ == "__main__":
    main()
