"""turnwise/TwentyQuestions-v0: guess the thing the other side thinks of, by questions that are
answered yes or no.

The agent asks about a property ("Does it have wheels?") or guesses ("Is it a train?"); property
words and names of things are understood wherever they stand, one per question. It ends with the
right guess or with the last question. The only reward comes then: 1 for a right guess, 0 without,
less `cost` for every question asked. Which question was worth asking shows only many turns later.

There are 64 things, told apart by 30 properties. A player that always asks what halves the rest
needs seven questions on average, the guess included.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import gymnasium

from ..protocols import Message, Text


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


THINGS = _words(
    "dog cat horse cow mouse elephant lion rabbit whale dolphin shark salmon eagle owl penguin duck"
    " chicken parrot snake turtle frog bee ant spider apple banana carrot potato tomato rice bread"
    " cheese egg chocolate honey oak rose mushroom car bicycle train boat airplane hammer knife"
    " chair table lamp clock book pencil guitar piano drum telephone computer shirt shoe hat"
    " umbrella moon river mountain stone"
)
# The word that is understood: (a question, what has the property).
PROPERTIES: dict[str, tuple[str, frozenset[str]]] = {
    word: (question, frozenset(having.split()))
    for word, question, having in (
        (
            "alive",
            "Is it alive?",
            (
                "dog cat horse cow mouse elephant lion rabbit whale dolphin shark salmon eagle owl"
                " penguin duck chicken parrot snake turtle frog bee ant spider oak rose mushroom"
            ),
        ),
        ("mammal", "Is it a mammal?", "dog cat horse cow mouse elephant lion rabbit whale dolphin"),
        ("feathers", "Does it have feathers?", "eagle owl penguin duck chicken parrot"),
        (
            "eggs",
            "Does it lay eggs?",
            "eagle owl penguin duck chicken parrot snake turtle frog bee ant spider salmon",
        ),
        (
            "legs",
            "Does it have four legs?",
            "dog cat horse cow mouse elephant lion rabbit turtle frog chair table",
        ),
        ("fly", "Can it fly?", "eagle owl duck parrot bee airplane"),
        (
            "water",
            "Is it found in water?",
            "whale dolphin shark salmon penguin duck turtle frog boat river",
        ),
        ("pet", "Is it kept as a pet?", "dog cat rabbit parrot mouse turtle"),
        ("farm", "Does it live on a farm?", "horse cow duck chicken dog rabbit"),
        ("dangerous", "Is it dangerous?", "lion shark snake spider bee knife"),
        (
            "big",
            "Is it big?",
            (
                "horse cow elephant lion whale dolphin shark oak car train boat airplane piano moon"
                " river mountain"
            ),
        ),
        (
            "eat",
            "Do people eat it?",
            (
                "salmon chicken duck apple banana carrot potato tomato rice bread cheese egg"
                " chocolate honey mushroom"
            ),
        ),
        ("sweet", "Is it sweet?", "apple banana chocolate honey"),
        (
            "grow",
            "Does it grow in the ground?",
            "apple banana carrot potato tomato rice oak rose mushroom",
        ),
        ("round", "Is it round?", "apple tomato potato moon clock drum"),
        ("red", "Is it red?", "apple tomato rose"),
        ("wood", "Is it made of wood?", "oak chair table boat pencil guitar piano"),
        ("metal", "Is it made of metal?", "car bicycle train airplane hammer knife lamp"),
        ("wheels", "Does it have wheels?", "car bicycle train airplane"),
        ("electric", "Is it electric?", "train lamp clock telephone computer"),
        ("music", "Does it make music?", "guitar piano drum"),
        ("wear", "Can you wear it?", "shirt shoe hat"),
        (
            "hand",
            "Does it fit into a hand?",
            (
                "mouse frog bee ant spider apple banana carrot potato tomato rice egg chocolate"
                " rose mushroom hammer knife pencil telephone stone"
            ),
        ),
        ("night", "Is it seen at night?", "owl mouse moon lamp cat"),
        ("play", "Does it play?", "dog cat dolphin"),
        ("white", "Is it white?", "rice egg moon rabbit"),
        ("leather", "Is it made of leather?", "shoe drum"),
        ("milk", "Is there milk in it?", "cow cheese chocolate"),
        ("sit", "Can you sit on it?", "chair bicycle horse"),
        ("over", "Is it over your head?", "hat umbrella moon lamp airplane"),
    )
}
SYSTEM = "I am thinking of something. Find out what it is. I answer yes or no."
OPENING = "Ask your first question."


def answers(thing: str) -> dict[str, bool]:
    """Returns the answers about a thing, by property."""
    return {word: thing in having for word, (_, having) in PROPERTIES.items()}


def guess(thing: str) -> str:
    """Returns the question whether it is this thing."""
    return f"Is it the {thing}?"


def named(question: str) -> list[str]:
    """Returns the things and properties a question names, in order of the tables."""
    words = set(re.findall(r"\w+", question.lower()))
    return [word for word in (*THINGS, *PROPERTIES) if word in words]


class TwentyQuestions(gymnasium.Env[str, str]):
    """A game of twenty questions; see the module's docstring.

    Args:
        questions: how many may be asked, guesses included.
        cost: of each question.
        things: how many of the 64 can be thought of.
    """

    metadata: dict[str, Any] = {"render_modes": [], "snapshots": True}
    players: ClassVar[Mapping[str, Any]]  # below
    observation_space = action_space = Text(1024)

    def __init__(self, questions: int = 20, cost: float = 0.02, things: int = len(THINGS)) -> None:
        if questions < 1 or not 2 <= things <= len(THINGS):
            raise ValueError(
                f"questions must be at least 1 and things 2 to {len(THINGS)}, got {questions} and"
                f" {things}"
            )
        self.questions, self.cost, self.things = questions, cost, THINGS[:things]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Draws the thing to be guessed."""
        super().reset(seed=seed)
        self.thing = self.things[int(self.np_random.integers(len(self.things)))]
        self.asked = 0
        return OPENING, {"system": SYSTEM}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answers a question; ends at the right guess or the last question, with 1 or 0 less the
        cost of those asked."""
        self.asked += 1
        words = named(action)
        right = words == [self.thing]
        if right or self.asked >= self.questions:
            end = "Yes, that is it!" if right else f"No more questions. It was the {self.thing}."
            return (
                end,
                float(right) - self.cost * self.asked,
                True,
                False,
                {"success": right, "questions": self.asked},
            )
        if len(words) != 1:
            text = "Ask about one thing at a time." if words else "I do not know what that means."
        else:
            text = "Yes." if words[0] in PROPERTIES and answers(self.thing)[words[0]] else "No."
        return text, 0.0, False, False, {"success": False, "questions": self.asked}


def _known(env: TwentyQuestions, conversation: Sequence[Message]) -> tuple[list[str], set[str]]:
    """Returns the things still possible after the conversation so far, and what has been asked."""
    left, asked = list(env.things), set()
    for question, answer in zip(conversation[1::2], conversation[2::2], strict=False):
        words = named(question.content)
        if len(words) == 1 and answer.content in ("Yes.", "No."):
            [word] = words
            asked.add(word)
            yes = answer.content == "Yes."
            left = [
                t for t in left if (answers(t)[word] == yes if word in PROPERTIES else t != word)
            ]
    return left, asked


def _expert(env: TwentyQuestions, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Returns a player that knows everything, asks what halves the rest best, and guesses when two
    are left."""

    def reply(conversation: Sequence[Message]) -> str:
        left, _ = _known(env, conversation)
        if len(left) <= 2:
            return guess(left[0])
        return PROPERTIES[
            min(
                PROPERTIES,
                key=lambda word: abs(2 * sum(answers(t)[word] for t in left) - len(left)),
            )
        ][0]

    return reply


def _random(env: TwentyQuestions, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Returns a player that asks any question or guesses."""
    every = [question for question, _ in PROPERTIES.values()] + [guess(t) for t in env.things]
    return lambda conversation: rng.choice(every)


def _demonstrator(env: TwentyQuestions, rng: random.Random) -> Callable[[Sequence[Message]], str]:
    """Returns a player that remembers the answers, asks at random, and guesses too early."""

    def reply(conversation: Sequence[Message]) -> str:
        left, asked = _known(env, conversation)
        open_ = [word for word in PROPERTIES if word not in asked]
        if len(left) <= 3 or rng.random() < 0.1 or not open_:
            return guess(rng.choice(left))
        return PROPERTIES[rng.choice(open_)][0]

    return reply


TwentyQuestions.players = {"expert": _expert, "random": _random, "demonstrator": _demonstrator}
