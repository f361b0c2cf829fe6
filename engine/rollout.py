"""Plays many environments against one player, and gives back episodes.

The schedule is deterministic: conversations take their turns together in a fixed order, environments step in slot order, and
sampling noise is keyed by (seed, update, start, slot, turn). Playing the same starts again gives the same episodes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import gymnasium

from .environment import Observation, PlayerFunction, Stepper, make_instance, snapshot
from .episode import Ending, Episode, Message, Start, Turn, derive_id

if TYPE_CHECKING:
    from .policy import Backend, Policy, Sampling

Progress = Callable[[int, int], None]  # (episodes finished, episodes in all)


class TooManyFailures(RuntimeError):
    """More environments or judges failed than the run allows."""


@dataclass(frozen=True, slots=True)
class Where:
    """Where in a run episodes are played; their ids and their noise derive from it."""

    run: str = ""
    stage: str = ""
    update: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Branch:
    """Where a conversation is continued anew: its first `turn` turns are played again, token for token, then the player goes on."""

    parent: Episode
    turn: int

    @property
    def origin(self) -> tuple[str, int]:
        return (self.parent.id, self.turn)

    @property
    def said(self) -> tuple[Turn, ...]:
        return self.parent.turns[: self.turn]


def episode_id(where: Where, start: Start | Branch, slot: int) -> str:
    """The id of the episode played there from this start or branch, in this slot of its group."""
    key = start.key if isinstance(start, Start) else start.origin
    return derive_id(where.run, where.stage, where.update, key, slot)


@dataclass(slots=True)
class _Talk:
    """One episode in the making."""

    index: int
    start: Start
    slot: int
    row: int
    env: gymnasium.Env[str, str]
    branch: Branch | None = None
    heard: Message | None = None
    turns: list[Turn] = field(default_factory=list)
    reset: Observation | None = None
    ids: list[int] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)  # ids since the last sampled token
    state: Any = None  # what the player keeps: a backend's conversation, or a script

    @property
    def messages(self) -> list[Message]:
        assert self.reset is not None
        said = [Message("system", self.reset.system)] if self.reset.system is not None else []
        for turn in self.turns:
            said += [turn.observation, Message("assistant", turn.action)]
        return [*said, self.heard] if self.heard else said


@dataclass(frozen=True, slots=True)
class Reply:
    """A player's reply to one conversation; None as `text`: it cannot go on, because of `stop` ("context")."""

    text: str | None
    prompt_ids: tuple[int, ...] = ()
    action_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    version: int = 0
    cut: bool = False
    stop: str = ""


class Player(Protocol):
    """Whatever replies: a policy, a script, a person."""

    rows: int
    history: Literal["append", "rerender"]

    def begin(self, talk: _Talk, where: Where) -> None: ...

    def reply(self, talks: Sequence[_Talk], where: Where) -> Sequence[Reply]: ...

    def final_ids(self, talk: _Talk) -> tuple[int, ...]: ...


class PolicyPlayer:
    """A policy as a player: renders observations into ids, samples replies through a backend.

    Args:
        policy: the policy.
        backend: what samples for it; default: in process.
        sampling: temperature and length of replies.
        history: "append" trains on exactly the sampled context; "rerender" renders the whole conversation anew at every turn,
            for templates that must rewrite history, and trains one row per turn.
    """

    def __init__(
        self,
        policy: Policy,
        sampling: Sampling,
        backend: Backend | None = None,
        history: Literal["append", "rerender"] = "append",
    ) -> None:
        from .policy.backends import InProcess

        self.policy, self.sampling, self.history = policy, sampling, history
        self.backend: Backend = backend if backend is not None else InProcess(policy)
        self.rows = self.backend.rows

    def begin(self, talk: _Talk, where: Where) -> None:
        from .policy.backends import Conversation

        assert talk.reset is not None
        talk.state = Conversation(talk.row)
        if talk.turns:
            talk.ids = [i for turn in talk.turns for i in (*turn.prompt_ids, *(turn.action_ids or ()))]
        else:
            talk.ids = talk.fresh = self.policy.chat.prompt(talk.messages, talk.reset.tools)

    def reply(self, talks: Sequence[_Talk], where: Where) -> list[Reply]:
        replies: list[Reply | None] = [None] * len(talks)
        asked = []
        for i, talk in enumerate(talks):
            self._hear(talk)
            if len(talk.ids) >= self.policy.context_length:
                replies[i] = Reply(None, stop="context")
                continue
            conversation = talk.state
            conversation.ids = talk.ids
            conversation.messages = talk.messages
            key = (where.seed, where.update, talk.start.key, talk.slot, len(talk.turns))
            place = (where.stage, talk.branch.parent.slot, talk.branch.turn) if talk.branch else ()
            conversation.seed = int(derive_id("noise", *key, *place), 16)
            asked.append(i)
        samples = self.backend.reply([talks[i].state for i in asked], self.sampling) if asked else []
        for i, sample in zip(asked, samples, strict=True):
            talk = talks[i]
            prompt = tuple(talk.ids if self.history == "rerender" else talk.fresh)
            talk.ids = talk.ids + list(sample.ids)
            special = bool(talk.env.metadata.get("special_tokens", False))
            replies[i] = Reply(
                self.policy.chat.text(sample.ids, special=special),
                prompt,
                sample.ids,
                sample.logprobs,
                self.policy.version,
                sample.cut,
            )
            talk.fresh = []
        return [reply for reply in replies if reply is not None]

    def _hear(self, talk: _Talk) -> None:
        """Appends the latest observation to the ids, closing a reply that did not close itself."""
        if not talk.turns or talk.fresh:
            return
        if self.history == "rerender":
            assert talk.reset is not None
            talk.ids = self.policy.chat.prompt(talk.messages, talk.reset.tools)
            talk.state.cached = 0
            talk.fresh = talk.ids
            return
        assert talk.heard is not None
        assert talk.reset is not None
        chat = self.policy.chat
        talk.fresh = chat.close(talk.ids) + chat.suffix(talk.heard, talk.reset.tools)
        talk.ids = talk.ids + talk.fresh

    def final_ids(self, talk: _Talk) -> tuple[int, ...]:
        """Ids from the last sampled token to where the policy would have replied, as far as they fit the context."""
        if not talk.turns or talk.turns[-1].action_ids is None:
            return ()
        self._hear(talk)
        room = max(0, self.policy.context_length - (len(talk.ids) - len(talk.fresh)))
        if self.history == "rerender":  # the whole context anew, or nothing: then the last reply's own row serves
            return tuple(talk.ids) if len(talk.ids) <= self.policy.context_length else ()
        return tuple(talk.fresh[:room])


class ScriptPlayer:
    """A scripted player: one of an environment's own (`"expert"`), or any function from a conversation to a reply.

    Args:
        player: name of one of the environment's players, or a function.
    """

    history: Literal["append", "rerender"] = "append"
    rows = 256

    def __init__(self, player: str | PlayerFunction) -> None:
        self.player = player

    def begin(self, talk: _Talk, where: Where) -> None:
        if callable(self.player):
            talk.state = self.player
            return
        players: Mapping[str, Any] = getattr(talk.env.unwrapped, "players", None) or {}
        if self.player not in players:
            raise LookupError(
                f"environment {talk.start.env!r} has no player {self.player!r}; it has: {', '.join(players) or 'none'}"
            )
        place = (where.stage, talk.branch.parent.slot, talk.branch.turn) if talk.branch else ()
        noise = random.Random(derive_id("player", where.seed, where.update, talk.start.key, talk.slot, *place))
        talk.state = players[self.player](talk.env.unwrapped, noise)

    def reply(self, talks: Sequence[_Talk], where: Where) -> list[Reply]:
        return [Reply(str(talk.state([m for m in talk.messages if m.role != "system"]))) for talk in talks]

    def final_ids(self, talk: _Talk) -> tuple[int, ...]:
        return ()


def rollout(
    player: Player,
    starts: Iterable[tuple[Start | Branch, int]],
    where: Where = Where(),
    *,
    max_turns: int = 1000,
    step_limit: float = 60.0,
    max_failure_rate: float = 1.0,
    progress: Progress | None = None,
) -> list[Episode]:
    """Plays one episode per start and slot, as many at a time as the player has rows for.

    A conversation that ends frees its row for the next start. One whose environment raises, hangs or breaks its space ends as
    `failed`, alone.

    Args:
        player: who replies.
        starts: (start, slot in its group). A branch is a start too: its environment is brought to that turn by playing the same replies
            again, or copied where it can be; one that then says something else ends as `failed`.
        where: for ids and noise.
        max_turns: truncates longer episodes with reason "max_turns".
        step_limit: seconds a reset or step may take.
        max_failure_rate: share of failed episodes above which the play stops.
        progress: called after every round of turns.

    Returns:
        the episodes, in the order of the starts.

    Raises:
        LookupError, TypeError: an environment that does not exist or does not take text.
        TooManyFailures: more environments failed than allowed; the message quotes the reasons.
    """
    waiting = list(enumerate(starts))[::-1]
    total = len(waiting)
    done: dict[int, Episode] = {}
    alive: list[_Talk] = []
    rows = list(range(player.rows))[::-1]
    idle: dict[str, list[gymnasium.Env[str, str]]] = {}
    stepper = Stepper(step_limit)
    awaited = Counter(start.origin for _, (start, _) in waiting if isinstance(start, Branch))
    copies: dict[
        tuple[str, int], tuple[gymnasium.Env[str, str], list[Observation]]
    ] = {}  # states that more branches start from

    def finish(talk: _Talk, ending: Ending, reason: str, final: Message | None) -> None:
        talk.heard = final
        final_ids = player.final_ids(talk) if ending == "truncated" and final is not None else ()
        reset = talk.reset
        done[talk.index] = Episode(
            id=episode_id(where, talk.branch or talk.start, talk.slot),
            start=talk.start,
            turns=tuple(talk.turns),
            ending=ending,
            reason=reason,
            run=where.run,
            stage=where.stage,
            update=where.update,
            slot=talk.slot,
            origin=talk.branch.origin if talk.branch else None,
            system=reset.system if reset else None,
            tools=reset.tools if reset else (),
            final=final,
            final_ids=final_ids,
            history=player.history,
            info=dict(reset.info) if reset else {},
        )
        rows.append(talk.row)
        rows.sort(reverse=True)
        if ending != "failed":  # a broken environment is not used again
            idle.setdefault(derive_id(talk.start.env, talk.start.kwargs), []).append(talk.env)
        alive.remove(talk)
        failed = [e for e in done.values() if e.ending == "failed"]
        if len(failed) > max_failure_rate * total:
            reasons = sorted({e.reason for e in failed})[:3]
            raise TooManyFailures(
                f"{len(failed)} of {total} episodes failed in their environment, more than max_failure_rate={max_failure_rate:g} "
                f"allows. Reasons: {'; '.join(reasons)}"
            )

    try:
        while waiting or alive:
            # Free rows take the next starts.
            begun = []
            while waiting and rows:
                index, (origin, slot) = waiting.pop()
                branch = origin if isinstance(origin, Branch) else None
                start = origin.parent.start if isinstance(origin, Branch) else origin
                pool = idle.get(derive_id(start.env, start.kwargs))
                env = pool.pop() if pool else make_instance(start.env, **start.kwargs)
                talk = _Talk(index, start, slot, rows.pop(), env, branch)
                alive.append(talk)
                begun.append(talk)
            for talk, (seen, why) in zip(begun, _reach(stepper, begun, copies, awaited), strict=True):
                if not why and talk.branch:
                    why = _differs(talk.branch, seen)
                if why:
                    finish(talk, "failed", why, None)
                    continue
                talk.reset, talk.heard = seen[0], seen[-1].message
                if talk.branch:
                    talk.turns = list(talk.branch.said)
                player.begin(talk, where)

            # Everybody replies, then every environment steps.
            talks = list(alive)
            replies = player.reply(talks, where) if talks else []
            stepping = []
            for talk, reply in zip(talks, replies, strict=True):
                if reply.text is None:
                    finish(talk, "truncated", reply.stop, talk.heard)
                else:
                    stepping.append((talk, reply))
            results = stepper.step([(talk.env, reply.text or "") for talk, reply in stepping])
            for (talk, reply), (observation, why) in zip(stepping, results, strict=True):
                assert talk.heard is not None
                talk.turns.append(
                    Turn(
                        talk.heard,
                        reply.text or "",
                        observation.reward if observation else 0.0,
                        reply.prompt_ids,
                        reply.action_ids,
                        reply.logprobs,
                        reply.version,
                        reply.cut,
                        dict(observation.info) if observation else {},
                    )
                )
                if observation is None:
                    finish(talk, "failed", f"step {len(talk.turns)}: {why}", None)
                    continue
                talk.heard = observation.message
                if observation.terminated:
                    finish(talk, "terminated", "", observation.message)
                elif observation.truncated:
                    finish(talk, "truncated", str(observation.info.get("reason", "environment")), observation.message)
                elif len(talk.turns) >= max_turns:
                    finish(talk, "truncated", "max_turns", observation.message)
            if progress:
                progress(len(done), total)
    finally:
        stepper.close()
        for pool in idle.values():
            for env in pool:
                env.close()
    return [done[i] for i in range(total)]


def _reach(
    stepper: Stepper,
    talks: Sequence[_Talk],
    copies: dict[tuple[str, int], tuple[gymnasium.Env[str, str], list[Observation]]],
    awaited: Counter[tuple[str, int]],
) -> list[tuple[list[Observation], str]]:
    """Brings every conversation's environment to where it begins: by reset, by playing a branch's replies again, or from a copy."""
    found: dict[int, tuple[list[Observation], str]] = {}
    origins = [talk.branch.origin if talk.branch else None for talk in talks]
    first = [i for i, origin in enumerate(origins) if origin is None or (origin not in copies and origin not in origins[:i])]
    for wave in (first, [i for i in range(len(talks)) if i not in set(first)]):
        replayed = []
        for i in wave:
            origin, talk = origins[i], talks[i]
            if origin in copies:
                state, seen = copies[origin]
                copied = snapshot(state)
            else:
                copied = None
            if copied is None:
                replayed.append(i)
            else:
                talk.env.close()
                talk.env, found[i] = copied, (seen, "")
        jobs = [
            (t.env, t.start, [turn.action for turn in t.branch.said] if t.branch else []) for t in (talks[i] for i in replayed)
        ]
        for i, (seen, why) in zip(replayed, stepper.restore(jobs), strict=True):
            found[i] = (seen, why)
            origin = origins[i]
            if origin is not None and not why and awaited[origin] > 1 and origin not in copies:
                kept = snapshot(talks[i].env)
                if kept is not None:
                    copies[origin] = (kept, seen)
        for i in wave:
            origin = origins[i]
            if origin is not None:
                awaited[origin] -= 1
                if not awaited[origin]:
                    copies.pop(origin, None)
    return [found[i] for i in range(len(talks))]


def _differs(branch: Branch, seen: Sequence[Observation]) -> str:
    """Why a replay is not the conversation it branches off from, if it is not."""
    recorded = [turn.observation for turn in branch.parent.turns[: branch.turn + 1]]
    replayed = [observation.message for observation in seen]
    if replayed[: len(recorded)] == recorded and len(replayed) == branch.turn + 1:
        return ""
    same = next(
        (k for k, (a, b) in enumerate(zip(recorded, replayed, strict=False)) if a != b), min(len(recorded), len(replayed))
    )
    return (
        f"replay: the same replies led to another observation at turn {same + 1}; an environment whose words depend on more than its seed "
        "and the replies cannot be branched"
    )
