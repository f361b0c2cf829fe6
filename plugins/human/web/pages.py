"""Prepares what the pages show: conversations as blocks, shared beginnings once, long ones folded,
and the form as it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ....protocols import Episode, Message
from ..answers import Task
from ..errors import FormError
from ..tasks import GRADES, LETTERS, common, read
from .render import LONG, plain

SPEAKERS = {
    "system": "Instructions to the assistant",
    "user": "Person",
    "assistant": "Assistant",
    "tool": "Tool",
}
PREVIEW = 1_000  # characters of a folded message that are shown
FOLD = 14  # messages beyond which the middle of a conversation is folded
Renderer = Callable[[Message], str]


@dataclass(frozen=True, slots=True)
class Block:
    """A message on the page.

    Attributes:
        html: safe to show.
        turn: number of the assistant's reply, from 0; None for other speakers.
        preview: of a message so long that `html` is folded; else None.
    """

    role: str
    speaker: str
    html: Markup
    turn: int | None
    preview: Markup | None
    length: int


@dataclass(frozen=True, slots=True)
class Folded:
    """Blocks, of which some in the middle may be folded."""

    head: Sequence[Block]
    middle: Sequence[Block]
    tail: Sequence[Block]


def blocks(episode: Episode, render: Renderer) -> list[Block]:
    """Renders an episode's messages as blocks."""
    found, turn = [], -1
    for message in episode.messages:
        turn += message.role == "assistant"
        long = len(message.content) > LONG
        preview = (
            Markup(plain(Message(message.role, message.content[:PREVIEW] + " …"))) if long else None
        )
        html = Markup(render(message))
        if len(several := message.speakers) > 1:
            named = Markup("<p><strong>{}</strong></p>{}")
            html = Markup("").join(
                named.format(SPEAKERS[each.role], Markup(render(each))) for each in several
            )
        number = turn if message.role == "assistant" else None
        found.append(
            Block(message.role, SPEAKERS[message.role], html, number, preview, len(message.content))
        )
    return found


def folded(found: Sequence[Block]) -> Folded:
    """Folds a long conversation; the first four messages and the last eight stay in sight."""
    if len(found) <= FOLD:
        return Folded(found, (), ())
    return Folded(found[:4], found[4:-8], found[-8:])


def task_page(task: Task, render: Renderer, check: bool) -> dict[str, Any]:
    """Returns what the template of a task needs.

    Args:
        check: tell what is missing in the form as it stands.
    """
    study, kind = task.study, task.study["task"]
    several = kind in ("rank", "compare")
    same = common(task.shown) if several else 0
    problem: FormError | None = None
    if check:
        try:
            read(kind, task.draft, task.shown, study["aspects"], study["scale"], {})
        except FormError as error:
            problem = error
    each = [blocks(e, render) for e in task.shown]
    return {
        "task": task, "kind": kind, "question": study["question"], "aspects": study["aspects"],
        "problem": problem,
        "points": range(1, study["scale"] + 1), "grades": GRADES, "letters": LETTERS,
        "draft": task.draft,
        "before": folded(each[0][:same]) if same else None,
        "talks": [folded(b[same:]) for b in each], "flat": each[0],
    }  # fmt: skip


def percent(value: float | None) -> str:
    """Formats a share as a percentage; a dash for None."""
    return "–" if value is None else f"{100 * value:.0f} %"


def number(value: float | None, digits: int = 2) -> str:
    """Formats a number with fixed digits; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def filters() -> Mapping[str, Callable[..., str]]:
    """Returns the filters of the templates by name."""
    return {"percent": percent, "number": number}
