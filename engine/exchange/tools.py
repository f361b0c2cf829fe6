"""Exports of annotation tools. Both tools are forms: named fields that were shown, and answers to
named questions.

The export says neither which field is the prompt nor which are the replies, so they are found by
name; the rules stand in docs/preference-data.md. What people answered in addition to a preference
(a comment, a topic) is kept in `details`. Which questions are answered so is decided over the whole
file (`Questions`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import PreferenceError
from ..records.episode import Message
from .records import Messages, Unread, is_transcript, messages, number, transcript

PROMPTS = ("prompt", "instruction", "question", "query", "input", "context", "history", "messages",
    "chat", "conversation", "dialogue")  # fmt: skip
REPLIES = ("response", "reply", "answer", "completion", "generation", "output")
TIES = ("tie", "equal", "same", "both", "neither")
GOOD, BAD = (
    ("good", "yes", "like", "liked", "thumbsup"),
    ("bad", "no", "dislike", "disliked", "thumbsdown"),
)

_COUNTER = re.compile(r"^(.+?)(?:[\W_]*(\d+)|[\W_]+([A-Za-z])|(?<=[a-z])([A-Z]))$")
_COUNTERS = re.compile(r"\d+|(?<![A-Za-z])[A-Za-z](?![A-Za-z])")


COMMENTS = ("comment", "comments", "why", "reason", "reasons", "rationale", "explanation",
    "justification", "note", "notes", "remark", "remarks")  # fmt: skip


class Ranking(NamedTuple):
    """Conversations and their places in them by tier, best first."""

    talks: tuple[Messages, ...]
    tiers: tuple[tuple[int, ...], ...]


class Score(NamedTuple):
    """A conversation and its number."""

    messages: Messages
    number: float


class Odd(Exception):
    """An answer that is no preference; the message gives the reason."""


class Form:
    """The fields of one record, as prompt and replies."""

    def __init__(self, data: Mapping[str, Any], where: str, unread: Unread) -> None:
        self.where, self.data = where, data
        self.fields: dict[str, str | Messages] = {}
        for name, value in data.items():
            if isinstance(value, str):
                whole = value.startswith("\n\nHuman:") and is_transcript(value)
                self.fields[name] = transcript(value) if whole else value
            elif (chat := _chat(value)) is not None:
                self.fields[name] = messages(chat, where, name, unread)
        self.system = [
            name for name in self.fields if plain_name(name) in ("system", "systemprompt")
        ]
        self.prompts = [name for name in self.fields if plain_name(name) in PROMPTS]
        if len(self.prompts) > 1:
            raise PreferenceError(
                f"{where}: which of the fields {', '.join(self.prompts)} is the prompt? Keep one of"
                " them"
            )
        families: dict[str, dict[str, str]] = {}  # "answer" to {"1": "answer1", "2": "answer2"}
        for name in self.fields:
            if found := _COUNTER.match(name):
                families.setdefault(plain_name(found[1]), {})[_counter(found)] = name
        families["side"] = {
            side: name
            for side in ("left", "right")
            for name in self.fields
            if plain_name(name) == side
        }
        several = {
            stem: dict(sorted(f.items(), key=_place)) for stem, f in families.items() if len(f) > 1
        }
        self.single = [name for name in self.fields if plain_name(name) in REPLIES]
        self.families = [f for stem, f in several.items() if stem in REPLIES] or (
            [] if self.single else list(several.values())
        )

    def prompt(self) -> Messages:
        """Returns the messages before the reply: the system prompt and the prompts."""
        texts = [
            Message("system", text)
            for name in self.system
            if isinstance(text := self.fields[name], str)
        ]
        for name in self.prompts:
            value = self.fields[name]
            texts += [Message("user", value)] if isinstance(value, str) else value
        return tuple(texts)

    def messages(self, reply: str | Messages) -> Messages:
        """Returns the whole conversation that ends in a reply; a reply may be a whole conversation
        itself."""
        prompt = self.prompt()
        if isinstance(reply, str):
            if not prompt:
                raise Odd(
                    f"{self.where}: no field holds the prompt; it must be called one of"
                    f" {', '.join(PROMPTS)}"
                )
            return (*prompt, Message("assistant", reply))
        return reply if reply[: len(prompt)] == prompt else (*prompt, *reply)

    def named(self, option: str) -> str | None:
        """Returns the field that an option refers to."""
        same = [name for name in self.fields if plain_name(name) == plain_name(option)]
        return same[0] if len(same) == 1 else None

    def family(self, member: str | None = None) -> list[str]:
        """Returns the replies to one prompt: fields whose names differ in a number or letter at the
        end, in its order."""
        found = [f for f in self.families if member is None or member in f.values()]
        if len(found) != 1:
            raise Odd(
                f"{self.where}: which fields are the replies? They must be called by one name and a"
                " number or letter (response_1, response_2; answer_a, answer_b); there are"
                f" {', '.join(self.data)}"
            )
        return list(found[0].values())

    def rated(self, *hints: str) -> Messages:
        """Returns the conversation that a question on a single one refers to: the only one, or that
        with the number of the question."""
        if len(self.families) == 1:
            for hint in hints:
                numbers = {_lower(n) for n in _COUNTERS.findall(hint)}
                if len(numbers) == 1 and (number := numbers.pop()) in self.families[0]:
                    return self.messages(self.fields[self.families[0][number]])
        elif not self.families and len(self.single) == 1:
            return self.messages(self.fields[self.single[0]])
        elif (
            not self.families
            and not self.single
            and any(m.role == "assistant" for m in self.prompt())
        ):
            return self.prompt()
        raise Odd(
            f"{self.where}: which conversation does {hints[0]!r} speak of? There must be one reply,"
            f" called one of {', '.join(REPLIES)}, or the question must have its number (rating_1"
            f" for response_1); there are {', '.join(self.data)}"
        )

    def ranked(
        self, tiers: Sequence[Sequence[str]]
    ) -> tuple[tuple[Messages, ...], tuple[tuple[int, ...], ...]]:
        """Returns tiers of fields as conversations and places."""
        return self.places([[self.messages(self.fields[name]) for name in tier] for tier in tiers])

    def places(
        self, tiers: Sequence[Sequence[Messages]]
    ) -> tuple[tuple[Messages, ...], tuple[tuple[int, ...], ...]]:
        """Returns tiers of conversations as the conversations, and their places by tier."""
        talks = tuple(conversation for tier in tiers for conversation in tier)
        if len(talks) < 2:
            raise Odd(f"{self.where}: a ranking of fewer than two conversations says nothing")
        ends = [sum(map(len, tiers[: i + 1])) for i in range(len(tiers))]
        return talks, tuple(
            tuple(range(end - len(tier), end)) for tier, end in zip(tiers, ends, strict=True)
        )

    def choice(self, option: str) -> list[list[str]]:
        """Returns the tiers that result from choosing one option among replies."""
        if plain_name(option) in TIES:
            return [self.family()]
        if plain_name(option) in ("left", "right") and len(pair := self.family()) == 2:
            return [pair[:1], pair[1:]] if plain_name(option) == "left" else [pair[1:], pair[:1]]
        best = self.named(option)
        if best is None:
            raise Odd(
                f"{self.where}: the answer {option!r} names no field ({', '.join(self.data)}), no"
                f" side (left, right), no tie ({', '.join(TIES)}) and is neither"
                f" {' nor '.join((GOOD[0], BAD[0]))}"
            )
        return [[best], [name for name in self.family(best) if name != best]]

    def ranking(self, value: Sequence[Any]) -> list[list[str]]:
        """Returns the tiers of a ranking: names, best first, or {value, rank} with equal ranks for
        ties."""
        tiers: dict[float, list[str]] = {}
        seen = set()
        for place, each in enumerate(value):
            name, rank = (
                (each.get("value"), each.get("rank", place))
                if isinstance(each, Mapping)
                else (each, place)
            )
            field = self.named(name) if isinstance(name, str) else None
            if field is None or field in seen or not isinstance(rank, (int, float, type(None))):
                raise Odd(
                    f"{self.where}: {each!r} is no place in a ranking of the fields"
                    f" {', '.join(self.data)}"
                )
            seen.add(field)
            if rank is not None:
                tiers.setdefault(rank, []).append(field)
        same = next((set(f.values()) for f in self.families if seen & set(f.values())), seen)
        if seen != same and all(isinstance(each, str) for each in value):
            raise Odd(
                f"{self.where}: {value!r} leaves out {', '.join(sorted(same - seen))}: it may be a"
                " choice of several"
            )
        return [tiers[rank] for rank in sorted(tiers)]


def understand_answer(form: Form, question: str, value: Any, about: str) -> Ranking | Score:
    """Reads one answer.

    Raises:
        Odd: no preference.
    """
    if isinstance(value, Tiers):
        return Ranking(*form.places(value.talks(form)))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        found = number(value, form.where, question)
        assert found is not None
        return Score(form.rated(question, about), found)
    if isinstance(value, str) and plain_name(value) in GOOD + BAD:
        return Score(form.rated(question, about), float(plain_name(value) in GOOD))
    if isinstance(value, str):
        return Ranking(*form.ranked(form.choice(value)))
    if isinstance(value, Sequence) and value:
        return Ranking(*form.ranked(form.ranking(value)))
    raise Odd(
        f"{form.where}: {question!r} is answered by {value!r}, which is no choice, ranking or"
        " rating"
    )


class Tiers(dict[str, list[str]]):
    """A ranker's buckets with the ids in them."""

    def talks(self, form: Form) -> list[list[Messages]]:
        """Returns the conversations by tier.

        One bucket is a ranking; several are tiers if numbered; `_` holds what was not ranked.
        """
        buckets = {name: ids for name, ids in self.items() if name != "_"}
        if len(buckets) == 1 and "_" not in self:
            tiers = [[id_] for id_ in next(iter(buckets.values()))]
        else:
            numbers = {name: re.search(r"\d+$", name) for name in buckets}
            if not all(numbers.values()):
                raise Odd(
                    f"{form.where}: the buckets {', '.join(buckets)} have no order; number them,"
                    " best first (tier_1, tier_2), to have them read as tiers of a ranking"
                )
            tiers = [
                buckets[name]
                for name in sorted(buckets, key=lambda name: int(numbers[name][0]))  # type: ignore[index]
            ]
        wanted = {id_ for tier in tiers for id_ in tier}
        for value in form.data.values():
            listed = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
            items = {
                str(each["id"]): each
                for each in listed
                if isinstance(each, Mapping) and "id" in each
            }
            if wanted and wanted <= set(items):
                bad = next((i for i in wanted if not isinstance(items[i].get("body"), str)), None)
                if bad is not None:
                    raise Odd(f"{form.where}: the ranked item {bad!r} has no `body`")
                return [
                    [form.messages(items[id_]["body"]) for id_ in tier] for tier in tiers if tier
                ]
        raise Odd(
            f"{form.where}: no list in the task's data holds the ranked items"
            f" {', '.join(sorted(wanted))}"
        )


# Helpers.


def _chat(value: Any) -> list[Any] | None:
    """Returns a chat field (Argilla: {role, content}) or paragraphs (Label Studio: {author, text})
    as {role, content}; None: neither."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return None
    found = []
    for m in value:
        keys = ("role", "content") if isinstance(m, Mapping) and "role" in m else ("author", "text")
        if not isinstance(m, Mapping) or not set(keys) <= set(m):
            return None
        role = str(m[keys[0]]).lower()
        more = {key: value for key, value in m.items() if key not in keys}
        found.append({**more, "role": "user" if role == "human" else role, "content": m[keys[1]]})
    return found


def plain_name(name: str) -> str:
    """Returns a name without signs and case: "Response-A" is "responsea"."""
    return re.sub(r"[\W_]+", "", name).casefold()


def _lower(number: str) -> str:
    return str(int(number)) if number.isdecimal() else number.lower()


def _counter(found: re.Match[str]) -> str:
    return _lower(found[2] or found[3] or found[4])


def _place(item: tuple[str, str]) -> tuple[int, str]:
    return (int(item[0]), "") if item[0].isdecimal() else (0, item[0])
