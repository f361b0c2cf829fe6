"""Ids and seeds derived from what they identify."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> str:
    """Returns one ASCII text for one value: sorted keys, no spaces. The basis of every id and hash
    in a run.

    Raises:
        TypeError: the value is not plain JSON data.
        ValueError: it holds NaN or infinity, which JSON lacks.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def derive_id(*parts: Any) -> str:
    """Returns a 16-digit hex id derived from its parts, so that a replay of the same work finds the
    same ids."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]
