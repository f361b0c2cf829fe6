"""The batch and the credit: the data that credit methods and optimizers receive and return.

The batch lays out *action tokens only*, `[E, A]`: E episodes, A the most action tokens of any of
them. Observation tokens do not appear on that axis, so no method can let them carry or decay
credit, and it makes no difference whether an episode is trained as one row of tokens or as one row
per turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .episode import Episode

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence of token ids to run through the model.

    Attributes:
        ids: the tokens, observation and action tokens as they stood when sampled.
        episode: index of the episode in the batch.
        positions: where in `ids` the action tokens stand, ascending, all > 0.
        actions: their places on the batch's action axis, ascending.
        bootstrap: the state after the last token is where the episode was truncated.
    """

    ids: tuple[int, ...]
    episode: int
    positions: tuple[int, ...]
    actions: tuple[int, ...]
    bootstrap: bool = False


@dataclass(frozen=True, slots=True)
class Credit:
    """Advantages made of rewards. Raw numbers: normalisation is the optimizer's, by name.

    Attributes:
        advantages: [E, A] per action token, 0 at padding.
        value_targets: [E, A] the critic's regression targets, or None without a critic.
        turn_credit: [E, K] per turn, 0 at padding; shown to people.
    """

    advantages: Tensor
    value_targets: Tensor | None
    turn_credit: Tensor


@dataclass(frozen=True, slots=True)
class Pairs:
    """Comparisons as pairs of episodes of the batch; P pairs.

    Attributes:
        better, worse: [P] long, indices of episodes.
        probability: [P] how sure it is that `better` is better; 1 for hard labels.
        margin: [P] how much better, in the raters' grades; 0 where no grade was given.
        weight: [P].
    """

    better: Tensor
    worse: Tensor
    probability: Tensor
    margin: Tensor
    weight: Tensor


@dataclass(slots=True)
class Batch:
    """The data that one update trains on. E episodes, A action tokens at most, K turns at most, G
    groups.

    The batch is global: with several processes each holds all of it, and optimizers divide the rows
    among the processes. Its tensors are float32 on the CPU.

    Attributes:
        rows: the token rows; every action token of every episode stands in exactly one.
        mask: [E, A] bool, True at action tokens.
        turn: [E, A] long, the turn an action token belongs to, -1 at padding. Stored, never
            inferred from rewards.
        group: [E] long, index of the episode's group in this batch.
        behaviour_logprobs: [E, A] as sampled, 0 at padding; None where a turn was not sampled by a
            policy of ours.
        staleness: [E] long, policy updates between the episode's oldest turn and now.
        outcome: [E] the whole episode's reward.
        turn_rewards: [E, K] summing to `outcome`, 0 at padding.
        turn_mask: [E, K] bool.
        turn_scores: [E, K] raters' opinions of turns, NaN where there is none; None when no source
            gave any.
        truncated: [E] bool.
        weight: [E] how much each episode counts.
        token_rewards: [E, A] rewards that arise per action token (a KL penalty), in addition to
            `turn_rewards`.
        values: [E, A] the critic's value of the state in which each action token was chosen, as it
            stands at the start of the update; None without a critic.
        bootstrap: [E] the critic's value of the state an episode was truncated in, 0 where it
            terminated.
        branch_values: [E, K] mean outcome of conversations that were continued again from each
            turn's start, NaN where there was none; None without branches.
        reference_logprobs: [E, A] under the reference policy, where the KL to it is used.
        pairs: for optimizers that consume comparisons.
        labels: [E] 1 good, 0 bad, NaN unknown, for optimizers that consume labels.
        signal: [E] bool, whether the episode's group has any credit: where no action token of a
            group has an advantage, all of it is False. Such episodes count in means, and in
            whatever else is in the loss.
        credit: set before an optimizer that consumes advantages sees the batch.
        temperature: the sampling temperature; log-probs are those of logits divided by it.
        progress: share of the stage's updates already done, in [0, 1), for schedules.
        seed: for everything random in the update (the order of minibatches).
        extras: what plugins hand to one another.
    """

    episodes: tuple[Episode, ...]
    rows: tuple[Row, ...]
    mask: Tensor
    turn: Tensor
    group: Tensor
    behaviour_logprobs: Tensor | None
    staleness: Tensor
    outcome: Tensor
    turn_rewards: Tensor
    turn_mask: Tensor
    truncated: Tensor
    weight: Tensor
    token_rewards: Tensor
    signal: Tensor
    turn_scores: Tensor | None = None
    values: Tensor | None = None
    bootstrap: Tensor | None = None
    branch_values: Tensor | None = None
    reference_logprobs: Tensor | None = None
    pairs: Pairs | None = None
    labels: Tensor | None = None
    credit: Credit | None = None
    temperature: float = 1.0
    progress: float = 0.0
    seed: int = 0
    extras: dict[str, Any] = field(default_factory=dict)
