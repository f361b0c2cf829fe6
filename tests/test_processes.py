"""Several processes that train together: their gradients, runs and checkpoints are those of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import turnwise
import yaml
from safetensors.torch import load_file
from turnwise.engine.errors import ConfigError
from turnwise.engine.pipeline.processes import check_launch

WORKER = Path(__file__).parent / "support" / "process_worker.py"
PLAY = {"groups": 3, "group_size": 3, "max_new_tokens": 8}
HEARD = [{"judge": "length", "min_words": 6}]
DESK = "turnwise/SupportDesk-v0"
MOVES = {"lr": 0.01, "warmup": 0}


def pipeline(policy: Any, **more: Any) -> dict[str, Any]:
    """Every way to train: demonstrations, a critic, comparisons, a KL term; in steps that move."""
    rl = {"env": DESK, "updates": 2, **PLAY, "feedback": HEARD}
    stages: list[Any] = [
        {"sft": {"env": DESK, "episodes": 12, "batch_size": 6, "epochs": 1, **MOVES}},
        {"rl": {**rl, "optimizer": {"name": "ppo", "kl": 0.05, "micro_tokens": 200, **MOVES}}},
        {"rank": {"env": DESK, "updates": 1, "groups": 3, "group_size": 3, "max_new_tokens": 8,
                  "feedback": ["simulated-panel"]}},
        {"reward-model": {"held_out": 0, "micro_tokens": 200, "batch_size": 3, **MOVES}},
        {"preference": {"optimizer": {"name": "dpo", "micro_tokens": 200, **MOVES}}},
        {"rl": {**rl, "optimizer": {"name": "grpo", "kl": 0.05, "micro_tokens": 200, **MOVES}}},
    ]  # fmt: skip
    return {"policy": policy, "threads": 1, "stages": stages, **more}


def launched(processes: int, *command: str, **more: str) -> str:
    """Runs a command in so many processes, by torchrun where they are several; returns what it
    printed."""
    start = [
        "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
    ]  # fmt: skip
    whole = [sys.executable]
    if processes > 1:
        whole += ["-m", *start]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run([*whole, *command], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def made(processes: int, configs: list[Any], folder: Path) -> list[dict[str, Any]]:
    """What the worker saved of some pipelines."""
    folder.mkdir()
    (folder / "asked.json").write_text(json.dumps(configs))
    launched(processes, str(WORKER), str(folder / "asked.json"), str(folder))
    found: list[dict[str, Any]] = torch.load(folder / "made.pt", weights_only=True)
    assert [each["processes"] for each in found] == [processes] * len(configs)
    return found


@pytest.mark.parametrize(
    ("processes", "ways"),
    [
        (2, [1, 2]),
        pytest.param(2, [0, 3], marks=pytest.mark.slow),
        pytest.param(3, [0, 1, 2, 3], marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_one_process(
    processes: int, ways: list[int], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Of sft, ppo with its critic, a reward model, dpo and grpo with a KL term, all weights (0, 2)
    and adapters (1, 3), each process with all of them (DDP; 0, 1) and with its share (FSDP2)."""
    adapters = {"model": str(model_folder()), "lora": {"r": 4, "target_modules": "all-linear"}}
    plain = [pipeline(str(model_folder())), pipeline(adapters)]
    configs = [*plain, *({**each, "shard": True} for each in plain)]
    several = made(processes, [configs[way] for way in ways], tmp_path / "several")
    one = made(1, plain, tmp_path / "one")
    assert [each["divided"] for each in several] == [way >= 2 for way in ways]
    for i, found in zip(ways, several, strict=True):
        wanted = one[i % 2]
        assert found["updates"] == wanted["updates"] == 8
        assert len(found["gradients"]) == len(wanted["gradients"]) >= 10
        for ours, theirs in zip(found["gradients"], wanted["gradients"], strict=True):
            size = max(float(g.norm()) for g in theirs)
            assert size > 0
            for a, b in zip(ours, theirs, strict=True):
                assert float((a - b).norm()) <= 1e-5 * max(float(b.norm()), 1e-2 * size)
        if i % 2 == 0:
            began = turnwise.Policy.from_pretrained(model_folder(), device="cpu")
            pairs = zip(wanted["weights"], began.network.parameters(), strict=True)
            assert max(float((a - b.detach()).abs().max()) for a, b in pairs) > 1e-3
        for a, b in zip(found["weights"], wanted["weights"], strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def run_of(processes: int, config: dict[str, Any], folder: Path, *more: str) -> Path:
    """Runs a pipeline by the command line; returns the run's folder."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))

    said = launched(processes, "-m", "turnwise", "run", str(path), "--folder", str(folder), *more)
    assert "Finished after update" in said
    last = max(folder.glob("checkpoints/*/state.json"))
    assert json.loads(last.read_text())["position"]["machine"]["processes"] == processes
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The policy that a run ended with."""
    return load_file(folder / "policy" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "shard"), [(2, True), (3, False), (3, True)])
def test_a_run_of_several_processes_is_the_run_of_one(
    processes: int, shard: bool, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = pipeline(str(model_folder()))
    for stage in config["stages"]:
        for options in stage.values():
            for own in (options, options.get("optimizer", {})):
                if "lr" in own:  # AdamW's steps have the size of the rate
                    own["lr"] = 1e-4
    one = run_of(1, config, tmp_path / "one")
    several = run_of(processes, {**config, "shard": shard}, tmp_path / "several")
    counts = [turnwise.Ledger(f / "ledger.sqlite").counts() for f in (one, several)]
    assert counts[0] == counts[1]
    assert counts[0]["members"] > 20
    for name, value in weights(one).items():
        assert torch.allclose(value, weights(several)[name], atol=2e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_of_two_processes_is_gone_on_with_by_any_number(
    lora: bool, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """By two to the last bit, by one and by three up to rounding; its moments are in shares."""
    policy: Any = str(model_folder())
    if lora:
        policy = {"model": policy, "lora": {"r": 4, "target_modules": "all-linear"}}
    optimizer = {"name": "ppo", "kl": 0.05, "lr": 1e-4, "critic": "separate", "warmup": 0}

    def config(updates: int) -> dict[str, Any]:
        rl = {"env": DESK, "updates": updates, **PLAY, "feedback": HEARD, "optimizer": optimizer}
        return {"policy": policy, "threads": 1, "shard": True, "stages": [{"rl": rl}]}

    name = "adapter_model.safetensors" if lora else "model.safetensors"
    straight = load_file(run_of(2, config(4), tmp_path / "straight") / "policy" / name)
    half = run_of(2, config(2), tmp_path / "half")
    shares = half / "checkpoints" / "update-000002" / "optimizer"
    assert len(list(shares.glob("*.distcp"))) == 2
    for processes in (2, 1, 3):
        folder = tmp_path / f"on-{processes}"
        shutil.copytree(half, folder)
        run_of(processes, config(4), folder, "--resume")
        found = load_file(folder / "policy" / name)
        for key, value in straight.items():
            if processes == 2:
                assert torch.equal(found[key], value), key
            else:
                assert torch.allclose(found[key], value, atol=2e-5), key


def test_a_launcher_that_starts_one_process_alone_is_found_out(tmp_path: Path) -> None:
    """The real one, which says nothing of it."""
    accelerate = str(Path(sys.executable).parent / "accelerate")
    done = subprocess.run(
        [accelerate, "launch", "--cpu", "--num_processes", "2", "-m", "turnwise", "run",
         "examples/support_desk.yaml", "--dry-run"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 1
    assert "started this one alone" in done.stderr
    assert "torchrun --nproc_per_node 2 -m turnwise run" in done.stderr


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED"])
def test_ways_of_accelerate_that_are_not_taken_are_refused(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    with pytest.raises(ConfigError, match=f"use {way}.*`shard: true`"):
        check_launch()


def test_another_number_of_processes_than_was_started_is_refused(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, policy = (
        turnwise.Policy.from_pretrained(model_folder(), device="cpu") for _ in range(2)
    )
    assert before.accelerator.num_processes == 1  # and so it stays in this process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(turnwise.PolicyError, match=r"2 processes were started .* connects 1"):
        policy.accelerator  # noqa: B018


@pytest.mark.parametrize("name", ["one_machine", "two_machines"])
def test_the_files_for_accelerate_start_plain_processes(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = Path(__file__).parent.parent / "examples" / "accelerate" / f"{name}.yaml"
    found = load_config_from_file(str(path))
    assert str(found.distributed_type) == "DistributedType.MULTI_GPU"
    assert found.num_processes == {"one_machine": 2, "two_machines": 16}[name]
    assert not found.fsdp_config
