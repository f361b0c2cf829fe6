"""The options of stages that play conversations, which they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from ..pipeline.signature import checked_options
from ..protocols import RunView
from ..rollout.elsewhere import Schedule
from ..util.section import Section, of_the_default
from .environments import EnvConfig, read_envs


class SamplingOptions(Section):
    """Where conversations are played, and how a policy's replies are sampled.

    Attributes:
        env: an id, a list of (id, weight), or of mappings with `id`, `weight`, `options`, `kwargs`,
            `feedback` and `seats`.
        temperature: of sampling; there is no top-p and no top-k, which would falsify the
            log-probs that RL needs. 0 is greedy, where nothing trains on them.
        max_new_tokens: of a reply.
        backend: what samples, and its options.
    """

    env: Any
    temperature: float = Field(default=1.0, ge=0)
    max_new_tokens: int = Field(default=256, ge=1)
    backend: Any = "in-process"

    _backend_by_options = field_validator("backend", mode="before")(of_the_default)

    @field_validator("env")
    @classmethod
    def _env(cls, value: Any) -> list[EnvConfig] | None:
        return read_envs(value)


class PlayOptions(SamplingOptions):
    """How conversations are played that something trains on.

    Attributes:
        temperature: see above; greater than 0.
        max_turns: of a conversation; it is truncated there.
        max_failure_rate: share of failed environments, and of each source's failed answers, above
            which the run stops.
        step_limit: seconds an environment may take for a step.
        schedule: "deterministic": a policy replies when every environment has answered, and the
            same seeds give the same bits; "ready-first": it replies to those that wait for it, so
            that slow environments delay no other, and repeats up to rounding.
    """

    temperature: float = Field(default=1.0, gt=0)
    max_turns: int = Field(default=1000, ge=1)
    max_failure_rate: float = Field(default=0.5, ge=0, le=1)
    step_limit: float = Field(default=60.0, gt=0)
    schedule: Schedule = "deterministic"


class JudgedPlayOptions(PlayOptions):
    """How conversations are played and feedback on them is awaited.

    Attributes:
        history: "append" keeps the tokens of earlier turns as they were sampled; "rerender" renders
            every turn's prompt anew with the chat template, so that a turn is a sequence of its
            own.
        poll: seconds between looks for answers that come later, at most.
    """

    history: Literal["append", "rerender"] = "append"
    poll: float = Field(default=1.0, ge=0)


def check_backend(run: RunView, backend: Any) -> None:
    """Checks the options of a backend that is named and not yet made.

    Raises:
        PluginError, ConfigError: there is no such backend, or it does not take them.
    """
    if isinstance(backend, (str, Mapping)):
        options = dict(backend) if isinstance(backend, Mapping) else {"name": backend}
        name = options.pop("name", "")
        checked_options(f"backend {name!r}", run.plugins.factory("backend", name), 0, options)
