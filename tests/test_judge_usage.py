"""What is booked for each way in which servers count tokens; the values are computed by hand."""

from typing import Any

import pytest
from turnwise.engine.secrets import redact
from turnwise.judges.models import Usage
from turnwise.judges.models.openai import read_completion

READ = {"prompt_tokens": 100, "completion_tokens": 20}
WAYS: dict[str, tuple[Any, Usage]] = {
    "reasoning inside": ({**READ, "total_tokens": 120}, Usage(100, 0, 0, 20)),
    "reasoning outside": ({**READ, "total_tokens": 1120}, Usage(100, 0, 0, 1020)),
    "no total": (READ, Usage(100, 0, 0, 20)),
    "a total that is too small": ({**READ, "total_tokens": 90}, Usage(100, 0, 0, 20)),
    "a total alone": ({"completion_tokens": 20, "total_tokens": 120}, Usage(100, 0, 0, 20)),
    "cached": ({**READ, "total_tokens": 120, "prompt_tokens_details": {"cached_tokens": 60}}, Usage(40, 60, 0, 20)),
    "text": ({"prompt_tokens": "100", "completion_tokens": "20.0", "total_tokens": "150"}, Usage(100, 0, 0, 50)),
    "floats": ({"prompt_tokens": 100.0, "completion_tokens": 20.0}, Usage(100, 0, 0, 20)),
    "no numbers": ({"prompt_tokens": "many", "completion_tokens": float("inf")}, Usage(0, 0, 0, 0)),
    "none": (None, Usage(0, 0, 0, 0)),
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_booked_for_every_way_of_counting(way: str) -> None:
    usage, booked = WAYS[way]
    body = {"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}], "usage": usage}
    assert read_completion(body).usage == booked


def test_a_key_after_bearer_is_hidden_whatever_its_signs() -> None:
    assert redact("Authorization: Bearer ab!c$d%e:f rest") == "Authorization: Bearer *** rest"
