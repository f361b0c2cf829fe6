"""The contracts of what plugins supply: judges, sources, combiners, credit methods, optimizers,
backends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from .records.batch import Batch, Credit
from .records.episode import Episode
from .records.feedback import Comparison, Feedback, Request
from .records.rewards import Aggregate, NoReward, Rewards
from .records.sampling import Conversation, Sample, Sampling

if TYPE_CHECKING:
    from .environments.pool import Environments
    from .ledger.ledger import Ledger
    from .policy.policy import Policy
    from .records.update import Update


@runtime_checkable
class Judge(Protocol):
    """Looks at episodes one by one and answers at once.

    Optional, for every kind of judge: `open(context)` before the first question, with a `Context`;
    `learn(run)`, see `FeedbackSource`; `members`, a mapping from name to judge, where it is made of
    others: the engine opens and closes those too, lets them learn and saves their state.
    """

    def score(
        self, episodes: Sequence[Episode]
    ) -> Sequence[Feedback] | Awaitable[Sequence[Feedback]]:
        """One `Feedback` per episode, in order.

        An exception makes all of them `failed`, never a score.
        """
        ...


@runtime_checkable
class GroupJudge(Protocol):
    """Compares episodes that started alike and answers at once."""

    def rank(self, group: Sequence[Episode]) -> Comparison | Awaitable[Comparison]: ...


@runtime_checkable
class FeedbackSource(Protocol):
    """Answers when it answers.

    `request` must be idempotent: after a crash the engine asks again for whatever has no answer.
    `receive` returns what has arrived since the last call, without waiting; answers name their
    request in `stamp.request`.

    Optional methods, called where present: `open(context)` before the first request, with a
    `Context`; `acknowledge(ids)` once the ledger holds these answers (until then a source that
    cannot afford to lose one repeats it, under the same id); `close()`; `state_dict()` and
    `load_state_dict(state)`; `learn(run) -> metrics or None`, which the rl stage calls once per
    update, in the main process, before anything of it is judged; `plan(group, episodes) ->
    [Question]` where one question per episode (`kind = "episode"`) or one per group (`kind =
    "group"`) is not what it asks; `waiting() -> str`, which completes "waiting for 12 ratings
    (...)", and `gives = "verdicts"` where they are no ratings. A source whose answers are written
    to the ledger by somebody else returns nothing from `receive`, and says so: `answers_in_ledger =
    True`.
    """

    def request(self, requests: Sequence[Request]) -> None: ...

    def receive(self) -> Sequence[Feedback | Comparison]: ...


@dataclass(frozen=True, slots=True)
class Context:
    """What a source may need of the run it serves.

    Attributes:
        name: the source's own name in this run.
        folder: the run's folder.
        clock: the run's clock, seconds.
        seed: for whatever is random in it.
        update: updates the run has made.
        ledger: the run's ledger, for sources that keep what they know beside the answers.
        run: the run's id.
    """

    name: str
    folder: Path
    clock: Callable[[], float]
    seed: int
    update: int = 0
    ledger: Any = None
    run: str = ""


Consumes = Literal["advantages", "comparisons", "labels", "demonstrations"]


@runtime_checkable
class CreditAssigner(Protocol):
    """How rewards become one advantage per action token.

    `needs` names what must be in the batch beside rewards: "group" (at least two members per
    start), "values" (a critic), "turn_scores" (a source that scores turns), "branches" (`branches`
    conversations, an attribute of the method, continued anew from the start of every turn). A run
    that cannot supply it is refused before it starts.

    A method with learned state also has `fit(batch)`, called after `assign`, `state_dict()` and
    `load_state_dict(state)`; states are dicts of tensors, numbers and strings.
    """

    needs: frozenset[str]

    def assign(self, batch: Batch) -> Credit: ...


@runtime_checkable
class Optimizer(Protocol):
    """The algorithm that updates the policy. It owns its torch optimizer, its critic, its KL
    penalty and their states.

    The engine calls `setup` once, then `load_state_dict` when a run goes on; per update `prepare`,
    then credit, then `update`.

    Attributes:
        consumes: what of the batch it trains on, one or more of "advantages", "comparisons",
            "labels", "demonstrations".
        provides: what `prepare` adds for credit methods: "values" when it has a critic.
    """

    consumes: frozenset[Consumes]
    provides: frozenset[str]

    def setup(self, policy: Policy) -> None:
        """Builds what needs the policy's shapes: a critic, a torch optimizer, a reference."""
        ...

    def prepare(self, policy: Policy, batch: Batch) -> None:
        """Adds to the batch what credit needs, as it stands before the update: `values` and
        `bootstrap` with a critic, `reference_logprobs` and `token_rewards` with a KL penalty in the
        reward."""
        ...

    def update(self, policy: Policy, batch: Batch) -> Mapping[str, float]:
        """Changes the policy in place and returns the metrics of the update. One that tells `steps`
        of 0 left the policy as it was, and its version stays.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite; the step is not taken.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Backend(Protocol):
    """Replies to many conversations at once.

    `rows` is how many conversations may live at a time. `refresh()` is called whenever the policy's
    weights changed.
    """

    rows: int

    def reply(
        self, conversations: Sequence[Conversation], sampling: Sampling
    ) -> Sequence[Sample]: ...

    def refresh(self) -> None: ...


@runtime_checkable
class Combiner(Protocol):
    """Makes rewards of a group's feedback; named in the config.

    A combiner that learns across groups (raters' reliability) also has `fit(feedback)`, called with
    all that is in force before `combine`, `state_dict()` and `load_state_dict(state)`. `fit` is
    given what is said of the update's own groups; one that wants what came after an episode had
    trained has `learn(run)`, as sources have, and asks `run.ledger.feedback_by`. With `metrics()`,
    names to numbers, it reports; they stand under `feedback/`.
    """

    def combine(
        self, group: Sequence[Episode], feedback: Sequence[Feedback | Comparison]
    ) -> Sequence[Rewards | NoReward]:
        """One entry per episode of the group, in order.

        Args:
            group: the episodes that share a start; failed ones are already left out.
            feedback: everything that was said of them and of the group, in force (nothing
                superseded).
        """
        ...


@runtime_checkable
class Aggregator(Protocol):
    """Many raters' answers to one estimate per episode. It keeps nothing between calls: whoever
    calls gives all that counts.

    Optional: `reads`, a set of "scores" and "comparisons"; sources that give nothing of it are
        refused before the run.
    """

    def aggregate(self, answers: Sequence[Feedback | Comparison]) -> Aggregate:
        """Estimates for every episode that an answer speaks of.

        Args:
            answers: in force; those that failed or abstained are not counted. A rater is
                `stamp.rater`, or `stamp.source` where that is empty. `shown["order"]` lists episode
                ids in the order they were displayed.
        """
        ...


class RunView(Protocol):
    """What a stage, a hook, a source or a combiner sees of the run it is part of.

    Attributes:
        id, name, folder: of the run.
        seed: everything random derives from it.
        stage: the label of the present stage.
        stages: labels and stages of the whole pipeline, in order.
        before: the labels of the stages before the present one.
        updates: updates made so far, through the whole run.
        start: the update after which the present stage began.
        metrics: one mapping per update, as in metrics.jsonl.
        stopping: the run was asked to end.
        clock, sleep: the run's one clock, in seconds.
        today: the day that chat templates are given; a resumed run keeps it.
        plugins: the registries, see `Plugins`.
        ledger, policy, environments: opened, loaded and made when first used.
        is_main: whether this process writes: of several that train together, one does.
    """

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> Path: ...
    @property
    def seed(self) -> int: ...
    @property
    def stage(self) -> str: ...
    @property
    def stages(self) -> Sequence[tuple[str, Any]]: ...
    @property
    def before(self) -> Sequence[str]: ...
    @property
    def updates(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def metrics(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def stopping(self) -> bool: ...
    @property
    def clock(self) -> Callable[[], float]: ...
    @property
    def sleep(self) -> Callable[[float], None]: ...
    @property
    def today(self) -> date: ...
    @property
    def plugins(self) -> Any: ...
    @property
    def ledger(self) -> Ledger: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def environments(self) -> Environments: ...
    @property
    def is_main(self) -> bool: ...

    def status(self, phase: str, done: int = 0, total: int = 0, **more: Any) -> None:
        """Tells whoever watches what is being done."""
        ...

    def begin(self, parts: Mapping[str, Any] | None = None) -> int:
        """Tells the run what learns beside the policy; returns how many updates of the stage are
        made already."""
        ...

    def finish_update(
        self, metrics: Mapping[str, float], *, episodes: Sequence[Episode] = ()
    ) -> Update:
        """Closes an update: counts it, writes its metrics, and a checkpoint when one is due."""
        ...
