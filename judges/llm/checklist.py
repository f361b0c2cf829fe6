"""The judge `checklist`: answers stated points with yes or no, or whether the agent's answer agrees
with a reference.

    score = sum of weights of the points that hold / sum of weights of the points that apply

A reference is a text, or stands in the start's options or in the info of its reset (`reference:
{start: answer}`), which the agent never sees. It becomes one more point, "agrees with the
reference". A conversation to which no point applies is abstained from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ...protocols import Answer, Episode, Feedback, Request
from ..asking.calls import Call
from ..asking.store import Verdict
from ..models.model import Prompt, Reply
from ..trust.canaries import ATTACKS
from .judge import ModelJudge
from .rubric_judge import form
from .transcript import RULES, Unreadable, conversation, fenced, names, read_json

TASK = """\
You check an agent's work in a conversation, point by point.

{rules}

{points}

For each point first write a rationale in a sentence or two, then say "yes", "no", or "does not \
apply" if the conversation gave no occasion for it. What the \
agent claims to have done is not what it did."""
AGREES = (
    "The agent's final answer agrees with the reference in every fact that the question asks for;"
    " wording does not matter."
)


@dataclass(kw_only=True)
class ChecklistJudge(ModelJudge):
    """Checks conversations against stated points.

    Attributes:
        points: sentences that should hold, or {name: sentence}; or a file with one per line.
        weights: by name, default 1; without names they are called point_1, point_2, ...
        reference: what the answer should agree with: a text, or {start: key} to take it from the
            start's options or from the info of its reset.
    """

    way: ClassVar[str] = "checklist"
    KINDS: ClassVar[Sequence[str]] = ATTACKS  # an empty reply may well keep every point
    points: Any = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    reference: str | Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self.points = _points(self.points)
        if isinstance(self.reference, Mapping) and set(self.reference) != {"start"}:
            raise ValueError(
                f"reference must be a text or {{start: key}}, got {dict(self.reference)}"
            )
        if self.reference is not None:
            self.points = {**self.points, "reference": AGREES}
        if not self.points:
            raise ValueError("a checklist needs points or a reference")
        strangers = set(self.weights) - set(self.points)
        if (
            strangers
            or any(w < 0 for w in self.weights.values())
            or not sum(self._weight(n) for n in self.points)
        ):
            raise ValueError(
                "weights must be at least 0, one above it, and name points:"
                f" {', '.join(self.points)}; got {dict(self.weights)}"
            )
        super().__post_init__()

    def _weight(self, name: str) -> float:
        return float(self.weights.get(name, 1.0))

    @property
    def instructions(self) -> str:
        """The system prompt: the rules and the points."""
        lines = [f"- {name}: {sentence}" for name, sentence in self.points.items()]
        return TASK.format(rules=RULES, points="\n".join(lines))

    def calls(self, request: Request) -> list[Call]:
        """Returns the one call on a conversation, with its reference where there is one."""
        [episode] = request.episodes
        data = {"conversation": conversation(episode)}
        if self.reference is not None:
            data["reference"] = self._reference(episode)
        return [
            Call(
                data,
                lambda nonce: self._write(data, nonce),
                lambda reply, nonce: self._read(reply, nonce),
            )
        ]

    def _reference(self, episode: Episode) -> Any:
        if isinstance(self.reference, str):
            return self.reference
        key = self.reference["start"] if self.reference else ""
        known = {**episode.info, **episode.start.options}
        if key not in known:
            raise ValueError(
                f"the start has no {key!r} to compare with; it has"
                f" {', '.join(sorted(known)) or 'nothing'}"
            )
        return known[key]

    def _write(self, data: Mapping[str, Any], nonce: str) -> Prompt:
        parts = [f"The code is {nonce}. The id of your verdict is {names(nonce, 1)[0]}."]
        parts += [fenced(label, each, nonce) for label, each in data.items()]
        return Prompt(
            self.instructions,
            "\n\n".join(parts),
            self._schema(),
            self.max_tokens,
            choices={"verdict_id": names(nonce, 1)},
        )

    def _schema(self) -> dict[str, Any]:
        point = form(
            {
                "rationale": {"type": "string"},
                "holds": {"type": "string", "enum": ["yes", "no", "does not apply"]},
            }
        )
        return form({"verdict_id": {"type": "string"}, **dict.fromkeys(self.points, point)})

    def _read(self, reply: Reply, nonce: str) -> dict[str, Any]:
        found = read_json(reply.text, self._schema())
        if found["verdict_id"] != names(nonce, 1)[0]:
            raise Unreadable("verdict_id is not the id given in the question")
        for name in self.points:
            point = found[name]
            sound = set(point) == {"rationale", "holds"} and isinstance(point["rationale"], str)
            if not sound or point["holds"] not in ("yes", "no", "does not apply"):
                raise Unreadable(
                    f'{name} needs a rationale, and holds: "yes", "no" or "does not apply", and'
                    " nothing else"
                )
        return {name: found[name] for name in self.points}

    def answer(self, request: Request, verdicts: Sequence[Verdict]) -> Answer:
        """Scores the weighted share of the points that hold, of those that apply; abstains without
        any."""
        payload = verdicts[0].payload
        holds = {
            name: float(payload[name]["holds"] == "yes")
            for name in self.points
            if payload[name]["holds"] != "does not apply"
        }
        total = sum(self._weight(name) for name in holds)
        if not total:
            return Feedback.abstained(request.target, "no point applies")
        score = sum(self._weight(name) * value for name, value in holds.items()) / total
        return Feedback(
            request.target,
            score=score,
            aspects=holds,
            details={"rationales": [payload[name]["rationale"] for name in self.points]},
        )


def _points(given: Any) -> dict[str, str]:
    if isinstance(given, str):
        try:
            given = [
                line.strip().removeprefix("- ")
                for line in Path(given).read_text(encoding="utf-8").splitlines()
                if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"points: cannot read {given}: {error}") from error
    if isinstance(given, Mapping):
        points = {str(name): str(sentence) for name, sentence in given.items()}
    else:
        points = {f"point_{i + 1}": str(sentence) for i, sentence in enumerate(given)}
    odd = [
        name for name in points if name in ("verdict_id", "reference") or not name.isidentifier()
    ]
    if odd:
        raise ValueError(
            f"a point cannot be called {odd[0]!r}: use a word of letters, digits and _ (not"
            " verdict_id, reference)"
        )
    return points
