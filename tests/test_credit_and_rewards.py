"""Credit methods and combiners on episodes written by hand; the rule judges."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import turnwise
from support.episodes import conversation, select
from turnwise.engine.policy.batching import make_batch
from turnwise.plugins.combiners.weighted import Weighted
from turnwise.plugins.credit.gae import GAE
from turnwise.plugins.credit.outcome import OutcomeCredit


def episode(
    name: str,
    lengths: tuple[int, ...],
    rewards: tuple[float, ...],
    *,
    seed: int = 1,
    ending: Any = "terminated",
    observed: int = 3,
    replies: tuple[str, ...] | None = None,
) -> turnwise.Episode:
    """Builds an episode by its numbers of tokens, which credit is about: so many action tokens per
    turn, and `observed` tokens of observation before each."""
    return conversation(
        *(replies or ("ok",) * len(lengths)),
        heard="hm",
        id=name,
        seed=seed,
        reward=list(rewards),
        prompt_ids=tuple(range(10, 10 + observed)),
        action_ids=[tuple(range(50, 50 + n)) for n in lengths],
        logprobs=[(-0.5,) * n for n in lengths],
        ending=ending,
        final=turnwise.Message("user", "bye"),
        final_ids=(7, 8) * observed,
    )


def batch(*episodes: turnwise.Episode, outcomes: list[float] | None = None) -> turnwise.Batch:
    rewards = [turnwise.Rewards(e.env_return, tuple(t.reward for t in e.turns)) for e in episodes]
    if outcomes is not None:
        rewards = [
            turnwise.Rewards(o, (*[0.0] * (len(e.turns) - 1), o))
            for o, e in zip(outcomes, episodes, strict=True)
        ]
    return make_batch(episodes, rewards)


def test_gae_is_the_same_with_observation_tokens_and_without() -> None:
    """The same replies and values, with long, short and no observations between the turns, lambda
    0.9."""
    found = []
    for observed in (20, 3, 1):
        made = batch(
            episode("a", (3, 2, 4), (0.0, 0.5, 1.0), observed=observed),
            episode("b", (1, 5), (0.0, -1.0), observed=observed),
        )
        values = torch.rand(made.mask.shape, generator=torch.Generator().manual_seed(0))
        made.values, made.bootstrap = values * made.mask, torch.tensor([0.3, 0.4])
        found.append(GAE(lam=0.9).assign(made))
    assert torch.equal(found[0].advantages, found[1].advantages)
    assert torch.equal(found[0].advantages, found[2].advantages)
    # And they are those of the flat sequence of action tokens: A_t = sum of (0.9)^l delta.
    rewards = torch.zeros(9)
    rewards[4], rewards[8] = 0.5, 1.0
    v = values[0, :9]
    delta = rewards + torch.cat([v[1:], torch.zeros(1)]) - v
    expected = [sum(0.9 ** (i - t) * float(delta[i]) for i in range(t, 9)) for t in range(9)]
    assert found[0].advantages[0, :9].tolist() == pytest.approx(expected, abs=1e-6)


def test_values_are_bootstrapped_at_truncation_only() -> None:
    made = batch(episode("a", (2,), (1.0,), ending="truncated"), episode("b", (2,), (1.0,)))
    made.values, made.bootstrap = torch.zeros(2, 2), torch.tensor([5.0, 5.0])
    credit = GAE(lam=1.0).assign(made)
    assert credit.advantages.tolist() == [[6.0, 6.0], [1.0, 1.0]]
    assert credit.turn_credit.tolist() == [[6.0], [1.0]]


def test_the_bootstrap_row_ends_after_the_final_observation() -> None:
    made = batch(
        episode("a", (2,), (1.0,), ending="truncated", observed=2),
        episode("b", (2,), (1.0,), observed=2),
    )
    assert made.rows[0].ids == (10, 11, 50, 51, 7, 8, 7, 8)
    assert made.rows[0].bootstrap
    assert made.rows[1].ids == (10, 11, 50, 51)
    assert not made.rows[1].bootstrap
    assert made.rows[0].positions == (2, 3)


def test_outcome_credit_is_alike_for_all_tokens_and_counts_token_rewards() -> None:
    made = batch(episode("a", (1, 2), (0.0, 0.0)), episode("b", (2,), (0.0,)), outcomes=[1.0, 3.0])
    credit = OutcomeCredit(baseline="mean").assign(made)
    assert credit.advantages.tolist() == [[-1.0, -1.0, -1.0], [1.0, 1.0, 0.0]]
    assert credit.turn_credit.tolist() == [[-1.0, -1.0], [1.0, 0.0]]
    made.token_rewards[0, 0] = 2.0  # a KL term evens it out
    assert OutcomeCredit(baseline="mean").assign(made).advantages.abs().sum() == 0


def test_outcome_credit_says_what_it_does_with_truncated_episodes() -> None:
    made = batch(
        episode("a", (1,), (0.0,), ending="truncated"),
        episode("b", (1,), (0.0,)),
        outcomes=[0.0, 2.0],
    )
    assert OutcomeCredit(baseline="mean").assign(made).advantages.tolist() == [[-1.0], [1.0]]
    assert OutcomeCredit(baseline="mean", truncated="drop").assign(made).advantages.tolist() == [
        [0.0],
        [1.0],
    ]
    for wrong in ({"baseline": "median"}, {"truncated": "keep"}):
        with pytest.raises(turnwise.ConfigError, match="outcome.*Input should be"):
            OutcomeCredit(**wrong)  # type: ignore[arg-type]


def test_selecting_episodes_keeps_everything_aligned() -> None:
    made = batch(
        episode("a", (1, 2), (0.0, 1.0)), episode("b", (4,), (2.0,), seed=2),
        episode("c", (2, 2), (1.0, 2.0), seed=3)
    )  # fmt: skip
    made.credit = OutcomeCredit().assign(made)
    made.extras["prox"] = torch.arange(12.0).view(3, 4)
    kept = select(made, [2, 0])
    assert [e.id for e in kept.episodes] == ["c", "a"]
    assert [(r.episode, r.ids) for r in kept.rows] == [(1, made.rows[0].ids), (0, made.rows[2].ids)]
    assert kept.group.tolist() == [1, 0]
    assert kept.outcome.tolist() == [3.0, 1.0]
    assert kept.extras["prox"].tolist() == [[8.0, 9.0, 10.0, 11.0], [0.0, 1.0, 2.0, 3.0]]


def said(target: str, source: str, **what: Any) -> turnwise.Feedback:
    return turnwise.Feedback(target, stamp=turnwise.Stamp(source=source), **what)


def test_weighted_adds_sources_up() -> None:
    group = [episode("a", (1, 1), (0.5, 1.0)), episode("b", (1,), (2.0,))]
    ranking = turnwise.Comparison(
        group[0].group, [["b"], ["a"]], stamp=turnwise.Stamp(source="ranker")
    )
    feedback = [
        said("a", "people", score=1.0), said("a", "people", score=0.0),
        said("b", "people", aspects={"kind": 1.0, "true": 0.0}),
        ranking, said("a", "turns", score=0.0, turn_scores=(1.0, None)),
        said("b", "turns", score=0.0, turn_scores=(0.5,)),
    ]  # fmt: skip
    combined = Weighted({"environment": 1.0, "people": 2.0, "ranker": 10.0, "turns": 0.0}).combine(
        group, feedback
    )
    assert combined[0] == turnwise.Rewards(1.5 + 1.0 + 0.0, (0.5, 2.0), (1.0, None))
    assert combined[1] == turnwise.Rewards(2.0 + 1.0 + 10.0, (13.0,), (0.5,))


def test_weighted_never_makes_a_number_of_a_failure() -> None:
    group = [episode(name, (1,), (9.0,)) for name in "abcd"]
    feedback = [
        turnwise.Feedback.failed("a", "timeout", stamp=turnwise.Stamp(source="judge")),
        turnwise.Feedback.abstained("b", "unsure", stamp=turnwise.Stamp(source="judge")),
        said("d", "judge", turn_scores=(1.0,)),
    ]
    weighted = Weighted({"environment": 1.0, "judge": 1.0})
    *none, turns_only = weighted.combine(group, feedback)
    assert turns_only == turnwise.Rewards(9.0, (9.0,), (1.0,)), (
        "who speaks of turns alone says nothing of the outcome"
    )
    *_, unlike = weighted.combine(group, [*feedback, said("c", "judge", score=0.5)])
    assert isinstance(unlike, turnwise.NoReward), (
        "but members of a group are not compared on different terms"
    )
    assert "scored turns only" in unlike.reason
    reasons = [r.reason for r in none]  # type: ignore[union-attr]
    assert "failed: timeout" in reasons[0]
    assert "abstained: unsure" in reasons[1]
    assert "did not answer" in reasons[2]


def score(judge: Any, *replies: str) -> float | None:
    e = episode("a", (1,) * len(replies), (0.0,) * len(replies), replies=replies)
    [answer] = judge.score([e])
    assert answer.episode == "a"
    return answer.score


def test_rules() -> None:
    judges = turnwise.judges
    assert score(judges.Length(2), "one two") == 1.0
    assert score(judges.Length(2), "one two three", "x") == pytest.approx(0.75)
    assert score(judges.Length(1), "far too many words") == 0.0
    assert score(judges.Regex("PLEASE"), "no", "yes please") == 1.0
    assert score(judges.Regex("please", where="last"), "please", "no") == 0.0
    assert score(judges.Regex("please", where="all", forbid=True), "please", "no") == 1.0
    assert score(judges.Repetition(), "What is it?", "what  IS it?", "ok") == pytest.approx(2 / 3)
    assert score(judges.Questions(1, 0.5), "a? b?", "c?") == 0.0
    assert score(judges.Questions(3), "a? b?", "c?") == 1.0
    for wrong in (
        lambda: judges.Regex("("),
        lambda: judges.Regex("x", where="first"),
        lambda: judges.Length(0),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_weights_of_rewards_reach_the_batch() -> None:
    e = episode("a", (1,), (1.0,))
    made = make_batch([e], [turnwise.Rewards(1.0, (1.0,), weight=0.25)])
    assert made.weight.tolist() == [0.25]
    with pytest.raises(ValueError, match="failed"):
        make_batch([dataclasses.replace(e, ending="failed")], [turnwise.Rewards(1.0, (1.0,))])
