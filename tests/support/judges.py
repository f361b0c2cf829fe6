"""Asks judges as the engine does, with models that judge by what they read."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import turnwise
from turnwise.engine.feedback.specs import with_members
from turnwise.engine.protocols import Context
from turnwise.engine.records.feedback import Question
from turnwise.engine.util.aio import background
from turnwise.judges.asking import calls
from turnwise.judges.asking.store import CALLS
from turnwise.judges.models.anthropic import Anthropic
from turnwise.judges.models.model import Model, Prompt, Reply, Usage
from turnwise.judges.models.openai import OpenAI, OpenAIChat

from support.clock import AsyncClock
from support.model_server import Asked, ModelServer, Tokens

# Dollars per million tokens: fresh, read from the cache, written to it, output.
PRICE = (3.0, 0.3, 3.75, 15.0)
WIRES = ("messages", "responses", "chat")
KEY = "sk-test-0123456789abcdef"
RUBRIC = {
    "name": "helpful",
    "criteria": [
        {
            "name": "kind",
            "question": "Was it kind?",
            "levels": ["no", "somewhat", "yes"],
            "weight": 1,
        },
        {
            "name": "right",
            "question": "Was it right?",
            "levels": ["no", "hardly", "partly", "mostly", "yes"],
            "weight": 3,
        },
    ],
}


def model(wire: str, server: ModelServer | str, name: str = "judge-1", **options: Any) -> Any:
    """Returns a model of a wire, at a server."""
    url = server if isinstance(server, str) else server.url
    kinds: Mapping[str, Callable[..., Any]] = {
        "messages": Anthropic,
        "responses": OpenAI,
        "chat": OpenAIChat,
    }
    return kinds[wire](name, api_key=KEY, url=url if wire == "messages" else f"{url}/v1", **options)


# A model that judges by what it reads: a reply is as good as it has "good" words, less the "bad"
# ones.


def quality(conversation: Mapping[str, Any]) -> int:
    return sum(worth(turn["reply"]["text"]) for turn in conversation["turns"])


def worth(text: str) -> int:
    return len(re.findall("good", text)) - len(re.findall("bad", text))


def blocks(user: str) -> list[tuple[str, Any]]:
    """Returns what stands between the marks of a question: label and data."""
    found = re.findall(r"<(\w+)-([0-9a-f]{16})>\n(.*)\n</\1-\2>", user)
    return [(label, json.loads(data)) for label, _, data in found]


def verdict(schema: Mapping[str, Any], user: str) -> dict[str, Any]:
    """Returns what an unbiased judge says, in the form asked for."""
    shown = [data for label, data in blocks(user) if label == "conversation"]
    fields = schema["properties"]
    said: dict[str, Any] = {}
    for name, inner in fields.items():
        if name == "verdict_id":
            said[name] = inner["enum"][0]
        elif name == "rationale":
            said[name] = "I read it."
        elif name == "abstain":
            said[name] = False
        elif name == "better":
            a, b = (quality(each) for each in shown)
            said[name] = inner["enum"][0 if a > b else 1 if b > a else 2]
        elif name == "ranking":
            ids = inner["items"]["items"]["enum"]
            tiers: dict[int, list[str]] = {}
            for id_, each in zip(ids, shown, strict=True):
                tiers.setdefault(-quality(each), []).append(id_)
            said[name] = [tiers[q] for q in sorted(tiers)]
        elif name == "levels":
            said[name] = levels(inner, quality(shown[0]))
        elif name == "replies":
            texts = [turn["reply"]["text"] for turn in shown[0]["turns"]]
            said[name] = {
                n: levels(f, worth(t))
                for (n, f), t in zip(inner["properties"].items(), texts, strict=True)
            }
        else:  # a point of a checklist
            said[name] = {
                "rationale": "So it is.",
                "holds": "yes" if quality(shown[0]) > 0 else "no",
            }
    return said


def levels(schema: Mapping[str, Any], number: int) -> dict[str, int]:
    return {
        name: min(max(number, 0), inner["enum"][-1]) for name, inner in schema["properties"].items()
    }


def bound(asked: Asked) -> dict[str, Any]:
    """Returns the schema of a question to a server with the ids in it that the question names; over
    the wire it has none, so that it can be cached."""
    assert asked.schema is not None
    [own] = re.findall(r"The id of your (?:verdict|answer) is (\w+)\.", asked.user)
    ids = re.findall(r"^Conversation (\w+):$", asked.user, re.MULTILINE)
    choices = {"verdict_id": [own], "answer_id": [own], "better": [*ids, "neither"], "ranking": ids}
    known = {name: values for name, values in choices.items() if name in asked.schema["properties"]}
    return Prompt("", asked.user, asked.schema, choices=known).bound


def unbiased(asked: Asked) -> dict[str, Any]:
    """Returns what an unbiased judge behind a server says."""
    return verdict(bound(asked), asked.user)


class Scripted(Model):
    """Answers in this process by a function of the prompt; what that raises is raised."""

    settings: Mapping[str, Any] = {}

    def __init__(
        self, say: Callable[[Prompt], Any] | None = None, name: str = "scripted:1", **settings: Any
    ) -> None:
        self.name, self.settings, self.prompts = name, settings, []
        self._say = say or (lambda prompt: verdict(prompt.bound, prompt.user))

    async def ask(self, prompt: Prompt) -> Reply:
        self.prompts.append(prompt)
        said = self._say(prompt)
        if asyncio.iscoroutine(said):
            said = await said
        return (
            said
            if isinstance(said, Reply)
            else Reply(
                "end", said if isinstance(said, str) else json.dumps(said), Usage(100, 0, 0, 10)
            )
        )


def context(
    folder: Path, ledger: turnwise.Ledger | None = None, run: str = "run", name: str = "judge"
) -> Context:
    return Context(name, folder / "run", lambda: 0.0, 0, ledger=ledger, run=run)


def answers(judge: Any, episodes: Sequence[Any], where: Context) -> list[Any]:
    """Returns what a judge says of conversations, asked as the engine does; of groups, if it
    compares."""
    for name, part in with_members(judge, where.name):
        if hasattr(part, "open"):
            part.open(dataclasses.replace(where, name=name))
    groups: dict[str, list[Any]] = {}
    for e in episodes:
        groups.setdefault(e.group, []).append(e)
    asked = []
    for key, members in groups.items():
        if hasattr(judge, "plan"):
            asked += judge.plan(key, members)
        elif judge.kind == "group":
            asked.append(Question(key, tuple(members)))
        else:
            asked += [Question(e.id, (e,)) for e in members]
    requests = [
        turnwise.Request(judge.kind, q.target, where.name, ask=q.ask, episodes=q.episodes)
        for q in asked
    ]
    clock = calls.TIME
    if isinstance(clock, AsyncClock):
        clock.held = True
    judge.request(requests)
    if isinstance(clock, AsyncClock):
        background(asyncio.sleep(0)).result()  # on the judges' loop: all of them have begun
        clock.held = False
    heard: dict[str, Any] = {}
    while len(heard) < len(requests):
        heard |= {a.stamp.request: a for a in judge.receive()}
    judge.close()
    return [heard[r.id] for r in requests]


def booked(ledger: turnwise.Ledger, run: str) -> list[Any]:
    """Returns what a run's ledger says of the requests that were sent."""
    with ledger.reading() as db:
        return list(db.execute(sa.select(CALLS).where(CALLS.c.run == run).order_by(CALLS.c.id)))


def dollars(tokens: Tokens, share: float = 1.0) -> float:
    """Returns what the server's tokens cost, at PRICE."""
    fresh, read, written, output = PRICE
    plain = tokens.input - tokens.cached - tokens.written
    return (
        (plain * fresh + tokens.cached * read + tokens.written * written + tokens.output * output)
        / 1e6
        * share
    )
