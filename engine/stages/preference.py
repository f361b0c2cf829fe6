"""`preference`: trains the policy on comparisons or on labels, with an optimizer that consumes
them. Nothing is played.

Comparisons are those the run has had made so far (`rank`), or come from a file. Labels (liked or
not) come from a file, or from the comparisons: the better conversation of a pair counts as liked,
the worse as not. Conversations that a policy of ours sampled train on their own tokens; written
ones are tokenized by the policy's chat template.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from ..analysis.preferences import Pair, liked, pairs
from ..errors import ConfigError, PreferenceError
from ..exchange.reading import import_data, read_records, shares_opening
from ..exchange.records import Scored
from ..pipeline.parts import component
from ..pipeline.processes import shared
from ..pipeline.stage import Stage
from ..protocols import RunView
from ..records.episode import Episode
from ..records.feedback import Comparison
from ..records.update import Update
from ..util.ids import derive_id
from ..util.memory import explained_memory
from ..util.section import of_the_default
from ..util.suggest import did_you_mean

Weights = dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class Preference(Stage):
    """Trains the policy on comparisons, or on labels.

    Attributes:
        data: a file or folder of comparisons made elsewhere (docs/preference-data.md), besides what
            the run has had compared so far; for an optimizer that consumes labels, labels or
            ratings too.
        threshold: ratings from this one on count as liked; without it they must be labels, 0 or 1.
        optimizer: one that consumes comparisons (`dpo`) or labels (`kto`).
        weights: source name to what each of its comparisons counts relative to those of others; 1
            for those not named, 0 leaves a source out.
        epochs, batch_size: passes over the pairs (or labelled conversations), and how many make an
            update.
    """

    data: Path | None = None
    threshold: float | None = None
    optimizer: Any = "dpo"
    weights: Weights = {}
    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=64, ge=1)

    _optimizer_by_options = field_validator("optimizer", mode="before")(of_the_default)

    def outline(self) -> list[str]:
        """Returns what it trains on."""
        source = f"{self.data}, and " if self.data is not None else ""
        return [f"makes {self.epochs} passes over {source}what the run has had compared"]

    def check(self, run: RunView) -> None:
        """Checks that there is something to learn from, and that the optimizer trains on it."""
        if self.data is not None and not self.data.exists():
            raise ConfigError(f"preference.data: there is no file or folder {self.data}")
        if self.data is None and len(comparing(run)) == 1:
            raise ConfigError(
                "preference has nothing to learn from: put a `rank` stage before it, or give `data`"
            )
        check_weights(run, "preference", self.weights, self.data)
        optimizer = component(run.plugins, "optimizer", self.optimizer)
        if not {"comparisons", "labels"} & set(optimizer.consumes):
            raise ConfigError(
                "the preference stage has comparisons and labels, but the optimizer trains on"
                f" {', '.join(sorted(optimizer.consumes))}: use 'dpo' or 'kto' here, or the rl"
                " stage for it"
            )

    def play(self, run: RunView) -> Iterator[Update]:
        """Trains on the compared pairs or the labels, `batch_size` of them per update."""
        optimizer = component(run.plugins, "optimizer", self.optimizer)
        policy = run.policy
        optimizer.setup(policy)
        chosen, labelled = Chosen(), "labels" in optimizer.consumes
        done = run.begin({"optimizer": optimizer, "chosen": chosen})
        found: Sequence[Pair | Label]
        if labelled and self.data is not None and (chosen.liked or is_labelled(self.data)):
            found = chosen.labels(run, self.data, self.threshold)
            count = len(found)
        else:
            opinions = pairs(
                weighed("preference", chosen.comparisons(run, self.data), self.weights),
                self.weights,
            )
            decided = [p for p in opinions if p.probability != 0.5]
            found = pair_labels(decided) if labelled else decided
            count = len(found) + len(opinions) - len(decided)
        episodes = run.ledger.episodes(sorted({e for p in found for e in _ids(p)}))
        rows = {id_: _rows(policy, episode) for id_, episode in episodes.items()}
        alike = [
            p for p in found if shares_opening([episodes[id_] for id_ in _ids(p)])
        ]  # answers to one prompt: the losses say so
        fitting = [p for p in alike if all(rows[id_] for id_ in _ids(p))]
        if not fitting:
            what = "labelled conversations" if labelled else "pairs"
            raise ConfigError(
                f"preference: none of {count} {what} is decided, of answers to one prompt, and fits"
                f" the context of {policy.context_length} tokens"
            )
        per_epoch = math.ceil(len(fitting) / self.batch_size)
        updates = self.epochs * per_epoch
        for i in range(done, updates):
            epoch, place = divmod(i, per_epoch)
            mine = _shuffled(fitting, episodes, derive_id("pairs", run.seed, run.stage, epoch))
            mine = mine[place * self.batch_size : (place + 1) * self.batch_size]
            run.status("update", i + 1, updates, update=i + 1, updates=updates)
            with explained_memory(
                "the update",
                "`activation_memory` or `micro_tokens` of the optimizer, or `batch_size`",
            ):
                batch = (
                    label_batch(mine, episodes, rows)
                    if labelled
                    else preference_batch(mine, episodes, rows)
                )
                batch.progress, batch.seed = (
                    i / updates,
                    int(derive_id(run.seed, run.updates + 1)[:12], 16),
                )
                optimizer.prepare(policy, batch)
                metrics = optimizer.update(policy, batch)
            policy.version += 1
            more = {
                "labelled" if labelled else "pairs": float(len(fitting)),
                "undecided_or_too_long": float(count - len(found) + len(alike) - len(fitting)),
                "different_prompts": float(len(found) - len(alike)),
            }
            yield run.finish_update({**metrics, **more})


@dataclass(frozen=True, slots=True)
class Label:
    """A conversation, and whether it was liked."""

    episode: str
    liked: bool


def pair_labels(found: Sequence[Pair]) -> list[Label]:
    """Both conversations of every pair, the likelier better one as liked.

    One that won here and lost there appears as both.
    """
    labels: dict[Label, None] = {}
    for p in found:
        better, worse = (p.first, p.second) if p.probability > 0.5 else (p.second, p.first)
        labels |= dict.fromkeys((Label(better, True), Label(worse, False)))
    return list(labels)


def is_labelled(path: Path) -> bool:
    """Whether a file holds labels or ratings of whole conversations; then those are what labels
    come from, not its comparisons."""
    return any(
        isinstance(record, Scored) and record.score is not None for record in read_records(path)
    )


def _ids(item: Pair | Label) -> tuple[str, ...]:
    return (item.episode,) if isinstance(item, Label) else (item.first, item.second)


def comparing(run: RunView) -> list[str]:
    """The stages up to the present one that are there to have conversations compared: what they say
    is for training.

    Comparisons made elsewhere, in `evaluate` on held-out starts above all, are not.
    """
    makes = {label for label, stage in run.stages if stage.makes_comparisons}
    return [label for label in run.before if label in makes] + [run.stage]


def comparisons_of(
    run: RunView, *, stages: Sequence[str] | None = None, corrected: bool = False
) -> list[Comparison]:
    """Returns the comparisons of a run's conversations, late ones too, by group and id.

    Args:
        run: the run.
        stages: only on conversations played or imported there.
        corrected: also those that a correction has replaced; for training that began before.
    """
    found = run.ledger.feedback(
        run=run.id, stages=stages, kind="comparison", status="scored", late=True,
        corrected=corrected, order="target",
    )  # fmt: skip
    return [a for a in found if isinstance(a, Comparison)]


def check_weights(
    run: RunView, section: str, weights: Mapping[str, float], data: Path | None
) -> None:
    """Refuses weights of sources that will not have compared anything, before anything is played;
    `data` and stages without `compared_by` may hold any: those are looked at when they have
    (`weighed`).

    Raises:
        ConfigError: a name that no earlier stage asks, or all that it asks weigh 0.
    """
    stages = dict(run.stages)
    asked = [stages[label].compared_by(run) for label in comparing(run)[:-1]]
    if weights and data is None and None not in asked:
        _known(section, weights, {name for names in asked for name in names or ()})


def weighed(
    section: str, comparisons: Sequence[Comparison], weights: Mapping[str, float]
) -> list[Comparison]:
    """The comparisons that weigh anything.

    Raises:
        ConfigError: a weight of a source that compared nothing, or all that compared weigh 0.
    """
    if weights:
        _known(section, weights, {c.stamp.source for c in comparisons})
    return [c for c in comparisons if weights.get(c.stamp.source, 1.0)]


def _known(section: str, weights: Mapping[str, float], sources: Collection[str]) -> None:
    for name in weights:
        if name not in sources:
            raise ConfigError(
                f"{section}.weights: no source {name!r} compares anything before this"
                f" stage.{did_you_mean(name, sources)}"
            )
    if not any(weights.get(name, 1.0) for name in sources):
        raise ConfigError(
            f"{section}.weights: all sources weigh 0, so there is nothing to learn from"
        )


class Chosen:
    """Which comparisons or labels a stage trains on: all that the run has had made, and those of a
    file. Decided once, and kept with its
    checkpoints: what arrives or is changed later must not change a run that goes on."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.liked: list[bool] = []  # of episodes; empty where `ids` are comparisons

    def comparisons(self, run: RunView, data: Path | None) -> list[Comparison]:
        """The comparisons, by group and id; the first call decides which.

        Raises:
            ConfigError: there are none.
            PreferenceError: the file holds something else.
        """
        if not self.ids:
            if data is not None and run.is_main:
                episodes, comparisons, scores = import_data(
                    data, run=run.id, stage=run.stage, update=run.start + 1
                )
                if not comparisons:
                    raise PreferenceError(
                        f"{data} holds labels or ratings, no comparison: the optimizer kto trains"
                        " on those"
                    )
                run.ledger.add_episodes(episodes)
                run.ledger.add_feedback([*comparisons, *scores])
            self.ids = shared(
                run,
                [c.id for c in comparisons_of(run, stages=comparing(run))] if run.is_main else [],
            )
        if not self.ids:
            why = [
                f"{a.status}: {a.reason}"
                for a in run.ledger.feedback(run=run.id, kind="comparison", late=True)
                if a.status != "scored"
            ]
            asked = f" {len(why)} were asked and did not, e.g. {why[0]}." if why else ""
            raise ConfigError(
                f"{run.stage}: no rater has compared anything in this run yet, so there is nothing"
                f" to learn from.{asked}"
            )
        wanted = set(self.ids)
        return [c for c in comparisons_of(run, corrected=True) if c.id in wanted]

    def labels(self, run: RunView, data: Path, threshold: float | None = None) -> list[Label]:
        """The labels of a file, recorded as feedback; the first call decides which.

        Raises:
            PreferenceError: the file holds something else, or ratings and no threshold is stated.
        """
        if not self.ids:
            labels: list[tuple[str, bool]] = []
            if run.is_main:
                episodes, comparisons, scores = import_data(
                    data, run=run.id, stage=run.stage, update=run.start + 1
                )
                labels = [
                    (f.episode, liked(f.score, threshold)) for f in scores if f.score is not None
                ]
                run.ledger.add_episodes(episodes)
                run.ledger.add_feedback([*comparisons, *scores])
            labels = shared(run, labels)
            self.ids, self.liked = (
                [episode for episode, _ in labels],
                [label for _, label in labels],
            )
        return [Label(id_, liked) for id_, liked in zip(self.ids, self.liked, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Returns the ids of what was chosen, and the labels."""
        return {"ids": self.ids, "liked": self.liked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the ids and labels of a checkpoint."""
        self.ids, self.liked = list(state["ids"]), list(state.get("liked", ()))


def _shuffled(found: Sequence[Any], episodes: Mapping[str, Episode], seed: str) -> list[Any]:
    """In an order that depends on the seed and on what was played, not on ids: those hold the run's
    name."""
    place = {id_: (e.start.key, e.update, e.slot) for id_, e in episodes.items()}
    return sorted(
        found,
        key=lambda p: derive_id(
            seed, sorted(place[id_] for id_ in _ids(p)), p.liked if isinstance(p, Label) else None
        ),
    )


def _rows(policy: Any, episode: Episode) -> list[tuple[list[int], list[int]]] | None:
    """Returns (ids read, ids sampled) per turn: as sampled, or as the chat template lays the
    conversation out; None if it does not fit.

    Raises:
        ConfigError: it is not one conversation, or the template refuses it.
    """
    if episode.forked:
        raise ConfigError(
            f"preference: the episode {episode.id} has several contexts, and a comparison trains"
            " one; leave it out, or train on it by `rl`"
        )
    if all(t.action_ids is not None for t in episode.turns) and episode.history == "append":
        turns = [(list(t.prompt_ids), list(t.action_ids or ())) for t in episode.turns]
    else:
        context = [m for m in episode.messages if m is not episode.final]
        try:
            turns = policy.chat.conversation(context, episode.tools)
        except ValueError as error:
            begins = f"{episode.turns[0].observation.content!r:.80}"
            raise ConfigError(
                f"preference: the conversation {episode.id} that begins {begins} cannot be"
                f" rendered: {error}"
            ) from error
    return turns if sum(len(a) + len(b) for a, b in turns) <= policy.context_length else None


def label_batch(
    found: list[Label],
    episodes: Mapping[str, Episode],
    rows: Mapping[str, list[tuple[list[int], list[int]]] | None],
) -> Any:
    """Labelled conversations as one batch: what an optimizer that consumes labels trains on."""
    from ..policy.batching import written_batch

    labelled = [rows[label.episode] or [] for label in found]
    return written_batch(
        [episodes[label.episode] for label in found],
        labelled,
        labels=[float(label.liked) for label in found],
    )


def preference_batch(
    found: list[Pair],
    episodes: Mapping[str, Episode],
    rows: Mapping[str, list[tuple[list[int], list[int]]] | None],
) -> Any:
    """Pairs and their conversations as one batch: what an optimizer that consumes comparisons
    trains on."""
    from ..policy.batching import written_batch

    ids = list(dict.fromkeys(e for p in found for e in (p.first, p.second)))
    index = {id_: e for e, id_ in enumerate(ids)}
    ordered = []
    for p in found:
        better, worse = (p.first, p.second) if p.probability > 0.5 else (p.second, p.first)
        sure = max(p.probability, 1 - p.probability)
        ordered.append((index[better], index[worse], sure, p.margin, p.weight))
    return written_batch([episodes[id_] for id_ in ids], [rows[id_] or [] for id_ in ids], ordered)
