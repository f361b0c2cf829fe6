"""What can go wrong with a run's folder: each is one clear message, and nothing that was
acknowledged is lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import turnwise
from support.command import Command
from turnwise.engine.errors import CheckpointError
from turnwise.engine.pipeline.checkpoint import newest, read
from turnwise.engine.pipeline.resume import check_same_run

RL = {
    "env": "test/Echo-v0",
    "updates": 4,
    "groups": 2,
    "group_size": 3,
    "max_new_tokens": 5,
    "poll": 0.0,
}


def config(model: Path, **more: Any) -> dict[str, Any]:
    rl = {**RL, **more.pop("rl", {})}
    return {
        "policy": str(model),
        "threads": 1,
        "checkpoint_every": 1,
        "name": "r",
        "stages": [{"rl": rl}],
        **more,
    }


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


def test_it_goes_on_to_where_an_undisturbed_run_ends(
    stopped: Path, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
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
        (
            {"rl": {"groups": 3}},
            (
                "stage 1 has been played and the config says something else now: groups of 'rl'"
                " changed"
            ),
        ),
        ({"rl": {"updates": 1}}, "updates of 'rl' changed"),
        ({"stages": [{"evaluate": {"env": "test/Echo-v0"}}]}, "'rl' is now 'evaluate'"),
        ({"threads": 2}, "made with threads 1 and would go on with 2.*set `threads: 1`"),
    ],
)
def test_a_changed_config_is_refused(
    change: dict[str, Any], message: str, stopped: Path, model_folder: Callable[..., Path]
) -> None:
    with pytest.raises(turnwise.ConfigError, match=message):
        resume(stopped, model_folder(), **change).finish()
    torch.set_num_threads(1)
    assert [u.number for u in resume(stopped, model_folder())] == [3, 4], "nothing was spoiled"


def test_a_resumed_run_keeps_its_number_of_threads(
    stopped: Path, model_folder: Callable[..., Path]
) -> None:
    torch.set_num_threads(2)
    try:
        run = resume(stopped, model_folder(), threads=None)
        assert [u.number for u in run] == [3, 4]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


class Metered(turnwise.Judge):
    """A third party's judge: what it may spend says nothing of its scores."""

    may_change = frozenset({"cents"})

    def __init__(self, cents: int = 1, strict: bool = False) -> None:
        self.strict = strict


def test_a_part_says_itself_which_of_its_options_may_change() -> None:
    module = types.ModuleType("metered")
    hook = turnwise.hookimpl(lambda register: register("metered", Metered))
    module.register_judges = hook  # type: ignore[attr-defined]
    plugins = turnwise.Plugins({"metered": module})

    def stages(**options: Any) -> dict[str, Any]:
        inner = {"judge": "metered", **options}
        return {"stages": [{"rl": {"feedback": [{"judge": "panel", "judges": [inner]}]}}]}

    check_same_run(stages(cents=1), stages(cents=99), 0, 1, plugins)
    with pytest.raises(turnwise.ConfigError, match="feedback of 'rl' changed"):
        check_same_run(stages(), stages(strict=True), 0, 1, plugins)
    rubric = {"judge": "rubric", "rubric": "a.md", "budget": 1.0}
    other = {**rubric, "budget": 5.0, "canaries": 0}
    check_same_run({"stages": [{"rl": {"feedback": [rubric]}}]},
                   {"stages": [{"rl": {"feedback": [other]}}]}, 0, 1, plugins)  # fmt: skip
    path = "turnwise.judges.llm.rubric_judge:RubricJudge"  # named by its class
    check_same_run({"stages": [{"rl": {"feedback": [{**rubric, "judge": path}]}}]},
                   {"stages": [{"rl": {"feedback": [{**other, "judge": path}]}}]}, 0, 1, plugins)  # fmt: skip  # noqa: E501
    critics = [{"stages": [{"revise": {"critic": {"model": "m", "budget": b}}}]} for b in (1, 2)]
    check_same_run(*critics, 0, 1, plugins)  # type: ignore[arg-type]


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
        turnwise.ConfigError,
        match=r"the ledger of the run .* is gone.*put it back, or start another run whose policy",
    ):
        resume(stopped, model_folder()).finish()
    shutil.move(stopped / "elsewhere", stopped / "ledger.sqlite")
    assert [u.number for u in resume(stopped, model_folder())] == [3, 4]


def test_a_damaged_ledger_is_said(stopped: Path, model_folder: Callable[..., Path]) -> None:
    for name in ("ledger.sqlite-wal", "ledger.sqlite-shm"):
        (stopped / name).unlink(missing_ok=True)
    (stopped / "ledger.sqlite").write_bytes(b"not a database at all " * 100)
    with pytest.raises(turnwise.LedgerError, match="cannot be used"):
        resume(stopped, model_folder()).finish()


def test_metrics_with_a_gap_are_said(stopped: Path, model_folder: Callable[..., Path]) -> None:
    log = stopped / "metrics.jsonl"
    text = log.read_text()
    log.write_text(text.splitlines()[1] + "\n")
    with pytest.raises(turnwise.ConfigError, match="should hold the updates 1 to 2"):
        resume(stopped, model_folder()).finish()


def test_a_checkpoint_of_another_model_is_said(
    stopped: Path, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder("qwen2"))
    with pytest.raises(
        turnwise.PolicyError, match=r"of another model than this policy: \d+ parameters differ"
    ):
        policy.load_weights(stopped / "checkpoints" / "update-000002" / "policy")
    before = {n: p.clone() for n, p in policy.network.named_parameters()}
    assert all(torch.equal(p, before[n]) for n, p in policy.network.named_parameters())
    lora = turnwise.Policy.from_pretrained(model_folder(), lora={"r": 4})
    with pytest.raises(turnwise.PolicyError, match="a whole model there, LoRA adapters here"):
        lora.load_weights(stopped / "checkpoints" / "update-000002" / "policy")


def test_lora_runs_resume_exactly(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    policy = {"model": str(model_folder()), "lora": {"r": 4}}
    rl = {"rl": {"optimizer": {"name": "ppo", "lr": 1e-2, "kl": 0.1, "kl_target": 0.05}}}
    whole = turnwise.Run(
        config(model_folder(), policy=policy, **rl), folder=tmp_path / "whole"
    ).finish()
    for update in turnwise.Run(config(model_folder(), policy=policy, **rl), folder=tmp_path / "r"):
        if update.number == 2:
            break
    again = resume(tmp_path / "r", model_folder(), policy=policy, **rl).finish()
    assert torch.equal(flat(again), flat(whole))
    assert [m["kl_coef"] for m in again.metrics] == [m["kl_coef"] for m in whole.metrics]
    assert len({m["kl_coef"] for m in whole.metrics}) > 1, "the coefficient follows the KL"


def pipeline(folder: Path, model: Path, updates: int = 400) -> Path:
    path = folder / "pipeline.yaml"
    rl = (
        f"{{env: turnwise/SupportDesk-v0, updates: {updates}, groups: 2, group_size: 2,"
        " max_new_tokens: 5, poll: 0}"
    )
    path.write_text(f"policy: {model}\nthreads: 1\ncheckpoint_every: 1000\nstages:\n  - rl: {rl}\n")
    return path


def start(path: Path, *more: str) -> Command:
    return Command("run", str(path), "--folder", str(path.parent / "run"), *more)


def wait_for_updates(command: Command, folder: Path, count: int) -> None:
    log = folder / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert not command.is_over, "the run has ended"
        time.sleep(0.05)


def test_a_second_process_is_refused_with_the_firsts_pid_and_sigterm_saves(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = pipeline(tmp_path, model_folder())
    first = start(path)
    wait_for_updates(first, tmp_path / "run", 2)
    second = start(path, "--resume")
    refused = second.wait()
    assert refused.returncode == 1
    assert f"is at work in process {first.pid}" in refused.stderr
    os.kill(first.pid, signal.SIGTERM)
    ended = first.wait()
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    made = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert f"Stopped after update {made}" in ended.stdout
    assert f"turnwise run --resume {path} --folder {tmp_path / 'run'}" in ended.stdout, (
        "one command to go on"
    )
    found = newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.position.update == made


def test_a_full_disk_is_one_message_and_nothing_acknowledged_is_lost(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """After some updates the operating system refuses to let any file grow; then there is room
    again."""
    # So many that the disk is full long before the last, however late this is noticed.
    path = pipeline(tmp_path, model_folder(), updates=1000)
    path.write_text(path.read_text().replace("checkpoint_every: 1000", "checkpoint_every: 1"))
    full = start(path)
    wait_for_updates(full, tmp_path / "run", 2)
    resource.prlimit(full.pid, resource.RLIMIT_FSIZE, (1, 1))
    ended = full.wait()
    said = ended.stderr
    assert ended.returncode == 1
    assert "Traceback" not in said, said
    assert "cannot be written" in said or "cannot be used" in said or "is full" in said, said
    before = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(before) >= 2
    last = len(before) + 3
    path.write_text(path.read_text().replace("updates: 1000", f"updates: {last}"))
    again = start(path, "--resume").wait()
    # Whole to its end; five tokens a reply earn nothing that could teach.
    assert again.returncode == 4, again.stderr
    assert f"Nothing learned after update {last}" in again.stdout
    after = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in before if line.endswith("}")][:1]
    assert after[: len(kept)] == kept, "what was finished stands"
    assert [json.loads(line)["update"] for line in after] == list(range(1, last + 1))


def two_stages(model: Path) -> dict[str, Any]:
    rl = {**RL, "optimizer": {"name": "grpo", "kl": 0.1, "lr": 1e-3}}
    return {**config(model), "stages": [{"rl": {**rl, "updates": 2}}, {"rl": {**rl, "updates": 2}}]}


def test_a_torn_first_checkpoint_of_a_later_stage(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The one before it lies in the stage before, whose own beginning must still be there for its
    reference."""
    whole = turnwise.Run(two_stages(model_folder()), folder=tmp_path / "whole").finish()
    for update in turnwise.Run(two_stages(model_folder()), folder=tmp_path / "r"):
        if update.number == 3:
            break
    last = sorted((tmp_path / "r" / "checkpoints").glob("update-*"))[-1]
    (last / "state.json").write_text("{")
    again = turnwise.Run(two_stages(model_folder()), folder=tmp_path / "r", resume=True)
    with pytest.warns(UserWarning, match="is torn"):
        again.finish()
    assert torch.equal(flat(again), flat(whole))


def test_a_checkpoint_that_is_there_is_not_written_again(stopped: Path) -> None:
    found = newest(stopped / "checkpoints")
    before = {f: f.stat().st_mtime_ns for f in found.folder.rglob("*")}
    from turnwise.engine.pipeline import checkpoint

    assert checkpoint.save(stopped / "checkpoints", found.position, None, {}, 9) == found.folder
    assert {f: f.stat().st_mtime_ns for f in found.folder.rglob("*")} == before


def test_another_attention_is_refused(stopped: Path, model_folder: Callable[..., Path]) -> None:
    for folder in (stopped / "checkpoints").glob("update-*"):
        note = json.loads((folder / "state.json").read_text())
        note["position"]["machine"]["attention"] = "eager"
        (folder / "state.json").write_text(json.dumps(note))
    with pytest.raises(
        turnwise.ConfigError, match="made with attention eager and would go on with sdpa"
    ):
        resume(stopped, model_folder()).finish()


class Moves(turnwise.Stage):
    """Trains without saying so."""

    def play(self, run: turnwise.Run) -> Any:
        with torch.no_grad():
            for parameter in run.policy.parameters():
                parameter += 1.0
        yield run.finish_update({})


class Waits(turnwise.Stage):
    """Touches no policy."""

    def play(self, run: turnwise.Run) -> Any:
        for i in range(run.begin(), 2):
            yield run.finish_update({"i": float(i)})


class MovingPlugin:
    @turnwise.hookimpl
    def register_stages(self, register: Any) -> None:
        register("moves", Moves)
        register("waits", Waits)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_weights_of_a_stage_that_never_begins_are_not_lost(
    stop: int, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    plugins = turnwise.Plugins({"mine": MovingPlugin()})
    config = {
        "policy": str(model_folder()),
        "threads": 1,
        "checkpoint_every": 1,
        "stages": [{"moves": {}}, {"waits": {}}],
    }
    whole = turnwise.Run(config, folder=tmp_path / "whole", plugins=plugins).finish()
    for update in turnwise.Run(config, folder=tmp_path / "r", plugins=plugins):
        if update.number == stop:
            break
    again = turnwise.Run(config, folder=tmp_path / "r", plugins=plugins, resume=True).finish()
    assert torch.equal(flat(again), flat(whole))


class Learns(turnwise.Judge):
    """A judge with a state: says how often it was asked."""

    def __init__(self) -> None:
        self._asked = 0

    def score(self, episodes: Any) -> list[turnwise.Feedback]:
        found = []
        for e in episodes:
            self._asked += 1
            found.append(turnwise.Feedback(e.id, score=float(self._asked)))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self._asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._asked = int(state["asked"])


def test_a_judges_state_is_restored(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    make = lambda: config(model_folder(), rl={"feedback": [Learns()]})  # noqa: E731
    whole = turnwise.Run(make(), folder=tmp_path / "whole").finish()
    for update in turnwise.Run(make(), folder=tmp_path / "r"):
        if update.number == 2:
            break
    again = turnwise.Run(make(), folder=tmp_path / "r", resume=True).finish()
    assert [m["outcome"] for m in again.metrics] == [m["outcome"] for m in whole.metrics]


class Office(turnwise.FeedbackSource):
    """People who answer at the third look; during an outage they say that they could not."""

    def __init__(self, outage: bool) -> None:
        self._outage, self._waiting, self._looks = outage, [], 0

    version = "1"

    def request(self, requests: Any) -> None:
        self._waiting += requests
        self._looks = 0

    def receive(self) -> list[turnwise.Feedback]:
        self._looks += 1
        if self._looks < 3:
            return []
        ready, self._waiting = self._waiting, []
        stamp = lambda r: turnwise.Stamp(request=r.id)  # noqa: E731
        if self._outage:
            return [
                turnwise.Feedback.failed(r.target, "closed", id=f"o-{r.id}", stamp=stamp(r))
                for r in ready
            ]
        return [
            turnwise.Feedback(
                r.target, score=float(r.episodes[0].slot), id=f"p-{r.id}", stamp=stamp(r)
            )
            for r in ready
        ]


def test_an_outage_of_a_slow_source_is_waited_out_after_resume(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    make = lambda outage: config(model_folder(), rl={"feedback": [Office(outage)], "updates": 2})  # noqa: E731
    with pytest.raises(turnwise.TooManyFailures, match="closed"):
        turnwise.Run(make(True), folder=tmp_path / "r").finish()
    done = turnwise.Run(make(False), folder=tmp_path / "r", resume=True).finish()
    members = done.ledger.members(done.id)
    assert len(members) == 12
    assert all(m.outcome is not None for m in members), "the update waited for the second answers"
    again = turnwise.Run(make(False), folder=tmp_path / "r", resume=True)
    assert list(again) == []


class NeverAnswers(turnwise.FeedbackSource):
    kind, version = "group", "1"

    def __init__(self, run_box: list[turnwise.Run]) -> None:
        self._box = run_box

    def request(self, requests: Any) -> None: ...

    def receive(self) -> list[Any]:
        self._box[0].stopping = True  # Ctrl-C while waiting
        return []


def test_an_evaluation_that_is_interrupted_is_not_finished(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    box: list[turnwise.Run] = []
    stage = {
        "env": "test/Echo-v0",
        "episodes": 3,
        "max_new_tokens": 4,
        "poll": 0.0,
        "judge": NeverAnswers(box),
    }
    players = ["policy", {"name": "other", "policy": str(model_folder())}]
    going = turnwise.Run(
        {"policy": str(model_folder()), "stages": [{"evaluate": {**stage, "players": players}}]},
        folder=tmp_path / "r",
    )
    box.append(going)
    going.finish()
    assert going.metrics == []
    assert not (tmp_path / "r" / "evaluation.json").exists()


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
    config = {
        "policy": str(model_folder()),
        "threads": 1,
        "checkpoint_every": 1,
        "stages": [{"counts": {}}, {"sums": {}}],
    }
    for update in turnwise.Run(config, folder=tmp_path / "r", plugins=plugins):
        if update.number == stop:
            break
    again = turnwise.Run(config, folder=tmp_path / "r", plugins=plugins, resume=True).finish()
    lines = [
        json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [m["update"] for m in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert [m.get("count", m.get("total")) for m in lines] == [1, 2, 3, 0, 1, 3, 6]
    assert again.policy.version == 3
