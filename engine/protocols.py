"""The contracts of what plugins supply: judges, sources, combiners, credit methods, optimizers,
curricula, backends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from .records.batch import Batch, Credit
from .records.episode import Episode
from .records.feedback import Comparison, Feedback, Question, Request
from .records.rewards import Aggregate, NoReward, Rewards
from .records.sampling import Conversation, Sample, Sampling
from .records.starts import GroupResult, StartNumber

if TYPE_CHECKING:
    from random import Random

    from .environments.pool import Environments
    from .ledger.ledger import Ledger
    from .policy.policy import Policy
    from .records.update import Update


@dataclass(frozen=True, slots=True)
class Context:
    """What a source may need of the run it serves.

    Attributes:
        name: the source's own name in this run.
        folder: the run's folder.
        clock: the run's clock, seconds.
        seed: for whatever is random in it.
        update: updates the run has made.
        ledger: the run's ledger, for sources that keep more than answers.
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


class Stateful(Protocol):
    """Has a state for checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, for a checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the state that `state_dict` returned."""
        ...


class Learns:
    """Base of what may learn during a run: the engine asks all of it for its state.

    A part without state keeps these methods and has no share in checkpoints.
    """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for the checkpoint: a dict of tensors, numbers and strings."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned; called where a run goes on, if it was not
        empty."""


class Giver(Learns):
    """Base of everything that gives feedback: judges that answer at once, and sources.

    Attributes:
        members: name to judge, where it is made of others: the engine opens and closes those too,
            lets them learn and saves their state.
        after: a stage that must come before the one that asks it; empty: none.
        may_change: its options that may change when a run goes on, since no answer depends on them.
    """

    may_change: ClassVar[frozenset[str]] = frozenset()

    members: Mapping[str, Any] = MappingProxyType({})
    after: str = ""

    def open(self, context: Context) -> None:
        """Prepares for the run; called before the first question."""

    def close(self) -> None:
        """Releases what was opened; called once, when nothing more will be asked."""

    def learn(self, run: RunView) -> Mapping[str, float] | None:
        """Learns from what the run's ledger holds.

        The rl stage calls it once per update, in the main process, before anything of the update is
        judged.

        Returns:
            metrics of the update, or None.
        """
        return None


class Judge(Giver):
    """Looks at episodes one by one and answers at once."""

    def score(
        self, episodes: Sequence[Episode]
    ) -> Sequence[Feedback] | Awaitable[Sequence[Feedback]]:
        """Returns one `Feedback` per episode, in order.

        An exception makes all of them `failed`, never a score.
        """
        raise TypeError(f"{type(self).__name__} has no score(episodes)")


class GroupJudge(Giver):
    """Compares episodes that started alike and answers at once."""

    def rank(self, group: Sequence[Episode]) -> Comparison | Awaitable[Comparison]:
        """Returns one `Comparison` of the episodes of a group."""
        raise TypeError(f"{type(self).__name__} has no rank(group)")


class FeedbackSource(Giver):
    """Answers when it answers: a person, a service, a model that is asked in the background.

    Attributes:
        kind: "episode" or "group": what its requests are about.
        gives: the plural noun for its answers, in "waiting for 12 ratings".
        answers_in_ledger: its answers are written to the ledger by another process, so that
            `receive` returns none.
    """

    kind: str = "episode"
    gives: str = "ratings"
    answers_in_ledger: bool = False

    def request(self, requests: Sequence[Request]) -> None:
        """Takes requests. Must be idempotent: after a crash the engine asks again for everything
        that has no answer."""
        raise TypeError(f"{type(self).__name__} has no request(requests)")

    def receive(self) -> Sequence[Feedback | Comparison]:
        """Returns what has arrived since the last call, without waiting; answers name their request
        in `stamp.request`."""
        raise TypeError(f"{type(self).__name__} has no receive()")

    def acknowledge(self, ids: Sequence[str]) -> None:
        """Learns that the ledger holds these answers. A source that cannot afford to lose one
        repeats it until then, under the same id."""

    def plan(self, group: str, episodes: Sequence[Episode]) -> list[Question]:
        """Returns what is asked about a group: by default one question per episode, or one on the
        whole group, by `kind`."""
        if self.kind == "group":
            return [Question(group, tuple(episodes))]
        return [Question(e.id, (e,)) for e in episodes]

    def waiting(self) -> str:
        """Returns what is known of the wait, such as "3 raters active", for progress displays."""
        return ""


class CreditAssigner(Learns):
    """How rewards become one advantage per action token.

    Attributes:
        needs: what must be in the batch in addition to rewards: "group" (at least two members per
            start), "values" (a critic), "turn_scores" (a source that scores turns), "branches"
            (`branches` conversations, sampled again from the start of every turn). A run that
            cannot supply it is refused before it starts.
        branches: how many, where it needs them.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    branches: ClassVar[int] = 0

    def assign(self, batch: Batch) -> Credit:
        """Returns the credit of a batch."""
        raise TypeError(f"{type(self).__name__} has no assign(batch)")

    def fit(self, batch: Batch) -> None:
        """Learns from a batch; called after `assign`."""


class Optimizer(Learns):
    """The algorithm that updates the policy. It owns its torch optimizer, its critic, its KL
    penalty and their states.

    The engine calls `setup` once, then `load_state_dict` when a run goes on; per update `prepare`,
    then credit, then `update`.

    Attributes:
        consumes: what of the batch it trains on, one or more of "advantages", "comparisons",
            "labels", "demonstrations".
        provides: what `prepare` adds for credit methods: "values" when it has a critic.
    """

    consumes: ClassVar[frozenset[Consumes]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()

    def setup(self, policy: Policy) -> None:
        """Builds what needs the policy's shapes: a critic, a torch optimizer, a reference."""

    def prepare(self, policy: Policy, batch: Batch) -> None:
        """Adds to the batch what credit needs, as it stands before the update: `values` and
        `bootstrap` with a critic, `reference_logprobs` and `token_rewards` with a KL penalty in the
        reward."""

    def update(self, policy: Policy, batch: Batch) -> Mapping[str, float]:
        """Changes the policy in place.

        Returns:
            the metrics of the update. One with `steps` of 0 left the policy as it was, and its
            version stays.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite; the step is not taken.
        """
        raise TypeError(f"{type(self).__name__} has no update(policy, batch)")


class Backend(Protocol):
    """Replies to many conversations at once. `rows`: how many may live at a time."""

    rows: int

    def reply(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        arriving: Callable[[], Sequence[Conversation]] = tuple,
    ) -> Iterable[tuple[Conversation, Sample]]:
        """Yields every conversation with its sampled reply, in any order, at best when it ends.

        Args:
            conversations: those that wait for a reply.
            sampling: how replies are drawn.
            arriving: returns those that have come to wait meanwhile, and may be called while
                replies are sampled. A backend that takes a fixed batch need not call it: they
                wait for the next one.
        """
        ...

    def refresh(self) -> None:
        """Takes up the policy's weights, which may have changed, and frees what is kept of
        conversations; called before and after play."""
        ...


class Combiner(Learns):
    """Makes rewards of feedback. `turns`: sources whose turn scores are rewards; None: unknown."""

    turns: Sequence[str] | None = None

    def combine(
        self, group: Sequence[Episode], feedback: Sequence[Feedback | Comparison]
    ) -> Sequence[Rewards | NoReward]:
        """Returns one entry per episode of the group, in order.

        Args:
            group: the episodes that share a start; failed ones are already left out.
            feedback: all current feedback on them and on the group (nothing superseded).
        """
        raise TypeError(f"{type(self).__name__} has no combine(group, feedback)")

    def fit(self, feedback: Sequence[Feedback | Comparison]) -> None:
        """Learns across groups (raters' reliability): called with all feedback on the update's
        groups, before they are combined."""

    def learn(self, run: RunView) -> Mapping[str, float] | None:
        """Learns from what came after an episode had trained, as `Giver.learn`; the ledger's
        `feedback(late=True)` has it."""
        return None

    def metrics(self) -> Mapping[str, float]:
        """Returns what it reports of an update; the names stand under `feedback/`."""
        return {}


class Aggregator:
    """Makes one estimate per episode of many raters' answers. It keeps nothing between calls: the
    caller gives all that counts.

    Attributes:
        reads: "scores", "comparisons" or both; sources that give nothing of it are refused before
            the run.
    """

    reads: frozenset[str] = frozenset({"scores", "comparisons"})

    def aggregate(self, answers: Sequence[Feedback | Comparison]) -> Aggregate:
        """Returns estimates for every episode that an answer speaks of.

        Args:
            answers: current ones; those that failed or abstained are not counted. A rater is
                `stamp.rater`, or `stamp.source` where that is empty. `shown["order"]` lists episode
                ids in the order they were displayed.
        """
        raise TypeError(f"{type(self).__name__} has no aggregate(answers)")


class Curriculum(Learns):
    """Chooses the starts that an `rl` stage plays, one for every group.

    Attributes:
        needs: "group" where it learns from how the conversations of one start differ: at least two.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def setup(self, weights: Sequence[float]) -> None:
        """Prepares for a mixture.

        Args:
            weights: of its environments, in order.

        Raises:
            ConfigError: the options do not fit this mixture.
        """

    def choose(
        self, rng: Random, unplayed: Sequence[int], taken: Collection[StartNumber]
    ) -> StartNumber | None:
        """Returns the start of the next group; None where none is left that is not taken. Nothing
        is remembered of the call: the same arguments after the same `learn` give the same start.

        Args:
            rng: for whatever is random in it.
            unplayed: of every environment the first number that was never played.
            taken: starts of groups that are being played or wait for answers; none of them.
        """
        raise TypeError(f"{type(self).__name__} has no choose(rng, unplayed, taken)")

    def learn(self, groups: Sequence[GroupResult]) -> None:
        """Learns from the groups of an update that was made."""

    def metrics(self) -> Mapping[str, float]:
        """Returns what it reports of an update; the names stand under `curriculum/`."""
        return {}


class RunView(Protocol):
    """What a stage, a hook, a source or a combiner sees of the run it is part of."""

    @property
    def id(self) -> str:
        """The run's id."""

    @property
    def name(self) -> str:
        """The run's name."""

    @property
    def folder(self) -> Path:
        """The run's folder."""

    @property
    def config(self) -> Any:
        """What was asked, a `RunConfig`."""

    @property
    def seed(self) -> int:
        """The seed that everything random derives from."""

    @property
    def stage(self) -> str:
        """The label of the present stage."""

    @property
    def stages(self) -> Sequence[tuple[str, Any]]:
        """Labels and stages of the whole pipeline, in order."""

    @property
    def before(self) -> Sequence[str]:
        """The labels of the stages before the present one."""

    @property
    def updates(self) -> int:
        """The number of updates made so far, through the whole run."""

    @property
    def start(self) -> int:
        """The number of the update after which the present stage began."""

    @property
    def metrics(self) -> Sequence[Mapping[str, Any]]:
        """One mapping per update, as in metrics.jsonl."""

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to end."""

    @property
    def clock(self) -> Callable[[], float]:
        """The run's clock, in seconds."""

    @property
    def sleep(self) -> Callable[[float], None]:
        """The function that waits, in seconds of the run's clock."""

    @property
    def today(self) -> date:
        """The day that chat templates are given; a resumed run keeps it."""

    @property
    def plugins(self) -> Any:
        """The registries, see `Plugins`."""

    @property
    def ledger(self) -> Ledger:
        """The run's ledger, opened when first used."""

    @property
    def policy(self) -> Policy:
        """The policy, loaded when first used."""

    @property
    def environments(self) -> Environments:
        """The run's environments, made when first used."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes: of several that train together, one does."""

    def status(self, phase: str, done: int = 0, total: int = 0, **more: Any) -> None:
        """Reports what is being done to progress displays."""

    def begin(self, parts: Mapping[str, Stateful] | None = None) -> int:
        """Tells the run what learns in addition to the policy. Returns how many updates of the
        stage are made already."""

    def finish_update(
        self, metrics: Mapping[str, float], *, episodes: Sequence[Episode] = ()
    ) -> Update:
        """Closes an update: counts it, writes its metrics, and a checkpoint when one is due."""
