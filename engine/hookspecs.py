"""The plugin API on one page.

A plugin is a module (or object) with functions marked `@turnwise.hookimpl`, published under the
entry-point group `turnwise`. Registration hooks are called once when a run or command starts; the
`register` they receive takes a name and a factory, which may be a `"module:Attribute"` string so
that listing plugins imports nothing heavy. Event hooks are called a few times per update, never in
a hot path; one that raises warns once and is called again next time.

A factory with a parameter `plugins` is given the run's `Plugins`, through which a part finds others
(`engine.sources.make_members`). Implementations may take fewer arguments than the specification. A
hook that is not on this page is an error.
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
    from .records.report_section import Section


hookspec = pluggy.HookspecMarker("turnwise")
hookimpl = pluggy.HookimplMarker("turnwise")

Factory = str | Callable[..., Any]


class Register(Protocol):
    def __call__(self, name: str, factory: Factory) -> None:
        """Makes `factory` known as `name`.

        Raises PluginError when another plugin registered the name.
        """


@hookspec
def register_envs() -> None:
    """Call `gymnasium.register(...)` here; once per process. Use "module:Class" strings as entry
    points."""


@hookspec
def register_judges(register: Register) -> None:
    """`factory(**options)` returns a `Judge`, a `GroupJudge`, or a plain function `episode ->
    number`, or a number per turn."""


@hookspec
def register_models(register: Register) -> None:
    """`factory(name, **options)` returns a `Model` that judges ask: `async ask(prompt) -> Reply`,
    see `judges/models`."""


@hookspec
def register_feedback_sources(register: Register) -> None:
    """`factory(**options)` returns a `FeedbackSource`: people, batch APIs, whatever answers
    later."""


@hookspec
def register_combiners(register: Register) -> None:
    """`factory(**options)` returns a `Combiner`: feedback to rewards. `weights`, source name to
    number, is an option of all."""


@hookspec
def register_aggregators(register: Register) -> None:
    """`factory(**options)` returns an `Aggregator`: what many raters said becomes one estimate per
    episode, with its uncertainty."""


@hookspec
def register_renderers(register: Register) -> None:
    """`factory(**options)` returns a function `message -> str`, the HTML of one message on the
    raters' page; it must escape what it shows."""


@hookspec
def register_credit(register: Register) -> None:
    """`factory(**options)` returns a `CreditAssigner`: rewards to advantages."""


@hookspec
def register_optimizers(register: Register) -> None:
    """`factory(**options)` returns an `Optimizer`."""


@hookspec
def register_backends(register: Register) -> None:
    """`factory(policy, **options)` returns a `Backend`: what samples replies for a policy."""


@hookspec
def register_stages(register: Register) -> None:
    """`factory(**options)` returns a `Stage`: one step of a pipeline, iterated update by update."""


@hookspec
def register_commands(app: Typer) -> None:
    """Add commands to the `turnwise` command line."""


@hookspec
def report_sections(ledger: Ledger, run: str) -> list[Section]:
    """Sections for a run's report, made from its ledger alone; none where there is nothing to
    say."""
    return []


@hookspec
def episodes_played(run: RunView, episodes: Sequence[Episode]) -> None:
    """A round of play is over and recorded."""


@hookspec
def feedback_received(run: RunView, feedback: Sequence[Feedback | Comparison]) -> None:
    """New feedback is recorded in the ledger, by a source or by another process that writes there.
    Each answer is told once; a run that was resumed tells again what there is on conversations that
    still wait."""


@hookspec
def update_finished(run: RunView, update: int, metrics: Mapping[str, float]) -> None:
    """The policy was updated and the metrics are on disk."""


@hookspec
def run_finished(run: RunView) -> None:
    """The last stage ended; not called for an interrupted run."""
