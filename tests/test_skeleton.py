"""The walking skeleton: a real third-party package, installed by pip, sends everything it has
through the contracts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import Command

PACKAGE = Path(__file__).parent / "packages" / "acme"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "acme"
    subprocess.run(["cp", "-r", str(PACKAGE), str(source)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    done = subprocess.run(
        [*command, "--target", str(target), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


def call(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", **environment}
    return Command(*arguments, env=env).wait()


def pipeline(folder: Path, model: Path, *stages: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(
        f"policy: {model}\nthreads: 1\ncheckpoint_every: 2\nstages:\n"
        + "".join(f"  - {s}\n" for s in stages)
    )
    return path


def test_everything_a_package_can_bring(
    site: Path, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rl = (
        "rl: {env: acme/Manners-v0, updates: 2, groups: 3, group_size: 4, max_new_tokens: 8,"
        " poll: 0, "
    )
    config = pipeline(
        tmp_path,
        model_folder(),
        rl + "feedback: [acme-polite, {judge: acme-people, raters: 2}], combiner: acme-best-of,"
        " credit: acme-learned, optimizer: acme-actor-critic, backend: {name: acme-backend,"
        " rows: 5}}",
        rl + "feedback: [{judge: acme-polite, letter: e, weight: 0.5}, environment], credit: gae,"
        " optimizer: acme-actor-critic}",
        rl + "feedback: [acme-ranker], credit: acme-learned, optimizer: grpo}",
        "acme-offline: {env: acme/Manners-v0, feedback: [acme-ranker]}",
    )
    log = tmp_path / "events.jsonl"
    done = call(site, "run", str(config), "--folder", str(tmp_path / "run"), ACME_LOG=str(log))
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [m["stage"] for m in metrics] == [
        "rl",
        "rl",
        "rl-2",
        "rl-2",
        "rl-3",
        "rl-3",
        "acme-offline",
        "acme-offline",
    ]
    assert [m["update"] for m in metrics] == list(range(1, 9))
    assert metrics[-1]["margin"] > metrics[-2]["margin"], "the offline DPO learns its comparisons"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    kinds = [e["event"] for e in events]
    assert kinds.count("update_finished") == 8
    assert kinds[-1] == "run_finished"
    assert {s for e in events for s in e.get("sources", ())} == {
        "acme-polite",
        "acme-people",
        "acme-ranker",
    }

    # What the ledger holds of it.
    import turnwise

    ledger = turnwise.Ledger(tmp_path / "run" / "ledger.sqlite")
    episodes = ledger.run_episodes(metrics_run := ledger_run(tmp_path / "run"))
    first = [e for e in episodes if e.update == 1]
    assert len(first) == 12
    said = ledger.feedback([e.group for e in first])
    people = [f for f in said if f.stamp.source == "acme-people"]
    assert len(people) == 24, "two raters for each of twelve episodes, none lost, none double"
    assert {f.stamp.rater for f in people} == {"rater-0", "rater-1"}
    assert {f.stamp.version for f in people} == {"people-1"}
    assert any(f.status == "abstained" for f in people)
    assert not ledger.open_requests()
    members = ledger.members(metrics_run)
    assert len(members) == 6 * 12
    assert all(set(m.feedback) for m in members if m.used)

    # The learned state of the last rl stage's credit method is in that stage's checkpoint.
    state = json.loads(
        (tmp_path / "run" / "checkpoints" / "update-000006" / "state.json").read_text()
    )
    assert state["states"]["credit"]["fitted"] == 2


def ledger_run(folder: Path) -> str:
    return str(
        json.loads(next((folder / "checkpoints").glob("*/state.json")).read_text())["position"][
            "run"
        ]
    )


def test_plugins_lists_what_it_registered(site: Path) -> None:
    done = call(site, "plugins", "--json")
    assert done.returncode == 0, done.stderr
    [acme] = [p for p in json.loads(done.stdout) if p["name"] == "acme"]
    assert acme["version"] == "1.2.3"
    assert acme["failed"] == ""
    assert acme["registered"]["optimizer"] == ["acme-actor-critic", "acme-dpo"]
    assert acme["registered"]["environment"] == ["acme/Manners-v0"]
    assert "run_finished" in acme["hooks"]
    assert "hello from acme" in call(site, "acme").stdout


def test_turnwise_plugins_chooses(site: Path) -> None:
    listed = lambda **env: {  # noqa: E731
        p["name"] for p in json.loads(call(site, "plugins", "--json", **env).stdout)
    }
    assert "acme" in listed()
    assert "acme" in listed(TURNWISE_PLUGINS="acme")
    assert "acme" not in listed(TURNWISE_PLUGINS="")
    assert "optimizers" in listed(TURNWISE_PLUGINS=""), "Turnwise's own parts always load"
    wrong = call(site, "plugins", TURNWISE_PLUGINS="acne")
    assert wrong.returncode == 1
    assert "Did you mean 'acme'?" in wrong.stderr


def test_a_wrong_pairing_is_refused_before_the_run(
    site: Path, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = pipeline(tmp_path, model_folder(), "rl: {env: acme/Manners-v0, optimizer: acme-dpo}")
    done = call(site, "run", str(config), "--folder", str(tmp_path / "run"))
    assert done.returncode == 1
    assert "trains on comparisons" in done.stderr
    assert "'grpo'" in done.stderr
    assert not (tmp_path / "run").exists()
