"""What the tests of the rating service share: a study in a ledger, the service on a real socket, and clients that rate."""

from __future__ import annotations

import random
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import httpx2
import turnwise
import uvicorn
from turnwise.engine.sources import Sources
from turnwise.plugins.human import raters
from turnwise.plugins.human.service import make_app

RUN = "run"


def talk(name: str, said: Sequence[str], seed: int = 1, slot: int = 0, **more: Any) -> turnwise.Episode:
    """A conversation whose person and assistant speak in turn."""
    turns = tuple(turnwise.Turn(turnwise.Message("user", said[i]), said[i + 1], 0.0) for i in range(0, len(said) - 1, 2))
    start = turnwise.Start("test/Talk-v0", seed)
    return turnwise.Episode(name, start, turns, "terminated", run=RUN, stage="rl", update=1, slot=slot, **more)


def groups(count: int = 3, size: int = 4, turns: int = 2) -> dict[str, list[turnwise.Episode]]:
    """Conversations that start alike; of a group, the one in slot 0 is the best."""
    found: dict[str, list[turnwise.Episode]] = {}
    for g in range(count):
        for slot in range(size):
            said = [f"Question {g}?"] + [w for k in range(turns) for w in (f"Answer {g}-{slot}-{k}.", f"And then {k}?")]
            episode = talk(f"e{g}-{slot}", said[: 2 * turns], seed=g, slot=slot)
            found.setdefault(episode.group, []).append(episode)
    return found


def study(
    ledger: turnwise.Ledger, *specs: Mapping[str, Any], played: Mapping[str, Sequence[turnwise.Episode]] | None = None
) -> Sources:
    """Asks people about some conversations, as a run would."""
    played = groups() if played is None else played
    ledger.add_episodes([e for members in played.values() for e in members])
    sources = Sources.make([{"source": "people", "name": s.get("task", "rank"), **s} for s in specs], turnwise.Plugins(), 1.0)
    sources.open(Path("."), ledger, 0)
    sources.ask(played, ledger)
    return sources


def person(ledger: turnwise.Ledger, name: str, role: str = "rater") -> str:
    """The id of a new rater who has entered."""
    return raters.session(ledger, raters.enter(ledger, raters.invite(ledger, name, role))).person.id


def next_task(desk: Any, rater: str) -> Any:
    """The task that a rater is handed; None: there is none."""
    id_ = desk.next(RUN, rater)
    return None if id_ is None else desk.task(id_, rater)


def fill(task: Any, rng: random.Random) -> dict[str, str]:
    """A form that is an answer to a task."""
    kind = task.study["task"]
    if kind == "rank":
        return {f"rank-{i}": str(rng.randint(1, len(task.shown))) for i in range(len(task.shown))}
    if kind == "compare":
        return {"preference": str(rng.randint(-3, 3))}
    if kind == "score":
        return {f"aspect-{a}": str(rng.randint(1, task.study["scale"])) for a in task.study["aspects"]}
    return {"first_wrong": rng.choice(["none", "0"])}


@contextmanager
def serving(ledger: turnwise.Ledger) -> Iterator[str]:
    """The service on loopback, in a thread; its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(ledger, RUN), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


class Client:
    """A browser without a screen: keeps cookies, follows redirects, reads the form on the page."""

    def __init__(self, base: str, ledger: turnwise.Ledger | None = None, name: str = "", role: str = "rater") -> None:
        self.http = httpx2.Client(base_url=base, follow_redirects=True, timeout=30)
        if ledger is not None:
            self.post("/enter", link=raters.invite(ledger, name, role))

    def get(self, path: str, **query: str) -> httpx2.Response:
        self.page = self.http.get(path, params=query)
        return self.page

    def post(self, path: str, **form: str) -> httpx2.Response:
        return self.send(path, form)

    def send(self, path: str, form: Mapping[str, str], headers: Mapping[str, str] | None = None) -> httpx2.Response:
        self.page = self.http.post(path, data=dict(form), headers=dict(headers or {}))
        return self.page

    @property
    def csrf(self) -> str:
        found = re.search(r'name="csrf" value="([^"]+)"', self.page.text)
        return unescape(found[1]) if found else ""

    @property
    def task(self) -> str | None:
        """The id of the task on the page."""
        found = re.search(r'action="/task/([\w-]+)" id="answer"', self.page.text)
        return found[1] if found else None

    def fill(self, rng: random.Random) -> dict[str, str]:
        """An answer to the task on the page: one of the choices of every group of buttons."""
        choices: dict[str, list[str]] = {}
        form = self.page.text.split('id="answer"')[1].split("</form>")[0]
        for name, value in re.findall(r'type="radio" name="([^"]+)" value="([^"]*)"', form):
            choices.setdefault(unescape(name), []).append(value)
        said = {name: rng.choice(values) for name, values in choices.items()}
        if "first_wrong" in said:
            said = {"first_wrong": "none"}
        return said | {"csrf": self.csrf}
