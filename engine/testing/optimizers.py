"""`check_optimizer`: trains a tiny policy by an optimizer, in several ways that must come to the
same."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ..errors import NonFiniteError
from ..policy.batching import make_batch
from ..protocols import Optimizer
from ..records.batch import Batch, Credit, Pairs
from ..records.episode import Episode
from ..records.rewards import Rewards
from .episodes import sampled
from .faults import faults_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..policy.policy import Policy

CLOSE = 2e-5  # of weights, after an update


def tiny_policy(seed: int = 0) -> Policy:
    """Returns a Llama of two layers with random weights, to test with."""
    from ..policy.policy import Policy
    from ..policy.tiny import build_policy

    with tempfile.TemporaryDirectory() as folder:
        build_policy(folder, ["Well? word"], seed=seed, hidden=32, layers=2, heads=2)
        return Policy.from_pretrained(folder, device="cpu")


def check_optimizer(make: Callable[[], Optimizer]) -> None:
    """Trains a tiny policy, and lists what is wrong: metrics that are no numbers; updates that
    depend on padding, or differ from one time to the next; a state that is not saved whole; a step
    on numbers that are not finite; a policy that stays, or goes away from what was rewarded; what
    it raises.

    Args:
        make: makes the optimizer, as a config would. It is to have no schedule that keeps its
            first steps at 0 (`warmup: 0`).

    Raises:
        Unsound: with all faults.
    """
    import torch

    with torch.random.fork_rng(), faults_of(make()) as faults:
        check = _Check(make, faults)
        made = check.batch()
        base = check.trained([made])
        if base is None:
            return
        check.compare(base, check.trained([check.batch()]), "differs from one time to the next", 0)
        # Adam's first step does not depend on the gradient's size: it takes several to see it.
        narrow, wide = (
            check.trained([_padded(check.batch(), columns) for columns in more])
            for more in ((0, 0, 0), (40, 0, 7))
        )
        check.compare(
            narrow, wide, "depends on padding: only where `mask` is True may anything count", CLOSE
        )
        check.direction(base)
        check.resumes()
        check.refuses_nan()


class _Check:
    """A check in progress: conversations that a tiny policy may have had."""

    def __init__(self, make: Callable[[], Optimizer], faults: list[str]) -> None:
        self.make, self.faults = make, faults
        self.consumes = make().consumes
        self.policy = tiny_policy()
        self.played = [_known(e, len(self.policy.chat.tokenizer)) for e in sampled()]
        self.before = self._weights(self.policy)

    def batch(self) -> Batch:
        """Returns the batch, with the log-probs that the policy gives it and all that an optimizer
        may consume: +1 and -1 for the conversations of a group by turns."""
        import torch

        good = {e.id: i % 2 == 0 for i, e in enumerate(self.played)}
        played = self.played
        sign = [1.0 if good[e.id] else -1.0 for e in played]
        rewards = [
            Rewards(s, (*[0.0] * (len(e.turns) - 1), s)) for s, e in zip(sign, played, strict=True)
        ]
        made = make_batch(played, rewards, seed=1)
        signs = torch.tensor(sign).unsqueeze(1)
        made.credit = Credit(signs * made.mask, None, signs * made.turn_mask)
        made.behaviour_logprobs = self.policy.logprobs(made)
        made.labels = (signs[:, 0] > 0).float()
        better = [i for i, s in enumerate(sign) if s > 0]
        worse = [next(j for j, s in enumerate(sign) if s < 0 and made.group[j] == made.group[i])
                 for i in better]  # fmt: skip
        ones = torch.ones(len(better))
        made.pairs = Pairs(torch.tensor(better), torch.tensor(worse), ones, 0 * ones, ones)
        return made

    def trained(
        self, batches: Sequence[Batch], optimizer: Optimizer | None = None, policy: Any = None
    ) -> Policy | None:
        """Returns a copy of the policy that was trained on batches, and notes odd metrics."""
        policy = policy or copy.deepcopy(self.policy)
        try:
            if optimizer is None:
                optimizer = self.make()
                optimizer.setup(policy)
            for made in batches:
                optimizer.prepare(policy, made)
                metrics = optimizer.update(policy, made)
                odd = [
                    name for name, value in metrics.items()
                    if not isinstance(value, (int, float)) or not math.isfinite(value)
                ]  # fmt: skip
                if odd:
                    self.faults.append(
                        f"its metric {odd[0]!r} is {metrics[odd[0]]!r}, which is no finite number"
                    )
        except Exception as error:
            self.faults.append(f"it raises {type(error).__name__} on a batch: {error}")
            return None
        return policy

    def _weights(self, policy: Any) -> list[Tensor]:
        return [p.detach().clone() for p in policy.model.parameters()]

    def compare(self, one: Any, other: Any, why: str, close: float) -> None:
        """Notes weights of two policies that differ by more than rounding."""
        if one is None or other is None:
            return
        apart = max(
            float((a - b).abs().max())
            for a, b in zip(self._weights(one), self._weights(other), strict=True)
        )
        if apart > close:
            self.faults.append(f"its update {why} (weights differ by {apart:.1e})")

    def direction(self, trained: Any) -> None:
        """Notes a policy that made what was rewarded less likely than what was not."""
        made = self.batch()
        assert made.behaviour_logprobs is not None
        assert made.credit is not None
        change = (trained.logprobs(made) - made.behaviour_logprobs).sum(1)
        good = made.outcome > 0
        if not float((change != 0).sum()):
            self.faults.append("its update leaves the policy as it was")
        elif "demonstrations" in self.consumes and "advantages" not in self.consumes:
            if float(change[good].mean()) <= 0:
                self.faults.append("it makes the conversations that it imitates less likely")
        elif float(change[good].mean()) <= float(change[~good].mean()):
            self.faults.append(
                "it makes what was rewarded less likely than what was not: look at the sign of the"
                " loss"
            )

    def resumes(self) -> None:
        """Compares two updates with two that a saved state lies between."""
        whole = self.trained([self.batch(), self.batch()])
        policy, first = copy.deepcopy(self.policy), self.make()
        first.setup(policy)
        if self.trained([self.batch()], first, policy) is None:
            return
        state = copy.deepcopy(first.state_dict())
        fresh, second = copy.deepcopy(self.policy), self.make()
        second.setup(fresh)  # before the weights are put back, as a run does that goes on
        for mine, theirs in zip(fresh.model.parameters(), policy.model.parameters(), strict=True):
            mine.data.copy_(theirs.data)
        if state:
            second.load_state_dict(state)
        again = self.trained([self.batch()], second, fresh)
        if whole is not None:
            self.compare(whole, again, "after its state was saved and loaded is another one: what"
                         " it needs is missing in state_dict()", 0)  # fmt: skip

    def refuses_nan(self) -> None:
        """Notes a step that was taken on NaN."""
        made, policy, optimizer = self.batch(), copy.deepcopy(self.policy), self.make()
        assert made.credit is not None
        optimizer.setup(policy)
        optimizer.prepare(policy, made)
        if "advantages" not in self.consumes:
            return
        made.credit = replace(made.credit, advantages=made.credit.advantages * math.nan)
        try:
            optimizer.update(policy, made)
        except NonFiniteError:
            pass
        except Exception as error:
            self.faults.append(
                f"on advantages that are NaN it raises {type(error).__name__} and not"
                " NonFiniteError"
            )
        if any((a != b).any() for a, b in zip(self.before, self._weights(policy), strict=True)):
            self.faults.append("it takes a step on advantages that are NaN: the policy is lost")


def _known(episode: Episode, vocabulary: int) -> Episode:
    """Returns an episode whose ids a tokenizer of this size has."""
    turns = tuple(
        replace(
            turn,
            prompt_ids=tuple(3 + i % (vocabulary - 3) for i in turn.prompt_ids),
            action_ids=tuple(3 + i % (vocabulary - 3) for i in turn.action_ids or ()),
        )
        for turn in episode.turns
    )
    return replace(episode, turns=turns)


def _padded(made: Batch, columns: int) -> Batch:
    """Returns a batch with more padding on the axes of actions and of turns, and numbers there that
    must not count."""
    import torch

    sizes = [tuple(made.mask.shape), tuple(made.turn_mask.shape)]

    def wider(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and tuple(value.shape) in sizes:
            fill = -1 if value.dtype == torch.long else 0 if value.dtype == torch.bool else 7.0
            more = torch.full((len(value), columns), fill, dtype=value.dtype)
            return torch.cat([value, more], 1)
        return value

    found = replace(made, **{f.name: wider(getattr(made, f.name)) for f in fields(Batch)})
    if made.credit is not None:
        found.credit = replace(
            made.credit,
            advantages=wider(made.credit.advantages),
            turn_credit=wider(made.credit.turn_credit),
        )
    return found
