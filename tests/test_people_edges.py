"""Forms in every alphabet and length, and a service that strangers cannot fill, forge or block."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from contextlib import suppress
from html import unescape
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa
import turnwise
import uvicorn
import yaml
from support.episodes import conversation
from support.rating import RUN, Client, groups, heard, serving, study
from turnwise.plugins.human import raters, tasks
from turnwise.plugins.human.source import People
from turnwise.plugins.human.tables import EVENTS, ITEMS, LEASES, metadata
from turnwise.plugins.human.web import serve, service
from turnwise.plugins.human.web.app import make_app
from turnwise.plugins.human.web.service import NOTED
from turnwise.running import keep

PLAIN = {"gold_share": 0.0, "random_share": 0.0, "undo": 0.0}


NAMES = [
    "全体　評価",
    "qualité\u00a0du ton",
    "👩\u200d💻 tone",
    "a\u200bb",
    "x" * 300,
    "a\"b'<i>&amp;",
    "ملاءمة",
    "a-b=c&d",
    "%41",
    "first_wrong",
]


def test_aspects_and_strata_of_any_name_can_be_answered(ledger: turnwise.Ledger) -> None:
    spec = {"task": "score", "aspects": NAMES, "strata": {n: [n, "other"] for n in NAMES}, **PLAIN}
    sources = study(ledger, spec, played=groups(1, 1))
    with serving(ledger) as base:
        ada = Client(base, ledger, "Ada")
        ada.get("/me")
        assert all(f'<option value="{n}"' in unescape(ada.page.text) for n in NAMES)
        ada.send("/me", {"csrf": ada.csrf, **{f"stratum-{n}": n for n in NAMES}})
        assert raters.everybody(ledger, RUN)[0].strata == {n: n for n in NAMES}
        ada.send(f"/task/{ada.task}", {"csrf": ada.csrf, **{f"aspect-{n}": "4" for n in NAMES}})
    [said] = heard(ledger, sources)
    assert said.aspects == dict.fromkeys(NAMES, 0.75)


@pytest.mark.parametrize("bad", ["", "  ", "a\nb", "a\0", "\ud800", "\u200b"])
def test_a_name_that_no_form_can_send_is_refused_when_the_config_is_read(bad: str) -> None:
    for options in (
        {"aspects": ["tone", bad]},
        {"strata": {bad: ["a", "b"]}},
        {"strata": {"lang": ["a", bad]}},
    ):
        with pytest.raises(ValueError, match="no name a form can send|is invisible"):
            People(task="score", **options)


def test_what_yaml_takes_for_something_else_is_a_text() -> None:
    strata = yaml.safe_load(
        "{age: [18, 2.5], smoker: [yes, no], since: [2024-01-31, null], lang: ['A ', B], 7: [a]}"
    )
    assert People(strata=strata).strata == {
        "age": ["18", "2.5"], "smoker": ["True", "False"], "since": ["2024-01-31", "None"],
        "lang": ["A", "B"], "7": ["a"],
    }  # fmt: skip
    for twice in (["a", "a "], [1, "1"]):
        with pytest.raises(ValueError, match="there twice"):
            People(strata={"x": twice})
    with pytest.raises(ValueError, match="a list of texts"):
        People(strata={"x": "abc"})


@pytest.mark.parametrize("what", ["answer", "draft", "skip"])
def test_a_conversation_of_a_thousand_replies_can_be_answered(
    ledger: turnwise.Ledger, what: str
) -> None:
    long = conversation(
        *(f"a{i}" for i in range(1200)), heard=[f"q{i}" for i in range(1200)], id="long"
    )
    study(ledger, {"task": "mark", **PLAIN}, played={long.group: [long]})
    with serving(ledger) as base:
        ada = Client(base, ledger, "Ada")
        ada.get("/")
        form = {"csrf": ada.csrf, "first_wrong": "3", "why": "too long"} | {
            f"turn-{i}": "" for i in range(1200)
        }
        assert (
            ada.send(f"/task/{ada.task}" + {"answer": ""}.get(what, f"/{what}"), form).status_code
            < 300
        )


def test_a_comment_is_as_long_as_the_browser_says(ledger: turnwise.Ledger) -> None:
    study(ledger, {"task": "compare", **PLAIN}, played=groups(2, 2))
    with serving(ledger) as base:
        ada = Client(base, ledger, "Ada")
        ada.get("/")
        for comment, fits in (
            ("😀" * 5001, False),
            ("😀" * 5000, True),
            ("a" * 10_001, False),
            (("a" * 98 + "\r\n") * 101, True),
        ):
            ada.send(f"/task/{ada.task}", {"csrf": ada.csrf, "preference": "1", "comment": comment})
            assert ("too long" not in ada.page.text) == fits


def test_nobody_forges_log_lines_or_fills_the_records(
    ledger: turnwise.Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(ledger) as base, caplog.at_level(logging.WARNING, "turnwise.rate"):
        ada = Client(base, ledger, "Ada")
        for _ in range(NOTED + 10):
            assert ada.post(
                "/task/x%0AINFO%20all%20is%20well%1B%5B2J/draft", csrf="wrong"
            ).status_code in (403, 404)
            assert ada.post("/task/x/draft", csrf="wrong").status_code == 403
    with ledger.reading() as db:
        notes = list(db.scalars(sa.select(EVENTS.c.detail).where(EVENTS.c.kind == "refused")))
    assert len(notes) == NOTED
    for line in [*notes, *(r.getMessage() for r in caplog.records)]:
        assert line.isprintable()


def test_links_are_made_for_no_foreign_host(ledger: turnwise.Ledger) -> None:
    with serving(ledger) as base:
        lea = Client(base, ledger, "Lea", "lead")
        lea.get("/lead")
        form = {"csrf": lea.csrf, "name": "Bo"}
        assert lea.send("/lead/raters", form, {"host": "evil.example"}).status_code == 422
        assert [p.name for p in raters.everybody(ledger, RUN)] == ["Lea"], "nobody was invited"
        assert f"{base}/enter?link=" in lea.send("/lead/raters", form).text


def test_a_wrong_link_keeps_nobody_waiting(ledger: turnwise.Ledger) -> None:
    keep(ledger, metadata)
    # Somebody writes; who has no link does not wait for it.
    with ledger.writing(), pytest.raises(raters.NoEntry):
        raters.enter(ledger, RUN, "guessed")


def test_half_open_connections_make_room(
    ledger: turnwise.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "WAITING", 50)
    monkeypatch.setattr(serve, "PATIENCE", 1.0)
    app = make_app(ledger, RUN)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_level="error", http=serve.Patient, limit_concurrency=serve.ANSWERED
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        half = [socket.create_connection(("127.0.0.1", port)) for _ in range(80)]
        for connection in half[:40]:
            try:
                connection.sendall(b"POST /enter HTTP/1.1\r\nHost: x\r\n")
            except OSError:  # it had to make room already
                continue
        assert httpx2.get(f"http://127.0.0.1:{port}/healthz", timeout=60).json() == {"status": "ok"}
        half[-1].settimeout(60)
        with suppress(ConnectionResetError):
            assert half[-1].recv(1) == b"", "closed when its time is over"
        server.should_exit = True
        thread.join(60)
        for connection in half:
            connection.close()


def test_the_count_of_everybody_does_not_tell_gold(
    ledger: turnwise.Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever works alone, and slowly, sees the line move after every answer or after none."""
    monkeypatch.setattr(service, "COUNT", 0.0)
    path = tmp_path / "gold.jsonl"
    says = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    said = [
        {
            "prompt": says("user", f"q{i}"),
            "chosen": says("assistant", "upright"),
            "rejected": says("assistant", "crooked"),
        }
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in said), encoding="utf-8")
    options = {"gold": str(path), "gold_share": 0.5, "random_share": 0.0, "undo": 0.0}
    study(ledger, {"task": "compare", **options}, played=groups(4, 2))
    with serving(ledger) as base:
        ada = Client(base, ledger, "Ada")
        ada.get("/")
        for done in range(1, 9):
            if ada.task is None:  # gold is drawn by lot, and none comes after the last work
                break
            first, second = ada.page.text.find("upright"), ada.page.text.find("crooked")
            # Gold is answered right: wrong gold may be tried again.
            right = "2" if 0 <= second < first else "-2"
            ada.send(f"/task/{ada.task}", {"csrf": ada.csrf, "preference": right})
            line = ada.get("/progress").text
            assert re.findall(r"everybody, of late, (\d+)<", line) == [str(done)]
            assert "<progress" not in line
            ada.get("/")
    with ledger.reading() as db:
        gold = db.scalars(
            sa.select(ITEMS.c.gold.is_not(None)).join(LEASES, LEASES.c.item == ITEMS.c.id)
        ).all()
    assert gold.count(False) == 4
    assert gold.count(True) >= 1


def test_names_that_are_too_long_for_a_form_are_refused() -> None:
    for options in ({"aspects": ["😀" * 20_001]}, {"strata": {"x": ["a" * 10_001, "b" * 10_000]}}):
        with pytest.raises(ValueError, match="more than a form can send"):
            People(task="score", **options)  # type: ignore[arg-type]
    assert People(task="score", aspects=["😀" * 20_000]).aspects


@pytest.mark.parametrize(
    "form",
    [
        {"turn-1": "bad"},
        {"turn-0": "good", "turn-1": "bad"},
        {"first_wrong": "1"},
        {"first_wrong": "none"},
    ],
)
def test_a_mark_agrees_with_the_gold_that_is_made_of_it(form: dict[str, str]) -> None:
    shown = (conversation("a", "b", heard=["q", "and?"]),)
    said = tasks.read("mark", form, shown, (), 5, {})
    assert tasks.agrees(said, tasks.known(said))
    assert not tasks.agrees(said, {"first_wrong": 0})
