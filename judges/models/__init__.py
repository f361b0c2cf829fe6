"""Models that judge: what they are asked, what they answer, how they fail, and how they are named in a config.

A model is anything with `ask(prompt) -> Reply`. Those here are `anthropic`, `openai` (Responses), `openai-chat` (Chat Completions, and every endpoint
that speaks it) and `local`; plugins add others by the hook `register_models`. They make exactly one request per `ask` and never retry: how
often something is asked is decided, and paid for, in one place (`judges/calls.py`).
"""

from __future__ import annotations

import json
import math
import os
import re
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, Protocol, runtime_checkable

from ...engine.plugins import PluginError, Plugins, check_options
from ...engine.secrets import config_in_use, in_use, redact, redacted, url_in_use


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
            use; "account" (key, quota, billing, permission, no such model) would happen to every other request too; "filtered": its content was not
            let through; "dialect": the model says the next one in other words, at once; "batch": a batch as a whole came to nothing.
        status: HTTP status; 0: none came.
        after: seconds the server asks to wait.
        lost: an answer may have been made, and be paid for, that did not arrive.
    """

    def __init__(self, kind: str, message: str, status: int = 0, after: float | None = None, lost: bool = False) -> None:
        super().__init__(message)
        self.kind, self.status, self.after, self.lost = kind, status, after, lost

    @property
    def passes(self) -> bool:
        return self.kind in ("busy", "server", "timeout", "connection", "dialect")

    @property
    def answer(self) -> Reply | ModelError:
        """What it is to a judge: a filter's word is an answer."""
        return Reply("filtered", "", reason=str(self)) if self.kind == "filtered" else self


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


_ACCOUNT = {
    "insufficient_quota",
    "billing_error",
    "billing_hard_limit_reached",
    "billing_not_active",
    "invalid_api_key",
    "api_key_invalid",
    "incorrect_api_key",
    "authentication_error",
    "invalid_authentication",
    "permission_error",
    "permission_denied",
    "account_deactivated",
    "insufficient_balance",
    "insufficient_credits",
    "insufficient_user_quota",
    "exceeded_current_quota_error",
    "arrearage",
    "access_terminated",
    "unauthenticated",
    "model_not_found",
    "unsupported_country_region_territory",
}
_FILTERED = {
    "content_filter",
    "content_policy_violation",
    "invalid_prompt",
    "responsibleaipolicyviolation",
    "data_inspection_failed",
    "datainspectionfailed",
    "prohibited_content",
    "content_filtered",
    "content_blocked",
    "moderation_blocked",
    "safety",
    "moderation_error",
    "sensitive_content",
    "guardrail_intervened",
    "prompt_blocked",
    "1301",
}
_FILTER_SAID = re.compile(
    r"content (?:management|filtering|safety|policy|policies)|ContentPolicyViolation|ResponsibleAI|flagged (?:as|by|for)|input was flagged"
    r"|(?:inappropriate|sensitive|unsafe) content|blocked by .*(?:safety|guardrail|moderation)",
    re.IGNORECASE,
)
_ACCOUNT_SAID = re.compile(
    r"credit balance|insufficient (?:balance|credit|funds)|api[ _]key (?:not valid|is invalid|expired|not found)"
    r"|(?:invalid|incorrect) api[ _]key",
    re.IGNORECASE,
)
_BUSY = {
    "rate_limit_exceeded",
    "rate_limit_error",
    "overloaded_error",
    "resource_exhausted",
    "engine_overloaded",
    "throttling",
    "1302",
}


def http_error(status: int, kind: str, code: str, message: str, headers: Mapping[str, str]) -> ModelError:
    """What an HTTP error means for the next request.

    Quota and billing come as 429 or 400 too: asking again would only be refused again. `x-should-retry` is the server's own word on it.
    """
    said = redact(f"HTTP {status} {code or kind}: {message}".strip(": "))[:500]
    # What the message says counts only where nothing else tells: rate limits come with advice on billing.
    names = {kind.lower(), code.lower()}
    broke = bool(names & _ACCOUNT) or (status == 400 and bool(_ACCOUNT_SAID.search(message)))
    filtered = bool(names & _FILTERED) or (status in (400, 403, 422, 451) and bool(_FILTER_SAID.search(message)))
    if filtered and 400 <= status < 500 and status not in (401, 402, 429):
        return ModelError("filtered", said, status)
    if status in (401, 402, 403, 404, 405, 407) or (broke and status in (400, 422, 429)):
        what = "account"
    elif status in (408, 504, 524):
        what = "timeout"
    elif status in (409, 425, 429, 503, 529):
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


def said_error(body: Any) -> tuple[str, str, str]:
    """Type, code and message of an error in the body of any shape: OpenAI's and Anthropic's `error`, a text, FastAPI's `detail`, Gemini's list,
    `message`, `errors`; "" for what it does not say."""
    if isinstance(body, (list, tuple)):
        found = [said_error(each) for each in body[:5]]
        first = found[0] if found else ("", "", "")
        return first[0], first[1], "; ".join(filter(None, (message for _, _, message in found)))
    if not isinstance(body, Mapping):
        return "", "", "" if body is None else str(body)
    for name in ("error", "detail", "errors"):
        if body.get(name) and not isinstance(body[name], bool):
            kind, code, message = said_error(body[name])
            outer = str(body.get("message") or "")
            return kind or _text(body.get("type")), code or _text(body.get("code")), message or outer
    details = mapping(body.get("details"))
    inner = mapping(body.get("innererror"))
    meta = mapping(body.get("metadata"))
    code = _text(body.get("code")) or _text(details.get("error_code"))
    if inner.get("code") and not code:
        code = _text(inner["code"])
    if meta.get("flagged_input") or meta.get("reasons"):
        code = "content_filter"
    message = next((str(body[n]) for n in ("message", "msg", "error_msg", "error_description", "title") if body.get(n)), "")
    if isinstance(body.get("message"), (Mapping, list)):
        message = said_error(body["message"])[2]
    if body.get("msg") and body.get("loc"):
        message = f"{message} ({'.'.join(map(str, body['loc']))})"
    if meta.get("raw"):
        message = f"{message}: {meta['raw']}"
    return _text(body.get("type") or body.get("status")), code, message or json.dumps(dict(body), default=str)


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, (Mapping, list)) else str(value)


def error_within(body: Any, paid: bool = False) -> ModelError:
    """An error that came with status 200.

    Args:
        body: what holds it.
        paid: whether an answer was begun, and may be charged.
    """
    kind, code, message = said_error(body)
    names = {kind.lower(), code.lower()}
    status = next((int(n) for n in (code, kind) if n.isdigit() and 400 <= int(n) < 600), 0)
    if not status:
        status = 400 if names & (_FILTERED | _ACCOUNT) else 429 if names & _BUSY else 500
        if status == 500 and ("invalid_request_error" in names or "context_length_exceeded" in names):
            status = 400
    found = http_error(status, kind, code, message, {})
    found.lost = paid
    return found


async def called(call: Awaitable[Any], sdk: Any, http: Any) -> Any:
    """What a call of one of the official SDKs brings; its errors, which both name alike, as ours.

    Raises:
        ModelError: with what is to be made of it.
    """
    try:
        return await call
    except sdk.APITimeoutError as error:
        left = not isinstance(error.__cause__, (http.ConnectTimeout, http.PoolTimeout))
        raise ModelError("timeout" if left else "connection", "the request took too long", lost=left) from error
    except sdk.APIStatusError as error:
        body = error.body if error.body is not None else error.response.text[:300]
        kind, code, message = said_error(body)
        if error.status_code in (404, 405):
            message = f"{message[:300] or 'nothing there'} ({error.request.url})"
        raise http_error(error.status_code, kind, code, message or str(error.message), error.response.headers) from error
    except (sdk.APIConnectionError, http.TransportError, UnicodeEncodeError) as error:
        cause = error.__cause__ or error
        never = isinstance(cause, (http.ConnectError, http.ProxyError, http.LocalProtocolError, http.UnsupportedProtocol))
        useless = isinstance(cause, (http.LocalProtocolError, http.UnsupportedProtocol, UnicodeEncodeError))
        if "CERTIFICATE_VERIFY_FAILED" in str(cause):
            raise ModelError("account", f"{cause}: name the authority's file in SSL_CERT_FILE") from error
        said = redact(f"no answer: {cause}")[:500]
        raise ModelError("account" if useless else "connection", said, lost=not (never or useless)) from error
    except (sdk.APIError.__base__, ValueError) as error:  # an answer that is not JSON is a bare ValueError of theirs
        raise ModelError(
            "server", redact(f"{type(error).__name__}: {error}")[:500], lost=isinstance(error, ValueError)
        ) from error


_ENVIRONMENT = (
    "ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE",
)  # fmt: skip


def client_of(name: str, key: str | None, url: str | None, make: Callable[[str | None, str | None], Any]) -> Any:
    """A client of one of the official SDKs, whose secrets are kept out of whatever is written.

    Args:
        name: of the model, for errors.
        key: as given; white space around it is none of it.
        url: of a server of one's own.
        make: the client of a key and a url.

    Raises:
        PluginError: the key or the url can never work, or what the environment says of proxies and certificates cannot.
    """
    stripped = None if key is None else key.strip()
    if key is not None and not stripped:
        raise PluginError(f"the `api_key` of {name} is empty")
    if url is not None:
        _check_url(name, url)
    try:
        client = make(stripped, url and url.strip())
    except (ImportError, OSError, ValueError) as error:
        there = [n for n in os.environ if n.upper() in _ENVIRONMENT and os.environ[n]]
        raise PluginError(
            redact(
                f"{name} cannot be reached as the environment has it ({', '.join(sorted(there)) or 'no proxy is set'}): "
                f"{type(error).__name__}: {error}. Correct or unset the variable"
                + ("; for a SOCKS proxy: pip install socksio" if "socks" in str(error).lower() else "")
            )
        ) from error
    if client.api_key:
        client.api_key = client.api_key.strip()
    _check_url(name, str(client.base_url))
    url_in_use(client.base_url)
    for secret in (client.api_key, getattr(client, "auth_token", None)):
        in_use(secret)
        if secret and not (secret.isascii() and secret.isprintable()):
            raise PluginError(
                f"the key of {name} holds signs that no header can carry (a line break, a curly quote?): copy it again"
            )
    return client


def _check_url(name: str, url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url.strip())
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"\s", url.strip())
        good = good and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise PluginError(f"the url of {name} must look like http://localhost:8000/v1, got {redact(url)!r}")


def mapping(value: Any) -> Mapping[str, Any]:
    """A value of somebody else's JSON where an object is expected: that, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def count(value: Any) -> int:
    """A number of tokens, which some servers send as a float or as text; 0 for what is none."""
    try:
        return max(int(float(value)), 0)
    except (TypeError, ValueError, OverflowError):
        return 0


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
        if "retry-after-ms" in headers and math.isfinite(wanted := float(headers["retry-after-ms"])):
            return max(0.0, wanted / 1000)
        value = headers.get("retry-after", "")
        if not value:
            return None
        if value.replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
