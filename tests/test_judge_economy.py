"""What judging costs: nothing is asked twice, no budget is exceeded, nothing is paid for twice
whatever happens, and secrets stay where they are."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import turnwise
import yaml
from support.clock import AsyncClock
from support.episodes import conversation
from support.judges import (
    KEY,
    PRICE,
    RUBRIC,
    WIRES,
    Scripted,
    answers,
    booked,
    context,
    dollars,
    model,
    unbiased,
)
from support.model_server import Fault, ModelServer, Received
from turnwise.engine.errors import ConfigError
from turnwise.judges.asking import calls
from turnwise.judges.asking.prices import BATCH, PRICES, cost, price_of
from turnwise.judges.asking.store import VERDICTS, Cache
from turnwise.judges.llm.rubric_judge import RubricJudge
from turnwise.judges.models.model import Prompt, Reply, Usage
from turnwise.learning import build_policy
from typer.testing import CliRunner

pytest.importorskip("anthropic")
pytest.importorskip("openai")

# Dollars per million tokens, with which about a hundred of the questions below cost one dollar.
CHEAP = [10.0, 30.0]


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer(unbiased) as server:
        yield server


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> AsyncClock:
    clock = AsyncClock(0.02)
    monkeypatch.setattr(calls, "TIME", clock)
    return clock


def pipeline(
    server: ModelServer, cache: Path, *, updates: int = 1, groups: int = 4, **judge: Any
) -> dict[str, Any]:
    """Scripted players in the support desk, compared two by two."""
    feedback = {
        "judge": "pairwise", "canaries": 0, "rubric": "Which customer was served better?",
        "cache": str(cache), "max_tokens": 64,
        "model": {"provider": "openai-chat", "model": "judge-1", "url": f"{server.url}/v1",
            "api_key": KEY}, **judge,
    }  # fmt: skip
    env = {
        "env": "turnwise/SupportDesk-v0",
        "players": ["expert", "random"],
        "group_size": 2,
        "groups": groups,
    }
    return {
        "name": "run",
        "policy": str(
            build_policy(cache.parent / "policy", ["hello there"] * 3, hidden=16, layers=1)
        ),
        "stages": [{"rank": {**env, "updates": updates, "feedback": [feedback], "poll": 0.0}}],
    }


def said(run: turnwise.Run) -> list[Any]:
    """What a run's judge said, without what tells runs apart."""
    slots = {e.id: e.slot for e in run.ledger.run_episodes(run.id)}
    found = [
        ([sorted(slots[e] for e in tier) for tier in c.ranking], c.status)
        for c in run.ledger.feedback(run=run.id, kind="comparison", status="scored", late=True)
    ]
    return sorted(found, key=str)


def test_the_same_question_twice_at_once_is_paid_for_once(
    server: ModelServer, tmp_path: Path
) -> None:
    ledger = turnwise.Ledger(tmp_path / "ledger.sqlite")
    judge = RubricJudge(
        canaries=0,
        model=model("chat", server),
        rubric=RUBRIC,
        prices={"openai-chat:judge-1": PRICE},
    )
    two = answers(
        judge,
        [conversation("good", id="e1"), conversation("good", id="e2", slot=1)],
        context(tmp_path, ledger),
    )
    assert [s.score for s in two] == [two[0].score] * 2
    assert server.count() == 1
    assert sorted(s.stamp.cost > 0 for s in two) == [False, True]
    assert sum(s.stamp.cost for s in two) == pytest.approx(dollars(server.tokens))
    answers(
        judge,
        [conversation("good", id="e3", slot=2, run="another", update=7)],
        context(tmp_path, ledger),
    )
    assert server.count() == 1, "nor ever again"
    ledger.close()


def test_a_second_run_of_the_same_asks_nothing(server: ModelServer, tmp_path: Path) -> None:
    config = pipeline(server, tmp_path / "cache.sqlite")
    one = turnwise.Run(config, folder=tmp_path / "one").finish()
    asked = server.count()
    assert asked == 8, "four pairs in both orders"
    two = turnwise.Run(config, folder=tmp_path / "two").finish()
    assert server.count() == asked
    assert said(one) == said(two) != []
    assert two.metrics[0]["spend"] == 0.0
    other = json.loads(json.dumps(config).replace("served better", "happier"))
    turnwise.Run(other, folder=tmp_path / "three").finish()
    assert server.count() == 2 * asked, "another rubric is another question"


def test_a_budget_is_not_exceeded_and_a_paused_run_goes_on_without_paying_twice(
    server: ModelServer, tmp_path: Path
) -> None:
    prices = {"openai-chat:judge-1": CHEAP}
    config = pipeline(
        server, tmp_path / "cache.sqlite", groups=100, budget=1.0, prices=prices, concurrency=8
    )
    path = tmp_path / "pipeline" / "run.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(config))
    from turnwise.engine.cli.main import app

    folder = tmp_path / "run"
    with warnings.catch_warnings():  # the command line says it in its own words
        ended = CliRunner().invoke(
            app, ["run", str(path), "--folder", str(folder)], obj=turnwise.Plugins()
        )
    assert ended.exit_code == 3, ended.output
    assert "Paused after update 0" in ended.output
    assert "has spent" in ended.output
    assert "--resume" in ended.output

    def spent() -> float:
        return (server.tokens.input * CHEAP[0] + server.tokens.output * CHEAP[1]) / 1e6

    assert 0.9 < spent() <= 1.0, "counted at the server"
    assert 60 < server.count() < 200
    first = server.count()
    with pytest.warns(UserWarning, match=r"of its budget of 1"):
        still = turnwise.Run(config, folder=folder, resume=True).finish()
    assert still.paused
    assert server.count() == first, "nothing more is sent before there is money"

    more = json.loads(json.dumps(config))
    more["stages"][0]["rank"]["feedback"][0]["budget"] = 10.0
    done = turnwise.Run(more, folder=folder, resume=True).finish()
    assert not done.paused
    differ = [
        c
        for c in done.ledger.feedback(run=done.id, kind="comparison", status="scored", late=True)
        if not c.details.get("same")
    ]
    asked = server.count()
    assert asked == 2 * len(differ) > 190, "each pair in both orders, each order once"
    rows = booked(done.ledger, done.id)
    assert len(rows) == asked
    assert sum(row.cost for row in rows) == pytest.approx(spent())
    whole = turnwise.Run(
        pipeline(server, tmp_path / "cache.sqlite", groups=100), folder=tmp_path / "whole"
    ).finish()
    assert said(done) == said(whole)
    assert server.count() == asked

    for key, value in (("rubric", "Which customer is happier?"), ("max_tokens", 128)):
        changed = json.loads(json.dumps(more))
        changed["stages"][0]["rank"]["feedback"][0][key] = value
        changed["stages"][0]["rank"]["updates"] = 2
        with pytest.raises(ConfigError, match="feedback"):
            turnwise.Run(changed, folder=folder, resume=True).finish()
    for file in [*folder.rglob("*"), tmp_path / "cache.sqlite"]:
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), (
            f"the key stands in {file}"
        )


def test_a_budget_holds_against_answers_of_any_length_and_requests_that_are_lost(
    tmp_path: Path, clock: AsyncClock
) -> None:
    """The dearest answers there can be, some of them lost: what was put aside is what they cost."""
    from turnwise.judges.asking.store import Account
    from turnwise.judges.models.model import ModelError, Reply

    sent: list[float] = []

    async def say(prompt: Prompt) -> Any:
        await clock.sleep(1.0)
        size = len((prompt.system + prompt.user).encode())
        sent.append(cost(Usage(fresh=size, output=prompt.max_tokens), PRICE))
        if len(sent) % 3 == 0:
            raise ModelError("connection", "reset", lost=True)
        return Reply("refused", "", Usage(fresh=size, output=prompt.max_tokens), "no")

    judge = RubricJudge(
        canaries=0,
        model=Scripted(lambda p: say(p)),
        rubric=RUBRIC,
        cache=False,
        budget=0.5,
        prices={"scripted:1": PRICE},
    )
    judge.open(context(tmp_path))
    judge.request(
        [
            turnwise.Request(
                "episode", f"e{i}", "j", episodes=(conversation(f"{i} " * 50, id=f"e{i}", seed=i),)
            )
            for i in range(200)
        ]
    )
    account: Account = judge._caller.account
    with pytest.raises(turnwise.engine.errors.Paused, match="give it a larger `budget`"):
        while True:
            judge.receive()
            assert account.spent + account.reserved <= 0.5 + 1e-9
    assert 0.4 < sum(sent) <= account.spent <= 0.5
    assert account.reserved == 0.0
    judge.close()


def test_prices(tmp_path: Path) -> None:
    assert price_of("openai:gpt-5-mini", {}) == PRICES["openai:gpt-5-mini"]
    assert price_of("openai-chat:gpt-5-mini", {}) == PRICES["openai:gpt-5-mini"]
    assert price_of("openai:gpt-5-mini-2025-08-07", {}) == PRICES["openai:gpt-5-mini"]
    assert (
        price_of("anthropic:claude-haiku-4-5-20251001", {}) == PRICES["anthropic:claude-haiku-4-5"]
    )
    assert price_of("openai:gpt-5-mini", {"openai:gpt-5-mini": [1, 2]}) == (1, 1, 1, 2)
    assert price_of("x:y", {"x:y": [1, 2, 3, 4]}) == (1, 2, 3, 4)
    assert price_of("local:folder", {}) == (0, 0, 0, 0)
    assert price_of("x:z", {"x:y": [1, 2]}) is None
    assert price_of("openai:gpt-5-minimal", {}) is None, "another model whose name begins alike"
    # 1000 fresh at 3, 2000 read at 0.3, 400 written at 3.75, 100 output at 15 dollars per million
    assert cost(Usage(1000, 2000, 400, 100), PRICE) == pytest.approx(
        0.003 + 0.0006 + 0.0015 + 0.0015
    )
    assert cost(Usage(1000, 2000, 400, 100), PRICE, batch=True) == pytest.approx(0.0033)
    for wrong in ([1], [1, 2, 3], [-1, 2], 5, ["a", 2], [float("nan"), 1]):
        with pytest.raises(ValueError, match="the price of 'x:y' must be"):
            price_of("x:y", {"x:y": wrong})  # type: ignore[dict-item]
    with pytest.raises(
        ValueError,
        match=r"the price of scripted:1 is unknown.*prices: \{'scripted:1': \[input, output\]\}",
    ):
        RubricJudge(canaries=0, model=Scripted(), rubric=RUBRIC, budget=1.0)
    with pytest.raises(ValueError, match="budget must be positive"):
        RubricJudge(
            canaries=0, model=Scripted(), rubric=RUBRIC, budget=0.0, prices={"scripted:1": [1, 2]}
        )


@pytest.mark.parametrize("wire", WIRES)
def test_what_a_provider_keeps_of_the_instructions_is_priced_as_such(
    wire: str, server: ModelServer, tmp_path: Path
) -> None:
    server.prefix = 512
    ledger, asked = turnwise.Ledger(tmp_path / "ledger.sqlite"), model(wire, server)
    judge = RubricJudge(
        canaries=0,
        model=asked,
        rubric=RUBRIC,
        cache=False,
        prices={asked.name: PRICE},
        concurrency=1,
    )
    said = answers(
        judge,
        [conversation("good " * i, id=f"e{i}", seed=i) for i in range(5)],
        context(tmp_path, ledger),
    )
    assert len({r.asked.system for r in server.requests}) == 1, (
        "byte for byte the same, or nothing is kept"
    )
    rows = booked(ledger, "run")
    assert [row.read > 0 for row in rows] == [False, True, True, True, True]
    assert [row.written > 0 for row in rows] == [wire == "messages", False, False, False, False]
    assert sum(row.read for row in rows) == server.tokens.cached
    assert sum(row.cost for row in rows) == pytest.approx(dollars(server.tokens))
    assert sum(s.stamp.cost for s in said) == pytest.approx(dollars(server.tokens))
    ledger.close()


# Batches.

BATCHING = ("messages", "responses", "chat")


def six() -> list[turnwise.Episode]:
    return [conversation("good " * i, id=f"e{i}", seed=i) for i in range(6)]


def scores(said: list[Any]) -> list[float | None]:
    return [s.score for s in said]


@pytest.fixture
def alone(tmp_path: Path) -> list[float | None]:
    """What the conversations are worth, asked singly."""
    return scores(
        answers(
            RubricJudge(canaries=0, model=Scripted(), rubric=RUBRIC, cache=False),
            six(),
            context(tmp_path),
        )
    )


@pytest.mark.parametrize("wire", BATCHING)
def test_a_batch_costs_half(
    wire: str, server: ModelServer, clock: AsyncClock, alone: Any, tmp_path: Path
) -> None:
    ledger, asked = turnwise.Ledger(tmp_path / "ledger.sqlite"), model(wire, server)
    judge = RubricJudge(
        canaries=0, model=asked, rubric=RUBRIC, batch=True, prices={asked.name: PRICE}, budget=1.0
    )
    said = answers(judge, six(), context(tmp_path, ledger))
    assert scores(said) == alone, "whatever order results come in"
    assert len(server.billed_batch_items) == 6
    assert server.stats()["batches"] == 1
    assert server.stats()["questions"] == 0
    assert sum(row.cost for row in booked(ledger, "run")) == pytest.approx(
        dollars(server.batch_tokens, BATCH)
    )
    assert sum(s.stamp.cost for s in said) == pytest.approx(dollars(server.batch_tokens, BATCH))
    assert judge._caller.account.reserved == 0.0
    answers(judge, six(), context(tmp_path, ledger))
    assert len(server.billed_batch_items) == 6
    ledger.close()


ITEMS = {
    "expired": (Fault("expired"), 1),
    "overloaded": (Fault("status", status=529), 1),
    "cut off": (Fault("truncated"), 1),
    "not in form": (Fault("extra_text"), 1),
    "wrong": (Fault("status", status=400), 0),
}


@pytest.mark.parametrize("name", ITEMS)
@pytest.mark.parametrize("wire", BATCHING)
def test_what_a_batch_leaves_over_is_asked_by_itself(
    wire: str, name: str, server: ModelServer, clock: AsyncClock, alone: Any, tmp_path: Path
) -> None:
    fault, singly = ITEMS[name]
    server.faults = lambda asked: (
        fault if asked.custom_id and "good good good good good" in asked.user else None
    )
    ledger, asked = turnwise.Ledger(tmp_path / "ledger.sqlite"), model(wire, server)
    judge = RubricJudge(
        canaries=0, model=asked, rubric=RUBRIC, batch=True, prices={asked.name: PRICE}
    )
    said = answers(judge, six(), context(tmp_path, ledger))
    assert scores(said[:5]) == alone[:5]
    assert server.stats()["questions"] == singly
    assert (said[5].status, said[5].score) == (("scored", alone[5]) if singly else ("failed", None))
    paid = dollars(server.batch_tokens, BATCH) + dollars(server.tokens)
    assert sum(row.cost for row in booked(ledger, "run")) == pytest.approx(paid)
    ledger.close()


@pytest.mark.parametrize("fault", ["reset", "cut", "empty", "not_json", "status"])
@pytest.mark.parametrize("wire", BATCHING)
def test_a_batch_whose_acknowledgement_is_lost_is_found_again(
    wire: str, fault: str, server: ModelServer, clock: AsyncClock, alone: Any, tmp_path: Path
) -> None:
    failed = set[str]()

    def first(received: Received) -> Fault | None:
        """Every kind of request fails once: uploads, submissions, looks, lists, results."""
        kind = (
            f"{received.method} {received.path.rsplit('_')[0]} {received.path.rsplit('/')[-1][:7]}"
        )
        if kind in failed:
            return None
        failed.add(kind)
        return Fault("status", status=503) if fault == "status" else Fault(fault)

    server.call_faults = first
    ledger, asked = turnwise.Ledger(tmp_path / "ledger.sqlite"), model(wire, server)
    judge = RubricJudge(
        canaries=0, model=asked, rubric=RUBRIC, batch=True, prices={asked.name: PRICE}
    )
    said = answers(judge, six(), context(tmp_path, ledger))
    assert scores(said) == alone, [s.reason for s in said]
    assert len(failed) >= 3
    assert len(server.billed_batch_items) == 6
    assert server.stats()["questions"] == 0
    ledger.close()


@pytest.mark.parametrize("wire", ["messages", "responses"])
def test_a_batch_that_cannot_be_looked_at_is_not_asked_singly_and_is_found_later(
    wire: str, server: ModelServer, clock: AsyncClock, alone: Any, tmp_path: Path
) -> None:
    server.call_faults = lambda r: Fault("status", status=500) if r.method == "GET" else None
    ledger, asked = turnwise.Ledger(tmp_path / "ledger.sqlite"), model(wire, server)
    judge = RubricJudge(
        canaries=0,
        model=asked,
        rubric=RUBRIC,
        batch=True,
        prices={asked.name: PRICE},
        patience=300.0,
    )
    said = answers(judge, six(), context(tmp_path, ledger))
    assert {s.status for s in said} == {"failed"}
    assert server.stats()["questions"] == 0
    server.call_faults = ()
    said = answers(judge, six(), context(tmp_path, ledger))
    assert scores(said) == alone
    assert len(server.billed_batch_items) == 6
    assert sum(row.cost for row in booked(ledger, "run")) == pytest.approx(
        dollars(server.batch_tokens, BATCH)
    )
    ledger.close()


def test_what_is_asked_while_a_batch_is_at_work_goes_into_another(
    server: ModelServer, clock: AsyncClock, tmp_path: Path
) -> None:
    server.batch_polls = None
    ledger = turnwise.Ledger(tmp_path / "ledger.sqlite")
    judge = RubricJudge(canaries=0, model=model("messages", server), rubric=RUBRIC, batch=True)
    judge.open(context(tmp_path, ledger))
    for i, e in enumerate(six()[:2]):
        judge.request([turnwise.Request("episode", e.id, "judge", episodes=(e,))])
        for _ in range(5000):
            if server.stats()["batches"] == i + 1:
                break
            judge.receive()
    assert server.stats()["batches"] == 2, "the second does not wait for the first"
    server.finish_batches()
    heard: list[Any] = []
    while len(heard) < 2:
        heard += judge.receive()
    assert {s.status for s in heard} == {"scored"}
    judge.close()
    ledger.close()


def test_a_process_that_is_killed_pays_for_its_batch_once(
    server: ModelServer, alone: Any, tmp_path: Path
) -> None:
    jobs = [
        f"{wire}:{moment}"
        for wire in ("messages", "responses")
        for moment in ("submitted", "waiting")
    ]
    worker = [
        sys.executable,
        "-m",
        "support.judge_worker",
        server.url,
        str(tmp_path),
        *jobs,
    ]
    done = subprocess.run(worker, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    costs = 0.0
    for job in jobs:
        name = job.replace(":", "-")
        found = json.loads((tmp_path / name / "said.json").read_text())
        assert [score for score, _ in found] == alone, job
        assert sum(asked.model == name for asked in server.billed_batch_items) == 6, job
        costs += sum(cost for _, cost in found)
    assert server.stats()["batches"] == len(jobs)
    assert server.stats()["questions"] == 0
    assert costs == pytest.approx(dollars(server.batch_tokens, BATCH))


def test_batches_need_a_model_that_has_them_and_a_run(server: ModelServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scripted:1 has no batches"):
        RubricJudge(canaries=0, model=Scripted(), rubric=RUBRIC, batch=True)
    judge = RubricJudge(canaries=0, model=model("chat", server), rubric=RUBRIC, batch=True)
    with pytest.raises(ValueError, match="batches need a run"):
        judge.open(context(tmp_path))


def test_a_cache_keeps_what_was_said_first_and_no_failure(tmp_path: Path) -> None:
    from turnwise.judges.asking.store import Verdict

    cache = Cache(tmp_path / "c.sqlite")
    cache.put("a", Verdict("failed", {}, "no answer"), 0.0)
    assert cache.get("a") is None
    cache.put("a", Verdict("scored", {"level": 1}), 0.0)
    cache.put("a", Verdict("scored", {"level": 2}), 1.0)
    found = cache.get("a")
    assert found is not None
    assert (found.payload, found.cached, found.cost) == ({"level": 1}, True, 0.0)
    with cache.reading() as db:
        assert db.scalar(sa.select(sa.func.count()).select_from(VERDICTS)) == 1


def test_keys_stand_in_no_message_about_a_model() -> None:
    from turnwise.engine.errors import PluginError

    with pytest.raises(PluginError) as error:
        RubricJudge(
            canaries=0, model={"provider": "openai", "api_key": "my-own-secret"}, rubric=RUBRIC
        )
    assert "my-own-secret" not in str(error.value)
    judge = RubricJudge(
        canaries=0,
        model={"provider": "openai", "model": "m", "api_key": "my-own-secret"},
        rubric=RUBRIC,
    )
    assert "my-own-secret" not in judge.version


def test_a_server_of_ones_own_costs_nothing_unless_it_has_a_price() -> None:
    free = (0, 0, 0, 0)
    for url in (
        "http://localhost:8000/v1",
        "http://127.0.0.1:1/v1",
        "http://10.1.2.3/v1",
        "http://[::1]:80/",
        "http://gpu-box/v1",
    ):
        assert price_of("openai-chat:qwen3-8b", {}, url) == free
        assert price_of("openai-chat:qwen3-8b", {"openai-chat:qwen3-8b": [1, 2]}, url) == (
            1,
            1,
            1,
            2,
        )
    assert price_of("openai-chat:grok", {}, "https://api.example.com/v1") is None
    assert (
        price_of("openai:gpt-5-mini", {}, "http://127.0.0.1:1/v1") == PRICES["openai:gpt-5-mini"]
    ), "a proxy to it"


def test_verdicts_that_are_forgotten_are_asked_for_again(tmp_path: Path) -> None:
    import typer
    from turnwise.judges.asking.store import Cache, Verdict

    plugins, app = turnwise.Plugins(), typer.Typer()
    plugins.call_commands(app)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("stages: []\n")
    cache = Cache(tmp_path / "judges.sqlite")
    for k, (status, who) in enumerate(
        [("scored", "a"), ("abstained", "a"), ("abstained", "b-2026"), ("scored", "b-2026")]
    ):
        cache.put(str(k), Verdict(status, {}, model=who), now=float(k))  # type: ignore[arg-type]
    left = lambda: [k for k in range(4) if cache.get(str(k)) is not None]  # noqa: E731
    asked = ["judges", str(tmp_path / "run")]
    for more, kept in (
        (["--forget", "abstained", "--model", "openai:a"], [0, 2, 3]),
        (["--forget", "abstained"], [0, 3]),
    ):
        done = CliRunner().invoke(app, [*asked, *more], obj=plugins)
        assert done.exit_code == 0, done.output
        assert "Forgot 1 verdicts" in done.output
        assert left() == kept
    assert cache.forget(since=3.0) == 1
    assert left() == [0]
    wrong = CliRunner().invoke(
        app, [*asked, "--forget", "all", "--cache", str(tmp_path / "none.sqlite")], obj=plugins
    )
    assert wrong.exit_code != 0
    assert not (tmp_path / "none.sqlite").exists()
    assert (
        CliRunner()
        .invoke(app, ["judges", str(tmp_path / "no-run"), "--forget", "all"], obj=plugins)
        .exit_code
        != 0
    )


def test_what_is_waited_for_says_why(tmp_path: Path) -> None:
    """The note of a judge whose server is out says so, without the key that the server repeats."""
    from turnwise.judges.asking.calls import Circuit
    from turnwise.judges.models.model import ModelError

    circuit = Circuit()
    assert circuit.trouble == ""
    circuit.record(ModelError("server", "HTTP 500: no room for Bearer Hunter2Secret", 500))
    assert circuit.trouble == "server: HTTP 500: no room for Bearer ***"
    circuit.record(Reply("end", "{}"))
    assert circuit.trouble == ""
    assert RubricJudge.gives == "verdicts"
