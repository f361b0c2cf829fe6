"""What a served policy's conversations leave in the ledger: episodes, feedback on them, or nothing
any more."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ...protocols import Episode, Feedback, LedgerError, Stamp
from ...running import RUN, Ledger
from ...tools import derive_id
from .redaction import clean_text, redacted
from .users import score_in, text_in
from .wire.form import Refused


class Recorder:
    """Writes conversations and feedback to a ledger.

    Args:
        ledger: where; None: nowhere.
        redact: what takes out of every text what must not be recorded.
    """

    def __init__(self, ledger: Ledger | None, redact: Callable[[str], str] | None) -> None:
        self.ledger, self.redact = ledger, redact
        self._kept: list[Episode] = []  # that the ledger did not take

    def add(self, episode: Episode) -> None:
        """Records a conversation. One that the ledger cannot take now is kept and tried again; one
        that cannot be redacted is dropped, with a warning."""
        if self.ledger is None:
            return
        if self.redact is not None:
            try:
                episode = redacted(self.redact, episode)
            except Exception as error:  # the operator's own function
                warnings.warn(
                    f"conversation {episode.id} was not recorded, since it could not be redacted:"
                    f" {type(error).__name__}",
                    stacklevel=2,
                )
                return
        self._kept.append(episode)
        self.settle()

    def settle(self) -> None:
        """Records what the ledger did not take before."""
        if not self._kept or self.ledger is None:
            return
        try:
            self.ledger.add_episodes(self._kept)
        except LedgerError as error:
            warnings.warn(
                f"{len(self._kept)} conversations wait to be recorded: {error}", stacklevel=2
            )
        else:
            self._kept.clear()

    def feedback(self, client: str, id_: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Records feedback on a conversation that has ended.

        Args:
            client: whose conversation it is.
            id_: the conversation.
            given: `score`, a number, or `thumbs`, "up" or "down"; perhaps `comment`, `rater` and
                `id`. The same `id` again with the same content changes nothing.

        Raises:
            Refused: no such conversation, or no feedback; or the ledger cannot be used now.
        """
        score, texts = score_in(given), {n: text_in(given, n) for n in ("comment", "rater", "id")}
        ledger = self._there(client, id_)
        if self.redact is not None:
            before = texts["id"]
            texts = {name: clean_text(self.redact, text) for name, text in texts.items()}
            if texts["id"] != before:
                texts["id"] = derive_id(before)
        own = texts["id"] or derive_id(id_, score, texts["comment"], texts["rater"])
        answer = Feedback(
            id_, score, comment=texts["comment"], id=f"users/{client}/{own}",
            stamp=Stamp(source="users", rater=texts["rater"]),
        )  # fmt: skip
        known = ledger.feedback(ids=[answer.id], late=True, corrected=True)
        if known and known != [answer]:
            raise Refused(
                409, f"feedback {own!r} is recorded with other content: give it another id"
            )
        try:
            new = ledger.add_feedback([answer])
        except LedgerError as error:
            raise Refused(503, f"the ledger cannot be used now: {error}") from error
        return {"conversation": id_, "feedback": answer.id, "new": bool(new)}

    def later(self, client: str, id_: str) -> list[str]:
        """Returns the conversations that went on with one of a client's.

        Raises:
            Refused: there is none.
        """
        return later(self._there(client, id_), [id_])

    def forget(self, ids: Sequence[str]) -> dict[str, tuple[str, int]]:
        """Deletes conversations. Returns the run and the update that trained on them, by id."""
        return {} if self.ledger is None else self.ledger.forget(ids)

    def _there(self, client: str, id_: str) -> Ledger:
        """Returns the ledger, which holds this conversation of a client's.

        Raises:
            Refused: it does not, or there is none.
        """
        if self.ledger is None:
            raise Refused(404, "nothing is recorded here: start it with `--ledger`")
        if any(episode.id == id_ for episode in self._kept):
            raise Refused(503, "the ledger cannot be used now; send it again later")
        found = self.ledger.episodes([id_]).get(id_)
        if found is None or found.run != RUN or found.info.get("client") != client:
            raise Refused(404, f"no conversation {id_!r} of {client!r} is recorded")
        return self.ledger


def conversation_of(name: str) -> str:
    """Returns the id of a conversation, given that or the id of one of its responses."""
    for prefix in ("chatcmpl-", "msg_", "resp_"):
        name = name.removeprefix(prefix)
    return name.partition("-")[0]


def later(ledger: Ledger, ids: Collection[str]) -> list[str]:
    """Returns the conversations that went on with some, and so hold what was in them."""
    found: list[str] = []
    all_ = ledger.run_episodes(RUN)
    new: Sequence[str] = list(ids)
    while new:
        new = [e.id for e in all_ if e.info.get("continues") in new and e.id not in found]
        found += new
    return found
