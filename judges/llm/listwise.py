"""The judge `listwise`: ranks all conversations of a start in one call.

What they share at the beginning is shown once. Each has an id drawn for the call, and the order is
shuffled; answers are matched by id, never by place. An answer that leaves one out, names one twice
or invents one is asked for once more with what was wrong with it, and then failed. Conversations
that are the same word for word are shown once and tied. With `orders` the group is ranked several
times, each time in a new random order, and places are averaged.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...protocols import Answer, Comparison, Episode, Request
from ...tools import derive_id
from ..asking.calls import Call
from ..asking.store import Verdict
from ..models.model import Prompt, Reply
from .judge import ModelJudge
from .pairwise import words
from .rubric import Rubric
from .rubric_judge import form
from .transcript import RULES, Unreadable, fenced, names, read_json, side_by_side

TASK = """\
You rank conversations in which an agent was given the same start, by how well the agent did.

{rules}

{standard}

First write a rationale: what tells them apart, in a few sentences. Then rank them: a list of \
tiers, best first, each a list of ids; those that are equally good \
share a tier. Every id stands exactly once. The order in which they are shown, and how long they \
are, says nothing. Set `abstain` to true only if they cannot be \
compared at all."""

TIERS = {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}
SCHEMA = form(
    {
        "verdict_id": {"type": "string"},
        "rationale": {"type": "string"},
        "abstain": {"type": "boolean"},
        "ranking": TIERS,
    }
)
MOST = 18  # conversations in one call: ids are told apart by their first letters


@dataclass(kw_only=True)
class ListwiseJudge(ModelJudge):
    """Ranks groups of conversations.

    Attributes:
        rubric: what better means: a Markdown file with criteria, or plain words.
        orders: how often a group is ranked, each time in a new random order.
    """

    kind = "group"
    way: ClassVar[str] = "listwise"
    room: ClassVar[int] = MOST
    rubric: Any
    orders: int = 1

    def __post_init__(self) -> None:
        if self.orders < 1:
            raise ValueError(f"orders must be at least 1, got {self.orders}")
        self.rubric = Rubric.load(self.rubric)
        super().__post_init__()

    @property
    def label(self) -> str:
        """The rubric's version."""
        return str(self.rubric.version)

    @property
    def instructions(self) -> str:
        """The system prompt: the rules and the rubric."""
        return TASK.format(rules=RULES, standard=self.rubric.prompt)

    def calls(self, request: Request) -> list[Call]:
        """Returns a call per order of the group's conversations; none where all are the same."""
        kinds = len(alike(request))
        if kinds > MOST:
            raise ValueError(
                f"{kinds} different conversations cannot be ranked in one call, at most {MOST} can:"
                " use a smaller `group_size`, or pairwise"
            )
        return (
            [self._call(shown, n) for n, shown in enumerate(self._orders(request))]
            if kinds > 1
            else []
        )

    def _orders(self, request: Request) -> list[list[Episode]]:
        """Returns the orders to show: one conversation of each kind, shuffled by their messages and
        never by ids, since those hold the run's name."""
        kinds = sorted(alike(request).items(), key=lambda kind: kind[0])
        shuffled = []
        for n in range(self.orders):
            order = [members[0] for _, members in kinds]
            random.Random(derive_id("shuffle", n, [kind for kind, _ in kinds])).shuffle(order)
            shuffled.append(order)
        return shuffled

    def _call(self, shown: Sequence[Episode], number: int) -> Call:
        data = side_by_side(shown)
        return Call(
            [data, number],
            lambda nonce: self._write(data, nonce),
            lambda reply, nonce: self._read(len(shown), reply, nonce),
        )

    def _write(self, data: Sequence[Any], nonce: str) -> Prompt:
        *ids, verdict = names(nonce, len(data))
        parts = [f"The code is {nonce}. The id of your verdict is {verdict}."]
        if data[0]:
            parts += ["All began with this:", fenced("beginning", data[0], nonce)]
        for id_, each in zip(ids, data[1:], strict=True):
            parts += [f"Conversation {id_}:", fenced("conversation", each, nonce)]
        choices = {"verdict_id": [verdict], "ranking": ids}
        return Prompt(
            self.instructions, "\n\n".join(parts), SCHEMA, self.max_tokens, choices=choices
        )

    def _read(self, count: int, reply: Reply, nonce: str) -> dict[str, Any]:
        *ids, verdict = names(nonce, count + 1)
        found = read_json(reply.text, SCHEMA)
        if found["verdict_id"] != verdict:
            raise Unreadable("verdict_id is not the id given in the question")
        if found["abstain"] is True:
            return {"abstain": True, "rationale": str(found["rationale"])}
        tiers = found["ranking"]
        if not isinstance(tiers, list) or not all(
            isinstance(t, list) and t and all(isinstance(i, str) for i in t) for t in tiers
        ):
            raise Unreadable("ranking must be a list of tiers, each a list of ids")
        named = [id_ for tier in tiers for id_ in tier]
        if sorted(named) != sorted(ids):
            raise Unreadable(
                f"it ranks {len(named)} ids; it must rank {len(ids)}, each exactly once:"
                f" {', '.join(ids)}"
            )
        place = {id_: i for i, tier in enumerate(tiers) for id_ in tier}
        return {"rationale": str(found["rationale"]), "tiers": [place[id_] for id_ in ids]}

    def answer(self, request: Request, verdicts: Sequence[Verdict]) -> Answer:
        """Ranks by the share of the others that each beats, ties half, over all orders."""
        kinds = alike(request)
        orders = self._orders(request)
        shown = {"order": [e.id for e in orders[0]]}
        if len(kinds) == 1:
            return Comparison(
                request.target,
                (tuple(e.id for e in request.episodes),),
                shown=shown,
                details={"same": True},
            )
        # The share of the others that each beats, ties half, over all orders.
        beaten = dict.fromkeys(kinds, 0.0)
        rankings = []
        for order, verdict in zip(orders, verdicts, strict=True):
            if verdict.payload.get("abstain"):
                continue
            tiers = verdict.payload["tiers"]
            for e, tier in zip(order, tiers, strict=True):
                beaten[_words(e)] += sum((t > tier) + 0.5 * (t == tier) for t in tiers) - 0.5
            rankings.append({"order": [e.id for e in order], "tiers": list(tiers)})
        rationales = [str(v.payload["rationale"]) for v in verdicts]
        if 2 * len(rankings) <= len(verdicts):
            return Comparison.abstained(
                request.target, "the judge abstained", comment=rationales[0]
            )
        ranking = [
            tuple(e.id for e in request.episodes if beaten[_words(e)] == value)
            for value in sorted(set(beaten.values()), reverse=True)
        ]
        return Comparison(
            request.target,
            tuple(ranking),
            comment=rationales[0],
            shown=shown,
            details={"orders": rankings, "rationales": rationales},
        )


def alike(request: Request) -> dict[str, list[Episode]]:
    """Groups the conversations that are the same word for word."""
    found: dict[str, list[Episode]] = {}
    for e in request.episodes:
        found.setdefault(_words(e), []).append(e)
    return found


def _words(episode: Episode) -> str:
    return derive_id(words(episode))
