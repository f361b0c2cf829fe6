"""Conversations continued anew from any turn: played again token for token, copied where the
environment can be, and used for credit."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
import turnwise
from support.echo import ECHO, play
from turnwise.engine.policy.in_process import InProcess
from turnwise.engine.report.credit import credited
from turnwise.engine.rollout.conversation import Branch

PLAYED: list[str] = []


class Copyable(gymnasium.Env):
    """A counting environment that may be copied; it notes every step that is really taken."""

    metadata: dict[str, Any] = {"render_modes": [], "snapshots": True}
    observation_space = action_space = turnwise.Text(1000)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.said: list[str] = []
        return "begin", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        PLAYED.append(action)
        self.said.append(action)
        return (
            f"{len(self.said)} {self.np_random.integers(100)}",
            float(len(action)),
            len(self.said) == 4,
            False,
            {},
        )


class Fickle(Copyable):
    """Says something else every time."""

    metadata: dict[str, Any] = {"render_modes": []}
    count = itertools.count()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        _, *rest = super().step(action)
        return (f"now {next(self.count)}", *rest)


gymnasium.register("test/Copyable-v0", Copyable)
gymnasium.register("test/Fickle-v0", Fickle)


@pytest.mark.parametrize("history", ["append", "rerender"])
def test_a_branch_begins_with_the_same_tokens_and_goes_on_by_itself(
    policy: turnwise.Policy, history: Any
) -> None:
    """Promise 1 for branches: the shared turns are the recorded ones, and log-probs of what is new
    agree with a plain forward pass."""
    parents = play(policy, 2, group=2, tokens=6, history=history)
    player = turnwise.PolicyPlayer(
        policy, turnwise.Sampling(1.0, 6), InProcess(policy, rows=3), history
    )
    chosen = [(Branch(e, k), slot) for e in parents for k in range(3) for slot in range(3)]
    found = turnwise.rollout(player, chosen, turnwise.Where("test", "rl/branches", 1, 3))
    for (branch, slot), e in zip(chosen, found, strict=True):
        assert isinstance(branch, Branch)
        assert (e.ending, e.origin, e.slot, e.start) == (
            "terminated",
            branch.origin,
            slot,
            branch.parent.start,
        )
        assert e.turns[: branch.turn] == branch.parent.turns[: branch.turn]
        assert e.turns[branch.turn].observation == branch.parent.turns[branch.turn].observation
        ids: list[int] = []
        for turn in e.turns:
            ids = (ids if history == "append" else []) + list(turn.prompt_ids)
            with torch.no_grad():
                logits = (
                    policy.model(input_ids=torch.tensor([[*ids, *(turn.action_ids or ())]]))
                    .logits[0]
                    .log_softmax(-1)
                )
            for token, logprob in zip(turn.action_ids or (), turn.logprobs or (), strict=True):
                assert float(logits[len(ids) - 1, token]) == pytest.approx(logprob, abs=1e-4)
                ids.append(token)
    assert len({e.id for e in found}) == len(found)
    assert len({e.group for e in found}) == 4 * 3, "branches of one turn form a group"
    assert len({e.turns[0].action for e in found if e.origin and e.origin[1] == 0}) > 4, (
        "each continues by its own noise"
    )
    player.backend.refresh()  # as before: what the cache still holds would not be computed again
    again = turnwise.rollout(player, chosen, turnwise.Where("other", "rl/branches", 1, 3))
    assert [e.turns for e in again] == [e.turns for e in found]
    turned = turnwise.rollout(player, chosen[::-1], turnwise.Where("test", "rl/branches", 1, 3))
    actions = [[[t.action for t in e.turns] for e in each] for each in (turned[::-1], found)]
    assert actions[0] == actions[1], "in whatever order they are played"


def test_states_are_copied_where_the_environment_can_be_and_replayed_elsewhere() -> None:
    player = turnwise.ScriptPlayer(lambda said: f"reply {len(said)}")
    [start] = turnwise.starts("test/Copyable-v0", 1, 1)
    [parent] = turnwise.rollout(player, [(start, 0)])
    PLAYED.clear()
    found = turnwise.rollout(player, [(Branch(parent, 2), slot) for slot in range(10)])
    assert all(e.turns == parent.turns for e in found), (
        "the random numbers of the environment are copied too"
    )
    assert len(PLAYED) == 2 + 10 * 2, "the two replies before the branch are played once"
    [slow] = turnwise.starts(ECHO, 1, 1)
    [other] = turnwise.rollout(player, [(slow, 0)])
    assert [
        e.turns for e in turnwise.rollout(player, [(Branch(other, 1), s) for s in range(3)])
    ] == [other.turns] * 3


def test_an_environment_that_does_not_repeat_itself_ends_its_branches_as_failed() -> None:
    player = turnwise.ScriptPlayer(lambda said: "reply")
    [parent] = turnwise.rollout(player, [(turnwise.starts("test/Fickle-v0", 1, 1)[0], 0)])
    first, second = turnwise.rollout(player, [(Branch(parent, 0), 0), (Branch(parent, 2), 0)])
    assert first.ending == "terminated"
    assert second.ending == "failed"
    assert "another observation at turn 2" in second.reason


def length(episode: turnwise.Episode) -> float:
    return sum(len(t.action) for t in episode.turns) / 10


@pytest.mark.parametrize("rl", [{"credit": "branch"}, {"audit": {"episodes": 2, "rollouts": 2}}])
def test_a_run_that_needs_an_environment_to_repeat_itself_says_so(
    rl: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """What happened to survive the replay would be a biased choice: nothing is trained on it."""
    made = turnwise.Run(config(model_folder(), env="test/Fickle-v0", **rl), folder=tmp_path / "r")
    with pytest.raises(
        turnwise.ConfigError, match="cannot be continued from the middle.*another observation"
    ):
        made.finish()
    assert made.policy.version == 0


def config(model: Path, **rl: Any) -> dict[str, Any]:
    stage = {
        "env": ECHO,
        "updates": 2,
        "groups": 2,
        "group_size": 2,
        "max_new_tokens": 5,
        "poll": 0.0,
        **rl,
    }
    return {"policy": str(model), "threads": 1, "stages": [{"rl": stage}]}


def test_branch_credit_is_made_of_the_continuations_in_the_ledger(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The credit of every trained turn, recomputed from the ledger alone; a judge's scores count as
    the environment's do."""

    class Letters(turnwise.Judge):
        def score(self, episodes: Any) -> list[turnwise.Feedback]:
            paid = turnwise.Stamp(cost=0.01)
            return [
                turnwise.Feedback(
                    e.id, score=sum(t.action.count("a") for t in e.turns) / 4, stamp=paid
                )
                for e in episodes
            ]

    rl = {
        "credit": {"name": "branch", "rollouts": 3},
        "feedback": ["environment", Letters()],
        "audit": {"episodes": 4, "rollouts": 3, "every": 1},
    }
    done = turnwise.Run(config(model_folder(), **rl), folder=tmp_path / "r").finish()
    episodes = done.ledger.run_episodes(done.id, stage="rl", update=1)
    branches = done.ledger.run_episodes(done.id, stage="rl/branches", update=1)
    worth = {
        e.id: e.env_return + sum(t.action.count("a") for t in e.turns) / 4
        for e in [*episodes, *branches]
    }
    members = {m.episode: m for m in done.ledger.members(done.id, 1)}
    assert {m.reason for m in members.values() if m.episode not in {e.id for e in episodes}} == {
        "branches",
        "audit",
    }
    audited = done.ledger.run_episodes(done.id, stage="rl/audit", update=1)
    said = [
        {(b.origin, tuple(t.action for t in b.turns)) for b in each} for each in (branches, audited)
    ]
    assert len(said[0] & said[1]) < 3, "an audit plays conversations of its own"
    worth |= {e.id: e.env_return + sum(t.action.count("a") for t in e.turns) / 4 for e in audited}
    total = sum(m["spend"] for m in done.metrics)
    assert 0 < total == pytest.approx(sum(done.ledger.spend().values())), (
        "continuations are paid for too"
    )
    assert (
        done.metrics[0]["branches/rollouts"]
        == len(branches)
        == 3 * len({b.origin for b in branches})
    )

    def value(e: turnwise.Episode, k: int) -> float:
        own = [b for b in branches if b.start == e.start and b.origin and b.origin[1] == k
               and [t.action for t in b.turns[:k]] == [t.action for t in e.turns[:k]]]  # fmt: skip
        assert len(own) == 3
        return sum(worth[b.id] for b in own) / 3

    for e in episodes:
        values = [value(e, k) for k in range(3)] + [worth[e.id]]
        assert members[e.id].credit == pytest.approx(
            [b - a for a, b in itertools.pairwise(values)], abs=1e-5
        )
    shown = credited(done.ledger, done.id)
    assert len(shown) == 3
    last = {e.id: e for e in done.ledger.run_episodes(done.id, stage="rl", update=2)}
    audits = done.ledger.run_episodes(done.id, stage="rl/audit", update=2)
    outcome = {m.episode: m.outcome for m in done.ledger.members(done.id, 2)}
    for talk in shown:
        e = last[talk["where"].split()[-1]]
        means = []
        for k in range(3):
            same = [
                b
                for b in audits
                if b.origin
                and b.origin[1] == k
                and b.start == e.start
                and [t.action for t in b.turns[:k]] == [t.action for t in e.turns[:k]]
            ]
            means.append(sum(outcome[b.id] for b in same) / len(same))
        true = [b - a for a, b in itertools.pairwise([*means, outcome[e.id]])]
        assert [t.true[0] for t in talk["turns"]] == pytest.approx(true, abs=1e-5)


def test_an_audit_measures_any_credit_and_trains_nothing(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    done = {}
    for name, audit in (("plain", None), ("audited", {"episodes": 4, "rollouts": 4, "every": 2})):
        rl = {"credit": "turn-returns", "updates": 3, "audit": audit, "feedback": [length]}
        done[name] = turnwise.Run(config(model_folder(), **rl), folder=tmp_path / name).finish()
    weights = [torch.cat([p.flatten() for p in run.policy.parameters()]) for run in done.values()]
    assert torch.equal(*weights)
    audited = [m for m in done["audited"].metrics if "audit/rollouts" in m]
    assert [m["update"] for m in audited] == [1, 3], "the first, every second, and the last"
    assert all("audit/rank_correlation" in m for m in audited)


def test_nothing_learns_from_an_audit(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A combiner that learns from what is said is fitted on the training conversations' feedback
    alone."""

    class Counting(turnwise.Combiner):
        def __init__(self, weights: Any) -> None:
            self.heard = 0

        def fit(self, feedback: Any) -> None:
            self.heard += len(feedback)

        def combine(self, group: Any, feedback: Any) -> list[turnwise.Rewards]:
            score = {f.episode: f.score for f in feedback}
            return [turnwise.Rewards(score[e.id], (0.0, 0.0, score[e.id])) for e in group]

        def state_dict(self) -> dict[str, Any]:
            return {"heard": self.heard}

        def load_state_dict(self, state: Any) -> None:
            self.heard = state["heard"]

    made: list[Counting] = []
    module = types.ModuleType("counting")
    module.register_combiners = turnwise.hookimpl(  # type: ignore[attr-defined]
        lambda register: register(
            "counting", lambda weights: made.append(Counting(weights)) or made[-1]
        )
    )
    plugins = turnwise.Plugins({"counting": module})
    rl = {
        "feedback": [length],
        "combiner": "counting",
        "audit": {"episodes": 2, "rollouts": 2, "every": 1},
    }
    turnwise.Run(config(model_folder(), **rl), folder=tmp_path / "r", plugins=plugins).finish()
    assert made[-1].heard == 2 * 4, "two updates of four conversations"


def test_groups_without_signal_are_replaced(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Only some starts pay; the others say nothing, and give way to new ones."""
    chosen = lambda episode: int(episode.start.key[0], 16) < 8  # noqa: E731

    def pays(episode: turnwise.Episode) -> float:
        return (
            sum(t.action.count("e") for t in episode.turns) + episode.slot / 100
            if chosen(episode)
            else 1.0
        )

    found = {}
    for again in (0, 4):
        run = turnwise.Run(
            config(model_folder(), groups=4, updates=1, feedback=[pays], resample=again),
            folder=tmp_path / str(again),
        ).finish()
        used = [m for m in run.ledger.members(run.id) if m.used]
        played = run.ledger.run_episodes(run.id)
        assert {m.episode for m in used} == {e.id for e in played if chosen(e)}
        found[again] = len({m.group for m in used}), len(played)
        silent = [m for m in run.ledger.members(run.id) if not m.used]
        assert {m.reason for m in silent} == {"group without signal"}
    assert found[0][0] < 4
    assert found[0][1] == 4 * 2
    assert found[4][0] == 4
    assert found[4][1] > 4 * 2


class Ranks(turnwise.GroupJudge):
    def rank(self, group: Any) -> turnwise.Comparison:
        return turnwise.Comparison(group[0].group, tuple((e.id,) for e in group))


class Late(turnwise.FeedbackSource):
    def request(self, requests: Any) -> None: ...

    def receive(self) -> list[Any]:
        return []


@pytest.mark.parametrize(
    ("rl", "what"),
    [
        (
            {"credit": "branch", "feedback": [Ranks()]},
            "cannot say: they need a number each, at once",
        ),
        (
            {"audit": {}, "feedback": [Late()]},
            "an audit asks about many continuations of every turn, which 'Late' cannot say",
        ),
        ({"credit": {"name": "branch"}, "resample": 2}, "does not compare within groups"),
        ({"credit": "gae"}, "without a critic"),
        ({"credit": "judged", "feedback": ["environment"]}, "turn_scores"),
        ({"credit": "gigpo", "group_size": 1}, "group_size of at least 2"),
        ({"optimizer": "rejection", "credit": "gigpo"}, "copies whole conversations"),
        (
            {"optimizer": "rejection", "group_size": 1},
            "it needs group_size of at least 2 to choose among them",
        ),
        ({"optimizer": "rejection", "audit": {}}, "no credit to audit"),
        ({"optimizer": "kto"}, "preference stage"),
        ({"optimizer": {"name": "grpo", "loss_mean": "constant"}}, "divisor"),
        (
            {"optimizer": {"name": "ppo", "critic": "twin"}},
            "ppo.critic: Input should be 'shared', 'detached' or 'separate'",
        ),
        (
            {"credit": {"name": "gae", "unit": "word"}, "optimizer": "ppo"},
            "gae.unit: Input should be",
        ),
    ],
)
def test_pairings_that_cannot_work_are_refused_with_advice(
    rl: dict[str, Any], what: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises((turnwise.ConfigError, turnwise.PluginError), match=what):
        turnwise.Run(config(model_folder(), **rl), folder=tmp_path / "r")
