"""The tools of an MCP server, for `turnwise/Tools-v0`: a command that speaks over its input and
output, or a URL.

A session is opened and closed in one task, as the `mcp` package asks: it has a thread with an event
loop of its own, and calls are sent there.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

import httpx2
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CONNECTION_CLOSED

from ..tools import in_use
from .toolbox import Schema, ToolFailed

LOOK = 0.1  # seconds between looks whether a wait was given up
CONNECT, READ = 30.0, 300.0  # seconds, as the `mcp` package allows
ANSWER = 5.0  # seconds in which a server that was idle must show that it is there, or must end


class MCPTools:
    """An MCP server as tools.

    Args:
        where: the command and its arguments, or a URL.
        fresh: whether every episode has a server of its own; needed where the server keeps what it
            is given.
        env: environment variables of a command, in addition to the few that it inherits; a value
            "$NAME" is that of a variable here, so that no key is written down.
        token: the variable here that holds a URL's bearer token.

    Raises:
        ValueError: no command and no URL, what one of them has not, or a variable that is not set.
    """

    def __init__(
        self,
        where: str | Sequence[str],
        fresh: bool = False,
        env: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> None:
        url = isinstance(where, str) and where.startswith(("http://", "https://"))
        if not where or (isinstance(where, str) and not url):
            raise ValueError(
                f"mcp: a command, as [COMMAND, ARGUMENT, ...], or a URL is needed, got {where!r}"
            )
        if url and (fresh or env):
            raise ValueError("mcp: `fresh` and `env` are for commands; a URL's server is another's")
        if token and not url:
            raise ValueError("mcp: `token` is for URLs; give a command its key by `env`")
        self._where, self._fresh = where, fresh
        self._env = None if env is None else {name: _value(text) for name, text in env.items()}
        self._token = None if token is None else _value(f"${token}")
        self._session: _Session | None = None

    def open(self) -> Sequence[Schema]:
        """Connects to the server, unless it is connected. Returns the schemas of its tools.

        Raises:
            ConnectionError: it cannot be reached.
        """
        if self._session is not None and (self._fresh or not self._session.answers()):
            self.close()
        if self._session is None:
            server: Any = self._where
            if not isinstance(server, str):
                command, *arguments = server
                server = StdioServerParameters(command=command, args=arguments, env=self._env)
            elif self._token is not None:
                headers = {"Authorization": f"Bearer {self._token}"}
                client = httpx2.AsyncClient(
                    headers=headers, timeout=httpx2.Timeout(CONNECT, read=READ)
                )
                server = streamable_http_client(server, http_client=client)
            self._session = _Session(server, str(self._where))
        return self._session.schemas()

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Calls a tool. Returns the texts of its result.

        Raises:
            ToolFailed: the server refuses the call, or its result is an error.
            ConnectionError: the server is gone.
        """
        assert self._session is not None
        return self._session.call(name, arguments)

    def close(self) -> None:
        """Ends the session, and with it a server that is a command."""
        if self._session is not None:
            self._session.end()
        self._session = None


def _value(text: str) -> str:
    """Returns a text, or the environment variable that "$NAME" names.

    Raises:
        ValueError: it is not set.
    """
    if not text.startswith("$"):
        return text
    if (value := os.environ.get(text[1:])) is None:
        raise ValueError(f"mcp: the environment variable {text[1:]} is not set")
    in_use(value)
    return value


class _Session:
    """A session in a thread of its own; it begins at once."""

    def __init__(self, server: Any, name: str) -> None:
        self._server, self._name = server, name
        self._ready: Future[Sequence[Schema]] = Future()
        self._over = False
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._run())
        self._thread = threading.Thread(target=self._turn, name="mcp", daemon=True)
        self._thread.start()

    def _turn(self) -> None:
        try:
            self._loop.run_until_complete(asyncio.wait([self._task]))
        finally:
            self._loop.close()

    async def _run(self) -> None:
        try:
            # Without a cache, so that a list says that the server is there.
            async with Client(self._server, cache=None) as self._client:
                page = await self._client.list_tools()
                tools = list(page.tools)
                while page.next_cursor is not None:
                    page = await self._client.list_tools(cursor=page.next_cursor)
                    tools += page.tools
                self._ready.set_result([_schema(tool) for tool in tools])
                await asyncio.Event().wait()  # until it is cancelled
        except BaseException as error:
            if not self._ready.done():
                why = f"mcp: {self._name}: {_first(error)}"
                self._ready.set_exception(ConnectionError(why))

    def schemas(self) -> Sequence[Schema]:
        """Returns the schemas of the tools, when the server has listed them."""
        return self._waited(self._ready)

    def answers(self) -> bool:
        """Returns whether the server is still there."""
        try:
            self._waited(self._sent(asyncio.wait_for(self._client.list_tools(), ANSWER)))
        except Exception:  # gone, in whatever way
            return False
        return True

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Calls a tool, as `MCPTools.call` does."""
        try:
            result = self._waited(self._sent(self._client.call_tool(name, dict(arguments))))
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                raise ConnectionError(f"mcp: {self._name}: {error.message}") from error
            raise ToolFailed(error.message) from error
        text = "\n".join(_text(part) for part in result.content)
        if result.is_error:
            raise ToolFailed(text)
        return text

    def _sent(self, work: Any) -> Future[Any]:
        if not self._thread.is_alive():
            work.close()
            raise ConnectionError(f"mcp: {self._name}: the session is over")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _waited(self, future: Future[Any]) -> Any:
        """Waits for a result; the session ends where the wait is given up."""
        try:
            while not future.done() and self._thread.is_alive():
                wait([future], LOOK)  # not longer, or the thread could not be interrupted
        except BaseException:
            future.cancel()
            self._cancel()
            raise
        if not future.done():
            raise ConnectionError(f"mcp: {self._name}: the session is over")
        return future.result()

    def _cancel(self) -> None:
        """Ends the session's task, once: a second time would break off what ends the server."""
        if self._thread.is_alive() and not self._over:
            self._over = True
            self._loop.call_soon_threadsafe(self._task.cancel)

    def end(self) -> None:
        """Ends the session; a server that does not end in time is left to the `mcp` package, which
        kills it."""
        self._cancel()
        self._thread.join(ANSWER)


def _first(error: BaseException) -> str:
    """Returns what an error says, or the first one in a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def _schema(tool: Any) -> Schema:
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description or "",
            "parameters": tool.input_schema,
        },
    }


def _text(part: Any) -> str:
    """Returns a part of a result as text: what is none is named."""
    return str(part.text) if part.type == "text" else f"[{part.type}]"
