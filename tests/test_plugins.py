"""Loading plugins: isolation, clashes, misspelt hooks, options, events."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import gymnasium
import pydantic
import pytest
import turnwise
import typer
from turnwise.engine.errors import PluginError
from turnwise.engine.pipeline.plugins import Plugins
from turnwise.engine.pipeline.signature import checked_options


def plugin(**functions: Callable[..., object]) -> types.ModuleType:
    module = types.ModuleType("theirs")
    for name, function in functions.items():
        setattr(module, name, turnwise.hookimpl(function))
    return module


def broken_entry(monkeypatch: pytest.MonkeyPatch, name: str, load: Callable[[], object]) -> None:
    """An entry point of somebody else's distribution."""
    from importlib import metadata

    real = metadata.entry_points

    class Entry:
        value = "somewhere:else"
        dist = types.SimpleNamespace(name="other", version="9")

    Entry.name, Entry.load = name, staticmethod(load)  # type: ignore[attr-defined]
    ours = [e for e in real(group="turnwise") if e.dist.name == "turnwise"]
    monkeypatch.setattr(metadata, "entry_points", lambda group: [*ours, Entry()])


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (
            lambda: (_ for _ in ()).throw(ImportError("no module named acme_sdk")),
            "ImportError: no module named acme_sdk",
        ),
        (lambda: (_ for _ in ()).throw(SystemExit(1)), "SystemExit"),
        (lambda: (_ for _ in ()).throw(GeneratorExit("mine")), "GeneratorExit: mine"),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt("mine")), "KeyboardInterrupt: mine"),
        (lambda: (_ for _ in ()).throw(asyncio.CancelledError("mine")), "CancelledError: mine"),
        (lambda: exec("1 +"), "SyntaxError"),
        (lambda: plugin(register_credits=lambda register: None), "register_credits"),
        (lambda: plugin(register_credit=lambda regster: None), "regster"),
        (lambda: plugin(register_judges=lambda register: 1 / 0), "ZeroDivisionError"),
        (
            lambda: plugin(register_optimizers=lambda register: register("ppo", dict)),
            "optimizer 'ppo' is registered by both 'optimizers' and 'theirs'",
        ),
        (
            lambda: plugin(register_envs=lambda: gymnasium.register("turnwise/Maze-v0", dict)),
            "both 'envs' and 'theirs'",
        ),
    ],
    ids=[
        "import",
        "exit",
        "generator exit",
        "interrupt",
        "cancelled",
        "syntax",
        "misspelt hook",
        "misspelt argument",
        "raises",
        "name clash",
        "environment clash",
    ],
)
def test_a_plugin_that_fails_is_listed_and_stops_nobody(
    load: Callable[[], object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    maze = gymnasium.registry["turnwise/Maze-v0"]
    broken_entry(monkeypatch, "theirs", load)
    plugins = Plugins()
    assert reason in plugins.infos["theirs"].failed
    assert plugins.infos["envs"].failed == ""
    assert gymnasium.registry["turnwise/Maze-v0"] is maze
    with pytest.raises(PluginError, match=r"no judge 'theirs-judge'.*failed to load: theirs"):
        plugins.factory("judge", "theirs-judge")
    if "ppo" in reason:  # nobody wins silently
        with pytest.raises(PluginError, match="registered by both"):
            plugins.factory("optimizer", "ppo")
    plugins.create("credit method", "gae")


def test_ctrl_c_while_plugins_load_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyboardInterrupt is the plugin's own only where nobody pressed a key."""
    broken_entry(
        monkeypatch, "theirs", lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(60)
    )
    # A shell's background job ignores it.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Plugins()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), RuntimeError("no")])
def test_a_hook_that_wants_to_end_the_run_does_not(error: BaseException) -> None:
    def raises(**more: object) -> None:
        raise error

    plugins = Plugins(
        {
            "bad": plugin(
                update_finished=lambda update: raises(), register_commands=lambda app: raises()
            )
        }
    )
    with pytest.warns(
        UserWarning, match=f"plugin 'bad' failed in update_finished: {type(error).__name__}"
    ):
        plugins.call_event("update_finished", run=None, update=1, metrics={})
    plugins.call_commands(typer.Typer())
    assert f"register_commands: {type(error).__name__}" in plugins.infos["bad"].failed


def test_a_second_plugin_of_one_name_is_listed_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_entry(monkeypatch, "envs", plugin)
    plugins = Plugins()
    assert plugins.infos["envs"].failed == ""
    assert "another plugin is called 'envs'" in plugins.infos["envs'"].failed


def test_a_plugin_given_directly_must_work() -> None:
    with pytest.raises(PluginError, match="register_credits"):
        Plugins({"mine": plugin(register_credits=lambda register: None)})
    with pytest.raises(PluginError, match=r"'grpo' is registered by both 'optimizers' and 'mine'"):
        Plugins({"mine": plugin(register_optimizers=lambda register: register("grpo", dict))})


def test_unknown_names_and_options_name_near_ones() -> None:
    plugins = Plugins()
    for kind, name, near in (("optimizer", "grop", "grpo"), ("credit method", "outcom", "outcome"), ("judge", "lenght", "length"),  # noqa: E501
                             ("combiner", "weigthed", "weighted"), ("stage", "sfft", "sft"), ("backend", "inprocess", "in-process")):  # fmt: skip  # noqa: E501
        with pytest.raises(PluginError, match=f"Did you mean '{near}'"):
            plugins.create(kind, name)
    with pytest.raises(PluginError, match=r"optimizer 'grpo' has no option 'learning_rte'"):
        plugins.create("optimizer", "grpo", learning_rte=1.0)
    with pytest.raises(PluginError, match=r"no option 'epoch'. Did you mean 'epochs'"):
        plugins.create("optimizer", "ppo", epoch=1)
    with pytest.raises(PluginError, match="needs the option 'pattern'"):
        plugins.create("judge", "regex")


def test_factories_given_as_strings_fail_when_needed() -> None:
    plugins = Plugins(
        {"mine": plugin(register_judges=lambda register: register("gone", "nowhere.at.all:Judge"))}
    )
    with pytest.raises(
        PluginError,
        match=r"judge 'gone' of plugin 'mine' cannot be imported from 'nowhere.at.all:Judge'",
    ):
        plugins.create("judge", "gone")


@pytest.mark.parametrize(
    "body", ["raise SystemExit('no licence')", "raise GeneratorExit('no licence')", "1 +", "1 / 0"]
)
def test_a_module_that_fails_as_it_is_needed_is_named(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"module_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    plugins = Plugins(
        {"mine": plugin(register_judges=lambda register: register("bad", f"{name}:Judge"))}
    )
    with pytest.raises(
        PluginError,
        match=(
            f"judge 'bad' of plugin 'mine' cannot be imported from '{name}:Judge': .*(Error|Exit)"
        ),
    ):
        plugins.create("judge", "bad")


def test_text_that_is_a_number_is_one() -> None:
    """Text that is a number is one where pydantic checks: other loaders of YAML than ours read
    `1e-3` as text."""
    plugins = Plugins()
    with pytest.raises(turnwise.ConfigError, match="grpo.lr: Input should be a valid number"):
        plugins.create("optimizer", "grpo", lr="fast")
    assert plugins.create("optimizer", "grpo", lr="1e-3").lr == 1e-3
    with pytest.raises(PluginError, match="judge 'length': max_words: Input should be a valid int"):
        plugins.create("judge", "length", max_words="few")
    with pytest.raises(PluginError, match="judge 'length': max_words: must be a number, got True"):
        plugins.create("judge", "length", max_words=True)
    assert plugins.create("judge", "length", max_words="3").max_words == 3


@pytest.mark.parametrize(
    "spec",
    [
        "subprocess:Popen",
        {"judge": "subprocess:Popen", "args": "touch pwned", "shell": True},
        "pathlib:Path",
        "builtins:dict",
        "builtins:type",
    ],
    ids=str,
)
def test_a_class_that_is_no_judge_is_refused_before_one_is_made(
    spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making an object may do anything, such as running a command."""
    monkeypatch.chdir(tmp_path)
    config = {"policy": "none", "stages": [{"rl": {"env": "turnwise/Maze-v0", "feedback": [spec]}}]}
    with pytest.raises(PluginError, match=r"is no judge|type\(\) takes 1 or 3 arguments"):
        turnwise.Run(config, folder=tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_events_are_isolated_and_warn_once() -> None:
    heard: list[int] = []

    def bad(update: int) -> None:
        raise RuntimeError("no disk")

    plugins = Plugins(
        {
            "bad": plugin(update_finished=bad),
            "good": plugin(update_finished=lambda update, metrics: heard.append(update)),
        }
    )
    with pytest.warns(
        UserWarning, match=r"plugin 'bad' failed in update_finished: RuntimeError: no disk"
    ):
        plugins.call_event("update_finished", run=None, update=1, metrics={})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugins.call_event("update_finished", run=None, update=2, metrics={})
    assert heard == [1, 2]


def test_what_a_run_costs_is_said_by_each_plugin_on_its_own() -> None:
    def bad(run: Any) -> list[str]:
        raise RuntimeError("no price list")

    plugins = Plugins({"bad": plugin(costs=bad), "good": plugin(costs=lambda run: ["rl: $3"])})
    run: Any = types.SimpleNamespace(stages=(), stage="")
    assert plugins.costs(run) == ["rl: $3", "bad cannot say: RuntimeError: no price list"]


def test_a_hook_that_is_to_go_warns_with_what_takes_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Marked as engine/hookspecs.py says: the plugin works on, and its author is told."""
    with pytest.warns(DeprecationWarning, match="`round_finished` goes in 0.3: `update_finished`"):
        plugins, heard = with_round_finished(monkeypatch)
    plugins.call_event("round_finished", number=3)
    assert heard == [3]


def with_round_finished(monkeypatch: pytest.MonkeyPatch) -> tuple[Plugins, list[int]]:
    from turnwise.engine import hookspecs

    @hookspecs.hookspec(
        warn_on_impl=DeprecationWarning("`round_finished` goes in 0.3: `update_finished` tells it")
    )
    def round_finished(number: int) -> None:
        """Tells that a round is finished."""

    heard: list[int] = []
    monkeypatch.setattr(hookspecs, "round_finished", round_finished, raising=False)
    return Plugins({"old": plugin(round_finished=lambda number: heard.append(number))}), heard


def test_envs_are_registered_once_per_process() -> None:
    calls: list[int] = []
    mine = plugin(register_envs=lambda: calls.append(1))
    Plugins({"mine": mine})
    Plugins({"mine": mine})
    assert calls == [1]


def test_a_module_named_on_the_command_line_may_have_hooks() -> None:
    from types import ModuleType

    module = ModuleType("mine")

    @turnwise.hookimpl
    def register_judges(register) -> None:
        register("mine", lambda: None)

    module.register_judges = register_judges  # type: ignore[attr-defined]
    plugins = turnwise.Plugins()
    plugins.adopt("mine", module)
    plugins.adopt("mine", module)  # once
    plugins.adopt("plain", ModuleType("plain"))
    assert "mine" in plugins.names("judge")
    assert "plain" not in plugins.infos


class _Boxed(turnwise.Judge):
    """Judges by words that it was given, and takes other things than it keeps."""

    kept: dict[str, int]

    def __init__(
        self,
        words: Iterable[str] = (),
        kept: Any = None,
        limit: Annotated[int, pydantic.Field(ge=1)] = 1,
        odd: "at least one" = 3,  # noqa: F722
        unknown: list[Missing] = (),  # noqa: F821
        prices: Mapping[str, Sequence[float]] = MappingProxyType({}),
        choice: Literal["mean", "min"] | None = None,
    ) -> None:
        self.words, self.kept, self.limit, self.odd = words, {"kept": 1}, limit, odd


def _options(**options: Any) -> dict[str, Any]:
    return checked_options("judge 'boxed'", _Boxed, 0, options)


def test_options_are_given_as_they_stand_in_the_config() -> None:
    """Pydantic checks; what it makes of a value is its own, but for a text that is a number."""
    words = ["a", "b"]
    assert _options(words=words)["words"] is words
    assert _options(limit="3") == {"limit": 3}
    assert _options(kept="q", odd="anything", unknown=7) == {
        "kept": "q", "odd": "anything", "unknown": 7,
    }  # fmt: skip
    prices = {"m": [1, 2]}
    assert _options(prices=prices)["prices"] is prices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "judge 'boxed': limit: Input should be greater than or equal to 1, got 0"),
        ({"limit": True}, "limit: must be a number, got True"),
        ({"limit": "few"}, "limit: Input should be a valid integer.*got 'few'"),
        ({"prices": {"m": ["x", 1]}}, "prices.m.0: Input should be a valid number.*got 'x'"),
        ({"choice": "men"}, "choice: Input should be 'mean' or 'min', got 'men'"),
        ({"limt": 1}, "has no option 'limt'. Did you mean 'limit'"),
    ],
)
def test_options_that_do_not_fit_say_where(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        _options(**options)


class _Called:
    def __call__(self, limit: int = 1) -> turnwise.Judge:
        return _Boxed(limit=limit)


@pytest.mark.parametrize(
    "factory", [partial(_Boxed), _Boxed, _Called()], ids=["partial", "class", "object"]
)
def test_factories_of_every_kind_are_checked(factory: Any) -> None:
    with pytest.raises(PluginError, match="limit: Input should be a valid integer"):
        checked_options("judge 'x'", factory, 0, {"limit": "few"})


def test_a_secret_that_does_not_fit_is_not_shown() -> None:
    def made(api_key: str | None = None) -> None: ...

    with pytest.raises(
        PluginError, match="got int, which is not shown here: put it in quotes"
    ) as e:
        checked_options("model 'm'", made, 0, {"api_key": 1234567890})
    assert "123456" not in str(e.value)
