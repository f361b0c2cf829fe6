"""Questions in batches: half the price, an answer within a day, and nothing paid for twice whenever the process is killed.

    written down under an id of ours ──submit──▶ the provider's id written down ──results──▶ booked, read

A question that is asked again after a kill is looked up first. Its batch is known: its results are waited for. It was being sent: the provider is asked for
the batch with our ids before anything is sent again. What a batch leaves over (an answer that cannot be used, an item that failed or expired) is asked
by itself, at the full price.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import sqlalchemy as sa

from ..engine.secrets import redact
from . import calls
from .calls import Call, Caller, judged
from .models import ModelError, Prompt, Reply, Usage
from .prices import cost
from .store import BATCHES, Entry, Verdict
from .transcript import new_nonce

GATHER = 0.5  # seconds of silence after which what was asked is sent
LARGEST = 10_000  # questions in one batch
POLL = 30.0  # seconds between looks


class BatchModel(Protocol):
    """A model with batches. All three raise ModelError."""

    name: str
    settings: Mapping[str, Any]

    async def ask(self, prompt: Prompt) -> Reply: ...

    async def submit(self, prompts: Mapping[str, Prompt]) -> str:
        """Sends prompts by id as one batch; returns its id."""
        ...

    async def results(self, batch: str) -> Mapping[str, Reply | ModelError] | None:
        """Answers by id; None while it is at work."""
        ...

    async def mine(self, since: float, ids: Sequence[str]) -> str | None:
        """The batch with these ids, sent at or after a time; None where there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Item:
    """A question in a batch.

    Attributes:
        id: ours, within the batch.
        done: gets the item's answer.
    """

    key: str
    call: Call
    id: str
    nonce: str
    most: float
    done: asyncio.Future[Reply | ModelError]

    @property
    def prompt(self) -> Prompt:
        return self.call.write(self.nonce)


class BatchCaller(Caller):
    """Asks one model in batches on behalf of one judge.

    Args:
        ledger, run, source: where batches are written down.
        others: of `Caller`; its model must have batches, and nothing is sent faster by `concurrency`.
    """

    def __init__(self, *args: Any, ledger: Any, run: str, source: str, **options: Any) -> None:
        super().__init__(*args, **options)
        if ledger is None:
            raise ValueError("batches need a run, whose ledger remembers them")
        self._ledger, self._mine = ledger, (BATCHES.c.run == run, BATCHES.c.source == source)
        self._names = {"run": run, "source": source}
        self._gathered: list[Item] = []
        self._sender: asyncio.Task[None] | None = None
        self._waiting: dict[str, asyncio.Task[Mapping[str, Reply | ModelError]]] = {}  # by batch
        self._found: dict[str, asyncio.Task[str | None]] = {}  # by job: searches for batches that were being sent

    async def _asked(self, call: Call, key: str) -> Verdict:
        """As one item of a batch; what comes back unusable is asked singly."""
        known = self._row(key)
        if known is not None and known.batch is None:
            batch = await self._search(known.job)
            known = self._row(key) if batch else None
        if known is not None:
            self.account.reserve(self._most(call, known.nonce), already_sent=True)
            item = Item(key, call, known.custom_id, known.nonce, self._most(call, known.nonce), asyncio.Future())
            answer = await self._result(known.batch, item)
        else:
            nonce = new_nonce()
            most = self._most(call, nonce)
            while not self.account.reserve(most):
                self._settled.clear()
                await self._settled.wait()
            item = Item(key, call, "", nonce, most, asyncio.get_running_loop().create_future())
            self._gathered.append(item)
            if self._sender is None or self._sender.done():
                self._sender = asyncio.ensure_future(self._send_soon())
            answer = await item.done
        return await self._judged(item, answer)

    def _most(self, call: Call, nonce: str) -> float:
        return self.most(call.write(nonce)) * 0.5

    async def _judged(self, item: Item, answer: Reply | ModelError) -> Verdict:
        paid, usage = 0.0, Usage()
        if isinstance(answer, Reply):
            paid, usage = cost(answer.usage, self.price, batch=True) if self.price else 0.0, answer.usage
            outcome = judged(item.call, answer, item.nonce)
            if isinstance(outcome, Verdict):
                return replace(outcome, cost=paid, usage=usage, requests=1, model=answer.model or self.model.name)
        elif not answer.passes:
            return Verdict("failed", {}, redact(f"{answer.kind}: {answer}"), requests=1)
        alone = await super()._asked(item.call, item.key)
        return replace(alone, cost=alone.cost + paid, usage=alone.usage + usage, requests=alone.requests + 1)

    # Sending.

    async def _send_soon(self) -> None:
        """Sends what was asked once nobody has asked for a moment."""
        count = -1
        while count != len(self._gathered):
            count = len(self._gathered)
            await calls.TIME.sleep(GATHER)
        while self._gathered:
            items, self._gathered = self._gathered[:LARGEST], self._gathered[LARGEST:]
            job = secrets.token_hex(8)
            items = [replace(item, id=f"tw-{job}-{i:05d}") for i, item in enumerate(items)]
            try:
                batch = await self._submit(job, items)
                await asyncio.gather(*(self._pass_on(batch, item) for item in items))
            except Exception as error:
                failed = error if isinstance(error, ModelError) else ModelError("request", f"{type(error).__name__}: {error}")
                for item in items:
                    if not item.done.done():
                        self._settle(item)
                        item.done.set_result(failed)

    async def _submit(self, job: str, items: Sequence[Item]) -> str:
        with self._ledger.writing() as db:
            rows = [
                {**self._names, "key": i.key, "custom_id": i.id, "nonce": i.nonce, "job": job, "batch": None, "booked": False, "time": self._clock()}
                for i in items
            ]  # fmt: skip
            for row in rows:  # a question that was asked before under another job is this job's now
                db.execute(BATCHES.delete().where(BATCHES.c.key == row["key"], *self._mine))
            db.execute(BATCHES.insert(), rows)
        prompts, began, tries = {item.id: item.prompt for item in items}, self._clock(), 0
        while True:
            try:
                batch = await self.model.submit(prompts)  # type: ignore[attr-defined]
                break
            except ModelError as error:
                tries += 1
                if not error.passes or tries >= calls.REQUESTS:
                    raise
                await calls.TIME.sleep(error.after or calls.BACKOFF * 2**tries)
                if error.lost and (found := await self.model.mine(began, list(prompts))):  # type: ignore[attr-defined]
                    batch = found
                    break
        self._name(job, batch)
        return str(batch)

    def _name(self, job: str, batch: str) -> None:
        with self._ledger.writing() as db:
            db.execute(BATCHES.update().where(BATCHES.c.job == job, *self._mine).values(batch=batch))

    async def _search(self, job: str) -> str | None:
        """The batch of a job that was being sent when the process was killed, if it arrived."""
        if job not in self._found:
            self._found[job] = asyncio.ensure_future(self._searched(job))
        return await self._found[job]

    async def _searched(self, job: str) -> str | None:
        with self._ledger.reading() as db:
            rows = list(db.execute(sa.select(BATCHES.c.custom_id, BATCHES.c.time).where(BATCHES.c.job == job, *self._mine)))
        batch = await self.model.mine(min(row.time for row in rows), [row.custom_id for row in rows])  # type: ignore[attr-defined]
        if batch is not None:
            self._name(job, batch)
        return batch

    # Hearing.

    async def _pass_on(self, batch: str, item: Item) -> None:
        answer = await self._result(batch, item)
        if not item.done.done():  # whoever asked may have gone
            item.done.set_result(answer)

    async def _result(self, batch: str, item: Item) -> Reply | ModelError:
        """An item's answer, booked once."""
        if batch not in self._waiting:
            self._waiting[batch] = asyncio.ensure_future(self._results(batch))
        try:
            answer = (await asyncio.shield(self._waiting[batch])).get(item.id) or ModelError(
                "server", "the batch lacks this answer"
            )
        except ModelError as error:
            answer = error
        if isinstance(answer, Reply) and self._book_once(item.key):
            paid = cost(answer.usage, self.price, batch=True) if self.price else 0.0
            self._settle(item, Entry(item.key, self.model.name, answer.stop, answer.usage, paid))
        else:
            self._settle(item)
        return answer

    def _settle(self, item: Item, entry: Entry | None = None) -> None:
        self.account.settle(item.most, entry)
        self._settled.set()

    def _book_once(self, key: str) -> bool:
        with self._ledger.writing() as db:
            changed = db.execute(
                BATCHES.update().where(BATCHES.c.key == key, BATCHES.c.booked.is_(False), *self._mine).values(booked=True)
            )
            return bool(changed.rowcount)

    async def _results(self, batch: str) -> Mapping[str, Reply | ModelError]:
        failures = 0
        while True:
            try:
                if (found := await self.model.results(batch)) is not None:  # type: ignore[attr-defined]
                    return dict(found)
                failures = 0
            except ModelError as error:
                failures += 1
                if not error.passes or failures >= calls.REQUESTS:
                    raise
            await calls.TIME.sleep(POLL)

    def _row(self, key: str) -> Any:
        with self._ledger.reading() as db:
            return db.execute(sa.select(BATCHES).where(BATCHES.c.key == key, *self._mine)).first()
