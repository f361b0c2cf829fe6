"""A reward model: one or several language models with a scalar head, read at the end of every
reply.

It reads conversations as text, with its own tokenizer and chat template, so it may come from
another family than the policy. The environment's answer to the last reply is not read, since it may
reveal the outcome.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...learning import (
    LOADING,
    ChatFormat,
    Micro,
    Row,
    context_length,
    divide,
    located,
    trunk,
)
from ...protocols import Episode, TurnwiseError
from ...tools import files

NOTE = "turnwise-reward-model.json"


class RewardModelError(TurnwiseError):
    """A reward model cannot be loaded or used. The message says what to do."""


class RewardModel:
    """Scores conversations: one number at the end of every reply, the last of which is the score of
    the whole.

    Args:
        members: `AutoModelForSequenceClassification` models with one label, causal ones; several
            are an ensemble.
        tokenizer: theirs.
        offsets: subtracted from each member's scores, so that the policy it was trained from scores
            0 on average.
        notes: further facts about it (what it was trained on).
        today: the day that chat templates which write a date are given, as 2026-01-31.
    """

    def __init__(
        self,
        members: Sequence[Any],
        tokenizer: Any,
        offsets: Sequence[float] | None = None,
        notes: dict[str, Any] | None = None,
        today: str | None = None,
    ) -> None:
        self.members = list(members)
        self.tokenizer = tokenizer
        self.chat = ChatFormat(tokenizer, today=date.fromisoformat(today) if today else None)
        self.offsets = list(offsets) if offsets is not None else [0.0] * len(self.members)
        self.notes = notes or {}
        for member in self.members:
            member.eval()
            head = dict(member.named_children()).get("score")
            if not isinstance(head, nn.Linear) or head.out_features != 1:
                raise RewardModelError(
                    f"{type(member).__name__} has no scalar head over a causal model; use a causal"
                    " language model, or a sequence-classification model with one label on one"
                )
            vocabulary = member.get_input_embeddings().weight.shape[0]
            if len(tokenizer) > vocabulary:
                raise RewardModelError(
                    f"the reward model's tokenizer has {len(tokenizer)} tokens but the model embeds"
                    f" {vocabulary}: tokenizer and model do not belong together; was the tokenizer"
                    " of another model copied into its folder?"
                )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | None = None) -> RewardModel:
        """Loads what `save_pretrained` wrote, or any sequence-classification model with one label
        by folder or hub name.

        Raises:
            RewardModelError: there is none, it is no reward model, or its tokenizer does not belong
                to it.
        """
        root = Path(folder)
        note: dict[str, Any] = {}
        if (root / NOTE).is_file():
            note = files.read_note(root / NOTE)
        names = (
            [str(root / f"member-{m}") for m in range(note["members"])] if note else [str(folder)]
        )
        if not note and root.is_dir() and not (root / "config.json").is_file():
            inside = sorted(p.parent for p in root.glob(f"**/{NOTE}"))
            hint = f" Did you mean {str(inside[-1])!r}?" if inside else ""
            raise RewardModelError(f"the folder {root} holds no reward model.{hint}")
        loaded = [load_member(name) for name in names]
        tokenizer, members = loaded[0][0], [member for _, member in loaded]
        if (
            not note
            and members[0].config.architectures
            and "CausalLM" in members[0].config.architectures[0]
        ):
            raise RewardModelError(
                f"{folder} is a language model, not a reward model: its scalar head would be"
                " random. Train one with the reward-model stage (`reward-model: {model:"
                f" {folder}}}`)"
            )
        where = device or ("cuda" if torch.cuda.is_available() else None)
        if where is not None:
            members = [m.to(where) for m in members]
        return cls(members, tokenizer, note.get("offsets"), note.get("notes"), note.get("today"))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes every member as a transformers model, and what makes them one reward model, whole
        or not at all."""
        target = Path(folder)
        draft = target.with_name(f".{target.name}")
        shutil.rmtree(draft, ignore_errors=True)
        for m, member in enumerate(self.members):
            member.save_pretrained(str(draft / f"member-{m}"))
            self.tokenizer.save_pretrained(str(draft / f"member-{m}"))
        note = {
            "members": len(self.members),
            "offsets": self.offsets,
            "notes": self.notes,
            "today": self.chat.template.today.isoformat(),
        }
        (draft / NOTE).write_text(json.dumps(note, indent=2) + "\n")
        files.move(draft, target)

    def shift(self, means: Tensor) -> None:
        """Moves each member's zero, [M]: what scored its mean scores 0 from now on."""
        self.offsets = [
            before + float(mean) for before, mean in zip(self.offsets, means, strict=True)
        ]

    @cached_property
    def version(self) -> str:
        """A hash of weights and offsets, so that verdicts of different reward models are never
        confused."""
        digest = hashlib.sha256(json.dumps(self.offsets).encode())
        for member in self.members:
            for parameter in member.parameters():
                digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        return "rm-" + digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        """The device of the members."""
        return self.members[0].device

    @property
    def context_length(self) -> int:
        """The number of tokens that the members can read."""
        return context_length(self.members[0].config.get_text_config())

    def fits(self, episode: Episode) -> bool:
        """Returns whether a conversation is short enough to be read."""
        return sum(len(a) + len(b) for a, b in self._turns(episode)) <= self.context_length

    def _turns(self, episode: Episode) -> list[tuple[list[int], list[int]]]:
        context = [m for m in episode.messages if m is not episode.final]
        if episode.forked:
            raise RewardModelError(
                f"episode {episode.id} has several contexts, and a reward model reads one"
                " conversation: judge it otherwise"
            )
        try:
            return self.chat.conversation(context, episode.tools)
        except ValueError as error:
            raise RewardModelError(
                f"episode {episode.id} cannot be read by the reward model: {error}"
            ) from error

    def rows(self, episodes: Sequence[Episode]) -> list[Row]:
        """Returns each episode as token ids; `positions` are the last tokens of its replies.

        Raises:
            RewardModelError: a conversation longer than the model's context, or one the chat
                template refuses.
        """
        limit = self.context_length
        rows = []
        for e, episode in enumerate(episodes):
            ids: list[int] = []
            ends: list[int] = []
            for prompt, reply in self._turns(episode):
                ids += [*prompt, *reply]
                ends.append(len(ids) - 1)
            if len(ids) > limit:
                raise RewardModelError(
                    f"episode {episode.id} has {len(ids)} tokens, more than the reward model's"
                    f" context of {limit}"
                )
            rows.append(Row(tuple(ids), e, tuple(ends), tuple(range(len(ends)))))
        return rows

    def read(self, member: Any, micro: Micro) -> Tensor:
        """Returns a member's raw scores at the positions of a micro-batch, [n], with gradient where
        enabled."""
        states = trunk(member)(input_ids=micro.ids, use_cache=False).last_hidden_state
        return member.score(states[micro.row, micro.position]).squeeze(-1).float()

    @torch.no_grad()
    def values(self, episodes: Sequence[Episode], *, micro_tokens: int = 16384) -> list[Tensor]:
        """Returns each member's score after each reply, [M, K] per episode of K turns, offsets
        subtracted.

        Equal conversations are read once, so that their scores are equal to the last bit, whatever
        else is in their batch.
        """
        rows = self.rows(episodes)
        found = [torch.zeros(len(self.members), len(row.positions)) for row in rows]
        first: dict[Any, int] = {}
        for i, row in enumerate(rows):
            first.setdefault((row.ids, row.positions), i)
        for micro in divide([rows[i] for i in first.values()], micro_tokens, self.device):
            for m, member in enumerate(self.members):
                scores = (self.read(member, micro) - self.offsets[m]).cpu()
                for e, k, value in zip(
                    micro.episode.tolist(), micro.action.tolist(), scores.tolist(), strict=True
                ):
                    found[e][m, k] = value
        return [found[first[row.ids, row.positions]] for row in rows]


def load_member(name: str, seed: int | None = None) -> tuple[Any, Any]:
    """Loads a tokenizer and a model with a scalar head; the head of a plain language model is drawn
    from the seed.

    Raises:
        RewardModelError: no such model, or none that can have a head.
    """
    import transformers

    auto: Any = transformers
    name = str(located(name))
    try:
        tokenizer = auto.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        with LOADING, torch.random.fork_rng():
            torch.manual_seed(seed or 0)
            model = auto.AutoModelForSequenceClassification.from_pretrained(
                name,
                num_labels=1,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RewardModelError(
            f"cannot load the reward model {name!r}: {type(error).__name__}: {error}"
        ) from error
    if tokenizer.chat_template is None:
        raise RewardModelError(
            f"the tokenizer of the reward model {name!r} has no chat template, which conversations"
            " need"
        )
    return tokenizer, model
