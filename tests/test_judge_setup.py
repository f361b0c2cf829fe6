"""What keeps a judge from asking at all: keys, addresses, proxies, certificates; and batches that
fail as a whole."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import turnwise
from support.clock import AsyncClock
from support.episodes import conversation
from support.judges import (
    KEY,
    PRICE,
    RUBRIC,
    answers,
    booked,
    context,
    model,
    unbiased,
)
from support.model_server import Fault, ModelServer
from turnwise import PluginError
from turnwise.judges.asking import calls
from turnwise.judges.llm.rubric_judge import RubricJudge
from turnwise.judges.models.model import make_model

pytest.importorskip("anthropic")
pytest.importorskip("openai")

GOOD = conversation("good", "good good", id="e1")
PROVIDERS = {"anthropic": "ANTHROPIC", "openai": "OPENAI", "openai-chat": "OPENAI"}
NO_KEYS = {
    "blank": "  \n",
    "a line break within": "sk-secret-0123\n456789",
    "curly quotes": "“sk-secret-0123456789”",
    "quotes": "'sk-secret-0123456789'",
    "Bearer": "Bearer sk-secret-0123456789",
    "another alphabet": "sk-sеcret-0123456789",
    "a control character": "sk-secret-\x000123456789",
    "a number": 12345678,
}
NO_ADDRESSES = {
    "no scheme": "localhost:8000/v1",
    "another scheme": "ftp://127.0.0.1/v1",
    "spaces within": "http://127.0.0.1 :8000/v1",
    "no host": "http:///v1",
    "a port that is none": "http://127.0.0.1:port/v1",
    "a port that is too large": "http://127.0.0.1:99999/v1",
    "a bracket": "http://[::1/v1",
    "nothing": "",
    "the whole path": "http://127.0.0.1:8000/v1/chat/completions",
    "a host that is none": "http://a..b/v1",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No word of the environment that tests run in."""
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in (
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        *(f"{p}_{w}" for p in PROVIDERS.values() for w in ("API_KEY", "BASE_URL")),
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "TIME", AsyncClock())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", NO_KEYS)
def test_a_key_that_cannot_be_sent_is_refused_at_once_and_not_shown(
    name: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PluginError, match="api_key") as refused:
        make_model({"provider": provider, "model": "m", "api_key": NO_KEYS[name]})
    assert "0123" not in str(refused.value)
    assert "12345678" not in str(refused.value)
    given = NO_KEYS[name]
    if isinstance(given, str) and given.strip() and "\x00" not in given:
        monkeypatch.setenv(f"{PROVIDERS[provider]}_API_KEY", given)
        with pytest.raises(PluginError, match=f"^{PROVIDERS[provider]}_API_KEY of ") as refused:
            make_model(f"{provider}:m")
        assert "0123" not in str(refused.value)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_white_space_around_a_key_is_taken_off(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Any = make_model({"provider": provider, "model": "m", "api_key": f" \ufeff{KEY}\r\n"})
    assert made._client.api_key == KEY
    monkeypatch.setenv(f"{PROVIDERS[provider]}_API_KEY", f"{KEY}\n")
    made = make_model(f"{provider}:m")
    assert made._client.api_key == KEY
    monkeypatch.setenv(f"{PROVIDERS[provider]}_API_KEY", " ")
    with pytest.raises(PluginError, match="_API_KEY of .* is empty"):
        make_model(f"{provider}:m")


def test_a_key_of_the_environment_is_not_sent_to_another_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made: Any = make_model(
        {"provider": "openai-chat", "model": "m", "url": "http://127.0.0.1:8000/v1"}
    )
    assert made._client.api_key != KEY


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", NO_ADDRESSES)
def test_an_address_that_cannot_be_asked_is_refused_at_once(
    name: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PluginError, match="`url` of "):
        make_model({"provider": provider, "model": "m", "api_key": KEY, "url": NO_ADDRESSES[name]})
    monkeypatch.setenv(f"{PROVIDERS[provider]}_BASE_URL", NO_ADDRESSES[name])
    with pytest.raises(PluginError):
        make_model({"provider": provider, "model": "m", "api_key": KEY})


PROXIES = {
    "socks5": "socks5://127.0.0.1:7890",
    "socks": "socks://127.0.0.1:7890",
    "odd": "ftp://user:hidden@127.0.0.1:7890",
}


@pytest.mark.parametrize("provider", ["anthropic", "openai-chat"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("socks5", "ALL_PROXY"),
        ("socks", "all_proxy"),
        ("socks5", "HTTPS_PROXY"),
        ("odd", "HTTP_PROXY"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_in_one_line(
    kind: str, name: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, PROXIES[kind])
    with pytest.raises(PluginError, match=f"{name} ") as refused:
        make_model(
            {"provider": provider, "model": "m", "api_key": KEY, "url": "http://127.0.0.1:8000/v1"}
        )
    assert "\n" not in str(refused.value)
    assert "hidden" not in str(refused.value)
    assert "NO_PROXY" in str(refused.value)


@pytest.mark.parametrize("wire", ["messages", "responses", "chat"])
def test_a_server_that_no_proxy_names_is_asked_beside_a_proxy_that_cannot_be_used(
    wire: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    with ModelServer(unbiased) as server:
        judge = RubricJudge(canaries=0, model=model(wire, server), rubric=RUBRIC, cache=False)
        [said] = answers(judge, [GOOD], context(tmp_path))
    assert said.status == "scored", said.reason


@pytest.mark.parametrize("provider", ["anthropic", "openai-chat"])
@pytest.mark.parametrize("kind", ["missing", "no certificates", "a folder"])
def test_certificates_that_cannot_be_read_are_named(
    kind: str, provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "own.pem"
    if kind == "no certificates":
        path.write_text("none")
    elif kind == "a folder":
        path.mkdir()
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(PluginError, match=r"SSL_CERT_FILE names \(.*own\.pem\)"):
        make_model({"provider": provider, "model": "m", "api_key": KEY})


@pytest.mark.parametrize("wire", ["messages", "responses", "chat"])
def test_what_never_left_costs_nothing(wire: str, clock: None, tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listened to: nobody answers there
        taken.bind(("127.0.0.1", 0))
        asked = model(wire, f"http://127.0.0.1:{taken.getsockname()[1]}")
        ledger = turnwise.Ledger(tmp_path / "ledger.sqlite")
        judge = RubricJudge(
            canaries=0,
            model=asked,
            rubric=RUBRIC,
            cache=False,
            prices={asked.name: PRICE},
            budget=0.05,
        )
        [said] = answers(judge, [GOOD], context(tmp_path, ledger))
    assert said.reason.startswith("connection: ")
    assert {(row.cost, row.certain) for row in booked(ledger, "run")} == {(0.0, True)}
    ledger.close()


@pytest.mark.parametrize("fault", ["expired", "canceled", "overloaded"])
@pytest.mark.parametrize("wire", ["messages", "responses", "chat"])
def test_a_batch_that_brings_nothing_is_a_failure_and_not_asked_singly(
    wire: str, fault: str, clock: None, tmp_path: Path
) -> None:
    episodes = [conversation("good " * i, id=f"e{i}", seed=i) for i in range(3)]
    ledger = turnwise.Ledger(tmp_path / "ledger.sqlite")
    with ModelServer(unbiased) as server:
        server.faults = lambda asked: (
            Fault("status", status=529) if fault == "overloaded" else Fault(fault)
        )
        asked = model(wire, server)
        judge = RubricJudge(
            canaries=0,
            model=asked,
            rubric=RUBRIC,
            batch=True,
            prices={asked.name: PRICE},
            budget=1.0,
        )
        said = answers(judge, episodes, context(tmp_path, ledger))
        assert {s.status for s in said} == {"failed"}
        assert all("as a whole" in s.reason for s in said)
        assert server.stats()["questions"] == 0
        assert booked(ledger, "run") == []
        assert judge._caller.account.reserved == 0.0
        server.faults = ()  # asked again, they go in a new batch
        said = answers(judge, episodes, context(tmp_path, ledger))
        assert {s.status for s in said} == {"scored"}
        assert server.stats()["batches"] == 2
        assert server.stats()["questions"] == 0
    ledger.close()


ERRORS = {
    "busy": ("token_limit_exceeded", "Enqueued token limit reached for judge-1."),
    "account": ("billing_hard_limit_reached", "Billing hard limit has been reached."),
    "request": ("invalid_json_line", "This line is not parseable as valid JSON."),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("wire", ["responses", "chat"])
def test_a_batch_that_is_not_accepted_says_why_in_its_own_words(
    wire: str, kind: str, clock: None, tmp_path: Path
) -> None:
    code, message = ERRORS[kind]
    ledger = turnwise.Ledger(tmp_path / "ledger.sqlite")
    with ModelServer(unbiased) as server:
        server.batch_errors = [{"code": code, "line": None, "message": message, "param": None}]
        judge = RubricJudge(canaries=0, model=model(wire, server), rubric=RUBRIC, batch=True)
        said = answers(
            judge,
            [conversation("good " * i, id=f"e{i}", seed=i) for i in range(3)],
            context(tmp_path, ledger),
        )
        assert {s.status for s in said} == {"failed"}
        assert all(
            s.reason.startswith(f"{kind}: the batch batch_") and f"{code}: {message}" in s.reason
            for s in said
        )
        assert server.stats()["questions"] == 0
        assert server.count(wire=wire) == 0
    ledger.close()


@pytest.mark.parametrize("wire", ["responses", "chat"])
def test_a_filter_in_a_batch_abstains(wire: str, clock: None, tmp_path: Path) -> None:
    ledger = turnwise.Ledger(tmp_path / "ledger.sqlite")
    with ModelServer(unbiased) as server:
        server.faults = lambda asked: (
            Fault("status", status=400, code="content_filter") if "bad bad" in asked.user else None
        )
        judge = RubricJudge(canaries=0, model=model(wire, server), rubric=RUBRIC, batch=True)
        said = answers(
            judge, [GOOD, conversation("bad bad", id="e2", seed=2)], context(tmp_path, ledger)
        )
        assert [s.status for s in said] == ["scored", "abstained"]
        assert said[1].reason.startswith("filtered: HTTP 400 content_filter")
        assert server.stats()["questions"] == 0
    ledger.close()


@pytest.mark.parametrize(
    "url", ["http://localhost:4000/v1", "http://litellm:4000", "http://10.0.0.5"]
)
def test_a_budget_that_never_ends_is_warned_of(url: str, recwarn: pytest.WarningsRecorder) -> None:
    asked = make_model({"provider": "openai-chat", "model": "judge-1", "url": url})
    RubricJudge(model=asked, rubric=RUBRIC)
    RubricJudge(model=asked, rubric=RUBRIC, budget=1.0, prices={asked.name: [0.0, 0.0]})
    assert not [warning for warning in recwarn if "budget" in str(warning.message)]
    with pytest.warns(UserWarning, match="its budget never ends.*give `prices"):
        RubricJudge(model=asked, rubric=RUBRIC, budget=1.0)
