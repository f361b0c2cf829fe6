"""The course of one environment from its reset to its end: the seat that it addresses replies, and
the replies become turns of that seat's conversation. Most environments have one seat."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..environments.conventions import Observation, SeatResult
from ..records.episode import Ending, Turn
from ..util.ids import derive_id
from ..util.secrets import redactor
from ..util.wording import each_text, reason_text
from .arriving import Call, ConversationFailed, States, arrive, enter
from .conversation import LiveEpisode, Reply, Where, handed, spoken
from .players import ScriptPlayer


def without_secrets(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `info` as it is stored.

    Its names are the environment's (`info["secret"]` may be the word to guess): only texts tell
    secrets.
    """
    return dict(each_text(redactor(), info))


@dataclass(slots=True, eq=False)
class Match:
    """An environment in play, with a conversation for each of its seats; most have one.

    Attributes:
        lives: by seat.
        course: what happens, step by step; it asks for calls and replies, and returns how it ended,
            why, and the seat whose limit that was.
    """

    lives: Mapping[str, LiveEpisode]
    course: Generator[Call, Any, tuple[Ending, str, str]]

    @property
    def first(self) -> LiveEpisode:
        """The conversation by which the environment is reset and its steps are counted."""
        return next(iter(self.lives.values()))

    @property
    def recorded(self) -> list[LiveEpisode]:
        """The conversations that become episodes."""
        return [live for live in self.lives.values() if live.index is not None]


def _script(live: LiveEpisode) -> str | None:
    """Returns the name of the environment's own player that replies in a conversation, if one
    does."""
    player = live.player
    own = isinstance(player, ScriptPlayer) and isinstance(player.player, str)
    return player.player if own else None


def _addressed(lives: Mapping[str, LiveEpisode], seat: str, env: str) -> LiveEpisode:
    """Returns the conversation that an observation is for.

    Raises:
        ConversationFailed: the seat has no player.
    """
    if seat in lives:
        return lives[seat]
    if "" in lives:
        why = f"it plays several seats: say who replies in them, `seats: {{{seat!r}: policy, ...}}`"
    elif not seat:
        why = "it names no seat in info['player'], and `seats` says who replies in each"
    else:
        why = f"it asks seat {seat!r}, and `seats` has {', '.join(lives)}"
    raise ConversationFailed(f"seats: environment {env!r}: {why}")


def course(
    lives: Mapping[str, LiveEpisode], where: Where, max_turns: int, known: States
) -> Generator[Call, Any, tuple[Ending, str, str]]:
    """Plays the conversations of one environment from where they begin to their end. Returns how
    they ended, why, and the seat whose limit that was.

    Raises:
        ConversationFailed: the environment, or a player of the environment's, failed.
    """
    first = next(iter(lives.values()))
    env, instance = first.start.env, first.env
    if instance.traits is None:
        yield ("make",)
    assert instance.traits is not None
    for own in filter(None, map(_script, lives.values())):
        if own not in instance.traits.players:
            has = ", ".join(instance.traits.players) or "none"
            raise LookupError(f"environment {env!r} has no player {own!r}; it has: {has}")
    reset = yield from arrive(first, known)
    for live in lives.values():
        live.reset = reset
        if live is not first:
            enter(live, reset)
    observation, first.observation = first.observation, None
    live = _addressed(lives, reset.player, env)
    live.observation = observation
    begun: set[LiveEpisode] = set()
    while True:
        if live not in begun:
            begun.add(live)
            yield from _begin(live, where)
        replied = ("reply", spoken(live), live.start.seat)
        reply = (yield live) if _script(live) is None else Reply((yield replied))
        if reply.failed:
            raise ConversationFailed(reply.stop)
        if reply.text is None:
            return "truncated", reply.stop, live.start.seat
        seen = yield from _step(live, reply)
        for seat, result in seen.seats.items():
            _receive(_addressed(lives, seat, env), result)
        over = seen.terminated or seen.truncated
        ended = over and not seen.player
        receiver = live if ended else _addressed(lives, seen.player, env)
        receiver.observation = seen.message
        enter(receiver, seen)
        if seen.terminated:
            return "terminated", "", ""
        if seen.truncated:
            return "truncated", reason_text(str(seen.info.get("reason", "environment"))), ""
        if len(live.turns) >= max_turns:
            return "truncated", "max_turns", live.start.seat
        live = receiver


def _begin(live: LiveEpisode, where: Where) -> Generator[Call, Any, None]:
    """Prepares the player, when a conversation has its first observation."""
    live.player.begin(live, where)
    if (own := _script(live)) is not None:
        branch, start = live.branch, live.start
        place = (where.stage, branch.parent.slot, branch.turn) if branch else ()
        noise = derive_id("player", where.seed, where.update, start.key, live.slot, *place)
        yield ("player", own, noise, start.seat)


def _step(live: LiveEpisode, reply: Reply) -> Generator[Call, Any, Observation]:
    """Gives a reply to the environment, and makes a turn of it. Returns what was observed."""
    assert live.observation is not None
    assert reply.text is not None
    sampled = (reply.prompt_ids, reply.action_ids, reply.logprobs, reply.version, reply.cut)
    turn = Turn(live.observation, reply.text, 0.0, *sampled, live.context)
    live.observation = None
    try:
        seen: Observation = yield ("step", handed(live, live.turns, turn))
    except ConversationFailed:
        live.turns.append(turn)
        raise
    live.turns.append(replace(turn, reward=seen.reward, info=without_secrets(seen.info)))
    return seen


def _receive(live: LiveEpisode, result: SeatResult) -> None:
    """Adds what another seat's reply means for a seat to its own last turn; before its first one
    there is nothing that it could have earned it by."""
    if live.turns:
        last, news = live.turns[-1], without_secrets(result.info)
        live.turns[-1] = replace(
            last, reward=last.reward + result.reward, info={**last.info, **news}
        )
