"""Whatever goes wrong between a judge and its model: what the answer is, what its reason says, how
often was asked, and what was counted.

Nothing but a good answer is ever a score.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import turnwise
from support.clock import AsyncClock
from support.episodes import conversation
from support.judges import (
    KEY,
    PRICE,
    RUBRIC,
    WIRES,
    Scripted,
    answers,
    blocks,
    booked,
    bound,
    context,
    dollars,
    model,
    unbiased,
    verdict,
)
from support.model_server import Asked, Fault, ModelServer
from turnwise.judges.asking import calls
from turnwise.judges.llm.listwise import ListwiseJudge
from turnwise.judges.llm.pairwise import PairwiseJudge
from turnwise.judges.llm.rubric_judge import RubricJudge
from turnwise.judges.models.model import ModelError, Prompt

pytest.importorskip("anthropic")
pytest.importorskip("openai")

GOOD = conversation("good", "good good", id="e1")  # 3 good words: kind 2 of 2, right 3 of 4
SCORE = (1 * 2 / 2 + 3 * 3 / 4) / 4
MANY = calls.REQUESTS


class Cell(NamedTuple):
    """What becomes of a fault.

    Attributes:
        always, once: the answer's status where every request meets it, and where only the first
            does.
        reason: what the reason begins with, where every request does.
        requests: how many are sent where every one meets it; `then`: where only the first does.
        lost: whether an answer may have been made and paid for that nobody has seen the price of.
    """

    fault: Fault
    always: str
    reason: str
    requests: int
    once: str = "scored"
    then: int = 2
    lost: bool = False
    wires: tuple[str, ...] = WIRES


def status(number: int, code: str | None = None, **headers: str) -> Fault:
    return Fault(
        "status",
        status=number,
        code=code,
        headers={k.replace("_", "-"): v for k, v in headers.items()},
    )


def passing(fault: Fault, reason: str, lost: bool = False, requests: int = MANY) -> Cell:
    return Cell(fault, "failed", reason, requests, lost=lost)


def final(fault: Fault, reason: str, wires: tuple[str, ...] = WIRES, kind: str = "failed") -> Cell:
    return Cell(fault, kind, reason, 1, once=kind, then=1, wires=wires)


def repaired(kind: str, reason: str, wires: tuple[str, ...] = WIRES) -> Cell:
    return Cell(Fault(kind), "failed", reason, 2, wires=wires)


def accepted(kind: str, wires: tuple[str, ...] = WIRES, lost: bool = False) -> Cell:
    return Cell(Fault(kind), "scored", "", 1, then=1, wires=wires, lost=lost)


OPENAI = ("responses", "chat")
MATRIX = {
    "400": final(status(400), "request: HTTP 400"),
    "401": final(status(401), "account: HTTP 401"),
    "402": final(status(402), "account: HTTP 402"),
    "403": final(status(403), "account: HTTP 403"),
    "404": final(status(404), "account: HTTP 404"),
    "408": passing(status(408), "timeout: HTTP 408"),
    "409": passing(status(409), "busy: HTTP 409"),
    "413": final(status(413), "request: HTTP 413"),
    "422": final(status(422), "request: HTTP 422"),
    "429": passing(status(429), "busy: HTTP 429"),
    "500": passing(status(500), "server: HTTP 500"),
    "502": passing(status(502), "server: HTTP 502"),
    "503": passing(status(503), "busy: HTTP 503"),
    "504": passing(status(504), "timeout: HTTP 504"),
    "529": passing(status(529), "busy: HTTP 529"),
    "quota": final(status(429, "insufficient_quota"), "account: HTTP 429 insufficient_quota"),
    "billing": final(status(400, "billing_hard_limit_reached"),
        "account: HTTP 400 billing_hard_limit_reached"),
    "should retry": passing(status(400, x_should_retry="true"), "server: HTTP 400"),
    "should not retry": final(status(503, x_should_retry="false"), "request: HTTP 503"),
    "slow": passing(Fault("slow", seconds=5), "timeout: no answer within 0.1 seconds", lost=True),
    "drip": passing(Fault("drip", seconds=5), "timeout: no answer within 0.1 seconds", lost=True),
    "cut": passing(Fault("cut"), "connection: no answer: ", lost=True),
    "reset": passing(Fault("reset"), "connection: no answer: ", lost=True),
    "empty": passing(Fault("empty"), "server: HTTP 200 with 0 bytes", lost=True),
    "not JSON": passing(Fault("not_json"),
        "form: HTTP 200 with 57 bytes of application/json, no JSON", lost=True, requests=2),
    "a page, 200": passing(Fault("html", status=200),
        "form: HTTP 200 with 106 bytes of text/html, no JSON", lost=True, requests=2),
    "a page, 502": passing(Fault("html"), "server: HTTP 502"),
    "no content": repaired("empty_content", "unreadable, also when asked again: it was empty"),
    "truncated": repaired("truncated", "truncated: max"),
    "truncated chat": repaired("truncated", "truncated: length, with twice the tokens too",
        ("chat",)),
    "refusal": final(Fault("refusal"), "refused: ", kind="abstained"),
    "filter, Claude": final(Fault("content_filter"), "refused: ", ("messages",), "abstained"),
    "filter": final(Fault("content_filter"), "filtered: content_filter", OPENAI, "abstained"),
    "context, Claude": final(Fault("context_window"), "ended by model_context_window_exceeded",
        ("messages",)),
    "context": final(Fault("context_window"), "request: HTTP 400 context_length_exceeded", OPENAI),
    "pause": final(Fault("pause_turn"), "ended by pause_turn", ("messages",)),
    "tool": final(Fault("tool_use"), "ended by tool", ("messages", "chat")),
    "tool, responses": repaired("tool_use", "unreadable, also when asked again: it was empty",
        ("responses",)),
    "failed": passing(Fault("failed"), "server: server_error")._replace(wires=("responses",)),
    "missing field": repaired("missing_field",
        "unreadable, also when asked again: fields missing: ['levels']"),
    "extra text": repaired("extra_text", "unreadable, also when asked again: not one JSON object"),
    "fenced": accepted("fenced"),
    "no usage": accepted("no_usage", lost=True),
    "commentary": accepted("commentary", ("responses",)),
}  # fmt: skip
MATRIX["truncated"] = MATRIX["truncated"]._replace(wires=("messages", "responses"))
CELLS = [
    pytest.param(wire, name, id=f"{wire}-{name}")
    for name, cell in MATRIX.items()
    for wire in cell.wires
]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[ModelServer, dict[str, Any]]]:
    with ModelServer(unbiased) as server:
        yield server, {wire: model(wire, server) for wire in WIRES}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[turnwise.Ledger]:
    """Opens one ledger for all cases, each of which is a run of its own in it."""
    opened = turnwise.Ledger(tmp_path_factory.mktemp("faults") / "ledger.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> AsyncClock:
    clock = AsyncClock()
    monkeypatch.setattr(calls, "TIME", clock)
    return clock


_runs = itertools.count()


@pytest.mark.parametrize("times", ["always", "once"])
@pytest.mark.parametrize(("wire", "name"), CELLS)
def test_what_a_fault_becomes(
    wire: str,
    name: str,
    times: str,
    served: Any,
    ledger: turnwise.Ledger,
    clock: AsyncClock,
    tmp_path: Path,
) -> None:
    (server, models), cell, run = served, MATRIX[name], f"run-{next(_runs)}"
    server.faults = (lambda _: cell.fault) if times == "always" else [cell.fault]
    server.requests.clear()
    before, undelivered = server.tokens, server.undelivered
    quick = cell.fault.kind in ("slow", "drip")
    judge = RubricJudge(canaries=0, 
        model=models[wire], rubric=RUBRIC, cache=False,
        timeout=0.1 if quick and times == "always" else 1.0 if quick else 30,
        prices={models[wire].name: PRICE}, max_tokens=64,
    )  # fmt: skip
    [said] = answers(judge, [GOOD], context(tmp_path, ledger, run))

    assert said.status == getattr(cell, times)
    if said.status == "scored":
        assert said.score == pytest.approx(SCORE)
    else:
        assert said.score is None
        assert not said.aspects
        assert said.reason.startswith(cell.reason), said.reason
    requests = cell.requests if times == "always" else cell.then
    assert server.count() == requests
    if times == "always" and requests == MANY:
        assert "given up after 8 requests" in said.reason

    rows = booked(ledger, run)
    assert len(rows) == requests, "every request is booked, once"
    lost = [row for row in rows if not row.certain]
    assert len(lost) == (requests if times == "always" else 1) * cell.lost
    if cell.lost and not quick and name != "no usage":
        assert sum(row.cost for row in lost) >= dollars(server.undelivered - undelivered), (
            "the most they can have cost"
        )
    if name != "no usage" and not quick:
        assert sum(row.cost for row in rows if row.certain) == pytest.approx(
            dollars(server.tokens - before)
        )
    assert said.stamp.cost == pytest.approx(sum(row.cost for row in rows))
    assert said.details["took"]["requests"] == requests


@pytest.mark.parametrize("wire", WIRES)
def test_an_answer_that_was_cut_off_is_asked_for_with_twice_the_room(
    wire: str, served: Any, clock: AsyncClock, tmp_path: Path
) -> None:
    server, models = served
    server.faults = [Fault("truncated")]
    server.requests.clear()
    [said] = answers(
        RubricJudge(canaries=0, model=models[wire], rubric=RUBRIC, cache=False, max_tokens=100),
        [GOOD],
        context(tmp_path),
    )
    assert said.status == "scored"
    field = {
        "messages": "max_tokens",
        "responses": "max_output_tokens",
        "chat": "max_completion_tokens",
    }[wire]
    assert [r.asked.body[field] for r in server.requests] == [100, 200]


AFTER = {
    "seconds": ({"retry-after": "7"}, 7.0),
    "a fraction": ({"retry-after": "2.5"}, 2.5),
    "milliseconds": ({"retry-after-ms": "1500"}, 1.5),
    "milliseconds before seconds": ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
    "minutes": ({"retry-after": "600"}, 600.0),
}


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("wire", WIRES)
def test_a_server_is_waited_for_as_long_as_it_asks(
    wire: str, name: str, served: Any, clock: AsyncClock, tmp_path: Path
) -> None:
    (server, models), (headers, seconds) = served, AFTER[name]
    server.faults = [Fault("status", status=429, headers=headers)]
    [said] = answers(
        RubricJudge(canaries=0, model=models[wire], rubric=RUBRIC, cache=False),
        [GOOD],
        context(tmp_path),
    )
    assert said.status == "scored"
    assert clock.time == pytest.approx(seconds)


def test_a_date_to_retry_after_is_waited_for(
    served: Any, clock: AsyncClock, tmp_path: Path
) -> None:
    server, models = served
    date = format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True)
    server.faults = [Fault("status", status=503, headers={"retry-after": date})]
    [said] = answers(
        RubricJudge(canaries=0, model=models["chat"], rubric=RUBRIC, cache=False),
        [GOOD],
        context(tmp_path),
    )
    assert said.status == "scored"
    assert 240 < clock.time <= 300


@pytest.mark.parametrize("odd", ["0", "-3", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", "nan"])
def test_a_wish_that_says_nothing_is_answered_by_waiting_ever_longer(
    odd: str, served: Any, clock: AsyncClock, tmp_path: Path
) -> None:
    server, models = served
    server.faults = [Fault("status", status=503, headers={"retry-after": odd})] * 3
    [said] = answers(
        RubricJudge(canaries=0, model=models["chat"], rubric=RUBRIC, cache=False),
        [GOOD],
        context(tmp_path),
    )
    assert said.status == "scored"
    assert 0.75 * (0.5 + 1 + 2) <= clock.time <= 0.5 + 1 + 2


def test_a_server_that_asks_for_more_than_patience_is_not_waited_for(
    served: Any, clock: AsyncClock, tmp_path: Path
) -> None:
    server, models = served
    server.faults = lambda _: Fault("status", status=429, headers={"retry-after": "7200"})
    server.requests.clear()
    [said] = answers(
        RubricJudge(canaries=0, model=models["chat"], rubric=RUBRIC, cache=False),
        [GOOD],
        context(tmp_path),
    )
    assert said.status == "failed"
    assert "given up after 1 requests" in said.reason
    assert (server.count(), clock.time) == (1, 0.0)


# What models say that is no verdict.


def twice(say: Callable[[dict[str, Any], Prompt], Any], good_after: int | None = None) -> Scripted:
    """A model whose answers are changed, all of them or the first few."""
    numbers = itertools.count()

    def said(prompt: Prompt) -> Any:
        good = verdict(prompt.bound, prompt.user)
        return good if good_after is not None and next(numbers) >= good_after else say(good, prompt)

    return Scripted(said)


def doubled(good: dict[str, Any], _: Prompt) -> str:
    text = json.dumps(good)
    return text[:-1] + ', "abstain": false}'


def changed(**fields: Any) -> Callable[[dict[str, Any], Prompt], Any]:
    return lambda good, _: {**good, **fields}


NO_SCORES = {
    "a key that stands twice": (doubled, "a key stands twice"),
    "a verdict id of another call": (changed(verdict_id="b234"), "verdict_id is not the id given"),
    "a level that is none": (
        changed(levels={"kind": 2, "right": 5}),
        "the level of right must be a whole number from 0 to 4",
    ),
    "a level in words": (changed(levels={"kind": 2, "right": "4"}), "the level of right"),
    "true for a level": (changed(levels={"kind": True, "right": 1}), "the level of kind"),
    "a fraction": (changed(levels={"kind": 2, "right": 1.5}), "the level of right"),
    "a criterion that is missing": (
        changed(levels={"kind": 2}),
        "levels must name each criterion once",
    ),
    "a criterion of its own": (
        changed(levels={"kind": 2, "right": 1, "charm": 1}),
        "levels must name each criterion once",
    ),
    "an abstention in words": (changed(abstain="yes"), "abstain must be a JSON boolean"),
    "a list": (lambda good, _: json.dumps([good]), "not a JSON object but list"),
    "two objects": (lambda good, _: json.dumps(good) * 2, "not one JSON object"),
    "a field of its own": (changed(score=1.0), "not asked for: 1"),
    "NaN": (
        lambda good, _: json.dumps({**good, "levels": {"kind": float("nan"), "right": 1}}),
        "the level of kind",
    ),
    "white space": (lambda good, _: " \n", "it was empty"),
}


@pytest.mark.parametrize("name", NO_SCORES)
def test_what_is_no_verdict_is_asked_for_again_and_told_why_and_then_failed(
    name: str, tmp_path: Path
) -> None:
    change, why = NO_SCORES[name]
    bad, mended = twice(change), twice(change, good_after=1)
    [said] = answers(
        RubricJudge(canaries=0, model=bad, rubric=RUBRIC, cache=False), [GOOD], context(tmp_path)
    )
    assert (said.status, said.score) == ("failed", None)
    assert why in said.reason
    assert len(bad.prompts) == 2
    assert why in bad.prompts[1].user, "the model is told what was wrong"
    [said] = answers(
        RubricJudge(canaries=0, model=mended, rubric=RUBRIC, cache=False), [GOOD], context(tmp_path)
    )
    assert said.score == pytest.approx(SCORE)
    assert len(mended.prompts) == 2


GROUP = [conversation("hello", "good " * i, id=f"g{i}", slot=i) for i in range(4)]


def ranked(change: Callable[[list[list[str]]], Any]) -> Callable[[dict[str, Any], Prompt], Any]:
    return lambda good, _: {**good, "ranking": change(good["ranking"])}


WRONG_RANKINGS = {
    "one left out": ranked(lambda tiers: tiers[1:]),
    "one twice": ranked(lambda tiers: [*tiers, tiers[0]]),
    "one invented": ranked(lambda tiers: [*tiers[1:], ["z999"]]),
    "an empty tier": ranked(lambda tiers: [*tiers, []]),
    "no tiers": ranked(lambda tiers: [id_ for tier in tiers for id_ in tier]),
    "no list": ranked(lambda tiers: "first"),
    "numbers": ranked(lambda tiers: [[1], [2], [3], [4]]),
}


@pytest.mark.parametrize("name", WRONG_RANKINGS)
def test_a_ranking_of_other_ids_than_were_shown_is_asked_for_again_and_then_failed(
    name: str, tmp_path: Path
) -> None:
    change = WRONG_RANKINGS[name]
    [said] = answers(
        ListwiseJudge(canaries=0, model=twice(change), rubric="Which is better?", cache=False),
        GROUP,
        context(tmp_path),
    )
    assert (said.status, said.ranking) == ("failed", ())
    assert said.reason.startswith("unreadable, also when asked again: ")
    mended = twice(change, good_after=1)
    [said] = answers(
        ListwiseJudge(canaries=0, model=mended, rubric="Which is better?", cache=False),
        GROUP,
        context(tmp_path),
    )
    assert said.ranking == (("g3",), ("g2",), ("g1",), ("g0",))
    assert len(mended.prompts) == 2


def test_the_better_one_must_be_one_of_those_shown(tmp_path: Path) -> None:
    model = twice(changed(better="first"))
    [said] = answers(
        PairwiseJudge(canaries=0, model=model, rubric="Which is better?", cache=False),
        GROUP[:2],
        context(tmp_path),
    )
    assert (said.status, said.ranking) == ("failed", ())
    assert "better must be one of" in said.reason


@pytest.mark.parametrize("judge", [ListwiseJudge, PairwiseJudge])
def test_conversations_that_are_the_same_word_for_word_are_tied_without_a_question(
    judge: Any, tmp_path: Path
) -> None:
    same, model = [conversation("hello", "yes", id=f"g{i}", slot=i) for i in range(2)], Scripted()
    [said] = answers(
        judge(model=model, rubric="Which is better?", cache=False), same, context(tmp_path)
    )
    assert said.ranking == (("g0", "g1"),)
    assert model.prompts == []
    last = [
        conversation("yes", id=f"g{i}", slot=i, final=turnwise.Message("user", text))
        for i, text in enumerate(("Fine!", "What?"))
    ]
    answers(judge(model=model, rubric="Which is better?", cache=False), last, context(tmp_path))
    assert model.prompts, "what the other side said last may tell them apart"


def test_an_answer_of_a_shape_nobody_thought_of_is_failed_and_counted(
    ledger: turnwise.Ledger, tmp_path: Path
) -> None:
    def say(prompt: Prompt) -> Any:
        raise KeyError("choices")

    judge = RubricJudge(
        canaries=0, model=Scripted(say), rubric=RUBRIC, cache=False, prices={"scripted:1": PRICE}
    )
    [said] = answers(judge, [GOOD], context(tmp_path, ledger, "odd"))
    assert (said.status, said.reason) == ("failed", "request: KeyError: 'choices'")
    [row] = booked(ledger, "odd")
    assert not row.certain
    assert row.cost > 0


def test_a_key_that_a_server_repeats_stands_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(prompt: Prompt) -> Any:
        raise ModelError("account", f"HTTP 401 Incorrect API key provided: {KEY}", 401)

    opened = turnwise.Ledger(tmp_path / "ledger.sqlite")
    [said] = answers(
        RubricJudge(canaries=0, model=Scripted(say), rubric=RUBRIC),
        [GOOD],
        context(tmp_path, opened),
    )
    opened.close()
    assert "Incorrect API key provided: ***" in said.reason
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()


# Outages.


class Service(Scripted):
    """A model that takes a second, and is down between two moments."""

    def __init__(
        self,
        clock: AsyncClock,
        down: tuple[float, float],
        error: Callable[[], ModelError] | None = None,
    ) -> None:
        super().__init__(self._answer)
        self._clock, self._down, self.sent, self._at_once, self.most_at_once = (
            clock,
            down,
            [],
            0,
            [],
        )
        self._error = error or (lambda: ModelError("busy", "HTTP 529 Overloaded", 529))

    async def _answer(self, prompt: Prompt) -> Any:
        began = self._clock.now()
        self._at_once += 1
        try:
            await self._clock.sleep(1.0)
        finally:
            self.sent.append(began)
            self.most_at_once.append((began, self._at_once))
            self._at_once -= 1
        if self._down[0] <= began < self._down[1]:
            raise self._error()
        return verdict(prompt.bound, prompt.user)


def crowd(count: int) -> list[turnwise.Episode]:
    return [conversation(f"good answer number {i}", id=f"c{i}", seed=i) for i in range(count)]


def test_an_outage_costs_time_and_no_verdicts(clock: AsyncClock, tmp_path: Path) -> None:
    service = Service(clock, (10.0, 600.0))
    judge = RubricJudge(canaries=0, model=service, rubric=RUBRIC, cache=False, concurrency=8)
    said = answers(judge, crowd(200), context(tmp_path))
    assert {s.status for s in said} == {"scored"}
    during = [t for t in service.sent if 10 <= t < 600]
    assert len(during) <= 8 + 20, "those in flight, and probes ever more seldom"
    alone = [n for t, n in service.most_at_once if 20 < t < 600]
    assert set(alone) == {1}, "while it is open, one at a time"
    probes = sorted(t for t in service.sent if 20 < t < 600)
    assert all(later - one >= calls.COOL for one, later in itertools.pairwise(probes))
    after = [t for t in service.sent if t >= 600]
    assert min(after) <= 600 + calls.COOLEST + calls.LONGEST
    assert max(n for t, n in service.most_at_once if t >= 600) == 8, "once one got through, all may"


def test_patience_bounds_an_outage_that_does_not_end(clock: AsyncClock, tmp_path: Path) -> None:
    service = Service(clock, (0.0, 1e9))
    judge = RubricJudge(
        canaries=0, model=service, rubric=RUBRIC, cache=False, concurrency=8, patience=300.0
    )
    said = answers(judge, crowd(100), context(tmp_path))
    assert {s.status for s in said} == {"failed"}
    assert all(s.reason.startswith("busy: ") and "529" in s.reason for s in said)
    assert clock.time <= 300 + calls.COOLEST + 1
    assert len(service.sent) < 30


def test_a_queue_longer_than_patience_fails_nobody_where_the_model_answers(
    clock: AsyncClock, tmp_path: Path
) -> None:
    service = Service(clock, (0.0, 0.0))
    judge = RubricJudge(
        canaries=0, model=service, rubric=RUBRIC, cache=False, concurrency=2, patience=10.0
    )
    said = answers(judge, crowd(100), context(tmp_path))
    assert {s.status for s in said} == {"scored"}
    assert clock.time > 3 * 10.0, "several times the patience"


def test_an_error_of_the_account_stops_all_but_those_in_flight(
    clock: AsyncClock, tmp_path: Path
) -> None:
    service = Service(
        clock,
        (5.0, 1e9),
        lambda: ModelError("account", "HTTP 402 Your credit balance is too low.", 402),
    )
    judge = RubricJudge(canaries=0, model=service, rubric=RUBRIC, cache=False, concurrency=4)
    said = answers(judge, crowd(100), context(tmp_path))
    refused = [t for t in service.sent if t >= 5]
    assert 1 <= len(refused) <= 4, "those in flight"
    assert [s.status for s in said].count("scored") == len(service.sent) - len(refused)
    assert all("credit balance" in s.reason for s in said if s.status == "failed")


def test_failures_between_answers_open_nothing(clock: AsyncClock, tmp_path: Path) -> None:
    """One question that its server never answers does not hold up the others."""
    bad = "number 7"

    async def say(prompt: Prompt) -> Any:
        await clock.sleep(1.0)
        if bad in prompt.user:
            raise ModelError("server", "HTTP 500", 500)
        return verdict(prompt.bound, prompt.user)

    model = Scripted(lambda prompt: say(prompt))
    said = answers(
        RubricJudge(canaries=0, model=model, rubric=RUBRIC, cache=False, concurrency=2),
        crowd(60)[:60],
        context(tmp_path),
    )
    assert [s.status for s in said].count("failed") == 1
    assert sum(bad in p.user for p in model.prompts) == MANY


def test_at_a_server_that_is_down_only_probes_arrive(
    served: Any, clock: AsyncClock, tmp_path: Path
) -> None:
    """The same over sockets: after the first failures the server never sees two questions at
    once."""
    server, models = served
    seen: list[int] = []

    def down(asked: Asked) -> Fault | None:
        seen.append(server._at_once)
        return Fault("status", status=503) if len(seen) <= 20 else None

    server.faults = down
    judge = RubricJudge(
        canaries=0, model=models["messages"], rubric=RUBRIC, cache=False, concurrency=8
    )
    said = answers(judge, crowd(40), context(tmp_path))
    assert {s.status for s in said} == {"scored"}
    assert all(others == 0 for others in seen[8:20])


async def _cancelled(caller: calls.Caller, call: calls.Call) -> None:
    asked = asyncio.ensure_future(caller.verdict(call))
    await asyncio.sleep(0.05)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)


def test_who_goes_away_does_not_lose_what_is_paid_for(tmp_path: Path) -> None:
    """The answer to a question whose asker is gone is kept for the next one."""
    from turnwise.judges.asking.store import Account, Cache

    async def say(prompt: Prompt) -> Any:
        await asyncio.sleep(0.1)
        return verdict(prompt.bound, prompt.user)

    async def story() -> tuple[Any, int]:
        model = Scripted(lambda prompt: say(prompt))
        judge = RubricJudge(canaries=0, model=model, rubric=RUBRIC)
        [call] = judge.calls(turnwise.Request("episode", "e1", "j", episodes=(GOOD,)))
        account = Account(None, "run", "j", None, lambda: 0.0)
        caller = calls.Caller(model, "v", Cache(tmp_path / "c.sqlite"), account, PRICE)
        await _cancelled(caller, call)
        await asyncio.sleep(0.2)
        return await caller.verdict(call), len(model.prompts)

    found, asked = asyncio.run(story())
    assert (found.status, found.cached, asked) == ("scored", True, 1)


# A long run among faults, and a server that others wrote.

LETTERS = {
    "name": "letters",
    "criteria": [
        {"name": "e", "question": "How many letters are e?", "levels": [str(i) for i in range(10)]}
    ],
}
PASSING = [
    cell.fault
    for name, cell in MATRIX.items()
    if cell.then == 2 and cell.once == "scored" and "chat" in cell.wires
]
LASTING = [
    MATRIX[name].fault
    for name in ("400", "413", "422", "should not retry", "refusal", "filter", "context", "tool")
]


def worth_of_e(text: str) -> float:
    """Up to a share that is easily reached, so that whoever learns at all ends at the same
    place."""
    return min(1.0, text.count("e") / (1 + len(text)) / 0.15)


def counted(asked: Asked) -> dict[str, Any]:
    """Says how many letters of the replies are an e."""
    said = verdict(bound(asked), asked.user)
    [conversation] = [data for label, data in blocks(asked.user) if label == "conversation"]
    text = "".join(turn["reply"]["text"] for turn in conversation["turns"])
    return {**said, "levels": {"e": round(9 * worth_of_e(text))}}


@pytest.mark.slow
def test_200_updates_among_faults_end_where_they_end_without(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fifth request meets a fault of any kind. Compared is what the policy really says, what
    the letters of its replies are worth, over the last 50 updates: the two runs' means differ by
    less than a tenth of what was learned, or by less than three standard errors, those of the means
    of ten updates each."""
    import statistics

    from turnwise.engine.report.page import write_report

    monkeypatch.setattr(calls, "TIME", AsyncClock(0.001))

    def played(name: str, faults: Any) -> tuple[list[float], turnwise.Run, int]:
        with ModelServer(counted) as server:
            server.faults = faults
            judge = {
                "judge": "rubric", "canaries": 0, "rubric": LETTERS, "model": model("chat", server),
                "timeout": 0.5, "cache": str(tmp_path / f"{name}.sqlite"),
                "prices": {"openai-chat:judge-1": PRICE}, "max_tokens": 64,
            }  # fmt: skip
            stage = {
                "env": {"id": "test/Echo-v0", "kwargs": {"turns": 1}}, "updates": 200, "groups": 2,
                "group_size": 4, "max_new_tokens": 6,
                "poll": 0.0, "optimizer": {"name": "grpo", "lr": 3e-3, "warmup": 2},
                "feedback": [judge],
            }  # fmt: skip
            config = {
                "policy": str(model_folder()),
                "threads": 1,
                "seed": 0,
                "checkpoint_every": 100,
                "stages": [{"rl": stage}],
            }
            run = turnwise.Run(config, folder=tmp_path / name).finish()
        true: dict[int, list[float]] = {}
        for e in run.ledger.run_episodes(run.id):
            true.setdefault(e.update, []).append(worth_of_e("".join(t.action for t in e.turns)))
        return [statistics.fmean(true[u]) for u in sorted(true)], run, server.count()

    chance = random.Random(0)
    kinds = [*PASSING, *LASTING]
    clean, without, _ = played("without", ())
    faulty, among, sent = played(
        "among", lambda asked: chance.choice(kinds) if chance.random() < 0.2 else None
    )

    tens = [
        [statistics.fmean(run[i : i + 10]) for i in range(150, 200, 10)] for run in (clean, faulty)
    ]
    learned = statistics.fmean(tens[0]) - statistics.fmean(clean[:10])
    apart = abs(statistics.fmean(tens[0]) - statistics.fmean(tens[1]))
    error = math.sqrt(sum(statistics.variance(means) / len(means) for means in tens))
    print(f"learned {learned:.3f}, apart {apart:.3f}, standard error {error:.3f}")
    assert learned > 0.2
    assert apart < max(3 * error, 0.1 * learned)

    rates = [m["judge_failure_rate"] for m in among.metrics]
    assert sum(m["judge_failure_rate"] for m in without.metrics) == 0.0
    assert 0.005 < statistics.fmean(rates) < 0.15, "what lasts fails; what passes does not"
    assert len(booked(among.ledger, among.id)) == sent
    page = write_report(among.folder).read_text()
    assert "judge_failure_rate" in page
    for run in (without, among):
        run.ledger.close()


@pytest.mark.slow
def test_a_server_that_takes_a_schema_and_ignores_it_is_never_scored(tmp_path: Path) -> None:
    """`transformers serve` with random weights: garbage is failed, with its reason."""
    import os
    import socket
    import subprocess
    import sys
    import time
    import urllib.request

    from turnwise.judges.models.openai import OpenAI, OpenAIChat
    from turnwise.learning import build_policy

    program = Path(sys.executable).with_name("transformers")
    if not program.exists():
        pytest.skip("no `transformers` beside this Python")
    folder = build_policy(tmp_path / "tiny", [json.dumps(RUBRIC)] * 4, context=4096)
    (tmp_path / "hub").mkdir()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    start = [
        str(program),
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        str(folder),
    ]
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(start, stdout=log, stderr=log, env=env)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.1)
        for kind in (OpenAIChat, OpenAI):
            for schema in ("strict", "prompt"):
                asked = kind(str(folder), url=f"http://127.0.0.1:{port}/v1", schema=schema)
                judge = RubricJudge(
                    canaries=0,
                    model=asked,
                    rubric=RUBRIC,
                    cache=False,
                    max_tokens=32,
                    patience=20.0,
                    timeout=60.0,
                )
                said = answers(judge, crowd(2), context(tmp_path))
                for one in said:
                    assert (one.status, one.score) == ("failed", None)
                    assert one.reason.startswith(
                        ("truncated: ", "unreadable, also when asked again: ")
                    ), one.reason
    finally:
        server.terminate()
        server.wait(20)
