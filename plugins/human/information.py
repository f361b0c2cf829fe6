"""The value of an answer: the information it would give about which of several voices is right.

Members of a reward-model ensemble, and judges, each have scores for the conversations of an item.
Voice m prefers the first of a pair with probability p_m = sigma(s_m,i - s_m,j). An answer is worth
asking for where the voices are sure of different things (BALD, Houlsby et al. 2011,
arXiv:1112.5745, eq. 2):

    I = H(mean_m p_m) - mean_m H(p_m)            H(p) = -p log p - (1-p) log (1-p)

averaged over the item's pairs. Where all p_m are one half, an answer is noise, and I is 0; so it is
where all agree.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, expit


def information(voices: NDArray[np.float64]) -> float:
    """Returns the bits of information in a ranking of the items, per pair; for a single
    conversation, in whether it is above its voices' usual score.

    Args:
        voices: [V, n] scores, in log-odds; a single conversation counts against 0.

    Returns:
        0 with fewer than two voices; at most 1.
    """
    voices = np.asarray(voices, dtype=np.float64)
    if voices.shape[0] < 2:
        return 0.0
    if voices.shape[1] == 1:
        difference = voices
    else:
        first, second = np.triu_indices(voices.shape[1], 1)
        difference = voices[:, first] - voices[:, second]
    p = expit(difference)
    entropy = lambda q: (entr(q) + entr(1 - q)) / np.log(2)  # noqa: E731
    return float((entropy(p.mean(0)) - entropy(p).mean(0)).mean())
