"""The rating service from outside: what it refuses, what it shows of hostile text, and that nothing
makes it fall over."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from html import unescape
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
import turnwise
from support.command import Command
from support.episodes import conversation
from support.rating import RUN, Client, groups, heard, serving, study
from turnwise.engine.pipeline.folder import open_ledger
from turnwise.plugins.human import raters
from turnwise.plugins.human.desk import Desk
from turnwise.plugins.human.tables import EVENTS, LEASES, RATERS
from turnwise.plugins.human.web.app import make_app
from turnwise.plugins.human.web.render import markdown, plain
from turnwise.plugins.human.web.service import cookie_name, place_of

COOKIE = cookie_name(RUN)
PLAIN = {"gold_share": 0.0, "random_share": 0.0, "undo": 0.0}
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)><svg onload=alert(3)>"
    " [click](javascript:alert(4)) [data](data:text/html,<b>) ![pixel](https://evil.example/p.png)"
    " <style>body{display:none}</style> \x1b[2J\x1b]0;title\x07 \x00 \u202egnp.exe \ud800"
    " </li></ol></form><form action=https://evil.example><input name=csrf> {{7*7}} {% include"
    " '/etc/passwd' %} ' OR 1=1; DROP TABLE episodes; -- <iframe src=//evil.example></iframe>"
    " \x9b31m <a href='https://evil.example' onclick=alert(5)>x</a>"
)


def notes(ledger: turnwise.Ledger) -> list[str]:
    with ledger.reading() as db:
        return list(
            db.scalars(
                sa.select(EVENTS.c.detail).where(EVENTS.c.kind == "refused").order_by(EVENTS.c.id)
            )
        )


@pytest.mark.parametrize("task", ["rank", "compare", "score", "mark"])
def test_a_rater_rates_until_nothing_is_left(ledger: turnwise.Ledger, task: str) -> None:
    sources = study(
        ledger,
        {"task": task, "instructions": "# Be *fair*\n<b>and kind</b>", **PLAIN},
        played=groups(2, 2),
    )
    with serving(ledger) as base:
        ada = Client(base, ledger, "Ada")
        assert ada.page.url.path == "/instructions"
        assert "Be <em>fair</em>" in ada.page.text
        assert "&lt;b&gt;" in ada.page.text
        ada.get("/")
        while ada.task:
            ada.send(f"/task/{ada.task}", ada.fill(random.Random(1)))
            assert ada.page.status_code == 200
            assert "Saved." in ada.page.text or "Nothing to rate" in ada.page.text
    said = heard(ledger, sources)
    assert (
        len(said)
        == len(ledger.feedback(run=RUN, kind="comparison", status="scored", late=True))
        + sum(isinstance(a, turnwise.Feedback) for a in said)
        > 1
    )
    assert ledger.open_requests() == []


def test_what_is_missing_is_said_and_nothing_is_lost(ledger: turnwise.Ledger) -> None:
    study(ledger, {"task": "score", **PLAIN}, played=groups(1, 1))
    with serving(ledger) as base:
        ada = Client(base, ledger, "Ada")
        ada.get("/")
        task = ada.task
        ada.post(f"/task/{task}", csrf=ada.csrf, comment="half <done>", **{"aspect-helpful": "4"})
        assert "Give points for &#39;honest&#39;." in ada.page.text
        assert "half &lt;done&gt;" in ada.page.text
        assert re.search(r'name="aspect-helpful" value="4" checked', ada.page.text)


def test_hostile_text_is_inert_and_the_service_alive(ledger: turnwise.Ledger) -> None:
    big = "A" * 1_000_000
    played = {
        e.group: [e]
        for e in (
            conversation(HOSTILE, "`" * 5000, heard=HOSTILE, id="bad"),
            conversation("*a " * 300_000, heard=big, id="big", seed=2),
        )
    }
    study(ledger, {"task": "score", "question": HOSTILE[:60], **PLAIN}, played=played)
    with serving(ledger) as base:
        ada = Client(base, ledger, HOSTILE)
        for _ in range(2):
            ada.get("/")
            assert ada.page.status_code == 200
            talk_ = ada.page.text.split("<main")[1]
            assert not re.search(r"<(script|img|svg|iframe|style|a href='https)", talk_), (
                "no tag of theirs"
            )
            assert not re.search(r"<[^>]*\son\w+\s*=", talk_), "no handler"
            assert not re.search(r'(href|src|action)="(?!/|#)', talk_), (
                "no address of theirs is followed"
            )
            assert not set("\x1b\x00\x07\u202e\x9b") & set(talk_)
            assert "49" not in talk_.split("7*7")[0][-5:]
            policy = ada.page.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            ada.send(
                f"/task/{ada.task}",
                ada.fill(random.Random(0)) | {"comment": HOSTILE.replace("\ud800", "")},
            )
        lead = Client(base, ledger, f"Lea {HOSTILE}"[:150], "lead")
        assert lead.get("/lead").status_code == 200
        assert "<script>alert" not in lead.page.text
        assert lead.get("/lead/export").status_code == 200
        assert lead.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize("render", [markdown, plain])
def test_rendering_keeps_what_was_said(render: Any) -> None:
    html = render(
        turnwise.Message(
            "user", "a <b> & c\n\nd `x < 1`\n\n```\ncode\n```\n1. one\n2. two \u202e\x1b"
        )
    )
    text = unescape(re.sub(r"<[^>]+>", "", html))
    for word in ("a <b> & c", "x < 1", "code", "one", "⟨U+202E⟩␛"):
        assert word in text
    assert "<b>" not in html


@pytest.mark.parametrize(
    "text",
    [
        "> " * 80 + "HIDDEN", "- " * 80 + "HIDDEN", "[x]: # (HIDDEN)", '[a](u "HIDDEN")', "``` HIDDEN\nx\n```", '![HIDDEN](x "HIDDEN")', "<!-- HIDDEN -->",  # noqa: E501
        "[a](https://x.y/HIDDEN)", "[ref][HIDDEN]\n\n[HIDDEN]: http://x.y", "|a|\n|-|\n|b|HIDDEN|", "&#72;IDDEN HIDDEN", "<p hidden>HIDDEN</p>",  # noqa: E501
    ],
)  # fmt: skip
def test_a_policy_cannot_say_to_judges_what_people_do_not_see(text: str) -> None:
    html = markdown(turnwise.Message("assistant", text))
    assert "HIDDEN" in unescape(re.sub(r"<[^>]+>", "", html))


def test_signs_that_turn_the_page_around_do_not_come_in_by_entities() -> None:
    html = markdown(
        turnwise.Message("user", "&#x202E;evil &rlm; &#x2066; &#0; | a |\n|:-:|\n| b |")
    )
    assert not set("\u202e\u200f\u2066\x00") & set(html)
    assert "style" not in html


def test_tables_that_would_take_seconds_are_text() -> None:
    wide = "|".join("a" * 1000) + "\n" + "|".join("-" * 1000) + "\n|" * 3000
    assert markdown(turnwise.Message("user", wide)).startswith('<div class="plain"')


def test_odd_requests_are_refused_and_leave_nothing_behind(ledger: turnwise.Ledger) -> None:
    study(ledger, {"task": "compare", **PLAIN}, played=groups(2, 2))
    with serving(ledger) as base:
        ada = Client(base, ledger, "Ada")
        ada.get("/")
        path, form = f"/task/{ada.task}", {"csrf": ada.csrf, "preference": "1"}
        boundary = 'multipart/form-data; boundary=x; charset="unicode_escape"'
        body = f'--x\r\nContent-Disposition: form-data; name="csrf"\r\n\r\n{ada.csrf}\r\n--x--\r\n'
        assert (
            ada.http.post(path, content=body, headers={"content-type": boundary}).status_code == 415
        )
        assert ada.send(path, form, {"origin": "http://["}).status_code == 403
        for odd in ("%00", "%ed%a0%80", "a%2Fb", "x" * 101):
            assert ada.get(f"/task/{odd}").status_code == 404
        ada.get("/")
        ada.send(
            f"{path}/draft", {**form, "junk": "x" * 1000, "comment": "a\0b", "turn-9": "\u202e"}
        )
        assert ada.page.status_code == 204
        page = ada.get(path).text
        assert "junk" not in page
        assert "a\ufffdb" in page
        assert ada.get("/more").status_code == 200
        bo = Client(base, ledger, "Bo")
        assert bo.get("/more").status_code == 200
        with ledger.reading() as db:
            assert db.scalar(sa.select(sa.func.count()).select_from(LEASES)) == 1, (
                "looking takes nothing"
            )


def test_links_lead_to_where_raters_reach_the_service(ledger: turnwise.Ledger) -> None:
    from starlette.testclient import TestClient

    study(ledger, {"task": "compare", **PLAIN}, played=groups(1, 2))
    http = TestClient(
        make_app(ledger, RUN, url="https://rate.example.org/t"), base_url="http://inner"
    )
    http.post(
        "/enter",
        data={"link": raters.invite(ledger, RUN, "Lea", "lead")},
        headers={"origin": "https://rate.example.org"},
    )
    csrf = re.search(r'name="csrf" value="([^"]+)"', http.get("/lead").text)[1]  # type: ignore[index]
    page = http.post(
        "/lead/raters", data={"csrf": csrf, "name": "Bo"}, headers={"host": "evil.example"}
    )
    assert 'value="https://rate.example.org/t/enter?link=' in page.text
    assert "evil.example" not in page.text


def test_pages_need_a_session_and_forms_its_token(ledger: turnwise.Ledger) -> None:
    study(ledger, {"task": "compare", **PLAIN}, played=groups(2, 2))
    with serving(ledger) as base:
        nobody = Client(base)
        for path in (
            "/",
            "/task/x",
            "/lead",
            "/me",
            "/progress",
            "/instructions",
            "/lead/export",
            "/lead/items/x",
        ):
            assert nobody.get(path).status_code == 401
        for path in (
            "/task/x",
            "/task/x/undo",
            "/practice",
            "/me",
            "/lead/raters",
            "/lead/studies",
            "/leave",
        ):
            assert nobody.post(path, name="x", source="x", csrf="x").status_code == 401
        ada = Client(base, ledger, "Ada")
        ada.get("/")
        form, task = ada.fill(random.Random(0)), ada.task
        for forged in (
            {**form, "csrf": ""},
            {**form, "csrf": "x" * 32},
            {k: v for k, v in form.items() if k != "csrf"},
        ):
            assert ada.send(f"/task/{task}", forged).status_code == 403
        assert (
            ada.send(f"/task/{task}", form, {"origin": "https://evil.example"}).status_code == 403
        )
        assert ada.send(f"/task/{task}", form, {"origin": "null"}).status_code == 403
        assert ada.send(f"/task/{task}", form, {"origin": base}).status_code == 200
        bo = Client(base, ledger, "Bo")
        bo.get("/")
        assert (
            ada.send(
                f"/task/{ada.task}", ada.fill(random.Random(0)) | {"csrf": bo.csrf}
            ).status_code
            == 403
        ), "another's token"
    assert len(notes(ledger)) == 5, "of strangers one a minute"
    with ledger.reading() as db:
        assert db.scalar(sa.select(sa.func.count()).where(LEASES.c.status == "answered")) == 1


def test_a_session_cannot_be_planted(ledger: turnwise.Ledger) -> None:
    """Session fixation: a cookie that was there before entering is worth nothing, and not kept."""
    study(ledger, {"task": "rank", **PLAIN})
    with serving(ledger) as base:
        planted = Client(base)
        planted.http.cookies.set(COOKIE, "planted-by-somebody", domain="127.0.0.1")
        planted.post("/enter", link=raters.invite(ledger, RUN, "Ada"))
        assert planted.http.cookies[COOKIE] != "planted-by-somebody"
        assert planted.get("/instructions").status_code == 200
        other = Client(base)
        other.http.cookies.set(COOKIE, "planted-by-somebody", domain="127.0.0.1")
        assert other.get("/instructions").status_code == 401
        cookie = planted.http.cookies[COOKIE]
        planted.get("/instructions")
        planted.post("/leave", csrf=planted.csrf)
        other.http.cookies.set(COOKIE, cookie, domain="127.0.0.1")
        assert other.get("/instructions").status_code == 401, "left is left"
        raw = httpx2.post(f"{base}/enter", data={"link": raters.invite(ledger, RUN, "Bo")})
        flags = raw.headers["set-cookie"].lower()
        assert "httponly" in flags
        assert "samesite=lax" in flags


def test_a_link_is_used_up_by_entering_and_not_by_looking(ledger: turnwise.Ledger) -> None:
    study(ledger, {"task": "rank", **PLAIN})
    secret = raters.invite(ledger, RUN, "Ada")
    with serving(ledger) as base:
        preview = Client(base)
        assert preview.get("/enter", link=secret).status_code == 200
        ada = Client(base)
        assert ada.post("/enter", link=f"{base}/enter?link={secret}").url.path == "/instructions"
        assert Client(base).post("/enter", link=secret).status_code == 403
        assert (
            Client(base)
            .send("/enter", {"link": "x"}, {"origin": "https://evil.example"})
            .status_code
            == 403
        )
    assert len(notes(ledger)) == 1, "of strangers one a minute"


def test_what_is_somebody_elses_is_refused_and_noted(ledger: turnwise.Ledger) -> None:
    study(ledger, {"task": "compare", "raters": 2, **PLAIN}, played=groups(3, 2))
    with serving(ledger) as base:
        ada, bo = Client(base, ledger, "Ada"), Client(base, ledger, "Bo")
        ada.get("/"), bo.get("/")
        task, form = ada.task, {"preference": "1", "csrf": bo.csrf}
        for refused in (
            bo.get(f"/task/{task}"), bo.send(f"/task/{task}", form), bo.send(f"/task/{task}/draft", form), bo.send(f"/task/{task}/skip", form),  # noqa: E501
            bo.send("/task/made-up", form),
        ):  # fmt: skip
            assert refused.status_code == 404
        for path in ("/lead", "/lead/export", "/lead/items/x"):
            assert bo.get(path).status_code == 403
        me = raters.everybody(ledger, RUN)[1].id
        for path, fields in ((f"/lead/raters/{me}", {"state": "active"}), ("/lead/raters", {"name": "Eve", "role": "lead"}),  # noqa: E501
                             ("/lead/studies", {"source": "compare", "paused": "true"}), ("/lead/items/x/gold", {})):  # fmt: skip  # noqa: E501
            assert bo.send(path, {**fields, "csrf": form["csrf"]}).status_code == 403
        assert {p.name for p in raters.everybody(ledger, RUN)} == {"Ada", "Bo"}
    assert len(notes(ledger)) == 12


def test_the_page_does_not_tell_gold_from_the_rest(ledger: turnwise.Ledger, tmp_path: Path) -> None:
    from test_people_desk import gold_file

    spec = {
        "task": "compare",
        **PLAIN,
        "gold": gold_file(tmp_path / "gold.jsonl", 3),
        "gold_share": 0.9,
    }
    study(ledger, spec, played=groups(3, 2))
    shapes = set()
    with serving(ledger) as base:
        ada = Client(base, ledger, "Ada")
        ada.get("/")
        while ada.task:
            page = re.sub(
                r"Question \d\?|gold \d|Answer [\d-]+\.|And then \d\?|right|wrong",
                "",
                ada.page.text.split("<main")[1],
            )
            assert "value" not in re.findall(r'class="[^"]*"', page)
            shapes.add(
                re.sub(
                    r"\s+|task/[\w-]+|value=\"[\w-]{20,}\"|<li.*?</li>|<div class=\"toast.*?</div>",
                    "",
                    page,
                    flags=re.S,
                )[:400]
            )
            ada.post(
                f"/task/{ada.task}",
                csrf=ada.csrf,
                preference="1",
                right="1",
                gold='{"ranking": []}',
                chosen="random",
            )
    assert len({re.sub(r"<form[^>]*undo.*?</form>", "", s) for s in shapes}) <= 2
    with ledger.reading() as db:
        rows = dict(db.execute(sa.select(LEASES.c.id, LEASES.c.right)).tuples().all())
        assert sum(r is not None for r in rows.values()) == 3, (
            "forged fields say nothing about gold"
        )


INJECTIONS = [
    "' OR '1'='1",
    "'; DROP TABLE people_leases; --",
    '" UNION SELECT token FROM people_raters --',
    "%27%20OR%201=1",
    "\\'; --",
]


@pytest.mark.parametrize("text", [INJECTIONS[0] + INJECTIONS[1], INJECTIONS[2] + INJECTIONS[3]])
def test_sql_in_any_field_is_text(ledger: turnwise.Ledger, text: str) -> None:
    study(ledger, {"task": "compare", **PLAIN, "strata": {"language": ["de"]}}, played=groups(2, 2))
    with serving(ledger) as base:
        lead = Client(base, ledger, f"Lea{text}", "lead")
        lead.get("/me")
        assert lead.send("/me", {"csrf": lead.csrf, "stratum-language": text}).status_code == 422
        lead.get("/me")
        lead.send("/me", {"csrf": lead.csrf, "stratum-language": "de"})
        assert lead.get(f"/task/{text}").status_code == 404
        assert lead.get(f"/lead/items/{text}").status_code == 404
        lead.get("/")
        csrf = lead.csrf
        lead.post(f"/task/{lead.task}", csrf=csrf, preference=text, comment=text)
        lead.post(f"/task/{lead.task}", csrf=csrf, preference="1", comment=text)
        lead.post(f"/task/{lead.task}/skip", csrf=csrf, reason=text)
        assert lead.post("/lead/raters", csrf=csrf, name=text, role="rater").status_code == 200
        assert lead.post("/lead/raters/x", csrf=csrf, state=text).status_code == 422
        assert lead.post("/lead/studies", csrf=csrf, source=text, paused="true").status_code == 200
        assert lead.post("/enter", link=text).status_code == 403
    with ledger.reading() as db:
        assert db.scalar(sa.select(sa.func.count()).select_from(RATERS)) == 2
        assert list(db.scalars(sa.select(LEASES.c.status).order_by(LEASES.c.status))) == [
            "answered",
            "skipped",
        ]


def test_large_requests_are_cut_off(ledger: turnwise.Ledger) -> None:
    study(ledger, {"task": "compare", **PLAIN}, played=groups(1, 2))
    with serving(ledger) as base:
        ada = Client(base, ledger, "Ada")
        ada.get("/")
        assert (
            ada.post(f"/task/{ada.task}", csrf=ada.csrf, comment="x" * 1_100_000).status_code == 413
        )
        pieces = (b"comment=" + b"x" * 100_000 for _ in range(12))  # no length said beforehand
        try:
            answer = ada.http.post(
                "/practice",
                content=pieces,
                headers={"content-type": "application/x-www-form-urlencoded"},
            )
            assert answer.status_code == 413
        except httpx2.TransportError:
            pass  # it hung up
        assert ada.get("/").status_code == 200


def test_the_lead_invites_pauses_and_makes_gold(ledger: turnwise.Ledger) -> None:
    study(ledger, {"task": "compare", "raters": 3, **PLAIN}, played=groups(1, 2))
    with serving(ledger) as base:
        lead = Client(base, ledger, "Lea", "lead")
        lead.get("/lead")
        csrf = lead.csrf
        lead.post("/lead/raters", csrf=csrf, name="Ada", role="rater")
        link = unescape(re.search(r'class="copy" readonly value="([^"]+)"', lead.page.text)[1])  # type: ignore[index]
        ada = Client(base)
        assert ada.post("/enter", link=link).url.path == "/instructions"
        assert lead.post("/lead/raters", csrf=csrf, name=" ", role="rater").status_code == 422
        ada.get("/")
        ada.post(f"/task/{ada.task}", csrf=ada.csrf, preference="2")
        lead.get("/")
        lead.post(f"/task/{lead.task}", csrf=csrf, preference="-1")
        with ledger.reading() as db:
            item = db.scalar(sa.select(LEASES.c.item))
        page = lead.get(f"/lead/items/{item}").text
        assert "A &gt; B" in page or "B &gt; A" in page
        assert lead.post(f"/lead/items/{item}/gold", csrf=csrf).status_code == 200, (
            "the lead's own answer is the known one"
        )
        [ada_] = [p for p in raters.everybody(ledger, RUN) if p.name == "Ada"]
        lead.post(f"/lead/raters/{ada_.id}", csrf=csrf, state="paused")
        assert "is paused" in ada.get("/").text
        lead.post("/lead/studies", csrf=csrf, source="compare", paused="true")
        bo = Client(base, ledger, "Bo")
        assert "Nothing to rate" in bo.get("/").text
        lead.post("/lead/studies", csrf=csrf, source="compare", paused="false")
        bo.get("/")
        assert bo.task
        assert lead.get("/lead").status_code == 200
        lines = lead.get("/lead/export").text.splitlines()
        assert len(lines) == 2


def test_whatever_fits_the_description_is_answered(database: str) -> None:
    """schemathesis makes requests from the OpenAPI description; none may make the service fail."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, settings

    ledger = turnwise.Ledger(database)
    study(ledger, {"task": "mark", "raters": 3, **PLAIN, "strata": {"language": ["de"]}})
    with serving(ledger) as base:
        lead = Client(base, ledger, "Lea", "lead")
        lead.get("/")
        description = make_app(ledger, RUN).openapi()
        schema = schemathesis.openapi.from_dict(description)
        schema.config.update(base_url=base)
        cookies = {COOKIE: lead.http.cookies[COOKIE]}
        count = 0
        for operation in schema.get_all_operations():
            found = operation.ok()
            if found.path == "/leave":
                continue

            @settings(
                max_examples=5,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @__import__("hypothesis").given(found.as_strategy())
            def ask(case: Any) -> None:
                nonlocal count
                count += 1
                answer = case.call(
                    base_url=base, cookies=cookies, headers={"x-csrf": lead.csrf}, timeout=600
                )
                assert answer.status_code < 500, (case.method, case.path, answer.text[:300])

            ask()
        assert count > 60
        assert lead.get("/healthz").status_code == 200
    ledger.close()


SERVE = """
import sys, uvicorn, turnwise
from turnwise.plugins.human.web.app import make_app
uvicorn.run(make_app(turnwise.Ledger(sys.argv[1]), "run"), port=int(sys.argv[2]), log_level="error")
"""


def test_a_killed_service_loses_nothing_it_acknowledged(database: str) -> None:
    ledger = turnwise.Ledger(database)
    sources = study(ledger, {"task": "compare", "raters": 1, **PLAIN}, played=groups(16, 2))
    port, acknowledged, rng = free_port(), 0, random.Random(0)

    def start() -> subprocess.Popen[bytes]:
        service = subprocess.Popen([sys.executable, "-c", SERVE, database, str(port)])
        while service.poll() is None:
            try:
                httpx2.get(f"http://127.0.0.1:{port}/healthz", timeout=None)
                return service
            except httpx2.TransportError:
                time.sleep(0.05)
        raise AssertionError("the service has ended")

    service = start()
    ada = Client(f"http://127.0.0.1:{port}", ledger, "Ada")
    for kill_after in (3, 1000):
        ada.get("/")
        while ada.task:
            ada.send(f"/task/{ada.task}", ada.fill(rng))
            acknowledged += "Saved." in ada.page.text or ada.task is None
            if acknowledged == kill_after:
                os.kill(service.pid, signal.SIGKILL)
                service.wait()
                service = start()
                break
    service.kill()
    service.wait()
    said = heard(ledger, sources)
    assert len(said) == len({a.target for a in said}) == acknowledged == 16
    ledger.close()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_killed_trainer_loses_nothing_that_was_acknowledged(
    model_folder: Any, tmp_path: Path
) -> None:
    """People go on rating while the run is dead; it finds everything when it comes back."""
    feedback = [{"judge": "people", "raters": 2, **PLAIN}]
    rank = {
        "env": "turnwise/SupportDesk-v0",
        "groups": 4,
        "group_size": 2,
        "updates": 1,
        "max_new_tokens": 6,
        "feedback": feedback,
        "poll": 0.1,
    }
    config, folder = tmp_path / "run.json", tmp_path / "run"
    config.write_text(
        json.dumps({"policy": str(model_folder()), "threads": 1, "stages": [{"rank": rank}]})
    )

    def start() -> Command:
        return Command("run", str(config), "--folder", str(folder), "--resume")

    trainer = start()
    while not (folder / "ledger.sqlite").exists() or not open_slots(folder):
        assert not trainer.is_over, "the run has ended"
        time.sleep(0.1)
    ledger, run = open_ledger(folder)
    port = free_port()
    rate = [sys.executable, "-m", "turnwise", "rate", str(folder), "--port", str(port)]
    bo = Command("rate", str(folder), "--port", str(port), "--invite", "Bo").wait().stdout.strip()
    service = subprocess.Popen(rate, stdout=subprocess.PIPE, text=True)
    lead = re.search(r"http\S+", service.stdout.readline())[0]  # type: ignore[index, union-attr]
    while "is at" not in service.stdout.readline():  # type: ignore[union-attr]
        pass
    people = [enter(f"http://127.0.0.1:{port}", link) for link in (lead, bo)]
    acknowledged = 0

    def answer(count: int) -> None:
        nonlocal acknowledged
        for _ in range(count):
            for rater in people:
                rater.get("/")
                if rater.task:
                    rater.send(f"/task/{rater.task}", rater.fill(random.Random(0)))
                    acknowledged += "Saved" in rater.page.text or rater.task is None

    answer(1)
    while not ledger.feedback(
        run=run, kind="comparison", status="scored", late=True
    ):  # the run has begun to collect
        time.sleep(0.05)
    answer(1)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    answer(4)
    service.kill()
    service.wait()
    assert start().wait().returncode == 0
    assert (
        len(ledger.feedback(run=run, kind="comparison", status="scored", late=True))
        == acknowledged
        == 8
    )
    assert (
        len(
            {
                (c.target, c.stamp.rater)
                for c in ledger.feedback(run=run, kind="comparison", status="scored", late=True)
            }
        )
        == 8
    )
    assert Desk(ledger).slots(run) == {"filled": 8, "slots": 8, "open": 0}
    ledger.close()


def enter(base: str, link: str) -> Client:
    """A client with a link, once the service listens."""
    while True:
        try:
            client = Client(base)
            assert client.post("/enter", link=link).url.path == "/instructions"
            return client
        except httpx2.TransportError:
            time.sleep(0.1)


def open_slots(folder: Path) -> bool:
    try:
        ledger, run = open_ledger(folder)
    except turnwise.ConfigError:  # it has only begun
        return False
    slots = Desk(ledger).slots(run)["slots"]
    ledger.close()
    return slots == 8


@pytest.mark.parametrize(
    ("url", "origin", "same"),
    [
        ("https://RATE.example.org", "https://rate.example.org", True),
        ("https://rate.example.org:443/", "https://rate.example.org", True),
        ("http://rate.example.org:80", "http://rate.example.org", True),
        ("https://b\u00fccher.example", "https://xn--bcher-kva.example", True),
        ("http://127.0.0.1:8000", "http://localhost:8000", True),
        ("https://fa\u00df.example", "https://xn--fa-hia.example", True),
        ("http://[0:0:0:0:0:0:0:1]:8000", "http://localhost:8000", True),
        ("https://rate.example.org", "http://rate.example.org", False),
        ("http://rate.example.org:443", "https://rate.example.org", False),
        ("https://rate.example.org", "https://rate.example.org:8443", False),
        ("https://rate.example.org", "https://evil.example", False),
        ("https://rate.example.org", "null", False),
        ("https://rate.example.org", "http://[", False),
    ],
)
def test_an_address_is_the_same_however_it_is_spelled(url: str, origin: str, same: bool) -> None:
    assert (place_of(url) == place_of(origin)) is same


@pytest.mark.parametrize(
    "url", ["rate.example.org", "https://", "ftp://rate.example.org", "http://[", "http://h:port"]
)
def test_an_address_that_is_none_is_refused_at_once(ledger: turnwise.Ledger, url: str) -> None:
    """Compared as nothing, it would be the same as the origin of a page that has none ("null")."""
    study(ledger, {"task": "score", **PLAIN}, played=groups(1, 1))
    with pytest.raises(ValueError, match=re.escape(repr(url))):
        make_app(ledger, RUN, url=url)
