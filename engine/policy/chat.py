"""Conversations as token ids, by the tokenizer's own chat template.

A sampled conversation only ever grows: the first prompt is rendered once, and every later
observation is a *suffix*, the text that the template puts between a reply and the next one. Sampled
ids are never decoded and tokenized again. A conversation that was *written* (a demonstration, a
preference) is rendered whole, as the template shows finished conversations: its ids are the
tokenizer's own. The reply is all that stands after the prompt that a policy would be given.

Text from a policy, a person or an environment stays text: where it spells a control token it is
tokenized in two pieces, cut inside that spelling. Control tokens are those marked special and those
that the template itself puts around messages; other added tokens (line breaks, runs of spaces,
`<think>`, `<tool_call>`) are text like any other.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from itertools import pairwise
from typing import Any

from ..errors import TemplateError
from ..records.episode import Message

MARK = "\ue000{}\ue001"  # private-use characters: in no template and no vocabulary of words
ANCHOR = "\ue000"  # nothing merges with it, so what follows is tokenized as in the middle of a text
PLAIN = "Hello there.\n\nHow are  you, on day 3?"
ANY = (
    "  two\ttabs\n\n\n- \u00fc\u00f1\u00ed\u00e7\u00f6\u0111\u00e9, \u6f22\u5b57,"
    " \u0417\u0434\u0440\u0430, \u0645\u0631\u062d\u0628\u0627, \U0001f642\u200d {x: [1]} `y`"
    " \\ ~ |"
)
THOUGHT = re.compile(r"</?think\w*>")  # the assistant's own words, also where a template opens them


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation as the template renders it.

    Attributes:
        text: all of it.
        spans: where in it each message's content stands, (start, end) by message.
        before: where the frame before each content begins: the end of the content before it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    before: tuple[int, ...]


class ChatFormat:
    """The format of a chat template: renders prompts, suffixes and written conversations as ids.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        stop_ids: further tokens that end a reply, as the model's generation config names them.
        today: the day that templates which write a date are given; default: the day this is made.

    Attributes:
        control_ids: the tokens that no text may become.
        end_id: the token with which a finished reply ends.
        stop_ids: all tokens that end a reply: `end_id`, the tokenizer's end of sequence, and
            `stop_ids`.

    Raises:
        TemplateError: no template, one that does not close an assistant's turn with a token of its
            own, or one that does not show messages as they are.
    """

    def __init__(
        self, tokenizer: Any, *, stop_ids: Collection[int] = (), today: date | None = None
    ) -> None:
        self.tokenizer, self.today = tokenizer, today or date.today()
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError(
                "the tokenizer has no chat template, so it is unknown how a conversation becomes"
                " tokens. Use a chat or instruct model, or set one (`policy: {model: ...,"
                " chat_template: chatml}`) for a model that you will fine-tune first."
            )
        self._begins: dict[tuple[str, str, bool, bool], int] = {}
        added = tokenizer.added_tokens_decoder
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self._system = self._system_style()
        frame = self._frame_text()
        self._controls = {
            token.content: i
            for i, token in added.items()
            if i in special
            or (
                token.content in frame
                and token.content.strip()
                and not THOUGHT.fullmatch(token.content)
            )
        }
        own = [token for token in added.values() if token.content not in self._controls]
        self._drops = any(len(text) == 1 for text in self._controls) or any(
            t.lstrip or t.rstrip for t in own
        )
        self._normalizes = any(added[i].normalized for i in self._controls.values())
        self.control_ids = frozenset({*self._controls.values(), *special})
        self._check_kept(PLAIN)  # what loses these loses a part of every conversation
        self._drops = self._drops or not self._keeps(ANY)
        self._closing, self._last_closing = self._closings()
        closing = self._encode(self._closing)
        last = self._encode(self._last_closing)
        self._closing_ids: list[int] = closing
        self.end_id: int = (closing if last[: len(closing)] == closing else last)[-1]
        eos = tokenizer.eos_token_id
        self.stop_ids = frozenset({self.end_id, *stop_ids, *([] if eos is None else [eos])})
        self._closes = {i for i in self.stop_ids if i == closing[-1] or self._shows(i)}
        self._ends = self.stop_ids | self.control_ids.intersection([*closing, *last])
        self._header = self._channel()
        # Special tokens that are the assistant's own words (a call of a tool): the template writes
        # them, but frames nothing with them.
        named = {
            tokenizer.bos_token_id,
            eos,
            tokenizer.pad_token_id,
            tokenizer.unk_token_id,
            *self._ends,
            *self._header,
        }
        self._unseen = special - {
            i
            for text, i in self._controls.items()
            if i not in named and text not in frame and self._writes(text)
        }
        probe = [Message("user", "x"), Message("assistant", "y")]
        self.conversation([*probe, *probe])  # what cannot be laid out is refused now

    # What the template makes of messages, as text.

    def _system_style(self) -> str:
        """Finds how the template takes a system prompt: "own" (as a message) or "first" (within the
        first user turn)."""
        messages = [{"role": "system", "content": MARK.format(9)}, {"role": "user", "content": "x"}]
        try:
            text = self._template(messages, True, None)
        # templates refuse by raise_exception, which is jinja's TemplateError or anything else
        except Exception:
            return "first"
        return "own" if MARK.format(9) in text else "first"

    def _template(
        self,
        messages: list[dict[str, str]],
        generate: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> str:
        # A tool's result implies tools, and with them the template that is made for tools, if there
        # are several.
        uses_tools = bool(tools) or any(m["role"] == "tool" for m in messages)
        source = self.tokenizer.get_chat_template(tools=[] if uses_tools else None)
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=_dated(source, self.today),
            tools=[self._defused(tool) for tool in tools] if tools else None,
            tokenize=False,
            add_generation_prompt=generate,
        )

    def _defused(self, value: Any) -> Any:
        """Returns a tool schema in which no string spells a control token: a space is put after the
        first character of any."""
        if isinstance(value, Mapping):
            return {self._defused(k): self._defused(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._defused(v) for v in value]
        if isinstance(value, str):
            for token in filter(None, self._controls):
                value = value.replace(token, f"{token[0]} {token[1:]}")
        return value

    def _render(
        self,
        messages: Sequence[Message],
        *,
        generate: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        plain = [{"role": m.role, "content": m.content} for m in messages]
        if self._system == "first" and plain and plain[0]["role"] == "system":
            system = plain.pop(0)["content"]
            if plain:
                plain[0] = {**plain[0], "content": f"{system}\n\n{plain[0]['content']}"}
            else:
                plain = [{"role": "user", "content": system}]
        try:
            return self._template(plain, generate, tools)
        except Exception as error:
            roles = [m["role"] for m in plain]
            raise TemplateError(
                f"the chat template refuses a conversation with roles {roles}:"
                f" {type(error).__name__}: {error}. If it has no tool role, let the environment say"
                " role 'user'."
            ) from error

    def _marked(
        self,
        messages: Sequence[Message],
        generate: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        real: int | None = None,
    ) -> tuple[list[int], list[str]]:
        """Renders messages with a mark in place of each content, but for the content of message
        `real`.

        Returns:
            the messages in the order in which the template shows them, and the pieces of text
            before, between and after them.
        """
        words = "".join(m.content for m in messages) + str(tools or "")
        # Or the words would pass for marks.
        free = next(chr(c) for c in range(0xE002, 0xF8FF) if chr(c) not in words)
        marks = [f"{free}{i + 10}{free}" for i in range(len(messages))]
        shown = [
            m if i == real else Message(m.role, mark)
            for i, (m, mark) in enumerate(zip(messages, marks, strict=True))
        ]
        text = self._render(shown, generate=generate, tools=tools)
        for i, (message, mark) in enumerate(zip(messages, marks, strict=True)):
            if i != real and text.count(mark) != 1:
                what = "a reply" if message.role == "assistant" else f"a {message.role} message"
                raise TemplateError(
                    f"the chat template shows {what} {text.count(mark)} times instead of once, so"
                    " its history cannot be appended to"
                )
        order = sorted(
            (i for i in range(len(marks)) if i != real), key=lambda i: text.index(marks[i])
        )
        pieces = []
        for i in order:
            piece, text = text.split(marks[i], 1)
            pieces.append(piece)
        return order, [*pieces, text]

    def _rendered(
        self, messages: Sequence[Message], generate: bool, tools: Sequence[Mapping[str, Any]] | None
    ) -> _Rendered:
        """Renders messages and finds where each content stands, however the template trims or
        rewrites it.

        Raises:
            TemplateError: what the template makes of a message depends on the words of another one.
        """
        text = self._render(messages, generate=generate, tools=tools)
        order, frames = self._marked(messages, generate, tools)
        contents = [messages[i].content for i in order]
        if text != "".join(f + c for f, c in zip(frames, [*contents, ""], strict=True)):
            frames, contents = self._rewritten(messages, generate, tools, order, frames)
            if text != "".join(f + c for f, c in zip(frames, [*contents, ""], strict=True)):
                raise TemplateError(
                    "the chat template shows a message otherwise depending on the words of"
                    " another one"
                )
        spans, before, at = [(0, 0)] * len(order), [0] * len(order), 0
        for i, frame, content in zip(order, frames, contents, strict=False):
            start = at + len(frame)
            spans[i], before[i], at = (start, start + len(content)), at, start + len(content)
        return _Rendered(text, tuple(spans), tuple(before))

    def _rewritten(
        self,
        messages: Sequence[Message],
        generate: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        order: list[int],
        frames: list[str],
    ) -> tuple[list[str], list[str]]:
        """Returns frames and contents where the template trims or rewrites some content: each is
        rendered among marks of the others."""
        shown, contents = list(frames), []
        for place, i in enumerate(order):
            piece, left, right = (
                self._marked(messages, generate, tools, i)[1][place],
                frames[place],
                frames[place + 1],
            )
            head = _alike(piece, left)
            rest = piece[head:]
            tail = _alike(rest[::-1], right[::-1])
            contents.append(rest[: len(rest) - tail])
            if head < len(left):
                shown[place] = left[:head]
            if tail < len(right):
                shown[place + 1] = right[len(right) - tail :]
        return shown, contents

    # The template's own frame.

    def _frame_text(self) -> str:
        """Returns the text that the template puts around messages, without any of what it lets the
        assistant say."""
        probe = [Message("user", "x"), Message("assistant", "x"), Message("user", "x")]
        pieces: list[str] = []
        for opening in ([Message("system", "x")], []) if self._system == "own" else ([],):
            _, frames = self._marked([*opening, *probe], True, None)
            written = self._marked([*opening, *probe[:2]], False, None)[1][len(opening) + 1]
            asked, written_again = frames[-1], frames[-3]
            pieces += [
                *frames[:-3],
                frames[-2],
                asked[: min(_alike(asked, written), _alike(asked, written_again))],
            ]
            if opening:
                continue
            with contextlib.suppress(TemplateError):  # no tool role
                *_, opens, closes = self._marked(
                    [*probe, probe[1], Message("tool", "x")], True, None
                )[1]
                pieces += [opens, closes[: len(closes) - _alike(closes[::-1], asked[::-1])]]
        return "\n".join(pieces)

    def _closings(self) -> tuple[str, str]:
        """Returns the text that the template writes after a reply that is followed by a message,
        and after the last one of a finished conversation.

        Both end with a control token: after it the policy has nothing more to say.
        """
        probe = [Message("user", "x"), Message("assistant", "x"), Message("user", "x")]
        middle = self._marked(probe, True, None)[1][2]
        end = self._marked(probe[:2], False, None)[1][2]
        last = end[: self._last_control(end)]
        if not last or not any(end.startswith(token) for token in filter(None, self._controls)):
            raise TemplateError(
                f"the chat template closes a reply with {(end or middle)[:40]!r}, which is no token"
                " of its own, so the policy cannot say that it is done. Use a template whose"
                " assistant turns end in a special token."
            )
        both = end[: _alike(end, middle)]
        if self._last_control(both):
            return both[: self._last_control(both)], last
        first = max((t for t in self._controls if t and middle.startswith(t)), key=len, default="")
        if not first:
            raise TemplateError(
                f"the chat template closes the last reply with {last!r} and an earlier one with"
                f" {middle[:40]!r}, which is no token of its own"
            )
        return first, last

    def _last_control(self, text: str) -> int:
        """Returns where the last control token spelled in a text ends; 0 if none is."""
        return max((text.rindex(t) + len(t) for t in self._controls if t and t in text), default=0)

    def _shows(self, token: int) -> bool:
        """Returns whether the template itself ever closes a reply with this token (a call of a
        tool, perhaps)."""
        text = self.tokenizer.convert_ids_to_tokens(token)
        return self._last_closing.startswith(text) or self._writes(text)

    def _writes(self, text: str) -> bool:
        """Returns whether the template's source holds a text."""
        source = self.tokenizer.chat_template
        return any(
            text in one for one in (source.values() if isinstance(source, dict) else [source])
        )

    def _channel(self) -> list[int]:
        """Returns the ids that stand before the words for the other side where replies have
        channels; none elsewhere."""
        probe = [Message("user", "x"), Message("assistant", "y")]
        whole = self._rendered(probe, False, None)
        header = whole.text[self._reply_begins(probe, whole, 1, None) : whole.spans[1][0]]
        ids = self._encode(header)
        return ids if ids and ids[0] in self.control_ids else []

    # Ids.

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode: character {error.start + 1} is half a surrogate"
                f" pair, U+{ord(text[error.start]):04X}"
            ) from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _continue(self, text: str) -> list[int]:
        """Returns the ids of a piece as the tokenizer would give them in the middle of a text (no
        space that some put before every piece)."""
        anchor, ids = self._encode(ANCHOR), self._encode(ANCHOR + text)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._encode(text)

    def _tokenize(
        self,
        text: str,
        contents: Sequence[tuple[int, int]],
        start: int = 0,
        end: int | None = None,
        apart: bool | None = None,
    ) -> list[int]:
        """Returns the ids of text[start:end], in which what stands in `contents` becomes no control
        token.

        Args:
            apart: whether contents are read character by character; None: where it cannot be had
                otherwise.
        """
        end = len(text) if end is None else end
        spans = [(max(a, start), min(b, end)) for a, b in contents if a < end and b > start]
        if apart is None:
            ids, apart = self._joined(text, spans, start, end)
        elif not apart:
            ids, _ = self._joined(text, spans, start, end)
        if not apart:
            return ids
        bounds = [start, *(at for span in spans for at in span), end]
        ids = self._encode(text[bounds[0] : bounds[1]])
        for (a, b), (c, d) in zip(spans, zip(bounds[2::2], bounds[3::2], strict=True), strict=True):
            ids = (
                ids
                + [i for character in text[a:b] for i in self._character(character)]
                + self._encode(text[c:d])
            )
        return ids

    def _joined(
        self, text: str, spans: Sequence[tuple[int, int]], start: int, end: int
    ) -> tuple[list[int], bool]:
        """Returns the ids of text[start:end] in as few pieces as control tokens spelled in it
        allow, and whether some content became a control token all the same: the tokenizer rewrites
        text before it looks for tokens."""
        cuts = {
            at + 1
            for a, b in spans
            for token in self._controls
            for at in _places(text, token, a, b)
        }
        ids = self._pieces(text, sorted(cut for cut in cuts if start < cut < end), start, end)
        if not cuts and not (self._normalizes and spans):
            return ids, False
        bounds = [start, *(at for span in spans for at in span), end]
        frames = [self._encode(text[a:b]) for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
        allowed = [i for frame in frames for i in frame if i in self.control_ids]
        return ids, [i for i in ids if i in self.control_ids] != allowed

    def _pieces(self, text: str, cuts: Sequence[int], start: int, end: int) -> list[int]:
        bounds = [start, *cuts, end]
        first, *others = [text[a:b] for a, b in pairwise(bounds)]
        return self._encode(first) + [i for piece in others for i in self._continue(piece)]

    def _character(self, character: str) -> list[int]:
        ids = self._continue(character)
        if self.control_ids.isdisjoint(ids):
            return ids
        return self._continue("\ufffd")  # a character that is a control token by itself

    def encode_text(self, text: str) -> list[int]:
        """Returns the ids of text that must stay text: no control token is among them, whatever it
        spells.

        Raises:
            ValueError: text that is not valid Unicode.
        """
        return self._tokenize(text, [(0, len(text))])

    def _keeps(self, text: str) -> bool:
        """Returns whether ids hold all of a text, but for the space around it and for forms that
        Unicode calls compatible."""
        back = self.tokenizer.decode(self.encode_text(text), clean_up_tokenization_spaces=False)
        return (
            unicodedata.normalize("NFKC", back).strip()
            == unicodedata.normalize("NFKC", text).strip()
        )

    def _check_kept(self, *texts: str) -> None:
        """Raises `TemplateError` for the first text that ids cannot hold: characters without a
        token, spaces and capitals that the tokenizer drops."""
        for text in texts:
            if not self._keeps(text):
                back = self.tokenizer.decode(
                    self.encode_text(text), clean_up_tokenization_spaces=False
                )
                raise TemplateError(
                    f"the tokenizer loses a part of what it reads: {text[:80]!r} becomes"
                    f" {back[:80]!r}. A tokenizer of bytes, or one that falls back to bytes, keeps"
                    " everything"
                )

    def _spells(self, text: str) -> bool:
        return self._normalizes or any(token in text for token in self._controls if token)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Returns the ids of a conversation up to where the assistant speaks next.

        Raises:
            TemplateError: the template refuses the conversation.
            ValueError: text that is not valid Unicode.
        """
        if self._drops:
            self._check_kept(*(m.content for m in messages))
        if not any(self._spells(m.content) for m in messages):
            return self._encode(self._render(messages, generate=True, tools=tools))
        whole = self._rendered(messages, True, tools)
        return self._tokenize(whole.text, sorted(whole.spans))

    def suffix(
        self, observation: Message, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Returns the ids between the end token of one reply and the first token of the next: the
        observation and its frame.

        Args:
            tools: those that the conversation began with; templates may look at them again.
        """
        if self._drops:
            self._check_kept(observation.content)
        mark = MARK.format(5)
        messages = [Message("user", "x"), Message("assistant", mark), observation]
        if self._spells(observation.content):
            whole = self._rendered(messages, True, tools)
            text, spans, start = whole.text, sorted(whole.spans), whole.spans[1][1]
        else:
            text, spans = self._render(messages, generate=True, tools=tools), []
            # The first is ours: what comes after it may spell the mark too.
            start = text.find(mark) + len(mark)
        if not text.startswith(self._closing, start):
            raise TemplateError(
                f"the chat template closes a reply before a {observation.role} message with "
                f"{text[start : start + 40]!r}, and else with {self._closing!r}"
            )
        # The end token is tokenized along, since some take what follows it with them, and then left
        # out.
        return self._tokenize(text, spans, start + self._closing_start(self._closing))[1:]

    def _closing_start(self, closing: str) -> int:
        """Returns where in a closing its last token begins."""
        return max(closing.rindex(t) for t in self._controls if t and closing.endswith(t))

    def reply(self, text: str) -> list[int]:
        """Returns the ids of a reply that was not sampled, alone: its text as text, and the closing
        of a reply that is followed by a message."""
        return [*self.encode_text(text), *self._closing_ids]

    def close(self, ids: Sequence[int]) -> list[int]:
        """Returns the ids that close a sampled reply which did not close itself, because it was
        cut; none if it did."""
        return [] if ids and ids[-1] in self._closes else list(self._closing_ids)

    def text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Returns a sampled reply as text, without the end token and without what stands before its
        last channel's words."""
        ids = list(ids)
        while ids and ids[-1] in self._ends:
            ids.pop()
        size = len(self._header)
        starts = (
            [i for i in range(len(ids) - size + 1) if ids[i : i + size] == self._header]
            if size
            else []
        )
        if starts:
            ids = ids[starts[-1] + size :]
        shown = ids if special else [i for i in ids if i not in self._unseen]
        return self.tokenizer.decode(shown, clean_up_tokenization_spaces=False)

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """Returns a whole written conversation as (prompt ids, reply ids) per turn.

        Together they are the tokenizer's own ids of what the template makes of the whole, up to the
        token that closes the last reply; messages after that are left out.

        Raises:
            ValueError: the roles do not alternate, no assistant speaks, or text that is not valid
                Unicode.
            TemplateError: the template refuses the conversation, or does not show it in order.
        """
        replies = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if not replies:
            raise ValueError("no assistant message in the conversation")
        messages = list(messages)[: replies[-1] + 1]
        _check_roles(messages)
        if self._drops:
            self._check_kept(*(m.content for m in messages))
        whole = self._rendered(messages, False, tools)
        text, contents = whole.text, sorted(whole.spans)
        turns: list[tuple[list[int], list[int]]] = []
        # One way of reading for the whole, or a reply would begin where two ways part: within the
        # user's message.
        until = whole.spans[replies[-1]][1] + len(self._last_closing)
        apart = self._joined(text, [span for span in contents if span[0] < until], 0, until)[1]
        # Each turn but the first is read from the token that closed the reply before it.
        start = overlap = 0
        for i in replies:
            closing = self._last_closing if i == replies[-1] else self._closing
            end = whole.spans[i][1]
            if end < start or not text.startswith(closing, end):
                raise TemplateError(
                    f"the chat template closes reply {len(turns) + 1} of {len(replies)} with"
                    f" {text[end : end + 40]!r} instead of {closing!r}"
                )
            end += len(closing)
            begin = self._reply_begins(messages, whole, i, tools)
            ids = self._tokenize(text, contents, start, end, apart)
            asked = _alike(ids, self._tokenize(text, contents, start, begin, apart))
            turns.append((ids[overlap:asked], ids[asked:]))
            start, overlap = end - len(closing) + self._closing_start(closing), 1
        if [i for turn in turns for part in turn for i in part] != self._tokenize(
            text, contents, 0, end, apart
        ):
            raise TemplateError(
                "the tokenizer reads the conversation otherwise in one piece than turn by turn: "
                "its end token takes text before it along"
            )
        return turns

    def _reply_begins(
        self,
        messages: Sequence[Message],
        whole: _Rendered,
        i: int,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> int:
        """Returns where in the whole the part begins that the assistant must say itself: after as
        much of the frame as a prompt would hold."""
        frame = whole.text[whole.before[i] : whole.spans[i][0]]
        key = (frame, messages[i - 1].role, bool(tools), i > 1)
        if key not in self._begins:
            _, pieces = self._marked(messages[:i], True, tools)
            self._begins[key] = _alike(frame, pieces[-1])
        return whole.before[i] + self._begins[key]

    def drift(
        self,
        messages: Sequence[Message],
        context: Sequence[int],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> bool:
        """Returns whether the tokenizer, given the template's rendering of the whole conversation,
        has other ids than those trained on.

        It happens with templates that trim or rewrite history, where a sampled reply would be
        tokenized otherwise, and where a message spells a control token.
        """
        return list(context) != self._encode(self._render(messages, generate=True, tools=tools))


@lru_cache(maxsize=64)
def _dated(template: str, today: date) -> str:
    """Answers a template's requests for the present time with one day, since prompts must not
    change at midnight.

    However the template asks, it calls this macro and not the function of that name.
    """
    if "strftime_now" not in template:
        return template
    parts = [
        *(f"%-{c}" for c in "dmyHIMSj"),
        *(f"%{c}" for c in "aAbBcCdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZ"),
    ]
    answers = "".join(f" | replace({part!r}, {today.strftime(part)!r})" for part in parts)
    return (
        f"{{%- macro strftime_now(format) -%}}{{{{ format{answers} }}}}{{%- endmacro -%}}{template}"
    )


def _alike(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Returns how many items two sequences begin with in common."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _places(text: str, token: str, start: int, end: int) -> list[int]:
    """Returns the places where a token is spelled so that at least one of its characters stands in
    text[start:end]."""
    found: list[int] = []
    at = text.find(token, max(0, start - len(token) + 1)) if token else -1
    while 0 <= at < end:
        found.append(at)
        at = text.find(token, at + 1)
    return found


def _check_roles(messages: Sequence[Message]) -> None:
    """Refuses roles that no alternating conversation could have.

    A reply may have made several calls of tools.
    """
    before, replied = "", False
    for message in messages:
        if message.role == "assistant":
            if before == "assistant":
                raise ValueError("two assistant messages follow each other")
            if before not in ("user", "tool"):
                raise ValueError("the assistant speaks before anybody else")
            replied = True
        elif replied and (
            message.role == "system"
            or before not in ("assistant", "tool" if message.role == "tool" else "")
        ):
            raise ValueError(
                f"a {message.role} message follows another one; roles must alternate after the"
                " first reply"
            )
        before = message.role


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' +"
    " '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
