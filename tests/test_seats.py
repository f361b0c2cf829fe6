"""Environments of several seats: whoever is addressed replies, each seat is a conversation of its
own with its own reward, and other policies, scripts and the policy itself can be the opponent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
import turnwise
from turnwise.engine.errors import ConfigError
from turnwise.engine.policy.in_process import InProcess
from turnwise.learning import build_policy, make_batch
from turnwise.protocols import Message, Rewards

DUEL = "test/Duel-v0"


class Duel(gymnasium.Env[str, str]):
    """Two players write a word in turn, `rounds` times; who used the letter "e" more often wins.
    The first to move is drawn. Each is shown what the other wrote.

    Args:
        fault: what goes wrong at the second step, if anything.
    """

    observation_space = action_space = turnwise.Text(1000)

    def __init__(self, rounds: int = 2, fault: str = "") -> None:
        self.rounds, self.fault = rounds, fault
        self.players = {"random": lambda env, rng: lambda messages: rng.choice(["he", "ha", "ee"])}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.turn = int(self.np_random.integers(2))
        self.count, self.steps = [0, 0], 0
        return "write a word", {"system": "duel", "player": str(self.turn)}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.fault and self.steps == 2:
            if self.fault == "raises":
                raise RuntimeError("the duel is off")
            return "", 0.0, False, False, {"player": self.fault}
        self.count[self.turn] += action.count("e")
        mine, theirs = self.count[self.turn], self.count[1 - self.turn]
        if self.steps == 2 * self.rounds:
            reward = float(mine > theirs) - float(mine < theirs)
            other = {"reward": -reward, "success": reward < 0}
            seats = {str(1 - self.turn): other}
            return "over", reward, True, False, {"success": reward > 0, "seats": seats}
        self.turn = 1 - self.turn
        return f"the other wrote {action[:20]!r}", 0.0, False, False, {"player": str(self.turn)}


gymnasium.register(DUEL, Duel)


def matches(count: int, against: str = "policy", *, both: bool = True, **kwargs: Any) -> Any:
    found = []
    for start in turnwise.starts(DUEL, 7, count, kwargs=kwargs):
        first = turnwise.Start(DUEL, start.seed, {}, kwargs, "0", {"1": against})
        found += [(first, 0), *([(first.in_seat("1"), 0)] if both else [])]
    return found


def player(policy: turnwise.Policy, rows: int = 6) -> turnwise.PolicyPlayer:
    return turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 6), InProcess(policy, rows=rows))


def texts(episode: turnwise.Episode) -> list[str]:
    return [m.content for m in episode.messages]


def test_both_seats_of_a_match_are_conversations_that_mirror_each_other(
    policy: turnwise.Policy,
) -> None:
    episodes = turnwise.rollout(player(policy), matches(8), turnwise.Where("r", "rl", 1, 3))
    assert [e.start.seat for e in episodes] == ["0", "1"] * 8
    assert len({e.id for e in episodes}) == len({e.group for e in episodes}) == 16
    firsts = set()
    for one, other in zip(episodes[::2], episodes[1::2], strict=True):
        assert one.env_return + other.env_return == 0
        assert one.ending == other.ending == "terminated"
        assert (one.success, other.success) == (one.env_return > 0, other.env_return > 0)
        begins, follows = (
            (one, other) if one.turns[0].observation.content == "write a word" else (other, one)
        )
        firsts.add(begins.start.seat)
        # What one writes is what the other is shown, in turn.
        wrote = [t.action[:20] for t in begins.turns]
        assert [t.observation.content for t in follows.turns] == [
            f"the other wrote {text!r}" for text in wrote
        ]
        assert begins.turns[1].observation.content == (
            f"the other wrote {follows.turns[0].action[:20]!r}"
        )
        assert texts(begins)[0] == texts(follows)[0] == "duel"
    assert firsts == {"0", "1"}
    assert any(e.env_return for e in episodes)


def test_sampled_log_probs_are_those_of_the_update_in_every_seat(policy: turnwise.Policy) -> None:
    episodes = turnwise.rollout(player(policy), matches(5), turnwise.Where("r", "rl", 1, 3))
    batch = make_batch(episodes, [Rewards(0.0, (0.0,) * len(e.turns)) for e in episodes])
    mine = policy.logprobs(batch)
    theirs = torch.zeros_like(mine)
    theirs[batch.mask] = torch.tensor([p for e in episodes for t in e.turns for p in t.logprobs])
    assert torch.allclose(mine[batch.mask], theirs[batch.mask], atol=1e-5)


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_the_number_of_rows_changes_nothing(policy: turnwise.Policy, rows: int) -> None:
    where = turnwise.Where("r", "rl", 1, 3)
    many, few = (turnwise.rollout(player(policy, n), matches(5), where) for n in (20, rows))
    assert [texts(e) for e in many] == [texts(e) for e in few]
    ready = turnwise.rollout(player(policy, rows), matches(5), where, schedule="ready-first")
    assert [texts(e) for e in many] == [texts(e) for e in ready]


def test_an_opponent_is_not_recorded_and_plays_the_same_game(policy: turnwise.Policy) -> None:
    """The policy in the other seat says what it says where it trains there too."""
    where = turnwise.Where("r", "rl", 1, 3)
    both = turnwise.rollout(player(policy), matches(4), where)
    one = turnwise.rollout(player(policy), matches(4, both=False), where)
    assert [texts(e) for e in one] == [texts(e) for e in both[::2]]
    other = turnwise.rollout(
        player(policy), matches(4, "friend", both=False), where, others={"friend": player(policy)}
    )
    assert all(e.start.against == {"1": "friend"} for e in other)
    assert {e.id for e in other}.isdisjoint(e.id for e in one)


def test_scripts_and_functions_reply_in_seats() -> None:
    mine = turnwise.ScriptPlayer(lambda messages: "eeee")
    won = turnwise.rollout(mine, matches(6, "random", both=False))
    assert [e.env_return for e in won] == [1.0] * 6
    seen: list[list[Message]] = []

    def listens(messages: Any) -> str:
        seen.append(list(messages))
        return "e" * 9

    lost = turnwise.rollout(
        mine, matches(6, "ear", both=False), others={"ear": turnwise.ScriptPlayer(listens)}
    )
    assert [(e.env_return, e.success) for e in lost] == [(-1.0, False)] * 6
    assert {m.content for said in seen for m in said if m.role == "assistant"} == {"e" * 9}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "step 2: RuntimeError: the duel is off"),
        ("7", "it asks seat '7', and `seats` has 0, 1"),
    ],
)
def test_a_broken_match_costs_its_own_episodes(
    policy: turnwise.Policy, fault: str, reason: str
) -> None:
    chosen = [*matches(1), *matches(2, fault=fault)[2:], *matches(3)[4:]]
    episodes = turnwise.rollout(player(policy), chosen)
    assert [e.ending for e in episodes] == ["terminated"] * 2 + ["failed"] * 2 + ["terminated"] * 2
    assert all(reason in e.reason for e in episodes[2:4])


def test_who_replies_must_be_said(policy: turnwise.Policy) -> None:
    lonely = [(turnwise.Start(DUEL, seed, seat="0"), 0) for seed in range(4)]
    assert all("it asks seat '1'" in e.reason for e in turnwise.rollout(player(policy), lonely))
    [episode] = turnwise.rollout(player(policy), [(turnwise.Start(DUEL, 3), 0)])
    assert "it plays several seats" in episode.reason
    with pytest.raises(ConfigError, match="2 seats of a match .* has 1 rows"):
        turnwise.rollout(player(policy, rows=1), matches(1))
    with pytest.raises(LookupError, match="no player 'expert'; it has: random"):
        turnwise.rollout(player(policy), matches(1, "expert", both=False))


def run(folder: Path, model: Path, *, resume: bool = False, **rl: Any) -> turnwise.Run:
    stage = {
        "env": {"id": DUEL, "seats": {"0": "policy", "1": "policy"}}, "updates": 3, "groups": 3,
        "group_size": 4, "max_new_tokens": 6, "poll": 0.0, **rl,
    }  # fmt: skip
    config = {"policy": str(model), "threads": 1, "stages": [{"rl": stage}]}
    return turnwise.Run(config, folder=folder, resume=resume)


def test_self_play_trains_both_sides_and_resumes_exactly(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    whole = run(tmp_path / "whole", model_folder()).finish()
    episodes = whole.ledger.run_episodes(whole.id)
    groups: dict[str, list[turnwise.Episode]] = {}
    for e in episodes:
        groups.setdefault(e.group, []).append(e)
    assert len(groups) == 3 * 3 * 2
    assert all(len(own) == 4 and len({e.start.seat for e in own}) == 1 for own in groups.values())
    assert sum(e.env_return for e in episodes) == 0
    assert whole.metrics[0]["episodes"] == 24
    part = run(tmp_path / "part", model_folder())
    next(iter(part))
    resumed = run(tmp_path / "part", model_folder(), resume=True).finish()
    for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_learns_to_beat_a_frozen_copy(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    frozen = str(model_folder())
    rl = {
        "env": [
            {"id": DUEL, "seats": {"0": "policy", "1": {"policy": frozen}}},
            {"id": DUEL, "seats": {"1": "policy", "0": {"policy": frozen}}},
        ],
        "updates": 12, "groups": 8, "group_size": 8,
        "optimizer": {"name": "grpo", "lr": 1e-2},
    }  # fmt: skip
    done = run(tmp_path / "r", model_folder(), **rl).finish()
    success = [m["success"] for m in done.metrics]
    assert sum(success[-3:]) / 3 > sum(success[:2]) / 2 + 0.2, success
    starts = [e.start for e in done.ledger.run_episodes(done.id)]
    assert {s.seat for s in starts} == {"0", "1"}
    assert {who for s in starts for who in s.against.values()} == {f"policy:{frozen}"}
    table = turnwise.Run(
        {
            "policy": str(done.folder / "policy"), "threads": 1,
            "stages": [{"evaluate": {
                "env": {"id": DUEL, "seats": {"0": "policy", "1": {"policy": frozen}}},
                "episodes": 60, "players": ["policy", "random"], "max_new_tokens": 6,
            }}],
        },
        folder=tmp_path / "e",
    ).finish()  # fmt: skip
    assert table.metrics[-1]["policy/success"] > 0.5


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"rl": {"env": {"id": DUEL, "seats": {"0": "random"}}}}, "must be the policy's"),
        ({"rl": {"env": DUEL}}, "plays several seats: say who replies in them"),
        ({"evaluate": {"env": {"id": DUEL, "seats": {"a": "policy", "b": "random"}}}},
            "asks seat '[01]'; `seats` has 'a', 'b'"),
        ({"rl": {"env": {"id": "turnwise/Maze-v0", "seats": {"0": "policy", "1": "self"}}}},
            "has one seat, and `seats` is not for it"),
        ({"rl": {"env": {"id": DUEL, "seats": {"0": "policy", "1": "rnd"}}}},
            "no player 'rnd'"),
        ({"rl": {"env": {"id": DUEL, "seats": {0: "policy", 1: {"policy": "no/such/one"}}}}},
            "there is no policy in no/such/one"),
        ({"rl": {"env": {"id": DUEL, "seats": {0: "policy", 1: {"polcy": "x"}}}}},
            "seat 1: may be policy, self, one of the environment's players"),
        ({"rl": {"env": {"id": DUEL, "seats": {"0": "policy", "1": "self"}}, "gold": {}}},
            "measure the policy against itself"),
        ({"rl": {"env": {"id": DUEL, "seats": {"0": "policy", "1": "policy"}}, "pending": 128}},
            "trains the policy in the seats 0, 1, and `pending`"),
        ({"rl": {"env": {"id": DUEL, "seats": {"0": "policy", "1": "policy"}}, "gold": {}}},
            "measure the policy against itself"),
        ({"rl": {"env": {"id": DUEL, "seats": {"0": "policy", "1": "self"}}, "credit": "branch"}},
            "plays on from the middle"),
        ({"rank": {"env": {"id": DUEL, "seats": {"0": "policy", "1": "self"}},
            "feedback": ["length"]}}, "only `sft`, `rl` and `evaluate`"),
        ({"evaluate": {"env": {"id": DUEL, "seats": {"0": "policy", "1": "policy"}}}},
            "gives the seats 0, 1 to the policy"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(
    stage: dict[str, Any], message: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        turnwise.Run(
            {"policy": str(model_folder()), "stages": [stage]}, folder=tmp_path / "r"
        ).finish()


def test_the_checker_plays_every_seat() -> None:
    assert turnwise.check_environment(DUEL, episodes=4) == []
    [found] = turnwise.check_environment(DUEL, episodes=2, fault="raises")
    assert "the duel is off" in found


def test_the_other_seats_full_context_is_the_others(tmp_path: Path) -> None:
    """What is cut by another's limit is not taken for our own."""
    folder = build_policy(tmp_path / "m", ["duel, write a word he ha"] * 4, hidden=16, layers=1,
        context=200)  # fmt: skip
    small = player(turnwise.Policy.from_pretrained(folder))
    start = turnwise.Start(DUEL, 3, {}, {"rounds": 40}, "0", {"1": "other"})
    me = turnwise.ScriptPlayer(lambda said: "he")
    [episode] = turnwise.rollout(me, [(start, 0)], others={"other": small})
    assert (episode.ending, episode.reason) == ("truncated", "context of seat 1")


def test_a_seat_that_never_replied_has_not_won() -> None:
    """The other breaks the match before its turn."""
    start = turnwise.Start(DUEL, 3, {}, {"fault": "raises", "rounds": 1}, "0", {"1": "random"})
    quit = turnwise.Episode("id", start, (), "terminated")
    assert quit.success is None
    assert not quit.succeeded


def test_demonstrations_of_seats(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Both seats of a match where both are the policy's, one where the other is not."""
    both, one = {"0": "policy", "1": "policy"}, {"0": "random", "1": "policy"}
    stage = {
        "env": [{"id": DUEL, "seats": both}, {"id": DUEL, "seats": one, "kwargs": {"rounds": 1}}],
        "player": "random", "episodes": 12,
    }  # fmt: skip
    config = {"policy": str(model_folder()), "threads": 1, "stages": [{"sft": stage}]}
    done = turnwise.Run(config, folder=tmp_path / "r").finish()
    assert done.metrics[0]["conversations"] == 12
    played = done.ledger.run_episodes(done.id)
    seats = [(e.start.seat, e.start.against) for e in played]
    assert seats.count(("1", {"0": "random"})) == 6
    assert (
        sorted(seat for seat, others in seats if "policy" in others.values())
        == ["0"] * 3 + ["1"] * 3
    )
    assert all(turn.action in ("he", "ha", "ee") for e in played for turn in e.turns)


def test_evaluations_of_both_seats_have_rows_of_their_own(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    env = [
        {"id": DUEL, "seats": {"0": "policy", "1": "random"}},
        {"id": DUEL, "seats": {"1": "policy", "0": "random"}},
    ]
    stage = {"env": env, "episodes": 3, "max_new_tokens": 4}
    config = {"policy": str(model_folder()), "threads": 1, "stages": [{"evaluate": stage}]}
    done = turnwise.Run(config, folder=tmp_path / "r").finish()
    rows = {name.split("/policy/")[0] for name in done.metrics[-1] if "/policy/" in name}
    assert len(rows) == 2
    stage["env"] = [env[0], env[0]]
    with pytest.raises(ConfigError, match="names an environment twice"):
        turnwise.Run(config, folder=tmp_path / "r2").finish()
