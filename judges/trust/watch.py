"""The record by which a judge is watched with canaries and quarantined."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ...protocols import Paused
from .canaries import Quarantine, Schedule


@dataclass(slots=True)
class Watch:
    """A judge's record of soundness, shared by all that ask it in a run, and the limit of requests
    at once."""

    quarantine: Quarantine
    schedule: Schedule
    serving: asyncio.Semaphore
    alone: asyncio.Lock


class Quarantined(Paused):
    """A judge fell for conversations that are known to be bad: it is asked no more."""
