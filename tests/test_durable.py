"""What can go wrong with a run's folder: each is one clear message, and nothing that was acknowledged is lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import turnwise
from turnwise.engine.checkpoint import CheckpointError, newest, read

RL = {"env": "test/Echo-v0", "updates": 4, "groups": 2, "group_size": 3, "max_new_tokens": 5, "poll": 0.0}


def config(model: Path, **more: Any) -> dict[str, Any]:
    rl = {**RL, **more.pop("rl", {})}
    return {"policy": str(model), "threads": 1, "checkpoint_every": 1, "name": "r", "stages": [{"rl": rl}], **more}


def flat(run: turnwise.Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


@pytest.fixture
def stopped(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder whose run was left after two of four updates."""
    for update in turnwise.Run(config(model_folder()), folder=tmp_path / "r"):
        if update.number == 2:
            break
    return tmp_path / "r"


def resume(folder: Path, model: Path, **more: Any) -> turnwise.Run:
    return turnwise.Run(config(model, **more), folder=folder, resume=True)


def test_it_goes_on_to_where_an_undisturbed_run_ends(stopped: Path, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    whole = turnwise.Run(config(model_folder()), folder=tmp_path / "whole").finish()
    again = resume(stopped, model_folder())
    assert [u.number for u in again] == [3, 4]
    assert torch.equal(flat(again), flat(whole))
    assert [m["update"] for m in again.metrics] == [1, 2, 3, 4]


def test_a_finished_run_can_be_extended(stopped: Path, model_folder: Callable[..., Path]) -> None:
    assert [u.number for u in resume(stopped, model_folder())] == [3, 4]
    assert [u.number for u in resume(stopped, model_folder())] == [], "nothing is left to do"
    assert [u.number for u in resume(stopped, model_folder(), rl={"updates": 6})] == [5, 6]
    evaluate = {"evaluate": {"env": "test/Echo-v0", "episodes": 3, "max_new_tokens": 5}}
    more = resume(stopped, model_folder(), stages=[{"rl": {**RL, "updates": 6}}, evaluate])
    assert [(u.number, u.stage) for u in more] == [(7, "evaluate")]
    lines = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]


def test_resume_of_nothing_begins(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    assert len(list(resume(tmp_path / "r", model_folder()))) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "started with seed=None, and the config now says 5"),
        ({"rl": {"groups": 3}}, "stage 1 has been played and the config says something else now: groups of 'rl' changed"),
        ({"rl": {"updates": 1}}, "updates of 'rl' changed"),
        ({"stages": [{"evaluate": {"env": "test/Echo-v0"}}]}, "'rl' is now 'evaluate'"),
        ({"threads": 2}, "made with 1 threads and would go on with 2.*set `threads: 1`"),
    ],
)
def test_a_changed_config_is_refused(
    change: dict[str, Any], message: str, stopped: Path, model_folder: Callable[..., Path]
) -> None:
    with pytest.raises(turnwise.ConfigError, match=message):
        resume(stopped, model_folder(), **change).finish()
    torch.set_num_threads(1)
    assert [u.number for u in resume(stopped, model_folder())] == [3, 4], "nothing was spoiled"


@pytest.mark.parametrize("what", ["weights", "state", "optimizer"])
def test_a_torn_checkpoint_is_detected_and_the_one_before_is_used(
    what: str, stopped: Path, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    whole = turnwise.Run(config(model_folder()), folder=tmp_path / "whole").finish()
    last = stopped / "checkpoints" / "update-000002"
    victim = {
        "weights": last / "policy" / "model.safetensors",
        "state": last / "state.json",
        "optimizer": last / "optimizer.safetensors",
    }[what]
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="torn"):
        read(last)
    again = resume(stopped, model_folder())
    with pytest.warns(UserWarning, match=r"update-000002 is torn.* Using the one before it"):
        assert [u.number for u in again] == [2, 3, 4]
    assert torch.equal(flat(again), flat(whole)), "what the ledger holds of update 2 is used again"
    assert again.ledger.counts()["episodes"] == whole.ledger.counts()["episodes"]


def test_a_deleted_ledger_is_said(stopped: Path, model_folder: Callable[..., Path]) -> None:
    shutil.move(stopped / "ledger.sqlite", stopped / "elsewhere")
    with pytest.raises(
        turnwise.ConfigError, match=r"the ledger of the run .* is gone.*put it back, or start another run whose policy"
    ):
        resume(stopped, model_folder()).finish()
    shutil.move(stopped / "elsewhere", stopped / "ledger.sqlite")
    assert [u.number for u in resume(stopped, model_folder())] == [3, 4]


def test_a_damaged_ledger_is_said(stopped: Path, model_folder: Callable[..., Path]) -> None:
    for name in ("ledger.sqlite-wal", "ledger.sqlite-shm"):
        (stopped / name).unlink(missing_ok=True)
    (stopped / "ledger.sqlite").write_bytes(b"not a database at all " * 100)
    with pytest.raises(turnwise.LedgerError, match="cannot be read"):
        resume(stopped, model_folder()).finish()


def test_metrics_with_a_gap_are_said(stopped: Path, model_folder: Callable[..., Path]) -> None:
    log = stopped / "metrics.jsonl"
    text = log.read_text()
    log.write_text(text.splitlines()[1] + "\n")
    with pytest.raises(turnwise.ConfigError, match="should hold the updates 1 to 2"):
        resume(stopped, model_folder()).finish()


def test_a_checkpoint_of_another_model_is_said(stopped: Path, model_folder: Callable[..., Path]) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder("qwen2"))
    with pytest.raises(turnwise.PolicyError, match=r"of another model than this policy: \d+ parameters differ"):
        policy.load_weights(stopped / "checkpoints" / "update-000002" / "policy")
    before = {n: p.clone() for n, p in policy.network.named_parameters()}
    assert all(torch.equal(p, before[n]) for n, p in policy.network.named_parameters())
    lora = turnwise.Policy.from_pretrained(model_folder(), lora={"r": 4})
    with pytest.raises(turnwise.PolicyError, match="a whole model there, LoRA adapters here"):
        lora.load_weights(stopped / "checkpoints" / "update-000002" / "policy")


def test_lora_runs_resume_exactly(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    policy = {"model": str(model_folder()), "lora": {"r": 4}}
    rl = {"rl": {"optimizer": {"name": "ppo", "lr": 1e-2, "kl": 0.1, "kl_target": 0.05}}}
    whole = turnwise.Run(config(model_folder(), policy=policy, **rl), folder=tmp_path / "whole").finish()
    for update in turnwise.Run(config(model_folder(), policy=policy, **rl), folder=tmp_path / "r"):
        if update.number == 2:
            break
    again = resume(tmp_path / "r", model_folder(), policy=policy, **rl).finish()
    assert torch.equal(flat(again), flat(whole))
    assert [m["kl_coef"] for m in again.metrics] == [m["kl_coef"] for m in whole.metrics]
    assert len({m["kl_coef"] for m in whole.metrics}) > 1, "the coefficient follows the KL"


def pipeline(folder: Path, model: Path, updates: int = 400) -> Path:
    path = folder / "pipeline.yaml"
    rl = f"{{env: turnwise/SupportDesk-v0, updates: {updates}, groups: 2, group_size: 2, max_new_tokens: 5, poll: 0}}"
    path.write_text(f"policy: {model}\nthreads: 1\ncheckpoint_every: 1000\nstages:\n  - rl: {rl}\n")
    return path


def start(path: Path, *more: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "turnwise", "run", str(path), "--folder", str(path.parent / "run"), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


def wait_for_updates(folder: Path, count: int) -> None:
    log = folder / "metrics.jsonl"
    for _ in range(600):
        if log.exists() and len(log.read_text().splitlines()) >= count:
            return
        time.sleep(0.1)
    raise AssertionError("the run makes no updates")


def test_a_second_process_is_refused_with_the_firsts_pid_and_sigterm_saves(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = pipeline(tmp_path, model_folder())
    first = start(path)
    wait_for_updates(tmp_path / "run", 2)
    second = start(path, "--resume")
    _, said = second.communicate(timeout=100)
    assert second.returncode == 1
    assert f"is at work in process {first.pid}" in said
    first.send_signal(signal.SIGTERM)
    out, said = first.communicate(timeout=100)
    assert first.returncode == 0, said
    made = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert f"Stopped after update {made}" in out
    assert f"turnwise run --resume {path} --folder {tmp_path / 'run'}" in out, "one command to go on"
    found = newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.position.update == made


def test_a_full_disk_is_one_message_and_resume_goes_on(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The operating system refuses to let any file grow beyond a limit that the ledger or a checkpoint reaches."""
    path = pipeline(tmp_path, model_folder(), updates=3)
    path.write_text(path.read_text().replace("checkpoint_every: 1000", "checkpoint_every: 1"))

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = 60_000  # the model alone is larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = start(path, preexec_fn=small)
    _, said = full.communicate(timeout=100)
    assert full.returncode == 1
    assert "Traceback" not in said, said
    assert "cannot be written" in said or "cannot be used" in said, said
    assert "--resume" in said or "disk" in said
    assert not list((tmp_path / "run" / "checkpoints").glob("update-*")), "nothing torn was moved into place"
    again = start(path, "--resume")
    out, said = again.communicate(timeout=100)
    assert again.returncode == 0, said
    assert "Finished after update 3" in out


class Counts(turnwise.Stage):
    """A plugin's stage that learns nothing the run knows of, and never says `begin`."""

    times: int = 3

    def play(self, run: turnwise.Run) -> Any:
        for i in range(self.times):
            run.policy.version += 1
            yield run.finish_update({"count": i + 1.0})


class Sums(turnwise.Stage):
    """One that says what learns in it."""

    class Part:
        total = 0

        def state_dict(self) -> dict[str, Any]:
            return {"total": self.total}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.total = state["total"]

    def play(self, run: turnwise.Run) -> Any:
        part = self.Part()
        for i in range(run.begin({"part": part}), 4):
            part.total += i
            yield run.finish_update({"total": float(part.total)})


class Plugin:
    @turnwise.hookimpl
    def register_stages(self, register: Any) -> None:
        register("counts", Counts)
        register("sums", Sums)


@pytest.mark.parametrize("stop", [1, 2, 4, 6])
def test_other_peoples_stages_resume_from_their_beginning_or_from_within(
    stop: int, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    plugins = turnwise.Plugins({"mine": Plugin()})
    config = {"policy": str(model_folder()), "threads": 1, "checkpoint_every": 1, "stages": [{"counts": {}}, {"sums": {}}]}
    for update in turnwise.Run(config, folder=tmp_path / "r", plugins=plugins):
        if update.number == stop:
            break
    again = turnwise.Run(config, folder=tmp_path / "r", plugins=plugins, resume=True).finish()
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [m["update"] for m in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert [m.get("count", m.get("total")) for m in lines] == [1, 2, 3, 0, 1, 3, 6]
    assert again.policy.version == 3
