"""Whether the policy got better, in words: the report's first line, and a run's last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..stages.evaluate import BEFORE

PAIR = f"policy - {BEFORE}"


def verdict(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns in a sentence or two whether the policy got better, as far as an evaluation says."""
    pairs = {
        name.rpartition("/")[0]: row
        for name, row in table.items()
        if name.rpartition("/")[2] == PAIR and "pairs" in row
    }
    if not pairs:
        return (
            "It is not known: no stage has evaluated both the policy and the one that the run began"
            " with. A stage `evaluate` after the others does."
        )
    return " ".join(_verdict(env, row, table) for env, row in pairs.items())


def _verdict(env: str, row: Mapping[str, Any], table: Mapping[str, Mapping[str, Any]]) -> str:
    own = f"{env}/" if env else ""
    name = "success" if row["success_low"] != row["success_high"] else "outcome"
    low, high, change = row[f"{name}_low"], row[f"{name}_high"], row[name]
    answer = (
        "Yes" if low > 0 else "No, it got worse" if high < 0 else "Not that these starts can show"
    )
    return (
        f"{f'In {env}: ' if env else ''}{answer}: {name}"
        f" {table[own + BEFORE][name]:.3f} before, {table[own + 'policy'][name]:.3f} after,"
        f" {change:+.3f} ({low:+.3f} to {high:+.3f}, 95 %) on {row['pairs']} starts."
    )
