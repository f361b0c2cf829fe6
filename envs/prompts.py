"""turnwise/Prompts-v0: a data set of prompts whose answers can be checked.

A row is a start: its prompt is the first observation, and the reply is checked against its answer
(see `answers`). A wrong one may be replaced, after `on_wrong`, while there are turns left. The
reward comes with the last reply and is the check's score; success is a score of at least 1.

With `answer: none` nothing is checked: rows need no answer, the environment pays nothing, and
judges or reward functions say what a reply is worth. They find the row's columns in
`episode.info["data"]`.

Rows are JSONL, a folder that `datasets` saved, or what a function returns. Each has `prompt` (text,
or messages: the last one is the user's, the first may be the system prompt, and those between are
earlier turns), `answer`, and perhaps `system` and `choices` (listed under the prompt as A, B, ...).
Rows are known by their content: which ones are held out, and in what order seeds visit them, does
not change when the file is shuffled or grows. No prompt is on both sides, with whatever system
prompt, choices and answer. As many seeds in a row as there are rows visit each of them once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, ClassVar

import gymnasium

from ..protocols import Message, Text
from ..tools import Splits, read_tasks, split_tasks, task_of, time_of
from .answers import LETTERS, check_of


class Prompts(gymnasium.Env[str, str]):
    """Prompts with checkable answers; see the module's docstring.

    Args:
        data: a JSONL file, a folder that `datasets` saved, or "python:MODULE:FUNCTION", which
            returns rows.
        answer: how replies are checked: "numeric", "exact", "choice", "regex",
            "python:MODULE:FUNCTION", or "none".
        turns: how many replies the player has.
        on_wrong: what is answered to a wrong reply.
        system: the system prompt, where a row has none of its own.
        held_out: share of the rows that are held out (`options={"split": "held_out"}`).

    Raises:
        ValueError: there is no such check, or the data cannot be read; the row is named.
    """

    metadata: dict[str, Any] = {"render_modes": [], "snapshots": True}
    players: ClassVar[Mapping[str, Any]]  # below
    observation_space = action_space = Text(1_000_000)

    def __init__(
        self,
        data: str,
        answer: str = "exact",
        turns: int = 1,
        on_wrong: str = "Try again.",
        system: str = "",
        held_out: float = 0.1,
    ) -> None:
        if not isinstance(turns, int) or turns < 1 or not 0 <= held_out < 1:
            raise ValueError(
                f"turns must be a whole number of at least 1, and held_out in [0, 1); got {turns!r}"
                f" and {held_out!r}"
            )
        if not isinstance(on_wrong, str) or not isinstance(system, str):
            raise ValueError(f"on_wrong and system must be texts, got {on_wrong!r} and {system!r}")
        self._check, self.turns, self.on_wrong = check_of(answer), turns, on_wrong
        self._unchecked = answer == "none"
        self._system, self._held_out, self._data, self._answer = system, held_out, data, answer
        self._rows()

    def _rows(self) -> Splits:
        return _split(self._data, time_of(self._data), self._held_out, self._answer)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Asks the seed's row.

        Raises:
            ValueError: the split is neither "train" nor "held_out", or has no rows.
        """
        super().reset(seed=seed)
        number = int(self.np_random.integers(2**31)) if seed is None else seed
        key, self.row = task_of(self._rows(), options, number, self._data)
        self._left = self.turns
        system = self.row.get("system") or self._system
        info: dict[str, Any] = {"row": key}
        if self._unchecked:
            info["data"] = {k: v for k, v in self.row.items() if k not in ("prompt", "system")}
        else:
            info["optimum"] = 1.0
        asked = _asked(self.row)
        info |= {"system": system} if system else {}
        if len(asked) > 1:
            info["parts"] = asked
        return "\n\n".join(each["content"] for each in asked), info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Checks a reply."""
        score = self._check.score(action, self.row)
        self._left -= 1
        done = score >= 1.0 or self._left == 0
        news = "" if done else self.on_wrong
        found = {"success": score >= 1.0} if done and not self._unchecked else {}
        return news, score if done else 0.0, done, False, found


@lru_cache(maxsize=64)
def _split(data: str, stamp: int, held_out: float, answer: str) -> Splits:
    """Returns the rows of both splits; `stamp` is the file's time, so that one that was written
    again is read again."""
    found: list[tuple[Any, Any, Mapping[str, Any]]] = []
    check = check_of(answer)
    for where, content in read_tasks(data):
        row = _checked(content, where, {"prompt"} if answer == "none" else {"prompt", "answer"})
        if fault := check.fault(row):
            raise ValueError(f"{where}: the answer {fault}")
        asked = _messages(row)
        whole = [row.get("system"), row.get("choices") or None, row.get("answer")]
        whole += [each["role"] for each in asked[:-1]]
        found.append((" ".join(each["content"] for each in asked).split(), whole, row))
    return split_tasks(found, held_out)


def _checked(row: Any, where: str, needed: Set[str]) -> Mapping[str, Any]:
    """Returns a row with its prompt as text, and the system prompt apart.

    Raises:
        ValueError: it lacks what is needed, or a part of it is of another kind.
    """
    if not isinstance(row, Mapping) or not needed <= set(row):
        has = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        wanted = " and ".join(f"`{key}`" for key in sorted(needed, reverse=True))
        raise ValueError(f"{where} must have {wanted}; it has {has}")
    prompt, system, choices = row["prompt"], row.get("system"), row.get("choices")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"{where}: `system` must be a text, got {system!r}")
    listed = isinstance(choices or [], (list, tuple)) and len(choices or []) <= len(LETTERS)
    if not listed or not all(isinstance(each, (str, int, float)) for each in choices or []):
        raise ValueError(
            f"{where}: `choices` must be a list of at most {len(LETTERS)} texts, got {choices!r}"
        )
    if isinstance(prompt, str) and prompt.strip():
        return row
    messages = prompt if isinstance(prompt, (list, tuple)) else ()
    found = [m for m in messages if isinstance(m, Mapping) and isinstance(m.get("content"), str)]
    roles = [m.get("role") for m in found]
    asked = found[-1]["content"].strip() if found else ""
    own = {"system": found.pop(0)["content"]} if roles[:1] == ["system"] else {}
    known = all(m.get("role") in ("user", "assistant") for m in found)
    if len(found) + len(own) != len(messages) or not asked or roles[-1] != "user" or not known:
        raise ValueError(
            f"{where}: `prompt` must be text, or messages with a `role` and a `content`: perhaps"
            " one of the system, then of user and assistant, the last one of the user"
        )
    return {**row, **own, "prompt": [{"role": m["role"], "content": m["content"]} for m in found]}


def _messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns a row's prompt as messages, the last one of the user."""
    prompt = row["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _asked(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns the messages that a row is asked with: the choices stand below the last one."""
    *before, last = _messages(row)
    listed = (f"{chr(ord('A') + i)}. {c}" for i, c in enumerate(row.get("choices") or ()))
    return [*before, {"role": "user", "content": "\n".join([last["content"], *listed])}]


Player = Callable[[Sequence[Message]], str]


def _expert(env: Prompts, rng: random.Random) -> Player:
    """Says the answer, or a row's `solution`, where the answer is a pattern."""

    def reply(messages: Sequence[Message]) -> str:
        return str(env.row.get("solution", env.row.get("answer", "")))

    return reply


Prompts.players = {"expert": _expert}
