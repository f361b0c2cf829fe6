"""A judge of SupportDesk's conversations that can be had for nothing: a model in the sense of
`judges/models`, made of rules.

It stands where a language model would: it is sent the real prompts, reads what stands between the
marks, and answers in the form that was asked, which the real parsers read. It knows what is said in
a conversation up to the agent's last reply, and nothing else: neither the hidden story nor what the
customer said of the resolution.

    asked which is better        it follows the one principle in the question, whatever else is
                                 wrong
    asked to revise a draft      it changes the draft only where the principle in the question
                                 demands it
    asked for levels             `resolved`: whether it ended by the rules. `engaged`: the naive
                                 one, how many questions there were

It errs: a stated share of its verdicts is drawn at random. What it says is drawn from a hash of
what it was shown, so that runs repeat.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turnwise.engine.records.episode import Message
from turnwise.engine.util.ids import derive_id
from turnwise.envs.support_desk import (
    _ASKS,
    _DOES,
    QUESTIONS,
    RESOLUTIONS,
    next_topic,
    read_facts,
    resolution,
)
from turnwise.judges.constitutional.constitution import Constitution
from turnwise.judges.models.model import Model, ModelError, Prompt, Reply, Token, Usage

CONSTITUTION = Path(__file__).with_name("constitution.md")
SURE = 0.9  # the probability of the verdict's token


@dataclass(frozen=True, slots=True)
class Heard:
    """A reply of the agent as the customer understands it.

    Attributes:
        facts: what the customer had told before.
        asks: topics it asks about.
        does: the resolution it promises; None where it promises none, or several.
    """

    facts: Mapping[str, str]
    asks: tuple[str, ...]
    does: str | None

    @classmethod
    def of(cls, before: Sequence[Message], reply: str) -> Heard:
        text, facts = reply.lower(), read_facts(before)
        if "?" in text:
            return cls(
                facts,
                tuple(topic for topic, pattern in _ASKS.items() if pattern.search(text)),
                None,
            )
        done = [name for name, pattern in _DOES.items() if pattern.search(text)]
        return cls(facts, (), done[0] if len(done) == 1 else None)

    @property
    def right(self) -> bool:
        """Whether it settles the matter as the shop's rules say."""
        return (
            self.does is not None
            and next_topic(self.facts) is None
            and self.does == resolution(self.facts)
        )


# How often a reply offends against a principle. For `rules` a whole conversation is judged by its
# last reply.
OFFENCES = {
    "rules": lambda h: int(h.does is not None and not h.right),
    "listen": lambda h: sum(topic in h.facts for topic in h.asks),
    "economy": lambda h: sum(
        topic not in h.facts and topic != next_topic(h.facts) for topic in h.asks
    ),
    "clarity": lambda h: int(not h.asks and h.does is None),
}


def offences(principle: str, replies: Sequence[Heard]) -> int:
    """How often a conversation offends against a principle."""
    return (
        int(not replies[-1].right)
        if principle == "rules"
        else sum(OFFENCES[principle](h) for h in replies)
    )


class SimulatedModel(Model):
    """See above.

    Args:
        error: share of the verdicts that are drawn at random.
        constitution: whose principles it knows, by their words; each must be one of `OFFENCES`.

    Attributes:
        words: how many it read and wrote.
    """

    name = "simulated:desk"

    def __init__(
        self, error: float = 0.1, constitution: Path | Constitution = CONSTITUTION
    ) -> None:
        self.principles = Constitution.load(
            constitution, ["better", "critique", "revise"]
        ).principles
        self.error = error
        self.settings = {"error": error, "sure": SURE}
        self.words = 0

    async def ask(self, prompt: Prompt) -> Reply:
        asked = set(prompt.bound["properties"])
        marks = re.findall(r"<(\w+)-([0-9a-f]{16})>\n(.*)\n</\1-\2>", prompt.user)
        plain = re.sub(r"<(\w+)-([0-9a-f]{16})>\n.*\n</\1-\2>", "", prompt.user)
        shown = [(label, json.loads(text)) for label, _, text in marks]
        if "better" in asked:
            reply = self._compare(prompt, plain, shown)
        elif "revision" in asked:
            reply = self._revise(prompt, plain, shown)
        elif "levels" in asked:
            reply = self._levels(prompt, shown)
        else:
            raise ModelError("request", f"{self.name} cannot answer in the form {sorted(asked)}")
        read, written = len(f"{prompt.system} {prompt.user}".split()), len(reply.text.split())
        self.words += read + written
        return Reply("end", reply.text, Usage(fresh=read, output=written), tokens=reply.tokens)

    def _principle(self, plain: str, part: str) -> str:
        """The one that is named in the question, outside of what is judged."""
        [name] = [p.name for p in self.principles if f"The principle: {getattr(p, part)}" in plain]
        return name

    def _compare(self, prompt: Prompt, plain: str, shown: Sequence[Any]) -> Reply:
        principle = self._principle(plain, "better")
        before = [data for label, data in shown if label == "beginning"]
        a, b = ([*before, data] for label, data in shown if label == "conversation")
        bad = [offences(principle, replies(parts)) for parts in (a, b)]
        chance = random.Random(derive_id("compare", principle, self.error, before, a, b))
        ids = prompt.bound["properties"]["better"]["enum"]  # the first shown, the second, "neither"
        verdict = ids[2] if bad[0] == bad[1] else ids[0] if bad[0] < bad[1] else ids[1]
        if chance.random() < self.error:
            verdict = chance.choice(ids)
        head = json.dumps(
            {
                "verdict_id": prompt.bound["properties"]["verdict_id"]["enum"][0],
                "rationale": f"By {principle}: {bad[0]} against {bad[1]} offences.",
                "abstain": False,
            }
        )
        head = f'{head[:-1]}, "better": "'
        sure = {id_: math.log(SURE if id_ == verdict else (1 - SURE) / 2) for id_ in ids}
        return Reply(
            "end",
            f'{head}{verdict}"}}',
            tokens=(Token(head, {head: 0.0}), Token(verdict, sure), Token('"}', {'"}': 0.0})),
        )

    def _revise(self, prompt: Prompt, plain: str, shown: Sequence[Any]) -> Reply:
        principle = self._principle(plain, "critique")
        [(_, data)] = shown
        before = [Message(each["from"], each["text"]) for each in data["conversation"]]
        draft = Heard.of(before, data["draft"])
        chance = random.Random(derive_id("revise", principle, self.error, data))
        offends, topic = OFFENCES[principle](draft) > 0, next_topic(draft.facts)
        better = chance.choice(QUESTIONS[topic] if topic else RESOLUTIONS[resolution(draft.facts)])
        if chance.random() < self.error:
            offends, better = (
                chance.random() < 0.5,
                chance.choice(chance.choice([*QUESTIONS.values(), *RESOLUTIONS.values()])),
            )
        said = {
            "answer_id": prompt.bound["properties"]["answer_id"]["enum"][0],
            "critique": f"By {principle}, the draft {'does not do' if offends else 'is fine'}.",
            "change": offends,
            "revision": better if offends else data["draft"],
        }
        return Reply("end", json.dumps(said))

    def _levels(self, prompt: Prompt, shown: Sequence[Any]) -> Reply:
        [(_, data)] = shown
        said = replies([data])
        chance = random.Random(derive_id("levels", self.error, data))
        knows = {"resolved": int(said[-1].right), "engaged": sum(len(h.asks) for h in said)}
        levels = {}
        for name, form in prompt.bound["properties"]["levels"]["properties"].items():
            highest = form["enum"][-1]
            levels[name] = (
                chance.randint(0, highest)
                if chance.random() < self.error
                else min(knows[name], highest)
            )
        answer = {
            "verdict_id": prompt.bound["properties"]["verdict_id"]["enum"][0],
            "rationale": f"Counted: {knows}.", "abstain": False,
            "levels": levels,
        }  # fmt: skip
        return Reply("end", json.dumps(answer))


def replies(parts: Sequence[Mapping[str, Any]]) -> list[Heard]:
    """The agent's replies in a conversation, given in parts that follow one another."""
    said: list[Message] = []
    found = []
    for part in parts:
        for turn in part["turns"]:
            said.append(Message(turn["heard"]["from"], turn["heard"]["text"]))
            found.append(Heard.of(said, turn["reply"]["text"]))
            said.append(Message("assistant", turn["reply"]["text"]))
    return found
