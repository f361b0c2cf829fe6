"""Asks models: what is known is not asked again, what fails is asked again only where that can
help, and no more is spent than allowed.

The stop reason of every answer is read before its text. What follows from it:

    a verdict in the form that was asked     scored
    refused, filtered (with an error too)    abstained, with the provider's reason
    cut off by the token limit               asked once more with twice the room, then failed; never
                                             re-asked as it was
    not in the form that was asked           asked once more with what was wrong with it, then
                                             failed
    rate limit, overload, server error,      waited for and sent again, as the server asks or ever
                                             longer, until `patience` is over,
    timeout, no connection                   or eight requests were sent, then failed
    wrong request                            failed
    key, quota, billing, permission          failed, and nothing more is sent: every other request
                                             would meet the same

After several failures in a row, over all calls, the circuit opens: one request at a time is let
through, ever more seldom, until one gets an answer. Calls wait meanwhile, up to their patience, so
that an outage in the night costs time and not verdicts.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...tools import redact
from ..llm.transcript import Unreadable, new_nonce
from ..models.model import Model, ModelError, Prompt, Reply, Usage
from .prices import BATCH, cost
from .store import Account, Cache, Entry, Verdict, content_key, without_cost

REQUESTS = 8  # at most, for one question
BACKOFF, LONGEST = 0.5, 30.0  # seconds before the second request, and at most
TRIP = 5  # failures in a row that open the circuit
COOL, COOLEST = 5.0, 60.0  # seconds until the next probe, at first and at most


@dataclass(frozen=True, slots=True)
class Call:
    """One question to a model.

    Attributes:
        key: what its verdict depends on in addition to the judge's version, JSON data.
        write: the prompt under a nonce.
        read: returns the verdict in a reply to the prompt of that nonce, as data; raises Unreadable
            with what the model should have done.
        since: when it was first wanted, by `TIME`; None: now. What has waited in a queue has lost
            patience there too.
    """

    key: Any
    write: Callable[[str], Prompt]
    read: Callable[[Reply, str], Mapping[str, Any]]
    since: float | None = None


class Time:
    """The clock that waits go by; tests replace it with one that does not take its time."""

    def now(self) -> float:
        """Returns the time in seconds, by a clock that never goes back."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Waits for so many seconds."""
        await asyncio.sleep(seconds)


TIME = Time()


class Caller:
    """Asks one model on behalf of one judge.

    Args:
        version: of the judge; part of every key.
        price: dollars per million tokens; None: unknown, and no budget can be held.
        concurrency: requests under way at once; fewer where the model says so (`at_once`), since a
            request's timeout is no time to queue.
        timeout: seconds for one request, its answer included.
        patience: seconds for one verdict, with everything that is waited for.
    """

    def __init__(
        self,
        model: Model,
        version: str,
        cache: Cache | None,
        account: Account,
        price: tuple[float, float, float, float] | None,
        *,
        concurrency: int = 8,
        timeout: float = 120.0,
        patience: float = 900.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.model, self.version, self.cache, self.account, self.price = (
            model,
            version,
            cache,
            account,
            price,
        )
        self._timeout, self._patience, self._clock = timeout, patience, clock
        self._slots = asyncio.Semaphore(min(concurrency, model.at_once or concurrency))
        self._circuit = Circuit()
        self._under_way: dict[str, asyncio.Task[Verdict]] = {}
        self._flying, self._landed, self._closed = 0, asyncio.Event(), False
        self._settled = asyncio.Event()
        self._chance = random.Random()

    @property
    def trouble(self) -> str:
        """Why the last request brought no answer, in a few words; empty where it did."""
        return self._circuit.trouble

    def key(self, call: Call) -> str:
        """Returns the key of a call's verdict in the cache."""
        return content_key(self.version, call.key)

    async def verdict(self, call: Call) -> Verdict:
        """Returns the model's verdict. Calls that ask the same at the same time share one answer.

        Raises:
            Paused: the budget is spent.
        """
        key = self.key(call)
        if key in self._under_way:
            return without_cost(await asyncio.shield(self._under_way[key]))
        if self.cache is not None and (known := self.cache.get(key)) is not None:
            return known
        task = self._under_way[key] = asyncio.ensure_future(self._verdict(call, key))
        # Also where the call was cancelled meanwhile: the answer is paid for.
        task.add_done_callback(lambda _: self._under_way.pop(key))
        return await asyncio.shield(task)

    async def _verdict(self, call: Call, key: str) -> Verdict:
        verdict = await self._asked(call, key)
        if self.cache is None:
            return verdict
        return self.cache.put(key, verdict, self._clock())

    async def _asked(self, call: Call, key: str) -> Verdict:
        """Asks, and asks once more where another question may bring what this one did not."""
        paid, usage, requests = 0.0, Usage(), 0
        asked = TIME.now() if call.since is None else call.since
        deadline = lambda: max(asked, self._circuit.answered) + self._patience  # noqa: E731 - patience is for outages, not for queues
        more: dict[str, Any] = {}
        while True:
            nonce = new_nonce()
            prompt = call.write(nonce)
            if "room" in more:
                prompt = replace(prompt, max_tokens=prompt.max_tokens * 2)
            if "wrong" in more:
                prompt = replace(
                    prompt,
                    user=(
                        f"{prompt.user}\n\nYour last answer could not be used ({more['wrong']})."
                        " Answer again, exactly in the form asked for."
                    ),
                )
            sent = await self._sent(prompt, key, deadline)
            paid, requests = paid + sent.cost, requests + sent.requests
            if isinstance(sent.reply, ModelError):
                usage = usage + sent.reply.usage
                return replace(unanswered(sent.reply), cost=paid, usage=usage, requests=requests)
            reply = sent.reply
            usage = usage + reply.usage
            outcome = judged(call, reply, nonce)
            if isinstance(outcome, Verdict):
                return replace(
                    outcome,
                    cost=paid,
                    usage=usage,
                    requests=requests,
                    model=reply.model or self.model.name,
                )
            if more.keys() & outcome.keys():
                return Verdict(
                    "failed", {}, _why(outcome), paid, usage, requests, model=reply.model
                )
            more |= outcome

    async def _sent(self, prompt: Prompt, key: str, deadline: Callable[[], float]) -> Sent:
        """Sends a prompt until there is an answer, or none can be had."""
        paid, requests = 0.0, 0
        while True:
            try:
                async with self._slots, self._circuit.passing(deadline):
                    most = await self._reserve(prompt)
                    if self._closed:
                        self.account.settle(most, None)
                        raise asyncio.CancelledError
                    self._flying += 1
                    entry = Entry(key, self.model.name, "cancelled", Usage(), most, certain=False)
                    try:
                        answer = await self._once(prompt)
                        entry = self._entry(key, answer, prompt)
                    finally:
                        self._flying -= 1
                        self._landed.set()
                        self.account.settle(most, entry)
                        self._settled.set()
            except ModelError as closed:  # the circuit's, nothing was sent
                return Sent(closed, paid, requests)
            requests += 1
            paid += entry.cost
            self._circuit.record(answer)
            if isinstance(answer, Reply) or not answer.passes:
                return Sent(answer, paid, requests)
            pause = answer.after or min(BACKOFF * 2 ** (requests - 1), LONGEST) * (
                0.75 + 0.25 * self._chance.random()
            )
            if (
                requests >= (2 if answer.kind == "form" else REQUESTS)
                or TIME.now() + pause > deadline()
            ):
                return Sent(
                    ModelError(
                        answer.kind, f"{answer} (given up after {requests} requests)", answer.status
                    ),
                    paid,
                    requests,
                )
            await TIME.sleep(pause)

    async def drain(self) -> None:
        """Waits for requests that are under way, each at most its timeout; sends no more, and gives
        up what waits."""
        self._closed = True
        while self._flying:
            self._landed.clear()
            await self._landed.wait()
        for _ in range(3):  # what has landed is read and kept
            await asyncio.sleep(0)
        left = list(self._under_way.values())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _once(self, prompt: Prompt) -> Reply | ModelError:
        try:
            return await asyncio.wait_for(self.model.ask(prompt), self._timeout)
        except TimeoutError:
            return ModelError("timeout", f"no answer within {self._timeout:g} seconds", lost=True)
        except ModelError as error:
            return error
        # an answer of an unforeseen shape, or a model that does not work properly
        except Exception as error:
            return ModelError("request", f"{type(error).__name__}: {error}", lost=True)

    async def _reserve(self, prompt: Prompt) -> float:
        most = self.most(prompt)
        while not self.account.reserve(most):
            self._settled.clear()
            await self._settled.wait()
        return most

    def most(self, prompt: Prompt) -> float:
        """Returns the most that a request can cost: no text has more tokens than bytes."""
        return sum(self._most(prompt))

    def _most(self, prompt: Prompt) -> tuple[float, float]:
        """Returns the most that a request can cost, for input and for output."""
        if self.price is None:
            return 0.0, 0.0
        size = (
            len((prompt.system + prompt.user + str(prompt.schema)).encode(errors="surrogatepass"))
            + 64
        )
        return size * max(self.price[:3]) / 1e6, prompt.max_tokens * self.price[3] / 1e6

    def _entry(
        self, key: str, answer: Reply | ModelError, prompt: Prompt, batch: bool = False
    ) -> Entry:
        """Returns what a request is booked as. Where its cost is unknown (its answer was lost on
        the way, or does not tell its tokens, or tells only one part of them), that is the most it
        can have cost."""
        used, share = answer.usage, BATCH if batch else 1.0
        if isinstance(answer, ModelError):
            status, wrote = answer.kind, True
            if used == Usage() and not answer.lost:
                return Entry(key, self.model.name, status, used, 0.0)
        else:
            status, wrote = answer.stop, bool(answer.text)
        read, written = self._most(prompt)
        paid = cost(used, self.price, batch) if self.price else 0.0
        unread = not (used.fresh or used.read or used.written)
        unwritten = not used.output and (unread or wrote)
        paid += share * (read * unread + written * unwritten)
        return Entry(
            key,
            self.model.name,
            status,
            used,
            paid,
            certain=not (self.price and (unread or unwritten)),
        )


@dataclass(frozen=True, slots=True)
class Sent:
    """The result of sending: an answer or why there is none, what was paid, and how many requests
    that took."""

    reply: Reply | ModelError
    cost: float
    requests: int


def judged(call: Call, reply: Reply, nonce: str) -> Verdict | dict[str, Any]:
    """Returns the verdict in a reply; or what another question should do better: "room" (it was cut
    off) or "wrong" (what was wrong with its form)."""
    if reply.stop in ("refused", "filtered"):
        return Verdict("abstained", {}, redact(f"{reply.stop}: {reply.reason}")[:500])
    if reply.stop == "length":
        return {"room": reply.reason}
    if reply.stop != "end":
        return Verdict("failed", {}, redact(f"ended by {reply.reason}"))
    if not reply.text.strip():
        return {"wrong": f"it was empty: {reply.reason}" if reply.reason else "it was empty"}
    try:
        return Verdict("scored", dict(call.read(reply, nonce)))
    except Unreadable as error:
        return {"wrong": str(error)[:300]}
    # the judge's own mistake; what it was paid for is booked all the same
    except Exception as error:
        return Verdict("failed", {}, redact(f"{type(error).__name__}: {error}")[:500])


def unanswered(error: ModelError) -> Verdict:
    """Returns the verdict where no answer came: abstained for a content filter, else failed."""
    status: Any = "abstained" if error.kind == "filtered" else "failed"
    return Verdict(status, {}, redact(f"{error.kind}: {error}"))


def _why(outcome: Mapping[str, Any]) -> str:
    if "room" in outcome:
        return f"truncated: {outcome['room']}, with twice the tokens too"
    return redact(f"unreadable, also when asked again: {outcome['wrong']}")


class Circuit:
    """A circuit breaker: it lets requests through, holds them back after failures, and stops them
    for good where none can succeed."""

    def __init__(self) -> None:
        self.answered = TIME.now()  # when the last answer came
        self._failures, self._opens, self._cool = 0, 0.0, COOL
        self._shut: ModelError | None = None
        self._last: ModelError | None = None
        self._probe = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def passing(self, deadline: Callable[[], float]) -> AsyncIterator[None]:
        """Waits until a request may be sent, alone where the circuit is open.

        Raises:
            ModelError: none may be, until the deadline.
        """
        alone = False
        try:
            while True:
                if self._shut is not None:
                    raise ModelError(
                        "account",
                        f"not sent, since an earlier request was answered: {self._shut}",
                        self._shut.status,
                    )
                if self._failures >= TRIP and not alone:
                    alone = await self._probe.acquire()
                    continue
                if alone and self._failures < TRIP:
                    self._probe.release()
                    alone = False
                pause = self._opens - TIME.now()
                if pause <= 0:
                    break
                if self._opens > deadline():
                    raise ModelError(
                        "busy", f"not sent, since the model does not answer: {self._last}"
                    )
                await TIME.sleep(pause)
            yield
        finally:
            if alone:
                self._probe.release()

    @property
    def trouble(self) -> str:
        """Why the last request brought no answer; empty where it did."""
        return (
            redact(f"{self._last.kind}: {self._last}")[:200]
            if self._failures and self._last is not None
            else ""
        )

    def record(self, answer: Reply | ModelError) -> None:
        """Takes note of an answer or a failure, and opens or closes accordingly."""
        now = TIME.now()
        if isinstance(answer, Reply):
            self._failures, self._cool, self.answered = 0, COOL, now
            if answer.limits > 0:
                self._opens = max(self._opens, now + answer.limits)
            return
        self._last = answer
        if answer.kind == "account":
            self._shut = answer
        elif answer.passes:
            self._failures += 1
            if answer.kind == "busy" and answer.after:
                self._opens = max(self._opens, now + answer.after)  # the server means everybody
            if self._failures >= TRIP:
                self._opens, self._cool = (
                    max(self._opens, now + self._cool),
                    min(self._cool * 2, COOLEST),
                )
