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
import warnings

from ...errors import ConfigError
from ...ledger.rows import Member
from ...pipeline.processes import shared
from ...records.episode import Episode
from ...records.feedback import Answer
from ...records.starts import StartNumber
from .collect import Collector
from .experience import Experience
from .pending import OLD

REDACTED = "redacted"  # why a conversation leaves without training
RUN = "served"  # what `turnwise serve` records as the run of its conversations


class Recorded(Collector):
    """Collects served conversations from the run's ledger."""

    _collected = False

    @property
    def _names(self) -> list[str]:
        """The sources whose feedback counts."""
        return [source.name for source in self.parts.sources.of_env[0]]

    def has_more(self) -> bool:
        """Returns whether an update was decided already, or there is enough for one."""
        run, settings = self.run, self.settings
        size = settings.groups * settings.group_size
        if not run.is_main:
            return bool(shared(run, None))
        enough = bool(self._decided()) or len(fresh := self._fresh()) >= size
        if not enough and not run.ledger.counts(RUN)["episodes"]:
            raise ConfigError(
                f"{run.stage}: the ledger {run.ledger.url} holds no served conversation: give the"
                " run the one that `turnwise serve --ledger` writes, as in `ledger:"
                " sqlite:///served.sqlite`"
            )
        if not enough and not self._collected:
            names = " or ".join(self._names)
            warnings.warn(
                f"{run.stage}: nothing trained: {len(fresh)} conversations that {names} scored wait"
                f" in the ledger {run.ledger.url}, and an update takes {size}",
                stacklevel=2,
            )
        return bool(shared(run, enough))

    def collect(self, i: int) -> Experience:
        """Returns the conversations of update i of the stage with the feedback on them."""
        run, settings, began = self.run, self.settings, time.perf_counter()
        self._collected = True
        experience = Experience(self.progress(i))
        episodes: list[Episode] = []
        feedback: dict[str, list[Answer]] = {}
        if run.is_main:
            size = settings.groups * settings.group_size
            chosen = self._decided() or self._fresh()[:size]
            episodes = sorted(chosen, key=lambda episode: episode.id)
            feedback = self._feedback(episodes)
        episodes, feedback = shared(run, (episodes, feedback))
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
        ids = [m.episode for m in members if m.reason not in (OLD, REDACTED)]
        return list(self.run.ledger.episodes(ids).values())

    def _fresh(self) -> list[Episode]:
        """Returns the conversations that may train, the oldest first: those that this policy or an
        earlier version of it sampled, at this temperature. What is too old leaves, and so does what
        has no tokens, because it was redacted.

        Raises:
            ConfigError: all of them were sampled at another temperature.
        """
        run, settings = self.run, self.settings
        found = [
            episode
            for episode in run.ledger.judged_episodes(RUN, self._names)
            if episode.info.get("lineage") == run.policy.lineage and self._age(episode) >= 0
        ]
        bare = {e.id for e in found if any(t.action_ids is None for t in e.turns)}
        old = {e.id for e in found if self._age(e) > settings.staleness}
        members = [
            Member(e.id, e.group, False, REDACTED if e.id in bare else OLD)
            for e in found
            if e.id in old | bare
        ]
        if members:
            run.ledger.add_members(run.id, run.updates + 1, members)
        sound = [e for e in found if e.id not in old | bare]
        fit = [e for e in sound if e.info.get("temperature") == settings.temperature]
        if sound and not fit:
            others = sorted({str(e.info.get("temperature")) for e in sound})
            raise ConfigError(
                f"{len(sound)} conversations were sampled at temperature {', '.join(others)}, and"
                f" the stage trains at {settings.temperature}: give it that `temperature`"
            )
        return fit

    def _feedback(self, episodes: list[Episode]) -> dict[str, list[Answer]]:
        """Returns the answers on conversations by group, each conversation's own."""
        group_of = {episode.id: episode.group for episode in episodes}
        feedback: dict[str, list[Answer]] = {group: [] for group in group_of.values()}
        for answer in self.run.ledger.feedback(
            list(feedback), sources=self._names, kind="feedback"
        ):
            feedback[group_of[answer.target]].append(answer)
        return feedback
