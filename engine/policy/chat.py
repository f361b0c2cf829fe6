"""Conversations as token ids, by the tokenizer's own chat template.

A sampled conversation only ever grows: the first prompt is rendered once, and every later
observation is a *suffix*, the text that the template puts between a reply and the next one. Sampled
ids are never decoded and tokenized again. A conversation that was *written* (a demonstration, a
preference) is rendered whole, as the template shows finished conversations: its ids are the
tokenizer's own. The reply is all that stands after the prompt that a policy would be given.

Two things stand below it: the template, which shows a conversation as text (template.py), and the
encoder, which reads text as ids so that no content becomes a control token (encoding.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import date
from typing import Any

from ..errors import TemplateError
from ..records.episode import Message
from .encoding import TextEncoder
from .template import MARK, Rendered, Template, alike


class ChatFormat:
    """The format of a chat template: renders prompts, suffixes and written conversations as ids.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        stop_ids: further tokens that end a reply, as the model's generation config names them.
        today: the day that templates which write a date are given; default: the day this is made.

    Attributes:
        template: what the template makes of messages, as text.
        encoder: reads text as ids.
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
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, today or date.today())
        frame = self.template.frame()
        self.encoder = TextEncoder(tokenizer, frame, self.template.writes)
        self._begins: dict[tuple[str, str, bool, bool], int] = {}
        self._closing, self._last_closing = self._closings()
        closing = self.encoder.encode(self._closing)
        last = self.encoder.encode(self._last_closing)
        self._closing_ids: list[int] = closing
        self.end_id: int = (closing if last[: len(closing)] == closing else last)[-1]
        eos = tokenizer.eos_token_id
        self.stop_ids = frozenset({self.end_id, *stop_ids, *([] if eos is None else [eos])})
        self._closes = {i for i in self.stop_ids if i == closing[-1] or self._shows(i)}
        self._ends = self.stop_ids | self.encoder.control_ids.intersection([*closing, *last])
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
        self._unseen = (self.encoder.special & self.encoder.control_ids) - {
            i
            for text, i in self.encoder.controls.items()
            if i not in named and text not in frame and self.template.writes(text)
        }
        probe = [Message("user", "x"), Message("assistant", "y")]
        self.conversation([*probe, *probe])  # what cannot be laid out is refused now

    def _closings(self) -> tuple[str, str]:
        """Returns the text that the template writes after a reply that is followed by a message,
        and after the last one of a finished conversation.

        Both end with a control token: after it the policy has nothing more to say.
        """
        probe = [Message("user", "x"), Message("assistant", "x"), Message("user", "x")]
        middle = self.template.marked(probe, True, None)[1][2]
        end = self.template.marked(probe[:2], False, None)[1][2]
        last = end[: self.encoder.last_control(end)]
        if not last or not any(
            end.startswith(token) for token in filter(None, self.encoder.controls)
        ):
            raise TemplateError(
                f"the chat template closes a reply with {(end or middle)[:40]!r}, which is no token"
                " of its own, so the policy cannot say that it is done. Use a template whose"
                " assistant turns end in a special token."
            )
        both = end[: alike(end, middle)]
        if self.encoder.last_control(both):
            return both[: self.encoder.last_control(both)], last
        first = max(
            (t for t in self.encoder.controls if t and middle.startswith(t)), key=len, default=""
        )
        if not first:
            raise TemplateError(
                f"the chat template closes the last reply with {last!r} and an earlier one with"
                f" {middle[:40]!r}, which is no token of its own"
            )
        return first, last

    def _shows(self, token: int) -> bool:
        """Returns whether the template itself ever closes a reply with this token (a call of a
        tool, perhaps)."""
        text = self.tokenizer.convert_ids_to_tokens(token)
        return self._last_closing.startswith(text) or self.template.writes(text)

    def _channel(self) -> list[int]:
        """Returns the ids that stand before the words for the other side where replies have
        channels; none elsewhere."""
        probe = [Message("user", "x"), Message("assistant", "y")]
        whole = self.template.located(probe, False, None)
        header = whole.text[self._reply_begins(probe, whole, 1, None) : whole.spans[1][0]]
        ids = self.encoder.encode(header)
        return ids if ids and ids[0] in self.encoder.control_ids else []

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Returns the ids of a conversation up to where the assistant speaks next.

        Raises:
            TemplateError: the template refuses the conversation.
            ValueError: text that is not valid Unicode.
        """
        messages, tools = self.template.prepared(messages, self.encoder.defused(tools))
        if self.encoder.drops:
            self.encoder.check_kept(*(m.content for m in messages))
        if not any(self.encoder.spells(m.content, m.role) for m in messages):
            return self.encoder.encode(self.template.render(messages, generate=True, tools=tools))
        whole = self.template.located(messages, True, tools)
        return self.encoder.tokenize(
            whole.text, sorted(whole.spans), others=_others(messages, whole)
        )

    def suffix(
        self, observation: Message, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Returns the ids between the end token of one reply and the first token of the next: the
        observation and its frame.

        Args:
            tools: those that the conversation began with; templates may look at them again.
        """
        observed, _ = self.template.prepared([observation], None)
        tools = self.encoder.defused(tools) if self.template.lists_tools else None
        if self.encoder.drops:
            self.encoder.check_kept(*(m.content for m in observed))
        mark = MARK.format(5)
        messages = [Message("user", "x"), Message("assistant", mark), *observed]
        others: list[tuple[int, int]] = []
        if any(self.encoder.spells(m.content, m.role) for m in observed):
            whole = self.template.located(messages, True, tools)
            text, spans, start = whole.text, sorted(whole.spans), whole.spans[1][1]
            others = _others(messages, whole)
        else:
            text, spans = self.template.render(messages, generate=True, tools=tools), []
            # The first is ours: what comes after it may spell the mark too.
            start = text.find(mark) + len(mark)
        if not text.startswith(self._closing, start):
            raise TemplateError(
                f"the chat template closes a reply before a {observation.role} message with "
                f"{text[start : start + 40]!r}, and else with {self._closing!r}"
            )
        # The end token is tokenized along, since some take what follows it with them, and then left
        # out.
        begin = start + self.encoder.last_begins(self._closing)
        return self.encoder.tokenize(text, spans, begin, others=others)[1:]

    def reply(self, text: str) -> list[int]:
        """Returns the ids of a reply that was not sampled, alone: its text as text, and the closing
        of a reply that is followed by a message."""
        return [*self.encoder.encode_text(text), *self._closing_ids]

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
        _check_roles(messages[: replies[-1] + 1])
        own = {id(messages[i]) for i in replies}
        messages, tools = self.template.prepared(
            messages[: replies[-1] + 1], self.encoder.defused(tools)
        )
        # A part of an observation may be an assistant's words that somebody else wrote.
        replies = [i for i, m in enumerate(messages) if id(m) in own]
        if self.encoder.drops:
            self.encoder.check_kept(*(m.content for m in messages))
        whole = self.template.located(messages, False, tools)
        text, contents, others = whole.text, sorted(whole.spans), _others(messages, whole)
        turns: list[tuple[list[int], list[int]]] = []
        # One way of reading for the whole, or a reply would begin where two ways part: within the
        # user's message.
        until = whole.spans[replies[-1]][1] + len(self._last_closing)
        apart = self.encoder.joined(text, [span for span in contents if span[0] < until], 0, until)[
            1
        ]
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
            ids = self.encoder.tokenize(text, contents, start, end, apart, others)
            asked = alike(ids, self.encoder.tokenize(text, contents, start, begin, apart, others))
            turns.append((ids[overlap:asked], ids[asked:]))
            start, overlap = end - len(closing) + self.encoder.last_begins(closing), 1
        if [i for turn in turns for part in turn for i in part] != self.encoder.tokenize(
            text, contents, 0, end, apart, others
        ):
            raise TemplateError(
                "the tokenizer reads the conversation otherwise in one piece than turn by turn: "
                "its end token takes text before it along"
            )
        return turns

    def _reply_begins(
        self,
        messages: Sequence[Message],
        whole: Rendered,
        i: int,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> int:
        """Returns where in the whole the part begins that the assistant must say itself: after as
        much of the frame as a prompt would hold."""
        frame = whole.text[whole.before[i] : whole.spans[i][0]]
        key = (frame, messages[i - 1].role, bool(tools), i > 1)
        if key not in self._begins:
            _, pieces = self.template.marked(messages[:i], True, tools)
            self._begins[key] = alike(frame, pieces[-1])
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
        messages, tools = self.template.prepared(messages, self.encoder.defused(tools))
        whole = self.template.render(messages, generate=True, tools=tools)
        return list(context) != self.encoder.encode(whole)


def _others(messages: Sequence[Message], whole: Rendered) -> list[tuple[int, int]]:
    """Returns where contents stand that are not the assistant's."""
    return [span for m, span in zip(messages, whole.spans, strict=True) if m.role != "assistant"]


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
