"""turnwise/SupportDesk-v0: ask for what is missing, never for what is known, then resolve.

A customer opens with part of a story. What the shop does about it depends on what went wrong and on
one or two further facts:

    lost      bought days ago: trace the parcel; longer ago: what the customer wants (refund or
              replacement)
    broken    what the customer wants (refund or replacement)
    faulty    bought days or months ago: repair; years ago: discount on the next one
    regret    box sealed: refund; box opened: store credit

Satisfaction comes once, at the end. The right resolution is worth 1, less 0.1 for every question
that did not matter and 0.2 for every question already answered; a wrong resolution is worth 0, and
so is a customer who left. Questions that matter are free, so the optimum of every start is 1, and
an agent that reads can reach it. Patience is finite: needless questions and replies the customer
cannot understand use it up.

Stories are divided by content: which (item, what happened, when) they tell decides whether they
belong to training or are held out (`options={"split": "held_out"}`), so that no seed of one split
can produce a story of the other.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium

from ..protocols import Message, Text

SYSTEM = (
    "You help the customers of a shop. Ask only for what is missing, then say what you will do."
)

ITEMS = (
    "kettle", "lamp", "blender", "toaster", "radio", "clock", "fan", "heater", "camera", "printer",
    "tablet", "phone",
    "keyboard", "mouse", "speaker", "chair", "desk", "mirror", "carpet", "bicycle", "tent",
    "backpack", "jacket",
    "coat", "watch", "drill", "saw", "mixer", "grill", "vacuum", "projector", "scanner", "router",
    "monitor",
    "headset", "guitar", "piano", "drum", "puzzle", "telescope",
)  # fmt: skip

# What the customer says of each fact: topic -> value -> phrasings.
SAYS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "what": {
        "lost": ("It never arrived.", "The parcel did not come.",
            "I am still waiting for the delivery.",
                 "Nobody brought it to my door."),
        "broken": ("It arrived in pieces.", "It was cracked when I unpacked it.",
            "The glass was smashed on arrival.",
                   "It came with a big dent."),
        "faulty": ("It stopped working.", "It does not turn on any more.",
            "It makes a strange noise and dies.",
                   "It worked fine until it quit."),
        "regret": ("I changed my mind.", "I do not need it after all.",
            "My sister gave me the same one.",
                   "It is not what I hoped for."),
    },
    "when": {
        "days": ("I bought it three days ago.", "I ordered it last week.",
            "I paid for it on Monday.",
                 "The order is five days old."),
        "months": ("I bought it two months ago.", "I ordered it in the spring.",
            "The order is ten weeks old.",
                   "I paid for it half a year ago."),
        "years": ("I bought it three years ago.", "It is four years old.",
            "I have had it since I was at school.",
                  "I paid for it ages ago."),
    },
    "wish": {
        "money": ("I want my money back.", "Please return what I paid.",
            "I would like the amount on my card."),
        "new": ("I want another one.", "Please send a fresh one.",
            "I would still like to have one."),
    },
    "box": {
        "sealed": ("The box is still sealed.", "I never opened it.", "The wrapping is untouched."),
        "opened": ("The box is open.", "I already unwrapped it.", "I tried it twice."),
    },
}  # fmt: skip

OPENINGS = (
    "Hello, this is about my {item}.",
    "Hi, I need help with a {item}.",
    "Good day, I am writing about the {item}.",
)
ASKS_AGAIN = ("I told you that already.", "As I said before.", "Please read what I wrote.")
CONFUSED = ("I do not understand.", "What do you mean?", "That does not help me.")
LEAVES = "I have had enough, goodbye."
THANKS = "Thank you, that is what I hoped for."
WRONG = "No, that is not right at all."

# What an agent may say. The customer understands any wording that holds the keywords below, not
# only these.
QUESTIONS = {
    "what": ("What went wrong with it?", "Can you tell me what happened?"),
    "when": ("When did you buy it?", "How long ago did you order it?"),
    "wish": (
        "Would you like a refund or a replacement?",
        "Do you prefer your money back or a new one?",
    ),
    "box": ("Is the box still sealed?", "Have you opened the box?"),
}
RESOLUTIONS = {
    "refund": ("I will refund your money.", "You get your money back today."),
    "replacement": ("I will send you a new one.", "A replacement is on its way."),
    "repair": ("We will repair it for free.", "Send it in and we will fix it."),
    "trace": ("I will trace the parcel.", "Let me track the parcel for you."),
    "discount": ("I can offer you a discount.", "You get a discount on your next order."),
    "credit": ("I can give you store credit.", "You get a voucher for the shop."),
}

OLD_RULES = {"lost": "refund", "broken": "replacement", "faulty": "replacement", "regret": "credit"}

_ASKS = {
    "what": re.compile(r"\bwhat\b.*\b(wrong|happen\w*|problem|matter)\b|\bproblem\b"),
    "when": re.compile(r"\bwhen\b|\bhow (long|old)\b|\bdate\b"),
    "wish": re.compile(r"\b(prefer|would you like|rather|want)\b"),
    "box": re.compile(r"\b(box|sealed|open\w*|unwrap\w*|unpack\w*)\b"),
}
_DOES = {
    "refund": re.compile(r"\brefund\b|\bmoney back\b"),
    "replacement": re.compile(r"\breplacement\b|\bnew one\b|\banother one\b|\bexchange\b"),
    "repair": re.compile(r"\brepair\b|\bfix\b"),
    "trace": re.compile(r"\b(trace|track)\b"),
    "discount": re.compile(r"\bdiscount\b"),
    "credit": re.compile(r"\bstore credit\b|\bvoucher\b"),
}


@dataclass(frozen=True)
class Story:
    """A customer's story: its facts, their wording, and what the customer tells at once."""

    item: str
    facts: Mapping[str, str]
    words: Mapping[str, str]
    opening: frozenset[str]

    @property
    def held_out(self) -> bool:
        """Whether the story belongs to the held-out split."""
        key = f"{self.item}|{self.words['what']}|{self.words['when']}"
        return hashlib.sha256(key.encode()).digest()[0] % 5 == 0


def next_topic(facts: Mapping[str, str]) -> str | None:
    """Returns the fact that the shop's rules need next, given the facts known so far; None when
    these suffice."""
    needed = {
        None: ["what"],
        "lost": ["when"] if facts.get("when") in (None, "days") else ["when", "wish"],
        "broken": ["wish"],
        "faulty": ["when"],
        "regret": ["box"],
    }[facts.get("what")]
    return next((topic for topic in needed if topic not in facts), None)


def resolution(facts: Mapping[str, str]) -> str:
    """Returns what the shop's rules say, once `next_topic(facts)` is None."""
    what = facts["what"]
    if what == "lost" and facts["when"] == "days":
        return "trace"
    if what in ("lost", "broken"):
        return {"money": "refund", "new": "replacement"}[facts["wish"]]
    if what == "faulty":
        return "discount" if facts["when"] == "years" else "repair"
    return {"sealed": "refund", "opened": "credit"}[facts["box"]]


def relevant(facts: Mapping[str, str]) -> set[str]:
    """Returns every fact the rules need for this story."""
    known: dict[str, str] = {}
    while (topic := next_topic(known)) is not None:
        known[topic] = facts[topic]
    return set(known)


def _choose(rng: random.Random, weights: Mapping[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def draw_story(rng: random.Random, held_out: bool) -> Story:
    """Draws a story of the wanted split; its opening usually leaves something out."""
    while True:
        what = _choose(rng, {"lost": 0.3, "broken": 0.2, "faulty": 0.25, "regret": 0.25})
        when = {
            "lost": {"days": 0.4, "months": 0.6},
            "broken": {"days": 0.6, "months": 0.4},
            "faulty": {"days": 0.1, "months": 0.45, "years": 0.45},
            "regret": {"days": 0.6, "months": 0.4},
        }[what]
        facts = {
            "what": what,
            "when": _choose(rng, when),
            "wish": _choose(rng, {"money": 0.4, "new": 0.6}),
            "box": _choose(rng, {"sealed": 0.4, "opened": 0.6}),
        }
        if what == "lost":
            facts["box"] = "sealed"  # a box that never came was never opened
        words = {topic: rng.choice(SAYS[topic][value]) for topic, value in facts.items()}
        chances = {"what": 0.5, "when": 0.25, "wish": 0.25, "box": 0.0 if what == "lost" else 0.25}
        opening = frozenset(topic for topic, chance in chances.items() if rng.random() < chance)
        story = Story(rng.choice(ITEMS), facts, words, opening)
        if story.held_out == held_out:
            return story


class SupportDesk(gymnasium.Env[str, str]):
    """A customer of a shop's support desk; see the module's docstring.

    Options of `reset`: `split`, "train" (default) or "held_out". The last step's `info` has
    `success`, `questions`, `needless` (questions that did not matter) and `repeated` (already
    answered); reset's has `optimum`.
    """

    metadata: dict[str, Any] = {"render_modes": []}
    players: ClassVar[Mapping[str, Any]]  # below
    observation_space = action_space = Text(2048)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Draws a customer's story from the split in `options`, "train" or "held_out"."""
        super().reset(seed=seed)
        unknown = set(options or {}) - {"split"}
        split = (options or {}).get("split", "train")
        if unknown or split not in ("train", "held_out"):
            raise ValueError(
                f'SupportDesk takes options={{"split": "train" | "held_out"}}, got {options}'
            )
        rng = random.Random(int(self.np_random.integers(2**63)))
        self.story = draw_story(rng, split == "held_out")
        self._known = set(self.story.opening)
        self._patience = rng.choice((2, 3))
        self._questions = self._needless = self._repeated = 0
        sentences = [self.story.words[topic] for topic in sorted(self.story.opening)]
        rng.shuffle(sentences)
        self._rng = rng
        opening = rng.choice(OPENINGS).format(item=self.story.item)
        return " ".join([opening, *sentences]), {"system": SYSTEM, "optimum": 1.0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answers a question, or ends with the satisfaction, 0 to 1, when one action is taken."""
        text = action.lower()
        if "?" in text:
            return self._answer([topic for topic, pattern in _ASKS.items() if pattern.search(text)])
        done = [name for name, pattern in _DOES.items() if pattern.search(text)]
        if len(done) != 1:  # nothing, or everything at once
            return self._annoyed(self._rng.choice(CONFUSED))
        right = done[0] == resolution(self.story.facts)
        satisfaction = max(0.0, 1.0 - 0.1 * self._needless - 0.2 * self._repeated) if right else 0.0
        return THANKS if right else WRONG, satisfaction, True, False, self._info(right)

    def _answer(self, topics: Sequence[str]) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if not topics:
            return self._annoyed(self._rng.choice(CONFUSED))
        answers, annoyed = [], False
        for topic in topics:
            self._questions += 1
            if topic in self._known:
                self._repeated, annoyed = self._repeated + 1, True
                answers.append(self._rng.choice(ASKS_AGAIN))
                continue
            if topic not in relevant(self.story.facts):
                self._needless, annoyed = self._needless + 1, True
            self._known.add(topic)
            answers.append(self.story.words[topic])
        if annoyed:
            return self._annoyed(" ".join(answers))
        return " ".join(answers), 0.0, False, False, self._info(False)

    def _annoyed(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._patience -= 1
        left = self._patience < 0
        return LEAVES if left else text, 0.0, left, False, self._info(False)

    def _info(self, success: bool) -> dict[str, Any]:
        return {
            "success": success,
            "questions": self._questions,
            "needless": self._needless,
            "repeated": self._repeated,
        }


# The players read the conversation, never the hidden story.

_MEANS = {
    words: (topic, value)
    for topic, values in SAYS.items()
    for value, all_ in values.items()
    for words in all_
}


def read_facts(conversation: Sequence[Message]) -> dict[str, str]:
    """Returns the facts a customer has told so far."""
    text = " ".join(m.content for m in conversation if m.role == "user")
    return dict(meaning for words, meaning in _MEANS.items() if words in text)


def _expert(env: SupportDesk, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Returns a player that asks for exactly what the rules need next, then resolves."""

    def reply(conversation: Sequence[Message]) -> str:
        facts = read_facts(conversation)
        topic = next_topic(facts)
        return rng.choice(QUESTIONS[topic] if topic else RESOLUTIONS[resolution(facts)])

    return reply


def _random(env: SupportDesk, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Returns a player that says any of the sentences an agent may say."""
    everything = [*QUESTIONS.values(), *RESOLUTIONS.values()]
    return lambda conversation: rng.choice(rng.choice(everything))


def _guess(facts: Mapping[str, str], rng: random.Random) -> str:
    """Returns a resolution that can follow from what is known, without asking for the rest."""
    known = dict(facts)
    while (topic := next_topic(known)) is not None:
        known[topic] = rng.choice(list(SAYS[topic]))
    return resolution(known)


def _hasty(env: SupportDesk, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Returns a player that resolves at once, guessing what the opening left out."""
    return lambda conversation: rng.choice(RESOLUTIONS[_guess(read_facts(conversation), rng)])


def _forgetful(env: SupportDesk, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Returns a player that asks the right questions, some of them twice, and usually ends by the
    old rule book."""

    def reply(conversation: Sequence[Message]) -> str:
        facts = read_facts(conversation)
        topic = next_topic(facts)
        if facts and rng.random() < 0.25:
            return rng.choice(QUESTIONS[rng.choice(sorted(facts))])
        if topic:
            return rng.choice(QUESTIONS[topic])
        return rng.choice(
            RESOLUTIONS[resolution(facts) if rng.random() < 0.2 else OLD_RULES[facts["what"]]]
        )

    return reply


def _interrogator(env: SupportDesk, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Returns a player that goes through the whole form in order, whatever the customer answers,
    until the customer has had enough."""
    form = ["what", "when", "wish", "box"]

    def reply(conversation: Sequence[Message]) -> str:
        asked = sum(m.role == "assistant" for m in conversation)
        facts = read_facts(conversation)
        if asked < len(form):
            return rng.choice(QUESTIONS[form[asked]])
        return rng.choice(RESOLUTIONS[_guess(facts, rng)])

    return reply


def _demonstrator(env: SupportDesk, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Returns one of the shop's staff: most are hasty or forgetful, some go through the form, few
    do it right."""
    return rng.choices([_hasty, _forgetful, _interrogator, _expert], [0.5, 0.35, 0.08, 0.07])[0](
        env, rng
    )


SupportDesk.players = {
    "expert": _expert,
    "random": _random,
    "demonstrator": _demonstrator,
    "hasty": _hasty,
    "forgetful": _forgetful,
    "interrogator": _interrogator,
}
