"""`people`: asks people, on the pages of `turnwise rate`. They answer when they answer; the run goes on meanwhile, if it may.

    feedback: [{source: people, task: rank, raters: 3, instructions: instructions.md, gold: gold.jsonl}]

What is asked goes into the ledger's database and is handed to raters by the desk (`desk.py`). What they say waits there until this
source collects it, a little later than it was said, so that a slip can be taken back before it counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa

from ...engine.episode import Episode, canonical_json, derive_id
from ...engine.feedback import Comparison, Context, Feedback, Question, Request
from ...engine.ledger import Ledger
from ...engine.reward import ranking_scores
from ...engine.suggest import did_you_mean
from .desk import Desk
from .tables import ITEMS
from .tasks import TASKS
from .value import information

QUESTIONS = {
    "rank": "Which of these conversations went best for the person asking?",
    "compare": "Which conversation went better for the person asking?",
    "score": "How good was the assistant in this conversation?",
    "mark": "Which replies were good, which were bad, and where did it go wrong first?",
}


@dataclass
class People:
    """Asks people to rate conversations.

    Attributes:
        task: "rank" (all conversations of a start), "compare" (two side by side), "score" (one, on aspects) or "mark" (its turns).
        question: what raters read above each task.
        instructions: a Markdown file, or a text: what raters read before they begin.
        aspects: of "score".
        scale: points per aspect, 2 to 10.
        pairs: of "compare": how many pairs of each group are asked about; default: all.
        gold: a file of items whose answer is known (see docs/people.md), mixed in unseen.
        gold_share: how many of a rater's tasks are gold, as long as there are any they have not seen.
        gold_pass: the share of gold a rater must get right; below it they are shown the instructions and tried again.
        order: "value" asks first what would teach most (see `value.py`) and covers what is little covered; "random" does not look.
        random_share: of the tasks, how many are drawn at random even so, and say so, for estimates that must not be biased.
        lease: seconds a rater may hold a task before somebody else gets it.
        undo: seconds an answer can be taken back before it counts.
        skips: how many raters may pass an item on before it counts as one nobody can judge.
        strata: what raters say of themselves, name to choices; the first is the one that rewards are made by.
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

    def __post_init__(self) -> None:
        for name, value, known in (("task", self.task, TASKS), ("order", self.order, ("value", "random"))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.{did_you_mean(value, known)}")
        for name, low, high in (("gold_share", 0, 0.9), ("gold_pass", 0, 1), ("random_share", 0, 1), ("scale", 2, 10)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in {low} to {high}, got {getattr(self, name)}")
        for name in ("lease", "reading"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.undo < 0 or self.skips < 1 or (self.pairs is not None and self.pairs < 1):
            raise ValueError("undo must not be negative; skips and pairs must be at least 1")
        if self.task == "score" and not self.aspects:
            raise ValueError("the task score needs aspects")
        if self.gold is not None and not Path(self.gold).is_file():
            raise ValueError(f"gold: there is no file {self.gold}")
        self.question = self.question or QUESTIONS[self.task]
        self.version = derive_id(asdict(self))
        self._context: Context | None = None
        self._looked = 0.0

    @property
    def kind(self) -> str:
        return "group" if self.task in ("rank", "compare") else "episode"

    @property
    def settings(self) -> dict[str, Any]:
        """The options, as they are kept for the service."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    # What the engine calls.

    def open(self, context: Context) -> None:
        self._context = context
        self._run = ""

    def plan(self, group: str, episodes: Sequence[Episode]) -> list[Question]:
        """One question per group to rank, per pair to compare, or per conversation."""
        ask = {"task": self.task, "question": self.question} | (
            {"aspects": self.aspects, "scale": self.scale} if self.task == "score" else {}
        )
        if self.task == "rank":
            return [Question(group, tuple(episodes), ask)]
        if self.task == "compare":
            chosen = sorted(combinations(episodes, 2), key=lambda pair: derive_id("pair", [e.id for e in pair]))[: self.pairs]
            return [Question(group, pair, ask) for pair in chosen]
        return [Question(e.id, (e,), ask) for e in episodes]

    def request(self, requests: Sequence[Request]) -> None:
        """Lays the items out for the raters; those that lie there already stay as they are."""
        context = self._opened()
        self._run = requests[0].episodes[0].run
        desk = Desk(context.ledger)
        desk.publish(self._run, context.name, self.settings, _text(self.instructions))
        if self.gold is not None:
            desk.add_gold(self._run, context.name, self.task, Path(self.gold))
        desk.add_items(self._run, {r.item: r for r in requests}.values())
        self._looked = -1.0

    def receive(self) -> list[Feedback | Comparison]:
        """What raters said and can no longer take back without a correction."""
        context = self._opened()
        if not self._run:
            return []
        desk, now = Desk(context.ledger), context.clock()
        if self.order == "value" and (self._looked < 0 or now - self._looked >= 5):
            value_items(context.ledger, self._run, context.name)
            self._looked = now
        return desk.due(self._run, context.name, self.undo)

    def acknowledge(self, ids: Sequence[str]) -> None:
        Desk(self._opened().ledger).delivered(ids)

    def waiting(self) -> str:
        """How many people are at it, and how long they will take at their pace."""
        context = self._opened()
        active, seconds = Desk(context.ledger).pace(self._run, context.name)
        people = f"{active} rater{'s' if active != 1 else ''} active"
        return people if seconds is None else f"{people}, about {_spell(seconds)}"

    def _opened(self) -> Context:
        if self._context is None or self._context.ledger is None:
            raise ValueError("people can be asked within a run only: its ledger is where the raters find their tasks")
        return self._context


def _text(instructions: str) -> str:
    """The file's text, where a file is named."""
    path = Path(instructions) if instructions and "\n" not in instructions and len(instructions) < 1000 else None
    if path is not None and path.suffix in (".md", ".txt"):
        try:
            return path.read_text()
        except OSError as error:
            raise ValueError(f"instructions: cannot read {path}: {error.strerror}") from error
    return instructions


def _spell(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    if minutes < 90:
        return f"{minutes} minute{'s' if minutes != 1 else ''}"
    hours = round(minutes / 60)
    return f"{hours} hours" if hours < 48 else f"{round(hours / 24)} days"


def value_items(ledger: Ledger, run: str, source: str) -> None:
    """Writes what an answer to each open item would teach, as far as other voices have been heard of it by now.

    Little-covered starts break ties: an item of a start nobody has judged comes before one of a start that has been judged often.
    """
    with ledger.reading() as db:
        query = sa.select(ITEMS.c.id, ITEMS.c.group, ITEMS.c.shown, ITEMS.c.start)
        query = query.where(ITEMS.c.run == run, ITEMS.c.source == source, ~ITEMS.c.valued, ITEMS.c.gold.is_(None))
        waiting = list(db.execute(query.order_by(ITEMS.c.time).limit(2000)))
    if not waiting:
        return
    said: dict[str, dict[str, list[float]]] = {}  # episode -> voice -> scores
    for answer in ledger.feedback(sorted({row.group for row in waiting})):
        if answer.status != "scored" or answer.stamp.source == source:
            continue
        voice = answer.stamp.source
        if isinstance(answer, Comparison):
            for episode, score in ranking_scores(answer).items():
                said.setdefault(episode, {}).setdefault(f"{voice}/{answer.stamp.rater}", []).append(4 * score - 2)
        else:
            members = answer.details.get("members")
            for m, score in enumerate(members if isinstance(members, list) else [answer.score]):
                if score is not None:
                    said.setdefault(answer.episode, {}).setdefault(f"{voice}/{m}", []).append(float(score))
    values = []
    for row in waiting:
        shown = json.loads(row.shown)
        voices = sorted(set.intersection(*(set(said.get(e, {})) for e in shown)))
        if len(voices) >= 2:
            scores = [[float(np.mean(said[e][v])) for e in shown] for v in voices]
            values.append({"item": row.id, "worth": information(np.array(scores))})
    if values:
        with ledger.writing() as db:
            update = ITEMS.update().where(ITEMS.c.id == sa.bindparam("item"))
            db.execute(update.values(value=sa.bindparam("worth"), valued=True), values)


__all__ = ["People", "canonical_json", "value_items"]
