"""A worker of `ray`: a process on the cluster that plays its share of each round."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import torch

from ...learning import Policy
from ...protocols import Episode, Sampling, Start
from ...running import Branch, Environments, Plugins, PolicyPlayer, Where, component, rollout

Chosen = tuple[Start | Branch, int]


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
    played, and the environments as they are registered here, pickled."""

    weights: Sent
    backend: Mapping[str, Any]
    sampling: Sampling
    history: Any
    where: Where
    options: Mapping[str, Any]
    specs: bytes


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
        self.specs = b""

    def play(self, plan: Round, refs: Sequence[Any], chosen: Sequence[Chosen]) -> Iterator[Episode]:
        """Yields the episodes of a share as they end.

        Args:
            plan: of the round.
            refs: where the policy is, and its present weights.
            chosen: the share.
        """
        self._take_up(plan, refs)
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

    def _take_up(self, plan: Round, refs: Sequence[Any]) -> None:
        """Registers the environments as they are where the run is, and fetches weights that are not
        known here."""
        import ray

        if plan.specs != self.specs:
            self.environments.close()  # those of before may be others under the same id
            self.environments, self.specs = Environments(), plan.specs
            gymnasium.registry.update(ray.cloudpickle.loads(plan.specs))
        sent, (whole, trained) = plan.weights, refs
        if self.has[0] != sent.of:
            self.player = self._player(plan, ray.get(whole))
        if self.has != (sent.of, sent.name):
            with torch.no_grad():
                own = self.player.policy.parameters()
                for parameter, value in zip(own, ray.get(trained), strict=True):
                    parameter.copy_(value)
            self.player.policy.version, self.has = sent.version, (sent.of, sent.name)

    def _player(self, plan: Round, whole: tuple[Any, ...]) -> PolicyPlayer:
        """Makes the policy, on a GPU where this process has one, and who plays it."""
        model, tokenizer, precision, today = whole
        place = "cuda" if torch.cuda.is_available() else "cpu"
        policy = Policy(model.to(place), tokenizer, precision=precision)
        policy.chat.template.today = today
        made = component(self.plugins, "backend", dict(plan.backend), policy=policy)
        return PolicyPlayer(policy, plan.sampling, made, plan.history)
