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
import signal
import socket
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

import gymnasium

from ...learning import Policy, outline
from ...protocols import ConfigError, Episode, PluginError, Start
from ...running import (
    Branch,
    Elsewhere,
    PolicyPlayer,
    Where,
    episode_id,
)
from ...tools import derive_id, install
from .worker import Chosen, Round, Sent, Worker

Needs = tuple[tuple[str, float], ...]  # resources and how much of each, by Ray's names
LOSSES = 10  # workers lost in one round with which it is given up
PATIENCE = 60.0  # seconds without a conversation until a warning of what may be missing

_workers: dict[tuple[Needs, int], Any] = {}  # of this process, by what they need and their number
_cluster = 0  # how many were connected to


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
        if workers > 1 and own.get("url"):
            raise ConfigError(
                f"each worker sends weights to its server, and {workers} workers cannot share"
                f" {own['url']}: leave `url` out, so that each starts its own, or take one worker"
            )
        self._backend = {"rows": rows, **own} if own.get("name") == "in-process" else own
        self._sent: Sent | None = None
        self._sent_when: tuple[Any, ...] = (0,)  # to which cluster, and what the weights were then
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
            ConfigError: there is no cluster, or it has less than is needed.
        """
        ray = _connected()
        kinds: dict[tuple[Needs, bool], list[list[Chosen]]] = {}
        for unit in _units(chosen):
            needs, alone = _declared(unit[0][0])
            own = tuple(sorted((self._needs | needs).items()))
            kinds.setdefault((own, alone), []).append(unit)
        shares = {
            (needs, number): [c for unit in units[number::many] for c in unit]
            for (needs, alone), units in kinds.items()
            for many in [1 if alone else min(self.workers, len(units))]
            for number in range(many)
        }
        _check(ray, list(shares))
        ids = {_start(start).env for start, _ in chosen}
        specs = {id_: gymnasium.registry[id_] for id_ in ids if id_ in gymnasium.registry}
        plan = Round(
            self._weights(ray), self._backend, player.sampling, player.history, where, options,
            ray.cloudpickle.dumps(specs),
        )  # fmt: skip
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

    def has_arrived(self, chosen: Sequence[Chosen], where: Where) -> bool:
        """Takes what is here of what was begun; returns whether it is all."""
        playing = self._begun.get(_key(chosen, where))
        return playing is not None and playing.is_over()

    def _weights(self, ray: Any) -> Sent:
        """Returns the policy's weights as workers find them; they are sent if they have changed."""
        policy, sent = self.policy, self._sent
        weights = [(id(p), p._version) for p in policy.network.parameters()]
        now = (_cluster, policy.version, weights)
        if sent is None or now[0] != self._sent_when[0]:
            network = policy.copied_network() if policy.is_sharded else policy.network
            model = outline(network.model, "cpu").cpu()
            parts = (model, policy.tokenizer, policy.precision, policy.chat.template.today)
            sent = Sent(uuid4().hex, ray.put(parts), "", policy.version, None)
        if sent.trained is None or now != self._sent_when:
            trained = ray.put([p.detach().cpu() for p in policy.parameters()])
            sent = replace(sent, name=uuid4().hex, version=policy.version, trained=trained)
        self._sent, self._sent_when = sent, now
        return sent


def _check(ray: Any, places: Sequence[tuple[Needs, int]]) -> None:
    """Makes room for the workers of a round, and refuses what would wait for ever on this machine;
    another cluster may grow.

    Raises:
        ConfigError: there is less than is needed.
    """
    if not set(places) <= set(_workers):
        for place in set(_workers) - set(places):
            ray.kill(_workers.pop(place))
    wanted: Counter[str] = Counter()
    for needs, _ in places:
        wanted.update(dict(needs))
    there = ray.cluster_resources()
    short = [
        f"{each:g} {name} (there are {there.get(name, 0):g})"
        for name, each in sorted(wanted.items())
        if each > there.get(name, 0)
    ]
    if short and "RAY_ADDRESS" not in os.environ:
        raise ConfigError(
            f"{len(places)} workers need {', '.join(short)}: ask for fewer (`workers`, `cpus`,"
            " `gpus`), or name a larger cluster (RAY_ADDRESS)"
        )


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
    global _cluster
    if not ray.is_initialized():
        _workers.clear()
        _cluster += 1
        handler = signal.getsignal(signal.SIGTERM)  # Ray takes it, and the run would not end well
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
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
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
        self.arrived: dict[str, Episode] = {}  # by id, in the order in which they came
        self.lost: list[Exception] = []
        self._failed: Exception | None = None
        self._given = ray.put(plan)
        self._streams: dict[Any, tuple[Needs, int]] = {}
        for place in shares:
            self._begin(place)

    def _begin(self, place: tuple[Needs, int]) -> None:
        sent, worker = self.plan.weights, _worker(self.ray, place)
        refs = [sent.whole, sent.trained]  # in a list: fetched where they are not known yet
        stream = worker.play.remote(self._given, refs, self.shares[place])
        self._streams[stream] = place

    def is_over(self) -> bool:
        """Takes what is here, without waiting; returns whether that is all. What failed is raised
        where it is waited for."""
        try:
            while self._streams and self._failed is None and self._take(0.0):
                pass
        except Exception as error:
            self._failed = error
        return not self._streams and self._failed is None

    def finish(self, ended: Callable[[Episode], None]) -> None:
        """Hands on what has arrived, and waits for the rest."""
        try:
            self._finish(ended)
        except BaseException:
            for place in self._streams.values():  # what plays on would be waited for, and paid
                if (worker := _workers.pop(place, None)) is not None:
                    self.ray.kill(worker)
            raise

    def _finish(self, ended: Callable[[Episode], None]) -> None:
        began, warned, handed = time.monotonic(), False, 0
        while True:
            if self._failed is not None:
                raise self._failed
            for episode in list(self.arrived.values())[handed:]:
                handed += 1
                ended(episode)
            if not self._streams:
                return
            took = self._take(10.0)
            if not (took or warned or self.arrived) and time.monotonic() - began > PATIENCE:
                warned = True
                there = self.ray.available_resources()
                warnings.warn(
                    f"nothing has been played on Ray for {PATIENCE:g} s: its workers may be"
                    f" waiting for {dict(next(iter(self.shares))[0])} each, where"
                    f" {there.get('CPU', 0):g} CPU and {there.get('GPU', 0):g} GPU are free",
                    stacklevel=2,
                )

    def _take(self, limit: float) -> bool:
        """Waits for a sign of a worker for so many seconds; returns whether there was one. A share
        is played again where its worker is lost."""
        ray = self.ray
        found, _ = ray.wait(list(self._streams), num_returns=1, timeout=limit)
        for stream in found:
            try:
                episode = ray.get(next(stream))
            except StopIteration:
                del self._streams[stream]
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:  # it died, was killed, or what it had is gone
                self._lost(self._streams.pop(stream), error)
            else:
                self.arrived.setdefault(episode.id, episode)
        return bool(found)

    def _lost(self, place: tuple[Needs, int], error: Exception) -> None:
        """Has the share of a worker that was lost played by another: all of it, and what has
        arrived is not taken twice.

        Raises:
            ConfigError: too many were lost.
        """
        _workers.pop(place, None)
        self.lost.append(error)
        if len(self.lost) >= LOSSES:
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
        needs = dict(place[0])
        cpus, gpus, memory = needs.pop("CPU"), needs.pop("GPU"), needs.pop("memory", None)
        actor = ray.remote(Worker).options(
            num_cpus=cpus, num_gpus=gpus, memory=memory, resources=needs
        )
        _workers[place] = actor.remote([path or os.getcwd() for path in sys.path])
    return _workers[place]


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


def _declared(start: Start | Branch) -> tuple[dict[str, float], bool]:
    """Returns the resources that an environment says it needs, by Ray's names; and whether it says
    how many of it may live at a time (`instances`), which one worker alone can keep.

    Raises:
        ConfigError: an amount that is no number.
    """
    metadata: Mapping[str, Any] = {}
    with contextlib.suppress(Exception):  # other people's: it says what is wrong when it is made
        entry: Any = gymnasium.spec(_start(start).env).entry_point
        if isinstance(entry, str):
            entry = gymnasium.envs.registration.load_env_creator(entry)
        metadata = dict(entry.metadata)
    needs = metadata.get("resources", {})
    if odd := [name for name, value in needs.items() if not isinstance(value, (int, float))]:
        raise ConfigError(
            f'{_start(start).env}: metadata["resources"] gives {needs[odd[0]]!r} for {odd[0]!r},'
            " which is no number"
        )
    return {str(name): float(value) for name, value in needs.items()}, "instances" in metadata
