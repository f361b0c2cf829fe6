"""What is said of judges after a run (`turnwise judges`, the report) and before it (`turnwise
estimate`); scores at equal length."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import turnwise
import typer
import yaml
from support.command import Command
from support.echo import ECHO
from support.episodes import conversation
from support.judges import bound
from support.model_server import Fault, ModelServer, example
from turnwise.engine.ledger.ledger import Ledger
from turnwise.engine.protocols import Context
from turnwise.engine.records.episode import Episode
from turnwise.engine.records.feedback import Comparison, Feedback, Request, Stamp
from turnwise.engine.report.page import write_report
from turnwise.judges.commands.audit import audit
from turnwise.judges.commands.estimate import estimate
from turnwise.judges.llm.pairwise import PairwiseJudge
from turnwise.judges.llm.rubric_judge import RubricJudge
from turnwise.judges.models.model import Model, Prompt, Reply, Usage
from turnwise.plugins.combiners.weighted import Weighted
from typer.testing import CliRunner


def command(arguments: list[str], plugins: turnwise.Plugins) -> str:
    """What a command of the plugins prints."""
    app = typer.Typer()
    plugins.call_commands(app)
    done = CliRunner().invoke(app, arguments, obj=plugins)
    assert done.exit_code == 0, done.output
    return done.stdout


def wordy(
    i: int, words: int, *, group: int = 0, sampled: bool = False, heard: str = "Hello?"
) -> Episode:
    """Builds a conversation by the length of its reply, which the judges here look at."""
    return conversation(
        " ".join(["word"] * words),
        heard=heard,
        id=f"{i:016x}",
        env="test/Talk",
        seed=group,
        slot=i,
        action_ids=(5,) if sampled else None,
        logprobs=(-1.0,) if sampled else None,
    )


def answered(asked: Any) -> dict[str, Any]:
    fields = bound(asked)["properties"]
    levels = dict.fromkeys(fields["levels"]["properties"], 3)
    return {
        "verdict_id": fields["verdict_id"]["enum"][0],
        "rationale": "fine",
        "abstain": False,
        "levels": levels,
    }


def test_the_judges_of_a_run_are_shown_with_their_failures_and_their_spend(
    model_folder: Any, tmp_path: Path
) -> None:
    with ModelServer(answered) as server:
        chance, server.prefix = random.Random(0), 512
        server.faults = lambda asked: Fault("refusal") if chance.random() < 0.3 else None
        model = {"provider": "openai", "model": "gpt-5-mini", "url": f"{server.url}/v1"}
        feedback = [
            {
                "judge": "rubric",
                "name": "good",
                "model": model,
                "rubric": "Was it good?",
                "cache": False,
                "canaries": 0,
            }
        ]
        stage = {
            "env": ECHO,
            "updates": 2,
            "groups": 4,
            "group_size": 4,
            "max_new_tokens": 5,
            "poll": 0,
            "feedback": feedback,
        }
        run = turnwise.Run(
            {"policy": str(model_folder()), "stages": [{"rl": stage}]}, folder=tmp_path / "run"
        ).finish()
        shown = command(["judges", str(tmp_path / "run"), "--json"], run.plugins)
        sections = {s["title"]: s for s in json.loads(shown)}
        [who] = (
            dict(zip(sections["Answers by source"]["columns"], row, strict=True))
            for row in sections["Answers by source"]["rows"]
        )
        [what] = (
            dict(zip(sections["What was asked of models"]["columns"], row, strict=True))
            for row in sections["What was asked of models"]["rows"]
        )
        answers = run.ledger.feedback(run=run.id, late=True)
        refused = sum(a.status == "abstained" for a in answers)
        assert 0 < refused < 32
        assert (who["source"], who["answers"], who["abstained"], who["failed"]) == (
            "good",
            "32",
            str(refused),
            "0 (0.0%)",
        )
        assert who["why not"] == f"refused ({refused})"
        assert int(what["requests"]) == server.count()
        fresh, cached = server.tokens.input - server.tokens.cached, server.tokens.cached
        assert cached > 0  # instructions and schema are the same in every call
        billed = (fresh * 0.25 + cached * 0.025 + server.tokens.output * 2.0) / 1e6
        assert float(what["dollars"]) == pytest.approx(billed, abs=6e-5)
        write_report(tmp_path / "run")
        page = (tmp_path / "run" / "report.html").read_text()
        assert "What was asked of models" in page
        assert f"refused ({refused})" in page


def test_judges_are_held_against_people_and_biases_are_named(tmp_path: Path) -> None:
    ledger, chance = Ledger(tmp_path / "ledger.sqlite"), random.Random(1)
    episodes = [wordy(i, chance.randrange(2, 30), group=i // 4) for i in range(200)]
    ledger.add_episodes(episodes)
    said: list[Any] = []
    for e in episodes:
        length, true = len(e.turns[0].action.split()), chance.gauss(0.5, 0.1)
        told = true + 0.02 * length + chance.gauss(0, 0.02)
        said.append(
            Feedback(e.id, score=told, id=f"j{e.id}", stamp=Stamp(source="judge", version="v1"))
        )
        said.append(
            Feedback(e.id, score=true, id=f"p{e.id}", stamp=Stamp(source="people", rater="ann"))
        )
    ledger.add_feedback(said)
    sections = {s.title: s for s in audit(ledger, "run")}
    assert any(
        "judge (v1)" in line and "characters" in line for line in sections["Biases of judges"].lines
    )
    assert (
        "judge: people (people) scored 200 of the 200 episodes that it judged."
        in sections["Judges against people"].lines
    )
    assert any("scores too high" in line for line in sections["Judges against people"].lines)
    with pytest.raises(LookupError, match="Did you mean 'people'"):
        audit(ledger, "run", people=["peple"])


def test_a_judge_that_prefers_its_own_family_is_named(tmp_path: Path) -> None:
    """Half of the conversations were sampled by the policy; people like both alike, the judge
    prefers the policy's."""
    ledger, chance = Ledger(tmp_path / "ledger.sqlite"), random.Random(2)
    episodes = [
        wordy(i, 5 + chance.randrange(5), group=i // 2, sampled=i % 2 == 0) for i in range(400)
    ]
    ledger.add_episodes(episodes)
    said: list[Any] = []
    for own, other in zip(episodes[::2], episodes[1::2], strict=True):
        worth = {e.id: chance.gauss(0, 1) for e in (own, other)}
        said += [
            Feedback(i, score=w, id=f"p{i}", stamp=Stamp(source="people", rater="ann"))
            for i, w in worth.items()
        ]
        better = own.id if chance.random() < 0.5 else max(worth, key=lambda i: worth[i])
        worse = other.id if better == own.id else own.id
        shown = {"order": [own.id, other.id] if chance.random() < 0.5 else [other.id, own.id]}
        said.append(
            Comparison(
                own.group,
                ((better,), (worse,)),
                id=f"j{own.id}",
                shown=shown,
                stamp=Stamp(source="judge", version="v1"),
            )
        )
    ledger.add_feedback(said)
    [section] = [s for s in audit(ledger, "run", own=["judge"]) if s.title == "Biases of judges"]
    assert any("family" in line for line in section.lines), section.lines


def test_an_estimate_is_of_the_prompts_that_the_run_then_sends(
    model_folder: Any, tmp_path: Path
) -> None:
    with ModelServer(answered) as server:
        model = {"provider": "openai", "model": "gpt-5-mini", "url": f"{server.url}/v1"}
        judge = {
            "judge": "rubric",
            "name": "good",
            "model": model,
            "rubric": "Was it good?",
            "cache": False,
            "canaries": 0,
        }
        stage = {
            "env": ECHO,
            "updates": 3,
            "groups": 4,
            "group_size": 4,
            "max_new_tokens": 5,
            "poll": 0,
            "feedback": [judge],
        }
        config = {"policy": str(model_folder()), "stages": [{"rl": stage}]}
        [found] = estimate(turnwise.Run(config, folder=tmp_path / "run"))
        [short] = estimate(turnwise.Run(config, folder=tmp_path / "run"), sample=0)
        assert server.count() == 0
        assert not (tmp_path / "run").exists()
        assert short.questions == found.questions
        assert 0 < (short.dollars or 0) < (found.dollars or 0)
        run = turnwise.Run(config, folder=tmp_path / "run").finish()
        spent = sum(a.stamp.cost for a in run.ledger.feedback(run=run.id, late=True))
        assert found.questions == server.count() == 48
        assert spent < (found.most or 0)
        assert (found.stage, found.judge, found.model) == ("rl", "good", "openai:gpt-5-mini")
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config))
    shown = command(["estimate", str(tmp_path / "p.yaml"), "--json"], turnwise.Plugins())
    assert json.loads(shown)[0]["questions"] == 48


def test_a_dry_run_says_what_it_would_pay_at_least(tmp_path: Path) -> None:
    """Without the policy, which is not loaded; a judge whose price is unknown says so."""
    judge = {"judge": "rubric", "rubric": "Was it good?"}
    stage = {
        "env": "turnwise/SupportDesk-v0", "updates": 1000, "groups": 4, "group_size": 4,
        "feedback": [
            {**judge, "name": "dear", "budget": 1.5,
             "model": {"provider": "openai", "model": "gpt-5-mini", "api_key": "k"}},
            {**judge, "name": "own", "share": 0.5, "required": False,
             "model": {"provider": "openai", "model": "ours", "api_key": "k"}},
        ],
    }  # fmt: skip
    (tmp_path / "p.yaml").write_text(
        yaml.safe_dump({"policy": "somebody/elses", "stages": [{"rl": stage}]})
    )
    done = Command("run", str(tmp_path / "p.yaml"), "--dry-run", cwd=tmp_path).wait()
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    paid = re.search(
        r"rl: dear asks openai:gpt-5-mini 16,000 questions, about \$([\d.]+); the run pauses"
        r" before it pays \$1.50", shown
    )  # fmt: skip
    assert paid, shown
    # Answers of 250 tokens at two dollars a million, and instructions of some hundred tokens.
    assert 8.0 < float(paid[1]) < 12.0
    assert "rl: own asks openai:ours 8,000 questions, whose price is unknown" in shown


def test_an_estimate_needs_no_key_and_knows_what_goes_up(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent, so no key is asked for; an escalation lets a tenth up."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    second = {"judge": "rubric", "model": "openai:gpt-5-mini", "rubric": "Was it good?"}
    judge = {"judge": "escalation", "first": "length", "then": second, "unsure": 0.6, "limit": 0.1}
    stage = {"env": "turnwise/SupportDesk-v0", "updates": 10, "groups": 4, "group_size": 5,
             "max_new_tokens": 4, "feedback": [judge]}  # fmt: skip
    (tmp_path / "p.yaml").write_text(
        yaml.safe_dump({"policy": str(model_folder()), "stages": [{"rl": stage}]})
    )
    done = Command("estimate", str(tmp_path / "p.yaml"), "--json", cwd=tmp_path).wait()
    assert done.returncode == 0, done.stderr
    assert [each["questions"] for each in json.loads(done.stdout)] == [20]


def test_a_dry_run_names_users_that_a_model_plays(tmp_path: Path) -> None:
    scenarios = tmp_path / "users.jsonl"
    scenarios.write_text('{"profile": "You want tea.", "opening": "Hello"}\n')
    kwargs = {"user": "openai:gpt-5", "scenarios": str(scenarios)}
    users = {"id": "turnwise/SimulatedUser-v0", "kwargs": kwargs}
    stage = {"env": users, "updates": 1, "feedback": ["length"]}
    (tmp_path / "p.yaml").write_text(
        yaml.safe_dump({"policy": "somebody/elses", "stages": [{"rl": stage}]})
    )
    done = Command("run", str(tmp_path / "p.yaml"), "--dry-run", cwd=tmp_path,
                   env={"OPENAI_API_KEY": "k-test"}).wait()  # fmt: skip
    assert "rl: openai:gpt-5 plays the users of turnwise/SimulatedUser-v0" in done.stdout, (
        done.stderr
    )


@pytest.mark.parametrize(("temperature", "samples"), [(1.0, 1), (0.0, 1), (1.0, 2)])
def test_an_estimate_has_the_judges_of_evaluate(
    temperature: float, samples: int, model_folder: Any, tmp_path: Path
) -> None:
    """One that compares is shown each pair in both orders, one for the best of n scores all."""
    with ModelServer(example) as server:
        asked = {
            "model": {"provider": "openai", "model": "gpt-5-mini", "url": f"{server.url}/v1"},
            "rubric": "Was it good?", "canaries": 0,
        }  # fmt: skip
        stage = {
            "env": ECHO, "episodes": 6, "max_new_tokens": 5, "poll": 0.0,
            "temperature": temperature,
            "players": ["policy", {"name": "other", "policy": str(model_folder("gpt2"))}],
            "judge": {"judge": "pairwise", "samples": samples, **asked},
        }  # fmt: skip
        if temperature:
            stage["best_of"] = {"judge": {"judge": "rubric", **asked}, "n": [1, 3]}
        config = {"policy": str(model_folder()), "stages": [{"evaluate": stage}]}
        found = estimate(turnwise.Run(config, folder=tmp_path / "run"))
        assert server.count() == 0
        wanted = [2 * 6 * samples, *([3 * 6] if temperature else [])]
        assert [each.questions for each in found] == wanted
        turnwise.Run(config, folder=tmp_path / "run").finish()
        # What is the same word for word is not asked again.
        assert 0.6 * sum(wanted) <= server.count() <= sum(wanted)


class FirstShown(Model):
    """A model that takes the first of two for the better with a stated chance, and the one with
    fewer words otherwise."""

    name, settings = "test:first", {}

    def __init__(self, bias: float) -> None:
        self.bias, self.chance = bias, random.Random(3)

    async def ask(self, prompt: Prompt) -> Reply:
        ids = prompt.bound["properties"]["better"]["enum"]
        one, other = (block.count("word") for block in prompt.user.split("Conversation ")[1:])
        better = ids[0] if one < other or self.chance.random() < self.bias else ids[1]
        told = {
            "verdict_id": prompt.bound["properties"]["verdict_id"]["enum"][0],
            "rationale": "-",
            "abstain": False,
            "better": better,
        }
        return Reply("end", json.dumps(told), Usage(10, 0, 0, 5))


@pytest.mark.parametrize("bias", [0.0, 0.1, 0.2])
def test_a_planted_position_bias_is_measured_within_three_points(
    bias: float, tmp_path: Path
) -> None:
    """Through the judge and the ledger: 1000 pairs in both orders."""
    from turnwise.engine.analysis.positions import position

    ledger = Ledger(tmp_path / "ledger.sqlite")
    # What is heard differs from pair to pair, or the judge would be asked only once.
    episodes = [
        wordy(i, 3 + i % 2 * 4 + i // 2 % 3, group=i // 2, heard=f"Hello {i // 2}?")
        for i in range(2000)
    ]
    judge = PairwiseJudge(
        model=FirstShown(bias), rubric="Shorter is better.", cache=False, canaries=0, concurrency=64
    )
    judge.open(Context("judge", tmp_path / "run", ledger.clock, 0))
    judge.request(
        [
            Request("group", a.group, "judge", episodes=(a, b))
            for a, b in zip(episodes[::2], episodes[1::2], strict=True)
        ]
    )
    answers: list[Any] = []
    while len(answers) < 1000:
        answers += judge.receive()
    found = position(answers)
    assert found is not None
    assert abs(found.estimate - bias) < 0.03
    assert sum(a.details["flipped"] for a in answers) / 1000 == pytest.approx(bias, abs=0.03)
    if bias == 0:
        assert all(
            a.ranking == ((x.id,), (y.id,))
            for a, x, y in zip(answers, episodes[::2], episodes[1::2], strict=True)
        )


def test_scores_at_equal_length_take_off_what_length_alone_earned() -> None:
    """A judge that adds 0.1 per word: what is left is what it says of the rest, learned from the
    updates before."""
    chance = random.Random(0)
    plain, controlled = Weighted({"judge": 1.0}), Weighted({"judge": 1.0}, length_control=["judge"])
    assert plain.state_dict() == {} == plain.metrics()
    for update in range(30):
        group = [wordy(8 * update + i, chance.randrange(1, 20), group=update) for i in range(8)]
        true = {e.id: chance.gauss(0, 1) for e in group}
        said = [
            Feedback(
                e.id,
                score=true[e.id] + 0.1 * len(e.turns[0].action.split()),
                id=e.id,
                stamp=Stamp(source="judge"),
            )
            for e in group
        ]
        controlled.fit(said)
        rewards = [r.outcome for r in controlled.combine(group, said)]
        raw = [r.outcome for r in plain.combine(group, said)]
        if update == 0:
            assert rewards == raw  # nothing is known yet
    again = Weighted({"judge": 1.0}, length_control=["judge"])
    again.load_state_dict(json.loads(json.dumps(controlled.state_dict())))
    assert [r.outcome for r in again.combine(group, said)] == rewards
    assert sum(rewards) == pytest.approx(sum(raw))
    words = [len(e.turns[0].action.split()) for e in group]
    spread = lambda values: max(values) - min(values)  # noqa: E731
    left = [r - true[e.id] for r, e in zip(rewards, group, strict=True)]
    before = [r - true[e.id] for r, e in zip(raw, group, strict=True)]
    assert spread(left) < 0.6 * spread(before), (words, left, before)
    with pytest.raises(ValueError, match="Did you mean 'judge'"):
        Weighted({"judge": 1.0}, length_control=["juge"])


def test_a_request_of_another_rater_slot_is_another_question(tmp_path: Path) -> None:
    asked: list[str] = []

    class Counting(FirstShown):
        async def ask(self, prompt: Prompt) -> Reply:
            asked.append(prompt.user)
            fields = prompt.bound["properties"]
            told = {
                "verdict_id": fields["verdict_id"]["enum"][0],
                "rationale": "",
                "abstain": False,
                "levels": {"overall": 2},
            }
            return Reply("end", json.dumps(told))

    judge = RubricJudge(model=Counting(0), rubric="?", canaries=0)
    judge.open(Context("judge", tmp_path / "run", lambda: 0.0, 0))
    e = wordy(1, 3)
    judge.request([Request("episode", e.id, "judge", slot, episodes=(e,)) for slot in (0, 1)])
    answers: list[Any] = []
    while len(answers) < 2:
        answers += judge.receive()
    assert len(asked) == 2
    assert len({a.stamp.request for a in answers}) == 2


def test_a_way_of_judging_with_a_mistake_in_it_fails_and_says_so(tmp_path: Path) -> None:
    """Whichever part raises, the answer is a failure with its request and what it cost; nothing
    hangs and nothing is scored."""

    class Broken(RubricJudge):
        where = ""

        def calls(self, request: Request) -> Any:
            if self.where == "calls":
                raise KeyError("calls")
            return super().calls(request)

        def _read(self, *args: Any) -> Any:
            if self.where == "read":
                raise KeyError("read")
            return super()._read(*args)

        def answer(self, *args: Any) -> Any:
            raise KeyError("answer")

    class Levels(FirstShown):
        async def ask(self, prompt: Prompt) -> Reply:
            fields = prompt.bound["properties"]
            told = {
                "verdict_id": fields["verdict_id"]["enum"][0],
                "rationale": "",
                "abstain": False,
                "levels": {"overall": 2},
            }
            return Reply("end", json.dumps(told), Usage(100, 0, 0, 10))

    for where, cost in (("calls", 0.0), ("read", 120e-6), ("answer", 120e-6)):
        judge = Broken(model=Levels(0), rubric="?", cache=False, prices={"test:first": [1.0, 2.0]})
        judge.where = where
        [said] = judge.ask([wordy(1, 3)], tmp_path)
        assert (said.status, said.reason) == ("failed", f"KeyError: {where!r}")
        assert said.id
        assert said.stamp.request
        assert said.stamp.cost == pytest.approx(cost)
