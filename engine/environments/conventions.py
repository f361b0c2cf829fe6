"""Conventions for dialogues as Gymnasium environments: the text space, what `info` and metadata may
hold and how they are read, seeds and starts.

An environment is any `gymnasium.Env` whose observation is the new utterance and whose action is the
reply, both `str`. The engine keeps the transcript. Optional conventions, all read from the
unwrapped environment or its `info`:

- `info["system"]`, `info["role"]` ("user" or "tool"), `info["tools"]` at reset; `info["role"]` at
  every step;
- `info["parts"]`: the messages that an observation consists of, where it is several: texts, the
  results of calls of tools, or `{"role": ..., "content": ...}`; the observation holds all of them,
  with an empty line between two;
- `info["context"]` at a step: the number of the context that the observation goes on in, where an
  episode has several, which all begin without a word of the others: the next free number opens one,
  and `info["tools"]` are its tools; `info["max_new_tokens"]`: the most that the reply may have;
- `info["success"]` (bool) at the last step; `info["optimum"]` at reset, the best return this start
  allows;
- `info["player"]` at reset and every step, where several seats are played: the one that the
  observation is for and that replies next; `info["seats"]` at a step: what the seats that did not
  reply get by it, `{seat: {"reward": number, "success": bool, ...}}`;
- `metadata["concurrency"]`: "serial" (default: all environments step in order on one thread),
  "thread" (thread-safe, or `reset`/`step` are coroutines) or "process" (each in a process of its
  own);
- `metadata["snapshots"]`: True if a `copy.deepcopy` of it goes on by itself; branching then copies
  a state instead of replaying it;
- `metadata["step_limit"]`: seconds that a call may take, where that is more than the run allows;
- `metadata["special_tokens"]`: True to receive replies with the tokenizer's special tokens in the
  text;
- `metadata["sampled"]`: True to receive replies as `SampledReply`, text that knows its tokens;
- `players`, a mapping from names ("expert", "random", "demonstrator") to `(env, rng) ->
  (conversation -> reply)`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Space

from ..errors import EnvironmentBroke
from ..records.episode import Message
from ..util.wording import tried, valid, worded


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a reply that a policy sampled.

    Attributes:
        read: how many tokens the policy read before it.
        texts: each token as text; halves of a character are replaced.
        logprobs: of each token, under the distribution it was sampled from.
        cut: the reply ended at the limit of tokens, not by itself.
    """

    read: int
    texts: tuple[str, ...]
    logprobs: tuple[float, ...]
    cut: bool


class SampledReply(str):
    """A reply that knows its tokens; None where no policy of ours sampled it."""

    tokens: Tokens | None

    def __new__(cls, text: str, tokens: Tokens | None) -> SampledReply:
        """Makes it of a text and its tokens."""
        reply = super().__new__(cls, text)
        reply.tokens = tokens
        return reply

    def __reduce__(self) -> tuple[Any, ...]:
        return SampledReply, (str(self), self.tokens)


PlayerFunction = Callable[[Sequence[Message]], str]
_READ = (
    "role", "system", "tools", "optimum", "player", "seats", "parts", "context", "max_new_tokens",
)  # fmt: skip
LARGEST = 1e15  # a reward beyond this is no reward
BITS = 4096  # of a whole number: Python writes none in digits, and reads none, that is much longer
_HALF = re.compile("[\ud800-\udfff]")
# Gymnasium says so of every wrapper that has spaces of its own, which is what a text codec is.
warnings.filterwarnings("ignore", message=".*is different from the unwrapped version.*")


@dataclass(frozen=True, slots=True)
class SeatResult:
    """What a step means for a seat that did not reply: its reward, and what its own last turn's
    `info` has more."""

    reward: float = 0.0
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Observation:
    """A checked result of `reset` or `step`."""

    message: Message
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    player: str = ""
    seats: Mapping[str, SeatResult] = field(default_factory=dict)
    context: int = 0
    max_new_tokens: int | None = None


def _jsonable(value: Any) -> Any:
    """Returns `info` as plain JSON data: numpy scalars become numbers, what JSON lacks becomes its
    text.

    Raises:
        RecursionError: it contains itself.
    """
    if isinstance(value, Mapping):
        return {valid(str(k)): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(v) for v in value]
    if isinstance(value, np.floating):
        value = float(value)
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and value.bit_length() > BITS:
        return hex(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return valid(str(value))


def text_of(value: Any, what: str, space: Space[Any] | None = None) -> str:
    """Checks that an utterance is text that a tokenizer and a file accept, and returns it.

    Raises:
        EnvironmentBroke: it is not; the first character at fault is named.
    """
    if not isinstance(value, str):
        raise EnvironmentBroke(f"{what} is {type(value).__name__}, not str")
    text = str.__str__(value)
    if half := _HALF.search(text):
        raise EnvironmentBroke(
            f"{what} is not valid Unicode (U+{ord(half[0]):04X}, a lone surrogate, at character"
            f' {half.start()}): decode bytes with errors="replace"'
        )
    if space is None or space.contains(text):
        return text
    standard = space if isinstance(space, gymnasium.spaces.Text) else None
    charset = None if standard is None else standard.character_set
    foreign = (
        None
        if charset is None
        else next(((i, c) for i, c in enumerate(text) if c not in charset), None)
    )
    if foreign is not None:
        place, sign = foreign
        raise EnvironmentBroke(
            f"{what} has {sign!r} (U+{ord(sign):04X}) at character {place}, which the charset of"
            " its space lacks; turnwise.Text takes any"
        )
    limit = None if standard is None else standard.max_length
    raise EnvironmentBroke(
        f"{what} of {len(text):,} characters is outside {space}"
        + (f" (limit {limit:,})" if limit else "")
    )


def _number(value: Any, what: str) -> float:
    """Returns a finite number, small enough that sums and squares of it are finite too.

    Raises:
        EnvironmentBroke: it is none; text that spells a number is none either.
    """
    text = isinstance(value, (str, bytes, bytearray))
    if text or (isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind not in "biuf"):
        raise EnvironmentBroke(f"{what} is {_short(value)}, not a number")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise EnvironmentBroke(f"{what} is {_short(value)}, not a number") from None
    if not math.isfinite(number):
        raise EnvironmentBroke(f"{what} is {number}")
    if abs(number) > LARGEST:
        raise EnvironmentBroke(
            f"{what} is {number:g}; beyond {LARGEST:g} sums of such numbers mean nothing"
        )
    return number


def _flag(value: Any, what: str) -> bool:
    """Returns True or False.

    Raises:
        EnvironmentBroke: neither bool nor 0 or 1. ("False" and NaN would count as true.)
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    number = None if value is None else _number(value, what)
    if number not in (0.0, 1.0):
        raise EnvironmentBroke(f"{what} is {_short(value)}, neither True nor False")
    return bool(number)


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Returns tool schemas: mappings with a name, or {"type": "function", "function": {"name":
    ...}}.

    Raises:
        EnvironmentBroke: something else, which a chat template would trip over.
    """
    if value is None:
        return ()
    wanted = (
        'info["tools"] must be a list of tool schemas, such as {"type": "function", "function":'
        ' {"name": "search"}}'
    )
    if not isinstance(value, (list, tuple)):
        raise EnvironmentBroke(f"{wanted}; it is {_short(value)}")
    for tool in value:
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if (
            not isinstance(inner, Mapping)
            or not isinstance(inner.get("name"), str)
            or not inner["name"]
        ):
            raise EnvironmentBroke(f"{wanted}; one of them is {_short(tool)}")
        schema = inner.get("parameters") or {}
        properties = (schema.get("properties") or {}) if isinstance(schema, Mapping) else None
        if not isinstance(properties, Mapping) or not all(
            isinstance(p, (Mapping, bool)) for p in properties.values()
        ):
            raise EnvironmentBroke(
                f"the parameters of tool {inner['name']!r} must be a JSON schema whose properties"
                f" are schemas by name, not {_short(inner['parameters'])}"
            )
    try:
        return tuple(_jsonable(value))
    except RecursionError:
        raise EnvironmentBroke(
            'info["tools"] contains itself, or is nested too deeply to be written down'
        ) from None


def read(result: Any, space: Space[Any], *, stepped: bool) -> Observation:
    """Checks the result of `reset` (obs, info) or `step` (obs, reward, terminated, truncated,
    info).

    Raises:
        EnvironmentBroke: part of it is not what it must be; the message says which and why.
    """
    size = 5 if stepped else 2
    if not isinstance(result, tuple) or len(result) != size:
        shape = "(obs, reward, terminated, truncated, info)" if stepped else "(obs, info)"
        raise EnvironmentBroke(
            f"{'step' if stepped else 'reset'} must return {shape}, got {_short(result)}"
        )
    obs, info = result[0], result[-1]
    if not isinstance(info, Mapping):
        raise EnvironmentBroke(f"info is {type(info).__name__}, not a mapping")
    role: Any = info.get("role", "user")
    if not (isinstance(role, str) and role in ("user", "tool")):
        raise EnvironmentBroke(f'info["role"] is {_short(role)}; it may be "user" or "tool"')
    kept = _plain_info({k: v for k, v in info.items() if k not in _READ})
    if info.get("optimum") is not None:
        try:
            kept["optimum"] = _number(info["optimum"], 'info["optimum"]')
        # a remark about the start; the episode is sound without it
        except EnvironmentBroke as error:
            kept["odd_optimum"] = str(error)
    reward, terminated, truncated = 0.0, False, False
    if stepped:
        reward = _number(result[1], "the reward")
        terminated, truncated = _flag(result[2], "terminated"), _flag(result[3], "truncated")
    system = info.get("system")
    return Observation(
        _message(text_of(obs, "the observation", space), role, info.get("parts")),
        reward,
        terminated,
        truncated,
        kept,
        None if system is None else text_of(system, 'info["system"]'),
        _tools(info.get("tools")),
        "" if info.get("player") is None else text_of(info["player"], 'info["player"]'),
        _seats(info.get("seats")) if stepped else {},
        _whole(info.get("context", 0), 'info["context"]', 0),
        _whole(info.get("max_new_tokens"), 'info["max_new_tokens"]', 1),
    )


def _whole(value: Any, what: str, least: int) -> Any:
    """Returns a whole number that is not too small, or None where there is none.

    Raises:
        EnvironmentBroke: it is no such number.
    """
    number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if value is not None and not (number and least <= value < 2**31):
        raise EnvironmentBroke(f"{what} is {_short(value)}, not a whole number from {least} on")
    return value if value is None else int(value)


def _message(text: str, role: str, parts: Any) -> Message:
    """Returns an observation as a message, with its parts where it is several.

    Raises:
        EnvironmentBroke: the parts are no list of texts or messages, or are not the observation.
    """
    whole = Message("tool" if role == "tool" else "user", text)
    if parts is None:
        return whole
    if not isinstance(parts, (list, tuple)):
        raise EnvironmentBroke(
            f'info["parts"] must be a list of texts or messages; it is {_short(parts)}'
        )
    found = [_part(part, f'info["parts"][{i}]') for i, part in enumerate(parts)]
    joined = Message.joined(whole.role, found)
    if joined.content != text or not found:
        raise EnvironmentBroke(
            'info["parts"] are the messages of the observation, which holds their texts with an'
            " empty line between two"
        )
    if found[-1].role != whole.role:
        raise EnvironmentBroke(
            f'the last of info["parts"] is of the {found[-1].role}, and info["role"] is'
            f" {role!r}: that is the role of what is replied to"
        )
    return joined


def _part(part: Any, what: str) -> Message:
    """Returns one message of an observation; a text is a tool's result.

    Raises:
        EnvironmentBroke: it is neither a text nor a role and a text.
    """
    if not isinstance(part, Mapping):
        return Message("tool", text_of(part, what))
    role: Any = part.get("role")
    if set(part) != {"role", "content"} or role not in ("system", "user", "assistant", "tool"):
        raise EnvironmentBroke(
            f"{what} must be a text, or `role` (system, user, assistant or tool) and `content`; it"
            f" is {_short(part)}"
        )
    return Message(role, text_of(part["content"], what))


def _seats(value: Any) -> dict[str, SeatResult]:
    """Returns what other seats get by a step.

    Raises:
        EnvironmentBroke: it is no mapping from seats to mappings.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(
        isinstance(seat, str) and isinstance(own, Mapping) for seat, own in value.items()
    ):
        raise EnvironmentBroke(
            'info["seats"] must be {seat: {"reward": number, "success": bool, ...}} of the seats'
            f" that did not reply; it is {_short(value)}"
        )
    found = {}
    for seat, own in value.items():
        info = _plain_info({k: v for k, v in own.items() if k != "reward"}, f"of seat {seat!r}")
        found[seat] = SeatResult(_number(own.get("reward", 0.0), f"reward of seat {seat!r}"), info)
    return found


def _plain_info(info: Mapping[Any, Any], whose: str = "") -> dict[str, Any]:
    """Returns `info` as it is kept: plain JSON data, `success` True or False or left out.

    Raises:
        EnvironmentBroke: it cannot be written down, or its success is neither.
    """
    try:
        kept = _jsonable({k: v for k, v in info.items() if k != "success"})
    except RecursionError:
        raise EnvironmentBroke(
            "info contains itself, or is nested too deeply to be written down"
        ) from None
    if info.get("success") is not None:
        kept["success"] = _flag(info["success"], f'info["success"] {whose}'.strip())
    return dict(kept)


def _short(value: Any) -> str:
    text = valid(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def guarded(work: Callable[[], Any]) -> tuple[Any, str]:
    """Calls `tried` where Ctrl-C does not arrive, on a thread or in a process of its own: a
    KeyboardInterrupt there is an error of the environment's."""
    try:
        return tried(work)
    except KeyboardInterrupt as error:
        return None, worded(error)
