"""`evaluate`: plays players on the same starts, with intervals: alone, in pairs, by a judge, and
the policy as the best of n."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from ..analysis.overoptimisation import best_of_n, kl_best_of_n
from ..analysis.scores import bootstrap, paired, score
from ..errors import ConfigError, TooManyFailures
from ..feedback.sources import Sources
from ..pipeline.config import PolicyConfig
from ..pipeline.parts import component
from ..pipeline.processes import decided
from ..pipeline.stage import Stage
from ..protocols import RunView
from ..records.episode import Episode
from ..records.feedback import Comparison, Feedback, Request
from ..records.update import Update
from ..rollout.conversation import Where
from ..rollout.players import PolicyPlayer, ScriptPlayer
from ..rollout.rollout import rollout
from ..util import files
from ..util.ids import canonical_json, derive_id
from ..util.section import Section
from .collect import ask, grouped, play
from .environments import (
    EnvConfig,
    check_envs,
    check_folder,
    load_beginning,
    load_other,
    other_policies,
)
from .play_options import SamplingOptions, check_backend

BEFORE = "before"  # the player who is the policy that the run began with


def play_held_out(
    player: Any,
    env: EnvConfig,
    episodes: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    where: Where = Where(stage="evaluate"),
    slots: Sequence[int] = (0,),
    run: RunView | None = None,
    others: Mapping[str, Any] = {},
) -> list[Episode]:
    """Plays the starts number 0 to `episodes - 1` that `seed` defines; the same for every player.

    Args:
        player: who replies.
        env: the environment and its options.
        episodes: how many starts.
        seed: what defines the starts.
        progress: called with what is done and the total.
        where: run, stage, update and seed they are played in.
        slots: in the groups of these starts; several play each start several times.
        run: records them in its ledger.
        others: other policies that play in seats, by name.
    """
    first = int(derive_id("evaluate", seed)[:8], 16)
    chosen = [(start, slot) for start in env.starts(first, episodes) for slot in slots]
    if run is not None:
        return play(run, player, chosen, where, progress=progress, others=others)
    return rollout(player, chosen, where, progress=progress, others=others)


def check_one_seat(env: EnvConfig) -> None:
    """Raises `ConfigError` when the policy has several seats: it is judged, or watched, in one."""
    if len(env.trained) > 1:
        raise ConfigError(
            f"environment {env.id!r} gives the seats {', '.join(env.trained)} to the policy: here"
            " it has one; give the others to the environment's own players, `self` or `{policy:"
            " folder}`"
        )


def _labels(envs: Sequence[EnvConfig]) -> list[str]:
    """Returns what the results of each environment begin with: nothing where there is one, else its
    id and options, and what else tells it from the others.

    Raises:
        ConfigError: two are the same.
    """
    if len(envs) == 1:
        return [""]
    labels = [f"{e.id} {canonical_json(e.options)}" if e.options else e.id for e in envs]
    whole = [
        f"{label} {canonical_json({'kwargs': e.kwargs, 'seats': e.model_dump()['seats']})}"
        if labels.count(label) > 1
        else label
        for label, e in zip(labels, envs, strict=True)
    ]
    if len(set(whole)) < len(whole):
        raise ConfigError(
            "evaluate: `env` names an environment twice in the same way: leave it out"
        )
    return [f"{label}/" for label in whole]


class Other(Section):
    """Another policy to play against.

    Attributes:
        name: in the results.
        policy: its folder or hub name.
    """

    name: str
    policy: str


class BestOf(Section):
    """A policy as the best of n: the baseline that RL against a judge must beat.

    Attributes:
        policy: another policy's folder or hub name, such as the one that RL began from; default:
            the run's.
        judge: scores single conversations, such as "reward-model"; anything the `feedback` of `rl`
            takes.
        n: how many conversations to choose from; the largest is how often each start is played.
    """

    policy: str | None = None
    judge: Any
    n: list[int] = Field(default=[1, 4, 16], min_length=1)


class Evaluate(SamplingOptions, Stage):
    """Plays the policy and other players on the same held-out starts. Results go to metrics and to
    `evaluation.json`.

    Attributes:
        episodes: starts per environment.
        players: "policy", names of the environment's own players, and `{name: ..., policy: folder}`
            for other policies. The first is compared with each of the others, start by start.
        before: after stages that train it, plays the policy that the run began with too, as the
            player "before", which no judge is asked about; not where a `Policy` object was given.
        judge: one that compares; gives the first player's win rate, every pair shown in both
            orders.
        best_of: the policy as the best of n by a judge's score.
        seed: of the starts; the same for every run, so that runs can be compared.
        poll: seconds between looks for a judge's answers that come later, at most.
    """

    _comparing: Sources | None = (
        None  # the judge and that of `best_of`, made where they are checked
    )
    _scoring: Sources | None = None
    _with_before: bool = False

    episodes: int = Field(default=300, ge=1)
    players: list[Any] = Field(default=["policy"], min_length=1)
    before: bool = True
    judge: Any = None
    best_of: BestOf | None = None
    seed: int = 20_000
    poll: float = Field(default=1.0, ge=0)

    @field_validator("backend")
    @classmethod
    def _backend(cls, value: Any) -> Any:
        if not isinstance(value, (str, Mapping)):
            raise ValueError("name a backend, with its options: one is made for each policy")
        return value

    @field_validator("players")
    @classmethod
    def _players(cls, value: list[Any]) -> list[Any]:
        players = [Other(**p) if isinstance(p, Mapping) else p for p in value]
        names = [p if isinstance(p, str) else p.name for p in players]
        if len(set(names)) != len(names):
            raise ValueError(f"two players have the same name: {names}")
        return players

    @property
    def trains_policy(self) -> bool:
        """False: it measures."""
        return False

    def check(self, run: RunView) -> None:
        """Checks the environments and players, that policies' folders exist, and that judges fit
        their use."""
        names = [p if isinstance(p, str) else p.name for p in self.players]
        given = isinstance(run.config.policy, PolicyConfig)
        stages = dict(run.stages)
        trained = any(stages[label].trains_policy for label in run.before)
        self._with_before = bool(
            self.before and given and trained and "policy" in names and BEFORE not in names
        )
        check_envs(
            self.env,
            [name for name in self.players if isinstance(name, str) and name != "policy"],
            run.plugins,
            several_seats=True,
        )
        for other in (*self.players, self.best_of):
            if isinstance(other, (Other, BestOf)) and other.policy is not None:
                check_folder(other.policy)
        _labels(self.env)
        for env in self.env:
            check_one_seat(env)
        check_backend(run, self.backend)
        self._comparing = self._sources(run, self.judge) if self.judge is not None else None
        self._scoring = self._sources(run, self.best_of.judge) if self.best_of else None
        if self._comparing and self._comparing.of_env[0][0].kind != "group":
            raise ConfigError(
                "evaluate.judge must compare conversations (have `rank`); one that scores them goes"
                " to `best_of`"
            )
        if self._scoring and self._scoring.of_env[0][0].kind != "episode":
            raise ConfigError(
                "evaluate.best_of.judge must score single conversations (have `score`)"
            )

    def outline(self) -> list[str]:
        """Returns who plays, and which judges are asked."""
        names = [p if isinstance(p, str) else p.name for p in self.players]
        names += [BEFORE] if self._with_before else []
        lines = [
            f"plays {self.episodes} starts of {' and of '.join(e.id for e in self.env)} by"
            f" {', '.join(names)}"
        ]
        if self._comparing:
            pairs = 2 * self.episodes * (len(self.players) - 1) * len(self.env)
            lines.append(f"asks {self._comparing.of_env[0][0].name} about {pairs:,} pairs")
        if self._scoring and self.best_of:
            number = max(self.best_of.n) * self.episodes * len(self.env)
            lines.append(f"plays {number:,} conversations for the best of n")
            lines.append(f"asks {self._scoring.of_env[0][0].name} about {number:,} conversations")
        return lines

    def _sources(self, run: RunView, spec: Any) -> Sources:
        sources = Sources.make([[spec]], run.plugins, 1.0)
        sources.check_order(run.before)
        if not sources.of_env[0]:
            raise ConfigError(
                "evaluate: the environment's own reward is measured anyway; name a judge"
            )
        return sources

    def play(self, run: RunView) -> Iterator[Update]:
        """Plays the same held-out starts with every player, and compares them, in one update."""
        if run.begin():
            return
        players: dict[str, Any] = {}
        for name in self.players:
            if isinstance(name, Other):
                players[name.name] = self._player(run, load_other(run, name.policy))
            else:
                players[name] = (
                    self._player(run, run.policy) if name == "policy" else ScriptPlayer(name)
                )
        if self._with_before:
            players[BEFORE] = self._player(run, load_beginning(run))
        others = other_policies(run, self.env, partial(self._player, run))
        table: dict[str, dict[str, Any]] = {}
        for label, env in zip(_labels(self.env), self.env, strict=True):
            where = Where(run.id, run.stage, run.updates + 1, self.seed)
            played: dict[str, list[Episode]] = {}
            for slot, (name, player) in enumerate(players.items()):
                show = partial(run.status, f"evaluate {name}")
                if isinstance(player, PolicyPlayer):
                    player.backend.refresh()
                played[name] = play_held_out(
                    player, env, self.episodes, self.seed, show, where, [slot], run, others
                )
                for each in (player, *others.values()):
                    if isinstance(each, PolicyPlayer):
                        each.backend.refresh()  # the next one needs the room
                table[label + name] = asdict(score(played[name]))
            [first, *rest] = players
            if self._with_before and first != "policy":
                pair = paired(played["policy"], played[BEFORE])
                table[f"{label}policy - {BEFORE}"] = asdict(pair)
            for name in rest:
                two = played[first], played[name]
                asked = self.judge is not None and not (self._with_before and name == BEFORE)
                judged = decided(run, partial(self._judged, run, *two)) if asked else {}
                table[f"{label}{first} - {name}"] = asdict(paired(*two, **judged))
            if self.best_of:
                many = self._many(run, env, where, len(players), others)
                best = decided(run, partial(self._best_of, run, many))
                table |= {label + name: row for name, row in best.items()}
        if run.is_main:
            files.write(run.folder / "evaluation.json", json.dumps(table, indent=2) + "\n")
        yield run.finish_update(
            {
                f"{key}/{k}": float(v)
                for key, row in table.items()
                for k, v in row.items()
                if v is not None
            }
        )

    def _judged(
        self, run: RunView, first: Sequence[Episode], second: Sequence[Episode]
    ) -> dict[str, Any]:
        """Returns a judge's verdicts on every pair, shown in both orders.

        Raises:
            Interrupted: the run was asked to end while it waited for them.
        """
        assert self._comparing is not None
        sources = self._comparing
        [[source]] = sources.of_env
        pairs = {
            a.group: (a, b)
            for a, b in zip(first, second, strict=True)
            if "failed" not in (a.ending, b.ending) and a.turns and b.turns
        }
        deadline = None if source.deadline is None else run.clock() + source.deadline
        requests = [
            Request(
                "group",
                key,
                source.name,
                0,
                deadline,
                source.required,
                {"against": b.slot, "order": order},
                (a, b) if order == 0 else (b, a),
            )
            for key, (a, b) in pairs.items()
            for order in (0, 1)
        ]
        sources.open(run.folder, run.ledger, run.seed, run.updates, run.id)
        try:
            rated = ask(run, sources, [pairs], poll=self.poll, requests=requests)
        finally:
            sources.close()
        wanted = {r.id: r for r in requests}
        wins: list[float] = []
        flips = 0
        for key, (a, b) in pairs.items():
            verdicts = [
                0.5 if len(c.ranking) == 1 else float(a.id in c.ranking[0])
                for c in rated[key]
                if isinstance(c, Comparison) and c.status == "scored" and c.stamp.request in wanted
                and {e for tier in c.ranking for e in tier} == {a.id, b.id}
            ]  # fmt: skip
            if len(verdicts) == 2:
                wins.append(sum(verdicts) / 2)
                flips += abs(verdicts[0] - verdicts[1]) == 1
        if not wins:
            return {"unjudged": len(pairs)}
        low, high = bootstrap(wins)
        return {
            "win_rate": float(np.mean(wins)), "win_low": low, "win_high": high,
            "flips": flips / len(wins),
            "unjudged": len(pairs) - len(wins),
        }  # fmt: skip

    def _player(self, run: RunView, policy: Any) -> PolicyPlayer:
        from ..records.sampling import Sampling

        sampling = Sampling(self.temperature, self.max_new_tokens)
        backend = component(run.plugins, "backend", self.backend, policy=policy)
        return PolicyPlayer(policy, sampling, backend)

    def _many(
        self, run: RunView, env: EnvConfig, where: Where, first: int, others: Mapping[str, Any]
    ) -> list[Episode]:
        """Plays as many conversations per start as `best_of` chooses from."""
        assert self.best_of is not None
        policy = run.policy if self.best_of.policy is None else load_other(run, self.best_of.policy)
        size = max(self.best_of.n)
        show = partial(run.status, f"best of {size}")
        slots = range(first, first + size)
        player = self._player(run, policy)
        return play_held_out(player, env, self.episodes, self.seed, show, where, slots, run, others)

    def _best_of(self, run: RunView, episodes: Sequence[Episode]) -> dict[str, dict[str, Any]]:
        """Chooses conversations by the judge's score, for every n, from the same many conversations
        per start.

        Raises:
            Interrupted: the run was asked to end while it waited for the scores.
            TooManyFailures: the judge scored all conversations of no start.
        """
        assert self.best_of is not None
        assert self._scoring is not None
        size, sources = max(self.best_of.n), self._scoring
        groups = grouped(episodes)
        sources.open(run.folder, run.ledger, run.seed, run.updates, run.id)
        try:
            answers = ask(run, sources, [groups], poll=self.poll)
        finally:
            sources.close()
        [[source]] = sources.of_env
        found = {
            a.target: a.score
            for each in answers.values()
            for a in each
            if isinstance(a, Feedback) and a.stamp.source == source.name and a.score is not None
        }
        proxy, outcome, success = [], [], []
        for members in groups.values():
            scored = [e for e in members if e.id in found]
            if len(scored) == size:
                proxy.append([found[e.id] for e in scored])
                outcome.append([e.env_return for e in scored])
                success.append([float(e.succeeded) for e in scored])
        if not proxy:
            raise TooManyFailures(
                f"best_of: the judge {source.name!r} scored all {size} conversations of none of"
                f" {len(groups)} starts"
            )
        table = {}
        for n in self.best_of.n:
            best = [
                best_of_n(np.array(proxy), np.array(gold), n) for gold in (outcome, success, proxy)
            ]
            table[f"best-of-{n}"] = {
                "outcome": float(best[0].mean()), "success": float(best[1].mean()),
                "proxy": float(best[2].mean()),
                "kl": float(kl_best_of_n(np.array(proxy), n).mean()),
                **dict(zip(("low", "high"), bootstrap(best[1].tolist()), strict=True)),
                **dict(zip(("outcome_low", "outcome_high"), bootstrap(best[0].tolist()),
                        strict=True)),
                "episodes": len(proxy), "failed": len(groups) - len(proxy),
            }  # fmt: skip
        return table
