"""Messages, turns and episodes: the record of what was played.

Frozen records; feedback on them is stored separately, never inside.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..errors import UserFailed
from ..util.ids import canonical_json, derive_id
from .shown import BLUE, PLAIN, brief, messages, number, tint

_BY_USER = re.compile(rf"(reset|step \d+): {UserFailed.WHOSE}: ")

Role = Literal["system", "user", "assistant", "tool"]
Ending = Literal["terminated", "truncated", "failed"]


@dataclass(frozen=True, slots=True)
class Message:
    """One utterance of a conversation.

    Attributes:
        parts: the messages that came together in this one, as the results of several calls of
            tools do; `content` is all of them in one, for readers of text, and a chat template
            shows each part as a message. Empty: it is one message.
    """

    role: Role
    content: str
    parts: tuple[Message, ...] = ()

    def __repr__(self) -> str:
        return brief(self)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))

    @property
    def speakers(self) -> tuple[Message, ...]:
        """The messages that it is, where others than its role speak in it; else it alone."""
        return self.parts if any(part.role != self.role for part in self.parts) else (self,)

    @property
    def unjoined(self) -> tuple[Message, ...]:
        """The messages that it is: one for each part."""
        return self.parts or (self,)

    @classmethod
    def joined(cls, role: Role, parts: Sequence[Message]) -> Message:
        """Returns several messages as one of this role; one message stays as it is, but for its
        role."""
        text = "\n\n".join(part.content for part in parts)
        alone = len(parts) == 1 and parts[0].role == role
        return cls(role, text, () if alone else tuple(parts))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Message:
        """Returns the message that `dataclasses.asdict` made plain."""
        return cls(data["role"], data["content"], tuple(map(cls.from_dict, data["parts"])))


@dataclass(frozen=True, slots=True)
class Start:
    """The start of an episode. Episodes of one update that share a start form a group.

    Attributes:
        env: id of the environment.
        seed, options: what `reset` received.
        kwargs: what `gymnasium.make` received.
        seat: which of the environment's seats the conversation is of; empty: it has one.
        against: who replies in the other seats, by seat: "policy", one of the environment's own
            players, or another policy's folder.

    Raises:
        TypeError: options or kwargs that are not plain JSON data.
    """

    env: str
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    seat: str = ""
    against: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("options", "kwargs", "against"):
            object.__setattr__(self, name, json.loads(canonical_json(dict(getattr(self, name)))))

    @property
    def key(self) -> str:
        """A digest of the start; equal starts have equal keys."""
        seats = (self.seat, self.against) if self.seat else ()
        return derive_id(self.env, self.seed, self.options, self.kwargs, *seats)

    @property
    def match(self) -> tuple[Any, ...]:
        """What the starts of all seats that are played together share."""
        players = {self.seat: "policy", **self.against} if self.seat else {}
        return (self.env, self.seed, canonical_json([self.options, self.kwargs, players]))

    def in_seat(self, seat: str) -> Start:
        """Returns the start of another seat of the same match, this one played by the policy."""
        others = {self.seat: "policy", **self.against}
        del others[seat]
        return replace(self, seat=seat, against=others)


@dataclass(frozen=True, slots=True)
class Turn:
    """One observation and the reply to it.

    The conversation in tokens is the concatenation of every turn's `prompt_ids + action_ids`:
    sampled ids are kept as sampled. Only `action_ids` were chosen by the policy; an end-of-turn
    token that had to be added after a reply cut at the limit stands at the head of the next turn's
    `prompt_ids`, where nothing is trained.

    Attributes:
        observation: the environment's utterance.
        action: the reply as text, as the environment received it.
        reward: the environment's own reward for the reply.
        prompt_ids: tokens the policy read since its last sampled token (with `history: rerender`,
            the whole context).
        action_ids: tokens the policy sampled, its end-of-turn token included. None: the reply was
            not sampled by a policy of ours (a script, a person, an import); RL refuses such turns.
        logprobs: log-probability of each action token under the distribution it was sampled from,
            same length.
        policy_version: number of policy updates made before the reply was sampled.
        cut: the reply ended at the token limit, not by an end-of-turn token.
        context: which of the episode's contexts was read, counted from 0. Most episodes have one,
            the conversation; an agent that forks or edits what it shows its policy opens another
            one, and the first observation in it is all that the policy reads.
        info: the `info` of the environment's step, plain JSON data.
    """

    observation: Message
    action: str
    reward: float
    prompt_ids: tuple[int, ...] = field(default=(), repr=False)
    action_ids: tuple[int, ...] | None = field(default=None, repr=False)
    logprobs: tuple[float, ...] | None = field(default=None, repr=False)
    policy_version: int = 0
    cut: bool = False
    context: int = 0
    info: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return brief(self)

    def __post_init__(self) -> None:
        if (self.action_ids is None) != (self.logprobs is None):
            raise ValueError("a turn has both action_ids and logprobs, or neither")
        if (
            self.action_ids is not None
            and self.logprobs is not None
            and len(self.action_ids) != len(self.logprobs)
        ):
            raise ValueError(f"{len(self.action_ids)} action_ids but {len(self.logprobs)} logprobs")
        if self.action_ids == ():
            raise ValueError("a sampled reply has at least one token, its end-of-turn token")


@dataclass(frozen=True, slots=True)
class Episode:
    """An episode: the turns from reset to the end, never changed after they were played.

    Attributes:
        id: derived from (run, stage, update, start, slot in the group), so that a replay finds the
            same ids.
        ending: `terminated` (the task's own end, also where the environment says both), `truncated`
            (cut from outside: values are bootstrapped here), or `failed` (the environment broke:
            counted and shown, never trained on, never reward 0).
        run, stage, update: where it was played; `update` counts through the whole run.
        slot: its place in its group.
        origin: (episode id, turn) it was branched off from; its earlier turns are copies. None:
            played from reset.
        reason: why it was truncated or failed ("max_turns", "context", "environment" when the
            environment truncated it, or an exception's text).
        system: the system prompt, if the environment gave one.
        tools: tool schemas the environment offered in any context, JSON data.
        final: the observation after the last reply, if the environment gave one.
        final_ids: tokens of that observation, up to where the policy would have replied: what a
            critic reads to value the state an episode was truncated in. None where that would have
            been in another context than the last reply's.
        history: how the trained context was made, see `Turn.prompt_ids`.
        info: the `info` of the reset, plain JSON data (`optimum`, when the environment knows it).
    """

    id: str
    start: Start
    turns: tuple[Turn, ...]
    ending: Ending
    reason: str = ""
    run: str = ""
    stage: str = ""
    update: int = 0
    slot: int = 0
    origin: tuple[str, int] | None = None
    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    final: Message | None = None
    final_ids: tuple[int, ...] = ()
    history: Literal["append", "rerender"] = "append"
    info: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        ended = self.ending + (f" ({self.reason})" if self.reason else "")
        where = f", {self.stage} update {self.update}" if self.stage else ""
        turns = "1 turn" if len(self.turns) == 1 else f"{len(self.turns)} turns"
        return (
            f"<Episode {self.id} of {self.start.env}: {turns}, {ended}, return"
            f" {number(self.env_return)}{where}>"
        )

    def _repr_html_(self) -> str:
        return self.html()

    def html(self, credit: Sequence[float] = (), note: str = "") -> str:
        """Returns the conversation as HTML, each reply on the colour of its credit.

        Args:
            credit: one number per turn, or none.
            note: what stands below it; default: what the episode is.

        Raises:
            ValueError: another number of credits than of turns.
        """
        credit = [float(each) for each in credit]
        if credit and len(credit) != len(self.turns):
            raise ValueError(f"{len(credit)} credits for {len(self.turns)} turns")
        written = [("system", self.system, "", PLAIN)] if self.system is not None else []
        largest = max(map(abs, credit), default=0.0)
        for i, turn in enumerate(self.turns):
            marks = [f" · credit {credit[i]:+.3f}"] if credit else []
            marks += [f" · reward {turn.reward:g}"] if turn.reward else []
            colour = tint(credit[i], largest) if credit else BLUE
            written += [(m.role, m.content, "", PLAIN) for m in turn.observation.speakers]
            written.append(("assistant", turn.action, "".join(marks), colour))
        if self.final:
            written.append((self.final.role, self.final.content, "", PLAIN))
        return messages(written, note or repr(self))

    @property
    def group(self) -> str:
        """The key of its group: (run, stage, update, start); branches form groups of their own."""
        return derive_id(self.run, self.stage, self.update, self.start.key, self.origin)

    @property
    def env_return(self) -> float:
        """The sum of the environment's own rewards."""
        return sum(turn.reward for turn in self.turns)

    @property
    def success(self) -> bool | None:
        """Whether the task succeeded, where the environment reports it (`info["success"]` of the
        last step)."""
        value = self.turns[-1].info.get("success") if self.turns else None
        return None if value is None else bool(value)

    @property
    def succeeded(self) -> bool:
        """Whether it counts as a success, one rule for every number of successes: as the
        environment reports; without a report, whether the episode came to its own end. One that was
        cut and has no report is no success, nor one in which nothing was replied (a match that was
        over before it was this seat's turn)."""
        if self.success is None:
            return self.ending == "terminated" and bool(self.turns)
        return self.success

    @property
    def task(self) -> str:
        """What it was about: a data set's row, where the environment says so (`info["row"]`), which
        comes again with other seeds; else its start."""
        return str(self.info.get("row") or self.start.key)

    @property
    def forked(self) -> bool:
        """Whether its policy read more than one context, so that its messages in their order are
        not one conversation."""
        return any(turn.context for turn in self.turns)

    @property
    def user_failed(self) -> bool:
        """Whether it failed because its user gave no reply (`UserFailed`), and not because the
        environment broke."""
        return self.ending == "failed" and _BY_USER.match(self.reason) is not None

    def state(self, turn: int) -> tuple[Any, ...]:
        """Returns a key of the conversation when a turn began, equal for conversations that share
        it: the start and the replies so far, by their tokens where a policy sampled them (other
        tokens may be read as the same text, and lead elsewhere)."""
        return (
            self.start.key,
            *(t.action if t.action_ids is None else t.action_ids for t in self.turns[:turn]),
        )

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation as people read it, the system prompt and the final observation
        included."""
        messages = [Message("system", self.system)] if self.system is not None else []
        for turn in self.turns:
            messages += [turn.observation, Message("assistant", turn.action)]
        return tuple(messages + ([self.final] if self.final else []))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON data; `Episode.from_dict` reads it back equal."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Episode:
        """Returns the episode that `to_dict` wrote."""
        values = dict(data)
        values["start"] = Start(**data["start"])
        values["final"] = Message.from_dict(data["final"]) if data["final"] else None
        values["final_ids"] = tuple(data["final_ids"])
        values["tools"] = tuple(data["tools"])
        values["origin"] = tuple(data["origin"]) if data["origin"] else None
        values["turns"] = tuple(
            Turn(
                **{
                    **turn,
                    "observation": Message.from_dict(turn["observation"]),
                    "prompt_ids": tuple(turn["prompt_ids"]),
                    "action_ids": None if turn["action_ids"] is None else tuple(turn["action_ids"]),
                    "logprobs": None if turn["logprobs"] is None else tuple(turn["logprobs"]),
                }
            )
            for turn in data["turns"]
        )
        return cls(**values)
