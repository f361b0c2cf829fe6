"""Environments of other packages, against the packages themselves: known baselines to the digit,
traps that bit, and what they may not do to each other."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import turnwise
from hypothesis import given
from hypothesis import strategies as st
from reasoning_gym.factory import DATASETS
from turnwise.envs.reasoning_gym import (
    FORMULAS,
    GENERATORS,
    LITERALS,
    UNSOLVED,
    ReasoningGym,
    is_formula,
)
from turnwise.envs.textarena import GAMES, SEVERAL, TextArena
from turnwise.envs.toy_text import CODECS

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
turnwise.Plugins()


def play(
    env: str, player: str | Callable[..., str], seeds: Sequence[int], **options: Any
) -> list[turnwise.Episode]:
    starts = [(turnwise.Start(env, seed, options), 0) for seed in seeds]
    return turnwise.rollout(turnwise.ScriptPlayer(player), starts)


def always(*moves: str) -> Callable[..., str]:
    return lambda messages: moves[sum(m.role == "assistant" for m in messages) % len(moves)]


# TextArena.


@pytest.mark.parametrize(
    ("game", "player", "mean", "turns"),
    [
        ("GuessTheNumber", "expert", 1.0, 3.62),
        ("TowerOfHanoi", "expert", 1.0, 7.0),
        ("Blackjack", always("[stand]"), 0.378, 5.0),
        ("Secretary", always("[accept]"), 0.11, 1.0),
        ("FrozenLake", always("[right]", "[down]"), 0.5867, 3.52),
    ],
)
def test_games_give_what_they_give_alone(game: str, player: Any, mean: float, turns: float) -> None:
    """Baselines over seeds 0 to 99, as measured with each game in a process of its own."""
    episodes = play(f"textarena/{game}-v0", player, range(100))
    assert all(e.ending == "terminated" for e in episodes)
    assert sum(e.env_return for e in episodes) / 100 == pytest.approx(mean, abs=1e-4)
    assert sum(len(e.turns) for e in episodes) / 100 == pytest.approx(turns, abs=5e-3)


@pytest.mark.parametrize(
    "game",
    [  # RushHour looks for a puzzle for seconds
        pytest.param(game, marks=pytest.mark.slow) if game == "RushHour" else game for game in GAMES
    ],
)
def test_every_game_passes_the_check(game: str) -> None:
    assert turnwise.check_environment(f"textarena/{game}-v0", episodes=2, limit=60.0) == []


def seated(game: str, seeds: Sequence[int], *seats: str) -> list[tuple[turnwise.Start, int]]:
    """Starts of a game of several players in these seats; all others are played by "random"."""
    env, found = f"textarena/{game}-v0", []
    for seed in seeds:
        others = {str(i): "random" for i in range(SEVERAL[game]) if str(i) not in seats}
        first = turnwise.Start(env, seed, {}, {}, seats[0], others)
        found.append((first, 0))
    return found


@pytest.mark.parametrize("game", SEVERAL)
def test_games_of_several_players_are_played_to_their_ends(game: str) -> None:
    env = f"textarena/{game}-v0"
    assert turnwise.check_environment(env, episodes=2, max_turns=500, limit=60.0) == []
    episodes = turnwise.rollout(turnwise.ScriptPlayer("random"), seated(game, range(20), "0"))
    assert [e.reason for e in episodes if e.ending == "failed"] == []
    others = turnwise.rollout(turnwise.ScriptPlayer("random"), seated(game, range(6), "1"))
    assert not any(e.succeeded for e in others if not e.turns), "over before its first turn"
    ends = [e for e in episodes if e.ending == "terminated"]
    assert all("opponent_invalid" in e.turns[-1].info for e in ends if len(e.turns) > 1)
    assert not any(e.success and e.turns[-1].info.get("opponent_invalid") for e in ends)


def test_tic_tac_toe_by_hand() -> None:
    """X at 0, 1, 2 wins over O at 3, 4; a taken field, twice, is an invalid end and no win of the
    other's."""

    def played(first: list[str], second: list[str]) -> turnwise.Episode:
        start = turnwise.Start("textarena/TicTacToe-v0", 0, {}, {}, "0", {"1": "second"})
        others = {"second": turnwise.ScriptPlayer(always(*second))}
        return turnwise.rollout(turnwise.ScriptPlayer(always(*first)), [(start, 0)], others=others)[
            0
        ]

    won = played(["0", "1", "2"], ["3", "4"])
    assert (won.env_return, won.success, len(won.turns)) == (1.0, True, 3)
    assert "Player 1 placed their symbol" in won.turns[1].observation.content
    lost = played(["0", "1", "8"], ["3", "4", "5"])
    assert (lost.env_return, lost.success) == (-1.0, False)
    given = played(["0", "1"], ["0", "0"])
    assert (given.env_return, given.success) == (1.0, False)
    assert given.turns[-1].info["opponent_invalid"]
    thrown = played(["0", "0", "0"], ["3", "4"])
    assert (thrown.env_return, thrown.turns[-1].info["invalid"]) == (-1.0, True)


def test_an_observation_is_what_is_new() -> None:
    [episode] = play("textarena/GuessTheNumber-v0", always("[1]", "[2]", "[3]"), [4])
    first, second, *_ = [m.content for m in episode.messages if m.role == "user"]
    assert "guess the number between 1 and 20" in first
    assert second == "The target number is higher."


def test_a_reply_without_brackets_is_a_move() -> None:
    bare, marked = (play("textarena/GuessTheNumber-v0", always(m), [4])[0] for m in ("1", "[1]"))
    assert [m.content for m in bare.messages if m.role == "user"] == [
        m.content for m in marked.messages if m.role == "user"
    ]


def test_an_invalid_end_is_told_from_a_loss() -> None:
    [episode] = play("textarena/GuessTheNumber-v0", always("hm"), [4])
    assert episode.turns[-1].info["invalid"] is True
    assert "Invalid Move" in episode.turns[-1].info["why"]
    assert not episode.succeeded
    [won] = play("textarena/GuessTheNumber-v0", "expert", [4])
    assert (won.turns[-1].info["invalid"], won.succeeded) == (False, True)


def test_a_reward_that_is_a_sentence_is_none() -> None:
    """Countdown swaps the reward of an invalid end with its reason, which makes the other half, a
    number, a message."""
    [episode] = play("textarena/Countdown-v0", always("[x]"), [1])
    assert episode.ending == "terminated"
    assert episode.env_return == 0.0
    assert isinstance(episode.turns[-1].info["odd_reward"], str)


def test_games_at_the_same_time_do_not_meet() -> None:
    """Two of one seed, one of another in between, and the global state as it was."""

    def moves(envs: Sequence[TextArena], seeds: Sequence[int]) -> list[list[str]]:
        found = [[env.reset(seed=seed)[0]] for env, seed in zip(envs, seeds, strict=True)]
        ended = [False] * len(envs)
        while not all(ended):
            for i, env in enumerate(envs):
                if not ended[i]:
                    text, _, done, *_ = env.step("[hit]" if len(found[i]) % 2 else "[stand]")
                    found[i].append(text)
                    ended[i] = done
        return found

    [alone] = moves([TextArena("Blackjack-v0")], [5])
    random.seed(1)
    before = random.getstate()
    first, _, third = moves([TextArena("Blackjack-v0") for _ in range(3)], [5, 8, 5])
    assert first == third == alone
    assert random.getstate() == before


def test_an_expert_of_another_game_is_refused() -> None:
    with pytest.raises(LookupError, match="has no player 'expert'; it has: random"):
        play("textarena/Blackjack-v0", "expert", [1])


# reasoning-gym.


def test_the_generators_are_those_of_the_package() -> None:
    assert set(GENERATORS) == set(DATASETS) - {"composite"}
    assert {f"reasoning-gym/{name}" for name in GENERATORS} <= set(gymnasium.registry)


@pytest.mark.parametrize("generator", ["chain_sum", "spell_backward", "gcd", "mini_sudoku"])
def test_the_right_answer_is_worth_one(generator: str) -> None:
    episodes = play(f"reasoning-gym/{generator}", "expert", range(10))
    assert [e.env_return for e in episodes] == [1.0] * 10
    assert all(e.succeeded and len(e.turns) == 1 for e in episodes)
    assert turnwise.check_environment(f"reasoning-gym/{generator}", episodes=3) == []


@pytest.mark.slow
@pytest.mark.parametrize("generator", GENERATORS)
def test_every_generator_scores_its_own_answer(generator: str) -> None:
    if generator in UNSOLVED:
        [episode] = play(f"reasoning-gym/{generator}", always("x"), [7])
        assert (episode.ending, episode.succeeded) == ("terminated", False)
        return
    for split in ("train", "held_out"):
        [episode] = play(f"reasoning-gym/{generator}", "expert", [7], split=split)
        assert (episode.ending, episode.env_return) == ("terminated", 1.0), episode.reason


def begun(**options: Any) -> ReasoningGym:
    env = ReasoningGym("chain_sum", tries=3)
    env.reset(seed=3, options={**SUMS, **options})
    return env


def test_a_wrong_number_gets_a_hint() -> None:
    env = begun()
    right = int(env.answer)
    low, reward, *ended, _ = env.step(f"I think it is {right - 1}.")
    assert (low, reward, ended) == (
        "That is wrong. The answer is larger. Try again.", 0.0, [False, False],
    )  # fmt: skip
    assert "The answer is smaller." in env.step(f"{right + 20}")[0]
    assert env.step(f"{right}")[:3] == ("That is right.", 1.0, True)


def test_the_last_try_ends_it() -> None:
    env = begun()
    replies = [env.step("no idea") for _ in range(3)]
    assert [r[0] for r in replies] == ["That is wrong. Try again."] * 2 + ["That is wrong."]
    assert [r[2] for r in replies] == [False, False, True]
    assert replies[-1][4] == {"success": False}


@given(
    st.integers(-99, 99),
    st.sampled_from(["{}", "It is {}.", "<answer>{}</answer> or 7", "3 + 4 = {}", "**{}**"]),
)
def test_a_number_is_read_wherever_it_stands(shift: int, form: str) -> None:
    """And is right or wrong: the generator pays half for "-1" where 1 is right."""
    env = begun()
    said = int(env.answer) + shift
    reward = env.step(form.format(said))[1]
    assert reward == float(shift == 0)


def test_no_split_has_a_question_of_the_other() -> None:
    questions = {
        split: {
            e.messages[1].content
            for e in play("reasoning-gym/chain_sum", always("0"), range(200), **SUMS, split=split)
        }
        for split in ("train", "held_out")
    }
    assert not questions["train"] & questions["held_out"]
    assert len(questions["held_out"]) > 20


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_trems": 2}, "chain_sum has no option 'max_trems'. Did you mean 'max_terms'"),
        ({"split": "test"}, "split must be train or held_out, not 'test'"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ReasoningGym("chain_sum").reset(seed=1, options=options)


def test_answers_in_words_are_scored_by_the_generator() -> None:
    env = ReasoningGym("spell_backward", tries=1)
    env.reset(seed=1)
    text, reward, done, *_ = env.step(f"  {env.answer} ")
    assert (text, reward, done) == ("That is right.", 1.0, True)
    env.reset(seed=1)
    assert env.step("xyz")[1] < 1.0


def test_a_generators_own_tolerance_counts() -> None:
    """power_function asks for three digits and knows all of them."""
    env = ReasoningGym("power_function", tries=1)
    env.reset(seed=3)
    assert env.step(f"It is {float(env.answer):.2e}.")[1] == 1.0
    env.reset(seed=3)
    assert env.step(f"It is {float(env.answer) * 1.1:.2e}.")[1] == 0.0


@pytest.mark.parametrize("generator", [*LITERALS, *FORMULAS])
def test_no_reply_is_run(generator: str, tmp_path: Path) -> None:
    """The package evaluates replies as Python."""
    env = ReasoningGym(generator, tries=1)
    env.reset(seed=1)
    for reply in (
        f"__import__('pathlib').Path('{tmp_path}/ran').touch() or 1", "9**9**9", "(9**9)**(9**9)",
        "2**1000000", "[i for i in [1]]", "exp(exp(exp(exp(exp(exp(9))))))", "x.__class__",
        "f'{1}'", "[" * 10_000, "-" * 10_000 + "1",
    ):  # fmt: skip
        assert env._score(reply) < 1.0, reply
    assert not list(tmp_path.iterdir())
    assert env._score(env.answer) == 1.0


@pytest.mark.parametrize(
    ("formula", "sound"),
    [
        ("x**2 + 3*x", True), ("-cos(3*x)/3 + C", True), ("x**(3/2)", True), ("2**-3", True),
        ("sin(x)**2", True), ("exp(x)/2", True), ("(3 + 5) * 2 - 1", True),
        ("(9**9)**9", False), ("9**(9*9)", False), ("1e30", False), ("x if 1 else 2", False),
        ("True", False), ("f(x)", False), ("sin(x, 1)", False), ("[1]", False), ("'x'", False),
        ("x and 1", False), ("5 % 2", False), ("1 << 90", False), ("", False),
    ],
)  # fmt: skip
def test_formulas_that_cannot_take_long(formula: str, sound: bool) -> None:
    assert is_formula(formula) == sound


@pytest.mark.parametrize(
    ("generator", "reply"),
    [
        ("game_of_life_halting", "hello"), ("complex_arithmetic", "nan"), ("coin_flip", "0"),
        ("prime_factorization", "I think 2 and 3"), ("boxnet", "5"), ("game_of_life", "{}"),
        ("coin_flip", "1e400"), ("coin_flip", "1e99999999999999999999"),
        ("chain_sum", "1e99999999999999999999"), ("fraction_simplification", "1e999999999"),
    ],
)  # fmt: skip
def test_a_reply_that_a_generator_cannot_score_is_wrong(generator: str, reply: str) -> None:
    """And no failure of the environment's, which would not be trained on."""
    for seed in range(5):
        env = ReasoningGym(generator, tries=1)
        env.reset(seed=seed)
        assert env.step(reply)[1] < 1.0


def test_options_of_a_game_are_refused() -> None:
    with pytest.raises(ValueError, match="GuessTheNumber-v0 takes no reset options, got split"):
        TextArena("GuessTheNumber-v0").reset(seed=1, options={"split": "held_out"})


# Gymnasium's toy texts.


@pytest.mark.parametrize("name", CODECS)
def test_toy_texts_are_gymnasiums_own_in_words(name: str) -> None:
    """The same moves from the same seeds give the same rewards and ends as without words."""
    assert turnwise.check_environment(f"toy-text/{name}", episodes=4, max_turns=250) == []
    for seed, episode in enumerate(play(f"toy-text/{name}", "random", range(20))):
        env = gymnasium.make(name, max_episode_steps=200)
        env.reset(seed=seed)
        for turn in episode.turns:
            _, reward, terminated, truncated, _ = env.step(CODECS[name].moves.index(turn.action))
            assert turn.reward == reward
        assert episode.ending == ("terminated" if terminated else "truncated")
        assert terminated or truncated


def test_toy_texts_by_hand() -> None:
    lake = {"is_slippery": False}
    start = turnwise.Start("toy-text/FrozenLake-v1", 0, {}, lake)
    way = always("Down.", "I go down", "right", "DOWN", "right", "right")
    [crossed] = turnwise.rollout(turnwise.ScriptPlayer(way), [(start, 0)])
    assert (crossed.env_return, crossed.success, len(crossed.turns)) == (1.0, True, 6)
    assert crossed.turns[1].observation.content == "You stand in row 2, column 1."
    [cliff] = play("toy-text/CliffWalking-v1", always("up", *["right"] * 11, "down"), [0])
    assert (cliff.env_return, cliff.success) == (-13.0, True)
    [lost] = play("toy-text/CliffWalking-v1", always("right"), [0])
    assert (lost.ending, lost.succeeded, lost.env_return) == ("truncated", False, -100.0 * 200)
    [unclear] = play("toy-text/Blackjack-v1", always("stick or hit?", "stick"), [3])
    assert unclear.turns[0].info == {"invalid": True}
    assert unclear.turns[1].observation.content.startswith("Say one of: stick, hit. You have ")
    [taxi] = play("toy-text/Taxi-v4", always("pickup"), [1])
    assert "The passenger waits at the" in taxi.turns[0].observation.content
