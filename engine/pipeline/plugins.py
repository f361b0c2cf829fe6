"""The plugin manager: one `Plugins` object per run or command, no global.

Plugins are loaded one by one from the entry-point group `turnwise`, so that one that fails is
remembered with its reason and stops only the run that needs it. Turnwise's own parts are plugins of
its own distribution and always load; `TURNWISE_PLUGINS=a,b` restricts all others to those named
(empty: none).
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from types import FrameType
from typing import Any

import pluggy

from .. import hookspecs
from ..errors import NameClash, PluginError
from ..hookspecs import Factory
from ..protocols import RunView
from ..util.suggest import did_you_mean
from .signature import PLUGINS, checked_options, parameters_of

GROUP = "turnwise"

# The registration hooks and what one entry of each registry is called in messages.
REGISTRIES = {
    "register_judges": "judge",
    "register_models": "model",
    "register_combiners": "combiner",
    "register_aggregators": "aggregator",
    "register_renderers": "renderer",
    "register_credit": "credit method",
    "register_optimizers": "optimizer",
    "register_curricula": "curriculum",
    "register_backends": "backend",
    "register_stages": "stage",
}

# Gymnasium's registry is per process, so this is too: (plugin name, its id) -> environment ids, and
# the plugin, kept alive so that its id stays its own.
_envs_registered: dict[tuple[str, int], tuple[list[str], object]] = {}
_envs_lock = threading.Lock()


# What a plugin may raise without ending the command; Ctrl-C is the user's.
_THEIRS = (Exception, SystemExit, GeneratorExit)


@dataclass(slots=True)
class PluginInfo:
    """The state of one plugin: a line of `turnwise plugins`."""

    name: str
    version: str = ""
    hooks: list[str] = field(default_factory=list)
    registered: dict[str, list[str]] = field(default_factory=dict)
    failed: str = ""


class Plugins:
    """Loads plugins and keeps what they registered.

    Args:
        extra: plugin objects or modules given directly (tests, notebooks), by name.

    Raises:
        PluginError: an extra plugin is broken, or two plugins registered one name.
    """

    def __init__(self, extra: dict[str, object] | None = None) -> None:
        self.infos: dict[str, PluginInfo] = {}
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._factories: dict[str, dict[str, tuple[Factory, str]]] = {
            kind: {} for kind in REGISTRIES.values()
        }
        if os.environ.get("TURNWISE_TRACE_HOOKS"):
            self._manager.add_hookcall_monitoring(_called, _returned)
        self._clashes: dict[tuple[str, str], str] = {}
        self._warned: set[tuple[str, str]] = set()
        with _ctrl_c() as self._pressed:
            for entry in _entry_points():
                # A plugin that does not load must not take the others along; nothing is lost,
                # `turnwise plugins` shows why.
                self._add(entry.point.name, entry.version, entry.point.load, fatal=entry.is_ours)
        for name, plugin in (extra or {}).items():
            self._add(name, _version_of(plugin), partial(_given, plugin), fatal=True)

    def _add(self, name: str, version: str, load: Callable[[], object], *, fatal: bool) -> None:
        if name in self.infos:
            reason = (
                f"another plugin is called {name!r} too (version"
                f" {self.infos[name].version or 'unknown'})"
            )
            if fatal:
                raise PluginError(reason)
            while name in self.infos:
                name += "'"
            self.infos[name] = PluginInfo(name, version, failed=reason)
            return
        info = self.infos[name] = PluginInfo(name, version)
        try:
            plugin = load()
            _check_version(plugin)
            self._manager.register(plugin, name=name)
            self._manager.check_pending()
            info.hooks = sorted(
                caller.name for caller in self._manager.get_hookcallers(plugin) or []
            )
            if not info.hooks:
                raise PluginError("nothing in it is marked with @turnwise.hookimpl")
            collected = self._collect(name, plugin, info)
        except BaseException as error:  # whatever it is, it is theirs, except Ctrl-C
            if isinstance(error, KeyboardInterrupt) and self._pressed:
                raise
            # Neither plugin wins silently: a run that asks for the name stops.
            if isinstance(error, NameClash):
                self._clashes[error.kind, error.entry] = str(error)
            # Or check_pending would fail for every plugin after it.
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            info.failed = f"{type(error).__name__}: {error}"
            if fatal:
                raise PluginError(f"plugin {name!r} failed to load: {info.failed}") from error
            return
        for kind, entries in collected.items():
            self._factories[kind].update(entries)
            if entries:
                info.registered[kind] = sorted(entries)

    def adopt(self, name: str, module: object) -> None:
        """Adds a module that was imported for a run as a plugin, if it has hooks and is none yet.

        Raises:
            PluginError: it is broken, or registers a name that is taken.
        """
        marked = any(self._manager.parse_hookimpl_opts(module, name) for name in vars(module))
        if marked and module not in self._manager.get_plugins():
            self._add(name, "", partial(_given, module), fatal=True)

    def _collect(
        self, name: str, plugin: object, info: PluginInfo
    ) -> dict[str, dict[str, tuple[Factory, str]]]:
        """Calls the plugin's registration hooks alone, so that every entry has a known origin."""
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        collected: dict[str, dict[str, tuple[Factory, str]]] = {}
        for hook, kind in REGISTRIES.items():
            entries = collected.setdefault(kind, {})

            def register(
                entry: str,
                factory: Factory,
                kind: str = kind,
                entries: dict[str, tuple[Factory, str]] = entries,
            ) -> None:
                owner = self._factories[kind].get(entry) or entries.get(entry)
                if owner:
                    raise NameClash(kind, entry, owner[1], name)
                entries[entry] = (factory, name)

            self._manager.subset_hook_caller(hook, others)(register=register)
        key = (name, id(plugin))
        with _envs_lock:
            if key not in _envs_registered and "register_envs" in info.hooks:
                import gymnasium

                from ..environments.registry import MISSING

                before = dict(gymnasium.registry)
                for missing in self._manager.subset_hook_caller("register_envs", others)():
                    MISSING.update(missing or {})
                for env, spec in before.items():
                    if gymnasium.registry.get(env) is not spec:
                        gymnasium.registry[env] = spec
                        owner = next(
                            (o for (o, _), (envs, _) in _envs_registered.items() if env in envs),
                            "another module",
                        )
                        raise NameClash("environment", env, owner, name)
                _envs_registered[key] = (sorted(set(gymnasium.registry) - set(before)), plugin)
        if _envs_registered.get(key, ([], None))[0]:
            info.registered["environment"] = _envs_registered[key][0]
        return collected

    def names(self, kind: str) -> list[str]:
        """Returns the registered names of a kind, in order."""
        return sorted(self._factories[kind])

    def factory(self, kind: str, name: str) -> Callable[..., Any]:
        """Returns the factory registered under a name, imported if it was given as a string.

        Raises:
            PluginError: no such name; the message lists near ones and plugins that failed to load.
        """
        if (kind, name) in self._clashes:
            raise PluginError(self._clashes[kind, name])
        try:
            factory, owner = self._factories[kind][name]
        except KeyError:
            raise self.unknown(kind, name, self._factories[kind]) from None
        if not isinstance(factory, str):
            return factory
        module, _, attribute = factory.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except _THEIRS as error:
            if type(error).__module__.startswith("turnwise."):  # says itself what is wrong
                raise
            why = (
                str(error)
                if isinstance(error, (ImportError, AttributeError))
                else f"{type(error).__name__}: {error}"
            )
            raise PluginError(
                f"{kind} {name!r} of plugin {owner!r} cannot be imported from {factory!r}: {why}"
            ) from error

    def unknown(self, kind: str, name: str, known: Iterable[str]) -> PluginError:
        """Returns the error for a name that is not registered; it names plugins that failed to
        load, since they may have meant to register it."""
        return PluginError(f"no {kind} {name!r}.{did_you_mean(name, known)}{self.failures()}")

    def failures(self) -> str:
        """Returns " Plugins that failed to load: ..." for error messages; empty when all is
        well."""
        failed = [f"{info.name} ({info.failed})" for info in self.infos.values() if info.failed]
        return f" Plugins that failed to load: {'; '.join(failed)}." if failed else ""

    def create(self, kind: str, name: str, /, *args: Any, **options: Any) -> Any:
        """Calls a registered factory; one that has a parameter `plugins`, to look up the parts of
        other plugins, is given this object.

        Raises:
            PluginError: no such name, or options that the factory does not take (with the near ones
                it does) or refuses.
        """
        factory = self.factory(kind, name)
        options = checked_options(f"{kind} {name!r}", factory, len(args), options)
        if any(parameter.name == PLUGINS for parameter in parameters_of(factory) or ()):
            options[PLUGINS] = self
        try:
            return factory(*args, **options)
        except (TypeError, ValueError) as error:
            if type(error).__module__.startswith("turnwise."):  # says itself what is wrong
                raise
            raise PluginError(f"{kind} {name!r}: {error}") from error

    def call_event(self, event: str, **arguments: Any) -> None:
        """Calls an event hook; a failing listener warns once and does not stop the others."""
        for name, found in self._one_by_one(event, arguments):
            if isinstance(found, _THEIRS) and (name, event) not in self._warned:
                self._warned.add((name, event))
                warnings.warn(
                    f"plugin {name!r} failed in {event}: {type(found).__name__}: {found}",
                    stacklevel=2,
                )

    def costs(self, run: RunView) -> list[str]:
        """Returns what plugins say that a run will cost; one that fails says why instead."""
        lines: list[str] = []
        for name, found in self._one_by_one("costs", {"run": run}):
            if isinstance(found, _THEIRS):
                lines.append(f"{name} cannot say: {type(found).__name__}: {found}")
            else:
                lines += map(str, found)
        return lines

    def report_sections(self, ledger: Any, run: str) -> list[Any]:
        """Returns the sections that plugins add to a run's report; one that fails is replaced by
        its reason."""
        from ..records.report_section import ReportSection

        sections: list[Any] = []
        for name, found in self._one_by_one("report_sections", {"ledger": ledger, "run": run}):
            if isinstance(found, _THEIRS):
                failed = f"This part failed: {type(found).__name__}: {found}"
                sections.append(ReportSection(name, [failed]))
            else:
                sections += found
        return sections

    def _one_by_one(
        self, hook: str, arguments: Mapping[str, Any]
    ) -> Iterator[tuple[str, list[Any] | Exception | SystemExit | GeneratorExit]]:
        """Calls a hook of each plugin on its own, in pluggy's order; yields the plugin's name with
        all that it returned, or with what it raised."""
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            plugin = implementation.plugin
            others = [other for other in self._manager.get_plugins() if other is not plugin]
            found: list[Any] | Exception | SystemExit | GeneratorExit
            try:
                given = self._manager.subset_hook_caller(hook, others)(**arguments)
                found = [
                    each
                    for some in given
                    for each in ([some] if isinstance(some, str) else some or [])
                ]
            except _THEIRS as error:
                found = error
            yield implementation.plugin_name, found

    def call_commands(self, app: Any) -> None:
        """Lets every plugin add its commands; one that cannot is listed as FAILED."""
        for implementation in self._manager.hook.register_commands.get_hookimpls():
            others = [
                other for other in self._manager.get_plugins() if other is not implementation.plugin
            ]
            try:
                self._manager.subset_hook_caller("register_commands", others)(app=app)
            except _THEIRS as error:
                self.infos[
                    implementation.plugin_name
                ].failed = f"register_commands: {type(error).__name__}: {error}"


def _check_version(plugin: object) -> None:
    """Raises `PluginError` where a plugin was written for a later plugin API."""
    try:
        wanted: Any = plugin.TURNWISE_API  # type: ignore[attr-defined]
    except AttributeError:
        return
    if not isinstance(wanted, int) or wanted > hookspecs.VERSION:
        raise PluginError(
            f"it is written for version {wanted!r} of the plugin API, and this Turnwise has"
            f" {hookspecs.VERSION}: upgrade turnwise, or install an older version of the plugin"
        )


def _called(hook: str, implementations: Sequence[Any], arguments: Mapping[str, Any]) -> None:
    """Prints a hook call, for TURNWISE_TRACE_HOOKS."""
    whom = ", ".join(each.plugin_name for each in implementations) or "nothing"
    shown = ", ".join(sorted(arguments))
    print(f"turnwise: hook {hook}({shown}) calls {whom}", file=sys.stderr)


def _returned(
    outcome: Any, hook: str, implementations: Sequence[Any], arguments: Mapping[str, Any]
) -> None:
    """Prints what a hook call raised, for TURNWISE_TRACE_HOOKS."""
    if outcome.exception is not None:
        print(f"turnwise: hook {hook} raised {outcome.exception!r}", file=sys.stderr)


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Notices Ctrl-C: a KeyboardInterrupt without it was raised by the plugin itself.

    Yields the signals that came; only the main thread gets any.
    """
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield pressed
        return

    def noticed(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        before(number, frame)

    signal.signal(signal.SIGINT, noticed)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _version_of(plugin: Any) -> str:
    """Returns the version that a plugin given as an object states; empty where it states none."""
    try:
        return str(plugin.__version__)
    except AttributeError:
        return ""


def _given(plugin: object) -> object:
    return plugin


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry point of the group, with the name and version of what it is installed with."""

    point: metadata.EntryPoint
    distribution: str
    version: str

    @property
    def is_ours(self) -> bool:
        return self.distribution == "turnwise"


def _entry_points() -> list[_Entry]:
    """Returns entry points, ours first, then the others in order of name, as far as
    TURNWISE_PLUGINS allows them."""
    found: dict[tuple[str, str, str], _Entry] = {}
    stated: dict[int, tuple[str, str]] = {}  # name and version: each look reads a file
    for point in metadata.entry_points(group=GROUP):
        dist = point.dist
        if id(dist) not in stated:
            stated[id(dist)] = (dist.name, dist.version) if dist else ("", "")
        entry = _Entry(point, *stated[id(dist)])
        found[point.name, point.value, entry.distribution] = entry
    others = [e for e in found.values() if not e.is_ours]
    allowed = os.environ.get("TURNWISE_PLUGINS")
    if allowed is not None:
        names = {name.strip() for name in allowed.split(",") if name.strip()}
        unknown = names - {e.point.name for e in others}
        if unknown:
            raise PluginError(
                f"TURNWISE_PLUGINS names {sorted(unknown)}, which"
                f" {'is' if len(unknown) == 1 else 'are'} not installed."
                + did_you_mean(sorted(unknown)[0], [e.point.name for e in others])
            )
        others = [e for e in others if e.point.name in names]
    ours = [e for e in found.values() if e.is_ours]
    by_name = lambda e: (e.point.name, e.point.value)  # noqa: E731
    return sorted(ours, key=by_name) + sorted(others, key=by_name)
