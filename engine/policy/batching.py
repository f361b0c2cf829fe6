"""Makes batches of tensors of episodes and their rewards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch

from ..errors import UntrainableEpisode
from ..records.batch import Batch, Pairs, Row
from ..records.episode import Episode
from ..records.rewards import Rewards


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
        episodes: [E] conversations that may train.
        rewards: [E], one per episode.
        version: the policy's, to tell how stale an episode is.
        temperature, progress, seed: see `Batch`.

    Raises:
        UntrainableEpisode: a turn without sampled ids, or a failed episode.
    """
    counts = []
    for episode in episodes:
        if episode.ending == "failed":
            raise UntrainableEpisode(
                f"episode {episode.id} failed ({episode.reason}); failed episodes never train"
            )
        if not episode.turns or any(turn.action_ids is None for turn in episode.turns):
            raise UntrainableEpisode(
                f"episode {episode.id} has turns that no policy of ours sampled (a script, a"
                " person, an import): they have no log-probs. Use sft or a preference optimizer"
                " for such data."
            )
        counts.append([len(turn.action_ids or ()) for turn in episode.turns])
    layout = _layout(episodes, counts)
    mask, turn_mask = layout["mask"], layout["turn_mask"]
    behaviour = torch.zeros(mask.shape)
    turn_rewards = torch.zeros(turn_mask.shape)
    turn_scores = torch.full(turn_mask.shape, math.nan)
    rows: list[Row] = []
    for e, (episode, reward) in enumerate(zip(episodes, rewards, strict=True)):
        behaviour[e, mask[e]] = torch.tensor([p for t in episode.turns for p in t.logprobs or ()])
        turn_rewards[e, turn_mask[e]] = torch.tensor(reward.turns)
        for k, score in enumerate(reward.turn_scores or ()):
            turn_scores[e, k] = math.nan if score is None else score
        rows += episode_rows(episode, e)
    return Batch(
        **layout,
        rows=tuple(rows),
        behaviour_logprobs=behaviour,
        staleness=torch.tensor(
            [version - min(t.policy_version for t in episode.turns) for episode in episodes]
        ),
        outcome=torch.tensor([reward.outcome for reward in rewards], dtype=torch.float32),
        turn_rewards=turn_rewards,
        weight=torch.tensor([reward.weight for reward in rewards], dtype=torch.float32),
        token_rewards=torch.zeros(mask.shape),
        signal=torch.ones(len(episodes), dtype=torch.bool),
        turn_scores=None if bool(turn_scores.isnan().all()) else turn_scores,
        temperature=temperature,
        progress=progress,
        seed=seed,
    )


def written_batch(
    episodes: Sequence[Episode],
    turns: Sequence[Sequence[tuple[list[int], list[int]]]],
    pairs: Sequence[tuple[int, int, float, float, float]] = (),
    labels: Sequence[float] | None = None,
) -> Batch:
    """Returns conversations and opinions of them as a batch, sampled or not: without
    behaviour log-probs and without rewards.

    Args:
        episodes: [E].
        turns: per episode (ids read, ids of the reply) per turn.
        pairs: (better, worse, probability, margin, weight) each, the first two being places in
            `episodes`.
        labels: [E] 1 liked, 0 not.
    """
    layout = _layout(episodes, [[len(tokens) for _, tokens in each] for each in turns])
    better, worse, *numbers = zip(*pairs, strict=True) if pairs else ((), (), (), (), ())
    return Batch(
        **layout,
        rows=tuple(row_of(each, e) for e, each in enumerate(turns)),
        behaviour_logprobs=None,
        staleness=torch.zeros(len(episodes), dtype=torch.long),
        outcome=torch.zeros(len(episodes)),
        turn_rewards=torch.zeros(layout["turn_mask"].shape),
        weight=torch.ones(len(episodes)),
        token_rewards=torch.zeros(layout["mask"].shape),
        signal=torch.ones(len(episodes), dtype=torch.bool),
        pairs=Pairs(
            torch.tensor(better, dtype=torch.long),
            torch.tensor(worse, dtype=torch.long),
            *(torch.tensor(n, dtype=torch.float32) for n in numbers),
        ),
        labels=None if labels is None else torch.tensor(labels, dtype=torch.float32),
    )


def _layout(episodes: Sequence[Episode], counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Returns where tokens and turns stand in a batch, from the number of action tokens per turn of
    each episode."""
    size, actions, turns = len(episodes), max(map(sum, counts)), max(map(len, counts))
    turn = torch.full((size, actions), -1)
    turn_mask = torch.zeros(size, turns, dtype=torch.bool)
    for e, count in enumerate(counts):
        turn[e, : sum(count)] = torch.repeat_interleave(
            torch.arange(len(count)), torch.tensor(count)
        )
        turn_mask[e, : len(count)] = True
    place = {key: g for g, key in enumerate(dict.fromkeys(episode.group for episode in episodes))}
    return {
        "episodes": tuple(episodes),
        "mask": turn >= 0,
        "turn": turn,
        "turn_mask": turn_mask,
        "group": torch.tensor([place[episode.group] for episode in episodes]),
        "truncated": torch.tensor([episode.ending == "truncated" for episode in episodes]),
    }


def row_of(
    turns: Iterable[tuple[Sequence[int], Sequence[int]]],
    index: int,
    then: Sequence[int] = (),
    bootstrap: bool = False,
    begins: Sequence[int] | None = None,
) -> Row:
    """Returns one row of (ids read, ids of the reply) per turn, followed by the ids read after the
    last.

    Args:
        begins: where each turn's tokens begin on the batch's action axis; default: they are all.
    """
    ids: list[int] = []
    positions: list[int] = []
    actions: list[int] = []
    for turn, (read, action) in enumerate(turns):
        ids += read
        first = len(actions) if begins is None else begins[turn]
        positions += range(len(ids), len(ids) + len(action))
        actions += range(first, first + len(action))
        ids += action
    return Row((*ids, *then), index, tuple(positions), tuple(actions), bootstrap)


def episode_rows(episode: Episode, index: int) -> list[Row]:
    """Returns the rows of token ids that train an episode: one per context with `history: append`,
    one per turn with `rerender`."""
    truncated = episode.ending == "truncated"
    ends = accumulate(len(turn.action_ids or ()) for turn in episode.turns)
    placed = list(zip(episode.turns, (0, *ends), strict=False))
    last = episode.turns[-1].context
    rows = []
    if episode.history == "append":
        for context in dict.fromkeys(turn.context for turn in episode.turns):
            own = [(turn, begin) for turn, begin in placed if turn.context == context]
            pairs = [(turn.prompt_ids, turn.action_ids or ()) for turn, _ in own]
            final = truncated and context == last
            begins = [begin for _, begin in own]
            rows.append(row_of(pairs, index, episode.final_ids if final else (), final, begins))
        return rows
    for turn, begin in placed:
        pairs = [(turn.prompt_ids, turn.action_ids or ())]
        rows.append(row_of(pairs, index, begins=[begin]))
    if truncated:  # the state it was truncated in, rendered whole: a row without action tokens
        rows.append(Row(episode.final_ids or rows[-1].ids, index, (), (), True))
    return rows
