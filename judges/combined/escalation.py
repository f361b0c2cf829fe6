"""`escalation`: a cheap judge first; a strong one, or people, where it is not enough.

    first ──sure──▶ its answer └──unsure, in disagreement with itself, failed──▶ then, as long as
      limit and budget allow ──▶ their answer

What makes `first` unsure is in its answer: members of a panel or samples that differ
(`details["spread"]`), a verdict that changes with the order (`details["flipped"]`), or a
probability near one half. Where nothing more may be asked, the answer that is there stands, and
says so.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...judging import as_source, make_members
from ...protocols import (
    Answer,
    Comparison,
    Context,
    Episode,
    FeedbackSource,
    Paused,
    Question,
    Request,
    Stamp,
)
from ...running import Plugins
from ...tools import derive_id


@dataclass(kw_only=True)
class Escalation(FeedbackSource):
    """Asks one judge, and another where the first is not sure.

    Attributes:
        first: an entry as in `feedback`: a cheap judge, or a panel of them.
        then: another: a strong judge, or `people`.
        spread: members or samples of the first that differ by more than this go up.
        unsure: probabilities below this go up, and verdicts that flip with the order.
        failed: whether what the first failed on or abstained from goes up.
        limit: share of the requests so far, how many may go up at most.

    Raises:
        ValueError, PluginError: with what would be right.
    """

    first: Any
    then: Any
    spread: float | None = None
    unsure: float | None = None
    failed: bool = True
    limit: float = 1.0
    plugins: Plugins | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        plugins = self.plugins or Plugins()
        made = make_members([self.first, self.then], plugins)
        self._first, self._then = (as_source(m.given) for m in made)
        self._names = [m.name for m in made]
        kinds = [self._first.kind, self._then.kind]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"first and then must both score or both compare: {self._names[0]!r} is about an"
                f" {kinds[0]}, {self._names[1]!r} about a {kinds[1]}"
            )
        # People write their answers into the ledger themselves, under the very request that they
        # were given.
        self._people = self._then.answers_in_ledger
        if self._first.answers_in_ledger:
            raise ValueError(
                f"{self._names[0]!r} answers late and elsewhere: it can only come second"
            )
        self.members = {m.name: m.given for m in made[: 1 if self._people else 2]}
        if self.spread is None and self.unsure is None and not self.failed:
            raise ValueError("nothing would ever go up: give `spread`, `unsure`, or failed: true")
        if not 0 < self.limit <= 1 or (self.unsure is not None and not 0.5 <= self.unsure <= 1):
            raise ValueError(
                f"limit must lie above 0 and up to 1, unsure in 0.5 to 1; got {self.limit} and"
                f" {self.unsure}"
            )
        self.kind = kinds[0]
        rule = [self.spread, self.unsure, self.failed, self.limit]
        self.version = f"escalation/{derive_id([m.version for m in made], rule)[:8]}"
        self._name, self._seen, self._up = "", 0, 0
        self._closed = ""  # why nothing goes up any more
        self._asked: dict[str, Request] = {}  # by the first's request
        # By the second's request, with the first's answer.
        self._waits: dict[str, tuple[Request, Answer]] = {}

    def open(self, context: Context) -> None:
        """Takes the context's name; opens the second where it is people."""
        self._name = context.name
        if self._people:
            self._then.open(context)

    def plan(self, group: str, episodes: Sequence[Episode]) -> list[Question]:
        """Asks as the second does, or as the first where the second has no plan of its own;
        people's pages need to know what is asked."""
        asked = self._then.plan(group, episodes)
        if self._people or asked != super().plan(group, episodes):
            return asked
        return self._first.plan(group, episodes)

    def request(self, requests: Sequence[Request]) -> None:
        """Asks the first about every request that is not under way."""
        own = {}
        for request in requests:
            theirs = dataclasses.replace(request, source=f"{self._name}.{self._names[0]}")
            if theirs.id not in self._asked:
                self._asked[theirs.id] = own[theirs.id] = request
        self._first.request(
            [dataclasses.replace(r, source=f"{self._name}.{self._names[0]}") for r in own.values()]
        )

    def receive(self) -> list[Answer]:
        """Returns the first's sure answers and the second's; sends up the unsure ones within the
        limit."""
        answers, up = [], []
        for answer in self._first.receive():
            request = self._asked.pop(answer.stamp.request or "")
            self._seen += 1
            why = self._why(answer)
            if (
                not why
                or self._closed
                or self._up + 1 > self.limit * max(self._seen, 1 / self.limit)
            ):
                answers.append(
                    self._as_ours(
                        request,
                        answer,
                        {"unsure": why, "closed": self._closed or "limit"} if why else {},
                    )
                )
                continue
            self._up += 1
            theirs = (
                request
                if self._people
                else dataclasses.replace(request, source=f"{self._name}.{self._names[1]}")
            )
            self._waits[theirs.id] = request, answer
            up.append(theirs)
        if up:
            self._then.request(up)
        return answers + self._second_answers()

    def _second_answers(self) -> list[Answer]:
        if self._closed:
            return []
        try:
            received = self._then.receive()
        except Paused as notice:  # what it would have been asked is answered by the first
            self._closed = str(notice)
            warnings.warn(
                f"{self._name!r}: nothing goes up to {self._names[1]!r} any more: {notice}",
                stacklevel=2,
            )
            waiting, self._waits = self._waits, {}
            return [
                self._as_ours(r, doubtful, {"unsure": self._why(doubtful), "closed": self._closed})
                for r, doubtful in waiting.values()
            ]
        answers = []
        for answer in received:
            request, first = self._waits.pop(answer.stamp.request or "")
            answers.append(
                self._as_ours(
                    request,
                    answer,
                    {"unsure": self._why(first), "first": _brief(first)},
                    first.stamp.cost,
                )
            )
        return answers

    def _why(self, answer: Answer) -> str:
        """What is not enough about an answer; empty: nothing."""
        if answer.status != "scored":
            return answer.status if self.failed else ""
        if self.spread is not None and answer.details.get("spread", 0.0) > self.spread:
            return f"spread {answer.details['spread']:.3g}"
        if self.unsure is not None and isinstance(answer, Comparison):
            if answer.details.get("flipped"):
                return "flipped"
            if len(answer.ranking) == 2 and (answer.probability or 1.0) < self.unsure:
                return f"probability {answer.probability:.3g}"
        return ""

    def _as_ours(
        self, request: Request, answer: Answer, note: dict[str, Any], cost: float = 0.0
    ) -> Answer:
        stamp = Stamp(request=request.id, version=self.version, cost=answer.stamp.cost + cost)
        details = {
            **answer.details,
            "by": answer.stamp.version,
            **({"escalation": note} if note else {}),
        }
        return dataclasses.replace(
            answer, id=derive_id(request.id, "escalation"), stamp=stamp, details=details
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns how many answers were seen, and how many went up."""
        # Not why it closed: a budget may have been raised since.
        return {"seen": self._seen, "up": self._up}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up both counts of a checkpoint."""
        self._seen, self._up = state["seen"], state["up"]

    def waiting(self) -> str:
        """Returns what both wait for, and how many answers went up."""
        pairs = zip(self._names, (self._first, self._then), strict=True)
        notes = [f"{name}: {note}" for name, source in pairs if (note := source.waiting())]
        return "; ".join([*notes, f"{self._up} of {self._seen} went up"])

    def close(self) -> None:
        """Closes the second where it is people, and forgets what is under way."""
        if self._people:
            self._then.close()
        self._asked, self._waits = {}, {}


def _brief(answer: Answer) -> dict[str, Any]:
    brief: dict[str, Any] = {"status": answer.status, "version": answer.stamp.version}
    if isinstance(answer, Comparison):
        return {
            **brief,
            "ranking": [list(tier) for tier in answer.ranking],
            "probability": answer.probability,
        }
    return {**brief, "score": answer.score}
