"""`ray`: conversations are played by workers on a Ray cluster, each with environments and a copy of
the policy.

    weights ──once per version──▶ object store ──▶ worker: policy, environments ──episodes──▶ here

A worker plays all conversations of a start, those in seats of one match too. Where it is lost, what
has not arrived of its conversations is played again by another in its place, under the same ids and
with the same noise. The ledger, judges and people are here.

The cluster is the one at RAY_ADDRESS, or is started on this machine. Workers live as long as this
process; the next that plays here has the same. Environments that need more than a CPU say so:
`metadata["resources"] = {"GPU": 1, "browser": 1}`, by Ray's names; their workers are placed there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import torch

from ...learning import Policy
from ...protocols import ConfigError, Episode, PluginError, Sampling, Start
from ...running import (
    Branch,
    Elsewhere,
    Environments,
    Plugins,
    PolicyPlayer,
    Where,
    component,
    episode_id,
    rollout,
)
from ...tools import derive_id, install

Chosen = tuple[Start | Branch, int]
Needs = tuple[tuple[str, float], ...]  # resources and how much of each, by Ray's names
LOSSES = 10  # workers lost in one round after which it is given up

_workers: dict[tuple[Needs, int], Any] = {}  # of this process, by what they need and their number


class Ray(Elsewhere):
    """Plays on a Ray cluster.

    Args:
        policy: whose replies are sampled.
        workers: how many play, of each kind that environments need.
        rows: conversations alive at a time in each.
        cpus, gpus: that a worker takes; with a GPU its copy of the policy is there.
        resources: others that a worker needs, by Ray's names.
        backend: what samples in a worker, and its options.
    """

    def __init__(
        self,
        policy: Policy,
        workers: int = 2,
        rows: int = 128,
        cpus: float = 1,
        gpus: float = 0,
        resources: Mapping[str, float] | None = None,
        backend: Any = "in-process",
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.policy, self.workers, self.rows = policy, workers, workers * rows
        self._needs = {"CPU": cpus, "GPU": gpus, **(resources or {})}
        own = {"name": backend} if isinstance(backend, str) else dict(backend)
        self._backend = {"rows": rows, **own} if own.get("name") == "in-process" else own
        self._sent: Sent | None = None
        self._begun: dict[str, _Playing] = {}

    def begin(
        self,
        player: PolicyPlayer,
        chosen: Sequence[Chosen],
        where: Where,
        options: Mapping[str, Any],
    ) -> None:
        """Hands each start's conversations to one worker, with the weights of now.

        Raises:
            PluginError: ray is missing.
            ConfigError: there is no cluster, or it has less than is needed; the policy's weights
                are divided among processes.
        """
        ray = _connected()
        kinds: dict[Needs, list[list[Chosen]]] = {}
        for unit in _units(chosen):
            own = {**self._needs, **_needs_of(unit[0][0])}
            kinds.setdefault(tuple(sorted(own.items())), []).append(unit)
        for needs in kinds:
            self._check(ray, needs)
        ids = {_start(start).env for start, _ in chosen}
        plan = Round(
            self._weights(ray), self._backend, player.sampling, player.history, where, options,
            {id_: gymnasium.registry[id_] for id_ in ids if id_ in gymnasium.registry},
        )  # fmt: skip
        shares = {
            (needs, number): [c for unit in units[number :: self.workers] for c in unit]
            for needs, units in kinds.items()
            for number in range(min(self.workers, len(units)))
        }
        self._begun[_key(chosen, where)] = _Playing(ray, shares, plan)

    def rollout(
        self,
        player: PolicyPlayer,
        chosen: Sequence[Chosen],
        where: Where,
        ended: Callable[[Episode], None],
        options: Mapping[str, Any],
    ) -> None:
        """Hands on episodes as they arrive, of what was begun before or begins now.

        Raises:
            PluginError, ConfigError: see `begin`; or too many workers were lost.
        """
        if (key := _key(chosen, where)) not in self._begun:
            self.begin(player, chosen, where, options)
        self._begun.pop(key).finish(ended)

    def _weights(self, ray: Any) -> Sent:
        """Returns the policy's weights as workers find them; they are sent if they have changed."""
        policy, sent = self.policy, self._sent
        if policy.is_sharded:
            raise ConfigError(
                "workers of Ray get the weights of one process, and `shard: true` divides them:"
                " leave one of the two out"
            )
        weights = [(id(p), p._version) for p in policy.network.parameters()]
        name = derive_id(id(self), policy.version, weights)
        if sent is None or sent.name != name:
            parts = (policy.network.model, policy.tokenizer, policy.precision)
            whole = ray.put((*parts, policy.chat.template.today)) if sent is None else sent.whole
            trained = ray.put([p.detach().cpu() for p in policy.parameters()])
            of = derive_id(id(self)) if sent is None else sent.of
            self._sent = Sent(of, whole, name, policy.version, trained)
        assert self._sent is not None
        return self._sent

    def _check(self, ray: Any, needs: Needs) -> None:
        """Refuses what would wait for ever on this machine; another cluster may grow.

        Raises:
            ConfigError: there is less than is needed.
        """
        there = ray.cluster_resources()
        short = [
            f"{each * self.workers:g} {name} (there are {there.get(name, 0):g})"
            for name, each in needs
            if each * self.workers > there.get(name, 0)
        ]
        if short and "RAY_ADDRESS" not in os.environ:
            raise ConfigError(
                f"{self.workers} workers need {', '.join(short)}: ask for fewer (`workers`, `cpus`,"
                " `gpus`), or name a larger cluster (RAY_ADDRESS)"
            )


@dataclass(frozen=True)
class Sent:
    """Where workers find a policy's weights.

    Attributes:
        of: the policy's name.
        whole: its model, tokenizer, precision and day, as they were at first.
        name: of these weights.
        version: the policy's.
        trained: its parameters that are trained, as they are now.
    """

    of: str
    whole: Any
    name: str
    version: int
    trained: Any


@dataclass(frozen=True)
class Round:
    """What all workers of a round are given: weights, how replies are sampled, where and how is
    played, and the environments as they are registered here."""

    weights: Sent
    backend: Mapping[str, Any]
    sampling: Sampling
    history: Any
    where: Where
    options: Mapping[str, Any]
    specs: Mapping[str, Any] = field(default_factory=dict)


def _connected() -> Any:
    """Returns the module ray, connected to a cluster.

    Raises:
        PluginError: it is missing.
        ConfigError: there is no cluster at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise PluginError(f"playing on Ray needs the package ray: {install('ray')}") from error
    if not ray.is_initialized():
        _workers.clear()
        address = os.environ.get("RAY_ADDRESS", "")
        try:
            _look_for(address)
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {address or 'this machine'}: {error}. Start one with"
                " `ray start --head`; set RAY_AUTH_MODE=token where it wants Ray's token; unset"
                " RAY_ADDRESS to play on this machine"
            ) from error
    return ray


def _look_for(address: str) -> None:
    """Raises an `OSError` at once where nothing listens at "host:port"; Ray looks for two
    minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


class _Playing:
    """A round in progress: who plays which share, and what has arrived.

    Args:
        ray: the module.
        shares: what each worker plays.
        plan: what all of them are given.
    """

    def __init__(
        self, ray: Any, shares: Mapping[tuple[Needs, int], list[Chosen]], plan: Round
    ) -> None:
        self.ray, self.shares, self.plan = ray, shares, plan
        self.arrived: set[str] = set()
        self.lost: list[Exception] = []
        self._given = ray.put(plan)
        self._streams: dict[Any, tuple[Needs, int]] = {}
        for place in shares:
            self._begin(place)

    def _begin(self, place: tuple[Needs, int]) -> None:
        sent, worker = self.plan.weights, _worker(self.ray, place)
        stream = worker.play.remote(self._given, sent.whole, sent.trained, self.shares[place])
        self._streams[stream] = place

    def finish(self, ended: Callable[[Episode], None]) -> None:
        """Waits until all has arrived; a share is played again where its worker is lost."""
        ray = self.ray
        while self._streams:
            [stream], _ = ray.wait(list(self._streams), num_returns=1)
            try:
                episode = ray.get(next(stream))
            except StopIteration:
                del self._streams[stream]
                continue
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                self._lost(self._streams.pop(stream), error)
                continue
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            if episode.id not in self.arrived:
                self.arrived.add(episode.id)
                ended(episode)

    def _lost(self, place: tuple[Needs, int], error: Exception) -> None:
        """Has the share of a worker that was lost played by another: all of it, and what has
        arrived is not taken twice.

        Raises:
            ConfigError: too many were lost.
        """
        _workers.pop(place, None)
        self.lost.append(error)
        if len(self.lost) > LOSSES:
            raise ConfigError(
                f"{len(self.lost)} workers of Ray were lost in one round, the last one so: {error}"
            ) from error
        warnings.warn(
            "a worker of Ray was lost; what has not arrived of its conversations is played"
            f" again: {str(error).splitlines()[0]}",
            stacklevel=2,
        )
        self._begin(place)


def _worker(ray: Any, place: tuple[Needs, int]) -> Any:
    """Returns the worker of this number for these needs, started where it was not, or was lost."""
    if place not in _workers:
        more = {name: value for name, value in place[0] if name not in ("CPU", "GPU")}
        needs = dict(place[0])
        actor = ray.remote(Worker).options(
            num_cpus=needs["CPU"], num_gpus=needs["GPU"], resources=more
        )
        _workers[place] = actor.remote([path or os.getcwd() for path in sys.path])
    return _workers[place]


class Worker:
    """A process on the cluster, with environments and a copy of the policy that plays.

    Args:
        paths: where modules are found in the run's process.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        sys.path += [path for path in paths if path not in sys.path]
        self.plugins, self.environments = Plugins(), Environments()
        self.player: Any = None
        self.has: tuple[str, str] = ("", "")  # whose weights, and which

    def play(
        self, plan: Round, whole: tuple[Any, ...], trained: Sequence[Any], chosen: Sequence[Chosen]
    ) -> Iterator[Episode]:
        """Yields the episodes of a share as they end."""
        for id_, spec in plan.specs.items():
            gymnasium.registry.setdefault(id_, spec)
        sent = plan.weights
        if self.has[0] != sent.of:
            self.player = self._player(plan, whole)
        if self.has != (sent.of, sent.name):
            with torch.no_grad():
                own = self.player.policy.parameters()
                for parameter, value in zip(own, trained, strict=True):
                    parameter.copy_(value)
            self.player.policy.version, self.has = sent.version, (sent.of, sent.name)
        self.player.sampling, self.player.history = plan.sampling, plan.history
        self.player.backend.refresh()
        ends: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def work() -> None:
            try:
                rollout(
                    self.player, chosen, plan.where, ended=ends.put,
                    environments=self.environments, **plan.options,
                )  # fmt: skip
                ends.put(None)
            except BaseException as error:
                ends.put(error)

        threading.Thread(target=work, daemon=True).start()
        while (found := ends.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
        self.player.backend.refresh()  # frees what it keeps

    def _player(self, plan: Round, whole: tuple[Any, ...]) -> PolicyPlayer:
        """Makes the policy, on a GPU where this process has one, and who plays it."""
        model, tokenizer, precision, today = whole
        place = "cuda" if torch.cuda.is_available() else "cpu"
        policy = Policy(model.to(place), tokenizer, precision=precision)
        policy.chat.template.today = today
        made = component(self.plugins, "backend", dict(plan.backend), policy=policy)
        return PolicyPlayer(policy, plan.sampling, made, plan.history)


def _key(chosen: Sequence[Chosen], where: Where) -> str:
    return derive_id(*(episode_id(where, start, slot) for start, slot in chosen))


def _start(start: Start | Branch) -> Start:
    return start if isinstance(start, Start) else start.parent.start


def _units(chosen: Sequence[Chosen]) -> list[list[Chosen]]:
    """Returns the conversations that one worker plays together, those of a start and of the seats
    of its matches, in order."""
    units: dict[Any, list[Chosen]] = {}
    for start, slot in chosen:
        units.setdefault(_start(start).match, []).append((start, slot))
    return list(units.values())


def _needs_of(start: Start | Branch) -> dict[str, float]:
    """Returns the resources that an environment says it needs, by Ray's names."""
    with contextlib.suppress(Exception):  # other people's: it says what is wrong when it is made
        entry: Any = gymnasium.spec(_start(start).env).entry_point
        if isinstance(entry, str):
            entry = gymnasium.envs.registration.load_env_creator(entry)
        found = entry.metadata.get("resources", {})
        return {str(name): float(value) for name, value in found.items()}
    return {}
