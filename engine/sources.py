"""Feedback sources of a run: makes one of any judge, asks them, and writes what they say into the ledger.

A judge that raises, answers for the wrong episodes, gives the wrong count or a number that is not finite has *failed*, for those
episodes; none of it is ever a score.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .environment import settle
from .episode import Episode, canonical_json, derive_id
from .feedback import Comparison, Context, Feedback, FeedbackSource, GroupJudge, Judge, Paused, Question, Request, version_of
from .ledger import Answer, Ledger
from .plugins import PluginError, Plugins, check_options
from .rollout import TooManyFailures
from .secrets import redact, redacted
from .suggest import did_you_mean
from .wording import each_text, told, tried, valid, worded

ENVIRONMENT = "environment"
LOOKS = 10
LIMIT = 600.0  # seconds that a judge's coroutine may take for a call
LATE = "no answer within"  # how the reason of one that took longer begins


class FunctionJudge:
    """A judge from a plain function of an episode. It returns a number, the episode's score; a sequence with one number (or None, no
    opinion) per turn, its turn scores; a `Feedback`; or None to abstain. It may be a coroutine."""

    def __init__(self, function: Callable[[Episode], Any]) -> None:
        self.function = function
        self.version = version_of(function)

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        return [_said(episode, settle(self.function(episode), LIMIT)) for episode in episodes]


def _said(episode: Episode, said: Any) -> Feedback:
    if isinstance(said, Feedback):
        return said
    if hasattr(said, "tolist"):  # an array of numbers, or a single one
        said = said.tolist()
    if isinstance(said, Sequence) and not isinstance(said, (str, bytes)):
        if all(number is None for number in said):
            return Feedback.abstained(episode.id, "no opinion of any turn")
        return Feedback(episode.id, turn_scores=tuple(said))
    return Feedback.abstained(episode.id) if said is None else Feedback(episode.id, score=said)


def with_members(judge: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A judge and its name, and where it is made of others (a mapping `members`, name to judge) those too: `rules.length`."""
    yield name, judge
    members = getattr(judge, "members", None)
    for inner, member in members.items() if isinstance(members, Mapping) else ():
        yield from with_members(member, f"{name}.{inner}")


class JudgeSource:
    """A judge as a source: what is requested is answered at the next `receive`."""

    def __init__(self, judge: Judge | GroupJudge) -> None:
        self.judge = judge
        self._waiting: list[Request] = []

    def request(self, requests: Sequence[Request]) -> None:
        self._waiting += requests

    def receive(self) -> list[Answer]:
        waiting, self._waiting = self._waiting, []
        if isinstance(self.judge, GroupJudge):
            return [self._rank(request) for request in waiting]
        return self._score(waiting)

    def _score(self, requests: Sequence[Request]) -> list[Answer]:
        if not requests:
            return []
        episodes = [r.episodes[0] for r in requests]
        answers, reason = tried(lambda: list(settle(self.judge.score(episodes), LIMIT)))  # type: ignore[union-attr]
        if reason:
            # One bad episode must not spoil the others: ask again one by one, but not one that hangs.
            if reason.startswith(LATE):
                warnings.warn(f"judge {type(self.judge).__name__}: {reason}; it was given up", RuntimeWarning, stacklevel=2)
            elif len(requests) > 1:
                return [answer for request in requests for answer in self._score([request])]
            return [self._failed(request, reason) for request in requests]
        if len(answers) != len(requests):
            return [self._failed(r, f"it gave {len(answers)} answers for {len(requests)} episodes") for r in requests]
        return [self._checked(r, answer) for r, answer in zip(requests, answers, strict=True)]

    def _checked(self, request: Request, answer: Any) -> Answer:
        if not isinstance(answer, Feedback):
            return self._failed(request, f"it gave {type(answer).__name__}, not Feedback")
        if answer.episode != request.target:
            return self._failed(request, f"it answered for episode {answer.episode!r} instead; answers must keep the order")
        if answer.turn_scores is not None and len(answer.turn_scores) != len(request.episodes[0].turns):
            return self._failed(
                request, f"it scored {len(answer.turn_scores)} turns of an episode of {len(request.episodes[0].turns)}"
            )
        return self._stamped(request, answer)

    def _rank(self, request: Request) -> Answer:
        answer, reason = tried(lambda: settle(self.judge.rank(request.episodes), LIMIT))  # type: ignore[union-attr]
        if reason:
            return self._failed(request, reason)
        if not isinstance(answer, Comparison) or answer.group != request.target:
            return self._failed(request, f"it must give a Comparison of group {request.target}, got {type(answer).__name__}")
        strangers = {e for tier in answer.ranking for e in tier} - {e.id for e in request.episodes}
        if strangers:
            return self._failed(request, f"it ranked episodes that were not shown: {sorted(strangers)[:3]}")
        return self._stamped(request, answer)

    def _failed(self, request: Request, reason: str) -> Answer:
        kind: type[Answer] = Feedback if request.kind == "episode" else Comparison
        return self._stamped(request, kind.failed(request.target, reason))

    def _stamped(self, request: Request, answer: Answer) -> Answer:
        try:
            canonical_json({"shown": dict(answer.shown), "details": dict(answer.details)})
        except (TypeError, ValueError) as error:
            return self._failed(request, f"`shown` or `details` is not plain JSON data: {error}")
        return dataclasses.replace(
            answer, id=answer.id or derive_id(request.id, "answer"), stamp=dataclasses.replace(answer.stamp, request=request.id)
        )


def ask_judge(judge: Judge, episodes: Sequence[Episode]) -> list[Feedback]:
    """What a judge says of each episode, in order. Whatever it does wrong is a `failed` answer, as in a run; nothing is raised."""
    source = JudgeSource(judge)
    source.request([Request("episode", episode.id, "", episodes=(episode,)) for episode in episodes])
    return [answer for answer in source.receive() if isinstance(answer, Feedback)]


@dataclass(slots=True)
class Source:
    """A source of this run, and how it is asked.

    Attributes:
        name: unique in the run.
        given: the source.
        weight: for the combiner; what is not required has none unless it is given.
        kind: "episode" or "group": what its requests are about.
        deadline: seconds after which an unanswered request counts as expired; None: never.
        raters: how many answers are asked for each item.
        required: whether groups wait for it before they train.
        share: of the groups, how many it is asked about; they are drawn at random.

    Raises:
        PluginError: a setting out of range.
    """

    name: str
    given: FeedbackSource
    version: str
    kind: str = "episode"
    weight: float | None = None
    deadline: float | None = None
    raters: int = 1
    required: bool = True
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.weight is None:
            self.weight = 1.0 if self.required else 0.0
        if self.raters < 1:
            raise PluginError(f"source {self.name!r}: raters must be at least 1, got {self.raters}")
        if not 0 < self.share <= 1:
            raise PluginError(f"source {self.name!r}: share must lie above 0 and up to 1, got {self.share}")
        if self.share < 1 and self.weight:
            raise PluginError(
                f"source {self.name!r} is asked about a share of the groups only, so it cannot be part of every group's reward: give it "
                "`required: false` and no `weight` (its answers calibrate, and train reward models), or leave `share` out"
            )


_SETTINGS = ("name", "weight", "deadline", "raters", "required", "kind", "share")


def make_source(spec: Any, plugins: Plugins) -> Source:
    """A source from an entry of the config: a registered name; "package.module:function"; a mapping with one of these as `judge` or
    `source` and its options; a judge or source object; or a plain function of an episode.

    Raises:
        PluginError: an unknown name or option, or something that is none of these.
    """
    name, given, version, settings = _named(spec, plugins)
    source, kind = as_source(given)
    return Source(**{"name": name, "given": source, "version": version, "kind": kind, **settings})


def as_source(given: Any) -> tuple[FeedbackSource, str]:
    """A judge or source as a source, and whether it is asked about an "episode" or a "group"."""
    if isinstance(given, FeedbackSource):
        return given, getattr(given, "kind", "episode")
    return JudgeSource(given), "group" if isinstance(given, GroupJudge) else "episode"


@dataclass(frozen=True, slots=True)
class Member:
    """A judge or source that is a part of another one.

    Attributes:
        given: a `Judge`, a `GroupJudge` or a `FeedbackSource`.
        weight: None where the entry gives none.
    """

    name: str
    given: Any
    version: str
    weight: float | None = None


def make_members(specs: Any, plugins: Plugins | None = None) -> list[Member]:
    """What another judge or source is made of, from entries as `make_source` takes them, with no settings but `name` and `weight`.

    For the factories of such judges: one that has a parameter `plugins` is given the run's. The judge keeps them in `members`, a mapping
    from name to what was given, through which the engine opens and closes them, lets them learn and saves their state; asking them is
    the judge's own business (`ask_judge` for those that answer at once).

    Args:
        plugins: where names are looked up; default: what is installed.

    Raises:
        PluginError: an unknown name or option, two members of one name, or something that is no judge.
    """
    if isinstance(specs, (str, Mapping)) or not isinstance(specs, Sequence) or not specs:
        raise PluginError(
            f"it takes a list of at least one judge, such as [{{judge: length}}, {{judge: turns}}], got {specs!r}"
        )
    plugins = plugins or Plugins()
    members = []
    for spec in specs:
        name, given, version, settings = _named(spec, plugins)
        odd = sorted(set(settings) - {"name", "weight"})
        if odd:
            raise PluginError(
                f"the member {name!r} is asked with the whole it belongs to, so it has no setting {odd[0]!r} of its own"
            )
        members.append(Member(settings.get("name", name), given, version, settings.get("weight")))
    names = [member.name for member in members]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise PluginError(f"two members are called {twice[0]!r}: give one a `name` of its own")
    return members


def _named(spec: Any, plugins: Plugins) -> tuple[str, Any, str, dict[str, Any]]:
    """What an entry of the config speaks of: its name, the judge or source, the version of that, and the settings it was given."""
    settings: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        options = dict(spec)
        settings = {key: options.pop(key) for key in _SETTINGS if key in options}
        given = [options.pop(key) for key in ("judge", "source") if key in options]
        if len(given) != 1:
            raise PluginError(f"a feedback entry needs either `judge` or `source`, got {dict(spec)}")
        spec = given[0]
        if options and not isinstance(spec, str):
            raise PluginError(f"options {sorted(options)} are for registered judges; this one is an object already")
    if isinstance(spec, str):
        name, known = spec, {kind: plugins.names(kind) for kind in ("judge", "feedback source")}
        kinds = [kind for kind, names in known.items() if spec in names]
        if kinds:
            takes = list(inspect.signature(plugins.factory(kinds[0], spec)).parameters.values())
            own = [p.name for p in takes if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "plugins"]
            for option in options if not any(p.kind is p.VAR_KEYWORD for p in takes) else ():
                if option not in own:  # it may be one that all sources have
                    raise PluginError(
                        f"{kinds[0]} {spec!r} has no option {option!r}.{did_you_mean(option, [*_SETTINGS, *own])}"
                    )
            spec = plugins.create(kinds[0], spec, **options)
        elif ":" in spec:
            name = spec.partition(":")[2]
            spec = _imported(spec, options)
        else:
            everything = [ENVIRONMENT, *known["judge"], *known["feedback source"]]
            raise PluginError(
                f"{plugins.unknown('judge or feedback source', spec, everything)} One of your own is given as an object, or named as "
                "'package.module:function'."
            )
    else:
        name = getattr(spec, "__name__", type(spec).__name__)
    version = derive_id(version_of(spec), canonical_json(_plain(options))) if options else version_of(spec)
    if inspect.isclass(spec):
        raise PluginError(f"{spec!r} is no feedback source but a class of them: give an instance")
    if isinstance(spec, (FeedbackSource, GroupJudge, Judge)):
        return name, spec, version, settings
    if callable(spec):
        return name, FunctionJudge(spec), version, settings
    raise PluginError(
        f"{spec!r} is no feedback source: it needs score(episodes), rank(group), request and receive, or to be a function of an episode"
    )


def _imported(path: str, options: Mapping[str, Any]) -> Any:
    """What "package.module:name" names: a function of an episode with options as keyword arguments, an instance made of a class and
    options, or an object, which takes none."""
    module, _, attribute = path.partition(":")
    try:
        home = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise PluginError(
            f"judge {path!r}: module {module!r} cannot be imported: {error}. The form is package.module:function; the module must be "
            "installed, or lie below the folder that turnwise is started from"
        ) from error
    try:
        found = getattr(home, attribute)
    except AttributeError:
        public = [name for name in vars(home) if not name.startswith("_")]
        raise PluginError(f"judge {path!r}: module {module!r} has no {attribute!r}.{did_you_mean(attribute, public)}") from None
    if inspect.isclass(found):
        called = any("__call__" in vars(kind) for kind in found.__mro__)
        if not called and not issubclass(found, (FeedbackSource, GroupJudge, Judge)):  # before it is made: that may do anything
            raise PluginError(
                f"judge {path!r}: the class {attribute!r} is no judge and no feedback source: it has none of score(episodes), rank(group), "
                "request and receive, and cannot be called"
            )
        check_options(f"judge {path!r}", found, 0, options)
        try:
            return found(**options)
        except (TypeError, ValueError) as error:
            if type(error).__module__.startswith("turnwise."):  # says itself what is wrong
                raise
            raise PluginError(f"judge {path!r}: {error}") from error
    if not options:
        return found
    if not inspect.isfunction(found):
        raise PluginError(f"judge {path!r} is an object already and takes no options, got {sorted(options)}")
    check_options(f"judge {path!r}", found, 1, options)
    return functools.partial(found, **options)


def _luck(source: str, episode: Episode) -> float:
    """A number in [0, 1) for a group; never of an id, since ids hold the run's name, which must not matter."""
    return int(derive_id("share", source, episode.stage, episode.update, episode.start.key)[:12], 16) / 16**12


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def check_order(sources: Sequence[Sources], before: Sequence[str]) -> None:
    """Raises PluginError for a judge that needs an earlier stage (its `after`) where there is none.

    Args:
        before: labels of the stages before the one that asks.
    """
    for each in sources:
        for source in each.sources:
            for name, judge in with_members(_giver(source), source.name):
                after = getattr(judge, "after", "")
                if after and not any(label == after or label.startswith(f"{after}-") for label in before):
                    raise PluginError(
                        f"the judge {name!r} needs what a {after!r} stage makes: put one before this stage, or give the judge a `path`"
                    )


def learners(sources: Sequence[Sources]) -> dict[str, Any]:
    """Sources and judges that have a state, by name, for checkpoints."""
    return {name: part for name, part in _givers(sources).items() if hasattr(part, "state_dict")}


def learn(sources: Sequence[Sources], run: Any, combiners: Sequence[Any] = ()) -> dict[str, float]:
    """Lets sources, judges and combiners that learn from what the run has heard so far do so, before it asks again; what they say of it are metrics."""
    found: dict[str, float] = {}
    for part in (*_givers(sources).values(), *combiners):
        if hasattr(part, "learn"):
            found |= part.learn(run) or {}
    return found


def _givers(sources: Sequence[Sources]) -> dict[str, Any]:
    """The sources and judges themselves, by a name that tells them apart."""
    return {
        name: part
        for i, each in enumerate(sources)
        for source in each.sources
        for name, part in with_members(_giver(source), f"source-{i}-{source.name}")
    }


def _giver(source: Source) -> Any:
    return source.given.judge if isinstance(source.given, JudgeSource) else source.given


@dataclass(frozen=True, slots=True)
class Again:
    """A request that is asked again: the answer that failed, the request's group and its deadline."""

    failed: str
    group: str
    deadline: float | None


@dataclass(slots=True)
class Sources:
    """All sources of a stage, asked and heard together.

    Args:
        plugins: where names are looked up.
        specs: the config's `feedback` list; "environment" stands for the environment's own reward and is not asked.
        max_failure_rate: share of failed answers above which the run stops.
    """

    sources: list[Source]
    environment_weight: float | None
    max_failure_rate: float = 0.5
    _silent: dict[str, int] = field(default_factory=dict)  # looks in a row that raised
    _round: dict[str, dict[str, str]] = field(default_factory=dict)  # what each source was asked this time: request to group
    _again: dict[str, Again] = field(default_factory=dict)  # requests that are asked again

    @classmethod
    def make(cls, specs: Sequence[Any], plugins: Plugins, max_failure_rate: float) -> Sources:
        environment_weight: float | None = None
        sources = []
        for spec in specs:
            name = spec.get("judge", spec.get("source")) if isinstance(spec, Mapping) else spec
            if isinstance(name, str) and name == ENVIRONMENT:
                environment_weight = float(spec.get("weight", 1.0)) if isinstance(spec, Mapping) else 1.0
            else:
                sources.append(make_source(spec, plugins))
        names = [s.name for s in sources]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise PluginError(f"two feedback sources are called {sorted(twice)[0]!r}: give one a `name` of its own")
        return cls(sources, environment_weight, max_failure_rate)

    @property
    def weights(self) -> dict[str, float]:
        own = {} if self.environment_weight is None else {ENVIRONMENT: self.environment_weight}
        return own | {s.name: s.weight or 0.0 for s in self.sources}

    def open(self, folder: Path, ledger: Ledger, seed: int, update: int = 0, run: str = "") -> None:
        for source in self.sources:
            for name, part in with_members(_giver(source), source.name):
                if hasattr(part, "open"):
                    part.open(Context(name, folder, ledger.clock, seed, update, ledger, run))

    def close(self) -> None:
        for source in self.sources:
            for _, part in with_members(_giver(source), source.name):
                if hasattr(part, "close"):
                    part.close()

    def ask(
        self,
        groups: Mapping[str, Sequence[Episode]],
        ledger: Ledger,
        requests: Sequence[Request] | None = None,
        beside: Collection[str] = (),
    ) -> None:
        """Asks every source about every group that was played; what failed in its environment is not shown to anybody.

        A source that failed on more of them than the run allows is asked again: that is where the run stopped.

        Args:
            requests: what to ask instead.
            beside: groups asked about earlier that still wait; a source's failures are counted over these too.
        """
        now = ledger.clock()
        self._again = {id_: again for id_, again in self._again.items() if again.group in beside}
        for source in self.sources:
            mine = self._requests(source, groups, now) if requests is None else [r for r in requests if r.source == source.name]
            ledger.add_requests(mine)
            waiting = {r["id"] for r in ledger.open_requests(groups)}
            asked = [r for r in mine if r.id in waiting]
            earlier = {id_: group for id_, group in self._round.get(source.name, {}).items() if group in beside}
            self._round[source.name] = earlier | {r.id: r.group for r in mine}
            failed = ledger.failed_requests([r.id for r in mine])
            if len(failed) > self.max_failure_rate * len(mine):  # an outage stopped the run; it is over, perhaps
                again = [r for r in mine if r.id in failed and (r.deadline is None or r.deadline > now)]
                self._again |= {r.id: Again(failed[r.id], r.group, r.deadline) for r in again}
                asked += again
            try:
                if asked:
                    source.given.request(asked)
            except Exception as error:
                raise TooManyFailures(f"feedback source {source.name!r} cannot be asked: {worded(error)}") from error

    def _requests(self, source: Source, groups: Mapping[str, Sequence[Episode]], now: float) -> list[Request]:
        deadline = None if source.deadline is None else now + source.deadline
        requests = []
        for group, members in groups.items():
            shown = tuple(e for e in members if e.ending != "failed" and e.turns)
            if not shown or _luck(source.name, shown[0]) >= source.share:
                continue
            if hasattr(source.given, "plan"):
                questions = source.given.plan(group, shown)
            elif source.kind == "group":
                questions = [Question(group, shown)]
            else:
                questions = [Question(e.id, (e,)) for e in shown]
            requests += [
                Request(source.kind, q.target, source.name, slot, deadline, source.required, q.ask, q.episodes)  # type: ignore[arg-type]
                for q in questions
                for slot in range(source.raters)
                if not (source.kind == "group" and len(q.episodes) < 2)
            ]
        return requests

    def receive(self, ledger: Ledger) -> list[Answer]:
        """Hears every source once and records what is new.

        Raises:
            TooManyFailures: a source failed on more of what it was asked this round than the run allows.
            Paused: a source waits for somebody's decision.
            LedgerError: a source contradicts itself.
        """
        new: list[Answer] = []
        for source in self.sources:
            answers = [self._stamp(source, answer) for answer in self._hear(source)]
            recorded = ledger.add_feedback(answers)
            if hasattr(source.given, "acknowledge") and answers:
                source.given.acknowledge([a.id for a in answers])
            reasons = sorted({a.reason for a in recorded if a.status == "failed"})[:3]
            asked = list(self._round.get(source.name, {}))
            # The rate is that of this round, as the ledger has it: a judge that dies late must not live on its past.
            failed = len(ledger.failed_requests(asked)) if reasons else 0
            if failed > self.max_failure_rate * len(asked):
                raise TooManyFailures(
                    f"feedback source {source.name!r} failed on {failed} of {len(asked)} requests, more than max_failure_rate="
                    f"{self.max_failure_rate:g} allows. Reasons: {'; '.join(reasons)}. Nothing it failed on was scored."
                )
            new += recorded
        return new

    def waits_again(self, now: float) -> list[str]:
        """The groups of the requests that were asked again and are still without an answer, one for each request."""
        return [again.group for again in self._again.values() if again.deadline is None or again.deadline > now]

    def _hear(self, source: Source) -> Sequence[Answer]:
        """A look that raises is tried again at the next poll; ten in a row stop the run."""
        try:
            heard = list(source.given.receive())
        except Paused:
            raise
        except (Exception, SystemExit, GeneratorExit) as error:
            self._silent[source.name] = self._silent.get(source.name, 0) + 1
            said = worded(error)
            if self._silent[source.name] == 1:
                warnings.warn(f"feedback source {source.name!r} could not be heard: {said}; trying again", stacklevel=2)
            if self._silent[source.name] >= LOOKS:
                raise TooManyFailures(
                    f"feedback source {source.name!r} could not be heard {LOOKS} times in a row: {said}"
                ) from error
            return []
        self._silent[source.name] = 0
        return heard

    def _stamp(self, source: Source, answer: Answer) -> Answer:
        stamp = dataclasses.replace(answer.stamp, source=source.name, version=answer.stamp.version or source.version)
        again = self._again.pop(answer.stamp.request or "", None)
        if again is not None:
            answer = dataclasses.replace(answer, id=derive_id(answer.id, "again", again.failed), supersedes=again.failed)
        comment, details = valid(redact(answer.comment)), each_text(valid, redacted(answer.details))
        return dataclasses.replace(answer, stamp=stamp, reason=told(answer.reason), comment=comment, details=details)
