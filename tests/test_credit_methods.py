"""Credit methods: hand-computed tables for the edges, what they conserve, what leaves them
unchanged, and two known biases that they lack."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import turnwise
from hypothesis import given, settings
from hypothesis import strategies as st
from support.episodes import conversation, select
from test_credit_and_rewards import batch, episode
from turnwise.engine.policy.batching import make_batch
from turnwise.engine.tensors import (
    bilevel_gae,
    gae,
    place_turn_rewards,
    returns_to_go,
    turn_advantages,
)
from turnwise.plugins.credit.branch import BranchCredit
from turnwise.plugins.credit.counterfactual import Counterfactual
from turnwise.plugins.credit.gae import GAE
from turnwise.plugins.credit.gigpo import GiGPO
from turnwise.plugins.credit.judged import Judged
from turnwise.plugins.credit.outcome import OutcomeCredit
from turnwise.plugins.credit.redistribute import Redistribute
from turnwise.plugins.credit.turn_returns import TurnReturns, against_others

NAN = math.nan


def walk(
    name: str, rooms: str, rewards: tuple[float, ...], seed: int = 1, tokens: int = 2
) -> turnwise.Episode:
    """Builds an episode whose observations are the given words, which methods tell states by."""
    return conversation(
        *(f"go {room}" for room in rooms.split()),
        heard=[*rooms.split(), "bye"],
        id=name,
        seed=seed,
        reward=list(rewards),
        prompt_ids=(7,),
        action_ids=(5,) * tokens,
        logprobs=(-0.5,) * tokens,
    )


def turns_of(credit: turnwise.Credit) -> list[list[float]]:
    return [[round(float(v), 6) for v in row] for row in credit.turn_credit]


def test_turn_returns_by_hand() -> None:
    """Three conversations of one start, of 3, 1 and 2 turns.

    Those who have finished count with what their last turn brought.
    """
    made = batch(
        episode("a", (2, 1, 3), (1.0, 0.0, 2.0)), episode("b", (2,), (4.0,)),
        episode("c", (1, 1), (0.0, 1.0)),
        episode("alone", (2, 2), (1.0, 1.0), seed=2),
    )  # fmt: skip
    # returns to go: a 3 2 2, b 4, c 1 1; carried: b 4 4 4, c 1 1 1
    assert turns_of(TurnReturns().assign(made)) == [
        [0.5, -0.5, -0.5],
        [2.0, 0, 0],
        [-2.5, -2.0, 0],
        [0, 0, 0],
    ]
    assert turns_of(TurnReturns(baseline="none").assign(made)) == [
        [3, 2, 2],
        [4, 0, 0],
        [1, 1, 0],
        [2, 1, 0],
    ]
    assert turns_of(TurnReturns(gamma=0.5, baseline="none").assign(made))[0] == [1.5, 1.0, 2.0]
    made.token_rewards[0, 2] = -1.0  # the KL penalty of the second turn's only token
    assert turns_of(TurnReturns(baseline="none").assign(made))[0] == [2, 1, 2]
    assert TurnReturns(baseline="none").assign(made).advantages[0].tolist() == [2, 2, 1, 2, 2, 2]
    assert TurnReturns().needs == {"group"}
    assert TurnReturns(baseline="none").needs == frozenset()


def test_gae_over_turns_by_hand() -> None:
    """Values 1 2 | 3 | 4 4 of three turns, rewards 0, 1, 2: the first token's value is the
    turn's."""
    made = batch(
        episode("a", (2, 1, 2), (0.0, 1.0, 2.0), ending="truncated"), episode("b", (1,), (0.0,))
    )
    made.values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [0.5, 0, 0, 0, 0]])
    made.bootstrap = torch.tensor([6.0, 6.0])
    # delta: 3 - 1 = 2, 1 + 4 - 3 = 2, 2 + 6 - 4 = 4; b terminated: 0 - 0.5
    td, half, monte = (GAE(unit="turn", turn_lam=lam).assign(made) for lam in (0.0, 0.5, 1.0))
    assert turns_of(td) == [[2, 2, 4], [-0.5, 0, 0]]
    assert turns_of(half) == [[4, 4, 4], [-0.5, 0, 0]]
    assert turns_of(monte) == [[8, 6, 4], [-0.5, 0, 0]]
    assert half.advantages[0].tolist() == [4.0] * 5, "all tokens of a turn share its advantage"
    assert half.value_targets is not None
    assert half.value_targets[0].tolist() == [5.0, 5.0, 7.0, 8.0, 8.0]


def test_bilevel_gae_by_hand() -> None:
    """Turns of 2 and 3 tokens; the first earns nothing and stays a turn."""
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    turn, mask = torch.tensor([[0, 0, 1, 1, 1]]), torch.ones(1, 5, dtype=torch.bool)
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0, 7.0]], dtype=torch.float64)
    advantages, targets = bilevel_gae(
        rewards, values, turn, mask, torch.zeros(1, dtype=torch.float64), 2, (0.9, 0.5), (0.8, 0.25)
    )
    # over turns, at their last tokens (V = 2 and 5): delta_2 = 7 - 5 = 2; delta_1 = 0 + 0.8 * 5 - 2
    # = 2; A_1 = 2 + 0.8 * 0.25 * 2 = 2.4 inside: token 1: 0.9 * 2 - 1 + 0.45 * 2.4 = 1.88; token 4:
    # 0.9 * 5 - 4 + 0.45 * 2 = 1.4; token 3: 0.9 * 4 - 3 + 0.45 * 1.4 = 1.23
    assert advantages[0].tolist() == pytest.approx([1.88, 2.4, 1.23, 1.4, 2.0])
    assert targets[0].tolist() == pytest.approx([2.88, 4.4, 4.23, 5.4, 7.0])


def test_bilevel_and_token_gae_agree_where_they_must() -> None:
    """With lambda and gamma 1 on both levels everything is Monte Carlo less the value; with one
    token per turn the levels are one."""
    made = batch(
        episode("a", (3, 2, 4), (0.0, 0.5, 1.0), ending="truncated"),
        episode("b", (1, 5), (0.0, -1.0)),
    )
    made.values = (
        torch.rand(made.mask.shape, generator=torch.Generator().manual_seed(0)) * made.mask
    )
    made.bootstrap = torch.tensor([0.3, 0.4])
    whole = [
        m.assign(made).advantages
        for m in (GAE(lam=1.0), GAE(unit="bilevel", lam=1.0, turn_lam=1.0))
    ]
    assert torch.allclose(whole[0], whole[1], atol=1e-6)
    made.token_rewards = (
        -0.1 * torch.rand(made.mask.shape, generator=torch.Generator().manual_seed(1)) * made.mask
    )  # a KL penalty
    charged = [m.assign(made) for m in (GAE(lam=1.0), GAE(unit="bilevel", lam=1.0, turn_lam=1.0))]
    assert torch.allclose(charged[0].advantages, charged[1].advantages, atol=1e-6)
    assert not torch.allclose(charged[0].advantages, whole[0], atol=1e-3)
    single = batch(
        episode("a", (1, 1, 1, 1), (0.0, 0.0, 0.5, 1.0)), episode("b", (1, 1), (0.0, -1.0))
    )
    single.values, single.bootstrap = torch.rand(single.mask.shape) * single.mask, torch.zeros(2)
    three = [
        GAE(**options).assign(single)
        for options in (
            {"gamma": 0.9, "lam": 0.7},
            {"unit": "turn", "turn_gamma": 0.9, "turn_lam": 0.7},
            {"unit": "bilevel", "gamma": 0.9, "lam": 0.7, "turn_gamma": 0.9, "turn_lam": 0.7},
        )
    ]
    for other in three[1:]:
        assert torch.allclose(three[0].advantages, other.advantages, atol=1e-6)


def test_lambda_below_one_shrinks_credit_over_observation_tokens_and_ours_does_not() -> None:
    """Two turns of three tokens, V = 0.5, reward 1 at the end. Laid out with four observation
    tokens of value 0 between the turns and run through plain GAE, as some trainers do, the first
    turn's credit shrinks twice; on action tokens alone it is verl's."""
    rewards, values = (
        torch.zeros(1, 10, dtype=torch.float64),
        torch.zeros(1, 10, dtype=torch.float64),
    )
    rewards[0, 9] = 1.0
    values[0, [0, 1, 2, 7, 8, 9]] = 0.5
    spread, _ = gae(
        rewards,
        values,
        torch.ones(1, 10, dtype=torch.bool),
        torch.zeros(1, dtype=torch.float64),
        1.0,
        0.95,
    )
    assert spread[0, :3].tolist() == pytest.approx([0.231, 0.244, 0.256], abs=1e-3)
    made = batch(episode("a", (3, 3), (0.0, 1.0), observed=4))
    made.values, made.bootstrap = 0.5 * made.mask, torch.zeros(1)
    assert GAE(lam=0.95).assign(made).advantages[0, :3].tolist() == pytest.approx(
        [0.387, 0.407, 0.429], abs=1e-3
    )
    assert GAE(lam=0.9).assign(made).advantages[0, :3].tolist() == pytest.approx(
        [0.295, 0.328, 0.365], abs=1e-3
    )


def test_gigpo_by_hand() -> None:
    """Two conversations: hall, kitchen, hall against hall, garden; only `hall` recurs."""
    made = batch(
        walk("a", "hall kitchen hall", (0.0, 0.0, 1.0)), walk("b", "hall garden", (0.0, 0.0))
    )
    # with gamma 0.5 returns are a: 0.25 0.5 1, b: 0 0; hall: mean of 0.25, 1, 0 = 0.416667;
    # episodes: +0.5, -0.5
    credit = turns_of(GiGPO(omega=2.0, gamma=0.5).assign(made))
    assert credit == [
        [round(0.5 + 2 * (0.25 - 1.25 / 3), 6), 0.5, round(0.5 + 2 * (1 - 1.25 / 3), 6)],
        [round(-0.5 - 2 * 1.25 / 3, 6), -0.5, 0.0],
    ]  # fmt: skip
    other = batch(walk("a", "hall kitchen", (0.0, 1.0)), walk("b", "hallo kitchens", (0.0, 0.0)))
    assert GiGPO().states(other).tolist() == [[0, 1], [2, 3]]
    assert GiGPO(similarity=0.8).states(other).tolist() == [[0, 1], [0, 1]]
    turned = batch(walk("b", "hallo kitchens", (0.0, 0.0)), walk("a", "hall kitchen", (0.0, 1.0)))
    near = [walk(n, f"{n} x", (0.0, 1.0)) for n in ("abcdef", "abcdeg", "abcdgg")]
    together = set()
    for order in itertools.permutations(near):
        found = GiGPO(similarity=0.8).states(batch(*order))[:, 0].tolist()
        together.add(
            frozenset(
                frozenset(e.id for e, n in zip(order, found, strict=True) if n == m)
                for m in set(found)
            )
        )
    assert len(together) == 1, "whoever comes first in the batch decides nothing"
    assert GiGPO(similarity=0.8).states(turned).tolist() == [[0, 1], [0, 1]]
    equal = batch(walk("a", "hall", (1.0,)), walk("b", "hall", (1.0,)), walk("c", "hall", (1.0,)))
    equal.token_rewards[0, 0], equal.token_rewards[1, 0] = -1e-3, 1e-3
    tiny = GiGPO(baseline="std").assign(equal).turn_credit
    assert float(tiny.abs().max()) < 1e-2, (
        "the smallest penalty must not become a full-strength advantage"
    )
    apart = batch(walk("a", "hall", (1.0,)), walk("b", "hall", (0.0,), seed=2))
    assert GiGPO().states(apart).tolist() == [[0], [1]], "states of two starts are never compared"


def test_branch_and_counterfactual_by_hand() -> None:
    made = batch(episode("a", (1, 2, 1), (0.0, 0.0, 1.0)), episode("b", (1, 1), (0.0, 0.0)))
    made.branch_values = torch.tensor([[0.25, 0.5, 0.75], [0.25, NAN, NAN]])
    # a: .5 - .25, .75 - .5, 1 - .75; b: the second state has no value, so what follows it counts: 0
    # for the last turn
    assert turns_of(BranchCredit().assign(made)) == [[0.25, 0.25, 0.25], [-0.25, 0, 0]]
    assert turns_of(Counterfactual().assign(made)) == [[0.75, 0.5, 0.25], [-0.25, 0, 0]]
    made.token_rewards[0, 1] = -0.125
    assert turns_of(BranchCredit().assign(made))[0] == [
        0.25,
        0.125,
        0.25,
    ], "a KL penalty is charged to its own turn"


def test_judged_by_hand() -> None:
    made = batch(episode("a", (1, 1, 1), (0.0, 0.0, 1.0)), episode("b", (1, 1), (0.0, 0.0)))
    made.turn_scores = torch.tensor([[0.5, NAN, 1.0], [0.25, 0.75, NAN]])
    assert turns_of(Judged().assign(made)) == [
        [0.0, 0, 0.5],
        [-0.5, 0.0, 0],
    ], "others' means: 0.5 for a, 0.75 for b"
    assert turns_of(Judged(scores="delta").assign(made)) == [[0.5, 0, 0.5], [0.25, 0.5, 0]]
    assert turns_of(Judged(scores="delta", initial=0.5).assign(made)) == [
        [0, 0, 0.5],
        [-0.25, 0.5, 0],
    ]
    # smear 1/2: the delta of turn 3 in shares 4/7, 2/7, 1/7 to turns 3, 2, 1; that of turn 2 in 2/3
    # and 1/3
    smeared = Judged(scores="delta", smear=0.5).assign(made).turn_credit
    assert smeared[0].tolist() == pytest.approx([0.5 + 0.5 / 7, 1.0 / 7, 2.0 / 7])
    assert smeared[1].tolist() == pytest.approx([0.25 + 0.5 / 3, 1.0 / 3, 0])
    assert turns_of(Judged(scores="delta", outcome=1.0).assign(made))[0] == [1.5, 1.0, 1.5]
    assert (Judged().needs, Judged(scores="delta").needs) == (
        {"turn_scores", "group"},
        {"turn_scores"},
    )
    heard = Judged()
    heard.assign(made)
    made.turn_scores = None
    assert not heard.assign(made).advantages.any(), "abstained throughout: no credit"
    again = Judged()
    with pytest.raises(
        turnwise.ConfigError, match="none of the feedback sources scored a single turn"
    ):
        again.assign(made)
    again.load_state_dict(heard.state_dict())
    assert not again.assign(made).advantages.any()


def test_redistribution_finds_the_turn_that_mattered_and_conserves_the_outcome() -> None:
    """Six turns; whether `key` was answered with `take` decides, everything else is noise of
    words."""
    rng = torch.Generator().manual_seed(0)
    pick = lambda n: int(torch.randint(n, (), generator=rng))  # noqa: E731

    def played(i: int) -> turnwise.Episode:
        where, won, heard, replies = pick(6), 0.0, [], []
        for k in range(6):
            heard.append("key" if k == where else f"room {pick(5)}")
            replies.append((("take", "leave") if k == where else ("on", "back"))[pick(2)])
            won = float(replies[-1] == "take") if k == where else won
        return conversation(
            *replies,
            heard=heard,
            id=str(i),
            seed=i // 8,
            reward=[0.0] * 5 + [won],
            prompt_ids=(7,),
            action_ids=(5,),
            logprobs=(-0.5,),
        )

    method = Redistribute(features=256)
    for update in range(6):
        made = batch(*(played(64 * update + i) for i in range(64)))
        credit = method.assign(made)
        outcome = OutcomeCredit(baseline="loo").assign(made).turn_credit[:, 0]
        assert torch.allclose(credit.turn_credit.sum(1), outcome, atol=1e-5), (
            "exact, whatever was learned"
        )
        method.fit(made)
    key = torch.tensor([[t.observation.content == "key" for t in e.turns] for e in made.episodes])
    assert credit.turn_credit[key].abs().mean() > 5 * credit.turn_credit[~key].abs().mean()
    again = Redistribute(features=256)
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.assign(made).turn_credit, method.assign(made).turn_credit)


METHODS: dict[str, Any] = {
    "outcome": OutcomeCredit, "rloo": lambda: OutcomeCredit(baseline="loo"),
    "turn-returns": TurnReturns,
    "gae": GAE,
    "turn gae": lambda: GAE(unit="turn"), "bilevel": lambda: GAE(unit="bilevel"), "gigpo": GiGPO,
    "branch": BranchCredit,
    "counterfactual": Counterfactual, "redistribute": lambda: Redistribute(features=64),
    "judged": Judged,
    "deltas": lambda: Judged(scores="delta", smear=0.5),
}  # fmt: skip


def supplied(
    episodes: list[turnwise.Episode], shift: float = 0.0, scale: float = 1.0
) -> turnwise.Batch:
    """A batch with everything any method needs, by functions of the episode's id and turn alone."""
    rewards = []
    for e in episodes:
        turns = [scale * t.reward for t in e.turns]
        turns[-1] += shift
        scores = tuple(
            None if k % 3 == 1 else scale * ((hash_(e.id) + k) % 5) / 4 for k in range(len(turns))
        )
        rewards.append(turnwise.Rewards(sum(turns), tuple(turns), scores))
    made = make_batch(episodes, rewards)
    made.values = (
        torch.tensor(
            [[((hash_(e.id) + a) % 7) / 7 for a in range(made.mask.shape[1])] for e in episodes]
        )
        * made.mask
    )
    made.bootstrap = torch.tensor([0.25 + hash_(e.id) % 3 for e in episodes])
    made.branch_values = torch.tensor(
        [
            [scale * ((hash_(e.id) + k) % 4) / 4 + shift for k in range(made.turn_mask.shape[1])]
            for e in episodes
        ]
    )
    return made


def hash_(text: str) -> int:
    return sum(ord(c) * (i + 3) for i, c in enumerate(text))


@st.composite
def groups(draw: Any) -> list[turnwise.Episode]:
    """Two to four groups of one to four conversations of different lengths, endings and observation
    lengths."""
    found = []
    for g in range(draw(st.integers(2, 4))):
        for i in range(draw(st.integers(1, 4))):
            turns = draw(st.integers(1, 4))
            lengths = tuple(draw(st.lists(st.integers(1, 4), min_size=turns, max_size=turns)))
            rewards = tuple(
                draw(
                    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=turns, max_size=turns)
                )
            )
            ending = draw(st.sampled_from(["terminated", "truncated"]))
            found.append(
                episode(
                    f"{g}.{i}",
                    lengths,
                    rewards,
                    seed=g,
                    ending=ending,
                    observed=draw(st.integers(1, 3)),
                )
            )
    return found


@settings(max_examples=25, deadline=None)
@given(groups(), st.sampled_from(sorted(METHODS)), st.randoms(use_true_random=False))
def test_credit_does_not_depend_on_order_padding_or_what_was_observed(
    played: list[turnwise.Episode], name: str, rng: Any
) -> None:
    """Shuffled episodes, other lengths of observations, and a longer neighbour that pads everybody:
    the same credit."""
    base = METHODS[name]().assign(supplied(played))
    at = {e.id: i for i, e in enumerate(played)}
    order = list(played)
    rng.shuffle(order)
    wider = [episode("9.0", (4,) * 6, (0.0,) * 6, seed=99), *order]
    found = METHODS[name]().assign(supplied(wider))
    for i, e in enumerate(wider[1:], 1):
        tokens, turns = sum(len(t.action_ids or ()) for t in e.turns), len(e.turns)
        assert torch.allclose(
            found.advantages[i, :tokens], base.advantages[at[e.id], :tokens], atol=1e-5
        )
        assert torch.allclose(
            found.turn_credit[i, :turns], base.turn_credit[at[e.id], :turns], atol=1e-5
        )
        assert (found.advantages[i, tokens:] == 0).all()
        assert (found.turn_credit[i, turns:] == 0).all()
    longer = [
        episode(e.id, tuple(len(t.action_ids or ()) for t in e.turns),
            tuple(t.reward for t in e.turns), seed=e.start.seed,
                ending=e.ending, observed=9)
        for e in played
    ]  # fmt: skip
    assert torch.allclose(
        METHODS[name]().assign(supplied(longer)).advantages, base.advantages, atol=1e-6
    )


@settings(max_examples=25, deadline=None)
@given(
    groups(),
    st.sampled_from(
        ["outcome", "rloo", "turn-returns", "redistribute", "branch", "counterfactual"]
    ),
)
def test_a_constant_added_to_all_outcomes_changes_nothing(
    played: list[turnwise.Episode], name: str
) -> None:
    base, moved = (METHODS[name]().assign(supplied(played, shift=s)) for s in (0.0, 3.0))
    assert torch.allclose(base.advantages, moved.advantages, atol=2e-4)


@settings(max_examples=25, deadline=None)
@given(
    groups(),
    st.sampled_from(
        [
            "rloo",
            "turn-returns",
            "gigpo",
            "redistribute",
            "branch",
            "counterfactual",
            "judged",
            "deltas",
        ]
    ),
)
def test_credit_scales_with_the_rewards(played: list[turnwise.Episode], name: str) -> None:
    base, twice = (METHODS[name]().assign(supplied(played, scale=s)) for s in (1.0, 2.0))
    assert torch.allclose(2 * base.advantages, twice.advantages, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(groups())
def test_what_is_conserved(played: list[turnwise.Episode]) -> None:
    """Branches sum to the outcome less the start's value, redistribution to RLOO's advantage,
    deltas to the last score."""
    made = supplied(played)
    assert made.branch_values is not None
    assert made.turn_scores is not None
    total = BranchCredit().assign(made).turn_credit.sum(1)
    assert torch.allclose(total, made.outcome - made.branch_values[:, 0], atol=1e-5)
    whole = OutcomeCredit(baseline="loo").assign(made).turn_credit[:, 0]
    assert torch.allclose(
        Redistribute(features=64).assign(made).turn_credit.sum(1), whole, atol=1e-5
    )
    deltas = Judged(scores="delta", smear=0.3).assign(made).turn_credit.sum(1)
    for e, scores in enumerate(made.turn_scores):
        own = [float(s) for s in scores[made.turn_mask[e]] if not s.isnan()]
        assert float(deltas[e]) == pytest.approx(own[-1] if own else 0.0, abs=1e-5)


@settings(max_examples=15, deadline=None)
@given(groups(), st.sampled_from(["outcome", "rloo", "turn-returns", "gigpo"]))
def test_groups_can_be_credited_one_by_one(played: list[turnwise.Episode], name: str) -> None:
    """Micro-batching by groups: the credit of a group does not see other groups."""
    made = supplied(played)
    whole = METHODS[name]().assign(made)
    for g in made.group.unique().tolist():
        index = [e for e, own in enumerate(made.group.tolist()) if own == g]
        part = METHODS[name]().assign(select(made, index))
        assert torch.allclose(part.advantages, whole.advantages[index], atol=1e-5)


def stopping_gradient(credit_of: Any, group: int = 2) -> float:
    """The exact expected policy gradient of a game in which the policy may stop, by enumeration of
    all groups.

    Turn 1: stop (reward 0, over) or go on (reward 1). Turn 2: one reply, reward 0. The policy goes
    on with probability 0.6; the gradient in the logit of going on is the expectation over groups of
    sum_i A_{i,1} (a_i - 0.6).
    """
    p, total = 0.6, 0.0
    for choices in itertools.product((0, 1), repeat=group):
        chance = math.prod(p if a else 1 - p for a in choices)
        turn_mask = torch.tensor([[True, bool(a)] for a in choices])
        rewards = torch.tensor([[float(a), 0.0] for a in choices], dtype=torch.float64)
        advantage = credit_of(rewards, turn_mask)[:, 0]
        total += chance * sum(float(advantage[i]) * (a - p) for i, a in enumerate(choices)) / group
    return total


def test_the_stopping_bias_of_normalising_per_turn_index_is_there_and_absent_from_ours() -> None:
    """The true gradient is p (1 - p) (E[G | go] - E[G | stop]). Per-turn-index baselines, summed to
    go, are off, because how many of them a conversation collects is its own choice
    (verl-project/verl#7244)."""

    def per_index(rewards: Any, mask: Any) -> Any:
        """Each turn's reward less the mean of those who got so far, summed to go."""
        alive = mask.sum(0).clamp(min=1)
        return returns_to_go((rewards - (rewards * mask).sum(0) / alive) * mask)

    def late(rewards: Any, mask: Any) -> Any:
        """The same game with the reward 1 moved to turn 2."""
        return per_index(rewards.flip(1), mask)

    def with_itself(rewards: Any, mask: Any) -> Any:
        """Returns to go less the mean of the whole group, the episode itself included."""
        returns = returns_to_go(rewards)
        return returns - returns.mean(0)

    ours = lambda rewards, mask: against_others(  # noqa: E731
        returns_to_go(rewards), mask, torch.zeros(len(rewards), dtype=torch.long)
    )
    ours_late = lambda rewards, mask: ours(rewards.flip(1), mask)  # noqa: E731
    true = 0.6 * 0.4
    for group in (2, 3, 4):
        assert stopping_gradient(ours, group) == pytest.approx(true, abs=1e-9)
        assert stopping_gradient(ours_late, group) == pytest.approx(true, abs=1e-9)
        assert stopping_gradient(with_itself, group) == pytest.approx(
            true * (1 - 1 / group), abs=1e-9
        ), "shrunk"
        assert abs(stopping_gradient(late, group)) < 0.01, (
            "everybody at turn 2 earns 1, so nobody is credited for getting there"
        )
        assert abs(stopping_gradient(late, group) - true) > 0.2


def test_turn_advantages_telescope_and_skip_unknown_states() -> None:
    values = torch.tensor([[0.2, NAN, 0.6], [0.5, 0.1, NAN]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = turn_advantages(values, torch.tensor([1.0, 0.0]), mask)
    assert found.tolist() == [pytest.approx([0.4, 0.0, 0.4]), pytest.approx([-0.4, -0.1, 0.0])]


def test_options_out_of_range_are_refused() -> None:
    for method, options in (
        (TurnReturns, {"gamma": 2}),
        (TurnReturns, {"baseline": "mean"}),
        (GAE, {"unit": "word"}),
        (GAE, {"turn_lam": -1}),
        (GAE, {"turn_lam": 0.5}),
        (GAE, {"unit": "turn", "lam": 0.5}),
        (GiGPO, {"similarity": 0.0}),
        (GiGPO, {"baseline": "loo"}),
        (BranchCredit, {"rollouts": 0}),
        (Counterfactual, {"rollouts": 0}),
        (Redistribute, {"features": 2}),
        (Judged, {"scores": "marks"}),
        (Judged, {"smear": 1.0}),
    ):
        with pytest.raises(turnwise.ConfigError, match=[*options][-1]):
            method(**options)


def test_rewards_of_turns_stand_on_their_last_tokens() -> None:
    made = batch(episode("a", (2, 3), (1.0, 2.0)))
    assert place_turn_rewards(made.turn_rewards, made.turn, made.mask)[0].tolist() == [
        0,
        1,
        0,
        0,
        2,
    ]
