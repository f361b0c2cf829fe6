"""Sends questions in batches: half the price, an answer within a day, and nothing paid for twice
whenever the process is killed.

    written down under an id of ours ──submit──▶ the provider's id written down ──results──▶ booked,
    read

A question that is asked again after a kill is looked up first. Its batch is known: its results are
waited for. It was being sent: the provider is asked for the batch with our ids before anything is
sent again. What a batch leaves over (an answer that cannot be used, an item that failed or expired)
is asked by itself, at the full price. A batch that brings nothing at all is a failure, in the
provider's own words: half the price was what was agreed. What was in it is sent in a new batch when
it is asked again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from ..llm.transcript import new_nonce
from ..models.model import Answers, BatchFailed, BatchModel, ModelError, Prompt, Reply, Usage
from . import calls
from .calls import Call, Caller, judged, unanswered
from .prices import BATCH
from .store import BATCHES, Entry, Verdict

GATHER = 0.5  # seconds of silence after which what was asked is sent
LARGEST, HEAVIEST = 10_000, 100e6  # questions in one batch, and bytes of them
POLL = 30.0  # seconds between looks


@dataclass(frozen=True, slots=True)
class Item:
    """A question in a batch.

    Attributes:
        id: our own id of it within the batch.
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
        """The prompt under this item's nonce."""
        return self.call.write(self.nonce)


class BatchCaller(Caller):
    """Asks one model in batches on behalf of one judge.

    Args:
        ledger, run, source: where batches are written down.
        others: those of `Caller`; its model must have batches, and `concurrency` makes nothing
            faster.
    """

    model: BatchModel

    def __init__(self, *args: Any, ledger: Any, run: str, source: str, **options: Any) -> None:
        super().__init__(*args, **options)
        if ledger is None:
            raise ValueError("batches need a run, whose ledger remembers them")
        self._ledger, self._mine = ledger, (BATCHES.c.run == run, BATCHES.c.source == source)
        self._names = {"run": run, "source": source}
        self._gathered: list[Item] = []
        self._sender: asyncio.Task[None] | None = None
        self._sent_off: set[asyncio.Task[None]] = set()
        self._waiting: dict[str, asyncio.Task[Answers]] = {}  # by batch
        # By job: searches for batches that were being sent.
        self._found: dict[str, asyncio.Task[str | None]] = {}

    async def _asked(self, call: Call, key: str) -> Verdict:
        """Asks as one item of a batch; what comes back unusable is asked singly."""
        known = self._row(key)
        done = asyncio.get_running_loop().create_future()
        try:
            if known is not None and known.batch is None:
                batch = await self._search(known.job)
                known = self._row(key) if batch else None
            if known is not None:
                item = Item(
                    key, call, known.custom_id, known.nonce, self._half(call, known.nonce), done
                )
                self.account.reserve(item.most, already_sent=True)
                answer = await self._result(known.batch, item)
            else:
                nonce = new_nonce()
                most = self._half(call, nonce)
                while not self.account.reserve(most):
                    self._settled.clear()
                    await self._settled.wait()
                item = Item(key, call, "", nonce, most, done)
                self._gathered.append(item)
                if self._sender is None or self._sender.done():
                    self._sender = asyncio.ensure_future(self._send_soon())
                answer = await done
        # of the batch, not of this answer: it may be there yet, and is not paid for twice
        except ModelError as error:
            return unanswered(error)
        return await self._judged(item, answer)

    def _half(self, call: Call, nonce: str) -> float:
        return self.most(call.write(nonce)) * BATCH

    async def _judged(self, item: Item, answer: Reply | ModelError) -> Verdict:
        paid, usage = 0.0, Usage()
        if isinstance(answer, Reply):
            paid, usage = self._entry(item.key, answer, item.prompt, batch=True).cost, answer.usage
            outcome = judged(item.call, answer, item.nonce)
            if isinstance(outcome, Verdict):
                return replace(
                    outcome,
                    cost=paid,
                    usage=usage,
                    requests=1,
                    model=answer.model or self.model.name,
                )
        elif not answer.passes:
            return replace(unanswered(answer), requests=1)
        alone = await super()._asked(item.call, item.key)
        return replace(
            alone, cost=alone.cost + paid, usage=alone.usage + usage, requests=alone.requests + 1
        )

    async def drain(self) -> None:
        """Cancels all waits for batches; the ledger keeps which batches are at work."""
        await super().drain()
        waits = [
            *self._sent_off,
            *self._waiting.values(),
            *self._found.values(),
            *([self._sender] if self._sender else []),
        ]
        for task in waits:  # the ledger knows which batches are at work
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    # Sending.

    async def _send_soon(self) -> None:
        """Sends the gathered questions once no new one has arrived for a moment."""
        count = -1
        while count != len(self._gathered):
            count = len(self._gathered)
            await calls.TIME.sleep(GATHER)
        while self._gathered:
            count, size = 0, 0.0
            for item in self._gathered[:LARGEST]:
                prompt = item.prompt
                size += len((prompt.system + prompt.user + str(prompt.schema)).encode()) + 1000
                if count and size > HEAVIEST:
                    break
                count += 1
            items, self._gathered = self._gathered[:count], self._gathered[count:]
            # Not waited for: what is asked next goes in a batch of its own.
            task = asyncio.ensure_future(self._send(items))
            self._sent_off.add(task)
            task.add_done_callback(self._sent_off.discard)

    async def _send(self, items: Sequence[Item]) -> None:
        """Sends one batch, and hands its answers to the calls that wait for them."""
        job = secrets.token_hex(8)
        items = [replace(item, id=f"tw-{job}-{i:05d}") for i, item in enumerate(items)]
        try:
            batch = await self._submit(job, items)
        except Exception as error:
            failed = (
                error
                if isinstance(error, ModelError)
                else ModelError("request", f"{type(error).__name__}: {error}")
            )
            for item in items:
                self._settle(item)
                if not item.done.done():  # its call may have been cancelled
                    item.done.set_exception(failed)
            return
        for item in items:
            try:
                answer = await self._result(batch, item)
                if not item.done.done():
                    item.done.set_result(answer)
            except ModelError as error:
                if not item.done.done():
                    item.done.set_exception(error)

    async def _submit(self, job: str, items: Sequence[Item]) -> str:
        with self._ledger.writing() as db:
            rows = [
                {**self._names, "key": i.key, "custom_id": i.id, "nonce": i.nonce, "job": job,
                    "batch": None, "booked": False, "time": self._clock()}
                for i in items
            ]  # fmt: skip
            for row in rows:  # a question that was asked before under another job is this job's now
                db.execute(BATCHES.delete().where(BATCHES.c.key == row["key"], *self._mine))
            db.execute(BATCHES.insert(), rows)
        prompts, began = {item.id: item.prompt for item in items}, self._clock()
        lost = False  # whether one may have arrived whose id did not

        async def sent() -> str:
            nonlocal lost
            if lost and (found := await self.model.mine(began, list(prompts), self._answers)):
                return str(found)
            try:
                return str(await self.model.submit(prompts))
            except ModelError as error:
                lost = lost or error.lost
                raise

        batch = await self._patiently(sent)
        self._name(job, batch)
        return batch

    def _name(self, job: str, batch: str) -> None:
        with self._ledger.writing() as db:
            db.execute(
                BATCHES.update().where(BATCHES.c.job == job, *self._mine).values(batch=batch)
            )

    async def _search(self, job: str) -> str | None:
        """Looks for the batch of a job that was being sent when the process was killed; None where
        it did not arrive."""
        if job not in self._found:
            self._found[job] = asyncio.ensure_future(self._searched(job))
        return await asyncio.shield(self._found[job])

    async def _searched(self, job: str) -> str | None:
        with self._ledger.reading() as db:
            rows = list(
                db.execute(
                    sa.select(BATCHES.c.custom_id, BATCHES.c.time).where(
                        BATCHES.c.job == job, *self._mine
                    )
                )
            )
        since, ids = min(row.time for row in rows), [row.custom_id for row in rows]
        batch: str | None = await self._patiently(
            lambda: self.model.mine(since, ids, self._answers)
        )
        if batch is not None:
            self._name(job, batch)
        return batch

    # Receiving.

    async def _result(self, batch: str, item: Item) -> Reply | ModelError:
        """Returns an item's answer, booked once.

        Raises ModelError where the batch's answers cannot be had.
        """
        try:
            answer = (await self._answers(batch)).get(item.id) or ModelError(
                "server", "the batch lacks this answer"
            )
        except ModelError:
            self._settle(item)
            raise
        entry = (
            self._entry(item.key, answer, item.prompt, batch=True)
            if isinstance(answer, Reply)
            else None
        )
        self._settle(item, entry)
        return answer

    def _settle(self, item: Item, entry: Entry | None = None) -> None:
        booked = (
            BATCHES.update()
            .where(BATCHES.c.key == item.key, BATCHES.c.booked.is_(False), *self._mine)
            .values(booked=True)
        )
        self.account.settle(item.most, entry, once=booked)
        self._settled.set()

    async def _answers(self, batch: str) -> Answers:
        """Returns a batch's answers; all items that wait for the batch share one look-up."""
        known = self._waiting.get(batch)
        if known is None or (
            known.done() and known.exception() and not isinstance(known.exception(), BatchFailed)
        ):
            self._waiting[batch] = asyncio.ensure_future(self._looked(batch))
        return await asyncio.shield(self._waiting[batch])

    async def _looked(self, batch: str) -> Answers:
        try:
            while (found := await self._patiently(lambda: self.model.results(batch))) is None:
                await calls.TIME.sleep(POLL)
            answers = dict(found)
            failed = [
                answer
                for answer in answers.values()
                if isinstance(answer, ModelError) and answer.passes
            ]
            if answers and len(failed) == len(answers):
                raise BatchFailed(
                    failed[0].kind, f"the batch {batch} as a whole brought no answer: {failed[0]}"
                )
            return answers
        except BatchFailed:
            with self._ledger.writing() as db:  # what is asked again is not looked for there
                db.execute(BATCHES.delete().where(BATCHES.c.batch == batch, *self._mine))
            raise

    async def _patiently(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """Returns the provider's answer, asked again through an outage while there is patience."""
        until, pause = calls.TIME.now() + self._patience, calls.BACKOFF
        while True:
            try:
                return await ask()
            except ModelError as error:
                wait = error.after or pause
                if (
                    isinstance(error, BatchFailed)
                    or not error.passes
                    or calls.TIME.now() + wait > until
                ):
                    raise
            await calls.TIME.sleep(wait)
            pause = min(pause * 2, POLL)

    def _row(self, key: str) -> Any:
        with self._ledger.reading() as db:
            return db.execute(sa.select(BATCHES).where(BATCHES.c.key == key, *self._mine)).first()
