"""`sft`: supervised fine-tuning on whole conversations, from an environment's demonstrators or from
files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from ..errors import ConfigError, PreferenceError
from ..exchange.records import (
    MARKS,
    Unread,
    check_keys,
    holds,
    messages,
    rows,
    schemas,
    with_system,
)
from ..pipeline.stage import Stage
from ..policy.options import SupervisedOptions
from ..protocols import RunView
from ..records.batch import Row
from ..records.episode import Episode, Message
from ..records.sampling import Sampling
from ..records.update import Update
from ..util.ids import derive_id
from ..util.memory import explained_memory
from ..util.suggest import did_you_mean
from .collect import play
from .environments import check_envs, other_policies, read_envs


class Conversation(NamedTuple):
    """A conversation that a row of ids is made of.

    Attributes:
        tools: schemas of what the assistant might call.
        where: where it stands, or what was played.
        trained: of each of the assistant's messages, whether it is trained on; all are if empty.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]
    where: str
    trained: tuple[bool, ...] = ()


class SFT(SupervisedOptions, Stage):
    """Supervised fine-tuning: maximum likelihood of the assistant's tokens, and of no other ones.

    Attributes:
        data: a file of JSON lines or one JSON array, or a folder saved by `datasets`, with
            conversations under `messages` (or `prompt` and `completion`), `system` and `tools`; a
            reply with `weight` 0 is read and not trained on.
        stage: instead of `data`: the conversations that an earlier stage of this run wrote down
            (`revise`).
        env, player, episodes: instead of `data`: play this many episodes with an environment's own
            player; in the policy's seats, where an environment has several.
        epochs, batch_size: passes over the data, and conversations per optimizer step.
        steps_per_update: optimizer steps per update of the run.
    """

    data: Path | None = None
    stage: str | None = None
    env: Any = None
    player: str = "demonstrator"
    episodes: int = Field(default=1000, ge=1)
    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=32, ge=1)
    steps_per_update: int = Field(default=25, ge=1)

    @field_validator("env")
    @classmethod
    def _env(cls, value: Any) -> Any:
        return None if value is None else read_envs(value)

    @model_validator(mode="after")
    def _one(self) -> SFT:
        if sum(given is not None for given in (self.data, self.env, self.stage)) != 1:
            raise ValueError(
                "give one of `data` (a file or folder of conversations), `env` (whose demonstrators"
                " play) or `stage` (which wrote them)"
            )
        return self

    def check(self, run: RunView) -> None:
        """Checks the environment and player, the stage, or the file that conversations come
        from."""
        if self.env is not None:
            check_envs(self.env, [self.player], run.plugins, several_seats=True)
        elif self.stage is not None:
            makes = [label for label in run.before if dict(run.stages)[label].makes_conversations]
            if self.stage not in makes:
                raise ConfigError(
                    f"sft.stage: no stage {self.stage!r} before this one writes conversations"
                    f" down.{did_you_mean(self.stage, makes)}"
                )
        elif not self.data or not self.data.exists():
            raise ConfigError(f"sft.data: there is no file or folder {self.data}")

    def outline(self) -> list[str]:
        """Returns where the conversations come from, and how often they are gone through."""
        source = (
            f"reads {self.data}" if self.data is not None
            else f"takes what the stage {self.stage} wrote" if self.stage is not None
            else f"plays {self.episodes:,} conversations by {self.player} in"
            f" {', '.join(each.id for each in self.env)}"
        )  # fmt: skip
        return [source, f"trains on them {self.epochs} times, {self.batch_size} per step"]

    def play(self, run: RunView) -> Iterator[Update]:
        """Trains on the replies of the conversations; an update is `steps_per_update` steps."""
        from ..policy.learner import Learner, Sums

        policy = run.policy
        learner = Learner(policy, self)
        made = run.begin({"learner": learner}) * self.steps_per_update
        rows, metrics = self._rows(run)
        size = len(rows)
        seed = int(derive_id("sft", run.seed, run.stage)[:12], 16)
        per_epoch = math.ceil(size / self.batch_size)
        steps = self.epochs * per_epoch
        updates = math.ceil(steps / self.steps_per_update)
        sums, tokens, norm, done = Sums(), 0, 0.0, 0
        for epoch in range(self.epochs):
            for episodes in learner.minibatches(size, per_epoch, seed, epoch):
                if done < made:  # before the run was interrupted
                    done, metrics = done + 1, {}
                    continue
                progress = done / steps
                count = sum(len(rows[e].positions) for e in episodes)
                with explained_memory(
                    "fine-tuning", "`activation_memory`, `micro_tokens` or `batch_size`"
                ):
                    for micro in learner.micro_batches(rows, episodes):
                        out = policy.score(micro, network=learner.network)
                        learner.backward(-out.logprobs.sum() / count, micro)
                        sums.add(micro, loss=-out.logprobs)
                norm = learner.step(progress, [f"conversation {e + 1}" for e in episodes])
                tokens, done = tokens + count, done + 1
                number = math.ceil(done / self.steps_per_update)
                run.status("fine-tune", done, steps, update=number, updates=updates)
                if done % self.steps_per_update == 0 or done == steps:
                    policy.version += 1
                    metrics |= sums.means(policy, tokens)
                    metrics |= {
                        "grad_norm": norm,
                        "lr": learner.rate,
                        "tokens": float(tokens),
                        "epoch": epoch + 1.0,
                    }
                    yield run.finish_update(metrics)
                    sums, tokens, metrics = Sums(), 0, {}

    def _rows(self, run: RunView) -> tuple[list[Row], dict[str, float]]:
        """Returns one row of ids per conversation, only the assistant's tokens marked; and metrics
        of the data."""
        chat, limit = run.policy.chat, run.policy.context_length
        metrics: dict[str, float] = {}
        files: Sequence[Path | None] = ()
        if self.env is not None:
            conversations, metrics = self._played(run)
        else:
            files = (
                [self.data]
                if self.stage is None
                else sorted((run.folder / self.stage).glob("update-*.jsonl"))
            )
            conversations = [each for file in files for each in read_conversations(file)]
        rows: list[Row] = []
        cut = 0
        for dialogue, tools, where, trained in conversations:
            ids: list[int] = []
            positions: list[int] = []
            try:
                turns = chat.conversation(dialogue, tools)
            except ValueError as error:
                raise ConfigError(f"{where}: {error}") from error
            for (prompt, reply), train in zip(turns, trained or (True,) * len(turns), strict=True):
                if len(ids) + len(prompt) + len(reply) > limit:
                    cut += 1
                    break
                ids += prompt
                positions += range(len(ids), len(ids) + len(reply)) if train else ()
                ids += reply
            if positions:
                places = tuple(range(len(positions)))
                rows.append(Row(tuple(ids), len(rows), tuple(positions), places))
        if not conversations:
            raise ConfigError(
                f"there is no conversation in the fine-tuning data ({', '.join(map(str, files))})"
            )
        if not rows:
            raise ConfigError(
                f"none of {len(conversations)} conversations of the fine-tuning data has a reply to"
                f" train on that fits the policy's context of {limit} tokens"
            )
        return rows, {**metrics, "conversations": float(len(rows)), "cut_conversations": float(cut)}

    def _played(self, run: RunView) -> tuple[list[Conversation], dict[str, float]]:
        from ..rollout.conversation import Where
        from ..rollout.players import PolicyPlayer, ScriptPlayer

        episodes: list[Episode] = []
        total = sum(env.weight for env in self.env)
        others = other_policies(run, self.env, lambda policy: PolicyPlayer(policy, Sampling()))
        for env in self.env:
            count = max(1, round(self.episodes * env.weight / total))
            seed = int(derive_id("demonstrations", run.seed, run.stage)[:8], 16)
            begun = env.starts(seed, math.ceil(count / max(1, len(env.trained))))
            chosen = [(seat, 0) for start in begun for seat in env.every_seat(start)]
            episodes += play(
                run, ScriptPlayer(self.player), chosen,
                Where(run.id, run.stage, run.start + 1, run.seed), others=others,
                progress=lambda done, total: run.status("demonstrations", done, total),
            )  # fmt: skip
        sound = [e for e in episodes if e.ending != "failed" and e.turns]
        if not sound:
            why = "; ".join(sorted({e.reason for e in episodes})[:3])
            raise ConfigError(
                f"no episode of player {self.player!r} could be played to its end: {why}"
            )
        metrics = {"demonstrations/return": sum(e.env_return for e in sound) / len(sound)}
        metrics["demonstrations/success"] = sum(e.succeeded for e in sound) / len(sound)
        return [Conversation(e.messages, e.tools, f"episode {e.id}") for e in sound], metrics


def read_conversations(path: Path | None) -> Iterator[Conversation]:
    """Yields the conversations of a JSON file or a `datasets` folder, in the conversational format.

    Raises:
        PreferenceError: what is there cannot be read, or a record is no such conversation; the
            message names it.
    """
    assert path is not None
    unread = Unread()
    for where, record in rows(path):
        if not isinstance(record, Mapping):
            raise PreferenceError(f"{where} is no record but {type(record).__name__}")
        split = not holds(record.get("messages")) and "prompt" in record and "completion" in record
        keys = ("prompt", "completion") if split else ("messages",)
        if not any(holds(record.get(key)) for key in keys):
            raise PreferenceError(
                f"{where}: no conversation under `messages` (or `prompt` and `completion`); it has"
                f" {', '.join(map(str, record))}"
            )
        check_keys(record, (*keys, "system", "tools"), where, unread)
        found: list[Message] = []
        trained: list[bool] = []
        for key in keys:
            plain, marks = _marked(record[key], where)
            found += messages(plain, where, key, unread)
            trained += marks
        yield Conversation(
            with_system(tuple(found), record.get("system"), where),
            schemas(record.get("tools"), where),
            where,
            tuple(trained),
        )
    unread.warn(path)


def _marked(value: Any, where: str) -> tuple[Any, list[bool]]:
    """Returns the messages without the marks that say which replies to train on, and these marks,
    reply by reply.

    Raises:
        PreferenceError: a mark that is neither 0 nor 1, or two that differ.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value, []
    plain, trained = [], []
    for m in value:
        if isinstance(m, Mapping):
            marks = {key: m[key] for key in MARKS if m.get(key) is not None}
            odd = next((key for key, mark in marks.items() if mark not in (0, 1)), None)
            if odd is not None or len({bool(mark) for mark in marks.values()}) > 1:
                raise PreferenceError(
                    f"{where}: a reply is trained on or not: `weight` must be 0 or 1, got {marks}"
                )
            if m.get("role") == "assistant":
                trained.append(all(marks.values()))
            elif any(marks.values()):
                raise PreferenceError(
                    f"{where}: only the assistant's messages are trained on, but one of"
                    f" {m.get('role')!r} has {marks}"
                )
            m = {key: each for key, each in m.items() if key not in MARKS}
        plain.append(m)
    return plain, trained
