"""What all judges that ask a model have in common: a way of judging says what is asked and what an
answer means, the rest is here.

    request ──calls()──▶ questions to the model ──Caller──▶ verdicts ──answer()──▶ feedback or
    comparison

A judge is a feedback source: it takes requests, has many of them judged at once on a loop of its
own, and hands over what is ready. Whatever is known already is not asked again; a run that was
killed asks for the rest only.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import random
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...protocols import (
    Answer,
    Comparison,
    Context,
    Episode,
    Feedback,
    FeedbackSource,
    Paused,
    Question,
    Request,
    Stamp,
)
from ...tools import background, derive_id, did_you_mean
from ..asking import calls, store
from ..asking.calls import Call
from ..asking.options import Asking
from ..asking.store import Verdict
from ..trust.canaries import (
    KINDS,
    Quarantine,
    Schedule,
    canary,
    control,
    fell_for_rank,
    fell_for_score,
    read_known_bad,
)
from ..trust.watch import Quarantined, Watch

LOOK = 0.02  # seconds that a look for answers takes, so that one after the other do not spin


@dataclass(kw_only=True)
class ModelJudge(Asking, FeedbackSource):
    """A judge that asks a model. Its options are those of `Asking`, and its own.

    A subclass is one way of judging: `calls`, `answer` and `instructions`.

    Attributes:
        canaries: share of its verdicts in a run along with which it is shown a conversation that is
            known to be bad (`judges/trust/canaries.py`), or {rate, kinds}; a judge that falls for
            them is quarantined: its verdicts are not trained on, and the run is paused.
        known_bad: a file of conversations that are known to be bad, as further canaries; six at
            least, since the same words count once.
    """

    kind = "episode"
    may_change: ClassVar[frozenset[str]] = Asking.may_change | {"canaries", "known_bad"}
    gives = "verdicts"  # what is waited for, in notes
    room: ClassVar[int] = 2  # conversations in one question, for judges that compare
    KINDS: ClassVar[Sequence[str]] = KINDS  # of canaries, unless others are named

    canaries: Any = 0.05
    known_bad: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._known_bad = read_known_bad(Path(self.known_bad)) if self.known_bad is not None else []
        if self._known_bad and self.kind == "group":
            raise ValueError(
                "known_bad is for judges that score: those that compare see canaries of the same"
                " start"
            )
        asked = (
            dict(self.canaries) if isinstance(self.canaries, Mapping) else {"rate": self.canaries}
        )
        if strange := set(asked) - {"rate", "kinds"}:
            raise ValueError(f"canaries take a rate and kinds, got {', '.join(sorted(strange))}")
        self._rate = float(asked.get("rate", 0.05))
        self._kinds = [*asked.get("kinds", self.KINDS), *(["known-bad"] if self._known_bad else [])]
        for kind in self._kinds:
            if kind not in (*KINDS, "known-bad"):
                raise ValueError(f"no canary {kind!r}.{did_you_mean(str(kind), KINDS)}")
        Schedule(self._rate, self._kinds)  # what is wrong with them shows before the run
        self._under_way: dict[str, tuple[Request, concurrent.futures.Future[Answer]]] = {}

    # What a way of judging says.

    @abstractmethod
    def calls(self, request: Request) -> list[Call]:
        """What the model is asked about a request."""

    @abstractmethod
    def answer(self, request: Request, verdicts: Sequence[Verdict]) -> Answer:
        """What its verdicts mean; all are scored."""

    # What the engine calls.

    def request(self, requests: Sequence[Request]) -> None:
        """Begins to judge every request that is not under way, in the background."""
        if not self._opened:
            raise ValueError("open(context) comes before the first question")
        for request in requests:
            if request.id not in self._under_way:
                self._under_way[request.id] = request, background(self._judge(request))

    def receive(self) -> list[Answer]:
        """What is ready, in the order it was asked.

        Raises:
            Quarantined: it is not to be trusted any more.
            Paused: nothing else is ready, and nothing more will be before a human decides.
        """
        if self._under_way:
            concurrent.futures.wait(
                [future for _, future in self._under_way.values()], timeout=LOOK
            )
        ready = {id_: future for id_, (_, future) in self._under_way.items() if future.done()}
        answers, paused = [], None
        for id_, future in ready.items():
            error = future.exception()
            if isinstance(error, Quarantined):
                raise error
            if isinstance(error, Paused):
                paused = error
                continue
            request, _ = self._under_way.pop(id_)
            failed = [Verdict("failed", reason=f"{type(error).__name__}: {error}")]
            answers.append(future.result() if error is None else self._stamped(request, failed))
        if paused is not None and not answers and len(ready) == len(self._under_way):
            raise paused
        return answers

    def waiting(self) -> str:
        """Returns how many are under way, the dollars spent, and what went wrong last."""
        note = f"{len(self._under_way)} under way"
        if self._caller is not None and self._caller.account.spent:
            of = f" of {self.budget:g}" if self.budget is not None else ""
            note += f", {self._caller.account.spent:.2f}{of} dollars spent"
        if self._caller is not None and (trouble := self._caller.trouble):
            note += f"; asking again after {trouble}"
        return note

    def close(self) -> None:
        """Cancels what is under way."""
        for _, future in self._under_way.values():
            future.cancel()
        self._under_way.clear()
        super().close()

    async def _judge(self, request: Request) -> Answer:
        since = calls.TIME.now()
        async with contextlib.AsyncExitStack() as held:
            if not self.batch:
                await held.enter_async_context(self._watch.serving)
                # One by one, so that each knows what the last canary showed.
                if self._watch.quarantine.suspect:
                    await held.enter_async_context(self._watch.alone)
            self._trusted()
            kind = (
                (self._watch.quarantine.suspect or self._watch.schedule.next())
                if self._watched
                else None
            )
            work = [
                self._answered(request, since),
                *([self._try_canary(request, kind, since)] if kind else []),
            ]
            answer, *canary_cost = await gathered(work)
        self._trusted()
        return dataclasses.replace(
            answer,
            stamp=dataclasses.replace(answer.stamp, cost=answer.stamp.cost + sum(canary_cost)),
        )

    def _trusted(self) -> None:
        if self._watch.quarantine.quarantined:
            raise Quarantined(
                f"the judge {self._name!r} ({self.version}) {self._watch.quarantine.reason}: a"
                " policy could win it over by writing such things. Its verdicts on this update are"
                " not trained on. Use another model or rubric in a run that begins from this one's"
                " policy (in its newest checkpoint); or, if you know better, choose its `canaries:"
                " {kinds: [...]}`, or set `canaries: 0`, and go on"
            )

    async def _answered(self, request: Request, since: float) -> Answer:
        asked = [dataclasses.replace(call, since=since) for call in self.calls(request)]
        if request.rater_slot:  # another rater is another answer, not the same one again
            asked = [
                dataclasses.replace(call, key=[call.key, request.rater_slot]) for call in asked
            ]
        return self._stamped(
            request, await gathered([self._caller.verdict(call) for call in asked])
        )

    # Canaries.

    @property
    def _watched(self) -> bool:
        return bool(self._rate) and self._context is not None and self._context.ledger is not None

    @property
    def _name(self) -> str:
        return self._context.name if self._context is not None else self.way

    def open(self, context: Context) -> None:
        """Opens the caller and the watch over canaries, which takes up those the ledger holds."""
        super().open(context)
        self._watch = Watch(
            Quarantine(),
            Schedule(self._rate, self._kinds, context.seed),
            asyncio.Semaphore(self.concurrency),
            asyncio.Lock(),
        )
        if self._watched:
            seen = store.canaries(context.ledger, context.run, context.name, self.version)
            for kind, fell in seen:
                self._watch.quarantine.saw(kind, fell)
            self._watch.schedule.load_state_dict({"verdicts": round(len(seen) / self._rate)})

    async def _try_canary(self, request: Request, kind: str, since: float) -> float:
        """Has a conversation judged that is known to be bad, and remembers what the judge made of
        it. Returns what it cost.

        Whatever goes wrong here is not the real conversation's fault.
        """
        assert self._context is not None
        real = request.episodes[0]
        rng = random.Random(
            derive_id("canary", kind, real.start.key, [turn.action for turn in real.turns])
        )
        bad = dataclasses.replace(
            canary(kind, real, rng, known_bad=self._known_bad), info=real.info
        )
        fell, answer, cost = await self._fell(request, bad, since)
        plain = control(bad)
        if fell and plain is not None:  # does it like such replies anyway?
            anyway, _, more = await self._fell(request, plain, since)
            fell, cost = (None if anyway is None else not anyway), cost + more
        # The same words are one trial, however often they come: a cached verdict tells nothing new.
        others = [turn.action for turn in real.turns] if self.kind == "group" else []
        words = [(turn.observation.content, turn.action) for turn in bad.turns]
        id_ = derive_id(self._context.run, self._name, self.version, kind, words, others)
        record = {
            "reply": bad.turns[-1].action,
            "said": answer.score if isinstance(answer, Feedback) else None,
            "status": answer.status,
            "comment": answer.comment,
        }
        new = store.add_canary(
            self._context.ledger, id_, self._context.run, self._name, self.version, kind, fell,
            record, self._context.clock()
        )  # fmt: skip
        if fell is not None and new:
            self._watch.quarantine.saw(kind, fell)
        return cost

    async def _fell(
        self, request: Request, bad: Episode, since: float
    ) -> tuple[bool | None, Answer, float]:
        """Whether a judge takes a bad conversation for a good one; None: it gave no verdict."""
        if self.kind == "episode":
            trial = dataclasses.replace(request, target=bad.id, episodes=(bad,))
        else:
            trial = dataclasses.replace(request, episodes=(*request.episodes[: self.room - 1], bad))
        try:
            answer = await self._answered(trial, since)
        except Paused:
            raise
        except Exception as error:
            answer = self._without(
                trial, Verdict("failed", reason=f"{type(error).__name__}: {error}")
            )
        if answer.status != "scored":
            return None, answer, answer.stamp.cost
        if isinstance(answer, Comparison):
            # A soft label near one half is a tie.
            sure = answer.probability is None or answer.probability >= 0.6
            return sure and fell_for_rank(answer.ranking, bad.id), answer, answer.stamp.cost
        return (
            (None if answer.score is None else fell_for_score(answer.score, 0.0, 1.0)),
            answer,
            answer.stamp.cost,
        )

    def _stamped(self, request: Request, verdicts: Sequence[Verdict]) -> Answer:
        """The answer with what it took to get it.

        A failure or abstention of one call is the answer's.
        """
        without = next(
            (v for status in ("failed", "abstained") for v in verdicts if v.status == status), None
        )
        try:
            answer = (
                self._without(request, without)
                if without is not None
                else self.answer(request, verdicts)
            )
        except Exception as error:
            answer = self._failed(request, f"{type(error).__name__}: {error}")
        took: dict[str, Any] = {
            "requests": sum(v.requests for v in verdicts),
            "tokens": sum(
                v.usage.fresh + v.usage.read + v.usage.written + v.usage.output for v in verdicts
            ),
            "cached": sum(v.cached for v in verdicts),
        }
        answered = next((v.model for v in verdicts if v.model), "")
        version = (
            self.version
            if not answered or self._model.name.endswith(f":{answered}")
            else f"{self.version}@{answered}"
        )
        stamp = Stamp(request=request.id, version=version, cost=sum(v.cost for v in verdicts))
        details = {**answer.details, "took": took}
        return dataclasses.replace(
            answer, id=answer.id or derive_id(request.id, "answer"), stamp=stamp, details=details
        )

    def _without(self, request: Request, verdict: Verdict) -> Answer:
        kind: type[Answer] = Feedback if request.kind == "episode" else Comparison
        return (kind.failed if verdict.status == "failed" else kind.abstained)(
            request.target, verdict.reason
        )

    def _failed(self, request: Request, reason: str) -> Answer:
        return self._without(request, Verdict("failed", reason=reason))

    # For trying a judge without a run.

    def ask(self, episodes: Sequence[Episode], folder: str | Path = ".") -> list[Answer]:
        """What it says of conversations, at once: of each, or of each group where it compares.

        Args:
            episodes: the conversations.
            folder: the folder whose parent holds the cache.

        Raises:
            Paused: the budget is spent.
        """
        if not self._opened or self._context is None or self._context.ledger is not None:
            self.open(
                Context(self.way, Path(folder) / "run", time.time, 0)
            )  # and stays open: its budget is for all that is asked here
        groups: dict[str, list[Episode]] = {}
        for e in episodes:
            groups.setdefault(e.group, []).append(e)
        asked: list[Question] = []
        for key, members in groups.items():
            asked += self.plan(key, members)
        requests = [
            Request(self.kind, q.target, self.way, ask=q.ask, episodes=q.episodes) for q in asked
        ]
        self.request(requests)
        answers: dict[str | None, Answer] = {}
        while len(answers) < len({r.id for r in requests}):
            answers |= {a.stamp.request: a for a in self.receive()}
        return [answers[r.id] for r in requests]


async def gathered(work: Sequence[Any]) -> list[Any]:
    """All results; what raises does so only after all others are done, since they are paid for."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
