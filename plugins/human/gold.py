"""Read items whose answer is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...engine.errors import PreferenceError
from ...engine.exchange.reading import import_data
from ...engine.records.episode import Episode
from ...engine.records.feedback import Answer, Comparison, Request
from . import tasks


def read_gold(
    path: Path, task: str, run: str, stage: str
) -> tuple[list[Episode], list[tuple[Request, dict[str, Any]]]]:
    """Items whose answer is known, from a file: comparisons for rank and compare, scores or labels
    for score, scores of turns for mark (the first negative one is where it went wrong; of labels,
    the first that is false).

    Raises:
        PreferenceError: the file holds something else, or an answer that any rater would get right.
    """
    found = import_data(path, run=run, stage=stage, update=0)
    by_id = {e.id: e for e in found.episodes}
    known: list[tuple[Request, dict[str, Any]]] = []
    answers: list[Answer] = [*found.comparisons, *found.scores]
    for said in answers:
        if isinstance(said, Comparison):
            shown = tuple(by_id[e] for tier in said.ranking for e in tier)
            fits = task == "rank" or (task == "compare" and len(shown) == 2)
        else:
            shown = (by_id[said.episode],)
            fits = task == ("mark" if said.turn_scores is not None else "score")
        if not fits:
            raise PreferenceError(f"{path} holds answers that cannot be gold for the task {task}")
        kind: Any = "group" if isinstance(said, Comparison) else "episode"
        request = Request(kind, said.target, stage, 0, None, False, {"gold": said.id}, shown)
        try:
            known.append((request, tasks.known(said, shown)))
        except ValueError as error:
            raise PreferenceError(f"{path}: {error}") from error
    return found.episodes, known


def gold_order(said: Mapping[str, Any], order: Sequence[str]) -> str:
    """What an answer looks like from outside: which place was best, which points were given."""
    if said["status"] != "scored":
        return str(said["status"])
    if "ranking" in said:
        place = {e: i for i, tier in enumerate(said["ranking"]) for e in tier}
        return "ranks " + " ".join(str(place[e] + 1) for e in order if e in place)
    if said.get("turn_scores"):
        return "all turns alike" if len(set(said["turn_scores"])) == 1 else str(said["turn_scores"])
    return "points " + " ".join(f"{v:g}" for _, v in sorted(said["aspects"].items()))
