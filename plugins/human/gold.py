"""Reads items whose answer is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...judging import import_data
from ...protocols import Answer, Comparison, Episode, PreferenceError, Request
from . import tasks


def read_gold(
    path: Path, task: str, run: str, stage: str
) -> tuple[list[Episode], list[tuple[Request, dict[str, Any]]]]:
    """Reads items whose answer is known from a file: comparisons for rank and compare, scores or
    labels for score, scores of turns for mark (the first negative one is where it went wrong; of
    labels, the first that is false).

    Raises:
        PreferenceError: the file holds something else, or an answer that any rater would get right.
    """
    found = import_data(path, run=run, stage=stage, update=0)
    by_id = {e.id: e for e in found.episodes}
    known: list[tuple[Request, dict[str, Any]]] = []
    answers: list[Answer] = [*found.comparisons, *found.scores]
    for answer in answers:
        if isinstance(answer, Comparison):
            shown = tuple(by_id[e] for tier in answer.ranking for e in tier)
            fits = task == "rank" or (task == "compare" and len(shown) == 2)
        else:
            shown = (by_id[answer.episode],)
            fits = task == ("mark" if answer.turn_scores is not None else "score")
        if not fits:
            raise PreferenceError(f"{path} holds answers that cannot be gold for the task {task}")
        kind: Any = "group" if isinstance(answer, Comparison) else "episode"
        request = Request(kind, answer.target, stage, 0, None, False, {"gold": answer.id}, shown)
        try:
            known.append((request, tasks.known(answer, shown)))
        except ValueError as error:
            raise PreferenceError(f"{path}: {error}") from error
    return found.episodes, known


def gold_order(answer: Mapping[str, Any], order: Sequence[str]) -> str:
    """Returns what an answer looks like from outside: the best place, or the points given."""
    if answer["status"] != "scored":
        return str(answer["status"])
    if "ranking" in answer:
        place = {e: i for i, tier in enumerate(answer["ranking"]) for e in tier}
        return "ranks " + " ".join(str(place[e] + 1) for e in order if e in place)
    if answer.get("turn_scores"):
        return (
            "all turns alike"
            if len(set(answer["turn_scores"])) == 1
            else str(answer["turn_scores"])
        )
    return "points " + " ".join(f"{v:g}" for _, v in sorted(answer["aspects"].items()))
