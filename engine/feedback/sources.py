"""Feedback sources of a run: makes one of any judge, asks them, and writes what they say into the
ledger.

A judge that raises, answers for the wrong episodes, gives the wrong count or a number that is not
finite has *failed*, for those episodes; none of it is ever a score.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Paused, PluginError, TooManyFailures
from ..ledger.ledger import Ledger
from ..pipeline.plugins import Plugins
from ..protocols import Combiner, Context, Giver
from ..records.episode import Episode
from ..records.feedback import Answer, Comparison, Feedback, Request
from ..util.ids import derive_id
from ..util.secrets import redact, redacted
from ..util.wording import each_text, reason_text, valid, worded
from .specs import ENVIRONMENT, Source, judge_of, make_source, with_members

LOOKS = 10


def _luck(source: str, episode: Episode) -> float:
    """A number in [0, 1) for a group; never of an id, since ids hold the run's name, which must not
    matter."""
    return (
        int(derive_id("share", source, episode.stage, episode.update, episode.start.key)[:12], 16)
        / 16**12
    )


def check_order(sources: Sequence[Sources], before: Sequence[str]) -> None:
    """Raises PluginError for a judge that needs an earlier stage (its `after`) where there is none.

    Args:
        sources: of the stage that asks.
        before: labels of the stages before the one that asks.
    """
    for each in sources:
        for source in each.sources:
            for name, judge in with_members(judge_of(source), source.name):
                after = judge.after
                if after and not any(
                    label == after or label.startswith(f"{after}-") for label in before
                ):
                    raise PluginError(
                        f"the judge {name!r} needs what a {after!r} stage makes: put one before"
                        " this stage, or give the judge a `path`"
                    )


def learn(
    sources: Sequence[Sources], run: Any, combiners: Sequence[Combiner] = ()
) -> dict[str, float]:
    """Lets sources, judges and combiners that learn from what the run has heard so far do so,
    before it asks again; what they say of it are metrics."""
    found: dict[str, float] = {}
    parts: list[Giver | Combiner] = [*givers(sources).values(), *combiners]
    for part in parts:
        found |= part.learn(run) or {}
    return found


def givers(sources: Sequence[Sources]) -> dict[str, Giver]:
    """The sources and judges themselves, by a name that tells them apart."""
    return {
        name: part
        for i, each in enumerate(sources)
        for source in each.sources
        for name, part in with_members(judge_of(source), f"source-{i}-{source.name}")
    }


@dataclass(frozen=True, slots=True)
class Again:
    """A request that is asked again: the answer that failed, the request's group and its
    deadline."""

    failed: str
    group: str
    deadline: float | None


@dataclass(slots=True)
class Sources:
    """All sources of a stage, asked and heard together.

    Args:
        plugins: where names are looked up.
        specs: the config's `feedback` list; "environment" stands for the environment's own reward
            and is not asked.
        max_failure_rate: share of failed answers above which the run stops.
    """

    sources: list[Source]
    environment_weight: float | None
    max_failure_rate: float = 0.5
    _silent: dict[str, int] = field(default_factory=dict)  # looks in a row that raised
    # What each source was asked this time: request to group.
    _round: dict[str, dict[str, str]] = field(default_factory=dict)
    _again: dict[str, Again] = field(default_factory=dict)  # requests that are asked again

    @classmethod
    def make(cls, specs: Sequence[Any], plugins: Plugins, max_failure_rate: float) -> Sources:
        """Makes the sources of a `feedback` list; two of one name are refused (PluginError)."""
        environment_weight: float | None = None
        sources = []
        for spec in specs:
            name = spec.get("judge", spec.get("source")) if isinstance(spec, Mapping) else spec
            if isinstance(name, str) and name == ENVIRONMENT:
                environment_weight = (
                    float(spec.get("weight", 1.0)) if isinstance(spec, Mapping) else 1.0
                )
            else:
                sources.append(make_source(spec, plugins))
        names = [s.name for s in sources]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise PluginError(
                f"two feedback sources are called {sorted(twice)[0]!r}: give one a `name` of"
                " its own"
            )
        return cls(sources, environment_weight, max_failure_rate)

    @property
    def weights(self) -> dict[str, float]:
        """Each source's weight by name, 0 where none is stated; the environment's where it
        counts."""
        own = {} if self.environment_weight is None else {ENVIRONMENT: self.environment_weight}
        return own | {s.name: s.weight or 0.0 for s in self.sources}

    def open(self, folder: Path, ledger: Ledger, seed: int, update: int = 0, run: str = "") -> None:
        """Opens every source's judge and its members, each with a context of its own."""
        for source in self.sources:
            for name, part in with_members(judge_of(source), source.name):
                part.open(Context(name, folder, ledger.clock, seed, update, ledger, run))

    def close(self) -> None:
        """Closes every source's judge and its members."""
        for source in self.sources:
            for _, part in with_members(judge_of(source), source.name):
                part.close()

    def ask(
        self,
        groups: Mapping[str, Sequence[Episode]],
        ledger: Ledger,
        requests: Sequence[Request] | None = None,
        earlier_groups: Collection[str] = (),
    ) -> None:
        """Asks every source about every group that was played; what failed in its environment is
        not shown to anybody.

        A source that failed on more of them than the run allows is asked again: that is where the
        run stopped.

        Args:
            groups: the episodes of each.
            ledger: where requests are written down.
            requests: what to ask instead.
            earlier_groups: groups asked about earlier that still wait; a source's failures are
                counted over these too.
        """
        now = ledger.clock()
        self._again = {
            id_: again for id_, again in self._again.items() if again.group in earlier_groups
        }
        for source in self.sources:
            mine = (
                self._requests(source, groups, now)
                if requests is None
                else [r for r in requests if r.source == source.name]
            )
            ledger.add_requests(mine)
            waiting = {r["id"] for r in ledger.open_requests(groups)}
            asked = [r for r in mine if r.id in waiting]
            earlier = {
                id_: group
                for id_, group in self._round.get(source.name, {}).items()
                if group in earlier_groups
            }
            self._round[source.name] = earlier | {r.id: r.group for r in mine}
            failed = ledger.failed_requests([r.id for r in mine])
            # An outage stopped the run; it is over, perhaps.
            if len(failed) > self.max_failure_rate * len(mine):
                again = [
                    r for r in mine if r.id in failed and (r.deadline is None or r.deadline > now)
                ]
                self._again |= {r.id: Again(failed[r.id], r.group, r.deadline) for r in again}
                asked += again
            try:
                if asked:
                    source.given.request(asked)
            except (Exception, SystemExit, GeneratorExit) as error:
                raise TooManyFailures(
                    f"feedback source {source.name!r} cannot be asked: {worded(error)}"
                ) from error

    def _requests(
        self, source: Source, groups: Mapping[str, Sequence[Episode]], now: float
    ) -> list[Request]:
        deadline = None if source.deadline is None else now + source.deadline
        requests = []
        for group, members in groups.items():
            shown = tuple(e for e in members if e.ending != "failed" and e.turns)
            if not shown or _luck(source.name, shown[0]) >= source.share:
                continue
            requests += [
                Request(
                    source.kind,
                    q.target,
                    source.name,
                    slot,
                    deadline,
                    source.required,
                    q.ask,
                    q.episodes,
                )
                for q in source.given.plan(group, shown)
                for slot in range(source.raters)
                if not (source.kind == "group" and len(q.episodes) < 2)
            ]
        return requests

    def receive(self, ledger: Ledger) -> list[Answer]:
        """Hears every source once and records what is new.

        Raises:
            TooManyFailures: a source failed on more of what it was asked this round than the run
                allows.
            Paused: a source waits for a human decision.
            LedgerError: a source contradicts itself.
        """
        new: list[Answer] = []
        for source in self.sources:
            answers = [self._stamp(source, answer) for answer in self._poll(source)]
            recorded = ledger.add_feedback(answers)
            if answers:
                source.given.acknowledge([a.id for a in answers])
            reasons = sorted({a.reason for a in recorded if a.status == "failed"})[:3]
            asked = list(self._round.get(source.name, {}))
            # The rate is that of this round, as the ledger has it: a judge that dies late must not
            # live on its past.
            failed = len(ledger.failed_requests(asked)) if reasons else 0
            if failed > self.max_failure_rate * len(asked):
                raise TooManyFailures(
                    f"feedback source {source.name!r} failed on {failed} of {len(asked)} requests,"
                    f" more than max_failure_rate={self.max_failure_rate:g} allows. Reasons:"
                    f" {'; '.join(reasons)}. Nothing it failed on was scored."
                )
            new += recorded
        return new

    def waits_again(self, now: float) -> list[str]:
        """The groups of the requests that were asked again and are still without an answer, one for
        each request."""
        return [
            again.group
            for again in self._again.values()
            if again.deadline is None or again.deadline > now
        ]

    def _poll(self, source: Source) -> Sequence[Answer]:
        """A look that raises is tried again at the next poll; ten in a row stop the run."""
        try:
            answers = list(source.given.receive())
            for answer in answers:
                if not isinstance(answer, (Feedback, Comparison)):
                    raise TypeError(
                        f"it gave {type(answer).__name__}, neither Feedback nor Comparison"
                    )
        except Paused:
            raise
        except (Exception, SystemExit, GeneratorExit) as error:
            self._silent[source.name] = self._silent.get(source.name, 0) + 1
            reason = worded(error)
            if self._silent[source.name] == 1:
                warnings.warn(
                    f"feedback source {source.name!r} could not be heard: {reason}; trying again",
                    stacklevel=2,
                )
            if self._silent[source.name] >= LOOKS:
                raise TooManyFailures(
                    f"feedback source {source.name!r} could not be heard {LOOKS} times in a row:"
                    f" {reason}"
                ) from error
            return []
        self._silent[source.name] = 0
        return answers

    def _stamp(self, source: Source, answer: Answer) -> Answer:
        stamp = dataclasses.replace(
            answer.stamp, source=source.name, version=answer.stamp.version or source.version
        )
        again = self._again.pop(answer.stamp.request or "", None)
        if again is not None:
            answer = dataclasses.replace(
                answer, id=derive_id(answer.id, "again", again.failed), supersedes=again.failed
            )
        comment, details = valid(redact(answer.comment)), each_text(valid, redacted(answer.details))
        return dataclasses.replace(
            answer, stamp=stamp, reason=reason_text(answer.reason), comment=comment, details=details
        )
