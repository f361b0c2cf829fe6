"""`check_feedback_source`: asks a source, twice and across a restart, and looks at what arrives."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..ledger.ledger import Ledger
from ..protocols import Context, FeedbackSource
from ..records.feedback import Answer, Comparison, Request
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
            faults += secret_faults(source, check.known.values())
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
        self.known: dict[str, Answer] = {}  # every answer so far, by id

    def go(self) -> None:
        """Asks, hears, acknowledges one answer, and hears the others."""
        source, faults = self.source, self.faults
        self._open()
        groups = [conversations()[i : i + 2] for i in (0, 4, 2)]
        before = [copy.deepcopy(e.to_dict()) for group in groups for e in group]
        for group in groups:
            self.ledger.add_episodes(group)
            self.requests += [
                Request(source.kind, q.target, "testing", ask=q.ask, episodes=q.episodes)
                for q in source.plan(group[0].group, group)
            ]
        self.ledger.add_requests(self.requests)
        self._timed("request", lambda: source.request(self.requests))
        self._timed("request, of the same again,", lambda: source.request(self.requests))
        first, second, *_ = self.requests
        self._wait_for(first)
        again = self._timed("receive", source.receive)
        for each in again or ():
            if each.id in self.known and plain(each) != plain(self.known[each.id]):
                faults.append(
                    "an answer that is repeated has another content under the same id: the run"
                    " would stop"
                )
        if any(not each.id or each.id not in self.known for each in again or ()):
            faults.append(
                "one answer arrives several times, under an id of its own each time: it would count"
                " twice. Give an answer the same id whenever it is repeated"
            )
            raise _Ended
        done = list(self.known)
        self.answer(source, second)  # it waits while the first is acknowledged
        self._timed("acknowledge", lambda: source.acknowledge(done))
        self._timed("acknowledge of an unknown id", lambda: source.acknowledge(["unknown"]))
        if any(a.id in done for a in self._timed("receive", source.receive) or ()):
            faults.append("an answer comes again after it was acknowledged")
        self._wait_for(second, answer=False)
        if [e.to_dict() for group in groups for e in group] != before:
            faults.append("it changes the episodes that it is shown: others see them too")
        self._timed("close", source.close)
        self._timed("close, a second time,", source.close)

    def restarted(self, source: FeedbackSource) -> None:
        """Asks again for what was not answered, as a run does that goes on after a crash."""
        self.source = source
        self._open()
        self._timed("request after a restart", lambda: source.request(self.requests[2:]))
        self._wait_for(self.requests[2], after="a restart")
        self._timed("close", source.close)

    def _open(self) -> None:
        """Opens it, which may take as long as an answer: it connects there."""
        context = Context("testing", self.folder, time.time, 0, ledger=self.ledger, run="testing")
        self._timed("open", lambda: self.source.open(context), self.patience)

    def _wait_for(self, request: Request, *, answer: bool = True, after: str = "") -> None:
        """Has a request answered, and waits for an answer about it; notes what arrives.

        Args:
            answer: False: it was answered already.
            after: what lies between the request and now.
        """
        if answer:
            self.answer(self.source, request)
        until = time.monotonic() + self.patience
        while time.monotonic() <= until:
            if self.source.answers_in_ledger:
                arrived = list(self.ledger.feedback(late=True))
            else:
                arrived = list(self._timed("receive", self.source.receive) or ())
            new = [a for a in arrived if a.id not in self.known]
            for old in (a for a in arrived if a.id in self.known):
                if self.known[old.id].target != old.target:
                    self.faults.append(
                        f"the id {old.id!r} is given to another answer{' after ' * bool(after)}"
                        f"{after}: the run would stop. Make ids of what is answered, not of a count"
                    )
                    raise _Ended
            self._check_answers(new, request)
            self.known |= {a.id: a for a in new if a.id}
            if new:
                return
            time.sleep(0.02)
        what = (
            f"what was asked before {after} is not answered after it: it was asked again, and"
            " `answer` was called again"
            if after
            else f"no answer to one of the requests arrived within {self.patience:g} s of `answer`:"
            " receive() returns what has come since, until it is acknowledged by its id"
        )
        self.faults.append(what)
        raise _Ended

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
            elif isinstance(each, Comparison):
                shown = {e.id for e in request.episodes}
                strangers = sorted({i for tier in each.ranking for i in tier} - shown)
                if strangers:
                    self.faults.append(f"it ranks {strangers[0]!r}, which it was not asked about")
            elif each.turn_scores is not None:
                [episode] = request.episodes
                if len(each.turn_scores) != len(episode.turns):
                    self.faults.append("it scores another number of turns than there are")
        of_it = [a for a in found if a.stamp.request == asked.id]
        if len(of_it) > 1:
            self.faults.append(
                "one request that was asked twice has two answers: request() must know what it was"
                " asked already, since a run asks again after a crash"
            )

    def _timed(self, what: str, call: Callable[[], Any], most: float | None = None) -> Any:
        """Makes a call, and notes what it raises and whether it waits, for more than `most`
        seconds."""
        began = time.perf_counter()
        try:
            found = call()
        except Exception as error:
            self.faults.append(f"{what} raises {type(error).__name__}: {error}")
            raise _Ended from None
        if (took := time.perf_counter() - began) > (most or self.seconds):
            self.faults.append(
                f"{what} takes {took:.1f} s: the run waits meanwhile. Do what takes long in a"
                " thread or a process"
            )
        return found
