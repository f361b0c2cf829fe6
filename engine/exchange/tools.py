"""Exports of annotation tools. Both tools are forms: named fields that were shown, and answers to
named questions.

The export says neither which field is the prompt nor which are the replies, so they are found by
name; the rules stand in docs/preference-data.md. What people answered in addition to a preference
(a comment, a topic) is kept in `details`. Which questions are answered so is decided over the whole
file (`Questions`).
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import PreferenceError
from ..records.episode import Message
from .records import Messages, Ranked, Scored, Unread, is_transcript, messages, number, transcript

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


@dataclass(frozen=True, slots=True)
class Answers:
    """One person's answers on one record, question by question: a ranking, (conversation, number),
    or why neither.

    Attributes:
        given: the answers as they stand in the file.
    """

    where: str
    rater: str
    given: Mapping[str, Any]
    understood: Mapping[str, Ranking | Score | Odd]


class Questions:
    """The kinds of the questions of one file. Exports do not tell a label from free text, so that
    is decided over the whole file.

    Args:
        text: questions that are known to be answered in free text.
    """

    def __init__(self, text: Collection[str] = ()) -> None:
        self._known = frozenset(text)
        self._text: set[str] = set()
        self._understood: Counter[str] = Counter()
        self._odd: dict[str, Odd] = {}  # question to why an answer to it is no preference
        # Question to whether all that was not understood were words.
        self._words: dict[str, bool] = {}

    def understand(self, form: Form, rater: str, answers: Mapping[str, tuple[Any, str]]) -> Answers:
        """Reads answers one by one.

        Args:
            form: the form that was filled in.
            rater: who answered.
            answers: question to the answer and to what the tool says that it is about.
        """
        understood: dict[str, Ranking | Score | Odd] = {}
        for question, (value, about) in answers.items():
            try:
                understood[question] = _understand(form, question, value, about)
                self._understood[question] += 1
            except Odd as why:
                understood[question] = why
                self._odd.setdefault(question, why)
                self._words[question] = self._words.get(question, True) and isinstance(value, str)
        return Answers(
            form.where,
            rater,
            {question: value for question, (value, _) in answers.items()},
            understood,
        )

    def decide(self, path: Path) -> None:
        """Decides which questions are free text: those known or called so, and those with words
        that are not understood, while other questions are understood throughout.

        Raises:
            PreferenceError: answers to a question are a preference in some records only, or none is
                one anywhere.
        """
        asked = {*self._understood, *self._odd}
        self._text = {q for q in asked if q in self._known}
        called = {q for q in asked if _plain(q) in COMMENTS}
        sound = {q for q in self._understood if q not in self._odd} - self._text - called
        self._text |= called if sound or set(self._understood) - called else set()
        for question, why in self._odd.items():
            if question in self._text:
                continue
            count = self._understood[question]
            if (count and not (sound and self._words[question])) or not set(
                self._understood
            ) - self._text:
                raise PreferenceError(str(why))
            if count:
                self._text.add(question)
                warnings.warn(
                    f"{path}: the question {question!r} is taken for free text, though {count} of"
                    f" its answers name a reply, a tie or a label, because {why}; take it out, or"
                    " mend these answers, to have it read",
                    stacklevel=2,
                )

    def records(self, answers: Answers) -> Iterator[Ranked | Scored]:
        """Returns the preferences, once the questions are decided; all other answers stand in the
        details."""
        rankings: dict[str, Ranking] = {}
        scores: dict[Messages, dict[str, float]] = {}
        details: dict[str, Any] = {}
        for question, reading in answers.understood.items():
            if question in self._text or isinstance(reading, Odd):
                details[question] = json.loads(json.dumps(answers.given[question], default=str))
            elif isinstance(reading, Ranking):
                rankings[question] = reading
            else:
                scores.setdefault(reading.messages, {})[question] = reading.number
        for question, (talks, tiers) in rankings.items():
            yield Ranked(
                answers.where,
                talks,
                tiers,
                answers.rater,
                aspect=question if len(rankings) > 1 else "",
                details=details,
            )
        for conversation, numbers in scores.items():
            one = next(iter(numbers.values())) if len(numbers) == 1 else None
            aspects = {} if one is not None else numbers
            yield Scored(
                answers.where,
                conversation,
                one,
                aspects=aspects,
                rater=answers.rater,
                details=details,
            )


class Ranking(NamedTuple):
    """Conversations and their places in them by tier, best first."""

    talks: tuple[Messages, ...]
    tiers: tuple[tuple[int, ...], ...]


class Score(NamedTuple):
    """A conversation and its number."""

    messages: Messages
    number: float


def text_questions(path: Path) -> frozenset[str]:
    """Returns the questions that Argilla's own settings, in the folder of the records that
    `Dataset.to_disk` wrote, call free text or marks in a text.

    Raises:
        PreferenceError: the settings cannot be read.
    """
    settings = path.parent / ".argilla" / "settings.json"
    if path.is_dir() or not settings.is_file():
        return frozenset()
    try:
        questions = json.loads(settings.read_text(encoding="utf-8"))["questions"]
        return frozenset(
            str(q["name"]) for q in questions if q["settings"]["type"] in ("text", "span")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PreferenceError(f"{settings} is no settings file of Argilla: {error!r}") from error


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
        self.system = [name for name in self.fields if _plain(name) in ("system", "systemprompt")]
        self.prompts = [name for name in self.fields if _plain(name) in PROMPTS]
        if len(self.prompts) > 1:
            raise PreferenceError(
                f"{where}: which of the fields {', '.join(self.prompts)} is the prompt? Keep one of"
                " them"
            )
        families: dict[str, dict[str, str]] = {}  # "answer" to {"1": "answer1", "2": "answer2"}
        for name in self.fields:
            if found := _COUNTER.match(name):
                families.setdefault(_plain(found[1]), {})[_counter(found)] = name
        families["side"] = {
            side: name for side in ("left", "right") for name in self.fields if _plain(name) == side
        }
        several = {
            stem: dict(sorted(f.items(), key=_place)) for stem, f in families.items() if len(f) > 1
        }
        self.single = [name for name in self.fields if _plain(name) in REPLIES]
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
        same = [name for name in self.fields if _plain(name) == _plain(option)]
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
        if _plain(option) in TIES:
            return [self.family()]
        if _plain(option) in ("left", "right") and len(pair := self.family()) == 2:
            return [pair[:1], pair[1:]] if _plain(option) == "left" else [pair[1:], pair[:1]]
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


def _understand(form: Form, question: str, value: Any, about: str) -> Ranking | Score:
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
    if isinstance(value, str) and _plain(value) in GOOD + BAD:
        return Score(form.rated(question, about), float(_plain(value) in GOOD))
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


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def _lower(number: str) -> str:
    return str(int(number)) if number.isdecimal() else number.lower()


def _counter(found: re.Match[str]) -> str:
    return _lower(found[2] or found[3] or found[4])


def _place(item: tuple[str, str]) -> tuple[int, str]:
    return (int(item[0]), "") if item[0].isdecimal() else (0, item[0])
