"""How failures of others are worded: one printable line without secrets; and what hangs or ends the
process costs its own answer."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import turnwise
from hypothesis import given
from hypothesis import strategies as st
from support.echo import ECHO
from support.rating import groups
from test_cli import call
from turnwise.engine.errors import PartFailed
from turnwise.engine.feedback import judge_source
from turnwise.engine.feedback.sources import Sources
from turnwise.engine.util.wording import LONGEST, one_line, reason_text, tried, worded

KEY = "corpgw-SECRET-abcdef0123456789"


@given(st.text())
def test_a_reason_is_one_printable_line_of_limited_length(text: str) -> None:
    line = reason_text(text * 3)
    line.encode()
    assert len(line) <= LONGEST
    assert not set(line) & {"\n", "\r", "\x1b", "\x00", "\u202e", "\u2028"}


def test_what_others_say_steers_no_terminal() -> None:
    assert (
        one_line("\x1b[2J\r\nturnwise: all is well \u202e\ud800")
        == r"\x1b[2J\r\nturnwise: all is well \u202e\ud800"
    )
    assert reason_text("x" * 10_000_000).endswith("... (10,000,000 characters)")


def test_an_exception_whose_text_cannot_be_read_is_named() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    assert worded(Mute()) == "Mute: (its message cannot be read)"


def test_a_reason_names_the_line_that_called_a_library() -> None:
    with pytest.raises(ValueError, match="Expecting") as raised:
        json.loads("{")  # raised in the standard library
    assert re.search(r"\(test_wording\.py:\d+\)$", worded(raised.value))


def play(player: Callable[..., Any], env: str = ECHO) -> turnwise.Episode:
    [episode] = turnwise.rollout(
        turnwise.ScriptPlayer(player), [(turnwise.starts(env, 1, 1)[0], 0)]
    )
    return episode


def test_players_may_be_coroutines_and_fail_like_environments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def refused(said: Any) -> str:
        raise RuntimeError(f"Error code: 401 - Incorrect API key provided: {KEY}")

    async def later(said: Any) -> str:
        await asyncio.sleep(0)
        return "eee"

    failed = play(refused)
    assert failed.ending == "failed"
    assert "player: RuntimeError: Error code: 401" in failed.reason
    assert KEY not in failed.reason
    assert [t.action for t in play(later).turns] == ["eee"] * 3
    nothing = play(lambda said: None)
    assert (nothing.ending, "the reply is NoneType, not str" in nothing.reason) == ("failed", True)


def ends(episodes: Any) -> Any:
    raise SystemExit("missing licence")


def gives(**fields: Any) -> Callable[[Any], Any]:
    return lambda episode: turnwise.Feedback(episode.id, score=1.0, **fields)


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (gives(comment=None), "comment must be text, got NoneType"),
        (gives(comment=5), "comment must be text, got int"),
        (ends, "SystemExit: missing licence"),
    ],
)
def test_a_judge_that_breaks_costs_its_own_answer(
    judge: Any, reason: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def sometimes(episode: turnwise.Episode) -> Any:
        return judge(episode) if episode.slot == 0 else float(episode.slot)

    rl = {
        "env": ECHO,
        "updates": 1,
        "groups": 2,
        "group_size": 3,
        "max_new_tokens": 4,
        "feedback": [sometimes],
    }
    run = turnwise.Run(
        {"policy": str(model_folder()), "stages": [{"rl": rl}]}, folder=tmp_path / "r"
    ).finish()
    answers = run.ledger.feedback(sorted({e.group for e in run.ledger.run_episodes(run.id)}))
    assert sorted(a.status for a in answers) == ["failed"] * 2 + ["scored"] * 4
    assert all(reason in a.reason for a in answers if a.status == "failed")


def test_a_judge_that_hangs_fails_and_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_source, "LIMIT", 0.2)
    episode = play(lambda said: "x")

    class Sleeps(turnwise.Judge):
        async def score(self, episodes: Any) -> list[turnwise.Feedback]:
            await asyncio.sleep(3600)
            return []

    class Blocks(turnwise.Judge):
        async def score(self, episodes: Any) -> list[turnwise.Feedback]:
            time.sleep(3)
            return []

    class Fine(turnwise.Judge):
        async def score(self, episodes: Any) -> list[turnwise.Feedback]:
            await asyncio.sleep(0)
            return [turnwise.Feedback(e.id, score=1.0) for e in episodes]

    for hanging in (Sleeps(), Blocks()):
        with pytest.warns(
            RuntimeWarning,
            match=rf"judge {type(hanging).__name__}: no answer within 0\.2 s; a coroutine",
        ):
            answers = judge_source.ask_judge(hanging, [episode] * 4)
        late = ("failed", "no answer within 0.2 s")
        assert [(a.status, a.reason) for a in answers] == [late] * 4
    monkeypatch.setattr(judge_source, "LIMIT", 60.0)
    assert [a.status for a in judge_source.ask_judge(Fine(), [episode])] == ["scored"]


def test_a_judge_that_hangs_on_one_episode_answers_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(judge_source, "LIMIT", 0.5)
    episodes = [play(lambda said: "x"), play(lambda said: "hang"), play(lambda said: "y")]

    async def judge(episode: turnwise.Episode) -> float:
        await asyncio.sleep(3600 if episode.turns[0].action == "hang" else 0)
        return 1.0

    with pytest.warns(RuntimeWarning, match="judge judge: no answer within"):
        answers = judge_source.ask_judge(judge_source.FunctionJudge(judge), episodes)
    assert [a.status for a in answers] == ["scored", "failed", "scored"]


def test_a_function_that_takes_long_is_named_and_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(judge_source, "LIMIT", 0.1)

    def slow(episode: turnwise.Episode) -> float:
        time.sleep(1.0)
        return 1.0

    with pytest.warns(
        RuntimeWarning, match="judge slow: no answer within .* a function is waited for"
    ):
        [answer] = judge_source.ask_judge(
            judge_source.FunctionJudge(slow), [play(lambda said: "x")]
        )
    assert answer.score == 1.0


def deep() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(20_000):
        found = {"in": found}
    return found


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"status": "fine"}, "status must be one of scored, abstained, failed, got 'fine'"),
        ({"id": 7}, "id must be text, got int"),
        ({"supersedes": 7}, "supersedes must be the id of a feedback, got int"),
        ({"supersedes": "abc"}, "it corrects an earlier answer"),
        ({"stamp": None}, "stamp must be a Stamp, got NoneType"),
        ({"details": deep()}, "`shown` or `details` is not plain JSON data"),
    ],
)
def test_a_field_that_is_not_what_it_must_be_costs_the_answer(
    fields: dict[str, Any], reason: str
) -> None:
    [answer] = judge_source.ask_judge(
        judge_source.FunctionJudge(gives(**fields)), [play(lambda said: "x")]
    )
    assert answer.status == "failed"
    assert reason in answer.reason


def test_a_failure_without_words_is_a_failure() -> None:
    def silent() -> None:
        raise PartFailed("")

    assert tried(silent) == (None, "PartFailed")


def test_a_judges_own_ids_do_not_collide() -> None:
    episodes = [episode for members in groups(1, 2).values() for episode in members]
    one, other = judge_source.ask_judge(judge_source.FunctionJudge(gives(id="mine")), episodes)
    assert one.id != other.id


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "it gave NoneType, neither Feedback nor Comparison"),
        (SystemExit("bye"), "SystemExit: bye"),
    ],
)
def test_a_source_that_gives_no_answers_is_not_heard(given: Any, said: str, tmp_path: Path) -> None:
    class Odd(turnwise.FeedbackSource):
        def request(self, requests: Any) -> None:
            pass

        def receive(self) -> list[Any]:
            if given is not None:
                raise given
            return [given]

    ledger = turnwise.Ledger(tmp_path / "l.sqlite")
    sources = Sources.make([[Odd()]], turnwise.Plugins(), 1.0)
    with pytest.warns(UserWarning, match=said):
        assert sources.receive(ledger) == []
    ledger.close()


def test_half_a_character_in_somebodys_words_stops_no_report(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def odd(episode: turnwise.Episode) -> turnwise.Feedback:
        if episode.slot:
            return turnwise.Feedback(
                episode.id, score=1.0, comment="fine \ud800", details={"why": ["\udfff"]}
            )
        return turnwise.Feedback.failed(episode.id, "bad \ud800 \x1b[31m")

    rl = {
        "env": ECHO,
        "updates": 1,
        "groups": 2,
        "group_size": 2,
        "max_new_tokens": 4,
        "feedback": [odd],
    }
    config = {"policy": str(model_folder()), "name": "r", "stages": [{"rl": rl}]}
    run = turnwise.Run(config, folder=tmp_path / "r").finish()
    answers = run.ledger.feedback(sorted({e.group for e in run.ledger.run_episodes(run.id)}))
    assert {a.reason for a in answers if a.status == "failed"} == {r"bad \ud800 \x1b[31m"}
    assert {a.comment for a in answers if a.status == "scored"} == {r"fine \ud800"}
    for command in ("report", "judges"):
        done = call(command, str(tmp_path / "r"))
        assert done.returncode == 0, done.stderr
        assert "\x1b[31m" not in done.stdout


def test_keys_in_what_an_environment_notes_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    import gymnasium

    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    class Tells(gymnasium.Env):
        observation_space = action_space = turnwise.Text(1000)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return "hi", {"at reset": f"key {KEY}"}

        def step(self, action: str) -> Any:
            return "bye", 1.0, True, False, {"calls": [{"header": KEY}]}

    gymnasium.register("test/Tells-v0", Tells)
    episode = play(lambda said: "x", "test/Tells-v0")
    gymnasium.registry.pop("test/Tells-v0")
    assert KEY not in json.dumps(episode.to_dict())
