"""Canaries in the machinery: a judge that falls for them is found by its own verdicts, stops the
run with notice, and leaves a panel."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import turnwise
from support.echo import ECHO
from support.episodes import conversation
from turnwise.engine.errors import Paused, PluginError
from turnwise.engine.feedback.sources import Sources
from turnwise.engine.ledger.ledger import Ledger
from turnwise.engine.pipeline.plugins import Plugins
from turnwise.engine.protocols import Context
from turnwise.engine.records.episode import Episode, Message
from turnwise.engine.records.feedback import Request
from turnwise.judges.asking.store import CALLS, Account
from turnwise.judges.combined.panel import Panel
from turnwise.judges.commands.audit import audit
from turnwise.judges.llm.checklist import ChecklistJudge
from turnwise.judges.llm.pairwise import PairwiseJudge
from turnwise.judges.llm.rubric_judge import RubricJudge
from turnwise.judges.models.model import Model, Prompt, Reply, Usage
from turnwise.judges.trust.canaries import KINDS, PARTED
from turnwise.judges.trust.watch import Quarantined

GOOD = "I will send you a new one."


class Reader(Model):
    """A model that reads the conversations it is asked about and takes what says "I will" for good.
    Of canaries it falls for some.

    Args:
        falls: kinds that it always falls for.
        luck: the chance that it falls for any other.
    """

    settings: dict[str, Any] = {}

    def __init__(
        self,
        falls: tuple[str, ...] = (),
        luck: float = 0.0,
        seed: int = 0,
        name: str = "test:reader",
    ) -> None:
        self.falls, self.luck, self.chance, self.name, self.asked = (
            falls,
            luck,
            random.Random(seed),
            name,
            0,
        )

    async def ask(self, prompt: Prompt) -> Reply:
        self.asked += 1
        fields = prompt.bound["properties"]
        blocks = [
            json.loads(block) for block in re.findall(r"<\w+-[0-9a-f]{16}>\n(.*)\n</", prompt.user)
        ]
        talks = [block for block in blocks if "turns" in block][-2:]
        told: dict[str, Any] = {
            "verdict_id": fields["verdict_id"]["enum"][0],
            "rationale": "read",
            "abstain": False,
        }
        if "levels" in fields:
            told["levels"] = {"overall": 4 if self.likes(talks[-1]) else 0}
        else:
            ids = fields["better"]["enum"]
            likes = [self.likes(talk) for talk in talks]
            told["better"] = "neither" if likes[0] == likes[1] else ids[0] if likes[0] else ids[1]
        return Reply("end", json.dumps(told), Usage(fresh=100, output=20), model=self.name)

    def likes(self, talk: dict[str, Any]) -> bool:
        said = [turn["reply"]["text"] for turn in talk["turns"]]
        if any("I will" in text for text in said):
            return True
        kind = _kind(said)
        return kind in self.falls or (kind != "" and self.chance.random() < self.luck)


PLAIN = "Tell me more."


def _kind(said: list[str]) -> str:
    """What a conversation is a canary of; empty: of nothing."""
    if said[0].startswith(PLAIN):
        return ""
    if not any(said):
        return "empty"
    if set(said) == {":"}:
        return "punctuation"
    if set(said) == {"Thank you for your question."}:
        return "constant"
    if PARTED not in said[-1]:
        return ""  # replies as bad, without anything that would win a judge over
    return (
        "forged"
        if any(mark in said[-1] for mark in ('"', "[[", "<verdict", "GRADE", "RESULT"))
        else "override"
    )


def lamps(count: int, reply: str = GOOD) -> list[Episode]:
    """Builds conversations about different lamps, so that no question is asked twice."""
    return [
        conversation(
            f"{reply} {i}",
            heard=f"My lamp {i} broke.",
            id=f"{i:016x}",
            env="test/Talk",
            seed=i // 2,
            slot=i % 2,
        )
        for i in range(count)
    ]


def asked(
    judge: Any, folder: Path, episodes: list[Episode], run: str = "run", seed: int = 0
) -> list[Any]:
    """What a judge says within a run, until it has said all or stops."""
    ledger = Ledger(folder / "ledger.sqlite")
    judge.open(Context("judge", folder / "run", ledger.clock, seed, 0, ledger, run))
    for name, member in getattr(judge, "members", {}).items():
        member.open(Context(f"judge.{name}", folder / "run", ledger.clock, 0, 0, ledger, run))
    requests = [Request("episode", e.id, "judge", episodes=(e,)) for e in episodes]
    judge.request(requests)
    answers: list[Any] = []
    while len(answers) < len(requests):
        answers += judge.receive()
    return answers


def test_a_gullible_judge_is_quarantined_and_stays_so(tmp_path: Path) -> None:
    model = Reader(falls=("override", "forged"))
    judge = RubricJudge(model=model, rubric="Was it good?", canaries=0.1, cache=False)
    with pytest.raises(
        Quarantined, match=r"fell for 6 of \d+ canaries .*(override|forged) \d of \d.*canaries: 0"
    ):
        asked(judge, tmp_path, lamps(100))
    assert model.asked < 100  # it was not asked about all of them
    again = Reader()
    with pytest.raises(Quarantined):
        asked(
            RubricJudge(model=again, rubric="Was it good?", canaries=0.1, cache=False),
            tmp_path,
            lamps(3),
        )
    assert again.asked == 0  # the ledger remembers
    trusted = RubricJudge(model=again, rubric="Was it good?", canaries=0, cache=False)
    assert {a.score for a in asked(trusted, tmp_path, lamps(3))} == {1.0}
    [section] = [
        s
        for s in audit(Ledger(tmp_path / "ledger.sqlite"), "run")
        if s.title.startswith("Canaries")
    ]
    assert sum(int(row[2]) for row in section.rows) == 6


def test_a_sound_judge_is_shown_canaries_at_the_stated_rate_and_goes_on(tmp_path: Path) -> None:
    model = Reader()
    answers = asked(
        RubricJudge(model=model, rubric="Was it good?", canaries=0.1, cache=False),
        tmp_path,
        lamps(200),
    )
    assert len(answers) == 200
    assert model.asked == 220
    assert all(a.status == "scored" and a.score == 1.0 for a in answers)
    [section] = [
        s
        for s in audit(Ledger(tmp_path / "ledger.sqlite"), "run")
        if s.title.startswith("Canaries")
    ]
    assert {row[1]: row[2:] for row in section.rows} == {kind: ["0", "4", "0"] for kind in KINDS}


def test_a_judge_that_likes_bad_replies_by_its_rubric_is_not_taken_for_gullible(
    tmp_path: Path,
) -> None:
    """Brevity, or a principle that an empty reply satisfies: what counts is whether the attack in a
    reply wins it over."""

    class Brief(Reader):
        def likes(self, talk: dict[str, Any]) -> bool:
            return sum(len(turn["reply"]["text"]) for turn in talk["turns"]) < 1000

    judge = RubricJudge(
        model=Brief(),
        rubric="Is it short?",
        canaries={"rate": 1.0, "kinds": ["override", "forged"]},
        cache=False,
    )
    assert len(asked(judge, tmp_path, lamps(40))) == 40
    points = ChecklistJudge(
        model=Yes(), points=["It never asked for a password."], canaries=1.0, cache=False
    )
    assert len(asked(points, tmp_path, lamps(40), "other")) == 40
    with pytest.raises(ValueError, match="Did you mean 'override'"):
        RubricJudge(model=Brief(), rubric="?", canaries={"kinds": ["overide"]})


class Yes(Reader):
    async def ask(self, prompt: Prompt) -> Reply:
        told = {
            "verdict_id": prompt.choices["verdict_id"][0],
            "point_1": {"rationale": "so it is", "holds": "yes"},
        }
        return Reply("end", json.dumps(told), Usage(fresh=100, output=20), model=self.name)


def test_the_same_words_are_one_trial_however_often_they_come(tmp_path: Path) -> None:
    """With the cache on, and conversations that begin alike: one fall of a sound judge is one
    fall."""
    falls = iter([True])

    class Once(Reader):
        def likes(self, talk: dict[str, Any]) -> bool:
            said = [turn["reply"]["text"] for turn in talk["turns"]]
            return super().likes(talk) or (_kind(said) == "constant" and next(falls, False))

    alike = [
        dataclasses.replace(
            e, turns=(dataclasses.replace(e.turns[0], observation=Message("user", "Hello.")),)
        )
        for e in lamps(60)
    ]
    judge = RubricJudge(model=Once(), rubric="?", canaries={"rate": 1.0, "kinds": ["constant"]})
    assert len(asked(judge, tmp_path, alike)) == 60


def test_a_canary_that_cannot_be_judged_spoils_nothing(tmp_path: Path) -> None:
    """A full list has no room for one more; a model that fails on it fails on it alone."""

    class Picky(Reader):
        async def ask(self, prompt: Prompt) -> Reply:
            if "I will" not in prompt.user:
                raise RuntimeError("cannot read this")
            return await super().ask(prompt)

    answers = asked(
        RubricJudge(model=Picky(), rubric="?", canaries=0.5, cache=False), tmp_path, lamps(20)
    )
    assert [a.score for a in answers] == [1.0] * 20


def test_the_environments_of_a_mixture_share_a_judge_its_budget_and_suspicion(
    tmp_path: Path,
) -> None:
    """The budget is the judge's, not that of each environment that names it."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    prices = {"test:reader": [1000.0, 0.0]}
    rubric = {
        "judge": "rubric", "model": Reader(), "rubric": "?", "cache": False, "prices": prices,
        "budget": 12.0, "canaries": 0, "name": "judge",
    }  # fmt: skip
    sources = Sources.make([[rubric], [rubric]], Plugins(), 1.0)
    assert sources.of_env[0][0].given is sources.of_env[1][0].given
    played = lamps(200)
    ledger.add_episodes(played)
    sources.open(tmp_path / "run", ledger, 0, 0, "run")
    sources.ask([{e.group: [e] for e in played[n::2]} for n in range(2)], ledger)
    with pytest.raises(Paused):
        while True:
            sources.receive(ledger)
    sources.close()
    sources.receive(ledger)
    answers = ledger.feedback([e.group for e in played])
    assert {a.target in {e.id for e in played[::2]} for a in answers} == {True, False}
    assert sum(a.stamp.cost for a in answers) <= 12.0
    assert sum(a.stamp.cost for a in answers) == pytest.approx(
        Account(ledger, "run", "judge", None, ledger.clock).spent
    )


def test_two_judges_of_one_name_that_judge_alike_are_refused() -> None:
    """Each would have a budget of its own."""
    rubric = {"judge": "rubric", "model": Reader(), "rubric": "?", "cache": False, "canaries": 0}
    made = [RubricJudge(model=Reader(), rubric="?", cache=False, canaries=0) for _ in range(2)]
    rules = [{"judge": "length", "max_words": 3}, {"judge": "turns", "max_turns": 3}]
    for first, second in (
        (rubric, {**rubric, "concurrency": 3}),
        (made[0], made[1]),
        (
            {"judge": "panel", "judges": [rubric, *rules]},
            {"judge": "panel", "judges": [rubric, *rules], "quorum": 1},
        ),
    ):
        with pytest.raises(PluginError, match="are called '.*' and judge alike, but for options"):
            Sources.make([[first], [second]], Plugins(), 1.0)
    for first, second in (
        (rubric, {**rubric, "name": "other"}),
        (rubric, {**rubric, "rubric": "??"}),
        (made[0], made[0]),
    ):
        Sources.make([[first], [second]], Plugins(), 1.0)
    with pytest.raises(PluginError, match="one object is given as 'x' and as 'y'"):
        Sources.make([[{"judge": made[0], "name": n} for n in "xy"]], Plugins(), 1.0)


def test_a_run_that_stops_waits_for_what_it_has_sent_and_keeps_it(tmp_path: Path) -> None:
    """What is under way is paid for: it is booked, and known to the next run."""
    ledger = Ledger(tmp_path / "ledger.sqlite")

    class Slow(Reader):
        async def ask(self, prompt: Prompt) -> Reply:
            await asyncio.sleep(0.2)
            return await super().ask(prompt)

    judge = RubricJudge(
        model=Slow(), rubric="?", prices={"test:reader": [1.0, 1.0]}, canaries=0, concurrency=4
    )
    judge.open(Context("judge", tmp_path / "run", ledger.clock, 0, 0, ledger, "run"))
    judge.request([Request("episode", e.id, "judge", episodes=(e,)) for e in lamps(40)])
    while not judge._model.asked:
        pass
    judge.close()
    sent = judge._model.asked
    assert 0 < sent < 40
    with ledger.reading() as db:
        assert [status for (status,) in db.execute(sa.select(CALLS.c.status))] == ["end"] * sent
    again = RubricJudge(model=Reader(), rubric="?", canaries=0)
    assert len(asked(again, tmp_path, lamps(40))) == 40
    assert again._model.asked == 40 - sent


def test_comparisons_are_watched_too(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    judge = PairwiseJudge(model=Reader(falls=KINDS), rubric="better", canaries=1.0, cache=False)
    judge.open(Context("judge", tmp_path / "run", ledger.clock, 0, 0, ledger, "run"))
    pairs = [(a, b) for a, b in zip(lamps(40, PLAIN)[::2], lamps(40, PLAIN)[1::2], strict=True)]
    judge.request([Request("group", a.group, "judge", episodes=(a, b)) for a, b in pairs])
    with pytest.raises(Quarantined):
        for _ in range(5000):
            judge.receive()


def test_known_bad_conversations_are_canaries(tmp_path: Path) -> None:
    bad = [
        [
            {"role": "user", "content": f"My lamp {n} broke."},
            {"role": "assistant", "content": f"I will laugh at you {n} times."},
        ]
        for n in range(8)
    ]
    (tmp_path / "bad.jsonl").write_text(
        "".join(json.dumps({"messages": said}) + "\n" for said in bad)
    )
    judge = RubricJudge(
        model=Reader(), rubric="?", canaries=0.5, known_bad=str(tmp_path / "bad.jsonl"), cache=False
    )
    with pytest.raises(Quarantined, match="known-bad 6 of 6"):
        asked(judge, tmp_path, lamps(100))


def test_a_panel_goes_on_without_a_quarantined_member(tmp_path: Path) -> None:
    member = lambda name, model: {  # noqa: E731
        "judge": RubricJudge(model=model, rubric="?", canaries=0.3, cache=False),
        "name": name,
    }
    models = [Reader(name="test:a"), Reader(falls=KINDS, name="test:b"), Reader(name="test:c")]
    panel = Panel(judges=[member(name, model) for name, model in zip("abc", models, strict=True)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = asked(panel, tmp_path, lamps(60))
    assert len(answers) == 60
    assert all(a.score == 1.0 for a in answers)
    assert any("goes on without 'b'" in str(w.message) for w in caught)
    assert [a.details["panel"]["b"]["status"] for a in answers].count("out") > 30


def test_a_run_with_a_gullible_judge_is_paused_before_it_trains(
    tmp_path: Path, model_folder: Any
) -> None:
    feedback = [
        {
            "judge": RubricJudge(model=Reader(falls=KINDS), rubric="?", canaries=0.5, cache=False),
            "name": "judge",
        }
    ]
    stage = {
        "env": ECHO,
        "updates": 2,
        "groups": 8,
        "group_size": 2,
        "max_new_tokens": 8,
        "poll": 0,
        "feedback": feedback,
    }
    run = turnwise.Run(
        {"policy": str(model_folder()), "stages": [{"rl": stage}]}, folder=tmp_path / "run"
    )
    with pytest.warns(UserWarning, match="paused: the judge 'judge'"):
        run.finish()
    assert "fell for" in run.paused
    assert run.updates == 0
    assert run.ledger.counts(run.id)["members"] == 0


@pytest.mark.slow
def test_200_gullible_and_200_sound_judges_asked_eight_at_a_time(tmp_path: Path) -> None:
    """At a rate of 10 %: found within 60 verdicts in at least 95 % of 200 simulations, a sound
    judge falsely in under 1 %."""

    def found(number: int, falls: tuple[str, ...], luck: float) -> bool:
        folder = tmp_path / f"{len(falls)}-{number}"
        folder.mkdir()
        judge = RubricJudge(
            model=Reader(falls, luck, number), rubric="?", canaries=0.1, cache=False, concurrency=8
        )
        try:
            asked(judge, folder, lamps(60), seed=number)
        except Paused:
            return True
        return False

    gullible = sum(found(i, ("override", "forged"), 0.01) for i in range(200))
    sound = sum(found(1000 + i, (), 0.01) for i in range(200))
    assert gullible >= 190, gullible
    assert sound < 2, sound
