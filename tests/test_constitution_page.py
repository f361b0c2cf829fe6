"""docs/constitution.md: its configs run, in small, with a simulated model in the place of the one
that costs money."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import turnwise
import yaml
from support.episodes import NO_RUN, conversation

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "constitution.md").read_text()
CONFIGS = [
    yaml.safe_load(text)
    for text in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
]
SMALL = {"updates": 1, "groups": 3, "group_size": 2, "max_new_tokens": 4, "epochs": 1, "members": 1}


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import simulated_judge

    yield simulated_judge
    sys.modules.pop("simulated_judge")


def small(config: Mapping[str, Any], model: Any, policy: Path) -> dict[str, Any]:
    """The same with fewer of everything, and another model; paths are those of the repository."""

    def made(value: Any) -> Any:
        if isinstance(value, list):
            return [made(each) for each in value]
        if not isinstance(value, dict):
            return value
        own = {
            key: min(SMALL[key], each) if key in SMALL else made(each)
            for key, each in value.items()
        }
        if "constitution" in own and "model" in own:
            own |= {
                "model": model,
                "constitution": str(ROOT / own["constitution"]),
                "prices": {"simulated:desk": [1, 1]},
            }
        return own

    return {**made(config), "policy": str(policy), "threads": 1}


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_the_configs_of_the_page_run(
    number: int, simulated: Any, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    assert len(CONFIGS) == 3
    model = simulated.SimulatedModel()
    run = turnwise.Run(
        small(CONFIGS[number], model, model_folder()), folder=tmp_path / "r"
    ).finish()
    assert not run.paused
    assert [m["stage"] for m in run.metrics] == [
        next(iter(stage)) for stage in CONFIGS[number]["stages"]
    ]
    first = run.metrics[0]
    assert min(model.words, first["spend"]) > 0
    bad = first.get("critic_failures", 0) + first.get("failed_comparisons", 0)
    assert bad == 0, "its answers are in the form that was asked"
    assert first.get("conversations") == 3 or first["comparisons"] >= 3


def parcel(*replies: str, slot: int = 0) -> turnwise.Episode:
    """Builds what the simulated judge knows the facts of: a parcel of last week did not come and
    should be traced."""
    heard = [
        "Hello, this is about my lamp. The parcel did not come.",
        "I ordered it last week.",
        "As I said before.",
    ]
    where = {"id": f"e{slot}", "env": "x/Y-v0", "seed": 0, "slot": slot}
    return conversation(*replies, heard=heard[: len(replies)], **where, **NO_RUN)


@pytest.mark.parametrize(
    ("principle", "better", "worse"),
    [
        (
            "rules",
            ["When did you buy it?", "I will trace the parcel."],
            ["When did you buy it?", "I will refund your money."],
        ),
        # a guess, however lucky
        (
            "rules",
            ["When did you buy it?", "I will trace the parcel."],
            ["I will trace the parcel."],
        ),
        ("listen", ["I will trace the parcel."], ["What went wrong with it?"]),
        ("economy", ["When did you buy it?"], ["Have you opened the box?"]),
        ("clarity", ["We will repair it for free."], ["Well."]),
        (
            "listen",
            ["Have you opened the box?"],
            ["Have you opened the box?", "When did you buy it?", "When did you buy it?"],
        ),
    ],
)
def test_the_simulated_judge_follows_the_one_principle(
    principle: str, better: list[str], worse: list[str], simulated: Any, tmp_path: Path
) -> None:
    """Through the judge's own prompts and parsers, in both orders, whatever else is right or wrong;
    and it errs where it is told to."""
    whole = turnwise.judges.Constitution.load(simulated.CONSTITUTION, ["better"])
    only = turnwise.judges.Constitution(
        "one", tuple(p for p in whole.principles if p.name == principle), whole.text
    )
    good, bad = parcel(*better), parcel(*worse, slot=1)
    judge = turnwise.judges.ConstitutionJudge(
        model=simulated.SimulatedModel(error=0.0), constitution=only, soft="logprobs", cache=False
    )
    [answer] = judge.ask([good, bad], tmp_path)
    assert answer.ranking == ((good.id,), (bad.id,))
    assert answer.probability > 0.7
    assert answer.details["principle"] == principle
    assert not answer.details["flipped"]


def test_the_simulated_judge_errs_as_often_as_stated(simulated: Any, tmp_path: Path) -> None:
    """Of 300 conversations that resolve wrongly at the first word, a random level is right half the
    time."""
    rubric = {
        "name": "r",
        "criteria": [{"name": "resolved", "question": "?", "levels": ["no", "yes"]}],
    }
    asked = [
        conversation(
            "I will refund your money.",
            heard=f"Hello {k}.",
            id=f"e{k}",
            env="x/Y-v0",
            seed=k,
            **NO_RUN,
        )
        for k in range(300)
    ]
    for error, low, high in ((0.0, 0, 0), (0.4, 40, 80), (1.0, 125, 175)):
        judge = turnwise.judges.RubricJudge(
            model=simulated.SimulatedModel(error=error), rubric=rubric, cache=False, concurrency=64
        )
        wrong = sum(answer.score for answer in judge.ask(asked, tmp_path))
        assert low <= wrong <= high
