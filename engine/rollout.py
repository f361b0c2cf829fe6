"""Plays many environments against one player, and gives back episodes.

The schedule is deterministic: a policy's conversations take their turns together in a fixed order, serial environments step in
slot order, and sampling noise is keyed by (seed, update, start, slot, turn). Playing the same starts again gives the same
episodes. Scripts, which do not mind who else is replied to, go ahead as soon as their environment has answered.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .environment import Observation, PlayerFunction, settle, text_of
from .episode import Ending, Episode, Message, Start, Turn, derive_id
from .instances import Environments, Instance
from .secrets import redact
from .wording import each_text, told, tried

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
    env: Instance
    branch: Branch | None = None
    heard: Message | None = None
    turns: list[Turn] = field(default_factory=list)
    reset: Observation | None = None
    ids: list[int] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)  # ids since the last sampled token
    state: Any = None  # what the player keeps: a backend's conversation
    steps: int = 0  # asked of the environment so far

    @property
    def messages(self) -> list[Message]:
        assert self.reset is not None
        said = [Message("system", self.reset.system)] if self.reset.system is not None else []
        for turn in self.turns:
            said += [turn.observation, Message("assistant", turn.action)]
        return [*said, self.heard] if self.heard else said


@dataclass(frozen=True, slots=True)
class Reply:
    """A player's reply to one conversation; None as `text`: it cannot go on, because of `stop` ("context"), and perhaps `failed`."""

    text: str | None
    prompt_ids: tuple[int, ...] = ()
    action_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    version: int = 0
    cut: bool = False
    stop: str = ""
    failed: bool = False


class Player(Protocol):
    """Whatever replies: a policy, a script, a person."""

    rows: int
    history: Literal["append", "rerender"]

    def begin(self, talk: _Talk, where: Where) -> None: ...

    def reply(self, talks: Sequence[_Talk], where: Where) -> Sequence[Reply]: ...

    def final_ids(self, talk: _Talk) -> tuple[int, ...]: ...


@contextlib.contextmanager
def _rendering() -> Iterator[None]:
    """What one environment says or offers, and the chat template cannot show, fails its own conversation.

    Raises:
        _Failed: the template refused.
    """
    from .policy import TemplateError

    try:
        yield
    except TemplateError as error:
        raise _Failed(f"template: {error}") from error


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
        self._most = policy.context_length * max(map(len, policy.chat.tokenizer.get_vocab()))

    def _overflows(self, talk: _Talk) -> bool:
        """Whether what was said is longer, in characters, than a context full of the longest token: then it need not be tokenized."""
        return sum(len(message.content) for message in talk.messages) > self._most

    def begin(self, talk: _Talk, where: Where) -> None:
        from .policy.backends import Conversation

        assert talk.reset is not None
        talk.state = Conversation(talk.row)
        if self._overflows(talk):
            return
        if talk.turns:
            talk.ids = [i for turn in talk.turns for i in (*turn.prompt_ids, *(turn.action_ids or ()))]
        else:
            with _rendering():
                talk.ids = talk.fresh = self.policy.chat.prompt(talk.messages, talk.reset.tools)

    def reply(self, talks: Sequence[_Talk], where: Where) -> list[Reply]:
        replies: list[Reply | None] = [None] * len(talks)
        asked = []
        for i, talk in enumerate(talks):
            overflows = self._overflows(talk)
            try:
                if not overflows:
                    self._hear(talk)
            except _Failed as error:
                replies[i] = Reply(None, stop=str(error), failed=True)
                continue
            if overflows or len(talk.ids) >= self.policy.context_length:
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
        assert talk.heard is not None
        assert talk.reset is not None
        chat = self.policy.chat
        with _rendering():
            if self.history == "rerender":
                talk.ids = talk.fresh = chat.prompt(talk.messages, talk.reset.tools)
                talk.state.cached = 0
            else:
                talk.fresh = chat.close(talk.ids) + chat.suffix(talk.heard, talk.reset.tools)
                talk.ids = talk.ids + talk.fresh

    def final_ids(self, talk: _Talk) -> tuple[int, ...]:
        """Ids from the last sampled token to where the policy would have replied, as far as they fit the context."""
        if not talk.turns or talk.turns[-1].action_ids is None or self._overflows(talk):
            return ()
        try:
            self._hear(talk)
        except _Failed:  # the template cannot show what came last: then nothing is known of that state
            return ()
        room = max(0, self.policy.context_length - (len(talk.ids) - len(talk.fresh)))
        if self.history == "rerender":  # the whole context anew, or nothing: then the last reply's own row serves
            return tuple(talk.ids) if len(talk.ids) <= self.policy.context_length else ()
        return tuple(talk.fresh[:room])


class ScriptPlayer:
    """A scripted player: one of an environment's own (`"expert"`), or any function from a conversation to a reply.

    A player of the environment's replies where the environment lives, under the same limit. A function is the caller's own: it
    runs in the calling thread for as long as it likes. What it raises, or says that is no text, fails the episode it replied in.

    Args:
        player: name of one of the environment's players, or a function; it may be a coroutine.
    """

    history: Literal["append", "rerender"] = "append"
    rows = 256

    def __init__(self, player: str | PlayerFunction) -> None:
        self.player = player

    def begin(self, talk: _Talk, where: Where) -> None:
        pass

    def reply(self, talks: Sequence[_Talk], where: Where) -> list[Reply]:
        assert callable(self.player)
        said = [tried(partial(self._say, self.player, _heard(talk))) for talk in talks]
        return [Reply(None, stop=f"player: {reason}", failed=True) if reason else Reply(text) for text, reason in said]

    @staticmethod
    def _say(player: PlayerFunction, heard: Sequence[Message]) -> str:
        return text_of(settle(player(heard)), "the reply")

    def final_ids(self, talk: _Talk) -> tuple[int, ...]:
        return ()


def _heard(talk: _Talk) -> list[Message]:
    return [m for m in talk.messages if m.role != "system"]


def _without_secrets(info: Mapping[str, Any]) -> dict[str, Any]:
    """`info` as it is kept. Its names are the environment's (`info["secret"]` may be the word to guess): only texts tell secrets."""
    return dict(each_text(redact, info))


class _Failed(Exception):
    """A conversation that ends as failed, and why."""


# A conversation asks for calls of its environment (a verb and its arguments) or, by None, for a reply.
_Asked = tuple[Any, ...] | None


def _converse(
    talk: _Talk, player: Player, where: Where, max_turns: int, known: _States
) -> Generator[_Asked, Any, tuple[Ending, str]]:
    """One conversation from where it begins to its end. Returns how it ended, and why.

    Raises:
        _Failed: its environment, or a player of the environment's, failed.
    """
    own = player.player if isinstance(player, ScriptPlayer) and isinstance(player.player, str) else None
    if talk.env.traits is None:
        yield ("make",)
    assert talk.env.traits is not None
    if own is not None and own not in talk.env.traits.players:
        has = ", ".join(talk.env.traits.players) or "none"
        raise LookupError(f"environment {talk.start.env!r} has no player {own!r}; it has: {has}")
    yield from _arrive(talk, known)
    player.begin(talk, where)
    if own is not None:
        place = (where.stage, talk.branch.parent.slot, talk.branch.turn) if talk.branch else ()
        yield ("player", own, derive_id("player", where.seed, where.update, talk.start.key, talk.slot, *place))
    while True:
        reply = Reply((yield ("reply", _heard(talk)))) if own is not None else (yield None)
        if reply.failed:
            raise _Failed(reply.stop)
        if reply.text is None:
            return "truncated", reply.stop
        assert talk.heard is not None
        said = (reply.prompt_ids, reply.action_ids, reply.logprobs, reply.version, reply.cut)
        heard, talk.heard = talk.heard, None
        try:
            observation = yield ("step", reply.text)
        except _Failed:
            talk.turns.append(Turn(heard, reply.text, 0.0, *said))
            raise
        talk.turns.append(Turn(heard, reply.text, observation.reward, *said, _without_secrets(observation.info)))
        talk.heard = observation.message
        if observation.terminated:
            return "terminated", ""
        if observation.truncated:
            return "truncated", told(str(observation.info.get("reason", "environment")))
        if len(talk.turns) >= max_turns:
            return "truncated", "max_turns"


@dataclass(slots=True)
class _States:
    """Turns from which more than one conversation goes on: reached once and then copied, where the environment can be.

    Attributes:
        awaited: how many conversations still begin there.
        reaching: turns that somebody is on the way to.
        alone: turns that turned out to be no states to copy: everybody gets there alone.
        copies: an environment's state and its observations, by turn.
    """

    awaited: Counter[tuple[str, int]]
    reaching: set[tuple[str, int]] = field(default_factory=set)
    alone: set[tuple[str, int]] = field(default_factory=set)
    copies: dict[tuple[str, int], tuple[Any, list[Observation]]] = field(default_factory=dict)


def _arrive(talk: _Talk, known: _States) -> Generator[_Asked, Any, None]:
    """Brings a conversation's environment to where it begins: by reset, by playing a branch's replies again, or from a copy."""
    branch = talk.branch
    origin = branch.origin if branch else None
    seen: list[Observation] = []
    try:
        if origin in known.copies:
            state, seen = known.copies[origin]
            if (yield ("adopt", state)):
                talk.steps = len(seen) - 1
            else:
                seen = []
        if not seen:
            seen = [(yield ("reset", talk.start.seed, talk.start.options))]
            for turn in branch.said if branch else ():
                if seen[-1].terminated or seen[-1].truncated:
                    break
                seen.append((yield ("step", turn.action)))
            copyable = talk.env.metadata.get("snapshots", False)
            if copyable and origin is not None and known.awaited[origin] > 1 and origin not in known.copies:
                state = yield ("copied",)
                if state is not None:
                    known.copies[origin] = (state, seen)
    finally:
        if origin is not None:
            known.reaching.discard(origin)
            if origin not in known.copies:
                known.alone.add(origin)
            known.awaited[origin] -= 1
            if not known.awaited[origin]:
                known.copies.pop(origin, None)
    if branch and (why := _differs(branch, seen)):
        raise _Failed(why)
    talk.reset, talk.heard = seen[0], seen[-1].message
    if branch:
        talk.turns = list(branch.said)


def rollout(
    player: Player,
    starts: Iterable[tuple[Start | Branch, int]],
    where: Where = Where(),
    *,
    max_turns: int = 1000,
    step_limit: float = 60.0,
    max_failure_rate: float = 1.0,
    progress: Progress | None = None,
    environments: Environments | None = None,
) -> list[Episode]:
    """Plays one episode per start and slot, as many at a time as the player has rows for.

    A conversation that ends frees its row for the next start. One whose environment raises, hangs or breaks its space (when it
    is made, reset or stepped, or in one of its players) ends as `failed`, alone.

    Args:
        player: who replies.
        starts: (start, slot in its group). A branch is a start too: its environment is brought to that turn by playing the same replies
            again, or copied where it can be; one that then says something else ends as `failed`.
        where: for ids and noise.
        max_turns: truncates longer episodes with reason "max_turns".
        step_limit: seconds that making, a reset, a step, a reply of an environment's player, or closing may take.
        max_failure_rate: share of failed episodes above which the play stops.
        progress: called whenever conversations have ended.
        environments: those to play in, kept by the caller for the next time; default: made here and closed at the end.

    Returns:
        the episodes, in the order of the starts.

    Raises:
        LookupError: an environment or a player that does not exist.
        TooManyFailures: more environments failed than allowed; the message quotes the reasons.
    """
    own = environments if environments is not None else Environments()
    own.limit = step_limit
    play = _Play(player, list(starts), where, max_turns, max_failure_rate, progress, own)
    try:
        return play.episodes()
    finally:
        play.end()
        if environments is None:
            own.close()


class _Play:
    """A rollout under way: which conversations wait, which are alive and for what."""

    def __init__(
        self,
        player: Player,
        starts: Sequence[tuple[Start | Branch, int]],
        where: Where,
        max_turns: int,
        max_failure_rate: float,
        progress: Progress | None,
        environments: Environments,
    ) -> None:
        self.player, self.where, self.max_turns, self.progress = player, where, max_turns, progress
        self.max_failure_rate, self.total, self.environments = max_failure_rate, len(starts), environments
        self.waiting = dict(enumerate(starts))
        self.rows = list(range(player.rows))[::-1]
        self.alive: dict[Instance, tuple[_Talk, Generator[_Asked, Any, tuple[Ending, str]]]] = {}
        self.silent: dict[Instance, None] = {}  # those who wait for a reply
        self.called: dict[Instance, str] = {}  # those who wait for their environment, and for what
        self.done: dict[int, Episode] = {}
        self.failed: list[str] = []
        self.known = _States(Counter(start.origin for start, _ in starts if isinstance(start, Branch)))
        self.together = not isinstance(player, ScriptPlayer)

    def episodes(self) -> list[Episode]:
        """Plays all. A policy replies when every conversation has heard its environment; a script whenever one has."""
        while self.waiting or self.alive:
            if not self.together or all(self.alive[instance][0].reset is None for instance in self.called):
                self._begin()
            if self.silent and not (self.together and self.called):
                self._reply()
                continue
            for instance, value, reason in self.environments.wait():
                place = self.called.pop(instance)
                self._advance(instance, value, f"{place}: {reason}" if reason else "")
            if self.progress:
                self.progress(len(self.done), self.total)
        return [self.done[i] for i in range(self.total)]

    def _begin(self) -> None:
        """Lets free rows take the next starts whose environments may be had."""
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
            talk = _Talk(index, start, slot, self.rows.pop(), instance, branch)
            self.alive[instance] = (talk, _converse(talk, self.player, self.where, self.max_turns, self.known))
            self._advance(instance, None)
            if not self.rows:
                return

    def _copied_soon(self, branch: Branch) -> bool:
        """Whether somebody is on the way to where this branch begins, so that it can be copied then."""
        origin = branch.origin
        if origin in self.known.copies or origin in self.known.alone or origin not in self.known.reaching:
            return False
        said = self.environments.metadata(branch.parent.start.env)
        return said is None or bool(said.get("snapshots", False))

    def _reply(self) -> None:
        asked = [instance for instance in self.alive if instance in self.silent]
        self.silent.clear()
        replies = self.player.reply([self.alive[instance][0] for instance in asked], self.where)
        for instance, reply in zip(asked, replies, strict=True):
            self._advance(instance, reply)

    def _advance(self, instance: Instance, value: Any, failed: str = "") -> None:
        """Goes on with one conversation: what it waited for is here, or failed."""
        talk, conversation = self.alive[instance]
        try:
            asked = conversation.throw(_Failed(failed)) if failed else conversation.send(value)
        except StopIteration as end:
            self._finish(instance, *end.value)
        except _Failed as error:
            self._finish(instance, "failed", str(error))
        else:
            if asked is None:
                self.silent[instance] = None
                return
            verb, *arguments = asked
            talk.steps += verb == "step"
            self.called[instance] = f"step {talk.steps}" if verb == "step" else "player" if verb == "reply" else str(verb)
            self.environments.ask(instance, verb, *arguments)

    def _finish(self, instance: Instance, ending: Ending, reason: str) -> None:
        talk, _ = self.alive.pop(instance)
        reset, final = talk.reset, talk.heard
        self.done[talk.index] = Episode(
            id=episode_id(self.where, talk.branch or talk.start, talk.slot),
            start=talk.start,
            turns=tuple(talk.turns),
            ending=ending,
            reason=reason,
            run=self.where.run,
            stage=self.where.stage,
            update=self.where.update,
            slot=talk.slot,
            origin=talk.branch.origin if talk.branch else None,
            system=reset.system if reset else None,
            tools=reset.tools if reset else (),
            final=final,
            final_ids=self.player.final_ids(talk) if ending == "truncated" and final is not None else (),
            history=self.player.history,
            info=_without_secrets(reset.info) if reset else {},
        )
        self.rows.append(talk.row)
        self.rows.sort(reverse=True)
        self.environments.give(instance, sound=ending != "failed")  # a broken environment is not used again
        if ending == "failed":
            self.failed.append(reason)
        if len(self.failed) > self.max_failure_rate * self.total:
            reasons = sorted(set(self.failed))[:3]
            raise TooManyFailures(
                f"{len(self.failed)} of {self.total} episodes failed in their environment, more than max_failure_rate="
                f"{self.max_failure_rate:g} allows. Reasons: {'; '.join(reasons)}"
            )

    def end(self) -> None:
        """Gives back what is still in use, after an error."""
        for instance in self.alive:
            self.environments.give(instance, sound=False)


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
