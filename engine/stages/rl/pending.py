"""Play that goes on while answers are awaited (`rl: {pending: ...}`): what was played and has not trained, and what of it trains next.

An update takes the first `groups` groups, in the order they were played, that wait for no answer any more. Where there are too few of
them another round is played with the policy as it is, as long as at most `pending` episodes wait for answers; where there is no room, the
run waits. So nothing is ever played ahead while there is something to train on, and with answers that come at once every update is on
its own policy's conversations, as in lockstep.

What makes it exact over a kill:

- rounds are numbered through the stage, and a round's episodes carry the update during which they were played: the ledger knows what was
  played when;
- an update's decision (who trains on which answers, who got no reward) is one transaction, `add_members`. Either it is there, and a
  resumed run makes that very update; or it is not, and nothing has happened that another decision could contradict. What is too old for
  an update depends on the policy's version alone.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ...errors import ConfigError
from ...ledger.rows import Member
from ...pipeline.processes import shared
from ...protocols import RunView
from ...records.episode import Episode, Start
from ...records.feedback import Answer
from ...rollout.conversation import Where, episode_id
from ..collect import grouped, listen, waiting_note

if TYPE_CHECKING:
    from .experience import Experience, Parts
    from .stage import RL


OLD, ENDED = "too old", "stage ended"  # why groups leave without training


@dataclass(frozen=True, slots=True)
class Group:
    """A group that was played and has not trained.

    Attributes:
        env: which environment of the mixture.
    """

    key: str
    env: int
    episodes: tuple[Episode, ...]

    def age(self, version: int) -> int:
        """How many versions of the policy came after the one that said the oldest of its replies."""
        return version - min((turn.policy_version for e in self.episodes for turn in e.turns), default=version)


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done next.

    Attributes:
        play: how many groups to play.
        heard: groups that all was said of: those that train, and those that nobody gave a reward.
        said: what was said of these.
    """

    what: Literal["look", "play", "wait", "train", "stop"]
    play: int = 0
    heard: tuple[Group, ...] = ()
    said: Mapping[str, list[Answer]] = field(default_factory=dict)


class Pending:
    """The groups of an `rl` stage that were played and have not trained, in the order they were played.

    Of several processes the main one decides, and holds them after a resume.
    """

    def __init__(self, run: RunView, stage: RL, parts: Parts) -> None:
        self.run, self.stage, self.parts = run, stage, parts
        self.rounds = 0  # played in this stage
        self.groups: list[Group] = []
        self.too_old = 0  # episodes given up since the last update
        self._asked: set[str] = set()  # groups that this process has asked about
        self._told: set[str] = set()  # answers that listeners know
        self._judged: tuple[Any, set[str]] = (None, set())

    def gather(self, experience: Experience, i: int) -> bool:
        """Fills the experience with the groups of update i of the stage, playing and waiting as need be. False: the run is to stop."""
        run, began, waited = self.run, time.perf_counter(), 0.0
        self._adopt(experience)
        self._forget_ended()
        self._leave_out_old()
        step = shared(run, self._recorded() if run.is_main else None)
        while step.what not in ("train", "stop"):
            if step.what == "play":
                self._play(experience, *self.stage.starts(run, self.rounds, step.play))
            elif step.what == "wait" and run.is_main:
                since = run.clock()
                run.sleep(self.stage.poll)
                waited += run.clock() - since
            step = shared(run, self._step(experience, i) if run.is_main else None)
        if step.what == "stop":
            return False
        gone = {group.key for group in step.heard}
        self.groups = [group for group in self.groups if group.key not in gone]
        experience.env_of |= {e.start.key: group.env for group in step.heard for e in group.episodes}
        episodes = [e for group in step.heard for e in group.episodes]
        rewards = self.stage.combine(self.parts, episodes, experience.env_of, step.said) if run.is_main else {}
        experience.add(episodes, shared(run, rewards), step.said)
        experience.heard = time.perf_counter() - began - experience.played
        experience.metrics = {
            "pending": float(sum(len(group.episodes) for group in self.groups)),
            "too_old": float(self.too_old),
            "seconds/waited": waited,
        }
        self.too_old = 0
        return True

    def close(self) -> None:
        """What is left when the stage ends will not train: it is recorded, so that nobody is asked about it any more."""
        self._leave_out(self.groups, self.run.updates, ENDED)

    # What is played.

    def _where(self) -> Where:
        return Where(self.run.id, self.run.stage, self.run.updates + 1, self.run.seed)

    def _adopt(self, experience: Experience) -> None:
        """Takes up the rounds of the present update that the ledger holds already; they were played before a kill."""
        run, where = self.run, self._where()
        while True:
            chosen, env_of = self.stage.starts(run, self.rounds, self.stage.groups)
            ids = {episode_id(where, start, slot): start.key for start, slot in chosen}
            there = {ids[id_] for id_ in run.ledger.episodes(list(ids))} if run.is_main else set()
            there = shared(run, there)
            if not there:
                return
            self._play(experience, [(start, slot) for start, slot in chosen if start.key in there], env_of)

    def _play(self, experience: Experience, chosen: Sequence[tuple[Start, int]], env_of: Mapping[str, int]) -> None:
        """Plays a round."""
        played = grouped(self.stage.play_round(experience, chosen, self._where()))
        self.rounds += 1
        self.groups += [Group(key, env_of[own[0].start.key], tuple(own)) for key, own in played.items()]
        if self.rounds == 1:
            self.stage.check_turns(self.run, [e for own in played.values() for e in own])

    # What leaves without training.

    def _leave_out(self, groups: Sequence[Group], update: int, why: str) -> None:
        if self.run.is_main:
            members = [Member(e.id, e.group, False, why) for group in groups for e in group.episodes]
            self.run.ledger.add_members(self.run.id, update, members)
        gone = {group.key for group in groups}
        self.groups = [group for group in self.groups if group.key not in gone]

    def _leave_out_old(self) -> None:
        """Gives up what is too old for the present update, answered or not, and for every later one."""
        old = [group for group in self.groups if group.age(self.run.policy.version) > self.stage.staleness]
        self._leave_out(old, self.run.updates + 1, OLD)
        self.too_old += sum(len(group.episodes) for group in old)

    def _forget_ended(self) -> None:
        """A stage that had ended gave up what was left; when it is extended, the checkpoint may still hold that."""
        if self.run.is_main:
            decided = self.run.ledger.decided([group.key for group in self.groups])
            ended = {key for key, update in decided.items() if update <= self.run.updates}
            self.groups = [group for group in self.groups if group.key not in ended]

    # What is decided, in the main process.

    def _recorded(self) -> Step:
        """The decision on the present update that a killed run had made; "look" where there is none."""
        run = self.run
        members = [m for m in run.ledger.members(run.id, run.updates + 1) if m.reason not in (OLD, ENDED)]
        decided = {m.group for m in members}
        mine = [group for group in self.groups if group.key in decided]
        if not mine:
            return Step("look")
        said: dict[str, list[Answer]] = {group.key: [] for group in mine}
        group_of = {id_: m.group for m in members for id_ in m.feedback}
        for answer in run.ledger.answers(list(group_of)):
            said[group_of[answer.id]].append(answer)
        return Step("train", heard=tuple(mine), said=said)

    def _step(self, experience: Experience, i: int) -> Step:
        """Asks about what is new, hears what there is, and says what is to be done next."""
        run, stage = self.run, self.stage
        self._ask()
        found, said = listen(run, self.parts.sources, {group.key: group.episodes for group in self.groups}, self._told)
        ready, needed = set(found), (stage.updates - i) * stage.groups
        # Combiners may take long over many raters' answers: they are asked only where it can matter that a group has no reward.
        matters = len(ready) >= min(stage.groups, len(self.groups)) or len(self.groups) >= needed
        silent = self._without_reward([group for group in self.groups if group.key in ready], said) if matters else set()
        alive = [group for group in self.groups if group.key not in silent]
        chosen = {group.key for group in [group for group in alive if group.key in ready][: stage.groups]}
        if len(chosen) == stage.groups:
            heard = tuple(group for group in self.groups if group.key in chosen | silent)
            return Step("train", heard=heard, said={group.key: said[group.key] for group in heard})
        if run.stopping:
            return Step("stop")
        waiting = [group for group in alive if group.key not in ready]
        # Ahead of the present update only while answers are awaited, and never more than the stage's updates need.
        count = min(stage.groups, (needed if waiting else stage.groups) - len(alive))
        if count > 0 and (len(waiting) + count) * stage.group_size <= stage.pending:
            return Step("play", play=count)
        note = waiting_note(run, self.parts.sources, [group.key for group in waiting])
        run.status("feedback", len(chosen), stage.groups, note=note, **experience.show)
        return Step("wait")

    def _ask(self) -> None:
        """Asks about groups that this process has not asked about: new ones, and after a resume all that are pending."""
        new = [group for group in self.groups if group.key not in self._asked]
        beside = self._asked & {group.key for group in self.groups}
        for index, sources in enumerate(self.parts.sources):
            if own := {group.key: group.episodes for group in new if group.env == index}:
                sources.ask(own, self.run.ledger, beside=beside)
        self._asked |= {group.key for group in new}

    def _without_reward(self, groups: Sequence[Group], said: Mapping[str, list[Answer]]) -> set[str]:
        """Of groups that all was said of, those in which nothing can train: nobody answered, or everybody abstained or failed."""
        seen = [(group.key, [answer.id for answer in said[group.key]]) for group in groups]
        if seen != self._judged[0]:
            combiners = self.parts.combiners  # they only try: what they learn is learned when an update is made
            before = [copy.deepcopy(c.state_dict()) if hasattr(c, "state_dict") else None for c in combiners]
            env_of = {e.start.key: group.env for group in groups for e in group.episodes}
            rewards = self.stage.combine(self.parts, [e for group in groups for e in group.episodes], env_of, said)
            for combiner, state in zip(combiners, before, strict=True):
                if state is not None:
                    combiner.load_state_dict(state)
            within = "group" in self.parts.credit.needs
            silent = {g.key for g in groups if not self.stage.members(g.episodes, rewards, within)[0]}
            if len(silent) > self.stage.groups >= len(self._judged[1]):
                warnings.warn(
                    f"{len(silent)} groups were played for this update and got no reward at all: nobody answered in time, or all abstained "
                    "or failed. Are there raters at work, and is the `deadline` long enough?",
                    stacklevel=2,
                )
            self._judged = (seen, silent)
        return self._judged[1]

    # What a checkpoint keeps.

    def state_dict(self) -> dict[str, Any]:
        kept = [{"key": g.key, "env": g.env, "episodes": [e.id for e in g.episodes]} for g in self.groups]
        return {"rounds": self.rounds, "too_old": self.too_old, "groups": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds, self.too_old = int(state["rounds"]), int(state["too_old"])
        if not self.run.is_main:
            return
        ids = [id_ for kept in state["groups"] for id_ in kept["episodes"]]
        found = self.run.ledger.episodes(ids)
        if len(found) < len(ids):
            raise ConfigError(
                f"{len(ids) - len(found)} conversations that waited for answers are not in the ledger: it is not the one this run wrote. "
                "Put that one back"
            )
        self.groups = [Group(k["key"], k["env"], tuple(found[id_] for id_ in k["episodes"])) for k in state["groups"]]
