"""The options of what trains by gradients: stages and optimizers have them in common."""

from __future__ import annotations

import importlib.util
from typing import Literal

from pydantic import ConfigDict, Field, field_validator

from ..util.section import Section
from ..util.suggest import install


class LearnerOptions(Section):
    """The options of everything that trains by gradients.

    Attributes:
        lr: learning rate after warm-up.
        warmup: optimizer steps over which the rate rises linearly; Adam's first steps are its
            largest otherwise.
        decay: final learning rate as a share of `lr`, reached linearly at the end of the stage.
        weight_decay: AdamW's.
        max_grad_norm: gradients are scaled down to this norm.
        micro_tokens: tokens per forward pass, padding included; lower it when memory runs out.
            Never changes the result beyond rounding.
        activation_memory: GiB that a forward pass may keep for its gradient: it takes as few tokens
            as that needs, and where one conversation alone is too much, layers are computed a
            second time; default: no limit.
        moments: what AdamW remembers of each weight, in "float32" or in "8bit", which takes a
            quarter of the memory; needs the package `bitsandbytes`.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    lr: float = Field(default=1e-6, ge=0)
    warmup: int = Field(default=10, ge=0)
    decay: float = Field(default=1.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    micro_tokens: int = Field(default=2048, ge=1)
    activation_memory: float | None = Field(default=None, gt=0)
    moments: Literal["float32", "8bit"] = "float32"

    @field_validator("moments")
    @classmethod
    def _installed(cls, value: str) -> str:
        if value == "8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(f"moments in 8 bits need bitsandbytes: {install('quantize')}")
        return value


class SupervisedOptions(LearnerOptions):
    """The options of training on data that does not change with the policy: the rate is higher and
    falls."""

    lr: float = Field(default=1e-5, gt=0)
    warmup: int = Field(default=20, ge=0)
    decay: float = Field(default=0.1, ge=0)


class PassOptions(LearnerOptions):
    """The options of an optimizer that goes over a batch.

    Attributes:
        epochs: passes over the batch.
        minibatches: optimizer steps per pass.
    """

    epochs: int = Field(default=1, ge=1)
    minibatches: int = Field(default=1, ge=1)
