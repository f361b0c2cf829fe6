"""The endpoint: an HTTP server that hands requests to those whom their keys belong to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import ModuleType
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ...tools import worded
from .session import Pending, Session
from .wire import chat_completions, messages, responses
from .wire.form import Answered, Asked, Refused

LARGEST = 16 * 2**20  # bytes of a request
PATIENCE = 5.0  # seconds that the last requests may take
LOOK = 1.0  # seconds between looks whether who asked is still there
APIS = {
    "/v1/chat/completions": chat_completions,
    "/v1/responses": responses,
    "/v1/messages": messages,
}
_server: Server | None = None
_making = threading.Lock()


class Client(Protocol):
    """What a key belongs to.

    Attributes:
        models: the names that the policy answers to.
        ignore: options of requests that are passed over.
        temperature: the one that may be asked for.
    """

    @property
    def temperature(self) -> float:
        """See above."""

    @property
    def models(self) -> Sequence[str]:
        """See above."""

    @property
    def ignore(self) -> Sequence[str]:
        """See above."""

    def submit(self, asked: Asked, api: str) -> Pending:
        """Takes a request; raises `Refused` where it cannot be answered."""


# What else is posted: whose key it was, and the JSON.
Post = Callable[[Any, Mapping[str, Any]], Any]


class Server:
    """An HTTP server on a thread of its own.

    Args:
        posts: what else can be posted, by path; what it returns is answered, or awaited.
        host, port: where to listen; 0: any free port.

    Attributes:
        url: where it is, without a path.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, posts: Mapping[str, Post], host: str = "127.0.0.1", port: int = 0) -> None:
        self._clients: dict[str, Client] = {}
        self._posts = posts
        routes = [Route(path, self._asking(api), methods=["POST"]) for path, api in APIS.items()]
        routes += [
            Route(path, self._posting(post), methods=["POST"]) for path, post in posts.items()
        ]
        routes += [
            Route("/v1/models", self._models),
            Route("/{path:path}", self._nothing, methods=["GET", "POST", "PUT", "DELETE"]),
        ]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # The protocol by name, or asyncio would leave small packets waiting for an answer (40 ms).
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
        own = f"[{host}]" if ":" in host else host
        self.url = f"http://{own}:{listening.getsockname()[1]}"
        config = uvicorn.Config(
            Starlette(routes=routes), log_level="error", access_log=False, lifespan="off",
            timeout_keep_alive=600,
        )  # fmt: skip
        self._uvicorn = uvicorn.Server(config)

        def run() -> None:
            asyncio.run(self._uvicorn.serve([listening]))

        self._thread = threading.Thread(target=run, daemon=True, name="turnwise-endpoint")
        self._thread.start()

    def stop(self) -> None:
        """Ends the server, when it has answered what it is answering."""
        self._uvicorn.should_exit = True
        self._thread.join(PATIENCE)
        self._uvicorn.force_exit = True
        self._thread.join(PATIENCE)

    def open(self, key: str, client: Client) -> None:
        """Lets a client ask."""
        self._clients[key] = client

    def close(self, key: str) -> None:
        """Takes a key back."""
        self._clients.pop(key, None)

    def _client(self, request: Request) -> Client:
        """Returns whom a request's key belongs to.

        Raises:
            Refused: there is no such key.
        """
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        client = self._clients.get(request.headers.get("x-api-key", "") or bearer)
        if client is None:
            raise Refused(
                401, "the key is not known here, or no more: it comes as `Authorization: Bearer"
                " KEY` or `x-api-key: KEY`. `turnwise serve` shows its own, or reads `--keys`; a"
                " program that an environment runs has one in OPENAI_API_KEY, ANTHROPIC_API_KEY"
                " and `endpoint.api_key`",
            )  # fmt: skip
        return client

    def _asking(self, api: ModuleType) -> Any:
        """Returns what answers the requests of an API."""

        async def ask(request: Request) -> Response:
            try:
                client = self._client(request)
                body = await _body(request)
                asked = api.read(body, client.ignore, client.temperature)
                pending = client.submit(asked, api.NAME)
                answered = await _answer(request, asyncio.wrap_future(pending.answer))
            except Refused as refused:
                return JSONResponse(api.refusal(refused), refused.status)
            except Exception as error:  # in the form that SDKs know
                return JSONResponse(api.refusal(_fault(error)), 500)
            if pending.asked.stream:
                written = "".join(api.events(pending.asked, answered))
                return StreamingResponse(iter([written]), media_type="text/event-stream")
            return JSONResponse(api.written(pending.asked, answered))

        return ask

    def _posting(self, post: Post) -> Any:
        """Returns what answers another kind of post."""

        async def take(request: Request) -> Response:
            try:
                found = post(self._client(request), await _body(request))
                taken = await asyncio.wrap_future(found) if isinstance(found, Future) else found
            except Refused as refused:
                return JSONResponse(chat_completions.refusal(refused), refused.status)
            except Exception as error:  # of this post alone, in the form that SDKs know
                return JSONResponse(chat_completions.refusal(_fault(error)), 500)
            return JSONResponse(taken)

        return take

    async def _models(self, request: Request) -> Response:
        """Lists the names of the policy."""
        try:
            names = self._client(request).models
        except Refused as refused:
            return JSONResponse(chat_completions.refusal(refused), refused.status)
        if "anthropic-version" in request.headers:
            own = [{"id": name, "type": "model", "display_name": name,
                    "created_at": "1970-01-01T00:00:00Z"} for name in names]  # fmt: skip
            ends = {"first_id": names[0], "last_id": names[-1], "has_more": False}
            return JSONResponse({"data": own, **ends})
        listed = [
            {"id": name, "object": "model", "created": 0, "owned_by": "turnwise"} for name in names
        ]
        return JSONResponse({"object": "list", "data": listed})

    async def _nothing(self, request: Request) -> Response:
        there = ", ".join([*APIS, "/v1/models", *self._posts])
        refused = Refused(404, f"{request.url.path} is not served; there are {there}")
        return JSONResponse(chat_completions.refusal(refused), 404)


def _fault(error: Exception) -> Refused:
    return Refused(500, f"the server is at fault: {worded(error)}")


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


async def _body(request: Request) -> Mapping[str, Any]:
    """Returns the JSON object of a request.

    Raises:
        Refused: it is none, or too large.
    """
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > LARGEST:
            raise Refused(413, f"a request may have {LARGEST:,} bytes")
    try:
        found = json.loads(data, parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is not valid JSON: {error}") from None
    if not isinstance(found, Mapping):
        raise Refused(400, "the request must be a JSON object")
    return found


async def _answer(request: Request, answer: asyncio.Future[Answered]) -> Answered:
    """Waits for an answer as long as who asked is there.

    Raises:
        Refused: the session ended first.
    """
    while not (await asyncio.wait({answer}, timeout=LOOK))[0]:
        if await request.is_disconnected():
            answer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answer
            raise Refused(400, "who asked has gone")
    return answer.result()


def server() -> Server:
    """Returns the server of this process for programs, started when it is first needed."""
    global _server
    with _making:
        if _server is None:
            _server = Server({"/reward": Session.post})
        return _server
