"""Renders messages as HTML that can do nothing and hide nothing: the page shows the message, sign
by sign.

A policy writes whatever earns it reward, also what would steer the page of those who judge it, or
what only an AI judge would read. So Markdown styles a message and takes nothing away: `**bold**` is
bold and keeps its stars, a fence is set like code with its backticks and language, links show where
they lead as they were written, lists keep their numbers, tables their pipes. The text of the HTML
is the text of the message (`visible`), white space included. Invisible characters (control and
direction characters, zero width, tags) become visible signs. The Content-Security-Policy of
the service would stop what got through.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from html import escape
from typing import Any

from markdown_it import MarkdownIt

from ....protocols import Message

LONG = 10_000  # characters beyond which a message is shown as plain text, folded
WIDE = 40  # columns beyond which a table is
_CONTROL = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {0x7F: "\u2421"}
_CONTROL |= dict.fromkeys(range(128, 160), "�") | dict.fromkeys(range(0xD800, 0xE000), "�")
_PRINTED = {
    0x600,
    0x601,
    0x602,
    0x603,
    0x604,
    0x605,
    0x6DD,
    0x70F,
    0x890,
    0x891,
    0x8E2,
    0x110BD,
    0x110CD,
}  # format characters with a shape
_BLANK = {
    0x34F,
    0x115F,
    0x1160,
    0x17B4,
    0x17B5,
    0x2800,
    0x3164,
    0xFFA0,
    0x2065,
    0x1D159,
    *range(0xFFF0, 0xFFF9),
    0x2028,
    0x2029,
    *range(0x180B, 0x1810),
    *range(0xE0000, 0xE1000),
}
# Invisible characters that carry meaning: a joiner after a letter of a script that joins, or
# between emoji; a selector after what it selects a form of, in the ranges that Unicode has forms
# for.
_JOINING = (
    "\u0600-\u0dff\u0f00-\u109f\u1780-\u18af\ua8e0-\ua8ff\ua980-\ua9ff\uaa60-\uaa7f\ufb50-\ufdff\ufe70-\ufefc"
    "\U00010ac0-\U00010aff\U00010d00-\U00010d3f\U00011000-\U00011fff\U0001e900-\U0001e95f"
)
_EMOJI = (
    "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2194-\u2199\u21a9\u21aa\u231a\u231b\u2328\u23cf\u23e9-\u23fa\u24c2\u25aa\u25ab\u25b6"
    "\u25c0\u25fb-\u25fe\u2600-\u27bf\u2934\u2935\u2b05-\u2b07\u2b1b\u2b1c\u2b50\u2b55\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
)
_SHAPING = re.compile(
    f"((?<=[{_JOINING}])[\u200c\u200d]|(?<=[{_EMOJI}\ufe0f])\u200d(?=[{_EMOJI}])|(?<=[0-9#*])\ufe0f(?=\u20e3)|(?<=[{_EMOJI}])[\ufe0e\ufe0f]"
    "|(?<=[\u2200-\u22ff\u2a00-\u2aff])\ufe00|(?<=[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])[\ufe00-\ufe02])"
    "|[\u200c\u200d\ufe00-\ufe0f]"
)

_SPAN = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
# `$...$`: stars in formulas multiply.
_PLAIN = re.compile(r"\\[!-/:-@\[-`{-~]|(?<=\w)[*~]+(?=\w)|`+|\$[^$\n]+\$")


def visible(text: str) -> str:
    r"""Returns a text in which everything can be seen: control, direction and zero-width characters
    become visible signs; `\r\n` becomes `\n`."""
    text = text.replace("\r\n", "\n").translate(_CONTROL)
    if text.isascii():
        return text
    text = _SHAPING.sub(lambda found: found[1] or _code(found[0]), text)
    return "".join(_code(c) if _is_unseen(c) else c for c in text)


def _is_unseen(character: str) -> bool:
    code = ord(character)
    if code in _BLANK:
        return True
    return (
        unicodedata.category(character) == "Cf"
        and code not in _PRINTED
        and character not in "\u200c\u200d"
    )


def _code(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"


def plain(message: Message) -> str:
    """Renders the text as it is, line breaks kept."""
    return f'<div class="plain" dir="auto">{escape(visible(message.content))}</div>'


def markdown(message: Message) -> str:
    """Renders the text as it is, styled as Markdown would be.

    Very long messages and very wide tables stay plain: their markup is of no use to a reader.
    """
    text = visible(message.content)
    if len(text) > LONG or any(line.count("|") > WIDE for line in text.split("\n")):
        return plain(message)
    return _styled(text)


@lru_cache(1000)
def _styled(text: str) -> str:
    """Styles lines of code, headings and running text, each as written; running text within its
    paragraph."""
    lines = text.split("\n")
    out: list[str] = []
    done = 0
    for kind, first, last in _parts(text):
        out += [escape(line) + "\n" for line in lines[done:first]]
        source = "\n".join(lines[first:last])
        if kind == "code":
            out.append(f'<code class="block">{escape(source)}\n</code>')
        elif kind == "heading":
            out.append(f'<b class="heading">{_inline(source)}</b>\n')
        else:
            out.append(_inline(source) + "\n")
        done = last
    out += [escape(line) + "\n" for line in lines[done:]]
    return f'<div class="rich" dir="auto">{_without_last_break("".join(out))}</div>'


def _without_last_break(html: str) -> str:
    """Removes the line break after the last line: every line was ended, but the message's last was
    not."""
    return html[:-8] + "</code>" if html.endswith("\n</code>") else html[:-1]


def _parts(text: str) -> list[tuple[str, int, int]]:
    """Returns parts as kind (code, heading, text), first line and line after the last, in order,
    none overlapping."""
    found: list[tuple[str, int, int]] = []
    kinds = {
        "fence": "code",
        "code_block": "code",
        "table_open": "code",
        "heading_open": "heading",
        "paragraph_open": "text",
    }
    done = 0
    for token in _BLOCKS.parse(text):
        if token.type in kinds and token.map and token.map[0] >= done:
            first, last = token.map
            found.append((kinds[token.type], first, last))
            done = last
    return found


def _inline(text: str) -> str:
    return str(_INLINE.renderInline(text))


def _as_written(state: Any, silent: bool) -> bool:
    """Keeps code with its backticks, an escaped sign with its backslash, and signs within a word or
    between digits, which are no emphasis."""
    text, at = state.src, state.pos
    if found := _SPAN.match(text, at):
        if not silent:
            state.push("code_inline", "code", 0).content = found[0]
    elif not (found := _PLAIN.match(text, at)):
        return False
    elif not silent:
        state.pending += found[0]
    state.pos = found.end()
    return True


def _code_inline(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    return f"<code>{escape(tokens[index].content)}</code>"


def _opening(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    return f"<{tokens[index].tag}>{tokens[index].markup}"


def _closing(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    return f"{tokens[index].markup}</{tokens[index].tag}>"


def _heading(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    """Renders a heading as styled text: the page's own headings stay its only ones, for readers who
    navigate by them."""
    return f'<p class="heading {tokens[index].tag}">' if tokens[index].nesting == 1 else "</p>"


def _cell(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    """Renders a cell without its alignment style: the service allows no inline style."""
    return f"<{tokens[index].tag}>"


_BLOCKS = (
    MarkdownIt("commonmark", {"html": False, "maxNesting": 20})
    .enable("table")
    .disable(["inline", "reference", "html_block"])
)
# No rule that removes a sign.
_INLINE = MarkdownIt("zero").enable(["emphasis", "strikethrough", "balance_pairs"])
_INLINE.inline.ruler.before("emphasis", "as_written", _as_written)
_INLINE.add_render_rule("code_inline", _code_inline)
for _name in ("strong", "em", "s"):
    _INLINE.add_render_rule(f"{_name}_open", _opening)
    _INLINE.add_render_rule(f"{_name}_close", _closing)

_LEAD = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
_LEAD.disable(["link", "image", "autolink", "reference", "entity"])
_LEAD.add_render_rule("heading_open", _heading)
_LEAD.add_render_rule("heading_close", _heading)
_LEAD.add_render_rule("th_open", _cell)
_LEAD.add_render_rule("td_open", _cell)


def make_markdown() -> Callable[[Message], str]:
    """Returns the renderer `markdown`."""
    return markdown


def make_plain() -> Callable[[Message], str]:
    """Returns the renderer `plain`."""
    return plain


def instructions(text: str) -> str:
    """Renders a lead's own Markdown; links show where they lead."""
    return str(_LEAD.render(visible(text)))
