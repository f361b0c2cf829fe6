"""turnwise/Shop-v0: a shop's customer service with tools, a database, and policies to be kept.

A customer wants an item's money back, another item for it, an order cancelled, or to know how an
order stands. The player asks for the e-mail address, looks the order up by its tools, does what the
policies allow, closes the case by a tool as well, and says so. The tools do whatever they are
asked: keeping the policies is the player's. When it writes something that is no question, the
customer leaves, and the reward is 1 if the database is then exactly as the policies want it, else
0. Wishes are drawn evenly, and half of those that may be denied are: who looks nothing up is seldom
right.

`options={"split": "held_out"}` draws items that other starts never have.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import gymnasium

from ..protocols import Message, Text
from ..tools import call_text
from .toolbox import Functions
from .tools import WithTools

SYSTEM = """\
You work for a shop. Ask for the customer's e-mail address, find the order, then decide:
- An order may be cancelled while it is pending.
- An item of an order that was delivered at most 30 days ago may be refunded or exchanged, but not \
one of the final sale.
- It may be exchanged for an item that is in stock and costs no more.
- What is not allowed is declined, and nothing is changed.
Close the case by close_case, with the order's status where that was asked for. Then say goodbye, \
without a question."""
DAYS = 30
COLOURS = ("red", "blue", "green", "black", "white")
NOUNS = ("lamp", "kettle", "chair", "clock", "bag", "scarf", "mug", "pan", "rug", "mirror")
HELD_OUT = ("vase", "stool", "tray")
NAMES = ("ann", "ben", "cleo", "dan", "eva", "finn", "gina", "hugo")
OPENINGS = {
    "refund": "Hello, I want my money back for the {item}.",
    "exchange": "Hi, I would like to exchange the {item} for the {other}.",
    "cancel": "Good morning. Please cancel my order of the {item}.",
    "status": "Hello, how does my order of the {item} stand?",
}
Outcome = Literal["refunded", "exchanged", "cancelled", "declined", "answered"]
Status = Literal["pending", "shipped", "delivered"]
DONE: Mapping[str, Outcome] = {
    "refund": "refunded", "exchange": "exchanged", "cancel": "cancelled", "status": "answered",
}  # fmt: skip


class Database:
    """The shop's orders, items and cases, and the tools that change them."""

    def __init__(self, rng: random.Random, nouns: Sequence[str]) -> None:
        names = [f"{colour} {noun}" for colour in COLOURS for noun in nouns]
        rng.shuffle(names)
        self._items = {
            name: {"price": rng.randrange(5, 60), "in_stock": rng.random() < 0.7}
            for name in names[:8]
        }
        self._orders: dict[str, dict[str, Any]] = {}
        self._cases: list[tuple[str, str | None]] = []
        numbers = iter(rng.sample(range(1000, 10000), 6))
        for name in rng.sample(NAMES, 3):
            bought = rng.sample(sorted(self._items), 4)  # no item is in both orders of a customer
            for items in (bought[:2], bought[2:]):
                status = rng.choice(["pending", "shipped", "delivered"])
                self._orders[f"W{next(numbers)}"] = {
                    "email": f"{name}@example.com",
                    "status": status,
                    "delivered_days_ago": rng.randrange(1, 61) if status == "delivered" else None,
                    "items": {
                        item: {
                            "price": self._items[item]["price"],
                            "final_sale": rng.random() < 0.2,
                        }
                        for item in items
                    },
                }

    @property
    def tools(self) -> list[Callable[..., Any]]:
        """What the player may call."""
        return [
            self.find_orders, self.get_order, self.get_item,
            self.cancel_order, self.refund_item, self.exchange_item, self.close_case,
        ]  # fmt: skip

    def find_orders(self, email: str) -> list[str]:
        """Lists the numbers of a customer's orders."""
        return [number for number, order in self._orders.items() if order["email"] == email]

    def get_order(self, order: str) -> dict[str, Any]:
        """Shows an order: its status, when it was delivered, and its items."""
        return self._order(order)

    def get_item(self, item: str) -> dict[str, Any]:
        """Shows what an item costs, and whether it is in stock."""
        if item not in self._items:
            raise LookupError(f"there is no item {item!r}")
        return self._items[item]

    def cancel_order(self, order: str) -> str:
        """Cancels an order."""
        self._order(order)["status"] = "cancelled"
        return "cancelled"

    def refund_item(self, order: str, item: str) -> str:
        """Gives back what an item of an order cost."""
        self._bought(order, item)["refunded"] = True
        return "refunded"

    def exchange_item(self, order: str, item: str, new_item: str) -> str:
        """Sends another item for one of an order."""
        self._bought(order, item)["exchanged_for"] = new_item
        return "exchanged"

    def close_case(self, outcome: Outcome, order_status: Status | None = None) -> str:
        """Writes down how the case ended, and the order's status where that was asked for."""
        self._cases.append((outcome, order_status))
        return "closed"

    def _order(self, order: str) -> dict[str, Any]:
        if order not in self._orders:
            raise LookupError(f"there is no order {order!r}")
        return self._orders[order]

    def _bought(self, order: str, item: str) -> dict[str, Any]:
        items: dict[str, dict[str, Any]] = self._order(order)["items"]
        if item not in items:
            raise LookupError(f"order {order} has no item {item!r}")
        return items[item]

    def allows(self, wish: str, order: str, item: str, other: str) -> bool:
        """Returns whether the policies allow what a customer wants."""
        found, bought = self._orders[order], self._bought(order, item)
        if wish in ("cancel", "status"):
            return wish == "status" or found["status"] == "pending"
        days = found["delivered_days_ago"]
        sound: bool = days is not None and days <= DAYS and not bought["final_sale"]
        if wish == "refund":
            return sound
        new = self._items[other]
        return sound and bool(new["in_stock"]) and new["price"] <= bought["price"]

    def serve(self, wish: str, order: str, item: str, other: str) -> None:
        """Changes the database as the policies want it when the case is closed."""
        if not self.allows(wish, order, item, other):
            self.close_case("declined")
            return
        if wish == "refund":
            self.refund_item(order, item)
        elif wish == "exchange":
            self.exchange_item(order, item, other)
        elif wish == "cancel":
            self.cancel_order(order)
        self.close_case(DONE[wish], self._order(order)["status"] if wish == "status" else None)

    def state(self) -> dict[str, Any]:
        """Returns all that the tools can change."""
        return {"orders": self._orders, "cases": self._cases}


class Customer(gymnasium.Env[str, str]):
    """The customer, who answers what is asked and leaves when nothing is."""

    observation_space = action_space = Text(1_000_000)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Opens a case.

        Raises:
            ValueError: an option that there is not.
        """
        super().reset(seed=seed)
        settings = dict(options or {})
        split = settings.pop("split", "train")
        if settings or split not in ("train", "held_out"):
            raise ValueError("Shop takes the option split, which is 'train' or 'held_out'")
        number = int(self.np_random.integers(2**31)) if seed is None else seed
        rng = random.Random(f"shop {split} {number}")
        self.wish = rng.choice(sorted(OPENINGS))
        allowed = self.wish == "status" or rng.random() < 0.5
        cases: list[tuple[str, str, str]] = []
        while not cases:
            self.database = Database(rng, HELD_OUT if split == "held_out" else NOUNS)
            cases = self._cases(allowed)
        self.order, self.item, self.other = rng.choice(cases)
        self.email = self.database.state()["orders"][self.order]["email"]
        self.may_have_it = allowed
        self._wanted = copy.deepcopy(self.database)
        self._wanted.serve(self.wish, self.order, self.item, self.other)
        opening = OPENINGS[self.wish].format(item=self.item, other=self.other)
        return opening, {"system": SYSTEM, "optimum": 1.0}

    def _cases(self, allowed: bool) -> list[tuple[str, str, str]]:
        """Returns what the customer could want it of, (order, item, another item), so that it is
        allowed, or is not."""
        orders = self.database.state()["orders"]
        bought = [
            (order, item) for order in sorted(orders) for item in sorted(orders[order]["items"])
        ]
        others = sorted({item for _, item in bought})
        return [
            (order, item, other)
            for order, item in bought
            for other in others
            if other != item and self.database.allows(self.wish, order, item, other) == allowed
        ]

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answers a question, gives the e-mail address where it is spoken of, or leaves."""
        asked = action.lower()
        if re.search(r"e-?mail", asked):
            return f"It is {self.email}.", 0.0, False, False, {}
        if "?" not in asked:
            right = self.database.state() == self._wanted.state()
            return "Goodbye.", float(right), True, False, {"success": right}
        if "order" in asked:
            return f"The number is {self.order}.", 0.0, False, False, {}
        if "item" in asked:
            return f"The {self.item}.", 0.0, False, False, {}
        return "I do not know.", 0.0, False, False, {}


class Shop(WithTools):
    """The customer with the tools of the shop."""

    players: ClassVar[Mapping[str, Any]]  # below

    def __init__(self) -> None:
        self.customer = Customer()
        super().__init__(self.customer, [Functions(lambda: self.customer.database.tools)])


Player = Callable[[Sequence[Message]], str]


def _agent(env: Shop, careful: bool) -> Player:
    """Serves as the policies ask, going on from whatever was done; where it is not careful it does
    what the customer wants, allowed or not."""

    def reply(messages: Sequence[Message]) -> str:
        customer, last = env.customer, messages[-1]
        written_before = [m.content for m in messages if m.role == "assistant"]
        if not any('"find_orders"' in text for text in written_before):
            if "@" not in last.content:
                return "What is your e-mail address, please?"
            return call_text("find_orders", {"email": customer.email})
        if not any('"get_order"' in text for text in written_before):
            found = customer.database.find_orders(customer.email)
            return "\n".join(call_text("get_order", {"order": order}) for order in found)
        steps = _steps(customer, careful)
        return next((step for step in steps if step not in written_before), steps[-1])

    return reply


def _steps(customer: Customer, careful: bool) -> list[str]:
    """Returns what is to be done for a customer whose orders are known: calls, and a goodbye."""
    wish, order, item, other = customer.wish, customer.order, customer.item, customer.other
    steps = [call_text("get_item", {"item": other})] if wish == "exchange" else []
    allowed = not careful or customer.may_have_it
    actions = {
        "refund": ("refund_item", {"order": order, "item": item}),
        "exchange": ("exchange_item", {"order": order, "item": item, "new_item": other}),
        "cancel": ("cancel_order", {"order": order}),
    }
    outcome: dict[str, Any] = {"outcome": DONE[wish] if allowed else "declined"}
    if allowed and wish in actions:
        steps.append(call_text(*actions[wish]))
    elif wish == "status":
        outcome["order_status"] = customer.database.get_order(order)["status"]
    words = {
        "refunded": f"The money for the {item} is on its way.",
        "exchanged": f"The {other} is on its way.",
        "cancelled": "Your order is cancelled.",
        "answered": f"Your order is {outcome.get('order_status')}.",
        "declined": "I am sorry, our policies do not allow that.",
    }
    return [*steps, call_text("close_case", outcome), words[outcome["outcome"]]]


def _expert(env: Shop, rng: random.Random) -> Player:
    """Keeps every policy: always succeeds."""
    return _agent(env, True)


def _demonstrator(env: Shop, rng: random.Random) -> Player:
    """Forgets the policies in a third of its cases."""
    return _agent(env, rng.random() < 2 / 3)


def _random(env: Shop, rng: random.Random) -> Player:
    """Writes calls and words at random."""

    def reply(messages: Sequence[Message]) -> str:
        database = env.customer.database.state()
        order = rng.choice(sorted(database["orders"]))
        item = rng.choice(sorted(database["orders"][order]["items"]))
        return rng.choice(
            [
                "What is your e-mail address?",
                "Goodbye.",
                call_text("find_orders", {"email": env.customer.email}),
                call_text("get_order", {"order": order}),
                call_text("refund_item", {"order": order, "item": item}),
                call_text("cancel_order", {"order": order}),
                call_text("close_case", {"outcome": rng.choice(sorted(DONE.values()))}),
            ]
        )

    return reply


Shop.players = {"expert": _expert, "demonstrator": _demonstrator, "random": _random}
