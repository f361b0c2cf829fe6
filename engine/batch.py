"""Episodes and their rewards as one batch of tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from .episode import Episode
from .learning import Batch, Credit, Pairs, Row
from .reward import Rewards


class UntrainableEpisode(ValueError):
    """An episode that RL cannot train on: its replies were not sampled by a policy of ours, or its environment failed."""


def make_batch(
    episodes: Sequence[Episode],
    rewards: Sequence[Rewards],
    *,
    version: int = 0,
    temperature: float = 1.0,
    progress: float = 0.0,
    seed: int = 0,
) -> Batch:
    """Lays out episodes [E] and their rewards for credit and optimizer.

    Args:
        version: the policy's, to tell how stale an episode is.
        temperature, progress, seed: see `Batch`.

    Raises:
        UntrainableEpisode: a turn without sampled ids, or a failed episode.
    """
    counts = []
    for episode in episodes:
        if episode.ending == "failed":
            raise UntrainableEpisode(f"episode {episode.id} failed ({episode.reason}); failed episodes never train")
        if not episode.turns or any(turn.action_ids is None for turn in episode.turns):
            raise UntrainableEpisode(
                f"episode {episode.id} has turns that no policy of ours sampled (a script, a person, an import): they have no "
                "log-probs. Use sft or a preference optimizer for such data."
            )
        counts.append([len(turn.action_ids or ()) for turn in episode.turns])
    size, actions = len(episodes), max(map(sum, counts))
    turns = max(map(len, counts))
    mask = torch.zeros(size, actions, dtype=torch.bool)
    turn = torch.full((size, actions), -1)
    behaviour = torch.zeros(size, actions)
    turn_rewards = torch.zeros(size, turns)
    turn_mask = torch.zeros(size, turns, dtype=torch.bool)
    turn_scores = torch.full((size, turns), math.nan)
    rows: list[Row] = []
    for e, (episode, reward, count) in enumerate(zip(episodes, rewards, counts, strict=True)):
        total = sum(count)
        mask[e, :total] = True
        turn[e, :total] = torch.repeat_interleave(torch.arange(len(count)), torch.tensor(count))
        behaviour[e, :total] = torch.tensor([p for t in episode.turns for p in t.logprobs or ()])
        turn_mask[e, : len(count)] = True
        turn_rewards[e, : len(count)] = torch.tensor(reward.turns)
        for k, score in enumerate(reward.turn_scores or ()):
            turn_scores[e, k] = math.nan if score is None else score
        rows += episode_rows(episode, e)
    keys = list(dict.fromkeys(episode.group for episode in episodes))
    return Batch(
        episodes=tuple(episodes),
        rows=tuple(rows),
        mask=mask,
        turn=turn,
        group=torch.tensor([keys.index(episode.group) for episode in episodes]),
        behaviour_logprobs=behaviour,
        staleness=torch.tensor([version - min(t.policy_version for t in episode.turns) for episode in episodes]),
        outcome=torch.tensor([reward.outcome for reward in rewards], dtype=torch.float32),
        turn_rewards=turn_rewards,
        turn_mask=turn_mask,
        truncated=torch.tensor([episode.ending == "truncated" for episode in episodes]),
        weight=torch.tensor([reward.weight for reward in rewards], dtype=torch.float32),
        token_rewards=torch.zeros(size, actions),
        turn_scores=None if bool(turn_scores.isnan().all()) else turn_scores,
        temperature=temperature,
        progress=progress,
        seed=seed,
    )


def written_batch(
    episodes: Sequence[Episode],
    turns: Sequence[Sequence[tuple[list[int], list[int]]]],
    pairs: Sequence[tuple[int, int, float, float, float]],
) -> Batch:
    """Conversations and comparisons of them as a batch, whoever said them: without behaviour log-probs and without rewards.

    Args:
        episodes: [E].
        turns: per episode (ids read, ids said) per turn.
        pairs: (better, worse, probability, margin, weight) each, the first two being places in `episodes`.
    """
    counts = [[len(said) for _, said in each] for each in turns]
    size, actions, most = len(episodes), max(map(sum, counts)), max(map(len, counts))
    mask, turn = torch.zeros(size, actions, dtype=torch.bool), torch.full((size, actions), -1)
    turn_mask = torch.zeros(size, most, dtype=torch.bool)
    rows = []
    for e, (each, count) in enumerate(zip(turns, counts, strict=True)):
        mask[e, : sum(count)] = True
        turn[e, : sum(count)] = torch.repeat_interleave(torch.arange(len(count)), torch.tensor(count))
        turn_mask[e, : len(count)] = True
        ids: list[int] = []
        positions: list[int] = []
        for read, said in each:
            ids += read
            positions += range(len(ids), len(ids) + len(said))
            ids += said
        rows.append(Row(tuple(ids), e, tuple(positions), 0))
    keys = list(dict.fromkeys(episode.group for episode in episodes))
    better, worse, *numbers = zip(*pairs, strict=True)
    return Batch(
        episodes=tuple(episodes),
        rows=tuple(rows),
        mask=mask,
        turn=turn,
        group=torch.tensor([keys.index(episode.group) for episode in episodes]),
        behaviour_logprobs=None,
        staleness=torch.zeros(size, dtype=torch.long),
        outcome=torch.zeros(size),
        turn_rewards=torch.zeros(size, most),
        turn_mask=turn_mask,
        truncated=torch.tensor([episode.ending == "truncated" for episode in episodes]),
        weight=torch.ones(size),
        token_rewards=torch.zeros(size, actions),
        pairs=Pairs(torch.tensor(better), torch.tensor(worse), *(torch.tensor(n, dtype=torch.float32) for n in numbers)),
    )


def episode_rows(episode: Episode, index: int) -> list[Row]:
    """The rows of token ids that train an episode: one with `history: append`, one per turn with `rerender`."""
    truncated = episode.ending == "truncated"
    if episode.history == "append":
        ids: list[int] = []
        positions: list[int] = []
        for turn in episode.turns:
            ids += turn.prompt_ids
            positions += range(len(ids), len(ids) + len(turn.action_ids or ()))
            ids += turn.action_ids or ()
        if truncated:
            ids += episode.final_ids
        return [Row(tuple(ids), index, tuple(positions), 0, truncated)]
    rows, first = [], 0
    for turn in episode.turns:
        begin, count = len(turn.prompt_ids), len(turn.action_ids or ())
        rows.append(Row(turn.prompt_ids + (turn.action_ids or ()), index, tuple(range(begin, begin + count)), first))
        first += count
    if truncated:  # the state it was truncated in, rendered anew: a row without action tokens
        last = episode.final_ids or rows[-1].ids
        rows.append(Row(last, index, (), first, True))
    return rows


def select(batch: Batch, keep: Sequence[int]) -> Batch:
    """The batch of some of its episodes only; groups keep their indices' order but are numbered anew."""
    place = {e: i for i, e in enumerate(keep)}
    index = torch.tensor(list(keep))
    size = len(batch.episodes)

    def part(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == size:
            return value[index]
        if isinstance(value, Credit):
            return Credit(part(value.advantages), part(value.value_targets), part(value.turn_credit))
        return value

    fields = {f.name: part(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
    fields |= {
        "episodes": tuple(batch.episodes[e] for e in keep),
        "rows": tuple(dataclasses.replace(r, episode=place[r.episode]) for r in batch.rows if r.episode in place),
        "group": torch.unique(batch.group[index], return_inverse=True)[1],
        "extras": {k: part(v) for k, v in batch.extras.items()},
        "pairs": None,
    }
    return Batch(**fields)
