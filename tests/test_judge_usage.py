"""What is booked for each way in which servers count tokens; the values are computed by hand."""

from typing import Any

import pytest
from turnwise.engine.util.secrets import redact
from turnwise.judges.models.model import Usage
from turnwise.judges.models.openai import read_completion

READ = {"prompt_tokens": 100, "completion_tokens": 20}
WAYS: dict[str, tuple[Any, Usage]] = {
    "reasoning inside": ({**READ, "total_tokens": 120}, Usage(100, 0, 0, 20)),
    "reasoning outside": ({**READ, "total_tokens": 1120}, Usage(100, 0, 0, 1020)),
    "no total": (READ, Usage(100, 0, 0, 20)),
    "a total that is too small": ({**READ, "total_tokens": 90}, Usage(100, 0, 0, 20)),
    "no prompt": ({"completion_tokens": 20, "total_tokens": 120}, Usage(100, 0, 0, 20)),
    "no completion": ({"prompt_tokens": 100, "total_tokens": 120}, Usage(100, 0, 0, 20)),
    "a total alone": ({"total_tokens": 120}, Usage(0, 0, 0, 120)),
    "reasoning outside, no total": (
        {**READ, "completion_tokens_details": {"reasoning_tokens": 1000}},
        Usage(100, 0, 0, 1020),
    ),
    "reasoning inside, no total": (
        {**READ, "completion_tokens_details": {"reasoning_tokens": 15}},
        Usage(100, 0, 0, 20),
    ),
    "reasoning beside the details": ({**READ, "reasoning_tokens": 30}, Usage(100, 0, 0, 50)),
    "reasoning inside, and told": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 1020,
            "total_tokens": 1120,
            "completion_tokens_details": {"reasoning_tokens": 1000},
        },
        Usage(100, 0, 0, 1020),
    ),
    "Responses' names": ({"input_tokens": 100, "output_tokens": 20}, Usage(100, 0, 0, 20)),
    "cached by another name": (
        {**READ, "prompt_cache_hit_tokens": 60, "prompt_cache_miss_tokens": 40},
        Usage(40, 60, 0, 20),
    ),
    "cached beside the prompt": (
        {**READ, "total_tokens": 620, "prompt_tokens_details": {"cached_tokens": 500}},
        Usage(100, 500, 0, 20),
    ),
    "numbers beyond all sense": (
        {"prompt_tokens": 1e30, "completion_tokens": -5},
        Usage(0, 0, 0, 0),
    ),
    "details of another shape": (
        {**READ, "prompt_tokens_details": [], "completion_tokens_details": "none"},
        Usage(100, 0, 0, 20),
    ),
    "a list": ([1, 2], Usage(0, 0, 0, 0)),
    "cached": (
        {**READ, "total_tokens": 120, "prompt_tokens_details": {"cached_tokens": 60}},
        Usage(40, 60, 0, 20),
    ),
    "text": (
        {"prompt_tokens": "100", "completion_tokens": "20.0", "total_tokens": "150"},
        Usage(100, 0, 0, 50),
    ),
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
