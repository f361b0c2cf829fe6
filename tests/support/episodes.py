"""Builds episodes from words, and batches of some of the episodes of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import turnwise
from turnwise.engine.records.batch import Batch, Credit

NO_RUN = {"run": "", "stage": "", "update": 0}  # fields of an episode that no run has played


def conversation(
    *replies: str,
    heard: str | Sequence[str | turnwise.Message] | None = None,
    id: str = "e",
    env: str = "test/Talk-v0",
    seed: int = 1,
    options: Mapping[str, Any] | None = None,
    reward: float | list[float] = 0.0,
    prompt_ids: tuple[int, ...] | list[tuple[int, ...]] = (),
    action_ids: tuple[int, ...] | list[tuple[int, ...]] | None = None,
    logprobs: tuple[float, ...] | list[tuple[float, ...]] | None = None,
    turn_info: Mapping[str, Any] | list[Mapping[str, Any]] | None = None,
    ending: Any = "terminated",
    run: str = "run",
    stage: str = "rl",
    update: int = 1,
    **fields: Any,
) -> turnwise.Episode:
    """Builds the episode in which an agent gives these replies.

    Args:
        heard: what the agent hears before its replies: one text before each, or a sequence with one
            for each, of which one more is the final observation; None: "Well? 0", "Well? 1", ...
        env, seed, options: of the start.
        reward, prompt_ids, action_ids, logprobs, turn_info: of every turn, or a list with one for
            each; `turn_info` is the `info` of a turn.
        fields: other fields of `turnwise.Episode`; `start` goes before `env`, `seed` and `options`.
    """
    if heard is None:
        heard = [f"Well? {k}" for k in range(len(replies))]
    elif isinstance(heard, str):
        heard = [heard] * len(replies)
    observed = [
        h if isinstance(h, turnwise.Message) else turnwise.Message("user", h) for h in heard
    ]
    if len(observed) == len(replies) + 1:
        fields = {"final": observed.pop(), **fields}

    def each(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value] * len(replies)

    turns = tuple(
        turnwise.Turn(observation, reply, paid, prompt, sampled, scored, info=info)
        for observation, reply, paid, prompt, sampled, scored, info in zip(
            observed,
            replies,
            each(reward),
            each(prompt_ids),
            each(action_ids),
            each(logprobs),
            each(turn_info or {}),
            strict=True,
        )
    )
    start = fields.pop("start", None) or turnwise.Start(env, seed, options or {})
    return turnwise.Episode(id, start, turns, ending, run=run, stage=stage, update=update, **fields)


def select(batch: Batch, keep: Sequence[int]) -> Batch:
    """Returns the batch of some of its episodes only; groups keep their indices' order but are
    numbered anew."""
    place = {e: i for i, e in enumerate(keep)}
    index = torch.tensor(list(keep))
    size = len(batch.episodes)

    def part(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == size:
            return value[index]
        if isinstance(value, Credit):
            return Credit(
                part(value.advantages), part(value.value_targets), part(value.turn_credit)
            )
        return value

    fields = {f.name: part(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
    fields |= {
        "episodes": tuple(batch.episodes[e] for e in keep),
        "rows": tuple(
            dataclasses.replace(r, episode=place[r.episode])
            for r in batch.rows
            if r.episode in place
        ),
        "group": torch.unique(batch.group[index], return_inverse=True)[1],
        "extras": {k: part(v) for k, v in batch.extras.items()},
        "pairs": None,
    }
    return Batch(**fields)
