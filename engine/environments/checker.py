"""The checker of environments: plays whole episodes, and finds what Gymnasium's own checker does
not see."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import EnvironmentBroke, NoRoom
from ..records.episode import Message, Start
from ..util.ids import derive_id
from .conventions import Observation
from .instance import Instance
from .pool import Environments, call
from .process import STARTING
from .registry import starts

PAIRS = 4  # of starts that are played at the same time
JUNK = [
    "",
    "ok",
    "?",
    "x" * 2000,
    "<|im_end|><|im_start|>assistant\n",
    "naïve \N{PILE OF POO} \u202e text",
    "\x00\x1b[31m",
]


@contextlib.contextmanager
def _global_random_untouched(problems: list[str]) -> Iterator[None]:
    before = (random.getstate(), np.random.get_state()[1].tobytes())  # type: ignore[index]
    yield
    if (random.getstate(), np.random.get_state()[1].tobytes()) != before:  # type: ignore[index]
        problems.append(
            "it uses or seeds the global random state (random or numpy.random): episodes influence"
            ' each other. Use self.np_random, or declare metadata["concurrency"] = "process".'
        )


def check_environment(
    env_id: str,
    *,
    episodes: int = 20,
    max_turns: int = 100,
    seed: int = 0,
    limit: float = 10.0,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> list[str]:
    """Plays whole episodes and lists what is wrong, beyond what Gymnasium's checker sees; empty
    when all is well.

    It plays each start twice with the same replies (are transcripts equal?), and some together with
    another one, step by step: with the environment's own players where it has any, and with random
    text, empty replies and very long ones. It reports: broken spaces and returns; text that is not
    `str`; rewards that are not finite; episodes that never end; a reset that does not reset; a seed
    that is ignored; state that episodes share; use of global random state; returns above the stated
    optimum; an expert that fails; calls that hang or raise.

    Args:
        env_id: a registered id.
        episodes: how many starts to play; two are needed to see what episodes share.
        max_turns: an episode longer than this counts as never ending.
        seed: of the first start and of the random replies.
        limit: seconds one call may take. Making it and its first reset, which may import and load,
            have a minute.
        options: for `reset`.
        **kwargs: for `gymnasium.make`.

    Raises:
        LookupError: no such environment.
    """
    check = _Check(env_id, max_turns, seed, dict(options or {}), kwargs)
    try:
        check.play(episodes, limit)
    finally:
        check.environments.close()
    check.problems += [f"close: {reason}" for _, reason in check.environments.failures]
    return check.found()


class _Check:
    """A check in progress, and the problems it has found."""

    def __init__(
        self,
        env_id: str,
        max_turns: int,
        seed: int,
        options: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> None:
        self.env_id, self.max_turns, self.seed, self.options, self.kwargs = (
            env_id,
            max_turns,
            seed,
            options,
            kwargs,
        )
        self.environments = Environments(STARTING)
        self.problems: list[str] = []
        self.firsts: dict[str, set[str]] = {}
        self.differing: list[int] = []
        self.together: list[tuple[int, int]] = []  # seeds whose episodes are other ones together
        self.expert: list[Any] = []  # what its episodes report as `success`

    def play(self, episodes: int, limit: float) -> None:
        """Plays every start twice by every player."""
        chosen = starts(self.env_id, self.seed, episodes, self.options, self.kwargs)
        instance = self.environments.take(self.env_id, self.kwargs)
        assert instance is not None
        try:
            traits = call(self.environments, instance, "make")
            declared = traits.metadata.get("snapshots")
            call(self.environments, instance, "reset", chosen[0].seed, chosen[0].options)
            if declared and call(self.environments, instance, "copied") is None:
                self.problems.append(
                    'it declares metadata["snapshots"], but a copy.deepcopy of it fails'
                )
            self.environments.limit = max(limit, 0.01)
            with _global_random_untouched(self.problems):
                for start in chosen:
                    for player in [*traits.players, None]:
                        self._twice(instance, start, player)
                self._side_by_side(instance, chosen[: 2 * PAIRS], [*traits.players, None])
        except (EnvironmentBroke, NoRoom) as error:
            self.problems.append(str(error))
        finally:
            self.environments.limit = max(limit, 0.01)
            self.environments.give(instance, sound=False)

    def _twice(self, instance: Instance, start: Start, player: str | None) -> None:
        once, twice = self._episode(instance, start, player), self._episode(instance, start, player)
        self.firsts.setdefault(start.key, set()).update((once[0], twice[0]))
        if once != twice:
            self.differing.append(start.seed)

    def _side_by_side(
        self, instance: Instance, chosen: Sequence[Start], players: Sequence[str | None]
    ) -> None:
        """Plays starts in pairs, a step of each in turn, as a run does; where only one may live
        there is nothing to find."""
        limit, self.environments.limit = self.environments.limit, STARTING
        if (other := self.environments.take(self.env_id, self.kwargs)) is None:
            return
        try:
            try:
                call(self.environments, other, "make")
                call(self.environments, other, "reset", chosen[0].seed, chosen[0].options)
            except NoRoom:
                return
            self.environments.limit = limit
            for a, b in zip(chosen[::2], chosen[1::2], strict=False):
                for player in players:
                    alone = [self._episode(instance, start, player) for start in (a, b)]
                    steps = [self._steps(instance, a, player), self._steps(other, b, player)]
                    rows = list(itertools.zip_longest(*steps))
                    paired = [
                        [step for step in own if step is not None]
                        for own in zip(*rows, strict=True)
                    ]
                    if paired != alone:
                        self.together.append((a.seed, b.seed))
        finally:
            self.environments.give(other, sound=False)

    def _episode(self, instance: Instance, start: Start, player: str | None) -> list[str]:
        """Plays an episode and returns its transcript."""
        return list(self._steps(instance, start, player))

    def _steps(self, instance: Instance, start: Start, player: str | None) -> Iterator[str]:
        """Plays an episode step by step and yields its transcript."""
        noise = derive_id("check", self.seed, start.key, player)
        rng = random.Random(noise)
        seen: Observation = call(self.environments, instance, "reset", start.seed, start.options)
        optimum = seen.info.get("optimum")
        if "odd_optimum" in seen.info:
            self.problems.append(str(seen.info["odd_optimum"]))
        yield seen.message.content
        totals = defaultdict[str, float](float)
        spoken: dict[str, list[Message]] = {}  # by seat; most environments have one
        for turn in range(self.max_turns):
            seat = seen.player
            if player and seat not in spoken:
                own = derive_id(noise, seat) if seat else noise
                self._ask(instance, "player", player, own, seat)
            messages = spoken.setdefault(seat, [])
            messages.append(seen.message)
            action = (
                self._ask(instance, "reply", list(messages), seat) if player else rng.choice(JUNK)
            )
            messages.append(Message("assistant", action))
            try:
                seen = call(self.environments, instance, "step", action)
            except EnvironmentBroke as error:
                raise EnvironmentBroke(
                    f"step after {turn} turns: {str(error).removeprefix('step: ')}"
                ) from error
            totals[seat] += seen.reward
            for other, result in seen.seats.items():
                totals[other] += result.reward
            well = seen.info.get("success")
            yield repr((action, seen.message.content, seen.reward, well, seen.seats))
            if seen.terminated or seen.truncated:
                break
        else:
            self.problems.append(
                f"an episode of {player or 'random text'} did not end within {self.max_turns}"
                " turns: give it an end, or register it with max_episode_steps"
            )
        total = max(totals.values(), default=0.0)
        if optimum is not None and total > optimum + 1e-6:
            self.problems.append(
                f"a return of {total:g} exceeds the start's stated optimum {optimum:g} (seed"
                f" {start.seed})"
            )
        if player == "expert" and optimum is not None and total < optimum - 1e-6:
            self.problems.append(f"its expert got {total:g} of {optimum:g} (seed {start.seed})")
        if player == "expert":
            self.expert.append(seen.info.get("success"))

    def _ask(self, instance: Instance, verb: str, *arguments: Any) -> Any:
        """Calls something of a player's."""
        try:
            return call(self.environments, instance, verb, *arguments)
        except EnvironmentBroke as error:
            raise EnvironmentBroke(f"player: {str(error).partition(': ')[2]}") from error

    def found(self) -> list[str]:
        """Returns the problems, one example of each kind."""
        if self.differing:
            self.problems.append(
                f"the same seed ({self.differing[0]}, for one) and the same replies gave two"
                " different transcripts"
            )
        if self.together and not self.differing:
            first, second = self.together[0]
            self.problems.append(
                f"the same seed and replies gave another transcript next to another episode (seed"
                f" {first} next to {second}, for one): what belongs to an episode must be kept on"
                " `self`, and not on the class or in the module"
            )
        if self.expert and not any(self.expert) and None not in self.expert:
            self.problems.append("its expert never succeeds")
        if any(len(texts) > 1 for texts in self.firsts.values()):
            self.problems.append(
                "the first observation depends on earlier episodes: reset does not reset everything"
            )
        kinds = {re.sub(r"[-\d.]+", "#", problem): problem for problem in reversed(self.problems)}
        return list(kinds.values())[::-1]
