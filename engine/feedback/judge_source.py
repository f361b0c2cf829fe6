"""Judges that answer at once, as feedback sources."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from ..protocols import FeedbackSource, GroupJudge, Judge
from ..records.episode import Episode
from ..records.feedback import Answer, Comparison, Feedback, Request, version_of
from ..util.aio import answering_loop, begin, leave_blocked, settle
from ..util.ids import canonical_json, derive_id
from ..util.wording import name_of, tried

LIMIT = 600.0  # seconds that a judge's coroutine may take for a call, from the last sign of it
MOMENT = 0.05  # seconds that a look waits for coroutines
AT_A_TIME = 64  # coroutines of a judge
NO_ANSWER = "no answer within"  # how the reason of one that took longer begins
HANGS = 3  # calls without an answer, after which the judge is not asked again in this round


class FunctionJudge(Judge):
    """A judge from a plain function of an episode. It returns a number, the episode's score; a
    sequence with one number (or None, no opinion) per turn, its turn scores; a `Feedback`; or None
    to abstain. It may be a coroutine."""

    def __init__(self, function: Callable[[Episode], Any]) -> None:
        self.function = function
        self.version = version_of(function)

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Calls the function on each episode; a number is a score, None an abstention."""
        return [
            _as_feedback(episode, settle(self.function(episode), LIMIT)) for episode in episodes
        ]


def _as_feedback(episode: Episode, value: Any) -> Feedback:
    if isinstance(value, Feedback):
        return value
    if hasattr(value, "tolist"):  # an array of numbers, or a single one
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if all(number is None for number in value):
            return Feedback.abstained(episode.id, "no opinion of any turn")
        return Feedback(episode.id, turn_scores=tuple(value))
    return Feedback.abstained(episode.id) if value is None else Feedback(episode.id, score=value)


class CoroutineJudge(FunctionJudge):
    """A judge from a coroutine function of an episode, otherwise as `FunctionJudge`."""

    async def score(self, episodes: Sequence[Episode]) -> list[Feedback]:  # type: ignore[override]
        """Awaits the function for one episode after the other; a source asks about each alone."""
        return [_as_feedback(episode, await self.function(episode)) for episode in episodes]


def judge_from(function: Callable[[Episode], Any]) -> Judge:
    """Returns the judge that a function of an episode, or a coroutine function, is."""
    return (CoroutineJudge if inspect.iscoroutinefunction(function) else FunctionJudge)(function)


@dataclass(eq=False, slots=True)
class _Begun:
    """Requests that a coroutine answers, the answer to come, the loop it was begun on, and whether
    that was the second time, since another coroutine blocked the loop of the first."""

    requests: list[Request]
    answer: Future[Any]
    loop: Any
    again: bool


class JudgeSource(FeedbackSource):
    """A judge as a source.

    A function is called at the next `receive`, which waits for it. A coroutine begins when it is
    requested, and works while others play or the policy is updated; those of several requests do so
    at the same time, `AT_A_TIME` at most.

    Attributes:
        begins: whether it is a coroutine.
    """

    def __init__(self, judge: Judge | GroupJudge) -> None:
        self.judge = judge
        self.kind = "group" if isinstance(judge, GroupJudge) else "episode"
        call = judge.rank if isinstance(judge, GroupJudge) else judge.score
        self.begins = inspect.iscoroutinefunction(call)
        self._waiting: list[Request] = []  # for the next `receive`
        self._begun: list[_Begun] = []
        self._task = f"judge {uuid4().hex}"  # what its coroutines are called
        self._loop: Any = None  # the one that `_room` is of
        self._room = asyncio.Semaphore(AT_A_TIME)
        self._active = 0.0  # when a coroutine was begun or ended last
        self._timeouts = 0  # calls of this round that had no answer
        self._warned = False

    def request(self, requests: Sequence[Request]) -> None:
        """Begins what a coroutine answers; keeps the rest until the next `receive`."""
        if not self.begins:
            self._waiting += requests
        elif self.kind == "group" or isinstance(self.judge, CoroutineJudge):
            for request in requests:
                self._begin([request])
        elif requests:
            self._begin(list(requests))

    def waits(self) -> bool:
        """Returns whether an answer is to come."""
        return bool(self._waiting or self._begun)

    def receive(self) -> list[Answer]:
        """Asks a judge that is a function about all that waits; returns what coroutines have
        answered by now."""
        if self.begins:
            return self._arrived()
        waiting, self._waiting, self._timeouts = self._waiting, [], 0
        if self.kind == "group":
            return [self._ranked(r, *self._ask(partial(self._called_now, [r]))) for r in waiting]
        return self._score(waiting)

    def close(self) -> None:
        """Cancels what has begun."""
        self._taken_back(self._begun)

    def _begin(self, requests: list[Request], again: bool = False) -> None:
        if self._loop is not answering_loop():
            self._loop, self._room = answering_loop(), asyncio.Semaphore(AT_A_TIME)
        self._active = time.monotonic()
        answer = begin(self._called(requests, self._room), self._task)
        self._begun.append(_Begun(requests, answer, self._loop, again))

    async def _called(self, requests: Sequence[Request], room: asyncio.Semaphore) -> Any:
        """Calls the judge where a call that cannot even be made is an answer that failed."""
        async with room:
            return await self._call(requests)

    def _arrived(self) -> list[Answer]:
        """Returns the answers of coroutines that have ended, after a moment for those that are
        quick. Where none has for too long, all that are begun are given up."""
        loop = answering_loop()
        if lost := [each for each in self._begun if each.loop is not loop]:  # another blocked it
            return self._begin_again(lost)
        wait([each.answer for each in self._begun], MOMENT)
        done = [each for each in self._begun if each.answer.done()]
        self._begun = [each for each in self._begun if each not in done]
        if done:
            self._active = time.monotonic()
        elif self._begun and time.monotonic() - self._active > LIMIT:
            self._warn_slow()
            if leave_blocked() in (None, self._task):
                return self._given_up(self._taken_back(self._begun))
            return self._begin_again(self._begun)
        return [answer for each in done for answer in self._taken(each)]

    def _taken(self, each: _Begun) -> list[Answer]:
        """Returns what a coroutine that has ended answered."""
        if self.kind == "group":
            return [self._ranked(each.requests[0], *tried(each.answer.result))]
        answers, reason = tried(lambda: list(each.answer.result()))
        if reason and len(each.requests) > 1:  # one bad episode must not spoil the others
            for request in each.requests:
                self._begin([request])
            return []
        return self._scored(each.requests, answers, reason)

    def _taken_back(self, begun: list[_Begun]) -> list[_Begun]:
        """Cancels some of what has begun; returns those."""
        self._begun = [each for each in self._begun if each not in begun]
        for each in reversed(begun):  # or those that wait for room would begin
            each.answer.cancel()
        return begun

    def _begin_again(self, begun: list[_Begun]) -> list[Answer]:
        """Begins on another loop what stood on one that another judge's coroutine blocked, once."""
        for each in self._taken_back(begun):
            if not each.again:
                self._begin(each.requests, again=True)
        return self._given_up([each for each in begun if each.again])

    def _given_up(self, begun: Sequence[_Begun]) -> list[Answer]:
        """Asks about each request of several alone; one alone has failed."""
        for request in (r for each in begun if len(each.requests) > 1 for r in each.requests):
            self._begin([request], again=True)
        alone = [each.requests[0] for each in begun if len(each.requests) == 1]
        return [self._failed(request, f"{NO_ANSWER} {LIMIT:g} s") for request in alone]

    def _call(self, requests: Sequence[Request]) -> Any:
        if isinstance(self.judge, GroupJudge):
            return self.judge.rank(requests[0].episodes)
        return self.judge.score([r.episodes[0] for r in requests])

    def _called_now(self, requests: Sequence[Request]) -> Any:
        return settle(self._call(requests), LIMIT)

    def _score(self, requests: Sequence[Request]) -> list[Answer]:
        if not requests:
            return []
        answers, reason = self._ask(lambda: list(self._called_now(requests)))
        if reason and len(requests) > 1:  # one bad episode must not spoil the others
            return [answer for request in requests for answer in self._score([request])]
        return self._scored(requests, answers, reason)

    def _scored(
        self, requests: Sequence[Request], answers: Sequence[Any], reason: str
    ) -> list[Answer]:
        if not reason and len(answers) != len(requests):
            reason = f"it gave {len(answers)} answers for {len(requests)} episodes"
        if reason:
            return [self._failed(request, reason) for request in requests]
        return [self._checked(r, answer) for r, answer in zip(requests, answers, strict=True)]

    def _ask(self, work: Callable[[], Any]) -> tuple[Any, str]:
        """One call of the judge, as `tried`.

        A call that does not come back is warned about once; after some of them no more are made.
        """
        if self._timeouts >= HANGS:
            return None, f"it was not asked: {HANGS} calls before had no answer within {LIMIT:g} s"
        timer = threading.Timer(LIMIT, self._warn_slow)
        timer.daemon = True
        timer.start()
        try:
            answer, reason = tried(work)
        finally:
            timer.cancel()
        if reason.startswith(NO_ANSWER):
            self._timeouts += 1
            self._warn_slow()
        return answer, reason

    def _warn_slow(self) -> None:
        if not self._warned:
            self._warned = True
            judge = self.judge.function if isinstance(self.judge, FunctionJudge) else self.judge
            warnings.warn(
                f"judge {name_of(judge)}: no answer within"
                f" {LIMIT:g} s; a coroutine is given up, a function is waited for",
                RuntimeWarning,
                stacklevel=2,
            )

    def _checked(self, request: Request, answer: Any) -> Answer:
        if not isinstance(answer, Feedback):
            return self._failed(request, f"it gave {type(answer).__name__}, not Feedback")
        if answer.episode != request.target:
            return self._failed(
                request,
                f"it answered for episode {answer.episode!r} instead; answers must keep the order",
            )
        if answer.turn_scores is not None and len(answer.turn_scores) != len(
            request.episodes[0].turns
        ):
            return self._failed(
                request,
                f"it scored {len(answer.turn_scores)} turns of an episode of"
                f" {len(request.episodes[0].turns)}",
            )
        return self._stamped(request, answer)

    def _ranked(self, request: Request, answer: Any, reason: str) -> Answer:
        if reason:
            return self._failed(request, reason)
        if not isinstance(answer, Comparison) or answer.group != request.target:
            return self._failed(
                request,
                f"it must give a Comparison of group {request.target}, got {type(answer).__name__}",
            )
        strangers = {e for tier in answer.ranking for e in tier} - {e.id for e in request.episodes}
        if strangers:
            return self._failed(
                request, f"it ranked episodes that were not shown: {sorted(strangers)[:3]}"
            )
        return self._stamped(request, answer)

    def _failed(self, request: Request, reason: str) -> Answer:
        kind: type[Answer] = Feedback if request.kind == "episode" else Comparison
        return self._stamped(request, kind.failed(request.target, reason))

    def _stamped(self, request: Request, answer: Answer) -> Answer:
        try:
            canonical_json({"shown": dict(answer.shown), "details": dict(answer.details)})
        except (TypeError, ValueError, RecursionError) as error:
            return self._failed(request, f"`shown` or `details` is not plain JSON data: {error}")
        if answer.supersedes is not None:
            return self._failed(
                request,
                "it corrects an earlier answer; a judge that answers at once has none to correct",
            )
        return dataclasses.replace(
            answer,
            id=derive_id(request.id, "answer"),
            stamp=dataclasses.replace(answer.stamp, request=request.id),
        )


def ask_judge(judge: Judge, episodes: Sequence[Episode]) -> list[Feedback]:
    """What a judge says of each episode, in order.

    Whatever it does wrong is a `failed` answer, as in a run; nothing is raised.
    """
    source = JudgeSource(judge)
    requests = [
        Request("episode", episode.id, "", number, episodes=(episode,))
        for number, episode in enumerate(episodes)  # one may be there twice
    ]
    source.request(requests)
    answers: dict[str | None, Answer] = {}
    while source.waits():
        answers |= {answer.stamp.request: answer for answer in source.receive()}
    found = [answers[request.id] for request in requests]
    return [answer for answer in found if isinstance(answer, Feedback)]
