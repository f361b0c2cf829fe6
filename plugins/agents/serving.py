"""A policy that is served: conversations with clients, recorded with what is needed to train on
them, and feedback on them whenever it comes.

A conversation begins with a request that goes on with none that is open, and it is open as long as
requests go on with it. When it has been idle for a while, when its place is needed, or when
feedback on it comes, it ends and is recorded in the ledger: an episode, with the ids and log-probs
of every reply. A request that goes on with it afterwards begins another one, which names it.

The thread that samples does everything else, too: the server's only puts what comes into a queue.
So replies are sampled together, and join the batch that is being sampled. What a request breaks is
its own conversation.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ...protocols import Episode, Start, Tokens, Turn
from ...running import RUN, SERVED, Ledger, LiveEpisode, Observation, PolicyPlayer, Reply, Where
from ...tools import derive_id, worded
from .clients import Client
from .contexts import REMEMBERED, Context, History, check, longest, observed, received
from .recording import Recorder, conversation_of
from .session import Pending
from .wire.form import Answered, Asked, Refused

LOOK = 0.2  # seconds between looks for conversations that are idle
ENDING = "the policy is being shut down"


@dataclass(slots=True, eq=False)
class _Conversation:
    """A conversation that is open.

    Attributes:
        continues: the one that had ended and that it goes on with.
        after: what is to be done when the reply that is being sampled has ended.
    """

    id: str
    client: Client
    live: LiveEpisode
    context: Context
    used: float
    continues: str = ""
    pending: Pending | None = None
    after: list[tuple[Callable[[], Any], Future[Any]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Place:
    """What a policy's player asks of where a conversation is played."""

    metadata: Mapping[str, Any]


class _Busy(Exception):
    """Something has to wait until a conversation's reply has ended."""

    def __init__(self, conversation: _Conversation) -> None:
        super().__init__()
        self.conversation = conversation


class Serving:
    """A policy that replies to clients.

    Args:
        player: the policy; its temperature and its limit of tokens are what is sampled by.
        models: the names that it answers to.
        ledger: where conversations are recorded; None: nowhere.
        ignore: options of requests that are passed over.
        redact: what takes out of every text what must not be recorded. A conversation in which it
            changes something is recorded without tokens, and never trains.
        idle: seconds after which a conversation ends.

    Attributes:
        temperature: what replies are sampled at.
    """

    def __init__(
        self,
        player: PolicyPlayer,
        models: Sequence[str] = ("policy",),
        ledger: Ledger | None = None,
        ignore: Sequence[str] = (),
        redact: Callable[[str], str] | None = None,
        idle: float = 600.0,
    ) -> None:
        self.player, self.models, self.ignore = player, tuple(models), tuple(ignore)
        self.recorder, self.idle = Recorder(ledger, redact), idle
        self.temperature = player.sampling.temperature
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting: deque[tuple[Client, Pending]] = deque()  # for a row
        self._open: list[_Conversation] = []
        self._rows = list(range(player.rows))[::-1]
        self._of: dict[LiveEpisode, _Conversation] = {}
        self._history = History()
        self._ended: dict[str, str] = {}  # ids, by what was in them; the latest ones
        self._where = Where(RUN, "serve", player.policy.version, uuid.uuid4().int % 2**32)
        self._stopping, self._over = threading.Event(), False
        self._closing = threading.Lock()  # held to settle whether something still comes in time
        self._looked = 0.0

    # On the server's thread.

    def submit(self, client: Client, asked: Asked, api: str) -> Pending:
        """Puts a request into the queue.

        Raises:
            Refused: it cannot be answered, or the policy is about to end.
        """
        check(asked, self.models, "by `--model`")
        if self._arrived.qsize() + len(self._waiting) > 20 * self.player.rows:
            raise Refused(503, "too many requests wait already; ask again later")
        pending = Pending(asked, api)
        self._put(client, pending)
        return pending

    def ask(self, work: Callable[[], Any]) -> Future[Any]:
        """Has something done between two tokens.

        Raises:
            Refused: the policy has ended.
        """
        done: Future[Any] = Future()
        self._put(work, done)
        return done

    def _put(self, what: Any, waiting: Any) -> None:
        with self._closing:
            if self._over or (self._stopping.is_set() and isinstance(waiting, Pending)):
                raise Refused(503, ENDING)
            self._arrived.put((what, waiting))

    def stop(self) -> None:
        """Ends `run`: what is being sampled is answered, and all conversations are recorded."""
        self._stopping.set()

    # On the thread that samples.

    def run(self) -> None:
        """Replies until it is stopped."""
        try:
            while not self._stopping.is_set():
                if lives := self._taken(LOOK):
                    arriving = partial(self._taken, 0.0)
                    for live, reply in self.player.reply(lives, self._where, arriving):
                        self._answer(self._of[live], reply)
        finally:
            self._stopping.set()
            with self._closing:
                self._over = True
            while not self._arrived.empty():
                self._take(self._arrived.get())
            for _, pending in self._waiting:
                pending.refuse(Refused(503, ENDING))
            for conversation in list(self._open):
                self._end(conversation)
            self.recorder.settle()

    def _taken(self, patience: float) -> list[LiveEpisode]:
        """Returns the conversations that have come to wait for a reply."""
        self._end_idle()
        try:
            self._take(
                self._arrived.get(timeout=patience) if patience else self._arrived.get_nowait()
            )
            while True:
                self._take(self._arrived.get_nowait())
        except queue.Empty:
            pass
        found = []
        for client, pending in [self._waiting.popleft() for _ in range(len(self._waiting))]:
            if pending.answer.cancelled():
                continue  # who asked has gone
            try:
                live = self._placed(client, pending)
            except Refused as refused:
                pending.refuse(refused)
            except Exception as error:  # of this request alone
                pending.refuse(Refused(400, f"the policy cannot read this: {worded(error)}"))
            else:
                if live is None:
                    self._waiting.append((client, pending))  # until a row is free
                else:
                    found.append(live)
        return found

    def _take(self, arrived: Any) -> None:
        """Takes what comes: a request waits for its place, other work is done."""
        what, waiting = arrived
        if isinstance(waiting, Pending):
            self._waiting.append((what, waiting))
            return
        if not waiting.running() and not waiting.set_running_or_notify_cancel():
            return
        try:
            waiting.set_result(what())
        except _Busy as busy:
            busy.conversation.after.append((what, waiting))
        except Exception as error:  # the client learns of it
            waiting.set_exception(error)

    def _placed(self, client: Client, pending: Pending) -> LiveEpisode | None:
        """Returns the conversation of a request, with its observation; None where there is no room
        for another one now.

        Raises:
            Refused: the response that it goes on from is not known.
        """
        asked = self._history.whole(pending.asked)
        idle = [c for c in self._open if c.client is client and c.pending is None]
        context = longest((c.context for c in idle), asked)
        if context is not None:
            conversation = next(c for c in idle if c.context is context)
            _, conversation.live.observation = observed(context.news(asked), _unknown, apart=False)
        elif (begun := self._begun(client, asked)) is not None:
            conversation = begun
        else:
            return None
        conversation.live.limit = asked.max_tokens
        conversation.pending = Pending(asked, pending.api, pending.answer)
        conversation.used = time.time()
        return conversation.live

    def _begun(self, client: Client, asked: Asked) -> _Conversation | None:
        """Returns a new conversation; the one that was idle longest makes room for it."""
        if not self._rows:
            resting = [c for c in self._open if c.pending is None]
            if not resting:
                return None
            self._end(min(resting, key=lambda c: c.used))
        id_ = uuid.uuid4().hex[:16]
        start = Start(SERVED, int(id_[:8], 16), {"conversation": id_})
        place: Any = _Place({"special_tokens": True, "sampled": True})
        system, message = observed(asked.messages, _unknown, apart=True)
        live = LiveEpisode(0, start, 0, self.player, self._rows[-1], place)
        live.reset = Observation(message, system=system, tools=tuple(asked.tools))
        live.enter(live.reset)
        live.observation = message
        self.player.begin(live, self._where)
        self._rows.pop()
        context, now = Context(asked.tools_key), time.time()
        conversation = _Conversation(id_, client, live, context, now, self._before(client, asked))
        self._open.append(conversation)
        self._of[live] = conversation
        return conversation

    def _before(self, client: Client, asked: Asked) -> str:
        """Returns the conversation that had ended and that a request goes on with; empty: none."""
        places = [i + 1 for i, m in enumerate(asked.messages) if m.role == "assistant"]
        known = (self._ended.get(_digest(client, asked.keys[:i])) for i in reversed(places))
        return next((id_ for id_ in known if id_ is not None), "")

    def _answer(self, conversation: _Conversation, reply: Reply) -> None:
        """Answers a request, and adds the reply to its conversation."""
        pending = conversation.pending
        assert pending is not None
        conversation.pending = None
        if reply.text is None:
            why = "the conversation is longer than the policy's context"
            why = why if reply.stop == "context" else reply.stop
            pending.refuse(Refused(400, f"the policy cannot reply: {why}"))
            conversation.live.observation = None
            self._end(conversation)
        else:
            answered = self._added(conversation, pending.asked, reply)
            conversation.used = time.time()
            pending.resolve(answered)
            self._do_what_waited(conversation)

    def _added(self, conversation: _Conversation, asked: Asked, reply: Reply) -> Answered:
        """Adds a reply to its conversation. Returns it as the client receives it."""
        live = conversation.live
        assert live.observation is not None
        assert reply.text is not None
        assert reply.action_ids is not None
        assert reply.logprobs is not None
        sampled = (reply.prompt_ids, reply.action_ids, reply.logprobs, reply.version, reply.cut)
        read = len(live.current.ids) - len(reply.action_ids)
        tokens = Tokens(read, self.player.pieces(reply.action_ids), reply.logprobs, reply.cut)
        id_ = f"{conversation.id}-{len(live.turns)}"
        live.turns.append(Turn(live.observation, reply.text, 0.0, *sampled))
        live.observation = None
        message = received(reply.text, asked.tools, id_)
        conversation.context.replied(asked, message)
        self._history.add(id_, asked, message)
        return Answered(id_, message, tokens)

    # What ends.

    def _end_idle(self) -> None:
        """Ends what has been idle, and tries again to record what could not be."""
        now = time.time()
        if now < self._looked + LOOK:
            return
        self._looked = now
        self.recorder.settle()
        for conversation in list(self._open):
            if conversation.pending is None and conversation.used + self.idle <= now:
                self._end(conversation)

    def _end(self, conversation: _Conversation) -> None:
        """Ends a conversation, and records it."""
        self._leave(conversation)
        if conversation.pending is not None:
            conversation.pending.refuse(Refused(503, ENDING))
        if conversation.live.turns:
            self._remember(conversation)
            self.recorder.add(self._episode(conversation))
        self._do_what_waited(conversation)

    def _do_what_waited(self, conversation: _Conversation) -> None:
        """Does what had to wait for a reply: feedback on the conversation, or its deletion."""
        waited, conversation.after = conversation.after, []
        for each in waited:
            self._take(each)

    def _remember(self, conversation: _Conversation) -> None:
        """Remembers what was in a conversation, for those that go on with it."""
        self._ended[_digest(conversation.client, conversation.context.messages)] = conversation.id
        while len(self._ended) > REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def _leave(self, conversation: _Conversation) -> None:
        """Takes a conversation out, and its row back."""
        self._open.remove(conversation)
        del self._of[conversation.live]
        self._rows.append(conversation.live.row)

    def _episode(self, conversation: _Conversation) -> Episode:
        """Returns a conversation as it is recorded."""
        live, policy = conversation.live, self.player.policy
        assert live.reset is not None
        info: dict[str, Any] = {
            "client": conversation.client.name,
            "temperature": self.temperature,
            "lineage": policy.lineage,
        }
        if conversation.continues:
            info["continues"] = conversation.continues
        return Episode(
            conversation.id, live.start, tuple(live.turns), "terminated", run=RUN, stage="serve",
            update=self._where.update, system=live.reset.system, tools=live.reset.tools, info=info,
        )  # fmt: skip

    # What else can be asked.

    def feedback(self, client: Client, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Records feedback on a conversation, its id or that of one of its responses in
        `conversation`; one that is open ends. See `Recorder.feedback`."""
        id_ = _id_in(given)
        if self.recorder.ledger is not None and (own := self._opened(client, id_)) is not None:
            self._end(own)
        return self.recorder.feedback(client.name, id_, given)

    def forget(self, client: Client, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Deletes a conversation, open or recorded, those that went on with it, and all feedback on
        them; it is named as in `feedback`."""
        id_ = _id_in(given)
        own, family, opened = self._opened(client, id_), [id_], list[_Conversation]()
        if own is None:
            family += self.recorder.later(client.name, id_)
        for conversation in self._open:  # in the order in which they began
            if conversation is own or conversation.continues in family:
                if conversation.pending is not None:
                    raise _Busy(conversation)
                opened.append(conversation)
                family.append(conversation.id)
        for conversation in opened:
            self._leave(conversation)
        for one in family:
            self._history.forget(one)
        trained = {} if own is not None else self.recorder.forget(family)
        found = [
            {"conversation": one, "run": run, "update": update}
            for one, (run, update) in trained.items()
        ]
        return {"conversation": id_, "deleted": list(dict.fromkeys(family)), "trained_in": found}

    def _opened(self, client: Client, id_: str) -> _Conversation | None:
        """Returns a client's conversation, where it is open.

        Raises:
            _Busy: it is being replied to.
        """
        own = next((c for c in self._open if c.id == id_ and c.client is client), None)
        if own is not None and own.pending is not None:
            raise _Busy(own)
        return own


def _unknown(before: Any, message: Any) -> None:
    """Knows no earlier reply: a client's words are what it sends."""


def _digest(client: Client, keys: Sequence[Any]) -> str:
    return derive_id(client.name, keys)


def _id_in(given: Mapping[str, Any]) -> str:
    """Returns the id of the conversation that is meant: its own, or in a response's.

    Raises:
        Refused: there is none.
    """
    name = given.get("conversation")
    if not isinstance(name, str) or not name:
        raise Refused(400, "`conversation` is needed: its id, or that of a response in it")
    return conversation_of(name)
