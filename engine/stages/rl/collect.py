"""Plays the conversations of an update and has them judged.

`Collector` is what every way of collecting has in common: which starts, how they are played, how
feedback becomes rewards. `InStep` waits for all feedback on an update's own conversations;
`Pending` (pending.py) plays on while answers are awaited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import ConfigError, PluginError
from ...pipeline.processes import decided, processes
from ...protocols import RunView
from ...records.episode import Episode, Start
from ...records.feedback import Answer
from ...records.rewards import NoReward, Rewards, clipped
from ...records.starts import StartNumber
from ...rollout.conversation import Branch, Where, episode_id
from ...rollout.elsewhere import begin_elsewhere, has_arrived
from ...util.memory import explained_memory
from ..collect import grouped, play, share, wait_for_answers
from .experience import Experience
from .metrics import groups_with_signal, warn_unread
from .parts import Parts, part_name
from .settings import RLSettings
from .starts import Starts


class Collector:
    """Collects the experience of updates.

    Args:
        run: the run.
        settings: options of the stage.
        parts: the stage's parts; its sources are open.
        players: "policy", and other policies that play in seats, by name.
    """

    def __init__(
        self, run: RunView, settings: RLSettings, parts: Parts, players: Mapping[str, Any]
    ) -> None:
        self.run, self.settings, self.parts, self.players = run, settings, parts, players
        self.starts = Starts(run, settings, parts.curriculum)
        self.notified: set[str] = set()  # ids of the answers that listeners know

    def collect(self, i: int) -> Experience:
        """Collects the conversations of update i of the stage, with all required feedback on them.

        Raises:
            Interrupted: the run is to end; what was played and asked is kept, and nothing trains.
        """
        raise TypeError(f"{type(self).__name__} does not say how it collects")

    def meanwhile(self) -> None:
        """Does what should not wait until the present update is made; called after its backward
        passes, and while its feedback is awaited. What fails is raised when its round comes."""

    def has_more(self, i: int) -> bool:
        """Returns whether there is something for update i of the stage."""
        return True

    def states(self) -> dict[str, Any]:
        """Returns what a checkpoint must keep of this collector, by name."""
        return {"starts": self.starts}

    def close(self) -> None:
        """Ends the stage: records what will not train any more."""

    def refresh(self) -> None:
        """Lets every policy's backend take up its weights, and frees what it keeps."""
        for player in self.players.values():
            player.backend.refresh()

    def progress(self, i: int) -> dict[str, int]:
        """Returns the fields of the progress display in update i."""
        return {"update": i + 1, "updates": self.settings.updates}

    def place(self) -> Where:
        """Returns where the present update's conversations are played: their ids and noise derive
        from it."""
        return Where(self.run.id, self.run.stage, self.run.updates + 1, self.run.seed)

    def in_groups(self, starts: Iterable[Start]) -> list[tuple[Start, int]]:
        """Returns every start with each slot of a group."""
        return [(start, slot) for start in starts for slot in range(self.settings.group_size)]

    def play_round(
        self,
        experience: Experience | None,
        chosen: Sequence[tuple[Start | Branch, int]],
        where: Where,
        purpose: str = "",
        group_ended: Callable[[list[Episode]], None] | None = None,
    ) -> list[Episode]:
        """Plays conversations and records them.

        Args:
            experience: whose time and progress it is; None: of none, since nothing waits for it.
            chosen, where, purpose: as in `judged_round`.
            group_ended: as in `play`.
        """
        settings, began = self.settings, time.perf_counter()

        def show(done: int, total: int) -> None:
            if experience is not None:
                self.run.status(purpose or "play", done, total, **experience.progress)

        with explained_memory(
            "sampling", "`groups`, `backend: {name: in-process, rows: ...}` or `max_new_tokens`"
        ):
            episodes = play(
                self.run,
                self.players["policy"],
                chosen,
                where,
                group_ended=group_ended,
                max_turns=settings.max_turns,
                step_limit=settings.step_limit,
                schedule=settings.schedule,
                others=self.players,
                max_failure_rate=1.0 if purpose else settings.max_failure_rate,
                progress=show,
            )
        if experience is not None:
            experience.play_seconds += time.perf_counter() - began
        return episodes

    def ask(
        self,
        groups: Mapping[str, list[Episode]],
        numbers: Mapping[str, StartNumber],
        earlier: Collection[str] = (),
        ahead: bool = False,
    ) -> None:
        """Asks the sources about groups.

        Args:
            groups: the episodes, by group.
            numbers: of starts, by key.
            earlier: groups of the same round that were asked about before.
            ahead: their round is not yet.
        """
        by_env = [
            {k: m for k, m in groups.items() if numbers[m[0].start.key].env == index}
            for index in range(len(self.settings.env))
        ]
        self.parts.sources.ask(by_env, self.run.ledger, earlier_groups=earlier, ahead=ahead)

    def judged_round(
        self,
        experience: Experience,
        chosen: Sequence[tuple[Start | Branch, int]],
        where: Where,
        purpose: str = "",
    ) -> None:
        """Plays conversations, has them judged, and adds them to the experience. Sources are asked
        about a group when it has ended, while others are played.

        Args:
            experience: what they are added to.
            chosen: starts or branches, each with its slot.
            where: run, stage, update and seed they are played in.
            purpose: what they are played for, where they are not to train; combiners do not learn
                from them.

        Raises:
            Interrupted: the run was asked to end while feedback was awaited.
        """
        run, sources, asked = self.run, self.parts.sources, set[str]()

        def ask(groups: Mapping[str, list[Episode]]) -> None:
            self.ask(groups, experience.numbers, asked)
            asked.update(groups)

        group_ended = (lambda own: ask(grouped(own))) if sources.by_name() else None
        episodes = self.play_round(experience, chosen, where, purpose, group_ended)
        began = time.perf_counter()

        def judged() -> tuple[
            list[Episode], dict[str, Rewards | NoReward], dict[str, list[Answer]]
        ]:
            groups = grouped(episodes)
            ask({key: own for key, own in groups.items() if key not in asked})
            feedback = wait_for_answers(
                run,
                sources,
                groups,
                poll=self.settings.poll,
                show=experience.progress,
                notified=self.notified,
                meanwhile=self.meanwhile,
            )
            self.notified -= {answer.id for answers in feedback.values() for answer in answers}
            return (
                episodes,
                self.combine(episodes, experience.numbers, feedback, fit=not purpose),
                feedback,
            )

        experience.add(*decided(run, judged))
        experience.feedback_seconds += time.perf_counter() - began

    def combine(
        self,
        episodes: Sequence[Episode],
        numbers: Mapping[str, StartNumber],
        feedback: Mapping[str, list[Answer]],
        fit: bool = True,
    ) -> dict[str, Rewards | NoReward]:
        """Turns feedback by group into rewards by episode id. Episodes that failed have none."""
        by_env: dict[int, dict[str, list[Episode]]] = {}
        for episode in episodes:
            own = by_env.setdefault(numbers[episode.start.key].env, {})
            own.setdefault(episode.group, []).append(episode)
        rewards: dict[str, Rewards | NoReward] = {}
        for index, groups in by_env.items():
            combiner = self.parts.combiners[index]
            if fit:
                combiner.fit([answer for key in groups for answer in feedback[key]])
            for key, members in groups.items():
                sound = [e for e in members if e.ending != "failed" and e.turns]
                combined = combiner.combine(sound, feedback[key]) if sound else []
                if len(combined) != len(sound):
                    raise PluginError(
                        f"combiner {part_name(self.settings.combiner)!r} gave {len(combined)}"
                        f" rewards for a group of {len(sound)} episodes"
                    )
                if self.settings.reward_clip is not None:
                    limit = self.settings.reward_clip
                    combined = [
                        clipped(r, limit) if isinstance(r, Rewards) else r for r in combined
                    ]
                rewards |= {e.id: r for e, r in zip(sound, combined, strict=True)}
            if combiner.turns is not None and "turn_scores" not in self.parts.credit.needs:
                answers = (answer for key in groups for answer in feedback[key])
                warn_unread(self.run, combiner.turns, self.parts.sources.weights(index), answers)
        return rewards

    def check_turns(self, episodes: Sequence[Episode]) -> None:
        """Raises `ConfigError` when no conversation could even begin."""
        if all(not e.turns and e.reason == "context" for e in episodes):
            raise ConfigError(
                "no episode had a single turn: the first prompt does not fit the policy's context"
                f" of {self.run.policy.context_length} tokens"
            )


@dataclass(slots=True)
class _Ahead:
    """A round that is begun before its update.

    Attributes:
        chosen: its starts, with their numbers.
        conversations: the starts, each with every slot of its group.
        recorded: whether it was played out and is in the ledger.
        asked: whether sources were asked about it.
        failed: why it could not be played out.
    """

    chosen: list[tuple[Start, StartNumber]]
    conversations: list[tuple[Start, int]]
    where: Where
    recorded: bool = False
    asked: bool = False
    failed: Exception | None = None


class InStep(Collector):
    """Plays the groups of an update and waits for all feedback on them; with `overlap` those of the
    next ones are begun before the update is made, and judged as soon as they are played.

    What is begun is played out and recorded before a checkpoint is written: the policy that samples
    it is not in the checkpoint, and a run that goes on finds the conversations in the ledger.
    """

    def __init__(
        self, run: RunView, settings: RLSettings, parts: Parts, players: Mapping[str, Any]
    ) -> None:
        super().__init__(run, settings, parts, players)
        if settings.overlap and processes(run)[0] > 1 and not run.policy.is_sharded:
            # The main process alone writes checkpoints then, and all play out what is begun.
            raise ConfigError(
                "`overlap` with several processes needs `shard: true`, so that all of them write"
                " checkpoints together: set it, or leave `overlap` out"
            )
        self._begun: list[_Ahead] = []  # the next rounds

    def collect(self, i: int) -> Experience:
        """Plays and judges round i; groups without a signal are played again from other starts, up
        to `resample` times."""
        experience = Experience(self.progress(i))
        missing = self.settings.groups
        for again in range(1 + self.settings.resample):
            taken = set(experience.numbers.values())
            taken |= {number for begun in self._begun for _, number in begun.chosen}
            place, least = ((i, "again", again), 0) if again else ((i,), missing)
            if self.settings.overlap and not again:
                self._begin(i)
                begun = self._begun.pop(0)
                if begun.failed is not None:
                    raise begun.failed
                chosen = begun.chosen
            else:
                chosen = self.starts.choose(missing, taken, *place, least=least)
            if not chosen:
                break
            experience.numbers |= {start.key: number for start, number in chosen}
            groups = self.in_groups(start for start, _ in chosen)
            self.judged_round(experience, groups, self.place())
            with_signal = set(groups_with_signal(experience.episodes, experience.rewards))
            taught = {e.start.key for e in experience.episodes if e.group in with_signal}
            missing = self.settings.groups - len({experience.numbers[key] for key in taught})
            if not missing:
                break
        return experience

    def _begin(self, i: int) -> None:
        """Begins round i and those after it, as far as they are to be and are not begun: they are
        played one after the other, while round i is judged and trained on."""
        settings = self.settings
        while len(self._begun) <= min(settings.overlap, settings.updates - i - 1):
            ahead = len(self._begun)
            taken = {number for begun in self._begun for _, number in begun.chosen}
            chosen = self.starts.choose(settings.groups, taken, i + ahead, least=settings.groups)
            begun = self._ahead(chosen, ahead)
            with self.run.policy.whole():
                begin_elsewhere(
                    self.players["policy"],
                    share(self.run, begun.conversations),
                    begun.where,
                    max_turns=settings.max_turns,
                    step_limit=settings.step_limit,
                    schedule=settings.schedule,
                )
            self._begun.append(begun)

    def _ahead(self, chosen: list[tuple[Start, StartNumber]], ahead: int) -> _Ahead:
        where = replace(self.place(), update=self.run.updates + 1 + ahead)
        return _Ahead(chosen, self.in_groups(start for start, _ in chosen), where)

    def meanwhile(self) -> None:
        """Records rounds that have been played out, and asks about them; not with several
        processes, which do everything together."""
        for begun in self._begun if processes(self.run)[0] == 1 else ():
            here = begun.recorded or has_arrived(
                self.players["policy"], begun.conversations, begun.where
            )
            if here and not begun.asked and begun.failed is None:
                self._take(begun)

    def _take(self, begun: _Ahead) -> None:
        """Plays out a round, records it, and asks about it."""
        alone = processes(self.run)[0] == 1
        try:
            groups = grouped(self.play_round(None, begun.conversations, begun.where))
        except Exception as error:
            if not alone:  # the others would go on
                raise
            begun.failed = error
            return
        begun.recorded = True
        if alone:
            self.ask(groups, {start.key: number for start, number in begun.chosen}, ahead=True)
            begun.asked = True

    def states(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of collecting: with `overlap` the rounds that are begun,
        too, as `ahead`."""
        return {**super().states(), **({"ahead": self} if self.settings.overlap else {})}

    def state_dict(self) -> dict[str, Any]:
        """Plays out and records what is begun; returns whose starts it is of."""
        for begun in self._begun:
            if not begun.recorded and begun.failed is None:
                self._take(begun)
        own = [dict.fromkeys(number for _, number in begun.chosen) for begun in self._begun]
        return {"numbers": [[list(number) for number in numbers] for numbers in own]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the rounds that were begun; the ledger holds their conversations."""
        self._begun = [
            self._ahead(self.starts.of(StartNumber(*number) for number in numbers), ahead)
            for ahead, numbers in enumerate(state["numbers"])
        ]
        for begun in self._begun:
            ids = [episode_id(begun.where, start, slot) for start, slot in begun.conversations]
            begun.recorded = processes(self.run)[0] == 1 and len(
                self.run.ledger.episodes(ids)
            ) == len(ids)
