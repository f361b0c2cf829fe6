"""How many threads torch should use on a CPU: as many as it finds, unless one is clearly faster.

Threads wait for each other at every operation. Where another process keeps a core busy, all of them
wait for the one that shares it, and a single thread can be several times faster.
"""

from __future__ import annotations

import statistics
import time

import torch

ROUNDS, PRODUCTS = 7, 40  # measurements of each, and the products of a measurement
MARGIN = 1.25  # a single thread must be so much faster: noise decides nothing
SHAPE = (32, 512, 512)  # a layer of a small model that replies to 32 conversations


def faster_threads() -> tuple[int, float]:
    """Measures torch's present number of threads against a single one, in turns, in less than half
    a second.

    Returns:
        1 where that is clearly faster, else torch's number; and how many times as fast a single
        thread is. Leaves torch with the number it had.
    """
    many = torch.get_num_threads()
    if many == 1:
        return 1, 1.0
    rows, inner, outer = SHAPE
    states, weights = torch.ones(rows, inner), torch.ones(inner, outer)
    took: dict[int, list[float]] = {many: [], 1: []}
    try:
        for _ in range(ROUNDS):
            for threads, seconds in took.items():
                torch.set_num_threads(threads)
                since = time.perf_counter()
                for _ in range(PRODUCTS):
                    states @ weights
                seconds.append(time.perf_counter() - since)
    finally:
        torch.set_num_threads(many)
    ratio = statistics.median(took[many]) / statistics.median(took[1])
    return (1 if ratio > MARGIN else many), ratio
