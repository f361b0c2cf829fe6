"""The KL to the reference policy, shared by PPO and GRPO: as a penalty in the reward, or as a term
of the loss; fixed or adaptive."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...learning import Batch, Policy, kl_estimate
from ...protocols import Section

# Nats: how far log-probs of one token by one policy are apart when other rows are in the batch
# (float32).
ROUNDING = 1e-5


class KLOptions(Section):
    """The options of an optimizer that can hold the policy near the reference.

    Attributes:
        kl: coefficient; 0 turns it off, and the reference is never run, except to measure.
        kl_place: "reward", "loss", or "measure" (nothing holds it back; it is only measured).
        kl_estimator: "k2" or "k3" in the loss; "k1", whose gradient there has a mean of zero, is
            what the penalty in the reward always is.
        kl_target: nats per conversation that the coefficient follows; None keeps it as it is.
    """

    kl: float = Field(default=0.0, ge=0)
    kl_place: Literal["reward", "loss", "measure"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_target: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kl_place == "measure" and self.kl:
            raise ValueError(f"kl_place 'measure' holds nothing back: leave kl at 0, got {self.kl}")
        if self.kl_place == "loss" and self.kl_estimator == "k1" and self.kl:
            raise ValueError(
                "k1 in the loss has a gradient whose mean is zero: use kl_estimator='k3' or 'k2',"
                " or kl_place='reward'"
            )
        if self.kl_target is not None and not self.kl:
            raise ValueError("kl_target needs kl to be positive, which is where it starts")
        return self


class KL:
    """A KL penalty that limits how far the policy moves from the reference.

    - place "reward": each action token costs coef * k1 (InstructGPT, Ouyang et al. 2022); credit
      distributes it.
    - place "loss": coef * estimator is added to the loss per token (GRPO, Shao et al. 2024, eq. 4,
      with k3).
    - place "measure": nothing holds it back; how far it moved is only measured.

    With a target, the coefficient follows the KL that was measured (Ziegler et al. 2019,
    arXiv:1909.08593, section 2.2):

        e = clip(KL / target - 1, -0.2, 0.2)        coef <- coef * (1 + gain * e)

    Args:
        options: of an optimizer.
        gain: how fast the coefficient follows.
    """

    def __init__(self, options: KLOptions, gain: float = 0.1) -> None:
        self.coef, self.place, self.estimator = options.kl, options.kl_place, options.kl_estimator
        self.target, self.gain = options.kl_target, gain
        self._measured: dict[str, float] = {}

    @property
    def used(self) -> bool:
        """Whether the KL is needed at all."""
        return self.coef > 0 or self.place == "measure"

    @property
    def in_loss(self) -> bool:
        """Whether the KL is a term of the loss."""
        return self.coef > 0 and self.place == "loss"

    def setup(self, policy: Policy) -> None:
        """Keeps the policy as it is now as the reference, where the KL is needed."""
        if self.used:
            policy.freeze_reference()

    def prepare(self, policy: Policy, batch: Batch, micro_tokens: int) -> None:
        """Sets `batch.reference_logprobs`, and adds the penalty to `batch.token_rewards`.

        Both sides come from one forward pass with the same rows, `batch.extras["prox"]` and the
        reference: where the policy is still the reference their difference is 0 to the last bit,
        and no rounding is trained on.
        """
        if not self.used:
            return
        batch.reference_logprobs = policy.logprobs(batch, micro_tokens=micro_tokens, reference=True)
        if "prox" not in batch.extras:
            batch.extras["prox"] = policy.logprobs(batch, micro_tokens=micro_tokens)
        apart = kl_estimate(batch.extras["prox"], batch.reference_logprobs, "k1") * batch.mask
        self._measured = {
            "kl": float(apart.sum() / batch.mask.sum()),
            "kl_episode": float(apart.sum(1).mean()),
        }
        if self.place == "reward":
            batch.token_rewards -= self.coef * apart

    def loss(self, logprobs: Tensor, reference: Tensor) -> Tensor:
        """Returns the term of each token's loss, [n]; without gradient where policy and reference
        differ by the rounding of a forward pass."""
        same = (logprobs - reference).detach().abs() <= ROUNDING
        return self.coef * kl_estimate(
            torch.where(same, reference, logprobs), reference, self.estimator
        )

    def measure(self) -> dict[str, float]:
        """Returns the KL of the whole batch as `prepare` saw it, k1, per token (`kl`) and per
        conversation (`kl_episode`); with a target, adapts the coefficient."""
        if not self.used:
            return {}
        found = {**self._measured, "kl_coef": self.coef}
        if self.target is not None:
            error = min(max(found["kl_episode"] / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + self.gain * error
        return found
