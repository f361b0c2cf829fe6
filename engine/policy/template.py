"""A chat template: conversations as text, and where in it each message stands.

A message's place is found by rendering the conversation with marks instead of contents, so that it
is found however the template frames, trims or rewrites a message.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

from ..errors import TemplateError
from ..records.episode import Message

TOOLS = """\
You have tools. Here is the schema of each:
{schemas}

To use one, write nothing but a call, or several, in this form:
<tool_call>
{{"name": "the tool's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>
The next message is what it returned."""
MARK = "\ue000{}\ue001"  # private-use characters: in no template and no vocabulary of words


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the template renders it.

    Attributes:
        text: all of it.
        spans: where in it each message's content stands, (start, end) by message.
        before: where the frame before each content begins: the end of the content before it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    before: tuple[int, ...]


class Template:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        today: the day that templates which write a date are given.

    Attributes:
        system: how a system prompt is given: "own" (as a message) or "first" (within the first
            user turn).
        results: the role that results of tools have: "tool", or "user" where the template has no
            such role, asks for more than text, or would show them as replies.
        lists_tools: whether it shows the schemas of tools; else `TOOLS` does, in the system prompt.

    Raises:
        TemplateError: the tokenizer has no template.
    """

    def __init__(self, tokenizer: Any, today: date) -> None:
        if not tokenizer.chat_template:
            raise TemplateError(
                "the tokenizer has no chat template, so it is unknown how a conversation becomes"
                " tokens. Use a chat or instruct model, or set one (`policy: {model: ...,"
                " chat_template: chatml}`) for a model that you will fine-tune first."
            )
        self.tokenizer, self.today = tokenizer, today
        self.system = self._system_style()
        self.results = self._results_role()
        self.lists_tools = self._lists_tools()

    def _system_style(self) -> str:
        """Finds how the template takes a system prompt, see `system`."""
        messages = [{"role": "system", "content": MARK.format(9)}, {"role": "user", "content": "x"}]
        try:
            text = self._template(messages, True, None)
        # templates refuse by raise_exception, which is jinja's TemplateError or anything else
        except Exception:
            return "first"
        return "own" if MARK.format(9) in text else "first"

    def _results_role(self) -> str:
        """Finds the role that results of tools have, see `results`."""
        marks = [MARK.format(i) for i in range(6)]
        roles = ("user", "assistant", "tool", "tool", "assistant", "tool")
        messages = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
        try:
            text = self._template(messages, True, None)
        # as above; templates that look for a call before its result find none
        except Exception:
            return "user"
        if any(text.count(mark) != 1 for mark in marks):
            return "user"
        # Templates that know users only show all others as the assistant's replies.
        again, then = text.split(marks[2])[1].split(marks[3])[0], text.split(marks[3])[1]
        return "tool" if again != then.split(marks[4])[0] else "user"

    def _lists_tools(self) -> bool:
        """Finds whether the template shows schemas of tools."""
        name = MARK.format(7)
        schema = {"name": name, "description": "", "parameters": {"type": "object"}}
        messages = [{"role": "user", "content": "x"}]
        try:
            text = self._template(messages, True, [{"type": "function", "function": schema}])
        except Exception:  # it takes none
            return False
        return name in text or json.dumps(name)[1:-1] in text

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
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=generate,
        )

    def prepared(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[list[Message], Sequence[Mapping[str, Any]] | None]:
        """Returns messages and tools in the form that the template can show: a message that has
        parts as one for each, results of tools in the role that they have here, and the schemas of
        tools in the system prompt, where the template would not show them."""
        found: list[Message] = []
        for message in (part for whole in messages for part in whole.unjoined):
            if message.role != "tool" or self.results == "tool":
                found.append(message)
            elif found and found[-1].role == "tool":
                found[-1] = Message("tool", f"{found[-1].content}\n\n{message.content}")
            else:
                found.append(Message("tool", message.content))
        if self.results != "tool":
            found = [Message("user", m.content) if m.role == "tool" else m for m in found]
        if not tools or self.lists_tools:
            return found, tools
        listed = TOOLS.format(schemas="\n".join(json.dumps(tool) for tool in tools))
        if found and found[0].role == "system":
            listed = f"{found.pop(0).content}\n\n{listed}"
        return [Message("system", listed), *found], None

    def render(
        self,
        messages: Sequence[Message],
        *,
        generate: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Returns the text that the template makes of messages.

        Args:
            messages: of the conversation so far.
            generate: end where the assistant speaks next.
            tools: schemas of the tools that it may call.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        plain = [{"role": m.role, "content": m.content} for m in messages]
        if self.system == "first" and plain and plain[0]["role"] == "system":
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
                f" {type(error).__name__}: {error}"
            ) from error

    def marked(
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
        text = self.render(shown, generate=generate, tools=tools)
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

    def located(
        self, messages: Sequence[Message], generate: bool, tools: Sequence[Mapping[str, Any]] | None
    ) -> Rendered:
        """Renders messages and finds where each content stands, however the template trims or
        rewrites it.

        Raises:
            TemplateError: what the template makes of a message depends on the words of another one.
        """
        text = self.render(messages, generate=generate, tools=tools)
        order, frames = self.marked(messages, generate, tools)
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
        return Rendered(text, tuple(spans), tuple(before))

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
                self.marked(messages, generate, tools, i)[1][place],
                frames[place],
                frames[place + 1],
            )
            head = alike(piece, left)
            rest = piece[head:]
            tail = alike(rest[::-1], right[::-1])
            contents.append(rest[: len(rest) - tail])
            if head < len(left):
                shown[place] = left[:head]
            if tail < len(right):
                shown[place + 1] = right[len(right) - tail :]
        return shown, contents

    def frame(self) -> str:
        """Returns the text that the template puts around messages, without any of what it lets the
        assistant say."""
        probe = [Message("user", "x"), Message("assistant", "x"), Message("user", "x")]
        pieces: list[str] = []
        for opening in ([Message("system", "x")], []) if self.system == "own" else ([],):
            _, frames = self.marked([*opening, *probe], True, None)
            written = self.marked([*opening, *probe[:2]], False, None)[1][len(opening) + 1]
            asked, written_again = frames[-1], frames[-3]
            pieces += [
                *frames[:-3],
                frames[-2],
                asked[: min(alike(asked, written), alike(asked, written_again))],
            ]
            if opening:
                continue
            with contextlib.suppress(TemplateError):  # no tool role
                *_, opens, closes = self.marked(
                    [*probe, probe[1], Message("tool", "x")], True, None
                )[1]
                pieces += [opens, closes[: len(closes) - alike(closes[::-1], asked[::-1])]]
        return "\n".join(pieces)

    def writes(self, text: str) -> bool:
        """Returns whether the template's source holds a text."""
        source = self.tokenizer.chat_template
        return any(
            text in one for one in (source.values() if isinstance(source, dict) else [source])
        )


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


def alike(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Returns how many items two sequences begin with in common."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' +"
    " '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
