"""Keeps secrets out of whatever is written: config dumps, failure reasons, logs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

HIDDEN = "***"
_NAMES = re.compile(r"(^|_|-)(api_?key|key|token|secret|password|passwd|credentials?|authorization)$", re.IGNORECASE)
_SHAPES = re.compile(
    r"\b(sk-[\w-]{12,}|hf_\w{16,}|gh[pousr]_\w{20,}|AKIA\w{12,})|(?<=Bearer )\S+|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)


def redact(text: str) -> str:
    """Text without what looks like a secret, or equals the value of a secret environment variable."""
    for name, value in os.environ.items():
        if _NAMES.search(name) and len(value) >= 8:
            text = text.replace(value, HIDDEN)
    return _SHAPES.sub(HIDDEN, text)


def redacted(value: Any, name: str = "") -> Any:
    """Plain data for a dump: secrets hidden by the name of their key or by their look, objects shown by their type only."""
    if isinstance(value, Mapping):
        return {str(k): redacted(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [redacted(v, name) for v in value]
    if isinstance(value, (str, PurePath)):
        value = str(value)
        return HIDDEN if value and _NAMES.search(name) else redact(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    kind = value if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")) else type(value)
    return f"<{kind.__module__}.{kind.__qualname__}>"
