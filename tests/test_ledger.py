"""The ledger's rules, also under many writers and a killed one."""

from __future__ import annotations

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import turnwise
from hypothesis import given, settings
from hypothesis import strategies as st
from turnwise.engine.ledger import FEEDBACK, Member


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def episode(name: str, update: int = 1, slot: int = 0, seed: int = 1) -> turnwise.Episode:
    turn = turnwise.Turn(turnwise.Message("user", "hi \x00 \ud800"), "yo", 1.0, (1,), (2,), (-0.1,))
    return turnwise.Episode(
        name, turnwise.Start("t/E-v0", seed), (turn,), "terminated", run="run", stage="rl", update=update, slot=slot
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(database: str, clock: Clock) -> Iterator[turnwise.Ledger]:
    ledger = turnwise.Ledger(database, clock=clock)
    yield ledger
    ledger.close()


def said(target: str, score: float, id_: str, **more: object) -> turnwise.Feedback:
    return turnwise.Feedback(target, score=score, id=id_, **more)  # type: ignore[arg-type]


def test_a_recorded_episode_wins_over_its_replay(ledger: turnwise.Ledger) -> None:
    first = episode("a")
    other = dataclasses.replace(first, reason="replayed differently")
    assert ledger.add_episodes([first]) == [first]
    assert ledger.add_episodes([other]) == [first]
    assert ledger.episodes(["a", "nope"]) == {"a": first}
    assert ledger.run_episodes("run") == [first]


def test_the_same_feedback_again_is_a_no_op_and_another_content_an_error(ledger: turnwise.Ledger) -> None:
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
    assert [f.id for f in ledger.feedback([group])] == ["f2"], "what arrives late is kept and never trains"
    assert ledger.counts()["feedback"] == 3


def test_requests_close_by_answer_or_by_deadline(ledger: turnwise.Ledger, clock: Clock) -> None:
    episodes = [episode("a", slot=0), episode("b", slot=1)]
    group = episodes[0].group
    ledger.add_episodes(episodes)
    requests = [turnwise.Request("episode", e.id, "people", deadline=clock.now + 60, episodes=(e,)) for e in episodes]
    ledger.add_requests(requests)
    ledger.add_requests([dataclasses.replace(requests[0], deadline=None)])  # asking again changes nothing
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
        episodes[0].group, [["b"], ["a"]], probability=0.8, id="c1", stamp=turnwise.Stamp(source="people", rater="r", cost=2.0)
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
    """Whatever repeats and conflicts arrive, the first content under an id stays, and nothing is counted twice."""
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
    ledger.add_feedback([turnwise.Feedback("a", score=float(i), id=f"{who}-{i}"), turnwise.Feedback("a", score=1.0, id=f"shared-{i}")])
    print(f"{who}-{i}", flush=True)
"""


def test_many_writers_lose_nothing(ledger: turnwise.Ledger, database: str) -> None:
    ledger.add_episodes([episode("a")])
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, database, f"w{i}", "40"], stdout=subprocess.DEVNULL) for i in range(4)
    ]
    assert [w.wait() for w in writers] == [0] * 4
    ids = [f.id for f in ledger.feedback([episode("a").group])]
    assert len(ids) == len(set(ids)) == 4 * 40 + 40


def test_a_killed_writer_loses_nothing_it_acknowledged(ledger: turnwise.Ledger, database: str, tmp_path: Path) -> None:
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
    ledger.add_feedback([said("a", 1.0, "f", comment=odd, stamp=turnwise.Stamp(source="s", rater=odd, stratum=odd))])
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
    """Schema 1 had no credit: the column is added, and what was there stays."""
    path = tmp_path / "old.sqlite"
    old = turnwise.Ledger(path)
    old.close()
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE members DROP COLUMN credit")
        db.execute("DROP INDEX ix_requests_item")
        db.execute("ALTER TABLE requests DROP COLUMN item")
        db.execute("ALTER TABLE requests DROP COLUMN shown")
        db.execute("UPDATE info SET value = '1' WHERE key = 'schema'")
        db.execute("INSERT INTO members VALUES ('e', 'run', 1, 'g', 1, '', 0.5, '[]', 0.0)")
    for _ in range(2):
        ledger = turnwise.Ledger(path)
        [member] = ledger.members("run")
        assert (member.episode, member.outcome, member.credit) == ("e", 0.5, ())
        ledger.close()
