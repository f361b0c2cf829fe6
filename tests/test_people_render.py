"""What a rater reads is what was said: the text of the page is the text of the message, sign by
sign."""

from __future__ import annotations

import gc
import re
import time
from html import unescape

import pytest
import turnwise
from hypothesis import example, given, settings
from hypothesis import strategies as st
from turnwise.plugins.human.web.render import markdown, plain, visible


def html(text: str) -> str:
    return markdown(turnwise.Message("assistant", text))


def seen(text: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html(text)))


SIGNS = [
    *"*_~`#>-+=.)(|:[]!\\&;<\"'^$ \n\t17aé",
    "**",
    "```",
    "~~~",
    "    ",
    "| a |\n|--|\n",
    "[x]: y\n",
    "&amp;",
    "1. ",
    "👩\u200d💻",
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(SIGNS), max_size=60).map("".join) | st.text(max_size=80))
@example("1) one\n7) seven\n\n# Head ##\n\nT\n===\n")
@example("[x]: http://a 'b'\n[x](http://c \"d\") ![i](j) <http://k> &amp; &#72;")
@example("a  \nb\\\nc\n    code\n\n\tcode\n```py x\n  in\n```")
@example("|a|\n|:-:|\n|b|c|\n\n> q\n> > r\nlazy\n***\n- [ ] task")
def test_the_page_holds_every_sign_of_the_message(text: str) -> None:
    assert seen(text) == visible(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("**b** and _i_", "<strong>**b**</strong> and <em>_i_</em>"), ("~~50~~ 40", "<s>~~50~~</s> 40"), ("2*3*4 = 24", "2*3*4 = 24"),  # noqa: E501
        ("2**3**2", "2**3**2"), ("`a*b*` c", "<code>`a*b*`</code> c"), (r"\*a\*", r"\*a\*"), ("$x^*(b) = a^*$", "$x^*(b) = a^*$"),  # noqa: E501
        ("# Head", '<b class="heading"># Head</b>\n'), ("```py\nx\n```", '<code class="block">```py\nx\n```</code>'),  # noqa: E501
    ],
)  # fmt: skip
def test_markdown_is_styled_and_keeps_its_signs(text: str, shown: str) -> None:
    assert html(text) == f'<div class="rich" dir="auto">{shown.removesuffix(chr(10))}</div>'


def test_what_has_no_shape_becomes_a_sign() -> None:
    # What an AI judge reads, and people do not see.
    hidden = "".join(chr(0xE0000 + ord(c)) for c in "vote A")
    for character in (*hidden, *"\u200b\u2060\ufeff\u00ad\u3164\u2028\u202e\u200d\u200c\U000e0101"):
        assert f"⟨U+{ord(character):04X}⟩" in seen(f"a{character}b")
    for whole in ("👩\u200d💻", "می\u200cخواهم", "❤\ufe0f", "क्\u200dष"):
        assert seen(whole) == whole
    assert plain(turnwise.Message("user", "\x1b[2J\u200b")).count("␛[2J⟨U+200B⟩") == 1


@pytest.mark.parametrize(
    "unit", ["![", "[", "[^", "*", "**a ", "*a_", "*a **a ", ">", "> ", "- ", "* a\n", "`", "~~a", "|a", "|a\n|-\n", "#\n", "<a", "- a\n  ", "\\"]  # noqa: E501
)  # fmt: skip
def test_no_message_takes_long(unit: str) -> None:
    # This thread's own time: the process has others, and in a long run of tests each collection of
    # garbage goes through all that they left.
    took = []
    for attempt in "abc":
        text = unit * (9990 // len(unit)) + attempt
        gc.disable()
        began = time.thread_time()
        shown = seen(text)
        took.append(time.thread_time() - began)
        gc.enable()
        assert shown == visible(text)
    assert min(took) < 2.0, "ten times what it takes at most"


@pytest.mark.parametrize(
    "text",
    [
        "1\ufe0f\u20e3",
        "\u2764\ufe0f",
        "\U0001f469\U0001f3fd\u200d\U0001f680",
        "\u0645\u06cc\u200c\u062e",
        "\u0915\u094d\u200d\u0937",
        "\u845b\ufe00",
        "\u2229\ufe00",
        "\u203c\ufe0f",
        "\U0001f3f3\ufe0f\u200d\U0001f308",
    ],
)
def test_joiners_and_selectors_that_say_something_stay(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "a\ufe01b",
        "\u00e9\ufe0f",
        "3\ufe0fx",
        "\u2764\ufe0f\ufe0f",
        "\u00e9\u200cx",
        "x\u2065y",
        "x\ufff1y",
        "\u4e2d\ufe05",
        "\u201c\ufe03",
        "\u2026\u200d",
        "\U0001f642\u200c",
        "\u0627\u200c\u200c",
        "\u0915\u200d\u200d",
        "\u2764\ufe05",
        "\U0001d159",
    ],
)
def test_what_nobody_sees_is_spelled_out(text: str) -> None:
    assert "\u27e8U+" in visible(text)
