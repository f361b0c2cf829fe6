"""The `env:` of a stage: one environment or a mixture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ..environments.conventions import Observation
from ..environments.instance import Instance
from ..environments.pool import Environments, call
from ..environments.registry import starts
from ..errors import ConfigError, EnvironmentBroke
from ..pipeline.parts import load_policy
from ..pipeline.plugins import Plugins
from ..protocols import RunView
from ..records.episode import Start
from ..rollout.players import Player
from ..util.ids import canonical_json
from ..util.section import Section
from ..util.suggest import did_you_mean


class OtherPolicy(Section):
    """Another policy in a seat of an environment; it stays as it is.

    Attributes:
        policy: its folder or hub name, or one of the names that `turnwise model get` knows.
    """

    policy: str

    @property
    def label(self) -> str:
        """What starts call it, which no player of an environment is called."""
        return f"policy:{self.policy}"


class EnvConfig(Section):
    """One environment of a mixture.

    Attributes:
        id: as registered with Gymnasium.
        weight: its share of the groups.
        options: for `reset`.
        kwargs: for `gymnasium.make`.
        feedback: its own sources, instead of the stage's.
        seats: who replies in each of its seats, where it has several: "policy", which trains
            there; "self", the policy without training there; one of the environment's own players;
            `{policy: folder}`, another policy.
    """

    id: str
    weight: float = Field(default=1.0, gt=0)
    options: dict[str, Any] = {}
    kwargs: dict[str, Any] = {}
    feedback: list[Any] | None = None
    seats: dict[str, str | OtherPolicy] = {}

    @field_validator("options", "kwargs")
    @classmethod
    def _plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, given in value.items():
            try:
                canonical_json(given)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{name} is no plain data (texts, numbers, lists, mappings), which runs keep"
                    " and other processes read; a function or a class is named by"
                    f" 'MODULE:NAME': {error}"
                ) from error
        return value

    @field_validator("seats", mode="before")
    @classmethod
    def _seats(cls, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError('must say who replies in each seat: `{"0": policy, "1": random}`')
        seats: dict[str, Any] = {}
        for seat, who in value.items():
            other = isinstance(who, Mapping) and set(who) == {"policy"}
            if not other and not isinstance(who, (str, OtherPolicy)):
                raise ValueError(
                    f"seat {seat}: may be policy, self, one of the environment's players or"
                    f" `{{policy: folder}}`, got {who!r}"
                )
            seats[str(seat)] = OtherPolicy(**who) if other else who
        if seats and "policy" not in seats.values():
            raise ValueError('one of the seats must be the policy\'s: `{"0": policy, ...}`')
        return seats

    @property
    def trained(self) -> list[str]:
        """The seats in which the policy trains, in order; none where there is one seat."""
        return sorted(seat for seat, who in self.seats.items() if who == "policy")

    @property
    def other_policies(self) -> dict[str, str]:
        """The folders or names of other policies in seats, by what starts call them."""
        others = [who for who in self.seats.values() if isinstance(who, OtherPolicy)]
        return {who.label: who.policy for who in others}

    def starts(
        self, seed: int, count: int, *, options: Mapping[str, Any] | None = None, first: int = 0
    ) -> list[Start]:
        """Returns starts as `starts` does, in the first seat that is the policy's.

        Args:
            seed: of the sequence.
            count: how many.
            options: for `reset`; default: its own.
            first: number of the first one.
        """
        own = self.options if options is None else options
        found = starts(self.id, seed, count, own, self.kwargs, first=first)
        if not self.seats:
            return found
        seat, *_ = self.trained
        names = {
            other: "policy" if who == "self" else who.label if isinstance(who, OtherPolicy) else who
            for other, who in self.seats.items()
            if other != seat
        }
        return [replace(start, seat=seat, against=names) for start in found]

    def every_seat(self, start: Start) -> list[Start]:
        """Returns a start in every seat in which the policy trains."""
        return [start, *(start.in_seat(seat) for seat in self.trained[1:])]


OURS = ("policy", "self")  # those in a seat that are no players of the environment


def read_envs(value: Any) -> list[EnvConfig]:
    """Reads the `env:` of a stage: an id, (id, weight) pairs, mappings, or a list of these."""
    entries = value if isinstance(value, list) else [value]
    result = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {"id": entry}
        elif isinstance(entry, (tuple, list)) and len(entry) == 2:
            entry = {"id": entry[0], "weight": entry[1]}
        if not isinstance(entry, (EnvConfig, Mapping)):
            raise ConfigError(
                f"an environment is given by its id, got {entry!r}: register it with"
                " gymnasium.register(id, Class) and give the id"
            )
        result.append(entry if isinstance(entry, EnvConfig) else EnvConfig(**entry))
    return result


def other_policies(
    run: RunView, envs: Sequence[EnvConfig], player: Callable[[Any], Player]
) -> dict[str, Player]:
    """Loads the other policies that play in seats, and returns a player of each by the name that
    starts know it by."""
    found = {label: name for env in envs for label, name in env.other_policies.items()}
    return {label: player(load_other(run, name)) for label, name in sorted(found.items())}


def load_other(run: RunView, name: str) -> Any:
    """Loads another policy to play together with the run's, on the run's day."""
    from ..policy.policy import Policy

    policy = Policy.from_pretrained(name)
    policy.chat.template.today = run.today
    return policy


def load_beginning(run: RunView) -> Any:
    """Loads the policy that the run began with once more, on the run's day."""
    policy = load_policy(run.config)
    policy.chat.template.today = run.today
    return policy


def check_folder(name: str) -> None:
    """Raises `ConfigError` when another policy's folder is not there; a name with one slash may be
    the hub's, unless its first part is a folder here."""
    from ..policy.known import located

    of_hub = name.count("/") == 1 and not Path(name).parent.is_dir()
    if not of_hub and not Path(located(name)).is_dir():
        raise ConfigError(f"there is no policy in {name}")


def check_envs(
    envs: Sequence[EnvConfig],
    players: Sequence[str] = (),
    plugins: Plugins | None = None,
    several_seats: bool = False,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Makes each environment once, so that a wrong id, option or player shows before the run.
    Each is reset once, so that wrong options and seats show, too.

    Args:
        envs: those of a stage.
        players: of the environments' own that the stage asks for.
        plugins: whose failures explain an id that is not there.
        several_seats: whether the stage plays environments of several seats.
        options: for `reset`, in addition to an environment's own.

    Raises:
        ConfigError: what is wrong, and what there is instead.
    """
    environments = Environments()
    try:
        for env in envs:
            if env.seats and not several_seats:
                raise ConfigError(
                    f"environment {env.id!r} has `seats`, and only `sft`, `rl` and `evaluate` play"
                    " environments of several seats"
                )
            try:
                made = environments.take(env.id, env.kwargs)
                assert made is not None
                own = call(environments, made, "make").players
                with contextlib.chdir(Path.cwd()):  # wherever it goes, the run stays here
                    for asked in (env.options, *([options] if options else [])):
                        _check_reset(environments, made, env, asked)
            except (LookupError, TypeError, ValueError) as error:
                note = (
                    plugins.failures()
                    if plugins is not None and isinstance(error, LookupError)
                    else ""
                )
                raise ConfigError(f"{error}{note}") from error
            except EnvironmentBroke as error:
                raise ConfigError(f"environment {env.id!r}: {error}") from error
            environments.give(made, sound=False)
            scripts = [
                who for who in env.seats.values() if isinstance(who, str) and who not in OURS
            ]
            for name in env.other_policies.values():
                check_folder(name)
            for name in [*players, *scripts]:
                if name not in own:
                    raise ConfigError(
                        f"environment {env.id!r} has no player {name!r}.{did_you_mean(name, own)}"
                        + (" Another policy is `{policy: folder}`." if name in scripts else "")
                    )
    finally:
        environments.close()


def _check_reset(
    environments: Environments, made: Instance, env: EnvConfig, options: Mapping[str, Any]
) -> None:
    """Resets once, and looks whom the environment addresses. One that cannot be reset without
    options either breaks by itself, which costs its own episodes and not the run.

    Raises:
        EnvironmentBroke: the options are at fault.
        ConfigError: `seats` names others than it has.
    """
    [start] = env.starts(0, 1)
    try:
        seen: Observation = call(environments, made, "reset", start.seed, options)
    except EnvironmentBroke:
        if made.lost or not options:
            return
        try:
            call(environments, made, "reset", start.seed, {})
        except EnvironmentBroke:
            return
        raise
    if seen.player and not env.seats:
        raise ConfigError(
            f"environment {env.id!r} plays several seats: say who replies in them, `seats:"
            f" {{{seen.player!r}: policy, ...}}`"
        )
    if seen.player not in (env.seats or {"": ""}):
        asks = (
            f"asks seat {seen.player!r}"
            if seen.player
            else "has one seat, and `seats` is not for it"
        )
        raise ConfigError(
            f"environment {env.id!r} {asks}; `seats` has {', '.join(map(repr, env.seats))}"
        )
