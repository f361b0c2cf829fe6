"""A policy that is served: conversations with clients, recorded with what is needed to train on
them, and feedback on them whenever it comes.

A conversation begins with a request that goes on with none that is open, and it is open as long as
requests go on with it. When it has been idle for a while, when its place is needed, or when
feedback on it comes, it ends and is recorded in the ledger: an episode, with the ids and log-probs
of every reply. A request that goes on with it afterwards begins another one.

The thread that samples does everything else, too: the server's only puts what comes into a queue.
So replies are sampled together, and join the batch that is being sampled.
"""

from __future__ import annotations

import queue
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Event
from typing import Any

from ...protocols import Episode, Feedback, LedgerError, Stamp, Start, Tokens, Turn
from ...running import RUN, SERVED, Ledger, LiveEpisode, Observation, PolicyPlayer, Reply, Where
from ...tools import derive_id
from .clients import Client
from .contexts import Context, History, check, longest, observed, received
from .redaction import redacted
from .session import Pending
from .users import score_in, text_in
from .wire.form import Answered, Asked, Refused

LOOK = 0.2  # seconds between looks for conversations that are idle


@dataclass(slots=True, eq=False)
class _Conversation:
    """A conversation that is open."""

    id: str
    client: Client
    live: LiveEpisode
    context: Context
    used: float
    pending: Pending | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """What a policy's player asks of where a conversation is played."""

    metadata: Mapping[str, Any]


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
        self.player, self.models, self.ledger = player, tuple(models), ledger
        self.ignore, self.redact, self.idle = tuple(ignore), redact, idle
        self.temperature = player.sampling.temperature
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting: deque[tuple[Client, Pending]] = deque()  # for a row
        self._open: list[_Conversation] = []
        self._rows = list(range(player.rows))[::-1]
        self._of: dict[LiveEpisode, _Conversation] = {}
        self._history = History()
        self._where = Where(RUN, "serve", player.policy.version, uuid.uuid4().int % 2**32)
        self._stopping = Event()

    # On the server's thread.

    def submit(self, client: Client, asked: Asked, api: str) -> Pending:
        """Puts a request into the queue.

        Raises:
            Refused: it cannot be answered, or the policy is about to end.
        """
        check(asked, self.models, "by `--model`")
        if self._stopping.is_set():
            raise Refused(503, "the policy is being shut down")
        if self._arrived.qsize() + len(self._waiting) > 20 * self.player.rows:
            raise Refused(503, "too many requests wait already; ask again later")
        pending = Pending(asked, api)
        self._arrived.put((client, pending))
        return pending

    def ask(self, work: Callable[[], Any]) -> Future[Any]:
        """Has something done between two tokens."""
        done: Future[Any] = Future()
        self._arrived.put((work, done))
        return done

    def stop(self) -> None:
        """Ends `run`: what is being sampled is answered, and all conversations are recorded."""
        self._stopping.set()

    # On the thread that samples.

    def run(self) -> None:
        """Replies until it is stopped."""
        try:
            while not self._stopping.is_set():
                self._end_idle()
                if lives := self._taken(LOOK):
                    arriving = lambda: self._taken(0.0)  # noqa: E731
                    for live, reply in self.player.reply(lives, self._where, arriving):
                        self._answer(self._of[live], reply)
        finally:
            self._stopping.set()
            while not self._arrived.empty():
                self._take(self._arrived.get())
            for _, pending in self._waiting:
                pending.refuse(Refused(503, "the policy is being shut down"))
            for conversation in list(self._open):
                self._end(conversation)

    def _taken(self, patience: float) -> list[LiveEpisode]:
        """Returns the conversations that have come to wait for a reply."""
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
            try:
                live = self._placed(client, pending)
            except Refused as refused:
                pending.refuse(refused)
                continue
            if live is None:
                self._waiting.append((client, pending))  # until a row is free
            else:
                found.append(live)
        return found

    def _take(self, arrived: Any) -> None:
        """Takes what comes: a request waits for its place, other work is done."""
        what, waiting = arrived
        if isinstance(waiting, Pending):
            if not waiting.answer.cancelled():
                self._waiting.append((what, waiting))
            return
        if not waiting.set_running_or_notify_cancel():
            return
        try:
            waiting.set_result(what())
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
        elif (begun := self._begun(client, asked)) is not None:
            conversation = begun
        else:
            return None
        live, opened = conversation.live, context is None
        news = asked.messages if opened else conversation.context.news(asked)
        system, message = observed(news, lambda before, m: None, apart=opened)
        if opened:
            tools = tuple(asked.tools)
            live.reset = Observation(message, system=system, tools=tools)
            live.enter(live.reset)
        live.observation, live.limit = message, asked.max_tokens
        conversation.pending, conversation.used = (
            Pending(asked, pending.api, pending.answer),
            time.time(),
        )
        if opened:
            try:
                self.player.begin(live, self._where)
            except Exception as error:
                self._open.remove(conversation)
                self._leave(conversation)
                raise Refused(400, f"the policy cannot read this: {error}") from error
        return live

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
        live = LiveEpisode(0, start, 0, self.player, self._rows.pop(), place)
        conversation = _Conversation(id_, client, live, Context.of(asked), time.time())
        self._open.append(conversation)
        self._of[live] = conversation
        return conversation

    def _answer(self, conversation: _Conversation, reply: Reply) -> None:
        """Answers a request, and adds the reply to its conversation."""
        live, pending = conversation.live, conversation.pending
        assert pending is not None
        assert live.observation is not None
        if reply.text is None:
            why = "the conversation is longer than the policy's context"
            why = why if reply.stop == "context" else reply.stop
            pending.refuse(Refused(400, f"the policy cannot reply: {why}"))
            conversation.pending = live.observation = None
            self._end(conversation)
            return
        assert reply.action_ids is not None
        assert reply.logprobs is not None
        sampled = (reply.prompt_ids, reply.action_ids, reply.logprobs, reply.version, reply.cut)
        read = len(live.current.ids) - len(reply.action_ids)
        tokens = Tokens(read, self.player.pieces(reply.action_ids), reply.logprobs, reply.cut)
        id_ = f"{conversation.id}-{len(live.turns)}"
        live.turns.append(Turn(live.observation, reply.text, 0.0, *sampled))
        live.observation = None
        message = received(reply.text, pending.asked.tools, id_)
        conversation.context.replied(pending.asked, message)
        self._history.add(id_, pending.asked, message)
        conversation.pending, conversation.used = None, time.time()
        pending.resolve(Answered(id_, message, tokens))

    # What ends.

    def _end_idle(self) -> None:
        now = time.time()
        for conversation in list(self._open):
            if conversation.pending is None and conversation.used + self.idle <= now:
                self._end(conversation)

    def _end(self, conversation: _Conversation) -> None:
        """Ends a conversation, and records it."""
        self._open.remove(conversation)
        self._leave(conversation)
        if conversation.pending is not None:
            conversation.pending.refuse(Refused(503, "the policy is being shut down"))
        if self.ledger is not None and conversation.live.turns:
            self.ledger.add_episodes([self._episode(conversation)])

    def _leave(self, conversation: _Conversation) -> None:
        """Gives a conversation's row back."""
        del self._of[conversation.live]
        self._rows.append(conversation.live.row)
        self._history.forget(f"{conversation.id}-{n}" for n in range(len(conversation.live.turns)))

    def _episode(self, conversation: _Conversation) -> Episode:
        """Returns a conversation as it is recorded."""
        live = conversation.live
        assert live.reset is not None
        turns, system = tuple(live.turns), live.reset.system
        if self.redact is not None:
            turns, system = redacted(self.redact, turns, system)
        info = {"client": conversation.client.name, "temperature": self.temperature}
        return Episode(
            conversation.id, live.start, turns, "terminated", run=RUN, stage="serve",
            update=self._where.update, system=system, tools=live.reset.tools, info=info,
        )  # fmt: skip

    # Feedback.

    def feedback(self, client: Client, given: Mapping[str, Any]) -> dict[str, Any]:
        """Records feedback on a conversation, which it ends if it is open.

        Args:
            client: whose conversation it is.
            given: `conversation`, its id or that of one of its responses; `score`, a number, or
                `thumbs`, "up" or "down"; perhaps `comment`, `rater` and `id`. The same `id` again
                with the same content changes nothing.

        Raises:
            Refused: no such conversation, or no feedback.
        """
        ledger, id_ = self._ledger(), self._id(given)
        score = score_in(given)
        for conversation in [c for c in self._open if c.id == id_ and c.client is client]:
            if conversation.pending is not None:
                raise Refused(409, "the conversation is being replied to; send it afterwards")
            self._end(conversation)
        self._recorded(client, id_)
        texts = {name: text_in(given, name) for name in ("comment", "rater", "id")}
        own = texts["id"] or derive_id(id_, score, texts["comment"], texts["rater"])
        if self.redact is not None:
            texts["comment"] = self.redact(texts["comment"])
        answer = Feedback(
            id_, score, comment=texts["comment"], id=f"users/{client.name}/{own}",
            stamp=Stamp(source="users", rater=texts["rater"]),
        )  # fmt: skip
        try:
            new = ledger.add_feedback([answer])
        except LedgerError as error:
            raise Refused(409, str(error)) from error
        return {"conversation": id_, "feedback": answer.id, "new": bool(new)}

    def forget(self, client: Client, given: Mapping[str, Any]) -> dict[str, Any]:
        """Deletes a conversation, open or recorded, and all feedback on it.

        Raises:
            Refused: there is no such conversation.
        """
        ledger, id_ = self._ledger(), self._id(given)
        for conversation in [c for c in self._open if c.id == id_ and c.client is client]:
            if conversation.pending is not None:
                raise Refused(409, "the conversation is being replied to; delete it afterwards")
            self._open.remove(conversation)
            self._leave(conversation)
            return {"conversation": id_, "deleted": True, "trained_in": None}
        self._recorded(client, id_)
        place = ledger.forget([id_]).get(id_)
        found = None if place is None else {"run": place[0], "update": place[1]}
        return {"conversation": id_, "deleted": True, "trained_in": found}

    def _ledger(self) -> Ledger:
        if self.ledger is None:
            raise Refused(404, "nothing is recorded here: start it with `--ledger`")
        return self.ledger

    def _id(self, given: Mapping[str, Any]) -> str:
        """Returns the id of the conversation that is meant: its own, or in a response's."""
        name = given.get("conversation")
        if not isinstance(name, str) or not name:
            raise Refused(400, "`conversation` is needed: its id, or that of a response in it")
        for prefix in ("chatcmpl-", "msg_", "resp_"):
            name = name.removeprefix(prefix)
        return name.partition("-")[0]

    def _recorded(self, client: Client, id_: str) -> Episode:
        """Returns a conversation of a client's from the ledger.

        Raises:
            Refused: there is none.
        """
        found = self._ledger().episodes([id_]).get(id_)
        if found is None or found.run != RUN or found.info.get("client") != client.name:
            raise Refused(404, f"no conversation {id_!r} of {client.name!r} is recorded")
        return found
