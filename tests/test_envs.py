"""The built-in dialogues: optimum, expert, demonstrators, random player, held-out stories, and no
leak."""

from __future__ import annotations

import random

import pytest
import turnwise
from turnwise.engine.environments.registry import make_env
from turnwise.envs import maze, support_desk, twenty_questions
from turnwise.envs.support_desk import RESOLUTIONS, SupportDesk, draw_story

DESK = "turnwise/SupportDesk-v0"


def play(env: str, player: object, count: int, **options: object) -> list[turnwise.Episode]:
    chosen = [(s, 0) for s in turnwise.starts(env, 5, count, options)]
    return turnwise.rollout(turnwise.ScriptPlayer(player), chosen)  # type: ignore[arg-type]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_desk_players_are_as_good_as_they_claim(split: str) -> None:
    expert = play(DESK, "expert", 200, split=split)
    assert all(e.env_return == e.info["optimum"] == 1.0 for e in expert)
    demonstrator = mean([e.env_return for e in play(DESK, "demonstrator", 400, split=split)])
    chance = mean([e.env_return for e in play(DESK, "random", 400, split=split)])
    assert 0.35 < demonstrator < 0.55
    assert chance < 0.2


def test_desk_demonstrators_show_every_reply() -> None:
    said = {t.action for e in play(DESK, "demonstrator", 1500) for t in e.turns}
    everything = {
        s for group in (*support_desk.QUESTIONS.values(), *RESOLUTIONS.values()) for s in group
    }
    assert said == everything


def test_desk_splits_are_disjoint_in_content_and_large() -> None:
    rng = random.Random(0)
    stories = {held: [draw_story(rng, held) for _ in range(12_000)] for held in (False, True)}
    content = {
        held: {(s.item, s.words["what"], s.words["when"]) for s in some}
        for held, some in stories.items()
    }
    assert not content[True] & content[False]
    distinct = {(s.item, *sorted(s.words.items()), *sorted(s.opening)) for s in stories[False]}
    assert len(distinct) >= 10_000


def talk(seed_of: str, *replies: str) -> tuple[float, list[str], dict]:
    """Plays given replies against the first story of a kind; the last reward, what the customer
    said, and the info."""
    env = SupportDesk()
    for seed in range(10_000):
        env.reset(seed=seed)
        if env.story.facts["what"] == seed_of and not env.story.opening:
            break
    said = []
    for reply in replies:
        observation, reward, terminated, _, info = env.step(reply)
        said.append(observation)
        if terminated:
            break
    return reward, said, info


def test_desk_counts_questions() -> None:
    right = {"sealed": "refund", "opened": "store credit"}
    for box, wanted in right.items():
        env = SupportDesk()
        env.reset(seed=0)
        env.story = support_desk.Story(
            "lamp", {"what": "regret", "when": "days", "wish": "new", "box": box},
            {"what": "I changed my mind.", "when": "I ordered it last week.",
                "wish": "I want another one.", "box": "The box."},
            frozenset({"what"}),
        )  # fmt: skip
        env._known, env._patience = {"what"}, 3
        assert env.step("Is the box sealed?")[0] == "The box."
        _, reward, terminated, _, info = env.step(f"I give you a {wanted}.")
        assert (reward, terminated, info["success"], info["needless"]) == (1.0, True, True, 0)


def test_desk_needless_and_repeated_questions_cost() -> None:
    reward, _, info = talk(
        "broken",
        "What happened?",
        "When did you buy it?",
        "What happened?",
        "Do you want a refund?",
    )
    assert (info["questions"], info["needless"], info["repeated"]) == (4, 1, 1)
    reward, said, info = talk("broken", *["What happened?"] * 6)
    assert said[-1] == support_desk.LEAVES
    assert (reward, info["success"]) == (0.0, False)


def test_desk_cannot_be_gamed_by_saying_everything() -> None:
    everything = " ".join(s[0] for s in RESOLUTIONS.values())
    reward, _said, info = talk("lost", *[everything] * 5)
    assert reward == 0.0
    assert not info["success"]
    reward, _, _ = talk(
        "lost", "What happened, when, what would you like, was the box open?", everything
    )
    assert reward == 0.0


def test_desk_refuses_unknown_options() -> None:
    for options in ({"split": "test"}, {"spilt": "train"}):
        with pytest.raises(ValueError, match="held_out"):
            SupportDesk().reset(seed=0, options=options)


@pytest.mark.parametrize(("size", "layout"), [(2, 0), (4, 0), (5, 3), (8, 1)])
def test_maze_optimum_is_the_experts_and_nobody_beats_it(size: int, layout: int) -> None:
    env = maze.Maze(size, layout)
    assert set(env.distances) == set(env.doors), "every cell reaches the exit"
    chosen = [
        (s, 0)
        for s in turnwise.starts("turnwise/Maze-v0", 1, 60, kwargs={"size": size, "layout": layout})
    ]
    expert = turnwise.rollout(turnwise.ScriptPlayer("expert"), chosen)
    for e in expert:
        if e.ending == "terminated":
            assert e.env_return == e.info["optimum"]
    for e in turnwise.rollout(turnwise.ScriptPlayer("random"), chosen):
        assert e.env_return <= e.info["optimum"]


def test_maze_walls_and_words() -> None:
    env = make_env("turnwise/Maze-v0").unwrapped
    env.reset(seed=0)
    env.cell = (0, 0)
    assert env.step("north")[0].startswith("There is a wall.")
    assert env.step("I go north and south.")[0].startswith("Say one direction.")
    assert env.step("banana")[1] == -1.0
    with pytest.raises(ValueError, match="2 to 8"):
        maze.Maze(9)


def test_maze_unobserved_names_no_cell_and_the_exit_pays_alone() -> None:
    for e in play("turnwise/MazePO-v0", "expert", 30):
        assert all("row" not in t.observation.content for t in e.turns)
        assert e.env_return == e.info["optimum"]
    chosen = [
        (s, 0)
        for s in turnwise.starts("turnwise/Maze-v0", 1, 60, kwargs={"reward": "exit", "steps": 4})
    ]
    for player in ("expert", "random"):
        for e in turnwise.rollout(turnwise.ScriptPlayer(player), chosen):
            assert e.ending == "terminated"
            assert len(e.turns) <= 4
            assert e.env_return == float(bool(e.success)) <= e.info["optimum"]
            assert [t.reward for t in e.turns[:-1]] == [0.0] * (len(e.turns) - 1)
            if player == "expert":
                assert e.env_return == e.info["optimum"]
    with pytest.raises(ValueError, match="'steps' or 'exit'"):
        maze.Maze(reward="gold")  # type: ignore[arg-type]


def test_questions_tell_all_things_apart_and_are_understood() -> None:
    signatures = {
        tuple(twenty_questions.answers(thing).values()) for thing in twenty_questions.THINGS
    }
    assert len(signatures) == len(twenty_questions.THINGS) >= 60
    for word, (question, having) in twenty_questions.PROPERTIES.items():
        assert twenty_questions.named(question) == [word]
        assert having <= set(twenty_questions.THINGS)
    for thing in twenty_questions.THINGS:
        assert twenty_questions.named(twenty_questions.guess(thing)) == [thing]


def test_questions_players_and_what_is_paid() -> None:
    expert, demonstrator, chance = (
        play("turnwise/TwentyQuestions-v0", p, 100) for p in ("expert", "demonstrator", "random")
    )
    assert all(e.success for e in expert)
    assert mean([len(e.turns) for e in expert]) < 8
    means = [mean([e.env_return for e in each]) for each in (expert, demonstrator, chance)]
    assert means[0] > 0.8 > 0.7 > means[1] > 0.4 > 0 > means[2]
    for e in (*expert, *demonstrator, *chance):
        assert all(t.reward == 0 for t in e.turns[:-1])
        assert e.env_return == pytest.approx(float(bool(e.success)) - 0.02 * len(e.turns))
    env = make_env("turnwise/TwentyQuestions-v0", questions=3, things=2).unwrapped
    env.reset(seed=0)
    env.thing = "dog"
    assert [env.step(said)[0] for said in ("Is it alive or red?", "hm")] == [
        "Ask about one thing at a time.",
        "I do not know what that means.",
    ]
    assert env.step("Is it the cat?")[:3] == (
        "No more questions. It was the dog.",
        pytest.approx(-0.06),
        True,
    )
    with pytest.raises(ValueError, match="2 to 64"):
        twenty_questions.TwentyQuestions(things=65)


@pytest.mark.parametrize(
    "env", ["turnwise/TwentyQuestions-v0", "turnwise/MazePO-v0", "turnwise/Maze-v0", DESK]
)
def test_the_checker_finds_nothing_wrong(env: str) -> None:
    assert turnwise.check_environment(env, episodes=8) == []
