"""Makes the feedback sources of a stage, asks them, and writes their answers into the ledger.

A judge that raises, answers for the wrong episodes, gives the wrong count or a number that is not
finite has *failed*, for those episodes; none of it is ever a score.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Paused, PluginError, TooManyFailures
from ..ledger.ledger import Ledger
from ..pipeline.plugins import Plugins
from ..protocols import Combiner, Context, FeedbackSource, Giver
from ..records.episode import Episode
from ..records.feedback import Answer, Comparison, Feedback, Request, version_of
from ..util.ids import derive_id
from ..util.secrets import redact, redacted
from ..util.wording import each_text, reason_text, valid, worded
from .judge_source import JudgeSource
from .requests import in_time, requests_of
from .specs import (
    ENVIRONMENT,
    Source,
    environment_weight,
    judge_of,
    make_source,
    with_members,
)

LOOKS = 10


@dataclass(frozen=True, slots=True)
class Again:
    """A request that is asked again: the answer that failed, the request's group and its
    deadline."""

    failed: str
    group: str
    deadline: float | None


@dataclass(slots=True)
class Asked:
    """A judge or source of a stage, and what it is asked at present.

    Attributes:
        name, version: stamped on its answers.
        given: the source itself.
        uses: index of each environment that it is asked about, and the settings there.
        round: what it was asked this time, request to group.
        ahead: requests that it was given before their round.
        failed_looks: looks in a row that raised.
    """

    name: str
    version: str
    given: FeedbackSource
    uses: list[tuple[int, Source]] = field(default_factory=list)
    round: dict[str, str] = field(default_factory=dict)
    ahead: set[str] = field(default_factory=set)
    failed_looks: int = 0

    @property
    def may_be_ahead(self) -> bool:
        """Whether it may be asked before a round is there: not what answers while one waits for it,
        nor what learns between rounds from the feedback so far."""
        works = not isinstance(self.given, JudgeSource) or self.given.begins
        parts = dict(with_members(judge_of(self.given), self.name)).values()
        return works and all(type(part).learn is Giver.learn for part in parts)


@dataclass(slots=True)
class Sources:
    """All sources of a stage, asked and heard together. One that several environments of a mixture
    name, by the same name and with the same options, is made once and serves all of them.

    Attributes:
        of_env: for each environment, the sources that are asked about its conversations.
        env_weights: for each environment, the weight of its own reward; None: it does not count.
        max_failure_rate: share of failed answers above which the run stops.
    """

    of_env: list[list[Source]]
    env_weights: list[float | None]
    max_failure_rate: float = 0.5
    _again: dict[str, Again] = field(default_factory=dict)  # requests that are asked again
    _asked: list[Asked] = field(default_factory=list)
    _opened: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        found: dict[int, Asked] = {}
        for env, own in enumerate(self.of_env):
            for source in own:
                new = Asked(source.name, source.version, source.given)
                asked = found.setdefault(id(source.given), new)
                if asked.name != source.name:
                    raise PluginError(
                        f"one object is given as {asked.name!r} and as {source.name!r}, so that"
                        " its answers would have one name only: make one for each"
                    )
                asked.uses.append((env, source))
        self._asked = list(found.values())
        self._check_twins()

    def _check_twins(self) -> None:
        """Refuses judges of one name that judge alike and are two: each would have a budget, and be
        watched, for itself. They differ in options that say nothing of their answers."""
        seen: dict[tuple[str, str], Giver] = {}
        for name, judge in self._judges():
            if not judge.may_change:
                continue
            if seen.setdefault((name, version_of(judge)), judge) is not judge:
                raise PluginError(
                    f"two judges are called {name!r} and judge alike, but for options that say"
                    f" nothing of their answers ({', '.join(sorted(judge.may_change))}). For one"
                    " judge of several environments make the entries equal, or give the same"
                    " object; for two, give each a `name` of its own"
                )

    def _judges(self) -> Iterator[tuple[str, Giver]]:
        """Yields every judge and source, and what they are made of, with their names."""
        for asked in self._asked:
            yield from with_members(judge_of(asked.given), asked.name)

    @classmethod
    def make(
        cls, feedback: Sequence[Sequence[Any]], plugins: Plugins, max_failure_rate: float
    ) -> Sources:
        """Makes the sources of a stage.

        Args:
            feedback: for each environment, its `feedback` list; "environment" stands for the
                environment's own reward and is not asked.
            plugins: where names are looked up.
            max_failure_rate: share of failed answers above which the run stops.

        Raises:
            PluginError: what `make_source` refuses, or two sources of one name in a list.
        """
        of_env: list[list[Source]] = []
        env_weights: list[float | None] = []
        made: dict[str, FeedbackSource] = {}
        for specs in feedback:
            if isinstance(specs, (str, Mapping)):
                raise PluginError(
                    f"`feedback` must be a list of sources for each environment, got {specs!r}"
                )
            own: list[Source] = []
            weight: float | None = None
            for spec in specs:
                name = spec.get("judge") if isinstance(spec, Mapping) else spec
                if isinstance(name, str) and name == ENVIRONMENT:
                    weight = environment_weight(spec)
                else:
                    own.append(make_source(spec, plugins, made))
            names = [s.name for s in own]
            twice = {n for n in names if names.count(n) > 1}
            if twice:
                raise PluginError(
                    f"two feedback sources are called {sorted(twice)[0]!r}: give one a `name` of"
                    " its own"
                )
            of_env.append(own)
            env_weights.append(weight)
        return cls(of_env, env_weights, max_failure_rate)

    def weights(self, env: int) -> dict[str, float]:
        """Returns the weights of an environment's sources by name, 0 where none is stated, and that
        of its own reward where it counts."""
        weight = self.env_weights[env]
        own = {} if weight is None else {ENVIRONMENT: weight}
        return own | {s.name: s.weight or 0.0 for s in self.of_env[env]}

    def by_name(self) -> dict[str, FeedbackSource]:
        """Returns the sources by name."""
        return {asked.name: asked.given for asked in self._asked}

    def givers(self) -> dict[str, Giver]:
        """Returns the judges and sources themselves and what they are made of, by a name that tells
        them apart: what a checkpoint keeps their states under."""
        return {
            f"source-{i}-{name}": part
            for i, asked in enumerate(self._asked)
            for name, part in with_members(judge_of(asked.given), asked.name)
        }

    def check_order(self, before: Sequence[str]) -> None:
        """Refuses a judge that needs an earlier stage (its `after`) where there is none.

        Args:
            before: labels of the stages before the one that asks.

        Raises:
            PluginError: such a judge, by name.
        """
        for name, judge in self._judges():
            after = judge.after
            if after and not any(
                label == after or label.startswith(f"{after}-") for label in before
            ):
                raise PluginError(
                    f"the judge {name!r} needs what a {after!r} stage makes: put one before this"
                    " stage, or give the judge a `path`"
                )

    def learn(self, run: Any, combiners: Sequence[Combiner] = ()) -> dict[str, float]:
        """Lets sources, judges and combiners that learn from the answers so far do so, before the
        run asks again; returns their metrics."""
        found: dict[str, float] = {}
        parts: list[Giver | Combiner] = [*self.givers().values(), *combiners]
        for part in parts:
            found |= part.learn(run) or {}
        return found

    def open(self, folder: Path, ledger: Ledger, seed: int, update: int = 0, run: str = "") -> None:
        """Opens every source's judge and its members, each with a context of its own; where one
        cannot be opened, those before it are closed."""
        try:
            for name, part in self._judges():
                part.open(Context(name, folder, ledger.clock, seed, update, ledger, run))
                self._opened.callback(part.close)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes what was opened, also where closing one of them raises; cancels what judges that
        are coroutines have begun."""
        for asked in self._asked:
            if isinstance(asked.given, JudgeSource):
                asked.given.close()
        self._opened.close()

    def ask(
        self,
        groups: Sequence[Mapping[str, Sequence[Episode]]],
        ledger: Ledger,
        requests: Sequence[Request] | None = None,
        earlier_groups: Collection[str] = (),
        ahead: bool = False,
    ) -> None:
        """Asks every source about every group that was played; what failed in its environment is
        shown to no rater.

        A source that failed on more of them than the run allows is asked again: that is where the
        run stopped.

        Args:
            groups: for each environment, the episodes of each of its groups.
            ledger: where requests are written down.
            requests: what to ask instead.
            earlier_groups: groups asked about earlier that still wait; a source's failures are
                counted over these too.
            ahead: their round is not yet: they will be asked about again then, and what a source
                was given is not given twice. Sources that may not be asked ahead are left out.

        Raises:
            TooManyFailures: a source cannot be asked, or failed ahead on more of this round than
                the run allows.
        """
        now = ledger.clock()
        if not ahead:
            self._again = {
                id_: again for id_, again in self._again.items() if again.group in earlier_groups
            }
        for asked in self._asked:
            if ahead and not asked.may_be_ahead:
                continue
            mine = (
                [r for env, source in asked.uses for r in requests_of(source, groups[env], now)]
                if requests is None
                else [r for r in requests if r.source == asked.name]
            )
            ledger.add_requests(mine)
            waiting = {
                r["id"] for r in ledger.open_requests([key for own in groups for key in own])
            }
            to_ask = [r for r in mine if r.id in waiting - asked.ahead]
            if ahead:
                with suppress(TooManyFailures):  # it is asked again when it is their round
                    _give(asked, to_ask)
                    asked.ahead.update(r.id for r in to_ask)
                continue
            ids = {r.id for r in mine}
            was_ahead = bool(asked.ahead & ids)
            asked.ahead -= ids
            earlier = {id_: group for id_, group in asked.round.items() if group in earlier_groups}
            asked.round = earlier | {r.id: r.group for r in mine}
            failed = ledger.failed_requests([r.id for r in mine])
            if was_ahead:
                self._refuse_failures(asked, failed, ledger)
            # Else an outage stopped the run; it is over, perhaps.
            elif len(failed) > self.max_failure_rate * len(mine):
                again = [
                    r for r in mine if r.id in failed and (r.deadline is None or r.deadline > now)
                ]
                self._again |= {r.id: Again(failed[r.id], r.group, r.deadline) for r in again}
                to_ask += again
            _give(asked, to_ask)

    def receive(self, ledger: Ledger) -> list[Answer]:
        """Hears every source once and records what is new.

        Raises:
            TooManyFailures: a source failed on more of what it was asked this round than the run
                allows.
            Paused: a source waits for a human decision.
            LedgerError: a source contradicts itself.
        """
        new: list[Answer] = []
        for asked in self._asked:
            answers = in_time(ledger, [self._stamp(asked, answer) for answer in _poll(asked)])
            recorded = ledger.add_feedback(answers)
            if answers:
                asked.given.acknowledge([a.id for a in answers])
            if any(answer.status == "failed" for answer in answers):
                # The rate is that of this round, as the ledger has it: a judge that dies late must
                # not live on its past.
                failed = ledger.failed_requests(list(asked.round))
                self._refuse_failures(asked, failed, ledger)
            new += recorded
        return new

    def _refuse_failures(self, asked: Asked, failed: Mapping[str, str], ledger: Ledger) -> None:
        """Raises `TooManyFailures` where a source failed on more of its round than the run
        allows.

        Args:
            asked: the source.
            failed: its answers that failed, by request.
            ledger: where they are.
        """
        if len(failed) <= self.max_failure_rate * len(asked.round):
            return
        answers = ledger.feedback(ids=sorted(failed.values()), late=True)
        reasons = sorted({answer.reason for answer in answers})[:3]
        raise TooManyFailures(
            f"feedback source {asked.name!r} failed on {len(failed)} of {len(asked.round)}"
            f" requests, more than max_failure_rate={self.max_failure_rate:g} allows."
            f" Reasons: {'; '.join(reasons)}. Nothing it failed on was scored."
        )

    def waits_again(self, now: float) -> list[str]:
        """Returns the groups of the requests that were asked again and are still without an answer,
        one for each request."""
        return [
            again.group
            for again in self._again.values()
            if again.deadline is None or again.deadline > now
        ]

    def _stamp(self, asked: Asked, answer: Answer) -> Answer:
        stamp = dataclasses.replace(
            answer.stamp, source=asked.name, version=answer.stamp.version or asked.version
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


def _give(asked: Asked, requests: list[Request]) -> None:
    """Gives requests to a source.

    Raises:
        TooManyFailures: it cannot take them.
    """
    try:
        if requests:
            asked.given.request(requests)
    except (Exception, SystemExit, GeneratorExit) as error:
        raise TooManyFailures(
            f"feedback source {asked.name!r} cannot be asked: {worded(error)}"
        ) from error


def _poll(asked: Asked) -> Sequence[Answer]:
    """A look that raises is tried again at the next poll; ten in a row stop the run."""
    try:
        answers = list(asked.given.receive())
        for answer in answers:
            if not isinstance(answer, (Feedback, Comparison)):
                raise TypeError(f"it gave {type(answer).__name__}, neither Feedback nor Comparison")
    except Paused:
        raise
    except (Exception, SystemExit, GeneratorExit) as error:
        asked.failed_looks += 1
        reason = worded(error)
        if asked.failed_looks == 1:
            warnings.warn(
                f"feedback source {asked.name!r} could not be heard: {reason}; trying again",
                stacklevel=2,
            )
        if asked.failed_looks >= LOOKS:
            raise TooManyFailures(
                f"feedback source {asked.name!r} could not be heard {LOOKS} times in a row:"
                f" {reason}"
            ) from error
        return []
    asked.failed_looks = 0
    return answers
