"""Detects that a judge's errors have changed: a cumulative alarm on labelled episodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import ndtri

from .prediction_powered import (
    check_level,
    finite_numbers,
)


class Drift:
    """A sequential test of whether people's scores less the judge's are still what they were, after
    every new one, for as long as a run lasts.

    What is tested: that the residuals r_1, r_2, ... are exchangeable. If they are, then

        p_t = (#{s < t: r_s < r_t} + u_t (1 + #{s < t: r_s = r_t})) / t,    z_t = Phi^-1(p_t)

    are independent and uniform, and independent and standard normal, whatever the scores'
    distribution (Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World, theorem
    8.2; u_t is drawn uniformly). For residuals that shift, z drifts. Against a drift that began at
    the k-th, of a size drawn from N(0, 1), stands the normal mixture (Robbins 1970; Howard et al.
    2021, arXiv:1810.08240, section 3.2), and over the beginnings a second mixture:

        E_t = sum_{k <= t} w_k (1 + m)^(-1/2) exp(S^2 / (2 (1 + m))) + sum_{k > t} w_k   m = t - k +
            1,  S = z_k + ... + z_t,  w_k = 1 / (k (k + 1))

    E is a martingale with mean 1 while nothing changes, so that the chance that it ever reaches 1 /
    level is at most `level` (Ville 1939), over a run of any length. The alarm is raised there, and
    stays.

    Args:
        level: chance of a false alarm over the whole run.

    Attributes:
        evidence: E.
        alarm: how many residuals there were when it was raised; None: it was not.
        began, shift: the beginning that has most of the evidence then, counted from 0, and the mean
            residual from there on less that before.
    """

    def __init__(self, level: float = 0.01) -> None:
        self.level = check_level(level)
        self.evidence = 1.0
        self.alarm: int | None = None
        self.began: int | None = None
        self.shift = 0.0
        self._residuals: list[float] = []
        self._normal: list[float] = []

    def __len__(self) -> int:
        return len(self._residuals)

    def add(self, residual: float, luck: float) -> bool:
        """Adds the next residual; returns whether it raises the alarm.

        Args:
            residual: people's score less the judge's; the mean over a cluster, where episodes hang
                together.
            luck: u in [0, 1), drawn independently of all scores; the same for the same episode, so
                that a resumed run finds the same.

        Raises:
            ValueError: a residual that is not finite.
        """
        value = float(finite_numbers([residual])[0])
        earlier, size = np.asarray(self._residuals), len(self._residuals) + 1
        p = (int((earlier < value).sum()) + luck * (1 + int((earlier == value).sum()))) / size
        self._residuals.append(value)
        self._normal.append(float(ndtri(min(max(p, 1e-12), 1 - 1e-12))))
        sums = np.cumsum(self._normal[::-1])[::-1]
        first = np.arange(1, size + 1)
        length = size - first + 1
        logs = sums**2 / (2 * (1 + length)) - 0.5 * np.log1p(length) - np.log(first * (first + 1.0))
        self.evidence = float(np.exp(np.minimum(logs, 700)).sum()) + 1 / (size + 1)
        if self.alarm is not None or self.evidence * self.level < 1:
            return False
        self.alarm, self.began = size, int(np.argmax(logs))
        self.shift = float(np.mean(self._residuals[self.began :]))
        self.shift -= float(np.mean(self._residuals[: self.began])) if self.began else 0.0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the test as plain JSON data."""
        return {
            "residuals": list(self._residuals), "normal": list(self._normal),
            "evidence": self.evidence, "alarm": self.alarm, "began": self.began,
            "shift": self.shift,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._residuals, self._normal = list(state["residuals"]), list(state["normal"])
        self.evidence, self.alarm = state["evidence"], state["alarm"]
        self.began, self.shift = state["began"], state["shift"]
