"""The plugin API on one page.

A plugin is a module (or object) with functions marked `@turnwise.hookimpl`, published under the
entry-point group `turnwise`. Registration hooks are called once when a run or command starts; the
`register` they receive takes a name and a factory, which may be a `"module:Attribute"` string so
that listing plugins imports nothing heavy. Event hooks are called a few times per update, never in
a hot path; one that raises warns once and is called again next time.

A factory with a parameter `plugins` is given the run's `Plugins`, through which a part finds others
(`turnwise.judging.make_members`). Implementations may take fewer arguments than the specification.
A hook that is not on this page is an error. One that is to go is marked with pluggy's
`warn_on_impl`, and an argument with `warn_on_impl_args`, for a minor version at least: the warning
names what takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    from typer import Typer

    from .ledger.ledger import Ledger
    from .protocols import RunView
    from .records.episode import Episode
    from .records.feedback import Comparison, Feedback
    from .records.report_section import ReportSection


hookspec = pluggy.HookspecMarker("turnwise")
hookimpl = pluggy.HookimplMarker("turnwise")

# The version of what is on this page. A plugin may state the one that it was written for, as
# `TURNWISE_API`; one that asks for more than there is does not load.
VERSION = 1

Factory = str | Callable[..., Any]


class Register(Protocol):
    """The function `register` that every registration hook receives."""

    def __call__(self, name: str, factory: Factory) -> None:
        """Registers `factory` as `name`.

        Raises PluginError when another plugin registered the name.
        """


@hookspec
def register_envs() -> Mapping[str, str] | None:
    """Registers environments by `gymnasium.register(...)`; once per process. Use "module:Class"
    strings as entry points. Returns why others are not registered, by id or "namespace/..."."""


@hookspec
def register_judges(register: Register) -> None:
    """Registers judges: `factory(**options)` returns a `Judge`, which scores, a `GroupJudge`, which
    compares, a `FeedbackSource` (people, batch APIs, anything that answers later), or a plain
    function `episode -> number`, or a number per turn."""


@hookspec
def register_models(register: Register) -> None:
    """Registers models that judges ask: `factory(name, **options)` returns a `Model` with `async
    ask(prompt) -> Reply`, see `judges/models`."""


@hookspec
def register_combiners(register: Register) -> None:
    """Registers combiners, which turn feedback into rewards: `factory(**options)` returns a
    `Combiner`. `weights`, source name to number, is an option of all."""


@hookspec
def register_aggregators(register: Register) -> None:
    """Registers aggregators: `factory(**options)` returns an `Aggregator`, which turns many raters'
    answers into one estimate per episode, with its uncertainty."""


@hookspec
def register_renderers(register: Register) -> None:
    """Registers renderers: `factory(**options)` returns a function `message -> str`, the HTML of
    one message on the raters' page; it must escape what it shows."""


@hookspec
def register_credit(register: Register) -> None:
    """Registers credit methods, which turn rewards into advantages: `factory(**options)` returns a
    `CreditAssigner`."""


@hookspec
def register_optimizers(register: Register) -> None:
    """Registers optimizers: `factory(**options)` returns an `Optimizer`."""


@hookspec
def register_curricula(register: Register) -> None:
    """Registers curricula, which choose the starts that are played: `factory(**options)` returns a
    `Curriculum`."""


@hookspec
def register_backends(register: Register) -> None:
    """Registers backends, which sample replies for a policy: `factory(policy, **options)` returns a
    `Backend`."""


@hookspec
def register_stages(register: Register) -> None:
    """Registers stages: `factory(**options)` returns a `Stage`, one step of a pipeline, iterated
    update by update."""


@hookspec
def register_commands(app: Typer) -> None:
    """Adds commands to the `turnwise` command line."""


@hookspec
def costs(run: RunView) -> list[str]:
    """Returns lines on what a run will pay for, for `turnwise run --dry-run`; its stages are in
    `run.stages`. Nothing may be loaded, played or asked."""
    return []


@hookspec
def report_sections(ledger: Ledger, run: str) -> list[ReportSection]:
    """Returns sections for a run's report, made from its ledger alone; none where there is nothing
    to show."""
    return []


@hookspec
def episodes_played(run: RunView, episodes: Sequence[Episode]) -> None:
    """Called when a round of play is over and recorded."""


@hookspec
def feedback_received(run: RunView, feedback: Sequence[Feedback | Comparison]) -> None:
    """Called when new feedback is recorded in the ledger, by a source or by another process that
    writes there. Each answer is reported once; a resumed run reports again the answers on
    conversations that still wait."""


@hookspec
def update_finished(run: RunView, update: int, metrics: Mapping[str, float]) -> None:
    """Called when the policy was updated and the metrics are on disk."""


@hookspec
def run_finished(run: RunView) -> None:
    """Called when the last stage ended; not for an interrupted run."""
