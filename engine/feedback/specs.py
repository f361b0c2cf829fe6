"""Read the entries of `feedback:` and make the sources they name."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PluginError
from ..pipeline.plugins import Plugins, check_options
from ..protocols import FeedbackSource, Giver, GroupJudge, Judge
from ..records.feedback import version_of
from ..util.ids import canonical_json, derive_id
from ..util.suggest import did_you_mean
from .judge_source import FunctionJudge, JudgeSource

ENVIRONMENT = "environment"


def with_members(judge: Giver, name: str) -> Iterator[tuple[str, Giver]]:
    """A judge and its name, and where it is made of others (a mapping `members`, name to judge)
    those too: `rules.length`."""
    yield name, judge
    for inner, member in judge.members.items():
        yield from with_members(member, f"{name}.{inner}")


@dataclass(slots=True)
class Source:
    """A source of this run, and how it is asked.

    Attributes:
        name: unique in the run.
        given: the source.
        weight: for the combiner; what is not required has none unless it is given.
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
    weight: float | None = None
    deadline: float | None = None
    raters: int = 1
    required: bool = True
    share: float = 1.0

    @property
    def kind(self) -> str:
        """What its requests are about: "episode" or "group"."""
        return self.given.kind

    def __post_init__(self) -> None:
        if self.weight is None:
            self.weight = 1.0 if self.required else 0.0
        if self.raters < 1:
            raise PluginError(f"source {self.name!r}: raters must be at least 1, got {self.raters}")
        if not 0 < self.share <= 1:
            raise PluginError(
                f"source {self.name!r}: share must lie above 0 and up to 1, got {self.share}"
            )
        if self.share < 1 and self.weight:
            raise PluginError(
                f"source {self.name!r} is asked about a share of the groups only, so it cannot be"
                " part of every group's reward: give it `required: false` and no `weight` (its"
                " answers calibrate, and train reward models), or leave `share` out"
            )


_SETTINGS = ("name", "weight", "deadline", "raters", "required", "share")


def make_source(spec: Any, plugins: Plugins) -> Source:
    """A source from an entry of the config: a registered name; "package.module:function"; a mapping
    with one of these as `judge` or `source` and its options; a judge or source object; or a plain
    function of an episode.

    Raises:
        PluginError: an unknown name or option, or something that is none of these.
    """
    name, given, version, settings = _named(spec, plugins)
    return Source(**{"name": name, "given": as_source(given), "version": version, **settings})


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
        name, given, version, settings = _named(spec, plugins)
        odd = sorted(set(settings) - {"name", "weight"})
        if odd:
            raise PluginError(
                f"the member {name!r} is asked with the whole it belongs to, so it has no setting"
                f" {odd[0]!r} of its own"
            )
        members.append(Member(settings.get("name", name), given, version, settings.get("weight")))
    names = [member.name for member in members]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise PluginError(f"two members are called {twice[0]!r}: give one a `name` of its own")
    return members


def _named(spec: Any, plugins: Plugins) -> tuple[str, Any, str, dict[str, Any]]:
    """What an entry of the config speaks of: its name, the judge or source, the version of that,
    and the settings it was given."""
    settings: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        options = dict(spec)
        settings = {key: options.pop(key) for key in _SETTINGS if key in options}
        given = [options.pop(key) for key in ("judge", "source") if key in options]
        if len(given) != 1:
            raise PluginError(
                f"a feedback entry needs either `judge` or `source`, got {dict(spec)}"
            )
        spec = given[0]
        if options and not isinstance(spec, str):
            raise PluginError(
                f"options {sorted(options)} are for registered judges; this one is an object"
                " already"
            )
    if isinstance(spec, str):
        name, known = spec, {kind: plugins.names(kind) for kind in ("judge", "feedback source")}
        kinds = [kind for kind, names in known.items() if spec in names]
        if kinds:
            takes = list(inspect.signature(plugins.factory(kinds[0], spec)).parameters.values())
            own = [
                p.name
                for p in takes
                if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "plugins"
            ]
            for option in options if not any(p.kind is p.VAR_KEYWORD for p in takes) else ():
                if option not in own:  # it may be one that all sources have
                    raise PluginError(
                        f"{kinds[0]} {spec!r} has no option"
                        f" {option!r}.{did_you_mean(option, [*_SETTINGS, *own])}"
                    )
            spec = plugins.create(kinds[0], spec, **options)
        elif ":" in spec:
            name = spec.partition(":")[2]
            spec = _imported(spec, options)
        else:
            everything = [ENVIRONMENT, *known["judge"], *known["feedback source"]]
            raise PluginError(
                f"{plugins.unknown('judge or feedback source', spec, everything)} One of your own"
                " is given as an object, or named as 'package.module:function'."
            )
    else:
        name = getattr(spec, "__name__", type(spec).__name__)
    version = (
        derive_id(version_of(spec), canonical_json(_plain(options)))
        if options
        else version_of(spec)
    )
    if inspect.isclass(spec):
        raise PluginError(f"{spec!r} is no feedback source but a class of them: give an instance")
    if isinstance(spec, (FeedbackSource, GroupJudge, Judge)):
        return name, spec, version, settings
    if callable(spec):
        return name, FunctionJudge(spec), version, settings
    raise PluginError(
        f"{spec!r} is no feedback source: derive its class from turnwise.Judge (score), GroupJudge"
        " (rank) or FeedbackSource (request, receive), or give a function of an episode"
    )


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
                f"judge {path!r}: the class {attribute!r} is no judge and no feedback source:"
                " derive it from turnwise.Judge (score), GroupJudge (rank) or FeedbackSource"
                " (request, receive), or make its instances callable with an episode"
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
        raise PluginError(
            f"judge {path!r} is an object already and takes no options, got {sorted(options)}"
        )
    check_options(f"judge {path!r}", found, 1, options)
    return functools.partial(found, **options)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def judge_of(source: Source) -> Any:
    """Returns what was given as the source: the judge itself where a source was made around it."""
    return source.given.judge if isinstance(source.given, JudgeSource) else source.given
