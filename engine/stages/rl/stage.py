"""`rl`: play, feedback, rewards, credit, optimizer; one update after the other."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from ...environments.registry import starts
from ...errors import ConfigError, PluginError
from ...feedback.judge_source import JudgeSource
from ...feedback.sources import Sources, check_order, learn
from ...feedback.specs import ENVIRONMENT
from ...ledger.rows import Member
from ...pipeline.parts import component
from ...pipeline.plugins import Plugins, check_options
from ...pipeline.processes import shared
from ...pipeline.stage import Stage
from ...protocols import RunView
from ...records.episode import Episode, Start
from ...records.feedback import Answer
from ...records.rewards import NoReward, Rewards, clipped
from ...records.update import Update
from ...rollout.conversation import Branch, Where
from ...util.ids import derive_id
from ...util.memory import explained_memory
from ..collect import ask, grouped, play
from ..environments import EnvConfig, check_envs, read_envs
from .branches import Audit
from .early_stopping import BestSoFar, Gold
from .experience import Experience, Parts
from .metrics import SILENT, credit_metrics, drift, feedback_metrics, groups_with_signal, mean, play_metrics, warn_untaught
from .parts import learning_parts, make_combiner, part_name, with_option
from .pending import Pending
from .update import check_finite, make_rl_batch, outcome_signal, spread


class RL(Stage):
    """Reinforcement learning on conversations.

    Attributes:
        env: an id, a list of (id, weight), or of mappings like `EnvConfig`.
        updates: how many.
        groups, group_size: starts per update, and episodes per start.
        optimizer, credit, combiner: a registered name, or a mapping with `name` and options.
        feedback: sources; "environment" is the environment's own reward.
        temperature, max_new_tokens, max_turns, history: how it is played.
        backend: what samples, and its options.
        reward_clip: outcomes are kept within plus and minus this.
        reward_whiten: rewards are divided by the standard deviation of the update's outcomes (their mean stays).
        gold: watches a measure that is not trained on, and ends the stage when it falls, see `Gold`.
        pending: how many episodes may wait for answers while play goes on, see `Pending`; 0: each update waits for its own.
        staleness: how many versions older than the policy an episode may be that trains; where play goes on.
        resample: how many times groups in which all outcomes are equal are replaced by new ones before an update (DAPO's dynamic sampling).
        audit: measures the credit against the truth, see `Audit`.
        min_group: groups with fewer rewarded episodes are dropped, where credit compares within groups.
        max_failure_rate: of environments, and of each source's answers; above it the run stops.
        step_limit: seconds an environment may take for a step.
        poll: seconds between looks for answers that come later.
    """

    env: Any
    updates: int = Field(default=100, ge=1)
    groups: int = Field(default=16, ge=1)
    group_size: int = Field(default=8, ge=1)
    optimizer: Any = "grpo"
    credit: Any = None
    combiner: Any = "weighted"
    feedback: list[Any] = [ENVIRONMENT]
    temperature: float = Field(default=1.0, gt=0)
    max_new_tokens: int = Field(default=256, ge=1)
    max_turns: int = Field(default=1000, ge=1)
    history: Literal["append", "rerender"] = "append"
    backend: Any = "in-process"
    reward_clip: float | None = Field(default=None, gt=0)
    reward_whiten: bool = False
    gold: Gold | None = None
    pending: int = Field(default=0, ge=0)
    staleness: int = Field(default=8, ge=1)
    resample: int = Field(default=0, ge=0)
    audit: Audit | None = None
    min_group: int = Field(default=2, ge=1)
    max_failure_rate: float = Field(default=0.5, ge=0, le=1)
    step_limit: float = Field(default=60.0, gt=0)
    poll: float = Field(default=1.0, ge=0)

    @field_validator("env")
    @classmethod
    def _env(cls, value: Any) -> list[EnvConfig]:
        return read_envs(value)

    @field_validator("feedback", mode="before")
    @classmethod
    def _feedback(cls, value: Any) -> list[Any]:
        sources = value if isinstance(value, list) else [value]
        if not sources:
            raise ValueError("at least one source is needed, or there is nothing to learn from; the default is ['environment']")
        return sources

    def check(self, run: RunView) -> None:
        check_envs(self.env, (), run.plugins)
        check_order(self.parts(run.plugins).sources, run.before)
        if not isinstance(self.backend, (str, Mapping)):
            return
        options = dict(self.backend) if isinstance(self.backend, Mapping) else {"name": self.backend}
        name = options.pop("name", "")
        check_options(f"backend {name!r}", run.plugins.factory("backend", name), 0, {"policy": None, **options})

    @property
    def makes_comparisons(self) -> bool:
        """Whether somebody may compare conversations here, for reward models and preference optimizers to learn from."""
        return any(env.feedback not in (None, [ENVIRONMENT]) for env in self.env) or self.feedback != [ENVIRONMENT]

    def parts(self, plugins: Plugins) -> Parts:
        """Makes the parts and refuses pairings that cannot work.

        Raises:
            PluginError, ConfigError: with what to choose instead.
        """
        optimizer = component(plugins, "optimizer", self.optimizer)
        if not {"advantages", "demonstrations"} & set(optimizer.consumes):
            raise ConfigError(
                f"optimizer {part_name(self.optimizer)!r} trains on {', '.join(sorted(optimizer.consumes))}, which the rl stage does "
                f"not make: use {' or '.join(with_option(plugins, 'advantages', 'demonstrations'))} here, or a preference stage for it"
            )
        if "advantages" not in optimizer.consumes and self.credit not in (None, "outcome"):
            raise ConfigError(
                f"optimizer {part_name(self.optimizer)!r} copies whole conversations and has no use for credit per turn: leave `credit` out, or "
                f"use {' or '.join(with_option(plugins, 'advantages'))}"
            )
        credit_name = self.credit or ("gae" if "values" in optimizer.provides else "outcome")
        credit = component(plugins, "credit method", credit_name)
        if "values" in credit.needs - optimizer.provides:
            raise ConfigError(
                f"credit {part_name(credit_name)!r} needs a critic's values, which optimizer {part_name(self.optimizer)!r} does not have: "
                "use optimizer 'ppo', or a credit method without a critic (outcome, turn-returns, gigpo, branch)"
            )
        if "advantages" not in optimizer.consumes and (self.audit or self.group_size < 2):
            raise ConfigError(
                f"optimizer {part_name(self.optimizer)!r} trains on whole conversations: it needs group_size of at least 2 to choose among them, and has no credit to audit"
            )
        if "group" in credit.needs and self.group_size < 2:
            raise ConfigError(
                f"credit {part_name(credit_name)!r} compares episodes of one start and needs group_size of at least 2, got "
                f"{self.group_size}: raise it, or use optimizer 'ppo' with credit 'gae'"
            )
        if self.resample and "group" not in credit.needs:
            raise ConfigError(
                f"resample replaces groups whose outcomes are all equal, but credit {part_name(credit_name)!r} does not compare within groups and "
                "learns from those too: leave resample out"
            )
        if self.pending:
            self._check_pending(credit, credit_name)
        elif "staleness" in self.model_fields_set:
            raise ConfigError(
                "staleness is for play that goes on while answers are awaited: give `pending` too, or leave it out"
            )
        unknown = credit.needs - {"group", "values", "turn_scores", "branches"}
        if unknown:
            raise ConfigError(f"credit {part_name(credit_name)!r} needs {sorted(unknown)}, which this version does not supply")
        sources, combiners = [], []
        for env in self.env:
            specs = env.feedback if env.feedback is not None else self.feedback
            sources.append(Sources.make(specs, plugins, self.max_failure_rate))
            combiners.append(make_combiner(plugins, self.combiner, sources[-1]))
            if "turn_scores" in credit.needs and not sources[-1].sources:
                raise ConfigError(
                    f"credit {part_name(credit_name)!r} needs turn scores, but no feedback source of {env.id!r} gives any: add a judge whose "
                    "Feedback has `turn_scores`, such as `{judge: reward-model, per: turn}`"
                )
            if "branches" in credit.needs or self.audit:
                what = f"credit {part_name(credit_name)!r}" if "branches" in credit.needs else "an audit"
                unfit = [s.name for s in sources[-1].sources if s.kind == "group" or not isinstance(s.given, JudgeSource)]
                if unfit:
                    raise ConfigError(
                        f"{what} asks about many continuations of every turn, which {unfit[0]!r} cannot say: they need a number each, at "
                        "once. Use judges that score, or a reward model trained on what people said; or credit 'gae', 'gigpo' or 'judged'"
                    )
        return Parts(optimizer, credit, sources, combiners)

    def _check_pending(self, credit: Any, name: Any) -> None:
        """Refuses what play that goes on while answers are awaited cannot be paired with."""
        size = self.groups * self.group_size
        if self.pending < size:
            raise ConfigError(
                f"pending={self.pending} leaves no room for a single round of play, which has groups * group_size = {size} episodes: give at "
                f"least {size}, or leave `pending` out and every update waits for its own answers"
            )
        if self.pending > size * (self.staleness + 1):
            raise ConfigError(
                f"pending={self.pending} is room for {self.pending // size} rounds of {size} episodes, the last of which would train after all "
                f"the others, when it is more than staleness={self.staleness} versions old, and be thrown away: give at most "
                f"{size * (self.staleness + 1)}, or raise `staleness`"
            )
        if self.resample:
            raise ConfigError(
                "resample replaces groups before an update and would wait for answers about the new ones: leave it out where `pending` is "
                "given, and raise `groups` instead"
            )
        if "branches" in credit.needs or self.audit:
            what = f"credit {part_name(name)!r}" if "branches" in credit.needs else "an audit"
            raise ConfigError(
                f"{what} needs judges that answer at once, so that no conversation would ever be pending: leave `pending` out, or use credit "
                "'outcome', 'gae', 'gigpo' or 'redistribute' with people who answer later"
            )

    def play(self, run: RunView) -> Iterator[Update]:
        from ...records.sampling import Sampling
        from ...rollout.players import PolicyPlayer

        parts = self.parts(run.plugins)
        policy = run.policy
        if self.max_new_tokens >= policy.context_length:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens} leaves no room in a context of {policy.context_length} tokens"
            )
        backend = component(run.plugins, "backend", self.backend, policy=policy)
        player = PolicyPlayer(policy, Sampling(self.temperature, self.max_new_tokens), backend, self.history)
        parts.optimizer.setup(policy)
        if run.is_main:
            for sources in parts.sources:
                sources.open(run.folder, run.ledger, run.seed, run.updates, run.id)
        try:
            best = BestSoFar(policy) if self.gold else None
            pending = Pending(run, self, parts) if self.pending else None
            learning = learning_parts(parts) | ({"gold": best} if best else {}) | ({"pending": pending} if pending else {})
            yield from self._updates(run, parts, player, backend, run.begin(learning), best, pending)
        finally:
            for sources in parts.sources:
                sources.close()

    def _updates(
        self, run: RunView, parts: Parts, player: Any, backend: Any, done: int, best: BestSoFar | None, pending: Pending | None
    ) -> Iterator[Update]:
        policy = run.policy
        for i in range(done, self.updates):
            if best is not None and self._has_turned(best):
                break
            began = time.perf_counter()
            number = run.updates + 1
            show = {"update": i + 1, "updates": self.updates}
            backend.refresh()
            golden: dict[str, float] = {}
            if best is not None and self.gold and i == 0:
                golden = self._gold(run, player, best, i)
            learned = shared(run, learn(parts.sources, run, parts.combiners) if run.is_main else {})
            experience = Experience(run, parts, player, show, {})
            if not (pending.gather(experience, i) if pending else self._in_step(experience, i)):
                return  # interrupted while waiting: what was played and asked is kept, nothing trains
            episodes, rewards, said = experience.episodes, experience.rewards, experience.said
            self.check_turns(run, episodes)
            used, left_out = self.members(episodes, rewards, "group" in parts.credit.needs)
            if self.resample:  # what was replaced does not train
                speaking = set(groups_with_signal(episodes, rewards))
                left_out |= {e.id: SILENT for e in used if e.group not in speaking}
                used = [e for e in used if e.group in speaking]
            metrics = play_metrics(episodes, rewards) | experience.metrics
            metrics |= {f"left_out/{why}": float(n) for why, n in Counter(left_out.values()).items()} | {"trained": 0.0}
            if used:
                run.status("update", **show)
                with explained_memory("the update", "`micro_tokens` of the optimizer, or `groups`"):
                    batch = make_rl_batch(
                        used, rewards, policy.version, self.temperature, i / self.updates, derive_id(run.seed, number)
                    )
                    if pending:
                        ages = batch.staleness.double()
                        metrics |= {"staleness/mean": float(ages.mean()), "staleness/max": float(ages.max())}
                    scale = spread(batch.outcome) if self.reward_whiten else 1.0
                    batch.outcome, batch.turn_rewards = batch.outcome / scale, batch.turn_rewards / scale
                    parts.optimizer.prepare(policy, batch)
                    if "branches" in parts.credit.needs:
                        branched = self.branches(experience, used, parts.credit.branches, "branches", number)
                        if branched is None:
                            return
                        batch.branch_values, cost = branched[0] / scale, branched[1]
                        metrics |= cost
                    batch.credit = parts.credit.assign(batch)
                    check_finite(batch)
                    if "advantages" in parts.optimizer.consumes:
                        metrics |= credit_metrics(batch)
                    if self.audit and (i % self.audit.every == 0 or i + 1 == self.updates):
                        audited = self.audited(experience, batch, number, scale)
                        if audited is None:
                            return
                        metrics |= audited
                    if parts.credit.needs & {"group", "branches"}:  # where no advantage means: as good as expected
                        batch.signal = outcome_signal(batch)
                    groups, silent = int(batch.group.max()) + 1, len(set(batch.group[~batch.signal].tolist()))
                    metrics |= {"groups_without_signal": float(silent), "groups_without_signal_share": silent / groups}
                    if hasattr(parts.credit, "fit"):
                        parts.credit.fit(batch)
                    left_out |= {e.id: SILENT for e, heard in zip(used, batch.signal.tolist(), strict=True) if not heard}
                    if run.is_main:
                        self.record_members(run, number, episodes, rewards, left_out, said, batch, scale)
                    made = parts.optimizer.update(policy, batch)
                    metrics |= {**made, "trained": float(batch.signal.sum())}
                    policy.version += int(made.get("steps", 1) > 0)
            elif run.is_main:
                self.record_members(run, number, episodes, rewards, left_out, said)
            metrics |= {
                **feedback_metrics(parts.combiners),
                "drift": drift(policy, episodes),
                "judge_failure_rate": experience.answers["failed"] / max(experience.answers.total(), 1),
                "spend": experience.spend,
                **golden,
                **learned,
                "seconds/play": experience.played,
                "seconds/feedback": experience.heard,
                "seconds/update": time.perf_counter() - began - experience.played - experience.heard,
            }
            last = i + 1 == self.updates
            if best is not None and self.gold and ((i + 1) % self.gold.every == 0 or last):
                backend.refresh()
                metrics |= self._gold(run, player, best, i + 1)
                if self.gold.patience is not None and (last or self._has_turned(best)):
                    best.put_back()
                    metrics["gold/kept_update"] = float(best.update)
            warn_untaught(run, metrics)
            yield run.finish_update(metrics, episodes=episodes)
        if pending:
            pending.close()

    def _in_step(self, experience: Experience, i: int) -> bool:
        """Plays the groups of update i and waits for all that is said of them. False: the run is to stop."""
        run, missing = experience.run, self.groups
        for again in range(1 + self.resample):
            chosen, env_of = self.starts(run, i, missing, again)
            experience.env_of.update(env_of)
            if not self.hear(experience, chosen, Where(run.id, run.stage, run.updates + 1, run.seed)):
                return False
            missing = self.groups - len(groups_with_signal(experience.episodes, experience.rewards))
            if not missing:
                break
        return True

    def check_turns(self, run: RunView, episodes: Sequence[Episode]) -> None:
        """Raises ConfigError when no conversation could even begin."""
        if not any(e.turns or e.ending == "failed" for e in episodes):
            raise ConfigError(
                f"no episode had a single turn: the first prompt does not fit the policy's context of {run.policy.context_length} tokens"
            )

    def _has_turned(self, best: BestSoFar) -> bool:
        return self.gold is not None and self.gold.patience is not None and best.waited >= self.gold.patience

    def _gold(self, run: RunView, player: Any, best: BestSoFar, made: int) -> dict[str, float]:
        """Plays the gold measure's starts with the policy as it is, after `made` updates of this stage.

        Raises:
            TooManyFailures: more environments failed than allowed, or all of them; that is no measurement.
        """
        from ...errors import TooManyFailures

        assert self.gold is not None
        values: list[float] = []
        successes: list[float] = []
        for env in self.env:
            options = env.options if self.gold.options is None else self.gold.options
            own = starts(env.id, self.gold.seed, self.gold.episodes, options, env.kwargs)
            where = Where(run.id, f"{run.stage}/gold-{made}", run.updates + 1, self.gold.seed)
            played = play(
                run, player, [(s, 0) for s in own], where, max_turns=self.max_turns, step_limit=self.step_limit,
                max_failure_rate=self.max_failure_rate,
            )  # fmt: skip
            sound = [e for e in played if e.ending != "failed"]
            values += [e.env_return for e in sound]
            successes += [float(e.succeeded) for e in sound]
        if not values:
            raise TooManyFailures(
                f"gold: no conversation of {self.gold.episodes} could be played to its end; nothing was measured"
            )
        best.hear(mean(values), run.updates + (made > 0))
        return {"gold/return": mean(values), "gold/success": mean(successes)}

    def hear(self, experience: Experience, chosen: Sequence[tuple[Start | Branch, int]], where: Where, aside: str = "") -> bool:
        """Plays conversations, has them judged, and adds them to the experience. False: the run was interrupted while waiting.

        Args:
            aside: what they are played for, where they are not for training; combiners do not learn from them.
        """
        run = experience.run
        episodes = self.play_round(experience, chosen, where, aside)
        began = time.perf_counter()
        if run.is_main:
            groups = grouped(episodes)
            asked = [
                (sources, {k: m for k, m in groups.items() if experience.env_of[m[0].start.key] == index})
                for index, sources in enumerate(experience.parts.sources)
            ]
            said = ask(run, asked, poll=self.poll, show=experience.show)
            rewards = {} if said is None else self.combine(experience.parts, episodes, experience.env_of, said, fit=not aside)
        else:
            said, rewards = {}, {}
        episodes, rewards, said = shared(run, (episodes, rewards, said))
        if said is None:
            return False
        experience.add(episodes, rewards, said)
        experience.heard += time.perf_counter() - began
        return True

    def play_round(
        self, experience: Experience, chosen: Sequence[tuple[Start | Branch, int]], where: Where, aside: str = ""
    ) -> list[Episode]:
        """Plays conversations and records them; `aside` as in `hear`."""
        run, began = experience.run, time.perf_counter()
        with explained_memory("sampling", "`groups`, `backend: {name: in-process, rows: ...}` or `max_new_tokens`"):
            episodes = play(
                run, experience.player, chosen, where, max_turns=self.max_turns, step_limit=self.step_limit,
                max_failure_rate=1.0 if aside else self.max_failure_rate,
                progress=lambda done, total: run.status(aside or "play", done, total, **experience.show),
            )  # fmt: skip
        experience.played += time.perf_counter() - began
        return episodes

    def branches(self, experience: Experience, episodes: Sequence[Episode], count: int, label: str, number: int) -> Any:
        """Continues conversations anew from the start of every turn, and values those states by the mean outcome.

        States that several conversations share, the start of a group above all, are valued once.

        Returns:
            [E, K] values, NaN where nothing could be played or judged, and what it cost; None: the run was interrupted.
        """
        import torch

        run = experience.run
        shared_states: dict[tuple[Any, ...], Branch] = {}
        states = [[e.state(k) for k in range(len(e.turns))] for e in episodes]
        for episode, own in zip(episodes, states, strict=True):
            for k, state in enumerate(own):
                shared_states.setdefault(state, Branch(episode, k))
        chosen = [(branch, slot) for branch in shared_states.values() for slot in range(count)]
        aside = Experience(run, experience.parts, experience.player, experience.show, experience.env_of)
        where = Where(run.id, f"{run.stage}/{label}", number, run.seed)
        if not self.hear(aside, chosen, where, label):
            return None
        self._check_continued(aside.episodes, label)
        experience.played, experience.heard = experience.played + aside.played, experience.heard + aside.heard
        experience.spend, experience.answers = experience.spend + aside.spend, experience.answers + aside.answers
        if run.is_main:
            why = {e.id: label for e in aside.episodes}
            self.record_members(run, number, aside.episodes, aside.rewards, why, aside.said)
        outcomes: dict[tuple[str, int], list[float]] = {}
        for episode in aside.episodes:
            reward = aside.rewards.get(episode.id)
            if isinstance(reward, Rewards) and episode.origin:
                outcomes.setdefault(episode.origin, []).append(reward.outcome)
        values = torch.full((len(episodes), max(map(len, states))), float("nan"))
        for e, own in enumerate(states):
            for k, state in enumerate(own):
                if heard := outcomes.get(shared_states[state].origin):
                    values[e, k] = mean(heard)
        new = [sum(len(t.action_ids or ()) for t in e.turns[e.origin[1] if e.origin else 0 :]) for e in aside.episodes]
        judged = sum(map(len, outcomes.values()))
        return values, {
            f"{label}/rollouts": float(len(chosen)),
            f"{label}/unjudged": float(len(chosen) - judged),
            f"{label}/tokens": float(sum(new)),
        }

    def _check_continued(self, episodes: Sequence[Episode], label: str) -> None:
        """Raises ConfigError when an environment does not repeat itself (what survives would be a biased choice), TooManyFailures when more
        continuations failed otherwise than allowed."""
        from ...errors import TooManyFailures

        failed = [e for e in episodes if e.ending == "failed"]
        odd = next((e for e in failed if e.reason.startswith("replay:")), None)
        if odd is not None:
            raise ConfigError(
                f"{label}: environment {odd.start.env!r} cannot be continued from the middle of a conversation. {odd.reason}. See `turnwise envs "
                "--check`; credit 'gae', 'gigpo' and 'outcome' need no continuations, and an audit can be left out"
            )
        if len(failed) > self.max_failure_rate * len(episodes):
            raise TooManyFailures(
                f"{label}: {len(failed)} of {len(episodes)} continued conversations failed in their environment, more than "
                f"max_failure_rate={self.max_failure_rate:g} allows. Reasons: {'; '.join(sorted({e.reason for e in failed})[:3])}"
            )

    def audited(self, experience: Experience, batch: Any, number: int, scale: float) -> dict[str, float] | None:
        """How the credit of some conversations agrees with the true advantages of their turns; None: the run was interrupted."""
        from scipy.stats import spearmanr

        from ...tensors import turn_advantages

        assert self.audit is not None
        count = min(self.audit.episodes, len(batch.episodes))
        some = [i * len(batch.episodes) // count for i in range(count)]  # of many starts
        found = self.branches(experience, [batch.episodes[e] for e in some], self.audit.rollouts, "audit", number)
        if found is None:
            return None
        values, cost = found
        size = values.shape[1]
        mask = batch.turn_mask[some, :size]
        true = turn_advantages(values / scale, batch.outcome[some], mask)[mask]
        ours = batch.credit.turn_credit[some, :size][mask]
        metrics = {**cost, "audit/true_std": float(true.std(correction=0))}
        if float(true.std(correction=0)) > 0 and float(ours.std(correction=0)) > 0:
            metrics["audit/rank_correlation"] = float(spearmanr(true, ours).statistic)
        return metrics

    def starts(self, run: RunView, i: int, count: int, again: int = 0) -> tuple[list[tuple[Start, int]], dict[str, int]]:
        """The (start, slot) pairs of update i, group by group, and which environment of the mixture each start is of.

        Args:
            count: how many groups.
            again: the round of resampling; its starts are others than those of any other round.
        """
        more = ("again",) if again else ()
        rng = random.Random(derive_id("mixture", run.seed, run.stage, i, *more, *((again,) if again else ())))
        seed = int(derive_id("starts", run.seed, run.stage, *more)[:8], 16)
        place = (i * self.resample + again - 1 if again else i) * self.groups
        chosen, env_of = [], {}
        for g in range(count):
            [index] = rng.choices(range(len(self.env)), [env.weight for env in self.env])
            env = self.env[index]
            [start] = starts(env.id, seed, 1, env.options, env.kwargs, first=place + g)
            env_of[start.key] = index
            chosen += [(start, slot) for slot in range(self.group_size)]
        return chosen, env_of

    def combine(
        self,
        parts: Parts,
        episodes: Sequence[Episode],
        env_of: Mapping[str, int],
        said: Mapping[str, list[Answer]],
        fit: bool = True,
    ) -> dict[str, Rewards | NoReward]:
        """Rewards by episode id, from what was said. Episodes that failed have none."""
        by_env: dict[int, dict[str, list[Episode]]] = {}
        for episode in episodes:
            by_env.setdefault(env_of[episode.start.key], {}).setdefault(episode.group, []).append(episode)
        rewards: dict[str, Rewards | NoReward] = {}
        for index, mine in by_env.items():
            combiner = parts.combiners[index]
            if fit and hasattr(combiner, "fit"):
                combiner.fit([a for key in mine for a in said[key]])
            for key, members in mine.items():
                sound = [e for e in members if e.ending != "failed" and e.turns]
                combined = combiner.combine(sound, said[key]) if sound else []
                if len(combined) != len(sound):
                    raise PluginError(
                        f"combiner {part_name(self.combiner)!r} gave {len(combined)} rewards for a group of {len(sound)} episodes"
                    )
                if self.reward_clip is not None:
                    combined = [clipped(r, self.reward_clip) if isinstance(r, Rewards) else r for r in combined]
                rewards |= {e.id: r for e, r in zip(sound, combined, strict=True)}
        return rewards

    def members(
        self, episodes: Sequence[Episode], rewards: Mapping[str, Rewards | NoReward], grouped: bool
    ) -> tuple[list[Episode], dict[str, str]]:
        """Episodes that train, and why the others are left out."""
        left_out: dict[str, str] = {}
        for episode in episodes:
            if episode.ending == "failed":
                left_out[episode.id] = "environment failed"
            elif not episode.turns:
                left_out[episode.id] = "no turns"
            elif isinstance(rewards[episode.id], NoReward):
                left_out[episode.id] = "no reward"
        if grouped:
            size = Counter(e.group for e in episodes if e.id not in left_out)
            for episode in episodes:
                if episode.id not in left_out and size[episode.group] < self.min_group:
                    left_out[episode.id] = "group too small"
        return [e for e in episodes if e.id not in left_out], left_out

    def record_members(
        self,
        run: RunView,
        number: int,
        episodes: Sequence[Episode],
        rewards: Mapping[str, Rewards | NoReward],
        left_out: Mapping[str, str],
        said: Mapping[str, list[Answer]],
        batch: Any = None,
        scale: float = 1.0,
    ) -> None:
        """Writes who trains, on which feedback, with which credit, before the update happens."""
        credit = {}
        if batch is not None:
            for i, episode in enumerate(batch.episodes):
                credit[episode.id] = tuple((scale * batch.credit.turn_credit[i, batch.turn_mask[i]]).tolist())
        members = []
        for e in episodes:
            reward = rewards.get(e.id)
            why = left_out.get(e.id, "")
            if isinstance(reward, NoReward):
                why = f"{why}: {reward.reason}"
            elif e.ending == "failed":
                why = f"{why}: {e.reason}"
            outcome = reward.outcome if isinstance(reward, Rewards) else None
            used = tuple(a.id for a in said.get(e.group, ()) if a.target in (e.id, e.group))
            members.append(Member(e.id, e.group, e.id not in left_out, why, outcome, used, credit.get(e.id, ())))
        run.ledger.add_members(run.id, number, members)
