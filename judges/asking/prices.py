"""The prices of tokens, in US dollars per million: fresh input, input read from the provider's
cache, input written to it, output.

List prices as their vendors published them in 2025, written down from memory and not checked since:
look before you rely on them, and override what has changed (`prices: {"openai:gpt-5-mini": [0.25,
0.025, 0.25, 2.0]}`). Batches cost half at both vendors. A model in this process is free, and so is
one on a server of your own (this machine, a private network) unless you give a price.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from ..models.model import Usage

PRICES: Mapping[str, tuple[float, float, float, float]] = {
    "anthropic:claude-haiku-4-5": (1.0, 0.1, 1.25, 5.0),
    "anthropic:claude-sonnet-4-5": (3.0, 0.3, 3.75, 15.0),
    "anthropic:claude-opus-4-5": (5.0, 0.5, 6.25, 25.0),
    "openai:gpt-5": (1.25, 0.125, 1.25, 10.0),
    "openai:gpt-5-mini": (0.25, 0.025, 0.25, 2.0),
    "openai:gpt-5-nano": (0.05, 0.005, 0.05, 0.4),
    "openai:gpt-4.1": (2.0, 0.5, 2.0, 8.0),
    "openai:gpt-4.1-mini": (0.4, 0.1, 0.4, 1.6),
}
BATCH = 0.5


def price_of(
    model: str, prices: Mapping[str, Sequence[float]], url: str = ""
) -> tuple[float, float, float, float] | None:
    """Returns what a model's tokens cost; None where that is unknown.

    Args:
        model: as `Model.name`; dated versions of a known name cost what it does.
        prices: the user's own, by the same names; four numbers, or two (input, output).
        url: where it is served. On this machine or in a private network it costs nothing, unless
            one of the prices is its.

    Raises:
        ValueError: a price that is none.
    """
    own = {name: _four(name, value) for name, value in prices.items()}
    known = {
        **PRICES,
        **{n.replace("openai:", "openai-chat:"): p for n, p in PRICES.items()},
        **own,
    }
    if model in known:
        return known[model]
    # Gpt-5-mini-2025-08-07, claude-haiku-4-5-20251001.
    dated = [name for name in known if model.startswith(f"{name}-2")]
    if dated:
        return known[max(dated, key=len)]
    return (0.0, 0.0, 0.0, 0.0) if model.startswith("local:") or _own(url) else None


def _own(url: str) -> bool:
    """Returns whether a server is on this machine or in a private network."""
    host = (urlsplit(url).hostname or "") if url else ""
    try:
        return ip_address(host).is_private
    except ValueError:
        return bool(host) and (
            "." not in host or host.endswith((".local", ".internal", ".lan", ".localhost"))
        )


def cost(usage: Usage, price: tuple[float, float, float, float], batch: bool = False) -> float:
    """Returns the dollars that tokens cost."""
    fresh, read, written, output = price
    total = (
        usage.fresh * fresh + usage.read * read + usage.written * written + usage.output * output
    )
    return total / 1e6 * (BATCH if batch else 1.0)


def _four(name: str, value: Sequence[float]) -> tuple[float, float, float, float]:
    try:
        numbers = [float(v) for v in value]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (2, 4) or not all(0 <= number < math.inf for number in numbers):
        raise ValueError(
            f"the price of {name!r} must be [input, output] or [input, cached, written, output] per"
            f" million tokens, got {value}"
        )
    if len(numbers) == 2:
        return numbers[0], numbers[0], numbers[0], numbers[1]
    return numbers[0], numbers[1], numbers[2], numbers[3]
