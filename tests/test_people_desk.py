"""The desk's rules: slots, leases, corrections, gold; on both databases."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import turnwise
from hypothesis import given, settings
from hypothesis import strategies as st
from rating import RUN, fill, groups, person, study, talk
from turnwise.engine.ledger import Member
from turnwise.plugins.human import lead, raters, tasks
from turnwise.plugins.human.desk import Desk, DeskError, NotYours
from turnwise.plugins.human.tables import EVENTS, LEASES, RATERS, SESSIONS


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(database: str, clock: Clock) -> Iterator[turnwise.Ledger]:
    ledger = turnwise.Ledger(database, clock=clock)
    yield ledger
    ledger.close()


@pytest.fixture
def fast(tmp_path: Path, clock: Clock) -> Iterator[turnwise.Ledger]:
    """Where the database makes no difference."""
    ledger = turnwise.Ledger(tmp_path / "ledger.sqlite", clock=clock)
    yield ledger
    ledger.close()


PLAIN = {"gold_share": 0.0, "random_share": 0.0, "undo": 0.0}


def rate(desk: Desk, rater: str, rng: random.Random | None = None) -> str | None:
    task = desk.next(RUN, rater)
    return None if task is None else desk.answer(task.id, rater, fill(task, rng or random.Random(0)))


def test_every_slot_is_filled_once_and_nobody_sees_an_item_twice(ledger: turnwise.Ledger) -> None:
    sources = study(ledger, {"task": "rank", "raters": 2, **PLAIN})
    desk, people = Desk(ledger), [person(ledger, name) for name in ("Ada", "Bo", "Cy")]
    done = Counter(p for _ in range(4) for p in people if rate(desk, p) == "new")
    assert sum(done.values()) == 6, "three groups, two raters each"
    assert all(desk.next(RUN, p) is None for p in people)
    said = sources.receive(ledger)
    assert Counter(a.target for a in said) == dict.fromkeys(groups(), 2)
    assert all(len({a.stamp.rater for a in said if a.target == g}) == 2 for g in groups())
    assert sources.receive(ledger) == [], "delivered once"
    assert ledger.open_requests() == []
    assert all(sorted(a.shown["order"]) == sorted(e.id for e in groups()[a.target]) for a in said)


def test_the_order_of_display_is_drawn_for_everybody(fast: turnwise.Ledger) -> None:
    study(fast, {"task": "rank", "raters": 30, **PLAIN}, played=groups(1))
    desk = Desk(fast)
    orders = {tuple(e.id for e in desk.next(RUN, person(fast, f"r{i}")).shown) for i in range(20)}  # type: ignore[union-attr]
    assert len(orders) > 8


def test_a_lease_blocks_a_slot_until_it_ends(ledger: turnwise.Ledger, clock: Clock) -> None:
    study(ledger, {"task": "rank", "raters": 1, "lease": 60, **PLAIN}, played=groups(1))
    desk, ada, bo, cy = Desk(ledger), *(person(ledger, n) for n in ("Ada", "Bo", "Cy"))
    mine = desk.next(RUN, ada)
    assert mine is not None
    assert desk.next(RUN, ada) == mine, "a reload shows the same task, in the same order"
    assert desk.next(RUN, bo) is None
    clock.now += 61
    taken = desk.next(RUN, bo)
    assert taken is not None, "whoever closes the laptop blocks nobody"
    assert desk.answer(mine.id, ada, fill(mine, random.Random(0))) == "extra", "what she says late is kept"
    assert desk.answer(taken.id, bo, fill(taken, random.Random(0))) == "new"
    assert desk.next(RUN, cy) is None
    with ledger.reading() as db:
        assert dict(db.execute(sa.select(LEASES.c.rater, LEASES.c.request.is_not(None))).tuples().all()) == {
            ada: False,
            bo: True,
        }


def test_who_comes_back_before_anybody_else_keeps_the_slot_and_the_draft(fast: turnwise.Ledger, clock: Clock) -> None:
    study(fast, {"task": "rank", "raters": 1, "lease": 60, **PLAIN}, played=groups(1))
    desk, ada = Desk(fast), person(fast, "Ada")
    mine = desk.next(RUN, ada)
    assert mine is not None
    desk.draft(mine.id, ada, {"rank-0": "2", "comment": "hm", "csrf": "secret"})
    clock.now += 500
    again = desk.next(RUN, ada)
    assert again is not None
    assert again.draft == {"rank-0": "2", "comment": "hm"}
    assert desk.answer(mine.id, ada, fill(mine, random.Random(0))) == "new"


def test_sent_twice_is_one_answer_and_sent_otherwise_is_a_correction(ledger: turnwise.Ledger, clock: Clock) -> None:
    sources = study(ledger, {"task": "compare", "raters": 1, **PLAIN, "undo": 30.0}, played=groups(1, 2))
    desk, ada = Desk(ledger), person(ledger, "Ada")
    task = desk.next(RUN, ada)
    assert task is not None
    assert desk.answer(task.id, ada, {"preference": "-2"}) == "new"
    clock.now += 10
    assert desk.answer(task.id, ada, {"preference": "-2"}) == "again"
    assert sources.receive(ledger) == [], "it can still be taken back"
    clock.now += 30
    [first] = sources.receive(ledger)
    assert first.strength == 2.0
    assert desk.answer(task.id, ada, {"preference": "1"}) == "corrected"
    clock.now += 31
    [second] = sources.receive(ledger)
    assert second.supersedes == first.id
    assert [a.id for a in ledger.feedback(list(groups(1, 2)))] == [second.id]
    ledger.add_members(RUN, 1, [Member(e.id, e.group, True, feedback=(second.id,)) for e in task.shown])
    assert desk.answer(task.id, ada, {"preference": "3"}) == "corrected"
    clock.now += 31
    [third] = sources.receive(ledger)
    assert third.supersedes is None, "what has trained is not corrected; the new opinion stands beside it"
    assert [a.id for a in ledger.feedback(list(groups(1, 2)))] == [second.id]


def test_the_last_answer_can_be_taken_back(fast: turnwise.Ledger, clock: Clock) -> None:
    sources = study(fast, {"task": "compare", **PLAIN, "undo": 30.0}, played=groups(1, 2))
    desk, ada = Desk(fast), person(fast, "Ada")
    with pytest.raises(DeskError, match="no answer"):
        desk.undo(RUN, ada)
    task = desk.next(RUN, ada)
    assert task is not None
    desk.answer(task.id, ada, {"preference": "3", "comment": "slip"})
    back = desk.undo(RUN, ada)
    assert (back.id, back.status, back.draft) == (task.id, "open", {"preference": "3", "comment": "slip"})
    clock.now += 100
    assert sources.receive(fast) == [], "what was taken back never arrives"
    assert desk.answer(task.id, ada, {"preference": "-3"}) == "corrected"
    clock.now += 31
    [said] = sources.receive(fast)
    assert said.supersedes is None
    assert said.ranking[0][0] == task.shown[0].id
    fast.add_members(RUN, 1, [Member(e.id, e.group, True, feedback=(said.id,)) for e in task.shown])
    with pytest.raises(DeskError, match="used already"):
        desk.undo(RUN, ada)


def test_an_item_that_everybody_passes_on_counts_as_one_nobody_can_judge(ledger: turnwise.Ledger) -> None:
    sources = study(ledger, {"task": "rank", "raters": 2, "skips": 2, **PLAIN}, played=groups(1))
    desk, people = Desk(ledger), [person(ledger, n) for n in ("Ada", "Bo", "Cy", "Di")]
    for p in people[:2]:
        task = desk.next(RUN, p)
        assert task is not None
        desk.skip(task.id, p, "not my language")
        assert desk.next(RUN, p) is None, "what was passed on does not come back"
    [said] = sources.receive(ledger)
    assert (said.status, said.reason) == ("abstained", "not my language")
    assert rate(desk, people[2]) == "new"
    assert desk.next(RUN, people[3]) is None


def test_cannot_judge_is_an_answer_without_a_score(fast: turnwise.Ledger) -> None:
    sources = study(fast, {"task": "score", **PLAIN}, played=groups(1, 1))
    desk, ada = Desk(fast), person(fast, "Ada")
    task = desk.next(RUN, ada)
    assert task is not None
    assert desk.answer(task.id, ada, {"verdict": "cannot", "reason": "cut off"}) == "new"
    [said] = sources.receive(fast)
    assert (said.status, said.reason, dict(said.aspects)) == ("abstained", "cut off", {})


def test_what_has_expired_or_trained_is_not_asked_any_more(fast: turnwise.Ledger, clock: Clock) -> None:
    study(fast, {"task": "rank", "deadline": 60.0, **PLAIN}, played=groups(2))
    desk = Desk(fast)
    first, second = groups(2).values()
    fast.add_members(RUN, 1, [Member(e.id, e.group, True) for e in first])
    task = desk.next(RUN, person(fast, "Ada"))
    assert task is not None
    assert task.shown[0].group == second[0].group
    clock.now += 61
    assert desk.next(RUN, person(fast, "Bo")) is None


def test_others_tasks_are_out_of_reach(fast: turnwise.Ledger) -> None:
    study(fast, {"task": "rank", **PLAIN})
    desk, ada, bo = Desk(fast), person(fast, "Ada"), person(fast, "Bo")
    task = desk.next(RUN, ada)
    assert task is not None
    for attempt in (
        lambda: desk.task(task.id, bo), lambda: desk.answer(task.id, bo, {}), lambda: desk.draft(task.id, bo, {}),
        lambda: desk.skip(task.id, bo, ""), lambda: desk.answer("nothing", bo, {}),
    ):  # fmt: skip
        with pytest.raises(NotYours):
            attempt()


def test_valued_items_come_first_and_a_share_is_drawn_at_random(fast: turnwise.Ledger) -> None:
    """Two judges that disagree about one group make it the one to ask about; `chosen` says how each came about."""
    played = groups(5, 2)
    odd = list(played)[3]
    fast.add_episodes([e for members in played.values() for e in members])
    for members in played.values():
        for e in members:
            split = 2.0 if members[0].group == odd else 0.0
            scores = [split * (1 - 2 * e.slot), -split * (1 - 2 * e.slot)]
            fast.add_feedback(
                [
                    turnwise.Feedback(
                        e.id, score=0.0, id=f"rm-{e.id}", details={"members": scores}, stamp=turnwise.Stamp(source="rm")
                    )
                ]
            )
    sources = study(fast, {"task": "rank", "raters": 60, **PLAIN, "random_share": 0.5}, played=played)
    sources.receive(fast)
    desk = Desk(fast, random.Random(0))
    first = [desk.next(RUN, person(fast, f"r{i}")) for i in range(40)]
    chosen = Counter((t.shown[0].group == odd) for t in first if t is not None)
    with fast.reading() as db:
        how = Counter(db.scalars(sa.select(LEASES.c.chosen)))
    assert chosen[True] >= how["value"] >= 10
    assert how["random"] >= 10


def test_two_raters_never_take_one_slot_at_the_same_moment(ledger: turnwise.Ledger) -> None:
    study(ledger, {"task": "compare", "pairs": 1, "raters": 1, **PLAIN}, played=groups(12, 2))
    people = [person(ledger, f"r{i}") for i in range(8)]
    gate, results, lock = threading.Barrier(len(people)), Counter[str](), threading.Lock()

    def work(rater: str) -> None:
        desk = Desk(ledger)
        gate.wait()
        while (task := desk.next(RUN, rater)) is not None:
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
    Desk(ledger)
    secret = raters.invite(ledger, "  Ada \n Lovelace \0 \ud800 ", "lead")
    cookie = raters.enter(ledger, secret)
    session = raters.session(ledger, cookie)
    assert (session.person.name, session.person.role) == ("Ada Lovelace \0 \ud800", "lead")
    with pytest.raises(raters.NoEntry, match="used or is too old"):
        raters.enter(ledger, secret)
    with ledger.reading() as db:
        kept = str([list(db.execute(sa.select(table))) for table in (RATERS, SESSIONS)])
    assert secret not in kept
    assert cookie not in kept
    old = raters.invite(ledger, "Bo")
    clock.now += raters.LINK + 1
    with pytest.raises(raters.NoEntry):
        raters.enter(ledger, old)
    raters.invite(ledger, "Ada Lovelace \0 \ud800", "lead")  # a new link ends what the old one opened
    with pytest.raises(raters.NoEntry):
        raters.session(ledger, cookie)
    for name, role in (("", "rater"), ("x", "king")):
        with pytest.raises(ValueError):
            raters.invite(ledger, name, role)


def gold_file(path: Path, count: int) -> str:
    rows = [
        {"prompt": [{"role": "user", "content": f"gold {i}"}], "chosen": [{"role": "assistant", "content": "right"}],
         "rejected": [{"role": "assistant", "content": "wrong"}]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def grade(task: object, well: bool) -> dict[str, str]:
    left_is_right = task.shown[0].turns[0].action == "right"  # type: ignore[attr-defined]
    return {"preference": "-2" if left_is_right == well else "2"}


def test_gold_gates_gives_a_second_chance_and_blocks(fast: turnwise.Ledger, tmp_path: Path, clock: Clock) -> None:
    spec = {"task": "compare", **PLAIN, "gold": gold_file(tmp_path / "gold.jsonl", 20), "gold_share": 0.9}
    sources = study(fast, spec, played=groups(40, 2))
    desk, ada, bo = Desk(fast, random.Random(1)), person(fast, "Ada"), person(fast, "Bo")

    def work(rater: str, well: bool, until: str) -> int:
        for n in range(60):
            clock.now += 20
            try:
                task = desk.next(RUN, rater)
            except DeskError:
                break
            assert task is not None
            desk.answer(task.id, rater, grade(task, well) if "gold" in str(task.shown[0].run) else {"preference": "1"})
            if {p.id: p.state for p in raters.everybody(fast)}[rater] == until:
                return n
        raise AssertionError(f"never {until}")

    work(ada, False, "gated")
    with pytest.raises(DeskError, match="read the instructions"):
        desk.next(RUN, ada)
    raters.try_again(fast, ada)
    work(ada, True, "active")
    work(ada, False, "blocked")
    with pytest.raises(DeskError, match="rests for now"):
        desk.next(RUN, ada)
    raters.set_state(fast, ada, "active")
    assert desk.next(RUN, ada) is not None
    work(bo, False, "gated")
    raters.try_again(fast, bo)
    work(bo, False, "blocked")
    assert all("gold" not in a.target for a in sources.receive(fast))
    rows = {r["person"].id: r for r in lead.overview(fast, RUN)["raters"]}
    assert rows[ada]["right"] >= 4
    assert rows[bo]["right"] == 0


def test_good_raters_pass_gold_and_gold_never_trains(fast: turnwise.Ledger, tmp_path: Path) -> None:
    spec = {"task": "compare", **PLAIN, "gold": gold_file(tmp_path / "gold.jsonl", 12), "gold_share": 0.5}
    sources = study(fast, spec, played=groups(12, 2))
    desk, ada = Desk(fast, random.Random(1)), person(fast, "Ada")
    while (task := desk.next(RUN, ada)) is not None:
        desk.answer(task.id, ada, grade(task, True) if task.shown[0].run != RUN else {"preference": "1"})
    assert raters.everybody(fast)[0].state == "active"
    assert {a.target for a in sources.receive(fast)} == set(groups(12, 2))


def test_an_agreed_item_becomes_gold_for_those_who_have_not_seen_it(fast: turnwise.Ledger) -> None:
    study(fast, {"task": "mark", "raters": 3, **PLAIN, "gold_share": 0.9}, played=groups(1, 1))
    desk = Desk(fast, random.Random(0))
    ada, bo, cy = (person(fast, n) for n in ("Ada", "Bo", "Cy"))
    for p in (ada, bo):
        task = desk.next(RUN, p)
        assert task is not None
        if p == bo:
            with pytest.raises(ValueError, match="too few"):
                lead.make_gold(fast, RUN, fast_item(fast))
        desk.answer(task.id, p, {"first_wrong": "1"})
    lead.make_gold(fast, RUN, fast_item(fast))
    assert desk.next(RUN, ada) is None, "she has judged it"
    task = desk.next(RUN, cy)
    assert task is not None
    desk.answer(task.id, cy, {"first_wrong": "none"})
    assert {s.rater: s.right for s in desk.answers(RUN)} == {ada: None, bo: None, cy: False}


def fast_item(ledger: turnwise.Ledger) -> str:
    with ledger.reading() as db:
        return str(db.scalar(sa.select(LEASES.c.item).order_by(LEASES.c.since)))


def test_haste_and_sameness_are_flagged_and_nothing_is_dropped(fast: turnwise.Ledger, clock: Clock) -> None:
    long = {e.group: [e] for g in range(24) for e in [talk(f"t{g}", ["why? " * 40, "because " * 40], seed=g)]}
    sources = study(fast, {"task": "score", **PLAIN}, played=long)
    desk, ada = Desk(fast), person(fast, "Ada")
    for n in range(20):
        task = desk.next(RUN, ada)
        assert task is not None
        clock.now += 1 if n < 5 else 60
        desk.answer(task.id, ada, {f"aspect-{a}": "4" for a in task.study["aspects"]})
    with fast.reading() as db:
        kinds = Counter(db.scalars(sa.select(EVENTS.c.kind)))
    assert kinds == {"too fast": 5, "always the same": 2}
    assert len(sources.receive(fast)) == 20


def test_strata_travel_with_the_answers(fast: turnwise.Ledger) -> None:
    sources = study(
        fast, {"task": "rank", "raters": 2, **PLAIN, "strata": {"language": ["de", "en"], "field": ["law"]}}, played=groups(1)
    )
    desk, ada, bo = Desk(fast), person(fast, "Ada"), person(fast, "Bo")
    raters.declare(fast, ada, {"field": "law", "language": "de"})
    assert rate(desk, ada) == rate(desk, bo) == "new"
    assert sorted(a.stamp.stratum for a in sources.receive(fast)) == ["", "de"]


def test_the_note_says_who_is_at_it_and_how_long_it_will_take(fast: turnwise.Ledger, clock: Clock) -> None:
    sources = study(fast, {"task": "rank", "raters": 2, **PLAIN}, played=groups(12))
    people = sources.sources[0].given
    assert people.waiting() == "0 raters active"  # type: ignore[attr-defined]
    desk, ada = Desk(fast), person(fast, "Ada")
    for _ in range(4):
        rate(desk, ada)
        clock.now += 60
    assert people.waiting() == "1 rater active, about 20 minutes"  # type: ignore[attr-defined]


# The lead's numbers.


def test_the_leads_page_shows_agreement_strata_and_what_is_disputed(fast: turnwise.Ledger) -> None:
    study(fast, {"task": "score", "raters": 4, **PLAIN, "strata": {"side": ["left", "right"]}}, played=groups(6, 1))
    desk = Desk(fast)
    for n, name in enumerate(("Ada", "Bo", "Cy", "Di")):
        rater = person(fast, name)
        raters.declare(fast, rater, {"side": "left" if n < 2 else "right"})
        while (task := desk.next(RUN, rater)) is not None:
            good = int(task.shown[0].id[1]) % 2 == 0
            points = ("5" if good else "1") if n < 2 else ("1" if good else "5")
            desk.answer(
                task.id, rater, {"aspect-helpful": points, "aspect-honest": "5" if good else "2", "aspect-harmless": "4"}
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
    assert view["slots"] == {"filled": 24, "slots": 24}
    rows = lead.export(fast, RUN)
    assert len(rows) == 24
    assert json.loads(json.dumps(rows)) == rows


# Forms.


FORM = st.dictionaries(
    st.sampled_from(["rank-0", "rank-1", "preference", "aspect-kind", "turn-0", "turn-1", "first_wrong", "verdict", "comment", "reason", "all_bad"]),
    st.one_of(st.sampled_from(["", "1", "2", "-3", "none", "good", "bad", "cannot", "0"]), st.text(max_size=20)),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(tasks.TASKS), FORM)
def test_any_form_is_an_answer_or_refused(task: str, form: dict[str, str]) -> None:
    shown = groups(1, 2).popitem()[1]
    try:
        said = tasks.read(task, form, shown if task in ("rank", "compare") else shown[:1], ["kind"], 5, {"seconds": 1.0})
    except tasks.FormError as error:
        json.dumps(error.field)
        return
    assert said.shown["order"] == [e.id for e in (shown if task in ("rank", "compare") else shown[:1])]
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
    assert read("score", {"aspect-kind": "1", "aspect-true": "4"}, (a,)).aspects == {"kind": 0.0, "true": 0.75}  # type: ignore[union-attr]
    marked = read("mark", {"turn-0": "good", "first_wrong": "1"}, (a,))
    assert (marked.turn_scores, marked.details) == ((1.0, -1.0), {"first_wrong": 1})  # type: ignore[union-attr]
    fine = read("mark", {"first_wrong": "none", "turn-1": "good"}, (a,))
    assert (fine.turn_scores, fine.details) == ((0.0, 1.0), {"first_wrong": None})  # type: ignore[union-attr]
    for task, form, field in (
        ("rank", {"rank-0": "1"}, "rank-1"), ("rank", {"rank-0": "1", "rank-1": "3"}, "rank-1"), ("compare", {"preference": "4"}, "preference"),
        ("compare", {"preference": "१"}, "preference"), ("score", {"aspect-kind": "5"}, "aspect-true"), ("mark", {}, "first_wrong"),
        ("mark", {"turn-0": "good", "first_wrong": "0"}, "first_wrong"), ("mark", {"turn-1": "great"}, "turn-1"),
        ("compare", {"preference": "1", "comment": "x" * 10_001}, "comment"),
    ):  # fmt: skip
        with pytest.raises(tasks.FormError) as said:
            read(task, form, (a, b) if task in ("rank", "compare") else (a,))
        assert said.value.field == field


# What an answer would teach.


def test_information_is_what_voices_disagree_about() -> None:
    from turnwise.plugins.human.value import information

    sure = 20.0
    assert information([[sure, -sure], [-sure, sure]]) == pytest.approx(1.0, abs=1e-6), (
        "two sure voices that contradict: one bit"
    )  # type: ignore[arg-type]
    assert information([[0.0, 0.0], [0.0, 0.0]]) == 0.0, "both are unsure: an answer is noise"  # type: ignore[arg-type]
    assert information([[sure, -sure], [sure, -sure]]) == pytest.approx(0.0, abs=1e-6), "both agree"  # type: ignore[arg-type]
    assert information([[3.0, 1.0]]) == 0.0, "one voice cannot disagree"  # type: ignore[arg-type]
    # p = sigma(1), sigma(-1): H(1/2) - H(sigma(1)) = 1 - 0.8399 bits
    assert information([[1.0, 0.0], [0.0, 1.0]]) == pytest.approx(0.1601, abs=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"task": "rnk"}, "Did you mean 'rank'"), ({"scale": 1}, "scale must lie"), ({"gold": "/none"}, "no file"), ({"lease": 0}, "lease"),
        ({"task": "score", "aspects": []}, "needs aspects"), ({"undo": -1}, "undo"), ({"ordr": "value"}, "no option 'ordr'"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(turnwise.PluginError, match=match):
        turnwise.Plugins().create("feedback source", "people", **options)
