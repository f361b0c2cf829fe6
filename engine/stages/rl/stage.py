"""`rl`: play, feedback, rewards, credit, optimizer; one update after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ...errors import ConfigError
from ...feedback.specs import ENVIRONMENT
from ...pipeline.parts import component
from ...pipeline.processes import shared
from ...protocols import RunView
from ...records.update import Update
from ..environments import check_envs, other_policies
from ..outline import asked, played
from ..play_options import check_backend
from .collect import Collector, InStep
from .early_stopping import EarlyStopping
from .metrics import warn_untaught
from .parts import Parts, default_credit, make_parts
from .pending import Pending
from .recorded import Recorded
from .settings import RLSettings
from .update import Trainer


class RL(RLSettings):
    """Trains the policy by reinforcement learning on conversations; its options are those of
    `RLSettings`."""

    _parts: Parts  # made where they are checked, so that what is checked is what is used

    def check(self, run: RunView) -> None:
        """Checks the environments, the order of judges, and the backend's options."""
        gold = None if self.gold is None else self.gold.options
        if self.episodes == "played":
            check_envs(self.env, (), run.plugins, several_seats=True, options=gold)
        self._parts = make_parts(self, run.plugins)
        self.credit = self.credit or default_credit(self._parts.optimizer)  # a dry run shows it
        self._parts.sources.check_order(run.before)
        if self.episodes == "ledger":
            for source in self._parts.sources.of_env[0]:
                if not source.given.answers_in_ledger:
                    raise ConfigError(
                        f"with `episodes: ledger` nothing is asked, and {source.name!r} gives no"
                        " feedback unasked: use `feedback: [users]`"
                    )
        check_backend(run, self.backend)

    def outline(self) -> list[str]:
        """Returns what is played, who is asked, and how often the policy is updated."""
        if self.episodes == "ledger":
            return [f"makes up to {self.updates} updates on conversations in the ledger"]
        starts, size = self.groups * self.updates, self.group_size
        more = []
        if self.gold:
            measured = 1 + self.updates // self.gold.every
            more.append(f"plays {self.gold.episodes} starts of `gold` up to {measured} times")
        if self.audit:
            times = f"{self.audit.rollouts} continuations of every turn"
            more.append(f"audits {self.audit.episodes} conversations now and then, by {times}")
        return [
            f"makes {self.updates} updates of {self.groups} starts with {size} conversations each",
            *more,
            *played(self.env, starts, size, self.max_turns, self.max_new_tokens),
            *asked(self._parts.sources, self.env, starts, size),
        ]

    @property
    def makes_comparisons(self) -> bool:
        """Whether conversations may be compared here, for reward models and preference optimizers
        to learn from."""
        return any(
            env.feedback not in (None, [ENVIRONMENT]) for env in self.env
        ) or self.feedback != [ENVIRONMENT]

    def play(self, run: RunView) -> Iterator[Update]:
        """Collects conversations with their rewards and trains the policy on them, update by
        update."""
        from ...records.sampling import Sampling
        from ...rollout.players import PolicyPlayer

        parts, policy = self._parts, run.policy
        if self.max_new_tokens >= policy.context_length:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens} leaves no room in a context of"
                f" {policy.context_length} tokens"
            )
        sampling = Sampling(self.temperature, self.max_new_tokens)

        def player(own: Any) -> PolicyPlayer:
            backend = component(run.plugins, "backend", self.backend, policy=own)
            return PolicyPlayer(own, sampling, backend, self.history)

        players = {"policy": player(policy), **other_policies(run, self.env, player)}
        parts.optimizer.setup(policy)
        if run.is_main:
            parts.sources.open(run.folder, run.ledger, run.seed, run.updates, run.id)
        try:
            kind = Recorded if self.episodes == "ledger" else Pending if self.pending else InStep
            collector: Collector = kind(run, self, parts, players)
            stopping = EarlyStopping(run, self, players)
            done = run.begin(parts.learning() | stopping.states() | collector.states())
            policy.meanwhile = collector.meanwhile
            yield from self._updates(collector, stopping, done)
        finally:
            policy.meanwhile = lambda: None
            parts.sources.close()

    def _updates(
        self, collector: Collector, stopping: EarlyStopping, done: int
    ) -> Iterator[Update]:
        """Makes the updates of the stage from number `done` on."""
        run, parts, trainer = collector.run, collector.parts, Trainer(collector)
        for i in range(done, self.updates):
            if stopping.is_over or not collector.has_more(i):
                break
            began = time.perf_counter()
            collector.refresh()
            measured = stopping.before(i)
            learned = shared(run, parts.sources.learn(run, parts.combiners) if run.is_main else {})
            experience = collector.collect(i)
            metrics = {**trainer.update(experience, i), **measured, **learned}
            metrics |= collector.starts.learn(experience)
            spent = experience.play_seconds + experience.feedback_seconds + stopping.seconds
            metrics["seconds/play"] = experience.play_seconds
            metrics["seconds/feedback"] = experience.feedback_seconds
            metrics["seconds/update"] = time.perf_counter() - began - spent
            metrics |= stopping.after(i)
            warn_untaught(run, metrics)
            yield run.finish_update(metrics, episodes=experience.episodes)
        collector.close()
