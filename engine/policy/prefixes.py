"""Shared beginnings: which conversations may take over what another one has in the cache.

Conversations of one start begin alike, and those of one environment have its instructions in
common. What is alike is computed once and copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

SHORTEST = 16  # tokens that are worth a copy


@dataclass(frozen=True, slots=True)
class Wave:
    """Conversations that are fed together, and what they take over before that.

    Attributes:
        members: places in the list of conversations.
        shared: for each, the row that it copies from and how many tokens; its own row where it
            holds them already. None: it begins from nothing.
    """

    members: list[int] = field(default_factory=list)
    shared: list[tuple[int, int] | None] = field(default_factory=list)

    def add(self, member: int, shared: tuple[int, int] | None) -> None:
        """Adds a conversation."""
        self.members.append(member)
        self.shared.append(shared)


def alike(a: np.ndarray, b: np.ndarray) -> int:
    """Returns how many tokens two conversations begin with in common; 0 where these are not worth
    a copy."""
    size = min(len(a), len(b))
    if size < SHORTEST or (a[:SHORTEST] != b[:SHORTEST]).any():
        return 0
    differ = a[:size] != b[:size]
    first = int(differ.argmax())
    return first if differ[first] else size


def waves(
    prompts: Sequence[Sequence[int]], rows: Sequence[int], held: Mapping[int, Sequence[int]]
) -> list[Wave]:
    """Divides conversations that begin into three waves, each of which may copy from those before
    it: those that share little, those that share a beginning with one of these or with a row of the
    cache, and those whose prompt another one has as a whole.

    At least one token of each is left to feed, since the logits after it are wanted.

    Args:
        prompts: the tokens that each conversation begins with, as lists.
        rows: of the cache, for each.
        held: the tokens that rows of the cache hold already.
    """
    first, then, last = Wave(), Wave(), Wave()
    there = {row: np.asarray(ids) for row, ids in held.items()}
    roots = {row: ids for row, ids in there.items() if row not in rows}
    whole: dict[tuple[int, ...], int] = {}
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        twin, most = whole.setdefault(tuple(prompt), i), len(prompt) - 1
        if twin != i and most >= SHORTEST:
            last.add(i, (rows[twin], most))
            continue
        ids = np.asarray(prompt)
        # Its own row comes first, which needs no copy.
        sources = ({row: there[row]} if row in there else {}) | roots
        common = {source: min(alike(ids, other), most) for source, other in sources.items()}
        best = max(common, key=common.__getitem__, default=row)
        if common.get(best, 0) >= max(SHORTEST, len(prompt) // 2):
            then.add(i, (best, common[best]))
        else:
            first.add(i, None)
            roots[row] = ids
    return [wave for wave in (first, then, last) if wave.members]
