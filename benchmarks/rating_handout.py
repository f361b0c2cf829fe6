"""How long it takes to hand out a task, to look whether there is one, and to show the lead's page,
by the number of items.

Every hundredth item has been answered by the rater who asks. CPU seconds, on SQLite. `python
benchmarks/rating_handout.py --items 1000 2000`
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import turnwise
from turnwise.engine.feedback.sources import Sources
from turnwise.plugins.human import lead, raters
from turnwise.plugins.human.agreement import agreed
from turnwise.plugins.human.desk import Desk

RUN = "run"


def timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(items: int) -> tuple[float, float, float, float]:
    """CPU seconds of handing out, of looking, of the progress line's counts, and of the lead's
    page."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = turnwise.Ledger(Path(folder) / "ledger.sqlite")
        said = [turnwise.Turn(turnwise.Message("user", "Hello?"), "Yes.", 0.0)]
        played = [
            turnwise.Episode(
                f"e{i}",
                turnwise.Start("test/Talk-v0", i),
                tuple(said),
                "terminated",
                run=RUN,
                stage="rl",
                update=1,
            )
            for i in range(items)
        ]
        ledger.add_episodes(played)
        sources = Sources.make(
            [[{"judge": "people", "name": "score", "task": "score", "undo": 0}]],
            turnwise.Plugins(),
            1.0,
        )
        sources.open(Path(folder), ledger, 0, run=RUN)
        sources.ask([{e.group: [e] for e in played}], ledger)
        desk = Desk(ledger, random.Random(0))
        ada = raters.session(
            ledger, RUN, raters.enter(ledger, RUN, raters.invite(ledger, RUN, "Ada"))
        ).person.id
        for _ in range(items // 100):
            if (task := desk.next(RUN, ada)) is not None:
                desk.answer(
                    task, ada, {f"aspect-{a}": "4" for a in ("helpful", "honest", "harmless")}
                )
        spent = (
            timed(lambda: desk.next(RUN, ada)), timed(lambda: desk.has_next(RUN, ada)),
            timed(lambda: (desk.slots(RUN), agreed(ledger, RUN))),
            timed(lambda: lead.overview(ledger, RUN)),
        )  # fmt: skip
        ledger.close()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[1000, 2000, 4000, 8000])
    print("items  next  has_next  progress  lead")
    for items in parser.parse_args().items:
        print(
            f"{items:5}  " + "  ".join(f"{seconds:.3f}" for seconds in measure(items)), flush=True
        )


if __name__ == "__main__":
    main()
