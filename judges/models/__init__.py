"""Models that judge: what they are asked, what they answer, how they fail, and how they are named in a config.

A model is anything with `ask(prompt) -> Reply`. Those here are `anthropic`, `openai` (Responses), `openai-chat` (Chat Completions, and every endpoint
that speaks it) and `local`; plugins add others by the hook `register_models`. They make exactly one request per `ask` and never retry: how
often something is asked is decided, and paid for, in one place (`judges/calls.py`).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, Protocol, runtime_checkable

from ...engine.plugins import PluginError, Plugins, check_options
from ...engine.secrets import config_in_use, redacted


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to a model.

    Attributes:
        system: instructions and rubric. The same for every call of a judge, so that providers can cache it.
        user: what is judged, and under which ids.
        schema: JSON schema of the answer; the same for every call of a judge as far as it can be, since providers put it before everything else and a
            cached beginning ends where it differs.
        choices: field to what its strings may be in this call: ids. Checked by the judge.
        max_tokens: of the answer.
        top_logprobs: how many alternatives per token are wanted; 0: none. Models that cannot give them leave `Reply.tokens` empty.
    """

    system: str
    user: str
    schema: Mapping[str, Any]
    max_tokens: int = 1024
    top_logprobs: int = 0
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def bound(self) -> dict[str, Any]:
        """The schema with the choices in it, for models in this process, which bind answers themselves and cache no schema."""
        whole = json.loads(json.dumps(dict(self.schema)))  # parts that were one object are several now
        for name, allowed in self.choices.items():
            place = whole["properties"][name]
            while place["type"] == "array":
                place = place["items"]
            place["enum"] = list(allowed)
        return whole


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. `read` (from the provider's cache) and `written` (to it) are not part of `fresh`."""

    fresh: int = 0
    read: int = 0
    written: int = 0
    output: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.fresh + other.fresh, self.read + other.read, self.written + other.written, self.output + other.output)


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer, and the alternatives to it: text to log-probability."""

    text: str
    alternatives: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model answered.

    Attributes:
        stop: why it ended. Only with "end" is there a text worth reading; "length" was cut off, "refused" and "filtered" were not given.
        text: the answer as it came, JSON that nobody has read yet.
        reason: what the model or provider said about an end that is not "end".
        model: the model that answered, which may be a dated version of the one that was asked.
        request: the provider's id of the request.
        limits: what its headers said of rate limits, seconds to wait before the next request; 0: none.
        tokens: with `top_logprobs`, the answer's tokens in order.
    """

    stop: Literal["end", "length", "refused", "filtered", "other"]
    text: str
    usage: Usage = field(default_factory=Usage)
    reason: str = ""
    model: str = ""
    request: str = ""
    limits: float = 0.0
    tokens: Sequence[Token] = field(default_factory=tuple)


class ModelError(Exception):
    """A request that got no answer.

    Attributes:
        kind: "busy" (rate limit, overload), "server", "timeout" and "connection" pass; "request" is this one's fault, asking the same again is no
            use; "account" (key, quota, billing, permission, no such model) would happen to every other request too.
        status: HTTP status; 0: none came.
        after: seconds the server asks to wait.
        lost: an answer may have been made, and be paid for, that did not arrive.
    """

    def __init__(self, kind: str, message: str, status: int = 0, after: float | None = None, lost: bool = False) -> None:
        super().__init__(message)
        self.kind, self.status, self.after, self.lost = kind, status, after, lost

    @property
    def passes(self) -> bool:
        return self.kind in ("busy", "server", "timeout", "connection")


@runtime_checkable
class Model(Protocol):
    """Attributes:
    name: what verdicts and prices are filed under, e.g. "openai:gpt-5-mini".
    settings: what may change its answers, JSON data; part of every judge's version.
    """

    name: str
    settings: Mapping[str, Any]

    async def ask(self, prompt: Prompt) -> Reply:
        """Sends one request. Raises ModelError where no answer came. Models that answer large jobs in batches also have `submit`, `results` and
        `mine`, see `judges/batches.py`."""
        ...


def make_model(spec: Any, plugins: Plugins | None = None) -> Model:
    """A model from "provider:name", from a mapping with `provider`, `model` and options, or the object itself.

    Raises:
        PluginError: an unknown provider or option.
    """
    if not isinstance(spec, (str, Mapping)):
        if not isinstance(spec, Model):
            raise PluginError(f"{spec!r} is no model: it needs `name`, `settings` and `async ask(prompt)`")
        return spec
    plugins = plugins or Plugins()
    if isinstance(spec, str):
        provider, _, name = spec.partition(":")
        options: dict[str, Any] = {}
    else:
        options = dict(spec)
        config_in_use(options)
        provider, name = str(options.pop("provider", "")), str(options.pop("model", ""))
    if isinstance(spec, Mapping) and not provider:
        raise PluginError(
            f"a model given as a mapping needs `provider` beside `model`: one of {', '.join(plugins.names('model'))}"
        )
    if not provider or not name:
        known = ", ".join(plugins.names("model"))
        raise PluginError(
            f'a model is given as "provider:name" or as a mapping with provider and model, got {redacted(spec)!r}. Providers: {known}'
        )
    check_options(f"model provider {provider!r}", plugins.factory("model", provider), 1, options)
    made: Model = plugins.create("model", provider, name, **options)
    return made


def free_of(extra: Mapping[str, Any] | None, *taken: str) -> dict[str, Any]:
    """Further fields of a request's body, without those that have options of their own.

    Raises:
        ValueError: one of those is among them.
    """
    for name in set(taken) & set(extra or {}):
        raise ValueError(f"`extra` must not hold {name!r}: the judge's `max_tokens` says it, and the budget counts on that")
    return dict(extra or {})


def http_error(status: int, kind: str, code: str, message: str, headers: Mapping[str, str]) -> ModelError:
    """What an HTTP error means for the next request.

    Quota and billing come as 429 or 400 too: asking again would only be refused again. `x-should-retry` is the server's own word on it.
    """
    said = f"HTTP {status} {code or kind}: {message}".strip(": ")[:500]
    # What the message says counts only where nothing else tells: rate limits come with advice on billing.
    broke = bool({kind, code} & {"insufficient_quota", "billing_error", "billing_hard_limit_reached", "billing_not_active"})
    broke = broke or (status == 400 and "credit balance" in message.lower())
    if status in (401, 402, 403, 404) or (broke and status in (400, 429)):
        what = "account"
    elif status in (408, 504):
        what = "timeout"
    elif status in (409, 429, 503, 529):
        what = "busy"
    elif status >= 500:
        what = "server"
    else:
        what = "request"
    wish = headers.get("x-should-retry", "")
    if wish == "false" and what not in ("account", "request"):
        what = "request"
    elif wish == "true" and what == "request":
        what = "server"
    return ModelError(what, said, status, _after(headers))


async def called(call: Awaitable[Any], sdk: Any, http: Any) -> Any:
    """What a call of one of the official SDKs brings; its errors, which both name alike, as ours.

    Raises:
        ModelError: with what is to be made of it.
    """
    try:
        return await call
    except sdk.APITimeoutError as error:
        raise ModelError("timeout", "the request took too long", lost=True) from error
    except sdk.APIStatusError as error:
        found = error.body if isinstance(error.body, Mapping) else {}
        inner: Any = found.get("error") if isinstance(found.get("error"), Mapping) else found
        details = inner.get("details") if isinstance(inner.get("details"), Mapping) else {}
        kind, code = str(inner.get("type") or ""), str(inner.get("code") or details.get("error_code") or "")
        raise http_error(
            error.status_code, kind, code, str(inner.get("message") or error.message), error.response.headers
        ) from error
    except (sdk.APIConnectionError, http.TransportError) as error:
        never = isinstance(error.__cause__, http.ConnectError)
        raise ModelError("connection", f"no answer: {error.__cause__ or error}", lost=not never) from error
    except (sdk.APIError.__base__, ValueError) as error:  # an answer that is not JSON is a bare ValueError of theirs
        raise ModelError("server", f"{type(error).__name__}: {error}", lost=isinstance(error, ValueError)) from error


def envelope(response: Any) -> Mapping[str, Any]:
    """The JSON object in the body of an HTTP response of the SDKs; a proxy's page or an empty body is none.

    Raises:
        ModelError: there is no such object.
    """
    try:
        body = json.loads(response.text)
    except ValueError:
        body = None
    if not isinstance(body, Mapping):
        kind = response.headers.get("content-type", "no content type")
        raise ModelError(
            "server",
            f"HTTP {response.status_code} with {len(response.content)} bytes of {kind}, no JSON object",
            response.status_code,
            lost=True,
        )
    return body


def _after(headers: Mapping[str, str]) -> float | None:
    """Seconds of `retry-after-ms` or `retry-after` (a number, or an HTTP date)."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after", "")
        if not value:
            return None
        if value.replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
