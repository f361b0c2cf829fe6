"""Serves models on the loopback: speaks the wire formats of model APIs and fails on demand.

It answers Anthropic's Messages and Message Batches and OpenAI's Chat Completions, Responses, Files
and Batches over real sockets, so official SDKs are tested as they are, with their connection pools,
timeouts and retries:

    with ModelServer(lambda asked: {"winner": "A"}) as server: client =
        anthropic.Anthropic(base_url=server.url, api_key="test")  # OpenAI: server.url + "/v1"
        server.faults = [Fault("status", status=529), None]  # the first request is refused, all
        others are answered

Requests are parsed and replies are framed by h11; the bytes are written here, so that a body can be
cut or dripped. Requests that the services would refuse (no key, missing fields, schemas outside of
their subsets of JSON Schema) are refused here too. The shapes are those of the types of anthropic
2.11 and openai 3.52; streaming is not spoken.

It also runs as a process: `python tests/support/model_server.py --port 0 --behaviour echo` prints
its URL; `GET /__stats` counts.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.util
import io
import json
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import h11
from python_multipart.multipart import parse_form

WIRES = {"/v1/messages": "messages", "/v1/chat/completions": "chat", "/v1/responses": "responses"}
REFUSED = ("status", "html")  # nothing is done
# The work is done; its answer is late, damaged or lost.
LOST = ("slow", "drip", "cut", "empty", "reset", "not_json")
SAID = (  # the model said something else, or the envelope is unusual
    "empty_content", "truncated", "refusal", "content_filter", "context_window", "pause_turn",
    "tool_use", "failed",
    "missing_field", "extra_text", "fenced", "no_usage", "commentary",
)  # fmt: skip
ENDED = ("expired", "canceled")  # how an item of a batch ends without an answer
UNDELIVERED = ("cut", "empty", "reset", "not_json")
ONLY = {"pause_turn": ("messages",), "failed": ("responses",), "commentary": ("responses",)}


@dataclass(frozen=True)
class Asked:
    """A question to a model, whatever the wire format; `number` counts them from 0, items of
    batches included."""

    wire: str  # messages | chat | responses
    model: str
    system: str
    user: str  # of all user messages, blocks joined by newlines
    schema: dict[str, Any] | None
    body: dict[str, Any]
    headers: Mapping[str, str]
    number: int
    custom_id: str | None = None  # of an item of a batch


@dataclass(frozen=True)
class Fault:
    """What goes wrong with an answer.

    `REFUSED` kinds are answered before any work is done: `status` (with `status`, and `code` for
    the error's code) and `html`, a proxy's page (`status` 502 unless told). `LOST` kinds do the
    work: `slow` (`seconds` before the first byte), `drip` (the body byte by byte over `seconds`),
    `cut` (half of the promised body, then the connection is closed), `empty` (200 without a body),
    `reset` (TCP reset without an answer), `not_json`. `SAID` kinds are answers, with status 200
    except `context_window` on OpenAI's wires (400). `ENDED` kinds are for items of batches, where
    `status` means errored. `seconds` delay any kind; `headers` are added, such as {"retry-after":
    "2"} or {"x-should-retry": "false"}.
    """

    kind: str
    status: int = 0
    seconds: float = 0.0
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = (*REFUSED, *LOST, *SAID, *ENDED)
        if self.kind not in known:
            raise ValueError(f"There is no fault {self.kind!r}; there are: {', '.join(known)}.")
        if self.kind == "status" and not 400 <= self.status < 600:
            raise ValueError("A fault of kind 'status' needs a status from 400 to 599.")


@dataclass(frozen=True)
class Tokens:
    """Tokens of requests. `input` includes those read from the cache (`cached`) and those written
    to it (`written`)."""

    input: int = 0
    cached: int = 0
    written: int = 0
    output: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            *(
                getattr(self, f) + getattr(other, f)
                for f in ("input", "cached", "written", "output")
            )
        )

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(
            *(
                getattr(self, f) - getattr(other, f)
                for f in ("input", "cached", "written", "output")
            )
        )


@dataclass
class Received:
    """An HTTP request and what became of it: `status` is None until it is answered, and stays None
    after a reset."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    at: float  # time.monotonic()
    asked: Asked | None = None
    status: int | None = None
    fault: Fault | None = None


@dataclass
class Reply:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    fault: Fault | None = None
    tokens: Tokens | None = None  # of a completion

    @classmethod
    def of(cls, content: Any, status: int = 200, **more: Any) -> Reply:
        return cls(
            status, json.dumps(content).encode(), {"content-type": "application/json"}, **more
        )


@dataclass
class Batch:
    """A batch of either service: `items` are (custom_id, body); `results` are in place when it has
    ended."""

    id: str
    anthropic: bool
    items: list[tuple[str, dict[str, Any]]]
    headers: Mapping[str, str]
    created: datetime
    wire: str = "messages"
    request: dict[str, Any] = field(default_factory=dict)  # OpenAI: what it was created with
    errors: list[dict[str, Any]] = field(default_factory=list)  # OpenAI: why it failed validation
    looks: int = 0
    canceling: bool = False
    ended: datetime | None = None
    # Custom_id, how it ended, what was said.
    results: list[tuple[str, str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # OpenAI: "output" and "error"


class Refusal(Exception):
    """A request that the service refuses, with the status and, for OpenAI, the parameter and
    code."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


Answer = Callable[[Asked], "str | dict[str, Any]"]
Schedule = Iterable["Fault | None"] | Callable[[Any], "Fault | None"]


class ModelServer:
    """Serves `answer` as a model, on a port of 127.0.0.1, while the `with` block runs.

    `answer`, fault functions and `token_logprobs` are called one at a time and hold up all
    connections: they should be quick. What they raise is answered as status 500 and raised again at
    the end of the `with` block.

    Attributes:
        url: root of the server. Anthropic's `base_url` is `url`, OpenAI's is `url + "/v1"`.
        faults: of questions and of batches' items: one Fault or None per question in the order of
            arrival (none after the end), or a function of `Asked`.
        call_faults: of all other requests (files, batches), likewise; a function is given
            `Received`. Kinds of `SAID` and `ENDED` mean nothing there.
        dialect: None, or what is answered instead by a server that is only almost compatible: a
            function of `Asked` that returns status, body (JSON data, or bytes) and headers, or None
            where it answers as usual.
        batch_errors: why OpenAI's batches are not accepted, as it writes it; empty: they are.
        batch_polls: so many looks see a batch in progress, the next one sees it ended; None: only
            `finish_batches()` ends it.
        usage: None, or changes the tokens that are reported and billed: a function of (Asked,
            Tokens).
        prefix: characters that OpenAI's cache works in: a repeated prompt is read from the cache in
            multiples of them.
        requests: everything received.
        tokens: of completions that were delivered; `undelivered`: of those that were made, and lost
            on the way.
        billed_batch_items: the items of batches that were answered, each time they were;
            `batch_tokens`: theirs.
        most_at_once: the most questions that were in progress at once.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        token_logprobs: Callable[[Asked, str], list[dict[str, Any]]] | None = None,
        port: int = 0,
    ) -> None:
        self.answer, self.token_logprobs, self._port = answer, token_logprobs, port
        self.faults: Schedule = ()
        self.call_faults: Schedule = ()
        self.dialect: Callable[[Asked], tuple[int, Any, dict[str, str]] | None] | None = None
        self.batch_errors: list[dict[str, Any]] = []
        self.batch_polls: int | None = 1
        self.usage: Callable[[Asked, Tokens], Tokens] | None = None
        self.prefix = 1024
        self.requests: list[Received] = []
        self.tokens, self.undelivered, self.batch_tokens = Tokens(), Tokens(), Tokens()
        self.billed_batch_items: list[Asked] = []
        self.most_at_once = 0
        self._at_once = self._asked = self._ids = 0
        self._schedules: dict[str, tuple[Any, Iterator[Fault | None]]] = {}
        self._cache: set[tuple[str, str]] = set()
        self._batches: dict[str, Batch] = {}
        self._files: dict[str, dict[str, Any]] = {}
        self._broken: list[Exception] = []
        self._lock = threading.RLock()

    def __enter__(self) -> ModelServer:
        started: Future[str] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(started)), name="model-server", daemon=True
        )
        self._thread.start()
        self.url = started.result()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        if self._broken and kind is None:
            raise self._broken[0]

    def count(
        self, path: str | None = None, *, wire: str | None = None, status: int | None = None
    ) -> int:
        """How many requests were received, of a path, of a wire, answered with a status."""
        return sum(
            (path is None or r.path == path)
            and (wire is None or (r.asked is not None and r.asked.wire == wire))
            and (status is None or r.status == status)
            for r in list(self.requests)
        )

    def finish_batches(self) -> None:
        """Ends all batches now."""
        with self._lock:
            for batch in self._batches.values():
                self._end(batch)

    def stats(self) -> dict[str, Any]:
        """Counts, as JSON."""
        with self._lock:
            paths = [f"{r.method} {r.path}" for r in self.requests]
            return {
                "requests": {p: paths.count(p) for p in sorted(set(paths))},
                "questions": sum(r.asked is not None for r in self.requests),
                "tokens": vars(self.tokens),
                "undelivered": vars(self.undelivered),
                "batches": len(self._batches),
                "billed_batch_items": len(self.billed_batch_items),
                "batch_tokens": vars(self.batch_tokens),
                "most_at_once": self.most_at_once,
            }

    # Sockets

    async def _serve(self, started: Future[str]) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        tasks: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await self._converse(reader, writer)
            except (ConnectionError, h11.RemoteProtocolError, asyncio.CancelledError):
                pass
            finally:
                tasks.discard(task)
                writer.close()

        try:
            server = await asyncio.start_server(connected, "127.0.0.1", self._port)
        except OSError as error:
            started.set_exception(error)
            return
        started.set_result(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await self._stopped.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads requests of a connection and answers them, until one side closes it."""
        http = h11.Connection(h11.SERVER)
        while received := await self._receive(http, reader, writer):
            with self._lock:
                self.requests.append(received)
                reply = self._reply(received)
                question = received.asked is not None
                self._at_once += question
                self.most_at_once = max(self.most_at_once, self._at_once)
            try:
                if not await self._send(http, reader, writer, received, reply):
                    return
            finally:
                self._at_once -= question
            if http.our_state is h11.MUST_CLOSE:
                return
            http.start_next_cycle()

    async def _receive(
        self, http: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Received | None:
        request, body = None, bytearray()
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                if http.they_are_waiting_for_100_continue:
                    writer.write(
                        http.send(h11.InformationalResponse(status_code=100, headers=[])) or b""
                    )
                http.receive_data(await reader.read(1 << 16))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and request is not None:
                target = urlsplit(request.target.decode())
                query = {k: v[-1] for k, v in parse_qs(target.query).items()}
                headers = {k.decode(): v.decode("latin-1") for k, v in request.headers}
                return Received(
                    request.method.decode(),
                    target.path,
                    query,
                    headers,
                    bytes(body),
                    time.monotonic(),
                )
            else:  # closed
                return None

    async def _send(
        self,
        http: h11.Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        received: Received,
        reply: Reply,
    ) -> bool:
        """Writes the reply as its fault wants it; whether the connection can go on. Counts before
        the client can know."""
        fault = reply.fault or Fault("slow")
        made = reply.tokens or Tokens()
        if fault.seconds and fault.kind != "drip":
            await asyncio.sleep(fault.seconds)
        if fault.kind == "reset" or reader.at_eof():  # at_eof: the client did not wait
            with self._lock:
                self.undelivered += made
            linger = struct.pack("ii", 1, 0)  # close() sends RST
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            return False
        if fault.kind in ("empty", "not_json"):
            reply.body = (
                b""
                if fault.kind == "empty"
                else b"upstream connect error or disconnect/reset before headers"
            )
        headers = {**reply.headers, **fault.headers, "content-length": str(len(reply.body))}
        head = (
            http.send(h11.Response(status_code=reply.status, headers=list(headers.items()))) or b""
        )
        body = http.send(h11.Data(data=reply.body)) or b""
        http.send(h11.EndOfMessage())
        with self._lock:
            received.status = reply.status
            if fault.kind in UNDELIVERED:
                self.undelivered += made
            else:
                self.tokens += made
        try:
            if fault.kind == "cut":
                writer.write(head + body[: len(body) // 2])
                await writer.drain()
                return False
            if fault.kind == "drip":
                writer.write(head)
                for byte in body:
                    await asyncio.sleep(fault.seconds / len(body))
                    if reader.at_eof():
                        raise ConnectionResetError
                    writer.write(bytes([byte]))
                    await writer.drain()
            else:
                writer.write(head + body)
                await writer.drain()
        except ConnectionError:
            if fault.kind not in UNDELIVERED:
                with self._lock:
                    self.tokens -= made
                    self.undelivered += made
            raise
        return True

    # What is answered

    def _reply(self, received: Received) -> Reply:
        wire = WIRES.get(received.path) if received.method == "POST" else None
        anthropic = received.path.startswith("/v1/messages")
        try:
            if received.path == "/__stats":
                return Reply.of(self.stats())
            if received.path == "/__finish_batches":
                self.finish_batches()
                return Reply.of({})
            if not received.headers.get("authorization", received.headers.get("x-api-key")):
                raise Refusal(401, "No API key was given.", code="invalid_api_key")
            if wire:
                reply = self._complete(received, wire)
            else:
                received.fault = self._fault("call_faults", received)
                reply = self._refused(received.fault, anthropic) or self._call(received, anthropic)
        except Refusal as refusal:
            reply = self._error(refusal, anthropic)
        except Exception as error:
            self._broken.append(error)
            reply = self._error(Refusal(500, f"The test's own code failed: {error!r}"), anthropic)
            reply.headers["x-should-retry"] = "false"
        reply.fault = received.fault
        reply.headers = {**self._headers(anthropic), **reply.headers}
        return reply

    def _fault(self, schedule: str, about: Any) -> Fault | None:
        """The next fault of a schedule. An iterable is read once, from when it was assigned."""
        given = getattr(self, schedule)
        if callable(given):
            return given(about)
        held = self._schedules.get(schedule)
        if held is None or held[0] is not given:
            held = self._schedules[schedule] = (given, iter(given))
        return next(held[1], None)

    def _refused(self, fault: Fault | None, anthropic: bool) -> Reply | None:
        if fault is None or fault.kind not in REFUSED:
            return None
        if fault.kind == "html":
            page = (
                b"<html><head><title>Bad Gateway</title></head><body><center><h1>502 Bad"
                b" Gateway</h1></center></body></html>"
            )
            return Reply(fault.status or 502, page, {"content-type": "text/html"})
        said = MESSAGES.get(fault.code or fault.status, "It failed.")
        return self._error(Refusal(fault.status, said, code=fault.code), anthropic, fault.code)

    def _error(self, refusal: Refusal, anthropic: bool, code: str | None = None) -> Reply:
        """The body of an error; `code` is for Anthropic, whose own refusals here have none."""
        body = (
            anthropic_error(refusal, self._id("req_011"), code)
            if anthropic
            else openai_error(refusal)
        )
        return Reply.of(body, refusal.status)

    def _headers(self, anthropic: bool) -> dict[str, str]:
        """Ids and rate limits. Windows of a minute are not modelled: what remains only falls."""
        request = self._id("req_011" if anthropic else "req_")
        remaining, tokens = (
            max(0, 4000 - len(self.requests)),
            max(0, 400_000 - self.tokens.input - self.tokens.output),
        )
        if anthropic:
            reset = datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
            limits = {"requests": (4000, remaining), "tokens": (400_000, tokens)}
            found = {"request-id": request}
            for what, (limit, left) in limits.items():
                for name, value in (("limit", limit), ("remaining", left), ("reset", reset)):
                    found[f"anthropic-ratelimit-{what}-{name}"] = str(value)
            return found
        parts = {
            "limit-requests": "4000",
            "remaining-requests": str(remaining),
            "reset-requests": "15ms",
        }
        parts |= {"limit-tokens": "400000", "remaining-tokens": str(tokens), "reset-tokens": "90ms"}
        return {
            "x-request-id": request,
            "openai-processing-ms": "12",
            **{f"x-ratelimit-{k}": v for k, v in parts.items()},
        }

    def _id(self, start: str) -> str:
        self._ids += 1
        return start + hashlib.sha256(f"{start}{self._ids}".encode()).hexdigest()[:24]

    # A question

    def _complete(self, received: Received, wire: str) -> Reply:
        body = parse(received.body)
        check(wire, body)
        asked = received.asked = self._question(wire, body, received.headers)
        if self.dialect is not None and (said := self.dialect(asked)) is not None:
            status, content, headers = said
            reply = (
                Reply(status, content) if isinstance(content, bytes) else Reply.of(content, status)
            )
            reply.headers |= headers
            return reply
        fault = received.fault = self._fault("faults", asked)
        if fault is not None and fault.kind in ENDED:
            raise ValueError(f"Only items of a batch end as {fault.kind!r}.")
        if refused := self._refused(fault, wire == "messages"):
            return refused
        content, tokens = self._said(asked, fault, "standard")
        return Reply.of(content, tokens=tokens)

    def _question(
        self,
        wire: str,
        body: dict[str, Any],
        headers: Mapping[str, str],
        custom_id: str | None = None,
    ) -> Asked:
        number, self._asked = self._asked, self._asked + 1
        parts = prompt(wire, body)
        system, user = (
            "\n".join(t for role, t, _ in parts if role in roles)
            for roles in (("system", "developer"), ("user",))
        )
        return Asked(
            wire,
            body["model"],
            system,
            user,
            schema_of(wire, body),
            body,
            headers,
            number,
            custom_id,
        )

    def _said(self, asked: Asked, fault: Fault | None, tier: str) -> tuple[dict[str, Any], Tokens]:
        """The body of a completion and the tokens it is billed with."""
        kind = fault.kind if fault is not None and fault.kind in SAID else None
        if asked.wire not in ONLY.get(kind or "", (asked.wire,)):
            raise ValueError(f"The wire {asked.wire!r} knows no {kind!r}.")
        if kind == "context_window" and asked.wire != "messages":
            param = "messages" if asked.wire == "chat" else "input"
            raise Refusal(
                400,
                "Your input exceeds the context window of this model.",
                param=param,
                code="context_length_exceeded",
            )
        texts = [
            distort(as_text(self.answer(asked)), kind, asked)
            for _ in range(asked.body.get("n") or 1)
        ]
        tokens = replace(self._cached(asked), output=sum(count_tokens(t) for t in texts))
        if self.usage is not None:
            tokens = self.usage(asked, tokens)
        logprobs = [self._logprobs(asked, text) for text in texts]
        envelope = {"messages": message, "chat": chat_completion, "responses": response}[asked.wire]
        content = envelope(asked, texts, logprobs, kind, self._id)
        content["usage"] = None if kind in ("no_usage", "failed") else usage(asked, tokens, tier)
        return content, Tokens() if kind == "failed" else tokens

    def _cached(self, asked: Asked) -> Tokens:
        """Input tokens, and how many of them a cache has seen: exact prefixes, per model, for ever.
        The schema is part of them."""
        parts = prompt(asked.wire, asked.body)
        schema = json.dumps(asked.schema)  # providers put it before everything else
        if asked.wire == "messages":
            ends = [i + 1 for i, (_, _, control) in enumerate(parts) if control]
            heads = [[(role, text) for role, text, _ in parts[:end]] for end in ends]
            prefixes = [
                (schema + json.dumps(head), sum(count_tokens(text) for _, text in head))
                for head in heads
            ]
        else:
            text = "\n".join(t for _, t, _ in parts)
            prefixes = [
                (schema + text[:n], count_tokens(text[:n]))
                for n in range(self.prefix, len(text) + 1, self.prefix)
            ]
        cached = max((n for p, n in prefixes if (asked.model, p) in self._cache), default=0)
        written = (
            max((n for _, n in prefixes), default=0) - cached if asked.wire == "messages" else 0
        )
        self._cache.update((asked.model, p) for p, _ in prefixes)
        return Tokens(sum(count_tokens(t) for _, t, _ in parts), cached, written)

    def _logprobs(self, asked: Asked, text: str) -> list[dict[str, Any]] | None:
        """The tokens of a text with their alternatives, where they were asked for."""
        wanted = {
            "messages": False,
            "chat": asked.body.get("logprobs"),
            "responses": "message.output_text.logprobs" in (asked.body.get("include") or ()),
        }[asked.wire]
        if not wanted:
            return None
        if self.token_logprobs is None:
            raise Refusal(
                403, "You are not allowed to request logprobs from this model.", param="logprobs"
            )
        found = self.token_logprobs(asked, text)
        if "".join(t["token"] for t in found) != text:
            raise ValueError(f"The tokens of token_logprobs do not make up the text {text!r}.")

        def one(t: Mapping[str, Any]) -> dict[str, Any]:
            return {
                "token": t["token"],
                "logprob": t["logprob"],
                "bytes": list(t["token"].encode()),
            }

        top = asked.body.get("top_logprobs") or 0
        return [
            {**one(t), "top_logprobs": [one(o) for o in t["top_logprobs"][:top]]} for t in found
        ]

    # Batches

    def _call(self, received: Received, anthropic: bool) -> Reply:
        method, path = received.method, received.path
        match [method, *path.strip("/").split("/")[1:]]:
            case ["POST", "messages", "count_tokens"]:
                parts = prompt("messages", parse(received.body))
                return Reply.of({"input_tokens": sum(count_tokens(t) for _, t, _ in parts)})
            case ["POST", "messages", "batches"]:
                return Reply.of(self._shown(self._create_messages(received)))
            case ["POST", "batches"]:
                return Reply.of(self._shown(self._create_openai(received)))
            case ["GET", "messages", "batches"] | ["GET", "batches"]:
                return Reply.of(self._list(received.query, anthropic))
            case ["GET", "messages", "batches", name] | ["GET", "batches", name]:
                return Reply.of(self._shown(self._look(self._batch(name, anthropic))))
            case ["POST", "messages", "batches", name, "cancel"] | [
                "POST",
                "batches",
                name,
                "cancel",
            ]:
                batch = self._batch(name, anthropic)
                batch.canceling = batch.ended is None
                return Reply.of(self._shown(batch))
            case ["GET", "messages", "batches", name, "results"]:
                return self._results(self._batch(name, anthropic))
            case ["POST", "files"]:
                return Reply.of(self._upload(received))
            case ["GET", "files", name, "content"]:
                return Reply(
                    200, self._file(name)["content"], {"content-type": "application/octet-stream"}
                )
            case ["GET", "files", name]:
                return Reply.of({k: v for k, v in self._file(name).items() if k != "content"})
            case ["DELETE", "files", name]:
                del self._files[self._file(name)["id"]]
                return Reply.of({"id": name, "object": "file", "deleted": True})
        raise Refusal(404, f"Invalid URL ({method} {path})")

    def _batch(self, name: str, anthropic: bool) -> Batch:
        batch = self._batches.get(name)
        if batch is None or batch.anthropic is not anthropic:
            raise Refusal(404, f"No batch found with id '{name}'.")
        return batch

    def _file(self, name: str) -> dict[str, Any]:
        if name not in self._files:
            raise Refusal(404, f"No such File object: {name}", param="id")
        return self._files[name]

    def _keep(self, batch: Batch) -> Batch:
        self._batches[batch.id] = batch
        return batch

    def _create_messages(self, received: Received) -> Batch:
        requests = parse(received.body).get("requests") or []
        names = [r.get("custom_id") for r in requests]
        if not requests or not all(
            isinstance(n, str) and re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", n) for n in names
        ):
            raise Refusal(
                400, "requests: each needs a custom_id that matches '^[a-zA-Z0-9_-]{1,64}$'"
            )
        if len(set(names)) < len(names):
            raise Refusal(400, "requests: custom_id values must be unique")
        # Checked later: a wrong one is an errored item.
        items = [(r["custom_id"], r.get("params") or {}) for r in requests]
        return self._keep(Batch(self._id("msgbatch_01"), True, items, received.headers, now()))

    def _create_openai(self, received: Received) -> Batch:
        request = parse(received.body)
        file, endpoint = self._file(str(request.get("input_file_id"))), str(request.get("endpoint"))
        wire = WIRES.get(endpoint)
        if wire not in ("chat", "responses") or request.get("completion_window") != "24h":
            raise Refusal(400, "endpoint and completion_window are not supported", param="endpoint")
        items: list[tuple[str, dict[str, Any]]] = []
        errors = list(self.batch_errors)
        for number, line in enumerate(file["content"].splitlines(), start=1):
            try:
                given = json.loads(line)
                name, body = given["custom_id"], given["body"]
                wrong = (
                    "mismatched_url"
                    if (given["method"], given["url"]) != ("POST", endpoint)
                    else None
                )
                wrong = "duplicate_custom_id" if name in [n for n, _ in items] else wrong
                items.append((name, body))
            except (ValueError, KeyError, TypeError):
                wrong = "invalid_json_line"
            if wrong:
                errors.append(
                    {
                        "code": wrong,
                        "line": number,
                        "message": f"{wrong} in line {number}.",
                        "param": None,
                    }
                )
        batch = Batch(
            self._id("batch_"), False, items, received.headers, now(), wire, request, errors
        )
        if errors:
            batch.ended = now()
        return self._keep(batch)

    def _look(self, batch: Batch) -> Batch:
        batch.looks += 1
        if batch.canceling or (self.batch_polls is not None and batch.looks > self.batch_polls):
            self._end(batch)
        return batch

    def _end(self, batch: Batch) -> None:
        """Answers the items of a batch.

        Results are in the reverse order: nobody promises an order.
        """
        if batch.ended is not None:
            return
        for name, body in batch.items:
            batch.results.insert(0, (name, *self._item(batch, name, body)))
        batch.ended = now()
        if not batch.anthropic:
            lines = [self._line(*r) for r in batch.results]
            for which, good in (("output", True), ("error", False)):
                chosen = [
                    line
                    for line, r in zip(lines, batch.results, strict=True)
                    if (r[1] == "succeeded") is good
                ]
                if chosen:
                    content = "".join(json.dumps(line) + "\n" for line in chosen).encode()
                    batch.files[which] = self._store(
                        f"{batch.id}_{which}.jsonl", content, "batch_output"
                    )["id"]

    def _item(self, batch: Batch, name: str, body: dict[str, Any]) -> tuple[str, Any]:
        """How an item ends (succeeded, errored, expired, canceled) and the completion or the
        error's (status, body)."""
        if batch.canceling:
            return "canceled", None
        anthropic = batch.anthropic
        try:
            check(batch.wire, body)
            asked = self._question(batch.wire, body, batch.headers, name)
            fault = self._fault("faults", asked)
            if fault is not None and fault.kind in ENDED:
                return fault.kind, None
            if fault is not None and fault.kind in (*LOST, "html"):
                raise ValueError(
                    f"An item of a batch has no connection that could fail: {fault.kind!r}."
                )
            if refused := self._refused(fault, anthropic):
                return "errored", (refused.status, json.loads(refused.body))
            content, tokens = self._said(asked, fault, "batch")
        except Refusal as refusal:
            return "errored", (refusal.status, json.loads(self._error(refusal, anthropic).body))
        self.billed_batch_items.append(asked)
        self.batch_tokens += tokens
        return "succeeded", content

    def _line(self, name: str, how: str, what: Any) -> dict[str, Any]:
        """A line of an output or error file of OpenAI's Batch API."""
        line: dict[str, Any] = {
            "id": self._id("batch_req_"),
            "custom_id": name,
            "response": None,
            "error": None,
        }
        if how in ENDED:
            code = {"expired": "batch_expired", "canceled": "batch_cancelled"}[how]
            line["error"] = {"code": code, "message": "This request was not executed."}
        else:
            status, body = (200, what) if how == "succeeded" else what
            line["response"] = {"status_code": status, "request_id": self._id("req_"), "body": body}
        return line

    def _results(self, batch: Batch) -> Reply:
        if batch.ended is None:
            raise Refusal(404, "The results of this batch are not available yet.")
        lines = []
        for name, how, what in batch.results:
            said = (
                {"message": what}
                if how == "succeeded"
                else {"error": what[1]}
                if how == "errored"
                else {}
            )
            lines.append(json.dumps({"custom_id": name, "result": {"type": how, **said}}) + "\n")
        return Reply(200, "".join(lines).encode(), {"content-type": "application/x-jsonl"})

    def _shown(self, batch: Batch) -> dict[str, Any]:
        ends = [how for _, how, _ in batch.results]
        if batch.anthropic:
            kinds = ("succeeded", "errored", "canceled", "expired")
            processing = 0 if batch.ended else len(batch.items)
            return {
                "id": batch.id,
                "type": "message_batch",
                "processing_status": (
                    "ended" if batch.ended else "canceling" if batch.canceling else "in_progress"
                ),
                "request_counts": {"processing": processing, **{k: ends.count(k) for k in kinds}},
                "created_at": batch.created.isoformat(),
                "expires_at": (batch.created + timedelta(hours=24)).isoformat(),
                "ended_at": batch.ended and batch.ended.isoformat(),
                "cancel_initiated_at": batch.created.isoformat() if batch.canceling else None,
                "archived_at": None,
                "results_url": (
                    f"{self.url}/v1/messages/batches/{batch.id}/results" if batch.ended else None
                ),
            }
        if batch.ended:
            done = (
                "cancelled" if batch.canceling else "expired" if "expired" in ends else "completed"
            )
            status = "failed" if batch.errors else done
        else:
            status = (
                "cancelling" if batch.canceling else "in_progress" if batch.looks else "validating"
            )
        at = int(batch.ended.timestamp()) if batch.ended else None
        return {
            "id": batch.id,
            "object": "batch",
            **{
                k: batch.request.get(k)
                for k in ("endpoint", "input_file_id", "completion_window", "metadata")
            },
            "status": status,
            "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
            "output_file_id": batch.files.get("output"),
            "error_file_id": batch.files.get("error"),
            "created_at": int(batch.created.timestamp()),
            "expires_at": int((batch.created + timedelta(hours=24)).timestamp()),
            **{
                f"{k}_at": at if status == k else None
                for k in ("completed", "failed", "expired", "cancelled")
            },
            "request_counts": {
                "total": len(batch.items),
                "completed": ends.count("succeeded"),
                "failed": len(ends) - ends.count("succeeded"),
            },
        }

    def _list(self, query: Mapping[str, str], anthropic: bool) -> dict[str, Any]:
        """A page of batches, the newest first."""
        shown = [
            self._shown(b) for b in reversed(self._batches.values()) if b.anthropic is anthropic
        ]
        limit, ids = int(query.get("limit", 20)), [b["id"] for b in shown]
        if before := query.get("before_id"):
            rest = shown[: ids.index(before)][::-1]
            page, more = rest[:limit][::-1], len(rest) > limit
        else:
            after = query.get("after_id", query.get("after"))
            rest = shown[ids.index(after) + 1 :] if after in ids else shown
            page, more = rest[:limit], len(rest) > limit
        ends = {
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": more,
        }
        return {"data": page, **ends} if anthropic else {"object": "list", "data": page, **ends}

    def _upload(self, received: Received) -> dict[str, Any]:
        fields: dict[str, bytes] = {}
        names: list[str] = []

        def on_file(file: Any) -> None:
            file.file_object.seek(0)
            fields[file.field_name.decode()] = file.file_object.read()
            names.append((file.file_name or b"upload").decode())

        headers: dict[str, Any] = {
            "Content-Type": received.headers.get("content-type", "").encode(),
            "Content-Length": str(len(received.body)).encode(),
        }
        parse_form(
            headers,
            io.BytesIO(received.body),
            lambda f: fields.update({f.field_name.decode(): f.value or b""}),
            on_file,
        )
        for name in ("file", "purpose"):
            if name not in fields:
                raise Refusal(400, f"'{name}' is a required property", param=name)
        return {
            k: v
            for k, v in self._store(names[0], fields["file"], fields["purpose"].decode()).items()
            if k != "content"
        }

    def _store(self, name: str, content: bytes, purpose: str) -> dict[str, Any]:
        file = {
            "id": self._id("file-"),
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
        }
        self._files[file["id"]] = file = {
            **file,
            "filename": name,
            "purpose": purpose,
            "status": "processed",
            "content": content,
        }
        return file


# What requests say


def parse(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Refusal(400, "We could not parse the JSON body of your request.")
    return found


def check(wire: str, body: dict[str, Any]) -> None:
    """Refuses what the service of a wire refuses."""
    needed = {
        "messages": ("model", "max_tokens", "messages"),
        "chat": ("model", "messages"),
        "responses": ("model", "input"),
    }
    for name in needed[wire]:
        if not body.get(name):
            message = (
                f"{name}: Field required"
                if wire == "messages"
                else f"Missing required parameter: '{name}'."
            )
            raise Refusal(400, message, param=name, code="missing_required_parameter")
    if body.get("stream"):
        raise Refusal(400, "This server does not stream.", param="stream")
    schema, fmt = schema_of(wire, body), format_of(wire, body)
    if schema is not None and (wire == "messages" or fmt.get("strict")):
        for problem in schema_problems(schema, anthropic=wire == "messages"):
            raise Refusal(
                400,
                f"Invalid schema: {problem}",
                param="response_format",
                code="invalid_json_schema",
            )
    if (
        wire != "messages"
        and fmt.get("type") == "json_schema"
        and not re.fullmatch(r"[\w-]{1,64}", fmt.get("name") or "")
    ):
        raise Refusal(
            400,
            "Invalid name of the schema: letters, digits, '_' and '-' only.",
            param="response_format",
        )


def format_of(wire: str, body: dict[str, Any]) -> dict[str, Any]:
    """Where each wire says what form an answer must have."""
    if wire == "messages":  # output_format: its name while in beta, which other clients still send
        return (body.get("output_config") or {}).get("format") or body.get("output_format") or {}
    if wire == "chat":
        given = body.get("response_format") or {}
        return {"type": given.get("type"), **(given.get("json_schema") or {})}
    return (body.get("text") or {}).get("format") or {}


def schema_of(wire: str, body: dict[str, Any]) -> dict[str, Any] | None:
    return format_of(wire, body).get("schema")


# The subsets of JSON Schema that structured outputs take, as far as both SDKs' own conversions show
# them (anthropic.transform_schema, openai.lib._pydantic.to_strict_json_schema).
NOT_IN_ANTHROPIC = {
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "maxItems",
}


def schema_problems(schema: Any, *, anthropic: bool, at: str = "$") -> Iterator[str]:
    """What a service refuses in a schema of an answer."""
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "object" or "properties" in schema:
        if schema.get("additionalProperties") is not False:
            yield f"at {at}, 'additionalProperties' must be false"
        missing = set(schema.get("properties", ())) - set(schema.get("required", ()))
        if missing and not anthropic:
            yield (
                f"at {at}, 'required' must name every property; missing:"
                f" {', '.join(sorted(missing))}"
            )
    if anthropic and (found := NOT_IN_ANTHROPIC & schema.keys()):
        yield f"at {at}, not supported: {', '.join(sorted(found))}"
    for key in ("properties", "$defs"):
        for name, inner in (schema.get(key) or {}).items():
            yield from schema_problems(inner, anthropic=anthropic, at=f"{at}.{name}")
    for inner in (schema.get("items"), *schema.get("anyOf", ()), *schema.get("allOf", ())):
        yield from schema_problems(inner, anthropic=anthropic, at=f"{at}[]")


def prompt(wire: str, body: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """All text of a prompt in its order, block by block: (role, text, cache_control)."""
    first: Any = {
        "messages": body.get("system"),
        "chat": None,
        "responses": body.get("instructions"),
    }[wire]
    rest = body.get("input" if wire == "responses" else "messages") or []
    turns = [{"role": "system", "content": first or []}]
    turns += [{"role": "user", "content": rest}] if isinstance(rest, str) else rest
    found: list[tuple[str, str, Any]] = []
    for turn in turns:
        content = turn.get("content") or []
        blocks = [{"text": content}] if isinstance(content, str) else content
        found += [
            (turn.get("role", ""), b.get("text") or "", b.get("cache_control")) for b in blocks
        ]
    # Of the whole request: its last block.
    if wire == "messages" and body.get("cache_control") and found:
        found[-1] = (*found[-1][:2], body["cache_control"])
    return found


def count_tokens(text: str) -> int:
    """Words and signs, which is what this model calls tokens."""
    return len(re.findall(r"\w+|[^\w\s]", text))


# What answers say


def as_text(said: str | dict[str, Any]) -> str:
    return said if isinstance(said, str) else json.dumps(said)


def distort(text: str, kind: str | None, asked: Asked) -> str:
    """The text of an answer as a fault wants it."""
    if kind in ("truncated", "context_window") or (
        kind == "content_filter" and asked.wire != "messages"
    ):
        return text[: len(text) // 2]
    if kind == "missing_field":
        said = json.loads(text)
        del said[((asked.schema or {}).get("required") or list(said))[-1]]
        return json.dumps(said)
    if kind == "extra_text":
        return f"Here is my judgement:\n\n{text}\n\nLet me know if you need anything else."
    return f"```json\n{text}\n```" if kind == "fenced" else text


DECLINED = "I can't help with that."


def message(
    asked: Asked, texts: list[str], _: Any, kind: str | None, new_id: Callable[[str], str]
) -> dict[str, Any]:
    stops = {
        "truncated": "max_tokens", "refusal": "refusal", "content_filter": "refusal",
        "pause_turn": "pause_turn",
        "tool_use": "tool_use", "context_window": "model_context_window_exceeded",
    }  # fmt: skip
    stop = stops.get(kind or "", "end_turn")
    content: list[dict[str, Any]] = [{"type": "text", "text": texts[0]}]
    if stop == "refusal" or kind == "empty_content":
        content = []
    elif stop == "tool_use":
        content = [{"type": "tool_use", "id": new_id("toolu_01"), "name": "lookup", "input": {}}]
    details = (
        {"type": "refusal", "category": "frontier_llm", "explanation": DECLINED}
        if stop == "refusal"
        else None
    )
    return {
        "id": new_id("msg_01"),
        "type": "message",
        "role": "assistant",
        "model": asked.model,
        "content": content,
        "stop_reason": stop,
        "stop_sequence": None,
        "stop_details": details,
    }


def chat_completion(
    asked: Asked,
    texts: list[str],
    logprobs: list[Any],
    kind: str | None,
    new_id: Callable[[str], str],
) -> dict[str, Any]:
    ends = {"truncated": "length", "content_filter": "content_filter", "tool_use": "tool_calls"}
    choices = []
    for index, (text, tokens) in enumerate(zip(texts, logprobs, strict=True)):
        said: dict[str, Any] = {
            "role": "assistant",
            "content": text,
            "refusal": None,
            "annotations": [],
        }
        if kind == "refusal":
            said |= {"content": None, "refusal": DECLINED}
        elif kind == "tool_use":
            call = {
                "id": new_id("call_"),
                "type": "function",
                "function": {"name": "lookup", "arguments": "{}"},
            }
            said |= {"content": None, "tool_calls": [call]}
        choices.append(
            {
                "index": index,
                "message": said,
                "logprobs": None if tokens is None else {"content": tokens, "refusal": None},
                "finish_reason": ends.get(kind or "", "stop"),
            }
        )
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [] if kind == "empty_content" else choices,
        "service_tier": "default",
        "system_fingerprint": None,
    }


def response(
    asked: Asked,
    texts: list[str],
    logprobs: list[Any],
    kind: str | None,
    new_id: Callable[[str], str],
) -> dict[str, Any]:
    reason = {"truncated": "max_output_tokens", "content_filter": "content_filter"}.get(kind or "")
    status = "incomplete" if reason else "failed" if kind == "failed" else "completed"

    def said(content: dict[str, Any], **more: Any) -> dict[str, Any]:
        state = "incomplete" if reason else "completed"
        return {
            "type": "message",
            "id": new_id("msg_"),
            "status": state,
            "role": "assistant",
            "content": [content],
            **more,
        }

    def text(words: str, tokens: Any = None) -> dict[str, Any]:
        return {"type": "output_text", "text": words, "annotations": [], "logprobs": tokens or []}

    final = {"phase": "final_answer"} if kind == "commentary" else {}
    output = [said(text(texts[0], logprobs[0]), **final)]
    if kind == "commentary":
        output.insert(0, said(text("Let me compare the two."), phase="commentary"))
    elif kind == "refusal":
        output = [said({"type": "refusal", "refusal": DECLINED})]
    elif kind == "tool_use":
        call = {
            "type": "function_call",
            "id": new_id("fc_"),
            "call_id": new_id("call_"),
            "name": "lookup",
            "arguments": "{}",
        }
        output = [{**call, "status": "completed"}]
    elif kind in ("empty_content", "failed"):
        output = []
    error = (
        {"code": "server_error", "message": "The model failed to generate a response."}
        if kind == "failed"
        else None
    )
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "error": error,
        "incomplete_details": {"reason": reason} if reason else None,
        "instructions": asked.body.get("instructions"),
        "max_output_tokens": asked.body.get("max_output_tokens"),
        "model": asked.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": asked.body.get("store", True),
        "temperature": asked.body.get("temperature", 1.0),
        "text": asked.body.get("text") or {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "metadata": asked.body.get("metadata") or {},
    }


def usage(asked: Asked, tokens: Tokens, tier: str) -> dict[str, Any]:
    """Tokens in the words of each wire."""
    if asked.wire == "messages":
        controls = [c for _, _, c in prompt("messages", asked.body) if c]
        hour = bool(controls) and controls[-1].get("ttl") == "1h"
        written = {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}
        written["ephemeral_1h_input_tokens" if hour else "ephemeral_5m_input_tokens"] = (
            tokens.written
        )
        return {
            "input_tokens": tokens.input - tokens.cached - tokens.written,
            "cache_creation_input_tokens": tokens.written,
            "cache_read_input_tokens": tokens.cached,
            "cache_creation": written,
            "output_tokens": tokens.output,
            "service_tier": tier,
        }
    total = tokens.input + tokens.output
    if asked.wire == "chat":
        return {
            "prompt_tokens": tokens.input,
            "completion_tokens": tokens.output,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": tokens.cached, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }
    return {
        "input_tokens": tokens.input,
        "input_tokens_details": {
            "cached_tokens": tokens.cached,
            "cache_write_tokens": tokens.written,
        },
        "output_tokens": tokens.output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": total,
    }


# Errors

ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error",
    403: "permission_error",
    404: "not_found_error", 408: "timeout_error", 409: "conflict_error", 413: "request_too_large",
    422: "invalid_request_error", 429: "rate_limit_error", 504: "timeout_error",
    529: "overloaded_error",
}  # fmt: skip
OPENAI_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
MESSAGES: dict[int | str, str] = {
    401: "Incorrect API key provided.",
    402: "Your credit balance is too low.",
    404: "The model does not exist or you do not have access to it.",
    413: "Request exceeds the maximum allowed number of bytes.",
    429: "Rate limit reached.",
    500: "The server had an error while processing your request.",
    503: "The server is currently overloaded.",
    529: "Overloaded",
    "insufficient_quota": (
        "You exceeded your current quota, please check your plan and billing details."
    ),
}


def anthropic_error(refusal: Refusal, request_id: str, code: str | None) -> dict[str, Any]:
    error: dict[str, Any] = {
        "type": ANTHROPIC_TYPES.get(refusal.status, "api_error"),
        "message": refusal.message,
    }
    if code:
        error["details"] = {"error_code": code}
    return {"type": "error", "error": error, "request_id": request_id}


def openai_error(refusal: Refusal) -> dict[str, Any]:
    code = refusal.code or OPENAI_CODES.get(refusal.status)
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    if refusal.status == 429:
        kind = "insufficient_quota" if code == "insufficient_quota" else "requests"
    return {
        "error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": code}
    }


def now() -> datetime:
    return datetime.now(UTC)


# As a process


def echo(asked: Asked) -> str:
    """Says what the user said."""
    return asked.user


def example(asked: Asked) -> str | dict[str, Any]:
    """Says the least that fits the schema: the first choice, the middle of a range; without one,
    what the user said."""
    if asked.schema is None:
        return asked.user
    said = fit(asked.schema, asked.schema)
    own = re.findall(r"The id of your (?:verdict|answer) is (\w+)", asked.user)  # as our judges ask
    known = (
        {"verdict_id": own[0], "answer_id": own[0], "abstain": False, "better": "neither"}
        if own
        else {}
    )
    if own and "ranking" in said:
        known["ranking"] = [re.findall(r"^Conversation (\w+):$", asked.user, re.MULTILINE)]
    return said | {name: value for name, value in known.items() if name in said}


def fit(schema: dict[str, Any], root: dict[str, Any]) -> Any:
    """A value that fits a schema."""
    if "$ref" in schema:
        return fit(root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    if "anyOf" in schema:
        return fit(schema["anyOf"][0], root)
    low, high = schema.get("minimum", 0), schema.get("maximum", schema.get("minimum", 0) + 1)
    simple = {
        "string": "text",
        "boolean": True,
        "null": None,
        "integer": (low + high) // 2,
        "number": (low + high) / 2,
    }
    if schema.get("type") in simple:
        return simple[schema["type"]]
    if schema.get("type") == "array":
        return [fit(schema["items"], root) for _ in range(schema.get("minItems", 1))]
    return {name: fit(inner, root) for name, inner in schema.get("properties", {}).items()}


def behaviour(name: str) -> Answer:
    """`echo`, `example`, or a function of a file: `path/to/file.py:function`."""
    if name in ("echo", "example"):
        return {"echo": echo, "example": example}[name]
    file, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("behaviour", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"There is no behaviour {name!r}: echo, example or FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def main() -> None:
    options = argparse.ArgumentParser(
        description="A model server on the loopback; prints its URL and runs until it is ended."
    )
    options.add_argument("--port", type=int, default=0, help="0: any free one")
    options.add_argument(
        "--behaviour", default="echo", help="echo, example or FILE.py:FUNCTION, a function of Asked"
    )
    options.add_argument("--seconds", type=float, default=0.0, help="before each answer")
    options.add_argument(
        "--batch-polls", type=int, default=1, help="so many looks see a batch in progress"
    )
    given = options.parse_args()
    with ModelServer(behaviour(given.behaviour), port=given.port) as server:
        server.batch_polls = given.batch_polls
        if given.seconds:
            server.faults = lambda asked: (
                None if asked.custom_id else Fault("slow", seconds=given.seconds)
            )
        print(server.url, flush=True)
        ended = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()


if __name__ == "__main__":
    main()
