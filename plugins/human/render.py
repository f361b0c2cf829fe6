"""Messages as HTML that can do nothing: no tag, no link that acts, no picture that is fetched, no character that reorders the page.

A policy writes whatever earns it reward, also what would steer the page of those who judge it. Markdown is rendered without HTML; links
show where they lead; images become their description; control characters (ANSI, NUL, right-to-left overrides) become visible signs. Nor can
anything be said to a judge that people do not see: what Markdown would swallow is shown, or else the message is, as plain text.
The Content-Security-Policy of the service would stop what got through.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from html import escape, unescape
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt

from ...engine.episode import Message

LONG = 10_000  # characters beyond which a message is shown as plain text, folded
WIDE = 40  # columns beyond which a table is
_TAGS = re.compile(r"<[^>]*>")
_BIDI = {c: f"⟨U+{c:04X}⟩" for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)}
_CONTROL = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {0x7F: "\u2421"}
_CONTROL |= dict.fromkeys(range(128, 160), "�")
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def visible(text: str) -> str:
    """Text whose control and direction characters are signs of themselves; line breaks of any kind become newlines."""
    text = _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))
    return text.translate(_BIDI | _CONTROL)


def plain(message: Message) -> str:
    """The text as it is, line breaks kept."""
    return f'<div class="plain" dir="auto">{escape(visible(message.content))}</div>'


def markdown(message: Message) -> str:
    """Markdown without HTML. Very long messages and very wide tables are shown as plain text: nobody reads their markup."""
    text = message.content
    if len(text) > LONG or any(line.count("|") > WIDE for line in text.split("\n")):
        return plain(message)
    html = _rich(text)
    return html if html is not None else plain(message)


@lru_cache(1000)
def _rich(text: str) -> str | None:
    """None: something of the text would not be seen."""
    html = str(_PARSER.render(visible(text))).translate(_BIDI)
    if _letters(visible(text)) - _letters(unescape(_TAGS.sub("", html))):
        return None
    return f'<div class="rich" dir="auto">{html}</div>'


def _letters(text: str) -> Counter[str]:
    """What must not get lost; numbers of lists do, and are counted anew."""
    return Counter(c for c in text if c.isalpha())


def _link(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    """An address is shown, not followed: raters should not be led anywhere."""
    token = tokens[index]
    if token.nesting == 1:
        env.setdefault("links", []).append(_where(token, "href"))
        return '<span class="link">'
    return f'</span> <span class="address">({escape(env["links"].pop())})</span>'


def _where(token: Any, attribute: str) -> str:
    """An address as it was written, with its title."""
    return " ".join(str(part) for part in (unquote(str(token.attrGet(attribute) or "")), token.attrGet("title")) if part)


def _image(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    return f'<span class="address">[{escape(token.content)} ({escape(_where(token, "src"))})]</span>'


def _fence(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    info = f'<div class="address">{escape(token.info.strip())}</div>' if token.info.strip() else ""
    return f"{info}<pre><code>{escape(token.content)}</code></pre>\n"


def _cell(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    """Without the style that says how it is aligned: the service lets no inline style in."""
    return f"<{tokens[index].tag}>"


def _heading(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    """The page's own headings stay its only ones, for those who find their way by them."""
    return f'<p class="heading {tokens[index].tag}">' if tokens[index].nesting == 1 else "</p>"


_PARSER = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": 60}).enable("table").enable("strikethrough")
_PARSER.disable(["reference", "entity"])
_PARSER.add_render_rule("link_open", _link)
_PARSER.add_render_rule("link_close", _link)
_PARSER.add_render_rule("image", _image)
_PARSER.add_render_rule("fence", _fence)
_PARSER.add_render_rule("th_open", _cell)
_PARSER.add_render_rule("td_open", _cell)
_PARSER.add_render_rule("heading_open", _heading)
_PARSER.add_render_rule("heading_close", _heading)


def make_markdown() -> Callable[[Message], str]:
    return markdown


def make_plain() -> Callable[[Message], str]:
    return plain


def instructions(text: str) -> str:
    """A lead's own Markdown: the same rules."""
    return str(_PARSER.render(visible(text))).translate(_BIDI)
