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
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from ...errors import ConfigError
from ...ledger.rows import Member
from ...pipeline.processes import decided
from ...records.episode import Episode
from ...records.feedback import Answer
from ...records.rewards import NoReward, Rewards
from ...records.starts import StartNumber
from .collect import Collector
from .experience import Experience
from .pending import OLD

REDACTED = "redacted"  # why a conversation leaves without training
OTHER, LATER = "of another policy", "of a later version of this policy"
WARMER = "sampled at another temperature"
RUN = "served"  # what `turnwise serve` records as the run of its conversations


class Recorded(Collector):
    """Collects served conversations from the run's ledger."""

    _chosen: Sequence[Episode] = ()  # for the next update

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._left: Counter[str] = Counter()  # how many left without training, by what they are

    @property
    def _names(self) -> list[str]:
        """The sources whose feedback counts."""
        return [source.name for source in self.parts.sources.of_env[0]]

    def has_more(self, i: int) -> bool:
        """Chooses the conversations of update i. Returns whether there are enough.

        Raises:
            ConfigError: the ledger holds none, or only of another temperature.
        """
        self._chosen = decided(self.run, partial(self._choose, i))
        return bool(self._chosen)

    def _choose(self, i: int) -> list[Episode]:
        """Returns the conversations that a killed run had decided on, or the oldest that may train;
        none where there are too few."""
        run, settings = self.run, self.settings
        if chosen := self._decided():
            return chosen
        fresh, others = self._fresh()
        size = settings.groups * settings.group_size
        if len(fresh) >= size:
            return fresh[:size]
        if not run.ledger.counts(RUN)["episodes"]:
            raise ConfigError(
                f"{run.stage}: the ledger {run.ledger.url} holds no served conversation: give the"
                " run the one that `turnwise serve --ledger` writes, as in `ledger:"
                " sqlite:///served.sqlite`"
            )
        names = " or ".join(self._names)
        besides = ", ".join(f"{count} {why}" for why, count in others.items())
        warnings.warn(
            f"{run.stage}: {'no further update' if i else 'nothing trained'}: {len(fresh)}"
            f" conversations that {names} scored wait in the ledger {run.ledger.url}, and an update"
            f" takes {size}" + (f"; besides them there are {besides}" if besides else ""),
            stacklevel=2,
        )
        return []

    def collect(self, i: int) -> Experience:
        """Returns the conversations that were chosen for update i with the feedback on them."""
        began = time.perf_counter()
        experience = Experience(self.progress(i))
        episodes = sorted(self._chosen, key=lambda episode: episode.id)
        experience.numbers = {e.start.key: StartNumber(0, k) for k, e in enumerate(episodes)}

        def judged() -> tuple[dict[str, Rewards | NoReward], dict[str, list[Answer]]]:
            feedback = self._feedback(episodes)
            return self.combine(episodes, experience.numbers, feedback), feedback

        experience.add(episodes, *decided(self.run, judged))
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

    def _fresh(self) -> tuple[list[Episode], Counter[str]]:
        """Returns the conversations that may train, the oldest first: those that this policy or an
        earlier version of it sampled, at this temperature; and how many others there are, by what
        they are. What is too old leaves, and so does what has no tokens, because it was redacted.

        Raises:
            ConfigError: all of them were sampled at another temperature.
        """
        run, settings = self.run, self.settings
        others: Counter[str] = Counter()
        found = []
        for episode in run.ledger.judged_episodes(RUN, self._names):
            if episode.info.get("lineage") != run.policy.lineage:
                others[OTHER] += 1
            elif self._age(episode) < 0:
                others[LATER] += 1
            else:
                found.append(episode)
        bare = {e.id for e in found if any(t.action_ids is None for t in e.turns)}
        old = {e.id for e in found if self._age(e) > settings.staleness}
        self._left.update({REDACTED: len(bare), OLD: len(old - bare)})
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
            sampled = sorted({str(e.info.get("temperature")) for e in sound})
            raise ConfigError(
                f"{len(sound)} conversations were sampled at temperature {', '.join(sampled)}, and"
                f" the stage trains at {settings.temperature}: give it that `temperature`"
            )
        others[WARMER] = len(sound) - len(fit)
        return fit, others + self._left

    def _feedback(self, episodes: list[Episode]) -> dict[str, list[Answer]]:
        """Returns the answers on conversations by group, each conversation's own."""
        group_of = {episode.id: episode.group for episode in episodes}
        feedback: dict[str, list[Answer]] = {group: [] for group in group_of.values()}
        for answer in self.run.ledger.feedback(
            list(feedback), sources=self._names, kind="feedback"
        ):
            feedback[group_of[answer.target]].append(answer)
        return feedback
