"""The pure maths: tensors in, tensors out, shapes in the docstrings.

E episodes, A action tokens, K turns, n any flat count.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a copy of a tensor of the CPU's on a device, which a GPU fetches while the program
    goes on."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def finest(device: torch.device) -> torch.dtype:
    """Returns the finest floating-point type of a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def fetched(*tensors: Tensor) -> list[list[float]]:
    """Returns the numbers of tensors of one length, all fetched from their device at once."""
    return torch.stack([each.to(finest(each.device)) for each in tensors]).tolist()


def log_softmax_at(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-probability of each target and the entropy of its distribution, in float32 at
    least.

    Args:
        logits: [n, V].
        targets: [n] long.

    Returns:
        log-probabilities [n], with gradient; entropies [n], without.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    logprobs = torch.log_softmax(logits, -1)
    with torch.no_grad():
        entropy = torch.special.entr(logprobs.exp()).sum(-1)  # 0 for a token without a chance
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def place_turn_rewards(turn_rewards: Tensor, turn: Tensor, mask: Tensor) -> Tensor:
    """Puts each turn's reward on the last action token of that turn.

    Args:
        turn_rewards: [E, K].
        turn: [E, A] long, turn of each action token, ascending.
        mask: [E, A] bool.

    Returns:
        [E, A]. A turn without action tokens (an empty reply) hands its reward to the last token
        before it, or to the first token of the episode, so that nothing is lost.
    """
    episodes, actions = turn.shape
    rewards = turn_rewards.new_zeros(episodes, actions)
    length = mask.sum(1)
    for k in range(turn_rewards.shape[1]):
        last = ((turn <= k) & mask).sum(1) - 1
        place = last.clamp(min=0).minimum((length - 1).clamp(min=0))
        rewards.scatter_add_(1, place.unsqueeze(1), turn_rewards[:, k : k + 1])
    return rewards * mask


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns generalised advantage estimates over action tokens (Schulman et al. 2015,
    arXiv:1506.02438, eq. 16).

        delta_t = r_t + gamma * V_{t+1} - V_t        A_t = delta_t + gamma * lam * A_{t+1}

    The state after the last action token is worth `bootstrap`: 0 where the episode terminated, the
    critic's value where it was truncated.

    Args:
        rewards, values: [E, A].
        mask: [E, A] bool; the True entries of a row come first.
        bootstrap: [E].
        gamma, lam: the discount and the decay, see above.

    Returns:
        advantages [E, A] and value targets A + V [E, A], both 0 at padding.
    """
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(bootstrap)
    next_value = bootstrap
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(here, delta + gamma * lam * following, following)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, following, 0.0)
    return advantages, (advantages + values) * mask


def bilevel_gae(
    rewards: Tensor,
    values: Tensor,
    turn: Tensor,
    mask: Tensor,
    bootstrap: Tensor,
    turns: int,
    token: tuple[float, float],
    turnwise: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Estimates advantages first over turns, then over the tokens inside each (VAGEN, Wang et al.
    2025, arXiv:2510.16907, section 3.3).

        over turns:   delta_k = r_k + g V(e_{k+1}) - V(e_k)   A_k = delta_k + g l A_{k+1}   e_k: the
                      last token of turn k
        in a turn:    A_{e_k} = A_k   A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}   for the
                      tokens t before e_k

    r_k is the reward on the turn's last token, and g times what the next turn's tokens before its
    last one earn (a KL penalty), so that a turn is charged for all that comes after it.

    Args:
        rewards, values: [E, A].
        turn: [E, A] long, -1 at padding.
        mask: [E, A] bool; the True entries of a row come first.
        bootstrap: [E].
        turns: K, how many turns the longest episode has.
        token, turnwise: (gamma, lam) inside turns and over turns.

    Returns:
        advantages [E, A] and value targets A + V [E, A], both 0 at padding.
    """
    _, counts = turn_sums(values, turn, mask, turns)
    _, last = turn_edges(counts)
    ends = counts > 0
    at_ends = rewards.gather(1, last) * ends
    before_ends = turn_sums(rewards, turn, mask, turns)[0] - at_ends
    earned = at_ends + turnwise[0] * torch.cat(
        [before_ends[:, 1:], torch.zeros_like(before_ends[:, :1])], 1
    )
    per_turn, _ = gae(earned, values.gather(1, last) * ends, ends, bootstrap, *turnwise)
    gamma, lam = token
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(bootstrap)
    next_value = torch.zeros_like(bootstrap)
    for t in reversed(range(values.shape[1])):
        k = turn[:, t].clamp(min=0).unsqueeze(1)
        at_end = (last.gather(1, k) == t).squeeze(1)
        inside = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * following
        following = torch.where(at_end, per_turn.gather(1, k).squeeze(1), inside)
        next_value = values[:, t]
        advantages[:, t] = torch.where(mask[:, t], following, 0.0)
    return advantages, (advantages + values) * mask


def rounding(size: Tensor) -> Tensor:
    """Returns how far apart numbers may be and still be equal up to rounding.

        2 eps |size|, at least 1e-12        eps: float32's

    Relative to their size, so that neither a large offset nor a small unit hides what differs; the
    floor is the rounding of sums of numbers around 1 in double precision.

    Args:
        size: the largest of the numbers that are compared, any shape.
    """
    return (2 * torch.finfo(torch.float32).eps * size.double().abs()).clamp(min=1e-12)


def apart(values: Tensor, baseline: Tensor, size: Tensor) -> Tensor:
    """Returns values - baseline in double precision, exactly 0 where the difference is within the
    `rounding` of numbers of that size.

    An advantage made of rounding would be one all the same: Adam makes a full step of the smallest
    gradient.
    """
    exact = values.double() - baseline.double()
    return torch.where(exact.abs() <= rounding(size), 0.0, exact)


def group_largest(values: Tensor, group: Tensor) -> Tensor:
    """Returns the largest absolute value of each one's group, [E], of values [E] or [E, K] with
    group indices [E]; NaN is ignored."""
    own = (
        values.double().nan_to_num(0.0).abs().flatten(1).amax(1)
        if values.ndim > 1
        else values.double().nan_to_num(0.0).abs()
    )
    groups = int(group.max()) + 1 if len(group) else 0
    return own.new_zeros(groups).scatter_reduce(0, group, own, "amax")[group]


def group_mean(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Returns the mean of each group, [G], of values [E] with group indices [E]."""
    total = values.new_zeros(groups).index_add_(0, group, values)
    return total / group_counts(group, groups).clamp(min=1)


def group_counts(group: Tensor, groups: int) -> Tensor:
    """Returns the number of members of each group, [G], from group indices [E]."""
    return torch.zeros(groups, dtype=torch.long, device=group.device).index_add_(
        0, group, torch.ones_like(group)
    )


def group_advantage(outcome: Tensor, group: Tensor, baseline: str) -> Tensor:
    """Returns outcomes relative to a baseline from the group.

    - "mean": R - mean(R), GRPO's numerator and Dr. GRPO (Liu et al. 2025, arXiv:2503.20783)
    - "loo":  R - mean of the others = (R - mean(R)) * G / (G - 1), RLOO (Ahmadian et al. 2024,
      arXiv:2402.14740)
    - "std":  (R - mean(R)) / (std(R) + 1e-4) with the unbiased std, GRPO (Shao et al. 2024,
      arXiv:2402.03300)

    A member of a group of one has nothing to be compared with and gets 0 under every baseline. So
    does one whose outcome is the group's mean up to `rounding`: "std" would blow the rounding of
    equal outcomes up to an advantage.

    Args:
        outcome: [E].
        group: [E] long.
        baseline: "mean", "loo" or "std".

    Returns:
        [E].

    Raises:
        ValueError: an unknown baseline.
    """
    groups = int(group.max()) + 1 if len(group) else 0
    exact = outcome.double()
    mean = group_mean(exact, group, groups)[group]
    centred = apart(exact, mean, group_largest(exact, group))
    size = group_counts(group, groups)[group].double()
    if baseline == "mean":
        return centred.to(outcome.dtype)
    if baseline == "loo":
        return (centred * size / (size - 1).clamp(min=1)).to(outcome.dtype)
    if baseline == "std":
        variance = group_mean(centred**2, group, groups)[group] * size / (size - 1).clamp(min=1)
        return (centred / (variance.sqrt() + 1e-4)).to(outcome.dtype)
    raise ValueError(f"unknown baseline {baseline!r}; there are 'mean', 'loo' and 'std'")


def turn_advantages(values: Tensor, outcome: Tensor, turn_mask: Tensor) -> Tensor:
    """Returns the advantage of every turn from the values of the states between them: the value
    after it less the value before.

        A_k = V_{k+1} - V_k        V after the last turn is the outcome itself, so that the sum is
                                   outcome - V_0

    A state without a value (NaN) is taken to be worth what the next one is.

    Args:
        values: [E, K] expected whole outcome in the state each turn starts from.
        outcome: [E].
        turn_mask: [E, K] bool; the True entries of a row come first.

    Returns:
        [E, K], 0 at padding.
    """
    advantages = torch.zeros_like(values)
    size = (
        torch.cat([values.nan_to_num(0.0), outcome.to(values.dtype).unsqueeze(1)], 1).abs().amax(1)
    )
    after = outcome.to(values.dtype)
    for k in reversed(range(values.shape[1])):
        here = turn_mask[:, k]
        value = torch.where(here & ~values[:, k].isnan(), values[:, k], after)
        advantages[:, k] = torch.where(here, apart(after, value, size).to(values.dtype), 0.0)
        after = value
    return advantages


def turn_sums(per_token: Tensor, turn: Tensor, mask: Tensor, turns: int) -> tuple[Tensor, Tensor]:
    """Returns sums and counts of a per-token quantity [E, A] over each turn: two tensors [E, K]."""
    index = turn.clamp(min=0)
    sums = per_token.new_zeros(per_token.shape[0], turns).scatter_add_(1, index, per_token * mask)
    counts = per_token.new_zeros(per_token.shape[0], turns).scatter_add_(
        1, index, mask.to(per_token.dtype)
    )
    return sums, counts


def turn_edges(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the places of each turn's first and last action token on the action axis, two long
    tensors [E, K]; both 0 for a turn without tokens.

    Args:
        counts: [E, K] action tokens per turn.
    """
    ends = counts.long().cumsum(1)
    return torch.where(counts > 0, ends - counts.long(), 0), torch.where(counts > 0, ends - 1, 0)


def spread_turns(per_turn: Tensor, turn: Tensor, mask: Tensor) -> Tensor:
    """Gives every action token its turn's number: [E, K] -> [E, A], 0 at padding."""
    return per_turn.gather(1, turn.clamp(min=0)) * mask


def returns_to_go(rewards: Tensor, gamma: float = 1.0) -> Tensor:
    """Returns G_k = r_k + gamma * G_{k+1}. [E, K] -> [E, K]; rewards are 0 at padding."""
    result = torch.zeros_like(rewards)
    after = torch.zeros_like(rewards[:, 0])
    for k in reversed(range(rewards.shape[1])):
        after = rewards[:, k] + gamma * after
        result[:, k] = after
    return result


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over the entries of the mask; 0 where there are none."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Scales to mean 0 and standard deviation 1 over the entries of the mask (biased std, eps
    1e-8); 0 elsewhere. Shapes alike."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return (values - mean) / (variance + 1e-8).sqrt() * mask


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimates KL(policy || reference) per token from samples of the policy (Schulman,
    "Approximating KL divergence").

    With d = log pi_ref - log pi: k1 = -d (unbiased, may be negative), k2 = d^2 / 2 (biased, low
    variance), k3 = exp(d) - 1 - d (unbiased, never negative). As a term of the loss, k2's gradient
    is on average that of the KL of each token's distribution and k3's that of KL(reference ||
    policy); neither sees that an earlier token decides which later ones are met, so that over a
    conversation both are biased: only k1 in the reward has the gradient of the conversation's KL
    (docs/credit.md). Shapes alike.

    Raises:
        ValueError: an unknown estimator.
    """
    d = reference - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d**2 / 2
    if estimator == "k3":
        return d.exp() - 1 - d
    raise ValueError(f"unknown KL estimator {estimator!r}; there are 'k1', 'k2' and 'k3'")


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Returns PPO's clipped surrogate per token (Schulman et al. 2017, arXiv:1707.06347, eq. 7),
    negated to be minimised.

        -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A),   ratio = exp(logprobs -
            old_logprobs)

    Args:
        logprobs, old_logprobs, advantages: [n].
        clip_low, clip_high: how far the ratio may go below and above 1.

    Returns:
        losses [n] and whether the clip holds the token back [n] bool.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    held = (ratio * advantages > clipped * advantages).detach()
    return loss, held


def clipped_value_loss(
    values: Tensor, old_values: Tensor, targets: Tensor, clip: float | None
) -> Tensor:
    """Returns the squared error of the critic per token, halved; with `clip`, the larger of it and
    the error of the value moved at most `clip` from `old_values` (PPO's reference implementation).
    All [n]."""
    loss = (values - targets) ** 2
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - targets) ** 2)
    return loss / 2


def importance_weight(prox: Tensor, behaviour: Tensor, cap: float) -> Tensor:
    """Returns min(cap, pi_prox / pi_behaviour) per token, without gradient: the correction for
    episodes older than the policy (decoupled PPO, Hilton et al. 2021, arXiv:2110.00641, with
    truncation as in IMPALA). 1 on-policy. Shapes alike."""
    return (prox - behaviour).exp().clamp(max=cap).detach()


def explained_variance(predictions: Tensor, targets: Tensor, mask: Tensor) -> float:
    """Returns 1 - Var(target - prediction) / Var(target) over the mask; 0 where the targets do not
    vary."""
    selected = mask.bool()
    target, error = targets[selected], (targets - predictions)[selected]
    if target.numel() < 2 or float(target.std()) <= float(rounding(target.abs().max())):
        return 0.0
    return float(1 - error.var() / target.var())


def sample_tokens(logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one exact sample per row by inversion: the first token whose cumulative probability
    exceeds the uniform.

    One uniform per token makes the sample a function of (logits, uniform) alone, whatever else is
    in the batch. The vocabulary is read once for the normalizer and once for the probabilities.

    Args:
        logits: [n, V] float32.
        uniforms: [n] in [0, 1); None: the likeliest token.

    Returns:
        tokens [n] long, their log-probabilities [n], and whether a row's logits are finite [n]
        bool; the sample of a row where they are not means nothing.
    """
    total = logits.logsumexp(-1, keepdim=True)
    if uniforms is None:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        exact = finest(logits.device)
        cumulative = (logits - total).exp_().cumsum(-1, dtype=exact)
        target = uniforms.to(exact).unsqueeze(-1) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    logprobs = (logits.gather(1, tokens) - total).squeeze(1)
    return tokens.squeeze(1), logprobs, torch.isfinite(total).squeeze(1)
