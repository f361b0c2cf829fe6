"""The judge `rubric`: scores a conversation on named criteria with anchored levels; with
`per: reply` every reply as well.

    score = sum_c weight_c * level_c / (levels of c - 1) / sum_c weight_c        in [0, 1]

The rationale comes before the levels, so that these follow from it. With `samples` the same
question is asked several times and levels are averaged; with `soft: logprobs` a level is its
expectation under the model's own probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...protocols import Answer, Episode, Feedback, Request
from ..asking.calls import Call
from ..asking.store import Verdict
from ..models.model import Prompt, Reply
from .judge import ModelJudge
from .rubric import Rubric
from .soft import choice, mean_level
from .transcript import RULES, Unreadable, conversation, fenced, names, read_json

TASK = """\
You judge how an agent did in a conversation, on a rubric.

{rules}

{rubric}

First write a rationale: for each criterion what speaks for and against, in a few sentences, with \
the numbers of the replies you mean. Then give each \
criterion the number of the level that fits best. Judge only what the rubric asks. Set `abstain` \
to true only if the conversation cannot be judged on \
this rubric at all; the levels are then not used."""
EACH = (
    " Judge every reply of the agent by itself, on each criterion, in the light of what came before"
    " it, and then the conversation as a whole."
)


@dataclass(kw_only=True)
class RubricJudge(ModelJudge):
    """Scores conversations on a rubric.

    Attributes:
        rubric: a Markdown file with criteria (see `judges/llm/rubric.py`), or a question in plain
            words, scored in five levels.
        per: "episode", or "reply": also a score for each reply, for credit that needs them
            (`judged`).
        samples: how often the same question is asked; levels are averaged, and `details["spread"]`
            tells how far they differ.
        soft: "logprobs": levels are expectations under the model's probabilities, where it gives
            them.
    """

    way: ClassVar[str] = "rubric"
    rubric: Any
    per: Literal["episode", "reply"] = "episode"
    samples: int = 1
    soft: Literal["logprobs"] | None = None

    def __post_init__(self) -> None:
        if self.per not in ("episode", "reply"):
            raise ValueError(f"per must be 'episode' or 'reply', got {self.per!r}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if self.soft not in (None, "logprobs"):
            raise ValueError(f"soft must be 'logprobs' or left out, got {self.soft!r}")
        self.rubric = Rubric.load(self.rubric)
        if long := [c.name for c in self.rubric.criteria if len(c.levels) > 10 and self.soft]:
            raise ValueError(
                f"soft: logprobs tells levels apart by one digit, and {long[0]!r} has more than ten"
            )
        super().__post_init__()

    @property
    def label(self) -> str:
        """The rubric's version."""
        return str(self.rubric.version)

    @property
    def instructions(self) -> str:
        """The system prompt: the rules and the rubric, and how to score each reply where asked."""
        return TASK.format(rules=RULES, rubric=self.rubric.prompt) + (
            EACH if self.per == "reply" else ""
        )

    def calls(self, request: Request) -> list[Call]:
        """Returns `samples` calls on the conversation."""
        [episode] = request.episodes
        shown = conversation(episode)
        return [
            Call(
                [shown, n],
                lambda nonce: self._write(episode, shown, nonce),
                lambda reply, nonce: self._read(episode, reply, nonce),
            )
            for n in range(self.samples)
        ]

    def _write(self, episode: Episode, shown: Mapping[str, Any], nonce: str) -> Prompt:
        user = (
            f"The code is {nonce}. The id of your verdict is"
            f" {names(nonce, 1)[0]}.\n\n{fenced('conversation', shown, nonce)}"
        )
        room = self.max_tokens * (1 if self.per == "episode" else 1 + len(episode.turns) // 4)
        choices = {"verdict_id": names(nonce, 1)}
        return Prompt(
            self.instructions, user, self._schema(episode), room, 10 if self.soft else 0, choices
        )

    def _schema(self, episode: Episode) -> dict[str, Any]:
        levels = form(
            {
                c.name: {"type": "integer", "enum": list(range(len(c.levels)))}
                for c in self.rubric.criteria
            }
        )
        fields: dict[str, Any] = {"verdict_id": {"type": "string"}, "rationale": {"type": "string"}}
        if self.per == "reply":
            fields["replies"] = form({f"reply_{k + 1}": levels for k in range(len(episode.turns))})
        return form({**fields, "abstain": {"type": "boolean"}, "levels": levels})

    def _read(self, episode: Episode, reply: Reply, nonce: str) -> dict[str, Any]:
        schema = self._schema(episode)
        found = read_json(reply.text, schema)
        if found["verdict_id"] != names(nonce, 1)[0]:
            raise Unreadable("verdict_id is not the id given in the question")
        if found["abstain"] is True:
            return {"abstain": True, "rationale": str(found["rationale"])}
        payload: dict[str, Any] = {
            "rationale": str(found["rationale"]),
            "levels": self._levels(found["levels"], reply),
        }
        if self.per == "reply":
            replies = found["replies"]
            wanted = [f"reply_{k + 1}" for k in range(len(episode.turns))]
            if not isinstance(replies, dict) or set(replies) != set(wanted):
                raise Unreadable(f"replies must be {', '.join(wanted)}, each once")
            payload["replies"] = [self._levels(replies[name]) for name in wanted]
        return payload

    def _levels(self, given: Any, reply: Reply | None = None) -> dict[str, float]:
        levels: dict[str, float] = {}
        if not isinstance(given, dict) or set(given) != {c.name for c in self.rubric.criteria}:
            raise Unreadable(
                "levels must name each criterion once:"
                f" {', '.join(c.name for c in self.rubric.criteria)}"
            )
        for c in self.rubric.criteria:
            level = given[c.name]
            if type(level) is not int or not 0 <= level < len(c.levels):
                raise Unreadable(
                    f"the level of {c.name} must be a whole number from 0 to {len(c.levels) - 1}"
                )
            options = [str(i) for i in range(len(c.levels))]
            chances = choice(reply, f"levels.{c.name}", options) if self.soft and reply else None
            levels[c.name] = mean_level(chances) if chances else float(level)
        return levels

    def answer(self, request: Request, verdicts: Sequence[Verdict]) -> Answer:
        """Scores by the mean levels of the verdicts; abstains where half of them do."""
        payloads = [v.payload for v in verdicts if not v.payload.get("abstain")]
        rationales = [str(v.payload["rationale"]) for v in verdicts]
        if 2 * len(payloads) <= len(verdicts):
            return Feedback.abstained(request.target, "the judge abstained", comment=rationales[0])
        scores = [self.rubric.score(each["levels"])[0] for each in payloads]
        score, aspects = self.rubric.score(_mean([each["levels"] for each in payloads]))
        turns = None
        if self.per == "reply":
            each_turn = zip(*(each["replies"] for each in payloads), strict=True)
            turns = tuple(self.rubric.score(_mean(list(levels)))[0] for levels in each_turn)
        details: dict[str, Any] = {"rationales": rationales}
        if len(scores) > 1:
            details["spread"] = max(scores) - min(scores)
        return Feedback(
            request.target,
            score=score,
            turn_scores=turns,
            aspects=aspects,
            comment=rationales[0],
            details=details,
        )


def form(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON schema of an object with exactly these fields."""
    return {
        "type": "object",
        "properties": dict(fields),
        "required": list(fields),
        "additionalProperties": False,
    }


def _mean(levels: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in levels) / len(levels) for name in levels[0]}
