"""Plays many environments against one player, and gives back episodes.

The schedule is deterministic: a policy's conversations take their turns together in a fixed order,
serial environments step in slot order, and sampling noise is keyed by (seed, update, start, slot,
turn). Playing the same starts again gives the same episodes. Scripts, which do not mind who else is
replied to, go ahead as soon as their environment has answered. With the schedule "ready-first" a
policy does too: it replies to those whose environments have answered while the others are at work.
The noise is the same, so that replies differ by the rounding of another batch only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Literal

from ..environments.instance import Instance
from ..environments.pool import Environments
from ..errors import TooManyFailures
from ..records.episode import Ending, Episode, Start, Turn
from ..util.ids import derive_id
from ..util.secrets import redact
from ..util.wording import each_text, reason_text
from .arriving import Call, ConversationFailed, States, arrive
from .conversation import Branch, LiveEpisode, Reply, Where, episode_id, spoken
from .players import Player, ScriptPlayer, in_order

Schedule = Literal["deterministic", "ready-first"]
Progress = Callable[[int, int], None]  # (episodes finished, episodes in all)


def _without_secrets(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `info` as it is stored.

    Its names are the environment's (`info["secret"]` may be the word to guess): only texts tell
    secrets.
    """
    return dict(each_text(redact, info))


def _converse(
    live: LiveEpisode, player: Player, where: Where, max_turns: int, known: States
) -> Generator[Call, Any, tuple[Ending, str]]:
    """Plays one conversation from where it begins to its end. Returns how it ended, and why.

    Raises:
        ConversationFailed: its environment, or a player of the environment's, failed.
    """
    own = (
        player.player
        if isinstance(player, ScriptPlayer) and isinstance(player.player, str)
        else None
    )
    if live.env.traits is None:
        yield ("make",)
    assert live.env.traits is not None
    if own is not None and own not in live.env.traits.players:
        has = ", ".join(live.env.traits.players) or "none"
        raise LookupError(f"environment {live.start.env!r} has no player {own!r}; it has: {has}")
    yield from arrive(live, known)
    player.begin(live, where)
    if own is not None:
        place = (where.stage, live.branch.parent.slot, live.branch.turn) if live.branch else ()
        yield (
            "player",
            own,
            derive_id("player", where.seed, where.update, live.start.key, live.slot, *place),
        )
    while True:
        reply = Reply((yield ("reply", spoken(live)))) if own is not None else (yield None)
        if reply.failed:
            raise ConversationFailed(reply.stop)
        if reply.text is None:
            return "truncated", reply.stop
        assert live.observation is not None
        sampled = (reply.prompt_ids, reply.action_ids, reply.logprobs, reply.version, reply.cut)
        answered, live.observation = live.observation, None
        try:
            observation = yield ("step", reply.text)
        except ConversationFailed:
            live.turns.append(Turn(answered, reply.text, 0.0, *sampled))
            raise
        live.turns.append(
            Turn(
                answered,
                reply.text,
                observation.reward,
                *sampled,
                _without_secrets(observation.info),
            )
        )
        live.observation = observation.message
        if observation.terminated:
            return "terminated", ""
        if observation.truncated:
            return "truncated", reason_text(str(observation.info.get("reason", "environment")))
        if len(live.turns) >= max_turns:
            return "truncated", "max_turns"


def rollout(
    player: Player,
    starts: Iterable[tuple[Start | Branch, int]],
    where: Where = Where(),
    *,
    max_turns: int = 1000,
    step_limit: float = 60.0,
    max_failure_rate: float = 1.0,
    schedule: Schedule = "deterministic",
    progress: Progress | None = None,
    ended: Callable[[Episode], None] | None = None,
    environments: Environments | None = None,
) -> list[Episode]:
    """Plays one episode per start and slot, as many at a time as the player has rows for.

    A conversation that ends frees its row for the next start. One whose environment raises, hangs
    or breaks its space (when it is made, reset or stepped, or in one of its players) ends as
    `failed`, alone.

    Args:
        player: who replies.
        starts: (start, slot in its group). A branch is a start too: its environment is brought to
            that turn by playing the same replies again, or copied where it can be; one that then
            replies with another observation ends as `failed`.
        where: for ids and noise.
        max_turns: truncates longer episodes with reason "max_turns".
        step_limit: seconds that making, a reset, a step, a reply of an environment's player, or
            closing may take.
        max_failure_rate: share of failed episodes above which the play stops.
        schedule: "deterministic": a policy replies to all together; "ready-first": to those that
            wait for it.
        progress: called whenever conversations have ended.
        ended: called with every episode when it has ended, while others are played.
        environments: those to play in, kept by the caller for the next time; default: made here and
            closed at the end.

    Returns:
        the episodes, in the order of the starts.

    Raises:
        LookupError: an environment or a player that does not exist.
        TooManyFailures: more environments failed than allowed; the message quotes the reasons.
    """
    own = environments if environments is not None else Environments()
    own.limit = step_limit
    play = _Play(player, list(starts), where, max_turns, max_failure_rate, schedule, own)
    play.progress, play.ended = progress, ended
    try:
        return play.episodes()
    finally:
        play.end()
        if environments is None:
            own.close()


class _Play:
    """A rollout in progress: which conversations wait, which are alive and for what."""

    def __init__(
        self,
        player: Player,
        starts: Sequence[tuple[Start | Branch, int]],
        where: Where,
        max_turns: int,
        max_failure_rate: float,
        schedule: Schedule,
        environments: Environments,
    ) -> None:
        self.player, self.where, self.max_turns = player, where, max_turns
        self.max_failure_rate, self.total, self.environments = (
            max_failure_rate,
            len(starts),
            environments,
        )
        self.waiting = dict(enumerate(starts))
        self.rows = list(range(player.rows))[::-1]
        self.alive: dict[
            Instance, tuple[LiveEpisode, Generator[Call, Any, tuple[Ending, str]]]
        ] = {}
        self.silent: dict[Instance, None] = {}  # those who wait for a reply
        self.called: dict[Instance, str] = {}  # those who wait for their environment, and for what
        self.progress: Progress | None = None
        self.ended: Callable[[Episode], None] | None = None
        self.done: dict[int, Episode] = {}
        self.failed: list[str] = []
        self.known = States(
            Counter(start.origin for start, _ in starts if isinstance(start, Branch))
        )
        self.together = not isinstance(player, ScriptPlayer) and schedule == "deterministic"

    def episodes(self) -> list[Episode]:
        """Plays all episodes. Where the schedule is deterministic a policy replies when every
        environment has answered; else a player replies to those that wait, when it has looked for
        others that do."""
        while self.waiting or self.alive:
            if not self.together or all(
                self.alive[instance][0].reset is None for instance in self.called
            ):
                self._begin()
            if self.silent and self.called and not self.together:
                self._listen(block=False)
            if self.silent and not (self.together and self.called):
                self._reply()
            else:
                self._listen(block=True)
        return [self.done[i] for i in range(self.total)]

    def _listen(self, *, block: bool) -> None:
        """Goes on with the conversations whose environments have answered."""
        ended = len(self.done)
        for instance, value, reason in self.environments.wait(block=block):
            place = self.called.pop(instance)
            self._advance(instance, value, f"{place}: {reason}" if reason else "")
        self._show(ended)

    def _show(self, before: int) -> None:
        if self.progress and len(self.done) > before:
            self.progress(len(self.done), self.total)

    def _begin(self) -> None:
        """Starts conversations in free rows, as far as their environments are available."""
        full: set[str] = set()
        for index, (origin, slot) in list(self.waiting.items()) if self.rows else ():
            branch = origin if isinstance(origin, Branch) else None
            start = origin.parent.start if isinstance(origin, Branch) else origin
            if start.env in full or (branch and self._copied_soon(branch)):
                continue
            instance = self.environments.take(start.env, start.kwargs)
            if instance is None:
                full.add(start.env)
                continue
            del self.waiting[index]
            if branch:
                self.known.reaching.add(branch.origin)
            live = LiveEpisode(index, start, slot, self.rows.pop(), instance, branch)
            self.alive[instance] = (
                live,
                _converse(live, self.player, self.where, self.max_turns, self.known),
            )
            self._advance(instance, None)
            if not self.rows:
                return

    def _copied_soon(self, branch: Branch) -> bool:
        """Returns whether another conversation is on the way to where this branch begins, so that
        it can be copied then."""
        origin = branch.origin
        if (
            origin in self.known.copies
            or origin in self.known.alone
            or origin not in self.known.reaching
        ):
            return False
        metadata = self.environments.metadata(branch.parent.start.env)
        return metadata is None or bool(metadata.get("snapshots", False))

    def _asking(self) -> list[LiveEpisode]:
        """Takes those who wait for a reply, in the order in which they began."""
        asking = [live for instance, (live, _) in self.alive.items() if instance in self.silent]
        self.silent.clear()
        return asking

    def _reply(self) -> None:
        asking, ended = self._asking(), len(self.done)
        if self.together:
            replies = in_order(asking, self.player.reply(asking, self.where))
            for live, reply in zip(asking, replies, strict=True):
                self._advance(live.env, reply)
        else:
            for live, reply in self.player.reply(asking, self.where, self._arriving):
                self._advance(live.env, reply)
        self._show(ended)

    def _arriving(self) -> list[LiveEpisode]:
        """Returns who has come to wait for a reply while others are replied to."""
        self._begin()
        self._listen(block=False)
        return self._asking()

    def _advance(self, instance: Instance, value: Any, failed: str = "") -> None:
        """Continues one conversation with what it waited for, or with its failure."""
        live, conversation = self.alive[instance]
        try:
            asked = (
                conversation.throw(ConversationFailed(failed))
                if failed
                else conversation.send(value)
            )
        except StopIteration as end:
            self._finish(instance, *end.value)
        except ConversationFailed as error:
            self._finish(instance, "failed", str(error))
        else:
            if asked is None:
                self.silent[instance] = None
                return
            verb, *arguments = asked
            live.steps += verb == "step"
            self.called[instance] = (
                f"step {live.steps}"
                if verb == "step"
                else "player"
                if verb == "reply"
                else str(verb)
            )
            self.environments.ask(instance, verb, *arguments)

    def _finish(self, instance: Instance, ending: Ending, reason: str) -> None:
        live, _ = self.alive.pop(instance)
        reset, final = live.reset, live.observation
        self.done[live.index] = Episode(
            id=episode_id(self.where, live.branch or live.start, live.slot),
            start=live.start,
            turns=tuple(live.turns),
            ending=ending,
            reason=reason,
            run=self.where.run,
            stage=self.where.stage,
            update=self.where.update,
            slot=live.slot,
            origin=live.branch.origin if live.branch else None,
            system=reset.system if reset else None,
            tools=reset.tools if reset else (),
            final=final,
            final_ids=(
                self.player.final_ids(live) if ending == "truncated" and final is not None else ()
            ),
            history=self.player.history,
            info=_without_secrets(reset.info) if reset else {},
        )
        self.rows.append(live.row)
        self.rows.sort(reverse=True)
        # A broken environment is not used again.
        self.environments.give(instance, sound=ending != "failed")
        if self.ended:
            self.ended(self.done[live.index])
        if ending == "failed":
            self.failed.append(reason)
        if len(self.failed) > self.max_failure_rate * self.total:
            reasons = sorted(set(self.failed))[:3]
            raise TooManyFailures(
                f"{len(self.failed)} of {self.total} episodes failed in their environment, more"
                f" than max_failure_rate={self.max_failure_rate:g} allows. Reasons:"
                f" {'; '.join(reasons)}"
            )

    def end(self) -> None:
        """Gives back what is still in use, after an error."""
        for instance in self.alive:
            self.environments.give(instance, sound=False)
