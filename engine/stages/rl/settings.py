"""The options of the stage `rl`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ...feedback.specs import ENVIRONMENT
from ...pipeline.stage import Stage
from ...util.section import Section, of_the_default
from ..environments import EnvConfig, read_envs
from ..play_options import JudgedPlayOptions

SERVED = "turnwise/Served-v0"  # what served conversations have for an environment


class Gold(Section):
    """Early stopping: the environment's own return on held-out starts, played every few updates.

    The policy that did best is kept; when it has not been beaten `patience` times in a row the
    stage ends, and the policy goes back to it, as it does at the stage's end. What is trained on
    may be a proxy (a reward model); this is the measure it stands for.

    Attributes:
        episodes: how many starts; the same every time.
        every: updates between measurements; the start is measured too.
        patience: measurements without a new best after which the stage ends; None: only measures,
            and keeps the last policy.
        options: for `reset`, to choose held-out content; default: those of the training
            environment.
        seed: of the starts.
    """

    episodes: int = Field(default=200, ge=1)
    every: int = Field(default=5, ge=1)
    patience: int | None = Field(default=3, ge=1)
    options: dict[str, Any] | None = None
    seed: int = 30_000


class Audit(Section):
    """The truth about the credit: for some conversations every turn's start is valued by many
    conversations continued from there with the present policy. Their differences are the true
    advantages of the turns, up to sampling noise; nothing of it trains.

    Attributes:
        episodes: how many conversations of an update.
        rollouts: how many continuations of each turn's start.
        every: updates between audits; the first update is audited, and the last.
    """

    episodes: int = Field(default=8, ge=1)
    rollouts: int = Field(default=32, ge=2)
    every: int = Field(default=25, ge=1)


class RLSettings(JudgedPlayOptions, Stage):
    """Describe reinforcement learning on conversations: what is played, judged and trained on.

    Attributes:
        episodes: "played", in `env`; or "ledger": conversations that `turnwise serve` recorded in
            the run's ledger, once each, when `feedback` has scored them. The stage ends when there
            are fewer than an update takes.
        updates: how many.
        groups, group_size: starts per update, and episodes per start.
        feedback: sources: "environment" is the environment's own reward; names of judges; mappings
            with `judge`, its options, and how it is asked (`name`, `weight`, `raters`, `deadline`,
            `required`, `share`); "package.module:function"; in Python objects and functions.
        reward_clip: outcomes are kept within plus and minus this.
        reward_whiten: rewards are divided by the standard deviation of the update's outcomes (their
            mean stays).
        gold: early stopping by a measure that is not trained on, see `Gold`.
        pending: how many episodes may wait for answers while play goes on; 0: each update waits for
            its own.
        overlap: how many updates ahead conversations are begun while the present update is made, by
            the policy as it is before it; needs a backend that plays elsewhere (`ray`). 0: every
            update trains on conversations of its own policy.
        staleness: how many versions older than the policy an episode may be that trains; with
            `pending`, or `episodes: ledger`.
        resample: how many times groups in which all outcomes are equal are replaced by new ones
            before an update (DAPO's dynamic sampling).
        audit: measures the credit against the truth, see `Audit`.
        min_group: groups with fewer rewarded episodes are dropped, where credit compares within
            groups.
        optimizer: `grpo`, `ppo`, `rejection`, or a plugin's; here as in `combiner`, `curriculum`
            and `backend` options without a `name` are those of the default.
        credit: how rewards become advantages; default: `gae` with a critic, else `outcome`.
        combiner: how feedback becomes rewards: `weighted`, `aggregate` or `calibrated`.
        curriculum: which starts are played: `uniform`, `learnable` or `staged`.
    """

    env: Any = None
    episodes: Literal["played", "ledger"] = "played"
    updates: int = Field(default=100, ge=1)
    groups: int = Field(default=16, ge=1)
    group_size: int = Field(default=8, ge=1)
    optimizer: Any = "grpo"
    credit: Any = None
    combiner: Any = "weighted"
    curriculum: Any = "uniform"
    feedback: list[Any] = [ENVIRONMENT]
    reward_clip: float | None = Field(default=None, gt=0)
    reward_whiten: bool = False
    gold: Gold | None = None
    pending: int = Field(default=0, ge=0)
    overlap: int = Field(default=0, ge=0)
    staleness: int = Field(default=8, ge=1)
    resample: int = Field(default=0, ge=0)
    audit: Audit | None = None
    min_group: int = Field(default=2, ge=1)

    _parts_by_options = field_validator("optimizer", "combiner", "curriculum", mode="before")(
        of_the_default
    )

    @field_validator("env")
    @classmethod
    def _env(cls, value: Any) -> list[EnvConfig] | None:
        return None if value is None else read_envs(value)

    @model_validator(mode="after")
    def _where_from(self) -> RLSettings:
        if self.episodes == "played":
            if self.env is None:
                raise ValueError("`env` is needed: where conversations are played")
            return self
        odd = [name for name in ("env", "gold", "audit", "pending", "resample")
               if name in self.model_fields_set]  # fmt: skip
        if odd:
            raise ValueError(
                f"with `episodes: ledger` nothing is played: leave out {', '.join(odd)}"
            )
        if ENVIRONMENT in self.feedback:
            raise ValueError(
                "with `episodes: ledger` say whose feedback counts, `feedback: [users]`: no"
                " environment rewards what was served"
            )
        vars(self)["env"] = [EnvConfig(id=SERVED)]  # and yet it was not given
        return self

    @field_validator("feedback", mode="before")
    @classmethod
    def _feedback(cls, value: Any) -> list[Any]:
        sources = value if isinstance(value, list) else [value]
        if not sources:
            raise ValueError(
                "at least one source is needed, or there is nothing to learn from; the default is"
                " ['environment']"
            )
        return sources
