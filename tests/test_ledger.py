"""The ledger's rules, also under many writers and a killed one."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import turnwise
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.databases import new_database
from support.echo import ECHO
from support.episodes import conversation
from turnwise.engine.ledger.rows import Member
from turnwise.engine.ledger.tables import FEEDBACK
from turnwise.testing import Clock


def episode(name: str, update: int = 1, slot: int = 0, seed: int = 1) -> turnwise.Episode:
    """Builds what is hardest to store: tokens, and text that databases refuse."""
    return conversation(
        "yo",
        heard="hi \x00 \ud800",
        id=name,
        env="t/E-v0",
        seed=seed,
        reward=1.0,
        prompt_ids=(1,),
        action_ids=(2,),
        logprobs=(-0.1,),
        update=update,
        slot=slot,
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger_clock(clock: Clock) -> Clock:
    """Lets `ledger` go by the clock that tests set."""
    return clock


@pytest.fixture
def ledger_url(database: str) -> str:
    """Lets `ledger` lie on either database."""
    return database


def said(target: str, score: float, id_: str, **more: object) -> turnwise.Feedback:
    return turnwise.Feedback(target, score=score, id=id_, **more)  # type: ignore[arg-type]


def test_a_recorded_episode_wins_over_its_replay(ledger: turnwise.Ledger) -> None:
    first = episode("a")
    other = dataclasses.replace(first, reason="replayed differently")
    assert ledger.add_episodes([first]) == [first]
    assert ledger.add_episodes([other]) == [first]
    assert ledger.episodes(["a", "nope"]) == {"a": first}
    assert ledger.run_episodes("run") == [first]


def test_the_same_feedback_again_is_a_no_op_and_another_content_an_error(
    ledger: turnwise.Ledger,
) -> None:
    ledger.add_episodes([episode("a")])
    assert len(ledger.add_feedback([said("a", 0.5, "f1")])) == 1
    assert ledger.add_feedback([said("a", 0.5, "f1", stamp=turnwise.Stamp(time=5.0))]) == []
    with pytest.raises(turnwise.LedgerError, match="other content"):
        ledger.add_feedback([said("a", 0.6, "f1")])
    with pytest.raises(turnwise.LedgerError, match="does not know"):
        ledger.add_feedback([said("zzz", 0.6, "f2")])
    with pytest.raises(turnwise.LedgerError, match="no id"):
        ledger.add_feedback([turnwise.Feedback("a", score=1.0)])
    assert [f.score for f in ledger.feedback([episode("a").group])] == [0.5]


def test_all_or_none_of_a_delivery_is_recorded(ledger: turnwise.Ledger) -> None:
    ledger.add_episodes([episode("a")])
    with pytest.raises(turnwise.LedgerError):
        ledger.add_feedback([said("a", 0.1, "f1"), said("nobody", 0.2, "f2")])
    assert ledger.counts()["feedback"] == 0


def test_a_correction_supersedes_until_the_episode_has_trained(ledger: turnwise.Ledger) -> None:
    group = episode("a").group
    ledger.add_episodes([episode("a")])
    ledger.add_feedback([said("a", 0.5, "f1")])
    ledger.add_feedback([said("a", 0.9, "f2", supersedes="f1")])
    assert [f.score for f in ledger.feedback([group])] == [0.9]
    with pytest.raises(turnwise.LedgerError, match="superseded by 'f2' already"):
        ledger.add_feedback([said("a", 0.7, "f3", supersedes="f1")])
    with pytest.raises(turnwise.LedgerError, match="no feedback on the same target"):
        ledger.add_feedback([said("a", 0.7, "f3", supersedes="f0")])
    ledger.add_members("run", 1, [Member("a", group, True, outcome=0.9, feedback=("f2",))])
    with pytest.raises(turnwise.LedgerError, match="has trained"):
        ledger.add_feedback([said("a", 0.7, "f4", supersedes="f2")])
    ledger.add_feedback([said("a", 0.1, "late")])
    assert [f.id for f in ledger.feedback([group])] == ["f2"], (
        "what arrives late is kept and never trains"
    )
    assert ledger.counts()["feedback"] == 3


def test_requests_close_by_answer_or_by_deadline(ledger: turnwise.Ledger, clock: Clock) -> None:
    episodes = [episode("a", slot=0), episode("b", slot=1)]
    group = episodes[0].group
    ledger.add_episodes(episodes)
    requests = [
        turnwise.Request("episode", e.id, "people", deadline=clock.now + 60, episodes=(e,))
        for e in episodes
    ]
    ledger.add_requests(requests)
    # Asking again changes nothing.
    ledger.add_requests([dataclasses.replace(requests[0], deadline=None)])
    assert {r["target"] for r in ledger.open_requests([group])} == {"a", "b"}
    assert ledger.ready_groups([group]) == []
    answer = said("a", 1.0, "f1", stamp=turnwise.Stamp(request=requests[0].id, source="people"))
    ledger.add_feedback([answer])
    assert [r["target"] for r in ledger.open_requests([group])] == ["b"]
    clock.now += 61
    assert ledger.open_requests([group]) == []
    assert ledger.ready_groups([group]) == [group]
    ledger.add_members("run", 1, [Member(e.id, group, True) for e in episodes])
    assert ledger.ready_groups([group]) == [], "a group trains once"


def test_groups_wait_only_for_what_is_required(ledger: turnwise.Ledger) -> None:
    e = episode("a")
    ledger.add_episodes([e])
    ledger.add_requests([turnwise.Request("episode", "a", "audit", required=False, episodes=(e,))])
    assert ledger.ready_groups([e.group]) == [e.group]
    assert len(ledger.open_requests()) == 1


def test_different_questions_about_one_target_are_different_requests() -> None:
    e = episode("a")
    one = turnwise.Request("episode", "a", "people", episodes=(e,))
    assert one.id == turnwise.Request("episode", "a", "people", deadline=5.0, episodes=(e,)).id
    for other in ({"rater_slot": 1}, {"ask": {"aspects": ["kind"]}}, {"source": "x"}):
        assert one.id != dataclasses.replace(one, **other).id  # type: ignore[arg-type]


def test_comparisons_come_back_whole(ledger: turnwise.Ledger) -> None:
    episodes = [episode("a", slot=0), episode("b", slot=1)]
    ledger.add_episodes(episodes)
    comparison = turnwise.Comparison(
        episodes[0].group,
        [["b"], ["a"]],
        probability=0.8,
        id="c1",
        stamp=turnwise.Stamp(source="people", rater="r", cost=2.0),
    )
    ledger.add_feedback([comparison])
    [back] = ledger.feedback([episodes[0].group])
    assert back == comparison
    assert (back.stamp.rater, back.stamp.cost) == ("r", 2.0)
    assert ledger.spend() == {"people": 2.0}


def test_an_episode_trains_once(ledger: turnwise.Ledger) -> None:
    e = episode("a")
    ledger.add_episodes([e])
    member = Member("a", e.group, True, outcome=1.0, feedback=("x",))
    ledger.add_members("run", 1, [member])
    ledger.add_members("run", 1, [member])  # writing it again after a crash
    assert ledger.members("run", 1) == [member]
    with pytest.raises(turnwise.LedgerError, match="trained in update 1"):
        ledger.add_members("run", 2, [member])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans()), max_size=20))
def test_any_order_of_deliveries_ends_the_same(deliveries: list[tuple[int, int, bool]]) -> None:
    """Whatever repeats and conflicts arrive, the first content under an id stays, and nothing is
    counted twice."""
    ledger = turnwise.Ledger("sqlite://")
    ledger.add_episodes([episode("a")])
    expected: dict[str, float] = {}
    for number, score, fresh in deliveries:
        id_ = f"f{number}"
        value = float(score) if fresh or id_ not in expected else expected[id_]
        try:
            ledger.add_feedback([said("a", value, id_)])
        except turnwise.LedgerError:
            assert expected[id_] != value
        else:
            assert expected.setdefault(id_, value) == value
    assert {f.id: f.score for f in ledger.feedback([episode("a").group])} == expected


WRITER = """
import sys, turnwise
ledger = turnwise.Ledger(sys.argv[1])
who = sys.argv[2]
for i in range(int(sys.argv[3])):
    ledger.add_feedback([turnwise.Feedback("a", score=float(i), id=f"{who}-{i}"), \
turnwise.Feedback("a", score=1.0, id=f"shared-{i}")])
    print(f"{who}-{i}", flush=True)
"""


def test_many_writers_lose_nothing(ledger: turnwise.Ledger, database: str) -> None:
    ledger.add_episodes([episode("a")])
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, database, f"w{i}", "40"], stdout=subprocess.DEVNULL
        )
        for i in range(4)
    ]
    assert [w.wait() for w in writers] == [0] * 4
    ids = [f.id for f in ledger.feedback([episode("a").group])]
    assert len(ids) == len(set(ids)) == 4 * 40 + 40


def test_a_killed_writer_loses_nothing_it_acknowledged(
    ledger: turnwise.Ledger, database: str, tmp_path: Path
) -> None:
    ledger.add_episodes([episode("a")])
    acknowledged = tmp_path / "acknowledged"
    with acknowledged.open("w") as out:
        command = [sys.executable, "-c", WRITER, database, "w", "100000"]
        writer = subprocess.Popen(command, stdout=out)
        while acknowledged.stat().st_size < 500:
            time.sleep(0.02)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    told = acknowledged.read_text().split("\n")[:-1]
    found = {f.id for f in turnwise.Ledger(database).feedback([episode("a").group])}
    assert set(told) <= found
    assert len(told) > 30


def test_a_locked_ledger_says_so(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    turnwise.Ledger(path).close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(turnwise.LedgerError, match="locked by another process"):
        turnwise.Ledger(path, lock_timeout=0.2)
    other.rollback()
    turnwise.Ledger(path, lock_timeout=0.2)


def test_words_that_databases_cannot_hold_are_kept(ledger: turnwise.Ledger) -> None:
    odd = "a\0b \ud800 \u202e"
    e = dataclasses.replace(episode("a"), ending="failed", reason=odd)
    ledger.add_episodes([e])
    ledger.add_feedback(
        [said("a", 1.0, "f", comment=odd, stamp=turnwise.Stamp(source="s", rater=odd, stratum=odd))]
    )
    ledger.add_members("run", 1, [Member("a", e.group, False, odd)])
    assert ledger.episodes(["a"]) == {"a": e}
    with ledger.reading() as db:
        assert db.scalar(sa.select(FEEDBACK.c.rater)) == "a\ufffdb ? \u202e"


def test_a_url_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    with pytest.raises(turnwise.LedgerError, match="cannot be used") as said_:
        turnwise.Ledger("postgresql://ada:hushhush@127.0.0.1:9/none")
    assert "hushhush" not in str(said_.value)
    with pytest.raises(turnwise.LedgerError, match="SQLite or PostgreSQL"):
        turnwise.Ledger("mysql://localhost/x")


def test_a_newer_ledger_and_no_ledger_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    turnwise.Ledger(path).close()
    with sqlite3.connect(path) as other:
        other.execute("UPDATE info SET value = '99' WHERE key = 'schema'")
    with pytest.raises(turnwise.LedgerError, match="newer Turnwise"):
        turnwise.Ledger(path)
    (tmp_path / "text").write_text("no database, but long enough to be looked at " * 100)
    with pytest.raises(turnwise.LedgerError, match="cannot be"):
        turnwise.Ledger(tmp_path / "text")


def test_a_ledger_of_the_schema_before_is_brought_up_to_date(tmp_path: Path) -> None:
    """Schema 1 had no credit, 3 no id and fewer indexes: they are added, it is said once, and what
    was there stays."""
    path = tmp_path / "old.sqlite"
    old = turnwise.Ledger(path)
    old.close()
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE members DROP COLUMN credit")
        db.execute("DROP INDEX ix_requests_item")
        db.execute("ALTER TABLE requests DROP COLUMN item")
        db.execute("ALTER TABLE requests DROP COLUMN shown")
        db.execute("UPDATE info SET value = '1' WHERE key = 'schema'")
        db.execute("DELETE FROM info WHERE key = 'id'")
        for index in ("ix_episodes_place", "ix_members_place", "ix_feedback_newest"):
            db.execute(f"DROP INDEX {index}")
        db.execute("INSERT INTO members VALUES ('e', 'run', 1, 'g', 1, '', 0.5, '[]', 0.0)")
    ids = set()
    for again in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ledger = turnwise.Ledger(path)
        said = [str(w.message) for w in caught if w.category is UserWarning]
        assert len(said) == (not again)
        assert all(
            "older Turnwise (schema 1) and has been brought up to date" in one for one in said
        )
        ids.add(ledger.id)
        [member] = ledger.members("run")
        assert (member.episode, member.outcome, member.credit) == ("e", 0.5, ())
        ledger.close()
    assert len(ids) == 1, "its id is drawn once"
    with sqlite3.connect(path) as db:
        indexes = {
            name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'index'")
        }
    assert indexes >= {
        "ix_episodes_place",
        "ix_members_place",
        "ix_feedback_newest",
        "ix_requests_item",
    }


def test_feedback_is_found_by_every_filter_alone_and_with_others(ledger: turnwise.Ledger) -> None:
    """Every combination of filters, against the same filters on a list."""
    played = [
        dataclasses.replace(
            episode(f"e{i}", update=1 + i // 4, slot=i % 2, seed=i // 2),
            run="other" if i == 11 else "run", stage="rank" if i >= 8 else "rl",
        )
        for i in range(12)
    ]  # fmt: skip
    ledger.add_episodes(played)
    rows: list[dict[str, Any]] = []

    def give(target: str, about: list[turnwise.Episode], source: str, **more: Any) -> None:
        i = len(rows)
        stamp = turnwise.Stamp(source=source, time=1.0 + i // 3)
        kind = "comparison" if target == about[0].group and len(about) > 1 else "feedback"
        more = {"id": f"f{i:02}", "stamp": stamp, **more}
        if kind == "comparison":
            order = tuple((e.id,) for e in about)
            ledger.add_feedback([turnwise.Comparison(target, order, **more)])
        elif more.pop("failed", False):
            answer = turnwise.Feedback.failed(target, "no")
            ledger.add_feedback([dataclasses.replace(answer, **more)])
        else:
            ledger.add_feedback([turnwise.Feedback(target, score=0.5, **more)])
        [found] = ledger.feedback(ids=[f"f{i:02}"], late=True, corrected=True)
        rows.append(
            {"answer": found, "episode": about[0], "source": source, "kind": kind, "late": False,
             "corrected": False, "update": 9}
        )  # fmt: skip
        if more.get("supersedes"):
            rows[int(more["supersedes"][1:])]["corrected"] = True

    for e in played:
        give(e.id, [e], "judge")
        give(e.id, [e], "people", failed=e.slot == 1)
    for a, b in zip(played[::2], played[1::2], strict=True):
        if a.run == b.run:
            give(a.group, [a, b], "people")
    give("e0", [played[0]], "judge", supersedes="f00")
    used = {0: ("f24", "f01", "f29"), 2: ()}
    for first, ids in used.items():
        members = [
            Member(e.id, e.group, True, outcome=0.5, feedback=ids)
            for e in played[first : first + 2]
        ]
        ledger.add_members("run", 1 + first, members)
        for row in rows:
            if row["answer"].target in {played[first].group, *(m.episode for m in members)}:
                row["update"] = 1 + first
                if row["answer"].id not in ids and not row["corrected"]:
                    row["late"] = True
    groups = [played[0].group, played[8].group]
    choices: dict[str, list[Any]] = {
        "groups": [None, groups], "ids": [None, ["f00", "f01", "f05", "f24"]],
        "run": [None, "run"], "stages": [None, ["rank"]], "decided_by": [None, 1],
        "sources": [None, ["people"]], "kind": [None, "feedback", "comparison"],
        "status": [None, "scored", "failed"], "late": [False, True], "corrected": [False, True],
        "order": ["time", "target"],
    }  # fmt: skip
    sizes = set()
    for values in itertools.product(*choices.values()):
        which = dict(zip(choices, values, strict=True))
        alone = (which["stages"] or which["decided_by"]) and not which["run"]
        if alone or (which["stages"] and which["decided_by"]):
            with pytest.raises(ValueError, match="give"):
                ledger.feedback(**which)
            continue
        keep = [
            row["answer"]
            for row in rows
            if (not which["groups"] or row["episode"].group in groups)
            and (not which["ids"] or row["answer"].id in which["ids"])
            and (not which["run"] or row["episode"].run == "run")
            and (not which["stages"] or row["episode"].stage == "rank")
            and (not which["decided_by"] or row["update"] <= 1)
            and (not which["sources"] or row["source"] == "people")
            and which["kind"] in (None, row["kind"])
            and which["status"] in (None, row["answer"].status)
            and (which["late"] or not row["late"])
            and (which["corrected"] or not row["corrected"])
        ]
        if which["order"] == "target":
            keep.sort(key=lambda answer: (answer.target, answer.id))
        assert ledger.feedback(**which) == keep, which
        sizes.add(len(keep))
    assert len(sizes) > 10
    for n in range(8):  # times are equal by threes
        assert ledger.feedback(run="run", newest=n) == (
            ledger.feedback(run="run")[-n:] if n else []
        )
        assert ledger.feedback(groups, sources=["people"], newest=n) == (
            ledger.feedback(groups, sources=["people"])[-n:] if n else []
        )
    for wrong, why in (
        ({"sources": "people"}, "sources must be a list"),
        ({"groups": "g"}, "groups must be a list"),
        ({"kind": "comparisons"}, "kind must be one of feedback, comparison"),
        ({"status": "score"}, "status must be one of"),
        ({"order": "id"}, "order must be one of"),
    ):
        with pytest.raises(ValueError, match=why):
            ledger.feedback(**wrong)  # type: ignore[arg-type]


def test_a_look_at_one_update_costs_that_update(tmp_path: Path) -> None:
    """What a run asks in every update is found by an index, however much has been said before: no
    query goes through a whole table."""
    ledger = turnwise.Ledger(tmp_path / "l.sqlite")
    asked: list[tuple[str, Any]] = []

    @sa.event.listens_for(ledger._engine, "before_cursor_execute")
    def seen(
        conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        asked.append((statement, parameters))

    ledger.members("run", 7)
    ledger.members_by_update("run", [7, 8])
    ledger.run_episodes("run", stage="rl", update=7)
    ledger.feedback(run="run", decided_by=7, sources=["people"], newest=50)
    ledger.feedback(["g"], sources=["people"], status="scored", late=True)
    ledger.feedback(["g"])
    ledger.ready_groups(["g"])
    ledger.open_requests(["g"])
    ledger.decided(["g"])
    ledger.failed_requests(["r"])
    ledger.mark("run")
    queries = [(s, p) for s, p in asked if s.startswith("SELECT") and "count(*)" not in s]
    assert len(queries) >= 10
    with sqlite3.connect(tmp_path / "l.sqlite") as db:
        for statement, parameters in queries:
            plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            assert not [
                step for step in plan if re.match("SCAN (episodes|feedback|members|requests)", step)
            ], (statement, plan)
            assert not [step for step in plan if re.search(r"\(run=\?( AND update<\?)?\)", step)], (
                statement,
                plan,
                "all of a run's rows",
            )


def test_a_ledger_knows_itself_and_what_it_must_hold(database: str, tmp_path: Path) -> None:
    ledger = turnwise.Ledger(database)
    assert ledger.id == turnwise.Ledger(database, create=False).id
    assert ledger.id != turnwise.Ledger(tmp_path / "other.sqlite").id
    ledger.add_episodes([episode("a"), episode("b", slot=1)])
    mark = ledger.mark("run")
    assert mark == {"id": ledger.id, "episodes": 2, "members": 0, "feedback": 0}
    ledger.add_feedback([said("a", 1.0, "f")])
    ledger.expect("run", mark)
    ledger.expect("run", {})
    with pytest.raises(
        turnwise.LedgerError, match="holds less .*: 2 of 3 episodes, 1 of 4 feedback"
    ):
        ledger.expect("run", {**mark, "episodes": 3, "feedback": 4})
    with pytest.raises(
        turnwise.LedgerError,
        match="is not the one that this run wrote to: its id is .*, and should be abc",
    ):
        ledger.expect("run", {**mark, "id": "abc"})
    with pytest.raises(turnwise.LedgerError, match="holds less .*: 0 of 2 episodes"):
        ledger.expect("another run", mark)
    ledger.settle()
    ledger.close()


def test_looking_for_a_ledger_makes_none(postgres: str, tmp_path: Path) -> None:
    with pytest.raises(turnwise.LedgerError, match="is gone: there is no such file"):
        turnwise.Ledger(tmp_path / "none.sqlite", create=False)
    assert not (tmp_path / "none.sqlite").exists()
    empty = new_database(postgres, f"t{uuid.uuid4().hex}")
    for _ in range(2):
        with pytest.raises(turnwise.LedgerError, match="is empty: it holds no run"):
            turnwise.Ledger(empty, create=False)


@pytest.mark.parametrize("when", ["while it is asked", "as it commits", "while it reads"])
def test_a_connection_that_breaks_off_is_one_line_and_the_next_one_works(
    when: str, postgres: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """PostgreSQL is restarted, or its administrator ends connections: the driver says so in three
    ways."""
    url = new_database(postgres, f"t{uuid.uuid4().hex}")
    ledger, administrator = turnwise.Ledger(url), turnwise.Ledger(url)
    ledger.add_episodes([episode("a")])

    def cut() -> None:
        others = (
            "select pg_terminate_backend(pid) from pg_stat_activity where datname ="
            " current_database() and pid <> pg_backend_pid()"
        )
        with administrator.reading() as db:
            db.exec_driver_sql(others)

    def ask() -> None:
        with ledger.reading() if when == "while it reads" else ledger.writing() as db:
            cut()
            if when != "as it commits":
                db.scalar(sa.select(FEEDBACK.c.id))

    with pytest.raises(
        turnwise.LedgerError, match="cannot be used, it cannot be reached: .*a run goes on with"
    ) as told:
        ask()
    assert "{" not in str(told.value), "no dictionary of the driver's"
    assert "\n" not in str(told.value)
    assert ledger.episodes(["a"]).keys() == {"a"}, (
        "what was acknowledged stands, and the ledger can be used again"
    )
    ledger.close()
    administrator.close()
    assert capsys.readouterr().err == "", "no traceback of the pool's beside it"


@pytest.mark.parametrize("secret", ["Hunter2Secret", "Hunter2Secret%2Fx"])
def test_no_error_of_the_ledger_says_the_password(secret: str) -> None:
    for url in (f"postgresql://bob:{secret}@127.0.0.1:1/db", f"postgresql+nodriver://bob:{secret}@h/db", f"mysql://bob:{secret}@h/db",  # noqa: E501
                f"postgresql://bob:{secret}@h:port/db"):  # fmt: skip
        with pytest.raises(turnwise.LedgerError) as told:
            turnwise.Ledger(url)
        assert "Hunter2Secret" not in str(told.value)


def test_a_password_that_libpq_finds_stands_in_no_config(
    postgres: str, model_folder: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The URL without it is kept whole, so that the run's folder opens by itself."""
    address = sa.make_url(new_database(postgres, f"t{uuid.uuid4().hex}"))
    with sa.create_engine(address.set(drivername="postgresql+psycopg")).begin() as db:
        db.exec_driver_sql("create role ada login password 'Hunter2Secret'")
        db.exec_driver_sql("grant all on schema public to ada")
    url = address.set(username="ada").render_as_string()
    with pytest.raises(turnwise.LedgerError, match=r"cannot be used: .*no password supplied"):
        turnwise.Ledger(url)
    monkeypatch.setenv("PGPASSWORD", "Hunter2Secret")
    stage = {"env": ECHO, "updates": 1, "groups": 2, "group_size": 2, "max_new_tokens": 5}
    config = {"policy": str(model_folder()), "ledger": url, "stages": [{"rl": stage}]}
    turnwise.Run(config, folder=tmp_path / "r").finish()
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["ledger"] == url
    assert len(turnwise.PastRun(tmp_path / "r").episodes("rl")) == 4
    kept = [p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()]
    assert not any(b"Hunter2Secret" in one for one in kept)
