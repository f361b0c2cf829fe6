"""Players, which reply in conversations: a policy through a backend, or a script."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from ..environments.conventions import PlayerFunction, text_of
from ..util.aio import settle
from ..util.ids import derive_id
from ..util.wording import worded
from .arriving import ConversationFailed
from .conversation import LiveEpisode, Reply, Where, spoken

if TYPE_CHECKING:
    from ..policy.policy import Policy
    from ..protocols import Backend
    from ..records.sampling import Conversation, Sample, Sampling

Arriving = Callable[[], Sequence[LiveEpisode]]


class Player(Protocol):
    """The protocol of players: a policy, a script, a person."""

    rows: int
    history: Literal["append", "rerender"]

    def begin(self, live: LiveEpisode, where: Where) -> None:
        """Prepares for a conversation whose environment was reset."""

    def reply(
        self, talks: Sequence[LiveEpisode], where: Where, arriving: Arriving = tuple
    ) -> Iterable[tuple[LiveEpisode, Reply]]:
        """Yields every conversation with its reply, in any order, at best when it ends.

        Args:
            talks: those that wait for a reply.
            where: for the noise.
            arriving: returns those that have come to wait meanwhile, which may be replied to as
                well.
        """

    def final_ids(self, live: LiveEpisode) -> tuple[int, ...]:
        """Returns the ids from the last sampled token to where the player would have replied."""

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Returns each token of a reply of the player's as text."""


def in_order(
    talks: Sequence[LiveEpisode], replies: Iterable[tuple[LiveEpisode, Reply]]
) -> list[Reply]:
    """Waits for all replies and returns them in the order of the conversations."""
    found = dict(replies)
    return [found[live] for live in talks]


@contextlib.contextmanager
def _rendering() -> Iterator[None]:
    """Fails a conversation whose messages or tools the chat template cannot show.

    Raises:
        ConversationFailed: the template refused.
    """
    from ..errors import TemplateError

    try:
        yield
    except TemplateError as error:
        raise ConversationFailed(f"template: {error}") from error


class PolicyPlayer:
    """A policy as a player: renders observations into ids, samples replies through a backend.

    Args:
        policy: the policy.
        backend: what samples for it; default: in process.
        sampling: temperature and length of replies.
        history: "append" trains on exactly the sampled context; "rerender" renders the whole
            conversation again at every turn, for templates that must rewrite history, and trains
            one row per turn.
    """

    def __init__(
        self,
        policy: Policy,
        sampling: Sampling,
        backend: Backend | None = None,
        history: Literal["append", "rerender"] = "append",
    ) -> None:
        from ..policy.in_process import InProcess

        self.policy, self.sampling, self.history = policy, sampling, history
        self.backend: Backend = backend if backend is not None else InProcess(policy)
        self.rows = self.backend.rows
        self._most = policy.context_length * max(map(len, policy.chat.tokenizer.get_vocab()))

    def _overflows(self, live: LiveEpisode) -> bool:
        """Returns whether the messages are longer, in characters, than a context full of the
        longest token: then they need not be tokenized."""
        return sum(len(message.content) for message in live.messages) > self._most

    def begin(self, live: LiveEpisode, where: Where) -> None:
        """Starts a conversation's tokens: those of its earlier turns, or else of its first
        prompt."""
        from ..records.sampling import Conversation

        assert live.reset is not None
        live.state = Conversation(live.row)
        for turn in live.turns:
            own = live.contexts[turn.context]
            ids = [*turn.prompt_ids, *(turn.action_ids or ())]
            own.ids = ids if self.history == "rerender" else own.ids + ids
        if not self._overflows(live):
            self._append_observation(live)

    def reply(
        self, talks: Sequence[LiveEpisode], where: Where, arriving: Arriving = tuple
    ) -> Iterator[tuple[LiveEpisode, Reply]]:
        """Samples the policy's next reply in every conversation whose context has room."""
        of_row: dict[int, LiveEpisode] = {}
        stopped: list[tuple[LiveEpisode, Reply]] = []

        def asked(some: Sequence[LiveEpisode]) -> list[Conversation]:
            for live in some:
                if (stop := self._prepare(live, where)) is not None:
                    stopped.append((live, stop))
                else:
                    of_row[live.row] = live
            return [live.state for live in some if of_row.get(live.row) is live]

        if first := asked(talks):
            for conversation, sample in self.backend.reply(
                first, self.sampling, lambda: asked(arriving())
            ):
                live = of_row.pop(conversation.row)
                yield live, self._replied(live, sample)
                while stopped:  # they free their rows at once
                    yield stopped.pop()
        yield from stopped

    def _prepare(self, live: LiveEpisode, where: Where) -> Reply | None:
        """Puts what the backend reads into a conversation's state. Returns the reply of one that
        cannot go on."""
        if self._overflows(live):
            return Reply(None, stop="context")
        try:
            self._append_observation(live)
        except ConversationFailed as error:
            return Reply(None, stop=str(error), failed=True)
        if len(live.current.ids) >= self.policy.context_length:
            return Reply(None, stop="context")
        live.state.ids, live.state.messages = live.current.ids, live.messages
        live.state.limit = live.limit
        key = (where.seed, where.update, live.start.key, live.slot, len(live.turns))
        place = (where.stage, live.branch.parent.slot, live.branch.turn) if live.branch else ()
        live.state.seed = int(derive_id("noise", *key, *place), 16)
        return None

    def _replied(self, live: LiveEpisode, sample: Sample) -> Reply:
        """Appends a sampled reply to a conversation's tokens, and returns it as a reply."""
        own = live.current
        prompt = tuple(own.ids if self.history == "rerender" else own.fresh)
        own.ids, own.fresh = own.ids + list(sample.ids), []
        special = bool(live.env.metadata.get("special_tokens", False))
        text = self.policy.chat.text(sample.ids, special=special)
        return Reply(text, prompt, sample.ids, sample.logprobs, self.policy.version, sample.cut)

    def _append_observation(self, live: LiveEpisode) -> None:
        """Appends the latest observation to the ids of its context, closing a reply that did not
        close itself.

        Raises:
            ConversationFailed: the template cannot show it.
        """
        own, chat = live.current, self.policy.chat
        if own.fresh:
            return
        assert live.observation is not None
        with _rendering():
            if self.history == "rerender" or not own.ids:
                own.ids = own.fresh = chat.prompt(live.messages, own.tools)
                live.state.cached = 0
            else:
                own.fresh = chat.close(own.ids) + chat.suffix(live.observation, own.tools)
                own.ids = own.ids + own.fresh
        if live.turns and live.turns[-1].context != live.context:
            live.state.cached = 0

    def final_ids(self, live: LiveEpisode) -> tuple[int, ...]:
        """Returns the ids from the last sampled token to where the policy would have replied, as
        far as they fit the context."""
        last = live.turns[-1] if live.turns else None
        if last is None or last.action_ids is None or last.context != live.context:
            return ()
        if self._overflows(live):
            return ()
        try:
            self._append_observation(live)
        # the template cannot show what came last: then nothing is known of that state
        except ConversationFailed:
            return ()
        own = live.current
        room = max(0, self.policy.context_length - (len(own.ids) - len(own.fresh)))
        # The whole context again, or nothing: then the last reply's own row serves.
        if self.history == "rerender":
            return tuple(own.ids) if len(own.ids) <= self.policy.context_length else ()
        return tuple(own.fresh[:room])

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Returns each token as text."""
        return tuple(self.policy.chat.tokenizer.batch_decode([[i] for i in ids]))


class ScriptPlayer:
    """A scripted player: one of an environment's own (`"expert"`), or any function from a
    conversation to a reply.

    A player of the environment's replies where the environment lives, under the same limit. A
    function is the caller's own: it runs in the calling thread for as long as it likes. What it
    raises, or says that is no text, fails the episode it replied in.

    Args:
        player: name of one of the environment's players, or a function; it may be a coroutine.
    """

    history: Literal["append", "rerender"] = "append"
    rows = 256

    def __init__(self, player: str | PlayerFunction) -> None:
        self.player = player

    def begin(self, live: LiveEpisode, where: Where) -> None:
        """Does nothing: a script keeps no state of a conversation."""
        pass

    def reply(
        self, talks: Sequence[LiveEpisode], where: Where, arriving: Arriving = tuple
    ) -> Iterator[tuple[LiveEpisode, Reply]]:
        """Calls the script on each conversation; one that raises fails that conversation only."""
        assert callable(self.player)
        for live in talks:
            try:
                reply = Reply(text_of(settle(self.player(spoken(live))), "the reply"))
            except Exception as error:  # SystemExit is the caller's own way out
                reply = Reply(None, stop=f"player: {worded(error)}", failed=True)
            yield live, reply

    def final_ids(self, live: LiveEpisode) -> tuple[int, ...]:
        """Returns no tokens of the last observation: a script reads text."""
        return ()

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Returns none: a script's replies have no tokens."""
        return ()
