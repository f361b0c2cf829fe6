"""`rank`: plays several conversations from each start and has them compared. The comparisons stay
in the ledger.

Reward models and preference optimizers train from them later. Comparisons that were made elsewhere
come in by `data`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from ..analysis.preferences import rater_agreement, source_agreement, truth_agreement
from ..environments.registry import starts
from ..errors import ConfigError
from ..exchange.reading import import_data
from ..feedback.sources import Sources
from ..pipeline.parts import component
from ..pipeline.processes import decided
from ..pipeline.stage import Stage
from ..protocols import RunView
from ..records.episode import Episode
from ..records.feedback import Comparison
from ..records.update import Update
from ..util.ids import derive_id
from .collect import ask, grouped, play
from .environments import EnvConfig, check_envs, read_envs
from .outline import asked, played
from .play_options import JudgedPlayOptions


class Rank(JudgedPlayOptions, Stage):
    """Plays groups of conversations and has them compared.

    Attributes:
        env: or `data`.
        data: instead of `env`: a file or folder of comparisons, labels or ratings made elsewhere,
            see docs/preference-data.md.
        updates: rounds of play and ranking; the policy does not change.
        groups, group_size: starts per round, and conversations to be compared per start.
        feedback: sources that compare: `people`, `simulated-panel`, judges with `rank`; `raters` of
            each says how many rank a group. Needed with `env`.
        players: who plays, in turn over the slots of a group: "policy", and names of the
            environment's players.
    """

    _sources: Sources  # made where they are checked

    env: Any = None
    data: Path | None = None
    updates: int = Field(default=10, ge=1)
    groups: int = Field(default=32, ge=1)
    group_size: int = Field(default=4, ge=2)
    feedback: list[Any] = []
    players: list[str] = Field(default=["policy"], min_length=1)

    @field_validator("env")
    @classmethod
    def _env(cls, value: Any) -> list[EnvConfig] | None:
        return None if value is None else read_envs(value)

    @field_validator("feedback", mode="before")
    @classmethod
    def _feedback(cls, value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value]

    @model_validator(mode="after")
    def _one(self) -> Rank:
        if (self.data is None) == (self.env is None):
            raise ValueError(
                "give either `env` (to play and compare) or `data` (comparisons made elsewhere)"
            )
        if self.env is not None and not self.feedback:
            raise ValueError("give `feedback`: sources that compare conversations")
        return self

    def check(self, run: RunView) -> None:
        """Checks that the file is there, or the environments, players and sources."""
        if self.env is None:
            if self.data is None or not self.data.exists():
                raise ConfigError(f"rank.data: there is no file or folder {self.data}")
            return
        check_envs(self.env, [name for name in self.players if name != "policy"], run.plugins)
        self._sources = self._make_sources(run)

    def outline(self) -> list[str]:
        """Returns what is played and who compares, or the file."""
        if self.env is None:
            return [f"reads comparisons from {self.data}"]
        starts, size = self.groups * self.updates, self.group_size
        return [
            *played(self.env, starts, size, self.max_turns, self.max_new_tokens),
            *asked(self._sources, self.env, starts, size),
        ]

    @property
    def trains_policy(self) -> bool:
        """False: it plays and records."""
        return False

    @property
    def makes_comparisons(self) -> bool:
        """True: this stage records comparisons."""
        return True

    def compared_by(self, run: RunView) -> set[str] | None:
        """Returns the names of the sources that will have compared; None: those that a file
        names."""
        return None if self.env is None else set(self._sources.by_name())

    def _make_sources(self, run: RunView) -> Sources:
        sources = Sources.make(
            [self.feedback if env.feedback is None else env.feedback for env in self.env or ()],
            run.plugins,
            self.max_failure_rate,
        )
        odd = [s.name for own in sources.of_env for s in own if s.kind != "group"]
        if odd or not all(sources.of_env) or any(w is not None for w in sources.env_weights):
            raise ConfigError(
                f"rank.feedback: {', '.join(map(repr, odd or ['environment']))} scores single"
                " conversations; sources that compare are needed (a judge with `rank`, such as"
                " simulated-panel)"
            )
        return sources

    def play(self, run: RunView) -> Iterator[Update]:
        """Imports a file in one update, or plays groups round by round and has them ranked."""
        if self.data is not None:
            if run.begin() == 0:
                yield self._import(run, self.data)
            return
        sources = self._sources
        players = self._players(run)
        done = run.begin(sources.givers())
        if run.is_main:
            sources.open(run.folder, run.ledger, run.seed, run.updates, run.id)
        try:
            yield from self._rounds(run, sources, players, done)
        finally:
            sources.close()

    def _players(self, run: RunView) -> list[Any]:
        from ..records.sampling import Sampling
        from ..rollout.players import PolicyPlayer, ScriptPlayer

        players: list[Any] = []
        for name in self.players:
            if name == "policy":
                backend = component(run.plugins, "backend", self.backend, policy=run.policy)
                sampling = Sampling(self.temperature, self.max_new_tokens)
                players.append(PolicyPlayer(run.policy, sampling, backend, self.history))
            else:
                players.append(ScriptPlayer(name))
        return players

    def _rounds(
        self, run: RunView, sources: Sources, players: Sequence[Any], done: int
    ) -> Iterator[Update]:
        from ..rollout.conversation import Where
        from ..rollout.players import PolicyPlayer

        total = sum(env.weight for env in self.env)
        seed = int(derive_id("starts", run.seed, run.stage)[:8], 16)
        for i in range(done, self.updates):
            show = {"update": i + 1, "updates": self.updates}
            where = Where(run.id, run.stage, run.updates + 1, run.seed)
            for player in players:
                if isinstance(player, PolicyPlayer):
                    player.backend.refresh()
            episodes: list[Episode] = []
            by_env = []
            for env in self.env:
                count = max(1, round(self.groups * env.weight / total))
                own = starts(env.id, seed, count, env.options, env.kwargs, first=i * count)
                played: dict[tuple[str, int], Episode] = {}
                for p, player in enumerate(players):
                    chosen = [
                        (s, slot)
                        for s in own
                        for slot in range(self.group_size)
                        if slot % len(players) == p
                    ]
                    found = play(
                        run, player, chosen, where, max_turns=self.max_turns,
                        step_limit=self.step_limit, schedule=self.schedule,
                        max_failure_rate=self.max_failure_rate,
                        progress=lambda done, total: run.status("play", done, total, **show),  # noqa: B023
                    )  # fmt: skip
                    played |= {(e.start.key, e.slot): e for e in found}
                mine = [played[s.key, slot] for s in own for slot in range(self.group_size)]
                episodes += mine
                by_env.append(grouped(mine))
            feedback = decided(run, lambda: ask(run, sources, by_env, poll=self.poll, show=show))  # noqa: B023
            answers = [a for each in feedback.values() for a in each if isinstance(a, Comparison)]
            yield run.finish_update(comparison_metrics(episodes, answers), episodes=episodes)

    def _import(self, run: RunView, path: Path) -> Update:
        episodes, comparisons, scores = import_data(
            path, run=run.id, stage=run.stage, update=run.updates + 1
        )
        if run.is_main:
            run.ledger.add_episodes(episodes)
            run.ledger.add_feedback([*comparisons, *scores])
        metrics = {**comparison_metrics(episodes, comparisons), "scores": float(len(scores))}
        return run.finish_update(metrics, episodes=episodes)


def comparison_metrics(
    episodes: Sequence[Episode], answers: Sequence[Comparison]
) -> dict[str, float]:
    """Returns the metrics of a round of comparisons; `truth_agreement` is with the environment's
    return."""
    scored = [a for a in answers if a.status == "scored"]
    sound = [e for e in episodes if e.ending != "failed"]
    users = sum(e.user_failed for e in episodes)
    metrics = {
        "episodes": float(len(episodes)),
        "failed_episodes": float(len(episodes) - len(sound)),
        **({"failed_users": float(users)} if users else {}),
        "comparisons": float(len(scored)),
        "failed_comparisons": float(sum(a.status == "failed" for a in answers)),
        "abstained_comparisons": float(sum(a.status == "abstained" for a in answers)),
        "spend": sum(a.stamp.cost for a in answers),
    }
    if sound:  # none is not zero
        metrics["return"] = sum(e.env_return for e in sound) / len(sound)
        metrics["turns"] = sum(len(e.turns) for e in sound) / len(sound)
    truth: Mapping[str, float] = {e.id: e.env_return for e in sound}
    measured = {
        "rater_agreement": rater_agreement(scored),
        "source_agreement": source_agreement(scored),
        "truth_agreement": truth_agreement(scored, truth),
    }
    return metrics | {name: value for name, value in measured.items() if value is not None}
