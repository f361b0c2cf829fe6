"""The desk's rules: slots, leases, corrections, gold; on both databases."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import turnwise
from hypothesis import given, settings
from hypothesis import strategies as st
from support.episodes import conversation
from support.rating import RUN, fill, groups, heard, next_task, person, study
from turnwise.engine.errors import PreferenceError
from turnwise.engine.ledger.rows import Member
from turnwise.plugins.human import lead, raters, tasks
from turnwise.plugins.human.agreement import judged
from turnwise.plugins.human.answers import RatedAnswer
from turnwise.plugins.human.desk import Desk
from turnwise.plugins.human.errors import DeskError, NotYours
from turnwise.plugins.human.tables import EVENTS, ITEMS, LEASES, RATERS, SESSIONS, metadata
from turnwise.running import keep
from turnwise.testing import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock(1_000_000.0)


@pytest.fixture
def ledger_clock(clock: Clock) -> Clock:
    """Lets `ledger` go by the clock that tests set."""
    return clock


@pytest.fixture
def ledger_url(database: str) -> str:
    """Lets `ledger` lie on either database."""
    return database


@pytest.fixture
def fast(tmp_path: Path, clock: Clock) -> Iterator[turnwise.Ledger]:
    """Where the database makes no difference."""
    ledger = turnwise.Ledger(tmp_path / "ledger.sqlite", clock=clock)
    yield ledger
    ledger.close()


PLAIN = {"gold_share": 0.0, "random_share": 0.0, "undo": 0.0}


def rate(desk: Desk, rater: str, rng: random.Random | None = None) -> str | None:
    task = next_task(desk, rater)
    return (
        None if task is None else desk.answer(task.id, rater, fill(task, rng or random.Random(0)))
    )


def test_every_slot_is_filled_once_and_nobody_sees_an_item_twice(ledger: turnwise.Ledger) -> None:
    sources = study(ledger, {"task": "rank", "raters": 2, **PLAIN})
    desk, people = Desk(ledger), [person(ledger, name) for name in ("Ada", "Bo", "Cy")]
    done = Counter(p for _ in range(4) for p in people if rate(desk, p) == "new")
    assert sum(done.values()) == 6, "three groups, two raters each"
    assert all(next_task(desk, p) is None for p in people)
    said = heard(ledger, sources)
    assert Counter(a.target for a in said) == dict.fromkeys(groups(), 2)
    assert all(len({a.stamp.rater for a in said if a.target == g}) == 2 for g in groups())
    assert heard(ledger, sources) == [], "delivered once"
    assert ledger.open_requests() == []
    assert all(sorted(a.shown["order"]) == sorted(e.id for e in groups()[a.target]) for a in said)


def test_the_order_of_display_is_drawn_for_everybody(fast: turnwise.Ledger) -> None:
    study(fast, {"task": "rank", "raters": 30, **PLAIN}, played=groups(1))
    desk = Desk(fast)
    orders = {tuple(e.id for e in next_task(desk, person(fast, f"r{i}")).shown) for i in range(20)}
    assert len(orders) > 8


def test_a_lease_blocks_a_slot_until_it_ends(ledger: turnwise.Ledger, clock: Clock) -> None:
    study(ledger, {"task": "rank", "raters": 1, "lease": 60, **PLAIN}, played=groups(1))
    desk, ada, bo, cy = Desk(ledger), *(person(ledger, n) for n in ("Ada", "Bo", "Cy"))
    mine = next_task(desk, ada)
    assert mine is not None
    assert next_task(desk, ada) == mine, "a reload shows the same task, in the same order"
    assert next_task(desk, bo) is None
    clock.now += 61
    taken = next_task(desk, bo)
    assert taken is not None, "whoever closes the laptop blocks nobody"
    assert desk.answer(mine.id, ada, fill(mine, random.Random(0))) == "extra", (
        "what she says late is kept"
    )
    assert desk.answer(taken.id, bo, fill(taken, random.Random(0))) == "new"
    assert next_task(desk, cy) is None
    with ledger.reading() as db:
        assert dict(
            db.execute(sa.select(LEASES.c.rater, LEASES.c.request.is_not(None))).tuples().all()
        ) == {
            ada: False,
            bo: True,
        }


def test_who_comes_back_before_anybody_else_keeps_the_slot_and_the_draft(
    fast: turnwise.Ledger, clock: Clock
) -> None:
    study(fast, {"task": "rank", "raters": 1, "lease": 60, **PLAIN}, played=groups(1))
    desk, ada = Desk(fast), person(fast, "Ada")
    mine = next_task(desk, ada)
    assert mine is not None
    desk.draft(mine.id, ada, {"rank-0": "2", "comment": "hm", "csrf": "secret"})
    clock.now += 500
    again = next_task(desk, ada)
    assert again is not None
    assert again.draft == {"rank-0": "2", "comment": "hm"}
    assert desk.answer(mine.id, ada, fill(mine, random.Random(0))) == "new"


def test_sent_twice_is_one_answer_and_sent_otherwise_is_a_correction(
    ledger: turnwise.Ledger, clock: Clock
) -> None:
    sources = study(
        ledger, {"task": "compare", "raters": 1, **PLAIN, "undo": 30.0}, played=groups(1, 2)
    )
    desk, ada = Desk(ledger), person(ledger, "Ada")
    task = next_task(desk, ada)
    assert task is not None
    assert desk.answer(task.id, ada, {"preference": "-2"}) == "new"
    clock.now += 10
    assert desk.answer(task.id, ada, {"preference": "-2"}) == "again"
    assert heard(ledger, sources) == [], "it can still be taken back"
    clock.now += 30
    [first] = heard(ledger, sources)
    assert first.strength == 2.0
    assert desk.answer(task.id, ada, {"preference": "1"}) == "corrected"
    clock.now += 31
    [second] = heard(ledger, sources)
    assert second.supersedes == first.id
    assert [a.id for a in ledger.feedback(list(groups(1, 2)))] == [second.id]
    ledger.add_members(
        RUN, 1, [Member(e.id, e.group, True, feedback=(second.id,)) for e in task.shown]
    )
    assert desk.answer(task.id, ada, {"preference": "3"}) == "corrected"
    clock.now += 31
    [third] = heard(ledger, sources)
    assert third.supersedes is None, (
        "what has trained is not corrected; the new opinion stands beside it"
    )
    assert [a.id for a in ledger.feedback(list(groups(1, 2)))] == [second.id]


def test_an_answer_can_be_taken_back_until_it_is_handed_over(
    fast: turnwise.Ledger, clock: Clock
) -> None:
    sources = study(fast, {"task": "compare", **PLAIN, "undo": 30.0}, played=groups(1, 2))
    desk, ada, bo = Desk(fast), person(fast, "Ada"), person(fast, "Bo")
    task = next_task(desk, ada)
    assert task is not None
    assert not desk.undo(task.id, ada), "there is nothing to take back"
    desk.answer(task.id, ada, {"preference": "3", "comment": "slip"})
    with pytest.raises(NotYours):
        desk.undo(task.id, bo)
    assert desk.undo(task.id, ada)
    back = desk.task(task.id, ada)
    assert (back.status, back.draft) == ("open", {"preference": "3", "comment": "slip"})
    clock.now += 100
    assert heard(fast, sources) == [], "what was taken back never arrives"
    assert desk.answer(task.id, ada, {"preference": "-3"}) == "corrected"
    clock.now += 31
    [said] = heard(fast, sources)
    assert said.supersedes is None
    assert said.ranking[0][0] == task.shown[0].id
    assert not desk.undo(task.id, ada), "it has been handed over, and can be corrected only"
    assert desk.task(task.id, ada).status == "answered"
    fast.add_members(RUN, 1, [Member(e.id, e.group, True, feedback=(said.id,)) for e in task.shown])
    with pytest.raises(DeskError, match="used already"):
        desk.undo(task.id, ada)


def test_a_correction_counts_once_however_collecting_is_killed(
    ledger: turnwise.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing an answer and marking it as delivered are one transaction."""
    study(ledger, {"task": "compare", **PLAIN}, played=groups(1, 2))
    desk, ada = Desk(ledger), person(ledger, "Ada")
    task = next_task(desk, ada)
    assert task is not None
    desk.answer(task.id, ada, {"preference": "3"})
    original = ledger.record

    def killed(db: Any, answers: Any) -> Any:
        original(db, answers)
        raise KeyboardInterrupt

    monkeypatch.setattr(ledger, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        desk.collect(RUN)
    monkeypatch.undo()
    desk.answer(task.id, ada, {"preference": "-1"})
    assert len(desk.collect(RUN)) == 1
    desk.answer(task.id, ada, {"preference": "-2"})
    assert len(desk.collect(RUN)) == 1
    assert desk.collect(RUN) == []
    [said] = ledger.feedback(list(groups(1, 2)))
    assert said.strength == 2.0  # type: ignore[union-attr]


def test_a_resumed_run_hears_corrections_and_a_stage_that_ends_collects_all(
    fast: turnwise.Ledger,
) -> None:
    spec = {"task": "compare", **PLAIN, "undo": 1000.0}
    study(fast, spec, played=groups(1, 2)).close()
    desk, ada = Desk(fast), person(fast, "Ada")
    task = next_task(desk, ada)
    assert task is not None
    desk.answer(task.id, ada, {"preference": "3"})
    sources = study(fast, spec, played=groups(1, 2))
    assert heard(fast, sources) == []
    sources.close()
    assert len(fast.feedback(list(groups(1, 2)))) == 1
    desk.answer(task.id, ada, {"preference": "-1"})
    sources = study(fast, spec, played=groups(1, 2))  # everything is answered: nobody is asked
    sources.close()
    assert [a.strength for a in fast.feedback(list(groups(1, 2)))] == [1.0]  # type: ignore[union-attr]


def test_a_task_stays_what_it_was_when_it_was_asked(fast: turnwise.Ledger) -> None:
    """A later stage may ask otherwise under the same name."""
    first = study(
        fast,
        {"name": "people", "task": "score", "aspects": ["kind"], "scale": 3, **PLAIN},
        played=groups(1, 1),
    )
    desk, ada = Desk(fast), person(fast, "Ada")
    old = next_task(desk, ada)
    assert old is not None
    later = {
        e.group: [e, f]
        for e, f in [
            (
                conversation("b", heard="a", id="x", seed=9),
                conversation("c", heard="a", id="y", seed=9, slot=1),
            )
        ]
    }
    study(fast, {"name": "people", "task": "rank", **PLAIN}, played=later)
    assert desk.task(old.id, ada).study["task"] == "score"
    assert desk.answer(old.id, ada, {"aspect-kind": "3"}) == "new"
    assert rate(desk, ada) == "new"
    assert {type(a) for a in heard(fast, first)} == {turnwise.Feedback, turnwise.Comparison}
    assert len(lead.export(fast, RUN)) == 2
    assert lead.overview(fast, RUN)["answers"] == 2


def test_an_item_that_everybody_passes_on_counts_as_one_nobody_can_judge(
    ledger: turnwise.Ledger,
) -> None:
    sources = study(ledger, {"task": "rank", "raters": 3, "skips": 2, **PLAIN}, played=groups(1))
    desk, people = Desk(ledger), [person(ledger, n) for n in ("Ada", "Bo", "Cy", "Di")]
    for p in people[:3]:
        task = next_task(desk, p)
        assert task is not None
        desk.skip(task.id, p, "not my language")
        assert next_task(desk, p) is None, "what was passed on does not come back"
    assert [(a.status, a.reason) for a in heard(ledger, sources)] == [
        ("abstained", "not my language")
    ] * 3
    assert next_task(desk, people[3]) is None
    assert ledger.open_requests() == [], "nobody waits for ever"


def test_who_may_not_work_changes_nothing(fast: turnwise.Ledger) -> None:
    study(fast, {"task": "compare", **PLAIN, "undo": 1000.0}, played=groups(3, 2))
    desk, ada = Desk(fast), person(fast, "Ada")
    assert rate(desk, ada) == "new"
    done, task = desk.answers(RUN)[0], next_task(desk, ada)
    assert task is not None
    with fast.reading() as db:
        [lease] = db.scalars(sa.select(LEASES.c.id).where(LEASES.c.status == "answered"))
    raters.set_state(fast, RUN, ada, "paused")
    for attempt in (
        lambda: desk.undo(lease, ada), lambda: desk.answer(lease, ada, {"preference": "3"}), lambda: desk.skip(task.id, ada, ""),  # noqa: E501
        lambda: desk.draft(task.id, ada, {}), lambda: desk.answer(task.id, ada, {"preference": "3"}), lambda: desk.next(RUN, ada),  # noqa: E501
    ):  # fmt: skip
        with pytest.raises(DeskError, match="paused"):
            attempt()
    assert desk.answers(RUN) == [done]


def test_what_comes_too_late_is_kept_and_said(fast: turnwise.Ledger, clock: Clock) -> None:
    study(fast, {"task": "compare", "deadline": 60.0, **PLAIN}, played=groups(1, 2))
    desk, ada = Desk(fast), person(fast, "Ada")
    task = next_task(desk, ada)
    assert task is not None
    clock.now += 61
    assert desk.next(RUN, ada) is None, "nobody waits for it any more"
    assert desk.answer(task.id, ada, {"preference": "1"}) == "late"
    assert len(desk.collect(RUN)) == 1


def test_raters_belong_to_one_run(ledger: turnwise.Ledger) -> None:
    study(ledger, {"task": "rank", **PLAIN})
    secret = raters.invite(ledger, RUN, "Ada", "lead")
    with pytest.raises(raters.NoEntry):
        raters.enter(ledger, "another", secret)
    cookie = raters.enter(ledger, RUN, secret)
    with pytest.raises(raters.NoEntry):
        raters.session(ledger, "another", cookie)
    raters.invite(ledger, "another", "Ada")
    assert [p.role for p in raters.everybody(ledger, RUN)] == ["lead"]
    assert [p.role for p in raters.everybody(ledger, "another")] == ["rater"]
    raters.invite(ledger, RUN, "Ada")
    assert raters.everybody(ledger, RUN)[0].role == "lead", "a new link changes no role"
    with pytest.raises(ValueError, match="only lead"):
        raters.invite(ledger, RUN, "Ada", "rater")


def test_cannot_judge_is_an_answer_without_a_score(fast: turnwise.Ledger) -> None:
    sources = study(fast, {"task": "score", **PLAIN}, played=groups(1, 1))
    desk, ada = Desk(fast), person(fast, "Ada")
    task = next_task(desk, ada)
    assert task is not None
    assert desk.answer(task.id, ada, {"verdict": "cannot", "reason": "cut off"}) == "new"
    [said] = heard(fast, sources)
    assert (said.status, said.reason, dict(said.aspects)) == ("abstained", "cut off", {})


def test_what_has_expired_or_trained_is_not_asked_any_more(
    fast: turnwise.Ledger, clock: Clock
) -> None:
    study(fast, {"task": "rank", "deadline": 60.0, **PLAIN}, played=groups(2))
    desk = Desk(fast)
    first, second = groups(2).values()
    fast.add_members(RUN, 1, [Member(e.id, e.group, True) for e in first])
    task = next_task(desk, person(fast, "Ada"))
    assert task is not None
    assert task.shown[0].group == second[0].group
    clock.now += 61
    assert next_task(desk, person(fast, "Bo")) is None


def test_what_nobody_waited_for_is_asked_after_its_group_has_trained(fast: turnwise.Ledger) -> None:
    """People who rank for a reward model's sake are slower than the policy that trains on it."""
    sources = study(fast, {"task": "rank", "required": False, **PLAIN}, played=groups(1))
    [members] = groups(1).values()
    fast.add_members(RUN, 1, [Member(e.id, e.group, True) for e in members])
    assert rate(Desk(fast), person(fast, "Ada")) == "new"
    assert (
        len(heard(fast, sources))
        == len(fast.feedback(run=RUN, kind="comparison", status="scored", late=True))
        == 1
    )
    assert fast.feedback([members[0].group]) == [], "it trained without it"


def test_others_tasks_are_out_of_reach(fast: turnwise.Ledger) -> None:
    study(fast, {"task": "rank", **PLAIN})
    desk, ada, bo = Desk(fast), person(fast, "Ada"), person(fast, "Bo")
    task = next_task(desk, ada)
    assert task is not None
    for attempt in (
        lambda: desk.task(task.id, bo), lambda: desk.answer(task.id, bo, {}), lambda: desk.draft(task.id, bo, {}),  # noqa: E501
        lambda: desk.skip(task.id, bo, ""), lambda: desk.answer("nothing", bo, {}),
    ):  # fmt: skip
        with pytest.raises(NotYours):
            attempt()


def test_what_voices_disagree_about_comes_first(fast: turnwise.Ledger) -> None:
    played = groups(5, 2)
    odd = list(played)[3]
    sources = study(fast, {"task": "rank", "raters": 9, **PLAIN}, played=played)
    for members in played.values():
        for e in members:
            split = 2.0 if members[0].group == odd else 0.0
            scores = [split * (1 - 2 * e.slot), -split * (1 - 2 * e.slot)]
            said = turnwise.Feedback(
                e.id,
                score=0.0,
                id=f"rm-{e.id}",
                details={"members": scores},
                stamp=turnwise.Stamp(source="rm"),
            )
            fast.add_feedback([said])
    heard(fast, sources)
    desk = Desk(fast)
    first = [next_task(desk, person(fast, f"r{i}")) for i in range(9)]
    assert {t.shown[0].group for t in first if t is not None} == {odd}
    with fast.reading() as db:
        worth = dict(db.execute(sa.select(ITEMS.c.group, ITEMS.c.value)).tuples().all())
    assert {g for g, value in worth.items() if value > 0} == {odd}


def test_the_random_share_has_nothing_to_do_with_worth(fast: turnwise.Ledger) -> None:
    """However far the raters get, what was chosen at random is a simple random sample, and valued
    items come from the others."""
    study(
        fast,
        {"task": "score", **PLAIN, "random_share": 0.4},
        played={
            e.group: [e]
            for g in range(200)
            for e in [conversation("b", heard="a", id=f"t{g:03}", seed=g)]
        },
    )
    with fast.writing() as db:  # what is worth more stands first in the run
        for n, id_ in enumerate(db.scalars(sa.select(ITEMS.c.id).order_by(ITEMS.c.target)).all()):
            db.execute(ITEMS.update().where(ITEMS.c.id == id_).values(value=1 - n / 200))
    desk, ada = Desk(fast, random.Random(3)), person(fast, "Ada")
    for _ in range(90):
        rate(desk, ada)
    query = sa.select(LEASES.c.chosen, ITEMS.c.value, ITEMS.c.luck).join(
        ITEMS, ITEMS.c.id == LEASES.c.item
    )
    with fast.reading() as db:
        rows = list(db.execute(query))
        pool = sorted(db.scalars(sa.select(ITEMS.c.luck).where(ITEMS.c.luck < 0.4)))
    lucky = [r for r in rows if r.chosen == "random"]
    assert 20 < len(lucky) < 55
    assert sorted(r.luck for r in lucky) == pool[: len(lucky)], "in the order of luck and no other"
    assert abs(sum(r.value for r in lucky) / len(lucky) - 0.5) < 3 * 0.29 / len(lucky) ** 0.5
    assert min(r.value for r in rows if r.chosen == "value") > 0.3
    assert all(r.luck >= 0.4 for r in rows if r.chosen == "value")


def test_little_covered_starts_come_first_and_what_is_begun_before_them(
    fast: turnwise.Ledger,
) -> None:
    played = {}
    for update in range(3):
        for seed in (1, 2):
            e = conversation("b", heard="a", id=f"t{update}-{seed}", seed=seed, update=update)
            played[e.group] = [e]
    study(fast, {"task": "score", "raters": 2, **PLAIN}, played=played)
    desk, ada, bo = Desk(fast), person(fast, "Ada"), person(fast, "Bo")
    first = next_task(desk, ada)
    assert first is not None
    desk.answer(first.id, ada, fill(first, random.Random(0)))
    second = next_task(desk, ada)
    assert second is not None
    assert second.shown[0].start != first.shown[0].start, "the other start has not been judged yet"
    begun = next_task(desk, bo)
    assert begun is not None
    assert begun.shown == first.shown, "what is begun is finished first"


def test_studies_take_turns_by_their_own_options(fast: turnwise.Ledger) -> None:
    study(
        fast,
        {"name": "a", "task": "score", **PLAIN, "random_share": 1.0},
        {"name": "b", "task": "score", **PLAIN},
        played={
            e.group: [e]
            for g in range(40)
            for e in [conversation("b", heard="a", id=f"t{g}", seed=g)]
        },
    )
    desk, ada = Desk(fast, random.Random(0)), person(fast, "Ada")
    for _ in range(40):
        rate(desk, ada)
    query = sa.select(ITEMS.c.source, LEASES.c.chosen).join(ITEMS, ITEMS.c.id == LEASES.c.item)
    with fast.reading() as db:
        how = Counter(db.execute(query).tuples().all())
    assert set(how) == {("a", "random"), ("b", "value")}
    assert min(how.values()) >= 8


def test_two_raters_never_take_one_slot_at_the_same_moment(ledger: turnwise.Ledger) -> None:
    study(ledger, {"task": "compare", "pairs": 1, "raters": 1, **PLAIN}, played=groups(12, 2))
    people = [person(ledger, f"r{i}") for i in range(8)]
    gate, results, lock = threading.Barrier(len(people)), Counter[str](), threading.Lock()

    def work(rater: str) -> None:
        desk = Desk(ledger)
        gate.wait()
        while (task := next_task(desk, rater)) is not None:
            result = desk.answer(task.id, rater, {"preference": "1"})
            with lock:
                results[result] += 1

    threads = [threading.Thread(target=work, args=(p,)) for p in people]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results == {"new": 12}
    with ledger.reading() as db:
        slots = list(db.scalars(sa.select(LEASES.c.request).where(LEASES.c.status == "answered")))
    assert len(slots) == len(set(slots)) == 12


# Raters.


def test_a_link_opens_once_and_secrets_are_not_kept(ledger: turnwise.Ledger, clock: Clock) -> None:
    keep(ledger, metadata)
    secret = raters.invite(ledger, RUN, "  Ada \n Lovelace \0 \ud800 ", "lead")
    cookie = raters.enter(ledger, RUN, secret)
    session = raters.session(ledger, RUN, cookie)
    assert (session.person.name, session.person.role) == ("Ada Lovelace \0 \ud800", "lead")
    with pytest.raises(raters.NoEntry, match="used or is too old"):
        raters.enter(ledger, RUN, secret)
    with ledger.reading() as db:
        kept = str([list(db.execute(sa.select(table))) for table in (RATERS, SESSIONS)])
    assert secret not in kept
    assert cookie not in kept
    old = raters.invite(ledger, RUN, "Bo")
    clock.now += raters.LINK + 1
    with pytest.raises(raters.NoEntry):
        raters.enter(ledger, RUN, old)
    # A new link ends what the old one opened.
    raters.invite(ledger, RUN, "Ada Lovelace \0 \ud800", "lead")
    with pytest.raises(raters.NoEntry):
        raters.session(ledger, RUN, cookie)
    for name, role in (("", "rater"), ("x", "king")):
        with pytest.raises(ValueError):
            raters.invite(ledger, RUN, name, role)


def gold_file(path: Path, count: int) -> str:
    rows = [
        {"prompt": [{"role": "user", "content": f"gold {i}"}],
            "chosen": [{"role": "assistant", "content": "right"}],
         "rejected": [{"role": "assistant", "content": "wrong"}]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def grade(task: object, well: bool) -> dict[str, str]:
    left_is_right = task.shown[0].turns[0].action == "right"  # type: ignore[attr-defined]
    return {"preference": "-2" if left_is_right == well else "2"}


def test_gold_gates_gives_a_second_chance_and_blocks(
    fast: turnwise.Ledger, tmp_path: Path, clock: Clock
) -> None:
    spec = {
        "task": "compare",
        **PLAIN,
        "gold": gold_file(tmp_path / "gold.jsonl", 20),
        "gold_share": 0.9,
    }
    sources = study(fast, spec, played=groups(40, 2))
    desk, ada, bo = Desk(fast, random.Random(1)), person(fast, "Ada"), person(fast, "Bo")

    def work(rater: str, well: bool, until: str) -> int:
        for n in range(60):
            clock.now += 20
            try:
                task = next_task(desk, rater)
            except DeskError:
                break
            assert task is not None
            desk.answer(
                task.id,
                rater,
                grade(task, well) if "gold" in str(task.shown[0].run) else {"preference": "1"},
            )
            if {p.id: p.state for p in raters.everybody(fast, RUN)}[rater] == until:
                return n
        raise AssertionError(f"never {until}")

    work(ada, False, "gated")
    with pytest.raises(DeskError, match="read the instructions"):
        next_task(desk, ada)
    raters.try_again(fast, ada)
    work(ada, True, "active")
    work(ada, False, "blocked")
    with pytest.raises(DeskError, match="rests for now"):
        next_task(desk, ada)
    raters.set_state(fast, RUN, ada, "active")
    assert next_task(desk, ada) is not None
    work(bo, False, "gated")
    raters.try_again(fast, bo)
    work(bo, False, "blocked")
    assert all("gold" not in a.target for a in heard(fast, sources))
    rows = {r["person"].id: r for r in lead.overview(fast, RUN)["raters"]}
    assert rows[ada]["right"] >= 4
    assert rows[bo]["right"] == 0


def test_practice_is_of_new_gold_and_ends_when_there_is_none(
    fast: turnwise.Ledger, tmp_path: Path, clock: Clock
) -> None:
    spec = {
        "task": "compare",
        **PLAIN,
        "gold": gold_file(tmp_path / "gold.jsonl", 5),
        "gold_share": 0.9,
    }
    study(fast, spec, played=groups(20, 2))
    desk, ada = Desk(fast, random.Random(1)), person(fast, "Ada")
    state = lambda: raters.everybody(fast, RUN)[0].state  # noqa: E731
    spent = []
    while state() == "active":
        clock.now += 20
        task = next_task(desk, ada)
        assert task is not None
        gold = task.shown[0].run != RUN
        desk.answer(task.id, ada, grade(task, False) if gold else {"preference": "1"})
        spent += [task] if gold else []
    raters.try_again(fast, ada)
    for task in spent:  # correcting what was wrong shows nothing
        clock.now += 20
        desk.answer(task.id, ada, grade(task, True))
    assert state() == "practice"
    clock.now += 20
    last = next_task(desk, ada)
    assert last is not None
    desk.answer(last.id, ada, grade(last, True))
    clock.now += 20
    assert next_task(desk, ada) is not None, "one right answer is all the gold there is"
    assert state() == "active"


def test_gold_must_be_something_one_can_get_wrong(tmp_path: Path) -> None:
    a, b = groups(1, 2).popitem()[1]
    assert tasks.known(turnwise.Comparison(a.group, ((b.id,), (a.id,)))) == {
        "ranking": [[b.id], [a.id]]
    }
    assert tasks.known(turnwise.Feedback(a.id, turn_scores=(1.0, -1.0))) == {"first_wrong": 1}
    assert tasks.known(turnwise.Feedback(a.id, turn_scores=(1.0, 0.0))) == {"first_wrong": 1}, (
        "labels: true, false"
    )
    assert tasks.known(
        turnwise.Feedback(a.id, turn_scores=(0.0, 1.0), details={"first_wrong": None})
    ) == {"first_wrong": None}
    for bad in (
        turnwise.Comparison(a.group, ((a.id, b.id),)), turnwise.Feedback(a.id, score=0.5), turnwise.Feedback(a.id, turn_scores=(0.0, 0.0)),  # noqa: E501
    ):  # fmt: skip
        with pytest.raises(ValueError, match="cannot be gold"):
            tasks.known(bad)
    twin = turnwise.Comparison(a.group, ((a.id,), (a.id + "'",)))
    with pytest.raises(ValueError, match="same words"):
        tasks.known(twin, (a, dataclasses.replace(a, id=a.id + "'")))
    for scale in (
        turnwise.Feedback(a.id, score=2.0),
        turnwise.Feedback(a.id, aspects={"tone": -1.0, "help": 1.0}),
    ):
        with pytest.raises(ValueError, match="0 .worst. to 1 .best."):
            tasks.known(scale)
    with pytest.raises(ValueError, match="marks that are gold"):
        tasks.known(turnwise.Feedback(a.id, turn_scores=(0.4, 0.9)))
    middle = turnwise.Feedback(a.id, aspects={"tone": 0.5})
    assert not any(tasks.agrees(middle, {"score": gold}) for gold in (0.0, 1.0)), (
        "who never says anything knows nothing"
    )
    (tmp_path / "gold.jsonl").write_text('{"prompt": []}\n')
    with pytest.raises(PreferenceError, match="no known format"):
        turnwise.Plugins().create("judge", "people", gold=str(tmp_path / "gold.jsonl"))


def test_gold_is_taken_back_and_handed_over_like_work(
    fast: turnwise.Ledger, tmp_path: Path, clock: Clock
) -> None:
    spec = {
        "task": "compare",
        **PLAIN,
        "undo": 30.0,
        "gold": gold_file(tmp_path / "gold.jsonl", 6),
        "gold_share": 0.5,
    }
    sources = study(fast, spec, played=groups(6, 2))
    desk, ada = Desk(fast, random.Random(1)), person(fast, "Ada")
    seen = set()
    while (task := next_task(desk, ada)) is not None:
        gold = task.shown[0].run != RUN
        seen.add(gold)
        desk.answer(task.id, ada, grade(task, True) if gold else {"preference": "1"})
        assert desk.undo(task.id, ada)
        assert (
            desk.answer(task.id, ada, grade(task, False) if gold else {"preference": "1"})
            == "corrected"
        )
        clock.now += 31
        assert not {a.target for a in heard(fast, sources)} & (
            {a.group for a in task.shown} if gold else set()
        )
        assert not desk.undo(task.id, ada)
    assert seen == {True, False}
    assert all(s.right for s in desk.answers(RUN) if s.gold), (
        "the first answer shows whether somebody knows"
    )


def test_good_raters_pass_gold_and_gold_never_trains(fast: turnwise.Ledger, tmp_path: Path) -> None:
    spec = {
        "task": "compare",
        **PLAIN,
        "gold": gold_file(tmp_path / "gold.jsonl", 12),
        "gold_share": 0.5,
    }
    sources = study(fast, spec, played=groups(12, 2))
    desk, ada = Desk(fast, random.Random(1)), person(fast, "Ada")
    while (task := next_task(desk, ada)) is not None:
        desk.answer(
            task.id, ada, grade(task, True) if task.shown[0].run != RUN else {"preference": "1"}
        )
    assert raters.everybody(fast, RUN)[0].state == "active"
    assert {a.target for a in heard(fast, sources)} == set(groups(12, 2))


def test_an_agreed_item_becomes_gold_for_those_who_have_not_seen_it(fast: turnwise.Ledger) -> None:
    study(fast, {"task": "mark", "raters": 3, **PLAIN, "gold_share": 0.9}, played=groups(1, 1))
    desk = Desk(fast, random.Random(0))
    ada, bo, cy = (person(fast, n) for n in ("Ada", "Bo", "Cy"))
    for p in (ada, bo):
        task = next_task(desk, p)
        assert task is not None
        if p == bo:
            with pytest.raises(ValueError, match="too few"):
                lead.make_gold(fast, RUN, fast_item(fast))
        desk.answer(task.id, p, {"first_wrong": "1"})
    lead.make_gold(fast, RUN, fast_item(fast))
    assert next_task(desk, ada) is None, "she has judged it"
    task = next_task(desk, cy)
    assert task is not None
    desk.answer(task.id, cy, {"first_wrong": "none"})
    assert {s.rater: s.right for s in desk.answers(RUN)} == {ada: None, bo: None, cy: False}


def fast_item(ledger: turnwise.Ledger) -> str:
    with ledger.reading() as db:
        return str(db.scalar(sa.select(LEASES.c.item).order_by(LEASES.c.since)))


def test_haste_and_sameness_are_flagged_and_nothing_is_dropped(
    fast: turnwise.Ledger, clock: Clock
) -> None:
    long = {
        e.group: [e]
        for g in range(24)
        for e in [conversation("because " * 40, heard="why? " * 40, id=f"t{g}", seed=g)]
    }
    sources = study(fast, {"task": "score", **PLAIN}, played=long)
    desk, ada = Desk(fast), person(fast, "Ada")
    for n in range(20):
        task = next_task(desk, ada)
        assert task is not None
        clock.now += 1 if n < 5 else 60
        desk.answer(task.id, ada, {f"aspect-{a}": "4" for a in task.study["aspects"]})
    with fast.reading() as db:
        kinds = Counter(db.scalars(sa.select(EVENTS.c.kind)))
    assert kinds == {"too fast": 5, "always the same": 2}
    assert len(heard(fast, sources)) == 20


def test_strata_travel_with_the_answers(fast: turnwise.Ledger) -> None:
    sources = study(
        fast,
        {
            "task": "rank",
            "raters": 2,
            **PLAIN,
            "strata": {"language": ["de", "en"], "field": ["law"]},
        },
        played=groups(1),
    )
    desk, ada, bo = Desk(fast), person(fast, "Ada"), person(fast, "Bo")
    raters.declare(fast, ada, {"field": "law", "language": "de"})
    assert rate(desk, ada) == rate(desk, bo) == "new"
    assert sorted(a.stamp.stratum for a in heard(fast, sources)) == ["", "de"]


def test_the_note_says_who_is_at_it_and_how_long_it_will_take(
    fast: turnwise.Ledger, clock: Clock
) -> None:
    sources = study(fast, {"task": "rank", "raters": 2, **PLAIN}, played=groups(12))
    people = sources.of_env[0][0].given
    assert people.waiting().startswith("0 raters active: run `turnwise rate ")  # type: ignore[attr-defined]
    desk, ada = Desk(fast), person(fast, "Ada")
    for _ in range(4):
        rate(desk, ada)
        clock.now += 60
    assert people.waiting() == "1 rater active, about 20 minutes"  # type: ignore[attr-defined]


# The lead's numbers.


def test_the_leads_page_shows_agreement_strata_and_what_is_disputed(fast: turnwise.Ledger) -> None:
    study(
        fast,
        {"task": "score", "raters": 4, **PLAIN, "strata": {"side": ["left", "right"]}},
        played=groups(6, 1),
    )
    desk = Desk(fast)
    for n, name in enumerate(("Ada", "Bo", "Cy", "Di")):
        rater = person(fast, name)
        raters.declare(fast, rater, {"side": "left" if n < 2 else "right"})
        while (task := next_task(desk, rater)) is not None:
            good = int(task.shown[0].id[1]) % 2 == 0
            points = ("5" if good else "1") if n < 2 else ("1" if good else "5")
            desk.answer(
                task.id,
                rater,
                {
                    "aspect-helpful": points,
                    "aspect-honest": "5" if good else "2",
                    "aspect-harmless": "4",
                },
            )
    view = lead.overview(fast, RUN)["studies"]["score"]
    table = {a.name: a for a in view["agreement"]}
    assert table["honest"].percent == table["honest"].alpha == 1.0
    assert table["helpful"].alpha is not None
    assert table["helpful"].alpha < 0 < table["helpful"].units
    assert table["harmless"].percent == 1.0
    assert table["harmless"].alpha is None, "one value only says nothing"
    assert table["side: left"].alpha == table["side: right"].alpha == 1.0, "agreed within"
    assert table["between sides"].percent == pytest.approx(2 / 3), "and not between"
    assert [d["agreed"] for d in view["disputed"]] == pytest.approx([(1 / 3 + 1 + 1) / 3] * 6)
    assert {a.name: round(a.percent or 0, 3) for a in view["per_rater"]} == dict.fromkeys(
        ("Ada", "Bo", "Cy", "Di"), round((1 / 3 + 1 + 1) / 3, 3)
    )
    assert view["slots"] == {"filled": 24, "slots": 24, "open": 0}
    rows = lead.export(fast, RUN)
    assert len(rows) == 24
    assert json.loads(json.dumps(rows)) == rows


def test_what_is_left_unmarked_is_no_judgement() -> None:
    def said(rater: str, marks: tuple[float | None, ...], **details: Any) -> RatedAnswer:
        answer = turnwise.Feedback(
            "e", turn_scores=marks, details=details, stamp=turnwise.Stamp(rater=rater)
        )
        return RatedAnswer("item", "mark", "mark", rater, answer, 1.0, "value", None, 0.0, False)

    answers = [
        said("a", (1.0, None, None), first_wrong=2),
        said("b", (None, -1.0, None), first_wrong=2),
        said("c", (1.0, -1.0, None)),
    ]
    found = judged(answers)
    assert found.units == [{"a": 1.0, "c": 1.0}, {"a": "2", "b": "2"}, {"b": -1.0, "c": -1.0}]
    assert judged(answers, "first_wrong").units == [{"a": "2", "b": "2"}]


# Forms.


FORM = st.dictionaries(
    st.sampled_from(["rank-0", "rank-1", "preference", "aspect-kind", "turn-0", "turn-1",
            "first_wrong", "verdict", "comment", "reason", "all_bad"]),
    st.one_of(st.sampled_from(["", "1", "2", "-3", "none", "good", "bad", "cannot", "0"]),
        st.text(max_size=20)),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(tasks.TASKS), FORM)
def test_any_form_is_an_answer_or_refused(task: str, form: dict[str, str]) -> None:
    shown = groups(1, 2).popitem()[1]
    try:
        said = tasks.read(
            task,
            form,
            shown if task in ("rank", "compare") else shown[:1],
            ["kind"],
            5,
            {"seconds": 1.0},
        )
    except tasks.FormError as error:
        json.dumps(error.field)
        return
    assert said.shown["order"] == [
        e.id for e in (shown if task in ("rank", "compare") else shown[:1])
    ]
    json.dumps(dict(said.details))


def test_forms_mean_what_they_say() -> None:
    a, b = groups(1, 2).popitem()[1]
    read = lambda task, form, shown=(a, b): tasks.read(task, form, shown, ["kind", "true"], 5, {})  # noqa: E731
    assert read("rank", {"rank-0": "2", "rank-1": "1"}).ranking == ((b.id,), (a.id,))  # type: ignore[union-attr]
    tie = read("rank", {"rank-0": "2", "rank-1": "2", "all_bad": "1"})
    assert (tie.ranking, tie.details) == (((a.id, b.id),), {"all_bad": True})  # type: ignore[union-attr]
    left = read("compare", {"preference": "-3"})
    assert (left.ranking, left.strength) == (((a.id,), (b.id,)), 3.0)  # type: ignore[union-attr]
    assert read("compare", {"preference": "0"}).ranking == ((a.id, b.id),)  # type: ignore[union-attr]
    assert read("score", {"aspect-kind": "1", "aspect-true": "4"}, (a,)).aspects == {
        "kind": 0.0,
        "true": 0.75,
    }  # type: ignore[union-attr]
    marked = read("mark", {"turn-0": "good", "first_wrong": "1"}, (a,))
    assert (marked.turn_scores, marked.details) == ((1.0, -1.0), {"first_wrong": 1})  # type: ignore[union-attr]
    fine = read("mark", {"first_wrong": "none", "turn-1": "good"}, (a,))
    assert (fine.turn_scores, fine.details) == ((0.0, 1.0), {"first_wrong": None})  # type: ignore[union-attr]
    for task, form, field in (
        ("rank", {"rank-0": "1"}, "rank-1"), ("rank", {"rank-0": "1", "rank-1": "3"}, "rank-1"), ("compare", {"preference": "4"}, "preference"),  # noqa: E501
        ("compare", {"preference": "१"}, "preference"), ("score", {"aspect-kind": "5"}, "aspect-true"), ("mark", {}, "first_wrong"),  # noqa: E501
        ("mark", {"turn-0": "good", "first_wrong": "0"}, "first_wrong"), ("mark", {"turn-1": "great"}, "turn-1"),  # noqa: E501
        ("compare", {"preference": "1", "comment": "x" * 10_001}, "comment"),
    ):  # fmt: skip
        with pytest.raises(tasks.FormError) as said:
            read(task, form, (a, b) if task in ("rank", "compare") else (a,))
        assert said.value.field == field


# What an answer would teach.


def test_information_is_what_voices_disagree_about() -> None:
    from turnwise.plugins.human.information import information

    sure = 20.0
    assert information([[sure, -sure], [-sure, sure]]) == pytest.approx(1.0, abs=1e-6), (
        "two sure voices that contradict: one bit"
    )  # type: ignore[arg-type]
    assert information([[0.0, 0.0], [0.0, 0.0]]) == 0.0, "both are unsure: an answer is noise"  # type: ignore[arg-type]
    assert information([[sure, -sure], [sure, -sure]]) == pytest.approx(0.0, abs=1e-6), "both agree"  # type: ignore[arg-type]
    assert information([[3.0, 1.0]]) == 0.0, "one voice cannot disagree"  # type: ignore[arg-type]
    # p = sigma(1), sigma(-1): H(1/2) - H(sigma(1)) = 1 - 0.8399 bits
    assert information([[1.0, 0.0], [0.0, 1.0]]) == pytest.approx(0.1601, abs=1e-4)  # type: ignore[arg-type]


def test_pairings_that_cannot_work_are_refused_before_the_run() -> None:
    def make(**rl: Any) -> None:
        stage = {"env": "turnwise/SupportDesk-v0", **rl}
        turnwise.Run({"policy": "nowhere", "stages": [{"rl": stage}]}, folder="/nonexistent/run")

    people = {"judge": "people", "task": "score"}
    with pytest.raises(
        turnwise.ConfigError, match="gives scores: use 'dawid-skene' or 'majority' or 'mean'"
    ):
        make(feedback=[people], combiner={"name": "aggregate", "aggregator": "bradley-terry"})
    make(feedback=[people], combiner={"name": "aggregate", "aggregator": "mean"})
    with pytest.raises(turnwise.PluginError, match="and no `weight`"):
        make(feedback=["environment", {**people, "share": 0.5, "required": False, "weight": 1}])
    with pytest.raises(turnwise.PluginError, match="Did you mean 'raters'"):
        make(feedback=[{**people, "ratrs": 2}])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"task": "rnk"}, "Did you mean 'rank'"), ({"scale": 1}, "scale must lie"), ({"gold": "/none"}, "no file"), ({"lease": 0}, "lease"),  # noqa: E501
        ({"task": "score", "aspects": []}, "needs aspects"), ({"undo": -1}, "undo"), ({"ordr": "value"}, "no option 'ordr'"),  # noqa: E501
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(turnwise.PluginError, match=match):
        turnwise.Plugins().create("judge", "people", **options)
