"""Text as token ids, where text from a policy, a person or an environment stays text.

Where it spells a control token it is tokenized in two pieces, cut inside that spelling. Control
tokens are those marked special and those that the template itself puts around messages. Markers,
which the template writes and which are neither (`<tool_call>`), are the assistant's own words, and
are cut in what others say; so are those that begin a call and are marked special
(`<|python_tag|>`), where the template frames no message with them. Other added tokens (line breaks,
runs of spaces, `<think>`) are text like any other.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from ..errors import TemplateError
from ..util.calls import MARKERS

ANCHOR = "\ue000"  # nothing merges with it, so what follows is tokenized as in the middle of a text
PLAIN = "Hello there.\n\nHow are  you, on day 3?"
ANY = (
    "  two\ttabs\n\n\n- \u00fc\u00f1\u00ed\u00e7\u00f6\u0111\u00e9, \u6f22\u5b57,"
    " \u0417\u0434\u0440\u0430, \u0645\u0631\u062d\u0628\u0627, \U0001f642\u200d {x: [1]} `y`"
    " \\ ~ |"
)
SHORT = 512  # characters of a text whose ids are remembered
THOUGHT = re.compile(r"</?think\w*>")  # the assistant's own words, also where a template opens them


class TextEncoder:
    """Reads text as ids in which no content becomes a control token.

    Args:
        tokenizer: a transformers tokenizer.
        frame: all text that the chat template puts around messages.
        writes: whether the chat template's source holds a text.

    Attributes:
        controls: the control tokens that text can spell, by spelling.
        markers: tokens that only the assistant may write, by spelling.
        control_ids: all tokens that no text may become.
        special: all tokens that the tokenizer marks as special.
        drops: whether the tokenizer loses a part of some texts, so that each must be checked.

    Raises:
        TemplateError: the tokenizer loses a part of ordinary text.
    """

    def __init__(self, tokenizer: Any, frame: str, writes: Callable[[str], bool]) -> None:
        self.tokenizer = tokenizer
        # Frames of messages, and what a group of conversations is asked, come again and again.
        self._known = lru_cache(16_384)(self._ids)
        added = tokenizer.added_tokens_decoder
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self.special = frozenset(special)
        calls = {
            i
            for i, token in added.items()
            if token.content in MARKERS and token.content not in frame and writes(token.content)
        }
        self.controls = {
            token.content: i
            for i, token in added.items()
            if i in special - calls
            or (
                token.content in frame
                and token.content.strip()
                and not THOUGHT.fullmatch(token.content)
            )
        }
        self.markers = frozenset(
            token.content
            for token in added.values()
            if token.content not in self.controls
            and token.content.strip()
            and not THOUGHT.fullmatch(token.content)
            and writes(token.content)
        )
        own = [token for token in added.values() if token.content not in self.controls]
        self.drops = any(len(text) == 1 for text in self.controls) or any(
            t.lstrip or t.rstrip for t in own
        )
        self._normalizes = any(added[i].normalized for i in {*self.controls.values(), *calls})
        self._calls = frozenset(calls)
        self.control_ids = frozenset({*self.controls.values(), *special} - calls)
        self.check_kept(PLAIN)  # what loses these loses a part of every conversation
        self.drops = self.drops or not self._keeps(ANY)

    def encode(self, text: str) -> list[int]:
        """Returns the tokenizer's ids of a text, in which control tokens are read as such.

        Raises:
            ValueError: text that is not valid Unicode.
        """
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode: character {error.start + 1} is half a surrogate"
                f" pair, U+{ord(text[error.start]):04X}"
            ) from error
        return list(self._known(text)) if len(text) <= SHORT else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _continue(self, text: str) -> list[int]:
        """Returns the ids of a piece as the tokenizer would give them in the middle of a text (no
        space that some put before every piece)."""
        anchor, ids = self.encode(ANCHOR), self.encode(ANCHOR + text)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self.encode(text)

    def encode_text(self, text: str) -> list[int]:
        """Returns the ids of text that must stay text: no control token is among them, whatever it
        spells.

        Raises:
            ValueError: text that is not valid Unicode.
        """
        return self.tokenize(text, [(0, len(text))])

    def tokenize(
        self,
        text: str,
        contents: Sequence[tuple[int, int]],
        start: int = 0,
        end: int | None = None,
        apart: bool | None = None,
        others: Sequence[tuple[int, int]] = (),
    ) -> list[int]:
        """Returns the ids of text[start:end], in which what stands in `contents` becomes no control
        token.

        Args:
            others: those contents that are not the assistant's: no markers stand in them either.
            apart: whether contents are read character by character; None: where it cannot be had
                otherwise.
        """
        end = len(text) if end is None else end
        spans = [(max(a, start), min(b, end)) for a, b in contents if a < end and b > start]
        if apart is None:
            ids, apart = self.joined(text, spans, start, end, others)
        elif not apart:
            ids, _ = self.joined(text, spans, start, end, others)
        if not apart:
            return ids
        bounds = [start, *(at for span in spans for at in span), end]
        ids = self.encode(text[bounds[0] : bounds[1]])
        for (a, b), (c, d) in zip(spans, zip(bounds[2::2], bounds[3::2], strict=True), strict=True):
            ids = (
                ids
                + [i for character in text[a:b] for i in self._character(character)]
                + self.encode(text[c:d])
            )
        return ids

    def joined(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        start: int,
        end: int,
        others: Sequence[tuple[int, int]] = (),
    ) -> tuple[list[int], bool]:
        """Returns the ids of text[start:end] in as few pieces as control tokens spelled in it
        allow, and whether some content became a control token all the same: the tokenizer rewrites
        text before it looks for tokens."""
        cuts = {
            at + 1 for a, b in spans for token in self.controls for at in _places(text, token, a, b)
        } | {
            at + 1 for a, b in others for token in self.markers for at in _places(text, token, a, b)
        }
        ids = self._pieces(text, sorted(cut for cut in cuts if start < cut < end), start, end)
        if not cuts and not (self._normalizes and spans):
            return ids, False
        bounds = [start, *(at for span in spans for at in span), end]
        frames = [self.encode(text[a:b]) for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
        allowed = [i for frame in frames for i in frame if i in self.control_ids]
        if [i for i in ids if i in self.control_ids] != allowed:
            return ids, True
        return ids, any(
            not self._calls.isdisjoint(
                self._pieces(text, sorted(cut for cut in cuts if a < cut < b), a, b)
            )
            for a, b in ((max(a, start), min(b, end)) for a, b in others if self._calls)
            if a < b
        )

    def _pieces(self, text: str, cuts: Sequence[int], start: int, end: int) -> list[int]:
        bounds = [start, *cuts, end]
        first, *others = [text[a:b] for a, b in pairwise(bounds)]
        return self.encode(first) + [i for piece in others for i in self._continue(piece)]

    def _character(self, character: str) -> list[int]:
        ids = self._continue(character)
        if self.control_ids.isdisjoint(ids):
            return ids
        return self._continue("\ufffd")  # a character that is a control token by itself

    def _keeps(self, text: str) -> bool:
        """Returns whether ids hold all of a text, but for the space around it and for forms that
        Unicode calls compatible."""
        back = self.tokenizer.decode(self.encode_text(text), clean_up_tokenization_spaces=False)
        return (
            unicodedata.normalize("NFKC", back).strip()
            == unicodedata.normalize("NFKC", text).strip()
        )

    def check_kept(self, *texts: str) -> None:
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

    def spells(self, text: str, role: str) -> bool:
        """Returns whether what a role says may spell a token that it must not, so that it has to be
        read with care."""
        refused = [*self.controls, *(() if role == "assistant" else self.markers)]
        return self._normalizes or any(token in text for token in refused if token)

    def defused(self, value: Any) -> Any:
        """Returns schemas of tools in which no string spells a control token or a marker: a space
        is put after the first character of any."""
        if isinstance(value, Mapping):
            return {self.defused(k): self.defused(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.defused(v) for v in value]
        if isinstance(value, str):
            for token in filter(None, (*self.controls, *self.markers)):
                value = value.replace(token, f"{token[0]} {token[1:]}")
        return value

    def last_control(self, text: str) -> int:
        """Returns where the last control token spelled in a text ends; 0 if none is."""
        return max((text.rindex(t) + len(t) for t in self.controls if t and t in text), default=0)

    def last_begins(self, closing: str) -> int:
        """Returns where in a closing its last token begins."""
        return max(closing.rindex(t) for t in self.controls if t and closing.endswith(t))


def _places(text: str, token: str, start: int, end: int) -> list[int]:
    """Returns the places where a token is spelled so that at least one of its characters stands in
    text[start:end]."""
    found: list[int] = []
    at = text.find(token, max(0, start - len(token) + 1)) if token else -1
    while 0 <= at < end:
        found.append(at)
        at = text.find(token, at + 1)
    return found
