"""The judge `pairwise`: asks in both orders which of two conversations went better.

    p = mean over orders (and samples) of how sure the model is that the one is better

A judge that answers differently when the order is turned has not told the two apart: they are tied,
and the flip is counted (`details["flipped"]`). With `soft` p is a soft label, from the
probabilities of the token that names the better one, or from `samples` answers per order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal

from ...protocols import Answer, Comparison, Episode, Question, Request
from ...tools import derive_id
from ..asking.calls import Call
from ..asking.store import Verdict
from ..models.model import Prompt, Reply
from .judge import ModelJudge
from .rubric import Rubric
from .rubric_judge import form
from .soft import choice
from .transcript import RULES, Unreadable, fenced, names, read_json, side_by_side

TASK = """\
You judge in which of two conversations an agent did better. They began alike; the agent replied \
differently.

{rules}

{standard}

First write a rationale: what speaks for the one and for the other, in a few sentences. Then name \
the better one by its id, or "neither" if they are equally \
good. Which is shown first, and how long they are, says nothing. Set `abstain` to true only if \
they cannot be compared at all."""

SCHEMA = form(
    {
        "verdict_id": {"type": "string"},
        "rationale": {"type": "string"},
        "abstain": {"type": "boolean"},
        "better": {"type": "string"},
    }
)


@dataclass(kw_only=True)
class PairwiseJudge(ModelJudge):
    """Compares conversations of one start, two at a time.

    Attributes:
        rubric: what better means: a Markdown file with criteria, or plain words.
        pairs: how many pairs of a group are compared; default: all.
        orders: 2 asks in both orders; 1 in one, drawn for each pair, at half the price and with the
            judge's liking for a place left in.
        samples: how often each order is asked.
        soft: "logprobs" or "samples": how sure the judge is becomes the comparison's probability.
            Without it verdicts count whole.
    """

    kind = "group"
    way: ClassVar[str] = "pairwise"
    rubric: Any
    pairs: int | None = None
    orders: Literal[1, 2] = 2
    samples: int = 1
    soft: Literal["logprobs", "samples"] | None = None

    def __post_init__(self) -> None:
        if self.orders not in (1, 2):
            raise ValueError(f"orders must be 1 or 2, got {self.orders!r}")
        if self.samples < 1 or (self.pairs is not None and self.pairs < 1):
            raise ValueError(
                f"samples and pairs must be at least 1, got {self.samples} and {self.pairs}"
            )
        if self.soft not in (None, "logprobs", "samples"):
            raise ValueError(f"soft must be 'logprobs' or 'samples', got {self.soft!r}")
        if self.soft == "samples" and self.samples < 2:
            raise ValueError("soft: samples needs several `samples`")
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

    def plan(self, group: str, episodes: Sequence[Episode]) -> list[Question]:
        """Plans one question per pair; which pairs, where not all are compared, is drawn from the
        conversations' messages."""
        drawn = sorted(
            combinations(episodes, 2), key=lambda pair: derive_id("pair", sorted(map(words, pair)))
        )
        return [Question(group, pair) for pair in drawn[: self.pairs]]

    def calls(self, request: Request) -> list[Call]:
        """Returns `samples` calls per order of the pair; none where both are the same."""
        return [
            self._call(shown, n) for shown in self._orders(request) for n in range(self.samples)
        ]

    def _orders(self, request: Request) -> list[tuple[Episode, Episode]]:
        one, other = sorted(request.episodes, key=words)  # never by id: those hold the run's name
        both = [(one, other), (other, one)]
        if words(one) == words(other):
            return []
        return (
            both
            if self.orders == 2
            else [both[int(derive_id("order", words(one), words(other))[0], 16) % 2]]
        )

    def _call(self, shown: tuple[Episode, Episode], sample: int) -> Call:
        data = side_by_side(shown)
        return Call(
            [data, sample, self.standard(shown)],
            lambda nonce: self._write(shown, data, nonce),
            lambda reply, nonce: self._read(reply, nonce),
        )

    def standard(self, shown: Sequence[Episode]) -> str:
        """Returns what this pair is compared by in addition to the instructions; part of the
        question."""
        return ""

    def _write(self, shown: Sequence[Episode], data: Sequence[Any], nonce: str) -> Prompt:
        ids = names(nonce, 3)
        parts = [f"The code is {nonce}. The id of your verdict is {ids[2]}.", self.standard(shown)]
        if data[0]:
            parts += ["Both began with this:", fenced("beginning", data[0], nonce)]
        for id_, each in zip(ids, data[1:], strict=False):
            parts += [f"Conversation {id_}:", fenced("conversation", each, nonce)]
        return Prompt(
            self.instructions,
            "\n\n".join(filter(None, parts)),
            SCHEMA,
            self.max_tokens,
            10 if self.soft == "logprobs" else 0,
            {"verdict_id": ids[2:], "better": [*ids[:2], "neither"]},
        )

    def _read(self, reply: Reply, nonce: str) -> dict[str, Any]:
        ids = names(nonce, 3)
        found = read_json(reply.text, SCHEMA)
        if found["verdict_id"] != ids[2]:
            raise Unreadable("verdict_id is not the id given in the question")
        payload: dict[str, Any] = {"rationale": str(found["rationale"])}
        if found["abstain"] is True:
            return {**payload, "abstain": True}
        values = {ids[0]: 1.0, ids[1]: 0.0, "neither": 0.5}
        if found["better"] not in values:
            raise Unreadable(f"better must be one of {', '.join(values)}")
        payload["first"] = values[found["better"]]
        if self.soft == "logprobs" and (chances := choice(reply, "better", list(values))):
            payload["first"] = sum(values[name] * chance for name, chance in chances.items())
        return payload

    def answer(self, request: Request, verdicts: Sequence[Verdict]) -> Answer:
        """Compares the pair by its verdicts in all orders; abstains where half of one order's
        do."""
        orders = self._orders(request)
        a, b = request.episodes
        if not orders:  # word for word the same
            return Comparison(
                request.target,
                ((a.id, b.id),),
                shown={"order": [a.id, b.id]},
                details={"same": True},
            )
        payloads: list[dict[str, Any]] = []
        rationales: list[str] = []
        for i, shown in enumerate(orders):
            own = [v.payload for v in verdicts[i * self.samples : (i + 1) * self.samples]]
            rationales += [str(each["rationale"]) for each in own]
            firsts = [float(each["first"]) for each in own if not each.get("abstain")]
            if 2 * len(firsts) <= len(own):
                return Comparison.abstained(
                    request.target, "the judge abstained", comment=rationales[-1]
                )
            payloads.append({"order": [e.id for e in shown], "first": sum(firsts) / len(firsts)})
        sure = [
            each["first"] if each["order"][0] == a.id else 1 - each["first"] for each in payloads
        ]
        flipped = len(sure) == 2 and (sure[0] - 0.5) * (sure[1] - 0.5) < 0
        p = sum(sure) / len(sure)
        if self.soft is None:
            p = 0.5 if flipped or p == 0.5 else float(p > 0.5)
        better, worse = (a.id, b.id) if p > 0.5 else (b.id, a.id)
        ranking = ((a.id, b.id),) if p == 0.5 else ((better,), (worse,))
        return Comparison(
            request.target, ranking, probability=max(p, 1 - p) if self.soft and p != 0.5 else None,
            comment=rationales[0],
            shown={"order": payloads[0]["order"]}, details={"orders": payloads, "flipped": flipped,
                "rationales": rationales},
        )  # fmt: skip


def words(episode: Episode) -> list[tuple[str, str]]:
    """Returns a conversation's messages, which tell it from others wherever ids must not matter."""
    last = [(episode.final.content, "")] if episode.final is not None else []
    return [(turn.observation.content, turn.action) for turn in episode.turns] + last
