"""The common part of models behind HTTP: checks of keys, addresses, proxies and certificates, and
what a server's errors mean for the next request, whatever shape they come in.

Servers that are almost compatible tell errors as `{"error": {...}}`, `{"detail": [...]}`,
`{"message": ...}`, lists, plain text or pages, and some tell them with HTTP 200. So the words that
tell kinds apart (`content_filter`, `insufficient_quota`) are looked for wherever a body has a code,
type, status or reason.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from ...protocols import PluginError
from ...tools import redact
from .model import ModelError, Usage

CONNECT = 10.0  # seconds to connect; what fails there was never sent, and costs nothing

# Words in a body's codes, lower case without "_" and "-".
FILTERED = frozenset((
    "contentfilter", "contentfiltered", "contentpolicyviolation", "contentpolicyviolationerror",
    "invalidprompt",
    "responsibleaipolicyviolation", "datainspectionfailed", "prohibitedcontent", "safety",
    "blocklist", "spii", "recitation",
    "guardrailintervened", "moderationblocked", "contentblocked", "refusal", "sensitive",
    "imagesafety", "modelarmor",
    "promptblocked", "jailbreak",
))  # fmt: skip
_ACCOUNT = frozenset((
    "insufficientquota", "billingerror", "billinghardlimitreached", "billingnotactive",
    "invalidapikey", "apikeyinvalid",
    "invalidauthentication", "invalidauthenticationerror", "authenticationerror",
    "authenticationfailed", "unauthenticated",
    "permissiondenied", "permissionerror", "accountdeactivated", "accountsuspended",
    "accessterminated", "insufficientbalance",
    "insufficientcredits", "exceededcurrentquotaerror", "arrearage", "modelnotfound",
    "modelnotfounderror", "notfounderror",
    "deploymentnotfound", "unsupportedcountryregionterritory",
))  # fmt: skip
_TEXT_FILTERED = re.compile(
    r"content.?policy.?violation|content management policy|content exists risk|violates? (?:our"
    r" |the )?(?:usage|content|safety)"
    r"|(?:input|prompt) was flagged|blocked by (?:our )?(?:content|safety|moderation)",
    re.IGNORECASE,
)
_TEXT_ACCOUNT = re.compile(
    r"credit balance|insufficient (?:balance|credits?|funds)|api.?key (?:is )?(?:not"
    r" valid|invalid|expired)"
    r"|(?:invalid|incorrect) api.?key|AuthenticationError|not a valid model",
    re.IGNORECASE,
)
_BUSY = frozenset(("ratelimitexceeded", "ratelimiterror", "ratelimit", "overloadederror",
        "overloaded", "toomanyrequests",
                   "resourceexhausted", "tokenlimitexceeded", "serviceunavailable",
                   "engineoverloadederror"))  # fmt: skip
_REQUEST = frozenset(
    (
        "invalidrequesterror",
        "badrequesterror",
        "contextlengthexceeded",
        "invalidargument",
        "invalidjsonline",
    )
)


# Before the first request.


def key_of(given: Any, variable: str, name: str) -> str | None:
    """Returns a key as it can be sent, without white space around it; None where there is none.

    Args:
        given: the option `api_key`.
        variable: of the environment, where it is not given.
        name: of the model, for messages.

    Raises:
        PluginError: it can never be one; the message says where it stands and not what it is.
    """
    found, where = (
        (given, "`api_key`") if given is not None else (os.environ.get(variable), variable)
    )
    if found is None:
        return None
    if not isinstance(found, str):
        raise PluginError(
            f"{where} of {name} must be text, got {type(found).__name__}: put it in quotes"
        )
    key = found.strip().strip("\ufeff\u200b")
    if not key:
        raise PluginError(f"{where} of {name} is empty: put the key there, or unset it")
    if not key.isascii() or not key.isprintable() or re.search(r"\s|^[\"'].*[\"']$", key):
        raise PluginError(
            f"{where} of {name} is no key: it has spaces, line breaks, quotes or other signs that"
            " cannot be sent. Copy it again, alone, without 'Bearer'"
        )
    return key


def address_of(given: Any, variable: str, name: str) -> str | None:
    """Returns the address of a server in a form that can be asked; None: the SDK's own.

    Raises:
        PluginError: it can never be one.
    """
    found, where = (given, "`url`") if given is not None else (os.environ.get(variable), variable)
    if found is None:
        return None
    url = str(found).strip()
    try:
        parts = urlsplit(url)
        good = (
            parts.scheme in ("http", "https")
            and bool((parts.hostname or "").encode("idna"))
            and parts.port != 0
        )
    # brackets that are not closed, a port that is no number, a host with an empty part
    except ValueError:
        good = False
    if not good or re.search(r"[\s\x00-\x1f\\]", url):
        raise PluginError(
            f"{where} of {name} is no address of a server: {url!r}. It looks like"
            " http://localhost:8000/v1, or is left out for the provider's own"
        )
    if end := re.search(r"/(chat/completions|completions|responses|messages)/*$", parts.path):
        raise PluginError(
            f"{where} of {name} must end before {end.group()}, which is put after it: {url!r}"
        )
    return url


def client_of(make: Callable[..., Any], sdk: Any, http: Any, url: str | None, name: str) -> Any:
    """Makes a client of an official SDK that sends one request per call and gives up connecting
    after `CONNECT` seconds.

    Proxies of the environment are ignored for a server that NO_PROXY names: the SDKs read them all
    the same, and stop at one that they cannot use.

    Raises:
        PluginError: proxies or certificates of the environment cannot be used.
    """
    options: dict[str, Any] = {"max_retries": 0, "timeout": http.Timeout(None, connect=CONNECT)}
    try:
        host = urlsplit(url).hostname if url else None
        if host and urllib.request.getproxies() and urllib.request.proxy_bypass(host):
            limits = http.Limits(max_connections=1000, max_keepalive_connections=100)
            options["http_client"] = sdk.DefaultAsyncHttpxClient(
                transport=http.AsyncHTTPTransport(limits=limits)
            )
        else:
            # Meets what the SDK's own would; that one, half made, complains once more when it goes.
            http.AsyncClient()
        return make(base_url=url, **options)
    except (ImportError, OSError, ValueError, http.InvalidURL) as error:
        raise PluginError(f"{name} cannot be asked: {_environment(error)}") from error


def _environment(error: Exception) -> str:
    """Names the environment's variable that keeps a client from being made."""
    if isinstance(error, OSError):
        for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
            if path := os.environ.get(variable):
                why = error.strerror or str(error)
                return (
                    f"the certificates that {variable} names ({path}) cannot be read ({why}):"
                    " correct it, or unset it"
                )
    names = [
        n
        for base in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
        for n in (base, base.lower())
        if os.environ.get(n)
    ]
    odd = [n for n in names if urlsplit(os.environ[n]).scheme not in ("http", "https", "")] or names
    if not odd:
        return f"{type(error).__name__}: {error}"
    shown = redact(f"{odd[0]} ({os.environ[odd[0]]})")
    if isinstance(error, ImportError):
        return (
            f"{shown} names a SOCKS proxy, for which the package socksio is missing: pip install"
            f" socksio, unset {odd[0]}, or name the server's host in NO_PROXY"
        )
    return (
        f"the proxy of {shown} cannot be used ({error}): correct it, unset it, or name the server's"
        " host in NO_PROXY"
    )


# What an error means.


def http_error(status: int, body: Any, headers: Mapping[str, str], url: str = "") -> ModelError:
    """Classifies an HTTP error by what it means for the next request.

    Quota and billing come as 429 or 400 too, content filters as 400 or 403. `x-should-retry` is the
    server's own advice.

    Args:
        status: the HTTP status.
        body: as it came: JSON data, or text.
        headers: those of the response.
        url: what was asked, for errors that an address may be the cause of.
    """
    code, message = error_text(body)
    words = set(_words(body))
    reason = ": ".join(filter(None, (f"HTTP {status} {code}".strip(), message)))[:500]
    # Where the message may tell; rate limits come with advice on billing.
    plain = status in (200, 400, 403, 422)
    if words & FILTERED or (plain and _TEXT_FILTERED.search(message)):
        return ModelError("filtered", reason, status)
    broke = (words & _ACCOUNT and status < 500) or (plain and _TEXT_ACCOUNT.search(message))
    if broke or status in (401, 402, 403, 404, 405, 407, 410, 451):
        what = "account"
    elif status in (408, 504):
        what = "timeout"
    elif status in (409, 425, 429, 503, 529):
        what = "busy"
    elif status >= 500 and status not in (501, 505):
        what = "server"
    else:
        what = "request"
    wish = headers.get("x-should-retry", "")
    if wish == "false" and what not in ("account", "request"):
        what = "request"
    elif wish == "true" and what == "request":
        what = "server"
    if url and status in (404, 405, 410):
        reason += f" (asked at {url})"
    return ModelError(what, reason, status, _after(headers))


def error_within(body: Any, usage: Usage | None = None, lost: bool = False) -> ModelError:
    """Classifies an error that came with HTTP 200, or as an item of a batch: the status is in its
    code, or follows from its words."""
    inner = body.get("error") if isinstance(body, Mapping) and body.get("error") else body
    code = inner.get("code") if isinstance(inner, Mapping) else None
    words = set(_words(body))
    numbered = re.fullmatch(r"[45]\d\d", str(code))
    if numbered:
        status = int(numbered.group())
    elif words & (FILTERED | _ACCOUNT):
        status = 400
    else:
        status = 429 if words & _BUSY else 400 if words & _REQUEST else 500
    found = http_error(status, body, {})
    reason = str(found) if numbered else re.sub(r"\AHTTP \d+:? *", "", str(found))
    return ModelError(
        found.kind, reason, found.status, lost=lost and found.kind != "filtered", usage=usage
    )


def error_text(body: Any) -> tuple[str, str]:
    """Returns the code and the message of an error's body, whatever its shape; of one that has
    neither, the body itself."""
    inner = body[0] if isinstance(body, list) and body else body
    if isinstance(inner, Mapping):
        inner = inner.get("error") or inner
    if not isinstance(inner, Mapping):
        return "", _text(inner)
    names = [
        inner.get("code"),
        part(inner, "details").get("error_code"),
        inner.get("status"),
        inner.get("type"),
    ]
    code = next(
        (name for name in names if isinstance(name, str) and name and not name.isdigit()), ""
    )
    message = next(
        (
            _text(inner[n])
            for n in ("message", "detail", "msg", "error_description")
            if inner.get(n)
        ),
        "",
    )
    more = inner.get("metadata")
    if isinstance(more, Mapping) and (raw := more.get("raw") or more.get("reasons")):
        message = f"{message}: {_text(raw)}"
    return code, message or _text(inner)


def _text(value: Any) -> str:
    """Returns a value of a body in one line; a page without its markup."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if re.search(r"<(!doctype|html|head|body)\b", text, re.IGNORECASE):
        text = re.sub(r"<[^>]*>", " ", text)
    return " ".join(text.split())[:500]


def _words(body: Any, depth: int = 0) -> Iterator[str]:
    """Yields the words that tell kinds of errors apart: codes, types, states and reasons, wherever
    they stand in a body."""
    if depth > 6:
        return
    if isinstance(body, list):
        for each in body[:20]:
            yield from _words(each, depth + 1)
    if isinstance(body, Mapping):
        for name, value in body.items():
            if name == "flagged_input":
                yield "contentfilter"
            elif isinstance(value, str) and name in (
                "code",
                "type",
                "status",
                "reason",
                "error_code",
            ):
                yield plain_word(value)
            elif name not in ("input", "ctx"):  # the request, repeated
                yield from _words(value, depth + 1)


def plain_word(text: str) -> str:
    """Returns a word in lower case without spaces, underscores and hyphens."""
    return re.sub(r"[\s_-]", "", text).lower()


async def called(call: Awaitable[Any], sdk: Any, http: Any) -> Any:
    """Awaits a call of one of the official SDKs and turns its errors, which both name alike, into
    ours.

    Raises:
        ModelError: the call failed; its kind tells what that means for the next request.
    """
    try:
        return await call
    except sdk.APIStatusError as error:
        response = error.response
        try:
            body = json.loads(response.text)
        except ValueError:
            body = response.text
        raise http_error(error.status_code, body, response.headers, str(response.url)) from error
    except (sdk.APIConnectionError, http.TransportError) as error:
        raise _unanswered(
            error.__cause__ or error, isinstance(error, sdk.APITimeoutError), http
        ) from error
    except http.InvalidURL as error:
        raise ModelError("account", f"the address cannot be asked: {error}") from error
    except UnicodeEncodeError as error:
        raise ModelError("request", f"the question cannot be sent: {error}") from error
    # an answer that is not JSON is a bare ValueError of theirs
    except (sdk.APIError.__base__, ValueError) as error:
        raise ModelError(
            "server", f"{type(error).__name__}: {error}", lost=isinstance(error, ValueError)
        ) from error


def _unanswered(error: BaseException, timeout: bool, http: Any) -> ModelError:
    """Classifies a missing answer: nothing was sent where no connection was made."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 10:
        chain.append(cause)
    if any(
        isinstance(e, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(e)
        for e in chain
    ):
        return ModelError(
            "account",
            f"the server's certificate is not trusted (SSL_CERT_FILE names others): {error}",
        )
    if isinstance(error, (http.LocalProtocolError, http.UnsupportedProtocol, http.InvalidURL)):
        return ModelError("account", f"it cannot be sent: {error}")
    if isinstance(error, http.ProxyError):
        refused = re.match(r"40[137]\b", str(error))
        return ModelError(
            "account" if refused else "connection", f"the proxy did not let it through: {error}"
        )
    if isinstance(error, (http.ConnectTimeout, http.PoolTimeout)):
        return ModelError("connection", f"no connection within {CONNECT:g} seconds")
    if timeout:
        return ModelError("timeout", "the request took too long", lost=True)
    return ModelError(
        "connection", f"no answer: {error}", lost=not isinstance(error, http.ConnectError)
    )


def envelope(response: Any) -> Mapping[str, Any]:
    """Returns the JSON object in the body of an HTTP response of the SDKs; a proxy's page or an
    empty body is none.

    Raises:
        ModelError: there is no such object, or it is an error.
    """
    try:
        body = json.loads(response.text.removeprefix("\ufeff"))
    except ValueError:
        body = None
    # As Gemini wraps its errors.
    if isinstance(body, list) and body and isinstance(body[0], Mapping):
        body = body[0]
    if not isinstance(body, Mapping):
        kind = response.headers.get("content-type", "no content type")
        raise ModelError(
            "form" if response.is_success and response.content else "server",
            f"HTTP {response.status_code} with {len(response.content)} bytes of {kind}, no JSON"
            f" object (asked at {response.url})",
            response.status_code,
            lost=True,
        )
    return body


def _after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds of `retry-after-ms` or `retry-after` (a number, or an HTTP date)."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after", "")
        if not value:
            return None
        if value.replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


# Numbers of tokens.


def count(value: Any) -> int:
    """Returns a number of tokens, which some servers send as a float or text; else 0."""
    try:
        found = int(float(value))
    except (TypeError, ValueError, OverflowError):
        return 0
    return found if 0 < found < 1_000_000_000 else 0


def part(of: Any, name: str) -> Mapping[str, Any]:
    """Returns an object within a body, empty where there is none."""
    found = of.get(name) if isinstance(of, Mapping) else None
    return found if isinstance(found, Mapping) else {}
