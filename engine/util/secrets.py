"""Keeps secrets out of whatever is written: config dumps, failure reasons, logs, ledgers, reports.

A secret is hidden three ways, since each alone misses some: by value, where it is in use (`in_use`,
`urls_in_use`, `config_in_use`, and the environment), however it is quoted; by the name next to it
(`api_key=...`, `Authorization: ...`, `?token=...`, a key of a mapping); and by its shape (`sk-...`,
a JWT, a private key, the password of a URL).
"""

from __future__ import annotations

import base64
import html
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import PurePath
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

from .secret_names import (
    _SURE,
    ENDS,
    PASSWORDS,
    PLAIN_AFTER,
    SHORT,
    WORDS,
    inner_name,
    looks_random,
    secret_name,
)

HIDDEN = "***"

# Names. They are read word by word: clientSecret, client-secret and CLIENT_SECRET are one.


# Shapes.

_SHAPES = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY[A-Z"
    r" ]*-----|\Z)"
    r"|\beyJ[\w-]{5,}\.[\w-]{5,}(?:\.[\w-]*)*"  # JWT
    r"|(?<![A-Za-z0-9])(?:"
    r"(?:sk|rk|pk|ak|csk|pplx|xai|nvapi|tvly)-[\w-]{12,}"
    r"|(?:sk|rk|pk|whsec|hf|api_org|gsk|r8|npm|tgp_v1|lsv2_[a-z]{2}|jina|wandb_v1|lin_api|lin_oauth|ntn|dckr_pat|shp(?:at|ca|pa|ss)|"
    r"dop_v1|doo_v1|dor_v1|gh[pousr]|github_pat|sbp|phc|phx|esecret|hvs|sntrys|sntryu|glc|glsa|pscale_tkn)"
    r"_[\w.-]{12,}"
    r"|hv[sbr]\.[\w-]{20,}"
    r"|gl(?:pat|oas|dt|rt|cbt|ptt|ft|imt|agent|soat)-[\w.-]{12,}|(?:xox[a-z]|xapp|xwfp)-[\w-]{10,}"
    r"|(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{12,}|AIza[\w-]{20,}|ya29\.[\w-]{10,}|GOCSPX-[\w-]{16,}"
    r"|SG\.[\w-]{16,}\.[\w-]{16,}|dapi[0-9a-f]{30,}|key-[0-9a-f]{32}|SK[0-9a-f]{32}|ATATT[\w=-]{20,}|pypi-AgE[\w-]{20,}"
    r"|AGE-SECRET-KEY-1[A-Z0-9]{20,}|\d{8,10}:AA[\w-]{32,}|[\w~.]{3}\dQ~[\w~.-]{30,}|EAA[A-Za-z0-9]{40,}|sq0[a-z]{3}-[\w-]{20,}"
    r")|(?<=hooks\.slack\.com/services/)[^\s\"'<>]+|(?<=hooks\.slack\.com/workflows/)[^\s\"'<>]+"
    r"|(?<=/api/webhooks/)[^\s\"'<>]+",
    re.DOTALL,
)
_SCHEME = re.compile(
    r"\b(?:Bearer(?=\s)|bearer(?=\s)|BEARER(?=\s)|Basic(?=\s)|basic(?=\s))\s+[\"']?([^\s\"'<>]+)"
)
_SPOKEN = frozenset(
    [
        "token",
        "tokens",
        "auth",
        "authentication",
        "authorization",
        "scheme",
        "header",
        "key",
        "is",
        "was",
        "of",
        "and",
        "or",
        "not",
        "for",
    ]
)
# The user and password of a URL: the password may hold any sign, and spaces where the URL is a
# database's.
_USERINFO = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]{1,40}://)"
    r"(?P<who>[^/\s:@?#\[\"'<>]*:(?!\d{1,5}(?:[/\s,;)]|$))(?:(?!://)\S){0,500}@"
    r"|[^/\s:@?#\[\"'<>]*:(?!\d{1,5}(?:[/\s,;)]|$))(?:(?!://)[^\n\"'<>@]){1,200}@(?=[\w.\[-]+(?:[:/?]|$))"
    r"|[^/\s:@?#\[\"'<>]+@)",
    re.IGNORECASE,
)
# name=value, name: value, "name": "value", {\"name\": \"value\"}
_NAME = re.compile(
    r"(?<![\w.-])(?P<name>[A-Za-z][\w.-]{1,63})(?P<sign>\\*[\"']?\s{0,3}(?:=>|:=|==?|:)\s{0,3})(?P<quote>\\*[\"'])?"
)
LOOK = 200  # as much of a value tells whether it is one
_VALUE = re.compile(r"[^\s\"'&<>]+")
_AUTH_SCHEME = re.compile(r"(?i)(?:basic|bearer|token|apikey|digest|negotiate)\s+")
_IN_PROSE = re.compile(
    r"(?i)\b(?:api[ -]?keys?|access["
    r" -]?tokens?|tokens?|passwords?|secrets?)\b[^:=\n]{0,24}[:=]\s*[\"'`]?([^\s\"'`<>]+)"
)


def _hide_shape(match: re.Match[str]) -> str:
    return HIDDEN if re.search(r"[0-9A-Z]", match[0]) else match[0]  # sk-learn-compatible


def _hide_userinfo(match: re.Match[str]) -> str:
    who = match["who"]
    if ":" not in who and not re.search(r"http|^wss?:", match["scheme"], re.IGNORECASE):
        return match[0]  # a database's or ssh's user without a password
    return f"{match['scheme']}{HIDDEN}@"


def _hide_beside(text: str) -> str:
    """Hides what stands next to the name of a secret."""
    kept, done, at = [], 0, 0
    while match := _NAME.search(text, at):
        at, kind = match.end(), secret_name(match["name"])
        if not kind:
            continue
        if match["quote"]:
            end = text.find(match["quote"], at)
            end = len(text) if end < 0 else end
        else:
            if scheme := _AUTH_SCHEME.match(text, at):
                at = scheme.end()
            end = found.end() if (found := _VALUE.match(text, at, at + LOOK)) else at
        value = text[at : min(end, at + LOOK)]
        certain = kind == "sure" and (
            set(match["name"].lower().split("_")) & PASSWORDS or not _loose(match)
        )
        if value and (
            certain or text[match.start() - 1 : match.start()] in ("?", "&") or looks_random(value)
        ):
            if not match["quote"] and (found := _VALUE.match(text, at)):
                end = found.end()
            kept += [text[done:at], HIDDEN]
            done = at = end
    return "".join([*kept, text[done:]])


def _loose(match: re.Match[str]) -> bool:
    """Returns whether it may be a sentence as well: "auth: failed"."""
    return match["name"].lower() in _SURE and ": " in match["sign"] and not match["quote"]


_COOKIE = re.compile(r"(?i)((?:set-)?cookie[\"']?\s*[:=]\s*[\"']?)(?=[^\s=;\"']+=)[^\n\"'}]+")


def _hide_scheme(match: re.Match[str]) -> str:
    value = match[1]
    basic = match[0][0] in "Bb" and match[0][1] == "a"
    spoken = value.strip(".,;:").lower() in _SPOKEN
    if spoken or (
        (basic or match[0][0] == "b")
        and not (looks_random(value) or value.endswith("=") or len(value) > 24)
    ):
        return match[0]
    return match[0][: match.start(1) - match.start()] + HIDDEN


def _hide_in_prose(match: re.Match[str]) -> str:
    value = match[1]
    if not looks_random(value) or "://" in value:
        return match[0]
    return match[0][: match.start(1) - match.start()] + HIDDEN


# Values.

_used: dict[str, None] = {}


def in_use(*values: Any) -> None:
    """Registers secrets of this process: from now on `redact` hides them, and whatever quoting
    makes of them. Empty ones and None are ignored, and so is what is shorter than eight
    characters."""
    for value in values:
        if isinstance(value, str) and len(value.strip()) >= SHORT:
            _used[value.strip()] = None


def url_in_use(url: Any) -> None:
    """Registers the secrets of a URL: its password, or a token in its place, and those among its
    parameters."""
    in_use(*_secrets_of_url(str(url)))


def _secrets_of_url(url: str) -> Iterator[str]:
    scheme, mark, rest = url.partition("://")
    if not mark:
        return
    if match := _USERINFO.match(url):
        user, colon, password = match["who"][:-1].partition(":")
        place = url[match.end() :]
        for secret in (
            (password, unquote(password)) if colon else ((user,) if "http" in scheme else ())
        ):
            if not colon or (
                secret != user
                and not re.match(rf"{re.escape(secret)}\b|.*[/@]{re.escape(secret)}(?:$|\?)", place)
            ):
                yield secret  # one that equals the user's or the database's name is no secret
    for pair in re.split(r"[?#&;]", rest)[1:]:
        name, _, value = pair.partition("=")
        if secret_name(name):
            yield from (value, unquote_plus(value))


def config_in_use(value: Any, name: str = "") -> None:
    """Registers the secrets in options: what stands under a name of secrets, and what is in
    URLs."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            config_in_use(each, inner_name(name, str(key)))
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)
        for k, each in enumerate(items):
            config_in_use(each, "password" if _after_flag(items, k) else name)
    elif isinstance(value, str):
        if secret_name(name) == "sure" or (secret_name(name) == "bare" and looks_random(value)):
            in_use(value)
        url_in_use(value)


@lru_cache(1)  # it is looked at for every text, and changes hardly ever
def _of_environment(variables: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    return tuple(_secrets_of_variables(variables))


def _secrets_of_variables(variables: Iterable[tuple[str, str]]) -> Iterator[str]:
    for name, value in variables:
        if len(value) < SHORT or name == "PWD":
            continue
        words = [word.lower() for word in WORDS.findall(name)]
        password = any(word == "pwd" or word.endswith(ENDS) for word in words)
        # A path: SSH_AUTH_SOCK, ..._CREDENTIALS.
        if password or not value.startswith(("/", "~", ".")):
            if (
                secret_name(name) == "sure"
                and ("://" not in value or "webhook" in name.lower())
                and "session" not in name.lower()
            ):
                yield value.strip()
            elif (
                words[:1] == ["key"]
                and words[-1] not in PLAIN_AFTER
                and "://" not in value
                and looks_random(value)
            ):
                yield value.strip()  # KEY_OPENAI
            elif "://" in value:
                yield from (secret for secret in _secrets_of_url(value) if len(secret) >= SHORT)


def _forms(value: str) -> Iterator[str]:
    """Yields a value, and its forms where it was quoted, escaped, or sent as a part of something in
    base64."""
    plain = [value]
    if re.search(r"\W", value):
        once = [
            repr(value)[1:-1],
            repr(value.encode())[2:-1],
            json.dumps(value)[1:-1],
            json.dumps(value, ensure_ascii=False)[1:-1],
        ]
        plain += [
            *once,
            *(json.dumps(each)[1:-1] for each in once),
            *(repr(each)[1:-1] for each in once),
        ]
        plain += [
            quote(value),
            quote(value, safe=""),
            quote_plus(value),
            html.escape(value),
            html.escape(value, quote=False),
        ]
        plain += [value.replace("'", "''"), " ".join(value.split())]
    yield from plain
    raw = value.encode("utf-8", "surrogatepass")
    for shift in range(3):  # the same bytes look three ways, by where they begin
        coded = base64.b64encode(b"\0" * shift + raw).decode()
        part = coded[(0, 2, 3)[shift] : len(coded) - (0, 3, 2)[(shift + len(raw)) % 3]]
        if len(part) >= SHORT:
            yield from (part, part.replace("+", "-").replace("/", "_"))


@lru_cache(32)
def _by_value(values: tuple[str, ...]) -> re.Pattern[str]:
    """Returns a pattern of the values in all their forms, the longest first; one of letters or
    digits alone only where it stands alone, and of one that was cut off somewhere (messages are)
    what is left, where that is much."""
    found, cut = [], []
    for form in sorted({form for value in values for form in _forms(value)}, key=len, reverse=True):
        text = re.escape(form)
        if form.isalpha() or form.isdigit():
            text = rf"(?<![^\W_]){text}(?![^\W_])"
        found.append(text)
        least = max(12, len(form) // 3)
        cut += (
            [re.escape(form[:least]) + r"[^\s\"'<>]*"]
            if len(form) > least + 3 and not form.isalpha()
            else []
        )
    return re.compile("|".join(found + cut), re.IGNORECASE)


def redactor() -> Callable[[str], str]:
    """Returns what takes secrets out of texts, with the values that are in use now."""
    values = tuple(dict.fromkeys([*_used, *_of_environment(tuple(os.environ.items()))]))
    in_use = _by_value(values) if values else None

    def hide(text: str) -> str:
        if in_use is not None:
            text = in_use.sub(HIDDEN, text)
        text = _USERINFO.sub(_hide_userinfo, text)
        text = _SHAPES.sub(_hide_shape, text)
        text = _COOKIE.sub(rf"\1{HIDDEN}", text)
        text = _hide_beside(text)
        text = _SCHEME.sub(_hide_scheme, text)
        return _IN_PROSE.sub(_hide_in_prose, text)

    return hide


def redact(text: str) -> str:
    """Returns text without secrets: values in use, what stands next to a secret's name, and what
    looks like one."""
    return redactor()(text)


def _after_flag(items: list[Any], k: int) -> bool:
    """Returns whether an item of a command is the secret that the flag before it names:
    `--api-key`, `VALUE`."""
    flag, value = (items[k - 1], items[k]) if k else ("", "")
    if not (
        isinstance(flag, str)
        and flag.startswith("-")
        and isinstance(value, str)
        and not value.startswith("-")
    ):
        return False
    kind = secret_name(flag.lstrip("-"))
    return "=" not in flag and (kind == "sure" or (kind == "bare" and looks_random(value)))


def redacted(value: Any, name: str = "") -> Any:
    """Returns plain data for a dump: secrets hidden by the name of their key or by their look,
    objects shown by their type only."""
    kind = secret_name(name)
    if isinstance(value, Mapping):
        named = value.get("name", value.get("key"))  # {"name": "Authorization", "value": ...}
        pair = isinstance(named, str) and secret_name(named) == "sure" and "value" in value
        return {
            redact(str(k)): redacted(
                v, named if pair and k == "value" else inner_name(name, str(k))
            )
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)
        if (
            len(items) == 2
            and isinstance(items[0], str)
            and isinstance(items[1], str)
            and secret_name(items[0])
        ):
            hide = secret_name(items[0]) == "sure" or looks_random(items[1])  # a header as a pair
            return [items[0], HIDDEN if hide else redact(items[1])]
        return [
            (
                HIDDEN
                if (kind == "bare" and isinstance(v, str) and looks_random(v))
                or _after_flag(items, k)
                else redacted(v, name if kind == "sure" else "")
            )
            for k, v in enumerate(items)
        ]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        single = (
            isinstance(value, int)
            and len(str(abs(value))) >= SHORT
            and not name.lower().endswith("s")
        )
        return (
            HIDDEN
            if (kind and single) or (kind == "sure" and set(name.lower().split("_")) & PASSWORDS)
            else value
        )
    if isinstance(value, (str, PurePath)):
        value = str(value)
        number = re.fullmatch(r"[\d.,+-]*", value) is not None and kind == "bare"
        return HIDDEN if value and kind and not number else redact(value)
    of = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
    return f"<{of.__module__}.{of.__qualname__}>"
