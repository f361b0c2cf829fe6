"""openenv: an environment on an OpenEnv server, `env: {id: openenv, kwargs: {url: ...}}`.

An episode is a session of the server's. A reply is the text field of its action, an observation the
text field of its observation: where each has one field of text they are found in the server's
schema, else `action_field` and `observation_field` name them. `sessions` says how many the server
allows: no more episodes are played at a time. Where it has none free all the same, since others use
it, episodes wait until it has.
"""

from __future__ import annotations

import contextlib
import json
import time
import urllib.request
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import gymnasium

from ..protocols import NoRoom, Text

FULL = "CAPACITY_REACHED"  # the server's word for having no session free
AGAIN = 0.2  # seconds until it is asked again


class OpenEnv(gymnasium.Env[str, str]):
    """An environment on a server; see the module's docstring.

    Args:
        url: of the server.
        action_field: the field of an action that a reply goes to.
        observation_field: the field of an observation that is read.
        sessions: how many the server allows at a time; 1 is what a server allows that was not told
            otherwise.
    """

    observation_space = action_space = Text(200_000)

    def __init__(
        self,
        url: str,
        action_field: str | None = None,
        observation_field: str | None = None,
        sessions: int = 1,
    ) -> None:
        self.metadata: dict[str, Any] = {
            "render_modes": [], "concurrency": "thread", "instances": sessions,
        }  # fmt: skip
        self.url = url.rstrip("/")
        schema = _schema(self.url) if action_field is None or observation_field is None else {}
        self.action_field = action_field or _text_field(schema, "action", "action_field")
        self.observation_field = observation_field or _text_field(
            schema, "observation", "observation_field"
        )
        self._client: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begins a session.

        Raises:
            NoRoom: the server is full.
        """
        super().reset(seed=seed)
        self.close()
        from openenv.core.generic_client import GenericEnvClient
        from websockets.exceptions import ConnectionClosedOK

        client = GenericEnvClient(base_url=self.url).sync()
        try:
            client.connect()
            self._client = client
            text, *_ = self._read(client.reset(seed=seed, **(options or {})))
        except Exception as error:  # the client wraps a full server in errors of several kinds
            self._client = None
            _ended(client)
            # A full server says so and hangs up; which of the two is noticed is chance.
            if FULL not in str(error) and not isinstance(error, ConnectionClosedOK):
                raise
            time.sleep(AGAIN)
            raise NoRoom(f"the server {self.url} has no session free") from error
        return text, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Sends a reply; the session ends with the episode, so that another may have it."""
        text, reward, done = self._read(self._client.step({self.action_field: action}))
        if done:
            self.close()
        return text, reward, done, False, {"success": reward > 0} if done else {}

    def close(self) -> None:
        """Ends the session."""
        if self._client is not None:
            client, self._client = self._client, None
            _ended(client)

    def _read(self, result: Any) -> tuple[str, float, bool]:
        seen = result.observation
        found = seen if isinstance(seen, Mapping) else vars(seen)
        if self.observation_field not in found:
            raise ValueError(
                f"the observation has no {self.observation_field!r}; it has {', '.join(found)}"
            )
        text = found[self.observation_field]
        if not isinstance(text, str):
            raise ValueError(
                f"the observation's {self.observation_field!r} is no text but {text!r}"
            )
        return text, float(result.reward or 0.0), bool(result.done)


def _ended(client: Any) -> None:
    """Closes a client; one whose connection is gone has nothing to close."""
    with contextlib.suppress(Exception):
        client.close()


@lru_cache(maxsize=64)
def _schema(url: str) -> Mapping[str, Any]:
    with urllib.request.urlopen(f"{url}/schema", timeout=30) as answer:
        return dict(json.load(answer))


def _text_field(schema: Mapping[str, Any], part: str, option: str) -> str:
    """Returns the one field of text that an action or observation has.

    Raises:
        ValueError: it has none, or several.
    """
    fields = schema.get(part, {}).get("properties", {})
    found = [name for name, field in fields.items() if field.get("type") == "string"]
    if len(found) != 1:
        raise ValueError(
            f"the server's {part} has the fields {', '.join(fields) or 'none'}, of which"
            f" {', '.join(found) or 'none'} are text: name one, `kwargs: {{{option}: ...}}`"
        )
    return str(found[0])
