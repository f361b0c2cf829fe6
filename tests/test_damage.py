"""A run's folder as it really comes back: cut, emptied, swapped, restored from yesterday. Going on
is exact, or is refused in one clear message that says what is missing; it never begins anew in
silence, and never trains on other weights. The same for the report."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import select
import shutil
import socket
import socketserver
import sqlite3
import struct
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
import turnwise
import yaml
from support.databases import new_database, server
from support.episodes import conversation
from turnwise.engine.pipeline.folder import open_ledger
from turnwise.engine.report.page import write_report
from turnwise.engine.util import files

LEDGERS = ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm")
EVALUATE = {"env": "test/Echo-v0", "episodes": 2, "max_new_tokens": 3}
RL = {"env": "test/Echo-v0", "updates": 3, "groups": 2, "group_size": 2, "max_new_tokens": 3,
    "optimizer": {"name": "grpo", "lr": 0.01},
      "feedback": ["environment", {"judge": "length", "max_words": 3}]}  # fmt: skip
OURS = (
    turnwise.ConfigError,
    turnwise.LedgerError,
    turnwise.engine.errors.CheckpointError,
    turnwise.PolicyError,
)


def config(model: Path, **more: Any) -> dict[str, Any]:
    stages = [{"evaluate": EVALUATE}, {"rl": RL}]
    return {
        "policy": str(model),
        "threads": 1,
        "checkpoint_every": 1,
        "keep_checkpoints": 2,
        "name": "r",
        "stages": stages,
        **more,
    }


def flat(run: turnwise.Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


@pytest.fixture(scope="module")
def made(
    model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, torch.Tensor]:
    """Folders that runs were made in: one left before its last update, as a killed process leaves
    it; an older copy; another run's. And the weights in which the undisturbed run ends."""
    root = tmp_path_factory.mktemp("runs")
    going = turnwise.Run(config(model_folder()), folder=root / "going")
    for update in going:
        if update.number == 2:
            copy(root / "going", root / "older")
        if update.number == 3:
            # At this moment: the journal is there, nobody has tidied up.
            copy(root / "going", root / "r")
            break
    assert (root / "r" / "ledger.sqlite-wal").exists()
    turnwise.Run(config(model_folder(), seed=9), folder=root / "another").finish()
    return (
        root / "r",
        root,
        flat(turnwise.Run(config(model_folder()), folder=root / "whole").finish()),
    )


def copy(folder: Path, target: Path) -> None:
    shutil.copytree(folder, target)
    for name in ("run.pid", "run.lock"):
        (target / name).unlink(missing_ok=True)


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("update-*"))[-1]


def edit_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = newest(folder) / "state.json"
    note = json.loads(path.read_text())
    change(note)
    path.write_text(json.dumps(note))


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(path: Path) -> None:
    """One bit of a byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def take_ledger(folder: Path, other: str, names: tuple[str, ...] = LEDGERS) -> None:
    for name in LEDGERS:
        (folder / name).unlink(missing_ok=True)
    for name in names:
        if (folder.parent / other / name).exists():
            shutil.copy(folder.parent / other / name, folder / name)


def sql(folder: Path, *statements: str) -> None:
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        for statement in statements:
            db.execute(statement)
    db.close()


def lines(folder: Path, change: Callable[[list[str]], list[str]]) -> None:
    path = folder / "metrics.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def linked(path: Path) -> None:
    """What was there lies elsewhere now, with a symbolic link in its place."""
    if not path.exists():
        path.mkdir()
    elsewhere = path.parent.parent / f"{path.parent.name}-elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def zip_bomb(folder: Path) -> None:
    import zlib

    with sqlite3.connect(folder / "ledger.sqlite") as db:
        squeezed = zlib.compressobj(9)
        data = b"".join(squeezed.compress(bytes(1 << 24)) for _ in range(17)) + squeezed.flush()
        db.execute("update episodes set content = ?", (data,))
    db.close()


EXACT = ""  # it goes on, to the very weights of the run that was never disturbed
TORN = "is torn.* Using the one before it"
# what is done to the folder; what resume says (EXACT, or a message); what it warns of on the way
DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    # The ledger.
    "ledger gone": (
        lambda f: take_ledger(f, "nowhere"),
        "is gone .ledger.sqlite..*put it back",
        "",
    ),
    "ledger of 0 bytes": (
        lambda f: [take_ledger(f, "nowhere"), (f / LEDGERS[0]).touch()],
        "is empty: it holds no run",
        "",
    ),
    "ledger without its journal": (
        lambda f: [(f / n).unlink(missing_ok=True) for n in LEDGERS[1:]],
        EXACT,
        "",
    ),
    "journal cut": (lambda f: cut(f / LEDGERS[1]), EXACT, ""),
    "journal of 0 bytes": (lambda f: (f / LEDGERS[1]).write_bytes(b""), EXACT, ""),
    "journal is noise": (lambda f: (f / LEDGERS[1]).write_bytes(os.urandom(5000)), EXACT, ""),
    "ledger of another run": (
        lambda f: take_ledger(f, "another"),
        "is not the one that this run wrote to",
        "",
    ),
    "an older copy of the ledger": (
        lambda f: take_ledger(f, "older"),
        r"holds less .*\d+ of \d+ episodes, \d+ of \d+ members.*older copy",
        "",
    ),
    "an older copy without journal": (
        lambda f: take_ledger(f, "older", LEDGERS[:1]),
        "holds less .* of .* episodes",
        "",
    ),
    "a new ledger in its place": (
        lambda f: [take_ledger(f, "nowhere"), turnwise.Ledger(f / LEDGERS[0]).close()],
        "is not the one",
        "",
    ),
    "episodes deleted": (
        lambda f: sql(f, "delete from episodes where rowid % 2"),
        r"holds less .*: \d+ of \d+ episodes",
        "",
    ),
    "members deleted": (
        lambda f: sql(f, "delete from members"),
        r"holds less .*: 0 of \d+ members",
        "",
    ),
    "answers deleted": (
        lambda f: sql(f, "delete from feedback"),
        r"holds less .*: 0 of \d+ feedback",
        "",
    ),
    "ledger is no database": (
        lambda f: [take_ledger(f, "nowhere"), (f / LEDGERS[0]).write_text("no " * 999)],
        "cannot be used",
        "",
    ),
    "ledger cut": (
        lambda f: [(f / n).unlink() for n in LEDGERS[1:]] and cut(f / LEDGERS[0]),
        "malformed|cannot be used",
        "",
    ),
    "ledger of another program": (
        lambda f: [take_ledger(f, "nowhere"), sql(f, "create table info (key text, value text)")],
        "is no ledger",
        "",
    ),
    "a table of the ledger gone": (
        lambda f: sql(f, "drop table members"),
        "cannot be used: no such table: members",
        "",
    ),
    "ledger of a newer version": (
        lambda f: sql(f, "update info set value = '99' where key = 'schema'"),
        "newer Turnwise",
        "",
    ),
    "ledger is a folder": (
        lambda f: [take_ledger(f, "nowhere"), (f / LEDGERS[0]).mkdir()],
        "no such file",
        "",
    ),
    # Checkpoints.
    "newest state.json cut": (lambda f: cut(newest(f) / "state.json"), EXACT, TORN),
    "newest state.json empty": (lambda f: (newest(f) / "state.json").write_text(""), EXACT, TORN),
    "newest state.json gone": (
        lambda f: (newest(f) / "state.json").unlink(),
        EXACT,
        "torn or missing.* Using the one before it",
    ),
    "state.json is a list": (lambda f: (newest(f) / "state.json").write_text("[1]"), EXACT, TORN),
    "state.json is noise": (
        lambda f: (newest(f) / "state.json").write_bytes(os.urandom(300)),
        EXACT,
        TORN,
    ),
    "no files named": (lambda f: edit_state(f, lambda n: n.update(files={})), EXACT, TORN),
    "no files named nor there": (
        lambda f: [
            edit_state(f, lambda n: n.update(files={}, states={})),
            remove(newest(f) / "policy"),
            (newest(f) / "optimizer.safetensors").unlink(),
        ],
        EXACT,
        TORN,
    ),
    "a part's state not named": (
        lambda f: edit_state(f, lambda n: n["files"].pop("optimizer.safetensors")),
        EXACT,
        TORN,
    ),
    "states gone": (lambda f: edit_state(f, lambda n: n.pop("states")), EXACT, TORN),
    "position of words": (
        lambda f: edit_state(f, lambda n: n["position"].update(update="three")),
        EXACT,
        TORN,
    ),
    "position of nothing": (
        lambda f: edit_state(f, lambda n: n.update(position=None)),
        EXACT,
        TORN,
    ),
    "weights with one bit changed": (
        lambda f: flip(newest(f) / "policy" / "model.safetensors"),
        EXACT,
        TORN,
    ),
    "weights gone": (lambda f: (newest(f) / "policy" / "model.safetensors").unlink(), EXACT, TORN),
    "optimizer's state cut": (lambda f: cut(newest(f) / "optimizer.safetensors"), EXACT, TORN),
    "newest checkpoint empty": (
        lambda f: [remove(newest(f)), (f / "checkpoints" / "update-000003").mkdir()],
        EXACT,
        TORN,
    ),
    "newest checkpoint a file": (
        lambda f: [remove(newest(f)), (f / "checkpoints" / "update-000003").touch()],
        EXACT,
        TORN,
    ),
    "a state.json that nests without end": (
        lambda f: (newest(f) / "state.json").write_text("[" * 100_000),
        EXACT,
        TORN,
    ),
    "the stage's first checkpoint gone": (
        lambda f: remove(f / "checkpoints" / "update-000001"),
        "update-000001 is torn or missing.*The stage that is gone on with began",
        "",
    ),
    "the stage's first checkpoint torn": (
        lambda f: flip(f / "checkpoints" / "update-000001" / "policy" / "model.safetensors"),
        "update-000001 is torn.*began from it",
        "",
    ),
    "a stray folder among them": (lambda f: (f / "checkpoints" / "update-old").mkdir(), EXACT, ""),
    "all checkpoints gone": (
        lambda f: remove(f / "checkpoints"),
        "its checkpoints are gone: put them back",
        "",
    ),
    "all checkpoints removed": (
        lambda f: [remove(c) for c in (f / "checkpoints").iterdir()],
        "its checkpoints are gone",
        "",
    ),
    "all checkpoints torn": (
        lambda f: [(c / "state.json").write_text("{") for c in (f / "checkpoints").iterdir()],
        "no checkpoint in .* can be used: .*torn",
        "",
    ),
    "checkpoints are a file": (
        lambda f: [remove(f / "checkpoints"), (f / "checkpoints").touch()],
        "is a file, and a run puts a folder",
        "",
    ),
    "checkpoints on another disk": (lambda f: linked(f / "checkpoints"), EXACT, ""),
    # Metrics.
    "last line of metrics cut": (lambda f: lines(f, lambda m: [*m, m[-1][:30]]), EXACT, ""),
    "a line of metrics cut": (
        lambda f: lines(f, lambda m: [m[0][:30] + "\n", *m[1:]]),
        "metrics.jsonl, line 1 is damaged",
        "",
    ),
    "a line of metrics gone": (
        lambda f: lines(f, lambda m: m[1:]),
        "should hold the updates 1 to 3",
        "",
    ),
    "lines of metrics swapped": (
        lambda f: lines(f, lambda m: m[::-1]),
        "should hold the updates 1 to 3",
        "",
    ),
    "metrics gone": (lambda f: (f / "metrics.jsonl").unlink(), "holds no run with metrics", ""),
    "metrics are noise": (
        lambda f: (f / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\n" * 5),
        "line 1 is damaged",
        "",
    ),
    "metrics of numbers": (
        lambda f: (f / "metrics.jsonl").write_text("1\n2\n3\n4\n"),
        "line 1 is damaged",
        "",
    ),
    "metrics are a folder": (
        lambda f: [(f / "metrics.jsonl").unlink(), (f / "metrics.jsonl").mkdir()],
        "is a folder, and a run puts a file",
        "",
    ),
    "metrics are a link": (lambda f: linked(f / "metrics.jsonl"), "is a symbolic link", ""),
    # The rest.
    "config.yaml empty": (
        lambda f: (f / "config.yaml").write_text(""),
        EXACT,
        "config.yaml is damaged.* It is written again",
    ),
    "config.yaml gone": (
        lambda f: (f / "config.yaml").unlink(),
        EXACT,
        "config.yaml cannot be read .* It is written again",
    ),
    "config.yaml cut": (
        lambda f: (f / "config.yaml").write_text("policy: {model: 'x"),
        EXACT,
        "is damaged.* It is written again",
    ),
    "config.yaml is noise": (
        lambda f: (f / "config.yaml").write_bytes(b"\xff\x00"),
        EXACT,
        "is damaged.* It is written again",
    ),
    "config.yaml of another run": (
        lambda f: shutil.copy(f.parent / "another" / "config.yaml", f),
        "was started with seed=9",
        "",
    ),
    "policy is a link": (
        lambda f: linked(f / "policy"),
        "policy is a symbolic link, and a run puts a folder of its own",
        "",
    ),
    "policy is a file": (
        lambda f: (f / "policy").touch(),
        "policy is a file, and a run puts a folder of its own",
        "",
    ),
    "evaluation.json cut": (lambda f: cut(f / "evaluation.json"), EXACT, ""),
    "a stale lock and pid": (
        lambda f: [(f / "run.pid").write_bytes(b"\xff"), (f / "run.lock").touch()],
        EXACT,
        "",
    ),
    "drafts of a killed process": (
        lambda f: [
            (f / ".config.yaml.draft").write_text("x"),
            (f / "checkpoints" / ".draft" / "policy").mkdir(parents=True),
            (f / ".policy").mkdir(),
            (f / ".policy.old").mkdir(),
        ],
        EXACT,
        "",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder(
    what: str, made: tuple[Path, Path, torch.Tensor], model_folder: Callable[..., Path]
) -> None:
    source, root, whole = made
    folder = root / re.sub(r"\W+", "-", what)
    copy(source, folder)
    before = sorted(p.name for p in (folder / "checkpoints").iterdir())
    damage, message, warned = DAMAGE[what]
    damage(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = turnwise.Run(config(model_folder()), folder=folder, resume=True)
        if message != EXACT:
            with pytest.raises(OURS, match=message) as said:
                again.finish()
            assert "Traceback" not in str(said.value)
            assert len(str(said.value)) < 1000
        else:
            again.finish()
    if message == EXACT:
        assert torch.equal(flat(again), whole), "bit for bit"
        assert [m["update"] for m in again.metrics] == [1, 2, 3, 4]
        assert again.ledger.mark(again.id)["episodes"] == 2 + 3 * 4
        assert yaml.safe_load((folder / "config.yaml").read_text())["name"] == "r"
    elif "checkpoint" not in what:
        assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == before, (
            "nothing was spoiled"
        )
    if warned:
        assert any(re.search(warned, str(w.message)) for w in caught), [
            str(w.message) for w in caught
        ]
    assert not (folder / "run.pid").exists()


# What is done; what the report says (EXACT: it is made); its warnings.
READING: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "nothing": (lambda f: None, EXACT, ""),
    "last line of metrics cut": (
        lambda f: lines(f, lambda m: [*m, m[-1][:30]]),
        EXACT,
        "line 4, the last, is cut short and left out",
    ),
    "a line of metrics cut": (
        lambda f: lines(f, lambda m: [m[0][:30] + "\n", *m[1:]]),
        "metrics.jsonl, line 1 is damaged",
        "",
    ),
    "metrics without updates": (
        lambda f: lines(f, lambda m: ["{}\n", *m]),
        "metrics.jsonl, line 1 is damaged",
        "",
    ),
    "metrics empty": (lambda f: (f / "metrics.jsonl").write_text(""), EXACT, ""),
    "newest state.json cut": (lambda f: cut(newest(f) / "state.json"), EXACT, ""),
    "all state.json cut": (
        lambda f: [cut(c / "state.json") for c in (f / "checkpoints").iterdir()],
        "none of its checkpoints can be read",
        "",
    ),
    "config.yaml empty": (
        lambda f: (f / "config.yaml").write_text(""),
        "config.yaml is damaged",
        "",
    ),
    "config.yaml cut": (
        lambda f: (f / "config.yaml").write_text("policy: {model: 'x"),
        "config.yaml is damaged",
        "",
    ),
    "config.yaml without stages": (
        lambda f: (f / "config.yaml").write_text("name: x"),
        "config.yaml is damaged",
        "",
    ),
    "config.yaml of odd stages": (
        lambda f: (f / "config.yaml").write_text("stages: [3, rl]"),
        "config.yaml is damaged",
        "",
    ),
    "evaluation.json cut": (
        lambda f: cut(f / "evaluation.json"),
        EXACT,
        "evaluation.json is damaged and left out",
    ),
    "evaluation.json empty": (
        lambda f: (f / "evaluation.json").write_text(""),
        EXACT,
        "evaluation.json is damaged and left out",
    ),
    "evaluation.json of numbers": (
        lambda f: (f / "evaluation.json").write_text('{"a": 1}'),
        EXACT,
        "damaged and left out",
    ),
    "evaluation.json without numbers": (
        lambda f: (f / "evaluation.json").write_text('{"policy": {}}'),
        EXACT,
        "damaged and left out",
    ),
    "evaluation.json nests without end": (
        lambda f: (f / "evaluation.json").write_text("[" * 10**5),
        EXACT,
        "damaged and left out",
    ),
    "config.yaml nests without end": (
        lambda f: (f / "config.yaml").write_text("[" * 10**4),
        "config.yaml is damaged",
        "",
    ),
    "an answer cut": (
        lambda f: sql(f, "update feedback set content = substr(content, 1, 20)"),
        "damaged: its answer",
        "",
    ),
    "ledger gone": (lambda f: take_ledger(f, "nowhere"), "is gone .ledger.sqlite.", ""),
    "ledger of 0 bytes": (
        lambda f: [take_ledger(f, "nowhere"), (f / LEDGERS[0]).touch()],
        "is empty: it holds no run",
        "",
    ),
    "ledger of another run": (
        lambda f: take_ledger(f, "another"),
        "is not the one that this run wrote to",
        "",
    ),
    "an older ledger": (lambda f: take_ledger(f, "older"), "holds less", ""),
    "an episode cut": (
        lambda f: sql(f, "update episodes set content = substr(content, 1, 50)"),
        "damaged: its episode .* cut short",
        "",
    ),
    "an episode of noise": (
        lambda f: sql(f, "update episodes set content = x'00'"),
        "damaged: its episode",
        "",
    ),
    "an episode that unpacks to gigabytes": (
        zip_bomb,
        "damaged: its episode .* unpacks to more than",
        "",
    ),
}


@pytest.mark.parametrize("what", READING)
def test_the_report_of_a_damaged_folder(
    what: str, made: tuple[Path, Path, torch.Tensor], plugins: turnwise.Plugins
) -> None:
    source, root, _ = made
    folder = root / re.sub(r"\W+", "-", f"report {what}")
    copy(source, folder)
    damage, message, warned = READING[what]
    damage(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if message != EXACT:
            with pytest.raises(OURS, match=message):
                write_report(folder, plugins=plugins)
        else:
            assert "<html" in write_report(folder, plugins=plugins).read_text()
    if warned:
        assert any(re.search(warned, str(w.message)) for w in caught), [
            str(w.message) for w in caught
        ]


def test_a_ledger_is_not_made_by_looking_for_it(made: tuple[Path, Path, torch.Tensor]) -> None:
    source, root, _ = made
    folder = root / "looked-for"
    copy(source, folder)
    shown = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(
        yaml.safe_dump({**shown, "ledger": f"sqlite:///{root}/not/there.sqlite"})
    )
    with pytest.raises(turnwise.ConfigError, match="is gone: there is no such file"):
        open_ledger(folder)
    assert not (root / "not").exists()


def test_a_copy_of_the_file_alone_holds_everything_up_to_the_last_update(
    made: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    source, _, _ = made
    shutil.copy(source / "ledger.sqlite", tmp_path / "alone.sqlite")
    alone, whole = (
        turnwise.Ledger(tmp_path / "alone.sqlite"),
        turnwise.Ledger(source / "ledger.sqlite"),
    )
    assert alone.id == whole.id
    assert alone.counts() == whole.counts()
    assert alone.counts()["members"] == 8


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The operating system lets no file of this process grow beyond a size, as a full disk would
    not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_when_the_journal_is_brought_in_is_named(tmp_path: Path) -> None:
    """What was acknowledged stands in the journal, and is brought in when there is room."""
    with contextlib.closing(turnwise.Ledger(tmp_path / "ledger.sqlite")) as ledger:
        with ledger.writing() as db:
            db.exec_driver_sql("create table more (word text)")
            db.exec_driver_sql("insert into more values (?)", ("x" * 1_000_000,))
        with (
            no_file_beyond(1),
            pytest.raises(turnwise.LedgerError, match="cannot be used: disk I/O error"),
        ):
            ledger.settle()
        ledger.settle()
        with ledger.reading() as db:
            assert db.exec_driver_sql("select length(word) from more").scalar() == 1_000_000


@pytest.mark.parametrize("size", [0, 1, 600, 5_000, 40_000, 70_000, 110_000, 200_000])
def test_a_disk_that_is_full_from_the_start_or_gets_full(
    size: int, made: tuple[Path, Path, torch.Tensor], model_folder: Callable[..., Path]
) -> None:
    _, root, whole = made
    folder = root / f"full-{size}"
    run = turnwise.Run(config(model_folder()), folder=folder)
    with (
        no_file_beyond(size),
        pytest.raises(OURS, match="cannot be (made or )?(written|used)") as said,
    ):
        run.finish()
    assert str(folder) in str(said.value)
    assert torch.equal(
        flat(turnwise.Run(config(model_folder()), folder=folder, resume=True).finish()), whole
    )


@pytest.mark.parametrize("committed", [False, True])
def test_a_run_goes_on_where_connections_break_off_in_transactions(
    committed: bool,
    postgres: str,
    made: tuple[Path, Path, torch.Tensor],
    model_folder: Callable[..., Path],
) -> None:
    """They end as a transaction commits, before it has or when it has and nobody was told, in every
    third one; and between updates."""
    _, root, whole = made
    url = new_database(postgres, f"t{uuid.uuid4().hex}")
    administrator = turnwise.Ledger(url)

    def restart() -> None:
        others = (
            "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        )
        with administrator.reading() as db:
            db.exec_driver_sql(f"select pg_terminate_backend(pid) {others}")
        gone = False
        while not gone:
            with administrator.reading() as db:  # it sees what was so when it began
                gone = not db.scalar(sa.text(f"select count(*) {others}"))

    run = turnwise.Run(config(model_folder(), ledger=url), folder=root / f"restarted-{committed}")
    commits = 0

    def commit(db: sa.Connection) -> None:
        nonlocal commits
        if db.get_execution_options().get("writing"):
            commits += 1
            if commits % 3 == 0:
                if committed:
                    db.connection.driver_connection.commit()  # type: ignore[union-attr]
                restart()

    sa.event.listen(run.ledger._engine, "commit", commit)
    for _ in run:
        restart()
    run.ledger.close()
    assert commits > 12
    assert torch.equal(flat(run), whole)
    assert [m["update"] for m in run.metrics] == [1, 2, 3, 4]
    assert administrator.counts(run.id)["episodes"] == 2 + 3 * 4
    administrator.close()


def test_a_server_that_is_restarted_is_waited_for(
    postgres: str, made: tuple[Path, Path, torch.Tensor], model_folder: Callable[..., Path]
) -> None:
    """It is down for a while between transactions: the run waits and goes on, and says so."""
    _, root, whole = made
    with server() as database:
        url = new_database(database.url, "waits")
        run = turnwise.Run(config(model_folder(), ledger=url), folder=root / "waits")
        waited: list[str] = []

        class StartsAgain(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                waited.append(record.getMessage())
                database.start()

        noted = logging.getLogger("turnwise.engine.ledger.database")
        noted.addHandler(handler := StartsAgain())
        for update in run:
            if update.number in (1, 3):
                database.stop()
        noted.removeHandler(handler)
        assert all("cannot be reached: waiting up to 60 s for it" in one for one in waited)
        assert len(waited) == 2
        assert torch.equal(flat(run), whole)
        assert [m["update"] for m in run.metrics] == [1, 2, 3, 4]
        run.ledger.close()
        for place, why in (
            ("ada@127.0.0.1:9/none", "cannot be used, it cannot be reached"),
            (f"turnwise@127.0.0.1:{database.port}/none", 'cannot be used: .*"none" does not exist'),
        ):
            with pytest.raises(turnwise.LedgerError, match=why):
                turnwise.Ledger(f"postgresql://{place}")  # at once


def test_threads_wait_together_for_a_server_that_is_restarted(postgres: str) -> None:
    """Who queues behind the one that waits is not told that it holds the lock for too long."""
    with server() as database:
        ledger = turnwise.Ledger(new_database(database.url, "waits"), lock_timeout=3)
        database.stop()
        writers = [
            threading.Thread(target=ledger.add_episodes, args=([conversation(id=name)],))
            for name in "abc"
        ]
        for writer in writers:
            writer.start()
        time.sleep(4)  # more than one waits for another's lock
        assert all(writer.is_alive() for writer in writers)
        database.start()
        for writer in writers:
            writer.join()
        assert ledger.episodes(["a", "b", "c"]).keys() == {"a", "b", "c"}
        ledger.close()


@pytest.mark.parametrize("when", ["at once", "as it answers"])
def test_a_connection_that_was_reset_between_transactions_is_replaced(
    postgres: str, when: str
) -> None:
    """A database that dies, or a router between, resets the connection: with the next statement or
    while its answer is read."""
    url = sa.make_url(new_database(postgres, f"t{uuid.uuid4().hex}"))
    routers: list[Router] = []

    class Router(socketserver.BaseRequestHandler):
        doomed = False

        def handle(self) -> None:
            routers.append(self)
            with socket.create_connection((url.host, url.port)) as server:
                ways = {self.request: server, server: self.request}
                while True:
                    for one in select.select(list(ways), [], [])[0]:
                        data = one.recv(65536)
                        if not data or self.doomed:
                            return self.reset()
                        ways[one].sendall(data)

        def reset(self) -> None:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Router) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ledger = turnwise.Ledger(
            url.set(port=server.server_address[1]).render_as_string(hide_password=False)
        )
        with ledger.reading() as db:
            assert db.scalar(sa.text("select 1")) == 1
        for router in routers:
            router.doomed = True
            if when == "at once":
                router.reset()
        before = len(routers)
        with ledger.writing() as db:
            assert db.scalar(sa.text("select 2")) == 2
        assert len(routers) == before + 1
        ledger.close()
        server.shutdown()


class Killed(BaseException):
    """Stands for the end of the process."""


def steps(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch, stop: int | None) -> int:
    """Does something, and ends it before the file system is touched for the how-manieth time;
    returns how often it was."""
    seen = 0
    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "fsync", "open", "rmdir", "unlink"):
            original = getattr(os, name)

            def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen - 1 == stop:
                    raise Killed
                return original(*args, **kwargs)

            patch.setattr(os, name, counted)
        with contextlib.suppress(Killed):
            act()
    return seen


def test_whoever_looks_sees_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    seen = set()
    for stop in (*range(20), None):
        path.write_text("old")
        steps(lambda: files.write(path, "new"), monkeypatch, stop)
        seen.add(path.read_text())
    assert seen == {"old", "new"}
    files.write(path, b"\x00")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json"], "and no draft is left"


def test_a_folder_is_put_in_place_whole_or_kept_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    for stop in (*range(60), None):
        root = tmp_path / f"{stop}"
        for name, text in (("target", "old"), ("draft", "new")):
            (root / name / "in").mkdir(parents=True)
            (root / name / "in" / "weights").write_text(text)
            (root / name / "config").write_text(text)
        count = max(
            count,
            steps(lambda root=root: files.move(root / "draft", root / "target"), monkeypatch, stop),
        )
        whole = {
            name: {p.read_text() for p in (root / name).rglob("*") if p.is_file()}
            for name in ("target", "draft", ".target.old")
        }
        if (root / "target").exists():
            assert whole["target"] in ({"old"}, {"new"})
        else:
            assert (whole["draft"], whole[".target.old"]) == ({"new"}, {"old"})
    assert 10 < count < 60
    assert not (tmp_path / "None" / ".target.old").exists()
