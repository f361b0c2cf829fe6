"""The tools of an MCP server, for `turnwise/Tools-v0`: a command that speaks over its input and
output, or a URL.

A session is opened and closed in one task, as the `mcp` package asks: it has a thread with an event
loop of its own, and calls are sent there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from mcp import Client, StdioServerParameters

from .calls import Schema, ToolFailed


class MCPTools:
    """An MCP server as tools.

    Args:
        where: the command and its arguments, or a URL.
        fresh: whether every episode has a server of its own; needed where the server keeps what it
            was told.
    """

    def __init__(self, where: str | Sequence[str], fresh: bool = False) -> None:
        if not where:
            raise ValueError("mcp: a command, as [COMMAND, ARGUMENT, ...], or a URL is needed")
        self._where, self._fresh = where, fresh
        self._thread: threading.Thread | None = None
        self._schemas: Sequence[Schema] = ()

    def open(self) -> Sequence[Schema]:
        """Connects to the server, unless it is connected. Returns the schemas of its tools."""
        if self._fresh:
            self.close()
        if self._thread is None or not self._thread.is_alive():
            ready: Future[Sequence[Schema]] = Future()
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._session(ready)), name="mcp", daemon=True
            )
            self._thread.start()
            self._schemas = ready.result()
        return self._schemas

    async def _session(self, ready: Future[Sequence[Schema]]) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        try:
            server: Any = self._where
            if not isinstance(server, str):
                command, *arguments = server
                server = StdioServerParameters(command=command, args=arguments)
            async with Client(server) as self._client:
                page = await self._client.list_tools()
                tools = list(page.tools)
                while page.next_cursor is not None:
                    page = await self._client.list_tools(cursor=page.next_cursor)
                    tools += page.tools
                ready.set_result([_schema(tool) for tool in tools])
                await self._over.wait()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(ConnectionError(f"mcp: {self._where}: {error}"))

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Calls a tool. Returns the texts of its result.

        Raises:
            ToolFailed: its result is an error.
        """
        asked = self._client.call_tool(name, dict(arguments))
        result = asyncio.run_coroutine_threadsafe(asked, self._loop).result()
        text = "\n".join(_text(part) for part in result.content)
        if result.is_error:
            raise ToolFailed(text)
        return text

    def close(self) -> None:
        """Ends the session, and with it a server that is a command."""
        if self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join()
        self._thread = None


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
