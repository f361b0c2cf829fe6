"""Servers that are almost compatible: what they answer, what the verdict is, what is booked, how often is asked."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import turnwise
from judging import PRICE, RUBRIC, Virtual, answers, context, model, talk, verdict
from turnwise.judges import RubricJudge, calls

USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
PLAIN = (100 * PRICE[0] + 20 * PRICE[3]) / 1e6  # dollars of that


def said(body: Mapping[str, Any]) -> str:
    schema = body["response_format"]["json_schema"]["schema"]
    asked = body["messages"][-1]["content"]
    [id_] = re.findall(r"id of your verdict is (\w+)", asked)
    schema["properties"]["verdict_id"]["enum"] = [id_]
    return json.dumps(verdict(schema, asked))


def ok(
    body: Mapping[str, Any], content: Any = None, finish: Any = "stop", usage: Any = None, **message: Any
) -> tuple[int, Any]:
    content = said(body) if content is None else content(said(body)) if callable(content) else content
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    return 200, {"model": "m", "choices": [choice], "usage": USAGE if usage is None else usage}


def text(change: Callable[[str], Any], **more: Any) -> Callable[[Any], tuple[int, Any]]:
    return lambda body: ok(body, change, **more)


def gone(finish: str) -> Callable[[Any], tuple[int, Any]]:
    return lambda body: ok(body, "", finish)


def used(**usage: Any) -> Callable[[Any], tuple[int, Any]]:
    return lambda body: ok(body, usage=usage)


def always(status: int, answer: Any) -> Callable[[Any], tuple[int, Any]]:
    return lambda body: (status, answer)


def unless(bad: Callable[[Any], bool], status: int, answer: Any) -> Callable[[Any], tuple[int, Any]]:
    return lambda body: (status, answer) if bad(body) else ok(body)


def error(message: str, code: Any = None, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "code": code, **more}}


def dollars(prompt: int, output: int) -> float:
    return (prompt * PRICE[0] + output * PRICE[3]) / 1e6


NEW = lambda body: "max_completion_tokens" in body  # noqa: E731
SYSTEM = lambda body: body["messages"][0]["role"] == "system"  # noqa: E731
MOST = "most"  # what a request can cost at most, where nobody knows what it did

# name: the server, the verdict's status, a part of the reason, requests, dollars booked
DIALECTS: dict[str, tuple[Callable[[Any], tuple[int, Any]], str, str, int, Any]] = {
    "plain": (ok, "scored", "", 1, PLAIN),
    "Mistral: parts and thoughts": (
        text(lambda t: [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": t}]),
        "scored", "", 1, PLAIN,
    ),
    "parts without types": (text(lambda t: [{"text": t[:9]}, {"text": t[9:]}]), "scored", "", 1, PLAIN),
    "a part that refuses": (text(lambda t: [{"type": "refusal", "refusal": "I won't"}]), "abstained", "I won't", 1, PLAIN),
    "thoughts whose tag the template opened": (text(lambda t: f"So {{it}} goes\n</think>\n\n{t}"), "scored", "", 1, PLAIN),
    "thoughts in tags": (text(lambda t: f"<think>hm</think>{t}"), "scored", "", 1, PLAIN),
    "Magistral's tags": (text(lambda t: f"[THINK]hm[/THINK]{t}"), "scored", "", 1, PLAIN),
    "gpt-oss's channels": (
        text(lambda t: f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>{t}<|return|>"),
        "scored", "", 1, PLAIN,
    ),
    "fence on one line": (text(lambda t: f"```JSON {t} ```"), "scored", "", 1, PLAIN),
    "stop token left": (text(lambda t: f"{t}<|im_end|>\n"), "scored", "", 1, PLAIN),
    "two stop tokens left": (text(lambda t: f"{t}<|eot_id|></s>"), "scored", "", 1, PLAIN),
    "byte order mark": (text(lambda t: f"\ufeff{t}"), "scored", "", 1, PLAIN),
    "finish reason eos": (text(str, finish="eos_token"), "scored", "", 1, PLAIN),
    "finish reason in capitals": (text(str, finish="STOP"), "scored", "", 1, PLAIN),
    "no finish reason": (text(str, finish=None), "scored", "", 1, PLAIN),
    "reasoning holds the text": (lambda b: ok(b, "", reasoning="{}"), "failed", "`reasoning` holds", 2, 2 * PLAIN),
    "Gemini: safety": (gone("SAFETY"), "abstained", "SAFETY", 1, PLAIN),
    "Gemini: prohibited": (gone("PROHIBITED_CONTENT"), "abstained", "PROHIBITED", 1, PLAIN),
    "Azure: filter in the answer": (gone("content_filter"), "abstained", "content_filter", 1, PLAIN),
    "Zhipu: sensitive": (gone("sensitive"), "abstained", "sensitive", 1, PLAIN),
    "Gemini: prompt blocked": (
        always(200, {"choices": [], "promptFeedback": {"blockReason": "OTHER"}, "usage": USAGE}), "abstained", "OTHER", 1, PLAIN,
    ),
    "Azure: filter as 400": (always(400, error("management policy", "content_filter")), "abstained", "filtered", 1, MOST),
    "Azure: innererror": (
        always(400, error("no", innererror={"code": "ResponsibleAIPolicyViolation"})), "abstained", "filtered", 1, MOST,
    ),
    "OpenAI: invalid_prompt": (always(400, error("flagged", "invalid_prompt")), "abstained", "flagged", 1, MOST),
    "OpenRouter: moderation as 403": (
        always(403, error("denied", 403, metadata={"reasons": ["x"], "flagged_input": "y"})), "abstained", "denied", 1, MOST,
    ),
    "DashScope: inspection": (always(400, error("no", "data_inspection_failed")), "abstained", "filtered", 1, MOST),
    "litellm: policy": (always(400, error("litellm.ContentPolicyViolationError: no")), "abstained", "litellm", 1, MOST),
    "wrong key, repeated": (always(401, error("Incorrect API key provided: sk-test-0123456789abcdef")), "failed", "account", 1, 0),
    "Gemini: wrong key as 400 in a list": (
        always(400, [{"error": {"code": 400, "message": "API key not valid", "status": "INVALID_ARGUMENT"}}]),
        "failed", "account: HTTP 400 400: API key not valid", 1, 0,
    ),
    "quota as 429": (always(429, error("no more", "insufficient_quota")), "failed", "account", 1, 0),
    "Moonshot: quota as 429": (always(429, error("x", type="exceeded_current_quota_error")), "failed", "account", 1, 0),
    "DeepSeek: balance": (always(402, error("Insufficient Balance")), "failed", "account", 1, 0),
    "FastAPI: detail": (always(400, {"detail": [{"loc": ["body", "x"], "msg": "bad x"}]}), "failed", "bad x (body.x)", 1, 0),
    "detail as text": (always(400, {"detail": "too long"}), "failed", "too long", 1, 0),
    "error as text": (always(400, {"error": "bad model"}), "failed", "bad model", 1, 0),
    "an address without /v1": (always(404, {"detail": "Not Found"}), "failed", "http://127.0.0.1", 1, 0),
    "OpenRouter: 402 in 200": (always(200, error("Insufficient credits", 402)), "failed", "account", 1, 0),
    "OpenRouter: context in 200": (always(200, error("too long", 400)), "failed", "request", 1, 0),
    "OpenRouter: 429 in 200": (always(200, error("slow down", 429)), "failed", "busy", 8, 0),
    "MiniMax: balance in 200": (
        always(200, {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "no money"}}), "failed", "account", 1, 0,
    ),
    "DeepSeek: no room": (gone("insufficient_system_resource"), "failed", "server", 8, MOST),
    "Responses where Chat is asked": (always(200, {"object": "response", "output": []}), "failed", "provider openai", 1, MOST),
    "Mistral: only max_tokens": (
        unless(NEW, 422, {"message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"], "msg": "no"}]}}),
        "scored", "", 2, PLAIN,
    ),
    "old vLLM: only max_tokens": (unless(NEW, 400, error("unknown field max_completion_tokens")), "scored", "", 2, PLAIN),
    "Gemma: no system role": (unless(SYSTEM, 400, {"message": "System role not supported", "code": 400}), "scored", "", 2, PLAIN),
    "roles must alternate": (
        unless(SYSTEM, 400, error("Conversation roles must alternate user/assistant/...")), "scored", "", 2, PLAIN,
    ),
    "both": (
        lambda b: (400, error("max_completion_tokens?")) if NEW(b) else (400, error("System role not supported")) if SYSTEM(b) else ok(b),
        "scored", "", 3, PLAIN,
    ),
    "xAI: reasoning in the total": (
        used(prompt_tokens=100, completion_tokens=20, total_tokens=1120, completion_tokens_details={"reasoning_tokens": 1000}),
        "scored", "", 1, dollars(100, 1020),
    ),
    "OpenAI: reasoning in the completion": (
        used(prompt_tokens=100, completion_tokens=1020, total_tokens=1120, completion_tokens_details={"reasoning_tokens": 1000}),
        "scored", "", 1, dollars(100, 1020),
    ),
    "reasoning outside, no total": (
        used(prompt_tokens=100, completion_tokens=20, completion_tokens_details={"reasoning_tokens": 1000}),
        "scored", "", 1, dollars(100, 1020),
    ),
    "counts as texts": (used(prompt_tokens="100", completion_tokens="20.0"), "scored", "", 1, PLAIN),
    "prompt missing": (used(completion_tokens=20, total_tokens=120), "scored", "", 1, PLAIN),
    "output missing": (used(prompt_tokens=100), "scored", "", 1, MOST),
    "only the total": (used(total_tokens=120), "scored", "", 1, MOST),
    "no usage": (lambda b: ok(b, usage={"x": 1}), "scored", "", 1, MOST),
    "usage is a list": (lambda b: ok(b, usage=[1]), "scored", "", 1, MOST),
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            served.asked.append(body)
            status, answer = served.answer(body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    served: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.asked = []
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize("name", DIALECTS)
def test_a_servers_dialect(name: str, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer, status, reason, requests, booked = DIALECTS[name]
    server.asked.clear()
    monkeypatch.setattr(calls, "TIME", Virtual())
    chat = model("chat", f"http://127.0.0.1:{server.server_address[1]}")
    judge = RubricJudge(canaries=0, model=chat, rubric=RUBRIC, cache=False, prices={chat.name: PRICE}, max_tokens=64)
    ledger = turnwise.Ledger(tmp_path / "ledger.sqlite")
    [answer] = answers(judge, [talk("e1", "good")], context(tmp_path, ledger, "run"))
    assert answer.status == status, answer.reason
    assert reason in answer.reason
    assert "0123456789abcdef" not in answer.reason
    assert len(server.asked) == requests
    if booked == MOST:
        assert answer.stamp.cost > 2 * PLAIN
    else:
        assert answer.stamp.cost == pytest.approx(booked)


@pytest.mark.parametrize("key", ["", "  ", "“curly”-key-12345", "two\nlines-of-a-key"])
def test_keys_that_cannot_be_sent_are_refused_at_once(key: str) -> None:
    with pytest.raises(turnwise.PluginError, match="key"):
        turnwise.judges.models.make_model(
            {"provider": "openai-chat", "model": "m", "url": "http://h/v1", "api_key": key or " "}
        )


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://h/v1", "http://a b/v1", "http://", "http://h:99999/v1"])
def test_addresses_that_cannot_be_asked_are_refused_at_once(url: str) -> None:
    with pytest.raises(turnwise.PluginError, match="url"):
        turnwise.judges.models.make_model({"provider": "openai-chat", "model": "m", "url": url, "api_key": "key-123456"})


@pytest.mark.parametrize("provider", ["openai", "openai-chat", "anthropic"])
@pytest.mark.parametrize(("name", "value"), [("ALL_PROXY", "socks5://127.0.0.1:7890"), ("SSL_CERT_FILE", "/nope.pem")])
def test_what_the_environment_says_wrongly_is_named(
    provider: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(turnwise.PluginError, match=name):
        turnwise.judges.models.make_model({"provider": provider, "model": "m", "url": "http://h/v1", "api_key": "key-123456"})
