"""`check_feedback_source`: asks a source, twice and across a restart, and looks at what arrives."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ..ledger.ledger import Ledger
from ..protocols import Context, FeedbackSource
from ..records.feedback import Answer, Feedback, Request
from .episodes import conversations
from .faults import faults_of, secret_faults, short
from .judges import plain


def check_feedback_source(
    make: Callable[[], FeedbackSource],
    answer: Callable[[FeedbackSource, Request], None],
    *,
    seconds: float = 1.0,
    patience: float = 10.0,
) -> None:
    """Asks a source as a run would, and lists what it does wrong: calls that wait; feedback that is
    not idempotent (asked twice, answered twice); answers to nothing that was asked, or about
    something else; answers that change when they are repeated, or come again when they were
    acknowledged; requests that a restart loses; episodes that it changes; secrets that it shows.

    Args:
        make: makes it, as a config would.
        answer: has the answer to a request arrive, as a rater or a service would give it.
        seconds: that one call may take.
        patience: seconds in which an answer must have arrived.

    Raises:
        Unsound: with all faults.
    """
    source = make()
    with tempfile.TemporaryDirectory() as folder, faults_of(source) as faults:
        check = _Check(source, Path(folder), answer, seconds, patience, faults)
        try:
            check.go()
            faults += secret_faults(source)
            check.restarted(make())
        except _Ended:
            pass
        finally:
            check.ledger.close()


class _Ended(Exception):
    """What follows cannot be tried."""


class _Check:
    """A check in progress: the source, and what was asked of it."""

    def __init__(
        self,
        source: FeedbackSource,
        folder: Path,
        answer: Callable[[FeedbackSource, Request], None],
        seconds: float,
        patience: float,
        faults: list[str],
    ) -> None:
        self.source, self.folder, self.answer = source, folder, answer
        self.seconds, self.patience, self.faults = seconds, patience, faults
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.requests: list[Request] = []

    def go(self) -> None:
        """Asks, hears and acknowledges."""
        source, faults = self.source, self.faults
        self._open()
        group = conversations()[:2]
        before = [copy.deepcopy(e.to_dict()) for e in group]
        self.ledger.add_episodes(group)
        asked = source.plan(group[0].group, group)
        self.requests = [
            Request(source.kind, q.target, "testing", ask=q.ask, episodes=q.episodes) for q in asked
        ]
        self.ledger.add_requests(self.requests)
        self._timed("request", lambda: source.request(self.requests))
        self._timed("request, of the same again,", lambda: source.request(self.requests))
        first, *others = self.requests
        self.answer(source, first)
        found = self._arrived(self.patience)
        if not found:
            faults.append(
                f"no answer arrived within {self.patience:g} s of `answer`: receive() returns what"
                " has come since"
            )
            raise _Ended
        self._check_answers(found, first)
        again = self._timed("receive", source.receive)
        known = {a.id: a for a in found if a.id}
        for each in again or ():
            if each.id in known and plain(each) != plain(known[each.id]):
                faults.append(
                    "an answer that is repeated has another content under the same id: the run"
                    " would stop"
                )
        new = [each for each in again or () if not each.id or each.id not in known]
        if new:
            faults.append(
                "one answer arrives several times, under an id of its own each time: it would count"
                " twice. Give an answer the same id whenever it is repeated"
            )
        self._timed("acknowledge", lambda: source.acknowledge([a.id for a in found]))
        self._timed("acknowledge of an unknown id", lambda: source.acknowledge(["unknown"]))
        if any(a.id in known for a in self._timed("receive", source.receive) or ()):
            faults.append("an answer comes again after it was acknowledged")
        if others:
            self.answer(source, others[0])
        if [e.to_dict() for e in group] != before:
            faults.append("it changes the episodes that it is shown: others see them too")
        self._timed("close", source.close)
        self._timed("close, a second time,", source.close)

    def restarted(self, source: FeedbackSource) -> None:
        """Asks again for what was not answered, as a run does that goes on after a crash."""
        self.source = source
        self._open()
        open_ones = self.requests[1:] or self.requests
        before = {a.id for a in self.ledger.feedback(late=True)}
        self._timed("request after a restart", lambda: source.request(open_ones))
        # An answer that had arrived before may be lost with the process.
        if not self._arrived(0.2, before):
            self.answer(source, open_ones[0])
            if not self._arrived(self.patience, before):
                self.faults.append(
                    "what was asked before a restart is not answered after it: it was asked again,"
                    " and `answer` was called again"
                )
        self._timed("close", source.close)

    def _open(self) -> None:
        context = Context("testing", self.folder, time.time, 0, ledger=self.ledger, run="testing")
        self._timed("open", lambda: self.source.open(context))

    def _arrived(self, patience: float, before: Collection[str] = ()) -> list[Answer]:
        """Returns what arrives, once anything has that was not there before."""
        until = time.monotonic() + patience
        while True:
            if self.source.answers_in_ledger:
                found = [a for a in self.ledger.feedback(late=True) if a.id not in before]
            else:
                found = list(self._timed("receive", self.source.receive) or ())
            if found or time.monotonic() > until:
                return found
            time.sleep(0.02)

    def _check_answers(self, found: Sequence[Answer], asked: Request) -> None:
        known = {r.id: r for r in self.requests}
        for each in found:
            request = known.get(each.stamp.request or "")
            if request is None:
                self.faults.append(
                    f"the answer {short(each)} names no request that was made: put its id into"
                    " `stamp=Stamp(request=request.id)`"
                )
            elif each.target != request.target:
                self.faults.append(
                    f"asked about {request.target!r} it answers about {each.target!r}"
                )
            elif isinstance(each, Feedback) and each.turn_scores is not None:
                [episode] = request.episodes
                if len(each.turn_scores) != len(episode.turns):
                    self.faults.append("it scores another number of turns than there are")
        of_first = [a for a in found if a.stamp.request == asked.id]
        if len({a.id for a in of_first}) < len(of_first) or len(of_first) > 1:
            self.faults.append(
                "one request that was asked twice has two answers: request() must know what it was"
                " asked already, since a run asks again after a crash"
            )

    def _timed(self, what: str, call: Callable[[], Any]) -> Any:
        """Makes a call, and notes what it raises and whether it waits."""
        began = time.perf_counter()
        try:
            found = call()
        except Exception as error:
            self.faults.append(f"{what} raises {type(error).__name__}: {error}")
            raise _Ended from None
        if (took := time.perf_counter() - began) > self.seconds:
            self.faults.append(
                f"{what} takes {took:.1f} s: the run waits meanwhile. Do what takes long in a"
                " thread or a process"
            )
        return found
