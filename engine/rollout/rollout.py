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
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from ..environments.instance import Instance
from ..environments.pool import Environments
from ..errors import ConfigError, Paused
from ..records.episode import Ending, Episode, Start
from ..util.ids import canonical_json, derive_id
from ..util.wording import NoRoomReason, PauseReason
from .arriving import ConversationFailed, States
from .conversation import Branch, LiveEpisode, Where, episode_id
from .elsewhere import Counting, Elsewhere, Progress, Schedule, plain, refuse_failures
from .match import Match, course, without_secrets
from .players import Player, PolicyPlayer, ScriptPlayer, in_order


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
    others: Mapping[str, Player] = {},
) -> list[Episode]:
    """Plays one episode per start and slot, as many at a time as the player has rows for.

    Starts that are seats of one match (`Start.match`) and have the same slot are played together,
    in one environment. In a seat that is not among the starts, the player that `Start.against`
    names replies, and nothing of it is recorded.

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
        others: other policies that `Start.against` names; what it names and is not here is a player
            of the environment's own.

    Returns:
        the episodes, in the order of the starts.

    Raises:
        LookupError: an environment or a player that does not exist.
        TooManyFailures: more environments failed than allowed; the message quotes the reasons.
    """
    if isinstance(player, PolicyPlayer) and isinstance(player.backend, Elsewhere):
        if odd := sorted(set(others) - {"policy"}):
            raise ConfigError(
                f"the policy {odd[0]!r} plays in a seat, and a backend that plays elsewhere has the"
                " policy that trains alone: take `backend: in-process`"
            )
        chosen, options = list(starts), plain(max_turns, step_limit, schedule)
        counting = Counting(chosen, where, max_failure_rate, progress, ended)
        player.backend.rollout(player, chosen, where, counting.take, options)
        return counting.episodes()
    own = environments if environments is not None else Environments()
    own.limit = step_limit
    play = _Rollout(player, list(starts), where, max_turns, max_failure_rate, schedule, own, others)
    play.progress, play.ended = progress, ended
    try:
        return play.episodes()
    finally:
        play.end()
        if environments is None:
            own.close()


class _Rollout:
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
        others: Mapping[str, Player],
    ) -> None:
        self.player, self.where, self.max_turns = player, where, max_turns
        self.max_failure_rate, self.total, self.environments = (
            max_failure_rate,
            len(starts),
            environments,
        )
        self.others = {**others, "policy": player}
        self.waiting = dict(enumerate(starts))
        # The environment that each is played in, by id and kwargs.
        self.kinds = [
            derive_id(start.env, start.kwargs)
            for start in (o.parent.start if isinstance(o, Branch) else o for o, _ in starts)
        ]
        # Where the seats of matches wait; those that have one seat need not be found.
        self.seated = {
            (start.key, slot): index
            for index, (start, slot) in self.waiting.items()
            if isinstance(start, Start) and start.seat
        }
        self.rows: dict[Player, list[int]] = {}
        self.alive: dict[Instance, Match] = {}
        self.silent: dict[Instance, LiveEpisode] = {}  # those who wait for a reply
        self.called: dict[Instance, str] = {}  # those who wait for their environment, and for what
        self.progress: Progress | None = None
        self.ended: Callable[[Episode], None] | None = None
        self.done: dict[int, Episode] = {}
        self.failed: list[str] = []
        self.known = States(
            Counter(start.origin for start, _ in starts if isinstance(start, Branch))
        )
        policies = any(not isinstance(each, ScriptPlayer) for each in self.others.values())
        self.together = policies and schedule == "deterministic"

    def episodes(self) -> list[Episode]:
        """Plays all episodes. Where the schedule is deterministic a policy replies when every
        environment has answered; else a player replies to those that wait, when it has looked for
        others that do."""
        while self.waiting or self.alive:
            if not self.together or all(self._arriving_yet(each) for each in self.called):
                self._begin()
            if self.silent and self.called and not self.together:
                self._listen(block=False)
            if self.silent and not (self.together and self.called):
                self._reply()
            else:
                self._listen(block=True)
        return [self.done[i] for i in range(self.total)]

    def _arriving_yet(self, instance: Instance) -> bool:
        """Returns whether an environment is still on its way to its first observation."""
        return self.alive[instance].first.reset is None

    def _listen(self, *, block: bool) -> None:
        """Goes on with the conversations whose environments have answered."""
        ended = len(self.done)
        for instance, value, reason in self.environments.wait(block=block):
            place = self.called.pop(instance)
            if isinstance(reason, PauseReason):
                raise Paused(reason)
            if isinstance(reason, NoRoomReason) and place == "reset":
                self._put_off(instance, reason)
                continue
            self._advance(instance, value, f"{place}: {reason}" if reason else "")
        self._show(ended)

    def _put_off(self, instance: Instance, reason: str) -> None:
        """Puts a match back to those that wait, in their order."""
        match = self.alive.pop(instance)
        match.course.close()
        for live in match.lives.values():
            self._free(live)
            if live.index is not None:
                self.waiting[live.index] = (live.branch or live.start, live.slot)
            if live.branch:
                self.known.awaited[live.branch.origin] += 1
        self.waiting = dict(sorted(self.waiting.items()))
        self.environments.has_no_room(instance, reason)

    def _free(self, live: LiveEpisode) -> None:
        """Gives a conversation's row back."""
        self.rows[live.player].append(live.row)
        self.rows[live.player].sort(reverse=True)

    def _show(self, before: int) -> None:
        if self.progress and len(self.done) > before:
            self.progress(len(self.done), self.total)

    def _begin(self) -> None:
        """Starts conversations in free rows, as far as their environments are available."""
        full: set[str] = set()
        if not self._has_room([self.player]):  # every match has a seat of its own
            return
        for index in list(self.waiting):
            if index not in self.waiting or self.kinds[index] in full:
                continue
            origin, slot = self.waiting[index]
            branch = origin if isinstance(origin, Branch) else None
            start = origin.parent.start if isinstance(origin, Branch) else origin
            if branch and self._copied_soon(branch):
                continue
            seats = self._seats(index, start, slot)
            if not self._has_room([player for _, _, player in seats]):
                if len(seats) == 1:
                    return
                continue
            instance = self.environments.take(start.env, start.kwargs)
            if instance is None:
                full.add(self.kinds[index])
                continue
            if branch:
                self.known.reaching.add(branch.origin)
            lives = {}
            for number, own, player in seats:
                if number is not None:
                    del self.waiting[number]
                row = self.rows[player].pop()
                lives[own.seat] = LiveEpisode(number, own, slot, player, row, instance, branch)
            played = course(lives, self.where, self.max_turns, self.known)
            self.alive[instance] = Match(lives, played)
            self._advance(instance, None)

    def _seats(self, index: int, start: Start, slot: int) -> list[tuple[int | None, Start, Player]]:
        """Returns the seats of the match that a start belongs to, in order: where they wait, their
        starts, and who replies."""
        if not start.seat:
            return [(index, start, self.player)]
        found: list[tuple[int | None, Start, Player]] = []
        for seat in sorted([start.seat, *start.against]):
            name = start.against.get(seat, "policy")
            own = start if seat == start.seat else start.in_seat(seat)
            number = self.seated.get((own.key, slot)) if name == "policy" else None
            known = number if number in self.waiting else None
            found.append((known, own, self.others.setdefault(name, ScriptPlayer(name))))
        return found

    def _has_room(self, players: Sequence[Player]) -> bool:
        """Returns whether every player has a free row for each conversation.

        Raises:
            ConfigError: one never has as many rows.
        """
        for player, count in Counter(players).items():
            free = self.rows.setdefault(player, list(range(player.rows))[::-1])
            if count > player.rows:
                raise ConfigError(
                    f"{count} seats of a match are played by one policy, and its backend has"
                    f" {player.rows} rows: give it more, `backend: {{name: in-process, rows: ...}}`"
                )
            if len(free) < count:
                return False
        return True

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
        start = branch.parent.start
        metadata = self.environments.metadata(start.env, start.kwargs)
        return metadata is None or bool(metadata.get("snapshots", False))

    def _asking(self, player: Player) -> list[LiveEpisode]:
        """Takes those who wait for a player's reply, in the order in which they began."""
        return [
            self.silent.pop(instance)
            for instance in list(self.alive)
            if instance in self.silent and self.silent[instance].player is player
        ]

    def _reply(self) -> None:
        ended = len(self.done)
        players = list(dict.fromkeys(live.player for live in self.silent.values()))
        if self.together:
            for player in players:
                asking = self._asking(player)
                replies = in_order(asking, player.reply(asking, self.where))
                for live, reply in zip(asking, replies, strict=True):
                    self._advance(live.env, reply)
        else:
            player = players[0]
            arriving = partial(self._arriving, player)
            for live, reply in player.reply(self._asking(player), self.where, arriving):
                self._advance(live.env, reply)
        self._show(ended)

    def _arriving(self, player: Player) -> list[LiveEpisode]:
        """Returns who has come to wait for a player's reply while others are replied to."""
        self._begin()
        self._listen(block=False)
        return self._asking(player)

    def _advance(self, instance: Instance, value: Any, failed: str = "") -> None:
        """Continues one match with what it waited for, or with its failure."""
        match = self.alive[instance]
        try:
            asked = (
                match.course.throw(ConversationFailed(failed))
                if failed
                else match.course.send(value)
            )
        except StopIteration as end:
            self._finish(instance, *end.value)
        except ConversationFailed as error:
            self._finish(instance, "failed", str(error))
        else:
            if isinstance(asked, LiveEpisode):
                self.silent[instance] = asked
                return
            verb, *arguments = asked
            match.first.steps += verb == "step"
            place = {"step": f"step {match.first.steps}", "reply": "player"}
            self.called[instance] = place.get(str(verb), str(verb))
            self.environments.ask(instance, verb, *arguments)

    def _finish(self, instance: Instance, ending: Ending, reason: str, seat: str = "") -> None:
        """Ends a match; `seat` is whose limit that was, where it was one's."""
        match = self.alive.pop(instance)
        for live in match.lives.values():
            self._free(live)
        others = f"{reason} of seat {seat}" if seat else reason
        episodes = [
            self._record(live, ending, reason if live.start.seat == seat else others)
            for live in match.recorded
        ]
        # A broken environment is not used again.
        self.environments.give(instance, sound=ending != "failed")
        for episode in episodes:
            if self.ended:
                self.ended(episode)
        if ending == "failed":
            self.failed += [reason] * len(match.recorded)
        refuse_failures(self.failed, self.total, self.max_failure_rate)

    def _record(self, live: LiveEpisode, ending: Ending, reason: str) -> Episode:
        assert live.index is not None
        reset, final = live.reset, live.observation
        episode = self.done[live.index] = Episode(
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
            tools=_offered(live),
            final=final,
            final_ids=(
                live.player.final_ids(live) if ending == "truncated" and final is not None else ()
            ),
            history=live.player.history,
            info=without_secrets(reset.info) if reset else {},
        )
        return episode

    def end(self) -> None:
        """Gives back what is still in use, after an error."""
        for instance in self.alive:
            self.environments.give(instance, sound=False)


def _offered(live: LiveEpisode) -> tuple[Mapping[str, Any], ...]:
    """Returns the tools of all contexts, each once."""
    tools = (tool for context in live.contexts.values() for tool in context.tools)
    return tuple({canonical_json(tool): tool for tool in tools}.values())
