"""The fault server of model APIs, as the official SDKs see it."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support import model_server
from support.model_server import Asked, Fault, ModelServer, Tokens, count_tokens

anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

SCHEMA = {
    "type": "object",
    "properties": {"rationale": {"type": "string"}, "winner": {"enum": ["A", "B", "tie"]}},
    "required": ["rationale", "winner"],
    "additionalProperties": False,
}
SAID = {"rationale": "short and right", "winner": "B"}
WIRES = ("messages", "chat", "responses")


def request(
    wire: str, user: str = "Which is better?", schema: Any = SCHEMA, **more: Any
) -> dict[str, Any]:
    """The body of a question, as each wire wants it."""
    system, turn = "You are a judge.", {"role": "user", "content": user}
    form = {"type": "json_schema", "name": "verdict", "strict": True, "schema": schema}
    if wire == "messages":
        output = {"format": {"type": "json_schema", "schema": schema}}
        return {
            "model": "claude-x",
            "max_tokens": 99,
            "system": system,
            "messages": [turn],
            "output_config": output,
            **more,
        }
    if wire == "chat":
        nested = {
            "type": "json_schema",
            "json_schema": {k: v for k, v in form.items() if k != "type"},
        }
        return {
            "model": "gpt-x",
            "messages": [{"role": "system", "content": system}, turn],
            "response_format": nested,
            **more,
        }
    return {
        "model": "gpt-x",
        "instructions": system,
        "input": [turn],
        "text": {"format": form},
        **more,
    }


class Client:
    """Both SDKs against one server, without retries."""

    def __init__(self, server: ModelServer, **options: Any) -> None:
        options = {"max_retries": 0, "timeout": 10.0, "api_key": "test", **options}
        self.anthropic = anthropic.Anthropic(base_url=server.url, **options)
        self.openai = openai.OpenAI(base_url=server.url + "/v1", **options)

    def create(self, wire: str, *args: Any, **more: Any) -> Any:
        create = {
            "messages": self.anthropic.messages.create,
            "chat": self.openai.chat.completions.create,
            "responses": self.openai.responses.create,
        }[wire]
        return create(**request(wire, *args, **more))

    def raw(self, wire: str, *args: Any, **more: Any) -> Any:
        create = {
            "messages": self.anthropic.messages.with_raw_response.create,
            "chat": self.openai.chat.completions.with_raw_response.create,
            "responses": self.openai.responses.with_raw_response.create,
        }[wire]
        return create(**request(wire, *args, **more))

    def close(self) -> None:
        self.anthropic.close()
        self.openai.close()


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer(lambda asked: SAID) as server:
        yield server


@pytest.fixture
def client(server: ModelServer) -> Iterator[Client]:
    client = Client(server)
    yield client
    client.close()


def text_of(wire: str, reply: Any) -> str:
    if wire == "messages":
        return reply.content[0].text
    return reply.choices[0].message.content if wire == "chat" else reply.output_text


def sdk(wire: str) -> Any:
    return anthropic if wire == "messages" else openai


@pytest.mark.parametrize("wire", WIRES)
def test_a_good_answer(server: ModelServer, client: Client, wire: str) -> None:
    reply = client.create(wire)
    assert json.loads(text_of(wire, reply)) == SAID
    (received,) = server.requests
    asked = received.asked
    assert asked is not None
    assert (asked.wire, asked.system, asked.user, asked.schema) == (
        wire,
        "You are a judge.",
        "Which is better?",
        SCHEMA,
    )
    assert (asked.number, received.status, asked.body["model"]) == (0, 200, asked.model)
    # "You are a judge ." is 5 tokens, "Which is better ?" is 4
    words = count_tokens(json.dumps(SAID))
    assert server.tokens == Tokens(input=9, output=words)
    reported = reply.usage
    if wire == "chat":
        assert (reported.prompt_tokens, reported.completion_tokens, reported.total_tokens) == (
            9,
            words,
            9 + words,
        )
    else:
        assert (reported.input_tokens, reported.output_tokens) == (9, words)


@pytest.mark.parametrize("wire", WIRES)
def test_answers_are_what_the_sdks_types_say(client: Client, wire: str) -> None:
    """The SDKs build their models without a look at the types; here pydantic looks."""
    reply = client.create(wire)
    again = type(reply).model_validate(json.loads(reply.to_json()))
    assert again == reply


def test_parsing_helpers_of_the_sdks() -> None:
    class Verdict(pydantic.BaseModel):
        rationale: str
        winner: str
        confidence: float = pydantic.Field(ge=0, le=1)

    with ModelServer(lambda asked: {**SAID, "confidence": 0.5}) as server:
        client = Client(server)
        turn = {"role": "user", "content": "hi"}
        one = client.anthropic.messages.parse(
            model="c", max_tokens=9, messages=[turn], output_format=Verdict
        )
        two = client.openai.chat.completions.parse(
            model="g", messages=[turn], response_format=Verdict
        )
        three = client.openai.responses.parse(model="g", input=[turn], text_format=Verdict)
        expected = Verdict(**SAID, confidence=0.5)
        assert one.parsed_output == two.choices[0].message.parsed == three.output_parsed == expected
        client.close()


STATUSES = {
    400: ("BadRequestError", "invalid_request_error"),
    401: ("AuthenticationError", "authentication_error"),
    402: ("PaymentRequiredError", "billing_error"),
    403: ("PermissionDeniedError", "permission_error"),
    404: ("NotFoundError", "not_found_error"),
    408: ("RequestTimeoutError", "timeout_error"),
    409: ("ConflictError", "conflict_error"),
    413: ("ContentTooLargeError", "request_too_large"),
    422: ("UnprocessableEntityError", "invalid_request_error"),
    429: ("RateLimitError", "rate_limit_error"),
    500: ("InternalServerError", "api_error"),
    502: ("InternalServerError", "api_error"),
    503: ("ServiceUnavailableError", "api_error"),
    504: ("GatewayTimeoutError", "timeout_error"),
    529: ("OverloadedError", "overloaded_error"),
}


@pytest.mark.parametrize("wire", WIRES)
def test_every_status_raises_the_sdks_class(server: ModelServer, client: Client, wire: str) -> None:
    server.faults = [Fault("status", status=s, headers={"retry-after": "7"}) for s in STATUSES]
    for status, (name, kind) in STATUSES.items():
        with pytest.raises(sdk(wire).APIStatusError) as caught:
            client.create(wire)
        error = caught.value
        assert error.status_code == status
        assert error.response.headers["retry-after"] == "7"
        assert error.request_id.startswith("req_")
        if wire == "messages":
            assert (type(error).__name__, error.type) == (name, kind)
        else:
            expected = (
                "InternalServerError"
                if status >= 500
                else "APIStatusError"
                if status in (402, 408, 413)
                else name
            )
            assert type(error).__name__ == expected
    assert server.tokens == Tokens()
    assert text_of(wire, client.create(wire))  # the list is at its end
    assert server.count(wire=wire, status=200) == 1


def test_codes_tell_quota_from_rate(server: ModelServer, client: Client) -> None:
    server.faults = [
        Fault("status", status=429, code="insufficient_quota"),
        Fault("status", status=429),
        Fault("status", status=402, code="contract_spend_limit_reached"),
    ]
    with pytest.raises(openai.RateLimitError) as quota:
        client.create("chat")
    with pytest.raises(openai.RateLimitError) as rate:
        client.create("responses")
    with pytest.raises(anthropic.PaymentRequiredError) as billing:
        client.create("messages")
    assert (quota.value.code, quota.value.type) == ("insufficient_quota", "insufficient_quota")
    assert (rate.value.code, rate.value.type) == ("rate_limit_exceeded", "requests")
    assert billing.value.error_code == "contract_spend_limit_reached"


def test_sdks_retry_as_the_headers_say(server: ModelServer) -> None:
    client = Client(server, max_retries=2)
    soon = {"retry-after-ms": "1"}
    for wire in WIRES:
        server.faults = [Fault("status", status=529, headers=soon), Fault("reset", headers=soon)]
        before = len(server.requests)
        if wire == "messages":  # one wire is enough: after a reset the SDKs wait half a second
            assert text_of(wire, client.create(wire))
            assert len(server.requests) - before == 3
        server.faults = [Fault("status", status=500, headers={"x-should-retry": "false"})]
        before = len(server.requests)
        with pytest.raises(sdk(wire).InternalServerError):
            client.create(wire)
        assert len(server.requests) - before == 1
    client.close()


@pytest.mark.parametrize("wire", WIRES)
def test_broken_transport(server: ModelServer, client: Client, wire: str) -> None:
    """What the SDKs make of it; none of it is money that the client knows of."""
    server.faults = [
        Fault("reset"),
        Fault("cut"),
        Fault("empty"),
        Fault("not_json"),
        Fault("html", status=200),
        Fault("html"),
    ]
    with pytest.raises(sdk(wire).APIConnectionError):
        client.create(wire)
    with pytest.raises(sdk(wire).APIConnectionError):
        client.create(wire)
    for _ in ("empty", "not_json"):  # 200, announced as JSON, and none
        with pytest.raises(json.JSONDecodeError):
            client.create(wire)
    # Text/html: the SDKs hand out the page as a string.
    assert "502 Bad Gateway" in client.create(wire)
    with pytest.raises(sdk(wire).InternalServerError):
        client.create(wire)
    assert [r.status for r in server.requests] == [None, 200, 200, 200, 200, 502]
    assert server.tokens == Tokens()
    assert server.undelivered.output == 4 * count_tokens(json.dumps(SAID))  # html asks no model
    assert text_of(wire, client.create(wire))
    assert server.tokens.output == count_tokens(json.dumps(SAID))


@pytest.mark.parametrize("kind", ["slow", "drip"])
def test_patience(server: ModelServer, client: Client, kind: str) -> None:
    """A slow answer arrives; one that is slower than the client's patience is undelivered. A drip
    outlives any read timeout."""
    server.faults = [Fault(kind, seconds=0.05), Fault(kind, seconds=30.0)]
    assert text_of("messages", client.create("messages"))
    delivered = server.tokens
    assert delivered.output
    if kind == "slow":
        with pytest.raises(anthropic.APITimeoutError):
            client.create("messages", timeout=0.1)
        assert server.tokens == delivered
    else:  # the timeout is between bytes: the whole takes longer, and passes
        server.faults = [Fault(kind, seconds=3.0)]
        assert text_of("messages", client.create("messages", timeout=2.5))


@pytest.mark.parametrize("wire", WIRES)
def test_what_else_a_model_says(server: ModelServer, client: Client, wire: str) -> None:
    def say(kind: str) -> Any:
        server.faults = [Fault(kind)]
        return client.create(wire)

    whole = json.dumps(SAID)
    cut = say("truncated")
    assert text_of(wire, cut) == whole[: len(whole) // 2]
    refusal, empty, tool, filtered = (
        say("refusal"),
        say("empty_content"),
        say("tool_use"),
        say("content_filter"),
    )
    if wire == "messages":
        assert (cut.stop_reason, refusal.stop_reason, tool.stop_reason) == (
            "max_tokens",
            "refusal",
            "tool_use",
        )
        assert (refusal.content, refusal.stop_details.category, empty.content) == (
            [],
            "frontier_llm",
            [],
        )
        assert tool.content[0].type == "tool_use"
        assert filtered.stop_reason == "refusal"
        assert say("pause_turn").stop_reason == "pause_turn"
        assert say("context_window").stop_reason == "model_context_window_exceeded"
    elif wire == "chat":
        assert [r.choices[0].finish_reason for r in (cut, tool, filtered)] == [
            "length",
            "tool_calls",
            "content_filter",
        ]
        assert (refusal.choices[0].message.content, empty.choices) == (None, [])
        assert refusal.choices[0].message.refusal
        assert tool.choices[0].message.tool_calls[0].function.name == "lookup"
    else:
        assert [(r.status, r.incomplete_details.reason) for r in (cut, filtered)] == [
            ("incomplete", "max_output_tokens"),
            ("incomplete", "content_filter"),
        ]
        assert (refusal.output[0].content[0].type, refusal.status, empty.output) == (
            "refusal",
            "completed",
            [],
        )
        assert tool.output[0].type == "function_call"
        assert (say("failed").status, say("failed").error.code) == ("failed", "server_error")
        spoken = say("commentary")
        assert [m.phase for m in spoken.output] == ["commentary", "final_answer"]
        assert json.loads(spoken.output[1].content[0].text) == SAID
        with pytest.raises(ValueError):  # both texts in one
            json.loads(spoken.output_text)
    if wire != "messages":
        with pytest.raises(openai.BadRequestError) as caught:
            say("context_window")
        assert caught.value.code == "context_length_exceeded"
    assert json.loads(text_of(wire, say("missing_field"))) == {"rationale": SAID["rationale"]}
    assert text_of(wire, say("fenced")) == f"```json\n{whole}\n```"
    assert whole in text_of(wire, say("extra_text"))
    assert say("no_usage").usage is None


def test_an_anthropic_cache_writes_then_reads(server: ModelServer, client: Client) -> None:
    def ask(stable: str, user: str, ttl: str = "5m") -> Any:
        system = [
            {"type": "text", "text": stable, "cache_control": {"type": "ephemeral", "ttl": ttl}}
        ]
        return client.create("messages", user, system=system).usage

    def read(u: Any) -> tuple[int, int, int]:
        return u.input_tokens, u.cache_creation_input_tokens, u.cache_read_input_tokens

    assert read(ask("one two three", "four five")) == (2, 3, 0)
    assert read(ask("one two three", "six")) == (1, 0, 3)
    hour = ask("one two more", "six", "1h")
    assert (read(hour), hour.cache_creation.ephemeral_1h_input_tokens) == ((1, 3, 0), 3)
    longer = [
        {"type": "text", "text": t, "cache_control": {"type": "ephemeral"}}
        for t in ("one two three", "seven eight")
    ]
    assert read(client.create("messages", "nine", system=longer).usage) == (1, 2, 3)
    # No cache_control, no cache.
    assert read(client.create("messages", "nine", system="one two three").usage) == (4, 0, 0)
    assert (server.tokens.input, server.tokens.cached, server.tokens.written) == (
        5 + 4 + 4 + 6 + 4,
        3 + 3,
        3 + 3 + 2,
    )


@pytest.mark.parametrize("wire", ["chat", "responses"])
def test_an_openai_cache_reads_what_it_has_seen(
    server: ModelServer, client: Client, wire: str
) -> None:
    def cached(user: str) -> int:
        used = client.create(wire, user).usage
        return (
            used.prompt_tokens_details if wire == "chat" else used.input_tokens_details
        ).cached_tokens

    server.prefix = 20
    stable = "word " * 30
    assert cached(stable + "first") == 0
    # 172 characters, of which the cache knows multiples of 20.
    seen = ("You are a judge.\n" + stable)[:160]
    assert cached(stable + "other") == count_tokens(seen)
    assert cached("nothing of it, " + stable) == 0


@pytest.mark.parametrize("wire", ["chat", "responses"])
def test_logprobs(wire: str) -> None:
    def tokens(asked: Asked, text: str) -> list[dict[str, Any]]:
        others = [
            {"token": "A", "logprob": -0.5},
            {"token": "B", "logprob": -1.0},
            {"token": "é", "logprob": -3.0},
        ]
        return [{"token": text, "logprob": -0.5, "top_logprobs": others}]

    more = {"logprobs": True} if wire == "chat" else {"include": ["message.output_text.logprobs"]}
    with ModelServer(lambda asked: "A", token_logprobs=tokens) as server:
        client = Client(server)
        reply = client.create(wire, top_logprobs=2, **more)
        found = (
            reply.choices[0].logprobs.content
            if wire == "chat"
            else reply.output[0].content[0].logprobs
        )
        assert [(t.token, t.logprob, t.bytes) for t in found] == [("A", -0.5, [65])]
        assert [(t.token, t.logprob) for t in found[0].top_logprobs] == [("A", -0.5), ("B", -1.0)]
        reply = client.create(wire)
        assert not (
            reply.choices[0].logprobs if wire == "chat" else reply.output[0].content[0].logprobs
        )
        server.token_logprobs = None
        with pytest.raises(openai.PermissionDeniedError):
            client.create(wire, **more)
        client.close()


def test_rate_limits_and_ids_in_headers(client: Client) -> None:
    reply = client.raw("messages")
    assert reply.headers["request-id"].startswith("req_011")
    assert reply.headers["anthropic-ratelimit-requests-remaining"] == "3999"
    for wire in ("chat", "responses"):
        reply = client.raw(wire)
        assert reply.headers["x-request-id"].startswith("req_")
        assert int(reply.headers["x-ratelimit-remaining-requests"]) < 4000


@pytest.mark.parametrize("wire", WIRES)
def test_wrong_requests_are_refused(server: ModelServer, client: Client, wire: str) -> None:
    refused = sdk(wire).BadRequestError
    loose = {k: v for k, v in SCHEMA.items() if k != "additionalProperties"}
    partial = {**SCHEMA, "required": ["winner"]}
    bounded = {
        **SCHEMA,
        "properties": {
            "rationale": {"type": "string", "maxLength": 9},
            "winner": {"type": "string"},
        },
    }
    with pytest.raises(refused, match="additionalProperties"):
        client.create(wire, schema=loose)
    if wire == "messages":
        assert text_of(wire, client.create(wire, schema=partial))
        with pytest.raises(refused, match="maxLength"):
            client.create(wire, schema=bounded)
    else:
        assert text_of(wire, client.create(wire, schema=bounded))
        with pytest.raises(refused, match="rationale"):
            client.create(wire, schema=partial)
    with pytest.raises(refused, match="model"):
        client.create(wire, model="")
    bare = urllib.request.Request(server.url + "/v1/messages", data=b"{}", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(bare)


def test_faults_by_function_and_usage_by_function(server: ModelServer, client: Client) -> None:
    server.faults = lambda asked: Fault("status", status=503) if "bad" in asked.user else None
    server.usage = lambda asked, tokens: Tokens(input=1000, cached=10, output=7)
    assert client.create("chat", "good").usage.prompt_tokens == 1000
    with pytest.raises(openai.InternalServerError):
        client.create("chat", "bad")
    assert server.tokens == Tokens(1000, 10, 0, 7)


def test_what_a_test_raises_is_heard() -> None:
    """A wrong answer function, a fault that a wire does not know: status 500 for the client, an
    exception for the test."""
    for answer, faults in (
        (lambda asked: {}["missing"], []),
        (lambda asked: "x", [Fault("commentary")]),
    ):
        with pytest.raises((KeyError, ValueError)), ModelServer(answer) as server:
            client = Client(server, max_retries=2)
            server.faults = faults
            with pytest.raises(anthropic.InternalServerError):
                client.create("messages")
            assert len(server.requests) == 1  # not retried
            client.close()
    with pytest.raises(ValueError, match="no fault 'explode'"):
        Fault("explode")
    with pytest.raises(ValueError, match="needs a status"):
        Fault("status")


def test_many_at_once(server: ModelServer, client: Client) -> None:
    barrier = threading.Barrier(8)

    def ask(number: int) -> str:
        barrier.wait(10)
        return text_of("chat", client.create("chat", f"question {number}"))

    server.faults = lambda asked: Fault("slow", seconds=0.2)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(ask, range(8)))) == 8
    assert sorted(r.asked.number for r in server.requests if r.asked) == list(range(8))
    assert 1 < server.most_at_once <= 8
    assert {r.asked.user for r in server.requests if r.asked} == {f"question {n}" for n in range(8)}


def test_one_connection_serves_many_requests(server: ModelServer) -> None:
    """Keep-alive, a chunked body, and a refusal in between; a request that asks for it ends the
    connection."""
    link = http.client.HTTPConnection("127.0.0.1", urlsplit(server.url).port)
    headers = {"authorization": "Bearer x", "content-type": "application/json"}
    body = json.dumps(request("chat")).encode()
    link.request("POST", "/v1/chat/completions", body, headers)
    assert json.load(link.getresponse())["object"] == "chat.completion"
    held = link.sock
    link.request("GET", "/v1/nothing", headers=headers)
    reply = link.getresponse()
    assert (reply.status, json.load(reply)["error"]["message"]) == (
        404,
        "Invalid URL (GET /v1/nothing)",
    )
    link.request(
        "POST", "/v1/chat/completions", iter([body[:10], body[10:]]), headers, encode_chunked=True
    )
    assert json.load(link.getresponse())["usage"]["prompt_tokens"] == 9
    assert link.sock is held
    link.request("POST", "/v1/chat/completions", body, {**headers, "connection": "close"})
    reply = link.getresponse()
    assert json.load(reply)["model"] == "gpt-x"
    assert reply.getheader("connection") == "close"
    link.close()
    assert server.count("/v1/chat/completions", status=200) == 3


# Batches


def test_anthropic_batches_end_to_end(server: ModelServer, client: Client) -> None:
    batches = client.anthropic.messages.batches
    params = {f"c{n}": request("messages", f"question {n}") for n in range(5)}
    del params["c4"]["max_tokens"]
    ends: dict[str, Fault] = {
        "c1": Fault("status", status=529),
        "c2": Fault("expired"),
        "c3": Fault("refusal"),
    }
    server.faults = lambda asked: ends.get(asked.custom_id or "")
    made = batches.create(requests=[{"custom_id": k, "params": p} for k, p in params.items()])
    assert (made.processing_status, made.request_counts.processing, made.results_url) == (
        "in_progress",
        5,
        None,
    )
    assert batches.retrieve(made.id).processing_status == "in_progress"
    ended = batches.retrieve(made.id)
    counts = ended.request_counts
    assert (ended.processing_status, counts.succeeded, counts.errored, counts.expired) == (
        "ended",
        2,
        2,
        1,
    )
    results = list(batches.results(made.id))
    assert [r.custom_id for r in results] == ["c4", "c3", "c2", "c1", "c0"]
    by = {r.custom_id: r.result for r in results}
    assert json.loads(by["c0"].message.content[0].text) == SAID
    assert by["c0"].message.usage.service_tier == "batch"
    assert (by["c3"].message.stop_reason, by["c2"].type) == ("refusal", "expired")
    assert [by[c].error.error.type for c in ("c1", "c4")] == [
        "overloaded_error",
        "invalid_request_error",
    ]
    assert [a.custom_id for a in server.billed_batch_items] == ["c0", "c3"]
    assert server.tokens == Tokens()
    assert server.batch_tokens.output == 2 * count_tokens(json.dumps(SAID))
    with pytest.raises(anthropic.BadRequestError, match="unique"):
        batches.create(requests=[{"custom_id": "c", "params": params["c0"]}] * 2)


def test_anthropic_batches_are_listed_in_pages_and_canceled(
    server: ModelServer, client: Client
) -> None:
    batches = client.anthropic.messages.batches
    server.batch_polls = None
    names = [
        batches.create(requests=[{"custom_id": "c", "params": request("messages")}]).id
        for _ in range(5)
    ]
    page = batches.list(limit=2)
    assert ([b.id for b in page.data], page.has_more) == (names[:2:-1], True)
    assert (page.first_id, page.last_id) == (names[4], names[3])
    assert [b.id for b in batches.list(limit=2)] == names[::-1]  # the SDK turns the pages
    assert [b.id for b in batches.list(limit=2, before_id=names[1]).data] == [names[3], names[2]]
    assert batches.cancel(names[0]).processing_status == "canceling"
    assert batches.retrieve(names[1]).processing_status == "in_progress"
    server.finish_batches()
    assert [r.result.type for r in batches.results(names[0])] == ["canceled"]
    assert [r.result.type for r in batches.results(names[1])] == ["succeeded"]
    assert len(server.billed_batch_items) == 4


@pytest.mark.parametrize("wire", ["chat", "responses"])
def test_openai_batches_end_to_end(server: ModelServer, client: Client, wire: str) -> None:
    api, endpoint = (
        client.openai,
        {"chat": "/v1/chat/completions", "responses": "/v1/responses"}[wire],
    )
    bodies = {f"c{n}": request(wire, f"frage nö. {n}\nzwei") for n in range(4)}
    lines = [
        {"custom_id": k, "method": "POST", "url": endpoint, "body": b} for k, b in bodies.items()
    ]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    ends = {"c1": Fault("status", status=500), "c2": Fault("expired")}
    server.faults = lambda asked: ends.get(asked.custom_id or "")
    file = api.files.create(file=("requests.jsonl", content), purpose="batch")
    assert (file.filename, file.bytes, file.purpose) == ("requests.jsonl", len(content), "batch")
    assert api.files.content(file.id).content == content
    with pytest.raises(openai.BadRequestError, match="purpose"):
        api.files.create(file=("requests.jsonl", content), purpose=openai.omit)
    made = api.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"run": "7"}
    )
    assert (made.status, made.metadata) == ("validating", {"run": "7"})
    assert api.batches.retrieve(made.id).status == "in_progress"
    ended = api.batches.retrieve(made.id)
    assert (ended.status, ended.request_counts.completed, ended.request_counts.failed) == (
        "expired",
        2,
        2,
    )
    good = [json.loads(line) for line in api.files.content(ended.output_file_id).text.splitlines()]
    bad = [json.loads(line) for line in api.files.content(ended.error_file_id).text.splitlines()]
    assert [(line["custom_id"], line["response"]["status_code"]) for line in good] == [
        ("c3", 200),
        ("c0", 200),
    ]
    assert (
        good[0]["response"]["body"]["object"]
        == {"chat": "chat.completion", "responses": "response"}[wire]
    )
    assert [line["custom_id"] for line in bad] == ["c2", "c1"]
    assert (bad[0]["error"]["code"], bad[1]["response"]["status_code"]) == ("batch_expired", 500)
    assert [a.user for a in server.billed_batch_items] == [
        bodies[c]["input" if wire == "responses" else "messages"][-1]["content"]
        for c in ("c0", "c3")
    ]
    assert [b.id for b in api.batches.list(limit=1)] == [made.id]


def test_openai_batches_fail_validation_and_are_canceled(
    server: ModelServer, client: Client
) -> None:
    api = client.openai
    line = {
        "custom_id": "c",
        "method": "POST",
        "url": "/v1/responses",
        "body": request("responses"),
    }

    def create(content: str) -> Any:
        file = api.files.create(file=("r.jsonl", content.encode()), purpose="batch")
        return api.batches.create(
            input_file_id=file.id, endpoint="/v1/responses", completion_window="24h"
        )

    elsewhere = {**line, "custom_id": "d", "url": "/v1/x"}
    failed = create(
        "\n".join([json.dumps(line), json.dumps(line), "nonsense", json.dumps(elsewhere)])
    )
    assert failed.status == "failed"
    assert [(e.line, e.code) for e in failed.errors.data] == [
        (2, "duplicate_custom_id"), (3, "invalid_json_line"), (4, "mismatched_url")
    ]  # fmt: skip
    made = create(json.dumps(line))
    assert api.batches.cancel(made.id).status == "cancelling"
    ended = api.batches.retrieve(made.id)
    assert (ended.status, ended.output_file_id) == ("cancelled", None)
    assert server.billed_batch_items == []


def test_a_lost_answer_to_a_creation_leaves_a_batch(server: ModelServer, client: Client) -> None:
    """What makes clients pay twice: the batch is there, the client does not know."""
    server.call_faults = [Fault("status", status=529), Fault("reset"), Fault("cut")]
    batches = client.anthropic.messages.batches
    wanted = [{"custom_id": "c", "params": request("messages")}]
    with pytest.raises(anthropic.OverloadedError):
        batches.create(requests=wanted)
    for _ in ("reset", "cut"):
        with pytest.raises(anthropic.APIConnectionError):
            batches.create(requests=wanted)
    assert len(batches.list().data) == 2
    server.finish_batches()
    assert [a.custom_id for a in server.billed_batch_items] == ["c", "c"]


def test_as_a_process(tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def judge(asked):\n    return {'rationale': asked.user[::-1], 'winner': 'tie'}\n"
    )
    for behaviour, expected in (
        ("echo", "abc"),
        ("example", '{"rationale": "text", "winner": "A"}'),
        (f"{judge}:judge", None),
    ):
        command = [sys.executable, model_server.__file__, "--port", "0", "--behaviour", behaviour]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        ) as process:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            client = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)
            said = client.messages.create(**request("messages", "abc")).content[0].text
            with urllib.request.urlopen(f"{url}/__stats") as reply:
                stats = json.load(reply)
            client.close()
            process.terminate()
            assert process.wait() == 0
        assert said == (expected or '{"rationale": "cba", "winner": "tie"}')
        assert (
            stats["questions"],
            stats["requests"]["POST /v1/messages"],
            stats["tokens"]["input"],
        ) == (1, 1, 6)


def test_a_server_ends_while_clients_wait() -> None:
    failed: list[BaseException] = []

    def ask(client: Client) -> None:
        try:
            client.create("messages")
        except anthropic.APIConnectionError as error:
            failed.append(error)

    with ModelServer(lambda asked: "x") as server:
        server.faults = [Fault("slow", seconds=1000)]
        client = Client(server)
        waiting = threading.Thread(target=ask, args=(client,))
        waiting.start()
        wait_for(lambda: len(server.requests) == 1)
    waiting.join(10)
    assert len(failed) == 1
    client.close()


def wait_for(true: Callable[[], bool]) -> None:
    given_up = threading.Event()
    for _ in range(1000):
        if true():
            return
        given_up.wait(0.01)
    raise AssertionError("It did not happen within ten seconds.")
