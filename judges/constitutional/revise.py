"""`revise`: the supervised half of Constitutional AI, inside conversations of many turns (Bai et
al. 2022, arXiv:2212.08073, section 3).

    the policy drafts a reply ─▶ a model criticises it by a principle and, where it must, rewrites
    it ─▶ the environment hears the revision

The revised conversation is the one that goes on: the user answers the revision, not the draft, and
a later draft has the revisions before it. Critique and revision are one question to the
model, in this order. The conversations are written down for a following `sft: {stage: revise}`;
every draft, critique and revision stands in the run's folder. A conversation in which the critic
failed, or refused, is played on with the draft and left out.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ...protocols import (
    ConfigError,
    Context,
    Episode,
    Message,
    RunView,
    Stage,
    TooManyFailures,
    Update,
    starts,
)
from ...running import (
    PlayOptions,
    PolicyPlayer,
    Reply,
    Where,
    check_envs,
    checked_options,
    component,
    episode_id,
    in_order,
    play,
)
from ...tools import background, derive_id, files
from ..asking.calls import Call
from ..asking.options import Asking
from ..asking.store import Verdict
from ..llm.rubric_judge import form
from ..llm.transcript import RULES, Unreadable, fenced, names, read_json
from ..models.model import Prompt
from ..models.model import Reply as Answered
from .constitution import Constitution, Principle

TASK = """\
You improve an agent's replies. You are given a conversation and the reply that the agent has \
drafted, and a principle.

{rules}

{text}

First write a critique: examine the draft by the principle, and only by it. Then say whether it \
needs to be changed at all. Then write the reply as it should be: \
the draft itself, word for word, if it need not be changed; otherwise the smallest change that \
satisfies the principle, in the agent's own style, \
addressed to whom the agent speaks with, and without a word about principles or critiques."""

TEXT = {"type": "string"}
SCHEMA = form(
    {"answer_id": TEXT, "critique": TEXT, "change": {"type": "boolean"}, "revision": TEXT}
)


@dataclass(kw_only=True)
class Critic(Asking):
    """Criticises and revises replies.

    Attributes:
        constitution: a Markdown file with principles that have `critique` and `revise`.
        rounds: how often a reply is revised, by another principle each time.
    """

    way: ClassVar[str] = "revise"
    constitution: Any
    rounds: int = 1

    def __post_init__(self) -> None:
        self.constitution = Constitution.load(self.constitution, ["critique", "revise"])
        if not 1 <= self.rounds <= len(self.constitution.principles):
            raise ValueError(
                f"rounds must lie in 1 to {len(self.constitution.principles)}, the number of"
                f" principles; got {self.rounds}"
            )
        if self.batch:
            raise ValueError(
                "revisions are needed at once, in the middle of conversations: leave `batch` out"
            )
        super().__post_init__()

    @property
    def label(self) -> str:
        """The constitution's version."""
        return str(self.constitution.version)

    @property
    def instructions(self) -> str:
        """The system prompt: the rules and the constitution's text."""
        return TASK.format(rules=RULES, text=self.constitution.text)

    async def revise(
        self, messages: Sequence[Message], draft: str, *by: Any
    ) -> list[dict[str, Any]]:
        """Criticises and revises a reply. Returns its rounds, first to last: principle, draft,
        critique, revision, status and reason. It stops at a round that failed.

        Args:
            messages: the conversation up to the reply.
            draft: the reply.
            by: what the principles are drawn by.
        """
        rounds: list[dict[str, Any]] = []
        left = list(self.constitution.principles)
        for number in range(self.rounds):
            drawn = self.constitution.draw(*by, number, among=left)
            left.remove(drawn)
            verdict: Verdict = await self._caller.verdict(self._call(messages, draft, drawn))
            record = {
                "principle": drawn.name,
                "draft": draft,
                "status": verdict.status,
                "reason": verdict.reason,
                "cost": verdict.cost,
            }
            rounds.append({**record, **verdict.payload})
            if verdict.status != "scored":
                break
            draft = str(verdict.payload["revision"])
        return rounds

    def _call(self, messages: Sequence[Message], draft: str, principle: Principle) -> Call:
        data = {
            "conversation": [{"from": m.role, "text": m.content} for m in messages],
            "draft": draft,
        }

        def write(nonce: str) -> Prompt:
            parts = [f"The code is {nonce}. The id of your answer is {names(nonce, 1)[0]}."]
            parts += [
                f"The principle: {principle.critique}",
                f"How to change a draft that does not satisfy it: {principle.revise}",
            ]
            asked, ids = (
                "\n\n".join([*parts, fenced("draft", data, nonce)]),
                {"answer_id": names(nonce, 1)},
            )
            return Prompt(self.instructions, asked, SCHEMA, self.max_tokens, choices=ids)

        def read(reply: Answered, nonce: str) -> dict[str, Any]:
            found = read_json(reply.text, SCHEMA)
            if found["answer_id"] != names(nonce, 1)[0]:
                raise Unreadable("answer_id is not the id given in the question")
            if not found["revision"].strip():
                raise Unreadable("revision must be the whole reply")
            revision = found["revision"].strip() if found["change"] else draft
            return {
                "critique": str(found["critique"]),
                "changed": revision != draft,
                "revision": revision,
            }

        return Call([data, principle.name], write, read)


class RevisingPlayer:
    """A policy whose replies are revised before the environment gets them.

    Args:
        note: called with episode id, turn, and the rounds of a reply; what it raises ends the play.
    """

    history: Any = "rerender"  # a context holds revisions, which the policy did not sample

    def __init__(
        self,
        drafts: PolicyPlayer,
        critic: Critic,
        note: Callable[[str, int, list[dict[str, Any]]], None],
    ) -> None:
        self.drafts, self.critic, self.note = drafts, critic, note
        self.rows = drafts.rows

    def begin(self, live: Any, where: Where) -> None:
        """Begins the conversation of the player that drafts."""
        self.drafts.begin(live, where)

    def reply(
        self, talks: Sequence[Any], where: Where, arriving: Callable[[], Sequence[Any]] = tuple
    ) -> Iterator[tuple[Any, Reply]]:
        """Drafts every reply and yields its last revision, the draft where none succeeded."""
        drafted = in_order(talks, self.drafts.reply(talks, where))
        rounds = background(self._rounds(talks, drafted)).result()
        for live, draft, own in zip(talks, drafted, rounds, strict=True):
            if draft.text is None:
                yield live, draft
                continue
            self.note(episode_id(where, live.start, live.slot), len(live.turns), own)
            refused = next(
                (each["revision"] for each in reversed(own) if each["status"] == "scored"),
                draft.text,
            )
            yield live, Reply(refused, version=draft.version)

    async def _rounds(
        self, talks: Sequence[Any], drafted: Sequence[Reply]
    ) -> list[list[dict[str, Any]]]:
        async def one(live: Any, draft: Reply) -> list[dict[str, Any]]:
            if draft.text is None:
                return []
            return await self.critic.revise(
                live.messages, draft.text, live.start.key, live.slot, len(live.turns)
            )

        found = await asyncio.gather(
            *(one(t, d) for t, d in zip(talks, drafted, strict=True)), return_exceptions=True
        )
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found  # type: ignore[return-value]

    def final_ids(self, live: Any) -> tuple[int, ...]:
        """Returns no tokens of the last observation: revised replies were not sampled."""
        return ()

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Returns none: see above."""
        return ()


class Revise(PlayOptions, Stage):
    """The stage `revise`: plays conversations whose replies a model criticises and revises.

    Attributes:
        critic: the model that revises: `model`, `constitution`, `rounds`, and the options of judges
            that ask a model (`budget`, `cache`, `concurrency`, ...).
        updates: rounds of play; the policy does not change.
        groups, group_size: starts per round, and conversations from each.
    """

    may_change: ClassVar[Mapping[str, frozenset[str]]] = {"critic": Critic.may_change}

    _made: Critic  # where it is checked

    critic: Any
    updates: int = Field(default=4, ge=1)
    groups: int = Field(default=64, ge=1)
    group_size: int = Field(default=1, ge=1)

    def check(self, run: RunView) -> None:
        """Checks the environments and the critic, and that the run is one process."""
        check_envs(self.env, plugins=run.plugins)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "revise works in one process: run it alone, and `sft` on its conversations (`data`)"
                " with several"
            )
        self._made = self.make_critic(run)

    def outline(self) -> list[str]:
        """Returns what is played, and what the critic is asked."""
        count = self.updates * self.groups * self.group_size
        return [
            f"plays {count:,} conversations in {', '.join(env.id for env in self.env)}",
            f"asks the critic {self._made.rounds} times about each of their replies",
        ]

    @property
    def trains_policy(self) -> bool:
        """False: it plays and records."""
        return False

    @property
    def makes_conversations(self) -> bool:
        """True: this stage records conversations."""
        return True

    def make_critic(self, run: RunView) -> Critic:
        """Returns the critic that the options name."""
        if isinstance(self.critic, Critic):
            return self.critic
        if not isinstance(self.critic, Mapping):
            raise ConfigError(
                f"revise.critic must be a mapping with model and constitution, got {self.critic!r}"
            )
        options = checked_options("revise.critic", Critic, 0, self.critic)
        try:
            return Critic(**options, plugins=run.plugins)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"revise.critic: {error}") from error

    def play(self, run: RunView) -> Iterator[Update]:
        """Plays conversations whose replies the critic revises, round by round."""
        from ...protocols import Sampling

        critic = self._made
        backend = component(run.plugins, "backend", self.backend, policy=run.policy)
        drafts = PolicyPlayer(
            run.policy, Sampling(self.temperature, self.max_new_tokens), backend, "rerender"
        )
        done = run.begin()
        critic.open(
            Context(run.stage, run.folder, run.clock, run.seed, run.updates, run.ledger, run.id)
        )
        try:
            yield from self._rounds(run, critic, drafts, done)
        finally:
            critic.close()

    def _rounds(
        self, run: RunView, critic: Critic, drafts: PolicyPlayer, done: int
    ) -> Iterator[Update]:
        total = sum(env.weight for env in self.env)
        seed = int(derive_id("starts", run.seed, run.stage)[:8], 16)
        for i in range(done, self.updates):
            shares = [max(1, round(self.groups * env.weight / total)) for env in self.env]
            most = self.max_failure_rate * sum(shares) * self.group_size
            notes = Notes(run.folder / run.stage / f"revisions-{i + 1:04d}.jsonl", most)
            player = RevisingPlayer(drafts, critic, notes.add)
            where = Where(run.id, run.stage, run.updates + 1, run.seed)
            drafts.backend.refresh()
            episodes: list[Episode] = []
            for env, count in zip(self.env, shares, strict=True):
                found = starts(env.id, seed + i, count, env.options, env.kwargs)
                episodes += play(
                    run, player, [(start,
                            slot) for start in found for slot in range(self.group_size)], where,
                    max_turns=self.max_turns, step_limit=self.step_limit, schedule=self.schedule,
                    max_failure_rate=self.max_failure_rate,
                    progress=lambda a, b, i=i: run.status("revise", a, b, update=i + 1,
                        updates=self.updates),
                )  # fmt: skip
            metrics = self._keep(run, i, episodes, notes.read())
            yield run.finish_update(metrics, episodes=episodes)

    def _keep(
        self,
        run: RunView,
        i: int,
        episodes: Sequence[Episode],
        notes: Mapping[str, Mapping[int, Any]],
    ) -> dict[str, float]:
        """Records the conversations that were revised to their end."""
        rounds = [r for turns in notes.values() for own in turns.values() for r in own]
        failed = {
            id_
            for id_, turns in notes.items()
            if any(r["status"] != "scored" for own in turns.values() for r in own)
        }
        sound = [e for e in episodes if e.ending != "failed" and e.turns and e.id not in failed]
        lines = [
            {
                "messages": [
                    {"role": m.role, "content": m.content}
                    for message in e.messages
                    if message is not e.final
                    for m in message.unjoined
                ],
                "tools": list(e.tools),
            }
            for e in sound
        ]
        files.write(
            run.folder / run.stage / f"update-{i + 1:04d}.jsonl",
            "".join(json.dumps(line) + "\n" for line in lines),
        )
        metrics = {
            "episodes": float(len(episodes)), "conversations": float(len(sound)),
            "critic_failures": float(sum(r["status"] == "failed" for r in rounds)),
            "refused": float(sum(r["status"] == "abstained" for r in rounds)),
            "spend": sum(r["cost"] for r in rounds),
        }  # fmt: skip
        if rounds:
            metrics["changed"] = sum(bool(r.get("changed")) for r in rounds) / len(rounds)
        if sound:
            metrics["return"] = sum(e.env_return for e in sound) / len(sound)
        return metrics


class Notes:
    """A file with the drafts, critiques and revisions of a round, a line per reply. What a run that
    was killed plays again is noted again; the later line counts.

    Args:
        most: conversations that the critic may fail on. One more ends the round, before any of its
            conversations is recorded: a run that goes on plays them again, with the critic's
            earlier answers from its cache.
    """

    def __init__(self, path: Path, most: float) -> None:
        self.path, self._most = path, most
        self._failed: dict[str, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, episode: str, turn: int, rounds: Sequence[Mapping[str, Any]]) -> None:
        """Writes down the rounds of a reply.

        Raises:
            TooManyFailures: the critic failed in more conversations than it may.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write(
                "\n" + json.dumps({"episode": episode, "turn": turn, "rounds": list(rounds)})
            )  # a line cut short stays by itself
            file.flush()
            os.fsync(file.fileno())
        if rounds and rounds[-1]["status"] == "failed":
            self._failed[episode] = rounds[-1]["reason"]
        if len(self._failed) > self._most:
            raise TooManyFailures(
                f"the critic failed in {len(self._failed)} conversations, more than"
                " max_failure_rate allows. Reasons:"
                f" {'; '.join(sorted(set(self._failed.values()))[:3])}. Go on when it answers"
                " again: its answers are kept."
            )

    def read(self) -> dict[str, dict[int, list[dict[str, Any]]]]:
        """Returns the rounds of every reply, by episode and turn."""
        found: dict[str, dict[int, list[dict[str, Any]]]] = {}
        for line in (
            self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ()
        ):
            try:
                note = json.loads(line)
            except ValueError:
                continue
            found.setdefault(note["episode"], {})[note["turn"]] = note["rounds"]
        return found
