"""Conversations as token ids, by the tokenizer's own chat template.

A conversation only ever grows: the first prompt is rendered once, and every later observation is a *suffix*, the text that the
template puts between a reply and the next one. Sampled ids are never decoded and tokenized again.

Text from a policy or an environment stays text: where it spells a control token of the tokenizer, it is tokenized in pieces
so that it cannot become one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..episode import Message

MARK = "\ue000{}\ue001"  # private-use characters: in no template and no vocabulary of words


class TemplateError(ValueError):
    """The tokenizer's chat template cannot carry a multi-turn conversation. The message says what to do."""


class ChatFormat:
    """Renders prompts and suffixes as ids.

    Args:
        tokenizer: a transformers tokenizer with a chat template.

    Raises:
        TemplateError: no template, or one that does not close an assistant's turn with a token of its own.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError(
                "the tokenizer has no chat template, so it is unknown how a conversation becomes tokens. Use a chat or "
                "instruct model, or set one: Policy.from_pretrained(..., chat_template=turnwise.CHATML) for a model that "
                "you will fine-tune first."
            )
        self._added: dict[str, int] = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        self.control_ids = frozenset(self._added.values())
        self._system = self._system_style()
        probe = self._render([Message("user", MARK.format(0)), Message("assistant", MARK.format(1))], generate=False)
        closing = self._after(probe, MARK.format(1))
        ids = self._encode(closing)
        if not ids or ids[0] not in self.control_ids:
            raise TemplateError(
                f"the chat template closes a reply with {closing[:40]!r}, which is no token of its own, so the policy cannot "
                "say that it is done. Use a template whose assistant turns end in a special token."
            )
        self.end_id: int = ids[0]
        self._end_text = next(text for text, token_id in self._added.items() if token_id == self.end_id)

    # What the template makes of messages, as text.

    def _system_style(self) -> str:
        """How the template takes a system prompt: "own" (as a message) or "first" (within the first user turn)."""
        try:
            text = self._template([{"role": "system", "content": MARK.format(9)}, {"role": "user", "content": "x"}], True, None)
        except Exception:  # templates refuse by raise_exception, which is jinja's TemplateError or anything else
            return "first"
        return "own" if MARK.format(9) in text else "first"

    def _template(self, messages: list[dict[str, str]], generate: bool, tools: Sequence[Mapping[str, Any]] | None) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=[self._defused(tool) for tool in tools] if tools else None,
            tokenize=False,
            add_generation_prompt=generate,
        )

    def _defused(self, value: Any) -> Any:
        """A tool schema in which no string spells a control token: a space is put after the first character of any."""
        if isinstance(value, Mapping):
            return {self._defused(k): self._defused(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._defused(v) for v in value]
        if isinstance(value, str):
            for token in filter(None, self._added):
                value = value.replace(token, f"{token[0]} {token[1:]}")
        return value

    def _render(self, messages: Sequence[Message], *, generate: bool, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
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
                f"the chat template refuses a conversation with roles {roles}: {type(error).__name__}: {error}. "
                "If it has no tool role, let the environment say role 'user'."
            ) from error

    def _after(self, text: str, mark: str) -> str:
        if text.count(mark) != 1:
            raise TemplateError(
                f"the chat template shows a reply {text.count(mark)} times instead of once, so its history cannot be appended to"
            )
        return text.split(mark)[1]

    # Ids.

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def encode_text(self, text: str) -> list[int]:
        """Ids of text that must stay text: no control token is among them, whatever it spells."""
        if not text:
            return []
        ids = self._encode(text)
        if self.control_ids.isdisjoint(ids):
            return ids
        # Cut inside every spelled-out control token, so that no piece holds a whole one.
        pieces = [text]
        for token in sorted(filter(None, self._added), key=len, reverse=True):
            cut: list[str] = []
            for piece in pieces:
                parts = piece.split(token)
                for i, part in enumerate(parts):
                    if i:
                        cut[-1] += token[:1]
                        part = token[1:] + part
                    cut.append(part)
            pieces = cut
        ids = [i for piece in pieces for i in self._encode(piece)]
        if not self.control_ids.isdisjoint(ids):  # one character that is a control token, or a tokenizer that normalises first
            ids = [i for character in text for i in self._encode(character) if i not in self.control_ids]
        return ids

    def _ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, cut_at: str | None) -> list[int]:
        """Renders messages (all of it, or what follows `cut_at`) and tokenizes it, contents as mere text.

        Usually that is the tokenizer's own reading of the rendered text. Only where a content spells a control token is it
        tokenized piece by piece; a template's own tokens are then told from the content's by marks.
        """

        def part(contents: Sequence[str]) -> str:
            shown = [Message(m.role, c) for m, c in zip(messages, contents, strict=True)]
            text = self._render(shown, generate=True, tools=tools)
            # The first occurrence is ours: what comes after it may spell the mark too.
            return text.split(cut_at, 1)[1].removeprefix(self._end_text) if cut_at else text

        plain = [m.content for m in messages]
        first = plain.index(cut_at) + 1 if cut_at else 0
        if not any(token in content for content in plain[first:] for token in self._added if token):
            return self._encode(part(plain))
        ids: list[int] = []
        marks = [MARK.format(i + 10) for i in range(first, len(plain))]
        rest = part([*plain[:first], *marks])
        for mark, content in zip(marks, plain[first:], strict=True):
            before, found, rest = rest.partition(mark)
            if not found:
                raise TemplateError("the chat template rewrites or drops a message, so a control token in it cannot be escaped")
            ids += self._encode(before) + self.encode_text(content)
        return ids + self._encode(rest)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Ids of a conversation up to where the assistant speaks next."""
        return self._ids(messages, tools, None)

    def suffix(self, observation: Message) -> list[int]:
        """Ids between the end token of one reply and the first token of the next: the observation and its frame."""
        mark = MARK.format(5)
        return self._ids([Message("user", "x"), Message("assistant", mark), observation], None, mark)

    def reply(self, text: str) -> list[int]:
        """Ids of a reply that was not sampled (a demonstration), its end token included."""
        return [*self.encode_text(text), self.end_id]

    def text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """A sampled reply as text, without the end token."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=not special)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a reply: the template's end token, and the tokenizer's end of sequence."""
        eos = self.tokenizer.eos_token_id
        return frozenset({self.end_id} | ({eos} if eos is not None else set()))

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """A whole written conversation as (prompt ids, reply ids) per turn, laid out just as a sampled one.

        Messages after the last reply are left out.

        Raises:
            ValueError: the roles do not alternate, or no assistant speaks.
        """
        turns: list[tuple[list[int], list[int]]] = []
        opening: list[Message] = []
        heard: Message | None = None
        for message in messages:
            if message.role != "assistant":
                if turns and (heard is not None or message.role == "system"):
                    raise ValueError(
                        f"a {message.role} message follows another one; roles must alternate after the first reply"
                    )
                if turns:
                    heard = message
                else:
                    opening.append(message)
                continue
            if not turns:
                if not any(m.role in ("user", "tool") for m in opening):
                    raise ValueError("the assistant speaks before anybody else")
                turns.append((self.prompt(opening, tools), self.reply(message.content)))
            elif heard is None:
                raise ValueError("two assistant messages follow each other")
            else:
                turns.append((self.suffix(heard), self.reply(message.content)))
                heard = None
        if not turns:
            raise ValueError("no assistant message in the conversation")
        return turns

    def drift(
        self, messages: Sequence[Message], context: Sequence[int], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> bool:
        """Whether the template, given the whole conversation anew, would render other ids than those trained on.

        It happens with templates that trim or rewrite history, and where a sampled reply would be tokenized otherwise.
        """
        return list(context) != self.prompt(messages, tools)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
