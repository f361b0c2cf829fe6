"""`panel`: several judges are asked the same, and what they say becomes one answer.

    scores        the median over members (default), their mean, or the score most of them gave
    comparisons   each pair goes to whom more members prefer; a group is ordered by the mean share
                  of the others that each beats

Members of different families are wrong about different things, and small ones together can cost
less than a large one (Verga et al. 2024, arXiv:2404.18796). With
`reliability: AGGREGATOR` each counts as much as an aggregator (`rater-bradley-terry`,
`dawid-skene`, ...) finds it reliable, over all answers of this panel in earlier updates. A member
that fails or abstains is left out; too few of them left (`quorum`), and the panel abstains. A
quarantined member leaves the panel, with notice.
"""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from ...judging import as_source, make_members, opinion
from ...protocols import (
    Answer,
    Comparison,
    Context,
    Episode,
    Feedback,
    FeedbackSource,
    Question,
    Request,
    Stamp,
)
from ...running import Plugins, component
from ...tools import derive_id, did_you_mean
from ..trust.watch import Quarantined

NEWEST = 5000  # answers that the members' reliability is estimated from


@dataclass(kw_only=True)
class Panel(FeedbackSource):
    """Asks several judges.

    Attributes:
        judges: entries as in `feedback`; all of them score conversations, or all of them compare.
        combine: "median", "mean" or "vote"; of scores. Comparisons are always voted on.
        reliability: an aggregator, by whose estimate of each member's reliability it counts,
            instead of its `weight`.
        quorum: how many members must have answered; default: more than half.
        tie: what equally many votes mean: "tie", or the member whose word then counts.

    Raises:
        ValueError, PluginError: with what would be right.
    """

    judges: Sequence[Any]
    combine: Literal["median", "mean", "vote"] = "median"
    reliability: Any = None
    quorum: int | None = None
    tie: str = "tie"
    plugins: Plugins | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.combine not in ("median", "mean", "vote"):
            raise ValueError(f"combine must be 'median', 'mean' or 'vote', got {self.combine!r}")
        plugins = self.plugins or Plugins()
        made = make_members(self.judges, plugins)
        # The engine opens and closes them, and keeps their states.
        self.members = {m.name: m.given for m in made}
        self._sources = {m.name: as_source(m.given) for m in made}
        names, kinds = list(self.members), {source.kind for source in self._sources.values()}
        if len(names) < 2 or len(kinds) > 1:
            shown = (
                f"{name} ({'compares' if source.kind == 'group' else 'scores'})"
                for name, source in self._sources.items()
            )
            raise ValueError(
                "a panel needs two judges or more that all score or all compare, got"
                f" {', '.join(shown)}"
            )
        late = [name for name, source in self._sources.items() if source.answers_in_ledger]
        if late:
            raise ValueError(
                f"{late[0]!r} cannot sit on a panel: what it hears does not pass through here. Ask"
                " it by an escalation"
            )
        [self.kind] = kinds
        self.quorum = len(self.members) // 2 + 1 if self.quorum is None else self.quorum
        if not 1 <= self.quorum <= len(self.members):
            raise ValueError(f"quorum must lie in 1 to {len(self.members)}, got {self.quorum}")
        if self.tie not in ("tie", *names):
            raise ValueError(
                f"tie must be 'tie' or a member, got {self.tie!r}.{did_you_mean(self.tie, names)}"
            )
        given = {m.name: 1.0 if m.weight is None else float(m.weight) for m in made}
        if min(given.values()) < 0 or not sum(given.values()):
            raise ValueError(f"weights must be at least 0, one above it; got {given}")
        if (
            self.combine == "median"
            and self.kind == "episode"
            and (len(set(given.values())) > 1 or self.reliability is not None)
        ):
            raise ValueError("a median knows no weights: use combine 'mean' or 'vote'")
        self._aggregator = None
        if self.reliability is not None:
            self._aggregator = component(plugins, "aggregator", self.reliability)
        self._counts = given
        rule = [self.combine, given, str(self.reliability), self.quorum, self.tie]
        self.version = f"panel/{derive_id([[m.name, m.version] for m in made], rule)[:8]}"
        self._name = ""
        # Requests under way, and the members' answers.
        self._asked: dict[str, tuple[Request, dict[str, Answer]]] = {}
        self._of: dict[str, tuple[str, str]] = {}  # a member's own request: ours, and the member
        self._out: dict[str, str] = {}  # members that have left, and why

    # What the engine calls.

    def open(self, context: Context) -> None:
        """Takes the context's name; the engine opens the members."""
        self._name = context.name

    def plan(self, group: str, episodes: Sequence[Episode]) -> list[Question]:
        """Asks as the first member with a plan of its own; all members are asked the same."""
        usual = super().plan(group, episodes)
        plans = (source.plan(group, episodes) for source in self._sources.values())
        return next((asked for asked in plans if asked != usual), usual)

    def request(self, requests: Sequence[Request]) -> None:
        """Asks every member that is present about the requests that are not under way."""
        new = [r for r in requests if r.id not in self._asked]
        self._asked |= {r.id: (r, {}) for r in new}
        for name in self._present():
            own = {r.id: dataclasses.replace(r, source=f"{self._name}.{name}") for r in new}
            self._of |= {theirs.id: (ours, name) for ours, theirs in own.items()}
            self._sources[name].request(list(own.values()))

    def receive(self) -> list[Answer]:
        """Hears the members; returns the panel's answer where all that are present have
        answered."""
        for name in self._present():
            try:
                received = self._sources[name].receive()
            except Quarantined as notice:
                self._out[name] = str(notice)
                warnings.warn(
                    f"the panel {self._name!r} goes on without {name!r}: {notice}", stacklevel=2
                )
                if len(self._present()) < (self.quorum or 1):
                    left = (
                        f"{len(self._present())} of {len(self.members)} judges of the panel"
                        f" {self._name!r} are left, {self.quorum} are needed"
                    )
                    raise Quarantined(f"{left}; the last that went: {notice}") from notice
                continue
            for answer in received:
                ours, _ = self._of.pop(answer.stamp.request or "")
                self._asked[ours][1][name] = answer
        ready = [
            id_
            for id_, (_, own) in self._asked.items()
            if all(name in own for name in self._present())
        ]
        return [self.answer(*self._asked.pop(id_)) for id_ in ready]

    def waiting(self) -> str:
        """Returns what the members that are present wait for."""
        return "; ".join(
            f"{n}: {note}" for n in self._present() if (note := self._sources[n].waiting())
        )

    def close(self) -> None:
        """Forgets the requests under way."""
        self._asked, self._of = {}, {}

    def learn(self, run: Any) -> dict[str, float]:
        """How much each member counts from now on, by the panel's answers in updates that are
        over."""
        if self._aggregator is None:
            return {}
        before = run.ledger.feedback(
            run=run.id, decided_by=run.updates, sources=[self._name], newest=NEWEST
        )
        answers = [own for answer in before for own in opinions_of(answer)]
        if answers:
            raters = self._aggregator.aggregate(answers).raters
            found = {
                n: max(raters[n].reliability, 0.0) if n in raters else 0.0 for n in self.members
            }
            if sum(found.values()) > 0:
                self._counts = found
        return {f"judges/{self._name}/weight/{name}": value for name, value in self._counts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns what each member counts."""
        return {"counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what each member counts."""
        self._counts = dict(state["counts"])

    def _present(self) -> list[str]:
        return [name for name in self.members if name not in self._out]

    # What members' answers become.

    def answer(self, request: Request, answers: Mapping[str, Answer]) -> Answer:
        """The panel's answer.

        Args:
            request: the one that all were asked.
            answers: by member; those that have left are missing.
        """
        sound = {name: a for name, a in answers.items() if a.status == "scored"}
        record = {name: _record(a) for name, a in answers.items()} | {
            name: {"status": "out"} for name in self._out if name not in answers
        }
        more: dict[str, Any] = {
            "id": derive_id(request.id, "panel"),
            "stamp": Stamp(
                request=request.id,
                version=self.version,
                cost=sum(a.stamp.cost for a in answers.values()),
            ),
        }
        if len(sound) < (self.quorum or 1):
            kind: type[Answer] = Feedback if request.kind == "episode" else Comparison
            failed = [a for a in answers.values() if a.status == "failed"]
            reason = (
                f"{len(sound)} of {len(self.members)} judges answered; {self.quorum} are needed"
            )
            reason += "".join(
                f"; {name}: {a.reason}" for name, a in answers.items() if a.status != "scored"
            )
            end = (
                kind.failed
                if len(failed) == len(answers) - len(sound) and failed
                else kind.abstained
            )
            return end(request.target, reason[:500], details={"panel": record}, **more)
        if request.kind == "episode":
            return self._score(
                request, {n: a for n, a in sound.items() if isinstance(a, Feedback)}, record, more
            )
        return self._rank(
            request, {n: a for n, a in sound.items() if isinstance(a, Comparison)}, record, more
        )

    def _score(
        self,
        request: Request,
        answers: Mapping[str, Feedback],
        record: Any,
        more: Mapping[str, Any],
    ) -> Feedback:
        scores = {name: a.score for name, a in answers.items() if a.score is not None}
        turns = {name: a.turn_scores for name, a in answers.items() if a.turn_scores is not None}
        length = len(request.episodes[0].turns)
        by_turn = [
            {n: each[k] for n, each in turns.items() if each[k] is not None} for k in range(length)
        ]
        names = sorted({name for a in answers.values() for name in a.aspects})
        aspects = {
            n: self._middle({who: a.aspects[n] for who, a in answers.items() if n in a.aspects})
            for n in names
        }
        spread = {"spread": max(scores.values()) - min(scores.values())} if len(scores) > 1 else {}
        return Feedback(
            request.target,
            score=self._middle(scores) if scores else None,
            aspects=aspects,
            turn_scores=(
                tuple(self._middle(each) if each else None for each in by_turn) if turns else None
            ),
            details={"panel": record, **spread},
            **more,
        )

    def _middle(self, scores: Mapping[str, float | None]) -> float:
        values = {name: score for name, score in scores.items() if score is not None}
        if self.combine == "median":
            return statistics.median(values.values())
        weight = {name: self._counts[name] for name in values}
        if not sum(weight.values()):
            weight = dict.fromkeys(values, 1.0)
        if self.combine == "mean":
            return sum(weight[n] * v for n, v in values.items()) / sum(weight.values())
        votes: Counter[float] = Counter()
        for name, value in values.items():
            votes[value] += weight[name]  # type: ignore[assignment]
        most = [value for value, count in votes.items() if count == max(votes.values())]
        if len(most) > 1 and values.get(self.tie) in most:
            return float(values[self.tie])
        return sum(most) / len(most)

    def _rank(
        self,
        request: Request,
        answers: Mapping[str, Comparison],
        record: Any,
        more: Mapping[str, Any],
    ) -> Comparison:
        ids = [e.id for e in request.episodes]
        weight = {name: self._counts[name] for name in answers}
        if not sum(weight.values()):
            weight = dict.fromkeys(answers, 1.0)
        beaten = dict.fromkeys(ids, 0.0)
        sure, disagree = 0.5, 0.0
        for a, b in combinations(ids, 2):
            votes = {name: p for name, c in answers.items() if (p := opinion(c, a, b)) is not None}
            total = sum(weight[name] for name in votes)
            # Equal is equal.
            sure = (
                round(sum(weight[name] * p for name, p in votes.items()) / total, 9)
                if total
                else 0.5
            )
            disagree = (
                max(disagree, max(votes.values()) - min(votes.values())) if votes else disagree
            )
            beaten[a], beaten[b] = round(beaten[a] + sure, 6), round(beaten[b] + 1 - sure, 6)
        tiers = [
            tuple(e for e in ids if beaten[e] == value)
            for value in sorted(set(beaten.values()), reverse=True)
        ]
        if len(tiers) == 1 and self.tie in answers:
            tiers = list(answers[self.tie].ranking)
        probability = max(sure, 1 - sure) if len(ids) == 2 and len(tiers) == 2 else None
        return Comparison(
            request.target,
            tuple(tiers),
            probability=None if probability == 0.5 else probability,
            details={"panel": record, "spread": disagree},
            **more,
        )


def _record(answer: Answer) -> dict[str, Any]:
    """Returns a member's answer as JSON data."""
    record: dict[str, Any] = {
        "status": answer.status,
        "version": answer.stamp.version,
        "cost": answer.stamp.cost,
    }
    if answer.status != "scored":
        return {**record, "reason": answer.reason}
    if isinstance(answer, Comparison):
        ranking = [list(tier) for tier in answer.ranking]
        return {
            **record,
            "ranking": ranking,
            "probability": answer.probability,
            "shown": dict(answer.shown),
        }
    return {**record, "score": answer.score, "aspects": dict(answer.aspects)}


def opinions_of(answer: Answer) -> list[Answer]:
    """Returns the answers of a panel's members as answers of their own."""
    found: list[Answer] = []
    for name, own in answer.details.get("panel", {}).items():
        stamp = Stamp(rater=name, source=name)
        if own["status"] != "scored":
            continue
        if isinstance(answer, Comparison):
            ranking = tuple(tuple(tier) for tier in own["ranking"])
            found.append(
                Comparison(
                    answer.group,
                    ranking,
                    probability=own["probability"],
                    shown=own["shown"],
                    stamp=stamp,
                )
            )
        elif own["score"] is not None:
            found.append(Feedback(answer.episode, score=own["score"], stamp=stamp))
    return found
