"""Trains on what was played already (`rl: {episodes: ledger}`): conversations of a policy with its
users, recorded by `turnwise serve`, and the users' feedback on them, whenever it came.

An update takes the oldest conversations that feedback has scored and that have trained nowhere,
`groups * group_size` of them; the stage ends where there are fewer, and what is left waits for
another run. Each was sampled by the policy as it was then: those that are more than `staleness`
versions older leave without training, and the others count with the optimizer's importance weights.

What makes it exact over a kill is the ledger: who trains in an update, and on which answers, is
written before the update is made, and a resumed run makes that very update.
"""

from __future__ import annotations

import time

from ...errors import ConfigError
from ...ledger.rows import Member
from ...pipeline.processes import shared
from ...records.episode import Episode
from ...records.feedback import Answer
from ...records.starts import StartNumber
from .collect import Collector
from .experience import Experience
from .pending import OLD

RUN = "served"  # what `turnwise serve` records as the run of its conversations


class Recorded(Collector):
    """Collects served conversations from the run's ledger."""

    def has_more(self) -> bool:
        """Returns whether an update was decided already, or there is enough for one."""
        run, settings = self.run, self.settings
        size = settings.groups * settings.group_size
        found = bool(self._decided()) or len(self._fresh()) >= size if run.is_main else False
        return shared(run, found)

    def collect(self, i: int) -> Experience:
        """Returns the conversations of update i of the stage with the feedback on them.

        Raises:
            ConfigError: they were sampled at another temperature.
        """
        run, settings, began = self.run, self.settings, time.perf_counter()
        experience = Experience(self.progress(i))
        episodes: list[Episode] = []
        feedback: dict[str, list[Answer]] = {}
        if run.is_main:
            size = settings.groups * settings.group_size
            chosen = self._decided() or self._fresh()[:size]
            episodes = sorted(chosen, key=lambda episode: episode.id)
            feedback = self._feedback(episodes)
        episodes, feedback = shared(run, (episodes, feedback))
        for episode in episodes:
            if (there := episode.info.get("temperature")) != settings.temperature:
                raise ConfigError(
                    f"conversation {episode.id} was sampled at temperature {there}, and the stage"
                    f" trains at {settings.temperature}: give it `temperature: {there}`"
                )
        experience.numbers = {e.start.key: StartNumber(0, k) for k, e in enumerate(episodes)}
        rewards = self.combine(episodes, experience.numbers, feedback)
        experience.add(episodes, rewards, feedback)
        experience.feedback_seconds = time.perf_counter() - began
        ages = [self._age(episode) for episode in episodes]
        experience.metrics = {
            "staleness/mean": sum(ages) / len(ages), "staleness/max": float(max(ages)),
        }  # fmt: skip
        return experience

    def _age(self, episode: Episode) -> int:
        """Returns how many versions of the policy came after the one that sampled a
        conversation."""
        return self.run.policy.version - min(turn.policy_version for turn in episode.turns)

    def _decided(self) -> list[Episode]:
        """Returns the members of the present update, where a killed run had decided on them."""
        members = self.run.ledger.members(self.run.id, self.run.updates + 1)
        ids = [member.episode for member in members if member.reason != OLD]
        return list(self.run.ledger.episodes(ids).values())

    def _fresh(self) -> list[Episode]:
        """Returns the conversations that may train, the oldest first; those that are too old leave.

        A conversation whose replies have no tokens, because they were redacted, never trains.
        """
        run = self.run
        names = [source.name for source in self.parts.sources.of_env[0]]
        found = run.ledger.judged_episodes(RUN, names)
        sound = [e for e in found if e.turns and all(t.action_ids is not None for t in e.turns)]
        old = [e for e in sound if self._age(e) > self.settings.staleness]
        if old:
            members = [Member(e.id, e.group, False, OLD) for e in old]
            run.ledger.add_members(run.id, run.updates + 1, members)
        left = {e.id for e in old}
        return [e for e in sound if e.id not in left]

    def _feedback(self, episodes: list[Episode]) -> dict[str, list[Answer]]:
        """Returns the answers on conversations by group, each conversation's own."""
        group_of = {episode.id: episode.group for episode in episodes}
        feedback: dict[str, list[Answer]] = {group: [] for group in group_of.values()}
        names = [source.name for source in self.parts.sources.of_env[0]]
        for answer in self.run.ledger.feedback(list(feedback), sources=names, kind="feedback"):
            feedback[group_of[answer.target]].append(answer)
        return feedback
