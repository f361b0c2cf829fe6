"""The starts of an `rl` stage: which ones a round plays, by what its curriculum chooses."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ...errors import ConfigError, PluginError
from ...pipeline.processes import shared
from ...protocols import Curriculum, RunView
from ...records.episode import Episode, Start
from ...records.rewards import Rewards
from ...records.starts import GroupResult, StartNumber
from ...util.ids import derive_id
from ..collect import grouped
from .experience import Experience
from .settings import RLSettings


class Starts:
    """Numbers the starts of a stage's environments, and counts how far each was played.

    Of several processes the main one chooses.

    Args:
        run: the run.
        settings: options of the stage.
        curriculum: chooses; it was set up.
    """

    def __init__(self, run: RunView, settings: RLSettings, curriculum: Curriculum) -> None:
        self.run, self.curriculum, self.env = run, curriculum, settings.env
        self._unplayed = [0] * len(self.env)
        self._seeds = []
        for i, env in enumerate(self.env):
            # An environment that the mixture names twice has two sequences.
            like = [(e.id, e.options, e.kwargs) for e in self.env[:i]]
            again = like.count((env.id, env.options, env.kwargs))
            digest = derive_id("starts", run.seed, run.stage, *((again,) if again else ()))
            self._seeds.append(int(digest[:8], 16))

    def choose(
        self, count: int, taken: Collection[StartNumber], *place: Any, least: int = 0
    ) -> list[tuple[Start, StartNumber]]:
        """Chooses the starts of a round; the first ones are the same for every count.

        Args:
            count: how many; they are fewer where the curriculum has no others.
            taken: starts that are being played or wait for answers.
            place: the round; what is random derives from it.
            least: how many are needed.

        Returns:
            starts with their numbers; a number comes once for every seat in which the policy
            trains.

        Raises:
            PluginError: the curriculum chose a start that is taken, or one that does not exist.
            ConfigError: there are not as many as are needed.
        """
        chosen = shared(self.run, self._numbers(count, taken, place) if self.run.is_main else None)
        if len(chosen) < least:
            raise ConfigError(
                f"the curriculum {type(self.curriculum).__name__} has {len(chosen)} starts left"
                f" that are not being played, and {least} are needed: lower `groups` or `pending`,"
                " or give it more starts"
            )
        return self.of(chosen)

    def of(self, numbers: Iterable[StartNumber]) -> list[tuple[Start, StartNumber]]:
        """Returns the starts of these numbers, once for every seat in which the policy trains."""
        return [(start, number) for number in numbers for start in self._starts(number)]

    def played(self, chosen: Collection[StartNumber]) -> None:
        """Counts starts as played."""
        for env, number in chosen:
            self._unplayed[env] = max(self._unplayed[env], number + 1)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Counts the starts of an update as played and lets the curriculum learn from their
        conversations. Returns what it reports, and of a mixture every environment's share of the
        groups."""
        results = [_result(own, experience) for own in grouped(experience.episodes).values()]
        self.played(experience.numbers.values())
        if self.run.is_main:
            self.curriculum.learn(results)
        metrics = dict(shared(self.run, self.curriculum.metrics() if self.run.is_main else None))
        if len(self.env) > 1:
            count = Counter(result.start.env for result in results)
            shares = [count[i] / max(len(results), 1) for i in range(len(self.env))]
            metrics |= {f"env-{i}": share for i, share in enumerate(shares)}
        return {f"curriculum/{name}": value for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns how far every environment's starts were played."""
        return {"unplayed": list(self._unplayed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up how far every environment's starts were played."""
        self._unplayed = [int(number) for number in state["unplayed"]]

    def _numbers(
        self, count: int, taken: Collection[StartNumber], place: tuple[Any, ...]
    ) -> list[StartNumber]:
        rng = random.Random(derive_id("mixture", self.run.seed, self.run.stage, *place))
        unplayed, chosen = list(self._unplayed), list[StartNumber]()
        for env, number in taken:
            unplayed[env] = max(unplayed[env], number + 1)
        for _ in range(count):
            gone = {*taken, *chosen}
            start = self.curriculum.choose(rng, tuple(unplayed), gone)
            if start is None:
                break
            if start in gone or not (0 <= start.env < len(self.env) and start.number >= 0):
                raise PluginError(
                    f"the curriculum {type(self.curriculum).__name__} chose {start}, which"
                    f" {'is being played' if start in gone else 'does not exist'}: `choose` must"
                    " return a start that is not among those taken, of one of the"
                    f" {len(self.env)} environments"
                )
            unplayed[start.env] = max(unplayed[start.env], start.number + 1)
            chosen.append(start)
        return chosen

    def _starts(self, chosen: StartNumber) -> list[Start]:
        env = self.env[chosen.env]
        [start] = env.starts(self._seeds[chosen.env], 1, first=chosen.number)
        return env.every_seat(start)


def _result(group: list[Episode], experience: Experience) -> GroupResult:
    rewards = [experience.rewards.get(e.id) for e in group]
    sound = [e.succeeded for e in group if e.ending != "failed"]
    return GroupResult(
        experience.numbers[group[0].start.key],
        tuple(r.outcome for r in rewards if isinstance(r, Rewards)),
        sum(sound) / len(sound) if sound else None,
    )
