"""The feedback source `people`: asks people, on the pages of `turnwise rate`. They answer in their
own time; the run goes on meanwhile, if it may.

    feedback: [{judge: people, task: rank, raters: 3, instructions: instructions.md, gold:
        gold.jsonl}]

What is asked goes into the ledger's database and is handed to raters by the desk (`desk.py`). Their
answers wait there until this source collects them, with a short delay, so that a slip can be taken
back before it counts.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa

from ...protocols import (
    Comparison,
    Context,
    Episode,
    Feedback,
    FeedbackSource,
    Question,
    Request,
    ranking_scores,
)
from ...running import SLOTS, Ledger, keep
from ...tools import derive_id, did_you_mean
from .desk import Desk
from .gold import read_gold
from .information import information
from .tables import ITEMS, metadata
from .tasks import LETTERS, TASKS

LOOK = 5.0  # seconds between looks at what is worth asking
# Characters that the names of one list may have: in a form, an emoji takes twelve bytes.
NAMES = 20_000
NEWEST = 2000  # open items that are looked at
QUESTIONS = {
    "rank": "Which of these conversations went best for the person asking?",
    "compare": "Which conversation went better for the person asking?",
    "score": "How good was the assistant in this conversation?",
    "mark": "Which replies were good, which were bad, and where did it go wrong first?",
}


@dataclass
class People(FeedbackSource):
    """Asks people to rate conversations.

    Attributes:
        task: "rank" (all conversations of a start), "compare" (two side by side), "score" (one, on
            aspects) or "mark" (its turns).
        question: what raters read above each task.
        instructions: a Markdown file, or a text: what raters read before they begin.
        aspects: of "score".
        scale: points per aspect, 2 to 10.
        pairs: of "compare": how many pairs of each group are asked about; default: all.
        gold: a file of items whose answer is known (see docs/people.md), mixed in unseen.
        gold_share: how many of a rater's tasks are gold, as long as there are any they have not
            seen.
        gold_pass: the share of gold a rater must get right; below it they are shown the
            instructions and tried again.
        order: "value" asks first what would teach most (see `information.py`), and of what teaches
            the same, what is little covered; "random": neither.
        random_share: of the items, a simple random sample that is asked in random order in addition
            to the others, and marked as such: for estimates that must not be biased.
        lease: seconds a rater may hold a task before another rater gets it.
        undo: seconds an answer can be taken back before it counts.
        skips: how many raters may pass an item on before it counts as one that cannot be judged.
        strata: what raters declare about themselves, name to choices; the first is the one that
            rewards are made by.
        reading: words per minute above which an answer is flagged as too fast to have been read.
        render: how messages are shown, "markdown", "plain" or a registered renderer.

    Raises:
        ValueError: an option out of range.
    """

    task: Literal["rank", "compare", "score", "mark"] = "rank"
    question: str = ""
    instructions: str = ""
    aspects: list[str] = field(default_factory=lambda: ["helpful", "honest", "harmless"])
    scale: int = 5
    pairs: int | None = None
    gold: str | None = None
    gold_share: float = 0.1
    gold_pass: float = 0.7
    order: Literal["value", "random"] = "value"
    random_share: float = 0.2
    lease: float = 1800.0
    undo: float = 30.0
    skips: int = 3
    strata: Mapping[str, Sequence[str]] = field(default_factory=dict)
    reading: float = 1200.0
    render: str = "markdown"

    # Under the request they answer, and `receive` returns nothing.
    answers_in_ledger = True

    def __post_init__(self) -> None:
        self.kind = "group" if self.task in ("rank", "compare") else "episode"
        for name, value, known in (
            ("task", self.task, TASKS),
            ("order", self.order, ("value", "random")),
        ):
            if value not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got"
                    f" {value!r}.{did_you_mean(value, known)}"
                )
        for name, low, high in (
            ("gold_share", 0, 0.9),
            ("gold_pass", 0, 1),
            ("random_share", 0, 1),
            ("scale", 2, 10),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in {low} to {high}, got {getattr(self, name)}")
        for name in ("lease", "reading"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.undo < 0 or self.skips < 1 or (self.pairs is not None and self.pairs < 1):
            raise ValueError("undo must not be negative; skips and pairs must be at least 1")
        self.aspects = _names("aspects", self.aspects)
        if not isinstance(self.strata, Mapping):
            raise ValueError(
                "strata must be names with their choices, such as {language: [English, German]},"
                f" got {self.strata!r}"
            )
        names = _names("strata", list(self.strata))
        self.strata = {
            name: _names(f"strata: {name}", choices)
            for name, choices in zip(names, self.strata.values(), strict=True)
        }
        if self.task == "score" and not self.aspects:
            raise ValueError("the task score needs aspects")
        if self.gold is not None and not Path(self.gold).exists():
            raise ValueError(f"gold: there is no file {self.gold}")
        if self.gold is not None:
            # What is wrong with it shows before the run.
            read_gold(Path(self.gold), self.task, "", "")
        self.question = self.question or QUESTIONS[self.task]
        self.version = derive_id(asdict(self))
        self._text = _text(self.instructions)
        self._context: Context | None = None
        self._looked = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        """The options, as they are kept for the service."""
        return {"version": self.version} | {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def ask(self) -> dict[str, Any]:
        """The task's part of every request."""
        return {
            "task": self.task,
            "question": self.question,
            "aspects": list(self.aspects),
            "scale": self.scale,
        }

    # What the engine calls.

    def open(self, context: Context) -> None:
        """Takes the context, and makes the tables of tasks in its ledger; refuses to work without
        one."""
        self._context = context
        if context.ledger is None:
            raise ValueError(
                "people can be asked within a run only: its ledger is where the raters find their"
                " tasks"
            )
        keep(context.ledger, metadata)
        self._looked = -math.inf

    def plan(self, group: str, episodes: Sequence[Episode]) -> list[Question]:
        """Plans one question per group to rank, per pair to compare, or per conversation.

        Raises:
            ValueError: more conversations than a person can rank.
        """
        if self.task == "rank":
            if len(episodes) > len(LETTERS):
                raise ValueError(
                    f"{len(episodes)} conversations cannot be ranked on one page; at most"
                    f" {len(LETTERS)} can, and few should"
                )
            return [Question(group, tuple(episodes), self.ask)]
        if self.task == "compare":
            chosen = sorted(
                combinations(episodes, 2), key=lambda pair: derive_id("pair", [e.id for e in pair])
            )[: self.pairs]
            return [Question(group, pair, self.ask) for pair in chosen]
        return [Question(e.id, (e,), self.ask) for e in episodes]

    def request(self, requests: Sequence[Request]) -> None:
        """Adds the items for the raters; those that are there already stay as they are."""
        context = self._opened()
        desk = Desk(context.ledger)
        desk.publish(context.run, context.name, self.settings, self._text)
        if self.gold is not None:
            desk.add_gold(context.run, context.name, self.ask, Path(self.gold))
        desk.add_items(context.run, list({r.item: r for r in requests}.values()), self.ask)
        self._looked = -math.inf

    def receive(self) -> list[Feedback | Comparison]:
        """Collects the answers that raters can no longer take back: they are in the ledger then,
        and this returns nothing."""
        context = self._opened()
        now = context.clock()
        if self.order == "value" and now - self._looked >= LOOK:
            value_items(context.ledger, context.run, context.name)
            self._looked = now
        Desk(context.ledger).collect(context.run, context.name)
        return []

    def close(self) -> None:
        """Collects what is on the desk when a stage ends; the service goes on collecting after
        that."""
        if self._context is not None:
            Desk(self._context.ledger).collect(self._context.run, self._context.name, undo=0.0)

    def waiting(self) -> str:
        """Tells how many people are at work, and how long they will take at their pace."""
        context = self._opened()
        active, seconds = Desk(context.ledger).pace(context.run, context.name)
        people = f"{active} rater{'s' if active != 1 else ''} active"
        if not active:
            return f"{people}: run `turnwise rate {context.folder}`"
        return people if seconds is None else f"{people}, about {_spell(seconds)}"

    def _opened(self) -> Context:
        if self._context is None:
            raise ValueError("open(context) comes before the first question")
        return self._context


def _names(what: str, value: Any) -> list[str]:
    """Returns names that raters choose or are asked about as texts, also where YAML takes them for
    numbers, truth values, dates or nothing (`yes` reads "True"; in quotes it stays itself).

    Raises:
        ValueError: no list, or a name that no form can send or that is there twice.
    """
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"{what} must be a list of texts, got {value!r}")
    names = [str(name).strip(" \t\r\n") for name in value]
    for name in names:
        if not name or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
            raise ValueError(
                f"{what}: {name!r} is no name a form can send: it is empty, or holds a line break"
                " or another control character"
            )
        if not any(unicodedata.category(c)[0] in "LMNPS" for c in name):
            raise ValueError(f"{what}: the name {name!r} is invisible")
        if names.count(name) > 1:
            raise ValueError(f"{what}: {name!r} is there twice")
    if (length := sum(map(len, names))) > NAMES:
        raise ValueError(
            f"{what}: {length:,} characters of names are more than a form can send: {NAMES:,}"
        )
    return names


def _text(instructions: str) -> str:
    """Returns the instructions, or the text of the file they name."""
    path = (
        Path(instructions)
        if instructions and "\n" not in instructions and len(instructions) < 1000
        else None
    )
    if path is not None and path.suffix in (".md", ".txt"):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"instructions: cannot read {path}: {error}") from error
    return instructions


def _spell(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    if minutes < 90:
        return f"{minutes} minute{'s' if minutes != 1 else ''}"
    hours = round(minutes / 60)
    return f"{hours} hours" if hours < 48 else f"{round(hours / 24)} days"


def value_items(ledger: Ledger, run: str, source: str) -> None:
    """Writes what an answer to each open item would teach, by the voices that have scored it by
    now: members of a reward model's ensemble (`details["members"]`, log-odds), and judges.

    Judges' scales are arbitrary, so their scores are taken in units of their own spread over the
    items looked at.
    """
    with ledger.reading() as db:
        waits = (SLOTS.c.item == ITEMS.c.id, ~SLOTS.c.answered)
        open_ = sa.select(SLOTS.c.id).where(*waits).exists()
        query = sa.select(ITEMS.c.id, ITEMS.c.group, ITEMS.c.shown, ITEMS.c.value)
        query = query.where(
            ITEMS.c.run == run, ITEMS.c.source == source, ITEMS.c.gold.is_(None), open_
        )
        waiting = list(db.execute(query.order_by(ITEMS.c.time.desc()).limit(NEWEST)))
    if not waiting:
        return
    scores = voices(
        a
        for a in ledger.feedback(sorted({row.group for row in waiting}))
        if a.stamp.source != source
    )
    values = []
    for row in waiting:
        shown = json.loads(row.shown)
        common = sorted(set.intersection(*(set(scores.get(e, {})) for e in shown)))
        worth = (
            information(np.array([[scores[e][v] for e in shown] for v in common]))
            if len(common) > 1
            else 0.0
        )
        if worth != row.value:
            values.append({"item": row.id, "worth": worth})
    if values:
        with ledger.writing() as db:
            db.execute(
                ITEMS.update()
                .where(ITEMS.c.id == sa.bindparam("item"))
                .values(value=sa.bindparam("worth")),
                values,
            )


def voices(answers: Iterable[Feedback | Comparison]) -> dict[str, dict[str, float]]:
    """Returns scores by episode and voice, in log-odds."""
    latest: dict[str, dict[str, float]] = {}  # voice -> episode -> score; the latest answer counts
    for answer in answers:
        name = f"{answer.stamp.source}/{answer.stamp.rater}"
        if answer.status != "scored":
            continue
        if isinstance(answer, Comparison):
            latest.setdefault(name, {}).update(ranking_scores(answer))
        elif isinstance(members := answer.details.get("members"), list):
            for m, score in enumerate(members):
                latest.setdefault(f"{name}/member {m}", {})[answer.episode] = float(score)
        elif answer.score is not None:
            latest.setdefault(name, {})[answer.episode] = answer.score
    by_episode: dict[str, dict[str, float]] = {}
    for name, scores in latest.items():
        spread = float(np.std(list(scores.values()))) if "/member " not in name else 1.0
        for episode, score in scores.items():
            by_episode.setdefault(episode, {})[name] = score / spread if spread > 0 else 0.0
    return by_episode
