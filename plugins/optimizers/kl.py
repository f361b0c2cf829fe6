"""The KL to the reference policy, shared by PPO and GRPO: as a penalty in the reward, or as a term
of the loss; fixed or adaptive."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...learning import Batch, Policy, kl_estimate

# Nats: how far log-probs of one token by one policy are apart when other rows are in the batch
# (float32).
ROUNDING = 1e-5


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
        coef: 0 turns it off, and the reference is never run, except to measure.
        place: "reward", "loss" or "measure".
        estimator: "k1", "k2" or "k3" in the loss; the penalty in the reward is always k1, whose
            expectation is the KL.
        target: nats per conversation; None keeps the coefficient as it is.
        gain: how fast the coefficient follows.
    """

    def __init__(
        self,
        coef: float,
        place: Literal["reward", "loss", "measure"],
        estimator: Literal["k1", "k2", "k3"],
        target: float | None = None,
        gain: float = 0.1,
    ) -> None:
        if coef < 0:
            raise ValueError(f"kl must not be negative, got {coef}")
        if place not in ("reward", "loss", "measure"):
            raise ValueError(f"kl_place must be 'reward', 'loss' or 'measure', got {place!r}")
        if place == "measure" and coef:
            raise ValueError(f"kl_place 'measure' holds nothing back: leave kl at 0, got {coef}")
        if estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")
        if place == "loss" and estimator == "k1" and coef:
            raise ValueError(
                "k1 in the loss has a gradient whose mean is zero: use kl_estimator='k3' or 'k2',"
                " or kl_place='reward'"
            )
        if target is not None and (target <= 0 or not coef):
            raise ValueError(
                f"kl_target needs to be positive and kl too, which is where it starts: got {target}"
                f" and kl={coef}"
            )
        self.coef, self.place, self.estimator, self.target, self.gain = (
            coef,
            place,
            estimator,
            target,
            gain,
        )
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
