"""The agent of tool_loop.py in the shop of `turnwise/Shop-v0`: all that it takes to train it.

env:
  id: turnwise/Agent-v0
  kwargs: {program: "examples.agents.shop:play", tasks: "python:examples.agents.shop:training"}
"""

from openai import OpenAI
from turnwise.envs.shop import Customer
from turnwise.envs.toolbox import Functions

from .tool_loop import serve


def play(endpoint):
    """Serves one customer. Returns whether the database is as the shop's policies want it."""
    shop, right = Customer(), False
    opening, info = shop.reset(seed=endpoint.task["customer"], options=endpoint.task["options"])
    tools = Functions(lambda: shop.database.tools)

    def customer(reply):
        nonlocal right
        if reply is None:
            return opening
        answer, _, has_left, _, more = shop.step(reply)
        right = more.get("success", False)
        return None if has_left else answer

    with OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
        serve(client, endpoint.model, info["system"], tools.open(), tools.call, customer)
    return right


def training(split="train"):
    """Returns the tasks: customers."""
    return [{"options": {"split": split}, "customer": number} for number in range(10_000)]


def held_out():
    """Returns customers of items that the others never have."""
    return training("held_out")
