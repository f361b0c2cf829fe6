"""Judges that answer at once, as feedback sources."""

from __future__ import annotations

import dataclasses
import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ..protocols import FeedbackSource, GroupJudge, Judge
from ..records.episode import Episode
from ..records.feedback import Answer, Comparison, Feedback, Request, version_of
from ..util.aio import begin, outcome, settle
from ..util.ids import canonical_json, derive_id
from ..util.wording import name_of, tried

LIMIT = 600.0  # seconds that a judge's coroutine may take for a call
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
        """Awaits the function for one episode after the other."""
        return [_as_feedback(episode, await self.function(episode)) for episode in episodes]


def judge_from(function: Callable[[Episode], Any]) -> Judge:
    """Returns the judge that a function of an episode, or a coroutine function, is."""
    return (CoroutineJudge if inspect.iscoroutinefunction(function) else FunctionJudge)(function)


class JudgeSource(FeedbackSource):
    """A judge as a source: what is requested is answered at the next `receive`.

    A function is called then. A coroutine begins when it is requested, and works while others play
    or the policy is updated; those of several requests do so at the same time.
    """

    def __init__(self, judge: Judge | GroupJudge) -> None:
        self.judge = judge
        self.kind = "group" if isinstance(judge, GroupJudge) else "episode"
        call = judge.rank if isinstance(judge, GroupJudge) else judge.score
        self._begins = inspect.iscoroutinefunction(call)
        self._waiting: list[tuple[list[Request], Future[Any] | None]] = []  # with what has begun
        self._timeouts = 0  # calls of this round that had no answer
        self._warned = False

    def request(self, requests: Sequence[Request]) -> None:
        """Begins what a coroutine answers; keeps the rest until the next `receive`."""
        together = [list(requests)] if self.kind == "episode" else [[r] for r in requests]
        for own in together:
            self._waiting.append((own, begin(self._called(own)) if self._begins else None))

    def receive(self) -> list[Answer]:
        """Asks the judge about all that waits, waits for what has begun, and returns the
        answers."""
        waiting, self._waiting, self._timeouts = self._waiting, [], 0
        if self.kind == "group":
            return [self._rank(request, begun) for [request], begun in waiting]
        if self._begins:
            return [answer for own, begun in waiting for answer in self._score(own, begun)]
        return self._score([request for own, _ in waiting for request in own])

    async def _called(self, requests: Sequence[Request]) -> Any:
        """Calls the judge where a call that cannot even be made is an answer that failed."""
        return await self._call(requests)

    def _call(self, requests: Sequence[Request]) -> Any:
        if isinstance(self.judge, GroupJudge):
            return self.judge.rank(requests[0].episodes)
        return self.judge.score([r.episodes[0] for r in requests])

    def _score(self, requests: Sequence[Request], begun: Future[Any] | None = None) -> list[Answer]:
        if not requests:
            return []
        answers, reason = self._ask(lambda: list(self._answer(requests, begun)))
        if reason:
            # One bad episode must not spoil the others: ask again one by one.
            if len(requests) > 1:
                return [answer for request in requests for answer in self._score([request])]
            return [self._failed(requests[0], reason)]
        if len(answers) != len(requests):
            return [
                self._failed(r, f"it gave {len(answers)} answers for {len(requests)} episodes")
                for r in requests
            ]
        return [self._checked(r, answer) for r, answer in zip(requests, answers, strict=True)]

    def _answer(self, requests: Sequence[Request], begun: Future[Any] | None) -> Any:
        return outcome(begun, LIMIT) if begun else settle(self._call(requests), LIMIT)

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

    def _rank(self, request: Request, begun: Future[Any] | None) -> Answer:
        answer, reason = self._ask(lambda: self._answer([request], begun))
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
    source.request(
        [Request("episode", episode.id, "", episodes=(episode,)) for episode in episodes]
    )
    return [answer for answer in source.receive() if isinstance(answer, Feedback)]
