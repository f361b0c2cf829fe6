"""The stage `revise`: replies are criticised and revised inside conversations, and `sft` trains on
what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import turnwise
from turnwise.engine.errors import TooManyFailures
from turnwise.judges.constitutional.constitution import Constitution
from turnwise.judges.models.model import Model, ModelError, Prompt, Reply, Usage

PARROT = "test/Parrot-v0"


class Parrot(gymnasium.Env):
    """Says again what it heard, three times; pays for words that the policy would not say by
    itself."""

    observation_space = action_space = turnwise.Text(10_000)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.heard: list[str] = []
        return f"hello {seed}", {"system": "say something"}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.heard.append(action)
        return f"you said: {action}", float("please" in action), len(self.heard) == 3, False, {}


gymnasium.register(PARROT, Parrot)

CONSTITUTION = """\
---
name: manners
principles:
  - name: polite
    critique: Is a word of courtesy missing?
    revise: Add one.
  - name: short
    critique: Is it longer than need be?
    revise: Shorten it.
---
Manners matter.
"""


class Simulated(Model):
    """A critic that adds "please", or makes nothing of it. It fails, refuses or talks nonsense
    about drafts that a test names.

    Attributes:
        asked: data and question of every request.
    """

    name, settings = "test:critic", {"kind": "simulated"}

    def __init__(self, answers: Callable[[Mapping[str, Any], str], Any] | None = None) -> None:
        self.asked: list[tuple[dict[str, Any], str]] = []
        self.answers = answers or (lambda data, question: None)

    async def ask(self, prompt: Prompt) -> Reply:
        [(nonce, text)] = re.findall(r"<draft-(\w+)>\n(.*)\n</draft-\1>", prompt.user)
        assert f"The code is {nonce}." in prompt.user
        data, question = json.loads(text), prompt.user.split("<draft-")[0]
        self.asked.append((data, question))
        said = self.answers(data, question)
        if isinstance(said, ModelError):
            raise said
        if isinstance(said, Reply):
            return said
        polite = "courtesy" in question
        answer = {
            "answer_id": prompt.bound["properties"]["answer_id"]["enum"][0],
            "critique": "No courtesy in it." if polite else "Fine.",
            "change": polite,
            "revision": f"please {data['draft']}" if polite else "never used",
            **(said or {}),
        }
        return Reply("end", json.dumps(answer), Usage(fresh=100, output=10))


@pytest.fixture
def constitution(tmp_path: Path) -> Path:
    path = tmp_path / "manners.md"
    path.write_text(CONSTITUTION)
    return path


def polite(constitution: Path) -> Constitution:
    """Its first principle alone."""
    whole = Constitution.load(constitution, ["critique", "revise"])
    return Constitution(whole.name, whole.principles[:1], whole.text)


def config(
    model: Path, critic: Mapping[str, Any], *more: dict[str, Any], **revise: Any
) -> dict[str, Any]:
    stage = {
        "env": PARROT,
        "updates": 2,
        "groups": 4,
        "max_new_tokens": 6,
        "critic": dict(critic),
        **revise,
    }
    return {"policy": str(model), "threads": 1, "stages": [{"revise": stage}, *more]}


def notes(run: turnwise.Run) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """What stands on disk: the rounds of every reply, later lines over earlier ones."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for file in sorted((run.folder / "revise").glob("revisions-*.jsonl")):
        for line in filter(None, file.read_text().splitlines()):
            each = json.loads(line)
            found[each["episode"], each["turn"]] = each["rounds"]
    return found


def written(run: turnwise.Run) -> list[dict[str, Any]]:
    files = sorted((run.folder / "revise").glob("update-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_the_environment_hears_the_revision(
    model_folder: Callable[..., Path], tmp_path: Path, constitution: Path
) -> None:
    critic = Simulated()
    run = turnwise.Run(
        config(model_folder(), {"model": critic, "constitution": polite(constitution)}),
        folder=tmp_path / "r",
    ).finish()
    episodes = run.ledger.run_episodes(run.id)
    assert len(episodes) == 8
    kept = notes(run)
    assert len(kept) == len(critic.asked) == 24
    for e in episodes:
        assert [t.reward for t in e.turns] == [1.0, 1.0, 1.0]
        for k, turn in enumerate(e.turns):
            [only] = kept[e.id, k]
            assert (only["principle"], only["critique"], only["status"]) == (
                "polite",
                "No courtesy in it.",
                "scored",
            )
            assert turn.action == only["revision"] == f"please {only['draft']}".strip()
            assert turn.action_ids is None, "the policy sampled the draft, not this"
        heard = [t.observation.content for t in e.turns[1:]] + [e.final.content if e.final else ""]
        assert heard == [f"you said: {t.action}" for t in e.turns]
    # The next draft is made, and criticised, after what was really said.
    later = [data["conversation"] for data, _ in critic.asked if len(data["conversation"]) > 2]
    assert len(later) == 16
    assert all(
        m["text"].startswith("please ") for said in later for m in said if m["from"] == "assistant"
    )
    assert [m["changed"] for m in run.metrics] == [1.0, 1.0]
    assert run.metrics[0]["return"] == 3.0
    # What is written down is what was said, up to the last reply.
    assert sorted(json.dumps(c["messages"]) for c in written(run)) == sorted(
        json.dumps([{"role": m.role, "content": m.content} for m in e.messages[:-1]])
        for e in episodes
    )
    assert written(run)[0]["messages"][0] == {"role": "system", "content": "say something"}


def test_every_round_has_a_principle_of_its_own(
    model_folder: Callable[..., Path], tmp_path: Path, constitution: Path
) -> None:
    critic = Simulated()
    given = {"model": critic, "constitution": str(constitution), "rounds": 2}
    run = turnwise.Run(config(model_folder(), given, updates=1), folder=tmp_path / "r").finish()
    orders = set()
    for rounds in notes(run).values():
        first, second = rounds
        assert {first["principle"], second["principle"]} == {"polite", "short"}
        assert second["draft"] == first["revision"], "the second round revises what the first made"
        by = {r["principle"]: r for r in rounds}
        assert (by["polite"]["changed"], by["short"]["changed"]) == (True, False)
        assert by["short"]["revision"] == by["short"]["draft"], (
            "what need not be changed is kept word for word"
        )
        orders.add(first["principle"])
    assert orders == {"polite", "short"}, "which comes first is drawn"
    assert run.metrics[0]["changed"] == 0.5
    assert all(
        ("courtesy" in question) != ("longer than" in question) for _, question in critic.asked
    ), "one principle at a time"


BAD = [
    ("refused", Reply("refused", "", reason="I would rather not"), "refused"),
    ("failed", ModelError("request", "too long"), "critic_failures"),
    ("failed", Reply("end", "I think it is fine."), "critic_failures"),
    ("failed", {"answer_id": "zzzz"}, "critic_failures"),
    ("failed", {"change": "yes"}, "critic_failures"),
    ("failed", {"revision": " "}, "critic_failures"),
]


@pytest.mark.parametrize(("what", "answer", "metric"), BAD)
def test_a_conversation_the_critic_did_not_revise_is_left_out(
    what: str,
    answer: Any,
    metric: str,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    constitution: Path,
) -> None:
    """It fails once, in the second turn of one conversation; that one is played on with the draft
    and is no data."""
    bad: list[str] = []

    def answers(data: Mapping[str, Any], question: str) -> Any:
        if len(data["conversation"]) == 4 and not bad:
            bad.append(data["conversation"][1]["text"])
        return (
            answer
            if len(data["conversation"]) == 4 and data["conversation"][1]["text"] in bad
            else None
        )

    given = {"model": Simulated(answers), "constitution": polite(constitution), "concurrency": 1}
    run = turnwise.Run(config(model_folder(), given, updates=1), folder=tmp_path / "r").finish()
    assert (
        run.metrics[0]["episodes"],
        run.metrics[0]["conversations"],
        run.metrics[0][metric],
    ) == (4.0, 3.0, 1.0)
    [(episode, turn)] = [
        key for key, rounds in notes(run).items() if rounds[-1]["status"] != "scored"
    ]
    assert turn == 1
    assert notes(run)[episode, 1][0]["reason"], "why is on disk"
    [left_out] = [e for e in run.ledger.run_episodes(run.id) if e.id == episode]
    assert left_out.turns[1].action == notes(run)[episode, 1][0]["draft"]
    assert len(written(run)) == 3
    assert bad[0] not in json.dumps(written(run))


def questions(critic: Simulated) -> set[str]:
    """What it was asked, without the codes that are drawn anew for every request."""
    codes = r"\b[0-9a-f]{16}\b|id of your answer is \w+"
    return {json.dumps([data, re.sub(codes, "", question)]) for data, question in critic.asked}


def test_a_run_that_was_killed_gives_the_same_and_asks_nothing_twice(
    model_folder: Callable[..., Path], tmp_path: Path, constitution: Path
) -> None:
    plain = Simulated()
    given = lambda model: {  # noqa: E731
        "model": model,
        "constitution": str(constitution),
        "rounds": 2,
    }
    whole = turnwise.Run(
        config(model_folder(), given(plain)), folder=tmp_path / "whole" / "r"
    ).finish()

    class Killed(BaseException):
        pass

    for last in (5, 29):  # in the first round; in the second
        home = tmp_path / f"killed-{last}"
        first = Simulated()

        def answers(
            data: Mapping[str, Any], question: str, first: Simulated = first, last: int = last
        ) -> Any:
            if len(first.asked) > last:
                raise Killed
            return None

        first.answers = answers
        with pytest.raises(Killed):
            turnwise.Run(config(model_folder(), given(first)), folder=home / "r").finish()
        second = Simulated()
        resumed = turnwise.Run(
            config(model_folder(), given(second)), folder=home / "r", resume=True
        ).finish()
        del first.asked[last:]
        assert not questions(first) & questions(second), "what was answered is not asked again"
        assert len(first.asked) + len(second.asked) == len(plain.asked)
        assert written(resumed) == written(whole)
        assert {k: [{**r, "cost": 0} for r in v] for k, v in notes(resumed).items()} == {
            k: [{**r, "cost": 0} for r in v] for k, v in notes(whole).items()
        }


def test_a_critic_that_is_down_ends_the_round_before_it_counts(
    model_folder: Callable[..., Path], tmp_path: Path, constitution: Path
) -> None:
    """What it could not say is asked again when it is up; a round that was recorded with failures
    would stay so."""
    down = Simulated(
        lambda data, question: (
            ModelError("request", "out of order") if len(data["conversation"]) > 2 else None
        )
    )
    given = lambda model: {"model": model, "constitution": polite(constitution)}  # noqa: E731
    with pytest.raises(
        TooManyFailures, match="failed in 3 conversations.*out of order.*Go on when it answers"
    ):
        turnwise.Run(config(model_folder(), given(down), updates=1), folder=tmp_path / "r").finish()
    up = Simulated()
    run = turnwise.Run(
        config(model_folder(), given(up), updates=1), folder=tmp_path / "r", resume=True
    ).finish()
    assert run.metrics[0]["conversations"] == 4.0
    assert all(len(data["conversation"]) > 2 for data, _ in up.asked), (
        "the first replies were known"
    )


def test_a_budget_pauses_the_run(
    model_folder: Callable[..., Path], tmp_path: Path, constitution: Path
) -> None:
    critic = Simulated()
    price = {
        "budget": 0.033,
        "prices": {"test:critic": [10.0, 10.0]},
    }  # a tenth of a cent each; put aside is the most that one can cost
    given = {"model": critic, "constitution": polite(constitution), **price}
    run = turnwise.Run(config(model_folder(), given, updates=1), folder=tmp_path / "r").finish()
    assert "budget" in run.paused
    assert 0 < len(critic.asked) < 12
    more = {**given, "model": Simulated(), "budget": 10.0}
    done = turnwise.Run(
        config(model_folder(), more, updates=1), folder=tmp_path / "r", resume=True
    ).finish()
    assert len(critic.asked) + len(more["model"].asked) == 12
    assert done.metrics[0]["conversations"] == 4.0


def test_sft_trains_on_the_revisions(
    model_folder: Callable[..., Path], tmp_path: Path, constitution: Path
) -> None:
    sft = {"stage": "revise", "epochs": 12, "lr": 1e-2, "warmup": 0, "batch_size": 8}
    answers = lambda data, question: {"revision": "please", "change": True}  # noqa: E731
    given = {"model": Simulated(answers), "constitution": polite(constitution)}
    run = turnwise.Run(
        config(model_folder(), given, {"sft": sft}, groups=8), folder=tmp_path / "r"
    ).finish()
    learned = [m for m in run.metrics if m["stage"] == "sft"]
    assert learned[0]["conversations"] == 16.0
    player = turnwise.PolicyPlayer(run.policy, turnwise.Sampling(1.0, 6))
    played = turnwise.rollout(player, [(s, 0) for s in turnwise.starts(PARROT, 99, 10)])
    assert sum(t.action == "please" for e in played for t in e.turns) > 20, [
        t.action for e in played for t in e.turns
    ]


def test_what_cannot_work_is_said_before_the_run(
    model_folder: Callable[..., Path], tmp_path: Path, constitution: Path
) -> None:
    def run(critic: Any, *more: dict[str, Any], **revise: Any) -> turnwise.Run:
        stages = config(model_folder(), {}, *more, **revise)
        stages["stages"][0]["revise"]["critic"] = critic
        return turnwise.Run(stages, folder=tmp_path / "never")

    good = {"model": Simulated(), "constitution": str(constitution)}
    with pytest.raises(
        turnwise.ConfigError,
        match="no stage 'revice' before this one writes.* Did you mean 'revise'",
    ):
        run(good, {"sft": {"stage": "revice"}})
    with pytest.raises(
        turnwise.ConfigError,
        match=r"no stage 'rank' before this one writes conversations down. Known: revise",
    ):
        run(good, {"sft": {"stage": "rank"}})
    with pytest.raises(turnwise.ConfigError, match="give one of `data`"):
        run(good, {"sft": {"stage": "revise", "env": PARROT}})
    with pytest.raises(
        turnwise.PluginError, match="revise.critic has no option 'rouns'. Did you mean 'rounds'"
    ):
        run({**good, "rouns": 2})
    with pytest.raises(turnwise.PluginError, match="needs the option 'model'"):
        run({"constitution": str(constitution)})
    with pytest.raises(turnwise.ConfigError, match="rounds must lie in 1 to 2"):
        run({**good, "rounds": 3})
    with pytest.raises(turnwise.ConfigError, match="cannot read .*gone.md"):
        run({**good, "constitution": str(tmp_path / "gone.md")})
    comparing = tmp_path / "comparing.md"
    comparing.write_text(
        "---\nname: c\nprinciples:\n  - name: kind\n    better: Which is kinder?\n---\n"
    )
    with pytest.raises(turnwise.ConfigError, match="the principle 'kind' needs `critique`"):
        run({**good, "constitution": str(comparing)})
    comparing.write_text(CONSTITUTION.replace("short", "polite"))
    with pytest.raises(
        turnwise.ConfigError, match="principles: .*two principles share a name: polite, polite"
    ):
        run({**good, "constitution": str(comparing)})
    with pytest.raises(turnwise.ConfigError, match="must be a mapping with model and constitution"):
        run("openai:gpt-5-mini")
    assert not (tmp_path / "never").exists()
