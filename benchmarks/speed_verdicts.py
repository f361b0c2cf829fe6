"""What the server of speed_judges.py answers: a verdict of the form that is asked for, whose levels
depend on the words that are judged."""

from __future__ import annotations

import random
import zlib
from typing import Any

from model_server import example  # the server is started from its folder


def verdict(asked: Any) -> dict[str, Any]:
    """Returns the answer to a question."""
    draw = random.Random(zlib.crc32(asked.user.encode()))

    def varied(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: varied(inner) for name, inner in value.items()}
        return draw.randrange(5) if type(value) is int else value

    return dict(varied(example(asked)))
