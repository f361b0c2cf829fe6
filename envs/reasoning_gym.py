"""reasoning-gym/GENERATOR: a task of the package reasoning-gym, asked in a dialogue.

The question is the first observation. A wrong answer is answered by a hint, "larger" or "smaller"
where the answer is a number, and may be replaced until the tries are used up. The reward is the
generator's own score of the last reply, at the end; success is a score of 1. A number is right or
wrong: many generators pay a part for text that contains the answer, half for "-1" where it is 1,
and a policy that is paid so learns to write minus signs.

Where the right answer is a number, the last number of the reply counts; else what is marked as the
answer, or the whole reply (see `answers`). A reply that the generator cannot score is wrong. Nine
generators evaluate replies as Python: they are given only literals, and formulas that cannot take
long.

Reset options are the generator's own (`{"max_terms": 2, "max_digits": 1}`), and `split`: "train"
or "held_out". One question in five is held out, by its text, so that no seed of one split draws a
question of the other.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import gymnasium

from ..protocols import Message, Text
from ..tools import did_you_mean
from .answers import last_number, marked, number

GENERATORS = (
    "ab", "acre", "advanced_geometry", "aiw", "arc_1d", "arc_agi", "base_conversion",
    "basic_arithmetic", "bf", "binary_alternation", "binary_matrix", "bitwise_arithmetic",
    "boxnet", "caesar_cipher", "calendar_arithmetic", "chain_sum", "circuit_logic", "codeio",
    "coin_flip", "color_cube_rotation", "complex_arithmetic", "count_bits", "count_primes",
    "countdown", "course_schedule", "cryptarithm", "decimal_arithmetic", "decimal_chain_sum",
    "dice", "emoji_mystery", "family_relationships", "figlet_font", "fraction_simplification",
    "futoshiki", "game_of_life", "game_of_life_halting", "gcd", "graph_color",
    "group_anagrams", "gsm_symbolic", "intermediate_integration", "isomorphic_strings", "jugs",
    "kakurasu", "knight_swap", "knights_knaves", "largest_island", "lcm", "leg_counting",
    "letter_counting", "letter_jumble", "list_functions", "mahjong_puzzle",
    "manipulate_matrix", "maze", "mini_sudoku", "modulo_grid", "n_queens", "needle_haystack",
    "number_filtering", "number_format", "number_sequence", "number_sorting",
    "palindrome_generation", "palindrome_partitioning", "path_star", "polynomial_equations",
    "polynomial_multiplication", "pool_matrix", "power_function", "prime_factorization",
    "products", "propositional_logic", "puzzle24", "quantum_lock", "ransom_note", "rearc",
    "rectangle_count", "rotate_matrix", "rotten_oranges", "rubiks_cube", "rush_hour",
    "self_reference", "sentence_reordering", "shortest_path", "simple_equations",
    "simple_geometry", "simple_integration", "sokoban", "spell_backward", "spiral_matrix",
    "string_insertion", "string_manipulation", "string_splitting", "string_synthesis",
    "sudoku", "survo", "syllogism", "time_intervals", "tower_of_hanoi", "tsumego",
    "word_ladder", "word_sequence_reversal", "word_sorting", "zebra_puzzles",
)  # fmt: skip
# Generators that evaluate the reply: lists and strings, and formulas.
LITERALS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
FORMULAS = (
    "countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24",
    "simple_integration",
)  # fmt: skip
CALLABLE = ("Abs", "acos", "asin", "atan", "cos", "cosh", "exp", "log", "sin", "sinh", "sqrt",
    "tan", "tanh")  # fmt: skip
BY_TEXT = ("game_of_life_halting",)  # whose own score is 1 for any reply
# What floats are made of that no answer is.
_ENDLESS = re.compile(r"\b(nan|inf|infinity)\b|\d[eE][-+]?\d{4,}", re.IGNORECASE)
NEAR = Decimal("0.001")  # of the right number, what a generator may take for it
UNSOLVED = ("boxnet", "rush_hour")  # generators that score answers and know none
EXAMPLES = ("example_answer", "example_correct_answer", "possible_answer")  # where others keep one
DRAWS = 200  # of questions, until one is of the wanted split


class ReasoningGym(gymnasium.Env[str, str]):
    """One question of a generator, with several tries; see the module's docstring.

    Args:
        generator: its name in reasoning-gym, such as "chain_sum".
        tries: how many replies the player has.
        system: the system prompt.
    """

    metadata: dict[str, Any] = {"render_modes": [], "snapshots": True}
    observation_space = action_space = Text(100_000)

    def __init__(
        self, generator: str, tries: int = 3, system: str = "Answer the question."
    ) -> None:
        if not isinstance(tries, int) or tries < 1:
            raise ValueError(f"tries must be a whole number of at least 1, not {tries!r}")
        self.generator = generator
        solved = {} if generator in UNSOLVED else {"expert": _expert}
        self.players: Mapping[str, Any] = {"random": _random, **solved}
        self.tries = tries
        self.system = system

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Draws a question.

        Raises:
            ValueError: the generator does not know one of the options, or hardly ever draws a
                question of the wanted split.
        """
        super().reset(seed=seed)
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        settings = dict(options or {})
        split = settings.pop("split", "train")
        if split not in ("train", "held_out"):
            raise ValueError(f"split must be train or held_out, not {split!r}")
        for _ in range(DRAWS):
            drawn = int(self.np_random.integers(2**31))
            try:
                self._data = reasoning_gym.create_dataset(
                    self.generator, size=1, seed=drawn, **settings
                )
            except TypeError as error:
                known = [f.name for f in dataclasses.fields(DATASETS[self.generator][1])]
                odd = next((name for name in settings if name not in known), None)
                if odd is None:
                    raise
                raise ValueError(
                    f"{self.generator} has no option {odd!r}.{did_you_mean(odd, known)}"
                ) from error
            self._task = self._data[0]
            if _held_out(self._task["question"]) == (split == "held_out"):
                break
        else:
            raise ValueError(
                f"{DRAWS} questions of {self.generator} were none of the {split} split"
            )
        self._left = self.tries
        return self._task["question"], {"system": self.system, "optimum": 1.0}

    @property
    def answer(self) -> str:
        """A right answer; empty where the generator knows none."""
        known = [self._task["answer"], *(self._task["metadata"].get(name) for name in EXAMPLES)]
        found = next((each for each in known if each is not None), "")
        return found if isinstance(found, str) else json.dumps(found)

    @property
    def _right(self) -> Decimal | None:
        """The right answer where it is a number."""
        return number(self.answer)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Scores a reply; a wrong one gets a hint while there are tries left."""
        score = self._score(action)
        self._left -= 1
        if score >= 1.0:
            return "That is right.", score, True, False, {"success": True}
        if self._left == 0:
            return "That is wrong.", score, True, False, {"success": False}
        return f"That is wrong. {self._hint(action)}Try again.", 0.0, False, False, {}

    def _score(self, reply: str) -> float:
        """Returns the generator's score of the answer in a reply; of a number it is 1 or 0."""
        right, given = self._right, last_number(reply)
        if right is None:
            return self._scored(marked(reply))
        if given is None:
            return 0.0
        near = abs(given - right) <= NEAR * abs(right)
        return float(given == right or (near and self._scored(str(given)) >= 1.0))

    def _scored(self, answer: str) -> float:
        """Returns the generator's score of an answer; 0 of one that must not be evaluated, or that
        it cannot read."""
        if self.generator in BY_TEXT:
            return float(answer.casefold() == self.answer.casefold())
        if _ENDLESS.search(answer) and not _ENDLESS.search(self.answer):
            return 0.0
        if self.generator in LITERALS and not _is_literal(answer):
            return float(answer in (self.answer, *self._task["metadata"].get("valid_answers", ())))
        if self.generator in FORMULAS and not is_formula(answer):
            return 0.0
        try:
            return float(self._data.score_answer(answer, self._task))
        except Exception:  # of many kinds: it did not expect such a text
            # Where it cannot score its own answer either, it is broken, and this raises.
            self._data.score_answer(self.answer, self._task)
            return 0.0

    def _hint(self, reply: str) -> str:
        given = last_number(reply)
        if self._right is None or given is None:
            return ""
        return f"The answer is {'larger' if given < self._right else 'smaller'}. "


def _is_literal(text: str) -> bool:
    """Returns whether a text is a Python literal: evaluating it runs nothing."""
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def is_formula(text: str) -> bool:
    """Returns whether a text is a formula of numbers, one-letter variables and functions of one
    argument that cannot take long: no large powers, and no powers of powers."""
    try:
        whole = ast.parse(text.strip()[:1000], mode="eval").body
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return len(text) <= 1000 and _is_sum(whole, 0)


def _is_sum(node: ast.AST, depth: int, power: bool = False) -> bool:
    if depth > 50:
        return False
    match node:
        case ast.Constant(value=int() | float() as value):
            return not isinstance(value, bool) and abs(value) < 10**20
        case ast.Name(id=name):
            return len(name) == 1
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=of):
            return _is_sum(of, depth + 1, power)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), left=a, right=b):
            return _is_sum(a, depth + 1, power) and _is_sum(b, depth + 1, power)
        case ast.BinOp(op=ast.Pow(), left=a, right=b):
            return not power and _is_exponent(b) and _is_sum(a, depth + 1, True)
        case ast.Call(func=ast.Name(id=name), args=[of], keywords=[]) if name in CALLABLE:
            return _is_sum(of, depth + 10, power)
    return False


def _is_exponent(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=int() | float() as value):
            return abs(value) <= 100
        case ast.UnaryOp(op=ast.USub(), operand=of):
            return _is_exponent(of)
        case ast.BinOp(op=ast.Div(), left=a, right=b):
            return _is_exponent(a) and _is_exponent(b)
    return isinstance(node, ast.Name) and len(node.id) == 1


def _held_out(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] % 5 == 0


Player = Callable[[Sequence[Message]], str]


def _expert(env: ReasoningGym, rng: random.Random) -> Player:
    return lambda messages: env.answer


def _random(env: gymnasium.Env[str, str], rng: random.Random) -> Player:
    return lambda messages: str(rng.randrange(-10, 21))
