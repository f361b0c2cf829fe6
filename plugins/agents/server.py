"""The endpoint: one HTTP server on this machine's own address, for all programs of a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .session import Session
from .wire import chat_completions, messages, responses
from .wire.form import Answered, Refused

LARGEST = 16 * 2**20  # bytes of a request
LOOK = 1.0  # seconds between looks whether who asked is still there
APIS = {
    "/v1/chat/completions": chat_completions,
    "/v1/responses": responses,
    "/v1/messages": messages,
}
_server: Server | None = None
_making = threading.Lock()


class Server:
    """An HTTP server on a thread of its own.

    Attributes:
        url: where it is, without a path.
    """

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        routes = [Route(path, self._asking(api), methods=["POST"]) for path, api in APIS.items()]
        routes += [
            Route("/v1/models", self._models),
            Route("/reward", self._reward, methods=["POST"]),
            Route("/{path:path}", self._nothing, methods=["GET", "POST", "PUT", "DELETE"]),
        ]
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(
            Starlette(routes=routes), log_level="error", access_log=False, lifespan="off",
            timeout_keep_alive=600,
        )  # fmt: skip
        server = uvicorn.Server(config)
        begun = threading.Event()

        async def serve() -> None:
            asyncio.get_running_loop().call_later(0, begun.set)
            await server.serve([listening])

        def run() -> None:
            asyncio.run(serve())

        listening.listen(1024)
        threading.Thread(target=run, daemon=True, name="turnwise-endpoint").start()
        begun.wait()

    def open(self, session: Session) -> None:
        """Lets a session's program ask."""
        self._sessions[session.key] = session

    def close(self, session: Session) -> None:
        """Ends a session."""
        session.close()
        self._sessions.pop(session.key, None)

    def _session(self, request: Request) -> Session:
        """Returns the session of a request.

        Raises:
            Refused: its key is no session's.
        """
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        session = self._sessions.get(request.headers.get("x-api-key", "") or bearer)
        if session is None:
            raise Refused(
                401, "the key is that of no session: there is none, or it has ended. A program's"
                " key is in OPENAI_API_KEY and ANTHROPIC_API_KEY, or in `endpoint.api_key`",
            )  # fmt: skip
        return session

    def _asking(self, api: ModuleType) -> Any:
        """Returns what answers the requests of an API."""

        async def ask(request: Request) -> Response:
            try:
                session = self._session(request)
                asked = api.read(await _body(request), session.ignore)
                pending = session.submit(asked, api.NAME)
                answered = await _answer(request, asyncio.wrap_future(pending.answer))
            except Refused as refused:
                return JSONResponse(api.refusal(refused), refused.status)
            if pending.asked.stream:
                written = "".join(api.events(pending.asked, answered))
                return StreamingResponse(iter([written]), media_type="text/event-stream")
            return JSONResponse(api.written(pending.asked, answered))

        return ask

    async def _models(self, request: Request) -> Response:
        """Lists the names of the policy."""
        try:
            names = self._session(request).models
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

    async def _reward(self, request: Request) -> Response:
        """Takes a reward that a program posts."""
        try:
            self._session(request).post(await _body(request))
        except Refused as refused:
            return JSONResponse(chat_completions.refusal(refused), refused.status)
        return JSONResponse({"taken": True})

    async def _nothing(self, request: Request) -> Response:
        there = ", ".join([*APIS, "/v1/models", "/reward"])
        refused = Refused(404, f"{request.url.path} is not served; there are {there}")
        return JSONResponse(chat_completions.refusal(refused), 404)


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
        found = json.loads(data)
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
    """Returns the server of this process, started when it is first needed."""
    global _server
    with _making:
        if _server is None:
            _server = Server()
        return _server
