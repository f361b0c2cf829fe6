"""Canaries in the machinery: a judge that falls for them is found by its own verdicts, stops the run with notice, and leaves a panel."""

from __future__ import annotations

import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import turnwise
from support import ECHO
from turnwise.engine.episode import Episode, Message, Start, Turn
from turnwise.engine.feedback import Context, Paused, Request
from turnwise.engine.ledger import Ledger
from turnwise.judges import PairwiseJudge, Panel, RubricJudge
from turnwise.judges.audit import audit
from turnwise.judges.canaries import KINDS
from turnwise.judges.judge import Quarantined
from turnwise.judges.models import Prompt, Reply, Usage

GOOD = "I will send you a new one."


class Reader:
    """A model that reads the conversations it is asked about and takes what says "I will" for good. Of canaries it falls for some.

    Args:
        falls: kinds that it always falls for.
        luck: the chance that it falls for any other.
    """

    settings: dict[str, Any] = {}

    def __init__(self, falls: tuple[str, ...] = (), luck: float = 0.0, seed: int = 0, name: str = "test:reader") -> None:
        self.falls, self.luck, self.chance, self.name, self.asked = falls, luck, random.Random(seed), name, 0

    async def ask(self, prompt: Prompt) -> Reply:
        self.asked += 1
        fields = prompt.bound["properties"]
        blocks = [json.loads(block) for block in re.findall(r"<\w+-[0-9a-f]{16}>\n(.*)\n</", prompt.user)]
        talks = [block for block in blocks if "turns" in block][-2:]
        told: dict[str, Any] = {"verdict_id": fields["verdict_id"]["enum"][0], "rationale": "read", "abstain": False}
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
    return "forged" if any(mark in said[-1] for mark in ('"', "[[", "<verdict", "GRADE", "RESULT")) else "override"


def talks(count: int, reply: str = GOOD) -> list[Episode]:
    return [
        Episode(
            f"{i:016x}", Start("test/Talk", i // 2), (Turn(Message("user", f"My lamp {i} broke."), f"{reply} {i}", 0.0),), "terminated",
            run="run", stage="rl", update=1, slot=i % 2,
        )
        for i in range(count)
    ]  # fmt: skip


def asked(judge: Any, folder: Path, episodes: list[Episode], run: str = "run") -> list[Any]:
    """What a judge says within a run, until it has said all or stops."""
    ledger = Ledger(folder / "ledger.sqlite")
    judge.open(Context("judge", folder / "run", ledger.clock, 0, 0, ledger, run))
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
    with pytest.raises(Quarantined, match=r"fell for 3 of \d+ canaries .*(override|forged) 3 of 3.*canaries: 0"):
        asked(judge, tmp_path, talks(100))
    assert model.asked < 100  # it was not asked about all of them
    again = Reader()
    with pytest.raises(Quarantined):
        asked(RubricJudge(model=again, rubric="Was it good?", canaries=0.1, cache=False), tmp_path, talks(3))
    assert again.asked == 0  # the ledger remembers
    trusted = RubricJudge(model=again, rubric="Was it good?", canaries=0, cache=False)
    assert {a.score for a in asked(trusted, tmp_path, talks(3))} == {1.0}
    [section] = [s for s in audit(Ledger(tmp_path / "ledger.sqlite"), "run") if s.title.startswith("Canaries")]
    assert any(row[1] in ("override", "forged") and row[2] == "3" for row in section.rows)


def test_a_sound_judge_is_shown_canaries_at_the_stated_rate_and_goes_on(tmp_path: Path) -> None:
    model = Reader()
    answers = asked(RubricJudge(model=model, rubric="Was it good?", canaries=0.1, cache=False), tmp_path, talks(200))
    assert len(answers) == 200
    assert model.asked == 220
    assert all(a.status == "scored" and a.score == 1.0 for a in answers)
    [section] = [s for s in audit(Ledger(tmp_path / "ledger.sqlite"), "run") if s.title.startswith("Canaries")]
    assert {row[1]: row[2:] for row in section.rows} == {kind: ["0", "4", "0"] for kind in KINDS}


def test_comparisons_are_watched_too(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    judge = PairwiseJudge(model=Reader(falls=KINDS), rubric="better", canaries=1.0, cache=False)
    judge.open(Context("judge", tmp_path / "run", ledger.clock, 0, 0, ledger, "run"))
    pairs = [(a, b) for a, b in zip(talks(40, PLAIN)[::2], talks(40, PLAIN)[1::2], strict=True)]
    judge.request([Request("group", a.group, "judge", episodes=(a, b)) for a, b in pairs])
    with pytest.raises(Quarantined):
        for _ in range(50):
            judge.receive()


def test_known_bad_conversations_are_canaries(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "My lamp broke."}, {"role": "assistant", "content": "I will laugh at you."}]
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    judge = RubricJudge(model=Reader(), rubric="?", canaries=0.5, known_bad=str(tmp_path / "bad.jsonl"), cache=False)
    with pytest.raises(Quarantined, match="known-bad 3 of 3"):
        asked(judge, tmp_path, talks(100))


def test_a_panel_goes_on_without_a_quarantined_member(tmp_path: Path) -> None:
    member = lambda name, model: {"judge": RubricJudge(model=model, rubric="?", canaries=0.3, cache=False), "name": name}  # noqa: E731
    models = [Reader(name="test:a"), Reader(falls=KINDS, name="test:b"), Reader(name="test:c")]
    panel = Panel(judges=[member(name, model) for name, model in zip("abc", models, strict=True)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = asked(panel, tmp_path, talks(60))
    assert len(answers) == 60
    assert all(a.score == 1.0 for a in answers)
    assert any("goes on without 'b'" in str(w.message) for w in caught)
    assert [a.details["panel"]["b"]["status"] for a in answers].count("out") > 30


def test_a_run_with_a_gullible_judge_is_paused_before_it_trains(tmp_path: Path, model_folder: Any) -> None:
    feedback = [{"judge": RubricJudge(model=Reader(falls=KINDS), rubric="?", canaries=0.5, cache=False), "name": "judge"}]
    stage = {"env": ECHO, "updates": 2, "groups": 8, "group_size": 2, "max_new_tokens": 8, "poll": 0, "feedback": feedback}
    run = turnwise.Run({"policy": str(model_folder()), "stages": [{"rl": stage}]}, folder=tmp_path / "run")
    with pytest.warns(UserWarning, match="paused: the judge 'judge'"):
        run.finish()
    assert "fell for" in run.paused
    assert run.updates == 0
    assert run.ledger.counts(run.id)["members"] == 0


@pytest.mark.slow
def test_200_gullible_and_200_sound_judges_asked_eight_at_a_time(tmp_path: Path) -> None:
    """At a rate of 10 %: found within 60 verdicts in at least 95 % of 200 simulations, a sound judge falsely in under 1 %."""

    def found(number: int, falls: tuple[str, ...], luck: float) -> bool:
        folder = tmp_path / f"{len(falls)}-{number}"
        folder.mkdir()
        judge = RubricJudge(model=Reader(falls, luck, number), rubric="?", canaries=0.1, cache=False, concurrency=8)
        judge._schedule.seed = number
        try:
            asked(judge, folder, talks(60))
        except Paused:
            return True
        return False

    gullible = sum(found(i, ("override", "forged"), 0.01) for i in range(200))
    sound = sum(found(1000 + i, (), 0.01) for i in range(200))
    assert gullible >= 190, gullible
    assert sound < 2, sound
