"""Which names are those of secrets, read word by word: clientSecret, client-secret and
CLIENT_SECRET are one."""

from __future__ import annotations

import re
from functools import lru_cache

# A shorter value in use is found by name and place alone: hidden everywhere, it would take ordinary
# words along.
SHORT = 8


WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


_SURE = frozenset(
    [
        "password",
        "passwords",
        "passwd",
        "passphrase",
        "passphrases",
        "passcode",
        "pwd",
        "pw",
        "secret",
        "secrets",
        "credential",
        "credentials",
        "cred",
        "creds",
        "authorization",
        "auth",
        "bearer",
        "cookie",
        "cookies",
        "jwt",
        "dsn",
        "webhook",
        "webhooks",
        "sas",
        "apikey",
        "apikeys",
        "accesskey",
        "accesskeys",
        "secretkey",
        "secretkeys",
        "privatekey",
        "privatekeys",
        "clientsecret",
        "clientsecrets",
        "authtoken",
        "authtokens",
        "accesstoken",
        "accesstokens",
        "refreshtoken",
        "idtoken",
        "bearertoken",
        "apitoken",
        "apitokens",
        "appsecret",
        "secrettoken",
        "sessiontoken",
        "sessionid",
        "sessionkey",
        "connectionstring",
        "connstr",
        "mnemonic",
        "userpass",
        "hfkey",
        "signingkey",
        "masterkey",
        "authkey",
        "subscriptionkey",
        "encryptionkey",
        "sharedkey",
        "accountkey",
        "apisecret",
        "totp",
        "otp",
    ]
)


_WEAK = frozenset(
    [
        "key",
        "keys",
        "token",
        "tokens",
        "session",
        "sessions",
        "pass",
        "pat",
        "signature",
        "sig",
        "pin",
    ]
)  # they mean other things as well


_PLAIN_BEFORE = frozenset(  # ... after these: max_tokens, sort_key, eos_token
    [
        "max",
        "min",
        "new",
        "num",
        "n",
        "no",
        "number",
        "prompt",
        "completion",
        "input",
        "output",
        "total",
        "cached",
        "reasoning",
        "eos",
        "bos",
        "pad",
        "unk",
        "sep",
        "cls",
        "mask",
        "special",
        "stop",
        "end",
        "start",
        "image",
        "audio",
        "video",
        "generated",
        "context",
        "budget",
        "added",
        "extra",
        "thinking",
        "next",
        "last",
        "first",
        "bad",
        "ban",
        "unknown",
        "padding",
        "begin",
        "of",
        "per",
        "control",
        "word",
        "sub",
        "primary",
        "foreign",
        "sort",
        "group",
        "partition",
        "cache",
        "public",
        "map",
        "dict",
        "row",
        "index",
        "unique",
        "hot",
        "turn",
        "answer",
        "value",
        "missing",
        "chosen",
        "rejected",
        "pairs",
        "train",
        "eval",
        "seen",
        "think",
        "tool",
        "call",
        "by",
        "written",
        "read",
        "fresh",
        "loss",
        "all",
        "boundary",
        "pass",
    ]
)


PLAIN_AFTER = frozenset(  # ... and before these: properties of a secret, and not the secret
    [
        "type",
        "mode",
        "method",
        "methods",
        "file",
        "files",
        "path",
        "paths",
        "name",
        "names",
        "count",
        "counts",
        "limit",
        "limits",
        "rate",
        "rates",
        "length",
        "len",
        "size",
        "ttl",
        "timeout",
        "expiry",
        "expires",
        "field",
        "fields",
        "header",
        "env",
        "var",
        "variable",
        "provider",
        "providers",
        "enabled",
        "required",
        "rotation",
        "policy",
        "style",
        "position",
        "index",
        "per",
        "second",
        "usage",
        "error",
        "errors",
        "mean",
        "std",
        "sum",
        "weight",
        "weights",
        "ratio",
        "share",
        "format",
        "url",
        "uri",
        "endpoint",
        "scheme",
    ]
)


ENDS = ("password", "passwd", "secret", "apikey")  # pgpassword: libpq writes it as one word


@lru_cache(4096)
def secret_name(name: str) -> str:
    """Returns "sure" where a value of this name is a secret, "bare" where it is one unless it looks
    like a word or a number, else ""."""
    words = [w.lower() for w in WORDS.findall(name)]
    if not words or words[-1] in PLAIN_AFTER - {"url", "uri"}:
        return ""
    joined = "_".join(words)
    if words[-1] in ("url", "uri"):
        return (
            "sure"
            if words[0] in ("webhook", "webhooks") or words[-2:-1] in (["webhook"], ["sas"])
            else ""
        )
    if re.search(r"(^|_)(connection_string|conn_str|pass_phrase|pass_word)s?(_|$)", joined) or any(
        w in _SURE or w.endswith(ENDS) for w in words
    ):
        return "sure"
    for k in range(len(words)):
        if words[k] in _WEAK and k >= len(words) - 2 and not (k and words[k - 1] in _PLAIN_BEFORE):
            if k == len(words) - 1:
                return "sure" if k and words[k] not in ("sessions",) else "bare"
            if (
                words[k + 1]
                in (
                    "id",
                    "value",
                    "values",
                    "data",
                    "json",
                    "string",
                    "secret",
                    "base",
                    "b64",
                    "pem",
                )
                or words[k + 1].isdigit()
            ):
                return "sure" if words[k] not in ("token", "tokens") or words[k + 1] != "id" else ""
    return ""


def inner_name(outer: str, name: str) -> str:
    """Returns the name of a value within a mapping: its own, unless the mapping's is one of secrets
    (`api_keys: {openai: ...}`)."""
    return outer if secret_name(outer) == "sure" and not secret_name(name) else name


def looks_random(value: str) -> bool:
    """Returns whether a text looks made by a machine: no spaces, and letters with digits, or of
    both cases in one word."""
    if len(value) < SHORT or any(c.isspace() for c in value):
        return False
    letters, digits = any(c.isalpha() for c in value), any(c.isdigit() for c in value)
    return letters and (digits or bool(re.search(r"[a-z][A-Z]|[A-Z]{2}[a-z]", value)))


PASSWORDS = frozenset(["password", "passwd", "passphrase", "passcode", "pwd", "secret", "apikey"])
