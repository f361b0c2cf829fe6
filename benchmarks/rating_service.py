"""Fifty raters at once: what they wait for, and whether every slot is filled exactly once.

    python benchmarks/rating_service.py [--database sqlite|postgresql|URL] [--clients 50] [--items
    200] [--raters 3] [--think 10]

Starts the service as a process of its own on loopback, lays out groups of four SupportDesk
conversations to rank, and lets simulated raters work until nothing is left. Between tasks a client
thinks (exponential, `--think` seconds in the mean; people take three to six times as long over four
conversations). One request in twenty is cut off before the answer arrives and sent again, one
answer in ten is sent twice, and one client in ten closes its laptop in the middle: its lease runs
out. Half-way the service is killed with SIGKILL and started again.

A run collects meanwhile, once a second. Prints percentiles of what clients waited for, by page, and
counts: slots, answers, doubles, losses, as the ledger has them in the end. The exit status says
whether every slot was filled once, and everything that was acknowledged is there.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import httpx2
import sqlalchemy as sa
import turnwise
from turnwise.engine.feedback.sources import Sources
from turnwise.engine.ledger.tables import FEEDBACK, REQUESTS
from turnwise.engine.rollout.conversation import Where
from turnwise.engine.rollout.players import ScriptPlayer
from turnwise.engine.rollout.rollout import rollout
from turnwise.engine.util.ids import derive_id
from turnwise.plugins.human import raters
from turnwise.plugins.human.tables import LEASES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.databases import cluster, new_database

SERVE = """
import sys, uvicorn, turnwise
from turnwise.plugins.human.web.app import make_app
uvicorn.run(make_app(turnwise.Ledger(sys.argv[1]), "run"), port=int(sys.argv[2]), \
log_level="error", access_log=False)
"""


def lay_out(url: str, items: int, overlap: int) -> tuple[turnwise.Ledger, Sources]:
    """Groups of four conversations, and a request for each of the raters who should rank them; and
    the run's end of it, which collects."""
    turnwise.Plugins()
    ledger = turnwise.Ledger(url)
    starts = turnwise.starts("turnwise/SupportDesk-v0", 1, items)
    players = ("expert", "demonstrator", "random", "demonstrator")
    played = [
        e
        for slot, name in enumerate(players)
        for e in rollout(
            ScriptPlayer(name), [(s, slot) for s in starts], Where("run", "rank", 1, 0)
        )
    ]
    ledger.add_episodes(played)
    groups: dict[str, list[turnwise.Episode]] = {}
    for e in played:
        groups.setdefault(e.group, []).append(e)
    sources = Sources.make(
        [[{"judge": "people", "raters": overlap, "lease": 15.0, "undo": 0.0}]],
        turnwise.Plugins(),
        1.0,
    )
    sources.open(Path("."), ledger, 0, run="run")
    sources.ask([groups], ledger)
    return ledger, sources


class Service:
    """The service in a process of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", SERVE, self.url, str(self.port)])
        for _ in range(600):
            try:
                httpx2.get(f"{self.base}/healthz", timeout=1)
                return
            except httpx2.TransportError:
                time.sleep(0.05)
        raise TimeoutError("the service did not start")

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Rater:
    """One client; `acknowledged` holds the tasks whose answer it was told is saved."""

    def __init__(
        self, name: str, link: str, base: str, think: float, waits: dict[str, list[float]]
    ) -> None:
        self.rng = random.Random(name)
        self.link, self.think, self.waits = link, think, waits
        self.http = httpx2.AsyncClient(base_url=base, follow_redirects=True, timeout=60)
        self.acknowledged: set[str] = set()
        self.sleeper = self.rng.random() < 0.1

    async def ask(self, what: str, method: str, path: str, **options: object) -> httpx2.Response:
        """A request that is sent again until it is answered; one in twenty is cut off on
        purpose."""
        while True:
            try:
                if self.rng.random() < 0.05:
                    async with asyncio.timeout(0.005):
                        await self.http.request(method, path, **options)  # type: ignore[arg-type]
                answer = await self.http.request(method, path, **options)  # type: ignore[arg-type]
                # An answer is one response, the next task another.
                for response in (*answer.history, answer):
                    kind = (
                        what
                        if response.request.method == "POST"
                        else "page"
                        if what == "answer"
                        else what
                    )
                    self.waits[kind].append(response.elapsed.total_seconds())
                return answer
            except (httpx2.TransportError, TimeoutError):
                await asyncio.sleep(0.2)

    async def work(self) -> None:
        # People do not come in the same moment.
        await asyncio.sleep(self.rng.uniform(0, 2 * self.think))
        await self.http.post("/enter", data={"link": self.link})
        idle = 0
        while idle < 3:
            page = (await self.ask("task", "GET", "/")).text
            task = re.search(r'action="/task/([\w-]+)" id="answer"', page)
            if task is None:
                idle += 1
                await asyncio.sleep(6)
                continue
            idle = 0
            await self.ask("progress", "GET", "/progress")
            csrf = re.search(r'name="csrf" value="([^"]+)"', page)
            assert csrf is not None
            if self.sleeper and self.rng.random() < 0.1:
                await asyncio.sleep(20)  # the laptop is closed; the lease runs out
            await asyncio.sleep(self.rng.expovariate(1 / self.think) if self.think else 0)
            form = {f"rank-{i}": str(self.rng.randint(1, 4)) for i in range(4)} | {"csrf": csrf[1]}
            path = f"/task/{task[1]}"
            await self.ask("draft", "POST", f"{path}/draft", data=form)
            for _ in range(2 if self.rng.random() < 0.1 else 1):
                said = await self.ask("answer", "POST", path, data=form)
                assert said.status_code == 200, said.text[-500:]
                self.acknowledged.add(task[1])
        await self.http.aclose()


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--database", default="sqlite")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--raters", type=int, default=3)
    parser.add_argument("--think", type=float, default=10.0)
    given = parser.parse_args()
    if given.database == "postgresql":
        with cluster() as server:
            return await measure(given, new_database(server, "rating"))
    if given.database != "sqlite":
        return await measure(given, given.database)
    with tempfile.TemporaryDirectory() as folder:
        return await measure(given, f"sqlite:///{folder}/ledger.sqlite")


async def listen(sources: Sources, ledger: turnwise.Ledger) -> None:
    """A run that looks for answers every second."""
    while True:
        await asyncio.to_thread(sources.receive, ledger)
        await asyncio.sleep(1)


async def measure(given: argparse.Namespace, url: str) -> int:
    ledger, sources = lay_out(url, given.items, given.raters)
    service = Service(url)
    waits: dict[str, list[float]] = defaultdict(list)
    links = [raters.invite(ledger, "run", f"rater {i}") for i in range(given.clients)]
    people = [
        Rater(f"rater {i}", link, service.base, given.think, waits) for i, link in enumerate(links)
    ]
    began = time.perf_counter()
    work = [asyncio.create_task(p.work()) for p in people]
    trainer = asyncio.create_task(listen(sources, ledger))
    while sum(len(p.acknowledged) for p in people) < given.items * given.raters / 2:
        await asyncio.sleep(0.1)
    service.kill()
    outage = time.perf_counter()
    service.start()
    outage = time.perf_counter() - outage
    await asyncio.gather(*work)
    seconds = time.perf_counter() - began
    service.kill()
    trainer.cancel()
    sources.close()
    with ledger.reading() as db:
        query = sa.select(
            LEASES.c.id,
            LEASES.c.attempt,
            FEEDBACK.c.id.label("kept"),
            FEEDBACK.c.request,
            FEEDBACK.c.rater,
        )
        kept = list(
            db.execute(
                query.outerjoin(FEEDBACK, FEEDBACK.c.rater == LEASES.c.rater).where(
                    LEASES.c.status == "answered"
                )
            )
        )
        asked = {row.id: row.item for row in db.execute(sa.select(REQUESTS.c.id, REQUESTS.c.item))}
    # The answer of that lease, in the ledger.
    mine = [row for row in kept if row.kept == derive_id(row.id, row.attempt)]
    slots = Counter(row.request for row in mine if row.request is not None)
    acknowledged = set().union(*(p.acknowledged for p in people))
    lost = acknowledged - {row.id for row in mine}
    twice = [
        pair
        for pair, n in Counter(
            (asked[row.request], row.rater) for row in mine if row.request
        ).items()
        if n > 1
    ]
    rows = [(what, found) for what, found in sorted(waits.items())] + [
        ("all", [w for found in waits.values() for w in found])
    ]
    print(
        f"{url.split(':')[0]}: {given.clients} clients, think {given.think:g} s, {len(mine)}"
        f" answers in {seconds:.0f} s, {outage:.1f} s of outage"
    )
    print(
        "\n| request | count | median ms | p95 ms | p99 ms | longest ms |\n| --- | --- | --- | ---"
        " | --- | --- |"
    )
    for what, found in rows:
        cut = statistics.quantiles([1000 * w for w in found], n=100)
        print(
            f"| {what} | {len(found)} | {cut[49]:.0f} | {cut[94]:.0f} | {cut[98]:.0f} |"
            f" {1000 * max(found):.0f} |"
        )
    wanted = given.items * given.raters
    print(
        f"\nslots {wanted}, filled {len(slots)}, filled twice {sum(n > 1 for n in slots.values())},"
        f" extra opinions {len(mine) - len(slots)}, "
    )
    print(
        f"acknowledged {len(acknowledged)}, of them lost {len(lost)}, one rater twice on an item"
        f" {len(twice)}"
    )
    return 0 if len(slots) == wanted and not lost and not twice and max(slots.values()) == 1 else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
