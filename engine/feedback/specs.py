"""Read the entries of `feedback:` and make the sources they name."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from ..errors import ConfigError, PluginError
from ..pipeline.plugins import Plugins
from ..pipeline.signature import checked_options, parameters_of
from ..protocols import FeedbackSource, Giver, GroupJudge, Judge
from ..records.feedback import version_of
from ..util.ids import canonical_json, derive_id
from ..util.section import Section
from ..util.suggest import did_you_mean
from ..util.wording import name_of
from .judge_source import JudgeSource, judge_from

ENVIRONMENT = "environment"


def with_members(judge: Giver, name: str) -> Iterator[tuple[str, Giver]]:
    """A judge and its name, and where it is made of others (a mapping `members`, name to judge)
    those too: `rules.length`."""
    yield name, judge
    for inner, member in judge.members.items():
        yield from with_members(member, f"{name}.{inner}")


class Source(Section):
    """A source of this run, and how it is asked.

    Attributes:
        name: unique in the run.
        given: the source.
        version: stamped on its answers.
        weight: for the combiner; what is not required has none unless it is given.
        deadline: seconds after which an unanswered request counts as expired; None: never.
        raters: how many answers are asked for each item.
        required: whether groups wait for it before they train.
        share: of the groups, how many it is asked about; they are drawn at random.

    Raises:
        ConfigError: a setting that does not fit.
    """

    name: str
    given: FeedbackSource
    version: str
    weight: float | None = Field(default=None, allow_inf_nan=False)
    deadline: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    raters: int = Field(default=1, ge=1)
    required: bool = True
    share: float = Field(default=1.0, gt=0, le=1)

    @property
    def kind(self) -> str:
        """What its requests are about: "episode" or "group"."""
        return self.given.kind

    @model_validator(mode="after")
    def _weighs(self) -> Source:
        if self.weight is None:
            self.weight = 1.0 if self.required else 0.0
        if self.share < 1 and self.weight:
            raise ValueError(
                "it is asked about a share of the groups only, so it cannot be part of every"
                " group's reward: give it `required: false` and no `weight` (its answers calibrate,"
                " and train reward models), or leave `share` out"
            )
        return self


SETTINGS = tuple(name for name in Source.model_fields if name not in ("given", "version"))


def make_source(
    spec: Any, plugins: Plugins, made: dict[str, FeedbackSource] | None = None
) -> Source:
    """Returns a source from an entry of the config: a registered name; "package.module:function"; a
    mapping with one of these as `judge` and its options; a judge or source object; or a plain
    function of an episode.

    Args:
        spec: the entry.
        plugins: where names are looked up.
        made: sources that were made before, which entries of the same name, judge and options
            share; the new one is added.

    Raises:
        PluginError: an unknown name or option, or something that is none of these.
    """
    entry = _read(spec)
    made = {} if made is None else made
    if entry.key not in made:
        made[entry.key] = as_source(_made(entry, plugins))
    given = made[entry.key]
    own = {"name": entry.name, "given": given, "version": _version(entry, judge_of(given))}
    try:
        return Source(**{**entry.settings, **own})
    except ConfigError as error:
        what = str(error).removeprefix("source: ").removeprefix("source.")
        raise PluginError(f"feedback {entry.name!r}: {what}") from error


def environment_weight(spec: Any) -> float:
    """Returns the weight of the environment's own reward, as its entry says.

    Raises:
        PluginError: another key than `weight`, or a weight that is no number.
    """
    options = {k: v for k, v in spec.items() if k != "judge"} if isinstance(spec, Mapping) else {}
    weight = options.pop("weight", 1.0)
    if options:
        raise PluginError(
            f"{ENVIRONMENT!r} is the environment's own reward and takes a `weight` only, got"
            f" {sorted(map(str, options))}"
        )
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise PluginError(f"the weight of {ENVIRONMENT!r} must be a number, got {weight!r}")
    return float(weight)


def as_source(given: Any) -> FeedbackSource:
    """Returns a judge or source as a source."""
    return given if isinstance(given, FeedbackSource) else JudgeSource(given)


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
    """What another judge or source is made of, from entries as `make_source` takes them, with no
    settings but `name` and `weight`.

    For the factories of such judges: one that has a parameter `plugins` is given the run's. The
    judge keeps them in `members`, a mapping from name to what was given, through which the engine
    opens and closes them, lets them learn and saves their state; asking them is the judge's own
    business (`ask_judge` for those that answer at once).

    Args:
        specs: the entries.
        plugins: where names are looked up; default: what is installed.

    Raises:
        PluginError: an unknown name or option, two members of one name, or something that is no
            judge.
    """
    if isinstance(specs, (str, Mapping)) or not isinstance(specs, Sequence) or not specs:
        raise PluginError(
            "it takes a list of at least one judge, such as [{judge: length}, {judge: turns}],"
            f" got {specs!r}"
        )
    plugins = plugins or Plugins()
    members = []
    for spec in specs:
        entry = _read(spec)
        odd = sorted(set(entry.settings) - {"name", "weight"})
        if odd:
            raise PluginError(
                f"the member {entry.name!r} is asked with the whole it belongs to, so it has no"
                f" setting {odd[0]!r} of its own"
            )
        given = _made(entry, plugins)
        weight = entry.settings.get("weight")
        members.append(Member(entry.name, given, _version(entry, given), weight))
    names = [member.name for member in members]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise PluginError(f"two members are called {twice[0]!r}: give one a `name` of its own")
    return members


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of `feedback:` as it is written.

    Attributes:
        judge: a name, "package.module:function", or an object.
        options: of a judge that is named.
        settings: how it is asked.
    """

    judge: Any
    options: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What its answers are stamped with."""
        judge = self.judge
        if isinstance(judge, str):
            own = judge.partition(":")[2] or judge
        else:
            own = name_of(judge)
        return str(self.settings.get("name", own))

    @property
    def key(self) -> str:
        """Equal for entries that one judge can serve."""
        return canonical_json([self.name, _identity(self.judge), _identity(self.options)])


def _read(spec: Any) -> _Entry:
    if not isinstance(spec, Mapping):
        return _Entry(spec, {}, {})
    options = dict(spec)
    settings = {key: options.pop(key) for key in SETTINGS if key in options}
    if "judge" not in options:
        raise PluginError(f"a feedback entry given as a mapping needs `judge`, got {dict(spec)}")
    judge = options.pop("judge")
    if not isinstance(settings.get("name", ""), str):
        raise PluginError(f"`name` of a feedback entry must be a text, got {settings['name']!r}")
    if options and not isinstance(judge, str):
        raise PluginError(
            f"options {sorted(options)} are for registered judges; this one is an object already"
        )
    return _Entry(judge, options, settings)


def _made(entry: _Entry, plugins: Plugins) -> Giver:
    """Returns the judge or source that an entry speaks of."""
    judge = entry.judge
    if isinstance(judge, str):
        known = plugins.names("judge")
        if judge in known:
            _check_known(judge, parameters_of(plugins.factory("judge", judge)) or [], entry.options)
            judge = plugins.create("judge", judge, **entry.options)
        elif ":" in judge:
            judge = _imported(judge, entry.options)
        else:
            raise PluginError(
                f"{plugins.unknown('judge', judge, [ENVIRONMENT, *known])} One of your own is given"
                " as an object, or named as 'package.module:function'."
            )
    if inspect.isclass(judge):
        raise PluginError(f"{judge!r} is no judge but a class of them: give an instance")
    if isinstance(judge, (FeedbackSource, GroupJudge, Judge)):
        return judge
    if callable(judge):
        return judge_from(judge)
    raise PluginError(
        f"{judge!r} is no judge: derive its class from turnwise.Judge (score), GroupJudge (rank) or"
        " FeedbackSource (request, receive), or give a function of an episode"
    )


def _check_known(judge: str, takes: Sequence[inspect.Parameter], options: Iterable[str]) -> None:
    """Refuses an option that a judge does not take; near ones may be settings, which all sources
    have."""
    own = [
        p.name
        for p in takes
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "plugins"
    ]
    for option in options if not any(p.kind is p.VAR_KEYWORD for p in takes) else ():
        if option not in own:
            raise PluginError(
                f"judge {judge!r} has no option {option!r}."
                f"{did_you_mean(option, [*SETTINGS, *own])}"
            )


def _version(entry: _Entry, given: Giver) -> str:
    """Returns the version of a judge as an entry makes it: its own, and its options."""
    own = version_of(given)
    return derive_id(own, canonical_json(_plain(entry.options))) if entry.options else own


def _imported(path: str, options: Mapping[str, Any]) -> Any:
    """What "package.module:name" names: a function of an episode with options as keyword arguments,
    an instance made of a class and options, or an object, which takes none."""
    module, _, attribute = path.partition(":")
    try:
        home = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise PluginError(
            f"judge {path!r}: module {module!r} cannot be imported: {error}. The form is"
            " package.module:function; the module must be installed, or lie below the folder that"
            " turnwise is started from"
        ) from error
    try:
        found = getattr(home, attribute)
    except AttributeError:
        public = [name for name in vars(home) if not name.startswith("_")]
        raise PluginError(
            f"judge {path!r}: module {module!r} has no"
            f" {attribute!r}.{did_you_mean(attribute, public)}"
        ) from None
    if inspect.isclass(found):
        called = any("__call__" in vars(kind) for kind in found.__mro__)
        # Before it is made: that may do anything.
        if not called and not issubclass(found, (FeedbackSource, GroupJudge, Judge)):
            raise PluginError(
                f"judge {path!r}: the class {attribute!r} is no judge:"
                " derive it from turnwise.Judge (score), GroupJudge (rank) or FeedbackSource"
                " (request, receive), or make its instances callable with an episode"
            )
        _check_known(path, parameters_of(found) or [], options)
        options = checked_options(f"judge {path!r}", found, 0, options)
        try:
            return found(**options)
        except (TypeError, ValueError) as error:
            if type(error).__module__.startswith("turnwise."):  # says itself what is wrong
                raise
            raise PluginError(f"judge {path!r}: {error}") from error
    if not options:
        return found
    if not inspect.isfunction(found):
        raise PluginError(
            f"judge {path!r} is an object already and takes no options, got {sorted(options)}"
        )
    _check_known(path, (parameters_of(found) or [])[1:], options)
    options = checked_options(f"judge {path!r}", found, 1, options)
    return functools.partial(found, **options)


def _identity(value: Any) -> Any:
    """Returns plain data as it is, and which object it is of everything else."""
    if isinstance(value, Mapping):
        return {str(k): _identity(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    plain = value is None or isinstance(value, (bool, int, float, str))
    return value if plain else {"object": id(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def judge_of(source: FeedbackSource) -> Giver:
    """Returns what was given as a source: the judge itself where the source was made around it."""
    return source.judge if isinstance(source, JudgeSource) else source
