"""`check_judge`: asks a judge about odd conversations, in other orders and again, and finds what
would falsify a run."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import inspect
import math
import time
from collections.abc import Sequence
from typing import Any

from ..feedback.judge_source import judge_from
from ..protocols import GroupJudge, Judge
from ..records.episode import Episode
from ..records.feedback import Comparison, Feedback
from .episodes import conversations
from .faults import faults_of, secret_faults, short

BEAT = 0.01  # seconds between the heartbeats of the loop


def check_judge(
    judge: Any,
    *,
    failing: Any = None,
    episodes: Sequence[Episode] | None = None,
    random: bool = False,
    seconds: float = 0.5,
) -> None:
    """Asks a judge as a run would, and lists what it does wrong: answers of the wrong number, for
    others, in another order; answers that change with the neighbours, the order in which a group is
    shown, the conversation's id, or from one time to the next;
    turn scores of another number than turns; episodes that it changes; what it raises; a coroutine
    that blocks its loop; secrets that it shows; a score where it failed.

    Args:
        judge: a `Judge`, a `GroupJudge`, or a function of an episode.
        failing: the same judge made so that what it asks fails (a wrong address, a model that
            answers nonsense); each of its answers must be `failed` or `abstained`, or it must
            raise.
        episodes: what it is asked about; default: `conversations()`.
        random: it may answer otherwise when it is asked again.
        seconds: for which a coroutine may keep its loop from everything else.

    Raises:
        Unsound: with all faults.
    """
    chosen = list(episodes if episodes is not None else conversations())
    loop = asyncio.new_event_loop()  # one for all questions, as in a run
    with contextlib.closing(loop), faults_of(judge) as faults:
        before = [copy.deepcopy(e.to_dict()) for e in chosen]
        check = _Check(judge, loop, seconds, faults)
        if isinstance(check.judge, GroupJudge):
            given = _check_ranking(check, chosen, random)
        else:
            given = _check_scores(check, chosen, random)
        if [e.to_dict() for e in chosen] != before:
            faults.append("it changes the episodes that it is shown: others see them too")
        if failing is not None:
            _check_failing(_Check(failing, loop, seconds, faults), chosen)
        faults += secret_faults(judge, given)


class _Check:
    """Asks a judge, and notes what it raises and whether it blocks the loop."""

    def __init__(
        self, judge: Any, loop: asyncio.AbstractEventLoop, seconds: float, faults: list[str]
    ) -> None:
        if isinstance(judge, type):
            raise TypeError(f"check_judge takes a judge: give {judge.__name__}(), not the class")
        if not callable(judge) and not isinstance(judge, (Judge, GroupJudge)):
            raise TypeError(
                f"check_judge takes a judge or a function of an episode, got {short(judge)}; one"
                " that is registered is made by `turnwise.Plugins().create('judge', NAME)`"
            )
        self.function = None if isinstance(judge, (Judge, GroupJudge)) else judge
        self.judge = judge if self.function is None else judge_from(judge)
        self.loop, self.seconds, self.faults = loop, seconds, faults

    def ask(self, argument: Sequence[Episode]) -> Any:
        """Returns the answer to one call.

        Raises:
            Exception: what the judge raises.
        """
        given: Any = self.judge
        made = given.rank(argument) if isinstance(given, GroupJudge) else given.score(argument)
        if inspect.isawaitable(made):
            return self.loop.run_until_complete(self._timed(made))
        return made

    async def _timed(self, made: Any) -> Any:
        longest, asking = 0.0, asyncio.ensure_future(made, loop=self.loop)
        while not asking.done():
            began = time.perf_counter()
            await asyncio.wait([asking], timeout=BEAT)
            longest = max(longest, time.perf_counter() - began - BEAT)
        if longest > self.seconds:
            self.faults.append(
                f"it is a coroutine and blocks its loop for {longest:.1f} s: every other question"
                " waits. Await what takes long (asyncio.to_thread, an asynchronous client)"
            )
        return await asking

    def answers(self, argument: Sequence[Episode], what: str) -> Any:
        """Returns the answer to one call, or None with a fault where it raised."""
        try:
            return self.ask(argument)
        except Exception as error:
            self.faults.append(
                f"it raises {type(error).__name__}: {error} when asked about {what}: return"
                " Feedback.failed or Feedback.abstained with the reason for what it cannot judge"
            )
            return None


def _check_scores(check: _Check, episodes: Sequence[Episode], random: bool) -> list[Any]:
    """Asks about each conversation alone, again, under another name, and with the others; returns
    the answers."""
    faults = check.faults
    alone: dict[str, Feedback] = {}
    for episode in episodes:
        answer = check.answers([episode], f"the conversation {episode.id!r}")
        if answer is None:
            continue
        found = _sound(answer, [episode], faults)
        alone |= {e.episode: e for e in found}
        again = None if random else check.answers([episode], f"{episode.id!r} again")
        if again is not None and not _alike(again, answer):
            faults.append(
                f"asked twice about {episode.id!r} it says {_words(answer)} and {_words(again)}: a"
                " run could not be repeated (pass random=True where that is meant)"
            )
            continue
        renamed = dataclasses.replace(episode, id=f"{episode.id}-renamed")
        other = None if random else check.answers([renamed], f"{episode.id!r} under another id")
        if other is not None and not _alike(other, answer):
            faults.append(
                f"asked about {episode.id!r} under another id it says {_words(answer)} and then"
                f" {_words(other)}: it remembers what it was asked, or goes by the id"
            )
    for order, name in ((list(episodes), "all"), (list(reversed(episodes)), "all, in reverse")):
        together = check.answers(order, f"{name} of them at once")
        if together is None:
            continue
        found = _sound(together, order, faults)
        other = [] if random else [
            f.episode for f in found
            if f.episode in alone and not _alike([f], [alone[f.episode]])
        ]  # fmt: skip
        if other:
            faults.append(
                f"its answer on {other[0]!r} depends on which others it is asked about together"
                " with it, or in which order"
            )
    if check.answers([], "no conversation at all"):
        faults.append("asked about no conversation it answers")
    return list(alone.values())


def _sound(answer: Any, asked: Sequence[Episode], faults: list[str]) -> list[Feedback]:
    """Returns the answers to a question, and notes what is wrong with their form."""
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        faults.append(f"it answers with {short(answer)} and not with a list of Feedback")
        return []
    odd = [each for each in answer if not isinstance(each, Feedback)]
    if odd:
        faults.append(f"it answers with {short(odd[0])}, which is no Feedback")
        return []
    if len(answer) != len(asked):
        faults.append(f"asked about {len(asked)} conversations it gives {len(answer)} answers")
        return []
    names = [e.id for e in asked]
    if [f.episode for f in answer] != names:
        known = sorted(f.episode for f in answer) == sorted(names)
        faults.append(
            "its answers are not in the order in which it was asked"
            if known
            else "its answers are about conversations that it was not asked about"
        )
        return []
    for feedback, episode in zip(answer, asked, strict=True):
        turns = feedback.turn_scores
        if turns is not None and len(turns) != len(episode.turns):
            faults.append(
                f"it scores {len(turns)} turns of {episode.id!r}, which has {len(episode.turns)}"
            )
    return list(answer)


def _check_ranking(check: _Check, episodes: Sequence[Episode], random: bool) -> list[Any]:
    """Asks about each group, again, and in the reverse order; returns the answers."""
    faults, given = check.faults, []
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    for key, group in groups.items():
        if len(group) < 2:
            continue  # there is nothing to compare, and a run does not ask
        names = [e.id for e in group]
        answer = check.answers(group, f"the conversations {', '.join(names)}")
        if answer is None:
            continue
        if not isinstance(answer, Comparison):
            faults.append(f"it answers with {short(answer)} and not with a Comparison")
            continue
        given.append(answer)
        if answer.group != key:
            faults.append("its comparison is filed under another group than that it was asked on")
        ranked = [name for tier in answer.ranking for name in tier]
        if strangers := sorted(set(ranked) - set(names)):
            faults.append(f"it ranks {strangers[0]!r}, which it was not asked about")
        again = None if random else check.answers(group, f"{', '.join(names)} again")
        if again is not None and plain(again) != plain(answer):
            faults.append(
                "asked twice about the same group it ranks otherwise: a run could not be repeated"
                " (pass random=True where that is meant)"
            )
            continue
        turned = None if random else check.answers(group[::-1], f"{', '.join(names)}, reversed")
        if isinstance(turned, Comparison) and _tiers(turned) != _tiers(answer):
            faults.append(
                f"shown {', '.join(names)} in the reverse order it ranks otherwise: the order that"
                " they are shown in decides (pass random=True where that is known)"
            )
    return given


def _check_failing(check: _Check, episodes: Sequence[Episode]) -> None:
    """Notes scores of a judge that cannot have looked."""
    try:
        answer = check.ask(episodes[:2])
    except Exception:  # an error of its own is an answer of `failed`
        return
    given = answer if isinstance(answer, Sequence) else [answer]
    honest = (Feedback, Comparison)
    scored = [a for a in given if not isinstance(a, honest) or a.status == "scored"]
    if scored:
        check.faults.append(
            f"where what it asks fails it answers {short(scored[0])}: a failure is never a score."
            " Return Feedback.failed(episode.id, reason), or let the error through"
        )


def plain(answer: Feedback | Comparison) -> dict[str, Any]:
    """Returns what an answer says, without its id and the engine's stamp."""
    found = dataclasses.asdict(answer)
    return {key: value for key, value in found.items() if key not in ("stamp", "id")}


def _tiers(answer: Comparison) -> list[frozenset[str]]:
    return [frozenset(tier) for tier in answer.ranking]


def _alike(one: Any, other: Any) -> bool:
    """Returns whether answers say the same, whatever their conversations are called; numbers up to
    the rounding of a batch in float32."""
    given = [list(a) if isinstance(a, list | tuple) else [a] for a in (one, other)]
    if len(given[0]) != len(given[1]):
        return False
    return all(
        a == b
        if not (isinstance(a, Feedback) and isinstance(b, Feedback))
        else a.status == b.status
        and _near(a.score, b.score)
        and _near(a.turn_scores, b.turn_scores)
        for a, b in zip(*given, strict=True)
    )


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, Sequence) and isinstance(other, Sequence):
        return len(one) == len(other) and all(map(_near, one, other))
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5)


def _words(answers: Any) -> str:
    return short(answers[0] if isinstance(answers, Sequence) and answers else answers)
