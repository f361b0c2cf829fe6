"""Makes the parts of an RL stage, and refuses pairings that cannot work with what to choose
instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...feedback.judge_source import JudgeSource
from ...feedback.sources import Sources
from ...feedback.specs import Source
from ...pipeline.parts import component, declared
from ...pipeline.plugins import Plugins
from ...protocols import Combiner, CreditAssigner, Curriculum, Learns, Optimizer
from ..environments import EnvConfig, OtherPolicy
from .settings import RLSettings


@dataclass(slots=True)
class Parts:
    """Holds the swappable parts of one RL stage.

    Attributes:
        combiners: one per environment of the mixture.
    """

    optimizer: Optimizer
    credit: CreditAssigner
    sources: Sources
    combiners: list[Combiner]
    curriculum: Curriculum

    def learning(self) -> dict[str, Any]:
        """Returns all parts that may have a state, by name."""
        named: dict[str, Learns] = {
            "optimizer": self.optimizer, "credit": self.credit, "curriculum": self.curriculum,
        }  # fmt: skip
        named |= {f"combiner-{i}": combiner for i, combiner in enumerate(self.combiners)}
        return named | self.sources.givers()


def make_parts(settings: RLSettings, plugins: Plugins) -> Parts:
    """Makes the parts that the options of a stage name.

    Raises:
        PluginError, ConfigError: a name, an option or a pairing that cannot work, with what to
            choose instead.
    """
    optimizer = component(plugins, "optimizer", settings.optimizer)
    _check_optimizer(settings, optimizer, plugins)
    credit_name = settings.credit or default_credit(optimizer)
    credit = component(plugins, "credit method", credit_name)
    _check_credit(settings, optimizer, credit, credit_name)
    sources = Sources.make(
        [settings.feedback if env.feedback is None else env.feedback for env in settings.env],
        plugins,
        settings.max_failure_rate,
    )
    combiners = []
    for i, (env, own) in enumerate(zip(settings.env, sources.of_env, strict=True)):
        combiners.append(make_combiner(plugins, settings.combiner, own, sources.weights(i)))
        _check_sources(settings, env, own, credit, credit_name)
    _check_seats(settings, credit, credit_name)
    curriculum = component(plugins, "curriculum", settings.curriculum)
    if "group" in curriculum.needs and settings.group_size < 2:
        raise ConfigError(
            f"curriculum {part_name(settings.curriculum)!r} looks at how the conversations of one"
            f" start differ and needs group_size of at least 2, got {settings.group_size}: raise"
            " it, or use curriculum 'uniform' or 'staged'"
        )
    curriculum.setup([env.weight for env in settings.env])
    return Parts(optimizer, credit, sources, combiners, curriculum)


def _check_optimizer(settings: RLSettings, optimizer: Any, plugins: Plugins) -> None:
    """Refuses an optimizer that does not train on what this stage makes."""
    if not {"advantages", "demonstrations"} & set(optimizer.consumes):
        raise ConfigError(
            f"optimizer {part_name(settings.optimizer)!r} trains on"
            f" {', '.join(sorted(optimizer.consumes))}, which the rl stage does not make: use"
            f" {' or '.join(with_option(plugins, 'advantages', 'demonstrations'))} here, or a"
            " preference stage for it"
        )
    if "advantages" not in optimizer.consumes and settings.credit not in (None, "outcome"):
        raise ConfigError(
            f"optimizer {part_name(settings.optimizer)!r} copies whole conversations and has no use"
            " for credit per turn: leave `credit` out, or use"
            f" {' or '.join(with_option(plugins, 'advantages'))}"
        )


def _check_credit(settings: RLSettings, optimizer: Any, credit: Any, credit_name: Any) -> None:
    """Refuses a credit method that lacks what it needs, and options that it has no use for."""
    if "values" in credit.needs - optimizer.provides:
        raise ConfigError(
            f"credit {part_name(credit_name)!r} needs a critic's values, which optimizer"
            f" {part_name(settings.optimizer)!r} does not have: use optimizer 'ppo', or a credit"
            " method without a critic (outcome, turn-returns, gigpo, branch)"
        )
    if "advantages" not in optimizer.consumes and (settings.audit or settings.group_size < 2):
        raise ConfigError(
            f"optimizer {part_name(settings.optimizer)!r} trains on whole conversations: it needs"
            " group_size of at least 2 to choose among them, and has no credit to audit"
        )
    if settings.episodes == "ledger" and "group" in credit.needs:
        raise ConfigError(
            f"credit {part_name(credit_name)!r} compares episodes of one start, and each served"
            " conversation has its own: use `{name: turn-returns, baseline: none}` and `normalise:"
            " whiten` of the optimizer, or optimizer 'ppo' with credit 'gae'"
        )
    if "group" in credit.needs and settings.group_size < 2:
        raise ConfigError(
            f"credit {part_name(credit_name)!r} compares episodes of one start and needs group_size"
            f" of at least 2, got {settings.group_size}: raise it, or use optimizer 'ppo' with"
            " credit 'gae'"
        )
    if settings.resample and "group" not in credit.needs:
        raise ConfigError(
            "resample replaces groups whose outcomes are all equal, but credit"
            f" {part_name(credit_name)!r} does not compare within groups and learns from those too:"
            " leave resample out"
        )
    if settings.overlap and (settings.pending or settings.episodes == "ledger"):
        other = "pending" if settings.pending else "episodes: ledger"
        raise ConfigError(
            f"overlap begins each update's conversations ahead, and with `{other}` what trains is"
            " not known then: leave one of the two out"
        )
    if settings.pending:
        _check_pending(settings, credit, credit_name)
    elif "staleness" in settings.model_fields_set and settings.episodes == "played":
        raise ConfigError(
            "staleness is for play that goes on while answers are awaited: give `pending` too, or"
            " leave it out"
        )
    unknown = credit.needs - {"group", "values", "turn_scores", "branches"}
    if unknown:
        raise ConfigError(
            f"credit {part_name(credit_name)!r} needs {sorted(unknown)}, which this version does"
            " not supply"
        )


def default_credit(optimizer: Optimizer) -> str:
    """Returns the name of the credit method that fits an optimizer where none is named."""
    return "gae" if "values" in optimizer.provides else "outcome"


def _check_sources(
    settings: RLSettings,
    env: EnvConfig,
    sources: Sequence[Source],
    credit: Any,
    credit_name: Any,
) -> None:
    """Refuses sources that cannot give what the credit method needs."""
    if "turn_scores" in credit.needs and not sources:
        raise ConfigError(
            f"credit {part_name(credit_name)!r} needs turn scores, but no feedback source of"
            f" {env.id!r} gives any: add a judge whose Feedback has `turn_scores`, such as"
            " `{judge: reward-model, per: turn}`"
        )
    if what := _continues(settings, credit, credit_name):
        unfit = [
            s.name for s in sources if s.kind == "group" or not isinstance(s.given, JudgeSource)
        ]
        if unfit:
            raise ConfigError(
                f"{what} asks about many continuations of every turn, which {unfit[0]!r} cannot"
                " say: they need a number each, at once. Use judges that score, or a reward model"
                " trained on people's answers; or credit 'gae', 'gigpo' or 'judged'"
            )


def _continues(settings: RLSettings, credit: Any, name: Any) -> str:
    """Returns what plays on from the middle of conversations, for messages; empty where nothing
    does."""
    if "branches" in credit.needs:
        return f"credit {part_name(name)!r}"
    return "an audit" if settings.audit else ""


def _check_seats(settings: RLSettings, credit: Any, name: Any) -> None:
    """Refuses what environments of several seats cannot be paired with."""
    if not any(env.seats for env in settings.env):
        return
    if what := _continues(settings, credit, name):
        raise ConfigError(
            f"{what} plays on from the middle of a conversation, which cannot be done with the"
            " other seats of an environment: use credit 'outcome', 'gae', 'gigpo' or"
            " 'redistribute', and no audit"
        )
    others = any(isinstance(who, OtherPolicy) for env in settings.env for who in env.seats.values())
    if others and not isinstance(settings.backend, (str, Mapping)):
        raise ConfigError(
            "another policy plays in a seat, and each policy needs a backend of its own: give"
            " `backend` by its name, with its options"
        )
    for env in settings.env:
        alone = len(env.trained) < 2
        if settings.gold and not (alone and "self" not in env.seats.values()):
            raise ConfigError(
                f"environment {env.id!r}: `gold` would measure the policy against itself, which"
                " says nothing of how good it is: put one of the environment's players or"
                " `{policy: folder}` into the other seats, or leave `gold` out"
            )
        if settings.pending and not alone:
            raise ConfigError(
                f"environment {env.id!r} trains the policy in the seats {', '.join(env.trained)},"
                " and `pending` counts the conversations of a start once: train in one seat"
                " (`self` in the others), or leave `pending` out"
            )


def _check_pending(settings: RLSettings, credit: Any, name: Any) -> None:
    """Refuses what play that goes on while answers are awaited cannot be paired with."""
    size = settings.groups * settings.group_size
    if settings.pending < size:
        raise ConfigError(
            f"pending={settings.pending} leaves no room for a single round of play, which has"
            f" groups * group_size = {size} episodes: give at least {size}, or leave `pending` out"
            " and every update waits for its own answers"
        )
    if settings.pending > size * (settings.staleness + 1):
        raise ConfigError(
            f"pending={settings.pending} is room for {settings.pending // size} rounds of {size}"
            " episodes, the last of which would train after all the others, when it is more than"
            f" staleness={settings.staleness} versions old, and be thrown away: give at most"
            f" {size * (settings.staleness + 1)}, or raise `staleness`"
        )
    if settings.resample:
        raise ConfigError(
            "resample replaces groups before an update and would wait for answers about the new"
            " ones: leave it out where `pending` is given, and raise `groups` instead"
        )
    if what := _continues(settings, credit, name):
        raise ConfigError(
            f"{what} needs judges that answer at once, so that no conversation would ever be"
            " pending: leave `pending` out, or use credit 'outcome', 'gae', 'gigpo' or"
            " 'redistribute' with people who answer later"
        )


def make_combiner(
    plugins: Plugins, spec: Any, sources: Sequence[Source], weights: Mapping[str, float]
) -> Any:
    """The combiner; its `aggregator`, where it has one, is looked up by name too.

    Raises:
        ConfigError: the aggregator cannot read what a source gives.
    """
    if isinstance(spec, Mapping) and "aggregator" in spec:
        aggregator = component(plugins, "aggregator", spec["aggregator"])
        reads = aggregator.reads
        for source in sources:
            gives = "comparisons" if source.kind == "group" else "scores"
            if source.weight and gives not in reads:
                known = plugins.names("aggregator")
                fit = [repr(n) for n in known if gives in declared(plugins, "aggregator", n).reads]
                raise ConfigError(
                    f"aggregator {part_name(spec['aggregator'])!r} reads"
                    f" {' and '.join(sorted(reads))}, but source {source.name!r} gives {gives}: use"
                    f" {' or '.join(fit)}, or another task for the source"
                )
        spec = {**spec, "aggregator": aggregator}
    return component(plugins, "combiner", spec, weights=weights)


def part_name(spec: Any) -> str:
    """Returns the name of a part as the config gives it."""
    if isinstance(spec, Mapping):
        return str(spec.get("name"))
    return spec if isinstance(spec, str) else type(spec).__name__


def with_option(plugins: Plugins, *consumes: str) -> list[str]:
    """Returns the names of optimizers that consume one of these."""
    names = plugins.names("optimizer")
    return [repr(n) for n in names if set(consumes) & declared(plugins, "optimizer", n).consumes]
