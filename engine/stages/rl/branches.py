"""Audit credit against continuations from every turn."""

from __future__ import annotations

from pydantic import Field

from ...pipeline.section import Section


class Audit(Section):
    """The truth about the credit: for some conversations every turn's start is valued by many conversations continued from there with the
    present policy. Their differences are the true advantages of the turns, up to sampling noise; nothing of it trains.

    Attributes:
        episodes: how many conversations of an update.
        rollouts: how many continuations of each turn's start.
        every: updates between audits; the first update is audited, and the last.
    """

    episodes: int = Field(default=8, ge=1)
    rollouts: int = Field(default=32, ge=2)
    every: int = Field(default=25, ge=1)
