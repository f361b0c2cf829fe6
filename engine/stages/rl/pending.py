"""Play that goes on while answers are awaited (`rl: {pending: ...}`): what was played and has not
trained, and what of it trains next.

An update takes the first `groups` groups, in the order they were played, that wait for no answer
any more. Where there are too few of them another round is played with the policy as it is, as long
as at most `pending` episodes wait for answers; where there is no room, the run waits. So nothing is
ever played ahead while there is something to train on, and with answers that come at once every
update is on its own policy's conversations, as in lockstep.

What makes it exact over a kill:

- rounds are numbered through the stage, and a round's episodes carry the update during which they
  were played: the ledger knows what was played when;
- an update's decision (who trains on which answers, who got no reward) is one transaction,
  `add_members`. Either it is there, and a resumed run makes that very update; or it is not, and
  nothing has happened that another decision could contradict. What is too old for an update depends
  on the policy's version alone.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import ConfigError, Interrupted
from ...ledger.rows import Member
from ...pipeline.processes import shared
from ...protocols import RunView
from ...records.episode import Episode, Start
from ...records.feedback import Answer
from ...records.starts import StartNumber
from ...rollout.conversation import episode_id
from ..collect import grouped, listen, pauses, waiting_note
from .collect import Collector
from .experience import Experience
from .parts import Parts
from .records import trainable
from .settings import RLSettings

OLD, ENDED = "too old", "stage ended"  # why groups leave without training


@dataclass(frozen=True, slots=True)
class Group:
    """A group that was played and has not trained.

    Attributes:
        start: the number of its start.
    """

    key: str
    start: StartNumber
    episodes: tuple[Episode, ...]

    def age(self, version: int) -> int:
        """How many versions of the policy came after the one that sampled the oldest of its
        replies."""
        return version - min(
            (turn.policy_version for e in self.episodes for turn in e.turns), default=version
        )


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done next.

    Attributes:
        play: how many groups to play.
        complete: groups with complete feedback: those that train, and those that got no reward.
        feedback: on these, by group.
    """

    what: Literal["look", "play", "wait", "train", "stop"]
    play: int = 0
    complete: tuple[Group, ...] = ()
    feedback: Mapping[str, list[Answer]] = field(default_factory=dict)


class Pending(Collector):
    """Holds the groups of an `rl` stage that were played and have not trained, in the order they
    were played.

    Of several processes the main one decides, and holds them after a resume.
    """

    def __init__(
        self, run: RunView, settings: RLSettings, parts: Parts, players: Mapping[str, Any]
    ) -> None:
        super().__init__(run, settings, parts, players)
        self.rounds = 0  # played in this stage
        self.groups: list[Group] = []
        self.too_old = 0  # episodes given up since the last update
        self._asked: set[str] = set()  # groups that this process has asked about
        # Groups whose feedback is complete, with its ids, and which of them got no reward.
        self._judged: tuple[Any, set[str]] = (None, set())

    def collect(self, i: int) -> Experience:
        """Returns the groups of update i of the stage, playing and waiting as need be.

        Raises:
            Interrupted: the run is to stop.
        """
        run, began, waited = self.run, time.perf_counter(), 0.0
        experience = Experience(self.progress(i))
        self._forget_ended()
        self._leave_out_old()
        self._adopt(experience)
        step, looks = (
            shared(run, self._recorded() if run.is_main else None),
            pauses(self.settings.poll),
        )
        while step.what not in ("train", "stop"):
            if step.what == "play":
                self._play(experience, self._next_starts(step.play, least=1))
                looks = pauses(self.settings.poll)
            elif step.what == "wait" and run.is_main:
                since = run.clock()
                run.sleep(next(looks))
                waited += run.clock() - since
            step = shared(run, self._step(experience, i) if run.is_main else None)
        if step.what == "stop":
            raise Interrupted
        gone = {group.key for group in step.complete}
        self.groups = [group for group in self.groups if group.key not in gone]
        experience.numbers |= numbers_of(step.complete)
        episodes = [e for group in step.complete for e in group.episodes]
        rewards = self.combine(episodes, experience.numbers, step.feedback) if run.is_main else {}
        experience.add(episodes, shared(run, rewards), step.feedback)
        experience.feedback_seconds = time.perf_counter() - began - experience.play_seconds
        experience.metrics = {
            "pending": float(sum(len(group.episodes) for group in self.groups)),
            "too_old": float(self.too_old),
            "seconds/waited": waited,
        }
        self.too_old = 0
        return experience

    def states(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of collecting: itself, as `pending`."""
        return {**super().states(), "pending": self}

    def close(self) -> None:
        """Records what is left when the stage ends and will not train, so that no rater is asked
        about it any more."""
        self._leave_out(self.groups, self.run.updates, ENDED)

    # What is played.

    def _adopt(self, experience: Experience) -> None:
        """Takes up the rounds of the present update that the ledger holds already; they were played
        before a kill."""
        while chosen := self._recorded_round():
            self._play(experience, chosen)

    def _recorded_round(self) -> list[tuple[Start, StartNumber]]:
        """Returns the starts of the next round that the ledger holds conversations of, of none or
        some; a start is chosen after the one before it was found there."""
        run, where = self.run, self.place()
        found: list[tuple[Start, StartNumber]] = []
        for count in range(1, self.settings.groups + 1):
            chosen = self._next_starts(count)[len(found) :]
            if not chosen:
                break
            ids = [
                episode_id(where, start, slot)
                for start, slot in self.in_groups(start for start, _ in chosen)
            ]
            if not shared(run, bool(run.ledger.episodes(ids)) if run.is_main else False):
                break
            found += chosen
        return found

    def _next_starts(self, count: int, least: int = 0) -> list[tuple[Start, StartNumber]]:
        """Returns the starts of the next round: none of a group that waits."""
        taken = {group.start for group in self.groups}
        return self.starts.choose(count, taken, self.rounds, least=least)

    def _play(self, experience: Experience, chosen: Sequence[tuple[Start, StartNumber]]) -> None:
        """Plays a round."""
        starts = self.in_groups(start for start, _ in chosen)
        played = grouped(self.play_round(experience, starts, self.place()))
        self.rounds += 1
        self.starts.played([number for _, number in chosen])
        numbers = {start.key: number for start, number in chosen}
        self.groups += [
            Group(key, numbers[own[0].start.key], tuple(own)) for key, own in played.items()
        ]
        if self.rounds == 1:
            self.check_turns([e for own in played.values() for e in own])

    # What leaves without training.

    def _leave_out(self, groups: Sequence[Group], update: int, why: str) -> None:
        if self.run.is_main:
            members = [
                Member(e.id, e.group, False, why) for group in groups for e in group.episodes
            ]
            self.run.ledger.add_members(self.run.id, update, members)
        gone = {group.key for group in groups}
        self.groups = [group for group in self.groups if group.key not in gone]

    def _leave_out_old(self) -> None:
        """Gives up what is too old for the present update, answered or not, and for every later
        one."""
        old = [
            group
            for group in self.groups
            if group.age(self.run.policy.version) > self.settings.staleness
        ]
        self._leave_out(old, self.run.updates + 1, OLD)
        self.too_old += sum(len(group.episodes) for group in old)

    def _forget_ended(self) -> None:
        """A stage that had ended gave up what was left; when it is extended, the checkpoint may
        still hold that."""
        if self.run.is_main:
            decided = self.run.ledger.decided([group.key for group in self.groups])
            ended = {key for key, update in decided.items() if update <= self.run.updates}
            self.groups = [group for group in self.groups if group.key not in ended]

    # What is decided, in the main process.

    def _recorded(self) -> Step:
        """The decision on the present update that a killed run had made; "look" where there is
        none."""
        run = self.run
        members = [
            m for m in run.ledger.members(run.id, run.updates + 1) if m.reason not in (OLD, ENDED)
        ]
        decided = {m.group for m in members}
        mine = [group for group in self.groups if group.key in decided]
        if not mine:
            return Step("look")
        feedback: dict[str, list[Answer]] = {group.key: [] for group in mine}
        group_of = {id_: m.group for m in members for id_ in m.feedback}
        for answer in run.ledger.feedback(ids=list(group_of), late=True, corrected=True):
            feedback[group_of[answer.id]].append(answer)
        return Step("train", complete=tuple(mine), feedback=feedback)

    def _step(self, experience: Experience, i: int) -> Step:
        """Asks about new groups, polls the sources, and decides what to do next."""
        run, settings = self.run, self.settings
        self._ask()
        found, feedback = listen(
            run,
            self.parts.sources,
            {group.key: group.episodes for group in self.groups},
            self.notified,
        )
        ready, needed = set(found), (settings.updates - i) * settings.groups
        # Combiners may take long over many raters' answers: they are asked only where it can matter
        # that a group has no reward.
        matters = len(ready) >= min(settings.groups, len(self.groups)) or len(self.groups) >= needed
        without_reward = (
            self._without_reward([group for group in self.groups if group.key in ready], feedback)
            if matters
            else set()
        )
        alive = [group for group in self.groups if group.key not in without_reward]
        chosen = {
            group.key
            for group in [group for group in alive if group.key in ready][: settings.groups]
        }
        if len(chosen) == settings.groups:
            complete = tuple(group for group in self.groups if group.key in chosen | without_reward)
            return Step(
                "train",
                complete=complete,
                feedback={group.key: feedback[group.key] for group in complete},
            )
        if run.stopping:
            return Step("stop")
        waiting = [group for group in alive if group.key not in ready]
        # Plays ahead of the present update only while answers are awaited, and never more groups
        # than the stage's updates need.
        count = min(settings.groups, (needed if waiting else settings.groups) - len(alive))
        if count > 0 and (len(waiting) + count) * settings.group_size <= settings.pending:
            return Step("play", play=count)
        note = waiting_note(run, self.parts.sources, [group.key for group in waiting])
        run.status("feedback", len(chosen), settings.groups, note=note, **experience.progress)
        return Step("wait")

    def _ask(self) -> None:
        """Asks about groups that this process has not asked about: new ones, and after a resume all
        that are pending."""
        new = [group for group in self.groups if group.key not in self._asked]
        earlier_groups = self._asked & {group.key for group in self.groups}
        if new:
            groups = [
                {group.key: group.episodes for group in new if group.start.env == index}
                for index in range(len(self.settings.env))
            ]
            self.parts.sources.ask(groups, self.run.ledger, earlier_groups=earlier_groups)
        self._asked |= {group.key for group in new}

    def _without_reward(
        self, groups: Sequence[Group], feedback: Mapping[str, list[Answer]]
    ) -> set[str]:
        """Returns, of the groups whose feedback is complete, those in which nothing can train: no
        source answered, or all abstained or failed."""
        seen = [(group.key, [answer.id for answer in feedback[group.key]]) for group in groups]
        if seen != self._judged[0]:
            # Combiners must not learn from this trial: they do when the update is made.
            combiners = self.parts.combiners
            before = [copy.deepcopy(combiner.state_dict()) for combiner in combiners]
            episodes = [e for group in groups for e in group.episodes]
            rewards = self.combine(episodes, numbers_of(groups), feedback)
            for combiner, state in zip(combiners, before, strict=True):
                if state:
                    combiner.load_state_dict(state)
            min_group = self.settings.min_group if "group" in self.parts.credit.needs else 0
            without_reward = {
                g.key for g in groups if not trainable(g.episodes, rewards, min_group)[0]
            }
            if len(without_reward) > self.settings.groups >= len(self._judged[1]):
                warnings.warn(
                    f"{len(without_reward)} groups were played for this update and got no reward"
                    " at all: no source answered in time, or all abstained or failed. Are there"
                    " raters at work, and is the `deadline` long enough?",
                    stacklevel=2,
                )
            self._judged = (seen, without_reward)
        return self._judged[1]

    # What a checkpoint keeps.

    def state_dict(self) -> dict[str, Any]:
        """Returns the rounds played, the count of groups too old, and the ids of what waits."""
        kept = [
            {"key": g.key, "start": list(g.start), "episodes": [e.id for e in g.episodes]}
            for g in self.groups
        ]
        return {"rounds": self.rounds, "too_old": self.too_old, "groups": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a checkpoint's counts, and reads the waiting groups from the ledger."""
        self.rounds, self.too_old = int(state["rounds"]), int(state["too_old"])
        if not self.run.is_main:
            return
        ids = [id_ for kept in state["groups"] for id_ in kept["episodes"]]
        found = self.run.ledger.episodes(ids)
        if len(found) < len(ids):
            raise ConfigError(
                f"{len(ids) - len(found)} conversations that waited for answers are not in the"
                " ledger: it is not the one this run wrote. Put that one back"
            )
        self.groups = [
            Group(k["key"], StartNumber(*k["start"]), tuple(found[id_] for id_ in k["episodes"]))
            for k in state["groups"]
        ]


def numbers_of(groups: Sequence[Group]) -> dict[str, StartNumber]:
    """Returns the number of every group's start, by the start's key."""
    return {e.start.key: group.start for group in groups for e in group.episodes}
