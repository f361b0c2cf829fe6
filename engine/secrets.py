"""Keeps secrets out of whatever is written: config dumps, failure reasons, logs.

A secret is known in three ways: by its value (`remember`, and environment variables named like one), by the name that
it stands under, and by its shape.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import PurePath
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "***"

_in_use: set[str] = set()

# Names are read as words: apiKey, API-KEY and api_key are the same two.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ALWAYS = {
    "password",
    "passwords",
    "passwd",
    "pwd",
    "passphrase",
    "passcode",
    "userpass",
    "pgpassword",
    "secret",
    "secrets",
    "credential",
    "credentials",
    "apikey",
    "apikeys",
    "accesskey",
    "secretkey",
    "privatekey",
    "authtoken",
    "accesstoken",
    "authorization",
    "bearer",
    "cookie",
    "cookies",
    "dsn",
    "jwt",
    "webhook",
    "sas",
    "otp",
}
_LAST = {"key", "token", "auth", "pass", "pin", "signature", "sig", "connectionstring"}
_PAIRS = {("connection", "string"), ("token", "value"), ("key", "id"), ("conn", "str"), ("private", "key"), ("api", "key")}
_PERHAPS = {"keys", "tokens", "session", "sessionid"}  # hidden where the value looks like one
_TOKENS = {
    "bos",
    "eos",
    "pad",
    "unk",
    "sep",
    "cls",
    "mask",
    "stop",
    "special",
    "control",
    "image",
    "added",
    "max",
    "new",
}  # a tokenizer's

_KINDS = r"api|access|secret|private|subscription|account|signing|encryption|shared|master|auth|license|service|client|storage"
_NAMED = re.compile(
    rf"""((?:(?:{_KINDS})[_\-. ]?keys?|(?<![a-z])pass(?:word|wd|phrase|code)s?|(?<=pg)password|(?<=_)password|pwd
        |(?:client|shared|app|consumer)?[_-]?secret|(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?<!stop_)token
        |authorization|credentials?|set-cookie|cookie|(?<![a-z])dsn|(?<=[?&])(?:key|auth|sig|signature|pass|code|jwt))
       ["']?(?:\s*=\s*|\s*:\s*))
       (?:"((?:[^"\\\n]|\\.)*)"|'((?:[^'\\\n]|\\.)*)'|((?:(?:Basic|Bearer|Token|Digest)\s+)?[^\s"'&,;)}}\]]+))""",
    re.IGNORECASE | re.VERBOSE,
)
_SHAPES = re.compile(
    r"\b(?:sk|pk|rk|lf|gsk|xai|pplx|r8|hf|nvapi|dop|npm|pypi|fw|key|tgp|csk|whsec|shpat|dapi|lin_api|wandb)[-_][\w-]{10,}"
    r"|\bgithub_pat_\w{10,}|\bgh[pousr]_\w{10,}|\bglpat-[\w-]{10,}|\bxox[a-z]-[\w-]{8,}|\bAIza[\w-]{12,}|\bya29\.[\w.-]{8,}"
    r"|\b(?:AKIA|ASIA)\w{8,}|\beyJ[\w-]{4,}\.[\w-]{4,}\.[\w-]+|hooks\.slack\.com/services/\S+|discord(?:app)?\.com/api/webhooks/\S+"
    r"|(?<=Bearer )\S+|(?<=bearer )\S{8,}|(?<=BEARER )\S{8,}|(?<=Basic )[\w+/=-]{6,}|(?<=basic )[\w+/-]{6,}={1,2}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
# A password may hold slashes, colons and, in databases' addresses, spaces; a port is none.
_WEB = re.compile(
    r"(?:(?<=http://)|(?<=https://)|(?<=ftp://)|(?<=ws://)|(?<=wss://))"
    r"(?:[^\s:/@?#]*:(?!\d{1,5}(?:[/?#]|$))[^\s@]*|[^\s:/@?#]+)(?=@)"
)
_ADDRESS = re.compile(r"(?<!http)(?<!https)(?<!ws)(?<!wss)(?<!ftp)://[^\s:/@?#]*:[^@\n]{0,300}?@(?:[^@\s/]*@)*")


def remember(secret: str | None) -> None:
    """Has a secret in use hidden from now on, wherever it turns up in this process and however it is written."""
    if secret and len(secret.strip()) >= 6:
        _in_use.add(secret)


def redact(text: str) -> str:
    """Text without secrets that are in use or stand in the environment, and without what looks like one."""
    kept = {value for name, value in os.environ.items() if len(value) >= 8 and _secret(name)}
    for secret in sorted(_in_use | kept, key=len, reverse=True):
        for spelling in _spellings(secret):
            if spelling in text:
                text = text.replace(spelling, HIDDEN)
    text = _ADDRESS.sub(f"://{HIDDEN}@", text)
    text = _SHAPES.sub(HIDDEN, _WEB.sub(HIDDEN, text))
    return _NAMED.sub(_hide, text)


def _hide(found: re.Match[str]) -> str:
    value = next(group for group in found.groups()[1:] if group is not None)
    if not value or value in (HIDDEN, "None", "null", "none") or re.fullmatch(r"[\d.]{1,5}", value):
        return found[0]
    if (
        ":" in found[1]
        and re.fullmatch(r"[A-Z]?[a-z]{1,12}", value)
        and not re.search(r"pass|pwd|secret", found[1], re.IGNORECASE)
    ):
        return found[0]  # "invalid_api_key: Incorrect ..."
    return found[1] + found[0][len(found[1]) :].replace(value, HIDDEN)


@lru_cache(maxsize=256)
def _spellings(secret: str) -> tuple[str, ...]:
    """How a secret may be written, the longest first: as it is, escaped, in a URL, in base64 (a part of Basic's)."""
    bare = secret.strip()
    found = {secret, bare, repr(bare)[1:-1], ascii(bare)[1:-1], json.dumps(bare)[1:-1], quote(bare, safe=""), quote_plus(bare)}
    found |= {quote(bare), bare.encode().hex()}
    raw = bare.encode()
    for before in range(3):  # base64 of "user:password" has the password at one of three places in its groups
        whole = base64.b64encode(b"\0" * before + raw).decode().rstrip("=")
        inner = whole[(0, 2, 3)[before] : len(whole) - (1 if (before + len(raw)) % 3 else 0)]
        if len(inner) >= 8:
            found |= {inner, inner.replace("+", "-").replace("/", "_")}
    return tuple(sorted((each for each in found if len(each) >= 6), key=len, reverse=True))


def _secret(name: str) -> bool:
    """Whether what stands under a name is a secret."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or (words[-1] in ("token", "tokens") and set(words[:-1]) & _TOKENS):
        return False
    if set(words) & _ALWAYS or words[-1] in _LAST or "".join(words[-2:]) in _ALWAYS:
        return True
    return any(pair in _PAIRS for pair in itertools.pairwise(words)) or words[-2:] == ["api", "keys"]


def redacted(value: Any, name: str = "", *, below: bool = False) -> Any:
    """Plain data for a dump: secrets hidden by the names they stand under, by value and by look.

    Args:
        name: what the value stands under.
        below: whether something around it has a secret's name.

    Returns:
        The data; objects are shown by their type only.
    """
    secret = below or (bool(name) and _secret(name))
    if isinstance(value, Mapping):
        return {redact(str(k)): redacted(v, str(k), below=secret) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [redacted(v, name, below=below) for v in value]
    if isinstance(value, (str, PurePath)):
        value = str(value)
        words = [word.lower() for word in _WORD.findall(name)]
        perhaps = words[-1:] and words[-1] in _PERHAPS and not set(words) & _TOKENS and re.fullmatch(r"\S{8,}", value)
        return HIDDEN if value and (secret or perhaps) else redact(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return HIDDEN if set(_WORD.findall(name.lower())) & {"password", "passwd", "pwd", "passphrase", "secret"} else value
    kind = value if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")) else type(value)
    return f"<{kind.__module__}.{kind.__qualname__}>"
